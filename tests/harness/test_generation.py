"""Generated tokens: every scheme chooses those of transformers' own generation, and does what the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from harness import datasets, models, profile, runner
from harness.cluster import Device
from harness.costs import FORWARD, Costs
from harness.errors import OrreryError, Unsupported
from harness.experiment import one
from harness.models import shards
from harness.plan import Plan, Send
from harness.plan.graph import InvalidPlan
from harness.plan.validate import validate
from harness.sharded import HYBRID, SEQUENCE, TENSOR, Shares
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.engine import devices
from tests.harness.engine.devices import outcomes
from tests.harness.test_sharded import Given, planned, uneven
from tests.harness.toys import cluster

PROMPT, NEW = 11, 5
SCHEMES = (
    (HYBRID, {"overlap": True}, 1),
    (HYBRID, {"overlap": True, "tiles": 2}, 3),
    (HYBRID, {}, 4),
    (TENSOR, {"tiles": 2}, 2),
    (TENSOR, {}, 4),
    (SEQUENCE, {}, 1),
    (SEQUENCE, {}, 3),
    (HYBRID, {"overlap": True, "embeddings": "everywhere"}, 3),
)


def generating(model: str, rows: int = 1, new_tokens: int = NEW, **options: object) -> Workload:
    """Two requests of so many rows."""
    return Workload(
        model,
        "synthetic",
        num_samples=2 * rows,
        batch_size=rows,
        technique="inference",
        seq_len=PROMPT,
        new_tokens=new_tokens,
        **options,
    )


def shares(costs: Costs, count: int) -> Shares:
    """One head and few columns for all devices but the first, which has few tokens."""
    found = uneven(costs, count)
    tokens = [1] * (count - 1)
    return replace(found, tokens=(PROMPT - sum(tokens), *tokens))


def noisy(load: Workload) -> models.Layered:
    """The model with all weights and biases drawn: nothing of what is learnt is zero or one."""
    layered = models.build(load)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layered.root.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return layered


def generated(load: Workload, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Logits [samples, new tokens, vocabulary] of the devices, and of transformers; prompts have several lengths."""
    layered = noisy(load)
    tensors = {name: tensor.detach().contiguous() for name, tensor in shards.named(layered.root)}
    save_file(tensors, folder / f"weights{hash(load)}.safetensors")
    values = datasets.load(load).batch(range(load.num_samples))
    for row in range(load.num_samples):
        values["attention_mask"][row, : 3 * row] = 0
    monkeypatch.setattr(devices.datasets, "load", lambda *asked: Given(values))
    answers: dict[int, list[Tensor]] = {sample: [] for sample in range(load.num_samples)}
    for outcome in outcomes(dict.fromkeys(plan.devices, plan), load, folder).values():
        if outcome.error is not None:
            raise outcome.error
        for ids, logits in outcome.answers:
            for sample, row in zip(ids, logits, strict=True):
                answers[sample].append(row)
    asked = GenerationConfig(
        max_new_tokens=load.new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    made = layered.root.generate(values["input_ids"], asked, attention_mask=values["attention_mask"])
    return torch.stack([torch.stack(rows) for rows in answers.values()]), torch.stack(made.logits, 1)


@pytest.mark.parametrize("model", ["gpt2-tiny", "opt-tiny"])
@pytest.mark.parametrize(("scheme", "how", "count"), SCHEMES)
def test_tokens_are_those_of_transformers(
    model: str, scheme: str, how: dict[str, object], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = generating(model, rows=1 + count % 2, attn_implementation="sdpa" if count % 2 else "eager")
    plan, _ = planned(load, scheme, shares(profile.count(load), count), **how)
    found, wanted = generated(load, plan, tmp_path, monkeypatch)
    assert found.argmax(-1).tolist() == wanted.argmax(-1).tolist()
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_few_tokens(new_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = generating("gpt2-tiny", new_tokens=new_tokens)
    plan, _ = planned(load, HYBRID, 2, overlap=True)
    assert sum(phase.repeat for phase in plan.phases if phase.decoding) == 2 * (new_tokens - 1)
    found, wanted = generated(load, plan, tmp_path, monkeypatch)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_device_keeps_the_keys_and_values_of_its_heads() -> None:
    load = generating("gpt2-tiny", rows=2)
    costs = profile.count(load)
    chosen = shares(costs, 3)
    width = costs.tensors["layer.0.keys"].width // sum(chosen.heads)
    layers, places = 4, PROMPT + NEW - 1
    plan, _ = planned(load, TENSOR, chosen)
    for number, heads in enumerate(chosen.heads):
        held = plan.phases[1].live[f"device{number}"]
        kept = sum(plan.bytes(v) for v in held if v.name.endswith((".keys", ".values")))
        assert kept == 2 * layers * 2 * places * heads * width * 4  # keys and values, layers, rows


def test_what_a_further_token_sends() -> None:
    """Two all-reduces per layer and the leader's embedding, to the byte."""
    load, count = generating("opt-tiny", rows=2), 4
    plan, costs = planned(load, HYBRID, count, overlap=True)
    decode = next(phase for phase in plan.phases if phase.name == "decode")
    token = 2 * costs.tensors["embedding.hidden"].width * 4
    trace = simulate(replace(plan, phases=(replace(decode, repeat=1),)), costs, cluster(count))
    assert trace.comm_bytes == (count - 1) * token + 4 * 2 * 2 * (count - 1) * token
    alone, costs = planned(load, SEQUENCE, count)
    after = [a for p in alone.phases if p.decoding for actions in p.actions.values() for a in actions]
    assert not [action for action in after if isinstance(action, Send)]


@pytest.mark.parametrize("bandwidth", [1e6, 1e15])
def test_a_further_token_takes_as_long_as_its_arithmetic_or_its_bytes(bandwidth: float) -> None:
    load = generating("gpt2-tiny")
    costs = profile.count(load).decoding
    assert costs is not None
    device: Device = replace(cluster(1).devices[0], memory_bandwidth=bandwidth)
    units = list(costs.executed(0, len(costs.units)))
    weights = sum(costs.parameters[p].bytes for u in units if u.kind != "embedding" for p in u.parameters)
    kept = sum(t.bytes(1) for name, t in costs.tensors.items() if name.endswith((".keys", ".values")))
    token = 8
    arithmetic = sum(unit.forward.matmul.at(1) for unit in units) / device.rates["matmul"][0]
    kernels = sum(unit.forward.kernels.at(1) for unit in units) * device.kernel_overhead_s
    expected = kernels + ((weights + kept + token) / bandwidth if bandwidth < 1e9 else arithmetic)
    assert costs.seconds(device, 0, len(costs.units), FORWARD, 1) == pytest.approx(expected, rel=1e-6)


def test_a_plan_that_loses_the_cache_is_refused() -> None:
    plan, costs = planned(generating("gpt2-tiny"), TENSOR, 2)
    prompt, decode, *rest = plan.phases
    held = {device: values[:-1] for device, values in decode.live.items()}
    with pytest.raises(InvalidPlan, match="begins with"):
        validate(replace(plan, phases=(prompt, replace(decode, live=held), *rest)), costs)


def test_what_generates_nothing_says_so() -> None:
    with pytest.raises(OrreryError, match="technique inference"):
        Workload("gpt2-tiny", "synthetic", num_samples=1, batch_size=1, new_tokens=3)
    with pytest.raises(Unsupported, match="causal"):
        profile.count(generating("bert-tiny"))
    asked = {"model": "gpt2-tiny", "technique": "inference", "dataset": "synthetic", "testbed": "pac-nano-4"}
    record = runner.run(one({**asked, "method": "gpipe", "new_tokens": 3, "num_samples": 16}, {}))
    assert (record.status, record.reason) == ("unsupported", "a pipeline generates no tokens")
    with pytest.raises(OrreryError, match="positions"):
        models.build(generating("gpt2-tiny", new_tokens=10**5))
