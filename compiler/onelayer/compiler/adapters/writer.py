"""Factors in, a PEFT adapter directory out, in the one form that PEFT, vLLM and llama.cpp all scale alike.

That form: one rank R for every module (zero-padded), lora_alpha = r = R, so the scaling is 1 wherever it is computed;
no rank stabilization, no patterns; the original's name as the base model; target modules by their short names where
these mean the same modules (`short_targets`).

Letters: r rank of one module, R rank of the file, in / out features.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.adapters.config import CONFIG_FILE
from onelayer.compiler.adapters.keys import EMBEDDING_A, EMBEDDING_B, KEY_PREFIX, LORA_A, LORA_B
from onelayer.compiler.adapters.pipeline_weights import PIPELINE_FILE, write_pipeline_weights
from onelayer.compiler.adapters.reader import PROVENANCE_FILE, WEIGHTS_FILE, Adapter
from onelayer.compiler.storage.files import read_json, write_json, write_text
from onelayer.compiler.storage.gguf_format import SUFFIX
from onelayer.compiler.storage.safetensors_writer import Entry, copy_entry, tensor_entry, write_safetensors

if TYPE_CHECKING:
    import torch


LoraFactors = Mapping[str, "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Base:
    """The original model that an adapter is for: its name and revision, its class, and how its linears lie.

    `quantization` is the method by which its weights are quantized. With `fan_in_fan_out` PEFT knows that the adapted
    weights are stored (in, out), as GPT-2's Conv1D does.
    """

    model: str
    revision: str | None
    class_name: str
    class_module: str
    fan_in_fan_out: bool
    quantization: str | None = None

    @property
    def is_denoiser(self) -> bool:
        """Whether pipelines of diffusers load its adapters."""
        return self.class_module.partition(".")[0] == "diffusers"


def write_adapter(
    directory: Path,
    factors: LoraFactors,
    *,
    source: Adapter,
    base: Base,
    targets: list[str],
    provenance: dict[str, Any],
) -> None:
    """Write an adapter into an existing directory.

    `targets` are the names by which PEFT finds the modules of `factors`.
    `factors` maps module names of `source` to A (r, in) and B (out, r), with the scaling already in B; what `source`
    replaces as well (dense modules, biases, token rows) is copied through as stored. `provenance` goes to
    `onelayer.json`, and its scalar facts to the metadata of the weights.
    """
    assert factors.keys() == source.modules.keys(), "every adapted module is written, and no other"
    rank = max(1, *(int(a.shape[0]) for a, _ in factors.values()))
    entries = [entry for name in sorted(factors) for entry in _lora_entries(source, name, *factors[name], rank)]
    carried = [*source.dense.values(), *(key for key, _ in source.token_rows.values())]
    entries.extend(copy_entry(key, source.tensors[key]) for key in sorted(carried))
    write_safetensors(directory / WEIGHTS_FILE, entries, {"format": "pt", **_flat(provenance)})
    _write_config(directory, targets, rank, source, base)
    if base.is_denoiser:
        write_pipeline_weights(directory, base.class_name)
    write_text(directory / "README.md", model_card(base, provenance))
    write_json(directory / PROVENANCE_FILE, provenance)


def _lora_entries(source: Adapter, name: str, a: "torch.Tensor", b: "torch.Tensor", rank: int) -> tuple[Entry, Entry]:
    """Return A and B of one module, padded with zeros to the file's rank, in float32."""
    from torch.nn.functional import pad

    missing = rank - a.shape[0]
    kind_a, kind_b = (EMBEDDING_A, EMBEDDING_B) if source.modules[name].embedding else (LORA_A, LORA_B)
    padded_a, padded_b = pad(a.float(), (0, 0, 0, missing)), pad(b.float(), (0, missing))
    return tensor_entry(KEY_PREFIX + name + kind_a, padded_a), tensor_entry(KEY_PREFIX + name + kind_b, padded_b)


def _write_config(directory: Path, targets: list[str], rank: int, source: Adapter, base: Base) -> None:
    """Let PEFT write its own configuration file; only the order of the names, a set to PEFT, is fixed."""
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        task_type=source.config.task_type,
        base_model_name_or_path=base.model,
        revision=base.revision,
        fan_in_fan_out=base.fan_in_fan_out,
        bias=source.config.bias,
        modules_to_save=source.config.modules_to_save,
        ensure_weight_tying=source.config.ensure_weight_tying,
        trainable_token_indices=source.config.trainable_token_indices,
        inference_mode=True,
    )
    mapping = {"base_model_class": base.class_name, "parent_library": base.class_module}
    config.save_pretrained(str(directory), auto_mapping_dict=None if config.task_type else mapping)
    path = directory / CONFIG_FILE
    write_json(path, {**read_json(path), "target_modules": targets})


def _flat(provenance: dict[str, Any], prefix: str = "onelayer") -> dict[str, str]:
    """Flatten the scalar facts of a nested record to strings: {"onelayer.base.digest": ...}."""
    flat: dict[str, str] = {}
    for name, value in provenance.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}.{name}"))
        elif not isinstance(value, list):
            flat[f"{prefix}.{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def model_card(base: Base, provenance: dict[str, Any]) -> str:
    """Write a model card that leads to the original, whatever the trainer wrote."""
    from huggingface_hub import ModelCardData

    tags = [f"base_model:adapter:{base.model}", "lora", "onelayer"]
    data = ModelCardData(base_model=base.model, library_name="peft", tags=tags)
    place, revision = base.model, f", revision={base.revision!r}" if base.revision else ""
    if place.endswith(SUFFIX):  # a file, which transformers reads by its folder and name
        place, revision = str(Path(place).parent), f", gguf_file={Path(place).name!r}"
    state = "trained on an emulator of it and corrected for it" if provenance.get("corrected") else "made for it"
    trained_on = provenance.get("trained_on")
    if trained_on and not provenance.get("corrected") and trained_on["digest"] != provenance["base"]["digest"]:
        state = "trained on an emulator of it and not yet corrected for it (`onelayer correct` does that)"
    if provenance.get("polished"):
        state = "trained with exact steps on it, streamed layer by layer,"
    packed = base.quantization
    fits = f" Its weights are quantized ({packed}), and the adapter fits them as they are unpacked." if packed else ""
    use = f"""from peft import PeftModel
from transformers import {base.class_name}

model = {base.class_name}.from_pretrained({place!r}{revision})
model = PeftModel.from_pretrained(model, "path/to/this/directory")"""
    if base.is_denoiser:
        use = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({place!r}{revision})
pipe.load_lora_weights("path/to/this/directory", weight_name={PIPELINE_FILE!r})"""
    return f"""---
{data.to_yaml()}
---

# LoRA adapter for {base.model}

A plain LoRA adapter for `{base.model}`, {state} by onelayer. `{PROVENANCE_FILE}` records how it was made.{fits}

```python
{use}
```
"""
