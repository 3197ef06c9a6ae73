"""An emulator's config and index from outside: they lead to no other weights than those of their own record."""

import json
from pathlib import Path

import pytest
import transformers

from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError

INDEX = "emulator.safetensors.index.json"


@pytest.fixture
def emulator(tmp_path: Path) -> Path:
    model = save_tiny("llama", tmp_path / "original")
    return write_emulator(model, tmp_path / "original", tmp_path / "emulator", ratio=0.5)


def name_weights(emulator: Path, name: str) -> None:
    config = json.loads((emulator / "config.json").read_text())
    config["quantization_config"]["weights_file"] = name
    (emulator / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["../other/emulator.safetensors", "pytorch_model.bin", "/etc/passwd"])
def test_weights_of_another_name_are_refused(emulator: Path, name: str) -> None:
    name_weights(emulator, name)
    with pytest.raises(InputError, match="weights_file"):
        Emulator.open(emulator)
    with pytest.raises(InputError, match="weights_file names"):
        transformers.AutoModelForCausalLM.from_pretrained(emulator)


def test_weights_that_the_digest_is_not_of_are_refused(emulator: Path) -> None:
    """A single file is read first and digested, but `weights_file` leads transformers to the index."""
    shard = min(emulator.glob("*.safetensors"))
    (emulator / "model.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(InputError, match=f"weights_file names {INDEX}, but the directory's weights are model.safe"):
        Emulator.open(emulator)


def test_an_index_that_leads_outside_is_refused(emulator: Path, tmp_path: Path) -> None:
    index = json.loads((emulator / INDEX).read_text())
    index["weight_map"] = {name: f"../other/{file}" for name, file in index["weight_map"].items()}
    (emulator / INDEX).write_text(json.dumps(index))
    (tmp_path / "other").mkdir()
    for shard in emulator.glob("*.safetensors"):
        shard.rename(tmp_path / "other" / shard.name)
    with pytest.raises(InputError, match="outside the folder"):
        transformers.AutoModelForCausalLM.from_pretrained(emulator)
