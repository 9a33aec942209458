from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from harness.costs import Affine, Costs, TensorCost
from harness.errors import OrreryError
from harness.models import build, entry
from harness.models.layered import Layered, Unit
from harness.profile import counting
from harness.profile.counting import batch_spec, count_units
from harness.workload import Workload
from tests.harness.profile.tiny import IMAGE, TEXT, batch, workload

TOKENS, WIDTH, LABELS, FLOAT = 5, 8, 3, 4
HIDDEN = TOKENS * WIDTH * FLOAT


def toy(frozen: int = 0, dropout: float = 0.5) -> Layered:
    """Embedding, linear, dropout and residual with a norm, classifier on the first token, loss; `frozen` in front."""
    root = nn.ModuleList(
        [
            nn.Embedding(10, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Dropout(dropout),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, LABELS),
        ]
    )
    for module in root[:frozen]:
        module.requires_grad_(False)
    embedding, linear, drop, norm, head = root
    units = (
        Unit("embedding", 0, "embedding", ["input_ids"], ["x"], embedding, [embedding]),
        Unit("linear", 1, "linear", ["x"], ["y"], linear, [linear]),
        Unit("connective", 1, "connective", ["y", "x"], ["z"], lambda y, x: norm(drop(y) + x), [drop, norm]),
        Unit("head", 2, "head", ["z"], ["logits"], lambda z: head(z[:, 0]), [head]),
        Unit("loss", 2, "loss", ["logits", "labels"], ["loss"], cross_entropy),
    )
    return Layered(root, units, (), ("input_ids",))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def counted(layered: Layered, **options: object) -> Costs:
    return count_units(layered, Workload("toy", "synthetic", 8, 8, seq_len=TOKENS, num_labels=LABELS, **options))


def whole(costs: Costs) -> tuple[int, int]:
    return 0, len(costs.units)


def test_closed_forms_of_a_toy() -> None:
    costs = counted(toy())
    embedding, linear, connective, head, loss = costs.units
    flops = 2 * TOKENS * WIDTH * WIDTH
    assert linear.forward.matmul == Affine(0, flops)
    assert linear.backward.matmul == Affine(0, 2 * flops)
    assert head.backward.matmul == Affine(0, 2 * 2 * WIDTH * LABELS)
    assert embedding.forward.kernels == linear.forward.kernels == Affine(1, 0)
    # Linear keeps its input; dropout its noise and the norm its input, a mean and a deviation per token.
    assert (linear.saved, linear.saves) == (Affine(0, 0), ("x",))
    assert (connective.saved, connective.saves) == (Affine(0, 2 * HIDDEN + 2 * TOKENS * FLOAT), ())
    assert embedding.saves == ("input_ids",)
    assert head.saves == ("z",)
    assert linear.forward_workspace == Affine(0, 0)
    assert linear.backward_workspace == Affine(0, HIDDEN)
    assert costs.tensors["x"] == TensorCost(TOKENS, WIDTH, FLOAT, batchless=False, needs_grad=True)
    assert costs.tensors["input_ids"] == TensorCost(TOKENS, 1, 8, batchless=False, needs_grad=False)
    assert costs.tensors["loss"] == TensorCost(1, 1, FLOAT, batchless=True, needs_grad=True)
    assert costs.parameters["1.weight"].numel == WIDTH * WIDTH
    assert loss.parameters == ()
    assert costs.inputs == ("input_ids", "labels")


def test_inference_saves_nothing_and_has_no_backward() -> None:
    layered = toy()
    costs = counted(replace(layered, units=layered.units[:-1]), technique="inference")
    assert costs.saved(*whole(costs)) == Affine(0, 0)
    assert sum(costs.work(*whole(costs), "backward").kernels) == 0
    assert not any(parameter.trainable for parameter in costs.parameters.values())
    # Beside what the connective writes live x, y, their sum, and the norm's mean and deviation per token.
    assert costs.workspace(0, 3, "forward", 4) == 4 * (3 * HIDDEN + 2 * TOKENS * FLOAT)


def test_units_in_front_of_the_first_trainable_weight_have_no_backward() -> None:
    costs = counted(toy(frozen=2))
    embedding, linear, connective = costs.units[:3]
    for unit in (embedding, linear):
        assert (unit.backward.matmul, unit.backward.kernels, unit.saved, unit.saves) == (*[Affine(0, 0)] * 3, ())
    assert not costs.tensors["y"].needs_grad
    assert connective.backward.kernels == Affine(1, 0)


def test_a_frozen_embedding_spares_the_gradient_of_what_it_writes() -> None:
    linear = counted(toy(frozen=1)).units[1]
    assert linear.backward.matmul == linear.forward.matmul


