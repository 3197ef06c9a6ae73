"""Denoisers of diffusers stream as its own classes compute, and what its semi-private surface must provide."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import model_loading_utils, modeling_utils

from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.library import library_of
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.stream import Stream
from scripts.sweep.pipelines import save_pipeline

CPU = torch.device("cpu")


def inputs(family: str, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a tiny denoiser, as its pipeline passes them."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    if family == "flux":
        ids = torch.zeros(8, 3)
        more = {"guidance": torch.ones(1), "txt_ids": torch.zeros(5, 3), "img_ids": ids}
        text = {"encoder_hidden_states": noise(1, 5, 32), "pooled_projections": noise(1, 32)}
        return {"hidden_states": noise(1, 8, 16), "timestep": torch.tensor([0.5], dtype=dtype), **text, **more}
    if family == "sd3":
        text = {"encoder_hidden_states": noise(1, 5, 32), "pooled_projections": noise(1, 64)}
        return {"hidden_states": noise(1, 4, 8, 8), "timestep": torch.tensor([500.0]), **text}
    added = {"text_embeds": noise(1, 32), "time_ids": torch.ones(1, 6)}
    return {
        "sample": noise(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "added_cond_kwargs": added,
        "encoder_hidden_states": noise(1, 5, 64),
    }


@pytest.mark.parametrize(
    ("family", "dtype"), [("flux", torch.float32), ("sd3", torch.bfloat16), ("sdxl", torch.float32)]
)
def test_a_streamed_denoiser_equals_the_resident_one(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = save_pipeline(family, tmp_path, dtype)
    name = "unet" if family == "sdxl" else "transformer"
    resident = type(getattr(pipe, name)).from_pretrained(str(tmp_path / name), torch_dtype=dtype)
    streamed = StreamedModel(tmp_path / name)
    assert streamed.dtype == dtype
    assert sum(unit.is_block for unit in streamed.units) >= 2
    batches = [inputs(family, seed, dtype) for seed in range(2)]
    outputs: dict[int, Any] = {}
    loads: Counter[str] = Counter()
    stream = Stream(streamed, CPU, Meter(CPU), on_unit=lambda unit: counted(unit, loads))
    with stream.meter:
        stream.run(batches, outputs.__setitem__)
    assert set(loads.values()) == {1}
    with torch.no_grad():
        for index, batch in enumerate(batches):
            assert torch.equal(outputs[index].sample, resident(**batch).sample)


class counted:  # noqa: N801  # used like a function
    def __init__(self, unit: Any, loads: Counter[str]) -> None:
        loads[unit.name] += 1

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_diffusers_still_has_what_loading_uses() -> None:
    model = diffusers.FluxTransformer2DModel
    assert model._no_split_modules == ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    assert hasattr(model, "_keep_in_fp32_modules")
    assert callable(model._fix_state_dict_keys_on_load)
    assert callable(model._set_default_torch_dtype)
    assert callable(modeling_utils.no_init_weights)
    assert "Transformer2DModel" in model_loading_utils._CLASS_REMAPPING_DICT
    assert callable(model_loading_utils._fetch_remapped_cls_from_config)


def saved_denoiser(directory: Path, **changed: Any) -> Path:
    kind: Any = diffusers.PixArtTransformer2DModel
    kind(
        num_layers=1, num_attention_heads=2, attention_head_dim=4, sample_size=8, caption_channels=8,
        cross_attention_dim=8,
    ).save_pretrained(directory)  # fmt: skip
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return directory


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "MyTransformer"}, "field _class_name: 'MyTransformer' is not a model of diffusers"),
        ({"_class_name": "DDPMScheduler"}, "field _class_name: 'DDPMScheduler' is not a model of diffusers"),
        ({"_class_name": 3}, "field _class_name: 3 is not a model of diffusers"),
        ({"_class_name": "FluxTransformer2DModel"}, "parameters of FluxTransformer2DModel are not in the checkpoint"),
        ({"quantization_config": {"quant_method": "gguf"}}, "field quantization_config: 'gguf'"),
        ({"quantization_config": {"quant_method": "onelayer"}}, "is an emulator; give the original model"),
        ({"num_layers": 10**7}, "describes more than 10000 modules"),
        ({"num_layers": 2}, "parameters of PixArtTransformer2DModel are not in the checkpoint"),
        ({"num_layers": "two"}, "no model can be built from it"),
        ({"caption_channels": 12}, "shape"),
    ],
)
def test_a_broken_component_is_refused_by_name(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_denoiser(tmp_path, **changed)
    with pytest.raises(InputError, match=message):
        load_all(tmp_path)


def load_all(directory: Path) -> None:
    streamed = StreamedModel(directory)
    for unit in streamed.units:
        streamed.weights.load(unit.held_names)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    saved_denoiser(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin: a pickle can run code"):
        StreamedModel(tmp_path)


def test_the_library_is_read_from_the_config(tmp_path: Path) -> None:
    assert library_of(saved_denoiser(tmp_path)).__name__.endswith("diffusers_models")  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_text('{"model_type": "llama", "_class_name": "old"}')
    assert library_of(tmp_path).__name__.endswith("transformers_models")  # type: ignore[attr-defined]
