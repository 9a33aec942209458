from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import datasets, samples
from harness.errors import OrreryError
from harness.workload import Workload

ROOT = Path(__file__).parents[2]
GLUE = ROOT / "../shared/data/glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="the GLUE text files are not here")
PAIRS = [("He did not sleep.", "NA", 1), ("null", 'The cat sat, "quietly".', 0), ("One two three.", "Four", 1)]


def text(dataset: str, model: str = "bert-tiny", **changes: object) -> Workload:
    spec = datasets.spec(dataset)
    fields = {"num_samples": spec.num_samples, "batch_size": 2, "seq_len": 32, "num_labels": spec.num_labels}
    return Workload(model=model, dataset=dataset, **{**fields, **changes})  # type: ignore[arg-type]


def image(dataset: str, **changes: object) -> Workload:
    fields = {"model": "resnet-tiny", "num_samples": 40, "batch_size": 2, "seq_len": None, "num_labels": 10}
    return Workload(dataset=dataset, **{**fields, **changes})  # type: ignore[arg-type]


def write_csv(path: Path, rows: list[tuple], header: tuple = ("sentence1", "sentence2", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_sizes_and_unknown_names() -> None:
    sizes = {name: datasets.spec(name).num_samples for name in datasets.names()}
    glue = {"mrpc": 3668, "stsb": 5749, "sst2": 67349, "qnli": 104743}
    assert sizes == {**glue, "digits": 1797, "cifar10": 50000, "synthetic": 1024}
    assert datasets.spec("qnli").columns == ("question", "sentence")
    assert datasets.spec("stsb").num_labels == 1
    with pytest.raises(OrreryError, match="Did you mean mrpc"):
        datasets.spec("mprc")


def test_importing_costs_no_heavy_library() -> None:
    program = "import sys; from harness import datasets; datasets.names(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "datasets", "sklearn", "transformers", "numpy"} & set(loaded.stdout.split())


def test_batches_are_formed_once_and_shuffled_as_a_whole() -> None:
    """What a device has cached of its rows serves it in every epoch; the smaller last batch stays the last."""
    workload = Workload("bert-tiny", "synthetic", num_samples=42, batch_size=8, seq_len=16)
    ids = datasets.batches(workload)
    epochs = [[tuple(next(ids)) for _ in range(6)] for _ in range(3)]
    assert sorted(sample for batch in epochs[0] for sample in batch) == list(range(42))
    for epoch in epochs[1:]:
        assert epoch[-1] == epochs[0][-1] and sorted(epoch) == sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_sample_order_is_the_same_everywhere() -> None:
    order = datasets.sample_order(1000, epoch=0, seed=0)
    assert sorted(order) == list(range(1000))
    assert datasets.sample_order(8, epoch=1, seed=3) == [4, 3, 1, 7, 5, 0, 2, 6]
    assert order != datasets.sample_order(1000, epoch=1, seed=0) != datasets.sample_order(1000, epoch=0, seed=1)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    found = datasets.load(image("digits", num_channels=1, num_samples=1797))
    batch = found.batch(range(1797))
    expected = load_digits()
    assert len(found) == datasets.spec("digits").num_samples
    assert torch.equal(batch["pixel_values"], torch.from_numpy(expected.images).float().unsqueeze(1) / 16)
    assert torch.equal(batch["labels"], torch.from_numpy(expected.target))


@pytest.mark.parametrize("size", [32, 5])
def test_images_are_resized_and_gray_fills_the_channels(size: int) -> None:
    """Oracle: Pillow's bilinear filter."""
    from PIL import Image

    small = datasets.load(image("digits", num_channels=1)).batch([4, 2])["pixel_values"]
    resized = datasets.load(image("digits", image_size=size)).batch([4, 2])["pixel_values"]
    expected = [Image.fromarray(gray[0].numpy()).resize((size, size), Image.Resampling.BILINEAR) for gray in small]
    wanted = torch.stack([torch.from_numpy(np.array(picture)) for picture in expected])
    assert resized.shape == (2, 3, size, size)
    for channel in range(3):
        torch.testing.assert_close(resized[:, channel], wanted, rtol=1e-5, atol=1e-6)


def test_glue_folder_of_tasks_or_of_one_task(tmp_path: Path) -> None:
    """Also: "NA" and "null" are words, and a quoted comma is text."""
    write_csv(tmp_path / "glue" / "mrpc" / "train.csv", PAIRS)
    found = [datasets.load(text("mrpc"), folder) for folder in (tmp_path / "glue", tmp_path / "glue" / "mrpc")]
    batches = [data.batch([2, 0, 1]) for data in found]
    assert len(found[0]) == 3
    assert batches[0]["labels"].tolist() == [1, 1, 0]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert set(batches[0]) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    # [CLS] n a [SEP] at least, in the second segment of sample 0.
    assert batches[0]["token_type_ids"][1].sum() >= 2


def test_batches_are_rows_of_the_whole(tmp_path: Path) -> None:
    write_csv(tmp_path / "mrpc" / "train.csv", PAIRS)
    data = datasets.load(text("mrpc", model="t5-tiny", decoder_seq_len=3), tmp_path)
    whole, part = data.batch([0, 1, 2]), data.batch([2, 0])
    assert all(torch.equal(part[name], whole[name][[2, 0]]) for name in whole)
    assert torch.equal(part["decoder_input_ids"], torch.zeros(2, 3, dtype=torch.long))


def test_bart_decodes_from_its_start_token(tmp_path: Path) -> None:
    write_csv(tmp_path / "mrpc" / "train.csv", PAIRS)
    batch = datasets.load(text("mrpc", model="bart-tiny"), tmp_path).batch([0])
    assert batch["decoder_input_ids"].tolist() == [[2]]
    mask = batch["attention_mask"][0].bool()
    assert (batch["input_ids"][0][~mask] == 1).all() and (batch["input_ids"][0][mask] != 1).all()


def test_regression_labels_are_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "stsb" / "train.csv", [("a b", "c", 4.25), ("d", "e f", 0)])
    labels = datasets.load(text("stsb"), tmp_path).batch([0, 1])["labels"]
    assert torch.equal(labels, torch.tensor([4.25, 0.0]))


def test_a_part_of_a_file_is_taken_at_even_distances(tmp_path: Path) -> None:
    """Files may be sorted: so are the genres of STS-B."""
    write_csv(tmp_path / "stsb" / "train.csv", [("a", "b", row) for row in range(10)])
    parts = {n: datasets.load(text("stsb", num_samples=n), tmp_path) for n in (2, 4, 10, 12)}
    found = {n: part.batch(range(len(part)))["labels"].int().tolist() for n, part in parts.items()}
    assert found == {2: [0, 5], 4: [0, 2, 5, 7], 10: [*range(10)], 12: [*range(10)]}
    digits = datasets.load(image("digits", num_samples=599)).batch(range(599))["labels"]
    whole = datasets.load(image("digits", num_samples=1797)).batch(range(1797))["labels"]
    assert torch.equal(digits, whole[::3])


def test_validation_text_is_read_with_the_training_texts_tokenizer(tmp_path: Path) -> None:
    write_csv(tmp_path / "mrpc" / "train.csv", PAIRS)
    write_csv(tmp_path / "mrpc" / "validation.csv", [("zzzz zzzz", "q", 0), *PAIRS[::-1]])
    asked = text("mrpc", num_samples=2)
    training = datasets.load(text("mrpc", num_samples=3), tmp_path).batch([0, 1, 2])
    found = datasets.load(asked, tmp_path, "validation")
    batch = found.batch([3, 2, 1])
    assert len(found) == 4, "all of it, however few are trained on"
    assert all(torch.equal(batch[name], training[name]) for name in training)


def test_validation_samples_that_are_made_are_others_of_the_same_kind() -> None:
    """Tokens lie in their label's slice of the vocabulary, pixels around their label's pattern."""
    words = text("synthetic", num_samples=64, num_labels=4)
    training, validation = (datasets.load(words, split=split).batch(range(64)) for split in ("train", "validation"))
    assert not torch.equal(training["input_ids"], validation["input_ids"])
    highest = [training["input_ids"][training["labels"] == label].max() for label in range(4)]
    for label in range(4):
        ids = validation["input_ids"][validation["labels"] == label]
        assert label == 0 or ids.min() > highest[label - 1] - 20
        assert label == 3 or ids.max() < highest[label] + 20
    pixels = image("synthetic", num_samples=256, num_labels=2)
    means = []
    for split in ("train", "validation"):
        batch = datasets.load(pixels, split=split).batch(range(256))
        means.append(torch.stack([batch["pixel_values"][batch["labels"] == label].mean(0) for label in range(2)]))
    assert not torch.equal(*means)
    assert (means[0] - means[1]).abs().mean() < 0.05 < 0.1 < (means[0][0] - means[1][1]).abs().mean()


def test_images_of_a_test_split(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 3), ("test", 2)):
        for row in range(count):
            path = tmp_path / "cifar10" / split / f"{row % 2}" / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (row, 0, 100 if split == "test" else 0)).save(path)
    asked = image("cifar10", num_samples=2)
    split = datasets.spec("cifar10").validation
    assert split is not None
    found = datasets.load(asked, tmp_path, split)
    assert len(found) == 2 and (found.batch([0, 1])["pixel_values"][:, 2] * 255).round().unique().tolist() == [100]
    assert len(datasets.load(asked, tmp_path)) == 2


