"""Merging several adapters, converted checkpoints, and mistakes that other tools make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, PreTrainedModel

from helpers.peft_adapters import deltas, load_adapter, load_original, random_adapter
from helpers.tiny_models import build, save_tiny, tiny_tokenizer
from onelayer.compiler.adapters import merge_shards
from onelayer.compiler.adapters.merge import merge_adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.files import publish_directory, read_json


def stored(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@settings(max_examples=15)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    block_bytes=st.sampled_from([64, 1000, 1 << 20]),
)
def test_several_with_weights_are_the_weighted_sum_rounded_once(
    ranks: list[int], weights: list[float], dtype: torch.dtype, family: str, block_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("several")
    save_tiny(family, root / "original", dtype, shards=2)
    wanted = {name: tensor.double() for name, tensor in stored(root / "original").items()}
    weights = weights[: len(ranks)]
    for number, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
        lora: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "seed": number}
        adapted = random_adapter(load_original(root / "original"), root / f"a{number}", **lora)
        for name, delta in deltas(adapted).items():
            wanted[f"{name}.weight"] += weight * delta.double()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merge_shards, "BLOCK_BYTES", block_bytes)
        patched.setattr(merge_shards, "CHUNK_BYTES", 8 * block_bytes)
        paths = [root / f"a{number}" for number in range(len(ranks))]
        merge_adapter(paths, model=root / "original", output=root / "merged", weight=weights)
    for name, tensor in stored(root / "merged").items():
        assert tensor.dtype is dtype
        half_unit = torch.finfo(dtype).eps / 2
        error = (tensor.double() - wanted[name]).abs()
        assert (error <= wanted[name].abs() * half_unit + wanted[name].abs().max() * 2e-6).all(), name
    record = read_json(root / "merged/onelayer.json")
    assert [part["weight"] for part in record["adapters"]] == weights


def test_one_adapter_twice_at_half_its_weight_is_that_adapter(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "original")
    adapter = tmp_path / "adapter"
    random_adapter(load_original(tmp_path / "original"), adapter, r=2, target_modules="all-linear")
    merge_adapter(adapter, model=tmp_path / "original", output=tmp_path / "once")
    merge_adapter([adapter, adapter], model=tmp_path / "original", output=tmp_path / "twice", weight=[0.5, 0.5])
    for name, tensor in stored(tmp_path / "twice").items():
        torch.testing.assert_close(tensor, stored(tmp_path / "once")[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_added_up_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original")

    def load() -> PreTrainedModel:
        return load_original(tmp_path / "original")

    random_adapter(load(), tmp_path / "plain", r=2, target_modules=["q_proj", "lm_head"])
    random_adapter(load(), tmp_path / "whole", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    random_adapter(load(), tmp_path / "rows", r=2, target_modules=["q_proj"], trainable_token_indices=[3])

    def merged(*names: str, weight: list[float] | None = None) -> None:
        paths = [tmp_path / name for name in names]
        merge_adapter(paths, model=tmp_path / "original", output=tmp_path / "out", weight=weight)

    for names, weight, message in (
        (("whole",), [0.5], "replaces lm_head.weight, which cannot be weighted"),
        (("rows",), [0.5], "replaces model.embed_tokens, which cannot be weighted"),
        (("whole", "plain"), None, "is changed by .*whole too"),
        (("rows", "rows"), None, "is changed by .*rows too"),
        (("plain", "plain"), [1.0], "1 given for 2 adapters"),
        (("plain",), [float("nan")], "finite"),
        ((), None, "for 0 adapters"),
    ):
        with pytest.raises(InputError, match=message):
            merged(*names, weight=weight)
    assert not (tmp_path / "out").exists()
    merged("whole", "rows")
    assert (tmp_path / "out").exists()


def test_a_renamed_checkpoint_keeps_its_own_names(tmp_path: Path) -> None:
    """The file's names are those of an older class; the adapter has the runtime's."""
    save_tiny("llama", tmp_path / "original")
    file = tmp_path / "original/model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, {"format": "pt"})
    adapted = random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", target_modules="all-linear")
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    assert stored(tmp_path / "merged").keys() == bare.keys()
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        found = load_original(tmp_path / "merged")(ids).logits
        torch.testing.assert_close(found, adapted(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_weight_that_is_fused_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = build("NomicBertConfig", "NomicBertForMaskedLM", **shape, num_attention_heads=4, pad_token_id=0)
    model.save_pretrained(str(tmp_path / "original"))
    tiny_tokenizer(tmp_path / "original")
    assert any("Wqkv" in name for name in Checkpoint.open(tmp_path / "original").tensors)

    def load() -> PreTrainedModel:
        loaded: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(tmp_path / "original").eval()
        return loaded

    options: dict[str, Any] = {"r": 2, "task_type": None}
    random_adapter(load(), tmp_path / "fused", target_modules=["q_proj"], **options)
    with pytest.raises(InputError, match=r"stored in another form \(.*Wqkv"):
        merge_adapter(tmp_path / "fused", model=tmp_path / "original", output=tmp_path / "merged")
    adapted = random_adapter(load(), tmp_path / "plain", target_modules=["down_proj", "o_proj"], **options)
    merge_adapter(tmp_path / "plain", model=tmp_path / "original", output=tmp_path / "merged")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-4)


def test_an_adapter_of_single_experts_is_not_dropped_but_refused(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "original")
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    expert = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    extra = {f"{expert}.lora_A.weight": torch.ones(2, 32), f"{expert}.lora_B.weight": torch.ones(64, 2)}
    save_file({**tensors, **extra}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.0\.w1\.lora_A.* has no place"):
        merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")


def test_weights_of_one_shape_are_not_taken_for_tied(tmp_path: Path) -> None:
    """Empty tensors all have the same address; only the model's own ties count."""
    save_tiny("llama", tmp_path / "original")
    adapter = tmp_path / "adapter"
    random_adapter(load_original(tmp_path / "original"), adapter, r=2, target_modules=["embed_tokens", "k_proj"])
    merge_adapter(adapter, model=tmp_path / "original", output=tmp_path / "merged")
    before, after = stored(tmp_path / "original"), stored(tmp_path / "merged")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1))}


