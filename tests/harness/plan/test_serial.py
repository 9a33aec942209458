"""Plans there and back through JSON, and what a wrong file is told."""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness.plan.serial as serial
from harness.costs import DIRECTIONS
from harness.errors import OrreryError
from harness.plan import (
    Action,
    Collective,
    Combine,
    Commit,
    Compute,
    Free,
    Load,
    Phase,
    Plan,
    Recv,
    Send,
    Shard,
    Step,
    Store,
    Tensor,
    Value,
)
from harness.plan.actions import COLLECTIVES, COMBINATIONS
from harness.plan.serial import from_json, parse_value, to_json
from harness.plan.values import KINDS

TENSORS = {
    "hidden@1": Tensor("activations", 8, 4, 4, per_row=True),
    "weights@0:1": Tensor("weights", 1, 100, 4),
    "gradients@0:1": Tensor("gradients", 1, 100, 4, fixed_bytes=3),
    "an odd name: v2, r0:1 ü": Tensor("cache", 0, 0),
}
DEVICES = ("device0", "device1")

counts = st.integers(0, 10**6)
ranges = st.tuples(counts, counts).map(lambda pair: (min(pair), max(pair)))
names = st.sampled_from(sorted(TENSORS))


@st.composite
def values(draw: st.DrawFn) -> Value:
    name = draw(names)
    rows = ranges if TENSORS[name].per_row else st.none() | ranges
    return Value(
        name,
        draw(st.integers(-1, 99)),
        draw(rows),
        draw(st.none() | ranges),
        draw(st.none() | ranges),
        draw(st.integers(-9, 9)),
    )


tuples = st.lists(values(), max_size=3).map(tuple)
peers = st.sampled_from(DEVICES)
actions = st.one_of(
    st.builds(Compute, ranges, st.sampled_from(DIRECTIONS), counts, ranges, tuples, tuples, tuples, tuples),
    st.builds(Send, values(), peers),
    st.builds(Recv, values(), peers),
    st.builds(Combine, st.sampled_from(COMBINATIONS), tuples, values(), st.booleans()),
    st.builds(Step, ranges, tuples, tuples, tuples, st.none() | values()),
    st.builds(Load, values()),
    st.builds(Store, values()),
    st.builds(Free, tuples),
    st.just(Commit()),
    st.builds(
        Collective,
        st.sampled_from(COLLECTIVES),
        values(),
        values(),
        st.just(DEVICES),
        st.lists(counts, max_size=2).map(tuple),
        st.integers(1, 9),
    ),
)
phases = st.builds(
    Phase,
    name=st.text(max_size=5),
    micro_batches=st.lists(counts, max_size=3).map(tuple),
    shards=st.dictionaries(peers, st.builds(Shard, ranges, st.lists(ranges, max_size=3).map(tuple))),
    actions=st.dictionaries(peers, st.lists(actions, max_size=6).map(tuple), min_size=1),
    live=st.dictionaries(peers, tuples),
    tied=st.dictionaries(names, st.just(DEVICES)),
    repeat=st.integers(1, 10**6),
    training=st.booleans(),
)
plans = st.builds(
    Plan,
    method=st.text(max_size=5),
    num_units=st.integers(1, 100),
    tensors=st.just(TENSORS),
    phases=st.lists(phases, min_size=1, max_size=3).map(tuple),
    summary=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.booleans())),
)


@given(values())
def test_a_value_is_parsed_back_from_how_it_prints(value: Value) -> None:
    assert parse_value(str(value)) == value


@pytest.mark.parametrize(
    "text",
    ["", "#1", "a#", "a[]", "a[x0:1]", "a[r0:1 r0:1]", "a[w0:1 t0:1]", "a[r2:1]", "a[r01:2]", "a[r0:1", "a[r0]", "a.v0",
     "a#-1", "a.v1#2.v", "a[r0:1]x", "a\n"],
)  # fmt: skip
def test_what_no_value_prints_as_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_value(text)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_a_plan_survives_the_round_trip(plan: Plan) -> None:
    text = to_json(plan)
    again = from_json(text)
    assert again == plan
    assert list(again.devices) == list(plan.devices)
    assert to_json(again) == text


