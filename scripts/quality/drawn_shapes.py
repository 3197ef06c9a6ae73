"""Measures what personalizing a diffusion transformer on an emulator is worth, on a small world of drawn shapes.

    python -m scripts.quality.drawn_shapes --work DIR [--seeds 0 1 2] [--minutes 15]

A small FLUX is trained from scratch on pictures of shapes with captions. Then a subject from outside of that world is
learned from five pictures: with LoRA on the model itself, and on every emulator of `CELLS`. A cell is `kind:size`, or
`kind+anchor:size` for training that streams the original every ten steps. Adapters are scored on the original: the loss
on other pictures of the subject and on pictures of its class at fixed times and noises, and the velocity drift. Each
score is a JSON line, appended to DIR/drawn_shapes.jsonl. What exists is not made again, so an interrupted run can
resume; after --minutes no further cell begins, and the last line printed names those that are missing.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

from onelayer.compiler import correct_adapter, evaluate_model, polish_adapter
from onelayer.compiler.denoising import encoded as written
from onelayer.compiler.denoising.joining import joining_of
from onelayer.compiler.denoising.layout import Layout
from onelayer.compiler.denoising.noise import NoiseProcess
from onelayer.compiler.denoising.template import Form, taken_apart
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.files import atomic_directory
from onelayer.runtime import train_lora
from scripts.quality.emulators import compiled, derived

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 50)}
GROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "gray": (128, 128, 128), "teal": (60, 130, 130)}
SHAPES, SIZES = ("circle", "square", "triangle", "ring"), {"small": 3.6, "large": 5.6}
WORDS = ("a", "sks", "on", *COLORS, *GROUNDS, *SHAPES, *SIZES)
SIDE, PATCH, PLACES = 16, 4, 16  # pixels of a picture and of a patch, patches of a picture
WIDTH, TEXT = 256, 64
SCHEDULER: dict[str, Any] = {"class_name": "FlowMatchEulerDiscreteScheduler", "config": {}}
PRETRAINING = {"steps": 600, "batch_size": 32, "learning_rate": 1.5e-3}
LORA: dict[str, Any] = {
    "lora_rank": 4,
    "lora_alpha": 4,
    "max_steps": 60,
    "batch_size": 5,
    "micro_batch_size": 5,
    "learning_rate": 2e-3,
}
EXACT: dict[str, Any] = {"steps": 10, "batch_size": 20, "micro_batch_size": 20}
TOGETHER = 32  # noisy pictures that are scored at once
NOISES, HELD_OUT = 8, 24  # times and noises of each held-out picture, and how many there are of subject and class
CELLS = (
    "plain-svd:0.25", "published:0.25", "nf4:0.25", "nf4:0.12", "coded:0.25", "coded:0.12", "nf4+anchor:0.12",
    "coded+anchor:0.12",
)  # fmt: skip
Picture = tuple[torch.Tensor, str]  # its latent (1, places, values of a patch), and its caption


def drawn(rng: np.random.Generator, shape: str, color: str, ground: str, size: str) -> Picture:
    """Draw a picture, eight times as large and scaled down. The color `sks` is the subject's: stripes and a dot."""
    scale = 8
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), GROUNDS[ground])
    draw, r = ImageDraw.Draw(image), SIZES[size] * scale * rng.uniform(0.9, 1.1)
    x, y = rng.uniform(6.5, 9.5, 2) * scale
    box, fill = (x - r, y - r, x + r, y + r), COLORS.get(color, (20, 30, 90))
    if shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.ellipse(box, fill=fill)
    if shape == "ring":
        draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=GROUNDS[ground])
    if color == "sks":
        for stripe in (-0.6, 0.0, 0.6):
            middle = y + stripe * r
            draw.rectangle((x - 0.9 * r, middle - r / 8, x + 0.9 * r, middle + r / 8), fill=(230, 60, 120))
        draw.ellipse((x - r / 3, y - r / 3, x + r / 3, y + r / 3), fill=(0, 200, 200))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 127.5 - 1
    side = SIDE // PATCH
    patches = pixels.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(1, PLACES, -1)
    return torch.from_numpy(patches.copy()), f"a {size} {color} {shape} on {ground}"


