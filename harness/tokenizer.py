"""Text to token ids: the checkpoint's own tokenizer, or a small one trained on the training text itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from harness import models as catalog
from harness.errors import OrreryError
from harness.models.checkpoints import locate
from harness.workload import Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: One sentence, or a pair.
Sample = tuple[str, ...]

#: Most tokens learnt from a training text: the words of MRPC, cut into few pieces, train in half a second.
MAX_LEARNT_TOKENS = 8192
#: Samples in the tokenizer's memory at a time.
CHUNK = 1024


class Encoded(NamedTuple):
    """Padded token ids and segment ids [samples, seq_len], and how many tokens of each row are no padding."""

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    lengths: NDArray[np.int32]


class Vocabulary(NamedTuple):
    """What a model's configuration says about token ids. `special` ids have a meaning: learnt tokens leave them out.

    `eos` is None in BERT's family, `decoder_start` where there is no decoder beside an encoder.
    """

    size: int
    pad: int
    eos: int | None
    decoder_start: int | None
    special: frozenset[int]


def vocabulary(workload: Workload) -> Vocabulary:
    """From the checkpoint's configuration where there is one, and for what that leaves open from the catalog."""
    config: dict[str, Any] = dict(catalog.entry(workload.model).config)
    if workload.checkpoint is not None:
        from transformers import PreTrainedConfig

        try:
            stored, _ = PreTrainedConfig.get_config_dict(locate(workload.checkpoint))
        except (OSError, ValueError) as error:
            raise _unreadable(workload.checkpoint, "configuration", error) from error
        config.update((key, value) for key, value in stored.items() if value is not None)
    keys = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return Vocabulary(
        size=config["vocab_size"],
        pad=config["pad_token_id"],
        eos=config.get("eos_token_id"),
        decoder_start=config.get("decoder_start_token_id"),
        special=frozenset(config[key] for key in keys if config.get(key) is not None),
    )


def pretrained(checkpoint: str, vocabulary: Vocabulary) -> Tokenizer:
    """The fast tokenizer of a checkpoint folder or hub name."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(locate(checkpoint)).backend_tokenizer
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, "tokenizer", error) from error
    if tokenizer.get_vocab_size() > vocabulary.size:
        raise OrreryError(
            f"The tokenizer of the checkpoint {checkpoint!r} has {tokenizer.get_vocab_size()} tokens and its model "
            f"{vocabulary.size}. Give a checkpoint whose tokenizer and model belong together."
        )
    return tokenizer


def _unreadable(checkpoint: str, part: str, error: Exception) -> OrreryError:
    first = str(error).strip().splitlines()[0]
    return OrreryError(
        f"The checkpoint {checkpoint!r} has no {part} that can be read: {first} Save one with save_pretrained, or "
        "leave --checkpoint away: weights then come from the seed and the tokenizer is trained on the data set."
    )


def train(samples: Sequence[Sample], vocabulary: Vocabulary) -> Tokenizer:
    """A byte-level BPE of the samples' own text: no unknown tokens, the same on every machine.

    Learnt tokens get the ids that are not special to the model. A model with an end-of-sequence token gets it after
    each sentence; one without (BERT's family) gets [CLS] first and [SEP] after each sentence.
    """
    free = [token for token in range(vocabulary.size) if token not in vocabulary.special]
    if vocabulary.eos is None:
        cls, sep, *free = free
        template = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
        )
    else:
        template = processors.TemplateProcessing(
            single="$A:0 [EOS]:0", pair="$A:0 [EOS]:0 $B:0 [EOS]:0", special_tokens=[("[EOS]", vocabulary.eos)]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if len(free) < len(alphabet):
        raise OrreryError(
            f"A vocabulary of {vocabulary.size} tokens is too small for text: {len(alphabet)} bytes and "
            f"{vocabulary.size - len(free)} special tokens must have an id. Choose a model with a larger vocabulary."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=min(len(free), MAX_LEARNT_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for sample in samples for text in sample), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    ids = {token: free[rank] for token, rank in learnt["vocab"].items()}
    tokenizer.model = models.BPE(vocab=ids, merges=[tuple(pair) for pair in learnt["merges"]])
    tokenizer.post_processor = template
    return tokenizer


def encode(tokenizer: Tokenizer, samples: Sequence[Sample], seq_len: int, pad: int) -> Encoded:
    """All samples, padded on the right to `seq_len`; of a pair that is too long, the longer sentence is cut."""
    room = seq_len - tokenizer.num_special_tokens_to_add(len(samples[0]) == 2)
    if room < len(samples[0]):
        raise OrreryError(
            f"seq_len {seq_len} leaves room for {max(room, 0)} tokens beside the special tokens. Raise --seq-len."
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(seq_len, strategy="longest_first")
    ids = np.full((len(samples), seq_len), pad, np.int32)
    types = np.zeros((len(samples), seq_len), np.uint8)
    lengths = np.zeros(len(samples), np.int32)
    for start in range(0, len(samples), CHUNK):
        inputs = [sample if len(sample) == 2 else sample[0] for sample in samples[start : start + CHUNK]]
        for row, encoding in enumerate(tokenizer.encode_batch_fast(inputs), start):
            length = lengths[row] = len(encoding.ids)
            ids[row, :length] = encoding.ids
            types[row, :length] = encoding.type_ids
    return Encoded(ids, types, lengths)


def padded_left(encoded: Encoded) -> Encoded:
    """The same texts at the end of their rows."""
    seq_len = encoded.ids.shape[1]
    place = (np.arange(seq_len) + encoded.lengths[:, None]) % seq_len
    ids = np.take_along_axis(encoded.ids, place, axis=1)
    return Encoded(ids, np.take_along_axis(encoded.types, place, axis=1), encoded.lengths)
