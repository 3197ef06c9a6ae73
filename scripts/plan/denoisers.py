"""Predicts on which cards diffusion transformers can be personalised, from public configurations, as markdown.

python -m scripts.plan.denoisers

Nothing here is measured except two figures of the EMLoC paper (arXiv 2506.12015, table 3), shown next to FLUX.1-dev.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from onelayer.runtime.planning.plan import plan_run
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.train_memory import PlannedRun, train_memory
from scripts.plan.table import ASSUMED, CARDS_GIB, GIB, cell

SIDES = (512, 1024)
# Fields that differ from the defaults of diffusers' classes, and what makes a latent of a picture.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FLUX.1-dev": (
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "in_channels": 64},
        {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
    ),
    "Qwen-Image": (
        {"_class_name": "QwenImageTransformer2DModel", "in_channels": 64},
        {"dim_mult": [1, 2, 4, 4], "z_dim": 16},
    ),
}
PAPER_NOTE = "EMLoC reports 35.1 GB for LoRA on FLUX.1-dev itself and 22.9 GB on its emulator"


def write_pipeline(folder: Path, denoiser: dict[str, Any], vae: dict[str, Any]) -> None:
    """Write a pipeline of configurations without weights."""
    for part, config in (("transformer", denoiser), ("vae", vae)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", denoiser["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))


def row(name: str, side: int) -> list[str]:
    """Return the cells of one model at one side of pictures."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_pipeline(folder, *MODELS[name])
        plans = [plan_run(folder, card * GIB, image_side=side, speed=ASSUMED) for card in CARDS_GIB]
        shapes = read_shapes(folder / "transformer", image_side=side)
    assert shapes.positions is not None
    whole = train_memory(shapes, shapes.unpacked_bytes, PlannedRun(1, shapes.positions))
    return [name, f"{side} px", *map(cell, plans), f"{whole.peak / 1e9:.1f} GB"]


def main() -> None:
    """Print the table."""
    print(
        "Predictions, not measurements: LoRA of rank 8 on all linears of the blocks, one picture with a prompt of 512"
    )
    print("positions at a time, bfloat16. Cells as above: the emulator, how activations are stored, and the peaks of")
    print("training / compiling on the card in GiB. The last column is LoRA on the original, activations whole.\n")
    head = ["model", "pictures", *(f"{card} GB card" for card in CARDS_GIB), "the original"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in MODELS:
        for side in SIDES:
            print(f"| {' | '.join(row(name, side))} |", flush=True)
    print(f"\n{PAPER_NOTE}; both measured there.")


if __name__ == "__main__":
    main()
