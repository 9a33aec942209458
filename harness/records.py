"""The record: everything about one run, as one JSON object and as one flat row. Field names carry units.

The JSON Schema in `docs/record.schema.json` is `python -m harness.records`; a test compares the two.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

#: Raised whenever a field changes its meaning, appears or goes. It is part of what a stored run is named by.
SCHEMA_VERSION = 5

#: Fields that may differ between two runs of the same input in simulated mode; all others are equal to the byte.
NOT_DETERMINISTIC = ("planning_time_s", "provenance")

Status = Literal["ok", "oom", "unsupported", "failed"]


class Part(BaseModel):
    """Base of the record and its parts: frozen, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DeviceMemory(Part):
    """Most bytes alive on one device at once, and the most of each kind. Kinds peak at different moments."""

    peak_bytes: int
    weights_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    activations_bytes: int = 0
    buffers_bytes: int = 0
    cache_bytes: int = 0
    snapshots_bytes: int = 0
    process_peak_bytes: int | None = Field(
        default=None, description="most memory that the device's process had, its code and libraries included"
    )


class PhaseRecord(Part):
    """One phase of the plan, over all its repeats."""

    name: str
    repeat: int
    time_s: float
    comm_bytes: int
    computing_s: float | None = Field(
        default=None, description="seconds of computing, summed over devices; null where not followed phase by phase"
    )
    memory: dict[str, DeviceMemory] | None = Field(
        default=None, description="of each device within the phase; null where not followed phase by phase"
    )


class DeviceEnergy(Part):
    """Energy of one device over the run. The parts add up to the device's gross energy."""

    idle_j: float = Field(description="as if it had done nothing, over the whole run")
    compute_j: float = Field(description="what computing adds")
    wait_j: float = Field(default=0.0, description="what waiting adds, where it takes more than to be idle")
    communication_j: float = Field(description="what the network adds")


class HostEnergy(Part):
    """What a meter of the machine that really ran this says of the execution. It is the host's energy: no device of the
    testbed drew it, and it is in no other field. Where there is no figure, it is null and `reason` says why.
    """

    meter: str = Field(description="name and version, or the instrument; none: there was no meter")
    energy_j: float | None = Field(description="gross")
    energy_net_of_idle_j: float | None = Field(description="null without an idle baseline")
    energy_source: str | None = Field(
        description="measured-rail, measured-counter, corrected-pmic, external, regression or tdp-model"
    )
    rails: list[str] = Field(description="the labels that were added, or the counters")
    constants: dict[str, float] = Field(description="of a correction or a regression")
    constants_source: str | None
    scope: str | None = Field(description="what is in the figure: board, module, counters")
    carrier_included: bool | None = Field(description="null where there is no carrier board, or it is not known")
    network_included: bool = Field(description="switches, routers; no meter of a board sees them")
    nominal_hz: float | None
    achieved_hz: float | None
    samples: int | None = Field(description="null where a counter of energy was read")
    largest_gap_s: float | None
    duration_s: float | None = Field(description="of the window: the whole execution, its preparation included")
    mean_w: float | None
    min_w: float | None
    max_w: float | None
    idle_w: float | None
    idle_at: str | None = Field(description="when the idle baseline began, UTC")
    idle_duration_s: float | None
    board: str | None = Field(description="as the device tree names it")
    power_mode: str | None
    clocks_pinned: bool | None
    release: str | None = Field(description="of L4T, or of the operating system")
    carbon_g: float | None = Field(description="g of CO2 equivalents, where an intensity was given")
    carbon_g_per_kwh: float | None
    carbon_source: str | None
    reason: str | None


class Recovery(Part):
    """One recovery after a failure: its phases in order, what it moved, and what the failure cost in throughput."""

    fault: str = Field(description="what happened, as it was injected")
    device: str
    in_round: int = Field(description="rounds that were over when it happened")
    back_to_round: int = Field(description="rounds of the snapshot that was gone back to")
    detect_s: float = Field(description="from the failure until it was known")
    replan_s: float | None = Field(description="of planning; null in virtual time: `planning_time_s` has it")
    regroup_s: float = Field(description="until the devices that are left were connected anew")
    transfer_s: float | None = Field(
        description="until each had what it needs; this and what follows null where another failure came before"
    )
    replay_s: float | None = Field(description="of the rounds since the snapshot")
    first_step_s: float | None = Field(description="of the round in which it happened, done again")
    moved_bytes: int | None
    throughput_before_samples_per_s: float | None = Field(description="null where no round was over")
    throughput_after_samples_per_s: float | None = Field(description="null where no round is left")
    iqr: dict[str, float] | None = Field(
        default=None, description="interquartile range of each number over the repeats, of which the median is given"
    )


class AssumedConstant(Part):
    """A constant of a device profile or of the link that is assumed, or fitted to published cells."""

    owner: str
    key: str
    value: float
    provenance: str
    source: str
    low: float | None
    high: float | None
    cells: list[str] = Field(description="the published cells it was fitted to")


class Provenance(Part):
    """Where the numbers come from."""

    schema_version: int
    package_version: str | None = Field(description="of orrery-bench; none when it runs from a plain folder")
    git_commit: str | None = Field(description="of the checkout the code runs from; none outside a checkout")
    git_dirty: bool | None
    config_hash: str = Field(description="of what was asked: same hash, same question")
    code_digest: str = Field(description="of the code that answered: another one answers anew")
    seed: int
    libraries: dict[str, str]
    host: dict[str, str | int]
    devices: dict[str, str] = Field(description="device -> profile")
    assumptions: list[AssumedConstant] = Field(description="constants of the testbed that nobody measured")
    traceback: str | None = Field(default=None, description="of a run that failed for an unforeseen reason")


