"""The manifests in `manifests/`: they load, their memory budgets can be met, and their schema is current."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.media_files import picture
from helpers.model_shapes import decoder
from helpers.places import ROOT
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import Manifest, load_manifest, manifest_schema
from onelayer.runtime.pipeline.costs import Costs
from onelayer.runtime.pipeline.emulator_size import planned_run, runs_in_key, size_of_shapes
from onelayer.runtime.pipeline.kinds import step_costs
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.training.trainer_args import trainer_args_model

FOLDER = ROOT / "manifests"
REAL = sorted(path.name for path in FOLDER.glob("*.yaml") if not path.name.startswith("demo"))
# Renaming, reordering or adding one changes the key of every emulator whose size follows from memory.
FIELDS_IN_KEY = [
    "batch_size",
    "max_length",
    "lora_rank",
    "where",
    "rank",
    "on_gpu",
    "allocation",
    "is_cut",
    "compile_tokens",
    "refine_tokens",
    "scored_tokens",
]
# hidden, inner, layers, key and value width, vocabulary; as in the models' own config.json
SIZES = {"8b": (4096, 14336, 32, 1024, 128256), "32b": (5120, 25600, 64, 1024, 151936)}
SIZED = {
    "llama-8b-8gb.yaml": ("nf4", 1.0),
    "llama-8b-16gb.yaml": ("int8", 1.0),
    "llama-8b-24gb.yaml": ("int8", 1.0),
    "qwen-32b-24gb.yaml": ("nf4", 1.0),
}


def placed(folder: Path, name: str) -> Manifest:
    """Copy a manifest to its own folder, with one line in each file and one picture in each folder that it names."""
    text = (FOLDER / name).read_text()

    def files(value: Any) -> list[str]:
        if isinstance(value, dict | list):
            return [file for item in (value.values() if isinstance(value, dict) else value) for file in files(item)]
        return [value] if isinstance(value, str) and (value.endswith(".jsonl") or value.startswith("data/")) else []

    for file in files(yaml.safe_load(text)):
        (folder / file).parent.mkdir(exist_ok=True)
        if not file.endswith(".jsonl"):
            (folder / file).mkdir(exist_ok=True)
            picture().save(folder / file / "0.png")
            (folder / "flux-dev").mkdir(exist_ok=True)  # a pipeline encodes them, and it must be there
            (folder / "flux-dev" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
            continue
        (folder / file).write_text('{"text": "a"}\n')
    shutil.copy(FOLDER / name, folder / name)
    return load_manifest(folder / name)


@pytest.mark.parametrize("name", REAL)
def test_a_manifest_loads_and_has_steps(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    manifest = placed(tmp_path, name)
    kinds = [step.kind for step in steps_of(manifest, list(manifest.tasks))]
    assert kinds.count("evaluate") == len(manifest.tasks)
    assert ("compile" in kinds) == (manifest.emulator is not None)
    if name == "loract-alone.yaml":
        assert kinds == ["train", "evaluate"]
    if name == "many-tasks.yaml":
        assert kinds.count("compile") == kinds.count("slice") == 1


@pytest.mark.parametrize("name", SIZED)
def test_a_budget_gives_a_ratio_and_a_factor_dtype(tmp_path: Path, name: str) -> None:
    manifest = placed(tmp_path, name)
    assert manifest.emulator is not None
    assert manifest.emulator.memory is not None
    hidden, inner, layers, narrow, vocabulary = SIZES["32b" if "32b" in name else "8b"]
    shapes = decoder(hidden, inner, layers, vocabulary, narrow=narrow)
    size = size_of_shapes(manifest, manifest.emulator, shapes)
    assert (size.factor_dtype, size.ratio) == SIZED[name]
    named = manifest.emulator.model_copy(update={"factor_dtype": "bf16"})
    factored = size_of_shapes(manifest, named, shapes)
    assert factored.factor_dtype == "bf16"
    assert factored.ratio < size.ratio
    little = manifest.emulator.model_copy(update={"memory": 1 << 30})
    with pytest.raises(InputError, match=r"emulator\.memory: tasks\.support cannot be trained"):
        size_of_shapes(manifest, little, shapes)


def test_the_planner_sees_what_a_task_sets(tmp_path: Path) -> None:
    manifest = placed(tmp_path, "many-tasks.yaml")
    assert planned_run(manifest, "sql").tokens == 4 * 1024
    assert planned_run(manifest, "notes").tokens == 4 * 2048
    assert planned_run(manifest, "support").lora_rank == 16


def test_the_names_in_a_compile_key_stay(tmp_path: Path) -> None:
    for run in runs_in_key(placed(tmp_path, "many-tasks.yaml")):
        assert list(run) == FIELDS_IN_KEY


def test_costs_of_a_model_that_is_not_here_are_unknown(tmp_path: Path) -> None:
    manifest = placed(tmp_path, "many-tasks.yaml")
    costs = step_costs(steps_of(manifest, list(manifest.tasks))[0], Costs(manifest, None))
    assert (costs.read_bytes, costs.write_bytes, costs.peak_bytes) == (None, None, None)


def test_the_schema_of_manifests_is_current() -> None:
    if trainer_args_model() is None:
        pytest.skip("without the training extra its arguments are not in the schema")
    assert json.loads((FOLDER / "manifest.schema.json").read_text()) == manifest_schema()
