"""Reads the inputs of training: facts about a model directory, without weights, and token rows with their digest."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.data.batches import check_token_ids
from onelayer.compiler.data.classes import Classes, check_trainable, is_classifier, predicted_classes, tokenize_for
from onelayer.compiler.data.labeled_rows import DataSource, labeled_rows, tell_cut
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.preferences import read_preferences
from onelayer.compiler.data.row_inputs import tower_rows
from onelayer.compiler.data.tokens import RowInputs, Tokens, asked_and_answered, load_tokenizer, text_tokenizer
from onelayer.compiler.denoising.batches import NoisyImages
from onelayer.compiler.dequantize.formats import quantization_method, quantization_settings
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries.library import library_of
from onelayer.compiler.machine.console import notice
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.sources.data_set import names_of
from onelayer.compiler.storage.checkpoint import Checkpoint, model_digest, resolve_model
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.model_config import read_model_config
from onelayer.compiler.storage.stamps import FileStamps
from onelayer.runtime.anchors.settings import ANCHOR_EVERY
from onelayer.runtime.modules.import_hook import register_loader
from onelayer.runtime.streamed.model import streamed_for_training
from onelayer.runtime.streamed.settings import StreamedSettings
from onelayer.runtime.training.settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainModel:
    """Facts about a model directory. `ranks` are those of its compressed modules (none in a plain model).

    `base` is the original. `classes` are the classes that it predicts; None for a causal model. `stamps` are those of
    its files from before they were digested. `quantization` is the method of an original's quantized weights.
    """

    directory: Path
    ranks: Mapping[str, int]
    digest: str
    base: dict[str, Any]
    config: "PreTrainedConfig"
    model_class: "type[PreTrainedModel]"
    reader: Any  # an `AnyTokenizer`; None for a denoiser
    classes: Classes | None
    stamps: FileStamps
    quantization: str | None = None
    streaming: StreamedSettings | None = None

    @property
    def denoises(self) -> bool:
        """Whether it is a denoiser, whose config is a plain dictionary."""
        return isinstance(self.config, dict)

    @property
    def dtype(self) -> "torch.dtype | None":
        """The dtype that it computes in, where its config or its weights name one."""
        config: Any = self.config
        checkpoint = Checkpoint.open(self.directory)
        return library_of(self.directory).compute_dtype(config, checkpoint) if self.denoises else config.dtype

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of texts. Raises `InputError` if the model reads none."""
        return text_tokenizer(self.reader)

    def empty(self) -> "PreTrainedModel":
        """Build the model without weights, with the modules of the original."""
        import torch

        empty: PreTrainedModel = library_of(self.directory).empty_model(self.config, self.model_class, torch.float32)
        return empty

    def load(self) -> "PreTrainedModel":
        """Load the model with its weights onto the host, or open it for streaming if `streaming` says how.

        Raises `InputError` if its files changed since `digest`.
        """
        if self.streaming is not None:
            streamed = streamed_for_training(self.directory, **self.streaming.model_dump())
            self.stamps.check()
            return streamed
        register_loader()
        dtype: dict[str, Any] = {"torch_dtype": self.dtype} if self.denoises else {}
        model: PreTrainedModel = self.model_class.from_pretrained(str(self.directory), **dtype)
        self.stamps.check()
        return model


@dataclass(frozen=True)
class TrainData:
    """Token rows for the trainer (`input_ids`, `labels`), their digest, and the numbers of rows left out and cut.

    `labels` has the length of `input_ids`, is the answer of an encoder-decoder, or the single class of the text.
    `inputs` are what the rows' images and audio become, if there are any. A denoiser's `rows` describe its `images`,
    and it computes `together` of them at once.
    """

    rows: list[dict[str, Any]]
    digest: str
    skipped: int
    cut: int
    inputs: Sequence[RowInputs | None] | None = None
    images: NoisyImages | None = None
    together: int = 1


