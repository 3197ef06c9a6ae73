"""Where latents and predictions lie in what a pipeline passes on, found by sending numbers through its own code.

What the denoiser answers goes through the pipeline to its scheduler, and what the scheduler returns to the VAE.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from onelayer.compiler.denoising.layout import Layout, NotALayoutError
from onelayer.compiler.denoising.template import FIRST_TIME, Template
from onelayer.compiler.encode.pipeline import OpenPipeline, Recorded, Request
from onelayer.compiler.encode.recording import TextRecorder
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.streaming.stream import Stream

PREDICTED, DECODED = "predicted", "decoded"


class Probe:
    """A pipeline of one prompt, whose denoiser gives prepared answers."""

    def __init__(
        self, pipeline: OpenPipeline, recorder: TextRecorder, template: Template, guidance: float, meter: Meter
    ) -> None:
        """Run the denoiser once, streamed: nothing else tells the shape of its answer."""
        self.pipeline, self.recorder, self.guidance = pipeline, recorder, guidance
        streamed = StreamedModel(pipeline.denoiser_directory)
        self.largest_unit_bytes, self.bytes_read = streamed.largest_unit_bytes, 0
        sample = torch.zeros(template.leaves[template.form.sample].shape)
        answers: dict[int, Any] = {}
        stream = Stream(streamed, meter.device, meter, description=pipeline.denoiser)
        stream.run([template.arguments(sample, FIRST_TIME, streamed.dtype)], answers.__setitem__)
        self.bytes_read = streamed.checkpoint.bytes_read
        answer = answers[0]
        self._leaves, self._tree = tree_flatten(dict(answer) if hasattr(answer, "to_tuple") else answer)
        self._rebuild = type(answer) if hasattr(answer, "to_tuple") else None
        self._count = sum(leaf.numel() for leaf in self._leaves)
        self._sample = template.leaves[template.form.sample]

    def layouts(self) -> tuple[Layout, Layout]:
        """Find where a latent of the VAE lies in a sample, and the prediction in the denoiser's answer.

        Raises `InputError` if the pipeline does more with them than moving and scaling values.
        """
        shape = self._run(torch.zeros(self._count), PREDICTED)[1]
        if torch.Size(shape).numel() != self._sample.numel():
            raise InputError(
                f"{self.pipeline.directory}: {self.pipeline.class_name} gives its denoiser more than the sample "
                f"({tuple(self._sample.shape)} for {tuple(shape)}); give a pipeline of texts to images"
            )
        zeros = torch.zeros(self._count)
        try:
            latent = Layout.found(tuple(shape), lambda values: self._run(zeros, DECODED, values)[0])
            answer = Layout.found((self._count,), lambda values: self._run(values, PREDICTED)[0])
        except NotALayoutError as error:
            raise InputError(
                f"{self.pipeline.directory}: {self.pipeline.class_name} cannot be probed, {error}; give another"
            ) from None
        return latent, answer

    def _run(
        self, values: torch.Tensor, until: str, stepped: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Size]:
        """Run the pipeline with `values` as the answer; return what arrives, and the shape of the sample."""
        shapes: list[torch.Size] = []

        def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            shapes.append(sample.shape)
            if until == PREDICTED:
                raise Recorded(PREDICTED, model_output)
            assert stepped is not None
            return (stepped.to(sample.dtype).reshape(sample.shape),)

        def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            raise Recorded(DECODED, latent)

        forwards: dict[str, Callable[..., Any]] = self.recorder.forwards(0)
        forwards[self.pipeline.denoiser] = lambda *args, **kwargs: self._answer(values)
        found = self.pipeline.run(
            self.recorder.prompts[0],
            self.recorder.size,
            Request(self.guidance),
            forwards=forwards,
            step=step,
            decode=decode,
        )
        if found.name != until:
            raise InputError(f"{self.pipeline.directory}: {self.pipeline.class_name} cannot be probed")
        return found.value.detach().double(), shapes[0]

    def _answer(self, values: torch.Tensor) -> Any:
        parts = values.split([leaf.numel() for leaf in self._leaves])
        leaves = [part.reshape(leaf.shape) for part, leaf in zip(parts, self._leaves, strict=True)]
        answer = tree_unflatten(leaves, self._tree)
        return answer if self._rebuild is None else self._rebuild(**answer)
