"""What a campaign has on this machine beside its processes, and what is left of those that were killed: control groups,
folders of weights and samples, and the lock that keeps two of them apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.errors import OrreryError
from testbeds.emulation import cgroups

#: Whoever only looks whether a lock is free has it for an instant.
TRIES, PAUSE_S = 3, 0.05


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder for one campaign, named after this process, so that it is known for a leftover when that is dead."""
    with tempfile.TemporaryDirectory(prefix=f"{cgroups.group_name(os.getpid())}-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextlib.contextmanager
def only_one() -> Iterator[Path]:
    """Two emulations at once would slow each other down: the second is refused. A dead one's lock is free."""
    path = _lock_path()
    try:
        file = _lock(path)
    except OSError as error:
        reason = error.strerror
        raise OrreryError(f"The lock file {path} can't be opened: {reason}. Remove it, or set TMPDIR.") from error
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield path
    finally:
        path.unlink(missing_ok=True)  # while it is ours
        os.close(file)


def find() -> list[str]:
    """Paths of what dead runs have left; nothing of a living one."""
    return [*(str(left.path) for left in cgroups.leftovers()), *map(str, (*_folders(), *_free_locks()))]


def clean() -> list[str]:
    """Remove what dead runs have left, and end what still runs in their control groups. Returns what there was."""
    groups = [str(left.path) for left in cgroups.clean()]
    return groups + remove([*_folders(), *_free_locks()])


def remove(paths: Iterable[str | Path]) -> list[str]:
    """Remove folders, and locks that nobody holds. Returns those that are gone."""
    places = [Path(path) for path in paths]
    for place in places:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            _remove_lock(place)
    return [str(place) for place in places if not place.exists()]


def _folders() -> list[Path]:
    """Campaigns' folders of this user whose owner is dead."""
    candidates = Path(tempfile.gettempdir()).glob("orrery-*-*-*-*")
    return [
        path
        for path in candidates
        if path.is_dir()
        and not path.is_symlink()
        and path.stat().st_uid == os.getuid()
        and cgroups.is_leftover(path.name.rpartition("-")[0])
    ]


def _lock_path() -> Path:
    return Path(tempfile.gettempdir()) / f"orrery-{os.getuid()}.lock"


def _lock(path: Path) -> int:
    """The descriptor of the locked file. Raises OrreryError if another process has it, OSError if it can't be made."""
    owner = ""
    for _ in range(TRIES):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):  # else removed meanwhile
                return file
        except BlockingIOError:
            owner = os.read(file, 100).decode(errors="replace").strip()
        os.close(file)
        time.sleep(PAUSE_S)
    raise OrreryError(
        f"Process {owner or 'unknown'} is emulating a testbed on this machine, and two would disturb each other. Wait "
        f"for it, or stop it. (The lock is {path}; it is freed when its process ends.)"
    )


def _free_locks() -> list[Path]:
    """The lock, if its process died without removing it."""
    path = _lock_path()
    with contextlib.suppress(OSError), _held(path):
        return [path]
    return []


def _remove_lock(path: Path) -> None:
    with contextlib.suppress(OSError), _held(path):
        path.unlink()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Raises OSError where there is no lock, or somebody has it."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
