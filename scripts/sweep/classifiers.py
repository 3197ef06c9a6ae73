"""Takes tiny classifiers of images and sound through every command, from a folder of files.

python -m scripts.sweep.classifiers [--only NAME ...]

Prints one line for each family: the loss of `evaluate` next to that of the resident model, and the loss of the polished
adapter next to that of the merged model. Exits with 1 if two of them differ in the sixth decimal, or a command fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

LABELS = ("circle", "cross", "square")
NAMES: dict[str, Any] = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: number for number, label in enumerate(LABELS)},
}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = {**SHAPE, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}
TEXT = {**SHAPE, "vocab_size": 99}
WAVES = {
    **{"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16},
}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SPECTRA = {"num_mel_bins": 16, "max_length": 64, "patch_size": 8, "time_stride": 8, "frequency_stride": 8}
SIDES = {"height": 32, "width": 32}
FILES, STEPS, TOLERANCE = 4, 2, 1e-6  # files of each class


def _two_towers(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(vision_config=VISION, text_config=TEXT, **NAMES)
    return getattr(transformers, f"{family}ForImageClassification")(config)


def _image(family: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**fields, **NAMES)
    return getattr(transformers, f"{family}ForImageClassification")(config)


def _sound(family: str, model_class: str, **fields: Any) -> Any:
    return getattr(transformers, model_class)(getattr(transformers, f"{family}Config")(**SHAPE, **fields, **NAMES))


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "vit": (lambda: _image("ViT", **VISION), lambda: transformers.ViTImageProcessorPil(size=SIDES)),
    "deit": (
        lambda: _image("DeiT", **VISION),
        lambda: transformers.DeiTImageProcessorPil(size=SIDES, crop_size=SIDES),
    ),
    "dinov2": (
        lambda: _image("Dinov2", **VISION, mlp_ratio=2),
        lambda: transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES),
    ),
    "siglip": (lambda: _two_towers("Siglip"), lambda: transformers.SiglipImageProcessorPil(size=SIDES)),
    "clip": (
        lambda: _two_towers("CLIP"),
        lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES),
    ),
    "swin": (lambda: _image("Swin", **STAGES), lambda: transformers.ViTImageProcessorPil(size=SIDES)),
    "wav2vec2": (
        lambda: _sound("Wav2Vec2", "Wav2Vec2ForSequenceClassification", **WAVES),
        transformers.Wav2Vec2FeatureExtractor,
    ),
    "ast": (
        lambda: _sound("AST", "ASTForAudioClassification", **SPECTRA),
        lambda: transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64),
    ),
}


def prepare(family: str, folder: Path) -> Any:
    """Save a seeded model with its processor as `model`, and files of three classes below `data`; return the model."""
    torch.manual_seed(0)
    make_model, make_processor = FAMILIES[family]
    model, processor = make_model().eval(), make_processor()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    numbers = np.random.default_rng(0)
    for label in LABELS:
        (folder / "data" / label).mkdir(parents=True)
        for index in range(FILES):
            file = folder / "data" / label / f"{index}"
            if hasattr(processor, "sampling_rate"):
                with wave.open(str(file.with_suffix(".wav")), "wb") as recording:
                    recording.setnchannels(1)
                    recording.setsampwidth(2)
                    recording.setframerate(processor.sampling_rate)
                    recording.writeframes(numbers.integers(-9000, 9000, 8000, dtype=np.int16).tobytes())
            else:
                pixels = numbers.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file.with_suffix(".png"))
    return model


def resident_loss(model: Any, folder: Path) -> float:
    """Compute the mean loss of the whole model over the files, as a user of transformers would."""
    from onelayer.compiler.data.classes import predicted_classes
    from onelayer.compiler.data.labeled_rows import read_for
    from onelayer.compiler.data.media_tokens import load_reader

    classes = predicted_classes(type(model), model.config, folder / "model")
    losses = []
    for row in read_for(classes, folder / "data", load_reader(folder / "model", type(model)), max_length=512):
        assert row.inputs is not None
        with torch.no_grad():
            logits = model(**row.inputs.tensors()).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([row.label]))))
    return sum(losses) / len(losses)


def run(folder: Path, *arguments: str) -> Any:
    """Run one command of onelayer in `folder`; return its JSON. Raises `RuntimeError` with its message if it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "onelayer.runtime", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def sweep(family: str, folder: Path) -> tuple[str, bool]:
    """Take one family through the commands; return its line, and whether the losses agree."""
    expected = resident_loss(prepare(family, folder), folder)
    batch = ("--batch-size", "2")
    emulator = run(
        folder, "compile", "model", "--calibration", "data", "--output", "emulator", "--ratio", "0.5", *batch
    )
    run(
        folder, "refine", "emulator", "--model", "model", "--calibration", "data", "--output", "refined", "--steps", "5"
    )
    trained = ("--max-steps", str(STEPS), "--batch-size", "3", "--activations", "sublayer")
    run(folder, "train", "refined", "--data", "data", "--output", "adapter", *trained)
    fits = ("--emulator", "refined", "--model", "model")
    run(folder, "correct", "adapter", *fits, "--output", "corrected", "--data", "data")
    steps = ("--steps", str(STEPS), "--batch-size", "6", "--micro-batch-size", "2")
    run(folder, "polish", "corrected", "--model", "model", "--data", "data", "--output", "polished", *steps)
    run(folder, "merge", "polished", "--model", "model", "--output", "merged")
    scored = run(folder, "evaluate", "model", "--data", "data", "--adapter", "polished", *batch)["results"]
    merged = run(folder, "evaluate", "merged", "--data", "data", *batch)["results"][0]["loss"]
    original, polished = (result["loss"] for result in scored)
    agree = abs(original - expected) < TOLERANCE and abs(merged - polished) < TOLERANCE
    line = f"evaluate {original:.6f} resident {expected:.6f}; polished {polished:.6f} merged {merged:.6f}"
    return f"{family:9} {len(emulator['linears'])} linears; {line}", agree


def main() -> int:
    """Sweep the families and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=FAMILIES, metavar="NAME")
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    for family in parser.parse_args().only or FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            try:
                line, agrees = sweep(family, Path(name))
            except (RuntimeError, ValueError) as error:
                line, agrees = f"{family:9} failed: {error}", False
        failed += not agrees
        print(line if agrees else f"{line}  <--", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
