"""Makes the emulators that the quality benchmark compares: ours, the published one, and others at equal bytes.

A kind is a name from `KINDS`; a size is a share of the linears' bytes at 16 bits. The product itself makes `published`
(bf16 factors, uniform ranks), `bf16`, `int8` and `nf4` with ranks by spectrum (with `-uniform`: uniform), `qlora` (all
linears whole in nf4), and `coded` (codes with a thin low-rank part; `coded-forward` without the pass back). Other kinds
replace the factors of `published`, so that everything else is equal: `plain-svd` uses no calibration, `sequential`
takes its statistics from the emulator instead of the original, `rescaled` gives each linear the original's output
energy. `dropped` keeps some layers whole instead (offsite tuning). `-refined` after a kind means that its factors were
trained unit by unit against the original (`refine`), `-refined-original` on the original's inputs whatever the form,
and `-refined-gradients` that they learned gradients too.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from onelayer.compiler import compile_emulator, refine_emulator
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.facts import DOWN, UP
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.factors.factorize import factorize
from onelayer.compiler.factors.moments import Gram, Moments
from onelayer.compiler.factors.quantize import quantize_matrix
from onelayer.compiler.libraries.library import library_of
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.runtime.modules.quantized_linear import QuantizedLinear

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
COMPILED: dict[str, dict[str, Any]] = {
    "published": {"factor_dtype": "bf16", "rank_allocation": "uniform"},
    "bf16": {"factor_dtype": "bf16", "rank_allocation": "spectrum"},
    "int8-uniform": {"factor_dtype": "int8", "rank_allocation": "uniform"},
    "int8": {"factor_dtype": "int8", "rank_allocation": "spectrum"},
    "nf4-uniform": {"factor_dtype": "nf4", "rank_allocation": "uniform"},
    "nf4": {"factor_dtype": "nf4", "rank_allocation": "spectrum"},
    "coded": {"form": "coded"},
    "coded-forward": {"form": "coded", "backward": False},
    "qlora": {"factor_dtype": "nf4", "rank_allocation": "uniform"},
}
DERIVED = ("plain-svd", "sequential", "rescaled")
KINDS = (*COMPILED, *DERIVED, "dropped")
# How the factors were trained, by what follows the kind.
REFINED: dict[str, dict[str, Any]] = {
    "-refined": {},
    "-refined-original": {"inputs": "original"},
    "-refined-gradients": {"backward": True},
}
LAYER = re.compile(r"\.(\d+)\.")


def resident(model: Path) -> Any:
    """Load the whole original into memory: only for baselines, which need it there."""
    library = library_of(model)
    loaded: Any = library.model_class(library.read_config(model), model).from_pretrained(str(model))
    return loaded.float().eval()


def compiled(kind: str, size: float, output: Path, model: Path, data: Path, calibration: Mapping[str, Any]) -> None:
    """Compile an emulator of a kind that the product makes."""
    share = 0.99 if kind == "qlora" else size  # share of 16-bit bytes: nf4 keeps every linear whole with far fewer
    compile_emulator(model, str(data), output, keep_bytes=share, **COMPILED[kind], **calibration)


def refinement_of(kind: str) -> str:
    """Return the ending of a kind that says how its factors were trained; empty if they were not."""
    return next((ending for ending in REFINED if kind.endswith(ending)), "")


def refined(kind: str, output: Path, emulator: Path, model: Path, data: Path, calibration: Mapping[str, Any]) -> None:
    """Refine the emulator as its kind says, otherwise with the defaults of `refine`."""
    given = {name: calibration[name] for name in ("max_length", "batch_size")}
    how = REFINED[refinement_of(kind)]
    refine_emulator(emulator, model=model, calibration=str(data), output=output, **given, **how)


def derived(kind: str, output: Path, published: Path, model: Path, data: Path, calibration: Mapping[str, Any]) -> None:
    """Make `published` with other factors of the same ranks."""
    source = Emulator.open(published)
    make: Callable[[], Factors] = {
        "plain-svd": lambda: _plain(resident(model), source),
        "sequential": lambda: _sequential(resident(model), source, model, data, calibration),
        "rescaled": lambda: _rescaled(source),
    }[kind]
    _rewrite(published, output, make())


def _plain(model: Any, source: Emulator) -> Factors:
    """Truncate the SVD of each weight, without calibration."""
    factors = {}
    for name, rank in source.facts.ranks.items():
        U, s, Vt = torch.linalg.svd(model.get_submodule(name).weight.detach().double(), full_matrices=False)
        factors[name] = (U[:, :rank] * s[:rank], Vt[:rank])
    return factors


def _rescaled(source: Emulator) -> Factors:
    """Scale each `up` by 1 / sqrt(1 - error^2), which restores the lost energy."""
    figures = json.loads((source.directory / "emulator.json").read_text())
    errors = {row["name"]: row["error"] for row in figures["linears"]}
    factors = {}
    for name in source.facts.ranks:
        up, down = source.factors(name)
        assert down is not None
        factors[name] = (up / max(1e-6, 1 - errors[name] ** 2) ** 0.5, down)
    return factors


def _sequential(model: Any, source: Emulator, name: Path, data: Path, calibration: Mapping[str, Any]) -> Factors:
    """Factorize layer by layer, with moments of the inputs that the earlier, already replaced layers produce."""
    tokens = read_tokens(str(data), load_tokenizer(name), calibration["max_length"], calibration["samples"], 0)
    batches = [batch.inputs for batch in make_batches(tokens, model.config, calibration["batch_size"])]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in _layers(source.facts.ranks):
        linears = {linear: model.get_submodule(linear) for linear in layer}
        grams = _grams(model, linears, batches)
        for linear, module in linears.items():
            weight = module.weight.detach()
            rank = source.facts.ranks[linear]
            found = factorize(weight, grams[linear], rank, torch.float32)
            factors[linear] = (found.up, found.down)
            module.weight.data = found.up @ found.down
    return factors


def _layers(ranks: Mapping[str, int]) -> Iterator[list[str]]:
    """Group the names of linears by layer, in order."""
    for prefix in dict.fromkeys(layer_prefix(name) for name in ranks):
        yield [name for name in ranks if layer_prefix(name) == prefix]


def layer_prefix(name: str) -> str:
    """Return a module's name up to and including its first number."""
    match = LAYER.search(name)
    assert match is not None, name
    return name[: match.end()]


