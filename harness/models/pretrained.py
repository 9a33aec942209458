"""A Hugging Face model with the workload's labels, dropout and attention: from a checkpoint, or from the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from harness.errors import OrreryError
from harness.models.checkpoints import locate
from harness.models.techniques import add_lora
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
    queries_and_values: Sequence[str] = (),
) -> Model:
    """The model, on the current default device; on "meta" a checkpoint gives its shape only.

    `dropouts` names the config's dropout probabilities, which `workload.dropout` replaces. `needs` are the config
    values that the family's cut is written for: another checkpoint is refused. `queries_and_values` are the names of
    the modules that the technique lora updates. Raises `OrreryError`.
    """
    model = _load(model_class, entry, workload, dropouts, needs or {})
    if workload.technique == "lora":
        add_lora(model, queries_and_values, workload)
    return model


def _load(
    model_class: type[Model],
    entry: ModelEntry,
    workload: Workload,
    dropouts: Sequence[str],
    needs: Mapping[str, Any],
) -> Model:
    config = _config(model_class.config_class, entry, workload, dropouts)
    for key, value in needs.items():
        if getattr(config, key) != value:
            raise OrreryError(
                f"The checkpoint {workload.checkpoint!r} has {key} = {getattr(config, key)!r}; models of the family "
                f"{entry.family!r} are cut for {key} = {value!r}. Choose a checkpoint with that."
            )
    if hasattr(config, "vocab_size"):
        _check_tokens(config, entry, workload)
    if workload.technique != "parallel-adapters":
        return _weights(model_class, config, workload)
    own = {key: getattr(config, key) for key in dropouts}
    for key in dropouts:
        setattr(config, key, 0.0)
    model = _weights(model_class, config, workload)
    for key, probability in own.items():  # what is made beside the model has its dropout
        setattr(model.config, key, probability)
    return model


def _weights(model_class: type[Model], config: PreTrainedConfig, workload: Workload) -> Model:
    if workload.checkpoint is None or torch.get_default_device().type == "meta":
        return model_class(config)
    try:
        place = locate(workload.checkpoint)
        model, info = model_class.from_pretrained(place, config=config, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(workload, str(error)) from error
    missing = sorted(key for key in info["missing_keys"] if _is_backbone(model, key))
    if missing:
        raise _unreadable(workload, f"{len(missing)} tensors of the backbone are missing, {missing[0]} among them.")
    return model


def _is_backbone(model: PreTrainedModel, key: str) -> bool:
    """Whether a checkpoint must hold the tensor: a new classifier and BERT's pooler start from the seed."""
    in_base = model.base_model is model or key.startswith(f"{model.base_model_prefix}.")
    return in_base and ".pooler." not in key


def _config(
    config_class: type[PreTrainedConfig], entry: ModelEntry, workload: Workload, dropouts: Sequence[str]
) -> PreTrainedConfig:
    config = _stored_config(config_class, entry, workload)
    if workload.dropout is not None:
        for key in dropouts:
            setattr(config, key, workload.dropout)
    return config


def _stored_config(config_class: type[PreTrainedConfig], entry: ModelEntry, workload: Workload) -> PreTrainedConfig:
    options = {"num_labels": workload.num_labels, "attn_implementation": workload.attn_implementation}
    if workload.checkpoint is None:
        return config_class(**entry.config, **options)
    try:
        stored, _ = PreTrainedConfig.get_config_dict(locate(workload.checkpoint))
    except (OSError, ValueError) as error:
        raise _unreadable(workload, str(error)) from error
    if "model_type" not in stored:
        raise _unreadable(workload, "there is no config.json with a model_type.")
    if stored["model_type"] != config_class.model_type:
        raise OrreryError(
            f"The checkpoint {workload.checkpoint!r} is a {stored['model_type']!r} model; {entry.name} needs "
            f"{config_class.model_type!r}. Name the model of the checkpoint, or a checkpoint of {entry.name}."
        )
    return config_class.from_dict(stored, **options)


def _check_tokens(config: PreTrainedConfig, entry: ModelEntry, workload: Workload) -> None:
    if workload.seq_len is None:
        raise OrreryError(f"{entry.name} reads text, and the workload has no seq_len. Give --seq-len.")
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(workload.seq_len, workload.decoder_seq_len if config.is_encoder_decoder else 1)
    if workload.new_tokens is not None:
        longest = workload.seq_len + workload.new_tokens - 1  # the last one is not read
    if limit is not None and longest > limit:
        raise OrreryError(
            f"{longest} tokens are more than the {limit} positions of {entry.name}. Lower --seq-len, --new-tokens or "
            "--decoder-seq-len."
        )


def _unreadable(workload: Workload, reason: str) -> OrreryError:
    return OrreryError(
        f"The checkpoint {workload.checkpoint!r} can't be read: {reason.strip().splitlines()[0]} Give a folder written "
        "by save_pretrained, or a hub name that this machine can reach."
    )
