from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import models
from harness.models.layered import Layered
from harness.workload import Workload

TINY = ("resnet-tiny", "mobilenet-v2-tiny", "efficientnet-tiny")
ROWS = 4


def workload(model: str, **changes: object) -> Workload:
    fields = {"num_samples": 50_000, "batch_size": ROWS, "seq_len": None, "image_size": 32, "num_labels": 10}
    return Workload(model=model, dataset="cifar10", **{**fields, **changes})  # type: ignore[arg-type]


def batch(size: int = 32, channels: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.rand(ROWS, channels, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([3, 0, 9, 3])}


def gradients(root: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in root.named_parameters() if p.grad is not None}


def steps(layered: Layered, values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What is alive after each unit, run one by one."""
    alive = [values]
    for index in range(len(layered.units)):
        alive.append(layered.run(index, index + 1, alive[-1]))
    return alive


def by_hugging_face(layered: Layered, seed: int) -> tuple[Tensor, Tensor, torch.nn.Module]:
    """Logits, mean loss and the copied model after its own forward and backward."""
    root = copy.deepcopy(layered.root)
    torch.manual_seed(seed)
    out = root(**batch())
    out.loss.backward()
    return out.logits, out.loss, root


@pytest.mark.parametrize("model", TINY)
def test_equals_the_hugging_face_model(model: str) -> None:
    """Dropout included: the units draw random numbers in the same order. Four rows: the mean is the sum, exactly."""
    layered = models.build(workload(model))
    logits, loss, root = by_hugging_face(layered, seed=1)
    torch.manual_seed(1)
    *_, head, last = steps(layered, batch())
    (last["loss"] / ROWS).backward()
    assert torch.equal(head["logits"], logits)
    assert torch.equal(last["loss"] / ROWS, loss)
    expected, found = gradients(root), gradients(layered.root)
    assert found.keys() == expected.keys() == dict(root.named_parameters()).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    buffers = dict(layered.root.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in root.named_buffers())


@pytest.mark.parametrize("model", TINY)
def test_cut_in_front_of_every_unit(model: str) -> None:
    """Two devices: the second starts from the one carried tensor and sends back its gradient."""
    whole = models.build(workload(model, dropout=0.0))
    expected = gradients(by_hugging_face(whole, seed=0)[2])
    for cut in range(1, len(whole.units) - 1):
        layered = models.build(workload(model, dropout=0.0))
        inputs = batch()
        first = layered.run(0, cut, {"pixel_values": inputs["pixel_values"]})
        (name,) = layered.units[cut].reads
        carried = first[name].detach().requires_grad_()
        second = layered.run(cut, len(layered.units), {name: carried, "labels": inputs["labels"]})
        (second["loss"] / ROWS).backward()
        first[name].backward(carried.grad)
        found = gradients(layered.root)
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"cut at {cut}"


@pytest.mark.parametrize("model", TINY)
def test_units_cover_the_model_once(model: str) -> None:
    layered = models.build(workload(model), device="meta")
    held = [id(tensor) for unit in layered.units for tensor in (*unit.parameters(), *unit.buffers())]
    assert len(held) == len(set(held))
    assert set(held) == {id(tensor) for tensor in (*layered.root.parameters(), *layered.root.buffers())}
    *convolutions, head, loss = layered.units
    assert {unit.kind for unit in convolutions} == {"conv"}
    assert (head.kind, loss.kind) == ("head", "loss")
    assert [unit.layer for unit in layered.units] == [*range(len(layered.units) - 1), head.layer]
    assert layered.inputs == ("pixel_values",)


def test_inference_has_no_loss_and_no_batch_dependence() -> None:
    """In eval mode batch norm takes its buffers: a row's logits do not depend on the other rows."""
    layered = models.build(workload("resnet-tiny", technique="inference"))
    assert layered.units[-1].name.endswith("head")
    pixels = batch()["pixel_values"]
    together = layered.run(0, len(layered.units), {"pixel_values": pixels})["logits"]
    alone = layered.run(0, len(layered.units), {"pixel_values": pixels[:1]})["logits"]
    torch.testing.assert_close(alone, together[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", TINY)
def test_fake_tensors_have_the_real_shapes(model: str) -> None:
    real = models.build(workload(model))
    expected = steps(real, batch())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = steps(real, {name: mode.from_tensor(tensor) for name, tensor in batch().items()})
    for fake_values, real_values in zip(found, expected, strict=True):
        assert fake_values.keys() == real_values.keys()
        assert all(fake_values[name].shape == tensor.shape for name, tensor in real_values.items())


# Parameters in millions, with 1000 labels and with fewer: counted from the public definitions.
@pytest.mark.parametrize(
    ("model", "millions", "labels", "millions_with_labels"),
    [("resnet-50", 25.6, 100, 23.7), ("mobilenet-v2", 3.50, 10, 2.24), ("efficientnet-b1", 7.79, 10, 6.53)],
)
def test_paper_size(model: str, millions: float, labels: int, millions_with_labels: float) -> None:
    for num_labels, expected in ((1000, millions), (labels, millions_with_labels)):
        layered = models.build(workload(model, num_labels=num_labels), device="meta")
        assert sum(p.numel() for p in layered.root.parameters()) / 1e6 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("model", [*TINY, "efficientnet-b1"])
def test_a_seed_s_weights_can_be_trained(model: str) -> None:
    """What flows keeps its size from block to block, so that gradients come back to the first one."""
    layered = models.build(workload(model, dropout=0.0))
    *alive, _, last = steps(layered, batch())
    deviations = [t.std().item() for values in alive for name, t in values.items() if name.endswith(".hidden")]
    assert len(deviations) == len(layered.units) - 2  # without head and loss
    assert all(0.02 < deviation < 50 for deviation in deviations), deviations
    last["loss"].backward()
    first, *_ = gradients(layered.root).values()
    assert first.abs().max() > 1e-3
