"""Merging: equal to PEFT's own merge, and byte-equal in every tensor that the adapter does not change."""

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.peft_adapters import load_adapter, load_original, quiet_peft, random_adapter
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.adapters import merge_shards
from onelayer.compiler.adapters.merge import merge_adapter
from onelayer.compiler.correct.command import correct_adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest
from onelayer.compiler.storage.files import read_json, write_json

CONFIGS: dict[str, dict[str, Any]] = {
    "all linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora and patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "embedding and head": {"r": 3, "target_modules": ["embed_tokens", "lm_head"]},
    "whole modules": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "token rows": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [9, 4]},
    "token rows of two": {
        "r": 2,
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1], "lm_head": [100, 2]},
    },
    "biases": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def merged_by_peft(directory: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(load_adapter(load_original(directory, dtype), adapter).merge_and_unload().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=[name.replace(" ", "_") for name in CONFIGS])
def test_it_is_what_peft_merges(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_shards, "CHUNK_BYTES", 1 << 10)  # a few rows at a time
    monkeypatch.setattr(merge_shards, "BLOCK_BYTES", 500)
    save_tiny("qwen2", tmp_path / "original", dtype, shards=3)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", **config)
    result = merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    wanted = merged_by_peft(tmp_path / "original", tmp_path / "adapter", dtype)
    before, after = stored(tmp_path / "original"), stored(tmp_path / "merged")
    assert before.keys() == after.keys() == wanted.keys()
    for name, tensor in after.items():
        assert tensor.dtype is dtype
        # In bfloat16 PEFT rounds the delta of an embedding before adding it; we round once, to within its last bit.
        twice = dtype is torch.bfloat16 and "embed_tokens" in name
        rtol, atol = 1e-5 if dtype is torch.float32 else 1e-2, 4e-3 if twice else 1e-6
        torch.testing.assert_close(tensor, wanted[name], rtol=rtol, atol=atol)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert 0 < len(changed) == result.changed
    assert result.copied == len(after) - len(changed)


def test_no_weight_is_ever_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "original", torch.bfloat16)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules="all-linear")
    monkeypatch.setattr(merge_shards, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(Checkpoint, "read", None)
    spans = []
    read_rows = Checkpoint.read_rows

    def recorded(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        spans.append((stop - start) * self.tensors[name].shape[1] * 2)
        return read_rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_rows", recorded)
    result = merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    assert max(spans) <= 1 << 10
    tensors = Checkpoint.open(tmp_path / "original").tensors.values()
    assert result.report.bytes_read == sum(info.size_bytes for info in tensors if "proj" in info.name)


def test_in_bfloat16_it_is_rounded_once(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original", torch.bfloat16)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=4, target_modules="all-linear")
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    exact = merged_by_peft(tmp_path / "original", tmp_path / "adapter", torch.float32)
    for name, tensor in stored(tmp_path / "merged").items():
        error = (tensor.double() - exact[name].double()).abs()
        assert (error <= exact[name].double().abs() * 2**-8 + 1e-30).all(), name


@pytest.mark.parametrize("shards", [None, 4])
def test_everything_else_is_the_same_bytes(shards: int | None, tmp_path: Path) -> None:
    original, output = tmp_path / "original", tmp_path / "merged"
    save_tiny("llama", original, torch.bfloat16, shards=shards)
    (original / "LICENSE").write_text("license")
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    (original / "pytorch_model.bin").write_bytes(b"stale")
    (original / ".cache").mkdir()
    random_adapter(
        load_original(original), tmp_path / "adapter", r=4, target_modules=["o_proj"], layers_to_transform=[1]
    )
    merge_adapter(tmp_path / "adapter", model=original, output=output)

    files = {path.relative_to(original): path for path in original.rglob("*") if path.is_file()}
    weights = {path for path in files if path.suffix == ".safetensors" or path.name.endswith(".index.json")}
    written = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert written == files.keys() - {Path("pytorch_model.bin")} | {Path("onelayer.json")}
    for path in written - weights - {Path("onelayer.json")}:
        assert (output / path).read_bytes() == files[path].read_bytes()
    if shards:
        before, after = (read_json(path / "model.safetensors.index.json") for path in (original, output))
        assert after == before
        sizes = sum(tensor.numel() * tensor.element_size() for tensor in stored(output).values())
        assert after["metadata"]["total_size"] == sizes
        assert len(weights) > 2

    def hashes(directory: Path) -> dict[str, str]:
        result = {}
        for name, info in Checkpoint.open(directory).tensors.items():
            data = info.file.read_bytes()[info.start : info.end]
            result[name] = hashlib.sha256(f"{info.dtype}{info.shape}".encode() + data).hexdigest()
        return result

    before_hashes, after_hashes = hashes(original), hashes(output)
    differing = {name for name in before_hashes if before_hashes[name] != after_hashes[name]}
    assert differing == {"model.layers.1.self_attn.o_proj.weight"}


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2", "opt"])
def test_other_families(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "original")
    adapted = random_adapter(
        load_original(tmp_path / "original"), tmp_path / "adapter", r=4, target_modules="all-linear"
    )
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted = adapted(ids).logits
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
        torch.testing.assert_close(load_original(tmp_path / "merged")(ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_attention_of_a_mixture_of_experts(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=4, target_modules=["q_proj", "v_proj"])
    wanted = merged_by_peft(tmp_path / "original", tmp_path / "adapter", torch.float32)
    result = merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    assert result.changed == 4
    for name, tensor in load_original(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "embedding", "whole"],
)
def test_a_tied_weight_is_not_changed_for_both(config: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("llama_tied", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, **config)
    with pytest.raises(InputError, match="shares its weight with"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_token_rows_of_a_tied_model_go_to_both_as_in_peft(tmp_path: Path) -> None:
    save_tiny("llama_tied", tmp_path / "original")
    config: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}
    adapted = random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", **config)
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            load_original(tmp_path / "merged")(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_a_corrected_adapter_says_so_and_an_uncorrected_one_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("llama", tmp_path / "original")
    write_emulator(model, tmp_path / "original", tmp_path / "emulator", ratio=0.4)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    digest = model_digest(tmp_path / "original")
    trained = {"digest": model_digest(tmp_path / "emulator")}
    record = {"kind": "adapter", "trained_on": trained, "base": {"digest": digest}, "corrected": False}

    def merged(adapter: Path, name: str) -> bool | None:
        result = merge_adapter(adapter, model=tmp_path / "original", output=tmp_path / name)
        written = read_json(tmp_path / name / "onelayer.json")
        assert written["base"]["digest"] == digest
        assert [part["corrected"] for part in written["adapters"]] == [result.corrected]
        assert ("is not corrected for" in capsys.readouterr().err) is (result.corrected is False)
        return result.corrected

    assert merged(tmp_path / "adapter", "foreign") is None
    write_json(tmp_path / "adapter/onelayer.json", record)
    assert merged(tmp_path / "adapter", "raw") is False
    write_json(tmp_path / "adapter/onelayer.json", {**record, "trained_on": {"digest": digest}})
    assert merged(tmp_path / "adapter", "direct") is None
    write_json(tmp_path / "adapter/onelayer.json", record)
    correct_adapter(
        tmp_path / "adapter", emulator=tmp_path / "emulator", model=tmp_path / "original", output=tmp_path / "fit"
    )
    assert merged(tmp_path / "fit", "corrected") is True
    write_json(tmp_path / "adapter/onelayer.json", {**record, "base": {"digest": "e" * 64}})
    with pytest.raises(InputError, match="made for another original"):
        merged(tmp_path / "adapter", "other")


def test_every_key_must_find_its_place(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    renamings = [("q_proj", "wq"), ("base_model.model.model", "base_model.model.language_model")]  # part, then all
    for old, new in renamings:
        save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, file)
        with pytest.raises(InputError, match="has no place"):
            merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    narrow = {key: tensor[:-2].contiguous() for key, tensor in tensors.items() if "lora_B" in key}
    save_file({**tensors, **narrow}, file)
    with pytest.raises(InputError, match="made for"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")


def test_norms_and_unknown_layers_cannot_be_adapted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original")
    adapted = quiet_peft(load_original(tmp_path / "original"), r=2, target_modules=["q_proj"])
    adapted.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.norm"
    extra = {f"{prefix}.lora_A.weight": torch.ones(2, 32), f"{prefix}.lora_B.weight": torch.ones(32, 2)}
    save_file({**tensors, **extra}, file)
    with pytest.raises(InputError, match="is a LlamaRMSNorm"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")


def test_a_weight_stored_in_another_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    monkeypatch.setattr("onelayer.compiler.adapters.merge_plan.FLOAT_DTYPES", {})
    with pytest.raises(InputError, match="stored in another form"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")


def test_a_full_disk_is_noticed_first_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
        with pytest.raises(InputError, match="GiB"):
            merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")

    def broken(*arguments: Any) -> None:
        raise OSError("disk error")

    monkeypatch.setattr("onelayer.compiler.adapters.merge_shards.write_safetensors", broken)
    with pytest.raises(OSError, match="disk error"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "original"]


def test_a_merge_can_be_merged_again(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "once")
    result = merge_adapter(tmp_path / "adapter", model=tmp_path / "once", output=tmp_path / "twice")
    json.dumps(result.model_dump(mode="json"), allow_nan=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    zero, one, two = (stored(tmp_path / part)[name] for part in ("original", "once", "twice"))
    torch.testing.assert_close(two - one, one - zero, rtol=1e-3, atol=1e-5)
