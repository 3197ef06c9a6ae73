"""The planner on models that read images or sound: which layers are there, and how many rows they compute."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers.tiny_models import DECODER, build
from onelayer.compiler.compile import selection
from onelayer.compiler.compile.selection import choose_ranks
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.models.linears import unit_linears, weight_shape
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.runtime.planning.media import Media
from onelayer.runtime.planning.pass_memory import compile_bytes
from onelayer.runtime.planning.plan import plan_run
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.shapes import LinearShape
from onelayer.runtime.planning.train_memory import emulator_bytes
from scripts.sweep.architectures import random_model
from scripts.sweep.configs import tiny_config
from scripts.sweep.vision_models import FAMILIES

VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
DEEPSTACK = {
    **{"depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 4, "patch_size": 8, "out_hidden_size": 32},
    **{"spatial_merge_size": 2, "deepstack_visual_indexes": [1], "num_position_embeddings": 64},
}
SPEECH = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16, "vocab_size": 96},
    **{"max_source_positions": 50, "max_target_positions": 64, "pad_token_id": 0, "decoder_start_token_id": 1},
}
WAVES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16},
}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
# For each model: its classes and fields, and what an image or a recording of an example comes to.
MODELS: dict[str, tuple[str, str, dict[str, Any], Media]] = {
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**DECODER, "head_dim": 8, "rope_parameters": SECTIONS}, "vision_config": DEEPSTACK},
        Media(count=2, rows=64, tokens=16),
    ),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_seq_length": 16,
        },
        Media(count=2, rows=17, tokens=16),
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION, Media(count=2, rows=17, tokens=0)),
    "swin": ("SwinConfig", "SwinForImageClassification", STAGES, Media(count=2, rows=64, tokens=0)),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", WAVES, Media(count=2, rows=8000, tokens=0)),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", SPEECH, Media(count=2, rows=50, tokens=50)),
}


# Gemma 3 multiplies by a parameter that is in no linear.
PROJECT_WITHOUT_LINEARS = {"gemma3"}


def shape_of(linear: LinearShape) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def saved(folder: Path, name: str) -> Any:
    config_class, model_class, fields, _ = MODELS[name]
    model = build(config_class, model_class, **fields)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_rows_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", name)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    blocks = [unit for unit in StreamedModel(tmp_path / "model").units if unit.is_block]
    compiled = [sorted(weight_shape(module) for _, module in unit_linears(unit)) for unit in blocks]
    for source in ("model", "config"):
        shapes = read_shapes(tmp_path / source, images=2)
        assert shapes.media == MODELS[name][3]
        assert {block.media_rows for block in shapes.blocks if not block.projects} <= {0, 2 * shapes.media.rows}
        read = [sorted(map(shape_of, block.linears)) for block in shapes.blocks]
        assert sorted(read) == sorted(linears for linears in compiled if linears)
        assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert not any(block.experts for block in shapes.blocks)


# The processor of SmolVLM, whose layers are Idefics3's, needs another package.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"smolvlm"}))
def test_a_projector_is_planned_as_it_is_compiled(family: str, tmp_path: Path) -> None:
    """Names, ranks and bytes: an item of Qwen3-VL's deepstack is a unit, and a linear may be a projector itself."""
    model, _ = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path)
    wanted = choose_ranks(streamed, 0.3)
    units = [sorted(weight_shape(module) for _, module in unit_linears(unit)) for unit in streamed.units]
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((tmp_path / "config.json").read_text())
    for source in (tmp_path, tmp_path / "config"):
        shapes = read_shapes(source)
        ranks = [rank_for(0.3, *shape_of(linear)) for block in shapes.blocks for linear in block.compressible]
        assert sorted(map(str, ranks)) == sorted(map(str, wanted.values()))
        projecting = [block for block in shapes.blocks if block.projects]
        assert projecting or family in PROJECT_WITHOUT_LINEARS
        for block in projecting:
            assert sorted(map(shape_of, block.linears)) in units
            assert shapes.media is not None
            assert block.media_rows <= shapes.media.rows
        assert emulator_bytes(shapes, 0.3) == selection.emulator_bytes(streamed, wanted, {}, None)


# What names in a checkpoint do not tell: gates next to as many experts, queries, keys and values that are stored in one
# matrix, modules with numbers that are no experts, and a projector that is declared indivisible.
OTHERS = (
    "Qwen3_5MoeForConditionalGeneration",
    "QianfanOCRForConditionalGeneration",
    "GraniteDoclingForConditionalGeneration",
    "PI0ForConditionalGeneration",
)


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_takes_the_linears_that_compile_takes(name: str, tmp_path: Path) -> None:
    model_class = getattr(transformers, name)
    random_model(model_class, tiny_config(model_class.config_class)).save_pretrained(tmp_path)
    wanted = choose_ranks(streamed := StreamedModel(tmp_path), 0.3)
    compiled = sorted(weight_shape(streamed.model.get_submodule(linear)) for linear in wanted)
    linears = [shape_of(linear) for block in read_shapes(tmp_path).blocks for linear in block.compressible]
    assert sorted(shape for shape in linears if rank_for(0.3, *shape) is not None) == compiled


def test_the_rows_of_a_tower_decide_its_memory_and_not_the_tokens(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llava")
    few, many = (read_shapes(tmp_path / "model", images, 512).at_length(128) for images in (1, 4))
    assert many.media is not None
    assert many.media.rows == 64 * 64
    assert compile_bytes(many, 0.5, 128) > 3.5 * compile_bytes(few, 0.5, 128)
    assert compile_bytes(many, 0.5, 256) > 1.9 * compile_bytes(many, 0.5, 128)  # two examples


@pytest.mark.parametrize("name", ["qwen3_vl", "swin", "wav2vec2"])
def test_a_plan_says_what_an_example_has(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", name)
    found = plan_run(tmp_path / "model", 2**30, max_length=24, batch_size=1, images=2, timing=False, on_gpu=False)
    assert found.media == MODELS[name][3]
    assert any("up to 32 tokens" in remark for remark in found.remarks) is (name == "qwen3_vl")
