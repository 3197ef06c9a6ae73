"""Saves a trained PEFT model as an adapter directory: PEFT's own files, naming the original, plus provenance."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.adapters.config import CONFIG_FILE
from onelayer.compiler.adapters.keys import KEY_PREFIX
from onelayer.compiler.adapters.pipeline_weights import write_pipeline_weights
from onelayer.compiler.adapters.reader import PROVENANCE_FILE
from onelayer.compiler.adapters.writer import Base, model_card
from onelayer.compiler.storage.files import read_json, write_json, write_text
from onelayer.runtime.modules.low_rank_linear import CompressedLinear
from onelayer.runtime.training.inputs import TrainModel
from onelayer.runtime.training.trainer_args import TOOL_FILES

if TYPE_CHECKING:
    from peft import PeftModel


def write_adapter_directory(
    directory: Path,
    adapted: "PeftModel",
    model: TrainModel,
    provenance: dict[str, Any],
    state: dict[str, Any] | None = None,
) -> None:
    """Save the adapter into an existing directory, with the values in `state` if given.

    PEFT records the path of the loaded base, which is the emulator's path on this machine. The modules have the
    original's names, so the adapter must name the original. Sets are sorted so that equal runs write equal bytes.
    PEFT sorts patterns too and takes the first that matches, so each module gets a pattern of its own.
    """
    adapted.save_pretrained(str(directory), state_dict=state)
    path = directory / CONFIG_FILE
    config = read_json(path)
    names = {"base_model_name_or_path": model.base["model"], "revision": model.base["revision"]}
    transposed = _was_conv1d(adapted)
    config.update(names, fan_in_fan_out=config["fan_in_fan_out"] or transposed, **_patterns(adapted))
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = sorted(config[field])
    write_json(path, config)
    base = Base(
        model=model.base["model"],
        revision=model.base["revision"],
        class_name=model.model_class.__name__,
        class_module=model.model_class.__module__,
        fan_in_fan_out=transposed,
        quantization=model.quantization,
    )
    if model.denoises:
        write_pipeline_weights(directory, base.class_name)
    write_text(directory / "README.md", model_card(base, provenance))
    write_json(directory / PROVENANCE_FILE, provenance)


def copy_logs(work: Path, output: Path) -> None:
    """Copy what reporting tools wrote into the trainer's directory to the output, where the user looks for it."""
    for name in TOOL_FILES:
        if (source := work / name).is_dir():
            shutil.copytree(source, output / name)
        elif source.is_file():
            shutil.copy2(source, output / name)


def _patterns(adapted: "PeftModel") -> dict[str, dict[str, float]]:
    """Return rank and alpha of every module that has others than the default, by its anchored full name."""
    from peft.tuners.lora import LoraLayer

    name = adapted.active_adapter
    default: Any = adapted.peft_config[name]
    layers = {
        f"^{module.removeprefix(KEY_PREFIX)}": layer
        for module, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.r
    }
    return {
        "rank_pattern": {key: layer.r[name] for key, layer in layers.items() if layer.r[name] != default.r},
        "alpha_pattern": {
            key: layer.lora_alpha[name] for key, layer in layers.items() if layer.lora_alpha[name] != default.lora_alpha
        },
    }


def _was_conv1d(adapted: "PeftModel") -> bool:
    """Return whether every adapted linear is a `Conv1D` in the original, which PEFT reads from `fan_in_fan_out`."""
    bases = [getattr(module, "base_layer", None) for module in adapted.modules()]
    linears = [base for base in bases if isinstance(base, CompressedLinear)]
    return bool(linears) and all(base.was_conv1d for base in linears)