@needs_glue
@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_real_glue(task: str) -> None:
    with (GLUE / task / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    data = datasets.load(text(task, seq_len=128), GLUE)
    batch = data.batch(range(len(data)))
    assert len(data) == len(rows)
    assert torch.equal(batch["labels"], torch.tensor([float(row["label"]) for row in rows]).to(batch["labels"].dtype))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), 128)
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
    assert batch["input_ids"].max() < 2000
    assert not (batch["token_type_ids"] * (1 - batch["attention_mask"])).any()


def mistakes(folder: Path) -> dict[str, Path]:
    """Message -> a folder with one thing wrong."""
    write_csv(folder / "column" / "train.csv", [("a", "b", 1)], ("sentence1", "text", "label"))
    write_csv(folder / "label" / "train.csv", [("a", "b", 1), ("c", "d", -1)])
    write_csv(folder / "word" / "train.csv", [("a", "b", "yes")])
    write_csv(folder / "no_rows" / "train.csv", [])
    write_csv(folder / "number" / "train.csv", [(1, "b", 1)])
    for name, content in (("empty", b""), ("binary", bytes(range(128, 256)))):
        (folder / name).mkdir()
        (folder / name / "train.csv").write_bytes(content)
    (folder / "bare").mkdir()
    return {
        r"bare/mrpc/train.csv and .*bare/train.csv, but --data-dir .* holds neither": folder / "bare",
        "--data-dir .*missing is no folder": folder / "missing",
        "no column sentence2; found sentence1, text, label": folder / "column",
        "label of sample 1 is -1; allowed is 0 to 1": folder / "label",
        "label of sample 0 is 'yes'": folder / "word",
        "no_rows/train.csv can't be read.*no data": folder / "no_rows",
        "sample 0 is .*must hold text": folder / "number",
        "empty/train.csv can't be read": folder / "empty",
        "binary/train.csv can't be read": folder / "binary",
    }


