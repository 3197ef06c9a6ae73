"""Sizes, counts and names that cost minutes or gigabytes unless they are bounded before any work."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.tiny_models import PLAIN_CHAT_TEMPLATE, causal, save_tiny, tiny_tokenizer
from onelayer.compiler.data import tokens
from onelayer.compiler.data.rows import Example
from onelayer.compiler.errors import MESSAGE_CHARACTERS, InputError, one_line
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import OPEN_FILES, Checkpoint
from onelayer.compiler.storage.safetensors_format import read_header
from onelayer.runtime.manifest.manifest import load_manifest


def header_file(path: Path, header: object) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    return path


def refused_within(seconds: float, work: Callable[[], object], match: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError, match=match) as caught:
        work()
    assert time.process_time() - started < seconds
    assert len(str(caught.value)) <= MESSAGE_CHARACTERS


def test_shapes_of_a_thousand_digits(tmp_path: Path) -> None:
    sizes = ",".join(["9" * 1000] * 20_000)
    row = f'{{"w": {{"dtype": "F32", "shape": [{sizes}], "data_offsets": [0, 0]}}}}'
    file = header_file(tmp_path / "model.safetensors", row)
    refused_within(1.0, lambda: read_header(file), "header is not valid JSON")


def test_shapes_of_many_dimensions(tmp_path: Path) -> None:
    row = {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 0]}
    file = header_file(tmp_path / "model.safetensors", {"w": row})
    refused_within(1.0, lambda: read_header(file), "has 100000 dimensions")


def test_a_name_of_ten_megabytes(tmp_path: Path) -> None:
    file = header_file(tmp_path / "model.safetensors", {"x" * 10_000_000: {"dtype": "F32"}})
    refused_within(2.0, lambda: read_header(file), "lacks dtype, shape or data_offsets; download the file again")


def test_controls_in_a_name_do_not_reach_the_terminal() -> None:
    assert one_line("tensor \x1b[2J\x07: bad") == "tensor \\x1b[2J\\x07: bad"


def test_more_layers_than_the_checkpoint_can_fill(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100_000}))
    refused_within(5.0, lambda: StreamedModel(tmp_path), "describes more than 10000 modules")


def test_an_alias_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "m.yaml").write_text("\n".join(lines))
    refused_within(1.0, lambda: load_manifest(tmp_path / "m.yaml"), "its aliases make")


def test_nested_loops_of_a_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onelayer.compiler.conversations.chat.TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny_tokenizer(generation_tags=False)
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loops + PLAIN_CHAT_TEMPLATE
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = Example("data.jsonl:1", messages=turns)
    refused_within(3.0, lambda: tokens.tokenize(example, tokenizer, 64), "the chat template of .* takes more than")


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    causal("Llama").save_pretrained(tmp_path)
    count = OPEN_FILES + 20
    for number in range(count):
        save_file({f"t{number}": torch.full((2,), float(number))}, tmp_path / f"s{number}.safetensors")
    places = {f"t{number}": f"s{number}.safetensors" for number in range(count)}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = Checkpoint.open(tmp_path)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + OPEN_FILES + 10, hard))
    try:
        for round_trip in range(2):
            for number in range(count):
                assert checkpoint.read(f"t{number}").tolist() == [number, number], round_trip
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
