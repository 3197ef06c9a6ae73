"""Refinement with gradients: distances are those of dense layers in plain torch, and both errors fall."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.dying_refinement import die_at_second_unit
from helpers.peft_adapters import load_original
from helpers.reference_emulators import dense_reference
from helpers.tiny_models import save_tiny
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import IGNORED, load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.refine.command import RefineResult, refine_emulator
from onelayer.compiler.storage.checkpoint import model_digest

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"
SETTINGS: dict[str, Any] = {"samples": 8, "max_length": 20, "batch_size": 4, "steps": 6, "step_samples": 4}


def begun(root: Path, name: str, **how: Any) -> None:
    save_tiny(name, root / "original")
    (root / "text.txt").write_text("\n\n".join(TEXT[i:] + TEXT[:i] for i in range(12)))
    given = {"samples": 8, "max_length": 20, "batch_size": 4, **how}
    compile_emulator(root / "original", root / "text.txt", root / "emulator", **given)


def refined(root: Path, output: Path, **changes: Any) -> RefineResult:
    given = {**SETTINGS, "backward": True, **changes}
    return refine_emulator(
        root / "emulator", model=root / "original", calibration=root / "text.txt", output=output, **given
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    begun(folder, "qwen2", ratio=0.4)
    return folder


def passed(model: Any, batch: TokenBatch) -> list[Any]:
    """Run forward and back; return the call of each layer, whose output has its gradient."""
    calls = list[Any]()

    def watch(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        calls.append((args, kwargs, output))

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in model.model.layers]
    logits = model(**batch.inputs, use_cache=False).logits
    targets = batch.targets.reshape(-1)
    torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets, ignore_index=IGNORED).backward()
    for handle in handles:
        handle.remove()
    return calls


def layer_gradients(layer: Any, call: Any, paths: list[str], gradient: torch.Tensor) -> list[torch.Tensor]:
    """Compute the gradients at the input and at the linears' outputs of one layer, for a gradient at its output."""
    args, kwargs, _ = call
    x, outputs = args[0].detach().requires_grad_(), list[torch.Tensor]()
    handles = [
        layer.get_submodule(path).register_forward_hook(lambda module, args, output: outputs.append(output))
        for path in paths
    ]
    y = layer(x, *args[1:], **kwargs)
    for handle in handles:
        handle.remove()
    return list(torch.autograd.grad(y, [x, *outputs], gradient))


def test_the_errors_told_are_those_of_dense_layers(root: Path, tmp_path: Path) -> None:
    told = refined(root, tmp_path / "out").units
    original: Any = load_original(root / "original")
    tokens = read_tokens(root / "text.txt", load_tokenizer(root / "original"), 20, 8, 0)
    batches = make_batches(tokens, original.config, 4)
    names = list(Emulator.open(root / "emulator").facts.ranks)
    for number in (0, 1):
        prefix = f"model.layers.{number}."
        paths = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        for path, error in (
            (root / "emulator", told[number].gradients_before),
            (tmp_path / "out", told[number].gradients_after),
        ):
            dense: Any = dense_reference(load_original(root / "original"), path)
            total = 0.0
            for batch in batches:
                call = passed(original, batch)[number]
                exact, found = (
                    layer_gradients(model.model.layers[number], call, paths, call[2].grad)
                    for model in (original, dense)
                )
                # The first layer has nothing trained before it, so it has no gradient at its input.
                parts = [
                    float((one - other).square().sum() / other.square().sum())
                    for one, other in list(zip(found, exact, strict=True))[number == 0 :]
                ]
                total += batch.shape[0] * sum(parts) / len(parts)
            assert error == pytest.approx((total / 8) ** 0.5, rel=2e-3)


def test_both_errors_fall_and_gradients_more_than_without(root: Path, tmp_path: Path) -> None:
    result, plain = refined(root, tmp_path / "both"), refined(root, tmp_path / "plain", backward=False)
    for unit, other in zip(result.units, plain.units, strict=True):
        assert unit.gradients_before is not None
        assert unit.gradients_after is not None
        assert unit.gradients_after < unit.gradients_before
        assert unit.before == pytest.approx(other.before, rel=1e-4)
        assert other.gradients_after is None
    assert [unit.name for unit in result.units] == ["model.layers.0", "model.layers.1"]
    assert model_digest(tmp_path / "both") != model_digest(tmp_path / "plain")


def test_a_killed_run_resumes_and_writes_the_same_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined(root, tmp_path / "undisturbed")
    trained = die_at_second_unit(monkeypatch)
    with pytest.raises(MemoryError):
        refined(root, tmp_path / "out")
    refined(root, tmp_path / "out")
    assert trained == ["model.layers.1", "model.layers.0", "model.layers.0"]
    assert model_digest(tmp_path / "out") == model_digest(tmp_path / "undisturbed")


def test_a_layer_without_a_second_derivative_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 1

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = Once.apply(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-untyped-call]
        found: torch.Tensor = self.down_proj(inner)
        return found

    monkeypatch.setattr(Qwen2MLP, "forward", forward)
    with pytest.raises(InputError, match=r"--backward: model\.layers\.1 cannot be differentiated twice"):
        refined(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
