from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import OrreryError
from harness.experiment import expand, one, read, toml_value
from harness.profile import content_key
from harness.techniques import Lora, all_options
from harness.workload import Workload


def tables(**sections: dict[str, Any]) -> dict[str, Any]:
    """A whole question about a tiny model, with the keys given instead."""
    return {
        "workload": {"model": "bert-tiny", "dataset": "mrpc", **sections.pop("workload", {})},
        "run": {"method": "eddl", "testbed": "pac-nano-2", **sections.pop("run", {})},
        **sections,
    }


def test_lists_are_a_cartesian_product_with_methods_changing_fastest() -> None:
    run = {"method": ["eddl", "gpipe"], "testbed": ["pac-nano-2", "pac-nano-4"]}
    requests = expand(tables(workload={"batch_size": [4, 8]}, run=run), "x")
    asked = [(r.workload.batch_size, r.testbed.name, r.method.name) for r in requests]
    assert asked == [(b, t, m) for b in (4, 8) for t in run["testbed"] for m in run["method"]]
    assert len({r.config_hash for r in requests}) == 8


def test_options_sweep_only_the_method_they_belong_to() -> None:
    asked = tables(run={"method": ["eddl", "gpipe"]}, options={"eddl": {"shares": ["equal", "speed"]}})
    assert [(r.method.name, r.options.get("shares")) for r in expand(asked, "x")] == [
        ("eddl", "equal"),
        ("eddl", "speed"),
        ("gpipe", None),
    ]


def test_data_set_gives_size_shape_and_labels() -> None:
    (text,) = expand(tables(), "x")
    w = text.workload
    assert (w.num_samples, w.seq_len, w.num_labels, w.image_size, w.batch_size) == (3668, 128, 2, None, 16)
    (image,) = expand(tables(workload={"model": "resnet-tiny", "dataset": "digits"}), "x")
    w = image.workload
    assert (w.num_samples, w.seq_len, w.image_size, w.num_channels, w.num_labels) == (1797, None, 8, 1, 10)
    (shorter,) = expand(tables(workload={"seq_len": 32, "num_samples": 64}), "x")
    assert (shorter.workload.seq_len, shorter.workload.num_samples) == (32, 64)


def test_config_hash_names_the_question_and_nothing_else() -> None:
    def hash_of(**sections: dict[str, Any]) -> str:
        (request,) = expand(tables(**sections), "x")
        return request.config_hash

    same = hash_of()
    assert hash_of() == same
    assert hash_of(workload={"batch_size": 16, "epochs": 1}, options={"eddl": {"shares": "equal"}}) == same, "defaults"
    assert hash_of(run={"repeats": 3, "data_dir": "/x"}) == same, "without effect in simulated mode"
    others = [
        hash_of(workload={"batch_size": 8}),
        hash_of(workload={"seed": 1}),
        hash_of(run={"testbed": "pac-nano-4"}),
        hash_of(run={"mode": "emulated"}),
        hash_of(run={"mode": "emulated", "repeats": 3}),
        hash_of(options={"eddl": {"shares": "speed"}}),
    ]
    assert len({same, *others}) == 7


WRONG = {
    "unknown section": ({"wokload": {}}, r"wokload is no section. Allowed are: workload, run, options"),
    "unknown key": (
        tables(workload={"bach_size": 4}),
        r"no key in \[workload\] called 'bach_size'. Did you mean",
    ),
    "wrong type": (tables(workload={"batch_size": "16"}), r"workload.batch_size is '16'. Allowed is a whole number"),
    "truth is no number": (tables(workload={"epochs": True}), r"workload.epochs is True. Allowed is a whole number"),
    "wrong type in a list": (tables(workload={"model": ["bert-tiny", 4]}), r"workload.model is 4. Allowed is a text"),
    "empty list": (tables(workload={"model": []}), r"workload.model is an empty list"),
    "no table": ({"workload": 3}, r"workload is 3. Allowed is a table"),
    "missing": ({"workload": {"model": "bert-tiny"}, "run": {"method": "eddl"}}, r"run.testbed is missing"),
    "contradiction": (tables(workload={"epochs": 1, "steps": 2}), r"epochs and workload.steps contradict each other"),
    "unknown model": (tables(workload={"model": "t5-bass"}), r"no model called 't5-bass'. Did you mean t5-base"),
    "unknown data": (tables(workload={"dataset": "mrcp"}), r"no data set called 'mrcp'. Did you mean mrpc"),
    "unknown technique": (tables(workload={"technique": "ful"}), r"no technique called 'ful'. Did you mean full"),
    "unknown method": (tables(run={"method": "edl"}), r"no method called 'edl'. Did you mean eddl"),
    "unknown testbed": (
        tables(run={"testbed": "pac-nan-4"}),
        r"called 'pac-nan-4'. Did you mean pac-nano-4",
    ),
    "unknown mode": (tables(run={"mode": "simulate"}), r"no mode called 'simulate'. Did you mean simulated"),
    "unknown option": (
        tables(options={"eddl": {"share": 1}}),
        r"option of eddl called 'share'. Did you mean shares",
    ),
    "option's type": (tables(options={"eddl": {"shares": 1}}), r"eddl.shares is 1. Allowed is a text"),
    "unused option": (
        tables(options={"gpipe": {"micro_batch_size": 1}}),
        r"that is not run. Run are: eddl",
    ),
    "too large a batch": (tables(workload={"batch_size": 4000}), r"batch_size 4000 is larger than the data set mrpc"),
    "nothing to do": (tables(workload={"steps": 0}), r"steps is 0; it must be at least 1"),
}


