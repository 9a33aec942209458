from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import ByteLevel

from harness import tokenizer
from harness.errors import OrreryError
from harness.workload import Workload

ROOT = Path(__file__).parents[2]
MRPC = ROOT / "../shared/data/glue/mrpc/train.csv"
CORPUS = [("the cat sat", "the cat"), ("a cat, the hat", "the")] * 20


def vocabulary(model: str) -> tokenizer.Vocabulary:
    return tokenizer.vocabulary(Workload(model, "mrpc", num_samples=8, batch_size=4))


MADE = tokenizer.train(CORPUS, vocabulary("bert-tiny"))


def tokens(encoded: tokenizer.Encoded, row: int) -> list[int]:
    return encoded.ids[row, : encoded.lengths[row]].tolist()


def test_special_tokens_of_the_models() -> None:
    assert vocabulary("bert-base") == (30522, 0, None, None, {0})
    assert vocabulary("t5-base") == (32128, 0, 1, 0, {0, 1})
    assert vocabulary("bart-large") == (50265, 1, 2, 2, {0, 1, 2})
    assert vocabulary("opt-1.3b") == (50272, 1, 2, None, {1, 2})
    assert vocabulary("gpt2-large") == (50257, 50256, 50256, None, {50256})


def test_a_pair_by_hand() -> None:
    """Every word of the corpus is one token in the end. BERT's pad is 0, so [CLS] is 1, [SEP] 2 and bytes follow."""
    made = tokenizer.train(CORPUS, vocabulary("bert-tiny"))
    the, cat, sat = (made.token_to_id(f"Ġ{word}") for word in ("the", "cat", "sat"))
    assert min(the, cat, sat) >= 3 + 256
    encoded = tokenizer.encode(made, [("The cat sat", "the CAT")], 10, pad=0)
    assert encoded.ids.tolist() == [[1, the, cat, sat, 2, the, cat, 2, 0, 0]]
    assert encoded.types.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0]]
    assert encoded.lengths.tolist() == [8]


@pytest.mark.parametrize(("model", "eos"), [("t5-tiny", 1), ("bart-tiny", 2), ("opt-tiny", 2), ("gpt2-tiny", 0)])
def test_models_with_an_end_of_sequence_token(model: str, eos: int) -> None:
    known = vocabulary(model)
    made = tokenizer.train(CORPUS, known)
    the, cat = (made.token_to_id(f"Ġ{word}") for word in ("the", "cat"))
    encoded = tokenizer.encode(made, [("the cat", "cat")], 7, known.pad)
    assert encoded.ids.tolist() == [[the, cat, eos, cat, eos, known.pad, known.pad]]
    assert not encoded.types.any()
    assert tokenizer.encode(made, [("cat",)], 4, known.pad).ids.tolist() == [[cat, eos, known.pad, known.pad]]
    assert not known.special & set(made.get_vocab().values())


def test_learnt_ids_step_over_special_ids_at_the_end() -> None:
    """As GPT-2 at paper size has them."""
    known = tokenizer.Vocabulary(size=262, pad=261, eos=261, decoder_start=None, special=frozenset({3, 261}))
    made = tokenizer.train(CORPUS, known)
    assert set(made.get_vocab().values()) == set(range(261)) - {3}


def test_the_longer_sentence_is_cut() -> None:
    made = tokenizer.train(CORPUS, vocabulary("bert-tiny"))
    the, cat, sat = (made.token_to_id(f"Ġ{word}") for word in ("the", "cat", "sat"))
    encoded = tokenizer.encode(made, [("the the the the cat", "sat cat")], 8, pad=0)
    assert tokens(encoded, 0) == [1, the, the, the, 2, sat, cat, 2]
    with pytest.raises(OrreryError, match="leaves room for 1 tokens"):
        tokenizer.encode(made, CORPUS, 4, pad=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30)), min_size=1, max_size=4))
