"""The guard that replaces a missing weight, and what PEFT and Trainer may and may not do with an emulator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from helpers.reference_emulators import FACTOR_DTYPES, dense_reference, stored_as, write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.errors import InputError
from onelayer.runtime import LowRankLinear, load_emulator
from onelayer.runtime.modules.weight_guard import GuardWeight

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.fixture(scope="module", params=FACTOR_DTYPES, ids=str)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with originals and full-rank emulators of them: `llama`, `llama.emulator`, `gpt2`, `gpt2.emulator`."""
    root: Path = tmp_path_factory.mktemp("guard")
    for name in ("llama", "gpt2"):
        with stored_as(request.param):
            write_emulator(save_tiny(name, root / name), root / name, root / f"{name}.emulator")
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def guarded() -> torch.Tensor:
    return LowRankLinear(7, 5, 2, bias=False, dtype=torch.bfloat16).weight


def test_the_guard_answers_about_itself() -> None:
    weight = guarded()
    assert isinstance(weight, GuardWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == ((5, 7), torch.bfloat16, "cpu")
    assert (weight.size(0), weight.numel(), weight.ndim, weight.requires_grad) == (5, 35, 2, False)
    assert repr(weight) == "GuardWeight((5, 7), torch.bfloat16, cpu)"
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.untyped_storage().nbytes() == 2  # one number, for every shape


OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda w: w + 1,
    "matmul": lambda w: torch.ones(2, 5) @ w,
    "linear": lambda w: torch.nn.functional.linear(torch.ones(2, 7), w),
    "data": lambda w: w.data + 1,
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "cast": lambda w: w.float(),
    "norm": lambda w: torch.linalg.norm(w),
    "svd": lambda w: torch.linalg.svd(w),
    "index": lambda w: w[0],
    "copy into": lambda w: w.copy_(torch.zeros(5, 7)),
    "copy from": lambda w: torch.zeros(5, 7).copy_(w),
    "numpy": lambda w: w.numpy(),
    "transpose": lambda w: w.T,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_guard_refuses_arithmetic(operation: str) -> None:
    with pytest.raises(InputError, match="two low-rank factors and no weight"):
        OPERATIONS[operation](guarded())


@pytest.mark.parametrize(
    "target", ["all-linear", ["q_proj", "down_proj"], r".*\.layers\.1\..*(q|v)_proj"], ids=["all", "list", "regex"]
)
def test_peft_attaches_and_the_adapter_fits_the_original(place: Path, target: Any, tmp_path: Path) -> None:
    emulator, original = place / "llama.emulator", place / "llama"
    config = peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = peft.get_peft_model(load_emulator(emulator), config)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert (logits(adapted) - logits(load_emulator(emulator))).abs().max() > 1e-3
    adapted.save_pretrained(str(tmp_path / "adapter"))
    fresh = dense_reference(transformers.AutoModelForCausalLM.from_pretrained(original), emulator)
    on_original = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(on_original), logits(adapted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_into_an_emulator_fails(place: Path, name: str) -> None:
    target = {"llama": ["q_proj"], "gpt2": ["c_attn"]}[name]
    adapted: Any = peft.get_peft_model(
        load_emulator(place / f"{name}.emulator"), peft.LoraConfig(target_modules=target)
    )
    with pytest.raises(InputError, match="onelayer correct"):
        adapted.merge_and_unload()
    with pytest.raises(InputError, match="onelayer correct"):
        adapted.merge_adapter()


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=["dora", "pissa", "olora"],
)
def test_variants_that_need_the_weight_fail(place: Path, settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)
    with pytest.raises(InputError, match="two low-rank factors and no weight"):
        peft.get_peft_model(load_emulator(place / "llama.emulator"), config)


def test_trainer_refuses_a_bare_emulator(place: Path, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=load_emulator(place / "llama.emulator"), args=arguments)
