"""Damaged and mislabeled files of every format: one line that names the file and the weight, before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import quantized_models as packers
from helpers.tiny_models import save_tiny
from onelayer.compiler.errors import InputError
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.runtime import plan_run

Q = "model.layers.0.self_attn.q_proj."
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj_"
Stored = dict[str, torch.Tensor]


def save(path: Path, form: str) -> None:
    settings: dict[str, Any]
    if form == "fp8":
        packers.save_quantized(path, "llama", packers.fp8_settings(24, 20), packers.fp8_block(24, 20))
    elif form == "gptq":
        packers.save_quantized(path, "llama", packers.gptq_settings(4, 16), packers.gptq(4, 16))
    elif form == "awq":
        packers.save_quantized(path, "llama", {"quant_method": "awq", "bits": 4}, packers.awq(16))
    elif form == "mxfp4":
        settings = {"quant_method": "mxfp4"}
        packers.save_quantized(path, "gpt_oss_wide", settings, packers.mxfp4, is_packed=packers.is_expert_stack)
    elif form == "int4":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
        settings = packers.compressed_settings("pack-quantized", **weights)
        packers.save_quantized(path, "llama", settings, packers.compressed_int4)
    else:
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        packers.save_quantized(path, "llama", settings, packers.row_fp8)


def change(path: Path, edit: Callable[[Stored], Any]) -> None:
    stored = load_file(path / "model.safetensors")
    edit(stored)
    save_file({name: part.contiguous() for name, part in stored.items()}, path / "model.safetensors", {"format": "pt"})


def put(name: str, tensor: torch.Tensor) -> Callable[[Stored], Any]:
    return lambda stored: stored.update({name: tensor})


def drop(*names: str) -> Callable[[Stored], Any]:
    return lambda stored: [stored.pop(name) for name in names]


def state(text: str) -> Callable[[Stored], Any]:
    """Make one weight look like 4 bits of bitsandbytes, with some state."""

    def edit(stored: Stored) -> None:
        for name in [name for name in stored if name.endswith("weight_scale")]:
            module = name.removesuffix("weight_scale")
            del stored[name]
            stored[f"{module}weight"] = torch.zeros(512, 1, dtype=torch.uint8)
            stored[f"{module}weight.absmax"] = torch.zeros(16)
            raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
            stored[f"{module}weight.quant_state.bitsandbytes__nf4"] = raw

    return edit


FAULTS: dict[str, tuple[str, Callable[[Stored], Any], str]] = {
    "no scale": ("fp8", drop(f"{Q}weight_scale_inv"), f"weight '{Q}weight': has no scale"),
    "scales of another shape": ("fp8", put(f"{Q}weight_scale_inv", torch.ones(3, 5)), "its scales (3, 5)"),
    "no scales at all": ("fp8", put(f"{Q}weight_scale_inv", torch.ones(0, 2)), "its scales (0, 2)"),
    "integers as values": ("fp8", put(f"{Q}weight", torch.ones(32, 32, dtype=torch.int32)), "is stored as I32"),
    "gptq without zeros": ("gptq", drop(f"{Q}qzeros"), "lacks qzeros or scales"),
    "gptq of odd shapes": ("gptq", put(f"{Q}qzeros", torch.ones(2, 3, dtype=torch.int32)), "which makes 3 bits"),
    "gptq with few groups": ("gptq", put(f"{Q}g_idx", torch.zeros(5, dtype=torch.int32)), "not as many in g_idx"),
    "gptq of floats": ("gptq", put(f"{Q}qweight", torch.ones(4, 32)), "is stored as F32, not in words"),
    "awq of odd shapes": ("awq", put(f"{Q}scales", torch.ones(3, 32)), "and scales (3, 32)"),
    "mxfp4 without scales": ("mxfp4", drop(f"{EXPERTS}scales"), "has no scales"),
    "mxfp4 of odd blocks": (
        "mxfp4",
        put(f"{EXPERTS}blocks", torch.ones(4, 128, 1, 8, dtype=torch.uint8)),
        "has blocks (4, 128, 1, 8)",
    ),
    "a false weight_shape": (
        "int4",
        put(f"{Q}weight_shape", torch.tensor([32, 1 << 40])),
        "has weight_shape (32, 10995",
    ),
    "no weight_shape": ("int4", drop(f"{Q}weight_shape"), "lacks weight_shape"),
    "a state that is no JSON": ("bitsandbytes", state("{"), "a quant_state that is no table with a shape"),
    "a state of a huge shape": ("bitsandbytes", state(json.dumps({"shape": [1 << 30, 1 << 30]})), "not as stored"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_in_one_line_before_any_work(name: str, tmp_path: Path) -> None:
    form, edit, reason = FAULTS[name]
    save(tmp_path, form)
    change(tmp_path, edit)
    for open_it in (StreamedModel, lambda path: plan_run(path, 1 << 30)):
        with pytest.raises(InputError) as caught:
            open_it(tmp_path)
        message = str(caught.value)
        assert reason in message or "missing: pip install" in message
        assert "\n" not in message


def test_a_group_beyond_the_last_is_named_when_it_is_read(tmp_path: Path) -> None:
    save(tmp_path, "gptq")
    change(tmp_path, put(f"{Q}g_idx", torch.full((32,), 7, dtype=torch.int32)))
    checkpoint = StreamedModel(tmp_path).checkpoint
    with pytest.raises(
        InputError, match=r"model.safetensors: weight '.*q_proj.weight': .*g_idx names a group beyond 2"
    ):
        checkpoint.read(f"{Q}weight")


def test_a_weight_of_another_shape_than_the_config_is_named(tmp_path: Path) -> None:
    save(tmp_path, "fp8")
    packers.edit_config(tmp_path, intermediate_size=80)
    streamed = StreamedModel(tmp_path)
    unit = next(unit for unit in streamed.units if unit.is_block)
    with pytest.raises(InputError, match=r"mlp.* does not fit the config's \((80, 32|32, 80)\)"):
        streamed.weights.load(unit.held_names)


def test_settings_that_make_no_sense_are_named(tmp_path: Path) -> None:
    save(tmp_path, "fp8")
    for settings in ({"weight_block_size": "x"}, {"weight_block_size": [0, 16]}):
        packers.edit_config(tmp_path, quantization_config={"quant_method": "fp8", **settings})
        with pytest.raises(InputError, match=r"config.json: field quantization_config: fp8: .*; restore the file"):
            StreamedModel(tmp_path)


LABELS: dict[str, dict[str, Any]] = {
    "fp8": packers.fp8_settings(24, 20),
    "mxfp4": {"quant_method": "mxfp4"},
    "gptq": packers.gptq_settings(4, 16),
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": packers.compressed_settings("pack-quantized", num_bits=4, type="int"),
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torchao": {"quant_method": "torchao"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_over_plain_weights_is_refused(label: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    packers.edit_config(tmp_path, quantization_config=LABELS[label])
    for open_it in (StreamedModel, lambda path: plan_run(path, 1 << 30)):
        with pytest.raises(InputError) as caught:
            open_it(tmp_path)
        message = str(caught.value)
        said = f"says {label!r}, but no weight is packed so; remove the field if the weights are plain, or"
        assert message.startswith(f"{tmp_path / 'config.json'}: field quantization_config: ")
        assert said in message or "missing: pip install" in message


@pytest.mark.parametrize(("form", "label"), [("gptq", "fp8"), ("fp8", "gptq"), ("awq", "mxfp4"), ("mxfp4", "awq")])
def test_a_label_of_another_format_is_refused(form: str, label: str, tmp_path: Path) -> None:
    save(tmp_path, form)
    packers.edit_config(tmp_path, quantization_config=LABELS[label])
    with pytest.raises(InputError, match=rf"config.json: field quantization_config: says '{label}', but no weight"):
        StreamedModel(tmp_path)


@pytest.mark.parametrize("form", ["fp8", "gptq", "awq", "mxfp4", "int4"])
def test_a_truncated_file_is_named(form: str, tmp_path: Path) -> None:
    save(tmp_path, form)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: .*download the file again") as caught:
        StreamedModel(tmp_path)
    assert "\n" not in str(caught.value)
