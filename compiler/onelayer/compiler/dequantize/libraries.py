"""Weights that other libraries pack and unpack: bitsandbytes, compressed-tensors, torchao.

Used here, and nowhere else: `QuantState.from_dict` and `dequantize_4bit` of bitsandbytes; `BaseCompressor` and
`QuantizationConfig` of compressed-tensors; `unflatten_tensor_state_dict` of torchao.
`tests/compiler/dequantize/test_libraries.py` shows which one broke.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from onelayer.compiler.dequantize.packed import (
    VALUES,
    PackedFormat,
    PackedTensor,
    Parts,
    UnsupportedError,
    require,
    small_bytes,
)

if TYPE_CHECKING:
    import torch

_STATE = ".weight.quant_state.bitsandbytes__"


class BitsAndBytes(PackedFormat):
    """bitsandbytes: 4-bit codes (nf4, fp4) with a scale for each block, or int8 with one for each output.

    The state of 4-bit codes is JSON in bytes, which has the shape.
    """

    library: ClassVar[str] = "bitsandbytes"
    endings: ClassVar[Mapping[str, str]] = {
        ".weight": VALUES,
        ".weight.absmax": "absmax",
        ".weight.quant_map": "quant_map",
        ".weight.nested_absmax": "nested_absmax",
        ".weight.nested_quant_map": "nested_quant_map",
        f"{_STATE}nf4": "quant_state.bitsandbytes__nf4",
        f"{_STATE}fp4": "quant_state.bitsandbytes__fp4",
        ".SCB": "scale",
        ".weight_format": "layout",
    }

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.bits = 4 if settings.get("load_in_4bit") else 8

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value, with scales in float32 for blocks of 64."""
        return 4.5 if self.bits == 4 else 8

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return (out, in)."""
        values = parts[VALUES]
        if "scale" in parts:
            require(values.dtype == "I8" and len(values.shape) == 2, f"is stored as {values.dtype} {values.shape}")
            require(parts["scale"].shape == values.shape[:1], f"has {values.shape[0]} rows, not as many scales")
            return values.shape
        state = next((info for part, info in parts.items() if part.startswith("quant_state")), None)
        if state is None or "absmax" not in parts:
            raise ValueError("lacks its quant_state or absmax")
        try:
            document = json.loads(small_bytes(state))
            shape = tuple(int(side) for side in document["shape"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError("has a quant_state that is no table with a shape") from None
        values_stored = 2 * values.size_bytes
        require(len(shape) == 2 and prod(shape) in (values_stored, values_stored - 1), f"has {shape}, not as stored")
        return shape

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Unpack by the library, or as LLM.int8() defines it: the scale is each row's largest absolute value."""
        import torch

        if "scale" in tensors:
            return (tensors[VALUES].float() * tensors["scale"].float()[:, None] / 127).to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        packed = {part: tensor for part, tensor in tensors.items() if part != VALUES}
        state = QuantState.from_dict(packed, device=torch.device("cpu"))
        return dequantize_4bit(tensors[VALUES], state).reshape(info.shape).to(dtype)

    scratch_value_bytes: ClassVar[int] = 8


