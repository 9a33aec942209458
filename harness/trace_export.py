"""Traces in the Trace Event Format that Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process per device, one thread per queue, one counter for the bytes alive. Format: "Trace Event Format", Google.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.errors import OrreryError
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


def read_chrome_trace(path: Path | str) -> tuple[tuple[str, ...], tuple[Event, ...]]:
    """The devices and events of a file of `write_chrome_trace`; their times are whole nanoseconds.

    Raises OrreryError where the file can't be read, or is not one of ours.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        device = {e["pid"]: e["args"]["name"] for e in entries if (e["ph"], e["name"]) == ("M", "process_name")}
        events = tuple(_event(entry, device[entry["pid"]]) for entry in entries if entry["ph"] == "X")
    except OSError as error:
        raise OrreryError(
            f"The trace {path} can't be read: {error.strerror or error}. Name another file, or run again."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise OrreryError(
            f"{path} is no trace of Orrery ({type(error).__name__}: {error}). Remove it; --force repeats its run."
        ) from error
    return tuple(device[pid] for pid in sorted(device)), events


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


def _event(entry: dict[str, Any], device: str) -> Event:
    """The inverse of `_slice`."""
    start_ns, duration_ns = round(entry["ts"] * 1e3), round(entry["dur"] * 1e3)
    args = entry["args"]
    return Event(
        device=device,
        queue=QUEUES[entry["tid"] - 1],
        kind=entry["cat"],
        label=entry["name"],
        start_s=start_ns / 1e9,
        end_s=(start_ns + duration_ns) / 1e9,
        phase=args["phase"],
        iteration=args["iteration"],
        micro_batch=args.get("micro_batch", -1),
        nbytes=args.get("bytes", 0),
        peer=args.get("peer", ""),
    )


def _microseconds(seconds: float) -> float:
    """Whole nanoseconds, which is what the viewers count in: slices that touch must not overlap after rounding."""
    return round(seconds * 1e9) / 1e3
