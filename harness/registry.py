"""The one door upwards: looks methods, testbeds, modes and reports up by name, without naming any in the code.

Listing reads file names and docstrings only, so that it is fast and a broken method can't break it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from harness.cluster import Cluster
from harness.costs import Costs
from harness.errors import OrreryError, unknown_name
from harness.plain import is_plain
from harness.plan import Plan
from harness.techniques import TECHNIQUES
from harness.workload import Workload

if TYPE_CHECKING:
    from harness.recovery import Change, Resumed

SYSTEMS, BASELINES = METHOD_PACKAGES = ("systems", "baselines")
ENTRY_POINTS = "orrery.methods"
MODES = ("simulated", "emulated", "real")


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs of this machine; the remedy is for where it is missing."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Entry:
    """A method as it is listed. `module` is what to import; third parties' methods count as systems."""

    name: str
    kind: str
    summary: str
    module: str


@dataclass(frozen=True)
class Method:
    """A planner. `digest` is the hash of its file where the user gave one, so that an edited file is a new run.

    `variants`: values of options that an advisor tries. `replan`: what it does about devices that are lost, leave, join
    or become slow, on the cluster as it is now; None: a lost device is the end.
    """

    name: str
    options: Mapping[str, object]
    plan: Callable[[Workload, Costs, Cluster, Mapping[str, object]], Plan]
    digest: str | None = None
    variants: Mapping[str, Sequence[object]] = field(default_factory=dict)
    replan: Callable[[Workload, Costs, Cluster, Mapping[str, object], Change], Resumed | None] | None = None


class Testbed(Protocol):
    """What the runner needs of a testbed. `assumptions`: the assumed and fitted constants underneath.

    `events`: what happens to it during a run. `heartbeat_timeout_s`: how long nothing is heard of a device before it is
    taken for lost.
    """

    @property
    def name(self) -> str: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def modes(self) -> Sequence[str]: ...
    @property
    def assumptions(self) -> Sequence[Any]: ...
    @property
    def events(self) -> Sequence[Any]: ...
    @property
    def heartbeat_timeout_s(self) -> float: ...


class Mode(Protocol):
    """What the runner needs of a mode. A testbed is open for as many runs as wanted:

    with opened(testbed) as execute:
        execute(plan, workload, costs, data_dir=..., cache_dir=..., journal=..., verify=..., evaluate=...,
                keep_trained=..., faults=..., replan=...)
    """

    def opened(self, testbed: Testbed) -> AbstractContextManager[Callable[..., Any]]: ...
    def examine(self, testbed: Testbed) -> list[Finding]: ...


def methods() -> dict[str, Entry]:
    """Every method by name: scanned from the packages, then from entry points. Nothing is imported."""
    found = {entry.name: entry for package in METHOD_PACKAGES for entry in _scan(package)}
    for point in _entry_points():
        if point.name in found:
            raise OrreryError(
                f"The entry point {point.name!r} of {_origin(point)} has the name of {found[point.name].module}. "
                f"Rename the entry point in the group {ENTRY_POINTS!r}."
            )
        found[point.name] = Entry(point.name, SYSTEMS, f"from {_origin(point)}", point.value)
    return found


def _scan(package: str) -> Iterator[Entry]:
    """A module in `baselines/`, a sub-package in `systems/`: whatever is there and isn't private is a method."""
    for folder in _folders(package):
        for path in sorted(folder.iterdir()):
            source = path / "__init__.py" if path.is_dir() else path
            if path.name.startswith(("_", ".")) or source.suffix != ".py" or not source.is_file():
                continue
            summary = _summary(source, source.stat().st_mtime_ns)
            yield Entry(method_name(path), package, summary, f"{package}.{path.stem}")


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def method_name(path: Path) -> str:
    return path.stem.replace("_", "-")


