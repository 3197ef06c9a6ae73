"""The correction pass over tiny models, compared with dense formulas and PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helpers.peft_adapters import deltas, load_adapter, load_original, random_adapter
from helpers.reference_emulators import products, write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.adapters.reader import Adapter, adapter_digest
from onelayer.compiler.correct.command import CorrectResult, correct_adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.files import read_json, write_json

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha is r": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
    "alpha differs": {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
}


class Setting:
    """Make a tiny original, an emulator of it, and an adapter for the emulator's module names."""

    def __init__(self, root: Path, family: str, ratio: float, skip: tuple[str, ...] = (), **lora: Any) -> None:
        self.root = root
        self.model: PreTrainedModel = save_tiny(family, root / "original", shards=2)
        write_emulator(self.model, root / "original", root / "emulator", ratio=ratio, skip=skip)
        self.adapted = random_adapter(self.reload(), root / "adapter", **lora)
        self.adapted.unload()

    def reload(self) -> PreTrainedModel:
        return load_original(self.root / "original")

    def correct(self, limit: float | None = 3.0, **changes: Any) -> CorrectResult:
        paths = {"emulator": self.root / "emulator", "model": self.root / "original", "output": self.root / "out"}
        return correct_adapter(self.root / "adapter", limit=limit, **{**paths, **changes})

    def stored_bytes(self, part: str) -> int:
        files = (self.root / "emulator").glob("*.safetensors")
        return sum(tensor.nbytes for file in files for name, tensor in load_file(file).items() if part in name)


@pytest.mark.usefixtures("factor_dtype")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=[name.replace(" ", "_") for name in CONFIGS])
def test_the_corrected_adapter_is_the_closed_form_on_the_original(config: dict[str, Any], tmp_path: Path) -> None:
    setting = Setting(tmp_path, "qwen2", 0.4, **config)
    trained = deltas(random_adapter(setting.reload(), tmp_path / "again", **config))
    result = setting.correct(limit=None)
    corrected = load_adapter(setting.reload(), tmp_path / "out")
    emulator, weights = products(tmp_path / "emulator"), dict(setting.model.named_parameters())
    found = deltas(corrected)
    assert found.keys() == trained.keys() == {linear.name for linear in result.linears}
    for name, delta in found.items():
        projector = (a := Adapter.open(tmp_path / "adapter").factors(name)[0]).T @ torch.linalg.pinv(a.T)
        wanted = (emulator[name] - weights[f"{name}.weight"]) @ projector + trained[name]
        torch.testing.assert_close(delta, wanted.detach(), rtol=1e-4, atol=1e-5)
    assert all(linear.compressed and linear.clamped == 0 for linear in result.linears)


@pytest.mark.usefixtures("factor_dtype")
def test_each_adapted_weight_is_read_once_and_nothing_else(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", 0.3, r=2, target_modules=["up_proj", "lm_head"])
    result = setting.correct()
    weights = sum(weight.nbytes for name, weight in setting.model.named_parameters() if "up_proj" in name)
    assert result.report.bytes_read == weights + setting.stored_bytes("up_proj")


@pytest.mark.usefixtures("factor_dtype")
def test_on_the_span_of_a_the_original_does_what_the_emulator_did(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", 0.3, r=4, lora_alpha=16, target_modules=["o_proj"])
    setting.correct(limit=None)
    name = "model.layers.1.self_attn.o_proj"
    trained, out = Adapter.open(tmp_path / "adapter"), Adapter.open(tmp_path / "out")
    (a, b), (a_c, b_c) = trained.factors(name), out.factors(name)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)) @ a
    emulator, weight = products(tmp_path / "emulator"), dict(setting.model.named_parameters())[f"{name}.weight"]
    on_emulator = x @ (emulator[name] + 4.0 * b @ a).T
    torch.testing.assert_close(x @ (weight + b_c @ a_c).T, on_emulator, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "phi3"])
@pytest.mark.parametrize("limit", [3.0, None])
def test_an_exact_emulator_changes_no_logit(family: str, limit: float | None, tmp_path: Path) -> None:
    setting = Setting(tmp_path, family, 1.0, r=4, lora_alpha=8, target_modules="all-linear")
    adapted = random_adapter(setting.reload(), tmp_path / "again", r=4, lora_alpha=8, target_modules="all-linear")
    result = setting.correct(limit=limit)
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        logits = load_adapter(setting.reload(), tmp_path / "out")(ids).logits
        torch.testing.assert_close(logits, adapted(ids).logits, rtol=1e-3, atol=2e-4)
    assert result.report.bytes_read > 0
    assert result.report.largest_unit_bytes > 0


