"""What a model reads in addition to text, in numbers: rows of its towers and tokens in the text, for one example.

In: tensor names with their shapes, and config.json. Out: which repeated layers compute images or sound, and how many
rows (patches, frames) one image or recording has there. Knows no architecture: a tower is entered by a convolution, as
text is by its table of tokens, and most towers have a table of positions. Tables of tokens that are only looked up are
counted here too. Torch-free.
"""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from onelayer.compiler.encode.settings import EncodeSettings
from onelayer.compiler.results import Result

Shape = tuple[int, ...]
Table = Mapping[str, Shape]

# Towers that take images of any size have no size of their own. Sound is counted as so much of it.
ANY_IMAGE_SIDE, SOUND_SECONDS, SOUND_HZ = 448, 10, 16000
# Samples to a frame of models that read waveforms and whose config.json names no strides.
FRAME_SAMPLES = 320
# A denoiser computes a picture and its prompt together; text encoders of pipelines answer with so many positions.
PICTURE_SIDE, PROMPT_POSITIONS = EncodeSettings.default("resolution"), 512
# How much smaller a latent is than its picture, where no config of an autoencoder says it.
LATENT_SCALE, PACKED = 8, 2
_POSITIONS = re.compile(r"pos(ition|_emb)")


class Media(Result):
    """The images or recordings of one example: their number, rows of a tower for each, tokens of the text for each."""

    count: int
    rows: int
    tokens: int


def reads_media(layers: str, entries: Table, vocabulary: int | None) -> bool:
    """Return whether a list of layers computes images or sound: the nearest way in is a convolution, not tokens.

    `entries` are the tensors outside of layers. The nearest way in shares the longest path with the list.
    """
    near = {True: -1, False: -1}
    for name, shape in entries.items():
        reads_tokens = _is_table(shape, vocabulary)
        if reads_tokens or is_kernel(name, shape):
            near[not reads_tokens] = max(near[not reads_tokens], _shared(layers, name))
    return near[True] > near[False]


def _is_table(shape: Shape, vocabulary: int | None) -> bool:
    """Whether a matrix has a row for each token. Some have rows for tokens that are added later, or lack a few."""
    return len(shape) == 2 and vocabulary is not None and 0.99 * vocabulary <= shape[0] <= 1.05 * vocabulary + 64


def looked_up_parameters(entries: Table, vocabulary: int | None, hidden: int | None, has_head: bool) -> int:
    """Count the parameters of tables that only give a row for each token, which takes no multiplication.

    `entries` are the tensors outside of layers. A head multiplies by one of the tables; a tied one by the only table.
    It reads the hidden width, as an embedding of another width does not.
    """
    tables = [shape for shape in entries.values() if _is_table(shape, vocabulary)]
    heads = [shape for shape in tables if shape[1] == hidden] or tables
    return sum(map(math.prod, tables)) - (math.prod(heads[-1]) if has_head and heads else 0)


def is_kernel(name: str, shape: Shape) -> bool:
    """Whether a tensor is the kernel of a convolution (out, in, *sides), or the matrix that embeds patches instead.

    A stack of matrices is named otherwise.
    """
    named = {2: "patch_embed", 3: "conv"}.get(len(shape))
    return len(shape) > 3 or (named is not None and named in name.lower())


def nearest_tower(unit: str, towers: Iterable[str]) -> str:
    """Return the list of layers that shares the longest path with a projector."""
    return max(towers, key=lambda tower: _shared(tower, unit))


def rows_of(layers: str, entries: Table, config: Mapping[str, Any], image_side: int | None) -> int:
    """Return the rows that one image or recording has in a list of layers.

    `image_side` is the side of an image in pixels; by default the one that the tower's table of positions or the
    config is made for. Sound is counted as ten seconds if the tower takes any length.
    """
    own = {name: shape for name, shape in entries.items() if _shared(layers, name) == _nearest(layers, entries)}
    kernels = [shape for name, shape in own.items() if len(shape) > 3]
    patch = kernels[0][-2:] if kernels else None
    if image_side is not None and patch is not None:
        return _patches((image_side, image_side), patch)
    positions = [shape for name, shape in own.items() if _POSITIONS.search(name) and len(shape) in (2, 3)]
    if positions:
        return max(shape[-2] for shape in positions)
    part = {**config, **(config.get("vision_config") or {})}
    if patch is not None:
        return _patches(_sides(part.get("image_size")), patch)
    strides = config.get("conv_stride")
    return SOUND_SECONDS * SOUND_HZ // (math.prod(strides) if isinstance(strides, list) else FRAME_SAMPLES)


def tokens_of(rows: int, config: Mapping[str, Any]) -> int:
    """Return the most tokens of the text that one image or recording takes, after the tower's rows are merged."""
    part = {**config, **(config.get("vision_config") or {})}
    for name in ("mm_tokens_per_image", "image_seq_length"):
        if isinstance(part.get(name), int):
            return int(part[name])
    merged = part.get("spatial_merge_size") or part.get("scale_factor") or 1
    ratio = part.get("downsample_ratio") or 1 / merged
    return max(1, int(rows * ratio * ratio))


def picture_positions(config: Mapping[str, Any], vae: Mapping[str, Any], side: int | None) -> int:
    """Return the positions that a denoiser computes for a picture of `side` pixels and its prompt.

    `vae` is the config of the pipeline's autoencoder. What each level of it halves, and how many channels of a latent
    the denoiser takes at once, give the pixels of a position. A UNet is counted at its finest level.
    """
    levels = next((vae[name] for name in _LEVELS if isinstance(vae.get(name), list)), None)
    scale = LATENT_SCALE if levels is None else 1 << (len(levels) - 1)
    latent = vae.get("latent_channels") or vae.get("z_dim") or config.get("in_channels") or 1
    packed = math.isqrt(max(1, (config.get("in_channels") or latent) // latent))
    patch = _last(config.get("patch_size") or config.get("all_patch_size") or 1)
    if packed == 1:  # a denoiser of packed latents names its patches too, and does not cut them again
        packed = patch if vae else max(PACKED, patch)
    step = scale * packed
    return max(1, (side or PICTURE_SIDE) // step) ** 2 + PROMPT_POSITIONS


_LEVELS = ("encoder_block_out_channels", "block_out_channels", "dim_mult")


def _last(value: Any) -> int:
    return int(value[-1] if isinstance(value, list | tuple) else value)


def _nearest(layers: str, entries: Table) -> int:
    """Return how much of its path the nearest kernel shares with a list of layers."""
    return max((_shared(layers, name) for name, shape in entries.items() if is_kernel(name, shape)), default=-1)


def _shared(layers: str, name: str) -> int:
    """Count the leading parts that two dotted names share."""
    same = (one == other for one, other in zip(layers.split("."), name.split("."), strict=False))
    return len(list(takewhile(bool, same)))


def _patches(sides: Iterable[int], patch: Iterable[int]) -> int:
    return math.prod(max(1, side // step) for side, step in zip(sides, patch, strict=True))


def _sides(size: object) -> tuple[int, int]:
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    side = size if isinstance(size, int) else ANY_IMAGE_SIDE
    return side, side
