"""Techniques add what the paper counted, change nothing where they should not, and equal Hugging Face's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness import models
from harness.errors import Unsupported
from harness.models import techniques
from harness.models.classifier import at_last_token
from harness.models.layered import Layered
from tests.harness.models import text_oracle as oracle

#: PAC, Table 1 (printed shares) and the counts that its weights amount to: millions of parameters.
LORA, ADAPTERS = 9.437184, 12.69
#: Matrices and the ways down and up; the paper's figure knows neither norms, nor the layers' biases, nor tables.
PARALLEL_ADAPTERS = {"t5-base": 5.09, "bart-large": 9.05, "t5-large": 17.70}
ADDING = ("lora", "adapters", "parallel-adapters")


def on_meta(model: str, technique: str, **options: object) -> Layered:
    return models.build(oracle.workload(model, technique=technique, technique_options=options), "meta")


def trained_numel(layered: Layered) -> int:
    """Parameters that the technique adds and trains, the head not counted."""
    heads = {id(p) for unit in layered.units if unit.kind == "head" for p in unit.parameters()}
    return sum(p.numel() for p in layered.root.parameters() if p.requires_grad and id(p) not in heads)


def test_lora_has_the_papers_parameters():
    assert trained_numel(on_meta("t5-large", "lora")) == LORA * 1e6


def test_adapters_have_the_papers_parameters():
    assert trained_numel(on_meta("t5-large", "adapters")) == pytest.approx(ADAPTERS * 1e6, rel=1e-3)


@pytest.mark.parametrize("model", PARALLEL_ADAPTERS)
def test_parallel_adapters_have_the_papers_parameters(model):
    layered = on_meta(model, "parallel-adapters")
    network = layered.root.side
    ways = [*network.up.parameters(), *(p for stack in network.stacks for p in stack.downs.parameters())]
    inner = [p for stack in network.stacks for layer in stack.layers for p in layer.parameters() if p.dim() == 2]
    tables = [p for name, p in network.named_parameters() if "relative_attention_bias" in name]
    counted = sum(p.numel() for p in (*ways, *inner)) - sum(p.numel() for p in tables)
    assert counted == pytest.approx(PARALLEL_ADAPTERS[model] * 1e6, abs=5e3)
    assert counted < trained_numel(layered) < 1.01 * counted


def test_options_have_the_parameters_that_they_should():
    """Closed forms for T5-Base (width 768, 36 attentions, 24 layers) and BERT-Base (768, 3072, 12 layers)."""
    assert trained_numel(on_meta("t5-base", "lora", rank=4)) == 36 * 2 * 4 * (768 + 768)
    inner = 768 // 8
    assert trained_numel(on_meta("t5-base", "adapters", reduction=8)) == 24 * 2 * (2 * 768 * inner + inner + 768)
    h, f, kept = 768 // 4, 3072 // 4, 9
    layer = 4 * (h * h + h) + 2 * h * f + f + h + 2 * 2 * h
    ways = (kept + 1) * (768 * h + h) + 768 * h + 768
    options = {"reduction": 4, "gate": True, "dropped": "0,4,8", "init": "pruning"}
    assert trained_numel(on_meta("bert-base", "parallel-adapters", **options)) == kept * layer + ways + kept


def test_a_new_gate_takes_half_of_each():
    load = oracle.workload("bert-tiny", technique="parallel-adapters", technique_options={"gate": True})
    layered = models.build(load)
    unit = next(unit for unit in layered.units if unit.kind == "side-down" and len(unit.reads) == 2)
    hidden, state = torch.randn(2, 3, 64), torch.randn(2, 3, 8)
    (joined,) = unit(hidden, state)
    torch.testing.assert_close(joined, 0.5 * state + 0.5 * unit.held[0](hidden), rtol=0, atol=1e-6)
    joined.sum().backward()
    slope = 0.25 / 0.1 * (state - unit.held[0](hidden)).sum()
    torch.testing.assert_close(unit.held[1].alpha.grad, slope.view(1), rtol=1e-5, atol=1e-5)


def test_lora_takes_its_dropout_from_its_option_then_from_the_workload():
    for options, dropout, expected in (({}, None, 0.1), ({}, 0.2, 0.2), ({"dropout": 0.3}, 0.2, 0.3)):
        load = oracle.workload("bert-tiny", technique="lora", technique_options=options, dropout=dropout)
        named = models.build(load, "meta").root.named_modules()
        found = [module for name, module in named if name.endswith("lora_dropout.default")]
        assert found and all(getattr(m, "p", 0.0) == expected for m in found)


def test_lora_is_scaled_by_alpha_over_rank():
    """One layer's queries, written out: W x + b + alpha / rank B A x."""
    load = oracle.workload("bert-tiny", technique="lora", technique_options={"rank": 4, "alpha": 6}, dropout=0.0)
    layered = oracle.build(load)
    query = layered.root.get_submodule("bert.encoder.layer.0.attention.self.query")
    a, b = (query.get_parameter(f"lora_{name}.default.weight") for name in "AB")
    assert (a.shape, b.shape) == ((4, 64), (64, 4))
    x = torch.randn(2, 3, 64)
    wanted = x @ query.base_layer.weight.T + query.base_layer.bias + 6 / 4 * (x @ a.T @ b.T)
    torch.testing.assert_close(query(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("technique", ADDING)
@pytest.mark.parametrize("model", oracle.TINY)
def test_only_what_is_added_and_the_head_are_trained(model, technique):
    load = oracle.workload(model, technique=technique)
    layered, values = oracle.build(load), oracle.batch(load)
    layered.run(0, len(layered.units), values)["loss"].backward()
    heads = {id(p) for unit in layered.units if unit.kind == "head" for p in unit.parameters()}
    for name, parameter in layered.root.named_parameters():
        added = any(part in techniques.ADDED for part in name.split("."))
        trained = added or id(parameter) in heads
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name


@pytest.mark.parametrize("model", oracle.TINY)
def test_new_lora_changes_nothing(model):
    load = oracle.workload(model, technique="lora", dropout=0.0)
    adapted, plain = models.build(load), models.build(oracle.workload(model, dropout=0.0))
    state = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.root.state_dict().items()}
    plain.root.load_state_dict({name: tensor for name, tensor in state.items() if ".lora_" not in name})
    values = oracle.batch(load)
    made, wanted = (layered.run(0, len(layered.units), values)["logits"] for layered in (adapted, plain))
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("model", oracle.TINY)
def test_adapters_that_add_nothing_change_nothing(model):
    load = oracle.workload(model, technique="adapters", dropout=0.0)
    adapted, plain = models.build(load), models.build(oracle.workload(model, dropout=0.0))
    state = adapted.root.state_dict()
    plain.root.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("adapters.")})
    values = oracle.batch(load)
    with torch.no_grad():
        before = adapted.run(0, len(adapted.units), values)["logits"]
        for adapter in adapted.root.adapters.values():
            adapter.up.weight.zero_()
        made, wanted = (layered.run(0, len(layered.units), values)["logits"] for layered in (adapted, plain))
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)
    assert not torch.equal(before, wanted)
    num_layers = len({unit.layer for unit in plain.units if unit.kind == "attention"})
    assert len(adapted.root.adapters) == 2 * num_layers