@pytest.mark.usefixtures("factor_dtype")
def test_modules_that_the_emulator_kept_stay_as_trained(tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}
    setting = Setting(tmp_path, "llama", 0.3, skip=("layers.0",), **config)
    result = setting.correct(limit=None)
    kept = {linear.name: linear for linear in result.linears if not linear.compressed}
    assert kept.keys() == {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"}
    assert all((linear.ratio_mean, linear.clamped) == (0.0, 0) for linear in kept.values())
    trained, found = Adapter.open(tmp_path / "adapter"), Adapter.open(tmp_path / "out")
    for name in kept:
        (a, b), (a_c, b_c) = trained.factors(name), found.factors(name)
        torch.testing.assert_close(b_c @ a_c, 2.0 * b @ a)


@pytest.mark.usefixtures("factor_dtype")
def test_the_record_names_everything_that_went_in(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", 0.3, r=2, target_modules=["q_proj"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    write_json(tmp_path / "adapter/onelayer.json", trained_on(tmp_path / "emulator"))
    result = setting.correct()
    record = read_json(tmp_path / "out/onelayer.json")
    digest = model_digest(tmp_path / "original")
    assert record["base"] == {"model": "example/original", "revision": None, "digest": digest}
    assert record["emulator"] == {"digest": model_digest(tmp_path / "emulator")}
    assert record["source_adapter"] == {"digest": adapter_digest(tmp_path / "adapter")}
    assert (record["corrected"], record["limit"], record["solver"]) == (True, 3.0, "span")
    assert result.provenance_checked
    document = result.model_dump(mode="json")
    assert {"output", "limit", "linears", "candidates", "report"} <= document.keys()
    assert {"name", "ratio_mean", "clamped"} <= document["linears"][0].keys()
    json.dumps(document, allow_nan=False)
    config = read_json(tmp_path / "out/adapter_config.json")
    assert config["base_model_name_or_path"] == "example/original"
    (tmp_path / "adapter/onelayer.json").unlink()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}


@pytest.mark.usefixtures("factor_dtype")
def test_an_untrained_adapter_changes_nothing_under_a_limit(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", 0.3, size=0.0, r=2, target_modules=["q_proj"])
    result = setting.correct()
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        logits = load_adapter(setting.reload(), tmp_path / "out")(ids).logits
        torch.testing.assert_close(logits, setting.reload()(ids).logits)
    assert all(linear.ratio_mean is None and linear.clamped == 2 for linear in result.linears)


def trained_on(emulator: Path, **changes: Any) -> dict[str, Any]:
    base = read_json(emulator / "config.json")["quantization_config"]["base_digest"]
    record = {"kind": "adapter", "corrected": False, "trained_on": {"digest": model_digest(emulator)}}
    return {**record, "base": {"digest": base}, **changes}


def _wrong_module(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    save_file({key.replace("q_proj", "z_proj"): tensor for key, tensor in load_file(file).items()}, file)


def _wrong_shape(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {key: tensor[:, :-2].contiguous() if "lora_A" in key else tensor for key, tensor in tensors.items()}, file
    )


def _not_finite(root: Path) -> None:
    file = root / "adapter/adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(file).items()}, file)


def _no_emulator(root: Path) -> None:
    config = read_json(root / "emulator/config.json")
    del config["quantization_config"]
    write_json(root / "emulator/config.json", config)


def _wrong_ranks(root: Path) -> None:
    config = read_json(root / "emulator/config.json")
    config["quantization_config"]["ranks"]["model.layers.0.self_attn.q_proj"] += 1
    write_json(root / "emulator/config.json", config)


def _other_original(root: Path) -> None:
    config = read_json(root / "original/config.json")
    write_json(root / "original/config.json", {**config, "rms_norm_eps": 1e-3})


def _record(**changes: Any) -> Callable[[Path], None]:
    return lambda root: write_json(root / "adapter/onelayer.json", trained_on(root / "emulator", **changes))


@pytest.mark.usefixtures("factor_dtype")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_wrong_module, r"has no model\.layers\.\d\.self_attn\.z_proj\.weight"),
        (_wrong_shape, "made for model.layers.0.self_attn.q_proj.weight"),
        (_not_finite, "not finite"),
        (_no_emulator, "is not an emulator"),
        (_wrong_ranks, "lacks factors of rank"),
        (_other_original, "is an emulator of example/original"),
        (_record(corrected=True), "already corrected"),
        (_record(trained_on={"digest": "f" * 64}), "trained on another emulator"),
        (_record(trained_on={"digest": 3}), r"field trained_on\.digest"),
    ],
)
def test_what_does_not_belong_together_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", 0.3, r=2, target_modules=["q_proj"])
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        setting.correct()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "emulator", "original"]


def test_a_second_correction_and_a_taken_output_are_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", 0.3, r=2, target_modules=["q_proj"])
    setting.correct()
    with pytest.raises(InputError, match="already holds files"):
        setting.correct()
    with pytest.raises(InputError, match="already corrected"):
        correct_adapter(
            tmp_path / "out", emulator=tmp_path / "emulator", model=tmp_path / "original", output=tmp_path / "twice"
        )
    for limit in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--limit"):
            setting.correct(limit=limit, output=tmp_path / "twice")
