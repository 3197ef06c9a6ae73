"""An ordinary transformers model whose weights stay on disk: a model in, one that any trainer takes out.

Its class is the model's own class with another forward, so whatever asks for the class, its configuration or the
arguments of `forward` finds what it expects.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import processes
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.runtime.streamed.settings import StreamedKeywords, StreamedSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@settings_keywords(StreamedSettings, StreamedKeywords)
def streamed_for_training(model: str | Path, **settings: Unpack[StreamedKeywords]) -> "PreTrainedModel":
    """Open a model for training an adapter, with its weights on disk and one layer of it in memory.

    `model` is a directory or a Hub id. The result is a transformers model of its own class: PEFT adapts it, and
    `Trainer` or a trainer of TRL trains it. A call streams forward and `backward()` streams back, each reading the
    model once, so give a trainer large batches; rows are computed `micro_batch_size` at a time. The weights do not
    change, and `save_pretrained` of a PEFT model writes the adapter. `model.streaming.report()` tells what it cost.
    Raises `InputError` for a model that cannot be streamed, and where a launcher started several processes.
    """
    asked = StreamedSettings.of(settings)
    if not processes().is_alone:
        raise InputError(f"{model}: a streamed model trains in one process; start it without torchrun")
    directory = resolve_model(model, asked.revision)
    from transformers import GenerationConfig

    from onelayer.compiler.libraries.transformers_models import GENERATION_FILE
    from onelayer.runtime.streamed.engine import StreamingEngine, parts_of

    engine = StreamingEngine(directory, asked)
    opened: Any = engine.model
    parts: list[Any] = list(parts_of(opened, engine.streamed))
    for part in parts:
        part.streaming = engine
        part.__class__ = _part_class(part.__class__)
    opened.streaming = engine
    opened.__class__ = _whole_class(opened.__class__)
    opened.name_or_path = str(model)
    if (directory / GENERATION_FILE).is_file():
        opened.generation_config = GenerationConfig.from_pretrained(directory)
    result: PreTrainedModel = opened
    return result


class _Streamed:
    """What parts and the whole have in common."""

    streaming: Any

    @property
    def device(self) -> Any:
        """The device that batches belong on; inside a stream the host, where the code between units runs."""
        import torch

        return torch.device("cpu") if self.streaming.is_running else self.streaming.device


class _Whole(_Streamed):
    """What the whole model does otherwise than one that is in memory."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `InputError`: the weights are those of the original."""
        original = self.streaming.streamed.checkpoint.directory
        raise InputError(
            f"{save_directory}: the weights of a streamed model are those of {original}; save the adapter "
            "(PeftModel.save_pretrained), and `onelayer merge` it for a whole model"
        )

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: every unit keeps its inputs only, and runs again on the way back."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode, but not in layers that learn from batches (batch norms): the original does not change."""
        from torch.nn.modules.batchnorm import _BatchNorm

        super().train(mode)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, _BatchNorm):
                module.training = False
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast what adapters added; the original's weights and buffers lie where the streams need them."""
        own = self.streaming.streamed.stored_owners()
        for module in self.modules():  # type: ignore[attr-defined]
            for name, parameter in module._parameters.items():
                if parameter is not None and (module, name) not in own:
                    parameter.data = fn(parameter.data)
                    if parameter.grad is not None:
                        parameter.grad.data = fn(parameter.grad.data)
        return self


@functools.cache
def _part_class(cls: type) -> type:
    """Return the class of a part whose calls stream."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.streaming.part(self, functools.partial(cls.forward, self), args, kwargs)  # type: ignore[attr-defined]

    return _same_name((_Streamed, cls), cls, forward)


@functools.cache
def _whole_class(cls: type) -> type:
    """Return the class of a model whose parts stream."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.streaming.whole(functools.partial(cls.forward, self), args, kwargs)  # type: ignore[attr-defined]

    return _same_name((_Whole, cls), cls, forward)


def _same_name(bases: tuple[type, ...], cls: type, forward: Any) -> type:
    return type(cls.__name__, bases, {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})
