"""Weights in integers with a zero point and a scale for each group of inputs: GPTQ and AWQ."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from onelayer.compiler.dequantize.packed import VALUES, PackedFormat, PackedTensor, Parts, UnsupportedError, require

if TYPE_CHECKING:
    import torch

WORD_BITS = 32
BITS = (2, 4, 8)


def _supported_bits(settings: Mapping[str, Any], supported: tuple[int, ...]) -> int:
    """Return the bits that a config.json names. Raises `UnsupportedError` if they do not fill whole words."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits not in supported:
        raise UnsupportedError(f"with {bits} bits")
    return int(bits)


def _shapes(parts: Parts) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of words, zeros and scales. Raises `ValueError` if a part is missing or not in words."""
    require({"zeros", "scale"} <= parts.keys(), "lacks qzeros or scales")
    require(parts[VALUES].dtype == parts["zeros"].dtype == "I32", f"is stored as {parts[VALUES].dtype}, not in words")
    return tuple(parts[part].shape for part in (VALUES, "zeros", "scale"))


class GroupedIntegers(PackedFormat):
    """Integers of `bits` bits with a zero point and a scale for each group of inputs."""

    bits: int

    @property
    def value_bits(self) -> float:
        """Bits on disk for each value; groups of 128 are usual."""
        return self.bits + (16 + self.bits) / 128


class Gptq(GroupedIntegers):
    """GPTQ: qweight (in / k, out) and qzeros (groups, out / k), k values in a word; scales (groups, out); g_idx (in).

    `g_idx` gives the group of each input, which the order of activations may mix. Version 1 of the format stores zero
    points less one. A mixed checkpoint has other bits in some modules, so the bits of each are those of its shapes.
    """

    endings: ClassVar[Mapping[str, str]] = {
        ".qweight": VALUES,
        ".qzeros": "zeros",
        ".scales": "scale",
        ".g_idx": "groups",
    }

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.bits = _supported_bits(settings, BITS)
        version = settings.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedError(f"in the layout {version!r}")
        self.zero_offset = int(version == "gptq")

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return (out, in)."""
        words, zeros, scales = _shapes(parts)
        require(len(words) == len(zeros) == len(scales) == 2 and words[1] > 0, f"has qweight {words}, scales {scales}")
        bits = WORD_BITS * zeros[1] // words[1]
        require(bits in BITS, f"has qweight {words} and qzeros {zeros}, which makes {bits} bits")
        inputs, outputs = words[0] * WORD_BITS // bits, words[1]
        fits = scales == (zeros[0], outputs) and zeros[1] * WORD_BITS == outputs * bits
        require(fits and scales[0] > 0, f"has qweight {words}, qzeros {zeros} and scales {scales}")
        groups = parts.get("groups")
        require(groups is None or groups.shape == (inputs,), f"has {inputs} inputs, and not as many in g_idx")
        require(groups is not None or inputs % scales[0] == 0, f"has {inputs} inputs in {scales[0]} groups")
        return (outputs, inputs)

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Return (values - zeros) * scales, transposed."""
        import torch

        from onelayer.compiler.dequantize import numerics

        inputs, words = info.shape[1], tensors[VALUES]
        bits = WORD_BITS * words.shape[0] // inputs
        zeros = numerics.unpack_words(tensors["zeros"], bits, 1) + self.zero_offset
        groups = tensors.get("groups")
        if groups is None:
            groups = torch.arange(inputs) // (inputs // len(zeros))
        require(bool(((groups >= 0) & (groups < len(zeros))).all()), f"g_idx names a group beyond {len(zeros)}")

        def values(start: int, stop: int) -> torch.Tensor:
            return numerics.unpack_words(words[start * bits // WORD_BITS : stop * bits // WORD_BITS], bits, 0)

        return numerics.scale_groups(values, zeros, tensors["scale"], groups.long(), dtype)


class Awq(GroupedIntegers):
    """AWQ: qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out); 8 outputs interleaved in a word."""

    endings: ClassVar[Mapping[str, str]] = {".qweight": VALUES, ".qzeros": "zeros", ".scales": "scale"}
    # Where the outputs 0, 1, ... of a word lie, from its lowest bits on.
    order: ClassVar[tuple[int, ...]] = (0, 4, 1, 5, 2, 6, 3, 7)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.bits = _supported_bits(settings, (4,))
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise UnsupportedError(f"in the layout {version!r}")

    def shape(self, name: str, parts: Parts) -> tuple[int, ...]:
        """Return (out, in)."""
        words, zeros, scales = _shapes(parts)
        fits = len(words) == len(zeros) == len(scales) == 2 and scales[1] == len(self.order) * words[1]
        fits = fits and zeros == (scales[0], words[1]) and scales[0] > 0 and words[0] % scales[0] == 0
        require(fits, f"has qweight {words}, qzeros {zeros} and scales {scales}")
        return (scales[1], words[0])

    def unpack(self, info: PackedTensor, tensors: Mapping[str, "torch.Tensor"], dtype: "torch.dtype") -> "torch.Tensor":
        """Return (values - zeros) * scales, transposed."""
        import torch

        from onelayer.compiler.dequantize import numerics

        zeros = numerics.unpack_words(tensors["zeros"], self.bits, 1, self.order)
        groups = torch.arange(info.shape[1]) // (info.shape[1] // len(zeros))

        def values(start: int, stop: int) -> torch.Tensor:
            return numerics.unpack_words(tensors[VALUES][start:stop], self.bits, 1, self.order)

        return numerics.scale_groups(values, zeros, tensors["scale"], groups, dtype)
