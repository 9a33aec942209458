"""A trace as a Gantt chart: one row per queue of each device, the bytes alive below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import OrreryError
from harness.plan.actions import QUEUES
from harness.store import write_whole
from harness.trace import Event, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, told apart with every common colour blindness. A meaning keeps its colour in all pictures.
COLOURS = {
    "forward": "#0072B2",
    "backward": "#E69F00",
    "step": "#009E73",
    "combine": "#D55E00",
    "transfer of a micro-batch": "#56B4E9",
    "transfer of weights or gradients": "#CC79A7",
    "storage": "#999999",
}
DEVICE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
LINE_STYLES = ("-", "--", ":", "-.")
#: Saved without dates and random ids: the same trace gives the same bytes.
METADATA: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
#: Rows of more devices than this can't be read; the picture says how many it leaves out.
MAX_DEVICES = 32
FONT_PT = 7.0
#: Inches: the panels' width, one row, the memory panel, one line of a legend.
PANEL_IN, ROW_IN, MEMORY_IN, LEGEND_IN = 9.2, 0.22, 1.7, 0.16
LEGEND: dict[str, Any] = {
    "frameon": False,
    "borderaxespad": 0.3,
    "borderpad": 0.1,
    "columnspacing": 1.2,
    "handletextpad": 0.5,
}


def gantt(
    trace: Trace,
    path: Path | str,
    iterations: int = 1,
    title: str = "",
    memory_budget_bytes: Mapping[str, int] | None = None,
) -> None:
    """Draw the first `iterations` iterations of the trace to an .svg, .pdf or .png file, whole or not at all.

    `memory_budget_bytes[device]` draws what each device has. OrreryError for any other suffix, for a trace
    without events, and where the file can't be written.
    """
    path = Path(path)
    if path.suffix not in METADATA:
        raise OrreryError(f"{path}: a picture's name ends in one of {', '.join(METADATA)}. Choose one of them.")
    devices = trace.devices[:MAX_DEVICES]
    in_order = dict.fromkeys((event.phase, event.iteration) for event in trace.events)
    window = list(in_order)[:iterations]
    events = [
        event for event in trace.events if (event.phase, event.iteration) in window and event.end_s > event.start_s
    ]
    if not events:
        raise OrreryError(f"{path} is not drawn: the trace has no events that take time.")
    begin, end = min(event.start_s for event in events), max(event.end_s for event in events)
    scale, unit = _unit(end - begin)
    span = (end - begin) * scale
    queues = [queue for queue in QUEUES if any(event.queue == queue for event in events)]
    budgets = {device: nbytes for device, nbytes in (memory_budget_bytes or {}).items() if device in devices}
    left_out = len(trace.devices) - len(devices)
    heading = title + (f" (first {len(devices)} of {len(trace.devices)} devices)" if left_out else "")

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "orrery", "font.size": FONT_PT, "axes.linewidth": 0.5}):
        figure = Figure()
        panels = [figure.add_subplot() for _ in range(2 if trace.memory_timeline else 1)]
        heights_in = [ROW_IN * len(devices) * len(queues), MEMORY_IN]
        _boxes(panels[0], [event for event in events if event.device in devices], devices, queues, begin, scale, span)
        legend_lines = 0
        if trace.memory_timeline:
            panels[0].tick_params(axis="x", labelbottom=False)
            legend_lines = _memory(panels[1], trace, devices, begin, end, scale, budgets)
        for panel in panels:
            panel.set_xlim(0, span)
            panel.spines[["top", "right"]].set_visible(False)
        shown = "first iteration" if len(window) == 1 else f"first {len(window)} iterations"
        panels[-1].set_xlabel(f"time in {unit}, {shown}", labelpad=2)
        left_in = 0.7 + 0.06 * max(map(len, devices))
        top_in = 0.25 + (0.3 if heading else 0)
        _place(figure, panels, heights_in, left_in, top_in, 0.4 + LEGEND_IN * legend_lines)
        if heading:
            size_in = figure.get_size_inches()
            figure.text(left_in / size_in[0], 1 - 0.08 / size_in[1], heading, va="top", fontsize=FONT_PT + 3)
        kind, metadata = path.suffix[1:], METADATA[path.suffix]
        write_whole(path, lambda part: figure.savefig(part, format=kind, metadata=metadata, dpi=150))


def meaning(event: Event) -> str:
    """What the colour of an event's box says."""
    if event.kind in ("send", "recv"):
        return "transfer of a micro-batch" if event.micro_batch >= 0 else "transfer of weights or gradients"
    return "storage" if event.kind in ("load", "store") else event.kind


def _place(
    figure: Figure, panels: Sequence[Axes], heights_in: Sequence[float], left_in: float, top_in: float, bottom_in: float
) -> None:
    """Size the figure around its panels, which stand below each other."""
    gap_in = 0.12
    height_in = top_in + sum(h + gap_in for h in heights_in[: len(panels)]) - gap_in + bottom_in
    width_in = left_in + PANEL_IN + 0.2
    figure.set_size_inches(width_in, height_in)
    upper_in = height_in - top_in
    for panel, panel_in in zip(panels, heights_in, strict=False):
        bottom = (upper_in - panel_in) / height_in
        panel.set_position((left_in / width_in, bottom, PANEL_IN / width_in, panel_in / height_in))
        upper_in -= panel_in + gap_in


