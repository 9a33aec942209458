"""What is installed, pinned and imported, checked against what is there."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
HOUSE = ("baselines", "harness", "results", "systems", "testbeds")
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]


def files(*patterns: str) -> list[Path]:
    found = [path for folder in HOUSE for pattern in patterns for path in (ROOT / folder).rglob(pattern)]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def package_of(path: Path) -> Path:
    """The innermost package that a file lies in, relative to the root."""
    return next(folder for folder in path.relative_to(ROOT).parents if (ROOT / folder / "__init__.py").exists())


def test_every_package_is_installed() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in files("__init__.py")}
    assert found == set(SETUPTOOLS["packages"])


def test_every_module_lies_in_a_package() -> None:
    assert all((path.parent / "__init__.py").exists() for path in files("*.py"))


def test_every_data_file_is_installed() -> None:
    left_out = []
    for path in files("*"):
        package = package_of(path)
        inside = path.relative_to(ROOT / package).as_posix()
        patterns = [p for key in ("*", ".".join(package.parts)) for p in SETUPTOOLS["package-data"].get(key, [])]
        # As setuptools globs: a star does not cross folders.
        matched = any(fnmatch.fnmatch(inside, p) and inside.count("/") == p.count("/") for p in patterns)
        if path.suffix != ".py" and not matched:
            left_out.append(path)
    assert left_out == []


@pytest.mark.parametrize("path", files("*.toml"), ids=lambda path: path.stem)
def test_every_data_file_parses(path: Path) -> None:
    assert tomllib.loads(path.read_text())


def test_every_dependency_is_pinned_for_every_python() -> None:
    """One pin per package and Python: unconditional, or one for 3.10 and one for later."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r'([a-z0-9-]+)==([0-9][0-9a-z.]*)(?:; python_version (<|>=) "3\.11")?', line)
        assert match, line
        pins.setdefault(match[1], []).append(match[3] or "any")
    assert all(sorted(when) in (["any"], ["<"], [">="], ["<", ">="]) for when in pins.values())
    asked = PROJECT["project"]["dependencies"]
    extras = [name for names in PROJECT["project"]["optional-dependencies"].values() for name in names]
    for requirement in [*asked, *extras]:
        name = re.match(r"[A-Za-z0-9-]+", requirement)
        assert name and name[0] in pins, requirement
        only_old = "python_version < '3.11'" in requirement
        assert sorted(pins[name[0]]) in ([["<"]] if only_old else [["any"], ["<", ">="]]), requirement


def test_torch_is_pinned_to_what_was_tested() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_planners_run_without_torch() -> None:
    """The linter follows import statements; this follows what importing them really loads, parents included."""
    (contract,) = (c for c in CONTRACTS if c["type"] == "forbidden")
    program = (
        "import importlib, pkgutil, sys\n"
        f"for name in {contract['source_modules']!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    for inner in pkgutil.walk_packages(getattr(module, '__path__', []), name + '.'):\n"
        "        importlib.import_module(inner.name)\n"
        f"print(*sorted(set({contract['forbidden_modules']!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_contracts_cover_the_house() -> None:
    (layers,) = (c for c in CONTRACTS if c["type"] == "layers")
    named = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
    assert named == set(HOUSE) == set(PROJECT["tool"]["importlinter"]["root_packages"])


def test_tests_are_not_installed() -> None:
    assert not any(name.split(".")[0] == "tests" for name in SETUPTOOLS["packages"])


def test_licence_is_apache_2() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
