"""The written correction as others read it: stock PEFT in its own process, vLLM's rules and llama.cpp's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.peft_adapters import deltas, load_adapter, load_original, random_adapter
from helpers.reference_emulators import FACTOR_DTYPES, stored_as, write_emulator
from helpers.tiny_models import save_tiny, tiny_llama
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.correct.command import correct_adapter
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import FactorDtype

PATTERNS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 10,
    "use_rslora": True,
    "target_modules": "all-linear",
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
}
STRANGER = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for root in sys.argv[1:]:
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(f"{root}/original", dtype=getattr(torch, dtype))
        model = PeftModel.from_pretrained(model, f"{root}/out").eval()
        with torch.no_grad():
            torch.save(model(torch.arange(24).reshape(2, 12)).logits.float(), f"{root}/{dtype}")
assert not any(name.startswith("onelayer") for name in sys.modules)
"""


def corrected(root: Path, dtype: torch.dtype = torch.float32, limit: float | None = 3.0, **lora: Any) -> Path:
    model = save_tiny("llama", root / "original", dtype, shards=2)
    write_emulator(model, root / "original", root / "emulator", ratio=0.4)
    random_adapter(load_original(root / "original"), root / "adapter", **lora)
    correct_adapter(
        root / "adapter", emulator=root / "emulator", model=root / "original", output=root / "out", limit=limit
    )
    return root / "out"


def unrounded(directory: Path) -> dict[str, torch.Tensor]:
    """Return the weight that an emulator stands for: the product of its factors in float64."""
    emulator = Emulator.open(directory)
    pairs = {name: emulator.factors(name) for name in emulator.facts.compressed}
    return {name: up.double() if down is None else up.double() @ down.double() for name, (up, down) in pairs.items()}


def dense_logits(root: Path, limit: float | None, computed_in: torch.dtype = torch.float32) -> torch.Tensor:
    """Build the original with weights W + (B' - D) P^T, all products formed in full, in float64 up to the weight."""
    model = load_original(root / "original")
    emulator = unrounded(root / "emulator")
    trained = Adapter.open(root / "adapter")
    weights = dict(model.named_parameters())
    for name, module in trained.modules.items():
        weight = weights[f"{name}.weight"].data
        a, b = (part.double() for part in trained.factors(name))
        if name not in emulator:
            weight += (module.scaling * b @ a).float()
            continue
        p = torch.linalg.svd(a.T, full_matrices=False)[0]
        error = (weight.double() - emulator[name].double()) @ p
        own = module.scaling * b @ a @ p
        for i in range(error.shape[1]):
            ratio = float(error[:, i].abs().mean() / own[:, i].abs().mean())
            error[:, i] *= min(1.0, (math.inf if limit is None else limit) / ratio)
        weight += ((own - error) @ p.T).float()
    resident: Any = model
    with torch.no_grad():
        logits: torch.Tensor = resident.to(computed_in)(torch.arange(24).reshape(2, 12)).logits
    return logits.float()


def test_stock_peft_computes_the_dense_reference(tmp_path: Path) -> None:
    cases: list[tuple[torch.dtype, float | None, FactorDtype | None]] = [
        (torch.float32, None, None),
        (torch.bfloat16, 1.0, None),
        *((torch.float32, 3.0, kind) for kind in FACTOR_DTYPES),
    ]
    roots = [tmp_path / str(number) for number in range(len(cases))]
    for root, (dtype, limit, kind) in zip(roots, cases, strict=True):
        with stored_as(kind):
            corrected(root, dtype, limit, **PATTERNS)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", STRANGER, *map(str, roots)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)

    for root, (dtype, limit, kind) in zip(roots, cases, strict=True):
        wanted = dense_logits(root, limit)

        def error(found: torch.Tensor, wanted: torch.Tensor = wanted) -> float:
            return float((found - wanted).norm() / wanted.norm())

        assert error(torch.load(root / "float32")) < 1e-5, (dtype, limit, kind)
        if dtype is torch.bfloat16:
            # PEFT rounds W x, the product with x and their sum, a rounded dense weight only once.
            dense = dense_logits(root, limit, torch.bfloat16)
            assert error(torch.load(root / "bfloat16")) < 4 * error(dense)


