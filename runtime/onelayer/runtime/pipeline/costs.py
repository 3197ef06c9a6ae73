"""A manifest and a model's shapes in; the emulator that its memory budget allows, and what each step costs, out.

Torch-free: `onelayer run --dry-run` says these things before anything is computed.
"""

from pathlib import Path

from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.ranks import widest_ratio
from onelayer.compiler.results import Result
from onelayer.runtime.manifest.manifest import Manifest
from onelayer.runtime.pipeline.emulator_size import Size, setting_of, size_of_shapes
from onelayer.runtime.planning.pass_memory import compile_bytes, pass_bytes, polish_bytes, refine_bytes
from onelayer.runtime.planning.read_shapes import shapes_from_headers
from onelayer.runtime.planning.shapes import ModelShapes
from onelayer.runtime.planning.sub_blocks import MASTER_BYTES, lora_parameters
from onelayer.runtime.planning.train_memory import emulator_bytes, train_memory


class StepCosts(Result):
    """Bytes that a step reads and writes, and its predicted peak on the device; None where they cannot be told."""

    read_bytes: int | None = None
    write_bytes: int | None = None
    peak_bytes: int | None = None


class Costs:
    """What the steps of one manifest cost. A model that is not here, or has no linears, leaves all unknown.

    Raises `InputError` where nothing fits the manifest's memory.
    """

    def __init__(self, manifest: Manifest, directory: Path | None) -> None:
        self._manifest = manifest
        self._shapes: ModelShapes | None = None
        self.size: Size | None = None
        if directory is None:
            return
        try:
            self._shapes = shapes_from_headers(directory)
        except InputError:  # the step itself will say what is wrong
            return
        if manifest.emulator is not None:
            self.size = size_of_shapes(manifest, manifest.emulator, self._shapes)

    def of(self, kind: str, task: str | None, ratio: float | None, direct: bool) -> StepCosts:
        """The costs of a step; `ratio` is its own where it slices or trains on a slice."""
        shapes = self._shapes
        if shapes is None:
            return StepCosts()
        whole = self.size or Size(1.0, None)
        ratio, dtype = ratio or whole.ratio, whole.factor_dtype or "bf16"
        model = shapes.parameters * shapes.value_bytes
        emulator = model if direct or self.size is None else emulator_bytes(shapes, ratio, dtype)
        if kind == "compile":
            assert self._manifest.emulator is not None
            tokens = self._manifest.stream.batch_size * self._manifest.emulator.calibration.max_length
            widest = widest_ratio(ratio, self._manifest.emulator.allocation)
            return StepCosts(read_bytes=model, write_bytes=emulator, peak_bytes=compile_bytes(shapes, widest, tokens))
        if kind == "refine":
            section = self._manifest.emulator
            assert section is not None
            refinement = section.refinement
            assert refinement is not None
            tokens = refinement.batch_size * section.calibration.max_length
            peak = refine_bytes(shapes, ratio, tokens, section.allocation)
            return StepCosts(read_bytes=model + emulator, write_bytes=emulator, peak_bytes=peak)
        if kind == "slice":
            return StepCosts(read_bytes=emulator_bytes(shapes, whole.ratio, dtype), write_bytes=emulator)
        if task is None:
            return StepCosts()
        setting = setting_of(self._manifest, task)
        adapter = MASTER_BYTES * lora_parameters(shapes, setting.lora_rank)
        largest = shapes.largest_block_bytes
        return {
            "train": StepCosts(
                read_bytes=emulator, write_bytes=adapter, peak_bytes=train_memory(shapes, emulator, setting).peak
            ),
            "correct": StepCosts(
                # Once, too, where held-out text chooses: the stream that scores also says what the solver needs.
                read_bytes=model + emulator,
                write_bytes=adapter,
                peak_bytes=pass_bytes(shapes, ratio, setting)["correct"],
            ),
            "merge": StepCosts(read_bytes=model + adapter, write_bytes=model),
            "evaluate": StepCosts(read_bytes=model, write_bytes=0, peak_bytes=largest),
            "polish": self._polish_costs(task, shapes, model, adapter),
        }.get(kind, StepCosts())

    def _polish_costs(self, task: str, shapes: ModelShapes, model_bytes: int, adapter_bytes: int) -> StepCosts:
        polishing, training = self._manifest.polishing(task), self._manifest.training(task)
        if polishing is None:
            return StepCosts()
        peak = polish_bytes(shapes, training.lora.r, polishing.micro_batch_size * training.max_length)
        return StepCosts(read_bytes=2 * polishing.steps * model_bytes, write_bytes=adapter_bytes, peak_bytes=peak)
