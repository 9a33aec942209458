"""How good what was trained is: the whole model, put together from its shards, on samples that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from harness import datasets, metrics, models
from harness.errors import Broken
from harness.models import shards
from harness.models.layered import Layered
from harness.samples import Dataset
from harness.workload import Workload

#: Samples in memory at a time. In eval mode each is by itself, so that their number changes nothing.
ROWS = 64


def whole(workload: Workload, weights: Path, trained: Mapping[str, Tensor]) -> Layered:
    """The unsharded model in eval mode: the weights that training began with, replaced by what was trained.

    `weights` is what `shards.write` made of the same workload; `trained` are parameters and buffers by name.
    """
    layered = shards.load(workload, weights, 0, len(models.build(workload, device="meta").units))
    named = dict(shards.named(layered.root))
    with torch.no_grad():
        for name, tensor in trained.items():
            named[name].copy_(tensor)
    layered.root.eval()
    return layered


def evaluate(workload: Workload, layered: Layered, data_dir: Path | None) -> float:
    """The data set's metric on its validation split, in points."""
    spec = datasets.spec(workload.dataset)
    assert spec.validation is not None, "asked only of data sets that have one"
    dataset = datasets.load(workload, data_dir, spec.validation)
    everything = range(len(dataset))
    labels = dataset.batch(everything)["labels"]
    return metrics.measure(spec.metric, _logits(layered, dataset, everything).double().numpy(), labels.double().numpy())


def max_rel_error(workload: Workload, layered: Layered, dataset: Dataset, answers: Mapping[int, Tensor]) -> float:
    """Largest |a - b| / max|b| of the logits that devices have answered, from those of the unsharded model.

    answers: of every sample, as often as it is asked for, [labels], or of every token that is generated [tokens], one
    after the other. Raises Broken where one is missing.
    """
    requests = sum(repeat for _, repeat in workload.batches())
    samples = sorted({sample for ids in islice(datasets.batches(workload), requests) for sample in ids})
    if missing := [sample for sample in samples if sample not in answers]:
        raise Broken(f"No device has answered {len(missing)} of {len(samples)} samples, {missing[0]} among them.")
    if workload.new_tokens is None:
        wanted = _logits(layered, dataset, samples).unsqueeze(1)
    else:
        wanted = _generated(layered, dataset, samples, workload.new_tokens)
    errors = [
        (answers[sample].view(-1, *logits.shape) - logits).abs().max()
        for sample, logits in zip(samples, wanted, strict=True)
    ]
    return (torch.stack(errors).max() / wanted.abs().max()).item()


def _logits(layered: Layered, dataset: Dataset, samples: Sequence[int]) -> Tensor:
    """What the whole model makes of the samples: [samples, labels]."""
    with torch.no_grad():
        return torch.cat(
            [
                layered.run(0, len(layered.units), dataset.batch(samples[first : first + ROWS]))["logits"]
                for first in range(0, len(samples), ROWS)
            ]
        )


def _generated(layered: Layered, dataset: Dataset, samples: Sequence[int], new_tokens: int) -> Tensor:
    """The logits from which the whole model chooses, by transformers' own generation: [samples, new tokens, tokens]."""
    root = layered.root
    assert isinstance(root, GenerationMixin)
    root.generation_config, root.config.pad_token_id = GenerationConfig(), None  # all tokens are text, none ends it
    chosen = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    found = []
    for sample in samples:
        batch = dataset.batch([sample])
        made = root.generate(batch["input_ids"], chosen, attention_mask=batch["attention_mask"])
        found.append(torch.cat(made.logits))
    return torch.stack(found)