@pytest.mark.parametrize("options", [{}, {"gate": True, "dropped": "0", "reduction": 4}], ids=["default", "options"])
@pytest.mark.parametrize("model", oracle.TINY)
def test_parallel_adapters_are_the_familys_own_layers(model, options):
    """The side network as its definition has it, over the uncut backbone's activations, by transformers' own code."""
    load = oracle.workload(model, technique="parallel-adapters", technique_options=options, dropout=0.0)
    layered, values = oracle.build(load), oracle.batch(load)
    layered.root.eval()
    with torch.no_grad():
        made = layered.run(0, len(layered.units), values)["logits"]
        wanted = side_logits(layered.root, model, values)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)
    for parameter in layered.root.side.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        assert not torch.allclose(layered.run(0, len(layered.units), values)["logits"], made, atol=1e-3)


def side_logits(root: nn.Module, model: str, values: dict[str, Tensor]) -> Tensor:
    network, family = root.side, models.entry(model).family
    activations: dict[str, list[Tensor]] = {}

    def watch(module: nn.Module, key: str, entering: bool = False) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: object = None) -> None:
            tensor = inputs[0] if entering else output
            activations.setdefault(key, []).append(tensor[0] if isinstance(tensor, tuple) else tensor)

        module.register_forward_pre_hook(hook) if entering else module.register_forward_hook(hook)

    backbone = root.backbone if hasattr(root, "backbone") else root.base_model
    stacks = {
        "t5": lambda: [backbone.encoder.block, backbone.decoder.block],
        "bart": lambda: [backbone.encoder.layers, backbone.decoder.layers],
        "bert": lambda: [backbone.encoder.layer],
        "distilbert": lambda: [backbone.transformer.layer],
        "gpt2": lambda: [backbone.h],
        "opt": lambda: [backbone.decoder.layers],
    }[family]()
    for number, stack in enumerate(stacks):
        watch(stack[0], f"{number}", entering=True)
        for layer in stack:
            watch(layer, f"{number}")
    final: list[Tensor] = []
    head = {"bert": "bert.pooler", "gpt2": "score", "opt": "score"}
    if family in head:
        root.get_submodule(head[family]).register_forward_pre_hook(lambda _, inputs: final.append(inputs[0]))
    if family in ("bert", "distilbert", "gpt2", "opt"):
        oracle.logits(root, values)
        final.append(activations["0"][-1])  # where no norm follows
    else:
        inputs = {name: tensor for name, tensor in values.items() if name != "labels"}
        final.append(backbone(**inputs, use_cache=False).last_hidden_state)
    memory, states = None, []
    for stack, beside in enumerate(network.stacks):
        points = activations[f"{stack}"]
        state = beside.downs[0](points[0])
        extra: dict[str, object] = {}
        for number, (place, layer) in enumerate(zip(beside.places, beside.layers, strict=True)):
            narrowed = beside.downs[number + 1](points[place + 1])
            joined = state + narrowed
            if beside.gates is not None:  # LST's, with its temperature of 0.1
                share = 1 / (1 + torch.exp(-10 * beside.gates[number].alpha))
                joined = share * state + (1 - share) * narrowed
            state = run_layer(family, layer, joined, values, memory, extra)
        if beside.norm is not None:
            state = beside.norm(state)
        memory = state
        states.append(state)
    merged = final[0] + network.up(states[-1])
    if family in ("t5", "bart"):
        return root.classifier(merged[:, -1])
    if family == "bert":
        return root.classifier(root.bert.pooler(merged))
    if family == "distilbert":
        return root.classifier(torch.relu(root.pre_classifier(merged[:, 0])))
    return at_last_token(root.score(merged), values["input_ids"], root.config.pad_token_id)


