"""Vision-language models through the loop, with image, text and multi-image rows mixed."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.media_files import picture
from helpers.places import ROOT
from helpers.tiny_models import tiny_tokenizer
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, merge_adapter, polish_adapter
from onelayer.compiler.data.batches import make_batches, tokens_digest
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import IGNORED, Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.inspect import inspect_path
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.streaming.stream import Stream
from onelayer.runtime import train_lora
from onelayer.runtime.cli.main import main
from scripts.sweep.vision import resident_loss
from scripts.sweep.vision_models import save_vision_model

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 256
PROJECTORS = {
    "llava": {f"model.multi_modal_projector.linear_{number}" for number in (1, 2)},
    "idefics3": {"model.connector.modality_projection.proj"},
    "qwen2_5_vl": {f"model.visual.merger.mlp.{number}" for number in (0, 2)},
}
SAID = {"role": "assistant", "content": "a thing"}
ROWS: list[dict[str, Any]] = [
    {"image": "0.png", "messages": [{"role": "user", "content": "what is it?"}, SAID]},
    {"messages": [{"role": "user", "content": "what is the name?"}, SAID]},
    {"images": ["1.png", "2.png"], "messages": [{"role": "user", "content": "<image> or <image>?"}, SAID]},
    {"image": "1.png", "messages": [{"role": "user", "content": "what is it!"}, SAID]},
    {"image": "0.png", "prompt": "what is it?", "completion": "the value"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(50, 40), (50, 40), (40, 64)]):
        picture(*size, seed=number).save(root / f"{number}.png")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("models")
    families = ("llava", "idefics3", "qwen2_5_vl")
    return {family: (root / family, save_vision_model(family, root / family)) for family in families}


def tokens_of(model: Path, resident: Any, rows: Path) -> list[Tokens]:
    return read_tokens(rows, load_reader(model, type(resident)), LENGTH)


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_5_vl"])
def test_streamed_logits_with_images_are_the_resident_ones(family: str, models: Any, folder: Path) -> None:
    model, resident = models[family]
    rows = tokens_of(model, resident, folder / "rows.jsonl")
    assert sum(row.inputs is not None and "pixel_values" in row.inputs.shapes for row in rows) == 4
    batches = make_batches(rows, resident.config, 2)
    assert len(batches) < len(rows), "rows of equal shapes share a batch"
    loads: Counter[str] = Counter()
    found: dict[int, Any] = {}

    @contextmanager
    def counted(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        yield

    streamed = StreamedModel(model)
    with Meter(torch.device("cpu")) as meter:
        stream = Stream(streamed, torch.device("cpu"), meter, counted)
        stream.run([batch.inputs for batch in batches], found.__setitem__)
    assert set(loads.values()) == {1}
    for index, batch in enumerate(batches):
        with torch.no_grad():
            expected = resident(**batch.inputs, use_cache=False).logits
        logits = found[index].logits
        assert torch.equal(logits.materialize() if isinstance(logits, DeferredLogits) else logits, expected)


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_5_vl"])
def test_an_emulator_of_tower_and_text_loads_in_stock_transformers(
    family: str, models: Any, folder: Path, tmp_path: Path
) -> None:
    model, resident = models[family]
    data = folder / "rows.jsonl"
    result = compile_emulator(model, data, tmp_path / "e", ratio=0.5, form="factors", max_length=LENGTH, batch_size=2)
    of_tower = ["vis" in linear.name for linear in result.linears]
    assert inspect_path(model)["reads"] == inspect_path(tmp_path / "e")["reads"] == ["text", "image"]
    assert any(of_tower)
    assert not all(of_tower)
    names = {linear.name for linear in result.linears}
    assert PROJECTORS[family] <= names
    assert not any("lm_head" in name or "patch_embed" in name for name in names)
    emulator = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "e").eval()
    scored = evaluate_model(model, data, against=tmp_path / "e", max_length=LENGTH, batch_size=2)
    rows = tokens_of(tmp_path / "e", emulator, data)  # by the copied processor
    assert scored.results[0].loss == pytest.approx(resident_loss(resident, rows), abs=1e-6)
    assert scored.against is not None
    assert scored.against.loss == pytest.approx(resident_loss(emulator, rows), abs=1e-5)


def test_calibration_without_images_leaves_the_tower_dense_and_says_so(
    models: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = models["llava"]
    (tmp_path / "text.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    output = tmp_path / "e"
    result = compile_emulator(model, tmp_path / "text.jsonl", output, ratio=0.5, form="factors", max_length=LENGTH)
    assert not any("vision" in linear.name for linear in result.linears)
    dense = {item["name"]: item["reason"] for item in json.loads((output / "emulator.json").read_text())["dense"]}
    tower = [name for name in dense if "vision_tower" in name]
    assert len(tower) == 18
    assert {dense[name] for name in [*tower, *PROJECTORS["llava"]]} == {"never visited by the calibration data"}
    assert "give rows with images" in capsys.readouterr().err


def test_images_are_never_labeled_and_only_text_is_cut(models: Any, folder: Path) -> None:
    model, resident = models["idefics3"]
    reader: Any = load_reader(model, type(resident))
    rows = tokens_of(model, resident, folder / "rows.jsonl")
    for row in rows:
        shown = reader.tokenizer.decode([label for label in row.labels if label != IGNORED])
        assert shown in ("a thing</s>", "the value")
    image = reader.tokenizer.convert_tokens_to_ids("<image>")
    last = max(place for place, token in enumerate(rows[0].input_ids) if token == image)
    with pytest.raises(InputError, match=r"rows.jsonl:1: \d+ tokens to the end of its last image"):
        read_tokens(folder / "rows.jsonl", reader, last, samples=None)
    cut = read_tokens(folder / "rows.jsonl", reader, len(rows[2].input_ids) - 1)
    assert [row.cut for row in cut] == [False, False, True, False, False]
    assert cut[2].inputs is not None
    assert rows[2].inputs is not None
    assert cut[2].inputs.shapes == rows[2].inputs.shapes


def test_rows_of_a_parquet_file_with_bytes_are_those_of_its_files(models: Any, folder: Path, tmp_path: Path) -> None:
    import pyarrow as arrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    model, resident = models["idefics3"]
    chats = [row for row in ROWS if "messages" in row]
    named = [row.get("images", [row["image"]] if "image" in row else []) for row in chats]
    stored = [[{"bytes": (folder / name).read_bytes(), "path": name} for name in names] for names in named]
    columns = {"images": stored, "messages": [row["messages"] for row in chats]}
    parquet.write_table(arrow.table(columns), tmp_path / "rows.parquet")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    by_bytes, by_file = (
        tokens_of(model, resident, rows) for rows in (tmp_path / "rows.parquet", folder / "chats.jsonl")
    )
    assert tokens_digest(by_bytes) == tokens_digest(by_file)


def test_a_limit_of_pixels_makes_images_fewer_tokens(models: Any, folder: Path) -> None:
    model, resident = models["qwen2_5_vl"]
    full, small = (
        read_tokens(folder / "rows.jsonl", load_reader(model, type(resident), limit), LENGTH) for limit in (None, 600)
    )
    counts = [[len(row.input_ids) for row in rows] for rows in (full, small)]
    assert [more > less for more, less in zip(*counts, strict=True)] == [True, False, True, True, True]
    assert tokens_digest(full) != tokens_digest(small)


def test_a_model_of_texts_refuses_images_in_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1: has 1 image\(s\), and the model of .* reads text only"):
        read_tokens(folder / "rows.jsonl", tiny_tokenizer(), LENGTH)


def test_rows_that_a_model_cannot_read_are_refused(models: Any, folder: Path, tmp_path: Path) -> None:
    model, resident = models["llava"]
    reader = load_reader(model, type(resident))
    picture().save(tmp_path / "a.png")
    for row, words in (
        ({"text": "an <image> tag"}, "shows <image> 1 times and the row has 0"),
        ({"image": "a.png", "text": "a cat"}, "has 'text' with an image; write 'messages'"),
        ({"image": "a.png", "messages": [ROWS[1]["messages"][0], {**SAID, "content": "<image>"}]}, "shows <image> 2"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match=words):
            read_tokens(tmp_path / "rows.jsonl", reader, LENGTH)


def test_an_image_that_changes_during_a_run_is_named(models: Any, tmp_path: Path) -> None:
    model, resident = models["llava"]
    picture(seed=1).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    [row] = tokens_of(model, resident, tmp_path / "rows.jsonl")
    picture(seed=2).save(tmp_path / "0.png")
    [changed] = tokens_of(model, resident, tmp_path / "rows.jsonl")
    assert row.inputs is not None
    assert changed.inputs is not None
    assert row.inputs.digest != changed.inputs.digest
    with pytest.raises(InputError, match=r"0.png: changed while it was in use"):
        row.inputs.tensors()


def test_an_adapter_of_the_language_model_goes_through_the_loop(models: Any, folder: Path, tmp_path: Path) -> None:
    model, _ = models["idefics3"]
    data = folder / "rows.jsonl"
    given: dict[str, Any] = {"max_length": LENGTH, "batch_size": 2}
    trained: dict[str, Any] = {
        "max_length": LENGTH,
        "batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lora_rank": 4,
    }
    emulator = tmp_path / "e"
    compile_emulator(model, data, emulator, ratio=0.5, form="factors", **given)
    train_lora(emulator, data, tmp_path / "a", **trained, anchor_every=2, model=model)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert keys
    assert all(".text_model." in name for name in keys), "by default the language model is adapted, not the tower"
    correct_adapter(tmp_path / "a", emulator=emulator, model=model, output=tmp_path / "c", limit=None)
    polish_adapter(tmp_path / "c", model=model, data=data, output=tmp_path / "p", steps=1, **given)
    merge_adapter(tmp_path / "p", model=model, output=tmp_path / "m")
    assert (tmp_path / "m" / "processor_config.json").read_bytes() == (model / "processor_config.json").read_bytes()
    scored = evaluate_model(model, data, adapters=[tmp_path / "p"], **given)
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "m").eval()
    assert scored.results[1].loss != pytest.approx(scored.results[0].loss, abs=1e-3)
    loss = resident_loss(merged, tokens_of(tmp_path / "m", merged, data))
    assert scored.results[1].loss == pytest.approx(loss, abs=1e-4)


def test_a_streamed_original_learns_images_like_the_resident_one(models: Any, folder: Path, tmp_path: Path) -> None:
    model, _ = models["llava"]
    trained: dict[str, Any] = {"max_length": LENGTH, "batch_size": 3, "max_steps": 1, "learning_rate": 1e-2}
    trained["target_modules"] = r".*vision_tower.*\.(q_proj|v_proj)"
    losses = []
    for way in ("resident", "streamed"):
        result = train_lora(model, folder / "rows.jsonl", tmp_path / way, way=way, **trained)
        losses.append(result.losses)
    keys = [load_file(tmp_path / way / "adapter_model.safetensors") for way in ("resident", "streamed")]
    assert losses[0] == losses[1]
    assert keys[0].keys() == keys[1].keys()
    assert all("vision_tower" in name for name in keys[0])
    for name, tensor in keys[0].items():
        torch.testing.assert_close(keys[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_packing_and_preferences_with_images_are_refused_by_one_line(models: Any, folder: Path, tmp_path: Path) -> None:
    model, _ = models["llava"]
    data, output = folder / "rows.jsonl", tmp_path / "out"
    for name in ("packing", "padding_free"):
        with pytest.raises(InputError, match=f"^{name}: rows with images or audio stay apart; leave it out$"):
            train_lora(model, data, output, max_length=LENGTH, max_steps=1, args={name: True})
    with pytest.raises(InputError, match=r"--packing: rows for a model that reads images or audio stay apart"):
        polish_adapter(None, model=model, data=data, output=output, lora_rank=2, packing=True, max_length=LENGTH)
    preference = {"image": "0.png", "prompt": "what?", "chosen": "a thing", "rejected": "the value"}
    (folder / "pairs.jsonl").write_text(json.dumps(preference) + "\n")
    with pytest.raises(InputError, match=r"pairs.jsonl:1: preferences with images are not supported"):
        train_lora(model, folder / "pairs.jsonl", output, method="dpo", max_length=LENGTH, max_steps=1)
    assert not output.exists()


def test_a_dry_run_of_the_example_for_images_plans_every_step(
    models: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = models["llava"]
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    for name in ("0", "1", "2"):
        shutil.copy(folder / f"{name}.png", tmp_path / "data")
    for part in ("train", "validation", "test"):
        shutil.copy(folder / "rows.jsonl", tmp_path / "data" / f"photos.{part}.jsonl")
    shutil.copy(ROOT / "manifests" / "vision-7b-16gb.yaml", tmp_path / "manifest.yaml")
    with pytest.raises(SystemExit) as caught:
        main(["run", str(tmp_path / "manifest.yaml"), "--dry-run", "--json"])
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    steps = [step["name"] for step in json.loads(shown.out)["steps"]]
    assert steps == ["compile", "photos.train", "photos.correct", "photos.evaluate"]
