"""Streams every architecture of transformers' registries that a tiny configuration can build, against the resident model.

    python scripts/sweep_architectures.py [--registry causal-lm] [--only llama,bloom] [--compile]

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from sweep_compile import compile_verdict, first_inputs
from sweep_configs import tiny_config
from sweep_inputs import Batch, candidates
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from onelayer.compiler import stream
from onelayer.compiler.errors import InputError
from onelayer.compiler.lazy import DeferredLogits
from onelayer.compiler.measure import Meter
from onelayer.compiler.units import StreamedModel, Unit

REGISTRIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
CPU = torch.device("cpu")
# Relative; a kernel that takes another path for weights at another address differs by less.
CLOSE = 1e-5


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


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Without cache, as streaming runs it, and without gradients, for which some products take another path."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if "use_cache" in getattr(config, "__dict__", {}):
            config.use_cache = False  # type: ignore[union-attr]
    return model.eval().requires_grad_(False)


def outputs_of(model: PreTrainedModel, batches: list[Batch]) -> list[list[torch.Tensor]]:
    """Every tensor of the model's answer to each batch."""
    with torch.no_grad():
        return [tensors_of(model(**batch)) for batch in batches]


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of an output in their order; deferred logits are formed."""
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [
        leaf.materialize() if isinstance(leaf, DeferredLogits) else leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    ]


def first_that_runs(model: PreTrainedModel, registry: str) -> tuple[str, list[Batch]]:
    """The first candidate batches that the resident model accepts, best those whose images or sound change its answer."""
    failures: list[str] = []
    ignored: list[tuple[str, list[Batch]]] = []
    for kind, batches in candidates(model, registry):
        try:
            answers = outputs_of(model, batches)
            if kind != "text" and not difference(answers, outputs_of(model, [turned(batch) for batch in batches])):
                ignored.append((f"{kind} (hardly any effect)", batches))
                continue
        except TimeoutError:
            raise
        except Exception as error:
            failures.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        if kind == "text" and (ignored or failures):
            return ignored[0] if ignored else (f"text (not more: {failures[0]})", batches)
        return kind, batches
    if ignored:
        return ignored[0]
    raise RuntimeError("; ".join(dict.fromkeys(failures)))


def turned(batch: Batch) -> Batch:
    """The batch with its images and sound the other way round."""
    return {name: value.flip(-1) if value.is_floating_point() else value for name, value in batch.items()}


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [""])[0][:150]


def difference(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value; infinite where shapes differ."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if [item.shape for item in ours] != [item.shape for item in theirs]:
            return float("inf")
        for one, other in zip(ours, theirs, strict=True):
            if not torch.equal(one, other):
                one, other = one.double(), other.double()
                same = (one == other) | (one.isnan() & other.isnan())
                distance = (one - other).abs().masked_fill(same, 0.0)
                worst = max(worst, float(distance.max() / other[other.isfinite()].abs().max().clamp_min(1e-12)))
    return worst


def verdict(model_class: type[PreTrainedModel], registry: str) -> tuple[str, str]:
    """('identical' | 'close' | 'differs' | 'refused' | 'failed' | 'not runnable', detail) of one class."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            model = prepared(tiny_model(model_class))
            model.save_pretrained(directory)
            resident = prepared(model_class.from_pretrained(directory))
            kind, batches = first_that_runs(resident, registry)
            expected = outputs_of(resident, batches)
        except Exception as error:
            return "not runnable", f"{type(error).__name__}: {first_line(error)}"
        try:
            found, loads, streamed = streamed_outputs(directory, batches)
        except InputError as error:
            return "refused", str(error).replace(name, "")[:150]
        except stream.BatchError as error:
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


def compiled(model_class: type[PreTrainedModel], registry: str) -> tuple[str, str]:
    """('optimal' | 'worse' | 'refused' | 'failed' | 'not runnable', detail) of compiling one class from text."""
    try:
        model = prepared(tiny_model(model_class))
        outputs_of(model, [first_inputs(model)])
    except Exception as error:
        return "not runnable", f"{type(error).__name__}: {first_line(error)}"
    try:
        return compile_verdict(model)
    except InputError as error:
        return "refused", first_line(error)
    except TimeoutError:
        raise
    except Exception as error:
        return "failed", f"{type(error).__name__}: {first_line(error)}"


def streamed_outputs(
    directory: Path, batches: list[Batch]
) -> tuple[list[list[torch.Tensor]], Counter[str], StreamedModel]:
    """Stream some batches as onto another device, where nothing is shared with the host: outputs, loads by unit."""
    outputs: dict[int, Any] = {}
    loads: Counter[str] = Counter()
    streamed = StreamedModel(directory)

    @contextlib.contextmanager
    def around(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        yield

    def copied(values: Any, device: torch.device) -> Any:
        return tree_map_only(torch.Tensor, lambda x: x.clone() if type(x) is torch.Tensor else x, values)

    with Meter(CPU) as meter, mock.patch.object(stream, "_move", copied):
        stream.Stream(streamed, CPU, meter, around=around).run(batches, outputs.__setitem__)
    return [tensors_of(outputs[index]) for index in range(len(batches))], loads, streamed


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its weights 16 bytes behind where they would lie by themselves."""
    for parameter in model.parameters():
        skip = 16 // parameter.element_size()
        place = torch.empty(parameter.numel() + skip, dtype=parameter.dtype)[skip:].view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
    return model


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


def sweep(registry: str, only: set[str], judge: Callable[..., tuple[str, str]] = verdict) -> Counter[str]:
    """Print one line per model type of a registry, and the count."""
    names = getattr(modeling_auto, REGISTRIES[registry])
    counts: Counter[str] = Counter()
    for model_type, class_name in names.items():
        class_name = class_name[0] if isinstance(class_name, tuple | list) else class_name
        model_class = getattr(transformers, class_name, None)
        if model_class is None or (only and model_type not in only):
            continue
        with limited(60), contextlib.redirect_stderr(io.StringIO()):
            result, detail = judge(model_class, registry)
        counts[result] += 1
        print(f"{registry:24} {model_type:28} {result:13} {detail}", flush=True)
        gc.collect()
    return counts


def main() -> int:
    """Parse the arguments, sweep, print the totals; 1 where something that runs resident does not stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", choices=[*REGISTRIES, "all"], default="causal-lm")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--compile", action="store_true", help="compile emulators instead of comparing outputs")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    bad = 0
    judge = compiled if arguments.compile else verdict
    for registry in REGISTRIES if arguments.registry == "all" else [arguments.registry]:
        counts = sweep(registry, {name for name in arguments.only.split(",") if name}, judge)
        runnable = sum(counts.values()) - counts["not runnable"]
        good = counts["identical"] + counts["optimal"]
        print(f"{registry}: {good} of {runnable} {'optimal' if arguments.compile else 'identical'}; {dict(counts)}")
        bad += runnable - good - counts["close"]
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
