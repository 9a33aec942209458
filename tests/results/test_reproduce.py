from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from harness import registry, runner
from harness.errors import OrreryError
from harness.experiment import Request
from harness.plan import Plan
from harness.store import load_all
from harness.workload import Workload
from results import reproduce

FOLDER = Path(reproduce.__file__).parent / "experiments"


def test_experiments_are_what_lies_in_the_folder() -> None:
    found = reproduce.experiments()
    assert [name for name, _ in found] == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert all(title and not title.startswith(("#", "[")) for _, title in found)


@pytest.mark.parametrize("name", [name for name, _ in reproduce.experiments()])
def test_every_experiment_can_be_asked(name: str) -> None:
    requests = reproduce.requests([name])
    assert bool(requests) != (name == reproduce.VALIDATION)
    assert all(request.mode in request.testbed.modes for request in requests)


SHAPED = {
    "emulated": ["emu-4-50mbit", "emu-4-200mbit"],
    "emulated-asteroid": ["emu-5-unequal-100mbit"],
    "emulated-galaxy": ["emu-4-slow-50mbit@25mbit", "emu-4-slow-50mbit", "emu-4-slow-50mbit@125mbit"],
    "emulated-generation": ["emu-4-slow-50mbit@25mbit", "emu-4-slow-50mbit@125mbit"],
    "emulated-pac": ["emu-4-50mbit"],
    "emulated-recovery": ["emu-5-unequal-100mbit"],
}
WHAT = ("full", "added", "beside", "pruned")
READING = {f"quality-{dataset}-{what}": dataset for dataset in ("mrpc", "stsb", "sst2") for what in WHAT}


def test_only_what_is_read_is_read_from_the_data_folder() -> None:
    folder = Path("somewhere")
    reading = reproduce.requests(["quality"], folder)
    assert {request.workload.dataset for request in reading} == {*READING.values()}
    assert all(request.data_dir == folder and request.evaluate for request in reading)
    assert all(request.data_dir is None for request in reproduce.requests(["quality"]))
    assert hashes(reproduce.requests(["local", "pac"], folder)) == hashes(reproduce.requests(["local", "pac"]))


def test_techniques_are_compared_like_for_like() -> None:
    """One amount of training per data set, one rate per technique, on the same two processes, with the same seeds."""
    requests = reproduce.requests(["quality"])
    for dataset in ("mrpc", "stsb", "sst2"):
        found = [request for request in requests if request.workload.dataset == dataset]
        alike = {(w.num_samples, w.seq_len, w.epochs, w.batch_size) for w in (request.workload for request in found)}
        assert len(alike) == len({request.testbed.name for request in found}) == 1
        for technique in ("full", "adapters", "lora", "parallel-adapters"):
            assert {r.workload.seed for r in found if r.workload.technique == technique} == {0, 1, 2}
    rates = {(request.workload.technique, request.workload.learning_rate) for request in requests}
    assert len(rates) == 4


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


def test_all_is_everything_that_shapes_and_reads_nothing() -> None:
    """What needs rights, or data and a checkpoint, is run where it is named."""
    everything = {*hashes(reproduce.requests([]))}
    for name, _ in reproduce.experiments():
        its = {*hashes(reproduce.requests([name]))}
        assert its or name == reproduce.VALIDATION
        left_out = name in {*SHAPED, *READING}
        assert its.isdisjoint(everything) if left_out else its <= everything, name
    assert reproduce.left_out([]) == reproduce.left_out(["pac", "all"])
    needs = reproduce.left_out(["all"])
    assert {*needs} == {*SHAPED, *READING}
    assert all(f"it runs for minutes on {', '.join(testbeds)}, for which" in needs[n] for n, testbeds in SHAPED.items())
    assert all(f"it trains for minutes on {dataset}, read" in needs[name] for name, dataset in READING.items())
    assert reproduce.left_out(["emulated"]) == reproduce.left_out(["quality", "emulated"]) == {}
    assert {*reproduce.left_out(["all", "emulated"])} == {*READING}
    assert {*hashes(reproduce.requests(["all", "emulated"]))} == everything | {
        *hashes(reproduce.requests(["emulated"]))
    }


def test_what_all_leaves_out_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    shutil.copy(FOLDER / "emulated.toml", folder)
    tiny = '[workload]\nmodel = "bert-tiny"\nsteps = 1\n[run]\nmethod = "eddl"\ntestbed = "pac-nano-4"\n'
    (folder / "tiny.toml").write_text(tiny)
    monkeypatch.setattr(reproduce, "_folder", lambda: folder)
    records = reproduce.run([], tmp_path / "out")
    assert [record.testbed for record in records] == ["pac-nano-4"]
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("emulated is not among all: it runs for minutes on emu-4-50mbit, emu-4-200mbit, for which")
    assert told.endswith("`orrery reproduce emulated` runs it.")
    reproduce.run(["tiny"], tmp_path / "out")
    assert "not among all" not in capsys.readouterr().err


def test_real_runs_of_a_testbed_follow_each_other_and_methods_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a testbed takes seconds, so that each is opened once; repeats alternate, so that no method has the
    machine's good hour for itself. Virtual time stands for real time here."""
    asked = [
        replace(request, repeats=2, workload=replace(request.workload, seq_len=8))
        for request in reproduce.requests(["emulated"])
        if request.mode == "emulated"
        and request.testbed.name in SHAPED["emulated"]
        and request.workload.technique == "full"
    ]
    assert len(asked) == 2 * 2 * 3
    simulated = registry.load_mode("simulated")
    seen: list[tuple[object, ...]] = []

    class Watched:
        @staticmethod
        @contextmanager
        def opened(testbed: registry.Testbed) -> Iterator[Callable[..., object]]:
            seen.append((testbed.name,))
            with simulated.opened(testbed) as execute:

                def watched(plan: Plan, workload: Workload, *args: object, **how: object) -> object:
                    seen.append((testbed.name, workload.batch_size, plan.method))
                    return execute(plan, workload, *args, **how)

                yield watched

    monkeypatch.setattr(registry, "load_mode", lambda mode: Watched)
    methods = ("eddl", "gpipe", "pipedream-1f1b")
    outcomes = list(runner.sweep(asked, tmp_path))
    wanted: list[tuple[object, ...]] = []
    for testbed in ("emu-4-50mbit", "emu-4-200mbit"):
        wanted += [(testbed,), *((testbed, size, m) for size in (32, 64) for _ in range(2) for m in methods)]
    assert seen == wanted
    assert [o.record.repeats for o in outcomes] == [2] * len(asked)
    assert len(load_all(tmp_path)) == len(asked)
    assert len([*(tmp_path / "traces").iterdir()]) == len(asked)


def test_the_four_nanos_are_asked_for_every_baseline_model_and_technique() -> None:
    asked = {(r.method.name, r.workload.model, r.workload.technique) for r in reproduce.requests(["pac-techniques"])}
    methods, models = ("standalone", "eddl", "gpipe", "pipedream-1f1b", "eco-fl"), ("t5-base", "bart-large", "t5-large")
    techniques = ("full", "adapters", "lora", "parallel-adapters")
    assert asked == {(method, model, name) for method in methods for model in models for name in techniques}
    for request in reproduce.requests(["pac-techniques"]):
        w = request.workload
        assert (w.dataset, w.epochs, w.batch_size, w.seq_len) == ("mrpc", 3, 16, 128)
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
