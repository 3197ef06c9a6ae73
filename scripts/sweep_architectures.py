"""Streams every architecture of transformers' registries that a tiny configuration can build, against the resident model.

    python scripts/sweep_architectures.py [--registry causal-lm] [--only llama,bloom]

One line per model type: identical, close (with the largest difference), refused (with the reason), or not runnable even
when resident. The configurations are shrunk by the meaning of their fields' names; no model is special.
"""

import argparse
import contextlib
import gc
import io
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from onelayer.compiler.errors import InputError
from onelayer.compiler.lazy import DeferredLogits
from onelayer.compiler.measure import Meter
from onelayer.compiler.stream import BatchError, Stream
from onelayer.compiler.units import StreamedModel
from sweep_configs import tiny_config

REGISTRIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

def tiny_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A seeded random model; norms and biases get noise, since ones and zeros would hide mistakes."""
    torch.manual_seed(0)
    config_class = model_class.config_class
    assert config_class is not None
    model = model_class(tiny_config(config_class))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval()
    return model


def inputs_for(model: PreTrainedModel, registry: str) -> list[dict[str, torch.Tensor]]:
    """Two batches of different lengths, as this kind of model takes them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, length in ((2, 9), (1, 14)):
        if registry == "image-classification":
            config: Any = model.config
            size, channels = getattr(config, "image_size", 32), getattr(config, "num_channels", 3)
            height, width = size if isinstance(size, list | tuple) else (size, size)
            batches.append({"pixel_values": torch.randn(rows, channels, height, width, generator=generator)})
            continue
        # Sequence classifiers look for padding behind the last token; one row needs none.
        rows = 1 if registry == "sequence-classification" else rows
        batch = {"input_ids": torch.randint(3, 100, (rows, length), generator=generator)}
        if model.config.is_encoder_decoder and registry == "seq2seq-lm":
            batch["decoder_input_ids"] = torch.randint(3, 100, (rows, length - 4), generator=generator)
        batches.append(batch)
    return batches


def without_cache(model: PreTrainedModel) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False  # type: ignore[union-attr]


def verdict(model_class: type[PreTrainedModel], registry: str) -> tuple[str, str]:
    """('identical' | 'close' | 'differs' | 'refused' | 'failed' | 'not runnable', detail) of one class."""
    try:
        model = tiny_model(model_class)
        without_cache(model)
        batches = inputs_for(model, registry)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            resident = model_class.from_pretrained(directory).eval().requires_grad_(False)
            without_cache(resident)
            with torch.no_grad():
                expected = [resident(**batch) for batch in batches]
            return compare(Path(directory), batches, expected)
    except Exception as error:
        return "not runnable", f"{type(error).__name__}: {str(error).splitlines()[0][:180] if str(error) else ''}"


def compare(directory: Path, batches: list[dict[str, torch.Tensor]], expected: list[Any]) -> tuple[str, str]:
    outputs: dict[int, Any] = {}
    device = torch.device("cpu")
    try:
        streamed = StreamedModel(directory)
        with Meter(device) as meter:
            Stream(streamed, device, meter).run(batches, outputs.__setitem__)
    except InputError as error:
        return "refused", str(error).replace(str(directory), "")[:150]
    except BatchError as error:
        return "failed", str(error)[:170]
    worst = 0.0
    for index, reference in enumerate(expected):
        for name, value in reference.items():
            if not isinstance(value, torch.Tensor):
                continue
            found = outputs[index][name]
            found = found.materialize() if isinstance(found, DeferredLogits) else found
            if not torch.equal(found, value):
                worst = max(worst, float((found - value).abs().max() / value.abs().max().clamp_min(1e-12)))
    if worst == 0.0:
        blocks = sum(unit.is_block for unit in streamed.units)
        return "identical", f"{len(streamed.units)} units, {blocks} blocks"
    return ("close" if worst < 1e-5 else "differs"), f"{worst:.1e}"


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Give up on a model type after a while; some ignore every field that would make them small."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sweep(registry: str, only: set[str]) -> Counter[str]:
    """Print one line per model type of a registry, and the count."""
    names = getattr(modeling_auto, REGISTRIES[registry])
    counts: Counter[str] = Counter()
    for model_type, class_name in names.items():
        class_name = class_name[0] if isinstance(class_name, tuple | list) else class_name
        model_class = getattr(transformers, class_name, None)
        if model_class is None or (only and model_type not in only):
            continue
        with limited(60), contextlib.redirect_stderr(io.StringIO()):
            result, detail = verdict(model_class, registry)
        counts[result] += 1
        print(f"{registry:24} {model_type:28} {result:13} {detail}", flush=True)
        gc.collect()
    return counts


def main() -> int:
    """Parse the arguments, sweep, print the totals; 1 where something that runs resident does not stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", choices=[*REGISTRIES, "all"], default="causal-lm")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    bad = 0
    for registry in REGISTRIES if arguments.registry == "all" else [arguments.registry]:
        counts = sweep(registry, {name for name in arguments.only.split(",") if name})
        runnable = sum(counts.values()) - counts["not runnable"]
        print(f"{registry}: {counts['identical']} of {runnable} identical; {dict(counts)}")
        bad += runnable - counts["identical"] - counts["close"]
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
