"""What is to be trained or served: a model, a data set, a technique, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from harness import techniques
from harness.errors import OrreryError, unknown_name
from harness.techniques import TECHNIQUES, Adapters, Lora, Options, ParallelAdapters

Chosen = TypeVar("Chosen", Lora, Adapters, ParallelAdapters)
OPTIMIZERS = ("sgd", "sgd-momentum", "adamw")
#: Optimizer state, in copies of the trainable weights.
OPTIMIZER_STATE_COPIES = {"sgd": 0, "sgd-momentum": 1, "adamw": 2}
#: More is a slip of the hand: it would plan for hours, or overflow 64 bits.
MOST_SEED, MOST_EPOCHS = 2**63 - 1, 10**5
MOST = {
    **dict.fromkeys(("num_samples", "epochs", "steps"), 10**9),
    **dict.fromkeys(("batch_size", "seq_len", "decoder_seq_len", "image_size", "num_channels", "num_labels"), 10**5),
    "new_tokens": 10**5,
}


@dataclass(frozen=True)
class Workload:
    """One training or inference job. `num_samples` and the shapes are all that the simulated mode needs of the data.

    `seq_len` is None for image models, whose shape is `image_size` x `image_size` x `num_channels`.
    `decoder_seq_len` is 1 with a classifier head on encoder-decoder models, as PAC measures them.
    `new_tokens`: how many each request generates after its `seq_len` tokens; None: it is classified instead.
    `steps` replaces `epochs` when given. `dropout` None keeps the model's own probabilities.
    `clip_norm` scales the gradients of an update down to this 2-norm of them all, where it is larger; None: never.
    `technique_options` may be given by name; they are kept as `techniques.chosen` gives them: None where all are the
    defaults.
    """

    model: str
    dataset: str
    num_samples: int
    batch_size: int
    technique: str = "full"
    technique_options: Options | Mapping[str, Any] | None = None
    seq_len: int | None = 128
    decoder_seq_len: int = 1
    new_tokens: int | None = None
    image_size: int | None = None
    num_channels: int = 3
    num_labels: int = 2
    epochs: int = 1
    steps: int | None = None
    optimizer: str = "sgd"
    learning_rate: float = 1e-2
    clip_norm: float | None = None
    dtype: str = "float32"
    attn_implementation: str = "eager"
    dropout: float | None = None
    checkpoint: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.technique not in TECHNIQUES:
            raise unknown_name("technique", self.technique, TECHNIQUES)
        options = techniques.chosen(self.technique, self.technique_options)
        object.__setattr__(self, "technique_options", options)
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        for field, most in MOST.items():
            value = getattr(self, field)
            if value is not None and not 1 <= value <= most:
                raise OrreryError(f"{field} is {value}; it must be at least 1, and at most {most}.")
        if self.new_tokens is not None and self.seq_len is None:
            raise OrreryError(f"new_tokens is {self.new_tokens}, and {self.model} reads no text that could go on.")
        if self.new_tokens is not None and self.training:
            raise OrreryError(
                f"new_tokens is {self.new_tokens}, and training generates no tokens. Set technique inference."
            )
        if not 0 <= self.seed <= MOST_SEED:
            raise OrreryError(f"seed is {self.seed}; it must be at least 0, and at most {MOST_SEED}.")
        if not 0 < self.learning_rate < math.inf:
            raise OrreryError(f"learning_rate is {self.learning_rate}; it must be a number above 0.")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise OrreryError(f"clip_norm is {self.clip_norm}; it must be a number above 0.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise OrreryError(f"dropout is {self.dropout}; it must be a probability from 0 to below 1.")
        if self.batch_size > self.num_samples:
            raise OrreryError(
                f"batch_size {self.batch_size} is larger than the data set {self.dataset} "
                f"({self.num_samples} samples). Lower --batch-size."
            )
        iterations = -(-self.num_samples // self.batch_size)
        epochs = self.epochs if self.steps is None else -(-self.steps // iterations)
        if epochs > MOST_EPOCHS:
            raise OrreryError(
                f"The run is {epochs} epochs long; it must be at most {MOST_EPOCHS}. Lower epochs or steps; "
                "the time of a longer run is a multiple of a shorter one's."
            )

    @property
    def training(self) -> bool:
        return self.technique != "inference"

    def chosen(self, kind: type[Chosen]) -> Chosen:
        """The technique's options, of which `kind` is the class."""
        return self.technique_options if isinstance(self.technique_options, kind) else kind()

    def batches(self) -> list[tuple[int, int]]:
        """The run as (batch size, repeat) in order: full batches, then the smaller last batch of each epoch."""
        full, rest = divmod(self.num_samples, self.batch_size)
        epoch = [(self.batch_size, full)] + ([(rest, 1)] if rest else [])
        if self.steps is None:
            return epoch * self.epochs
        program: list[tuple[int, int]] = []
        left = self.steps
        while left:
            for size, repeat in epoch:
                take = min(repeat, left)
                if take:
                    program.append((size, take))
                left -= take
        return program

    @property
    def total_samples(self) -> int:
        """Samples processed by the whole run."""
        return sum(size * repeat for size, repeat in self.batches())
