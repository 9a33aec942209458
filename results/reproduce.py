"""The reproductions: every experiment file under `experiments/`, run and reported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from harness import datasets, show
from harness.errors import unknown_name
from harness.experiment import COMPUTED, Request, read
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


def requests(names: Sequence[str], data_dir: Path | None = None) -> list[Request]:
    """The runs of the experiments by those names, each once; of "all" where none is named.

    An experiment goes by the name of its file, or by the first word of it: "pac" are all that begin so. `data_dir` is
    where the data sets lie that are read and are in no package; None: on the hub.
    """
    not_asked = left_out(names)
    chosen = [name for name in _chosen(names) if name not in not_asked]
    runs = [_with_data(request, data_dir) for name in chosen for request in _runs(name)]
    return list({request.config_hash: request for request in runs}.values())


def left_out(names: Sequence[str]) -> dict[str, str]:
    """Experiments that "all" does not run, and what they need that is not on every machine."""
    by_name = _chosen([name for name in names if name != ALL]) if {*names} - {ALL} else []
    needs = {name: _needs(name) for name in _chosen(names) if name not in by_name}
    return {name: need for name, need in needs.items() if need}


def run(names: Sequence[str], out: Path, force: bool = False, data_dir: Path | None = None) -> list[Record]:
    """Run what is named into the results folder, then write its report: tables, figures, report.md, index.html."""
    for need, alike in _by_need(left_out(names)).items():
        print(
            f"{' and '.join(alike)} {'are' if len(alike) > 1 else 'is'} not among all: {need}. "
            f"`orrery reproduce {' '.join(alike)}` runs {'them' if len(alike) > 1 else 'it'}.",
            file=sys.stderr,
        )
    asked = requests(names, data_dir)
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
    whole = [record for record in records if record.inject is None]
    for part in ("agreement", "scores", "quality", "latency", "throughput", "scaling", "parallelisms"):
        if text := load_results(part).text(whole):
            yield text
    for part in ("system_claims", "recovery"):
        if text := load_results(part).text(records):
            yield text
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


def _by_need(needs: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that need the same."""
    found: dict[str, list[str]] = {}
    for name, need in needs.items():
        found.setdefault(need, []).append(name)
    return found


def _needs(name: str) -> str:
    """What the experiment's real runs need beside this installation; empty where they need nothing."""
    real = [request for request in _runs(name) if request.mode != COMPUTED]
    asked = dict.fromkeys(request.testbed.name for request in real)
    shaped = [testbed for testbed in asked if library.load(testbed).medium != "loopback"]
    read = [dataset for dataset in dict.fromkeys(r.workload.dataset for r in real) if _is_elsewhere(dataset)]
    needs = []
    if shaped:
        needs.append(
            f"it runs for minutes on {', '.join(shaped)}, for which this machine's cores and links are shaped, and "
            f"that needs rights (`orrery doctor --testbed {shaped[0]}` tells whether they are there)"
        )
    if read:
        weights = dict.fromkeys(r.workload.checkpoint for r in real if r.workload.checkpoint is not None)
        begin = f", and begins with {', '.join(weights)}" if weights else ""
        needs.append(f"it trains for minutes on {', '.join(read)}, read from the Hugging Face hub or --data-dir{begin}")
    return ", and ".join(needs)


def _with_data(request: Request, data_dir: Path | None) -> Request:
    """The request, reading from the folder what it reads from one."""
    reads = request.mode != COMPUTED and _is_elsewhere(request.workload.dataset)
    return replace(request, data_dir=data_dir) if reads and data_dir is not None else request


def _is_elsewhere(dataset: str) -> bool:
    """Whether the data set's samples are neither made here nor in a package."""
    return datasets.spec(dataset).hub is not None


def _folder() -> Path:
    return Path(str(files("results"))) / "experiments"