def read_as_vllm_does(directory: Path) -> dict[str, torch.Tensor]:
    """Apply vLLM's rules: one alpha / r for all, patterns unread; DoRA, biases and whole modules rejected."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert not (config["use_dora"])
    assert not (config["modules_to_save"])
    assert not (config["lora_bias"])
    assert config["bias"] == "none"
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(directory / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert all(tensor.shape[0] <= config["r"] for key, tensor in tensors.items() if ".lora_A" in key)
    return {name: scaling * tensors[f"{key}.lora_B.weight"] @ a for name, key, a in _pairs(tensors)}


def read_as_llama_cpp_does(directory: Path) -> dict[str, torch.Tensor]:
    """Scale by the configuration's alpha over the rank of the tensor; nothing but A and B is known."""
    alpha = json.loads((directory / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(directory / "adapter_model.safetensors")
    return {name: alpha / a.shape[0] * tensors[f"{key}.lora_B.weight"] @ a for name, key, a in _pairs(tensors)}


def _pairs(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, torch.Tensor]]:
    keys = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert all(key.startswith("base_model.model.") for key in keys)
    return [(key.removeprefix("base_model.model."), key, tensors[f"{key}.lora_A.weight"]) for key in keys]


def test_every_reader_scales_it_alike(tmp_path: Path) -> None:
    adapter = corrected(tmp_path, **PATTERNS)
    wanted = deltas(load_adapter(load_original(tmp_path / "original"), adapter))
    for read in (read_as_vllm_does, read_as_llama_cpp_does):
        found = read(adapter)
        assert found.keys() == wanted.keys()
        for name, delta in found.items():
            torch.testing.assert_close(delta, wanted[name], rtol=1e-5, atol=1e-6)
    # The adapter as trained is the counter-example: its patterns are what these readers do not see.
    trained = deltas(random_adapter(load_original(tmp_path / "original"), tmp_path / "again", **PATTERNS))
    assert any(
        not torch.allclose(trained[name], delta) for name, delta in read_as_vllm_does(tmp_path / "again").items()
    )


def test_it_is_the_same_every_time_and_takes_no_random_number(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = corrected(tmp_path, r=3, target_modules=["q_proj", "down_proj"])
    paths: dict[str, Any] = {"emulator": tmp_path / "emulator", "model": tmp_path / "original"}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    correct_adapter(tmp_path / "adapter", output=tmp_path / "second", **paths)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in files:
        assert (first / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize("part", ["original", "emulator"])
def test_a_value_that_is_not_finite_is_named_and_never_replaced(part: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "original")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] = float("nan")
    if part == "original":
        model.save_pretrained(str(tmp_path / "original"))
    write_emulator(tiny_llama(), tmp_path / "original", tmp_path / "emulator", ratio=0.4)
    if part == "emulator":
        for file in (tmp_path / "emulator").glob("*.safetensors"):
            poisoned = {
                name: tensor * float("inf") if "layers.1.self_attn.q_proj.lr_up" in name else tensor
                for name, tensor in load_file(file).items()
            }
            save_file(poisoned, file, {"format": "pt"})
    random_adapter(load_original(tmp_path / "original"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj: weight or emulator holds values"):
        correct_adapter(
            tmp_path / "adapter", emulator=tmp_path / "emulator", model=tmp_path / "original", output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 9),
    alpha=st.integers(1, 40),
    rslora=st.booleans(),
    ratio=st.sampled_from([0.1, 0.4, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    limit=st.one_of(st.none(), st.floats(0, 20)),
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    kind=st.sampled_from(FACTOR_DTYPES),
)
def test_for_any_rank_scaling_and_dtype_it_is_the_formula(
    rank: int, alpha: int, rslora: bool, ratio: float, dtype: torch.dtype, limit: float | None, family: str,
    kind: FactorDtype | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("any")
    model = save_tiny(family, root / "original", dtype)
    with stored_as(kind):
        write_emulator(model, root / "original", root / "emulator", ratio=ratio)
    lora: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": "all-linear"}
    trained = deltas(random_adapter(load_original(root / "original"), root / "adapter", **lora))
    result = correct_adapter(
        root / "adapter", emulator=root / "emulator", model=root / "original", output=root / "out", limit=limit
    )
    emulator = unrounded(root / "emulator")
    original = dict(load_original(root / "original").named_parameters())
    found = deltas(load_adapter(load_original(root / "original"), root / "out"))
    assert found.keys() == trained.keys() == {linear.name for linear in result.linears}
    for name, delta in found.items():
        transposed = family == "gpt2"
        weight = original[f"{name}.weight"].detach().double()
        weight, own = (weight.T, trained[name].T.double()) if transposed else (weight, trained[name].double())
        p = torch.linalg.svd(Adapter.open(root / "adapter").factors(name)[0].double().T, full_matrices=False)[0]
        error = (weight - emulator[name]) @ p
        ratios = error.abs().mean(0) / (own @ p).abs().mean(0)
        wanted = own - error * ((math.inf if limit is None else limit) / ratios).clamp(max=1.0) @ p.T
        scale = float(wanted.norm())
        assert float((delta.double() - (wanted.T if transposed else wanted)).norm()) <= 2e-5 * scale + 1e-6
