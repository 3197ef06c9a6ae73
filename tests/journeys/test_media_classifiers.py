"""Classifiers of images and sound through every command, from a folder of files by class."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from helpers.commands import refused, run, through_every_command
from onelayer.compiler.data.batches import tokens_digest
from onelayer.compiler.data.classes import predicted_classes
from onelayer.compiler.data.labeled_rows import read_for
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.readers import media_files, read_examples
from onelayer.compiler.sources.data_set import DataSet, data_set
from scripts.sweep.classifiers import LABELS, prepare, resident_loss

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    prepare("vit", folder)
    return folder


def loaded(model: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(model)


def test_a_folder_of_images_goes_through_every_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, made = folder / "model", folder / "made"
    emulator, polished, scored = through_every_command(capsys, folder, "--activations", "sublayer")
    assert {item["name"].split(".")[2] for item in emulator["linears"]} == {"0", "1"}
    original, adapted = scored["results"]
    merged = loaded(made / "merged")
    assert original["tokens"] == 12
    assert original["loss"] == pytest.approx(resident_loss(loaded(model), folder), abs=1e-6)
    assert adapted["loss"] == pytest.approx(resident_loss(merged, folder), abs=1e-6)
    assert adapted["loss"] < polished["steps"][0]["loss"]
    assert not torch.equal(merged.classifier.weight, loaded(model).classifier.weight)
    assert (made / "merged" / "preprocessor_config.json").is_file()
    assert (made / "emulator" / "preprocessor_config.json").is_file()


def test_the_promise_holds_and_does_not_grow_with_the_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    few = run(capsys, "compile", folder / "model", "--calibration", tmp_path / "data", "--output", tmp_path / "few")
    for label in LABELS:
        for index in range(20):
            shutil.copy(tmp_path / "data" / label / "0.png", tmp_path / "data" / label / f"more{index}.png")
    many = run(capsys, "compile", folder / "model", "--calibration", tmp_path / "data", "--output", tmp_path / "many")
    promised = [found["report"]["workspace_bytes"] for found in (few, many)]
    assert promised[0] == promised[1]
    for found in (few, many):
        report = found["report"]
        assert report["peak_device_bytes"] <= report["largest_unit_bytes"] + report["workspace_bytes"]


def test_files_named_by_rows_are_the_same_as_those_of_folders(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "by_rows" / "files")
    rows = [
        {"file_name": f"files/{label}/{index}.png", "label": number if index % 2 else label}
        for number, label in enumerate(LABELS)
        for index in range(4)
    ]
    (tmp_path / "by_rows" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader: Any = load_reader(folder / "model", type(loaded(folder / "model")))
    digests = [
        [reader.tokens_of(example, 8, False).inputs.digest for example in read_examples(source)]
        for source in (folder / "data", tmp_path / "by_rows")
    ]
    assert digests[0] == digests[1]
    listed = [media_files(DataSet(path=str(source))) for source in (folder / "data", tmp_path / "by_rows")]
    assert [len(files) for files in listed] == [12, 12]  # manifests digest these
    assert len(set(digests[0])) == 12
    assert [example.label for example in read_examples(folder / "data")][::4] == list(LABELS)


def test_a_parquet_file_with_bytes_gives_the_inputs_of_its_files(folder: Path, tmp_path: Path) -> None:
    import pyarrow as arrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    files = sorted((folder / "data").glob("*/*.png"))
    stored = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    labels = [LABELS.index(file.parent.name) for file in files]
    parquet.write_table(arrow.table({"image": stored, "label": labels}), tmp_path / "rows.parquet")
    model = loaded(folder / "model")
    classes = predicted_classes(type(model), model.config, folder / "model")
    reader = load_reader(folder / "model", type(model))
    by_bytes, by_file = (
        read_for(classes, source, reader, 8) for source in (tmp_path / "rows.parquet", folder / "data")
    )
    assert [row.label for row in by_bytes] == [row.label for row in by_file]
    assert tokens_digest(by_bytes) == tokens_digest(by_file)
    for embedded, named in zip(by_bytes, by_file, strict=True):
        assert embedded.inputs is not None
        assert named.inputs is not None
        assert torch.equal(embedded.inputs.tensors()["pixel_values"], named.inputs.tensors()["pixel_values"])


def test_a_split_is_a_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data" / "train")
    shutil.copytree(folder / "data" / "cross", tmp_path / "data" / "test" / "cross")
    assert len(read_examples(data_set(tmp_path / "data", split="test"))) == 4
    assert len(read_examples(data_set(tmp_path / "data", split="train"))) == 12


def test_rows_that_fit_no_classifier_are_refused_by_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "data" / "cross" / "0.png", tmp_path / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    for row, part in (
        ({"image": "0.png", "label": "circles"}, "label2id"),
        ({"image": "0.png", "label": 3}, "a number from 0 to 2"),
        ({"text": "a cross", "label": 1}, "the model reads one image and no text"),
        ({"images": ["0.png", "0.png"], "label": 1}, "the model reads one image"),
        ({"file_name": "1.png", "label": 1}, "no such file"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        line = refused(capsys, "evaluate", folder / "model", "--data", tmp_path / "rows.jsonl")
        assert part in line
        assert "rows.jsonl:1" in line
    (tmp_path / "rows.jsonl").unlink()
    assert "lies in no folder of a class" in refused(capsys, "evaluate", folder / "model", "--data", tmp_path)
