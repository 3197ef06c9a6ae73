"""The sampling pass as a function: prompts in, a directory of pictures out, begun again where it was interrupted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.sampling.report import Samples
from onelayer.compiler.sampling.sampler import PictureSampler
from onelayer.compiler.sampling.settings import Pictures, SampleKeywords, SampleSettings
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import resolve_pipeline
from onelayer.compiler.storage.files import atomic_directory, check_output
from onelayer.compiler.storage.work_directory import WorkKind, work_directory

SAMPLE_WORK = WorkKind("sample", finished="*.safetensors")


@settings_keywords(SampleSettings, SampleKeywords)
def sample_pictures(
    model: str | Path,
    prompt: str | Sequence[str],
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    **settings: Unpack[SampleKeywords],
) -> Samples:
    """Draw a picture of each prompt with the streamed pipeline `model`, and write them to `output` as PNG.

    The pipeline's own code runs, with its own guidance; `steps` and `resolution` are its own too unless given. With
    `adapter`, the denoiser is adapted. Every picture begins with the noise of `seed`. Raises `InputError` for what the
    caller can fix.
    """
    chosen, output = SampleSettings.of(settings), Path(output)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    pictures = Pictures.of({"prompts": texts, "steps": chosen.steps, "resolution": chosen.resolution})
    check_output(output, model, adapter)
    sampler = PictureSampler(resolve_pipeline(model, chosen.revision), pictures, chosen.seed)
    identity = {**sampler.recorded(), "adapter": None if adapter is None else adapter_digest(Path(adapter))}
    device = pick_device(chosen.device)
    with (
        work_directory(output, SAMPLE_WORK, identity, chosen.resume) as work,
        atomic_directory(output) as partial,
    ):
        found = sampler.draw(None if adapter is None else Path(adapter), work, partial, device)
    return found.model_copy(update={"output": str(output)})
