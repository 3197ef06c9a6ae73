"""The commands for images: `encode` and `sample`. Each makes one call of the API."""

from pathlib import Path
from typing import Annotated, Unpack

import typer

from onelayer.compiler.encode.settings import EncodeKeywords, EncodeSettings
from onelayer.compiler.sampling.settings import SampleKeywords, SampleSettings
from onelayer.runtime.cli.command import print_result
from onelayer.runtime.cli.options import Json, Output, settings_options
from onelayer.runtime.reporting import summaries
from onelayer.runtime.reporting.tables import summary


@settings_options(EncodeKeywords, EncodeSettings, omit=("revision",))
def encode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id of a diffusers pipeline.")],
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR",
            help="Folder of images with metadata.jsonl (file_name, text), or .txt captions; may be repeated.",
        ),
    ],
    output: Output,
    *,
    class_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images of the subject's class, which training keeps as they are."),
    ] = None,
    as_json: Json = False,
    **settings: Unpack[EncodeKeywords],
) -> None:
    """Encode images and captions for the denoiser of a diffusion pipeline.

    Text encoders and VAE stream by once. The other commands read the result as their data: compile, refine, train,
    polish and evaluate.

    \b
    Example:
      onelayer encode ./flux --data photos --instance-prompt "a photo of sks dog" --output dog
      onelayer compile ./flux --calibration dog --keep-bytes 0.25 --output emulator
      onelayer train emulator --data dog --output adapter
    """
    from onelayer.compiler import encode_images

    print_result(
        lambda: encode_images(model, list(data), output, class_data=class_data, **settings),
        summary,
        as_json,
    )


@settings_options(SampleKeywords, SampleSettings, omit=("revision",))
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id of a diffusers pipeline.")],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to draw; may be repeated.")],
    output: Output,
    *,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter of the pipeline's denoiser.")] = None,
    as_json: Json = False,
    **settings: Unpack[SampleKeywords],
) -> None:
    """Draw pictures with a diffusion pipeline, layer by layer.

    The pipeline's own code runs, and its text encoders, denoiser and VAE stream. A denoising step reads the denoiser
    once for all prompts.

    \b
    Example:
      onelayer sample ./flux --adapter polished --prompt "sks dog on the moon" --output samples
    """
    from onelayer.compiler import sample_pictures

    print_result(
        lambda: sample_pictures(model, prompt, output, adapter=adapter, **settings), summaries.sample_summary, as_json
    )
