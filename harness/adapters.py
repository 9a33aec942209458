"""What a technique has trained, as one file; and such a file put onto a Hugging Face model.

    model = BertForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")
    tuned = attach(model, "mrpc.safetensors").eval()
    logits = tuned(input_ids=..., attention_mask=...).logits

The file is safetensors: the trained parameters by their names in the model, and as metadata what they are.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from harness import models
from harness.errors import OrreryError, Unsupported
from harness.models.classifier import EncoderDecoderClassifier
from harness.models.layered import Layered
from harness.models.techniques import ADDED, add_lora, choose_trained
from harness.store import write_whole
from harness.techniques import all_options
from harness.workload import Workload

FORMAT, VERSION = "orrery-adapter", "1"


def save(path: Path, workload: Workload, tensors: Mapping[str, Tensor], config_hash: str) -> None:
    """Write the trained parameters. `config_hash` names the run that trained them. Raises OrreryError."""
    about = {
        "format": FORMAT,
        "version": VERSION,
        "technique": workload.technique,
        "technique_options": json.dumps(all_options(workload.technique, workload.technique_options)),
        "model": workload.model,
        "num_labels": str(workload.num_labels),
        "checkpoint": workload.checkpoint or "",
        "seed": str(workload.seed),
        "config_hash": config_hash,
    }
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda part: save_file(whole, part, metadata=about))


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the parameters of a file that `save` wrote. Raises OrreryError for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except OSError as error:
        raise OrreryError(f"The adapter {path} can't be read: {error}. Name a file of `--save-adapter`.") from error
    except SafetensorError as error:
        raise OrreryError(f"The adapter {path} is damaged or no safetensors file: {error}. Train it again.") from error
    if about.get("format") != FORMAT:
        raise OrreryError(f"{path} holds tensors, but no adapter of Orrery. Name a file of `--save-adapter`.")
    if about.get("version") != VERSION:
        raise OrreryError(
            f"The adapter {path} is of version {about.get('version')} of its format, and this Orrery reads version "
            f"{VERSION}. Train it again, or attach it with the Orrery that wrote it."
        )
    return about, tensors


def attach(model: nn.Module, path: str | Path) -> nn.Module:
    """Put what the file holds onto the model that it was trained with, in place, the head included.

    `model` is what the family is run as: BertForSequenceClassification and the like, for T5 and BART the bare T5Model
    or BartModel. What comes back answers with `.logits` of [rows, labels]: the model itself, patched; for T5 and BART
    with a classifier around it; with parallel adapters, whose pass is not the model's own, a module that holds it.
    Raises OrreryError, and then has changed nothing, where the file is none or does not belong to such a model.
    """
    about, tensors = read(Path(path))
    root = _with_head(model, about)
    _check(root, about, tensors)
    first = next(model.parameters())
    with torch.device(first.device):
        layered = _added(root, about)
    for module in (*_added_modules(root), *(() if root is model else (root.classifier,))):
        module.to(device=first.device, dtype=first.dtype)
    root.train(model.training)
    with torch.no_grad():
        for name, tensor in tensors.items():
            root.get_parameter(name).copy_(tensor)
    if about["technique"] == "parallel-adapters":
        return Beside(root, layered)
    for unit in layered.units:
        if unit.kind == "adapter":
            _follow(layered, unit.reads[0], unit.held[0])
    return root


class Beside(nn.Module):
    """A model with a network beside it: its own layers and the side network's, unit by unit."""

    def __init__(self, model: nn.Module, layered: Layered) -> None:
        super().__init__()
        self.model = model
        self._layered = layered
        self.train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """As the model's own. input_ids: [rows, tokens]; without a mask all of them count."""
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            "decoder_input_ids": decoder_input_ids,
        }
        values = {name: tensor for name in self._layered.inputs if (tensor := given[name]) is not None}
        if len(values) < len(self._layered.inputs):
            raise TypeError("The model has a decoder: give decoder_input_ids, such as its start token in each row.")
        before_loss = len(self._layered.units) - 1
        return SequenceClassifierOutput(logits=self._layered.run(0, before_loss, values)["logits"])