def test_remote_code_is_left_out_and_never_run(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "original")
    config = read_json(tmp_path / "original/config.json")
    code = f"open({str(tmp_path / 'was-run')!r}, 'w')\n"
    (tmp_path / "original/modeling_other.py").write_text(code)
    from onelayer.compiler.storage.files import write_json

    write_json(tmp_path / "original/config.json", {**config, "auto_map": {"AutoModelForCausalLM": "modeling_other.X"}})
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "merged")
    assert not (tmp_path / "merged/modeling_other.py").exists()
    assert "auto_map" not in read_json(tmp_path / "merged/config.json")
    assert not (tmp_path / "was-run").exists()


def test_the_disk_holds_one_copy_and_no_random_number_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "original", shards=3)
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    largest, publish = [], publish_directory

    def noted(work: Path, output: Path) -> None:
        largest.append(sum(file.stat().st_size for file in tmp_path.glob(".out*/*.safetensors")))
        publish(work, output)

    monkeypatch.setattr("onelayer.compiler.storage.work_directory.publish_directory", noted)
    before = torch.get_rng_state()
    merge_adapter(tmp_path / "adapter", model=tmp_path / "original", output=tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    original = sum(file.stat().st_size for file in (tmp_path / "original").glob("*.safetensors"))
    assert largest == [pytest.approx(original, rel=0.01)]
    loaded = load_adapter(load_original(tmp_path / "original"), tmp_path / "adapter").merge_and_unload()
    for name, tensor in load_original(tmp_path / "out").state_dict().items():
        assert not tensor.is_meta
        torch.testing.assert_close(tensor, loaded.state_dict()[name], rtol=1e-5, atol=1e-6)
