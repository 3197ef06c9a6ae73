"""Predicts what each step of a manifest reads, writes and needs on the device, from the model's shapes.

Torch-free: `onelayer run --dry-run` shows these figures before anything is computed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import widest_ratio
from onelayer.compiler.machine.hardware import shows_gpu
from onelayer.compiler.results import Result
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.manifest.sections import Emulator
from onelayer.runtime.pipeline.emulator_size import of_pictures, planned_run, shapes_of_examples, size_of_shapes
from onelayer.runtime.pipeline.step import Step
from onelayer.runtime.planning.choice import Size
from onelayer.runtime.planning.pass_memory import (
    compile_bytes,
    evaluate_bytes,
    pass_bytes,
    polish_bytes,
    refine_bytes,
    renewal_bytes,
)
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.sub_blocks import MASTER_BYTES, lora_parameters
from onelayer.runtime.planning.train_memory import PlannedRun, emulator_bytes, train_memory


class StepCosts(Result):
    """Bytes that a step reads and writes, and its predicted device peak; None if unknown."""

    read_bytes: int | None = None
    write_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class CostBasis:
    """Everything that decides the costs of one step. `size` is that of the common emulator."""

    step: Step
    manifest: Manifest
    shapes: ModelShapes
    size: Size

    @property
    def ratio(self) -> float:
        """The ratio of the emulator that the step makes or uses."""
        task = self.step.task
        own = self.step.fields.get("ratio") if task is None else self.manifest.tasks[task].ratio
        return own or self.size.ratio

    @property
    def task(self) -> str:
        """The task of a step that belongs to one."""
        assert self.step.task is not None
        return self.step.task

    @property
    def emulator(self) -> Emulator:
        """The emulator section of a manifest that has one."""
        assert self.manifest.emulator is not None
        return self.manifest.emulator

    @property
    def planned(self) -> PlannedRun:
        """The run that the step's task asks for, on a GPU if this machine shows one."""
        on_gpu = shows_gpu() and not self.manifest.training(self.task).args.get("use_cpu")
        run = of_pictures(planned_run(self.manifest, self.task), self.shapes)
        return replace(run, coded=self.size.coded, on_gpu=on_gpu)

    def tokens(self, batch_size: int, max_length: int) -> int:
        """Return what a pass has on the device at once: a batch, or the positions of a picture."""
        return self.shapes.positions or batch_size * max_length

    @property
    def model_bytes(self) -> int:
        """The size of the original on disk."""
        return self.shapes.stored_bytes

    @property
    def adapter_bytes(self) -> int:
        """The size of the task's adapter."""
        return MASTER_BYTES * lora_parameters(self.shapes, self.planned.lora_rank)

    def emulator_bytes(self, ratio: float) -> int:
        """Predict the size of an emulator with this ratio."""
        return emulator_bytes(self.shapes, ratio, self.size.stored)


class Costs:
    """The figures that decide all costs of one manifest. There are none without a local model that has linears.

    Raises `InputError` if nothing fits the manifest's memory.
    """

    def __init__(self, manifest: Manifest, directory: Path | None) -> None:
        self._manifest = manifest
        self._shapes: ModelShapes | None = None
        self.size: Size | None = None
        if directory is None:
            return
        try:
            self._shapes = shapes_of_examples(manifest, directory)
        except InputError:  # the step itself reports what is wrong
            return
        if manifest.emulator is not None:
            self.size = size_of_shapes(manifest, manifest.emulator, self._shapes)

    def basis(self, step: Step) -> CostBasis | None:
        """Return what decides the costs of a step; None if the model is unknown."""
        if self._shapes is None:
            return None
        return CostBasis(step, self._manifest, self._shapes, self.size or Size(1.0, None))


def unknown_costs(basis: CostBasis) -> StepCosts:
    """Predict nothing."""
    return StepCosts()