def _with_head(model: nn.Module, about: Mapping[str, str]) -> nn.Module:
    """The root that names in the file begin from. A bare encoder-decoder gets a classifier of its own."""
    family = _family(about)
    if isinstance(model, family.MODEL) and models.entry(about["model"]).family in models.ENCODER_DECODER:
        return EncoderDecoderClassifier(model, int(about["num_labels"]))
    return model


def _family(about: Mapping[str, str]) -> ModuleType:
    """The module that cuts the model of the file."""
    return importlib.import_module(models.module_of(about["model"]))


def _check(root: nn.Module, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a model that the file is not for, on "meta": of the model itself nothing is touched."""
    family, what = _family(about), f"The adapter is for {about['model']} with {about['num_labels']} labels"
    backbone = _backbone(root)
    if not isinstance(backbone, family.MODEL):
        raise OrreryError(f"{what}, which is a {family.MODEL.__name__}; this is a {type(backbone).__name__}.")
    if any(_added_modules(root)):
        raise OrreryError("The model has an adapter already. Load it anew to attach another one.")
    config = copy.deepcopy(backbone.config)
    for key, value in family.NEEDS.items():
        if getattr(config, key) != value:
            raise OrreryError(f"{what}, whose {key} is {value!r}; this one's is {getattr(config, key)!r}.")
    with torch.device("meta"):
        like: nn.Module = family.MODEL(config)
        if backbone is not root:
            like = EncoderDecoderClassifier(like, int(about["num_labels"]))
        try:
            _added(like, about)
        except Unsupported as error:
            raise OrreryError(f"{what}; to this model it can't be attached: {error}.") from error
    wanted = {name: parameter.shape for name, parameter in like.named_parameters() if parameter.requires_grad}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            ours, theirs = (list(shapes[name]) if name in shapes else "nothing" for shapes in (wanted, found))
            raise OrreryError(f"{what}; at {name} this model has {ours}, and the file {theirs}.")


def _added(root: nn.Module, about: Mapping[str, str]) -> Layered:
    """Add what the technique adds, in place, and cut the model into units."""
    family, workload = _family(about), _workload(root, about)
    if workload.technique == "lora":
        add_lora(_backbone(root), family.QUERIES_AND_VALUES, workload)
    layered: Layered = family.cut(root, workload)
    choose_trained(layered, workload.technique)
    return layered


def _workload(root: nn.Module, about: Mapping[str, str]) -> Workload:
    """That of the adapter, in the type and with the attention of the model. Of the data nothing matters."""
    config = _backbone(root).config
    attention = config._attn_implementation
    return Workload(
        about["model"],
        "synthetic",
        num_samples=1,
        batch_size=1,
        technique=about["technique"],
        technique_options=json.loads(about["technique_options"]),
        num_labels=int(about["num_labels"]),
        decoder_seq_len=2,  # more than one: then any number of tokens has its mask
        dtype=str(next(root.parameters()).dtype).removeprefix("torch."),
        attn_implementation=attention if attention in models.ATTENTION_IMPLEMENTATIONS else "eager",
    )


def _backbone(root: nn.Module) -> Any:
    """The model of transformers' that the root is, or has."""
    return root.backbone if isinstance(root, EncoderDecoderClassifier) else root


def _added_modules(root: nn.Module) -> list[nn.Module]:
    return [module for name, module in root.named_modules() if name.rpartition(".")[2] in ADDED]


def _follow(layered: Layered, tensor: str, adapter: nn.Module) -> None:
    """Let the adapter follow the one module whose output it reads, in the model's own pass."""
    (writer,) = (unit for unit in layered.units if tensor in unit.writes)
    (module,) = writer.held
    module.register_forward_hook(lambda module, inputs, output: adapter(output))