class Record(Part):
    """One run. Optional fields are null where they don't apply; a run that is not `ok` says why in `reason`.

    Times are wall time of the whole run, medians over `repeats`; `iqr` holds their interquartile ranges.
    """

    schema_version: int = SCHEMA_VERSION
    method: str
    method_options: dict[str, JsonValue]
    technique: str
    technique_options: dict[str, JsonValue]
    model: str
    dataset: str
    num_samples: int = Field(description="samples per epoch")
    seq_len: int | None = Field(description="tokens; null for images")
    decoder_seq_len: int = Field(description="tokens of encoder-decoder models; 1 with a classifier head")
    new_tokens: int | None = Field(default=None, description="generated per request; null: it is classified")
    image_size: int | None = Field(description="pixels; null for text")
    batch_size: int
    micro_batch_size: int | None = Field(default=None, description="rows of the largest micro-batch of the plan")
    epochs: int
    steps: int | None = Field(description="iterations, where they were asked for instead of epochs")
    optimizer: str
    learning_rate: float
    clip_norm: float | None = Field(description="2-norm that larger gradients are scaled down to; null: none")
    dropout: float | None = Field(description="null: the model's own probabilities")
    dtype: str
    attn_implementation: str
    checkpoint: str | None = Field(description="where the weights come from; null: from the seed")

    testbed: str
    mode: str
    num_devices: int
    inject: str | None = Field(default=None, description="what was made to happen to devices")
    dilation: float = Field(default=1.0, description="emulated: every rate was divided by it, times are divided back")

    status: Status
    reason: str | None = None

    resumed_after_epoch: int | None = Field(
        default=None,
        description="the run was killed, and went on after this epoch: there is no total time; other times, "
        "throughput, phases, bytes, memory and energy are of the rest alone; losses and max_rel_error of all epochs",
    )
    total_time_s: float | None = Field(default=None, description="training: all epochs; inference: all requests")
    time_per_sample_s: float | None = None
    device_time_per_sample_s: float | None = Field(
        default=None, description="seconds of computing per sample, summed over devices"
    )
    throughput_samples_per_s: float | None = None
    latency_s: float | None = Field(default=None, description="inference: time per request, which is one batch")
    prefill_time_s: float | None = Field(
        default=None, description="generation: time of a request up to its first new token"
    )
    time_per_token_s: float | None = Field(default=None, description="generation: time of every further token")
    phases: list[PhaseRecord] | None = None
    repeats: int = 1
    iqr: dict[str, float] | None = Field(
        default=None, description="interquartile range by field name, where the run was repeated"
    )

    peak_memory_bytes: int | None = Field(default=None, description="of the worst device")
    memory: dict[str, DeviceMemory] | None = None
    comm_bytes: int | None = Field(default=None, description="sent over all links, whole run")
    comm_time_s: float | None = Field(
        default=None, description="busiest network queue of any device: sending or receiving"
    )
    compute_time_s: float | None = Field(default=None, description="compute queue of the busiest device")
    bubble_fraction: float | None = Field(
        default=None, description="share of the run in which a device does not compute, mean over devices"
    )

    energy_j: float | None = Field(default=None, description="gross, all devices; null where a power is unknown")
    energy_net_of_idle_j: float | None = None
    energy_per_sample_j: float | None = Field(default=None, description="energy_j over samples, of all epochs")
    energy_source: str | None = None
    energy: dict[str, DeviceEnergy] | None = None
    host_energy: HostEnergy | None = Field(
        default=None, description="of the machine that a run was really executed on; null for simulated runs"
    )

    recovery: list[Recovery] | None = Field(
        default=None,
        description="of every failure; then phases, bytes and queues are those after the last one, and no memory or "
        "energy is given",
    )
    planning_time_s: float | None = None
    plan: dict[str, JsonValue] | None = Field(default=None, description="the plan's summary: grouping, cuts, shares")

    loss: float | None = Field(default=None, description="mean training loss per sample of the last batch")
    losses: list[float] | None = Field(default=None, description="mean training loss per sample of every batch")
    metric: float | None = Field(
        default=None,
        description="where it was evaluated: the data set's metric on its validation split, in points, of which 100 "
        "are perfect; a correlation with constant predictions counts as 0",
    )
    max_rel_error: float | None = Field(
        default=None,
        description="where it was verified: distance of what was trained from the same on one device, with weights as "
        "stale as the method has them",
    )
    emulation: dict[str, JsonValue] | None = Field(
        default=None, description="what the emulated testbed measured of itself before the run"
    )

    provenance: Provenance

    def json_line(self) -> str:
        """The record as one line of JSON, fields in the order of this class."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)


def flat(record: Record) -> dict[str, Any]:
    """The table row: one column per field of `Record`; objects and lists become JSON text, scalars stay."""
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        for name, value in record.model_dump(mode="json").items()
    }


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a record as it is written."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:orrery:record:{SCHEMA_VERSION}",
        **Record.model_json_schema(mode="serialization"),
    }


def schema_text() -> str:
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
