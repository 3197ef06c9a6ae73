"""The classes that a model predicts, and rows tokenized for it: for the next token, or for one class of the row.

Classifiers are the classes in transformers' registries for texts, images and sound. Their logits have shape (batch,
classes). Evaluation, exact steps and training all tokenize their rows here.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onelayer.compiler.data.rows import Example
from onelayer.compiler.data.tokens import IGNORED, AnyTokenizer, RowReader, Tokens, not_doubled, tokenize
from onelayer.compiler.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


SINGLE_LABEL = "single_label_classification"


@dataclass(frozen=True)
class Classes:
    """The classes of a sequence classifier: their count, and the numbers of the named ones."""

    count: int
    numbers: Mapping[str, int]

    def number_of(self, example: Example) -> int:
        """Return the class of one row. Raises `InputError` if the model has no such class."""
        label = example.label
        number = self.numbers.get(label) if isinstance(label, str) else label
        if number is None and str(label).isdecimal():  # tables have no numbers
            number = int(str(label))
        if number is None or not 0 <= number < self.count:
            raise InputError(
                f"{example.source}: field 'label' is {label!r}; write a number from 0 to {self.count - 1}, or a name "
                f"of label2id in the model's config.json: {', '.join(list(self.numbers)[:5])}"
            )
        return number


def predicted_classes(
    cls: "type[PreTrainedModel]", config: "PreTrainedConfig", directory: str | Path
) -> Classes | None:
    """Return the classes that a model of class `cls` predicts, None if it predicts tokens.

    Raises `InputError` if it predicts neither, so that there is no loss, and for classifiers with a different loss.
    """
    if not is_classifier(cls):
        if cls.can_generate():
            return None
        refuse_ctc(cls, directory)
        raise InputError(
            f"{directory}: {cls.__name__} predicts no next token and no class of a text, so there is no loss to "
            "measure; give a language model or a sequence classifier"
        )
    count = config.num_labels or 0
    problem = config.problem_type or (SINGLE_LABEL if count > 1 else "regression")
    if problem != SINGLE_LABEL:
        raise InputError(
            f"{Path(directory) / 'config.json'}: field problem_type: {problem} is not supported; give a classifier of "
            "two classes or more, of which a text has one"
        )
    return Classes(count, {str(name): int(number) for name, number in (config.label2id or {}).items()})


def refuse_ctc(cls: "type[PreTrainedModel]", directory: str | Path) -> None:
    """Raise `InputError` for a speech model whose loss aligns text with sound, over all alignments (CTC)."""
    if cls.__name__.endswith("ForCTC"):
        raise InputError(
            f"{directory}: {cls.__name__} aligns text with sound by CTC, which is not supported; give a speech "
            "model that writes text token by token, or a classifier"
        )


def is_transcriber(cls: "type[PreTrainedModel]") -> bool:
    """Return whether a model writes what it hears or sees: it reads no text, and its decoder alone takes token ids."""
    takes = inspect.signature(cls.forward).parameters
    return cls.can_generate() and "decoder_input_ids" in takes and "input_ids" not in takes


def check_trainable(cls: "type[PreTrainedModel]", directory: str | Path) -> None:
    """Raise `InputError` for a class that `onelayer train` does not take."""
    refuse_ctc(cls, directory)
    if not is_trainable(cls):
        raise InputError(
            f"{directory}: {cls.__name__} is not a language model or a sequence classifier, which training needs"
        )


def is_trainable(cls: "type[PreTrainedModel]") -> bool:
    """Return whether `onelayer train` takes models of a class.

    It takes those that predict the next token, encoder-decoders of texts or media, and classifiers.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    registries = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    listed = any(cls.__name__ in registry.values() for registry in registries)
    return listed or is_transcriber(cls) or is_classifier(cls)


def is_classifier(cls: "type[PreTrainedModel]") -> bool:
    """Return whether transformers lists the class as a classifier of texts, images or sound."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return cls.__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values() or reads_media_alone(cls)


def reads_media_alone(cls: "type[PreTrainedModel]") -> bool:
    """Return whether transformers lists the class as a classifier of images or sound, which reads no text."""
    from transformers.models.auto import modeling_auto

    registries = (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    )
    listed = (names for registry in registries for names in registry.values())
    return any(cls.__name__ in ((names,) if isinstance(names, str) else names) for names in listed)


def tokenize_for(
    classes: Classes | None,
    example: Example,
    tokenizer: AnyTokenizer,
    max_length: int,
    append_eos: bool = False,
) -> Tokens:
    """Tokenize one row for a model with these classes, or for one that predicts tokens.

    The tokenizer truncates a text with a class, which keeps its special tokens; no end token is appended. Raises
    `InputError` if the row does not fit the model.
    """
    if append_eos and example.is_preference:
        raise InputError(f"{example.source}: is a preference; train with --method dpo or kto, or remove its fields")
    if classes is None:
        if example.label is not None:
            raise InputError(
                f"{example.source}: field 'label' needs a sequence classifier, and this model predicts tokens; give "
                "one, or remove the field"
            )
        return tokenize(example, tokenizer, max_length, append_eos)
    if isinstance(tokenizer, RowReader) and tokenizer.tokenizer is None:
        if example.label is None:
            raise InputError(
                f"{example.source}: has no 'label', and the model is a classifier of {classes.count} classes; add it"
            )
        return replace(tokenizer.tokens_of(example, max_length, append_eos), label=classes.number_of(example))
    if example.text is None or example.label is None:
        raise InputError(
            f"{example.source}: has no 'label', and the model is a classifier of {classes.count} classes; write rows "
            "of 'text' and 'label'"
        )
    if example.media or isinstance(tokenizer, RowReader):
        raise InputError(f"{example.source}: classifiers of texts with images or audio are not supported; give texts")
    number = classes.number_of(example)
    ids = list(tokenizer(example.text, truncation=True, max_length=max_length)["input_ids"])
    cut = len(ids) == max_length and len(tokenizer(example.text, verbose=False)["input_ids"]) > max_length
    ids = ids[not_doubled(tokenizer, ids)]
    return Tokens(ids, [IGNORED] * len(ids), label=number, cut=cut)
