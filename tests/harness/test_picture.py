"""Gantt charts show each event where and as long as it was."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.errors import OrreryError
from harness.picture import COLOURS, MAX_DEVICES, MOST_SHAPES, gantt, meaning, overlay
from harness.trace import Event, PhaseTrace, Trace


def pipeline(num_devices: int = 2, num_micro_batches: int = 2, iterations: int = 2) -> Trace:
    """Forwards of 1 s, backwards of 2 s and transfers of half a second, one iteration after the other."""
    names = tuple(f"device{d}" for d in range(num_devices))
    events = []
    for iteration in range(iterations):
        now = float(iteration) * 4.5 * num_devices * num_micro_batches
        for m in range(num_micro_batches):
            for d, name in enumerate(names):
                peer = names[(d + 1) % num_devices]
                events += [
                    Event(name, "compute", "forward", f"F{m}", now, now + 1, 0, iteration, m),
                    Event(name, "nic-out", "send", "hidden", now + 1, now + 1.5, 0, iteration, m, 8, peer),
                    Event(peer, "nic-in", "recv", "hidden", now + 1, now + 1.5, 0, iteration, m, 8, name),
                    Event(name, "compute", "backward", f"B{m}", now + 1.5, now + 3.5, 0, iteration, m),
                    Event(name, "nic-out", "send", "gradients", now + 3.5, now + 4, 0, iteration, -1, 8, peer),
                    Event(name, "compute", "combine", "slice", now + 4, now + 4, 0, iteration),
                    Event(name, "compute", "step", "step", now + 4, now + 4.5, 0, iteration),
                ]
                now += 4.5
    return Trace(
        mode="simulated",
        devices=names,
        total_s=now,
        events=tuple(events),
        phases=(PhaseTrace("train", iterations, 0.0, now, 0),),
        busy_s={},
        link_bytes={},
        peak_bytes=dict.fromkeys(names, 2**21),
        memory_bytes={},
        memory_timeline=dict.fromkeys(names, ((0.0, 2**20), (now / 2, 2**21), (now, 2**20))),
    )


def boxes(svg: str, layer: int = 1) -> list[tuple[str, float, float, float]]:
    """(colour, left, right, top) of the boxes of an SVG picture, in its units."""
    (group,) = re.findall(rf'<g id="PolyCollection_{layer}">(.*?)</g>', svg, flags=re.DOTALL)
    found = []
    for path, style in re.findall(r'<path d="(.*?)".*?style="(.*?)"', group, flags=re.DOTALL):
        points = np.array(re.findall(r"[ML] (\S+) (\S+)", path), dtype=float)
        (left, top), (right, _) = points.min(axis=0), points.max(axis=0)
        found.append((style.split("fill: ")[1][:7].upper(), left, right, top))
    return found


@pytest.mark.parametrize("iterations", [1, 2])
def test_each_event_that_takes_time_is_a_box_at_its_place(tmp_path: Path, iterations: int) -> None:
    trace = pipeline()
    gantt(trace, tmp_path / "picture.svg", iterations=iterations)
    events = [e for e in trace.events if e.iteration < iterations and e.end_s > e.start_s]
    drawn = boxes((tmp_path / "picture.svg").read_text())
    assert len(drawn) == len(events)
    assert [colour for colour, *_ in drawn] == [COLOURS[meaning(event)].upper() for event in events]
    start, end = (np.array([getattr(event, edge) for event in events]) for edge in ("start_s", "end_s"))
    left, right = (np.array([box[edge] for box in drawn]) for edge in (1, 2))
    per_second = (right.max() - left.min()) / (end.max() - start.min())
    np.testing.assert_allclose(left - left.min(), start * per_second, atol=1e-4)
    np.testing.assert_allclose(right - left, (end - start) * per_second, atol=1e-4)
    rows = {(event.device, event.queue): top for event, (*_, top) in zip(events, drawn, strict=True)}
    assert len(set(rows.values())) == 6
    assert all(rows[e.device, e.queue] == box[3] for e, box in zip(events, drawn, strict=True))
    order = [(f"device{d}", queue) for d in range(2) for queue in ("compute", "nic-out", "nic-in")]
    assert sorted(rows, key=rows.__getitem__) == order


def test_colours_tell_kinds_and_what_is_transferred() -> None:
    counts = Counter(map(meaning, pipeline(iterations=1).events))
    assert counts == {
        "forward": 4,
        "backward": 4,
        "step": 4,
        "combine": 4,
        "transfer of a micro-batch": 8,
        "transfer of weights or gradients": 4,
    }
    assert len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".png", b"\x89PNG")])
def test_the_same_trace_gives_the_same_bytes(tmp_path: Path, suffix: str, begins: bytes) -> None:
    pictures = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}{suffix}"
        gantt(pipeline(4, 8), path, title="1F1B", memory_budget_bytes={"device0": 2**22, "device3": 2**23})
        pictures.append(path.read_bytes())
    assert pictures[0].startswith(begins)
    assert pictures[0] == pictures[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_more_boxes_than_one_can_see_are_pixels(tmp_path: Path) -> None:
    few, many = tmp_path / "few.svg", tmp_path / "many.svg"
    gantt(pipeline(2, 50, 1), few)
    gantt(pipeline(4, MOST_SHAPES // 8, 1), many)
    assert "data:image/png" not in few.read_text() and boxes(few.read_text())
    assert "data:image/png" in many.read_text()
    assert many.stat().st_size < few.stat().st_size


def test_a_budget_is_drawn_above_the_curves(tmp_path: Path) -> None:
    gantt(pipeline(), tmp_path / "without.svg")
    gantt(pipeline(), tmp_path / "with.svg", memory_budget_bytes={"device0": 2**22, "device1": 2**22})
    lines = [(tmp_path / name).read_text().count("stroke-dasharray") for name in ("without.svg", "with.svg")]
    assert lines == [0, 2]  # the line and its entry in the legend


def test_devices_beyond_those_that_can_be_read_are_left_out(tmp_path: Path) -> None:
    trace = pipeline(MAX_DEVICES + 3, 1, 1)
    gantt(trace, tmp_path / "picture.svg")
    drawn = boxes((tmp_path / "picture.svg").read_text())
    shown = [e for e in trace.events if e.device in trace.devices[:MAX_DEVICES] and e.end_s > e.start_s]
    assert len(drawn) == len(shown)


def later(trace: Trace, by_s: float, stretch: float) -> tuple[Event, ...]:
    """The events as a slower machine would have done them, which began later."""
    return tuple(replace(e, start_s=by_s + stretch * e.start_s, end_s=by_s + stretch * e.end_s) for e in trace.events)


@pytest.mark.parametrize(("iterations", "shown"), [(2, 1), (1, 0)])
def test_an_overlay_has_each_event_twice_above_each_other(tmp_path: Path, iterations: int, shown: int) -> None:
    """Real events half as fast: both from the start of the second iteration, twice as far and twice as long above."""
    trace = pipeline(iterations=iterations)
    overlay(later(trace, 100.0, 2.0), trace, tmp_path / "picture.svg", "a plan")
    svg = (tmp_path / "picture.svg").read_text()
    real, simulated = boxes(svg, 1), boxes(svg, 2)
    events = [e for e in trace.events if e.iteration == shown and e.end_s > e.start_s]
    assert len(real) == len(simulated) == len(events)
    origin = min(left for _, left, *_ in real)
    assert origin == min(left for _, left, *_ in simulated)
    for event, above, below in zip(events, real, simulated, strict=True):
        assert above[0] == COLOURS[meaning(event)].upper() != below[0]
        np.testing.assert_allclose(np.array(above[1:3]) - origin, 2 * (np.array(below[1:3]) - origin), atol=1e-3)
        assert above[3] < below[3], "upwards is less in SVG"
    for half, drawn in ((0, real), (1, simulated)):
        tops = {(e.device, e.queue): box[3] for e, box in zip(events, drawn, strict=True)}
        assert len(set(tops.values())) == len(tops) == 6, half
    assert f"<!-- time in s since the {'second' if shown else 'first'} iteration began -->" in svg
    assert "<!-- above: really happened -->" in svg and "<!-- below, paler: simulated -->" in svg


def test_an_overlay_shows_an_iteration_that_both_have(tmp_path: Path) -> None:
    long, short = pipeline(iterations=2), pipeline(iterations=1)
    for real, simulated in ((long, short), (short, long)):
        overlay(real.events, simulated, tmp_path / "picture.svg")
        svg = (tmp_path / "picture.svg").read_text()
        above, below = ([box[1:3] for box in boxes(svg, layer)] for layer in (1, 2))
        assert above == below and len(above) == sum(e.end_s > e.start_s for e in short.events)


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_the_same_two_timelines_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    trace = pipeline(4, 4)
    for name in ("one", "two"):
        overlay(later(trace, 1.0, 1.1), trace, tmp_path / f"{name}{suffix}", "1F1B")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_timelines_of_different_plans_are_not_laid_on_each_other(tmp_path: Path) -> None:
    trace = pipeline()
    strange = tuple(replace(event, device="gpu7") for event in trace.events)
    with pytest.raises(OrreryError, match=r"gpu7 ran for real, and simulated are device0, device1"):
        overlay(strange, trace, tmp_path / "picture.svg")
    other = tuple(replace(event, phase=1) for event in trace.events)
    for real in ((), other):
        with pytest.raises(OrreryError, match="no iteration in common"):
            overlay(real, trace, tmp_path / "picture.svg")
    with pytest.raises(OrreryError, match=r"\.svg, \.pdf, \.png"):
        overlay(trace.events, trace, tmp_path / "picture.gif")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    with pytest.raises(OrreryError, match=r"\.svg, \.pdf, \.png"):
        gantt(pipeline(), tmp_path / "picture.jpg")
    with pytest.raises(OrreryError, match="no events"):
        gantt(replace(pipeline(), events=()), tmp_path / "picture.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OrreryError, match="can't be written"):
        gantt(pipeline(), tmp_path / "file" / "picture.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