def test_lost_in_views() -> None:
    layered = toy()
    view = Unit("view", 1, "view", ["x"], ["y"], lambda x: x[:, :2])
    with pytest.raises(OrreryError, match="writes 'y', a view"):
        counted(Layered(layered.root, (layered.units[0], view), (), ("input_ids",)))


def test_parts_of_one_storage_count_as_its_parts() -> None:
    layered = toy()
    split = Unit("split", 1, "split", ["x"], ["a", "b"], lambda x: (2 * x).split(WIDTH // 2, dim=2))
    costs = counted(Layered(layered.root, (layered.units[0], split), (), ("input_ids",)))
    assert costs.tensors["a"].bytes(3) + costs.tensors["b"].bytes(3) == 3 * HIDDEN
    assert costs.units[1].forward_workspace == Affine(0, 0)


def test_counting_leaves_the_model_as_it_was() -> None:
    layered = toy()
    before = {name: (id(p), p.clone()) for name, p in layered.root.named_parameters()}
    counted(layered)
    for name, parameter in layered.root.named_parameters():
        assert (id(parameter), parameter.grad) == (before[name][0], None)
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("model", [*TEXT, *IMAGE])
def test_every_cost_is_affine_in_rows(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = workload(model)
    costs = count_units(build(load, "meta"), load)
    monkeypatch.setattr(counting, "ROWS", (13, 31))
    again = count_units(build(load, "meta"), load)
    assert again.tensors == costs.tensors
    for one, other in zip((*costs.local_units, *costs.units), (*again.local_units, *again.units), strict=True):
        assert one == other, one.name


@pytest.mark.parametrize("model", TEXT)
def test_flops_equal_torchs_count_of_the_uncut_model(model: str) -> None:
    load = workload(model)
    layered = build(load)
    oracle = uncut_flops(layered.root, inputs(layered, batch(load, 3)))
    assert flops(count_units(build(load, "meta"), load), 3) == oracle


def test_flash_attention_is_counted_with_the_scores_it_computes_again() -> None:
    eager, sdpa = (workload("opt-tiny", attn_implementation=name, dropout=0.0) for name in ("eager", "sdpa"))
    forward, backward = flops(count_units(build(eager, "meta"), eager), 3)
    config = entry("opt-tiny").config
    scores = 3 * config["num_hidden_layers"] * 2 * eager.seq_len**2 * config["hidden_size"]
    assert flops(count_units(build(sdpa, "meta"), sdpa), 3) == (forward, backward + scores)


@pytest.mark.parametrize("model", IMAGE)
def test_flops_of_convolutions(model: str) -> None:
    """As torch counts, but for the weight gradients of grouped convolutions, where torch 2.13 forgets the groups."""
    load = workload(model)
    layered = build(load)
    forward, backward = uncut_flops(layered.root, inputs(layered, batch(load, 3)))
    costs = count_units(layered, load)
    assert flops(costs, 3)[0] == forward
    if model == "resnet-tiny":
        assert flops(costs, 3)[1] == backward
    else:
        work = [costs.work(*whole(costs), direction).depthwise.at(3) for direction in ("forward", "backward")]
        assert work[1] == 2 * work[0] > 0


def flops(costs: Costs, rows: int) -> tuple[float, float]:
    forward, backward = (costs.work(*whole(costs), direction).flops(rows) for direction in ("forward", "backward"))
    return forward, backward


def inputs(layered: Layered, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in layered.inputs}


def uncut_flops(call: Callable[..., object], inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Forward and backward FLOPs of the whole Hugging Face model by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        output = call(**inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_t5_base_equals_torchs_count_of_the_uncut_model() -> None:
    load = Workload("t5-base", "synthetic", 64, 16)
    layered = build(load, "meta")
    costs = count_units(layered, load)
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in layered.root.named_parameters()}
        tokens = torch.zeros((16, 128), dtype=torch.long)
        inputs = {"input_ids": tokens, "attention_mask": tokens, "decoder_input_ids": tokens[:, :1]}
        oracle = uncut_flops(lambda **values: functional_call(layered.root, weights, (), values), inputs)
    assert flops(costs, 16) == oracle


@pytest.mark.parametrize("model", ["t5-tiny", "bert-tiny", "resnet-tiny"])
def test_inputs_are_as_the_data_set_makes_them(model: str) -> None:
    load = workload(model)
    values = batch(load, 3)
    for name in (*build(load, "meta").inputs, "labels"):
        assert batch_spec(name, load, 3)[:2] == (values[name].shape, values[name].dtype), name
