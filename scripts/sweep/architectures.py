"""Streams every architecture of transformers' registries that a tiny configuration can build, and compares results.

    python -m scripts.sweep.architectures [--registry causal-lm] [--only llama,bloom] [--compile | ...] [--device D]

Prints one line per model type: identical, close (with the largest difference), refused (with the reason), or not
runnable even when resident. Configurations are shrunk by the meaning of their field names; no model is special.
"""

import argparse
import contextlib
import copy
import gc
import io
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from onelayer.compiler.errors import InputError
from onelayer.compiler.streaming.stream import BatchError
from scripts.devices import CPU, opened
from scripts.sweep.compare import difference, first_line, first_that_runs, moved, outputs_of, prepared, streamed_outputs
from scripts.sweep.compile import compile_verdict, first_inputs, refine_verdict
from scripts.sweep.configs import tiny_config
from scripts.sweep.gradients import gradient_verdict
from scripts.sweep.packing import packing_verdict

REGISTRIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
# A relative difference; a kernel that takes another path for weights at another address differs by less.
CLOSE = 1e-5
# Models that ignore the fields that would make them small are skipped: nothing here may take more than a few GB.
MOST_PARAMETERS = 300_000_000


def small_models(model_class: type[PreTrainedModel]) -> Iterator[Callable[[], PreTrainedModel]]:
    """Return ways to make a small model, from a tiny and from the class's default configuration. Each may fail."""
    config_class = model_class.config_class
    assert config_class is not None
    yield lambda: random_model(model_class, tiny_config(config_class))
    yield lambda: random_model(model_class, config_class())


def random_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Make a seeded random model; norms, biases and zeros get noise, since ones and zeros would hide mistakes."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters, more than {MOST_PARAMETERS:,}")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.ndim == 1 or not parameter.any()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval()
    return model


def verdict(model_class: type[PreTrainedModel], registry: str, device: torch.device = CPU) -> tuple[str, str]:
    """Judge one class: ('identical' | 'close' | 'differs' | 'refused' | 'failed' | 'not runnable', detail)."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        reasons = []
        for make in small_models(model_class):
            try:
                prepared(make()).save_pretrained(directory)
                resident = prepared(model_class.from_pretrained(directory))
                kind, batches = first_that_runs(resident, registry)
                expected = outputs_of(resident, batches)
                break
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {first_line(error)}")
        else:
            return "not runnable", " | ".join(reasons)
        try:
            found, loads, streamed = streamed_outputs(directory, batches, device)
        except InputError as error:
            return "refused", str(error).replace(name, "")[:150]
        except BatchError as error:
            return "failed", str(error)[:170]
        again = {unit: count for unit, count in loads.items() if count > 1}
        blocks = sum(unit.is_block for unit in streamed.units)
        detail = f"{kind}; {len(streamed.units)} units, {blocks} blocks"
        detail += "".join(f"; {unit} loaded {count} times" for unit, count in list(again.items())[:1])
        worst = difference(found, expected)
        if worst == 0.0:
            return "identical", detail
        own = difference(outputs_of(moved(resident), batches), expected)
        detail = f"{worst:.1e}; {own:.1e} between the resident model and itself at other addresses; {detail}"
        return ("close" if worst < CLOSE else "differs"), detail


def compiled(model_class: type[PreTrainedModel], registry: str, device: torch.device = CPU) -> tuple[str, str]:
    """Judge compiling a class from text: ('optimal' | 'worse' | 'refused' | 'failed' | 'not runnable', detail)."""
    return from_text(partial(compile_verdict, device=device), model_class)


def refined(model_class: type[PreTrainedModel], registry: str, device: torch.device = CPU) -> tuple[str, str]:
    """Judge refining a class's emulator: ('better' | 'unmoved' | 'refused' | 'failed' | 'not runnable', detail)."""
    return from_text(partial(refine_verdict, device=device), model_class)


