"""A meter outside of the board (USB meter, smart plug, INA219 board), through a file or HTTP: see docs/energy.md."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

from harness.meters.measurement import EXTERNAL, Facts, NotHere
from harness.meters.sampler import Watch, sampled, timed
from harness.meters.system import System
from harness.meters.window import MOST_GAP_S, Unreadable, Window

RATE_HZ = 20.0
#: A web page per reading: gentle with the small web servers of plugs.
HTTP_RATE_HZ = 5.0
#: Seconds since boot never reach this, and Unix time has been beyond it since 2001.
FIRST_UNIX_S = 1e9
#: More than two lines of any meter.
TAIL_BYTES = 512
#: An answer is one number.
MOST_ANSWER_BYTES = 65536
#: A meter is in the same room, whatever proxy leads out of the house.
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class FileMeter:
    """The last whole line of a file that another program appends to: seconds and watts."""

    facts: Facts
    path: str

    def read(self) -> tuple[int, float]:
        """The time of the reading on the monotonic clock in ns, and W."""
        with open(self.path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            whole, newline, _ = file.read(TAIL_BYTES).rpartition(b"\n")
        line = whole.rpartition(b"\n")[2].decode(errors="replace")
        try:
            seconds, watts = map(float, line.split())
        except ValueError:
            found = f"its last line is {line!r}" if newline else "it has no whole line"
            raise Unreadable(f"{self.path}: {found}. Allowed is 'SECONDS WATTS', such as '1234.56 7.89'.") from None
        if seconds >= FIRST_UNIX_S:
            seconds -= time.time() - time.monotonic()
        return round(seconds * 1e9), watts

    def instrument(self) -> str | None:
        """What the first line says it is, if that is `# NAME`."""
        with open(self.path, "rb") as file:
            first = file.readline(TAIL_BYTES).decode(errors="replace").strip()
        return first[1:].strip() if first.startswith("#") else None

    def window(self, watch: Watch) -> Window:
        return sampled(self.read, RATE_HZ, watch)


@dataclass(frozen=True)
class HttpMeter:
    """A page that answers GET with {"power_w": number}, and perhaps its "instrument"."""

    facts: Facts
    url: str

    def read_w(self) -> float:
        return self._answer()[0]

    def instrument(self) -> str | None:
        """What the page says it is, if anything."""
        return self._answer()[1]

    def window(self, watch: Watch) -> Window:
        return sampled(lambda: timed(self.read_w), HTTP_RATE_HZ, watch)

    def _answer(self) -> tuple[float, str | None]:
        try:
            with DIRECTLY.open(self.url, timeout=MOST_GAP_S) as answer:
                text = answer.read(MOST_ANSWER_BYTES)
        except (OSError, HTTPException) as error:  # urllib's own errors are of the system's
            raise Unreadable(f"{self.url} does not answer: {error}.") from None
        try:
            content = json.loads(text)
            power_w, instrument = content["power_w"], content.get("instrument")
            if isinstance(power_w, bool) or not isinstance(power_w, int | float):
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise Unreadable(f'{self.url} answers {text[:80]!r}. Allowed is {{"power_w": NUMBER}}.') from None
        return float(power_w), None if instrument is None else str(instrument)


def probe(argument: str | None, system: System) -> FileMeter | HttpMeter:
    """The meter behind a file or a URL: `external:readings.txt`, `external:http://127.0.0.1:8000/`."""
    if not argument:
        raise NotHere("it needs a file or a URL: --meter external:FILE or --meter external:http://HOST/PATH")
    web = argument.startswith(("http://", "https://"))
    place, rate_hz = (argument, HTTP_RATE_HZ) if web else (str(Path(argument).absolute()), RATE_HZ)
    facts = Facts(f"external: {place}", EXTERNAL, "whatever the instrument is wired to", rate_hz)
    meter = HttpMeter(facts, place) if web else FileMeter(facts, place)
    try:
        _ = meter.read_w() if isinstance(meter, HttpMeter) else meter.read()
        instrument = meter.instrument()
    except (Unreadable, OSError) as error:
        raise NotHere(str(error)) from error
    return meter if instrument is None else replace(meter, facts=replace(facts, meter=f"external: {instrument}"))