def test_every_action_field_has_a_type_that_the_format_knows() -> None:
    """A new action, or a new field, either fits the format or fails here."""
    hints = {hint for cls in get_args(Action) for hint in get_type_hints(cls).values()}
    ranged, texts, several, counts = tuple[int, int], tuple[str, ...], tuple[Value, ...], tuple[int, ...]
    assert hints <= {str, int, bool, Value, Value | None, ranged, ranged | None, texts, several, counts}
    assert set(serial.ACTION_OF.values()) == set(get_args(Action))
    assert serial.WORDS[Tensor, "kind"] == KINDS


def by_hand() -> str:
    """The example of the module's docstring."""
    text = textwrap.dedent(serial.__doc__ or "").split("micro-batch of two rows:\n")[1]
    return text.split("\nThe other actions")[0]


def test_the_documented_example_means_what_it_says() -> None:
    weights, gradients = Value("weights"), Value("gradients")
    forward = Compute((0, 1), "forward", 0, (0, 2), (weights,))
    backward = Compute((0, 1), "backward", 0, (0, 2), (weights,), accumulates=(gradients,))
    step = Step((0, 1), (gradients,), (weights,), (weights._replace(version=1),))
    phase = Phase(
        name="train",
        micro_batches=(2,),
        shards={"device0": Shard((0, 1), ((0, 2),))},
        actions={"device0": (forward, backward, step, Free((gradients,)))},
        live={"device0": (weights,)},
        repeat=10,
    )
    tensors = {"weights": Tensor("weights", 1, 100, 4), "gradients": Tensor("gradients", 1, 100, 4)}
    assert from_json(by_hand()) == Plan("by-hand", 1, tensors, (phase,))


def test_the_documented_collective_and_a_step_that_clips_are_read() -> None:
    """The collective of the module's docstring, in the place of the example's first action."""
    line = textwrap.dedent(serial.__doc__ or "").split("its share of the sum:\n\n")[1].split("\n(member 2)")[0]
    old = '{"do": "compute", "units": "0:1", "direction": "forward", "micro_batch": 0, "rows": "0:2",\n'
    text = by_hand().replace(old + '          "weights": ["weights"]}', line.replace('"h', '"gradients'))
    text = text.replace('"writes": ["weights.v1"]', '"writes": ["weights.v1"], "norm": "gradients[w0:1]"')
    collective, _, step, _ = from_json(text).phases[0].actions["device0"]
    whole, share = Value("gradients"), Value("gradients", width=(60, 100), version=1)
    group = ("device0", "device1", "device2")
    assert collective == Collective("reduce-scatter", whole, share, group, (60, 0, 40), 4)
    assert isinstance(step, Step) and step.norm == Value("gradients", width=(0, 1))


def test_what_has_its_default_is_not_written() -> None:
    """Plans look as they did before actions had these fields."""
    reduce = Collective("all-reduce", Value("gradients"), Value("gradients", version=1), DEVICES)
    one = from_json(by_hand())
    (train,) = one.phases
    actions = {"device0": (*train.actions["device0"], reduce)}
    text = to_json(replace(one, phases=(replace(train, actions=actions),)))
    assert not any(f'"{field}"' in text for field in ("shares", "tiles", "norm"))


