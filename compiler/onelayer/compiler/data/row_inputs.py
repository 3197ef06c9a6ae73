"""What a model reads of a row besides its token ids: tensors that are made when a batch is taken, and never kept."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.media.audio import read_audio
from onelayer.compiler.media.images import read_image
from onelayer.compiler.media.processors import RowProcessor
from onelayer.compiler.media.sources import MediaSource

if TYPE_CHECKING:
    import torch

TEXT_OUTPUTS = ("input_ids", "attention_mask", "labels", "offset_mapping", "text_replacement_offsets")


@dataclass(frozen=True)
class Made:
    """The inputs of one row that a processor makes: at every call from the bytes of the sources.

    `arguments` are the processor's texts; `names` are those of the tensors that are kept, cut at `length` tokens of
    `whole`.
    """

    processor: RowProcessor
    media: tuple[MediaSource, ...]
    arguments: Mapping[str, Any]
    digests: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    length: int

    @property
    def digest(self) -> str | None:
        """The digest of the sources and of the processor; None without media."""
        if not self.media:
            return None
        return hashlib.sha256("".join([self.processor.digest, *self.digests]).encode()).hexdigest()

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Make the tensors. Raises `InputError` if a source changed since it was first read."""
        output, digests = processed(self.processor, self.media, self.arguments)
        for source, now, before in zip(self.media, digests, self.digests, strict=True):
            if now != before:
                raise InputError(f"{source}: changed while it was in use; run the command again")
        return kept_tensors(output, self.processor, self.length)


@dataclass(frozen=True)
class Zeros:
    """What a processor makes of the tokens of a text without media: zeros."""

    shapes: Mapping[str, tuple[int, ...]]
    digest: str | None = None

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Make the tensors."""
        import torch

        return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in self.shapes.items()}


def processed(
    processor: RowProcessor, media: Sequence[MediaSource], arguments: Mapping[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """Call the processor for one row, and return its output and the digests of the bytes.

    Raises `InputError` if it fails.
    """
    digests = tuple(source.digest() for source in media)
    given: dict[str, Any] = dict(arguments)
    if images := [read_image(source, processor.max_image_pixels) for source in media if source.kind == "image"]:
        given["images"] = [images]
    if recordings := [read_audio(source, processor.rate_hz) for source in media if source.kind == "audio"]:
        given |= {"audio": recordings, "sampling_rate": processor.rate_hz}
    try:
        return processor.stock(**given), digests
    except Exception as error:  # processors raise anything for a medium that is too small, or too many of them
        line, where = str(error).strip().partition("\n")[0], media[0] if media else "a text"
        raise InputError(
            f"{where}: the processor of {processor.directory} refuses the row ({type(error).__name__}: {line}); "
            "change the row"
        ) from None


def kept_tensors(output: Any, processor: RowProcessor, length: int) -> "dict[str, torch.Tensor]":
    """Return the tensors of a processor's output that a model reads besides the ids; those of tokens are cut."""
    whole = len(first_row(output["input_ids"]))
    own = media_names(processor)
    kept = type(output)({name: value for name, value in output.items() if name not in TEXT_OUTPUTS})
    tensors = dict(kept.convert_to_tensors("pt"))
    return {
        name: tensor[:, :length] if name not in own and tensor.ndim > 1 and tensor.shape[1] == whole else tensor
        for name, tensor in tensors.items()
    }


def media_names(processor: RowProcessor) -> set[str]:
    """Return the names of what the processor makes of media, not of tokens."""
    parts = (processor.image_processor, processor.feature_extractor)
    return {name for part in parts if part is not None for name in part.model_input_names}


def first_row(values: Any) -> list[Any]:
    """Return the first row of a list or an array as a list."""
    row = values[0]
    return list(row.tolist() if hasattr(row, "tolist") else row)
