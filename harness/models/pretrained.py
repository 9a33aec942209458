"""A Hugging Face model with the workload's labels, dropout and attention: from a checkpoint, or from the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from harness.errors import OrreryError
from harness.workload import Workload

if TYPE_CHECKING:
    from harness.models import ModelEntry


Model = TypeVar("Model", bound=PreTrainedModel)


def load(
    model_class: type[Model],
    entry: ModelEntry,
    workload: Workload,
    dropouts: Sequence[str],
    needs: Mapping[str, Any] | None = None,
) -> Model:
    """The model, on the current default device; on "meta" a checkpoint gives its shape only.

    `dropouts` names the config's dropout probabilities, which `workload.dropout` replaces. `needs` are the config
    values that the family's cut is written for: another checkpoint is refused. Raises `OrreryError`.
    """
    config = _config(model_class.config_class, entry, workload)
    for key, value in (needs or {}).items():
        if getattr(config, key) != value:
            raise OrreryError(
                f"The checkpoint {workload.checkpoint!r} has {key} = {getattr(config, key)!r}; models of the family "
                f"{entry.family!r} are cut for {key} = {value!r}. Choose a checkpoint with that."
            )
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(workload.seq_len or 0, workload.decoder_seq_len)
    if limit is not None and longest > limit:
        raise OrreryError(f"{longest} tokens are more than the {limit} positions of {entry.name}. Lower --seq-len.")
    if workload.dropout is not None:
        for key in dropouts:
            setattr(config, key, workload.dropout)
    if workload.checkpoint is None or torch.get_default_device().type == "meta":
        return model_class(config)
    try:
        return model_class.from_pretrained(workload.checkpoint, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(workload, error) from error


def _config(config_class: type[PreTrainedConfig], entry: ModelEntry, workload: Workload) -> PreTrainedConfig:
    options = {"num_labels": workload.num_labels, "attn_implementation": workload.attn_implementation}
    if workload.checkpoint is None:
        return config_class(**entry.config, **options)
    try:
        stored, _ = PreTrainedConfig.get_config_dict(workload.checkpoint)
        config = config_class.from_pretrained(workload.checkpoint, **options)
    except (OSError, ValueError) as error:
        raise _unreadable(workload, error) from error
    if stored.get("model_type") != config_class.model_type:
        raise OrreryError(
            f"The checkpoint {workload.checkpoint!r} is a {stored.get('model_type')!r} model; {entry.name} needs "
            f"{config_class.model_type!r}. Name the model of the checkpoint, or a checkpoint of {entry.name}."
        )
    return config


def _unreadable(workload: Workload, error: Exception) -> OrreryError:
    first = str(error).strip().splitlines()[0]
    return OrreryError(
        f"The checkpoint {workload.checkpoint!r} can't be read: {first} Give a folder written by save_pretrained, or "
        "a hub name that this machine can reach."
    )
