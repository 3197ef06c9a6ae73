"""Puts tiny vision-language models of ten families through every command, on rows with images, and compares.

    python -m scripts.sweep.vision [--only llava,idefics3]

Prints one line per family: how far streamed logits and gradients are from those in memory (LoRA on every linear), the
losses of original and emulator streamed and in memory (row by row, with all that the processor makes of each), those of
the corrected and of the merged adapter, and the losses of training. SmolVLM's processor needs the package num2words.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from onelayer.compiler import (
    compile_emulator,
    correct_adapter,
    evaluate_model,
    merge_adapter,
    polish_adapter,
    refine_emulator,
)
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import IGNORED, Tokens
from onelayer.runtime import train_lora
from scripts.sweep.compare import difference, first_line, outputs_of, prepared, streamed_outputs
from scripts.sweep.gradients import compared_gradients
from scripts.sweep.vision_models import FAMILIES, save_vision_model

SIZES = [(50, 40), (64, 32), (33, 64)]
SAID = {"role": "assistant", "content": "a thing"}
LENGTH: dict[str, Any] = {"max_length": 1024}
STEPS: dict[str, Any] = {**LENGTH, "max_steps": 3, "batch_size": 3, "learning_rate": 1e-2, "lora_rank": 4}


def write_rows(folder: Path, family: str) -> Path:
    """Write images and rows: one, none and two images, and an answer to a plain prompt."""
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    prompt = {"image": "0.png", "prompt": "what is it?", "completion": "the value"}
    rows: list[dict[str, Any]] = [prompt, {**prompt, "image": "1.png"}, {**prompt, "image": "2.png"}]
    if family != "paligemma":  # answers one prompt about one image
        rows += [
            {"image": "0.png", "messages": [{"role": "user", "content": "what is it?"}, SAID]},
            {"messages": [{"role": "user", "content": "what is the name?"}, SAID]},
            {"images": ["1.png", "2.png"], "messages": [{"role": "user", "content": "<image> or <image>?"}, SAID]},
        ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loss_in_memory(directory: Path, data: Path) -> float:
    """Load a model, and compute its loss over the rows of `data`."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()
    return resident_loss(model, read_tokens(data, load_reader(directory, type(model)), LENGTH["max_length"]))


def resident_loss(model: Any, rows: Sequence[Tokens]) -> float:
    """Compute the mean loss of a model in memory over the labeled tokens, row by row, with what a processor makes."""
    losses = []
    for row in rows:
        made = {} if row.inputs is None else row.inputs.tensors()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids]), **made, use_cache=False).logits[0]
        labels = torch.tensor(row.labels[1:])
        kept = labels != IGNORED
        losses.append(torch.nn.functional.cross_entropy(logits[:-1][kept], labels[kept], reduction="none"))
    return float(torch.cat(losses).double().mean())


def verdict(family: str) -> str:
    """Run every command for one family, and describe what came out."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model, emulator, adapter, corrected = (root / part for part in ("model", "emulator", "adapter", "corrected"))
        save_vision_model(family, model)
        data = write_rows(root, family)
        compiled = compile_emulator(model, data, emulator, ratio=0.5, form="factors", batch_size=2, **LENGTH)
        tower = sum("vis" in linear.name for linear in compiled.linears)
        trained = train_lora(emulator, data, adapter, **STEPS)
        train_lora(emulator, data, root / "anchored", anchor_every=2, model=model, **STEPS)
        correct_adapter(adapter, emulator=emulator, model=model, output=corrected, limit=None)
        merge_adapter(corrected, model=model, output=root / "merged")
        refine_emulator(emulator, model=model, calibration=data, output=root / "refined", steps=3, **LENGTH)
        polish_adapter(corrected, model=model, data=data, output=root / "polished", steps=1, batch_size=3, **LENGTH)
        scored = evaluate_model(model, data, adapters=[corrected], against=emulator, batch_size=2, **LENGTH)
        assert scored.against is not None
        original, adapted = (result.loss for result in scored.results)
        streamed = {"model": original, "emulator": scored.against.loss, "merged": adapted}
        off = ", ".join(
            f"{name} {abs(loss - loss_in_memory(root / name, data)):.1e}" for name, loss in streamed.items()
        )
        losses = ", ".join(f"{loss:.4f}" for _, loss in trained.losses)
        return (
            f"{len(compiled.linears)} linears, {tower} of the tower; {streamed_and_in_memory(model, data)}; losses "
            f"differ by: {off}; trained {losses}"
        )


def streamed_and_in_memory(directory: Path, data: Path) -> str:
    """Say how far streamed logits and gradients of `data` are from those of the model in memory."""
    model: Any = prepared(transformers.AutoModelForImageTextToText.from_pretrained(directory))
    rows = read_tokens(data, load_reader(directory, type(model)), LENGTH["max_length"])
    batches = [dict(batch.inputs) for batch in make_batches(rows, model.config, 2)]
    off = difference(streamed_outputs(directory, batches)[0], outputs_of(model, batches))
    result, detail = compared_gradients(model, "images and texts", batches)
    return f"logits {'identical' if not off else f'differ by {off:.1e}'}, gradients {result} ({detail})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, separated by commas")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for family in parser.parse_args(arguments).only.split(","):
        try:
            print(f"{family:16} {verdict(family)}", flush=True)
        except Exception as error:
            print(f"{family:16} failed: {type(error).__name__}: {first_line(error)}", flush=True)


if __name__ == "__main__":
    main()