def from_text(
    judge: Callable[[PreTrainedModel], tuple[str, str]], model_class: type[PreTrainedModel]
) -> tuple[str, str]:
    """Call `judge` for a small model of a class that runs on text."""
    try:
        model = prepared(next(small_models(model_class))())
        outputs_of(model, [first_inputs(model)])
    except Exception as error:
        return "not runnable", f"{type(error).__name__}: {first_line(error)}"
    try:
        return judge(model)
    except InputError as error:
        return "refused", first_line(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {first_line(error)}"


def backward(model_class: type[PreTrainedModel], registry: str, device: torch.device = CPU) -> tuple[str, str]:
    """Judge gradients: ('identical' | 'close' | 'differs' | 'refused' | 'failed' | 'not runnable', detail)."""
    return tried(partial(gradient_verdict, device=device), model_class, registry)


def packed(model_class: type[PreTrainedModel], registry: str) -> tuple[str, str]:
    """Judge a class's gradients from packed rows: ('exact' | 'refused' | 'missed' | 'not runnable' ..., detail)."""
    return tried(lambda model, registry: packing_verdict(model.requires_grad_(), registry), model_class, registry)


def tried(
    judge: Callable[[PreTrainedModel, str], tuple[str, str]], model_class: type[PreTrainedModel], registry: str
) -> tuple[str, str]:
    """Call `judge` for the first small model of a class that it accepts."""
    reasons = []
    for make in small_models(model_class):
        try:
            return judge(prepared(make()), registry)
        except InputError as error:
            return "refused", first_line(error)
        except BatchError as error:
            return "failed", first_line(error)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
    return "not runnable", " | ".join(reasons)


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Stop work on a model type after a time limit; some ignore every field that would make them small."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def sweep(registry: str, only: set[str], judge: Callable[..., tuple[str, str]] = verdict) -> Counter[str]:
    """Print one line per model type of a registry, and the counts."""
    names = getattr(modeling_auto, REGISTRIES[registry])
    counts: Counter[str] = Counter()
    for model_type, class_name in names.items():
        class_name = class_name[0] if isinstance(class_name, tuple | list) else class_name
        model_class = getattr(transformers, class_name, None)
        if model_class is None or (only and model_type not in only):
            continue
        with limited(120), contextlib.redirect_stderr(io.StringIO()):
            result, detail = judge(model_class, registry)
        counts[result] += 1
        print(f"{registry:24} {model_type:28} {result:13} {detail}", flush=True)
        gc.collect()
    return counts


def main() -> int:
    """Parse the arguments, sweep, print the totals; return 1 if a model that runs resident does not stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", choices=[*REGISTRIES, "all"], default="causal-lm")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--compile", action="store_true", help="compile emulators instead of comparing outputs")
    parser.add_argument("--refine", action="store_true", help="compile emulators and train their factors")
    parser.add_argument("--gradients", action="store_true", help="compare LoRA gradients, streamed forward and back")
    parser.add_argument("--packing", action="store_true", help="compare gradients of packed rows, resident")
    parser.add_argument("--device", help="where units run: cpu, cuda, or pretend, the tests' accelerator without one")
    arguments = parser.parse_args()
    device = CPU if arguments.device is None else opened(arguments.device)
    if arguments.packing and device != CPU:
        parser.error("--packing compares resident models; leave --device out")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    bad = 0
    judges: dict[str, Callable[..., tuple[str, str]]] = {
        "compile": compiled,
        "refine": refined,
        "gradients": backward,
        "packing": packed,
    }
    judge = next((judge for name, judge in judges.items() if getattr(arguments, name)), verdict)
    on_device = judge if device == CPU else partial(judge, device=device)
    for registry in REGISTRIES if arguments.registry == "all" else [arguments.registry]:
        counts = sweep(registry, {name for name in arguments.only.split(",") if name}, on_device)
        runnable = sum(counts.values()) - counts["not runnable"]
        good = counts["identical"] + counts["optimal"] + counts["exact"] + counts["better"]
        word = {compiled: "optimal", refined: "better", packed: "exact"}.get(judge, "identical")
        print(f"{registry}: {good} of {runnable} {word}; {dict(counts)}")
        bad += runnable - good - counts["close"] - (counts["refused"] if judge is packed else 0)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
