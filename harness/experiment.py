"""What is asked for: one request per run, from flags, from Python, or from a TOML file whose lists are a sweep.

[workload]                       # fields of `harness.workload.Workload`; the data set gives the rest
model = ["t5-base", "bart-large"]
dataset = "mrpc"
batch_size = 16

[run]
method = ["eddl", "gpipe"]
testbed = "pac-nano-4"
mode = "simulated"

[options.eddl]                   # the options of a method, or of a technique
shares = ["equal", "proportional"]
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from harness import datasets, models, registry
from harness.cluster import Cluster
from harness.errors import OrreryError, unknown_name
from harness.faults import Fault, faults_of, joining
from harness.plain import A_NAME, is_name, is_plain
from harness.records import SCHEMA_VERSION
from harness.registry import Method, Testbed
from harness.techniques import TECHNIQUES
from harness.workload import Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Section -> key -> type. A list of that type is a sweep.
KEYS: dict[str, dict[str, type]] = {
    "workload": {
        "model": str,
        "dataset": str,
        "technique": str,
        "batch_size": int,
        "seq_len": int,
        "decoder_seq_len": int,
        "new_tokens": int,
        "image_size": int,
        "num_channels": int,
        "num_samples": int,
        "epochs": int,
        "steps": int,
        "optimizer": str,
        "learning_rate": float,
        "clip_norm": float,
        "dtype": str,
        "attn_implementation": str,
        "dropout": float,
        "checkpoint": str,
        "seed": int,
    },
    "run": {
        "method": str,
        "plan": str,
        "testbed": str,
        "mode": str,
        "repeats": int,
        "data_dir": str,
        "cache_dir": str,
        "verify": bool,
        "evaluate": bool,
        "save_adapter": str,
        "inject": str,
    },
}
DEFAULT_TECHNIQUE = "full"
DEFAULT_DATASETS = {"text": "mrpc", "image": "digits"}
#: PAC (ICPP 2024) trains with mini-batches of 16.
DEFAULT_BATCH_SIZE = 16
#: Runs in this mode read no data, and repeating one gives the same bytes.
COMPUTED = "simulated"
#: Runs in this mode are executed on this machine, so that its meter can see them.
ON_THIS_MACHINE = "emulated"
MOST_REPEATS = 1000
CONTRADICTIONS = ((("workload", "epochs"), ("workload", "steps")), (("run", "method"), ("run", "plan")))
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Request:
    """One run that is asked for, with every name looked up. `options` are the method's, defaults included.

    `verify`: what was trained, or answered, is compared with the same on one device. `evaluate`: the metric of what was
    trained is measured on the validation split. `save_adapter`: the file that gets what the technique has trained; it
    is no part of the question. Simulated runs are done once, and have no `data_dir` and nothing to verify or evaluate,
    whatever was asked: it makes no difference. `cache_dir`: where activation caches are kept.
    """

    method: Method
    options: Mapping[str, object] = field(hash=False)
    workload: Workload
    testbed: Testbed
    mode: str
    repeats: int = 1
    data_dir: Path | None = None
    cache_dir: Path | None = None
    verify: bool = False
    evaluate: bool = False
    save_adapter: Path | None = None
    faults: tuple[Fault, ...] = ()

    @property
    def beginning(self) -> Cluster:
        """The devices that are there in the beginning."""
        cluster = self.testbed.cluster
        return cluster.only(set(cluster.names).difference(joining(self.faults)))

    @cached_property
    def config_hash(self) -> str:
        """Names this run: equal for equal questions, whatever version of the code answers them."""
        asked = {
            "schema_version": SCHEMA_VERSION,
            "method": [self.method.name, self.method.digest],
            "options": dict(self.options),
            "workload": dataclasses.asdict(self.workload),
            "testbed": [
                self.testbed.name,
                dataclasses.asdict(self.testbed.cluster),
                [*map(str, self.testbed.events)],
                self.testbed.heartbeat_timeout_s,
            ],
            "mode": self.mode,
            "repeats": self.repeats,
            "data_dir": None if self.data_dir is None else str(self.data_dir),
            "cache_dir": None if self.cache_dir is None else str(self.cache_dir),
            "verify": self.verify,
            "evaluate": self.evaluate,
            "faults": [*map(str, self.faults)],
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        w = self.workload
        what = f"{self.method.name} · {w.model} · {w.technique} · {w.dataset} · batch {w.batch_size}"
        return " · ".join((what, self.testbed.name, self.mode, *map(str, self.faults)))


def read(path: Path) -> list[Request]:
    """The requests of an experiment file, in the order of its sweep: methods change fastest."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OrreryError(f"The experiment {path} can't be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8, and numbers of too many digits
        raise OrreryError(f"The experiment {path} is not valid TOML: {error}. Mend the file and try again.") from error
    return expand(tables, str(path))