def test_mistakes_in_a_folder_are_named(tmp_path: Path) -> None:
    for message, folder in mistakes(tmp_path).items():
        with pytest.raises(OrreryError, match=message):
            datasets.load(text("mrpc"), folder)


def test_unreachable_hub_says_data_dir(tmp_path: Path) -> None:
    """A port nobody listens on stands for a machine without network."""
    program = (
        "from harness import datasets; from harness.workload import Workload\n"
        "try: datasets.load(Workload('bert-tiny', 'qnli', num_samples=8, batch_size=4))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("OrreryError") and "Pass --data-dir" in done.stdout


def test_cifar10_from_a_folder_per_class(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    pixels = {name: random.integers(256, size=(32, 32, 3), dtype=np.uint8) for name in ("airplane", "bird")}
    for name, array in pixels.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "train" / name / "0.png")
    batch = datasets.load(image("cifar10"), tmp_path).batch([0, 1])
    expected = [torch.from_numpy(array).permute(2, 0, 1) / 255 for array in pixels.values()]
    assert batch["labels"].tolist() == [0, 1]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for name, size in (("airplane", 16), ("bird", 32)):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (size, size)).save(tmp_path / "train" / name / "0.png")
    with pytest.raises(OrreryError, match="differ in size"):
        datasets.load(image("cifar10"), tmp_path)