@cache
def _summary(source: Path, changed_ns: int) -> str:
    """First line of the module's docstring, as the file was at that time: a sweep looks methods up often."""
    try:
        text = ast.get_docstring(ast.parse(source.read_bytes()))
    except (OSError, SyntaxError, ValueError) as error:
        return f"can't be read: {error}"
    return text.splitlines()[0] if text else ""


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def load_method(name: str) -> Method:
    """The method called `name`, or the one in the file `name` where that is a path (`./my_method.py`)."""
    if name.endswith(".py"):
        return _load_file(Path(name))
    found = methods()
    if name not in found:
        raise unknown_name("method", name, found)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(found[name].module)
    except (Exception, SystemExit) as error:
        raise OrreryError(
            f"The method {name} can't be imported from {found[name].module}: {type(error).__name__}: {error}. "
            "`orrery list systems --check` and `orrery list baselines --check` show which methods are broken."
        ) from error
    return _method(name, module, found[name].module)


def _load_file(path: Path) -> Method:
    if not path.is_file():
        raise OrreryError(f"There is no method file {path}. A method is a name or the path of a Python file.")
    name = f"orrery_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise OrreryError(f"The method file {path} can't be imported: {type(error).__name__}: {error}.") from error
    return _method(method_name(path), module, str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def _method(name: str, module: ModuleType, where: str, digest: str | None = None) -> Method:
    if name in TECHNIQUES:
        raise OrreryError(f"{where} makes a method called {name}, and so is a technique called. Rename the file.")
    plan, options = getattr(module, "plan", None), getattr(module, "OPTIONS", None)
    if not callable(plan) or not isinstance(options, Mapping):
        raise OrreryError(
            f"{where} is no method: it needs a function `plan(workload, costs, cluster, options)` and a dictionary "
            "`OPTIONS` of option names and default values (it may be empty)."
        )
    for option, default in options.items():
        if not isinstance(option, str) or not is_plain(default):
            raise OrreryError(
                f"{where}: OPTIONS holds {option!r}: {default!r}. A name must be a text, and a default what a record "
                "can hold: None, a truth value, a finite number, a text, or lists and dictionaries of these."
            )
    variants = getattr(module, "VARIANTS", {})
    for option, values in variants.items():
        if option not in options or not isinstance(values, list) or not values:
            raise OrreryError(
                f"{where}: VARIANTS holds {option!r}: {values!r}. A name must be one of OPTIONS, and its value a list "
                "of those that are worth trying."
            )
    return Method(name, options, plan, digest, variants, getattr(module, "replan", None))


def check_methods(kind: str) -> dict[str, str | None]:
    """Import each method of the kind in a process of its own: name -> None, or why it is broken."""
    return {name: _check(name) for name, entry in methods().items() if entry.kind == kind}


def _check(name: str) -> str | None:
    program = "import sys; from harness.registry import load_method; load_method(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", program, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the import ended with exit code {done.returncode}"


def load_testbed(name: str) -> Testbed:
    """The testbed of the library called `name`, or the TOML file at that path."""
    testbed: Testbed = importlib.import_module("testbeds.library").load(name)
    return testbed


def testbeds() -> list[tuple[str, str]]:
    """(name, description) of the testbeds of the library."""
    library = importlib.import_module("testbeds.library")
    return [(name, library.load(name).description) for name in library.names()]


def devices() -> list[tuple[str, str]]:
    """(name, title) of the device profiles of the library."""
    library = importlib.import_module("testbeds.library")
    return [(name, library.load_device(name).title) for name in library.devices()]


def experiments() -> list[tuple[str, str]]:
    """(name, title) of the reproductions."""
    listed: list[tuple[str, str]] = load_results("reproduce").experiments()
    return listed


def load_mode(mode: str) -> Mode:
    """The module of `testbeds/` that runs plans in this mode."""
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    module: Any = importlib.import_module(f"testbeds.{mode}")
    return module


def leftovers() -> Any:
    """The module that finds (`find()`) and removes (`clean()`) what killed runs have left on this machine."""
    return importlib.import_module("testbeds.emulation.leftovers")


def load_results(module: str) -> ModuleType:
    """A module of `results/`: the reproductions and the reports."""
    return importlib.import_module(f"results.{module}")
