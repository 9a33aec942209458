"""Orrery's shared machinery: from a workload and a method's plan to a trace and a record.

import harness
record = harness.run(method="eddl", model="t5-base", testbed="pac-nano-4", dataset="mrpc", batch_size=16)
record.throughput_samples_per_s
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.meters import Choice
    from harness.records import Record


def run(
    *,
    options: Mapping[str, object] | None = None,
    technique_options: Mapping[str, object] | None = None,
    meter: Choice | None = None,
    **named: Any,
) -> Record:
    """One run, named as on the command line (`batch_size` for `--batch-size`); returns what `--json` prints.

    `options` are the method's own, `technique_options` the technique's. `meter` is what measures this machine while it
    executes the run; None: what is found. Nothing is written, but what `save_adapter`
    names. Raises `harness.errors.OrreryError` for bad input.
    """
    from harness import experiment, runner

    return runner.run(experiment.one(named, options or {}, technique_options), meter or runner.FOUND_HERE)