@torch.no_grad()
def _grams(model: Any, linears: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]) -> dict[str, Moments]:
    grams = {}
    handles = []
    for name, module in linears.items():
        of_input = module.out_features >= module.in_features
        gram = Gram(min(module.out_features, module.in_features), torch.device("cpu"))
        energy = None if of_input else torch.zeros(module.in_features, dtype=torch.float64)
        grams[name] = Moments(gram, of_input, energy)

        def hook(module: Any, args: Any, output: Any, moments: Moments = grams[name]) -> None:
            bias = 0 if module.bias is None else module.bias
            moments.gram.add(args[0] if moments.of_input else output - bias)
            if moments.input_energy is not None:
                moments.input_energy += args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)

        handles.append(module.register_forward_hook(hook))
    for inputs in batches:
        model(**inputs)
    for handle in handles:
        handle.remove()
    return grams


def _rewrite(published: Path, output: Path, factors: Factors) -> None:
    """Copy an emulator with other bf16 factors and its own digest."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(published, partial)
    for shard in partial.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, (up, down) in factors.items():
            if name + UP in tensors:
                tensors[name + UP] = quantize_matrix(up.T.float().contiguous(), "bf16")
                tensors[name + DOWN] = quantize_matrix(down.float().contiguous(), "bf16")
        save_file(tensors, shard, {"format": "pt"})
    figures = json.loads((partial / "emulator.json").read_text())
    figures["digest"] = model_digest(partial)
    (partial / "emulator.json").write_text(json.dumps(figures))
    partial.rename(output)


@contextmanager
def elastic(least: float = 0.5, seed: int = 0) -> Iterator[None]:
    """Make quantized factors use a random prefix in the block: a share of `least` or more, new for each pass."""
    generator, product = Random(seed), QuantizedLinear._product
    first: list[QuantizedLinear] = []
    share = [1.0]

    def prefix(self: QuantizedLinear, x: torch.Tensor, name: str, rows_are_outputs: bool) -> torch.Tensor:
        y = product(self, x, name, rows_are_outputs)
        if name != "lr_down":
            return y
        first[:] = first or [self]
        if self is first[0]:
            share[0] = generator.uniform(least, 1.0)
        return y * (torch.arange(y.shape[-1], device=y.device) < share[0] * y.shape[-1])

    with mock.patch.object(QuantizedLinear, "_product", prefix):
        yield


def dropped(size: float, output: Path, model: Path) -> dict[int, int]:
    """Make a plain model of some evenly spread layers; return the original's number of each of its layers."""
    loaded = resident(model)
    layers = next(part for part in loaded.modules() if isinstance(part, torch.nn.ModuleList) and len(part) > 1)
    count, total = max(1, round(size * len(layers))), len(layers)
    kept = [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
    chosen = [layers[number] for number in kept]
    while len(layers):
        del layers[0]
    layers.extend(chosen)
    loaded.config.num_hidden_layers = count
    loaded.save_pretrained(output)
    load_tokenizer(model).save_pretrained(output)
    return dict(enumerate(kept))


def restored(adapter: Path, output: Path, layers: Mapping[int, int], model: Path) -> None:
    """Rename an adapter of a model with dropped layers for the original; missing layers get zeros."""
    shutil.copytree(adapter, output)
    for name in ("onelayer.json", "README.md"):
        (output / name).unlink(missing_ok=True)
    tensors = load_file(output / "adapter_model.safetensors")
    renamed = {
        LAYER.sub(lambda match: f".{layers[int(match[1])]}.", name, count=1): tensor for name, tensor in tensors.items()
    }
    template = {LAYER.sub(".{}.", name, count=1): tensor for name, tensor in tensors.items() if LAYER.search(name)}
    total = AutoConfig.from_pretrained(model).num_hidden_layers
    for name, tensor in template.items():
        for number in set(range(total)) - set(layers.values()):
            renamed[name.format(number)] = torch.zeros_like(tensor)
    save_file(renamed, output / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((output / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model)
    config["target_modules"] = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in renamed})
    (output / "adapter_config.json").write_text(json.dumps(config))
