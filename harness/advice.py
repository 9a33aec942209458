"""What the advisor found, for people: a table; for programs: lines of JSON; and the front as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.advisor import EDP, Advice, Candidate
from harness.carbon import Intensity
from harness.picture import COLOURS, FONT_PT, drawable, save
from harness.show import columns, duration, number

#: Rows of the table beside those on the front; all are in the JSON.
MOST_ROWS = 12
HEADER = ("rank", "method", "devices", "time", "J", "J/sample", "g CO2", "peak MiB", "distribution", "front")
#: Names beside the picture, for which there is room.
MOST_NAMES = 25


def table(advice: Advice, carbon: Intensity, samples: int) -> str:
    """The best, and the front, in order; then, one line per method, what can't be done."""
    shown = [
        (rank, candidate)
        for rank, candidate in enumerate(advice.ranked, 1)
        if rank <= MOST_ROWS or candidate in advice.front
    ]
    text = [columns(HEADER, [_row(rank, candidate, advice, carbon, samples) for rank, candidate in shown])]
    if len(shown) < len(advice.ranked):
        text.append(f"and {len(advice.ranked) - len(shown)} more that are worse: --json has them")
    reasons: dict[str, list[Candidate]] = {}
    for candidate in advice.others:
        reasons.setdefault(_named(candidate), []).append(candidate)
    for name, refused in reasons.items():
        first, *more = refused
        further = f" (and on {len(more)} further sets of devices)" if more else ""
        text.append(f"{first.status if first.time_s is None else 'left out'}: {name}: {first.reason}{further}")
    text.append(f"{advice.num_planned} of {advice.num_sets} sets of devices that differ were planned for; {carbon}")
    return "\n".join(text)


def _row(rank: int, candidate: Candidate, advice: Advice, carbon: Intensity, samples: int) -> Sequence[str]:
    joules = candidate.energy_j
    return (
        str(rank),
        _named(candidate),
        ",".join(candidate.devices),
        duration(candidate.time_s or 0.0),
        number(joules),
        number(None if joules is None else joules / samples),
        number(None if joules is None else carbon.grams(joules)),
        number((candidate.peak_memory_bytes or 0) / 2**20),
        duration(candidate.distribution_s or 0.0),
        "yes" if candidate in advice.front else "",
    )


def _named(candidate: Candidate) -> str:
    return " ".join((candidate.method, *(f"{option}={value}" for option, value in candidate.options.items())))


def lines(advice: Advice, carbon: Intensity, samples: int) -> Iterator[str]:
    """A candidate each: the ranked ones in order, then those that can't be done or compared, without a rank."""
    for rank, candidate in [*enumerate(advice.ranked, 1), *((None, other) for other in advice.others)]:
        joules = candidate.energy_j
        yield json.dumps(
            {
                "rank": rank,
                "on_front": candidate in advice.front,
                "method": candidate.method,
                "method_options": dict(candidate.options),
                "devices": list(candidate.devices),
                "status": candidate.status,
                "reason": candidate.reason,
                "time_s": candidate.time_s,
                "energy_j": joules,
                "energy_per_sample_j": None if joules is None else joules / samples,
                "edp_js": candidate.value(EDP),
                "co2_g": None if joules is None else carbon.grams(joules),
                "carbon_g_per_kwh": carbon.g_per_kwh,
                "carbon_source": carbon.source,
                "peak_memory_bytes": candidate.peak_memory_bytes,
                "distribution_s": candidate.distribution_s,
                "distribution_j": candidate.distribution_j,
                "plan": candidate.plan,
            },
            ensure_ascii=False,
            allow_nan=False,
        )


def draw(advice: Advice, path: Path, title: str) -> None:
    """Time and energy of the ranked candidates, or time and memory where no energy is known; an area says the memory.
    Those in colour are on the front of time, energy and memory; their numbers are their ranks."""
    path = drawable(path)
    with_energy = all(candidate.energy_j is not None for candidate in advice.ranked)

    def place(candidate: Candidate) -> tuple[float, float]:
        memory = (candidate.peak_memory_bytes or 0) / 2**20
        return candidate.time_s or 0.0, candidate.energy_j or 0.0 if with_energy else memory

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "orrery", "font.size": FONT_PT, "axes.linewidth": 0.5}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        most = max(candidate.peak_memory_bytes or 1 for candidate in advice.ranked)
        beaten = [candidate for candidate in advice.ranked if candidate not in advice.front]
        for chosen, colour in ((beaten, "#999999"), (advice.front, COLOURS["step"])):
            areas = [8 + 60 * (candidate.peak_memory_bytes or 0) / most for candidate in chosen]
            xs, ys = [place(candidate)[0] for candidate in chosen], [place(candidate)[1] for candidate in chosen]
            axes.scatter(xs, ys, areas, color=colour, alpha=0.8, linewidths=0)
        alike: dict[tuple[float, float], list[Candidate]] = {}
        for candidate in advice.front:
            alike.setdefault(place(candidate), []).append(candidate)
        names = []
        for where, (first, *others) in alike.items():
            rank = advice.ranked.index(first) + 1
            axes.annotate(str(rank), where, (4, 3), textcoords="offset points")
            more = f", as {len(others)} others" if others else ""
            names.append(f"{rank}  {_named(first)} on {len(first.devices)}{more}")
        # What is far from the front would make it a dot.
        for which, limit in ((0, axes.set_xlim), (1, axes.set_ylim)):
            low = min(place(candidate)[which] for candidate in advice.front)
            high = max(place(candidate)[which] for candidate in advice.front)
            room = 0.15 * (high - low) or 0.15 * high
            limit(low - room, high + 3 * room)
        far = sum(place(c)[0] > axes.get_xlim()[1] or place(c)[1] > axes.get_ylim()[1] for c in beaten)
        axes.set_xlabel("time in s, with the distribution")
        axes.set_ylabel("energy in J, with the distribution" if with_energy else "peak memory in MiB")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=FONT_PT + 1, loc="left")
        notes = [f"area: memory, at most {most / 2**20:.0f} MiB", f"grey: beaten, {far} further ones out of sight"]
        axes.text(
            1.02,
            1,
            "\n".join(["on the front, by rank:", *names[:MOST_NAMES], "", *notes]),
            va="top",
            transform=axes.transAxes,
        )
        save(figure, path)