def read_model(directory: Path, name: str, max_image_pixels: int | None = None) -> TrainModel:
    """Read config, tokenizer, processor and headers. `name` is the user's name of the model: a path or a Hub id."""

    from onelayer.compiler.models.original import Original

    library = library_of(directory)
    load_config, model_class = library.load_config, library.model_class
    stored = Checkpoint.open(directory)
    packing = quantization_settings(read_model_config(directory))
    digest = model_digest(directory)
    ranks: Mapping[str, int] = {}
    # The Hub's cache names its snapshots by commit.
    base = {
        "model": name,
        "revision": directory.name if directory.parent.name == "snapshots" else None,
        "digest": digest,
    }
    quantization = None
    if packing is not None and quantization_method(packing) == "onelayer":
        facts = Emulator.open(directory).facts
        ranks = facts.compressed
        base = {"model": facts.base_model, "revision": facts.base_revision, "digest": facts.base_digest}
        config = load_config(directory)
    elif packing is not None or stored.is_gguf:
        original = Original.open(directory)
        config, quantization = original.config, original.checkpoint.quantization
    else:
        config = load_config(directory)
    loaded_class = model_class(config, directory)
    if library.DENOISES:
        return TrainModel(directory, ranks, digest, base, config, loaded_class, None, None, stored.stamps, quantization)
    check_trainable(loaded_class, directory)
    classes = predicted_classes(loaded_class, config, directory) if is_classifier(loaded_class) else None
    reader = load_reader(directory, loaded_class, max_image_pixels)
    read = (config, loaded_class, reader, classes, stored.stamps, quantization)
    return TrainModel(directory, ranks, digest, base, *read)


def with_default_anchors(settings: TrainSettings, model: TrainModel, original: str | Path | None) -> TrainSettings:
    """Return settings that anchor an emulator whose original is named: without preferences, nothing else reads it."""
    if original is None or settings.anchor_every is not None or settings.method != "sft" or not model.ranks:
        return settings
    notice(f"--model {original}: anchors are renewed every {ANCHOR_EVERY} steps; --anchor-every says how often")
    return settings.model_copy(update={"anchor_every": ANCHOR_EVERY})


def original_source(
    settings: TrainSettings, model: TrainModel, original: str | Path | None, has_reference: bool
) -> Path | None:
    """Return the directory of the original that a training streams: for anchors, or for the reference of preferences.

    Raises `InputError` if `original` is missing, superfluous, or not what the emulator was compiled from.
    """
    anchored = settings.anchor_every is not None
    if anchored and original is None:
        raise InputError(f"--anchor-every {settings.anchor_every}: needs the original; give --model")
    if anchored and not model.ranks:
        raise InputError(f"{model.directory}: is no emulator, so nothing can be anchored; leave --anchor-every out")
    refers = settings.method != "sft" and bool(model.ranks) and not has_reference
    if refers and original is None:
        raise InputError(f"--method {settings.method}: the original is the reference of an emulator; give --model")
    if original is not None and not (anchored or refers):
        reason = "--reference has its scores" if model.ranks else f"{model.directory} is no emulator"
        raise InputError(f"--model {original}: nothing reads it, since {reason}; leave it out")
    if original is None:
        return None
    if anchored and settings.lora is not None and settings.lora.get("bias", "none") != "none":
        raise InputError("lora.bias: biases that are trained cannot be anchored; leave it or --anchor-every out")
    directory = resolve_model(original)
    Emulator.open(model.directory).check_original(directory)
    if not model.denoises and load_tokenizer(directory).get_vocab() != model.tokenizer.get_vocab():
        raise InputError(
            f"{model.directory}: its tokenizer has other tokens than that of {directory}; copy the original's files"
        )
    return directory


def preference_data(data: DataSource, model: TrainModel, settings: TrainSettings, batch_size: int) -> TrainData:
    """Tokenize preferences for the method of `settings`. Raises `InputError` for rows or models without an answer."""
    from onelayer.runtime.preferences.rows import answers_of, trainer_rows

    assert settings.method != "sft"
    if model.classes is not None or model.config.is_encoder_decoder:
        raise InputError(f"{model.directory}: --method {settings.method} is for models that predict the next token")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    preferences, skipped = read_preferences(data, settings.method, model.reader, settings.max_length)
    rows = trainer_rows(preferences, settings.method, batch_size)
    answers = answers_of(rows, settings.method)
    check_token_ids((tokens.input_ids for tokens in answers.values()), model.config)
    longest = max(len(tokens.input_ids) for item in preferences for tokens in item.rows())
    if limit is not None and longest > limit:
        raise InputError(
            f"{names_of(data)}: {longest} tokens, and {model.directory} has positions for {limit}; set max_length to "
            f"{limit} or less"
        )
    cut = sum(item.cut for item in preferences)
    tell_cut(settings.max_length, len(preferences) + skipped, cut, skipped)
    return TrainData(rows, sha256_json([rows, settings.method]), skipped, cut)


