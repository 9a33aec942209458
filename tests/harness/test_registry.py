from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from harness import registry
from harness.errors import OrreryError

GOOD = '"""Mine: does nothing.\n\nMore."""\nOPTIONS = {"speed": 1}\ndef plan(workload, costs, cluster, options): ...\n'


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two method packages of our own, in place of the built-in ones."""
    (tmp_path / "own_systems" / "big_one").mkdir(parents=True)
    (tmp_path / "own_systems" / "big_one" / "__init__.py").write_text(GOOD)
    (tmp_path / "own_systems" / "no_package").mkdir()
    (tmp_path / "own_baselines").mkdir()
    (tmp_path / "own_baselines" / "__init__.py").write_text("")
    (tmp_path / "own_baselines" / "small_one.py").write_text(GOOD)
    (tmp_path / "own_baselines" / "broken.py").write_text('"""Broken."""\nimport there_is_no_such_library\n')
    (tmp_path / "own_baselines" / "half.py").write_text('"""Half a method."""\nOPTIONS = {}\n')
    (tmp_path / "own_baselines" / "odd.py").write_text("def (\n")
    (tmp_path / "own_baselines" / "_private.py").write_text("")
    (tmp_path / "own_baselines" / "data.toml").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(registry, "METHOD_PACKAGES", ("own_systems", "own_baselines"))
    return tmp_path


def test_scan_takes_names_from_files_and_summaries_from_docstrings(packages: Path) -> None:
    listed = {entry.name: (entry.kind, entry.summary, entry.module) for entry in registry.methods().values()}
    assert listed["big-one"] == ("own_systems", "Mine: does nothing.", "own_systems.big_one")
    assert listed["small-one"] == ("own_baselines", "Mine: does nothing.", "own_baselines.small_one")
    assert set(listed) == {"big-one", "small-one", "broken", "half", "odd"}
    assert listed["odd"][1].startswith("can't be read")
    assert not any(name.startswith("own_baselines.") for name in sys.modules), "listing imports no method"


def test_variants_are_lists_of_values_of_options(packages: Path) -> None:
    small = packages / "own_baselines" / "small_one.py"
    small.write_text(f'{GOOD}VARIANTS = {{"speed": [1, 2]}}\n')
    assert registry.load_method("small-one").variants == {"speed": [1, 2]}
    assert registry.load_method("big-one").variants == {}
    for wrong in ('{"sped": [1]}', '{"speed": 2}', '{"speed": []}'):
        path = packages / "wrong.py"
        path.write_text(f"{GOOD}VARIANTS = {wrong}\n")
        with pytest.raises(OrreryError, match=r"VARIANTS holds 'spe.*A name must be one of OPTIONS"):
            registry.load_method(str(path))


def test_load_by_name(packages: Path) -> None:
    method = registry.load_method("big-one")
    assert (method.name, dict(method.options), method.digest) == ("big-one", {"speed": 1}, None)


def test_unknown_and_broken_methods_are_clear_errors(packages: Path) -> None:
    with pytest.raises(OrreryError, match=r"no method called 'smal-one'. Did you mean small-one"):
        registry.load_method("smal-one")
    with pytest.raises(OrreryError, match="ModuleNotFoundError: No module named 'there_is_no_such_library'"):
        registry.load_method("broken")
    with pytest.raises(OrreryError, match=r"own_baselines.half is no method: it needs a function `plan"):
        registry.load_method("half")


def test_method_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_method.py"
    path.write_text(GOOD)
    first = registry.load_method(str(path))
    assert (first.name, dict(first.options)) == ("my-method", {"speed": 1})
    path.write_text(GOOD + "# edited\n")
    assert registry.load_method(str(path)).digest != first.digest
    path.write_text("def (\n")
    with pytest.raises(OrreryError, match="can't be imported: SyntaxError"):
        registry.load_method(str(path))
    with pytest.raises(OrreryError, match="There is no method file"):
        registry.load_method(str(tmp_path / "none.py"))


def test_third_party_methods_come_from_entry_points(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "own_systems.big_one", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINTS else [])
    assert registry.methods()["theirs"].kind == registry.SYSTEMS
    assert registry.load_method("theirs").name == "theirs"
    clash = EntryPoint("big-one", "x", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [clash])
    with pytest.raises(OrreryError, match=r"'big-one'.*has the name of own_systems.big_one"):
        registry.methods()


def test_check_imports_each_built_in_method_in_a_process_of_its_own() -> None:
    """The real packages: every method is whole, and no planner brings torch along."""
    assert all(why is None for why in registry.check_methods(registry.BASELINES).values())
    program = (
        "import sys; from harness import registry\n"
        "for name in registry.methods(): registry.load_method(name)\n"
        "assert 'torch' not in sys.modules, 'a planner imports torch'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_check_names_the_broken_ones_with_the_reason(tmp_path: Path) -> None:
    """A package of methods that stands in for `baselines/` in another process."""
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "__init__.py").write_text("")
    (tmp_path / "baselines" / "broken.py").write_text("import there_is_no_such_library\n")
    (tmp_path / "baselines" / "whole.py").write_text(GOOD)
    program = "from harness import registry; import json; print(json.dumps(registry.check_methods('baselines')))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": ""},
    )
    assert '"whole": null' in done.stdout
    assert "No module named 'there_is_no_such_library'" in done.stdout


def test_unknown_mode_is_a_clear_error() -> None:
    with pytest.raises(OrreryError, match=r"no mode called 'simulate'. Did you mean simulated"):
        registry.load_mode("simulate")
