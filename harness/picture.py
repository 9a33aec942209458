"""Gantt charts: one row per queue of each device. A trace with the bytes alive below, or a real and a simulated one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
#: More boxes, or points of a line, become pixels in .svg and .pdf, too: as shapes they are megabytes, too thin to see.
MOST_SHAPES = 1000
FONT_PT = 7.0
#: Inches: the panels' width, one row, the memory panel, one line of a legend.
PANEL_IN, ROW_IN, MEMORY_IN, LEGEND_IN = 9.2, 0.22, 1.7, 0.16
#: A row that holds two boxes above each other, with room for their numbers.
DOUBLE_ROW_IN = 0.34
#: Above and below the middle of a row, in rows.
BOX = 0.42
#: How much white is in a pale colour.
PALE = 0.5
#: (phase, iteration) that an overlay shows, the first that there is: the first iteration warms up.
COMPARED = ((0, 1), (0, 0))
LEGEND: dict[str, Any] = {
    "frameon": False,
    "borderaxespad": 0.3,
    "borderpad": 0.1,
    "columnspacing": 1.2,
    "handletextpad": 0.5,
}


@dataclass(frozen=True)
class _Layer:
    """Events that are drawn between `top` and `bottom` of their rows; the time `begin` is at the left edge."""

    events: Sequence[Event]
    begin: float
    top: float = -BOX
    bottom: float = BOX
    pale: bool = False


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
    path = drawable(path)
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
    heading = _heading(title, len(trace.devices))

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "orrery", "font.size": FONT_PT, "axes.linewidth": 0.5}):
        figure = Figure()
        panels = [figure.add_subplot() for _ in range(2 if trace.memory_timeline else 1)]
        heights_in = [ROW_IN * len(devices) * len(queues), MEMORY_IN]
        _boxes(panels[0], _Layer(events, begin), devices, queues, scale, span)
        _rows(panels[0], events, devices, queues)
        legend_lines = 0
        if trace.memory_timeline:
            panels[0].tick_params(axis="x", labelbottom=False)
            legend_lines = _memory(panels[1], trace, devices, begin, end, scale, budgets)
        for panel in panels:
            panel.set_xlim(0, span)
            panel.spines[["top", "right"]].set_visible(False)
        shown = "first iteration" if len(window) == 1 else f"first {len(window)} iterations"
        panels[-1].set_xlabel(f"time in {unit}, {shown}", labelpad=2)
        _place(figure, panels, heights_in, devices, heading, 0.4 + LEGEND_IN * legend_lines)
        save(figure, path)


def overlay(real: Sequence[Event], simulated: Trace, path: Path | str, title: str = "") -> None:
    """Draw one iteration of a plan as it really ran and, paler below it in each row, as it was simulated.

    It is the second iteration of the first phase, the first where there is no other: from its own first event on, in
    both. Raises OrreryError as `gantt` does, and where the two have no such iteration, or are of other devices.
    """
    path = drawable(path)
    strangers = sorted({event.device for event in real}.difference(simulated.devices))
    if strangers:
        raise OrreryError(
            f"{path} is not drawn: {', '.join(strangers)} ran for real, and simulated are "
            f"{', '.join(simulated.devices)}. Both must be of one plan."
        )
    above, below = _by_iteration(real), _by_iteration(simulated.events)
    which = next((which for which in COMPARED if above.get(which) and below.get(which)), None)
    if which is None:
        raise OrreryError(f"{path} is not drawn: the two have no iteration in common whose events take time.")
    layers = (
        _Layer(above[which], min(event.start_s for event in above[which]), bottom=0.0),
        _Layer(below[which], min(event.start_s for event in below[which]), top=0.0, pale=True),
    )
    devices = simulated.devices[:MAX_DEVICES]
    events = [*above[which], *below[which]]
    queues = [queue for queue in QUEUES if any(event.queue == queue for event in events)]
    longest = max(event.end_s - layer.begin for layer in layers for event in layer.events)
    scale, unit = _unit(longest)
    span = longest * scale

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "orrery", "font.size": FONT_PT, "axes.linewidth": 0.5}):
        figure = Figure()
        panel = figure.add_subplot()
        for layer in layers:
            _boxes(panel, layer, devices, queues, scale, span)
        _rows(panel, events, devices, queues, ("above: really happened", "below, paler: simulated"))
        panel.set_xlim(0, span)
        panel.spines[["top", "right"]].set_visible(False)
        ordinal = "second" if which[1] else "first"
        panel.set_xlabel(f"time in {unit} since the {ordinal} iteration began", labelpad=2)
        heading = _heading(title, len(simulated.devices))
        _place(figure, [panel], [DOUBLE_ROW_IN * len(devices) * len(queues)], devices, heading, 0.4)
        save(figure, path)


def _by_iteration(events: Sequence[Event]) -> dict[tuple[int, int], list[Event]]:
    """The events that take time, by phase and iteration."""
    found: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        if event.end_s > event.start_s:
            found.setdefault((event.phase, event.iteration), []).append(event)
    return found


def meaning(event: Event) -> str:
    """What the colour of an event's box says."""
    if event.kind in ("send", "recv"):
        return "transfer of a micro-batch" if event.micro_batch >= 0 else "transfer of weights or gradients"
    return "storage" if event.kind in ("load", "store") else event.kind