def test_equal_phases_are_stored_once_and_come_back_as_one_object() -> None:
    one = from_json(by_hand())
    (train,) = one.phases
    copy = replace(train, actions={device: (*actions,) for device, actions in train.actions.items()}, repeat=3)
    other = replace(train, training=False)
    plan = replace(one, phases=(train, copy, other, train))
    text = to_json(plan)
    assert text.count('"shards"') == 2
    assert json.loads(text)["phases"] == [
        {"body": "body0", "repeat": 10},
        {"body": "body0", "repeat": 3},
        {"body": "body1", "repeat": 10},
        {"body": "body0", "repeat": 10},
    ]
    again = from_json(text)
    assert again == plan
    assert again.phases[0] is again.phases[3]
    assert again.phases[0].actions is again.phases[1].actions


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"orrery_plan": 1', '"orrery_plan": 2', "orrery_plan is 2; allowed is 1"),
        ('"num_units": 1,', '"num_units": 1', "line 6 column 6: this is not JSON"),
        ('"num_units": 1', '"num_units": 0', "num_units is 0; allowed is a whole number from 1 up"),
        ('"num_units": 1', '"num_units": 1, "num_units": 1', "the key 'num_units' stands twice"),
        ('"num_units": 1,', "", "the file has no key 'num_units'"),
        ('"method"', '"methods"', "the file: There is no key called 'methods'. Did you mean method"),
        ('"kind": "gradients"', '"kind": "gradient"', 'tensors.gradients.kind is "gradient"; allowed is one of'),
        ('"width": 100', '"width": true', "tensors.weights.width is true; allowed is a whole number from 0 up"),
        ('"units": "0:1", "dir', '"units": "1:0", "dir', 'actions.device0[0].units is "1:0"; allowed is a'),
        ('"do": "step"', '"do": "stepp"', 'bodies.body0.actions.device0[2].do is "stepp"; allowed is one of'),
        ('"do": "free", ', "", "bodies.body0.actions.device0[3].do is null; allowed is one of compute"),
        ('"forward"', '"forwards"', 'device0[0].direction is "forwards"; allowed is one of forward, backward'),
        ('["gradients"]}', '["gradient"]}', "There is no tensor called 'gradient'. Did you mean gradients"),
        ('["gradients"]}', '["gradients#"]}', 'accumulates[0] is "gradients#"; allowed is a value like'),
        ('["gradients"]}', '"gradients"}', 'accumulates is "gradients"; allowed is a list [...]'),
        ('"writes"', '"norm": null, "writes"', "device0[2].norm is null; allowed is a value like"),
        ('"values"', '"value"', "device0[3]: There is no key called 'value'. Did you mean values"),
        ('"width": 100, "itemsize": 4}', '"width": 100, "itemsize": 4, "per_row": true}', "rows, like weights[r0:2]"),
        ('"body": "body0"', '"body": "body1"', 'phases[0].body is "body1"; allowed is one of body0'),
        ('"repeat": 10', '"repeat": 0', "phases[0].repeat is 0; allowed is a whole number from 1 up"),
        ('{"body": "body0", "repeat": 10}', "", "phases is []; allowed is a list of at least one phase"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_where_and_what_is_allowed(old: str, new: str, message: str) -> None:
    text = by_hand()
    assert old in text
    with pytest.raises(OrreryError) as error:
        from_json(text.replace(old, new, 1), source="my_plan.json")
    assert str(error.value).startswith("my_plan.json")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"orrery_plan": 1}', "[" * 100_000])
def test_what_is_no_plan_at_all_is_refused(text: str) -> None:
    with pytest.raises(OrreryError):
        from_json(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_one_entry_replaced_gives_a_plan_or_a_clear_error(data: st.DataObject) -> None:
    """Hand-edited files fail in no other way than by OrreryError."""
    tree = json.loads(by_hand())
    node = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            break
        node = node[key]
    junk = (
        st.none()
        | st.booleans()
        | st.floats(allow_nan=False)
        | st.integers()
        | st.text(max_size=4)
        | st.just([])
        | st.just({})
    )
    node[key] = data.draw(junk | st.lists(junk) | st.dictionaries(st.text(), junk))
    try:
        plan = from_json(json.dumps(tree))
    except OrreryError:
        return
    assert from_json(to_json(plan)) == plan


def test_an_action_takes_one_line() -> None:
    lines = to_json(from_json(by_hand())).splitlines()
    assert [line.strip()[:12] for line in lines if '"do"' in line] == ['{"do": "comp'] * 2 + [
        '{"do": "step',
        '{"do": "free',
    ]
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize("name", ["a#1", "a[0]", "weights.v2", "weights.v-2", ""])
def test_a_name_that_would_be_read_differently_is_not_written(name: str) -> None:
    plan = replace(from_json(by_hand()), tensors={name: Tensor("weights", 1, 1)})
    with pytest.raises(OrreryError, match="can't be written"):
        to_json(plan)


@pytest.mark.benchmark
def test_ten_thousand_actions_are_read_in_half_a_second() -> None:
    def compute(index: int, direction: str) -> Compute:
        hidden = Value("hidden@1", index, (0, 4))
        return Compute((0, 1), direction, index, (0, 4), (Value("weights@0:1"),), (hidden,), (hidden,))

    steps = tuple(compute(i // 2, DIRECTIONS[i % 2]) for i in range(10_000))
    phase = Phase("train", (4,), {}, {"device0": steps}, {})
    plan = Plan("m", 1, TENSORS, (phase,))
    text = to_json(plan)
    start = time.process_time()
    again = from_json(text)
    seconds = time.process_time() - start
    assert again == plan
    assert seconds < 0.5
