"""What is to be trained or served: a model, a data set, a technique, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import OrreryError, unknown_name

TECHNIQUES = ("full", "inference")
OPTIMIZERS = ("sgd", "sgd-momentum", "adamw")
#: Optimizer state, in copies of the trainable weights.
OPTIMIZER_STATE_COPIES = {"sgd": 0, "sgd-momentum": 1, "adamw": 2}


@dataclass(frozen=True)
class Workload:
    """One training or inference job. `num_samples` and the shapes are all that the simulated mode needs of the data.

    `seq_len` is None for image models, whose shape is `image_size` x `image_size` x `num_channels`.
    `decoder_seq_len` is 1 with a classifier head on encoder-decoder models, as PAC measures them.
    `steps` replaces `epochs` when given. `dropout` None keeps the model's own probabilities.
    """

    model: str
    dataset: str
    num_samples: int
    batch_size: int
    technique: str = "full"
    seq_len: int | None = 128
    decoder_seq_len: int = 1
    image_size: int | None = None
    num_channels: int = 3
    num_labels: int = 2
    epochs: int = 1
    steps: int | None = None
    optimizer: str = "sgd"
    learning_rate: float = 1e-2
    dtype: str = "float32"
    attn_implementation: str = "eager"
    dropout: float | None = None
    checkpoint: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.technique not in TECHNIQUES:
            raise unknown_name("technique", self.technique, TECHNIQUES)
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        for field in ("batch_size", "epochs", "num_samples", "decoder_seq_len"):
            if getattr(self, field) < 1:
                raise OrreryError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.seq_len is not None and self.seq_len < 1:
            raise OrreryError(f"seq_len is {self.seq_len}; it must be at least 1.")
        if self.steps is not None and self.steps < 1:
            raise OrreryError(f"steps is {self.steps}; it must be at least 1.")
        if self.batch_size > self.num_samples:
            raise OrreryError(
                f"batch_size {self.batch_size} is larger than the data set {self.dataset} "
                f"({self.num_samples} samples). Lower --batch-size."
            )

    @property
    def training(self) -> bool:
        return self.technique != "inference"

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
