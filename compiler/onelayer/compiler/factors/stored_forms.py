"""How an emulator's factors may be stored, by name, and the bytes they take: arithmetic alone, torch-free."""

from collections.abc import Mapping
from typing import Literal, get_args

from onelayer.compiler.errors import InputError

# `None` in their place stands for the original's own dtype, unpacked.
FactorDtype = Literal["bf16", "int8", "nf4"]
# This many neighbors of a row share one scale, a bfloat16, which has the range of float32.
BLOCK, SCALE_BYTES = 64, 2
BITS = {"bf16": 16, "int8": 8, "nf4": 4}
INSTALL = "nf4 factors need bitsandbytes: pip install 'onelayer[quantized]', or choose --factor-dtype int8"
# Factors that keep this share of all values lose little to what they leave out: then precision is worth more than rank.
NEARLY_ALL = 0.85
# A budget in bytes is a share of what the linears take at this size, whatever the dtype they are stored in.
REFERENCE_BYTES = 2
DEFAULT_KEEP_BYTES = 0.25


def is_blockwise(factor_dtype: FactorDtype) -> bool:
    """Whether values share a scale: `bf16` is merely rounded."""
    return factor_dtype != "bf16"


def row_bytes(width: int, factor_dtype: FactorDtype) -> int:
    """Bytes of one packed row of `width` values: its codes, filled up to whole blocks, and a scale for each block."""
    if not is_blockwise(factor_dtype):
        return 2 * width
    blocks = -(-width // BLOCK)
    return blocks * (BLOCK * BITS[factor_dtype] // 8 + SCALE_BYTES)


def bytes_per_value(factor_dtype: FactorDtype) -> float:
    """Return the bytes of a value in rows of whole blocks: 2 for bf16, 1.03125 for int8, 0.53125 for nf4."""
    return row_bytes(BLOCK, factor_dtype) / BLOCK


def linear_bytes(
    out_features: int, in_features: int, rank: int | None, factor_dtype: FactorDtype | None, dtype_bytes: int
) -> int:
    """What a linear of an emulator takes: its factors, or its whole weight where `rank` is None."""
    if factor_dtype is None:
        return dtype_bytes * (out_features * in_features if rank is None else rank * (out_features + in_features))
    if rank is None:
        return out_features * row_bytes(in_features, factor_dtype)
    return rank * (row_bytes(out_features, factor_dtype) + row_bytes(in_features, factor_dtype))


def keep_ratio(keep_bytes: float, factor_dtype: FactorDtype | None, dtype_bytes: int) -> float:
    """The share of each linear's values, at most 1, that fits into `keep_bytes`: a share of its bytes at 16 bits.

    `dtype_bytes` per value are what factors take where `factor_dtype` is None.
    """
    return min(
        1.0, keep_bytes * REFERENCE_BYTES / (dtype_bytes if factor_dtype is None else bytes_per_value(factor_dtype))
    )


def best_of(ratios: Mapping[FactorDtype, float | None]) -> FactorDtype:
    """Return the dtype that rounds least and still keeps nearly all values, from the ratio that each affords.

    If none does, nf4: in the same bytes its factors were the best at every size that was measured
    (manifests/LOG.md, emulators of equal bytes), so precision is bought only when there is no rank left to buy. Where
    int8 keeps all, it goes before a bf16 that does not: its rounding costs less than a twentieth of the values does.
    """
    if (ratios.get("int8") or 0.0) >= 1.0:
        return "int8"
    return next((factor_dtype for factor_dtype, ratio in ratios.items() if (ratio or 0.0) >= NEARLY_ALL), "nf4")


def best_factor_dtype(keep_bytes: float) -> FactorDtype:
    """The best dtype for factors of `keep_bytes`."""
    kinds: tuple[FactorDtype, ...] = get_args(FactorDtype)
    return best_of({factor_dtype: keep_ratio(keep_bytes, factor_dtype, REFERENCE_BYTES) for factor_dtype in kinds})


def within_bytes(
    keep_bytes: float, factor_dtype: FactorDtype | None, dtype_bytes: int
) -> tuple[float, FactorDtype | None]:
    """The ratio that takes a share of bytes, and the dtype: `factor_dtype`, or the best where none was given."""
    factor_dtype = factor_dtype or best_factor_dtype(keep_bytes)
    return keep_ratio(keep_bytes, factor_dtype, dtype_bytes), factor_dtype


def known_factor_dtype(name: str | None) -> FactorDtype | None:
    """`name` as one of the packed forms; None where it is none of them."""
    kinds: tuple[FactorDtype, ...] = get_args(FactorDtype)
    return next((factor_dtype for factor_dtype in kinds if factor_dtype == name), None)


def checked_factor_dtype(name: str | None) -> FactorDtype | None:
    """Check the name of a factor dtype; None stays None. Raises `InputError` for an unknown one."""
    if name is not None and known_factor_dtype(name) is None:
        raise InputError(f"--factor-dtype {name}: is none of {', '.join(get_args(FactorDtype))}")
    return known_factor_dtype(name)


# What no factor holds is stored with this many bits a value. With two, the gradient's cosine at a rank of 1/8 rises
# from 0.81 to 0.98 on a trained model, and LoRA ends where it ends without compression (manifests/LOG.md).
RESIDUAL_BITS = 2
RESIDUAL_CHOICES = (0, 1, 2, 4)  # as many as divide a byte


def residual_bytes(rows: int, features: int, bits: int) -> int:
    """Codes, and a scale of two bytes per row and per column."""
    return rows * -(-features * bits // 8) + 2 * (rows + features) if bits else 0


def factored_bytes(rows: int, features: int, rank: int, bits: int) -> int:
    """(T, k) in bytes with a scale of two bytes per row, (k, n) in two bytes with one of four per row, the residual."""
    return rank * (rows + 2 * features + 4) + 2 * rows + residual_bytes(rows, features, bits)


def is_factored(rows: int, features: int, rank: int, bits: int, exact_bytes: int) -> bool:
    """Whether a matrix is stored so, and not as it is in `exact_bytes`: only where that is smaller."""
    return rank < min(rows, features) and factored_bytes(rows, features, rank, bits) < exact_bytes
