"""The step that trains an emulator's factors against the original, for the common emulator or a slice of it.

Nothing here imports torch before a step executes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelayer.runtime.manifest import Manifest
from onelayer.runtime.manifest_sections import Emulator, Refine
from onelayer.runtime.sources import Source
from onelayer.runtime.step_kinds import Step, model_source


def refine_step(manifest: Manifest, emulator: Emulator, refine: Refine, ratio: float | None) -> Step:
    """Refine the common emulator, or its slice of `ratio`, on the data that it was compiled with."""
    model, calibration = model_source(manifest), emulator.calibration
    settings = refine.model_dump(mode="json")

    def execute(inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
        from onelayer.compiler import refine_emulator
        from onelayer.compiler.checkpoint import resolve_model

        result = refine_emulator(
            inputs["emulator"],
            model=resolve_model(model.text, model.revision),
            calibration=list(calibration.data),
            output=output,
            max_length=calibration.max_length,
            device=manifest.stream.device,
            seed=manifest.seed,
            **settings,
        )
        return result.model_dump(mode="json")

    fields = {
        **settings,
        "max_length": calibration.max_length,
        "seed": manifest.seed,
        **({} if ratio is None else {"ratio": ratio}),
    }
    sources = {"model": model, **calibration_sources(emulator)}
    base, name = ("compile", "refine") if ratio is None else (f"slice {ratio}", f"refine {ratio}")
    passes = {"device": manifest.stream.device}
    return Step(name, "refine", execute, fields, sources, needs={"emulator": base}, passes=passes)


def calibration_sources(emulator: Emulator) -> dict[str, Source]:
    """The calibration data by the roles that they have in a step."""
    return {f"calibration {index}": Source(data) for index, data in enumerate(emulator.calibration.data, start=1)}