def drawable(path: Path | str) -> Path:
    """The path, if its suffix is of a kind of picture."""
    path = Path(path)
    if path.suffix not in METADATA:
        raise OrreryError(f"{path}: a picture's name ends in one of {', '.join(METADATA)}. Choose one of them.")
    return path


def _heading(title: str, num_devices: int) -> str:
    return title + (f" (first {MAX_DEVICES} of {num_devices} devices)" if num_devices > MAX_DEVICES else "")


def save(figure: Figure, path: Path) -> None:
    """The figure as a file, whole or not at all."""
    kind, metadata = path.suffix[1:], METADATA[path.suffix]
    write_whole(path, lambda part: figure.savefig(part, format=kind, metadata=metadata, dpi=150))


def _place(
    figure: Figure,
    panels: Sequence[Axes],
    heights_in: Sequence[float],
    devices: Sequence[str],
    heading: str,
    bottom_in: float,
) -> None:
    """Size the figure around its panels, which stand below each other, and write the heading above them."""
    gap_in = 0.12
    left_in = 0.7 + 0.06 * max(map(len, devices))
    top_in = 0.25 + (0.3 if heading else 0)
    height_in = top_in + sum(h + gap_in for h in heights_in[: len(panels)]) - gap_in + bottom_in
    width_in = left_in + PANEL_IN + 0.2
    figure.set_size_inches(width_in, height_in)
    upper_in = height_in - top_in
    for panel, panel_in in zip(panels, heights_in, strict=False):
        bottom = (upper_in - panel_in) / height_in
        panel.set_position((left_in / width_in, bottom, PANEL_IN / width_in, panel_in / height_in))
        upper_in -= panel_in + gap_in
    if heading:
        figure.text(left_in / width_in, 1 - 0.08 / height_in, heading, va="top", fontsize=FONT_PT + 3)


def _boxes(axes: Axes, layer: _Layer, devices: Sequence[str], queues: Sequence[str], scale: float, span: float) -> None:
    """One box per event of these devices, with its micro-batch number where there is room."""
    from matplotlib.collections import PolyCollection

    row = {(device, queue): d * len(queues) + q for d, device in enumerate(devices) for q, queue in enumerate(queues)}
    corners, colours, edges = [], [], []
    for event in layer.events:
        if event.device not in devices:
            continue
        left, right = (event.start_s - layer.begin) * scale, (event.end_s - layer.begin) * scale
        middle = row[event.device, event.queue]
        top, bottom = middle + layer.top, middle + layer.bottom
        width_pt = (right - left) / span * PANEL_IN * 72
        corners.append(((left, top), (left, bottom), (right, bottom), (right, top)))
        colours.append(_pale(COLOURS[meaning(event)]) if layer.pale else COLOURS[meaning(event)])
        edges.append("white" if width_pt > 2 else colours[-1])  # what is thinner than its edge must not vanish
        number = str(event.micro_batch)
        if event.micro_batch >= 0 and width_pt > 0.65 * FONT_PT * len(number) + 2:
            ink = "white" if event.kind == "forward" and not layer.pale else "black"
            place = ((left + right) / 2, (top + bottom) / 2)
            axes.text(*place, number, ha="center", va="center_baseline", color=ink, fontsize=FONT_PT)
    many = len(corners) > MOST_SHAPES
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors=edges, linewidths=0.4, rasterized=many))


def _pale(colour: str) -> str:
    """The colour with white in it."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * PALE):02X}" for part in parts)


def _rows(
    axes: Axes, events: Sequence[Event], devices: Sequence[str], queues: Sequence[str], halves: Sequence[str] = ()
) -> None:
    """Names and shades of the rows, and what colours mean; `halves` says what the halves of a row are."""
    from matplotlib.patches import Patch

    rows = [(device, queue) for device in devices for queue in queues]
    for d in range(0, len(devices), 2):
        axes.axhspan(d * len(queues) - 0.5, (d + 1) * len(queues) - 0.5, color="#F2F2F2", zorder=0, linewidth=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{d}   {q}" if q == queues[0] else q for d, q in rows])
    axes.tick_params(axis="y", length=0)
    present = {meaning(event) for event in events}
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in present]
    shades = ["black", _pale("#000000")]
    patches += [Patch(color=shade, label=half) for shade, half in zip(shades, halves, strict=False)]
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
            rasterized=len(inside) > MOST_SHAPES,
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
