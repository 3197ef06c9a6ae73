"""Reads the valid names and types for a manifest's `args:` from the source of the installed SFTConfig.

Importing SFTConfig would import torch, and a manifest is checked without it.
"""

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, create_model

from onelayer.compiler.faults import unknown_name

if TYPE_CHECKING:
    import torch

# A method's configuration and its ancestors, oldest first: (package, file, class). A test compares with
# dataclasses.fields of each.
_ANCESTORS = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)
Method = Literal["sft", "dpo", "kto"]
# TRL's defaults are meant for full tuning. On SmolLM2 4e-3 is best at alpha = 2 r, of six rates (manifests/LOG.md,
# "Learning rates on a real model"); larger models want less. For preferences, ten times TRL's.
LEARNING_RATES: dict[Method, float] = {"sft": 1e-3, "dpo": 1e-5, "kto": 1e-5}
METHODS: tuple[Method, ...] = get_args(Method)
CONFIG_NAMES: dict[Method, str] = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig"}
_SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}

# SFTConfig arguments for logging, display, scoring and saving during a training: changing one never trains again.
NON_SEMANTIC_ARGS = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "disable_tqdm",
        "eval_steps",
        "include_num_input_tokens_seen",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "project",
        "report_to",
        "run_name",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "skip_memory_metrics",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    }
)


# Defaults that differ from SFTConfig's. Losses are logged at every step so that a resumed run can report their mean.
TRAINER_DEFAULTS: dict[str, Any] = {
    "activation_checkpointing": False,
    "logging_nan_inf_filter": False,
    "logging_steps": 1,
    "save_total_limit": 2,
}

# Names that transformers 5.23 deprecates. It ignores their value if the new name has one.
RENAMED_ARGS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# SFTConfig arguments that would be ignored here or would break a promise, and what to do instead.
REFUSED_ARGS = {
    **dict.fromkeys(
        ("output_dir", "resume_from_checkpoint", "seed", "max_length"), "train_lora has its own parameter for it"
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "chat_template_path", "completion_only_loss", "dataset_kwargs", "dataset_num_proc"),
        "onelayer labels the data itself; change the data",
    ),
    **dict.fromkeys(
        ("dataset_text_field", "eos_token", "pad_token", "truncation_mode"),
        "onelayer tokenizes the data itself; change the data or the tokenizer's files",
    ),
    **dict.fromkeys(("eval_strategy", "do_eval", "eval_on_start", "eval_delay"), "give eval_data and eval_steps"),
    "load_best_model_at_end": "the last adapter is written; compare others with `onelayer evaluate`",
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "upload the finished adapter yourself"),
    "model_init_kwargs": "the emulator is loaded unchanged",
    "trust_remote_code": "remote code is never run",
}

# Arguments of DPOConfig and KTOConfig that would be ignored or would break a promise, and why.
REFUSED_PREFERENCE_ARGS = {
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size"), "the original gives the reference before training"
    ),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), "the reference is the original and stays"
    ),
    **dict.fromkeys(("ld_alpha", "padding_free"), "the reference is one number for each answer"),
}


def refused_args(method: Method) -> dict[str, str]:
    """Return the arguments that a method's training refuses, and what to do instead."""
    return REFUSED_ARGS if method == "sft" else {**REFUSED_ARGS, **REFUSED_PREFERENCE_ARGS}


# The tools that Trainer reports to, and the packages of each: all are needed, `|` separates alternatives.
REPORTERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard|tensorboardX",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}

# Where tensorboard and codecarbon write in the trainer's directory. The other tools keep places of their own.
TOOL_FOLDER = "runs"
TOOL_FILES = (TOOL_FOLDER, "emissions.csv")


def reporter_fault(report_to: Any) -> str | None:
    """Say which tool to report to is unknown, or lacks its package; None if nothing is wrong."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("all", "none"):
            continue
        if name not in REPORTERS:
            return f"{name}: {unknown_name(str(name), list(REPORTERS), 'tool')}"
        for package in REPORTERS[name]:
            if not any(find_spec(choice) for choice in package.split("|")):
                return f"{name}: needs a package that is not installed; pip install {package.split('|')[0]}"
    return None


@cache
def trainer_args_model(method: Method = "sft") -> type[BaseModel] | None:
    """Build a model with one optional field per argument of a method; None if the training extra is not installed.

    Scalars are typed, so `1e-4` (a string in YAML) becomes a float and `max_steps: many` is refused. Other types pass
    unchecked.
    """
    fields: dict[str, Any] = {}
    own = ("trl", f"trainer/{method}_config.py", CONFIG_NAMES[method])
    for distribution, file, class_name in (*_ANCESTORS, own):
        spec = find_spec(distribution)
        if spec is None or not spec.submodule_search_locations:
            return None
        for name, annotation in _annotations(Path(spec.submodule_search_locations[0]) / file, class_name):
            fields[name] = (_type(annotation), None)
    config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return create_model("TrainerArgs", __config__=config, **fields)


def _annotations(file: Path, class_name: str) -> list[tuple[str, str]]:
    """List names and annotations of the fields that a class body declares."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    assert bodies, f"{file} no longer defines {class_name}"
    return [
        (node.target.id, ast.unparse(node.annotation))
        for node in bodies[0]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _type(annotation: str) -> Any:
    """Return the scalar type that an annotation names, or None; anything richer is left to SFTConfig."""
    kinds = set(annotation.split(" | ")) - {"None"}
    scalar = _SCALARS.get(kinds.pop()) if len(kinds) == 1 else None
    return Any if scalar is None else scalar | None


def training_device(arguments: Mapping[str, Any]) -> "torch.device":
    """Return the device of a training with these arguments of its trainer."""
    from onelayer.compiler.machine.devices import pick_device

    return pick_device("cpu" if arguments.get("use_cpu") else None)
