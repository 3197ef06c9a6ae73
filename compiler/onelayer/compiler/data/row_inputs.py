"""What a model reads of a row besides its token ids: tensors that are made when a batch is taken, and never kept."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import RowInputs
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.audio import read_audio
from onelayer.compiler.media.images import read_image
from onelayer.compiler.media.processors import RowProcessor
from onelayer.compiler.media.sources import MediaSource

if TYPE_CHECKING:
    import torch

TEXT_OUTPUTS = ("input_ids", "attention_mask", "labels", "offset_mapping", "text_replacement_offsets")
# What becomes one row of a tower: a patch of an image in each of its channels, 20 ms of sound at 16 kHz.
PATCH_SIDE, FRAME_VALUES = 14, 320


@dataclass(frozen=True)
class Made:
    """The inputs of one row that a processor makes: at every call from the bytes of the sources.

    `arguments` are those of the processor other than media: the text, and how it is tokenized. `digests` are those of
    the sources when they were first read. What belongs to tokens is cut at `length`.
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
        output, digests = processed(self.processor, [self.media], self.arguments)
        self.check_unchanged(digests)
        return kept_tensors(output, self.processor, self.length)

    def check_unchanged(self, digests: Sequence[str]) -> None:
        """Raise `InputError` if the bytes of the sources are not those that were first read."""
        for source, now, before in zip(self.media, digests, self.digests, strict=True):
            if now != before:
                raise InputError(f"{source}: changed while it was in use; run the command again")


@dataclass(frozen=True)
class Zeros:
    """What a processor makes of the tokens of a text without media: zeros."""

    shapes: Mapping[str, tuple[int, ...]]
    digest: str | None = None

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Make the tensors."""
        import torch

        return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in self.shapes.items()}


def padded_tensors(rows: Sequence[Any], length: int) -> "dict[str, torch.Tensor]":
    """Make the inputs of rows of several lengths together, as their processor pads them.

    What belongs to tokens is padded with zeros to `length`. A row is `Made`, `Zeros` or None.
    """
    import torch

    shown = [row for row in rows if isinstance(row, Made)]
    if not shown:
        names = {name for row in rows if row is not None for name in row.shapes}
        return {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in sorted(names)}
    processor, several = shown[0].processor, {"padding": True, "padding_side": "right"}
    columns = [row.arguments if isinstance(row, Made) else {"text": ["a"]} for row in rows]
    given = {
        name: [item for column in columns for item in column[name]] if isinstance(value, list) else value
        for name, value in shown[0].arguments.items()
    }
    media = [row.media if isinstance(row, Made) else () for row in rows]
    output, digests = processed(processor, media, {**given, **several})
    for row in shown:
        row.check_unchanged(digests[: len(row.media)])
        digests = digests[len(row.media) :]
    own, width = media_names(processor), min(len(first_row(output["input_ids"])), length)
    return {
        name: tensor
        if name in own or tensor.ndim < 2 or tensor.shape[1] != width
        else torch.cat([tensor, tensor.new_zeros(len(tensor), length - tensor.shape[1], *tensor.shape[2:])], dim=1)
        for name, tensor in kept_tensors(output, processor, length).items()
    }


def joined_media(rows: Sequence[RowInputs]) -> "dict[str, torch.Tensor]":
    """Make the inputs of rows of one medium each, joined along the first dimension.

    Recordings of unequal length are padded together by the processor, with a mask. Raises `InputError` if it makes
    none, since then a row's result would depend on the others of its batch.
    """
    import torch

    if all(row.shapes == rows[0].shapes for row in rows):
        made = [row.tensors() for row in rows]
        return {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}
    shown = [row for row in rows if isinstance(row, Made)]
    processor = shown[0].processor
    if not getattr(processor.feature_extractor, "return_attention_mask", False):
        raise InputError(
            f"--batch-size: recordings of unequal length make no batch, since the processor of {processor.directory} "
            "pads without a mask; cut them to one length, or give 1 and gradient_accumulation_steps"
        )
    output, digests = processed(processor, [row.media for row in shown], {"padding": True})
    for row, digest in zip(shown, digests, strict=True):
        row.check_unchanged([digest])
    return dict(output.convert_to_tensors("pt"))


def check_kinds(example: Example, processor: RowProcessor, reads: Sequence[str]) -> None:
    """Raise `InputError` for a row with a medium of a kind that the model does not read; `reads` are all it does."""
    for source in example.media:
        if source.kind not in processor.reads:
            shown = " and ".join(reads)
            raise InputError(f"{source}: the model reads {shown}, and no {source.kind}; remove it from the row")


def medium_alone(processor: RowProcessor, example: Example) -> Made:
    """Return the inputs of a row of one medium, which no text goes with."""
    output, digests = processed(processor, (example.media,), {})
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(kept_tensors(output, processor, 0).items())}
    return Made(processor, example.media, {}, digests, shapes, 0)


def processed(
    processor: RowProcessor, rows: Sequence[Sequence[MediaSource]], arguments: Mapping[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """Call the processor for the media of some rows, and return its output and the digests of all bytes.

    Raises `InputError` if it fails.
    """
    media = [source for row in rows for source in row]
    digests = tuple(source.digest() for source in media)
    given: dict[str, Any] = dict(arguments)
    if any(source.kind == "image" for source in media):
        limit = processor.max_image_pixels
        given["images"] = [[read_image(source, limit) for source in row if source.kind == "image"] for row in rows]
    if recordings := [read_audio(source, processor.rate_hz) for source in media if source.kind == "audio"]:
        if "text" not in arguments:
            _check_heard(processor, media, [len(samples) for samples in recordings])
        # A feature extractor alone has another name for what it reads than a processor.
        name = "raw_speech" if processor.stock is processor.feature_extractor else "audio"
        given |= {name: recordings, "sampling_rate": processor.rate_hz}
    try:
        return processor.stock(**given), digests
    except Exception as error:  # processors raise anything for a medium that is too small, or too many of them
        line, where = str(error).strip().partition("\n")[0], media[0] if media else "a text"
        raise InputError(
            f"{where}: the processor of {processor.directory} refuses the row ({type(error).__name__}: {line}); "
            "change the row"
        ) from None


def _check_heard(processor: RowProcessor, media: Sequence[MediaSource], samples: Sequence[int]) -> None:
    """Raise `InputError` for a recording that the processor would cut: what it says there would be learned unheard."""
    most = getattr(processor.feature_extractor, "n_samples", None)
    for source, count in zip(media, samples, strict=True):
        if most is not None and count > most:
            given, heard = (f"{number / processor.rate_hz:.4g} s" for number in (count, most))
            raise InputError(f"{source}: {given} of sound, and the model hears {heard}; split the row")


def kept_tensors(output: Any, processor: RowProcessor, length: int) -> "dict[str, torch.Tensor]":
    """Return the tensors of a processor's output that a model reads besides the ids; those of tokens are cut."""
    whole = len(first_row(output["input_ids"])) if "input_ids" in output else -1
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


def tower_rows(inputs: RowInputs) -> int:
    """Count the patches of an image, or the frames of a recording, as most models make them."""
    shapes = inputs.shapes.values()
    return max(math.prod(shape) // (shape[1] * PATCH_SIDE**2 if len(shape) == 4 else FRAME_VALUES) for shape in shapes)
