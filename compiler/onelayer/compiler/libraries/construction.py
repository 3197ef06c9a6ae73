"""Bounds on what a configuration may make: a config.json may ask for any number of layers and for any table.

A model class is built without its weights, but each of its modules takes time, and tables that no checkpoint holds
take memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from onelayer.compiler.errors import InputError

# A layer has fewer modules than this for each tensor that is stored of it.
MODULES_PER_TENSOR = 20
MODULES_AT_LEAST = 10_000
# For a configuration without weights: ten times the largest known model.
MODULES_WITHOUT_WEIGHTS = 200_000
TABLES_LIMIT_BYTES = 4 << 30


def modules_limit(stored_tensors: int) -> int:
    """Return how many modules a model with so many stored tensors may have."""
    return max(MODULES_AT_LEAST, MODULES_PER_TENSOR * stored_tensors)


@contextmanager
def building(config_file: Path, limit: int) -> Iterator[None]:
    """Turn whatever fails while a model is built from its configuration into an `InputError` that names the file.

    It also ends the work at more than `limit` modules.
    """
    count, thread = 0, get_ident()

    def counted(parent: nn.Module, name: str, child: nn.Module) -> None:
        nonlocal count
        if get_ident() != thread:
            return
        count += 1
        if count > limit:
            raise InputError(
                f"{config_file}: describes more than {limit} modules, far more than the checkpoint can fill; restore "
                "the file (the number of layers, above all)"
            )

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # model classes check few of the values that they compute with
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{config_file}: no model can be built from it ({reason}); restore the file") from None
    finally:
        hook.remove()


def check_tables(model: nn.Module, config_file: Path) -> None:
    """Refuse a model whose tables (positions, masks) are too large to be made on the host."""
    tables = {name: buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers()}
    if sum(tables.values()) > TABLES_LIMIT_BYTES:
        largest = max(tables, key=lambda name: tables[name])
        raise InputError(
            f"{config_file}: asks for tables of {sum(tables.values()) >> 30} GiB, {largest!r} above all; restore the "
            "file (the number of positions, above all)"
        )
