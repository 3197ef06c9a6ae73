"""The encode pass: text encoders and VAE stream by, and a pipeline's denoiser needs neither from then on.

In: a pipeline, folders of images with captions. Out: a directory with the denoiser's arguments for every prompt and the
latent of every image. Held on the device: one unit and one image, or the prompts that are parked.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from onelayer.compiler.denoising.batches import SEED_STEP
from onelayer.compiler.denoising.encoded import (
    LATENTS,
    LAYOUT_FILE,
    PROMPTS,
    ImageRow,
    finish_encoded,
    numbered,
    write_tensors,
)
from onelayer.compiler.denoising.layout import Layout
from onelayer.compiler.encode.images import CaptionedImage, captioned_images, pixels
from onelayer.compiler.encode.pipeline import OpenPipeline
from onelayer.compiler.encode.probing import Probe
from onelayer.compiler.encode.recording import TextRecorder
from onelayer.compiler.encode.settings import EncodeKeywords, EncodeSettings
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.console import Progress, StopRequest
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.unit_memory import RESERVE_BYTES
from onelayer.compiler.results import Report, Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import model_digest, resolve_pipeline
from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import check_output
from onelayer.compiler.storage.work_directory import WorkKind, publish_work, work_directory
from onelayer.compiler.streaming.stream import Stream

ENCODE_WORK = WorkKind("encode", finished=f"{LATENTS}/*.safetensors")
# Feature maps of an image's full size that a VAE holds at once, in float32.
FULL_SIZE_MAPS = 6


class EncodeResult(Result):
    """What an encoding made: `latent` is the shape of the latent of one image."""

    output: str
    images: int
    class_images: int
    prompts: int
    resolution: int
    latent: tuple[int, ...]
    pipeline: str
    report: Report


@settings_keywords(EncodeSettings, EncodeKeywords)
def encode_images(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    class_data: str | Path | None = None,
    **settings: Unpack[EncodeKeywords],
) -> EncodeResult:
    """Encode images and captions of the folders `data` for the denoiser of a pipeline; write them to `output`.

    Captions are those of `metadata.jsonl` (`file_name`, `text`), of `.txt` files next to the images, or
    `instance_prompt`. `class_data` are images of the subject's class, for prior preservation (DreamBooth, arXiv
    2208.12242). Every other command reads the result as its data. An interrupted encoding continues after its last
    image. Raises `InputError` for what the caller can fix.
    """
    chosen, output = EncodeSettings.of(settings), Path(output)
    folders = [data] if isinstance(data, str | Path) else list(data)
    check_output(output, model, *folders)
    images = [
        image
        for folder in folders
        for image in captioned_images(folder, chosen.instance_prompt, "--instance-prompt", is_class=False)
    ]
    if class_data is not None:
        images += captioned_images(class_data, chosen.class_prompt, "--class-prompt", is_class=True)
    elif chosen.class_prompt is not None:
        raise InputError(f"--class-prompt {chosen.class_prompt}: there are no class images; give --class-data too")
    for image in images:
        pixels(image, chosen.resolution)  # every image is checked before any weight is read
    directory = resolve_pipeline(model, chosen.revision)
    pipeline = OpenPipeline(directory)
    # A relative path would be taken for a Hub id from another working directory.
    name = str(Path(model).absolute()) if Path(model).exists() else str(model)
    base = {"model": name, "revision": chosen.revision, "digest": model_digest(pipeline.denoiser_directory)}
    identity = {
        "base": base,
        "images": sha256_json([[image.source.digest(), image.caption, image.is_class] for image in images]),
        "components": {part: model_digest(directory / part) for part in ("vae", *pipeline.encoders)},
        "scheduler": sha256_json(pipeline.scheduler),
        "settings": chosen.recorded(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    device = pick_device(chosen.device)
    with (
        StopRequest("image") as stop,
        work_directory(output, ENCODE_WORK, identity, chosen.resume) as work,
        Meter(device) as meter,
    ):
        return _Encoding(pipeline, images, chosen, work, meter, stop).finish(output, base)


class _Encoding:
    """An encoding in progress, in the directory `work`."""

    def __init__(
        self,
        pipeline: OpenPipeline,
        images: list[CaptionedImage],
        settings: EncodeSettings,
        work: Path,
        meter: Meter,
        stop: StopRequest,
    ) -> None:
        self.pipeline, self.images, self.settings = pipeline, images, settings
        self.work, self.meter, self.stop = work, meter, stop
        self.prompts = list(dict.fromkeys(image.caption for image in images))

    def finish(self, output: Path, base: dict[str, Any]) -> EncodeResult:
        """Encode everything, and publish it."""
        recorder = TextRecorder(self.pipeline, self.prompts, self.settings.resolution, self.meter)
        templates, guidance = recorder.templates(self.settings.guidance)
        for number, template in enumerate(templates):
            leaves = {f"leaf.{index}": leaf for index, leaf in enumerate(template.leaves)}
            write_tensors(numbered(self.work, PROMPTS, number), leaves)
        if any(template.form != templates[0].form for template in templates):
            raise InputError(f"{self.pipeline.directory}: its denoiser gets other arguments for other prompts")
        probe = Probe(self.pipeline, recorder, templates[0], guidance, self.meter)
        latent, answer = probe.layouts()
        write_tensors(self.work / LAYOUT_FILE, answer.tensors("answer"))
        self._encode_images(latent)
        rows = [
            ImageRow(image.source.name, image.caption, self.prompts.index(image.caption), image.is_class)
            for image in self.images
        ]
        finish_encoded(self.work, base, self.pipeline.scheduler, templates[0].form, rows)
        parts = [*self.pipeline.encoders.values(), self.pipeline.vae]
        largest = max(probe.largest_unit_bytes, *(part.largest_unit_bytes for part in parts))
        bytes_read = probe.bytes_read + sum(part.checkpoint.bytes_read for part in parts)
        for part in parts:
            part.checkpoint.check_unchanged()
        publish_work(self.work, ENCODE_WORK, output)
        class_images = sum(image.is_class for image in self.images)
        workspace = encode_workspace(self.pipeline.vae, self.settings.resolution)
        return EncodeResult(
            output=str(output),
            images=len(self.images) - class_images,
            class_images=class_images,
            prompts=len(self.prompts),
            resolution=self.settings.resolution,
            latent=latent.shape,
            pipeline=self.pipeline.class_name,
            report=self.meter.report(largest, workspace, bytes_read),
        )

    def _encode_images(self, layout: Layout) -> None:
        """Encode the images that are not encoded yet, one at a time."""
        with Progress(len(self.images), "encode") as bar:
            for number, image in enumerate(self.images):
                path = numbered(self.work, LATENTS, number)
                if not path.is_file():
                    write_tensors(path, {"latent": self._latent(image, number, layout)})
                bar.reached(number + 1, image.source.name, self.meter.sample())
                self.stop.check()

    def _latent(self, image: CaptionedImage, number: int, layout: Layout) -> torch.Tensor:
        vae: Any = self.pipeline.vae
        values = pixels(image, self.settings.resolution).to(vae.dtype)
        values = values.unsqueeze(2) if layout.scale.ndim == 5 else values  # a video of one picture
        found: dict[int, Any] = {}
        stream = Stream(vae, self.meter.device, self.meter, description="vae", call=vae.model.encode)
        stream.run([{"x": values}], found.__setitem__)
        encoded = found[0]
        if hasattr(encoded, "latent_dist"):
            generator = torch.Generator().manual_seed(self.settings.seed * SEED_STEP + number)
            latent = encoded.latent_dist.sample(generator)
        else:
            latent = encoded.latent
        latent = layout.backward(latent).float()
        if not bool(latent.isfinite().all()):
            raise InputError(
                f"{image.source}: its latent is not finite in {str(vae.dtype).removeprefix('torch.')}; give a pipeline "
                "whose VAE is stored in float32"
            )
        return latent


def encode_workspace(vae: StreamedModel, resolution: int) -> int:
    """Predict what an encoding holds in addition to the largest unit: the feature maps of one image at full size."""
    weights = (tensor for tensor in vae.weights.bare_parameters.values() if tensor.ndim >= 4)
    channels = next((tensor.shape[0] for tensor in weights), 3)
    return FULL_SIZE_MAPS * channels * resolution**2 * 4 + RESERVE_BYTES
