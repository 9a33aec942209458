"""Chrome-trace files say what the trace says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import OrreryError
from harness.plan.actions import QUEUES
from harness.trace import Event, PhaseTrace, Trace
from harness.trace_export import chrome_trace, write_chrome_trace

#: Two stages, two micro-batches, forwards of 1 s and backwards of 2 s, transfers of 0.1 s.
EVENTS = (
    Event("a", "compute", "forward", "F0 0:1", 0.0, 1.0, 0, 0, 0),
    Event("a", "nic-out", "send", "hidden@1#0[r0:2]", 1.0, 1.1, 0, 0, 0, 800, "b"),
    Event("a", "compute", "forward", "F1 0:1", 1.0, 2.0, 0, 0, 1),
    Event("b", "nic-in", "recv", "hidden@1#0[r0:2]", 1.0, 1.1, 0, 0, 0, 800, "a"),
    Event("b", "compute", "forward", "F0 1:2", 1.1, 2.1, 0, 0, 0),
    Event("b", "compute", "backward", "B0 1:2", 2.1, 4.1, 0, 0, 0),
    Event("b", "nic-out", "send", "grad:hidden@1#0[r0:2]", 4.1, 4.2, 0, 0, 0, 800, "a"),
    Event("a", "nic-in", "recv", "grad:hidden@1#0[r0:2]", 4.1, 4.2, 0, 0, 0, 800, "b"),
    Event("a", "compute", "backward", "B0 0:1", 4.2, 6.2 + 1 / 3, 0, 0, 0),
    Event("a", "compute", "step", "step", 6.2 + 1 / 3, 6.7, 0, 1),
)
TIMELINE = {"a": ((0.0, 400), (1.0, 1200), (6.7, 400)), "b": ((1.0, 800), (4.2, 0))}
TRACE = Trace(
    mode="simulated",
    devices=("a", "b"),
    total_s=6.7,
    events=EVENTS,
    phases=(PhaseTrace("train", 1, 0.0, 6.7, 1600),),
    busy_s={},
    link_bytes={("a", "b"): 800, ("b", "a"): 800},
    peak_bytes={"a": 1200, "b": 800},
    memory_bytes={},
    memory_timeline=TIMELINE,
)


def of_kind(trace: dict, ph: str) -> list[dict]:
    return [entry for entry in trace["traceEvents"] if entry["ph"] == ph]


def test_the_file_holds_what_the_function_returns(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(TRACE, path)
    assert json.loads(path.read_text()) == chrome_trace(TRACE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]


def test_every_event_is_a_slice_on_its_device_and_queue() -> None:
    trace = chrome_trace(TRACE)
    device = {e["pid"]: e["args"]["name"] for e in of_kind(trace, "M") if e["name"] == "process_name"}
    queue = {(e["pid"], e["tid"]): e["args"]["name"] for e in of_kind(trace, "M") if e["name"] == "thread_name"}
    slices = of_kind(trace, "X")
    assert len(slices) == len(EVENTS)
    for event, entry in zip(EVENTS, slices, strict=True):
        assert device[entry["pid"]] == event.device
        assert queue[entry["pid"], entry["tid"]] == event.queue
        assert (entry["name"], entry["cat"]) == (event.label, event.kind)
        assert entry["ts"] == pytest.approx(event.start_s * 1e6, abs=5e-4)
        assert entry["dur"] == pytest.approx((event.end_s - event.start_s) * 1e6, abs=1e-3)
        assert entry["args"].get("bytes", 0) == event.nbytes
        assert entry["args"].get("peer", "") == event.peer
        assert entry["args"].get("micro_batch", -1) == event.micro_batch


def test_queues_are_in_their_order_and_only_those_in_use() -> None:
    threads = [e["args"]["name"] for e in of_kind(chrome_trace(TRACE), "M") if e["name"] == "thread_name"]
    assert threads == [*QUEUES[:3], *QUEUES[:3]]


def test_counters_are_the_memory_timeline() -> None:
    counters = of_kind(chrome_trace(TRACE), "C")
    for pid, device in enumerate(TRACE.devices, start=1):
        points = [(entry["ts"] / 1e6, entry["args"]["bytes"]) for entry in counters if entry["pid"] == pid]
        assert points == list(TIMELINE[device])


def test_entries_are_in_order_of_time_after_the_names() -> None:
    entries = chrome_trace(TRACE)["traceEvents"]
    assert isinstance(entries, list)
    num_names = len([entry for entry in entries if entry["ph"] == "M"])
    assert all(entry["ph"] == "M" for entry in entries[:num_names])
    times = [entry["ts"] for entry in entries[num_names:]]
    assert times == sorted(times)


def test_slices_that_touch_still_touch_in_whole_nanoseconds() -> None:
    slices = [entry for entry in of_kind(chrome_trace(TRACE), "X") if entry["cat"] in ("backward", "step")]
    backward, step = (entry for entry in slices if entry["pid"] == 1)
    assert round((backward["ts"] + backward["dur"]) * 1e3) == round(step["ts"] * 1e3)
    assert backward["dur"] * 1e3 == pytest.approx(round(backward["dur"] * 1e3), abs=1e-6)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OrreryError, match="can't be written"):
        write_chrome_trace(TRACE, tmp_path / "file" / "trace.json")