def expand(tables: Mapping[str, Any], source: str) -> list[Request]:
    """The Cartesian product of every list in the tables `workload`, `run` and `options`.

    `source` names the tables in messages: a file, or "the command line". Everything that can be refused
    without planning is refused here, before the first run.
    """
    _check(tables, source)
    options = tables.get("options", {})
    load_method, load_testbed = cache(registry.load_method), cache(registry.load_testbed)  # a sweep names few, often
    requests = [
        request
        for workload in workloads(tables, source)
        for values in _product(_method_last(tables.get("run", {})))
        for request in _requests(workload, values, options, load_method, load_testbed)
    ]
    methods = {request.method.name for request in requests}
    _every_option_used(options, methods, {request.workload.technique for request in requests}, source)
    files = [request.save_adapter for request in requests if request.save_adapter is not None]
    if len(files) > len(set(files)):
        _refuse(source, "run.save_adapter", f"names one file for {len(files)} runs", "Allowed is a file of one run")
    return requests


def workloads(tables: Mapping[str, Any], source: str) -> list[Workload]:
    """Those that the table `workload` asks for, each with every choice of its technique's options."""
    return [
        workload_of({**values, "technique_options": chosen}, source)
        for values in _product(tables.get("workload", {}))
        for chosen in _product(tables.get("options", {}).get(values.get("technique", DEFAULT_TECHNIQUE), {}))
    ]


def counted(tables: Mapping[str, Any], source: str) -> Workload:
    """The workload of which nothing is run: no method's options have a meaning for it."""
    found = workloads(tables, source)
    if len(found) != 1:
        raise OrreryError(f"In {source}: {len(found)} workloads are named. Give one value for each option.")
    _every_option_used(tables.get("options", {}), set(), {found[0].technique}, source)
    return found[0]


def toml_value(text: str) -> object:
    """A value as TOML reads it (`false`, `4`, `[1, 2]`), or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _check(tables: Mapping[str, Any], source: str) -> None:
    for section, table in tables.items():
        if section not in (*KEYS, "options"):
            _refuse(source, section, "is no section", f"Allowed are: {', '.join((*KEYS, 'options'))}")
        if not isinstance(table, Mapping):
            _refuse(source, section, f"is {table!r}", f"Allowed is a table: [{section}]")
        if section == "options":
            for owner, options in table.items():
                if not isinstance(options, Mapping):
                    allowed = "Allowed is a table: [options.METHOD] or [options.TECHNIQUE]"
                    _refuse(source, f"options.{owner}", f"is {options!r}", allowed)
                for option, value in options.items():
                    _check_values(source, f"options.{owner}.{option}", value)
            continue
        for key, value in table.items():
            if key not in KEYS[section]:
                raise OrreryError(f"In {source}: {unknown_name(f'key in [{section}]', key, KEYS[section])}")
            _check_values(source, f"{section}.{key}", value)
            for one in value if isinstance(value, list) else [value]:
                _check_type(source, f"{section}.{key}", one, KEYS[section][key])
    for (section, key), (other_section, other) in CONTRADICTIONS:
        if key in tables.get(section, {}) and other in tables.get(other_section, {}):
            both = f"{section}.{key} and {other_section}.{other}"
            _refuse(source, both, "contradict each other", "Allowed is one of them")
    run = tables.get("run", {})
    required = ("workload.model", "run.testbed", *(() if "plan" in run else ("run.method",)))
    for name in required:
        section, key = name.split(".")
        if key not in tables.get(section, {}):
            _refuse(source, name, "is missing", f"It must name a {key}; `orrery list` shows which there are")


def _check_values(source: str, name: str, value: object) -> None:
    """Values that a record can't hold, such as nan or a date, and texts that are no name of anything."""
    if value == []:
        _refuse(source, name, "is an empty list", "Allowed is at least one value")
    for one in value if isinstance(value, list) else [value]:
        if not is_plain(one):
            _refuse(source, name, f"is {one!r}", "Allowed are finite numbers, Unicode texts, true and false")
        if isinstance(one, str) and not is_name(one):
            _refuse(source, name, f"is {one!r}", f"Allowed is {A_NAME}")