def test_no_text_is_unknown(samples: list[tuple[str]]) -> None:
    """Byte level: the ids spell the normalised text back, with a space in front."""
    encoded = tokenizer.encode(MADE, samples, 512, pad=0)
    alphabet = {id: token for token, id in MADE.get_vocab().items()}
    for row, (text,) in enumerate(samples):
        spelt = ByteLevel().decode([alphabet[id] for id in tokens(encoded, row)[1:-1]])
        wanted = MADE.normalizer.normalize_str(text)
        assert spelt.removeprefix(" ") == wanted.removeprefix(" ")


def fingerprint(path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        samples = [(row["sentence1"], row["sentence2"]) for row in csv.DictReader(file)][:1000]
    made = tokenizer.train(samples, vocabulary("bert-tiny"))
    ids, types, lengths = tokenizer.encode(made, samples, 128, pad=0)
    return hashlib.sha256(ids.tobytes() + types.tobytes() + lengths.tobytes()).hexdigest()


@pytest.mark.skipif(not MRPC.is_file(), reason="the GLUE text files are not here")
def test_bitwise_the_same_in_other_processes() -> None:
    """Other hash seeds and another number of threads: every device trains its own tokenizer, and they must agree."""
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/harness']; from pathlib import Path\n"
        "from test_tokenizer import MRPC, fingerprint; print(fingerprint(MRPC))"
    )
    expected = fingerprint(MRPC)
    for hash_seed, parallel in (("1", "false"), ("2", "true")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "TOKENIZERS_PARALLELISM": parallel}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.skipif(not MRPC.is_file(), reason="the GLUE text files are not here")
def test_real_text_fits() -> None:
    """A vocabulary of 2,000 tokens spells nine in ten MRPC pairs within 128 tokens, and the rest are cut there."""
    with MRPC.open(newline="", encoding="utf-8") as file:
        samples = [(row["sentence1"], row["sentence2"]) for row in csv.DictReader(file)]
    made = tokenizer.train(samples, vocabulary("bert-tiny"))
    encoded = tokenizer.encode(made, samples, 128, pad=0)
    assert (encoded.lengths < 128).mean() > 0.9
    assert ((encoded.ids == 2).sum(1) == 2).all() and (encoded.ids[:, 0] == 1).all()
    assert (encoded.ids[np.arange(len(samples)), encoded.lengths - 1] == 2).all()


def saved_checkpoint(folder: Path, vocab_size: int) -> Workload:
    from transformers import BertConfig, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=MADE, pad_token="[PAD]").save_pretrained(folder)
    BertConfig(vocab_size=vocab_size, pad_token_id=5).save_pretrained(folder)
    return Workload("bert-tiny", "mrpc", num_samples=8, batch_size=4, checkpoint=str(folder))


def test_checkpoint_brings_its_own_tokenizer(tmp_path: Path) -> None:
    """Oracle: transformers' own call of the same tokenizer."""
    from transformers import AutoTokenizer

    workload = saved_checkpoint(tmp_path, vocab_size=600)
    known = tokenizer.vocabulary(workload)
    assert known == (600, 5, None, None, {5})
    found = tokenizer.encode(tokenizer.pretrained(str(tmp_path), known), CORPUS, 9, known.pad)
    expected = AutoTokenizer.from_pretrained(tmp_path)(*zip(*CORPUS, strict=True), truncation=True, max_length=9)
    assert [tokens(found, row) for row in range(len(CORPUS))] == expected["input_ids"]
    with pytest.raises(OrreryError, match="and its model 64"):
        tokenizer.pretrained(str(tmp_path), known._replace(size=64))


def test_mistakes_are_named(tmp_path: Path) -> None:
    small = tokenizer.Vocabulary(size=200, pad=0, eos=None, decoder_start=None, special=frozenset({0}))
    with pytest.raises(OrreryError, match="A vocabulary of 200 tokens is too small"):
        tokenizer.train(CORPUS, small)
    with pytest.raises(OrreryError, match="no tokenizer that can be read"):
        tokenizer.pretrained(str(tmp_path), small)
    missing = Workload("bert-tiny", "mrpc", num_samples=8, batch_size=4, checkpoint=str(tmp_path / "missing"))
    with pytest.raises(OrreryError, match="no configuration that can be read"):
        tokenizer.vocabulary(missing)
