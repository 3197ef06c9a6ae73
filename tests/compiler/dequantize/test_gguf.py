"""A GGUF file as a model: streamed it is what transformers loads from it."""

import json
import shutil
import struct
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.gguf_files import corrupted, write_gguf
from helpers.peft_adapters import random_adapter
from helpers.tiny_models import CORPUS
from onelayer.compiler import evaluate_model, inspect_path, merge_adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import model_digest, resolve_model
from onelayer.compiler.storage.gguf_format import read_gguf_header
from onelayer.compiler.streaming.stream import Stream
from onelayer.runtime import generate_text, plan_run

pytest.importorskip("gguf")
IDS = torch.tensor([[5, 17, 40, 33, 8, 60, 21, 90, 14]])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAYER_HOME", str(tmp_path / "home"))


def loaded(file: Path) -> Any:
    dtype = torch.bfloat16
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()


@pytest.mark.parametrize(("kind", "tied"), [("Q8_0", False), ("Q4_1", True), ("F16", True)])
def test_streamed_equals_what_transformers_loads(kind: str, tied: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, kind, tied)
    streamed = StreamedModel(resolve_model(file))
    found: dict[int, Any] = {}
    with Meter(CPU) as meter:
        Stream(streamed, CPU, meter).run([{"input_ids": IDS}], found.__setitem__)
    logits = found[0].logits
    resident = loaded(file)
    with torch.no_grad():
        expected = resident(input_ids=IDS).logits
    assert isinstance(logits, DeferredLogits)
    assert torch.equal(logits.materialize(), expected)
    assert streamed.lazy == {"model.embed_tokens.weight", "lm_head.weight"}
    state = resident.state_dict()
    for name in streamed.checkpoint.tensors:
        assert torch.equal(streamed.checkpoint.read(name), state[name]), name


def test_rows_of_the_embedding_are_all_that_is_read_of_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, "Q8_0")
    checkpoint = StreamedModel(resolve_model(file)).checkpoint
    rows = torch.tensor([3, 70]).numpy()
    assert torch.equal(
        checkpoint.gather_rows("model.embed_tokens.weight", rows), loaded(file).model.embed_tokens.weight[rows]
    )
    assert checkpoint.bytes_read == 2 * 34  # a block of 32 values has 34 bytes
    assert checkpoint.unpacking_bytes < (8 + 12 * 4 + 2) * 64 * 32, "a table is never unpacked whole"
    assert torch.equal(checkpoint.read_rows("lm_head.weight", 5, 9), loaded(file).lm_head.weight[5:9])


def test_commands_take_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    scored = evaluate_model(file, data, max_length=16, device="cpu")
    assert inspect_path(file)["quantization"] == "gguf"
    planned = plan_run(file, 1 << 30, max_length=16).predicted
    stored = sum(info.size_bytes for info in read_gguf_header(file)[0].values())
    assert planned.model_bytes == stored
    resident = loaded(file)
    adapted = random_adapter(resident, tmp_path / "adapter", r=2, target_modules=["q_proj", "down_proj"])
    assert generate_text(file, "the", max_new_tokens=2).tokens == 2
    result = merge_adapter(tmp_path / "adapter", model=file, output=tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-2, atol=1e-6)
    assert result.changed == 4
    again = evaluate_model(tmp_path / "merged", data, max_length=16, device="cpu")
    assert again.results[0].tokens == scored.results[0].tokens


def test_the_table_of_names_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = import_module("gguf")
    make, made = package.get_tensor_name_map, []

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(package, "get_tensor_name_map", counted)
    file = tmp_path / "model.gguf"
    write_gguf(file)
    StreamedModel(resolve_model(file))
    assert len(made) == 1
    assert package.get_tensor_name_map is counted


def test_its_digest_is_that_of_its_content(tmp_path: Path) -> None:
    file, other = tmp_path / "model.gguf", tmp_path / "elsewhere" / "model.gguf"
    write_gguf(file)
    other.parent.mkdir()
    shutil.copy(file, other)
    first, second = resolve_model(file), resolve_model(other)
    assert first == resolve_model(file) != second
    assert model_digest(first) == model_digest(second)


def damage(file: Path, name: str) -> None:
    size = file.stat().st_size
    content = file.read_bytes()
    if name == "truncated":
        file.write_bytes(content[: size // 2])
    elif name == "short":
        file.write_bytes(content[:10])
    elif name == "mislabeled":
        corrupted(file, 0, b"PK\x03\x04")
    elif name == "version":
        corrupted(file, 4, struct.pack("<I", 9))
    elif name == "many tensors":
        corrupted(file, 8, struct.pack("<Q", 1 << 62))
    elif name == "long name":
        corrupted(file, 24, struct.pack("<Q", 1 << 60))
    elif name == "type":
        place = content.index(b"token_embd.weight") + len("token_embd.weight")
        corrupted(file, place + 4 + 16, struct.pack("<I", 99))
    elif name == "shape":
        place = content.index(b"blk.0.attn_v.weight") + len("blk.0.attn_v.weight")
        corrupted(file, place + 4 + 8, struct.pack("<Q", 8))
    elif name == "array":
        place = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
        corrupted(file, place + 4 + 4, struct.pack("<Q", 1 << 61))


DAMAGED = {
    "truncated": "ends beyond the end of the file",
    "short": "truncated, or damaged",
    "mislabeled": "first bytes are not GGUF",
    "version": "version 9",
    "many tensors": "do not fit the file",
    "long name": "a name of",
    "type": "unknown type 99",
    "shape": "do not make model.layers.0.self_attn.v_proj.weight",
    "array": "truncated",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    damage(file, name)
    with pytest.raises(InputError) as caught:
        StreamedModel(resolve_model(file))
    message = str(caught.value)
    assert "model.gguf: " in message
    assert DAMAGED[name] in message
    assert "\n" not in message
    assert message.endswith("download the file again")
