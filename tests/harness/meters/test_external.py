"""Meters outside of the board: the file and the web page, both for real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from harness import meters
from harness.meters.external import FileMeter, probe
from harness.meters.measurement import EXTERNAL, Measurement, NotHere
from harness.meters.system import System
from harness.meters.window import Unreadable

HERE = System()


def file_meter(path: Path) -> FileMeter:
    found = probe(str(path), HERE)
    assert isinstance(found, FileMeter)
    return found


def test_the_last_whole_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "readings"
    path.write_text("10.5 3.25\n11.0 4.5\n11.5 9")
    assert file_meter(path).read() == (11_000_000_000, 4.5)


def test_unix_time_is_set_to_the_monotonic_clock(tmp_path: Path) -> None:
    path = tmp_path / "readings"
    path.write_text(f"{time.time():.6f} 4.5\n")
    at_ns, _ = file_meter(path).read()
    assert abs(at_ns - time.monotonic_ns()) < 0.5e9


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "it has no whole line"),
        ("11.5 9", "it has no whole line"),
        ("11.5\n", "'11.5'"),
        ("12 watts\n", "'12 watts'"),
        ("1 2 3\n", "'1 2 3'"),
        ("\n", "''"),
    ],
)
def test_what_is_no_line_of_two_numbers_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "readings"
    path.write_text(text)
    with pytest.raises(NotHere, match=rf"{path}: .*{found}.*'SECONDS WATTS'"):
        probe(str(path), HERE)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="No such file"):
        probe(str(tmp_path / "readings"), HERE)
    with pytest.raises(NotHere, match="--meter external:FILE"):
        probe(None, HERE)


@contextmanager
def logger(path: Path, watts: float, hz: float = 20.0) -> Iterator[threading.Event]:
    """Appends a line that often, as the program of a meter would, until the event is set or the block ends."""
    stop = threading.Event()

    def work() -> None:
        with path.open("a", buffering=1) as file:
            while not stop.is_set():
                file.write(f"{time.monotonic():.6f} {watts}\n")
                time.sleep(1 / hz)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not path.exists() or not path.stat().st_size:
            time.sleep(0.01)
        yield stop
    finally:
        stop.set()
        thread.join()


def window(name: str, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> Measurement:
    with meters.opened(meters.Choice(name)) as meter:
        meter.begin()
        time.sleep(seconds / 2)
        meanwhile()
        time.sleep(seconds / 2)
        return meter.end()


def test_a_window_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "readings"
    with logger(path, 4.5):
        found = window(f"external:{path}", 1.5)
    assert found.reason is None
    assert (found.energy_source, found.meter) == (EXTERNAL, f"external: {path}")
    assert found.energy_j == pytest.approx(4.5 * found.duration_s)
    assert found.duration_s == pytest.approx(1.5, abs=0.3)
    assert found.samples is not None and found.samples > 15


def test_a_logger_that_stops_rejects_the_window(tmp_path: Path) -> None:
    path = tmp_path / "readings"
    with logger(path, 4.5) as stop:
        found = window(f"external:{path}", 3.0, stop.set)
    assert found.energy_j is None
    assert found.reason is not None and "Nothing was read for" in found.reason


def test_a_file_that_vanishes_rejects_the_window(tmp_path: Path) -> None:
    path = tmp_path / "readings"
    with logger(path, 4.5):
        found = window(f"external:{path}", 1.5, path.unlink)
    assert found.energy_j is None
    assert found.reason is not None and "No such file" in found.reason


@contextmanager
def page(answer: Callable[[], bytes], status: int = 200) -> Iterator[str]:
    """A web server on loopback; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/power"
        finally:
            server.shutdown()
            thread.join()


def test_a_window_over_http() -> None:
    with page(lambda: b'{"power_w": 7.25, "voltage_v": 230}') as url:
        found = window(f"external:{url}", 3.0)
    assert found.reason is None
    assert found.energy_j == pytest.approx(7.25 * found.duration_s)
    assert (found.energy_source, found.meter) == (EXTERNAL, f"external: {url}")


@pytest.mark.parametrize(
    "answer", [b"", b"7.25", b"[7.25]", b'{"power": 7.25}', b'{"power_w": "7"}', b'{"power_w": true}']
)
def test_an_answer_without_power_is_refused(answer: bytes) -> None:
    with page(lambda: answer) as url, pytest.raises(NotHere, match=rf"{url} answers .*power_w"):
        probe(url, HERE)


def test_the_instrument_may_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "readings"
    path.write_text("# INA226 board, 10 mOhm\n11.0 4.5\n")
    assert file_meter(path).facts.meter == "external: INA226 board, 10 mOhm"
    with page(lambda: b'{"power_w": 7.25, "instrument": "plug of Monday"}') as url:
        assert probe(url, HERE).facts.meter == "external: plug of Monday"


def test_a_server_that_refuses_or_is_not_there() -> None:
    with page(lambda: b"no", status=500) as url, pytest.raises(NotHere, match="does not answer: HTTP Error 500"):
        probe(url, HERE)
    with pytest.raises(NotHere, match="does not answer"):
        probe(url, HERE)
    with pytest.raises(NotHere, match="nonnumeric port"):
        probe("http://127.0.0.1:none/", HERE)


def test_power_below_zero_rejects_the_window() -> None:
    watts = iter([5.0] * 4)
    with page(lambda: b'{"power_w": %f}' % next(watts, -5.0)) as url:
        found = window(f"external:{url}", 2.0)
    assert found.energy_j is None
    assert found.reason is not None and "-5 W" in found.reason


def test_a_server_that_stops_in_mid_window() -> None:
    def answer() -> bytes:
        return b'{"power_w": 5}' if next(left, False) else b"gone"

    left = iter([True] * 4)
    with page(answer) as url:
        meter = probe(url, HERE)
        found = window(f"external:{url}", 2.0)
        with pytest.raises(Unreadable):
            meter.read_w()
    assert found.energy_j is None
    assert found.reason is not None and "answers b'gone'" in found.reason