class CompressedTensors(PackedFormat):
    """compressed-tensors, as llm-compressor and others write it: integers or floats of 4 and 8 bits."""

    library: ClassVar[str] = "compressed-tensors"
    endings: ClassVar[Mapping[str, str]] = {
        ".weight": VALUES,
        ".weight_packed": VALUES,
        ".weight_scale": "weight_scale",
        ".weight_zero_point": "weight_zero_point",
        ".weight_global_scale": "weight_global_scale",
        ".weight_shape": "weight_shape",
        ".weight_g_idx": "weight_g_idx",
        ".input_scale": "input_scale",
        ".input_zero_point": "input_zero_point",
        ".input_global_scale": "input_global_scale",
    }
    known: ClassVar[tuple[str, ...]] = (
        "dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized",
        "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
    )  # fmt: skip
    # The library unpacks a weight whole: words, integers, and floats before they are rounded.
    scratch_value_bytes: ClassVar[int] = 16

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        groups = [group for group in settings["config_groups"].values() if isinstance(group, dict)]
        for form in {settings.get("format", "dense"), *(group.get("format") for group in groups)} - {None}:
            if form not in self.known:
                raise UnsupportedError(f"in the layout {form!r}")
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise UnsupportedError("with sparsity")
        if settings.get("transform_config"):
            raise UnsupportedError("with rotations")
        bits = [(group.get("weights") or {}).get("num_bits", 16) for group in groups]
        self.bits = float(bits[0]) if bits else 16.0

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value; groups of 32 are usual for 4-bit floats, of 128 for integers."""
        return self.bits + (0.5 if self.bits == 4 else 0)

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return (out, in): as recorded, else that of the values, or twice as wide for 4-bit floats in bytes."""
        values = parts[VALUES]
        require("weight_scale" in parts, "has no weight_scale")
        require(len(values.shape) == 2, f"has {len(values.shape)} dimensions")
        rows, columns = values.shape
        if not values.name.endswith("_packed"):
            return (rows, columns)
        if values.dtype == "U8":
            return (rows, 2 * columns)
        recorded = parts.get("weight_shape")
        if recorded is None or recorded.dtype != "I64" or recorded.shape != (2,):
            raise ValueError("lacks weight_shape")
        raw = small_bytes(recorded)
        shape = tuple(int.from_bytes(raw[start : start + 8], "little", signed=True) for start in (0, 8))
        fits = values.dtype == "I32" and shape[0] == rows and 32 * (columns - 1) < 8 * shape[1] and shape[1] > 0
        require(fits and shape[1] <= 32 * columns, f"has weight_shape {shape} and {values.dtype} {values.shape}")
        return shape

    @cached_property
    def _config(self) -> Any:
        config_class: Any = import_module("compressed_tensors.quantization").QuantizationConfig
        fields = config_class.model_fields.keys()
        return config_class.model_validate({k: v for k, v in self.settings.items() if k in fields})

    def _scheme(self, module: str) -> Any:
        """Return the scheme of a module: that of the group that names it, else that of the first general group."""
        schemes = list(self._config.config_groups.values())
        for scheme in schemes:
            if any(_names(target, module) for target in scheme.targets):
                return scheme
        return next((scheme for scheme in schemes if any("re:" not in target for target in scheme.targets)), schemes[0])

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Unpack by the library."""
        scheme = self._scheme(info.name.removesuffix(".weight"))
        form = scheme.format or self._config.format
        compressors: Any = import_module("compressed_tensors.compressors")
        compressor = compressors.BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        packed = tensors[VALUES].shape != info.shape
        state = {**tensors, "weight_packed" if packed else "weight": tensors[VALUES]}
        del state[VALUES]
        weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
        require(tuple(weight.shape) == info.shape, f"unpacks to {tuple(weight.shape)}, not {info.shape}")
        return weight.to(dtype)


def _names(target: str, module: str) -> bool:
    """Whether a target names a module, as itself or by a regular expression; others name classes."""
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


class TorchAo(PackedFormat):
    """torchao: tensor classes that a safetensors header describes; those of 8 bits are as large as the weight."""

    library: ClassVar[str] = "torchao"
    endings: ClassVar[Mapping[str, str]] = {
        "._weight_qdata": VALUES,
        "._weight_scale": "scale",
        "._weight_zero_point": "zero_point",
        "._weight_act_pre_scale": "act_pre_scale",
    }
    classes: ClassVar[tuple[str, ...]] = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
    scratch_value_bytes: ClassVar[int] = 16

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take no settings: the header describes each tensor."""

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value."""
        return 8

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values."""
        try:
            kind = json.loads(self.described[name])["_type"]
        except (KeyError, ValueError, TypeError, RecursionError):
            raise ValueError("is not described in the header of its file") from None
        require(kind in self.classes, f"is a torchao {str(kind)[:40]}, which cannot be unpacked")
        return parts[VALUES].shape

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Unpack by the library."""
        support: Any = import_module("torchao.prototype.safetensors.safetensors_support")
        stem = info.name.removesuffix("weight")
        parts = {"qdata" if part == VALUES else part: tensor for part, tensor in tensors.items()}
        stored = {f"{stem}_weight_{part}": tensor for part, tensor in parts.items()}
        described = {"tensor_names": json.dumps([info.name]), info.name: self.described[info.name]}
        weight: torch.Tensor = support.unflatten_tensor_state_dict(stored, described)[0][info.name].dequantize()
        require(tuple(weight.shape) == info.shape, f"unpacks to {tuple(weight.shape)}, not {info.shape}")
        return weight.to(dtype)
