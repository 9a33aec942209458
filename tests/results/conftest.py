from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.experiment import expand
from harness.records import Record
from harness.runner import sweep
from harness.store import load_all
from results import system_claims
from tests.harness.conftest import ASKED, record

__all__ = ["record"]

METHODS = ["standalone", "eddl", "gpipe", "pipedream-1f1b"]
#: 40 samples in batches of 16: two full batches and a smaller last one per epoch.
TEXT = {"model": ["bert-tiny", "t5-tiny"], "dataset": "mrpc", "num_samples": 40, "batch_size": 16, "epochs": 2}
IMAGES = {"model": "resnet-tiny", "dataset": "digits", "num_samples": 64, "epochs": 1, "learning_rate": 0.05}
#: What is really trained by two processes that exchange tensors.
SHARED = {"model": "bert-tiny", "dataset": "synthetic", "num_samples": 16, "batch_size": 8, "seq_len": 16, "steps": 3}
BOTH = ["emulated", "simulated"]
#: The memory of a board on which t5-tiny can be trained, though not by every method, and bert-tiny not at all.
SMALL_BOARD_BYTES = 5_000_000


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches and temporary files of a test run live and die with it; other emulations here are none of its business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = str(tmp_path_factory.mktemp("temporary"))
        patch.setenv("TMPDIR", folder)
        patch.setattr("tempfile.tempdir", folder)
        yield


@pytest.fixture(scope="session")
def small_testbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three boards, a file of the user's own."""
    import testbeds

    folder = tmp_path_factory.mktemp("boards")
    library = Path(testbeds.__file__).parent
    board = (library / "devices/jetson-nano-10w.toml").read_text()
    assert board.count("value = 1_625_292_800") == board.count("low = 1_625_292_800") == 1
    (folder / "small.toml").write_text(board.replace("= 1_625_292_800", f"= {SMALL_BOARD_BYTES}"))
    environment = (library / "environments/demo-hetero-3.toml").read_text()
    link = environment[environment.index("[link]") :]
    text = f'description = "small"\nmodes = ["simulated"]\n\n[[devices]]\nprofile = "small.toml"\ncount = 3\n\n{link}'
    (folder / "small-3.toml").write_text(text)
    return folder / "small-3.toml"


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory, small_testbed: Path) -> Path:
    """A results folder with runs of tiny models: simulated, out of memory, and for real on this machine."""
    out = tmp_path_factory.mktemp("swept")
    for workload, run in (
        (TEXT, {"method": METHODS, "testbed": "pac-nano-4"}),
        (TEXT, {"method": METHODS, "testbed": str(small_testbed)}),
        (IMAGES, {"method": "standalone", "testbed": "local-1", "mode": BOTH}),
        (SHARED, {"method": ["eddl", "pipedream-1f1b"], "testbed": "local-2", "mode": BOTH, "verify": True}),
    ):
        requests = expand({"workload": workload, "run": run}, "the test")
        for outcome in sweep(requests, out):
            assert outcome.record.status in ("ok", "oom"), outcome.record.reason
    return out


@pytest.fixture(scope="session")
def records(swept: Path) -> list[Record]:
    return load_all(swept)


@pytest.fixture
def made() -> Callable[..., Record]:
    """A simulated request on so many devices of a family."""

    def make(devices: int, seq_len: int, seconds: float, method: str = "galaxy", **changed: object) -> Record:
        asked = {
            "model": "gpt2-large",
            "technique": "inference",
            "method": method,
            "method_options": system_claims.load("galaxy")["options"][method],
            "testbed": f"galaxy-m-{devices}@16gib",
            "num_devices": devices,
            "seq_len": seq_len,
            "latency_s": seconds,
        }
        return Record.model_validate({**ASKED, **asked, **changed})

    return make
