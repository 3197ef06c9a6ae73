"""Makes inputs for the sweep: batches of tokens, images or sound that a tiny model's forward accepts.

No processor is used: the names of the inputs come from the forward's signature, their sizes from the configuration. If
a signature allows several layouts, all are offered and the first that runs is used.
"""

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from scripts.sweep.configs import FIRST_SPECIAL_ID

Batch = dict[str, torch.Tensor]
TEXT, IMAGE = ((2, 9), (1, 14)), "image-text-to-text"
SOUND_FRAMES, SAMPLES = 128, 4000


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Make token ids (rows, length) of plain text."""
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> torch.Tensor:
    """Make seeded normal values for images and sound."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def candidates(model: PreTrainedModel, registry: str) -> Iterator[tuple[str, list[Batch]]]:
    """Yield sets of batches for a kind of model, the most meaningful first, each with a word for its contents."""
    takes = inspect.signature(model.forward).parameters
    if registry == "image-classification" and "input_ids" not in takes:
        for pixels in _images(model, takes):
            yield "images", [pixels, {name: value.flip(0, -1) for name, value in pixels.items()}]
        return
    text = [_text(model, registry, rows, length) for rows, length in TEXT]
    if registry in (IMAGE, "image-classification"):
        seen = list(_with_images(model))
        yield from (("mixed", [text[0], batch, text[1], batch]) for batch in seen)
        yield from (("images", [batch, batch]) for batch in seen)
    if registry in ("speech-seq2seq", "seq2seq-lm"):
        yield from (("sound", batches) for batches in _with_sound(model))
    yield "text", text


def _text(model: PreTrainedModel, registry: str, rows: int, length: int) -> Batch:
    # Sequence classifiers look for padding after the last token; one row needs none.
    rows = 1 if registry == "sequence-classification" else rows
    ids = random_ids(rows, length)
    vocabulary, end = getattr(model.config, "vocab_size", None), getattr(model.config, "eos_token_id", None)
    if isinstance(vocabulary, int):
        ids %= vocabulary
    if registry == "sequence-classification" and isinstance(end, int):
        ids[:, -1] = end  # where encoder-decoders look for the whole sequence
    books = getattr(model.config, "num_codebooks", None)
    if registry == "speech-seq2seq" and isinstance(
        books, int
    ):  # text and sound next to each other, position by position
        ids = torch.stack([ids, *(random_ids(rows, length, 2 + book) for book in range(books))], dim=-1)
    batch = {"input_ids": ids}
    takes = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in takes and registry != "sequence-classification":
        batch["decoder_input_ids"] = _decoder_ids(model, rows, length - 4)
    if "bbox" in takes:
        batch["bbox"] = torch.zeros(rows, length, 4, dtype=torch.float if "visual_bbox" in takes else torch.long)
    return batch


