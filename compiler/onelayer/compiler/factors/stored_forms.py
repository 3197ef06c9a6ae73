"""The forms in which factors and activations can be stored, and their sizes in bytes: arithmetic only, torch-free."""

from collections.abc import Mapping
from typing import Literal, get_args

from onelayer.compiler.errors import InputError

# `None` instead of a name means the original's own dtype, not quantized.
FactorDtype = Literal["bf16", "int8", "nf4"]
FACTOR_DTYPES: tuple[FactorDtype, ...] = get_args(FactorDtype)
# This many neighbors in a row share one bfloat16 scale, which has the range of float32.
BLOCK, SCALE_BYTES = 64, 2
BITS = {"bf16": 16, "int8": 8, "nf4": 4}
INSTALL = "nf4 factors need bitsandbytes: pip install 'onelayer[quantized]', or choose --factor-dtype int8"
# Factors that keep this share of all values lose little to what they leave out. Precision is then worth more than rank.
NEARLY_ALL = 0.85
# A budget in bytes is a share of the linears' size at this many bytes a value, whatever dtype they are stored in.
REFERENCE_BYTES = 2
DEFAULT_KEEP_BYTES = 0.25


def is_blockwise(factor_dtype: FactorDtype) -> bool:
    """Return whether values share a scale; `bf16` is only rounded."""
    return factor_dtype != "bf16"


def row_bytes(width: int, factor_dtype: FactorDtype) -> int:
    """Bytes of one quantized row of `width` values: codes, padded to whole blocks, and one scale per block."""
    if not is_blockwise(factor_dtype):
        return 2 * width
    blocks = -(-width // BLOCK)
    return blocks * (BLOCK * BITS[factor_dtype] // 8 + SCALE_BYTES)


def bytes_per_value(factor_dtype: FactorDtype) -> float:
    """Bytes per value in rows of whole blocks: 2 for bf16, 1.03125 for int8, 0.53125 for nf4."""
    return row_bytes(BLOCK, factor_dtype) / BLOCK


def kept_values(out_features: int, in_features: int, rank: int | None) -> int:
    """Count the values of a linear's factors, or of its whole weight if `rank` is None."""
    return out_features * in_features if rank is None else rank * (out_features + in_features)


def linear_bytes(
    out_features: int, in_features: int, rank: int | None, factor_dtype: FactorDtype | None, dtype_bytes: int
) -> int:
    """Bytes of a linear of an emulator: of its factors, or of its whole weight if `rank` is None."""
    if factor_dtype is None:
        return dtype_bytes * kept_values(out_features, in_features, rank)
    if rank is None:
        return out_features * row_bytes(in_features, factor_dtype)
    return rank * (row_bytes(out_features, factor_dtype) + row_bytes(in_features, factor_dtype))


def keep_ratio(keep_bytes: float, factor_dtype: FactorDtype | None, dtype_bytes: int) -> float:
    """The share of each linear's values, at most 1, that fits into `keep_bytes`, a share of its size at 16 bits.

    Factors take `dtype_bytes` per value if `factor_dtype` is None.
    """
    return min(
        1.0, keep_bytes * REFERENCE_BYTES / (dtype_bytes if factor_dtype is None else bytes_per_value(factor_dtype))
    )


def best_of(ratios: Mapping[FactorDtype, float | None]) -> FactorDtype:
    """Choose a dtype by the ratio that each affords: the first that keeps nearly all values.

    `ratios` list the dtypes that round least first. If none keeps nearly all, choose nf4: at equal bytes its factors
    were best at every size measured (manifests/LOG.md, emulators of equal bytes), so bytes go to precision only when no
    rank is left to add. If int8 keeps all values it goes before a bf16 that does not: its rounding costs less than
    dropping a twentieth of the values.
    """
    if (ratios.get("int8") or 0.0) >= 1.0:
        return "int8"
    return next((name for name, ratio in ratios.items() if (ratio or 0.0) >= NEARLY_ALL), "nf4")


def best_factor_dtype(keep_bytes: float) -> FactorDtype:
    """Choose the best dtype for factors of `keep_bytes`."""
    return best_of({name: keep_ratio(keep_bytes, name, REFERENCE_BYTES) for name in FACTOR_DTYPES})


def within_bytes(
    keep_bytes: float, factor_dtype: FactorDtype | None, dtype_bytes: int
) -> tuple[float, FactorDtype | None]:
    """Return the ratio that fits a share of bytes, and the dtype: `factor_dtype`, or the best if none is given."""
    factor_dtype = factor_dtype or best_factor_dtype(keep_bytes)
    return keep_ratio(keep_bytes, factor_dtype, dtype_bytes), factor_dtype


def known_factor_dtype(name: str | None) -> FactorDtype | None:
    """Return `name` as one of the quantized forms, or None if it is none of them."""
    return next((factor_dtype for factor_dtype in FACTOR_DTYPES if factor_dtype == name), None)


def checked_factor_dtype(name: str | None) -> FactorDtype | None:
    """Return the quantized form that was asked for, None for none. Raises `InputError` for an unknown name."""
    if name is not None and known_factor_dtype(name) is None:
        raise InputError(f"--factor-dtype {name}: is none of {', '.join(FACTOR_DTYPES)}")
    return known_factor_dtype(name)


# The part of an activation that its factors leave out is stored with this many bits a value. With two, the gradient's
# cosine at a rank of 1/8 rises from 0.81 to 0.98 on a trained model, and LoRA ends where it ends without compression
# (manifests/LOG.md).
RESIDUAL_BITS = 2
RESIDUAL_CHOICES = (0, 1, 2, 4)  # numbers that divide a byte
# Offsets of anchored training with this many bits a value are float32, not coded.
EXACT_BITS = 32


def residual_bytes(rows: int, features: int, bits: int) -> int:
    """Bytes of a residual: its codes, and a scale of two bytes per row and per column."""
    return rows * -(-features * bits // 8) + 2 * (rows + features) if bits else 0


def factored_bytes(rows: int, features: int, rank: int, bits: int) -> int:
    """Bytes of activation factors and their residual.

    (T, k) takes a byte a value and two bytes per row, (k, n) two bytes a value and four per row.
    """
    return rank * (rows + 2 * features + 4) + 2 * rows + residual_bytes(rows, features, bits)


def is_factored(rows: int, features: int, rank: int, bits: int, exact_bytes: int) -> bool:
    """Return whether a matrix is stored as factors: only if they are smaller than its own `exact_bytes`."""
    return rank < min(rows, features) and factored_bytes(rows, features, rank, bits) < exact_bytes
