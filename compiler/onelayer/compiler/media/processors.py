"""A model's directory in, what makes inputs of its rows out: the model's own processor, run by Pillow.

transformers' image processors exist for torchvision and for Pillow, with slightly different pixels. Pillow's run
everywhere, so they are always taken; the choice is part of the digest. This is the only module that knows how
transformers builds processors.
"""

import inspect
import types
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.errors import InputError
from onelayer.compiler.media.sources import MediaKind
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BACKEND = "pil"
FILES = ("processor_config.json", "preprocessor_config.json")
REMEDY = f"copy the model's {' or '.join(FILES)} there"


@dataclass(frozen=True)
class RowProcessor:
    """What makes a model's inputs of rows with images or audio.

    `stock` is transformers' own: a processor with a tokenizer, or an image processor or feature extractor alone.
    Images of more than `max_image_pixels` are scaled down first.
    """

    directory: Path
    stock: Any
    max_image_pixels: int | None = None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer; None if the model reads no text."""
        return getattr(self.stock, "tokenizer", None)

    @property
    def text_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of a model that reads text."""
        assert self.tokenizer is not None, "asked only of models that read text"
        return self.tokenizer

    @property
    def reads(self) -> tuple[MediaKind, ...]:
        """The kinds of media that become inputs."""
        kinds: tuple[tuple[MediaKind, Any], ...] = (("image", self.image_processor), ("audio", self.feature_extractor))
        return tuple(kind for kind, part in kinds if part is not None)

    @property
    def image_processor(self) -> Any:
        """The part that reads images; None if there is none."""
        return getattr(self.stock, "image_processor", None) or (self.stock if _is_image_processor(self.stock) else None)

    @property
    def feature_extractor(self) -> Any:
        """The part that reads audio; None if there is none."""
        part = getattr(self.stock, "feature_extractor", None)
        return part or (self.stock if hasattr(self.stock, "sampling_rate") else None)

    @property
    def rate_hz(self) -> int:
        """The sampling rate of the audio that the model reads."""
        return int(self.feature_extractor.sampling_rate)

    @cached_property
    def digest(self) -> str:
        """The digest of all that decides pixel values and features: processor files, backend and the pixel limit."""
        files = {name: read_json(self.directory / name) for name in FILES if (self.directory / name).is_file()}
        return sha256_json({"files": files, "backend": BACKEND, "max_image_pixels": self.max_image_pixels})


def load_processor(
    directory: Path, model_class: "type[PreTrainedModel]", max_image_pixels: int | None = None
) -> RowProcessor | None:
    """Load the processor of a model's directory, without the network or code from there.

    None if the model of class `model_class` reads text only, or no processor is there. Raises `InputError` for one that
    cannot be loaded.
    """
    if not any((directory / name).is_file() for name in FILES):
        return None
    try:
        stock = _stock(directory)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{directory}: its processor needs another package ({_first_line(error)})") from None
    except Exception as error:  # files of any content: transformers raises TypeError, KeyError, OSError and others
        raise InputError(
            f"{directory}: no processor that can be loaded ({type(error).__name__}: {_first_line(error)}); {REMEDY}"
        ) from None
    processor = RowProcessor(directory, stock, max_image_pixels)
    parts = (processor.image_processor, processor.feature_extractor)
    names = [name for part in parts if part is not None for name in part.model_input_names[:1]]
    return processor if {*names} & inspect.signature(model_class.forward).parameters.keys() else None


def media_read(directory: Path) -> list[MediaKind]:
    """List the kinds of media that a model's directory has a processor for, from its files alone."""
    documents = [read_json(directory / name) for name in FILES if (directory / name).is_file()]
    keys = {key for document in documents if isinstance(document, dict) for key in document}
    found: list[MediaKind] = ["image"] if keys & {"image_processor", "image_processor_type"} else []
    return [*found, "audio"] if keys & {"feature_extractor", "feature_extractor_type"} - _of_images(keys) else found


def _of_images(keys: Collection[str]) -> set[str]:
    """Return what old configurations of image processors have too: they were called feature extractors."""
    return {"feature_extractor_type"} if "image_processor_type" in keys else set()


def _stock(directory: Path) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, ProcessorMixin

    cls = _processor_class(directory)
    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if cls is not None and issubclass(cls, ProcessorMixin) and not _predicts_classes(directory):
        return without_video(cls).from_pretrained(directory, local_files_only=True, backend=BACKEND)
    path = next(directory / name for name in reversed(FILES) if (directory / name).is_file())
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: must hold an object; {REMEDY}")
    if "feature_extractor" in document or (
        "feature_extractor_type" in document and "image_processor_type" not in document
    ):
        return AutoFeatureExtractor.from_pretrained(directory, **own)
    return AutoImageProcessor.from_pretrained(directory, backend=BACKEND, **own)


def _processor_class(directory: Path) -> Any:
    """Return the class that the files name, else that of the model's type; None if there is none.

    Raises `InputError` for a class that transformers does not have: its code would have to come from the directory.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    for name in (*FILES, "tokenizer_config.json"):
        path = directory / name
        document = read_json(path) if path.is_file() else {}
        named = document.get("processor_class") if isinstance(document, dict) else None
        if named:
            cls = getattr(transformers, str(named), None)
            if not isinstance(cls, type):
                raise InputError(f"{path}: field processor_class: transformers has no {named}; {REMEDY}")
            return cls
    kind = read_json(directory / "config.json").get("model_type")
    named = PROCESSOR_MAPPING_NAMES.get(kind)
    return getattr(transformers, named, None) if isinstance(named, str) else None


def _predicts_classes(directory: Path) -> bool:
    """Return whether the model is a classifier of images or audio, which reads no text whatever its family reads."""
    names = read_json(directory / "config.json").get("architectures") or [""]
    return str(names[0]).endswith(("ForImageClassification", "ForAudioClassification", "ForSequenceClassification"))


def without_video(cls: Any) -> Any:
    """Return the class, or without torchvision one of the same name that has no video processor.

    Only torchvision's video processors exist, and videos are refused anyway. transformers reads the fields of a
    processor off the code of `__init__`, which is therefore copied with other defaults, not wrapped.
    """
    from transformers.utils.import_utils import is_torchvision_available

    names = cls.get_attributes()
    if "video_processor" not in names or is_torchvision_available():
        return cls
    kept = [name for name in names if name != "video_processor"]
    fields: dict[str, Any] = {"get_attributes": classmethod(lambda c: kept), "__module__": cls.__module__}
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    place = next(index for index, item in enumerate(parameters) if item.name == "video_processor")
    if parameters[place].default is inspect.Parameter.empty:
        old = cls.__init__
        later = [item for item in parameters[place:] if item.kind is item.POSITIONAL_OR_KEYWORD]
        defaults = tuple(None if item.default is item.empty else item.default for item in later)
        fields["__init__"] = types.FunctionType(old.__code__, old.__globals__, old.__name__, defaults, old.__closure__)
    return type(cls.__name__, (cls,), fields)


def _is_image_processor(part: Any) -> bool:
    from transformers.image_processing_base import ImageProcessingMixin

    return isinstance(part, ImageProcessingMixin)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