def _decoder_ids(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """Make a decoder's first input: ids (rows, length), or (rows, length, channels) if it has several channels."""
    ids = random_ids(rows, length, 1)
    channels = getattr(getattr(model.config, "decoder_config", None), "num_channels", None)
    return ids if channels is None else ids[..., None].expand(-1, -1, channels)


# ---- images ----------------------------------------------------------------------------------------------------------


def _with_images(model: PreTrainedModel) -> Iterator[Batch]:
    """Yield one row of text with an image in its place, in every layout that the signature allows."""
    takes = inspect.signature(model.forward).parameters
    counting = getattr(model, "get_image_features", getattr(model.base_model, "get_image_features", None))
    for pixels in _images(model, takes):
        length = _count_features(model, counting, pixels)
        known = _number(model.config, ("latent_query_num", "num_query_tokens"), 16)
        guesses = [length] if length else list(dict.fromkeys((known, 16, 4, 17, 1)))
        for ids in (ids for guess in guesses for ids in _placeholders(model.config, guess)):
            batch = {"input_ids": ids, **pixels}
            marks = ids >= FIRST_SPECIAL_ID
            for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask"):
                if name in takes:
                    batch[name] = marks.long()
            if "qformer_input_ids" in takes:
                batch["qformer_input_ids"] = random_ids(1, 5)
            if "decoder_input_ids" in takes:
                batch["decoder_input_ids"] = random_ids(1, 6, 1)
            if "image_attention_mask" in takes:
                batch["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
            if "visual_bbox" in takes:
                batch["bbox"] = torch.zeros(1, ids.shape[1], 4)
            if "state" in takes:
                batch |= {"state": noise(1, 32), "noise": noise(1, 50, 32), "timestep": torch.full((1,), 0.5)}
            yield batch


def _placeholders(config: PreTrainedConfig, length: int) -> Iterator[torch.Tensor]:
    """Make text with room for `length` image features, or for none if the image goes elsewhere."""
    before, after = random_ids(1, 4, 2), random_ids(1, 7, 3)
    marks = {name: value for name, value in vars(config).items() if isinstance(value, int)}
    if hasattr(config, "latent_query_num"):  # a mask gives the place of an image, not an id
        marks["image_token_id"] = FIRST_SPECIAL_ID
    for name, value in marks.items():
        if re.fullmatch(r"(image|im|img|media|vision|video)_?(patch|placeholder|context)?_?token_?(id|index)", name):
            yield torch.cat([before, torch.full((1, length), value), after], dim=1)
    yield torch.cat([before, after], dim=1)


def _count_features(model: PreTrainedModel, counting: Callable[..., Any] | None, inputs: Batch) -> int:
    """Count the rows that the model makes from an image or from sound, by making them; 0 if that fails."""
    if counting is None:
        return 0
    takes = inspect.signature(counting).parameters
    found = None
    for given in ({name: value for name, value in inputs.items() if name in takes}, inputs):
        with torch.no_grad(), contextlib.suppress(Exception):
            found = counting(**given)
            break
    text: Any = model.config.get_text_config()
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(part.numel() for part in parts if isinstance(part, torch.Tensor)) // int(text.hidden_size)


def _images(model: PreTrainedModel, takes: Any) -> Iterator[Batch]:
    """Make one image as this kind of model takes it: pixels by rows and columns, by crops, or by patches."""
    config: Any = model.config
    vision = next((part for part in (getattr(config, name, None) for name in VISION_CONFIGS) if part), config)
    size = _number(vision, ("image_size", "img_size", "input_size"), 32)
    patch = _number(vision, ("patch_size", "spatial_patch_size", "encoder_patch_size"), 8)
    channels = _number(vision, ("num_channels", "in_channels", "in_chans"), 3)
    merge = _number(vision, ("spatial_merge_size", "merge_size", "pooling_kernel_size"), 2)
    depth = _number(vision, ("temporal_patch_size",), 1)
    side = 2 * merge
    square = torch.tensor([[side, side]])
    flat = noise(side * side, channels * depth * patch * patch)
    grid = {"image_grid_thw": torch.tensor([[1, side, side]]), "image_grid_hw": square}
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
    extra: Batch = {
        "image_sizes": torch.tensor([[size, size]]),
        "spatial_shapes": square,
        "target_sizes": square,
        "image_position_ids": places,
        "image_merge_sizes": torch.tensor([merge]),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "high_res_pixel_values": noise(1, channels, 2 * size, 2 * size),
        "num_local_patches": torch.zeros(1, dtype=torch.long),
    }
    mask = {"pixel_attention_mask", "pixel_mask"} & set(takes)
    extra = {name: value for name, value in extra.items() if name in takes}
    gridded = {name: value for name, value in grid.items() if name in takes}
    if gridded:
        yield {"pixel_values": flat, **gridded, **extra}
    by_patch = {name: torch.ones(1, side * side, dtype=torch.long) for name in mask}
    whole, crops = noise(1, channels, size, size), noise(1, 1, channels, size, size)
    layouts: list[Batch] = [
        {"pixel_values": whole, **extra},
        {"pixel_values": crops, **extra},
        {"pixel_values": flat[None], **extra, **by_patch},
        {"pixel_values": flat.view(-1, channels * depth, patch, patch), **gridded, **extra},
        {"pixel_values": noise(1, 2, channels, size, size), **extra},
        {"pixel_values": noise(1, 1, 4, channels, size, size), **extra},
    ]
    for name in mask:
        layouts.insert(0, {**layouts[1], name: torch.ones(1, 1, size, size, dtype=torch.long)})
        layouts.append({"pixel_values": crops, **extra, name: torch.ones(1, 1, dtype=torch.bool)})
    if "flattened_patches" in takes:
        patches = torch.cat([places[0] + 1, flat], dim=1)[None]
        layouts = [{"flattened_patches": patches, **extra}]
    yield from layouts
    yield from ({name: value for name, value in layout.items() if name not in extra} for layout in layouts if extra)


VISION_CONFIGS = ("vision_config", "vit_config", "encoder", "vision_encoder_config", "vision_tower_config")


def _number(config: Any, names: Sequence[str], default: int) -> int:
    """Return the first of some fields that a configuration has; the first value if it is a pair."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return default


# ---- sound -----------------------------------------------------------------------------------------------------------


def _with_sound(model: PreTrainedModel) -> Iterator[list[Batch]]:
    """Make two batches with sound, as features (rows, mel, frames) or (rows, frames, mel), or as samples."""
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    audio = next((part for part in (getattr(config, name, None) for name in AUDIO_CONFIGS) if part), config)
    mel = _number(audio, ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"), 16)
    mel = _number(audio, ("input_dim",), mel) if "num_mel_bins" not in vars(audio) else mel
    longest = 2 * _number(audio, ("max_source_positions",), SOUND_FRAMES // 2)
    layouts: list[Batch] = []
    if "input_features" in takes:
        for frames in dict.fromkeys((longest, SOUND_FRAMES)):
            layouts += [{"input_features": noise(1, mel, frames)}, {"input_features": noise(1, frames, mel)}]
        masks = [name for name in ("input_features_mask", "feature_attention_mask") if name in takes]
        for layout, name in itertools.product(list(layouts), masks):
            frames = max(layout["input_features"].shape[1:])
            layouts.insert(0, {**layout, name: torch.ones(1, frames, dtype=torch.long)})
    for name in ("input_values", "inputs"):
        if name in takes:
            layouts.append({name: noise(1, SAMPLES)})
    for layout in layouts:
        if "decoder_input_ids" in takes:
            yield [{**layout, "decoder_input_ids": _decoder_ids(model, 1, length)} for length in (5, 8)]
        else:
            length = _count_features(model, getattr(model, "get_audio_features", None), layout)
            tokens = getattr(config, "audio_token_id", getattr(config, "audio_token_index", None))
            if length and tokens is not None:
                sound = torch.full((1, length), tokens)
                ids = torch.cat([random_ids(1, 4, 2), sound, random_ids(1, 7, 3)], dim=1)
                yield [_text(model, "", 2, 9), {"input_ids": ids, **layout}, _text(model, "", 1, 14)]
            elif length:  # sound that is added to the text, token by token
                yield [{"input_ids": random_ids(1, length, seed), **layout} for seed in (2, 3)]


AUDIO_CONFIGS = ("audio_config", "encoder_config", "encoder", "audio_encoder_config")
