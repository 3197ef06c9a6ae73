"""Draws pictures with a pipeline's own code: its text encoders, its denoiser with an adapter, and its VAE stream by.

In: prompts, a pipeline, an adapter. Out: a folder of PNG files. Held on the device: one unit and what it computes for
one prompt. All prompts pass in step, so a denoising step reads the denoiser once, however many there are.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves, tree_map_only

from onelayer.compiler.adapters.attach import Adapted, adapted_model
from onelayer.compiler.adapters.fit import check_made_for
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.replacements import replaced_bytes
from onelayer.compiler.denoising.encoded import write_tensors
from onelayer.compiler.encode.pipeline import OpenPipeline, reason_of
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.variants import Variant, switch_variants
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import scoring_bytes
from onelayer.compiler.results import Report
from onelayer.compiler.sampling.lockstep import Call, Lockstep
from onelayer.compiler.sampling.report import Picture, Samples
from onelayer.compiler.sampling.settings import Pictures
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import write_json
from onelayer.compiler.streaming.stream import Stream

VAE = "vae"
SAMPLES_FILE = "samples.json"
# Maps as large as what a block of a VAE is given and returns together: those, their norm, and the convolution's copies.
DECODER_MAPS = 4


class PictureSampler:
    """A pipeline without weights that can draw the pictures asked for; the noise of each is that of `seed`."""

    def __init__(self, directory: Path, pictures: Pictures, seed: int) -> None:
        """Open the pipeline, and let it check what it is asked for. Raises `InputError` if it cannot draw that."""
        self.directory, self.pictures, self.seed = directory, pictures, seed
        self.pipeline = OpenPipeline(directory, empty_dtype=None)
        if not self.pipeline.encoders:
            raise InputError(f"{directory}: has no text encoder, which sample pictures need; give a whole pipeline")
        self.digest = model_digest(self.pipeline.denoiser_directory)
        with self._runs():
            pass  # every run has reached its first call, after the pipeline's own checks

    def recorded(self) -> dict[str, Any]:
        """What decides the pictures, but for the adapter."""
        parts = {name: model_digest(self.directory / name) for name in (VAE, *self.pipeline.encoders)}
        asked = {**self.pictures.model_dump(), "seed": self.seed}
        return {
            **asked,
            "denoiser": self.digest,
            "components": parts,
            "scheduler": sha256_json(self.pipeline.scheduler),
        }

    def draw(self, adapter: Path | None, work: Path, output: Path, device: torch.device) -> Samples:
        """Draw the pictures into the directory `output`.

        The answers of components are kept in `work`, and found again there by an interrupted run.
        """
        opened = {} if adapter is None else {"adapter": Adapter.open(adapter)}
        for item in opened.values():
            check_made_for(item, self.pipeline.denoiser_directory, self.digest)
        adapted = adapted_model(self.pipeline.denoiser_directory, opened)
        work.mkdir(exist_ok=True)
        with Meter(device) as meter, self._runs() as runs:
            streams = _Streams(self.pipeline, adapted, next(iter(opened), None), work, meter)
            for part, numbers, calls in runs.calls():
                for number, answer in zip(numbers, streams.answers(part, calls), strict=True):
                    runs.answer(number, answer)
            streams.check_unchanged()
            report = streams.report()
        output.mkdir(exist_ok=True)
        pictures = []
        for number, prompt in enumerate(self.pictures.prompts):
            pictures.append(Picture(file=f"{number}.png", prompt=prompt))
            _first(runs.results[number]).save(output / pictures[-1].file)
        document = {"format_version": 1, "kind": "samples", **self.recorded()}
        write_json(output / SAMPLES_FILE, {**document, "pictures": [picture.model_dump() for picture in pictures]})
        return Samples(output=str(output), pictures=tuple(pictures), seed=self.seed, report=report)

    def _runs(self) -> Lockstep:
        asked: dict[str, Any] = {"output_type": "pil", "return_dict": False}
        if self.pictures.steps is not None:
            asked["num_inference_steps"] = self.pictures.steps

        def run(prompt: str) -> Any:
            pipe = self.pipeline.private(copy.deepcopy(self.pipeline.pipe.scheduler))
            try:
                return self.pipeline.picture(pipe, prompt, self.pictures.resolution, self.seed, asked)
            except Exception as error:  # pipelines raise whatever they refuse with
                refused = f"{self.pipeline.class_name} draws no picture of {prompt!r}"
                raise InputError(f"{self.directory}: {refused} ({reason_of(error)}); correct what it names") from error

        return Lockstep([partial(run, prompt) for prompt in self.pictures.prompts], self._stubs)

    def _stubs(self, stub: Callable[[str], Callable[..., Any]]) -> Any:
        names = (*self.pipeline.encoders, self.pipeline.denoiser)
        return self.pipeline.replaced({name: stub(name) for name in names}, stub(VAE))


class _Streams:
    """The components of a pipeline that draws, and what their streams cost."""

    def __init__(self, pipeline: OpenPipeline, adapted: Adapted, adapter: str | None, work: Path, meter: Meter) -> None:
        self.adapted, self.work, self.meter = adapted, work, meter
        self.denoiser = pipeline.denoiser
        self.parts: dict[str, StreamedModel] = {**pipeline.encoders, self.denoiser: adapted.streamed, VAE: pipeline.vae}
        self._variants = [Variant(adapter=adapter)]
        self._workspace_bytes = self._count = 0

    def answers(self, part: str, calls: Sequence[Call]) -> list[Any]:
        """Return what a component answers to calls: by a stream of it, or from an interrupted run."""
        self._count += 1
        kept = self.work / f"{self._count:06d}.safetensors"
        if kept.is_file():
            return _read_answers(kept, len(calls))
        # Autoencoders of videos keep what one decoding needs in the model itself.
        together = [[call] for call in calls] if part == VAE else [calls]
        answers = [answer for group in together for answer in self._streamed(part, group)]
        if part in (self.denoiser, VAE):
            for answer in answers:
                self._check_finite(part, answer)
        if all(_is_plain(answer) for answer in answers):
            tensors = {f"{run}.{place}": t for run, answer in enumerate(answers) for place, t in enumerate(answer)}
            write_tensors(kept, tensors)
        return answers

    def _streamed(self, part: str, calls: Sequence[Call]) -> list[Any]:
        streamed = self.parts[part]
        method = streamed.model.decode if part == VAE else streamed.model
        on_unit = switch_variants(self.adapted, self._variants, self.meter.device) if part == self.denoiser else None
        stream = Stream(
            streamed,
            self.meter.device,
            self.meter,
            on_unit,
            description=f"sample, {part}",
            call=lambda args, kwargs: method(*args, **kwargs),
        )
        batches = [_in_dtype({"args": call.args, "kwargs": dict(call.kwargs)}, streamed.dtype) for call in calls]
        answers: dict[int, Any] = {}
        stream.run(batches, answers.__setitem__)
        self._workspace_bytes = max(self._workspace_bytes, self._workspace(part, stream, batches))
        return [answers[number] for number in range(len(calls))]

    def _workspace(self, part: str, stream: Stream, batches: Sequence[Any]) -> int:
        """Predict what a stream holds in addition to its largest unit; on a host also the runs that wait."""
        streamed, on_gpu = stream.streamed, stream.device.type != "cpu"
        loads, value_bytes = stream.loads, max(4, stream.streamed.dtype.itemsize)
        values = DECODER_MAPS * loads.most_states if part == VAE else loads.most_values(streamed)
        needed = scoring_bytes(streamed.largest_unit_bytes, 0, values, on_gpu) + streamed.host_bytes(on_gpu)
        if part == self.denoiser:
            trained = sum(value.nbytes for value in streamed.model.parameters() if value.requires_grad)
            needed += replaced_bytes(streamed, self.adapted.replacements) + trained
        if not on_gpu:
            given = sum(leaf.nbytes for leaf in tree_leaves(list(batches)) if isinstance(leaf, torch.Tensor))
            needed += given + len(batches) * loads.most_states * value_bytes
        return needed

    def _check_finite(self, part: str, answer: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        if not all(bool(leaf.isfinite().all()) for leaf in leaves):
            dtype = str(self.parts[part].dtype).removeprefix("torch.")
            raise InputError(
                f"{self.parts[part].checkpoint.directory}: its answer for a sample picture is not finite in {dtype}; "
                "store this component in float32, or lower the learning rate"
            )

    def check_unchanged(self) -> None:
        """Raise `InputError` if a file of a component was replaced while it was read."""
        for part in self.parts.values():
            part.checkpoint.check_unchanged()

    def report(self) -> Report:
        """Return what all streams cost."""
        largest = max(part.largest_unit_bytes for part in self.parts.values())
        read = sum(part.checkpoint.bytes_read for part in self.parts.values())
        return self.meter.report(largest, self._workspace_bytes, read)


def _in_dtype(arguments: Any, dtype: torch.dtype) -> Any:
    """Return arguments in the dtype of the component that gets them; plain numbers stay, models convert them."""
    return tree_map_only(
        torch.Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() and leaf.ndim > 1 else leaf, arguments
    )


def _is_plain(answer: Any) -> bool:
    return type(answer) is tuple and all(isinstance(item, torch.Tensor) for item in answer)


def _read_answers(path: Path, count: int) -> list[Any]:
    """Read kept answers: a tuple of tensors for each of `count` runs."""
    stored = load_file(path)
    places = len(stored) // count
    return [tuple(stored[f"{run}.{place}"] for place in range(places)) for run in range(count)]


def _first(pictures: Any) -> Any:
    """Return the one picture of what a pipeline returns: lists of lists, of a video of one frame too."""
    while isinstance(pictures, list | tuple):
        pictures = pictures[0]
    return pictures
