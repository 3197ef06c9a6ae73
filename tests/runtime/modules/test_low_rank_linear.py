"""Emulators as ordinary transformers directories: loading, saving, and loud failures where necessary."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.reference_emulators import FACTOR_DTYPES, compressible, dense_reference, stored_as, write_emulator
from helpers.tiny_models import TINY, save_tiny
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.runtime import load_emulator
from onelayer.runtime.modules.low_rank_linear import CompressedLinear

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])


@pytest.fixture(scope="module", params=FACTOR_DTYPES, ids=str)
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Path, Path]]:
    """Emulators by family, ratio and factor dtype, made once: (dense reference, original directory, emulator
    directory).

    The dense reference computes what the emulator must compute. Plain factors of full rank compute the same as the
    original.
    """
    made: dict[tuple[str, float], tuple[Any, Path, Path]] = {}

    def folder(name: str, ratio: float = 1.0) -> tuple[Any, Path, Path]:
        if (name, ratio) not in made:
            base = tmp_path_factory.mktemp(name)
            model = save_tiny(name, base / "original")
            made[name, ratio] = (model, base / "original", base / "emulator")
            with stored_as(request.param):
                write_emulator(model, base / "original", base / "emulator", ratio)
            if request.param is not None or ratio < 1:
                dense_reference(model, base / "emulator")
        return made[name, ratio]

    return folder


Folders = Callable[..., tuple[Any, Path, Path]]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, **extra).logits
    return result


def tensor_bytes(directory: Path) -> dict[str, bytes]:
    """Read every stored tensor of a directory as raw bytes, by name."""
    return {
        name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", TINY)
def test_full_rank_emulator_equals_the_dense_model(folders: Folders, name: str) -> None:
    model, _, emulator = folders(name)
    loaded, info = type(model).from_pretrained(emulator, output_loading_info=True)
    assert not any(info.values())
    replaced = {name for name, module in loaded.named_modules() if isinstance(module, CompressedLinear)}
    assert replaced == set(compressible(model))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_low_rank_emulator_computes_with_the_product_of_its_factors(folders: Folders) -> None:
    dense, original, emulator = folders("qwen2", 0.5)
    loaded = load_emulator(emulator)
    low_rank = [module for module in loaded.modules() if isinstance(module, CompressedLinear)]
    assert any(getattr(module, "rank", None) for module in low_rank)
    torch.testing.assert_close(logits(loaded), logits(dense), atol=1e-5, rtol=0)
    assert (logits(dense) - logits(transformers.AutoModelForCausalLM.from_pretrained(original))).abs().max() > 1e-2


def test_gradients_reach_the_input_as_through_the_dense_weight(folders: Folders) -> None:
    dense, _, emulator = folders("qwen2", 0.5)
    loaded: Any = load_emulator(emulator)
    for name, module in loaded.named_modules():
        if isinstance(module, CompressedLinear):
            x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
            twin = x.detach().clone().requires_grad_()
            module(x).square().sum().backward()
            reference = dense.get_submodule(name)
            torch.nn.functional.linear(twin, reference.weight.detach(), reference.bias).square().sum().backward()
            assert x.grad is not None
            torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_factors_are_frozen_after_loading(folders: Folders) -> None:
    emulator = folders("llama")[2]
    names = [name for name, p in load_emulator(emulator).named_parameters() if not p.requires_grad]
    facts = Emulator.open(emulator).facts
    assert len(names) == 2 * len(facts.ranks) + len(facts.quantized_dense)
    assert len(facts.compressed) == 14
    assert all(name.endswith((".lr_up", ".lr_down", ".lr_dense")) for name in names)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2"])
def test_saving_again_keeps_every_factor_byte(folders: Folders, name: str, tmp_path: Path) -> None:
    _, _, emulator = folders(name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(emulator)
    loaded.save_pretrained(tmp_path / "again")
    before, after = tensor_bytes(emulator), tensor_bytes(tmp_path / "again")
    factors = {key: value for key, value in before.items() if ".lr_" in key}
    assert factors
    assert factors == {key: value for key, value in after.items() if ".lr_" in key}
    document = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "weights_file" not in document["quantization_config"]
    assert "transformers_weights" not in document
    assert document["quantization_config"]["base_model"] == "example/original"
    again = load_emulator(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(loaded), atol=0, rtol=0)
    again.save_pretrained(tmp_path / "thrice")
    assert tensor_bytes(tmp_path / "thrice") == after


def test_other_heads_load_from_the_same_folder(folders: Folders) -> None:
    model, _, emulator = folders("llama")
    bare = transformers.AutoModel.from_pretrained(emulator)
    with torch.no_grad():
        expected = model.model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(bare(input_ids=IDS).last_hidden_state, expected, atol=1e-5, rtol=0)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(emulator, num_labels=3)
    assert sum(isinstance(module, CompressedLinear) for module in classifier.modules()) == 14
    assert logits(classifier).shape == (2, 3)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(folders: Folders, device_map: Any) -> None:
    model, _, emulator = folders("llama")
    loaded = load_emulator(emulator, device_map=device_map)
    torch.testing.assert_close(logits(loaded).cpu(), logits(model), atol=1e-5, rtol=0)


def test_disk_offload(folders: Folders, tmp_path: Path) -> None:
    model, _, emulator = folders("llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = load_emulator(emulator, device_map=places, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_meta_device(folders: Folders) -> None:
    loaded: Any = load_emulator(folders("llama")[2], device_map="meta")
    assert loaded.model.layers[0].self_attn.q_proj.weight.is_meta


def test_copies_casts_generates_and_prints(folders: Folders) -> None:
    model, _, emulator = folders("llama")
    loaded: Any = load_emulator(emulator)
    twin = copy.deepcopy(loaded)
    torch.testing.assert_close(logits(twin), logits(loaded), atol=0, rtol=0)
    assert twin.to(torch.bfloat16).model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert logits(twin).dtype == torch.bfloat16
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(loaded.generate(IDS, **settings), model.generate(IDS, **settings))
    assert "Linear(in=32, out=64, rank=32, bias=False" in str(loaded)


def test_dtype_of_the_checkpoint_and_of_the_call(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "original", dtype=torch.bfloat16)
    emulator = write_emulator(model, tmp_path / "original", tmp_path / "emulator")
    assert {p.dtype for p in load_emulator(emulator).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_emulator(emulator, dtype=torch.float32).parameters()} == {torch.float32}


def edited(emulator: Path, output: Path, **fields: Any) -> Path:
    """Copy an emulator with changed fields in its `quantization_config`."""
    shutil.copytree(emulator, output)
    document = json.loads((output / "config.json").read_text())
    document["quantization_config"].update(fields)
    (output / "config.json").write_text(json.dumps(document))
    return output


def test_unknown_format_version_is_refused(folders: Folders, tmp_path: Path) -> None:
    later = edited(folders("llama")[2], tmp_path / "later", format_version=6)
    with pytest.raises(InputError, match=r"format_version is 6, this onelayer reads 5"):
        transformers.AutoModelForCausalLM.from_pretrained(later)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj", "model.norm"])
def test_ranks_must_name_linears_of_the_model(folders: Folders, tmp_path: Path, name: str) -> None:
    wrong = edited(folders("llama")[2], tmp_path / "wrong", ranks={name: 4})
    with pytest.raises(InputError, match=name):
        load_emulator(wrong)


def test_a_missing_factor_is_refused(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders("llama")[2], tmp_path / "torn")
    file = next(
        file
        for file in sorted((tmp_path / "torn").glob("*.safetensors"))
        if "model.layers.0.mlp.gate_proj.lr_down" in load_file(file)
    )
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.gate_proj.lr_down"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"\*\.lr_down"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "torn")


def test_a_missing_shard_is_refused(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders("llama")[2], tmp_path / "torn")
    next((tmp_path / "torn").glob("emulator-00002*")).unlink()
    with pytest.raises(InputError, match="emulator-00002"):
        load_emulator(tmp_path / "torn")


def test_load_emulator_refuses_other_folders(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an emulator"):
        load_emulator(folders("llama")[1])
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_emulator(tmp_path)
