"""A pipeline directory as this pass uses it: components that stream, and the pipeline's own code around them.

No component has weights here. The denoiser and the VAE inside the pipeline are empty models.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from onelayer.compiler.denoising.noise import NoiseProcess
from onelayer.compiler.denoising.template import FIRST_TIME
from onelayer.compiler.errors import InputError
from onelayer.compiler.libraries import diffusers_models
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.pipeline_directory import (
    INDEX_FILE,
    components_of,
    denoiser_directory,
    read_pipeline_index,
)

HOST = torch.device("cpu")


class Recorded(BaseException):
    """Ends a pipeline when it has called what was to be recorded. No pipeline catches it."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name)
        self.name, self.value = name, value


@dataclass(frozen=True)
class Request:
    """What a pipeline is asked for: how many pictures of a prompt, and the time of its one step."""

    guidance: float = 1.0
    time: float = FIRST_TIME
    seed: int = 0
    pictures: int = 1


class OpenPipeline:
    """A pipeline without weights: `encoders` and `vae` stream, `denoiser` is the name of the denoiser.

    Denoiser and VAE are taken for models of the dtype `empty_dtype`; float32, so that probes lose nothing to rounding.
    None is the dtype that each is stored in.
    """

    def __init__(self, directory: Path, empty_dtype: torch.dtype | None = torch.float32) -> None:
        """Open every component. Raises `InputError` naming one that is missing or cannot be used."""
        import diffusers

        self.directory = directory
        index = read_pipeline_index(directory)
        self.denoiser_directory = denoiser_directory(directory)
        self.denoiser = self.denoiser_directory.name
        self.class_name: str = index["_class_name"]
        cls = getattr(diffusers, self.class_name, None)
        file = directory / INDEX_FILE
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            raise InputError(
                f"{file}: field _class_name: {self.class_name!r} is not a pipeline of diffusers "
                f"{diffusers.__version__}; custom code is not run, give a stock pipeline"
            )
        self.components = components_of(index)
        for needed in ("vae", "scheduler"):
            if needed not in self.components:
                raise InputError(f"{file}: has no {needed}, which encoding needs; give a whole pipeline")
        for name in self.components:
            if not (directory / name).is_dir() and name != "safety_checker":
                raise InputError(f"{directory / name}: is missing, {INDEX_FILE} names it; download the pipeline again")
        self.encoders = {name: StreamedModel(directory / name) for name in self.components if self._is_encoder(name)}
        self.vae = StreamedModel(directory / "vae")
        if not hasattr(self.vae.model, "encode"):
            raise InputError(f"{directory / 'vae'}: {type(self.vae.model).__name__} encodes no images")
        self.pipe = self._opened(cls, empty_dtype)
        NoiseProcess(**self.scheduler)  # refuses a scheduler that no later command could train with

    def _is_encoder(self, name: str) -> bool:
        library, class_name = self.components[name]
        if library != "transformers":
            return False
        import transformers

        cls = getattr(transformers, class_name, None)
        return isinstance(cls, type) and issubclass(cls, PreTrainedModel)

    def _opened(self, cls: Any, dtype: torch.dtype | None) -> Any:
        """Open the pipeline by its own class, with empty models in the places of its components."""
        import diffusers

        given: dict[str, Any] = {name: part.model for name, part in self.encoders.items()}
        given |= {name: empty(self.directory / name, dtype) for name in ("vae", self.denoiser)}
        given |= {"safety_checker": None} if "safety_checker" in self.components else {}
        diffusers.utils.logging.set_verbosity_error()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe = cls.from_pretrained(str(self.directory), **given)
        except InputError:
            raise
        except Exception as error:  # tokenizers and schedulers raise whatever their files make them raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{self.directory}: the pipeline cannot be opened ({reason}); restore it") from None
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def scheduler(self) -> dict[str, Any]:
        """The class and the config of the scheduler, without infinite limits of solvers, which JSON cannot hold."""
        scheduler = self.pipe.scheduler
        config = {
            name: value
            for name, value in scheduler.config.items()
            if not name.startswith("_") and not (isinstance(value, float) and math.isinf(value))
        }
        return {"class_name": type(scheduler).__name__, "config": config}

    def run(
        self,
        prompt: str,
        size: int,
        request: Request,
        *,
        forwards: dict[str, Callable[..., Any]],
        step: Callable[..., Any] | None = None,
        decode: Callable[..., Any] | None = None,
    ) -> Recorded:
        """Run the pipeline for one step until something raises `Recorded`; return that.

        `forwards` are those of its components. `step` and `decode` replace the scheduler's and the VAE's. Raises
        `InputError` if the pipeline fails or ends before.
        """
        pipe = self.private(self._one_step(request.time, step))
        asked = {
            "num_inference_steps": 1,
            "num_images_per_prompt": request.pictures,
            "num_videos_per_prompt": request.pictures,
            "guidance_scale": request.guidance,
            "true_cfg_scale": 1.0,  # a second pass for a negative prompt is guidance too
            "output_type": "np",
        }
        try:
            with self.replaced(forwards, decode), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.picture(pipe, prompt, size, request.seed, asked)
        except Recorded as found:
            return found
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.directory}: {self.class_name} cannot be recorded ({reason_of(error)})") from error
        raise InputError(f"{self.directory}: {self.class_name} never called its denoiser; give another pipeline")

    def picture(self, pipe: Any, prompt: str, size: int | None, seed: int, asked: Mapping[str, Any]) -> Any:
        """Call a pipeline for one frame of a prompt; the size is its own if None. What it does not know is left out."""
        common = {"prompt": prompt, "num_frames": 1, "use_resolution_binning": False}
        common |= {"generator": torch.Generator().manual_seed(seed)}
        common |= {} if size is None else {"height": size, "width": size}
        known = inspect.signature(type(pipe).__call__).parameters
        return pipe(**{name: value for name, value in {**common, **asked}.items() if name in known})

    @contextmanager
    def replaced(self, forwards: Mapping[str, Callable[..., Any]], decode: Callable[..., Any] | None) -> Iterator[None]:
        """Replace the forwards of components, and what the VAE decodes with."""
        methods = {(getattr(self.pipe, name), "forward"): forward for name, forward in forwards.items()}
        if decode is not None:
            methods[self.pipe.vae, "decode"] = decode
        try:
            for (module, name), method in methods.items():
                module.__dict__[name] = method
            yield
        finally:
            for module, name in methods:
                module.__dict__.pop(name, None)

    def _one_step(self, time: float, step: Callable[..., Any] | None) -> Any:
        """Return a scheduler like the pipeline's, which has one step at the given time."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        plain = scheduler.set_timesteps

        @functools.wraps(plain)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            plain(*args, **kwargs)
            scheduler.timesteps = torch.full_like(scheduler.timesteps[:1].float(), time)
            scheduler.num_inference_steps = 1

        scheduler.set_timesteps = set_timesteps
        if step is not None:
            scheduler.step = step
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input = lambda sample, *args, **kwargs: sample
        return scheduler

    def private(self, scheduler: Any) -> Any:
        """Return the pipeline with a scheduler of its own; it takes the host for the device of its components."""
        cls = type(self.pipe)
        # Models without weights are on no device, and a pipeline would take that for its own.
        on_host = type(cls.__name__, (cls,), {"device": HOST, "_execution_device": HOST})
        settings = inspect.signature(cls.__init__).parameters
        plain_settings = {
            name: value
            for name, value in self.pipe.config.items()
            if name in settings and name not in self.pipe.components
        }
        pipe = on_host(**{**self.pipe.components, **plain_settings, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def reason_of(error: Exception) -> str:
    """Say in one line what a pipeline's own code failed with."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def empty(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """Build a component of diffusers without weights that says it is on the host, by default in its stored dtype.

    Raises `InputError` naming what is wrong with it.
    """
    config = diffusers_models.read_config(directory)
    cls = diffusers_models.model_class(config, directory)
    dtype = dtype or diffusers_models.compute_dtype(config, Checkpoint.open(directory))
    model = diffusers_models.build_skeleton(config, cls, dtype)
    model.__class__ = type(cls.__name__, (cls,), {"device": HOST})
    return model
