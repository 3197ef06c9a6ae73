"""What is copied with the weights: known regular files, and nothing that leads out of the model's directory."""

import json
import os
from pathlib import Path

import pytest

from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import save_tiny, tiny_tokenizer
from onelayer.compiler import compile_emulator, evaluate_model, merge_adapter, slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.companions import check_companions, copy_companions


def write(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    return directory


BELONGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE-MODEL.txt",
    "README.md",
)
STRAY = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "modeling_own.py",
    "vocab.py",
    "README.py",
    "notes.txt",
    ".model",
    "onelayer.json",
    "checkpoint-5/config.json",
    "1_Pooling/model.safetensors",
    "runs/events.model",
)


def test_known_files_are_copied_and_no_others(tmp_path: Path) -> None:
    source, target = write(tmp_path / "model", *BELONGS, *STRAY), tmp_path / "out"
    target.mkdir()
    os.mkfifo(source / "pipe")
    (source / "somewhere").symlink_to("/nowhere")
    copy_companions(source, target)
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == set(BELONGS)


def test_pointers_to_code_are_not_copied(tmp_path: Path) -> None:
    source, target = write(tmp_path / "model", "README.md"), tmp_path / "out"
    target.mkdir()
    pointer = {"AutoTokenizer": ["evil/repository--tokenization.Own", None]}
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": pointer, "eos_token": "</s>"}))
    (source / "config.json").write_text('{"model_type":  "llama"}')
    copy_companions(source, target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    assert (target / "config.json").read_text() == '{"model_type":  "llama"}'


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    source = tmp_path / "snapshots" / "abc"
    write(tmp_path, "blobs/1234")
    source.mkdir(parents=True)
    (source / "tokenizer.json").symlink_to("../../blobs/1234")
    assert check_companions(source) == [source / "tokenizer.json"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("out", "a link to .*secret, outside the directory"),
        ("nowhere", "leads nowhere"),
        ("pipe", "not a regular file"),
    ],
)
def test_links_and_pipes_are_refused_before_work(tmp_path: Path, what: str, message: str) -> None:
    save_tiny("llama", tmp_path / "model")
    random_adapter(load_original(tmp_path / "model"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    (tmp_path / "secret").write_text("a key")
    file = tmp_path / "model/tokenizer.model"
    os.mkfifo(file) if what == "pipe" else file.symlink_to(tmp_path / ("secret" if what == "out" else "gone"))
    with pytest.raises(InputError, match=rf"tokenizer\.model: .*{message}"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "model", output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter", "secret"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=r"config\.json|not a regular file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(InputError, match=r"config\.json|not a regular file"):
        evaluate_model(tmp_path, tmp_path / "rows.jsonl")


def test_an_adapter_in_the_models_directory_is_not_part_of_the_model(tmp_path: Path) -> None:
    """An adapter is not copied: transformers would load it onto the merged model, and refuse an emulator."""
    save_tiny("llama", tmp_path / "model")
    random_adapter(load_original(tmp_path / "model"), tmp_path / "model", r=2, target_modules=["q_proj"])
    random_adapter(load_original(tmp_path / "model"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    merge_adapter(tmp_path / "adapter", model=tmp_path / "model", output=tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    load_original(tmp_path / "merged")


def test_code_in_an_emulator_is_replaced_by_our_own(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "the quick brown fox"}\n')
    compile_emulator(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "emulator", ratio=0.5)
    shim = (tmp_path / "emulator/modeling_onelayer.py").read_text()
    (tmp_path / "emulator/modeling_onelayer.py").write_text("raise SystemExit\n")
    config = json.loads((tmp_path / "emulator/config.json").read_text())
    own = dict(config["auto_map"])
    config["auto_map"]["AutoModel"] = "evil/repository--modeling.Own"
    (tmp_path / "emulator/config.json").write_text(json.dumps(config))
    slice_emulator(tmp_path / "emulator", 0.3, tmp_path / "slice")
    assert (tmp_path / "slice/modeling_onelayer.py").read_text() == shim
    assert json.loads((tmp_path / "slice/config.json").read_text())["auto_map"] == {
        name: value for name, value in own.items() if name != "AutoModel"
    }
