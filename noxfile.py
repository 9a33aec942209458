"""What a person runs here: on a fresh machine `nox -s reproduce` does the main job, and `nox -s tests` the tests.

All sessions share one environment, `.nox/orrery`: made once, brought up to date when what it is made from changes.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint"]

ENVIRONMENT = Path(".nox/orrery").resolve()
BIN = ENVIRONMENT / "bin"
MADE_FROM = ("pyproject.toml", "constraints.txt", "noxfile.py")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The tests, without the slow ones. Arguments go to pytest."""
    run(session, "pytest", *session.posargs)


@nox.session(venv_backend="none", default=False)
def slow(session: nox.Session) -> None:
    """The tests that take minutes. Arguments go to pytest."""
    run(session, "pytest", "-m", "slow", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style, types, and who may import whom."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "mypy")
    run(session, "lint-imports")


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """The speed of planning, profiling and simulating. Arguments go to pytest."""
    run(session, "pytest", "-m", "benchmark", *session.posargs)


@nox.session(venv_backend="none", default=False)
def reproduce(session: nox.Session) -> None:
    """Every table and figure that needs no rights. Arguments go to `orrery reproduce`; without any: all."""
    run(session, "orrery", "reproduce", *(session.posargs or ["all"]))


@nox.session(venv_backend="none", default=False)
def emulate(session: nox.Session) -> None:
    """The runs for real on this machine, beside the simulator. Shaped testbeds need root, or user namespaces."""
    run(session, "orrery", "reproduce", *(session.posargs or ["emulated", "local"]))


@nox.session(venv_backend="none", default=False)
def report(session: nox.Session) -> None:
    """The report of finished runs. Arguments go to `orrery report`; without any: the runs in ./orrery-runs."""
    run(session, "orrery", "report", *(session.posargs or ["orrery-runs"]))


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """A program of the shared environment."""
    install(session)
    session.run(str(BIN / program), *arguments, env={"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"})


def install(session: nox.Session) -> None:
    """Make the environment, unless it is made from these very files."""
    made_from = hashlib.sha256(b"".join(Path(name).read_bytes() for name in MADE_FROM)).hexdigest()
    stamp = ENVIRONMENT / "made-from"
    if stamp.exists() and stamp.read_text() == made_from:
        return
    if not (BIN / "python").exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(ENVIRONMENT))
    pip = (str(BIN / "python"), "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt")
    if sys.platform == "linux":
        session.run(*pip, "--no-deps", *cpu_index(session, pip), "torch")
    session.run(*pip, "--editable", ".[test,lint]")
    stamp.write_text(made_from)


def cpu_index(session: nox.Session, pip: tuple[str, ...]) -> list[str]:
    """Where torch without CUDA comes from: what pip finds by itself if that is a CPU build, else PyTorch's index."""
    found = session.run(*pip, "--dry-run", "--no-deps", "--report", "-", "torch", silent=True, success_codes=[0, 1])
    return [] if "+cpu" in str(found) else ["--index-url", CPU_BUILDS]
