"""What records and their files can hold, whatever users and their methods come up with."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

A_NAME = "a text of at least one character, none of them a control character"


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, keys and texts are Unicode. TypeError or ValueError for others."""
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace"))


def is_plain(value: object) -> bool:
    """Whether the value can be in a record: finite, Unicode, and of JSON's types."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def is_name(text: str) -> bool:
    """Whether the text can name something, on one line, in a file and on a terminal."""
    return bool(text) and not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)