def test_synthetic_labels_follow_from_the_tokens() -> None:
    """Each label has its own words, none of them special; the seed fixes everything."""
    workload = text("synthetic", model="bart-tiny", num_samples=200, seq_len=16)
    data = datasets.load(workload)
    batch = data.batch(range(200))
    words = [set(batch["input_ids"][batch["labels"] == label].flatten().tolist()) for label in (0, 1)]
    assert not words[0] & words[1] and not (words[0] | words[1]) & {0, 1, 2}
    assert Counter(batch["labels"].tolist()).keys() == {0, 1} and batch["attention_mask"].all()
    assert torch.equal(datasets.load(workload).batch([7])["input_ids"], batch["input_ids"][[7]])
    other = datasets.load(text("synthetic", model="bart-tiny", num_samples=200, seq_len=16, seed=1))
    assert not torch.equal(other.batch(range(200))["input_ids"], batch["input_ids"])


def test_synthetic_images_lie_next_to_their_labels_mean() -> None:
    batch = datasets.load(image("synthetic", num_samples=200)).batch(range(200))
    pixels, labels = batch["pixel_values"].flatten(1), batch["labels"]
    assert pixels.shape == (200, 3 * 32 * 32)
    means = torch.stack([pixels[labels == label].mean(0) for label in range(10)])
    assert torch.equal(torch.cdist(pixels, means).argmin(1), labels)


@pytest.mark.parametrize(("workload", "kind"), [(image("mrpc"), "images"), (text("digits"), "text")])
def test_text_is_no_image(workload: Workload, kind: str) -> None:
    with pytest.raises(OrreryError, match=f"reads {kind} and the data set {workload.dataset}"):
        datasets.load(workload)


def regression(folder: Path) -> Path:
    write_csv(folder / "stsb" / "train.csv", [("a b", "c", 4.25), ("d", "e f", 0), ("g", "h", 1.5)])
    return folder


@pytest.mark.parametrize(
    "workload",
    [
        text("stsb"),
        text("stsb", dtype="bfloat16"),
        text("synthetic", model="t5-tiny", decoder_seq_len=3, num_samples=20),
        image("digits", num_channels=3, image_size=20, dtype="float64"),
        image("synthetic"),
    ],
)
def test_saved_samples_give_equal_batches(tmp_path: Path, workload: Workload) -> None:
    data = datasets.load(workload, regression(tmp_path) if workload.dataset == "stsb" else None)
    path = tmp_path / "new" / "samples.safetensors"
    written = set()
    for _ in range(5):
        samples.save(data, path)
        written.add(path.read_bytes())
    assert len(written) == 1, "a run that goes on compares the bytes"
    again = samples.read(path)
    assert len(again) == len(data)
    for ids in (range(len(data)), [2, 0], [1, 1, 1]):
        expected, found = data.batch(ids), again.batch(ids)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_files_that_hold_no_samples_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = tmp_path / "whole"
    samples.save(datasets.load(image("synthetic")), whole)
    (tmp_path / "torn").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "empty").touch()
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    save_file({"weight": torch.ones(2)}, tmp_path / "strange", {"kind": "Texts"})
    for name, reason in {
        "weights": "kind is None, and must be",
        "torn": "",
        "empty": "",
        "absent": "",
        "strange": "",
    }.items():
        with pytest.raises(OrreryError, match=f"can't be read from .*{name}: .*{reason}.*Save the data set again"):
            samples.read(tmp_path / name)