def compile_costs(basis: CostBasis) -> StepCosts:
    """Predict a compile: one pass over the original, and one back if errors are weighted by gradients."""
    tokens = basis.tokens(basis.manifest.stream.batch_size, basis.emulator.calibration.max_length)
    ratio = basis.ratio if basis.size.coded else widest_ratio(basis.ratio, basis.emulator.allocation)
    asked, coded = basis.emulator.backward, basis.size.coded
    backward = asked is not False if coded else asked is True
    peak = compile_bytes(basis.shapes, ratio, tokens, coded, backward, on_gpu=shows_gpu())
    read = basis.model_bytes * (2 if backward else 1)
    return StepCosts(read_bytes=read, write_bytes=basis.emulator_bytes(basis.ratio), peak_bytes=peak)


def slice_costs(basis: CostBasis) -> StepCosts:
    """Predict a slice of the common emulator."""
    read, written = basis.emulator_bytes(basis.size.ratio), basis.emulator_bytes(basis.ratio)
    return StepCosts(read_bytes=read, write_bytes=written)


def refine_costs(basis: CostBasis) -> StepCosts:
    """Predict a refinement: one pass over original and emulator, two over the original if gradients are learned."""
    refinement = basis.emulator.refine
    assert refinement is not None
    tokens = basis.tokens(refinement.batch_size, basis.emulator.calibration.max_length)
    backward, coded = refinement.backward, basis.size.coded
    peak = refine_bytes(basis.shapes, basis.ratio, tokens, basis.emulator.allocation, coded=coded, backward=backward)
    written = basis.emulator_bytes(basis.ratio)
    return StepCosts(
        read_bytes=(2 if backward else 1) * basis.model_bytes + written, write_bytes=written, peak_bytes=peak
    )


def train_costs(basis: CostBasis) -> StepCosts:
    """Predict a training, on the emulator if the step needs one, else on the original."""
    trained_on = basis.emulator_bytes(basis.ratio) if "emulator" in basis.step.needs else basis.model_bytes
    memory = train_memory(basis.shapes, trained_on, basis.planned)
    read: int | None = trained_on
    peak = memory.peak
    if "anchor" in basis.step.fields:
        read = _anchored_read(basis, trained_on)
        peak = max(peak, renewal_bytes(basis.shapes, memory, basis.planned))
    return StepCosts(read_bytes=read, write_bytes=basis.adapter_bytes, peak_bytes=peak)


def _anchored_read(basis: CostBasis, trained_on: int) -> int | None:
    """Add one reading of the original for every renewal; None if the number of steps depends on the data.

    Renewals where an epoch begins are not foreseen.
    """
    training = basis.manifest.training(basis.task)
    steps: int | None = training.args.get("max_steps")
    if training.anchor is None or steps is None:
        return None
    return trained_on + -(-steps // training.anchor.every) * basis.model_bytes


def correct_costs(basis: CostBasis) -> StepCosts:
    """Predict a correction. The original is read once; twice if held-out text chooses, unless it has few rows."""
    read = (2 if basis.planned.scored_tokens else 1) * basis.model_bytes + basis.emulator_bytes(basis.ratio)
    peak = pass_bytes(basis.shapes, basis.ratio, basis.planned)["correct"]
    return StepCosts(read_bytes=read, write_bytes=basis.adapter_bytes, peak_bytes=peak)


def polish_costs(basis: CostBasis) -> StepCosts:
    """Predict a polish: every step reads the original twice."""
    polishing, training = basis.manifest.polishing(basis.task), basis.manifest.training(basis.task)
    assert polishing is not None
    positions = basis.shapes.positions or training.max_length
    peak = polish_bytes(basis.shapes, training.lora.r, polishing.micro_batch_size * positions)
    read = 2 * polishing.steps * basis.model_bytes
    return StepCosts(read_bytes=read, write_bytes=basis.adapter_bytes, peak_bytes=peak)


def merge_costs(basis: CostBasis) -> StepCosts:
    """Predict a merge, which runs on the host."""
    return StepCosts(read_bytes=basis.model_bytes + basis.adapter_bytes, write_bytes=basis.shapes.unpacked_bytes)


def evaluate_costs(basis: CostBasis) -> StepCosts:
    """Predict an evaluation: one pass over the original."""
    tokens = basis.tokens(basis.manifest.stream.batch_size, basis.manifest.training(basis.task).max_length)
    peak = evaluate_bytes(basis.shapes, tokens)
    return StepCosts(read_bytes=basis.model_bytes, write_bytes=0, peak_bytes=peak)