def _boxes(
    axes: Axes,
    events: Sequence[Event],
    devices: Sequence[str],
    queues: Sequence[str],
    begin: float,
    scale: float,
    span: float,
) -> None:
    """One box per event, with its micro-batch number where there is room."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    row = {(device, queue): d * len(queues) + q for d, device in enumerate(devices) for q, queue in enumerate(queues)}
    corners, colours, edges = [], [], []
    for event in events:
        left, right, y = (event.start_s - begin) * scale, (event.end_s - begin) * scale, row[event.device, event.queue]
        width_pt = (right - left) / span * PANEL_IN * 72
        corners.append(((left, y - 0.42), (left, y + 0.42), (right, y + 0.42), (right, y - 0.42)))
        colours.append(COLOURS[meaning(event)])
        edges.append("white" if width_pt > 2 else colours[-1])  # what is thinner than its edge must not vanish
        number = str(event.micro_batch)
        if event.micro_batch >= 0 and width_pt > 0.65 * FONT_PT * len(number) + 2:
            ink = "white" if event.kind == "forward" else "black"
            axes.text((left + right) / 2, y, number, ha="center", va="center_baseline", color=ink, fontsize=FONT_PT)
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors=edges, linewidths=0.4))
    for d in range(0, len(devices), 2):
        axes.axhspan(d * len(queues) - 0.5, (d + 1) * len(queues) - 0.5, color="#F2F2F2", zorder=0, linewidth=0)
    axes.set_ylim(len(row) - 0.5, -0.5)
    axes.set_yticks(range(len(row)), [f"{d}   {q}" if q == queues[0] else q for d, q in row])
    axes.tick_params(axis="y", length=0)
    present = {meaning(event) for event in events}
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in present]
    axes.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(patches), handlelength=1.4, **LEGEND
    )


def _memory(
    axes: Axes,
    trace: Trace,
    devices: Sequence[str],
    begin: float,
    end: float,
    scale: float,
    budget_bytes: Mapping[str, int],
) -> int:
    """Bytes alive on each device between `begin` and `end`, as steps. Returns the number of lines of the legend."""
    most = max(trace.peak_bytes[device] for device in devices)
    # Where there is memory to spare, the curves get half of the height; a limit above that is in the legend only.
    largest = max([most, *(min(nbytes, 2 * most) for nbytes in budget_bytes.values())])
    divisor, unit = (2**30, "GiB") if largest >= 2**32 else (2**20, "MiB") if largest >= 2**20 else (2**10, "KiB")
    # Devices with one and the same curve share a line: one would hide the others.
    owners: dict[tuple[tuple[float, int], ...], list[str]] = {}
    for device in devices:
        owners.setdefault(trace.memory_timeline[device], []).append(device)
    for index, (points, names) in enumerate(owners.items()):
        before = [nbytes for time_s, nbytes in points if time_s <= begin][-1:] or [0]
        inside = [(time_s, nbytes) for time_s, nbytes in points if begin < time_s <= end]
        alive = [*before, *(nbytes for _, nbytes in inside)]
        axes.step(
            [(time_s - begin) * scale for time_s in (begin, *(time_s for time_s, _ in inside), end)],
            [nbytes / divisor for nbytes in [*alive, alive[-1]]],
            where="post",
            color=DEVICE_COLOURS[index % len(DEVICE_COLOURS)],
            linestyle=LINE_STYLES[index // len(DEVICE_COLOURS) % len(LINE_STYLES)],
            linewidth=1.0,
            label=f"{_names(names)}: at most {trace.peak_bytes[names[0]] / divisor:.4g} {unit}",
        )
    limits: dict[int, list[str]] = {}
    for device, nbytes in budget_bytes.items():
        limits.setdefault(nbytes, []).append(device)
    for index, (nbytes, names) in enumerate(limits.items()):
        whose = "each device" if len(names) == len(devices) else _names(names)
        label = f"memory of {whose}: {nbytes / divisor:.4g} {unit}" + (" (off the scale)" if nbytes > largest else "")
        dashes = (0, (6 / (index + 1), 3))
        axes.axhline(nbytes / divisor, color="black", linestyle=dashes, linewidth=0.7, label=label)
    axes.set_ylim(0, largest / divisor * 1.05)
    axes.set_ylabel(f"memory in {unit}")
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, int(PANEL_IN / (0.45 + 0.055 * max(map(len, labels)))))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=columns, handlelength=1.8, **LEGEND)
    return -(-len(labels) // columns)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _unit(seconds: float) -> tuple[float, str]:
    """Factor and name of the unit in which a span is read best."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return factor, unit
    return 1e6, "us"
