from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from statistics import geometric_mean

import pytest

from results import papers
from testbeds import library
from testbeds.profiles import load_device

REFERENCE = Path(papers.__file__).parent / "reference"
KINDS = {"printed", "figure", "inferred"}


@pytest.mark.parametrize("name", papers.names())
def test_every_cell_has_provenance_and_source(name: str) -> None:
    paper = papers.load(name)
    with (REFERENCE / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == tuple(field.name for field in dataclasses.fields(papers.Cell))[1:]
    for cell in paper.cells:
        assert cell.provenance in KINDS, cell
        assert paper.doi in cell.source, cell
        assert cell.value and cell.unit is not None and cell.metric and cell.artefact, cell


@pytest.mark.parametrize("name", papers.names())
def test_no_cell_is_given_twice(name: str) -> None:
    cells = papers.load(name).cells
    keys = [
        (c.artefact, c.model, c.dataset, c.technique, c.system, c.devices, c.epochs, c.metric, c.value, c.note)
        for c in cells
    ]
    assert len(set(keys)) == len(keys)


def test_cells_of_pac() -> None:
    """Printed in Tables 1 and 2 and in the abstract."""
    cells = papers.load("pac").cells
    table1 = {c.metric: c.number for c in cells if (c.artefact, c.technique) == ("table1", "Full")}
    assert table1["weights_gib"] + table1["activations_gib"] + table1["gradients_gib"] == pytest.approx(10.83)
    assert table1["memory_gib"] == 10.83
    (hours,) = (c for c in cells if (c.system, c.model, c.dataset) == ("PAC", "T5-Base", "MRPC") and c.unit == "h"
                and c.artefact == "table2")  # fmt: skip
    assert (hours.number, hours.provenance) == (0.14, "printed")
    oom = [c for c in cells if c.value == papers.OOM]
    assert all(c.number is None for c in oom)
    assert len([c for c in oom if (c.artefact, c.technique, c.system) == ("table2", "Full", "Standalone")]) == 8


def test_names_of_a_paper_and_ours() -> None:
    assert papers.same("T5-Base", "t5-base")
    assert papers.same("STS-B", "stsb")
    assert papers.same("SST-2", "sst2")
    assert not papers.same("T5-Base", "t5-large")
    assert not papers.same("PA", "PA+cache".lower())


def test_quantities_for_people() -> None:
    quantities = {c.quantity for c in papers.load("pac").cells}
    assert {"training time, h", "weights, GiB", "forward time per sample, s", "tflop forward, TFLOP"} <= quantities


def test_the_paper_of_a_testbed() -> None:
    paper = papers.of_testbed("pac-nano-4")
    assert paper is not None and paper.name == "pac"
    assert papers.of_testbed("demo-hetero-3") is None


@pytest.mark.parametrize("testbed", library.names())
def test_constants_are_fitted_to_cells_that_exist(testbed: str) -> None:
    every = [cell for name in papers.names() for cell in papers.load(name).cells]
    for named in (cell for a in library.load(testbed).assumptions for cell in a.constant.cells):
        if named.split()[0] in papers.names():
            assert sum(cell.fitted([named]) for cell in every) == 1, named


def test_a_name_fits_one_cell_only() -> None:
    fitted = [c for c in papers.load("pac").cells if c.fitted(["pac fig8a T5-Base Full forward"])]
    assert [(c.metric, c.value) for c in fitted] == [("forward_time_per_sample_s", "0.2257")]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_nanos_rates_are_the_mean_of_what_they_were_fitted_to(direction: str) -> None:
    """Figure 3's operations over Figure 8(a)'s seconds of a batch of 16, as a part of the peak; to the digits given."""
    nano = load_device("jetson-nano-10w").constants
    efficiency = nano[f"efficiency_matmul_{direction}"]
    rates = []
    for name in efficiency.cells:
        (timed,) = (cell for cell in papers.load("pac").cells if cell.fitted([name]))
        (counted,) = (
            cell
            for cell in papers.load("pac").cells
            if (cell.artefact, cell.model, cell.technique) == ("fig3", timed.model, timed.technique)
            and cell.metric == f"tflop_{direction}"
        )
        rates.append(float(counted.value) * 1e12 / 16 / float(timed.value))
    assert efficiency.value * nano["peak_fp32_flops_per_s"].value == pytest.approx(geometric_mean(rates), rel=2e-3)
