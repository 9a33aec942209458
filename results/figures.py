"""The figures of a report: each is an SVG, a PNG and the numbers in it as CSV. Same records, same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness import runner, store
from harness.experiment import Request
from harness.picture import METADATA, gantt, overlay
from harness.records import Record
from harness.registry import load_testbed
from harness.simulator import simulate
from harness.store import write_whole
from harness.trace import Event, Trace
from harness.trace_export import read_chrome_trace
from results import again, throughput
from results.agreement import Pair
from results.grids import Grid, label, ratios
from results.settings import Setting, colour
from testbeds import library

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

GIB = 2**30
#: Share of the room between two models that their bars fill, as seaborn draws them.
BARS = 0.8
#: A bar's place, up to the widest figure; letters that stand side by side in a legend of the narrowest one.
INCHES_PER_BAR, MOST_INCHES, LEGEND_LETTERS = 0.3, 14.0, 95
#: How near to white the last of many labels of one method comes.
PALEST = 0.8
#: What stands behind a number that a line may cross.
ON_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
#: Iterations that one point of the smoothed loss curve averages.
SMOOTHED = 25
#: The method whose timelines are laid on each other, where it was run: stages that wait for each other both ways.
OVERLAID = "pipedream-1f1b"


@dataclass(frozen=True)
class Figure:
    """`path` without suffix; beside it lie .svg, .png and .csv. `caption` says what is to be seen."""

    path: Path
    caption: str


def draw(setting: Setting, folder: Path) -> Iterator[Figure]:
    """Every figure of the setting that its records have something for."""
    for mode in dict.fromkeys(record.mode for record in setting.records):
        records = [record for record in setting.records if record.mode == mode]
        if len(records) > 1:
            yield _bars(setting, records, folder / f"{setting.name}-{mode}-throughput", memory=False)
            yield _bars(setting, records, folder / f"{setting.name}-{mode}-memory", memory=True)
    yield from _timelines(setting, folder)
    for record in setting.records:
        if record.losses:
            label = re.sub(r"[^\w.=-]+", "-", setting.label(record)).strip("-")
            yield _loss(setting, record, folder / f"{setting.name}-{label}-{record.model}-{record.mode}-loss")


def _palette(records: Sequence[Record], label: Callable[[Record], str]) -> dict[str, tuple[float, ...]]:
    """The method's colour, the lighter the later of several labels of one method."""
    from matplotlib.colors import to_rgb

    labels: dict[str, list[str]] = {}
    for record in records:
        of_method = labels.setdefault(record.method, [])
        if label(record) not in of_method:
            of_method.append(label(record))
    return {
        label: tuple(part + (1 - part) * PALEST * place / len(of_method) for part in to_rgb(colour(method)))
        for method, of_method in labels.items()
        for place, label in enumerate(of_method)
    }


