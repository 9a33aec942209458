"""The journal of a run that can be killed: at any instant the old commit or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import resume
from harness.errors import OrreryError
from harness.resume import COMMITTED, Journal

ABOUT = {"config_hash": "c0ffee", "code_digest": "beef"}


def written(journal: Journal, epochs: int) -> dict[str, str]:
    """What two devices do before a commit."""
    for device in ("device0", "device1"):
        (journal.folder / f"epoch-{epochs:05d}-{device}.safetensors").write_text(device)
    return {"device0": f"a{epochs}", "device1": f"b{epochs}"}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    found = Journal(tmp_path / "resume" / "c0ffee", ABOUT)
    assert found.committed() is None
    found.keep_plan("{}")
    return found


def names(journal: Journal) -> set[str]:
    return {path.name for path in journal.folder.iterdir()}


def test_the_last_commit_counts_and_earlier_files_go(journal: Journal) -> None:
    for epochs in (1, 2, 10):
        journal.commit(epochs, digests := written(journal, epochs))
        found = Journal(journal.folder, ABOUT).committed()
        assert found is not None and (found.epochs, found.digests) == (epochs, digests)
        files = {f"epoch-{epochs:05d}-device{rank}.safetensors" for rank in (0, 1)}
        assert names(journal) == {"plan.json", COMMITTED, *files}
    journal.remove()
    assert not journal.folder.parent.exists()


def test_a_kill_before_or_amid_a_commit_leaves_the_old_one(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.commit(1, written(journal, 1))
    before = names(journal)
    digests = written(journal, 2)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    for step in ("pathlib.Path.replace", "os.fsync"):
        with monkeypatch.context() as then:
            then.setattr(step, die)
            with pytest.raises(Killed):
                journal.commit(2, digests)
        found = Journal(journal.folder, ABOUT).committed()
        assert found is not None and found.epochs == 1 and before <= names(journal)
    with monkeypatch.context() as then:
        then.setattr("pathlib.Path.glob", die)
        with pytest.raises(Killed):
            journal.commit(2, digests)
    found = Journal(journal.folder, ABOUT).committed()
    assert found is not None and found.epochs == 2, "just not tidied up"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({**ABOUT, "config_hash": "tea"}, "was of another question: c0ffee there, tea now"),
        ({**ABOUT, "code_digest": "pork"}, "was of another code: beef there, pork now"),
        ({**ABOUT, "samples": "ab"}, "was of another data: None there, ab now"),
    ],
)
def test_what_was_of_something_else_is_refused(journal: Journal, about: dict[str, str], message: str) -> None:
    journal.commit(3, written(journal, 3))
    text = f"{message}, so it can't go on after epoch 3. Remove {journal.folder} to begin anew, run without --resume"
    with pytest.raises(OrreryError, match=text):
        Journal(journal.folder, about).committed()


def test_another_format_is_refused(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.commit(1, written(journal, 1))
    monkeypatch.setattr(resume, "FORMAT", 2)
    with pytest.raises(OrreryError, match="was of another version of the state's format: 1 there, 2 now"):
        Journal(journal.folder, ABOUT).committed()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": 1}', '{"about": 1, "epochs": 1, "digests": {}}'])
def test_a_damaged_commit_is_refused(journal: Journal, text: str) -> None:
    (journal.folder / COMMITTED).write_text(text)
    with pytest.raises(OrreryError, match=r"committed\.json can't be read: .* Remove .* to begin anew"):
        journal.committed()