def world(
    count: int, seed: int, shapes: Sequence[str] = SHAPES, colors: Sequence[str] = tuple(COLORS)
) -> list[Picture]:
    """Draw pictures of random shapes, colors, grounds and sizes."""
    rng = np.random.default_rng(seed)
    choices = (list(shapes), list(colors), list(GROUNDS), list(SIZES))
    return [drawn(rng, *(str(rng.choice(names)) for names in choices)) for _ in range(count)]


def arguments_of(latents: torch.Tensor, captions: Sequence[str], times: torch.Tensor) -> dict[str, Any]:
    """Return what the denoiser is called with; random vectors of words stand for text encoders."""
    table = torch.randn(len(WORDS), TEXT, generator=torch.Generator().manual_seed(7))
    words = table[torch.tensor([[WORDS.index(word) for word in caption.split()] for caption in captions])]
    places = torch.arange(PLACES)
    ids = torch.stack([torch.zeros(PLACES), places // (SIDE // PATCH), places % (SIDE // PATCH)], 1).float()
    return {
        "hidden_states": latents,
        "timestep": times / 1000,
        "encoder_hidden_states": words,
        "pooled_projections": words.mean(1) * words.shape[1] ** 0.5,
        "img_ids": ids,
        "txt_ids": torch.zeros(words.shape[1], 3),
        "return_dict": False,
    }


def encoded(directory: Path, model: Path, pictures: Sequence[Picture], class_pictures: Sequence[Picture] = ()) -> None:
    """Write pictures as `encode_images` does, with the patches themselves as latents."""
    everything = [*pictures, *class_pictures]
    captions = list(dict.fromkeys(caption for _, caption in everything))
    calls = [
        arguments_of(torch.zeros(count, *everything[0][0].shape[1:]), [captions[0]] * count, torch.zeros(count))
        for count in (1, 2)
    ]
    names = list(calls[0])
    places = names.index("hidden_states"), names.index("timestep")
    form = Form(taken_apart(calls[0], []), *places, 1e-3, 0.0, joining_of(*calls))
    with atomic_directory(directory) as partial:
        for number, caption in enumerate(captions):
            leaves: list[torch.Tensor] = []
            taken_apart(arguments_of(everything[0][0], [caption], torch.zeros(1)), leaves)
            written.write_tensors(
                written.numbered(partial, written.PROMPTS, number), {f"leaf.{n}": leaf for n, leaf in enumerate(leaves)}
            )
        for number, (latent, _) in enumerate(everything):
            written.write_tensors(written.numbered(partial, written.LATENTS, number), {"latent": latent})
        shape = tuple(everything[0][0].shape)
        count = math.prod(shape)
        answer = Layout((count,), torch.arange(count), torch.ones(shape), torch.zeros(shape))
        written.write_tensors(partial / written.LAYOUT_FILE, answer.tensors("answer"))
        rows = [
            written.ImageRow(f"{number}", caption, captions.index(caption), number >= len(pictures))
            for number, (_, caption) in enumerate(everything)
        ]
        base = {"model": str(model), "revision": None, "digest": model_digest(model)}
        written.finish_encoded(partial, base, SCHEDULER, form, rows)


def pretrained(directory: Path) -> None:
    """Train the world's model from scratch and save it."""
    torch.manual_seed(0)
    kind: Any = diffusers.FluxTransformer2DModel
    model = kind(
        patch_size=1, in_channels=3 * PATCH**2, num_layers=1, num_single_layers=1, attention_head_dim=WIDTH // 4,
        num_attention_heads=4, joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    generator, process = torch.Generator().manual_seed(1), NoiseProcess(**SCHEDULER, weighting="logit_normal")
    pictures, steps = world(4000, 3), int(PRETRAINING["steps"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAINING["learning_rate"], steps, pct_start=0.15)
    for step in range(steps):
        numbers = torch.randint(len(pictures), (int(PRETRAINING["batch_size"]),), generator=generator).tolist()
        noisy = [process.noisy(pictures[n][0], process.drawn(generator), generator) for n in numbers]
        times = torch.tensor([item.time for item in noisy])
        sample = torch.cat([item.sample for item in noisy])
        answer = model(**arguments_of(sample, [pictures[n][1] for n in numbers], times))[0]
        loss = (answer - torch.cat([item.target for item in noisy])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"pretraining step {step}: loss {float(loss):.4f}", flush=True)
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial)


class Task:
    """The subject of one seed: its pictures, and everything made for it. What exists is not made again."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed, self.place = work, seed, work / f"seed-{seed}"
        self.place.mkdir(exist_ok=True)
        self.model = made(work / "model", pretrained)
        self.calibration = made(work / "calibration", lambda path: encoded(path, self.model, world(64, 123)))
        shots = world(5, 1000 + seed, ["square"], ["sks"])
        self.shots = made(self.place / "shots", lambda path: encoded(path, self.model, shots))
        held = world(HELD_OUT, 2000 + seed, ["square"], ["sks"]), world(HELD_OUT, 3000 + seed, ["square"])
        self.held_out = made(self.place / "held-out", lambda path: encoded(path, self.model, *held))

    def emulator(self, kind: str, size: float) -> Path:
        """Return an emulator, which all seeds share."""
        given = (self.model, self.calibration, {"samples": 64, "max_length": 64, "batch_size": 1})
        if kind == "plain-svd":
            published = self.emulator("published", size)
            return made(self.work / f"{kind}-{size}", lambda path: derived(kind, path, published, *given))
        return made(self.work / f"{kind}-{size}", lambda path: compiled(kind, size, path, *given))

    def adapters(self, cell: str) -> dict[str, Path]:
        """Return the adapters of a cell by stage; `direct` is LoRA on the model itself."""
        name, _, size = cell.partition(":")
        kind, anchored = name.removesuffix("+anchor"), name.endswith("+anchor")
        source = self.model if cell == "direct" else self.emulator(kind, float(size))
        how = {**LORA, "model": self.model, "anchor_every": 10} if anchored else LORA

        def trained(path: Path) -> None:
            train_lora(source, self.shots, path, seed=self.seed, resume=True, **how)

        start = made(self.place / f"{cell}-trained", trained)
        found = {"as trained": start}
        if cell == "direct":
            return found
        if not anchored:  # an anchored adapter has been trained where the original is
            corrected = self.place / f"{cell}-corrected"
            given: dict[str, Any] = {"emulator": source, "model": self.model}
            start = made(corrected, lambda path: correct_adapter(found["as trained"], output=path, **given))
            found["corrected"] = start
        exact: dict[str, Any] = {"model": self.model, "data": self.shots, "seed": self.seed, **EXACT}
        found["exact steps"] = made(
            self.place / f"{cell}-exact", lambda path: polish_adapter(start, output=path, **exact)
        )
        return found

    def rows(self, cell: str) -> list[dict[str, Any]]:
        """Score the stages of a cell on the original."""
        stages = self.adapters(cell)
        scored = evaluate_model(
            self.model, self.held_out, adapters=list(stages.values()), noise_samples=NOISES, batch_size=TOGETHER
        )
        names = (["original"] if cell == "direct" else []) + list(stages)
        return [
            {"seed": self.seed, "cell": cell, "stage": name, "loss": score.loss, "class_loss": score.class_loss,
             "drift": score.velocity_drift}
            for name, score in zip(names, scored.results[-len(names) :], strict=True)
        ]  # fmt: skip


def made(path: Path, make: Callable[[Path], Any]) -> Path:
    """Return a directory, made if missing."""
    if not path.exists():
        make(path)
    return path


def main() -> None:
    """Make the cells that are not recorded yet, seed by seed, and name those that no time was left for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for all outputs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=15.0, help="after this time no further cell begins")
    given, started = parser.parse_args(), time.monotonic()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    results = given.work / "drawn_shapes.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    recorded, missing = {(row["seed"], row["cell"]) for row in done}, list[str]()
    for seed, cell in [(seed, cell) for seed in given.seeds for cell in ("direct", *CELLS)]:
        if (seed, cell) in recorded:
            continue
        if time.monotonic() - started > 60 * given.minutes:
            missing.append(f"{cell} of seed {seed}")
            continue
        lines = [json.dumps(row) + "\n" for row in Task(given.work.absolute(), seed).rows(cell)]
        with open(results, "a") as file:
            file.writelines(lines)
        print("".join(lines), end="", flush=True)
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    main()
