from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from harness.provenance import code_digest
from harness.records import Record

#: The least a record needs: what was asked, how it ended, where it comes from.
ASKED = {
    "method": "eddl",
    "method_options": {"shares": "equal", "micro_batch_size": None},
    "technique": "full",
    "technique_options": {},
    "model": "bert-tiny",
    "dataset": "mrpc",
    "num_samples": 3668,
    "seq_len": 128,
    "decoder_seq_len": 1,
    "image_size": None,
    "batch_size": 16,
    "epochs": 3,
    "steps": None,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "clip_norm": None,
    "dropout": None,
    "dtype": "float32",
    "attn_implementation": "eager",
    "checkpoint": None,
    "testbed": "pac-nano-4",
    "mode": "simulated",
    "num_devices": 4,
    "status": "ok",
    "provenance": {
        "schema_version": 3,
        "package_version": None,
        "git_commit": None,
        "git_dirty": None,
        "config_hash": "0123456789abcdef",
        "code_digest": code_digest(),
        "seed": 0,
        "libraries": {},
        "host": {},
        "devices": {"device0": "jetson-nano-10w"},
        "assumptions": [],
    },
}


@pytest.fixture
def record() -> Callable[..., Record]:
    """Makes a record of what is asked by default, with the fields given instead."""

    def make(**changed: object) -> Record:
        provenance = {**ASKED["provenance"], **changed.pop("provenance", {})}
        return Record.model_validate({**ASKED, **changed, "provenance": provenance})

    return make


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches of a test run live and die with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
