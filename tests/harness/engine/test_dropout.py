"""Masks by key: the same for any split of a batch, in any order, in any process, and where Hugging Face draws them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from harness import models
from harness.engine.dropout import BLOCK, KeyedDropout, kept
from harness.errors import Unsupported
from harness.models.layered import Layered
from harness.profile.track import storage_id
from tests.harness.models import text_oracle
from tests.harness.profile.tiny import IMAGE, TEXT, batch, workload

ROOT = Path(__file__).parents[3]
IDS = (17, 3, 9, 40, 4)
STEP = 7


def dropped(x: Tensor, ids: Any = IDS, step: int = STEP, unit: str = "layer.0.head", seed: int = 0, **o: Any) -> Tensor:
    masks = KeyedDropout(seed)
    with masks.samples(step, ids):
        masks.enter(unit)
        return functional.dropout(x, **{"p": 0.4, **o})


def test_a_mask_is_its_rows_samples() -> None:
    """Any split into pieces, and any order of rows and pieces."""
    x = torch.randn(5, 3, 33)
    whole = dropped(x)
    for rows in ([0], [1, 2], [4, 3], [2, 0, 4, 1, 3]):
        assert torch.equal(dropped(x[rows], [IDS[row] for row in rows]), whole[rows])


def test_every_part_of_the_key_counts() -> None:
    x = torch.ones(2, 999)
    masks = KeyedDropout(0)
    drawn = {
        "seed": dropped(x, (1, 2), seed=1),
        "step": dropped(x, (1, 2), step=8),
        "unit": dropped(x, (1, 2), unit="b"),
    }
    with masks.samples(STEP, (1, 2)):
        masks.enter("layer.0.head")
        first, second = functional.dropout(x, 0.4), functional.dropout(x, 0.4)
        masks.enter("layer.0.head")
        again = functional.dropout(x, 0.4)
    assert torch.equal(first, again)
    rows = [first[0], first[1], second[0], second[1], *(row for pair in drawn.values() for row in pair)]
    for one, other in ((a, b) for i, a in enumerate(rows) for b in rows[:i]):
        # Independent masks agree at 0.6^2 + 0.4^2 = 0.52 of the places; 5 standard deviations are 0.079.
        assert abs((one == other).float().mean() - 0.52) < 0.08


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_rate_and_scale(p: float) -> None:
    count = 3 * BLOCK + 1
    stay = kept(["any key"], count, p)[0]
    assert abs(stay.mean() - (1 - p)) < 4 * np.sqrt(p * (1 - p) / count)
    runs = (stay[1:] & stay[:-1]).mean()
    assert abs(runs - (1 - p) ** 2) < 5 * np.sqrt(p * (1 - p) / count)
    ones = torch.ones(1, 1000)
    assert torch.equal(dropped(ones, [0], p=p).unique(), functional.dropout(ones, p).unique())


def test_a_longer_row_begins_like_a_shorter_one() -> None:
    """Blocks are but a way to draw; an odd number of elements takes half of the last 64 bits."""
    long = kept(["any key"], 2 * BLOCK + 5, 0.3)[0]
    for count in (1, BLOCK - 1, BLOCK, BLOCK + 1):
        assert np.array_equal(kept(["any key"], count, 0.3)[0], long[:count])


def test_the_draws_are_these_on_every_machine() -> None:
    assert (
        "".join("01"[int(bit)] for bit in kept(["0 7 17 0 layer.0.head"], 48, 0.5)[0])
        == "010101011000010000001000110001110110111000100010"
    )


def test_another_process_draws_the_same() -> None:
    program = (
        "import torch, hashlib; from torch.nn import functional; from harness.engine.dropout import KeyedDropout\n"
        f"masks = KeyedDropout(0)\nwith masks.samples({STEP}, {IDS}):\n"
        " masks.enter('layer.0.head'); made = functional.dropout(torch.ones(5, 99), 0.4)\n"
        "print(hashlib.sha256(made.numpy().tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == hashlib.sha256(dropped(torch.ones(5, 99)).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("layout", ["rows", "transposed", "bfloat16", "float64"])
def test_autograd_keeps_what_it_keeps_of_torchs_own(layout: str) -> None:
    """One tensor of the input's size, type and strides, which is the gradient's factor."""
    x = torch.randn(5, 6, 8)
    if layout == "transposed":
        x = x.transpose(1, 2)
    elif layout != "rows":
        x = x.to(getattr(torch, layout))
    x.requires_grad_()
    kept_by = []
    for function in (lambda: functional.dropout(x, 0.4), lambda: dropped(x)):
        packed: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor, packed=packed: packed.append(tensor) or tensor, lambda tensor: tensor):
            y = function()
        kept_by.append([(t.dtype, t.stride(), t.untyped_storage().nbytes()) for t in packed])
    assert kept_by[0] == kept_by[1] and len(kept_by[1]) == 1
    (noise,) = packed
    assert torch.equal(y, x * noise) and y.stride() == x.stride()
    arriving = torch.randn_like(y)
    y.backward(arriving)
    assert x.grad is not None and torch.equal(x.grad, arriving * noise)


def test_what_is_certain_is_not_drawn() -> None:
    assert kept(["any key"], 1000, 1e-12).all()
    x = torch.ones(3, 4)  # not the rows of five samples
    assert dropped(x, training=False) is x and dropped(x, p=0.0) is x
    assert not dropped(x, p=1.0).any()
    masks = KeyedDropout(0)
    with masks.samples(STEP, IDS):
        masks.enter("layer.0.head")
        torch.nn.Dropout(0.4).eval()(x)
        assert torch.equal(torch.nn.Dropout(0.4)(torch.ones(5, 9)), dropped(torch.ones(5, 9)))


def test_in_place_is_the_same() -> None:
    x = torch.randn(5, 9)
    expected = dropped(x)
    assert dropped(x, inplace=True) is x and torch.equal(x, expected)


def test_what_can_not_be_keyed_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"layer\.0\.head drops out a tensor of shape \[1, 4\] while 5 samples"):
        dropped(torch.ones(1, 4))
    heads, masks = torch.ones(5, 2, 3, 4), KeyedDropout(0)
    with masks.samples(STEP, IDS):
        masks.enter("layer.0.attention")
        with pytest.raises(Unsupported, match=r"layer\.0\.attention .*p = 0\.2.*Set attn_implementation to eager"):
            functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2)
        functional.scaled_dot_product_attention(heads, heads, heads)


def test_other_threads_and_what_comes_after_are_left_alone() -> None:
    plain = torch.ones(3, 4)
    masks = KeyedDropout(0)
    with masks.samples(STEP, IDS):
        thread = threading.Thread(target=lambda: functional.dropout(plain, 0.5, inplace=True))
        thread.start()
        thread.join(10)
    assert set(plain.unique().tolist()) <= {0.0, 2.0}
    functional.dropout(plain, 0.5)


# Whole models


class Recorded(KeyedDropout):
    """Remembers in which order keys were drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.keys: list[tuple[str | None, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.call
        out = super().__torch_function__(func, types, args, kwargs)
        if self.call > before:
            self.keys.append((self.unit, before))
        return out


class Replayed(KeyedDropout):
    """Draws recorded keys in their order, whoever asks; also for OPT, which folds its tokens into the rows."""

    def __init__(self, seed: int, keys: list[tuple[str | None, int]]) -> None:
        super().__init__(seed)
        self.keys = iter([*keys, ("end", 0)])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.unit is None:
            self.unit, self.call = next(self.keys)
        before, folded = self.call, None
        if func is functional.dropout and len(args[0]) == len(self.sample_ids) * 12:
            folded = args[0].shape
            args = (args[0].view(len(self.sample_ids), 12, -1),)
        out = super().__torch_function__(func, types, args, kwargs)
        if self.call > before:
            self.unit = None
        return out if folded is None else out.view(folded)


def of_whole(
    layered: Layered, values: dict[str, Tensor], ids: tuple[int, ...], masks: KeyedDropout
) -> dict[str, Tensor]:
    with masks.samples(STEP, ids):
        return layered.run(0, len(layered.units), values, entering=masks.enter)


@pytest.mark.parametrize("name", TEXT)
def test_pieces_of_a_batch_are_the_rows_of_the_whole(name: str) -> None:
    """Logits row by row, and the gradients of the losses' sum."""
    load = text_oracle.workload(name, dtype="float64", dropout=0.1)
    layered, values = text_oracle.build(load), text_oracle.batch(load)
    whole = of_whole(layered, values, IDS, KeyedDropout(0))
    whole["loss"].backward()
    expected = text_oracle.gradients(layered.root)
    for rows in ([3, 0], [1, 2, 4]):
        piece = {key: tensor[rows] for key, tensor in values.items()}
        made = of_whole(layered, piece, tuple(IDS[row] for row in rows), KeyedDropout(0))
        torch.testing.assert_close(made["logits"], whole["logits"][rows], rtol=1e-12, atol=1e-13)
        made["loss"].backward()
    for parameter, gradient in text_oracle.gradients(layered.root).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-9, atol=1e-11, msg=parameter)
    other = of_whole(layered, values, IDS, KeyedDropout(1))
    assert not torch.allclose(other["logits"], whole["logits"])


def test_entering_names_each_unit_before_it_runs() -> None:
    load = workload("t5-tiny")
    layered, seen = models.build(load), list[str]()
    for unit in (*layered.units, *layered.local_units):
        unit.register_forward_pre_hook(lambda unit, _: seen.append(f"runs {unit.name}"))
    layered.run(0, 4, batch(load, 2), entering=seen.append)
    order = [unit.name for unit in (*layered.locals_of(layered.units[:4]), *layered.units[:4])]
    assert seen == [line for name in order for line in (name, f"runs {name}")] and len(order) > 4


@pytest.mark.parametrize("name", TEXT)
def test_stages_draw_what_the_whole_draws(name: str) -> None:
    load = text_oracle.workload(name, dropout=0.1)
    layered, values = text_oracle.build(load), text_oracle.batch(load)
    expected = of_whole(layered, values, IDS, KeyedDropout(0))
    made = values
    for first, last in text_oracle.layer_ranges(layered):
        masks = KeyedDropout(0)
        with masks.samples(STEP, IDS):
            made = values | layered.run(first, last, made, entering=masks.enter)
    assert torch.equal(made["loss"], expected["loss"]) and torch.equal(made["logits"], expected["logits"])


@pytest.mark.parametrize("name", [*TEXT, "mobilenet-v2-tiny", "efficientnet-tiny"])
def test_units_draw_where_hugging_face_draws(name: str) -> None:
    """The uncut model with the keys of our run, in their order: the same logits, and no key left over."""
    load = workload(name)
    layered, values = models.build(load), batch(load, len(IDS))
    record = Recorded(0)
    made = of_whole(layered, values, IDS, record)["logits"]
    layered.root.train()
    replay = Replayed(0, record.keys)
    inputs = {key: values[key] for key in layered.inputs}
    with replay.samples(STEP, IDS):
        out = layered.root(**inputs)
    torch.testing.assert_close(made, out if isinstance(out, Tensor) else out.logits, rtol=0, atol=1e-6)
    assert record.keys and len(set(record.keys)) == len(record.keys)
    assert replay.unit == "end"


class Randomness(TorchDispatchMode):
    """Collects the operators that draw from torch's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.drew: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drew.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*TEXT, *IMAGE])
def test_no_model_draws_anything_else(name: str) -> None:
    load = workload(name)
    layered, values = models.build(load), batch(load, len(IDS))
    with Randomness() as plain:
        layered.run(0, len(layered.units), values)
    with Randomness() as keyed:
        of_whole(layered, values, IDS, KeyedDropout(0))
    assert (plain.drew, keyed.drew) == (set() if name == "resnet-tiny" else {"aten.bernoulli_.float"}, set())


def saved_bytes(function: Callable[[], dict[str, Tensor]]) -> int:
    """Bytes of the distinct storages that autograd keeps."""
    packed: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        packed[storage_id(tensor)] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        assert function()["loss"].requires_grad
    return sum(nbytes for nbytes, _ in packed.values())


@pytest.mark.parametrize("name", [*TEXT, "efficientnet-tiny"])
def test_a_model_saves_as_many_bytes_as_with_torchs_dropout(name: str) -> None:
    load = workload(name)
    layered, values = models.build(load), batch(load, len(IDS))
    plain = saved_bytes(lambda: layered.run(0, len(layered.units), values))
    assert saved_bytes(lambda: of_whole(layered, values, IDS, KeyedDropout(0))) == plain
