"""The shapes of a model whose weights are not here: its class, built on the meta device from config.json alone."""

from pathlib import Path

from onelayer.compiler.checkpoint import INDEX_FILES, SINGLE_FILES
from onelayer.compiler.shapes import ModelShapes, read_config_document, shapes_from_headers, shapes_of


def read_shapes(directory: Path) -> ModelShapes:
    """Shapes from headers where there are weights (torch stays out), else from the config.

    Raises `InputError` where the directory holds no model that can be streamed.
    """
    if any((directory / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES)):
        return shapes_from_headers(directory)
    return _shapes_from_config(directory)


def _shapes_from_config(directory: Path) -> ModelShapes:
    document = read_config_document(directory)
    import torch

    from onelayer.compiler import compat

    config = compat.read_config(directory)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = compat.model_class(config, directory)._from_config(config, dtype=dtype)
    # Tied parameters are one object here, and come once.
    table = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # The class knows what the file may leave to its defaults.
    named = {"hidden_size", "vocab_size", "num_experts_per_tok"}
    text = config.get_text_config()
    known = {name: getattr(text, name) for name in named if isinstance(getattr(text, name, None), int)}
    return shapes_of(str(directory), {**document, **known}, table, dtype.itemsize, False)