def _row(tokens: Tokens, model: TrainModel) -> dict[str, Any]:
    """Return a row for the trainer of a model: the ids that it reads, and what it predicts."""
    if tokens.label is not None and not tokens.input_ids:
        return {"labels": tokens.label}
    if tokens.label is not None:
        return {"input_ids": tokens.input_ids, "labels": tokens.label}
    if model.config.is_encoder_decoder:
        asked, answered = asked_and_answered(tokens)
        return {"input_ids": asked, "labels": answered} if asked else {"labels": answered}
    return {"input_ids": tokens.input_ids, "labels": tokens.labels}


def tokenized(data: DataSource, model: TrainModel, max_length: int) -> TrainData:
    """Tokenize the data. Examples without a label only cost time, so they are counted and left out."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    labeled = labeled_rows(
        data,
        lambda example: [tokenize_for(model.classes, example, model.reader, max_length, append_eos=True)],
        max_length,
    )
    check_token_ids((tokens.input_ids for tokens in labeled.tokens), model.config)
    digest = hashlib.sha256()
    rows = []
    for example, tokens in labeled.rows:
        if limit is not None and len(tokens.input_ids) > limit:
            raise InputError(
                f"{example.source}: {len(tokens.input_ids)} tokens, and {model.directory} has positions for {limit}; "
                f"set max_length to {limit} or less"
            )
        for ids in (tokens.input_ids, tokens.labels if tokens.label is None else [tokens.label]):
            digest.update(array("q", [len(ids), *ids]).tobytes())
        if tokens.inputs is not None and tokens.inputs.digest is not None:
            digest.update(tokens.inputs.digest.encode())
        rows.append(_row(tokens, model))
    labeled.tell()
    inputs = [tokens.inputs for tokens in labeled.tokens]
    given = inputs if any(item is not None for item in inputs) else None
    return TrainData(rows, digest.hexdigest(), labeled.skipped, labeled.cut, given)


def longest_batch(examples: TrainData, arguments: Mapping[str, Any]) -> int:
    """Count the tokens of the largest batch of a training; a row of preferences has those of all its answers."""
    if examples.images is not None:
        return examples.images.positions
    longest = max(sum(len(ids) for name, ids in row.items() if name.endswith("_ids")) for row in examples.rows)
    if not longest:  # rows without a text to read
        longest = max(tower_rows(inputs) for inputs in examples.inputs or () if inputs is not None)
    longest = arguments["max_length"] if arguments.get("packing") else longest
    return int(longest * arguments["per_device_train_batch_size"])


def held_by(model: TrainModel, settings: TrainSettings, tokens: int, device: "torch.device") -> TrainModel:
    """Return the model with the way that it is held, which is printed for an original. `tokens` are those of a batch.

    Raises `InputError` if the settings do not go with the way.
    """
    import torch

    from onelayer.runtime.streamed.ways import chosen_way

    if model.denoises and settings.way == "streamed":
        raise InputError(f"--way streamed: {model.directory} is a denoiser, use `onelayer polish` for exact steps")
    if model.ranks or model.denoises:
        if settings.way == "streamed":
            raise InputError(f"--way streamed: {model.directory} is an emulator, which is made to fit; leave it out")
        return model
    dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    streaming = chosen_way(model.directory, dtype, settings, tokens, device, model.quantization)
    if streaming is not None:
        if settings.activations != "none":
            kept = "a streamed model keeps inputs of layers exactly, on the host and in files"
            raise InputError(f"--activations {settings.activations}: {kept}; leave it out")
        if not processes().is_alone:
            raise InputError("--way streamed: runs in one process; start it without torchrun")
        if settings.gradient_accumulation > 1:
            batches = settings.gradient_accumulation
            notice(f"--gradient-accumulation {batches}: every batch of a step reads the model")
    return replace(model, streaming=streaming)
