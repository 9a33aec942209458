"""Tables of layers against the costs that they are made of, on a model with tied weights and values carried far."""

from __future__ import annotations

import pytest

from harness import profile
from harness.costs import BACKWARD, FORWARD, Costs
from harness.layer_tables import LayerTables
from harness.workload import Workload
from tests.harness.toys import chain, cluster


@pytest.fixture(scope="module")
def t5() -> Costs:
    return profile.count(Workload("t5-tiny", "mrpc", num_samples=8, batch_size=8, technique="lora"), "gpu")


@pytest.fixture(params=["t5", "tied"])
def costs(request: pytest.FixtureRequest, t5: Costs) -> Costs:
    return t5 if request.param == "t5" else chain(4, tied=True)


def test_weights_of_every_range_are_those_that_it_holds_each_once(costs: Costs) -> None:
    held, trained = LayerTables(costs, cluster(1)).weight_bytes
    for x in range(len(costs.layers)):
        for y in range(x + 1, len(costs.layers) + 1):
            units = costs.layers[x][0], costs.layers[y - 1][1]
            assert (held[x, y], trained[x, y]) == costs.weight_bytes(*units)


def test_boundaries_carry_what_the_next_layers_read(costs: Costs) -> None:
    forward, backward = LayerTables(costs, cluster(1)).boundary_bytes(8)
    assert forward[0] == forward[-1] == 0 and len(forward) == len(costs.layers) + 1
    for cut, (first, _) in enumerate(costs.layers):
        carried = [costs.tensors[name] for name in costs.carried(first)]
        assert forward[cut] == sum(tensor.bytes(8) for tensor in carried)
        assert backward[cut] == sum(tensor.bytes(8) for tensor in carried if tensor.needs_grad)


def test_mean_seconds_are_those_of_the_average_device() -> None:
    boards, costs = cluster(3, speeds=(1.0, 2.0, 4.0)), chain(3)
    forward, backward = LayerTables(costs, boards).mean_seconds(8)
    for found, direction in ((forward, FORWARD), (backward, BACKWARD)):
        each = [sum(costs.seconds(board, 0, y, direction, 8) for board in boards.devices) / 3 for y in range(4)]
        assert list(found) == pytest.approx(each)
