"""Tests that name the piece of transformers' semi-private surface that broke."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.tiny_models import save_tiny, tiny_llama
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries import transformers_models
from onelayer.compiler.libraries.modules import has_forward, missing_parameters
from onelayer.compiler.storage.checkpoint import Checkpoint


def parameters_of(function: object) -> set[str]:
    assert callable(function)
    return set(inspect.signature(function).parameters)


def test_conversion_rules_are_given_for_a_model() -> None:
    assert "model" in parameters_of(conversion_mapping.get_model_conversion_mapping)
    assert isinstance(conversion_mapping.get_model_conversion_mapping(tiny_llama()), list)


def test_a_key_is_renamed_by_rules_prefix_and_expected_names() -> None:
    wanted = {"source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"}
    assert wanted <= parameters_of(core_model_loading.rename_source_key)
    renamed = core_model_loading.rename_source_key("norm.weight", [], [], "model", {"model.norm.weight": torch.ones(1)})
    assert renamed == ("model.norm.weight", None)


def test_loading_takes_a_partial_state_dict() -> None:
    assert {"model", "state_dict", "load_config"} <= parameters_of(
        core_model_loading.convert_and_load_state_dict_in_model
    )
    fields = set(modeling_utils.LoadStateDictConfig.__dataclass_fields__)
    assert {"dtype", "dtype_plan", "device_map", "weight_mapping"} <= fields


def test_models_tell_their_layers_ties_and_dtypes() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert "LlamaDecoderLayer" in (model._no_split_modules or ())
    assert issubclass(type(model.model.layers[0]), GradientCheckpointingLayer)
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert isinstance(model._get_dtype_plan(torch.float16), dict)


def test_a_skeleton_has_no_weights_and_real_buffers() -> None:
    config = tiny_llama().config
    before = torch.random.get_rng_state()
    skeleton = transformers_models.build_skeleton(config, transformers.LlamaForCausalLM, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), before), "the user's random numbers must not move"
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in skeleton.parameters())
    expected = tiny_llama().model.rotary_emb.inv_freq
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, expected)
    assert not skeleton.training


def test_renamed_stacked_and_tied_names_are_planned(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "moe")
    config = transformers_models.read_config(tmp_path / "moe")
    skeleton = transformers_models.build_skeleton(config, transformers.MixtralForCausalLM, torch.float32)
    plan = transformers_models.plan_loading(skeleton, Checkpoint.open(tmp_path / "moe"))
    stacked = [name for name in plan.checkpoint_keys if name.endswith("experts.gate_up_proj")]
    assert stacked
    assert all(len(plan.checkpoint_keys[name]) == 8 and name not in plan.stored_unchanged for name in stacked)
    assert not missing_parameters(skeleton, plan)
    save_tiny("llama_tied", tmp_path / "tied")
    config = transformers_models.read_config(tmp_path / "tied")
    skeleton = transformers_models.build_skeleton(config, transformers.LlamaForCausalLM, torch.float32)
    plan = transformers_models.plan_loading(skeleton, Checkpoint.open(tmp_path / "tied"))
    assert plan.alias == {"lm_head.weight": "model.embed_tokens.weight"}


def test_parameters_that_a_class_computes_need_not_be_stored(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = transformers.MarianMTModel(transformers.MarianConfig(**shape, pad_token_id=0, max_position_embeddings=32))
    model.save_pretrained(tmp_path)
    config, checkpoint = transformers_models.read_config(tmp_path), Checkpoint.open(tmp_path)
    skeleton = transformers_models.build_skeleton(config, transformers.MarianMTModel, torch.float32)
    name = "model.encoder.embed_positions.weight"
    assert name not in checkpoint.tensors
    computed = transformers_models.computed_parameters(
        skeleton, transformers_models.plan_loading(skeleton, checkpoint), tmp_path
    )
    assert name in computed
    built = transformers_models.build_skeleton(config, transformers.MarianMTModel, torch.float32, computed)
    assert torch.equal(built.get_parameter(name), model.get_parameter(name))


def test_lists_of_lists_of_layers_are_cut_at_what_is_called() -> None:
    rows = [torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]) for _ in range(2)]
    assert not has_forward(rows[0])
    model = tiny_llama()
    model.model.layers = torch.nn.ModuleList(rows)
    model._no_split_modules = None
    assert transformers_models.block_modules(model) == {linear for row in rows for linear in row}


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"tensor {name}: F8_E4M3 are quantized values"):
        transformers_models.plan_loading(model, Checkpoint.open(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_config": {"quantization_config": {"bits": 4}}}))
    with pytest.raises(InputError, match="field quantization_config: 'quantized' weights"):
        transformers_models.read_config(tmp_path)


def test_no_other_module_of_the_compiler_uses_that_surface() -> None:
    private = {
        "conversion_mapping": ("conversion.py",),
        "core_model_loading": ("transformers_models.py", "conversion.py"),
        "LoadStateDictConfig": ("conversion.py",),
        "_get_dtype_plan": ("conversion.py",),
        "_no_split_modules": ("transformers_models.py", "diffusers_models.py"),
        "_keys_to_ignore_on_load_missing": ("transformers_models.py",),
        "all_tied_weights_keys": ("transformers_models.py",),
    }
    for path in Path(transformers_models.__file__).parents[1].rglob("*.py"):
        text = path.read_text()
        assert not [name for name, files in private.items() if name in text and path.name not in files], path
