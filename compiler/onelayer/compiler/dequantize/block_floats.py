"""Weights in 8- and 4-bit floats with scales for blocks of values: FP8, MXFP8, MXFP4."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from onelayer.compiler.dequantize.packed import VALUES, PackedFormat, PackedTensor, Parts, require

if TYPE_CHECKING:
    import torch

FP8_NAMES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
MXFP4_BLOCK = 32


class BlockFp8(PackedFormat):
    """FP8 of DeepSeek-V3 and others: a scale for each block of (rows, columns), the last of which may be partial.

    A scale may also be one for the whole weight. Some mixtures have experts in 4-bit floats, two in a byte.
    """

    endings: ClassVar[Mapping[str, str]] = {
        ".weight": VALUES,
        ".weight_scale_inv": "scale",
        ".scale": "scale",
        ".qscale_weight": "scale",
        ".activation_scale": "activation_scale",
        ".qscale_act": "activation_scale",
    }

    def __init__(self, settings: Mapping[str, Any]) -> None:
        block = settings.get("weight_block_size")
        self.block = (int(block[0]), int(block[1])) if block else None
        require(self.block is None or min(self.block) > 0, f"weight_block_size is {block}")

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value, with its share of the scales."""
        return 8 + (32 / (self.block[0] * self.block[1]) if self.block else 0)

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values, which are twice as wide as stored if they have 4 bits."""
        values = parts[VALUES]
        require(values.dtype in (*FP8_NAMES, "I8"), f"is stored as {values.dtype}, not in 8-bit floats")
        require("scale" in parts, "has no scale")
        shape = (*values.shape[:-1], (2 if values.dtype == "I8" else 1) * values.shape[-1])
        require(len(shape) in (2, 3), f"has {len(shape)} dimensions")
        self._block(shape, parts["scale"].shape)
        return shape

    def _block(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Return rows and columns of a block, from the grid of scales.

        The configured block goes first: 192 rows in blocks of 128 have two scales, and so would 192 rows in blocks of
        96.
        """
        rows, columns = shape[-2:]
        if max(scales, default=1) == 1 and len(scales) < 3:
            return rows, columns
        require(len(scales) == len(shape) and scales[:-2] == shape[:-2], f"has {shape}, its scales {scales}")
        if self.block is not None and all(
            count == -(-side // size)
            for count, side, size in zip(scales[-2:], (rows, columns), self.block, strict=True)
        ):
            return self.block
        require(
            0 not in scales and not (rows % scales[-2] or columns % scales[-1]), f"has {shape}, its scales {scales}"
        )
        return rows // scales[-2], columns // scales[-1]

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Return values times scales, in float32 and then rounded to `dtype`."""
        from onelayer.compiler.dequantize import numerics

        scales = numerics.scale_values(tensors["scale"])
        block = self._block(info.shape, tuple(scales.shape))
        grid = scales.reshape(1, 1) if scales.numel() == 1 else scales
        return numerics.scale_blocks(tensors[VALUES], grid, block, info.shape, dtype)


class RowFp8(PackedFormat):
    """FP8 of fbgemm: a scale for each output."""

    endings: ClassVar[Mapping[str, str]] = {".weight": VALUES, ".weight_scale": "scale", ".input_scale_ub": "bound"}

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take no settings: the format has none that concern weights."""

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value."""
        return 8

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the values."""
        values = parts[VALUES]
        require(values.dtype in FP8_NAMES, f"is stored as {values.dtype}, not in 8-bit floats")
        require("scale" in parts, "has no scale")
        scales = parts["scale"].shape
        fits = len(values.shape) == 2 and scales in ((values.shape[0], 1), values.shape[:1])
        require(fits, f"has {values.shape}, its scales {scales}")
        return values.shape

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Return values times scales, in float32 and then rounded to `dtype`."""
        from onelayer.compiler.dequantize import numerics

        scales = numerics.scale_values(tensors["scale"]).reshape(-1, 1)
        return numerics.scale_blocks(tensors[VALUES], scales, (1, info.shape[1]), info.shape, dtype)


class Mxfp4(PackedFormat):
    """MXFP4 of gpt-oss: stacks of experts (E, out, blocks, 16) of two 4-bit floats in a byte, a power of 2 for 32."""

    endings: ClassVar[Mapping[str, str]] = {"_blocks": VALUES, "_scales": "scale"}
    plain_ending: ClassVar[str] = ""
    packs_only_experts: ClassVar[bool] = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take no settings: the format has none."""

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value, with its share of the scales."""
        return 4 + 8 / MXFP4_BLOCK

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return (E, in, out), as the class multiplies."""
        require("scale" in parts, "has no scales")
        blocks, scales = parts[VALUES].shape, parts["scale"].shape
        dtypes = {part.dtype for part in parts.values()}
        require(dtypes == {"U8"}, f"is stored as {'/'.join(sorted(dtypes))}, not in bytes")
        require(
            len(blocks) == 4 and blocks[3] == MXFP4_BLOCK // 2 and scales == blocks[:3],
            f"has blocks {blocks} and scales {scales}",
        )
        return (blocks[0], MXFP4_BLOCK * blocks[2], blocks[1])

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Unpack one expert after the other."""
        from onelayer.compiler.dequantize import numerics

        return numerics.unpack_experts(tensors[VALUES], tensors["scale"], dtype)
