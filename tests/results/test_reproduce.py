from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import OrreryError
from harness.experiment import Request
from harness.store import load_all
from results import reproduce

FOLDER = Path(reproduce.__file__).parent / "experiments"


def test_experiments_are_what_lies_in_the_folder() -> None:
    found = reproduce.experiments()
    assert [name for name, _ in found] == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert all(title and not title.startswith(("#", "[")) for _, title in found)


@pytest.mark.parametrize("name", [name for name, _ in reproduce.experiments()])
def test_every_experiment_can_be_asked(name: str) -> None:
    requests = reproduce.requests([name])
    assert requests and all(request.mode in request.testbed.modes for request in requests)


def hashes(requests: list[Request]) -> list[str]:
    return [request.config_hash for request in requests]


def test_names() -> None:
    everything = hashes(reproduce.requests([]))
    assert len(set(everything)) == len(everything)
    assert hashes(reproduce.requests(["all"])) == everything
    assert hashes(reproduce.requests(["pac", "all"])) == everything
    pac = reproduce.requests(["pac"])
    assert {request.testbed.name.rpartition("-")[0] for request in pac} == {"pac-nano"}
    assert {*hashes(pac)} < {*everything}
    with pytest.raises(OrreryError, match=r"no reproduction called 'pacc'.*Did you mean pac"):
        reproduce.requests(["pac", "pacc"])


def test_the_four_nanos_are_asked_for_every_baseline_and_model() -> None:
    asked = {(r.method.name, r.workload.model) for r in reproduce.requests(["pac-full"])}
    methods, models = ("standalone", "eddl", "gpipe", "pipedream-1f1b"), ("t5-base", "bart-large", "t5-large")
    assert asked == {(method, model) for method in methods for model in models}
    for request in reproduce.requests(["pac-full"]):
        w = request.workload
        assert (w.dataset, w.technique, w.epochs, w.batch_size, w.seq_len) == ("mrpc", "full", 3, 16, 128)
        assert (request.testbed.name, request.mode) == ("pac-nano-4", "simulated")


def test_a_reproduction_ends_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real digits experiment, shortened: it trains, the loss falls, and the second time nothing is run."""
    text = (FOLDER / "local-digits.toml").read_text()
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "local-short.toml").write_text(text.replace("epochs = 3", "steps = 60"))
    monkeypatch.setattr(reproduce, "_folder", lambda: folder)
    out = tmp_path / "out"
    records = reproduce.run([], out)
    assert [record.status for record in records] == ["ok", "ok"]
    losses = next(record.losses for record in records if record.losses)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    page = (out / "index.html").read_bytes()
    assert reproduce.run(["local"], out) == records == sorted(load_all(out), key=records.index)
    assert (out / "index.html").read_bytes() == page


def test_listing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from results.reproduce import experiments; experiments();"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'seaborn', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
