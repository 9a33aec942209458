"""The results folder: one JSON file per run, whole or absent, named by the hash of what was asked; and the table.

Beside the record of a run that really happened lies its trace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from harness.errors import OrreryError
from harness.provenance import code_digest
from harness.records import SCHEMA_VERSION, Record, flat

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_OUT = Path("orrery-runs")
#: Runs that need not be done again. Refusals are cheap to repeat, and failures may have been mended.
FINISHED = ("ok", "oom")


def run_path(out: Path, config_hash: str) -> Path:
    return out / "runs" / f"{config_hash}.json"


def trace_path(out: Path, config_hash: str) -> Path:
    """The timeline of a run that really happened, its last repeat; for people's viewers and `read_chrome_trace`."""
    return out / "traces" / f"{config_hash}.json"


def state_path(out: Path, config_hash: str) -> Path:
    """The folder with the state of a run that can be resumed, as long as it is not over."""
    return out / "resume" / config_hash


def prepare(out: Path, replaced: Container[str] = ()) -> None:
    """Make the folder, and prove that it can be written and its records be read, before anything is run for it.

    Records of the hashes `replaced` need not be readable: they will be overwritten.
    """
    probe = out / "runs" / f".probe-{os.getpid()}"
    write_whole(probe, lambda part: part.write_bytes(b"\n"))
    probe.unlink()
    for path in _paths(out):
        if path.stem not in replaced:
            load(path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, flushed to disk, then renamed to `path`: readers see the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OrreryError(
            f"{path} can't be written: {error.strerror or error}. Nothing was changed there. "
            "Free some space, mend the permissions, or choose another folder with --out."
        ) from error
    finally:
        _discard(part)


def _sync_folder(folder: Path) -> None:
    """A rename is on disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(part: Path) -> None:
    """Remove what an interrupted write left; a folder that can't be entered holds nothing of ours."""
    try:
        part.unlink(missing_ok=True)
    except OSError:
        return


def save(out: Path, record: Record) -> Path:
    path = run_path(out, record.provenance.config_hash)
    write_whole(path, lambda part: part.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8"))
    return path


def load(path: Path) -> Record:
    """One record file. A file that is not a whole record of this schema is an `OrreryError` that says so."""
    try:
        record = Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise OrreryError(
            f"The record {path} can't be read: {error.strerror or error}. Remove it, or name another record or folder "
            "of results."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise OrreryError(
            f"The record {path} is corrupt or of another version of the schema: at {where}: {first['msg']}. "
            "Delete the file and ask for the run again."
        ) from error
    if record.schema_version != SCHEMA_VERSION:
        raise OrreryError(
            f"The record {path} is of version {record.schema_version} of the schema, and this Orrery reads version "
            f"{SCHEMA_VERSION}. Delete the file and ask for the run again, or choose another folder with --out."
        )
    return record


def finished(out: Path, config_hash: str) -> Record | None:
    """The stored record of a run that need not be done again: it ended, and this very code answered."""
    path = run_path(out, config_hash)
    if not path.exists():
        return None
    record = load(path)
    return record if record.status in FINISHED and record.provenance.code_digest == code_digest() else None


def holds_records(out: Path) -> bool:
    """Whether any run has left its record in the folder."""
    return any((out / "runs").glob("*.json"))


def load_all(out: Path) -> list[Record]:
    """Every record of a results folder, in an order that depends on nothing but what was asked."""
    paths = _paths(out)
    if not paths:
        raise OrreryError(f"There are no results in {out}: its folder `runs` is empty. Name the --out of a run.")
    return sorted(
        map(load, paths),
        key=lambda r: (r.testbed, r.mode, r.model, r.dataset, r.technique, r.provenance.config_hash),
    )


def _paths(out: Path) -> list[Path]:
    folder = out / "runs"
    if not folder.is_dir():
        raise OrreryError(f"There are no results in {out}: it has no folder `runs`. Name the --out of a run.")
    return sorted(folder.glob("*.json"))


def table(out: Path) -> pd.DataFrame:
    """One flat row per record (see `harness.records.flat`), written to `runs.csv` and `runs.parquet` in the folder."""
    import pandas as pd

    frame = pd.DataFrame([flat(record) for record in load_all(out)], columns=list(Record.model_fields))
    write_whole(out / "runs.csv", lambda part: frame.to_csv(part, index=False))
    write_whole(out / "runs.parquet", lambda part: part.write_bytes(frame.to_parquet(index=False)))
    return frame
