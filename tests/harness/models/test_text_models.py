"""The chain of units computes what the uncut Hugging Face model computes, and costs what it costs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from harness import models
from tests.harness.models import text_oracle as oracle

ENCODER_DECODERS = ("t5-tiny", "bart-tiny")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", oracle.TINY)
def test_logits_equal_the_uncut_model(name, attention):
    load = oracle.workload(name, technique="inference", attn_implementation=attention)
    layered, values = oracle.build(load), oracle.batch(load)
    made = layered.run(0, len(layered.units), values)["logits"]
    torch.testing.assert_close(made, oracle.logits(layered.root, values), rtol=0, atol=1e-6)
    assert made.std() > 1e-2


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_longer_decoder_equals_the_uncut_model(name):
    load = oracle.workload(name, technique="inference", decoder_seq_len=4)
    layered, values = oracle.build(load), oracle.batch(load)
    made = layered.run(0, len(layered.units), values)["logits"]
    torch.testing.assert_close(made, oracle.logits(layered.root, values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2-tiny", "opt-tiny"])
def test_padding_on_the_left_equals_the_uncut_model(name):
    load = oracle.workload(name, technique="inference")
    layered, values = oracle.build(load), oracle.batch(load, left=True)
    made = layered.run(0, len(layered.units), values)["logits"]
    torch.testing.assert_close(made, oracle.logits(layered.root, values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", oracle.TINY)
def test_padding_is_not_looked_at(name):
    load = oracle.workload(name, technique="inference")
    layered, values = oracle.build(load), oracle.batch(load)
    changed = dict(values)
    hidden = values["attention_mask"] == 0
    # The classifier of a decoder-only model finds the last token by its id, so the new ids stay in front of it.
    if name in ("gpt2-tiny", "opt-tiny"):
        hidden = torch.zeros_like(hidden)
        hidden[:, 0] = True
        values["attention_mask"] = values["attention_mask"].masked_fill(hidden, 0)
        changed["attention_mask"] = values["attention_mask"]
    changed["input_ids"] = values["input_ids"].masked_fill(hidden, 99)
    before = layered.run(0, len(layered.units), values)["logits"]
    after = layered.run(0, len(layered.units), changed)["logits"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("cut", ["whole", "every layer"])
@pytest.mark.parametrize("name", oracle.TINY)
def test_loss_and_all_gradients_equal_the_uncut_model(name, cut):
    load = oracle.workload(name, dropout=0.0, dtype="float64", decoder_seq_len=2 if name in ENCODER_DECODERS else 1)
    layered, values = oracle.build(load), oracle.batch(load)
    expected = oracle.loss(layered.root, values)
    expected.backward()
    expected_gradients = oracle.gradients(layered.root)

    whole = [(0, len(layered.units))]
    stages = whole if cut == "whole" else oracle.layer_ranges(layered)
    made = oracle.loss_and_backward_in_stages(layered, values, stages)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)
    for parameter, gradient in oracle.gradients(layered.root).items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-7, atol=1e-9, msg=parameter)


@pytest.mark.parametrize("name", oracle.TINY)
def test_dropout_draws_in_the_order_of_the_uncut_model(name):
    load = oracle.workload(name, dropout=0.2)
    layered, values = oracle.build(load), oracle.batch(load)
    torch.manual_seed(11)
    expected = oracle.loss(layered.root, values)
    torch.manual_seed(11)
    made = oracle.chain_loss(layered, values)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=0)
    assert made != oracle.chain_loss(layered, values)


@pytest.mark.parametrize("name", ["bert-tiny", "t5-tiny"])
def test_one_label_is_a_regression(name):
    load = oracle.workload(name, dropout=0.0, num_labels=1)
    layered, values = oracle.build(load), oracle.batch(load)
    made = oracle.chain_loss(layered, values)
    torch.testing.assert_close(made, oracle.loss(layered.root, values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", oracle.TINY)
def test_the_losses_of_micro_batches_add_up(name):
    load = oracle.workload(name, dropout=0.0, dtype="float64")
    layered, values = oracle.build(load), oracle.batch(load)
    pieces = [{key: tensor[rows] for key, tensor in values.items()} for rows in (slice(0, 2), slice(2, None))]
    total = sum(oracle.chain_loss(layered, piece) for piece in pieces)
    torch.testing.assert_close(total, oracle.chain_loss(layered, values), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", oracle.TINY)
def test_eager_and_sdpa_agree(name):
    losses, gradients = [], []
    for attention in ("eager", "sdpa"):
        load = oracle.workload(name, dropout=0.0, attn_implementation=attention)
        layered = oracle.build(load)
        losses.append(oracle.chain_loss(layered, oracle.batch(load)))
        losses[-1].backward()
        gradients.append(oracle.gradients(layered.root))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for parameter, gradient in gradients[0].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=0, atol=max(1e-4 * largest, 1e-5))


@pytest.mark.parametrize("name", oracle.TINY)
def test_every_parameter_is_held_by_a_unit_and_only_tied_ones_by_two(name):
    layered = models.build(oracle.workload(name), "meta")
    holders: dict[str, list[str]] = {key: [] for key in layered.parameter_names().values()}
    for unit in (*layered.units, *layered.local_units):
        for parameter in unit.parameters():
            holders[layered.parameter_names()[id(parameter)]].append(unit.name)
    tied = {"backbone.shared.weight"} if name in ENCODER_DECODERS else set()
    assert {key for key, units in holders.items() if len(units) != 1} == tied
    assert all(holders.values())


@pytest.mark.parametrize("name", oracle.TINY)
def test_names_are_unique_and_every_tensor_is_written_before_it_is_read(name):
    layered = models.build(oracle.workload(name, decoder_seq_len=2), "meta")
    units = (*layered.local_units, *layered.units)
    assert len({unit.name for unit in units}) == len(units)
    known = {*layered.inputs, "labels"}
    for unit in units:
        assert set(unit.reads) <= known
        assert not known & set(unit.writes)
        known.update(unit.writes)
    numbers = [unit.layer for unit in layered.units]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(numbers[-1] + 1))


@pytest.mark.parametrize("name", oracle.TINY)
def test_between_layers_flows_one_hidden_state_and_the_encoder_output(name):
    layered = models.build(oracle.workload(name), "meta")
    for first, _ in oracle.layer_ranges(layered)[1:]:
        written = {tensor for unit in layered.units[:first] for tensor in unit.writes}
        read = {tensor for unit in layered.units[first:] for tensor in unit.reads}
        in_decoder = layered.units[first].name.startswith("decoder.") and "embedding" not in layered.units[first].name
        assert len(written & read) == (2 if in_decoder else 1)


def _saved_bytes(function) -> int:
    """Bytes of the storages that autograd keeps, weights aside."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", oracle.TINY)
def test_flops_and_saved_bytes_are_those_of_the_uncut_model(name, attention):
    load = oracle.workload(name, attn_implementation=attention)
    layered, values = oracle.build(load), oracle.batch(load)
    counts = []
    for function in (oracle.loss, oracle.chain_loss):
        model = layered.root if function is oracle.loss else layered
        with FlopCounterMode(display=False) as counter:
            function(model, values).backward()
        layered.root.zero_grad(set_to_none=True)
        counts.append((counter.get_total_flops(), _saved_bytes(lambda f=function, m=model: f(m, values))))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", oracle.TINY)
def test_units_run_on_fake_tensors_without_looking_at_values(name):
    load = oracle.workload(name, num_labels=3)
    layered = models.build(load, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {key: torch.ones_like(tensor, device="meta") for key, tensor in oracle.batch(load).items()}
        oracle.chain_loss(layered, values).backward()
        logits = layered.run(0, len(layered.units) - 1, values)["logits"]
    assert logits.shape == (oracle.ROWS, 3)
    assert all(parameter.grad is not None for parameter in layered.root.parameters())