def _bars(setting: Setting, records: Sequence[Record], path: Path, memory: bool) -> Figure:
    """One bar per model and method; a run that did not fit is marked, with what it would have needed."""
    import seaborn

    unit = "GiB" if memory else "samples/s"
    frame = pd.DataFrame(
        {
            "model": record.model,
            "method": setting.label(record),
            "status": record.status,
            unit: (record.peak_memory_bytes or 0) / GIB if memory else record.throughput_samples_per_s or 0.0,
        }
        for record in records
    )
    models, methods = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["method"]))
    palette = _palette(records, setting.label)
    with _style():
        drawing, axes = _blank(max(7.0, min(MOST_INCHES, INCHES_PER_BAR * len(models) * len(methods))), 3.2)
        seaborn.barplot(frame, x="model", y=unit, hue="method", order=models, hue_order=methods, palette=palette,
                        saturation=1, ax=axes)  # fmt: skip
        top = float(frame[unit].max()) or 1.0
        width = BARS / len(methods)
        for row in frame.itertuples(index=False):
            x = models.index(row.model) + (methods.index(row.method) - (len(methods) - 1) / 2) * width
            height = row[-1]
            if row.status == "ok":
                axes.text(x, height + top * 0.01, f"{height:.3g}", ha="center", va="bottom", fontsize=7, bbox=ON_PAPER)
                continue
            axes.bar(x, height, width, facecolor="white", edgecolor=palette[row.method], hatch="////", linewidth=1)
            axes.text(x, height + top * 0.015, row.status.upper() if row.status == "oom" else row.status, rotation=90,
                      ha="center", va="bottom", fontsize=7)  # fmt: skip
        limits = _limits(setting) if memory else {}
        for nbytes, boards in limits.items():
            axes.axhline(nbytes / GIB, color="black", linestyle="--", linewidth=0.8)
            axes.text(1.005, nbytes / GIB, boards, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
        axes.set_ylim(0, max([top, *(nbytes / GIB for nbytes in limits)]) * 1.16)
        axes.set(xlabel="", ylabel=f"peak memory, {unit}" if memory else unit)
        columns = max(1, LEGEND_LETTERS // (max(map(len, methods)) + 6))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(columns, len(methods)), frameon=False,
                    borderaxespad=0.2)  # fmt: skip
        _save(drawing, path, frame)
    what = "Peak memory of the worst device" if memory else "Throughput"
    marks = " Hatched: what a run that does not fit would need." if memory else " A run without a bar did not fit."
    lines = " Dashed: usable memory of the boards." if limits else ""
    some = marks if (frame["status"] != "ok").any() else ""
    return Figure(path, f"{what} by model and method, {setting.title}, {records[0].mode}.{some}{lines}")


def _limits(setting: Setting) -> dict[int, str]:
    """Usable bytes -> the boards that have them. A testbed from a file is known only where the file lies."""
    if setting.first.testbed not in library.names():
        return {}
    boards: dict[int, dict[str, None]] = {}
    for device in load_testbed(setting.first.testbed).cluster.devices:
        boards.setdefault(device.memory_bytes, {})[device.profile] = None
    return {nbytes: ", ".join(profiles) for nbytes, profiles in boards.items()}


def _timelines(setting: Setting, folder: Path) -> Iterator[Figure]:
    """One iteration of every simulated method on several devices, for the model that most of them can train."""
    able: dict[str, list[Record]] = {}
    for record in setting.records:
        if record.mode == "simulated" and record.status == "ok" and record.comm_bytes:
            able.setdefault(record.model, []).append(record)
    for record in max(able.values(), key=len, default=[]):
        replayed = _replayed(record)
        if replayed is None:
            continue
        asked, trace = replayed
        path = folder / f"{setting.name}-{record.method}-{record.model}-timeline"
        title = f"{setting.label(record)}, {record.model}, {record.testbed}: one iteration"
        budget = {device.name: device.memory_bytes for device in asked.testbed.cluster.devices}
        for suffix in (".svg", ".png"):
            gantt(trace, path.with_name(path.name + suffix), title=title, memory_budget_bytes=budget)
        first = [event for event in trace.events if (event.phase, event.iteration) == (0, 0)]
        _write_csv(path, _events(first))
        yield Figure(
            path,
            f"One iteration of {setting.label(record)} on {record.testbed}, {record.model}: what every queue of every "
            "device does, and below the bytes alive on each device.",
        )


def leads(grid: Grid, path: Path) -> Iterator[Figure]:
    """A panel per model: how many times as long as the first method the others take on every testbed."""
    compared = throughput.others(grid)
    table = ratios("", "", grid, throughput.seconds, compared, "")
    if table is not None:
        yield _leads(grid, table.frame, compared, path)


def _leads(grid: Grid, frame: pd.DataFrame, compared: Sequence[str], path: Path) -> Figure:
    import seaborn
    from matplotlib.ticker import LogLocator, NullLocator

    first, models = grid.columns[0], list(dict.fromkeys(frame["model"]))
    testbeds = list(dict.fromkeys(frame["testbed"]))
    palette = _palette(grid.records, label)
    longest = frame.melt(["model", "testbed"], list(compared), "method", "times").dropna()
    with _style():
        width = max(7.0, min(MOST_INCHES, INCHES_PER_BAR * len(testbeds) * (len(compared) + 1) / 2))
        drawing, panels = _panels(width, 2.0 * len(models) + 0.8, len(models))
        for axes, model in zip(panels, models, strict=True):
            seaborn.stripplot(longest[longest["model"] == model], x="testbed", y="times", hue="method", order=testbeds,
                              hue_order=compared, palette=palette, dodge=True, jitter=False, size=6, ax=axes,
                              legend=axes is panels[0])  # fmt: skip
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(yscale="log", xlabel="", ylabel=f"times as long\nas {first}", title=model)
            axes.set_ylim(min(0.8, longest["times"].min() / 1.2), max(2.0, longest["times"].max() * 1.2))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            for place in range(len(testbeds) - 1):
                axes.axvline(place + 0.5, color="black", linewidth=0.3, alpha=0.4)
        panels[-1].set_xticks(range(len(testbeds)), testbeds, rotation=30, ha="right")
        panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.12), ncols=min(3, len(compared)), frameon=False)
        _save(drawing, path, frame)
    return Figure(
        path,
        f"How many times as long as {first} the other methods take for a sample, {throughput.title(grid)}. Above the "
        "line they are slower. No dot: it did not fit, or was not run.",
    )


def laid_on_each_other(pairs: Sequence[Pair], out: Path) -> Figure | None:
    """One plan's timelines, real and simulated: of `OVERLAID` where there is one, on the slowest links.

    None where no pair has both: the trace that its emulated run left, and a simulation that can be done again.
    """
    preferred = sorted((p for p in pairs if p.ok), key=lambda p: (p.emulated.method != OVERLAID, _slowest_link(p)))
    for pair in preferred:
        real = store.trace_path(out, pair.emulated.provenance.config_hash)
        replayed = _replayed(pair.simulated) if real.exists() else None
        if replayed is not None:
            return _overlay(pair, read_chrome_trace(real)[1], replayed[1], out / "figures")
    return None


