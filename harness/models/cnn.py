"""Convolutional image classifiers: a stem, one unit per block, a head. Each unit calls its modules in turn.

Between units flows one tensor, [rows, channels, height, width]. Batch norm's buffers are its unit's own and follow
the rows that this unit sees, so the result depends on how a batch is split (as in every data-parallel training).
In training mode batch norm needs more than one value per channel: one row of 1 x 1 pixels is an error of torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import (
    EfficientNetForImageClassification,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetForImageClassification,
)

from harness.models import pretrained
from harness.models.chain import Chain
from harness.models.layered import Layered
from harness.workload import Workload

if TYPE_CHECKING:
    from harness.models import ModelEntry

#: A convolutional unit or the head: its name and the modules it calls in turn.
Piece = tuple[str, Sequence[nn.Module]]


@dataclass(frozen=True)
class Family:
    """How a family is built and cut. `dropouts` are its config's dropout probabilities; the head is the last piece."""

    model_class: type[PreTrainedModel]
    dropouts: tuple[str, ...]
    cut: Callable[[Any], list[Piece]]


def _resnet(root: Any) -> list[Piece]:
    blocks = [block for stage in root.resnet.encoder.stages for block in stage.layers]
    return [
        ("stem", [root.resnet.embedder]),
        *((f"block.{i}", [block]) for i, block in enumerate(blocks)),
        ("head", [root.resnet.pooler, root.classifier]),
    ]


def _mobilenet_v2(root: Any) -> list[Piece]:
    return [
        ("stem", [root.mobilenet_v2.conv_stem]),
        *((f"block.{i}", [block]) for i, block in enumerate(root.mobilenet_v2.layer)),
        ("top", [root.mobilenet_v2.conv_1x1]),
        ("head", [root.mobilenet_v2.pooler, nn.Flatten(), root.dropout, root.classifier]),
    ]


def _efficientnet(root: Any) -> list[Piece]:
    encoder = root.efficientnet.encoder
    return [
        ("stem", [root.efficientnet.embeddings]),
        *((f"block.{i}", [block]) for i, block in enumerate(encoder.blocks)),
        ("top", [encoder.top_conv, encoder.top_bn, encoder.top_activation]),
        ("head", [root.efficientnet.pooler, nn.Flatten(), root.dropout, root.classifier]),
    ]


FAMILIES = {
    "resnet": Family(ResNetForImageClassification, (), _resnet),
    "mobilenet-v2": Family(MobileNetV2ForImageClassification, ("classifier_dropout_prob",), _mobilenet_v2),
    "efficientnet": Family(EfficientNetForImageClassification, ("dropout_rate", "drop_connect_rate"), _efficientnet),
}


def build(entry: ModelEntry, workload: Workload) -> Layered:
    """Input `pixel_values` [rows, channels, height, width]; every unit but the loss is a layer of its own."""
    family = FAMILIES[entry.family]
    channels = {"num_channels": workload.num_channels}
    entry = replace(entry, config={**entry.config, **channels})
    root = pretrained.load(family.model_class, entry, workload, family.dropouts, needs=channels)
    if workload.checkpoint is None:
        _unit_scales(root)
    *pieces, (head, head_modules) = family.cut(root)
    chain = Chain(workload)
    carried = "pixel_values"
    for name, modules in pieces:
        chain.layer(name)
        (carried,) = chain.unit("conv", "conv", [carried], ["hidden"], _in_turn(modules), modules)
    chain.layer(head)
    return chain.close(root, ["pixel_values"], [carried], _in_turn(head_modules), head_modules)


def _unit_scales(root: nn.Module) -> None:
    """Batch norm begins with a scale of one. transformers draws EfficientNet's from a normal distribution of deviation
    0.02: then what flows shrinks ten thousandfold per block, and no gradient comes back."""
    for module in root.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def _in_turn(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    return function
