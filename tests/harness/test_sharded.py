"""Layers shared among devices: every scheme answers as the uncut Hugging Face model, and does what the plan says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness import profile
from harness.costs import Costs
from harness.errors import Unsupported
from harness.models import shards
from harness.plan import Collective, Combine, Compute, Plan, Send
from harness.plan.graph import InvalidPlan
from harness.plan.serial import from_json, to_json
from harness.plan.validate import validate
from harness.sharded import HYBRID, SCHEMES, SEQUENCE, TENSOR, Shares, even_shares, plan_sharded, shared_block
from harness.simulator import simulate
from harness.workload import Workload
from tests.harness.engine import devices
from tests.harness.engine.devices import outcomes, run_devices
from tests.harness.models import text_oracle
from tests.harness.toys import cluster

MODELS = ("bert-tiny", "distilbert-tiny", "gpt2-tiny", "opt-tiny")
TOKENS = text_oracle.TOKENS


@dataclass(frozen=True)
class Given:
    """A data set of these very values, batch first."""

    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.values["labels"])

    def batch(self, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        return {name: tensor[torch.as_tensor(sample_ids)] for name, tensor in self.values.items()}


def requests(model: str, rows: int, **options: object) -> Workload:
    """Two requests of so many rows."""
    asked = text_oracle.workload(model, technique="inference", **options)
    return replace(asked, num_samples=2 * rows, batch_size=rows)


def planned(load: Workload, scheme: str, shares: Shares | int, **how: object) -> tuple[Plan, Costs]:
    costs = profile.count(load)
    shares = even_shares(costs, shares) if isinstance(shares, int) else shares
    names = [f"device{i}" for i in range(len(shares.heads))]
    plan = plan_sharded("by-hand", load, costs, names, scheme, shares, **how)
    validate(plan, costs)
    assert from_json(to_json(plan)) == plan
    return plan, costs


def uneven(costs: Costs, count: int) -> Shares:
    """One head, few columns and many tokens for the first device; of five devices one has no part of each kind."""
    block = shared_block(costs)
    heads = [1] * (count - 1)
    columns = [3 + i for i in range(count - 1)]
    tokens = [1 + i % 2 for i in range(count - 1)]
    if count == 5:
        heads[3], columns[1], tokens[2] = 0, 0, 0
    return Shares(
        (*heads, block.heads - sum(heads)),
        (*columns, block.columns - sum(columns)),
        (TOKENS - sum(tokens), *tokens),
    )


def answers(load: Workload, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """What the devices answer, and the uncut model; weights and biases are noise, rows have different lengths."""
    layered = text_oracle.build(load)
    tensors = {name: tensor.detach().contiguous() for name, tensor in shards.named(layered.root)}
    save_file(tensors, folder / f"weights{hash(load)}.safetensors")
    values = text_oracle.batch(load, load.num_samples)
    monkeypatch.setattr(devices.datasets, "load", lambda *asked: Given(values))
    found: dict[int, Tensor] = {}
    ended = outcomes(dict.fromkeys(plan.devices, plan), load, folder)
    for outcome in ended.values():
        if outcome.error is not None:
            raise outcome.error
        for ids, logits in outcome.answers:
            found.update(zip(ids, logits, strict=True))
    layered.root.eval()
    with torch.no_grad():
        wanted = text_oracle.logits(layered.root, values)
    return torch.stack([found[sample] for sample in range(load.num_samples)]), wanted


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("scheme", "how", "count"),
    [
        *((HYBRID, {"overlap": True}, count) for count in (1, 2, 4)),
        *((HYBRID, {"overlap": True, "tiles": 3}, count) for count in (3, 5)),
        *((HYBRID, {}, count) for count in (3, 5)),
        *((TENSOR, {"tiles": 2}, count) for count in (2, 4, 5)),
        *((SEQUENCE, {}, count) for count in (1, 3, 5)),
        *((scheme, {"embeddings": "everywhere"}, 3) for scheme in SCHEMES),
        (HYBRID, {"embeddings": "everywhere", "overlap": True, "tiles": 2}, 4),
    ],
)
def test_answers_as_the_uncut_model(
    model: str, scheme: str, how: dict[str, object], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = requests(model, rows=1 if count % 2 else 3)
    plan, _ = planned(load, scheme, uneven(profile.count(load), count), **how)
    found, wanted = answers(load, plan, tmp_path, monkeypatch)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_for_every_length_and_attention(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths that no number of devices divides, down to one token on three devices."""
    for tokens in (1, 2, 7):
        ids = torch.randint(3, 50, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(2).long()}
        monkeypatch.setattr(text_oracle, "batch", lambda *asked, values=values: values)
        for model in ("distilbert-tiny", "gpt2-tiny"):
            load = replace(requests(model, 1, attn_implementation=attention), seq_len=tokens)
            plan, _ = planned(load, HYBRID, 3, overlap=True)
            found, wanted = answers(load, plan, tmp_path, monkeypatch)
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_device_never_holds_more_than_its_share(tmp_path: Path) -> None:
    """Of the weights, to the byte what the plan says, and of memory at its peak what the simulator says."""
    load = replace(requests("bert-tiny", 1), seq_len=64)
    costs = profile.count(load)
    shares = Shares((3, 1), (100, 28), (40, 24))
    plan, _ = planned(load, HYBRID, shares, overlap=True)
    found = run_devices(plan, load, tmp_path)
    simulated = simulate(plan, costs, cluster(2))
    for device, report in found.reports.items():
        held = [value for value in plan.phases[0].live[device] if plan.tensors[value.name].kind == "weights"]
        assert report.memory[0].standing["weights"] == sum(map(plan.bytes, held))
        assert report.memory[0].peak == pytest.approx(simulated.peak_bytes[device], rel=0.05)
    whole = sum(p.bytes for p in costs.parameters.values())
    assert found.reports["device1"].memory[0].standing["weights"] < 0.2 * whole
    assert found.execution.trace.link_bytes == simulated.link_bytes


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("scheme", "overlap", "factor"), [(HYBRID, False, 4), (HYBRID, True, 4), (TENSOR, False, 4), (SEQUENCE, False, 2)]
)
def test_bytes_per_device_and_layer(count: int, scheme: str, overlap: bool, factor: int) -> None:
    """4 (D-1)/D s h b by width, half of it by tokens; the same whether tiles overlap or not."""
    load = replace(requests("bert-tiny", 1), seq_len=64)
    plan, costs = planned(load, scheme, count, overlap=overlap)
    entering, leaving = "layer.1.hidden", "layer.2.hidden"  # what enters is gathered for the layer's first product
    sent: Counter[str] = Counter()
    for event in simulate(plan, costs, cluster(count)).events:
        name = event.label.partition("#")[0]
        mine = name == entering or (name.startswith("layer.2.") and name != leaving)
        if event.queue == "nic-out" and event.iteration == 0 and mine:
            sent[event.device] += event.nbytes
    assert sent == dict.fromkeys(plan.devices, factor * (count - 1) * costs.tensors[leaving].bytes(1) // count)


def test_only_what_the_scheme_issues() -> None:
    """Collectives per layer: two of each kind for hybrid parallelism, no all-reduce; two all-reduces by width."""
    load = replace(requests("bert-tiny", 1), seq_len=64)
    layers = 4
    wanted = {
        HYBRID: {"reduce-scatter": 2 * layers, "all-gather": 2 * layers},
        TENSOR: {"all-reduce": 2 * layers, "all-gather": 1},
        SEQUENCE: {"all-gather": 2 * layers},
    }
    for scheme in SCHEMES:
        plan, _ = planned(load, scheme, 3)
        for actions in plan.phases[0].actions.values():
            assert Counter(a.kind for a in actions if isinstance(a, Collective)) == wanted[scheme]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("megabytes_per_s", [0.5, 4.0, 50.0])
def test_a_fused_operation_takes_what_its_tiles_take(count: int, megabytes_per_s: float) -> None:
    """t_tile + (D-1) max(t_tile, t_step) for an all-gather and the product it feeds, and for a product and the
    reduce-scatter that follows; exact, where nothing else interferes."""
    load = replace(requests("bert-tiny", 1), seq_len=64)
    plan, costs = planned(load, HYBRID, count, overlap=True)
    boards = cluster(count, bandwidth=megabytes_per_s * 1e6)
    trace = simulate(plan, costs, boards)
    step = costs.tensors["layer.2.hidden"].bytes(1) / count / (megabytes_per_s * 1e6)
    starts: dict[str, list[float]] = {}
    ends: dict[str, list[float]] = {}
    names = {f"F0 {i}:{i + 1}": unit.name for i, unit in enumerate(costs.units)}
    for event in trace.events:
        if event.iteration == 0 and event.device == "device0" and event.queue == "compute":
            name = names.get(event.label) or event.label.partition(" ")[2].partition("#")[0]
            starts.setdefault(name, []).append(event.start_s)
            ends.setdefault(name, []).append(event.end_s)
    for number, unit in enumerate(costs.units):
        if unit.name in ("layer.2.mlp-in", "layer.2.mlp-out"):
            tile = costs.seconds(boards.devices[0], number, number + 1, "forward", 1, 1 / count**2)
            last = max(ends[unit.writes[0]]) if unit.kind == "mlp-out" else max(ends[unit.name])
            took = last - min(starts[unit.name])
            assert took == pytest.approx(tile + (count - 1) * max(tile, step), rel=1e-9)


def changed(plan: Plan, device: str, change: object) -> Plan:
    """The plan with `change(action)` for each action of the device; what becomes None is left out."""
    (phase,) = {id(phase): phase for phase in plan.phases}.values()
    actions = tuple(new for old in phase.actions[device] if (new := change(old)) is not None)  # type: ignore[operator]
    return replace(plan, phases=(replace(phase, actions={**phase.actions, device: actions}),))


def test_a_bias_is_added_once() -> None:
    load = requests("bert-tiny", 1)
    plan, costs = planned(load, HYBRID, 2)

    def without(action: object) -> object:
        if isinstance(action, Compute):
            return replace(action, weights=tuple(v for v in action.weights if not v.name.startswith("weights:")))
        return action

    with pytest.raises(InvalidPlan, match=r"the sum layer.0.projected.* has .*bias 0 times, and should have it once"):
        validate(changed(plan, "device0", without), costs)


def test_a_part_of_a_sum_is_not_taken_for_the_sum() -> None:
    load = requests("bert-tiny", 1)
    plan, costs = planned(load, HYBRID, 2, overlap=True)

    def skip(action: object) -> object:
        if isinstance(action, Combine) and action.op == "sum" and action.write.name == "layer.1.outer":
            return replace(action, reads=action.reads[:1])
        return action

    with pytest.raises(InvalidPlan, match=r"the sum layer.1.outer.* misses the channels"):
        validate(changed(plan, "device1", skip), costs)


def test_every_channel_and_token_is_computed_once() -> None:
    load = requests("bert-tiny", 1)
    plan, costs = planned(load, TENSOR, 2)

    def all_heads(action: object) -> object:
        if isinstance(action, Compute) and costs.units[action.units[0]].name == "layer.0.attention":
            return replace(action, width=None)
        return action

    with pytest.raises(InvalidPlan):
        validate(changed(plan, "device0", all_heads), costs)

    def no_replica(action: object) -> object:
        return replace(action, replica=False) if isinstance(action, Compute) else action

    with pytest.raises(InvalidPlan, match=r"are both computed|are covered twice"):
        validate(changed(plan, "device1", no_replica), costs)

    def half_a_head(action: object) -> object:
        if isinstance(action, Compute) and costs.units[action.units[0]].kind == "attention":
            return replace(action, width=(0, 1))
        return action

    with pytest.raises(InvalidPlan, match="in multiples of"):
        validate(changed(plan, "device0", half_a_head), costs)


def test_a_pass_has_the_width_of_its_weights() -> None:
    """The engine computes with what a device holds: a pass that says otherwise would make something else."""
    load = requests("bert-tiny", 1)
    plan, costs = planned(load, HYBRID, 2)

    def whole(action: object) -> object:
        return replace(action, width=None) if isinstance(action, Compute) else action

    with pytest.raises(InvalidPlan, match=r"its width is all, and that of weights@1:2.* \(0, 32\)"):
        validate(changed(plan, "device0", whole), costs)


def test_what_cannot_be_shared() -> None:
    with pytest.raises(Unsupported, match="can't be shared by width"):
        shared_block(profile.count(text_oracle.workload("t5-tiny", technique="inference")))


def test_sends_go_to_the_right_neighbour() -> None:
    """The ring is the order of the devices; only the leader talks to all."""
    load = replace(requests("bert-tiny", 1), seq_len=64)
    plan, _ = planned(load, HYBRID, 4, overlap=True)
    ring = list(plan.devices)
    for place, device in enumerate(ring[1:], 1):
        peers = {a.peer for a in plan.phases[0].actions[device] if isinstance(a, Send)}
        assert peers == {ring[(place + 1) % 4], ring[0]}