def _slowest_link(pair: Pair) -> float:
    """Bytes per second; infinite where the testbed is not known here any more, and nothing can be drawn."""
    asked = again.request(pair.simulated)
    return min(asked.testbed.cluster.bandwidth.values()) if asked else math.inf


def _overlay(pair: Pair, events: Sequence[Event], trace: Trace, folder: Path) -> Figure:
    record = pair.emulated
    what = f"{pair.label}, {record.model}, batch {record.batch_size}, {record.testbed}"
    path = folder / f"{pair.setting.name}-{record.method}-{record.model}-overlay"
    for suffix in (".svg", ".png"):
        overlay(events, trace, path.with_name(path.name + suffix), title=what)
    both = {"emulated": events, "simulated": trace.events}
    _write_csv(path, pd.concat([_events(each).assign(mode=mode) for mode, each in both.items()]))
    return Figure(
        path,
        f"One iteration of {what}: in each row what the queue really did, the last of {record.repeats} repeats, and "
        "below it, paler, what the simulator foretold. Both begin with the iteration.",
    )


def _replayed(record: Record) -> tuple[Request, Trace] | None:
    """The simulated run once more, with its events. None where it would be another one.

    A method or testbed may have changed since, and times that were measured on this machine may be measured anew.
    """
    asked = again.request(record)
    if asked is None:
        return None
    costs, plan = runner.make_plan(asked)
    trace = simulate(plan, costs, asked.testbed.cluster)
    return (asked, trace) if trace.total_s == record.total_time_s else None


def _events(events: Sequence[Event]) -> pd.DataFrame:
    """One event per row."""
    columns = (
        "device",
        "queue",
        "kind",
        "label",
        "phase",
        "iteration",
        "micro_batch",
        "start_s",
        "end_s",
        "nbytes",
        "peer",
    )
    return pd.DataFrame([[getattr(event, name) for name in columns] for event in events], columns=list(columns))


def _loss(setting: Setting, record: Record, path: Path) -> Figure:
    """The training loss of every iteration, and its running mean."""
    assert record.losses is not None
    frame = pd.DataFrame({"iteration": range(1, len(record.losses) + 1), "loss": record.losses})
    frame["mean"] = frame["loss"].rolling(SMOOTHED, min_periods=1).mean()
    with _style():
        drawing, axes = _blank(7.0, 2.8)
        axes.plot(frame["iteration"], frame["loss"], color=colour(record.method), linewidth=0.6, alpha=0.45,
                  label="each iteration")  # fmt: skip
        axes.plot(frame["iteration"], frame["mean"], color="black", linewidth=1.4, label=f"mean of {SMOOTHED}")
        axes.set(xlabel="iteration", ylabel="training loss", xlim=(1, len(frame)), ylim=(0, None))
        axes.legend(frameon=False)
        _save(drawing, path, frame)
    ends = f"from {frame['mean'].iloc[min(SMOOTHED, len(frame)) - 1]:.3f} to {frame['mean'].iloc[-1]:.3f}"
    return Figure(
        path,
        f"Training loss of {record.model} on {record.dataset}, {record.method} on {record.testbed}, {record.mode}: "
        f"the mean of {SMOOTHED} iterations goes {ends}.",
    )


def _style() -> AbstractContextManager[None]:
    """Text stays text, and nothing in the file is random."""
    import matplotlib

    return matplotlib.rc_context({"svg.hashsalt": "orrery", "svg.fonttype": "none", "font.size": 9})


def _blank(width_in: float, height_in: float) -> tuple[Drawing, Axes]:
    """A drawing of one panel."""
    drawing, (axes,) = _panels(width_in, height_in, 1)
    return drawing, axes


def _panels(width_in: float, height_in: float, count: int) -> tuple[Drawing, list[Axes]]:
    """A drawing without a display, so that it can be made anywhere: panels above each other."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(width_in, height_in))
    panels = list(drawing.subplots(count, 1, sharex=True, squeeze=False, gridspec_kw={"hspace": 0.35})[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.set_axisbelow(True)
    return drawing, panels


def _save(drawing: Drawing, path: Path, frame: pd.DataFrame) -> None:
    for suffix in (".svg", ".png"):
        kind: dict[str, Any] = {"format": suffix[1:], "metadata": METADATA[suffix]}
        write_whole(path.with_name(path.name + suffix), partial(drawing.savefig, **kind, dpi=150, bbox_inches="tight"))
    _write_csv(path, frame)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_whole(path.with_name(path.name + ".csv"), partial(frame.to_csv, index=False))
