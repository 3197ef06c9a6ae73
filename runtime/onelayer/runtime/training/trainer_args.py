"""Reads the valid names and types for a manifest's `args:` from the source of the installed SFTConfig.

Importing SFTConfig would import torch, and a manifest is checked without it.
"""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

# SFTConfig and its ancestors, oldest first: (package, file, class). A test compares with dataclasses.fields(SFTConfig).
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}

# SFTConfig arguments for logging, display and saving during a training: changing one never trains again.
NON_SEMANTIC_ARGS = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "disable_tqdm",
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


@cache
def trainer_args_model() -> type[BaseModel] | None:
    """Build a model with one optional field per SFTConfig argument; None if the training extra is not installed.

    Scalars are typed, so `1e-4` (a string in YAML) becomes a float and `max_steps: many` is refused. Other types pass
    unchecked.
    """
    fields: dict[str, Any] = {}
    for distribution, file, class_name in _CLASSES:
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