@pytest.mark.parametrize(("asked", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_what_is_allowed(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(OrreryError, match=message) as caught:
        expand(asked, "my.toml")
    assert "\n" not in str(caught.value)


def test_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text('[workload]\nmodel = "bert-tiny"\n[run]\nmethod = ["eddl", "gpipe"]\ntestbed = "pac-nano-2"\n')
    assert [request.method.name for request in read(path)] == ["eddl", "gpipe"]
    path.write_text('[workload]\nmodel = "bert-tiny\n')
    with pytest.raises(OrreryError, match=rf"{path} is not valid TOML: .*line 2"):
        read(path)
    path.write_text('[workload]\nmodel = "bert-tiny"\ncolour = 1\n')
    with pytest.raises(OrreryError, match=rf"In {path}: .*'colour'"):
        read(path)
    with pytest.raises(OrreryError, match="can't be read: No such file"):
        read(tmp_path / "none.toml")


def test_an_edited_method_file_is_another_question(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("OPTIONS = {}\ndef plan(workload, costs, cluster, options): ...\n")
    (first,) = expand(tables(run={"method": str(path)}), "x")
    path.write_text(path.read_text() + "# better\n")
    (second,) = expand(tables(run={"method": str(path)}), "x")
    assert first.method.name == "mine"
    assert first.config_hash != second.config_hash


def test_one_request_from_python() -> None:
    request = one({"method": "eddl", "model": "bert-tiny", "testbed": "pac-nano-2"}, {"shares": "speed"})
    assert (request.workload.dataset, request.options["shares"]) == ("mrpc", "speed")
    with pytest.raises(OrreryError, match=r"no argument called 'modell'. Did you mean model"):
        one({"modell": "bert-tiny"}, {})
    with pytest.raises(OrreryError, match="names 2 runs"):
        one({"method": ["eddl", "gpipe"], "model": "bert-tiny", "testbed": "pac-nano-2"}, {})


@pytest.mark.parametrize(
    ("text", "value"), [("false", False), ("4", 4), ("0.5", 0.5), ("[1, 2]", [1, 2]), ("speed", "speed"), ('"4"', "4")]
)
def test_values_on_the_command_line_are_toml_or_text(text: str, value: object) -> None:
    assert toml_value(text) == value


def test_options_of_techniques_sweep_and_name_the_question() -> None:
    options = {"lora": {"rank": [4, 32]}, "parallel-adapters": {"dropped": ["none", "2, 0"], "gate": True}}
    asked = tables(workload={"technique": ["lora", "parallel-adapters"]}, options=options)
    requests = expand(asked, "x")
    chosen = [all_options(r.workload.technique, r.workload.technique_options) for r in requests]
    assert [(c.get("rank"), c.get("dropped")) for c in chosen] == [(4, None), (32, None), (None, "none"), (None, "0,2")]
    (default,) = expand(tables(workload={"technique": "lora"}), "x")
    hashes = [r.config_hash for r in requests]
    assert len(set(hashes)) == 4 and hashes[1] == default.config_hash, "a default that is said is no other question"
    keys = {content_key(r.workload) for r in requests}
    assert len(keys) == 4 and content_key(default.workload) in keys
    for request in requests:
        sent = json.loads(json.dumps(dataclasses.asdict(request.workload)))
        assert Workload(**sent) == request.workload and hash(Workload(**sent)) == hash(request.workload)


WRONG_OPTIONS = {
    "no such option": ("lora", {"ranks": 4}, r"option of lora called 'ranks'. Did you mean rank"),
    "none at all": ("full", {"rank": 4}, r"The technique full has no options, so 'rank' can't be set"),
    "too small": ("lora", {"rank": 0}, r"lora.rank is 0. Allowed is a whole number of at least 1"),
    "no whole number": ("adapters", {"reduction": 2.5}, r"adapters.reduction is 2.5. Allowed is a whole number"),
    "truth is no number": ("lora", {"alpha": True}, r"lora.alpha is True. Allowed is a whole number"),
    "no probability": ("lora", {"dropout": 1}, r"lora.dropout is 1. Allowed is a probability from 0 to below 1"),
    "no truth value": (
        "parallel-adapters",
        {"gate": "yes"},
        r"parallel-adapters.gate is 'yes'. Allowed is true or false",
    ),
    "no layers": (
        "parallel-adapters",
        {"dropped": "0-4"},
        r"dropped is '0-4'. Allowed is 'none', or a text with numbers",
    ),
    "no beginning": ("parallel-adapters", {"init": "prune"}, r"init called 'prune'. Did you mean pruning"),
}


@pytest.mark.parametrize(("technique", "options", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_options_of_techniques_that_are_wrong_are_named(technique: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OrreryError, match=message):
        expand(tables(workload={"technique": technique}, options={technique: options}), "my.toml")


def test_options_of_a_technique_that_is_not_run_are_refused() -> None:
    with pytest.raises(OrreryError, match=r"options.lora sets options of a technique that is not run. Run are: full"):
        expand(tables(options={"lora": {"rank": 4}}), "x")
    request = one(
        {"method": "eddl", "model": "bert-tiny", "testbed": "pac-nano-2", "technique": "lora"}, {}, {"rank": 4}
    )
    assert request.workload.technique_options == Lora(rank=4)


def test_a_method_can_not_have_the_name_of_a_technique(tmp_path: Path) -> None:
    (tmp_path / "lora.py").write_text("OPTIONS = {}\ndef plan(workload, costs, cluster, options): ...\n")
    with pytest.raises(OrreryError, match="makes a method called lora, and so is a technique called"):
        expand(tables(run={"method": str(tmp_path / "lora.py")}), "x")
