"""The memory ledger: every byte from the action that takes it to the action that gives it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.plan.actions import QUEUES
from harness.plan.graph import Graph
from harness.plan.values import KINDS
from harness.trace import Peak

_KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Peaks:
    """Of each device the peaks of the whole run and of each span of it, and the bytes alive after each change."""

    run: Mapping[str, Peak]
    spans: Sequence[Mapping[str, Peak]]
    timeline: Mapping[str, tuple[tuple[int, int], ...]]


class Ledger:
    """Collects what iterations take and give back (times in any integer unit), then finds the peaks.

    Changes at one instant are netted: what an ending action releases is there for the one that starts.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = tuple(devices)
        self._columns: list[np.ndarray] = []
        self._live: list[np.ndarray] = [np.zeros(len(KINDS), dtype=np.int64) for _ in devices]

    def add(
        self,
        graph: Graph,
        start: Sequence[int],
        end: Sequence[int],
        workspace: Mapping[int, tuple[int, int]],
        before: int = 0,
    ) -> None:
        """One iteration, whose node n ran from start[n] to end[n]. `before`: when all earlier ones had ended.

        `workspace[n]`: bytes of activations and of gradients at its worst moment beyond those before and after it.
        """
        rows: list[tuple[int, int, int, int]] = []
        live = [np.zeros(len(KINDS), dtype=np.int64) for _ in self._devices]
        left = [np.zeros(len(KINDS), dtype=np.int64) for _ in self._devices]
        began = self._began(graph, start, before)
        for entry in graph.allocations:
            device, kind = entry.device, _KIND_INDEX[entry.kind]
            if entry.taken < 0:
                live[device][kind] += entry.nbytes
            else:
                rows.append((end[entry.taken] if entry.at_end else start[entry.taken], device, kind, entry.nbytes))
            if entry.released is None:
                left[device][kind] += entry.nbytes
            else:
                released = max((end[node] for node in entry.released if node >= 0), default=began[device])
                rows.append((released, device, kind, -entry.nbytes))
        for node, parts in workspace.items():
            for kind, nbytes in zip((_KIND_INDEX["activations"], _KIND_INDEX["gradients"]), parts, strict=True):
                if nbytes:
                    rows.append((start[node], graph.device[node], kind, nbytes))
                    rows.append((end[node], graph.device[node], kind, -nbytes))
        for device, (held, holds) in enumerate(zip(self._live, live, strict=True)):
            for number in np.flatnonzero(held != holds).tolist():
                rows.append((began[device], device, number, int(holds[number] - held[number])))
        self._live = left
        if rows:
            self._columns.append(np.array(rows, dtype=np.int64))

    def _began(self, graph: Graph, start: Sequence[int], before: int) -> list[int]:
        """When each device takes what it holds: in the first phase at once, later with its first action, if any."""
        if self._columns:
            began: dict[int, int] = {}
            for queue, node in graph.begins.items():
                device = queue // len(QUEUES)
                began[device] = min(start[node], began.get(device, start[node]))
            return [began.get(device, before) for device in range(len(self._devices))]
        return [0] * len(self._devices)

    def settle(self, spans: Sequence[tuple[int, int]] = ()) -> Peaks:
        """The peaks, and those of spans [begin, end) of time."""
        rows = np.concatenate(self._columns) if self._columns else np.zeros((0, 4), dtype=np.int64)
        rows = rows[np.argsort(rows[:, 1], kind="stable")]
        edges = np.searchsorted(rows[:, 1], np.arange(len(self._devices) + 1))
        run: dict[str, Peak] = {}
        within: list[dict[str, Peak]] = [{} for _ in spans]
        timeline: dict[str, tuple[tuple[int, int], ...]] = {}
        for index, name in enumerate(self._devices):
            mine = rows[edges[index] : edges[index + 1]]
            times, alive = _running(mine[:, 0], mine[:, 3])
            timeline[name] = tuple(zip(times.tolist(), alive.tolist(), strict=True))
            total = _highest(times, alive, spans)
            kinds = {kind: [0] * (1 + len(spans)) for kind in KINDS}
            for number in np.unique(mine[:, 2]).tolist():
                some = mine[mine[:, 2] == number]
                kinds[KINDS[number]] = _highest(*_running(some[:, 0], some[:, 3]), spans)
            run[name], *others = (
                Peak(peak, {kind: peaks[place] for kind, peaks in kinds.items()}) for place, peak in enumerate(total)
            )
            for span, peak in zip(within, others, strict=True):
                span[name] = peak
        return Peaks(run, within, timeline)


def _highest(times: np.ndarray, alive: np.ndarray, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Most bytes alive at all, then within each span: what is alive when it begins included."""
    found = [int(alive.max(initial=0))]
    for begin, end in spans:
        first = max(0, int(np.searchsorted(times, begin, side="right")) - 1)
        last = int(np.searchsorted(times, end, side="left"))
        found.append(int(alive[first : max(last, first + 1)].max(initial=0)))
    return found


def _running(times: np.ndarray, deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct times, and the bytes alive from each on."""
    if not len(times):
        return times, deltas
    order = np.argsort(times, kind="stable")
    times, deltas = times[order], deltas[order]
    firsts = np.flatnonzero(np.r_[True, times[1:] != times[:-1]])
    return times[firsts], np.cumsum(np.add.reduceat(deltas, firsts))
