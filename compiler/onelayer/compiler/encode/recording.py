"""Prompts in, templates out: the pipeline's own code runs, and its denoiser records what it is called with.

A text encoder that the pipeline calls is streamed for all prompts together. Then the pipelines run again, with the
encoder's answers at hand, until every one of them has called its denoiser.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from onelayer.compiler.denoising.joining import NotJoinedError, joined, joining_of
from onelayer.compiler.denoising.template import FIRST_TIME, OTHER_TIME, NotATemplateError, Template
from onelayer.compiler.encode.pipeline import OpenPipeline, Recorded, Request
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.streaming.stream import Stream

# Most pipelines guide, by a second sample, above 1; some above 0.
GUIDANCE_OFF = (1.0, 0.0)
# Calls of encoders for one prompt; pipelines make one for each encoder and prompt.
MOST_CALLS = 16
DENOISER = "denoiser"


class TextRecorder:
    """Runs a pipeline for some prompts. `answers[prompt][encoder]` are the encoder's answers so far, in order."""

    def __init__(self, pipeline: OpenPipeline, prompts: Sequence[str], size: int, meter: Meter) -> None:
        self.pipeline, self.prompts, self.size, self.meter = pipeline, prompts, size, meter
        self._answers: list[dict[str, list[Any]]] = [{name: [] for name in pipeline.encoders} for _ in prompts]

    def encode(self, guidance: float) -> None:
        """Stream the encoders until every prompt has what its pipeline asks for."""
        for _ in range(MOST_CALLS):
            calls: dict[str, dict[int, Any]] = {}
            for number in range(len(self.prompts)):
                found = self.recorded(number, Request(guidance))
                if found.name != DENOISER:
                    calls.setdefault(found.name, {})[number] = found.value
            if not calls:
                return
            for name, waiting in calls.items():
                self._stream(name, waiting)
        raise InputError(f"{self.pipeline.directory}: {self.pipeline.class_name} calls its encoders without end")

    def _stream(self, name: str, calls: dict[int, Any]) -> None:
        numbers = list(calls)
        answers: dict[int, Any] = {}
        streamed = self.pipeline.encoders[name]
        stream = Stream(streamed, self.meter.device, self.meter, description=name)
        stream.run([calls[number] for number in numbers], answers.__setitem__)
        for index, number in enumerate(numbers):
            self._answers[number][name].append(answers[index])

    def recorded(self, number: int, request: Request) -> Recorded:
        """Run the pipeline for a prompt until it calls its denoiser, or an encoder whose answer is not known."""
        forwards: dict[str, Callable[..., Any]] = self.forwards(number)
        denoiser = type(getattr(self.pipeline.pipe, self.pipeline.denoiser))
        forwards[self.pipeline.denoiser] = partial(_record, DENOISER, denoiser)
        return self.pipeline.run(self.prompts[number], self.size, request, forwards=forwards)

    def forwards(self, number: int) -> dict[str, Callable[..., Any]]:
        """Return forwards of the encoders that give the known answers for a prompt, once each and in order."""
        found: dict[str, Callable[..., Any]] = {}
        for name, answers in self._answers[number].items():
            cls = type(self.pipeline.encoders[name].model)
            found[name] = partial(_answer, iter(answers), partial(_record, name, cls))
        return found

    def templates(self, guidance: float | None) -> tuple[list[Template], float]:
        """Return the template of every prompt, and the guidance that the pipelines ran with.

        `guidance` is an argument of guidance-distilled denoisers. Raises `InputError` if the pipeline still guides.
        """
        reason = "it guides whatever its guidance_scale"
        for value in GUIDANCE_OFF if guidance is None else (guidance,):
            self.encode(value)
            try:
                return [self._template(number, value) for number in range(len(self.prompts))], value
            except NotATemplateError as error:
                reason = str(error)
        option = "" if guidance is None else f"--guidance {guidance:g}: "
        remedy = "leave it out" if guidance is not None else "give another pipeline"
        raise InputError(f"{option}{self.pipeline.directory}: {self.pipeline.class_name}: {reason}; {remedy}")

    def _template(self, number: int, guidance: float) -> Template:
        first, later, other = (
            self.recorded(number, Request(guidance, time, seed)).value
            for time, seed in ((FIRST_TIME, 0), (OTHER_TIME, 0), (FIRST_TIME, 1))
        )
        template = Template.of(first, later, other)
        try:
            two = self.recorded(number, Request(guidance, pictures=2)).value
            joining = joining_of(first, two)
            joined(joining, [first, other])  # a pipeline that makes one picture whatever is asked shares the sample
        except (NotJoinedError, InputError):
            return template  # its images are computed one by one
        return replace(template, form=replace(template.form, joining=joining))


def _record(name: str, cls: type[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Raise what a component is called with, by the names of its forward's parameters."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    raise Recorded(name, {**dict(zip(names, args, strict=False)), **kwargs})


def _answer(answers: Any, record: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the next known answer, or record the call."""
    for answer in answers:
        return answer
    return record(*args, **kwargs)
