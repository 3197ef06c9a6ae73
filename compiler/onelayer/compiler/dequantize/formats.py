"""The formats of quantized originals by the name that config.json gives; what is not listed is refused by name.

In: the `quantization_config` of a model. Out: how its weights are packed. Torch-free.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onelayer.compiler.dequantize.block_floats import BlockFp8, Mxfp4, RowFp8
from onelayer.compiler.dequantize.integers import Awq, Gptq
from onelayer.compiler.dequantize.libraries import BitsAndBytes, CompressedTensors, TorchAo
from onelayer.compiler.dequantize.packed import PackedFormat, UnsupportedError
from onelayer.compiler.errors import InputError

FORMATS: dict[str, Callable[[Mapping[str, Any]], PackedFormat]] = {
    "fp8": BlockFp8,
    "mxfp8": BlockFp8,
    "mxfp4": Mxfp4,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "torchao": TorchAo,
    "fbgemm_fp8": RowFp8,
}
FIELD = "quantization_config"


def quantization_settings(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `quantization_config` of a config.json document or of one of its parts; None for plain weights."""
    parts = [document, *(part for part in document.values() if isinstance(part, dict))]
    found = next((part[FIELD] for part in parts if part.get(FIELD)), None)
    return found if found is None or isinstance(found, dict) else {"quant_method": str(found)}


def without_quantization(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json document, and its parts, without what says that weights are quantized."""
    return {
        name: without_quantization(value) if isinstance(value, dict) else value
        for name, value in document.items()
        if name != FIELD
    }


def quantization_method(settings: Mapping[str, Any]) -> str:
    """Return the name of the method in a `quantization_config`."""
    if "quant_method" not in settings and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(settings.get("quant_method", "quantized"))


def format_of(settings: Mapping[str, Any], config_file: Path) -> PackedFormat:
    """Return how the weights of a model are packed. Raises `InputError` naming a method that is not supported."""
    method = quantization_method(settings)
    if method == "onelayer":
        raise InputError(f"{config_file.parent}: is an emulator; give the original model it was compiled from")
    if method not in FORMATS:
        raise _unsupported(config_file, f"{method!r} weights")
    try:
        return FORMATS[method](settings)
    except UnsupportedError as error:
        raise _unsupported(config_file, f"{method!r} weights {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{config_file}: field {FIELD}: {method}: {error}; restore the file") from None


def _unsupported(config_file: Path, what: str) -> InputError:
    return InputError(
        f"{config_file}: field {FIELD}: {what} cannot be unpacked; give the unquantized original, or one in a "
        f"supported format ({', '.join(FORMATS)})"
    )


def check_library(form: PackedFormat, config_file: Path) -> None:
    """Raise `InputError` if the package that unpacks a format is not installed."""
    if form.library is not None and find_spec(form.library.replace("-", "_")) is None:
        raise InputError(
            f"{config_file}: field {FIELD}: weights are unpacked by {form.library}, which is missing: pip install "
            f"{form.library}"
        )
