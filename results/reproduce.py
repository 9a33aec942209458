"""The reproductions: every experiment file under `experiments/`, run and reported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from harness import show
from harness.errors import unknown_name
from harness.experiment import Request, read
from harness.records import Record
from harness.registry import load_results
from harness.runner import sweep

ALL = "all"


def experiments() -> list[tuple[str, str]]:
    """(name, title) of the experiments; the title is the file's first line, a comment."""
    return [
        (path.stem, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
        for path in sorted(_folder().glob("*.toml"))
    ]


def requests(names: Sequence[str]) -> list[Request]:
    """The runs of the experiments by those names, each once; of all of them where none is named.

    An experiment goes by the name of its file, or by the first word of it: "pac" are all that begin so.
    """
    paths = {name: _folder() / f"{name}.toml" for name, _ in experiments()}
    families = {name.partition("-")[0] for name in paths}
    for name in names:
        if name not in (ALL, *families, *paths):
            raise unknown_name("reproduction", name, (ALL, *families, *paths))
    everything = not names or ALL in names
    chosen = [path for name, path in paths.items() if everything or {name, name.partition("-")[0]} & {*names}]
    asked = {request.config_hash: request for path in chosen for request in read(path)}
    return list(asked.values())


def run(names: Sequence[str], out: Path, force: bool = False) -> list[Record]:
    """Run what is named into the results folder, then write its report: tables, figures, report.md, index.html."""
    asked = requests(names)
    records = []
    with show.progress(len(asked)) as ended:
        for outcome in sweep(asked, out, force):
            records.append(outcome.record)
            ended(f"{outcome.request}: {show.ending(outcome.record)}{' (done before)' if outcome.skipped else ''}")
    load_results("report").write(out)
    return records


def _folder() -> Path:
    return Path(str(files("results"))) / "experiments"