def run_layer(
    family: str, layer: nn.Module, x: Tensor, values: dict[str, Tensor], memory: Tensor | None, extra: dict[str, object]
) -> Tensor:
    """One of transformers' layers by its own forward. `extra` carries T5's position bias from its first layer on."""
    least = torch.finfo(x.dtype).min
    padding = (1.0 - values["attention_mask"][:, None, None, :].to(x.dtype)) * least
    if family == "t5":
        mask = padding if memory is None else torch.zeros(1, 1, x.shape[1], x.shape[1])
        out = layer(
            x,
            attention_mask=mask,
            position_bias=extra.get("bias"),
            encoder_hidden_states=memory,
            encoder_attention_mask=None if memory is None else padding,
            encoder_decoder_position_bias=extra.get("cross"),
        )
        extra["bias"] = out[1]
        if memory is not None:
            extra["cross"] = out[2]
        return out[0]
    if family == "bart" and memory is not None:
        out = layer(x, attention_mask=None, encoder_hidden_states=memory, encoder_attention_mask=padding)
    elif family in ("gpt2", "opt"):
        tokens = x.shape[1]
        causal = torch.full((tokens, tokens), least).triu(1)
        out = layer(x, attention_mask=(padding + causal).clamp(min=least))
    else:
        out = layer(x, attention_mask=padding)
    return out[0] if isinstance(out, tuple) else out


def test_what_can_not_be_adapted_is_said():
    for technique, expected in (("lora", "has none"), ("adapters", "has none"), ("parallel-adapters", "has none")):
        with pytest.raises(Unsupported, match=expected):
            models.build(oracle.workload("resnet-tiny", technique=technique), "meta")


def test_widths_that_do_not_divide_are_said():
    with pytest.raises(Unsupported, match="7 times narrower, and hidden_size is 64"):
        on_meta("bert-tiny", "parallel-adapters", reduction=7)
    with pytest.raises(Unsupported, match="and num_attention_heads is 4: a hidden_size of 2 is no multiple"):
        on_meta("bert-tiny", "parallel-adapters", reduction=32)
    with pytest.raises(Unsupported, match="and 64 is no multiple"):
        on_meta("bert-tiny", "adapters", reduction=7)
    with pytest.raises(Unsupported, match="names layer 4, and the model's last one is 3"):
        on_meta("bert-tiny", "parallel-adapters", dropped="1,4")
    with pytest.raises(Unsupported, match="names all layers of a stack"):
        on_meta("t5-tiny", "parallel-adapters", dropped="0,1")