def _check_type(source: str, name: str, value: object, wanted: type) -> None:
    """A whole number will do for a number; a truth value is no number."""
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits:
        _refuse(source, name, f"is {value!r}", f"Allowed is {WORDS[wanted]}, or a list of them")


def _refuse(source: str, key: str, found: str, allowed: str) -> NoReturn:
    raise OrreryError(f"In {source}: {key} {found}. {allowed}.")


def _method_last(run: Mapping[str, Any]) -> dict[str, Any]:
    """What comes last changes fastest: methods are interleaved, so that none has the machine's good hour for itself."""
    return dict(sorted(run.items(), key=lambda item: item[0] == "method"))


def _product(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    axes = [value if isinstance(value, list) else [value] for value in table.values()]
    for values in itertools.product(*axes):
        yield dict(zip(table, values, strict=True))


def workload_of(values: Mapping[str, Any], source: str) -> Workload:
    """The data set gives the number of samples, the labels and the shape; a shape that is asked for goes first."""
    images = reads_images(values["model"])
    spec = datasets.spec(values.get("dataset", DEFAULT_DATASETS["image" if images else "text"]))
    shape: dict[str, Any] = {"seq_len": spec.seq_len}
    if images:
        shape = {"seq_len": None, "image_size": spec.image_size, "num_channels": spec.num_channels}
    size = {"num_samples": spec.num_samples, "num_labels": spec.num_labels, "batch_size": DEFAULT_BATCH_SIZE}
    try:
        return Workload(**{**size, **shape, **values, "dataset": spec.name})
    except OrreryError as error:
        raise OrreryError(f"In {source}: {error}") from error


def reads_images(model: str) -> bool:
    return models.MODULE_OF.get(models.entry(model).family) == "cnn"


def _requests(
    workload: Workload,
    run: Mapping[str, Any],
    options: Mapping[str, Any],
    load_method: Callable[[str], Method],
    load_testbed: Callable[[str], Testbed],
) -> Iterator[Request]:
    method = planned(Path(run["plan"])) if "plan" in run else load_method(run["method"])
    testbed = load_testbed(run["testbed"])
    mode = run.get("mode", "simulated")
    if mode not in registry.MODES:
        raise unknown_name("mode", mode, registry.MODES)
    repeats = run.get("repeats", 1)
    if not 1 <= repeats <= MOST_REPEATS:
        raise OrreryError(f"repeats is {repeats}; it must be at least 1, and at most {MOST_REPEATS}.")
    computed = mode == COMPUTED
    if run.get("evaluate", False) and not computed:
        _check_evaluation(workload)
    save_adapter = Path(run["save_adapter"]).expanduser() if "save_adapter" in run else None
    if save_adapter is not None:
        _check_adapter(save_adapter, workload, mode)
    faults = faults_of(run["inject"], testbed.cluster.names) if "inject" in run else ()
    for chosen in _product(options.get(method.name, {})):
        yield Request(
            method=method,
            options={**method.options, **{name: _option(method, name, value) for name, value in chosen.items()}},
            workload=workload,
            testbed=testbed,
            mode=mode,
            repeats=1 if computed else repeats,
            data_dir=None if computed or "data_dir" not in run else Path(run["data_dir"]).expanduser(),
            cache_dir=None if "cache_dir" not in run else Path(run["cache_dir"]).expanduser(),
            verify=not computed and run.get("verify", False),
            evaluate=not computed and run.get("evaluate", False),
            save_adapter=save_adapter,
            faults=faults,
        )


def _check_evaluation(workload: Workload) -> None:
    if not workload.training:
        raise OrreryError("evaluate measures what was trained, and the technique inference trains nothing.")
    if datasets.spec(workload.dataset).validation is None:
        others = [name for name in datasets.names() if datasets.spec(name).validation is not None]
        raise OrreryError(
            f"evaluate measures on samples that were not trained on, and the data set {workload.dataset} has but one "
            f"split. Choose one of: {', '.join(others)}."
        )


def _check_adapter(path: Path, workload: Workload, mode: str) -> None:
    """Refuse what would train and then have nothing to save, or nowhere."""
    if mode == COMPUTED:
        raise OrreryError(f"save_adapter saves what was trained, and mode {mode} trains nothing. Give mode emulated.")
    if TECHNIQUES[workload.technique] is None:
        adding = ", ".join(name for name, options in TECHNIQUES.items() if options is not None)
        raise OrreryError(
            f"save_adapter saves what a technique adds to a model, and {workload.technique} adds nothing. "
            f"Choose one of: {adding}."
        )
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"would lie in {path.parent}, which is no folder"
        raise OrreryError(f"save_adapter is {path}, which {found}. Name a file in a folder that is there.")


def planned(path: Path) -> Method:
    """A saved or hand-written plan as a method that always gives this plan."""
    from harness.plan import serial

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OrreryError(f"The plan {path} can't be read: {reason}. Name a file of `orrery plan --json`.") from error
    plan = serial.from_json(text, str(path))
    if not is_name(plan.method):
        raise OrreryError(f"{path}: method is {plan.method!r}; allowed is {A_NAME}.")
    return Method(plan.method, {}, lambda *_: plan, hashlib.sha256(text.encode()).hexdigest())


def _option(method: Method, name: str, value: object) -> object:
    """An option's value, of the type of its default."""
    if name not in method.options:
        if not method.options:
            raise OrreryError(f"The method {method.name} has no options, so {name!r} can't be set.")
        raise unknown_name(f"option of {method.name}", name, method.options)
    default = method.options[name]
    wanted = type(default)
    if default is None or type(value) is wanted or (wanted is float and type(value) is int):
        return value
    raise OrreryError(
        f"The option {method.name}.{name} is {value!r}. "
        f"Allowed is {WORDS.get(wanted, wanted.__name__)}, such as its default {default!r}."
    )


def _every_option_used(options: Iterable[str], methods: set[str], techniques: set[str], source: str) -> None:
    """Options of a method or a technique that is not asked for would do nothing: say so instead."""
    for owner in options:
        kind, asked = ("technique", techniques) if owner in TECHNIQUES else ("method", methods)
        if owner not in asked:
            found = f"sets options of a {kind} that is not run"
            _refuse(source, f"options.{owner}", found, f"Run are: {', '.join(sorted(asked)) or 'none'}")


def one(
    named: Mapping[str, Any], options: Mapping[str, object], technique_options: Mapping[str, object] | None = None
) -> Request:
    """The request of a call from Python: keys of all sections in one mapping, options of the method and technique."""
    tables: dict[str, dict[str, Any]] = {
        section: {key: named[key] for key in keys if named.get(key) is not None} for section, keys in KEYS.items()
    }
    known = [key for keys in KEYS.values() for key in keys]
    for key in named:
        if key not in known:
            raise unknown_name("argument", key, known)
    if options:
        if "method" not in tables["run"]:
            raise OrreryError("The call sets options, but names no method that they belong to. Give method=.")
        tables["options"] = {registry.load_method(tables["run"]["method"]).name: dict(options)}
    if technique_options:
        owner = tables["workload"].get("technique", DEFAULT_TECHNIQUE)
        tables["options"] = {**tables.get("options", {}), owner: dict(technique_options)}
    requests = expand(tables, "the call")
    if len(requests) != 1:
        raise OrreryError(f"The call names {len(requests)} runs. Give one value each, or use an experiment file.")
    return requests[0]
