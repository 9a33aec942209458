"""One request, or batch, on several devices at once: every layer is shared by width, by tokens, or by both in turn.

Three schemes, over one ring of devices:

- "hybrid": attention and MLP by width (heads, columns), what lies between by tokens. The sums over the width leave by
  a reduce-scatter along the tokens, and an all-gather along the tokens feeds the next product (Galaxy, INFOCOM'24).
  With `overlap` both go round the ring tile by tile, beside the products.
- "tensor": attention and MLP by width, sums by an all-reduce, what lies between on every device (Megatron, arXiv
  1909.08053).
- "sequence": everything by tokens with whole weights; keys and values are all-gathered.

The first device of the ring leads: it alone has the head, and collects the tokens of what the last layer makes. It
alone has the embeddings, too, and hands out the tokens of what they make; or they are "everywhere", and every device
makes that for itself.

Where tokens are generated the prompt is done so, and every device keeps the keys and values of its heads. One token
can't be shared: after "hybrid" and "tensor" every further one is done by width with sums everywhere. After "sequence",
where weights are whole and the leader has all keys and values, it does that alone.

In training a batch goes the same way, and its gradients the mirrored way back (`training.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.costs import Costs
from harness.errors import Unsupported
from harness.plan import Phase, Plan, Shard, Value
from harness.schedules import buffers_of, micro_batches, state_of
from harness.sharded.layout import Sharded
from harness.sharded.member import Member, with_frees
from harness.sharded.shares import (
    EQUAL,
    EVERYWHERE,
    HYBRID,
    LEADER,
    MLP,
    SCHEMES,
    SEQUENCE,
    TENSOR,
    Block,
    Shares,
    even_shares,
    known_embeddings,
    shared_block,
    shared_cut,
    shares_of,
    whole_tiles,
)
from harness.sharded.training import Trainer
from harness.workload import Workload

__all__ = [
    "EQUAL",
    "EVERYWHERE",
    "HYBRID",
    "LEADER",
    "MLP",
    "SCHEMES",
    "SEQUENCE",
    "TENSOR",
    "Block",
    "Shares",
    "even_shares",
    "known_embeddings",
    "plan_sharded",
    "shared_block",
    "shared_cut",
    "shares_of",
    "whole_tiles",
]


def plan_sharded(
    method: str,
    workload: Workload,
    costs: Costs,
    devices: Sequence[str],
    scheme: str,
    shares: Shares,
    overlap: bool = False,
    tiles: int = 1,
    embeddings: str = LEADER,
    micro_batch_size: int | None = None,
) -> Plan:
    """All requests, or batches, of the workload under the scheme. `micro_batch_size`: into which batches are cut in
    training; None: not at all. Raises Unsupported where the layers can't be shared."""
    if costs.training:
        _check_trainable(workload, costs, overlap)
    sharded = Sharded(costs, tuple(devices), scheme, shares, overlap, tiles, embeddings, workload.optimizer)
    built: dict[tuple[int, int], tuple[Phase, ...]] = {}
    for rows, repeat in workload.batches():
        batch = "" if rows == workload.batch_size else " last batch"
        built[rows, repeat] = built.get((rows, repeat)) or _phases(
            sharded, rows, repeat, workload.new_tokens, batch, micro_batch_size
        )
    further = {} if sharded.further is None else sharded.further.tensors
    return Plan(
        method=method,
        num_units=len(costs.units),
        tensors=sharded.tensors | further,
        phases=tuple(phase for batch in workload.batches() for phase in built[batch]),
        summary={
            "scheme": scheme,
            "devices": list(devices),
            "heads": list(shares.heads),
            "columns": list(shares.columns),
            "tokens": list(shares.tokens),
            "overlap": overlap,
            "tiles": tiles,
            "embeddings": embeddings,
        },
    )


def _check_trainable(workload: Workload, costs: Costs, overlap: bool) -> None:
    """Refuse what has no way back here."""
    if overlap:
        raise Unsupported("layers that are shared are trained without overlap of transfers and products")
    if workload.clip_norm is not None:
        raise Unsupported("gradients of layers that are shared are not clipped by a norm")
    if not all(parameter.trainable for parameter in costs.parameters.values()):
        raise Unsupported(f"layers that are shared are trained whole (full), not by {workload.technique}")


def _phases(
    sharded: Sharded, rows: int, repeat: int, new_tokens: int | None, batch: str, micro_batch_size: int | None
) -> tuple[Phase, ...]:
    """So many batches, or requests, one after the other; where they generate each is a prompt, which gives the first
    token, and the tokens after it."""
    if sharded.costs.training:
        return (_batch(sharded, micro_batches(rows, micro_batch_size or rows), f"train{batch}", repeat),)
    if new_tokens is None:
        return (_request(sharded, rows, f"infer{batch}", repeat),)
    further = sharded.further
    phases = [_request(sharded, rows, f"prefill{batch}", ends=further is None)]
    if further is not None:
        if new_tokens > 2:
            phases.append(_request(further, rows, f"decode{batch}", new_tokens - 2, sharded))
        phases.append(_request(further, rows, f"last token{batch}", 1, sharded, ends=True))
    return tuple(phases) * repeat


def _request(
    sharded: Sharded, rows: int, name: str = "infer", repeat: int = 1, prompt: Sharded | None = None, ends: bool = False
) -> Phase:
    """One request of so many rows. After a `prompt`: one more token of it, and with `ends` the last one."""
    actions, live, leaves = {}, {}, {}
    for number, device in enumerate(sharded.devices):
        standing = _standing(sharded, number)
        before = () if prompt is None else prompt.kept(number, rows)
        after = sharded.kept(number, rows) if prompt is None else before
        renewed = [value for value in before if value.name in sharded.costs.kept]
        live[device] = (*standing, *before)
        leaves[device] = standing if ends else (*standing, *after)
        actions[device] = with_frees(
            Member(sharded, number).request(rows),
            before if ends else renewed,
            () if ends else after if prompt is None else [value._replace(version=1) for value in renewed],
        )
    return Phase(
        name=name,
        micro_batches=(rows,),
        shards=_shards(sharded, rows),
        actions=actions,
        live=live,
        repeat=repeat,
        training=False,
        leaves={} if leaves == live else leaves,
        decoding=prompt is not None,
    )


def _batch(sharded: Sharded, rows: Sequence[int], name: str, repeat: int) -> Phase:
    """One batch of micro-batches of so many rows, there and back, and its update."""
    actions, live = {}, {}
    for number, device in enumerate(sharded.devices):
        states = (Value(state_of(v.name), width=v.width) for v in _standing(sharded, number))
        live[device] = (*_standing(sharded, number), *(state for state in states if state.name in sharded.tensors))
        actions[device] = with_frees(Trainer(sharded, number).batch(rows))
    return Phase(name, tuple(rows), _shards(sharded, *rows), actions, live, repeat=repeat)


def _standing(sharded: Sharded, number: int) -> tuple[Value, ...]:
    """The weights and buffers of a device."""
    first, last = sharded.held(number)
    held = dict.fromkeys(value for unit in range(first, last) for value in sharded.weights(unit, number))
    buffers = Value(buffers_of((first, last)))
    return (*held, *((buffers,) if buffers.name in sharded.tensors else ()))


def _shards(sharded: Sharded, *rows: int) -> dict[str, Shard]:
    """Every device works on all rows of every micro-batch."""
    whole = tuple((0, count) for count in rows)
    return {device: Shard(sharded.held(i), whole) for i, device in enumerate(sharded.devices)}
