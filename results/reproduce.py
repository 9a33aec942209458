"""The reproductions: every experiment file under `experiments/`, run and reported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from harness import show
from harness.errors import unknown_name
from harness.experiment import Request, read
from harness.records import Record
from harness.registry import load_results
from harness.runner import sweep
from testbeds import library

ALL = "all"
#: The experiment that needs no run.
VALIDATION = "validation"


def experiments() -> list[tuple[str, str]]:
    """(name, title) of the experiments; the title is the file's first line, a comment."""
    return [
        (path.stem, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        for path in sorted(_folder().glob("*.toml"), key=lambda path: path.stem)
    ]


def requests(names: Sequence[str]) -> list[Request]:
    """The runs of the experiments by those names, each once; of "all" where none is named.

    An experiment goes by the name of its file, or by the first word of it: "pac" are all that begin so.
    """
    not_asked = left_out(names)
    chosen = [name for name in _chosen(names) if name not in not_asked]
    asked = {request.config_hash: request for name in chosen for request in _runs(name)}
    return list(asked.values())


def left_out(names: Sequence[str]) -> dict[str, list[str]]:
    """Experiments that "all" does not run, with the testbeds that are why: to shape them takes rights, and minutes."""
    by_name = _chosen([name for name in names if name != ALL]) if {*names} - {ALL} else []
    shaped = {name: _shaped_testbeds(name) for name in _chosen(names) if name not in by_name}
    return {name: testbeds for name, testbeds in shaped.items() if testbeds}


def run(names: Sequence[str], out: Path, force: bool = False) -> list[Record]:
    """Run what is named into the results folder, then write its report: tables, figures, report.md, index.html."""
    for name, testbeds in left_out(names).items():
        print(
            f"{name} is not among all: it runs for minutes on {', '.join(testbeds)}, for which this machine's cores "
            f"and links are shaped, and that needs rights (`orrery doctor --testbed {testbeds[0]}` tells whether they "
            f"are there). `orrery reproduce {name}` runs it.",
            file=sys.stderr,
        )
    asked = requests(names)
    records = []
    with show.progress(len(asked)) as ended:
        for outcome in sweep(asked, out, force):
            records.append(outcome.record)
            ended(f"{outcome.request}: {show.ending(outcome.record)}{' (done before)' if outcome.skipped else ''}")
    if VALIDATION in _chosen(names):
        load_results("validation").write(out)
    load_results("report").write(out)
    return records


def texts(names: Sequence[str], records: Sequence[Record], out: Path) -> Iterator[str]:
    """What a terminal shows of what was asked for, part by part."""
    if records:
        yield show.records_table(records)
    if agreement := load_results("agreement").text(records):
        yield agreement
    if VALIDATION in _chosen(names):
        yield load_results("validation").text(out)


def _chosen(names: Sequence[str]) -> list[str]:
    """The experiments by those names; every one where none or "all" is named."""
    known = [name for name, _ in experiments()]
    families = {name.partition("-")[0] for name in known}
    for name in names:
        if name not in (ALL, *families, *known):
            raise unknown_name("reproduction", name, (ALL, *families, *known))
    if not names or ALL in names:
        return known
    return [name for name in known if {name, name.partition("-")[0]} & {*names}]


def _runs(name: str) -> list[Request]:
    return [] if name == VALIDATION else read(_folder() / f"{name}.toml")


def _shaped_testbeds(name: str) -> list[str]:
    """Where the experiment's real runs are on devices and links that this machine is shaped to behave like."""
    emulated = [request.testbed.name for request in _runs(name) if request.mode == "emulated"]
    return [testbed for testbed in dict.fromkeys(emulated) if library.load(testbed).medium != "loopback"]


def _folder() -> Path:
    return Path(str(files("results"))) / "experiments"
