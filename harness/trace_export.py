"""Traces in the Trace Event Format that Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process per device, one thread per queue, one counter for the bytes alive. Format: "Trace Event Format", Google.
"""

from __future__ import annotations

import json
from pathlib import Path

from harness.plan.actions import QUEUES
from harness.store import write_whole
from harness.trace import Event, Trace


def chrome_trace(trace: Trace) -> dict[str, object]:
    """The trace as a JSON-ready object: metadata first, then events and memory counters in order of time."""
    process = {device: index for index, device in enumerate(trace.devices, start=1)}
    used = {(event.device, event.queue) for event in trace.events}
    names: list[dict[str, object]] = []
    for device, pid in process.items():
        names.append(_metadata("process_name", pid, name=device))
        names.append(_metadata("process_sort_index", pid, sort_index=pid))
        for thread, queue in enumerate(QUEUES, start=1):
            if (device, queue) in used:
                names.append(_metadata("thread_name", pid, thread, name=queue))
                names.append(_metadata("thread_sort_index", pid, thread, sort_index=thread))
    timed = [(event.start_s, _slice(event, process[event.device])) for event in trace.events]
    for device, points in trace.memory_timeline.items():
        for time_s, nbytes in points:
            counter = {"ph": "C", "name": "memory", "ts": _microseconds(time_s), "pid": process[device]}
            timed.append((time_s, {**counter, "args": {"bytes": nbytes}}))
    timed.sort(key=lambda entry: entry[0])
    return {"traceEvents": [*names, *(entry for _, entry in timed)], "displayTimeUnit": "ms"}


def write_chrome_trace(trace: Trace, path: Path | str) -> None:
    """Write `chrome_trace(trace)` to a file, whole or not at all. OrreryError where it can't be written."""
    text = json.dumps(chrome_trace(trace), separators=(",", ":"))
    write_whole(Path(path), lambda part: part.write_text(text, encoding="utf-8"))


def _metadata(kind: str, pid: int, tid: int = 0, **args: object) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _slice(event: Event, pid: int) -> dict[str, object]:
    start, end = _microseconds(event.start_s), _microseconds(event.end_s)
    args: dict[str, object] = {"phase": event.phase, "iteration": event.iteration}
    if event.micro_batch >= 0:
        args["micro_batch"] = event.micro_batch
    if event.nbytes:
        args["bytes"] = event.nbytes
    if event.peer:
        args["peer"] = event.peer
    return {
        "ph": "X",
        "name": event.label,
        "cat": event.kind,
        "ts": start,
        "dur": round(end - start, 3),
        "pid": pid,
        "tid": QUEUES.index(event.queue) + 1,
        "args": args,
    }


def _microseconds(seconds: float) -> float:
    """Whole nanoseconds, which is what the viewers count in: slices that touch must not overlap after rounding."""
    return round(seconds * 1e9) / 1e3
