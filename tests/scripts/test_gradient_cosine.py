"""The cosine of gradients: one for equal models, and that of dense models in plain torch otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.peft_adapters import load_original
from helpers.reference_emulators import dense_reference
from helpers.tiny_models import save_tiny
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import TokenBatch, make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.runtime.training.inputs import read_model
from scripts.quality.gradient_cosine import adapted, compared, gradients

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cosine")
    save_tiny("qwen2", folder / "original")
    (folder / "text.txt").write_text("\n".join(TEXT[i:] + TEXT[:i] for i in range(12)))
    compile_emulator(folder / "original", folder / "text.txt", folder / "emulator", ratio=0.4, max_length=20)
    return folder


def held_out(root: Path) -> list[TokenBatch]:
    model = read_model(root / "original", "original")
    return make_batches(read_tokens(root / "text.txt", model.tokenizer, 20), model.config, 4)


def dense_gradient(model: Any, source: Any, batch: TokenBatch) -> torch.Tensor:
    """Compute the gradient at B = 0 by hand: scale * dL/dW A^T, from the gradients of dense weights."""
    model.requires_grad_(True)
    model(**batch.inputs, labels=batch.inputs["input_ids"]).loss.backward()
    parts = []
    for name, value in sorted(source.named_parameters()):
        if "lora_B" in name:
            path = name.removeprefix("base_model.model.").partition(".lora_B")[0]
            A = source.get_parameter(name.replace("lora_B", "lora_A")).detach()
            parts.append((model.get_submodule(path).weight.grad @ A.T).flatten())
            assert parts[-1].numel() == value.numel()
    model.zero_grad()
    return torch.cat(parts)


def test_it_is_the_cosine_of_dense_gradients(root: Path) -> None:
    batches = held_out(root)
    lora = adapted(read_model(root / "original", "original"), 0)
    exact, loss = gradients(lora, batches, [torch.enable_grad()] * len(batches))
    original = load_original(root / "original")
    emulator = dense_reference(load_original(root / "original"), root / "emulator")
    cosines = []
    for batch, vector in zip(batches, exact, strict=True):
        want, other = (dense_gradient(model, lora, batch) for model in (original, emulator))
        assert float(torch.cosine_similarity(want, vector, dim=0)) == pytest.approx(1, abs=1e-4)
        cosines.append(float(torch.cosine_similarity(want, other, dim=0)))
    found = compared(root / "emulator", root / "original", batches, exact, 0, bits=32)
    assert found["plain"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-3)
    assert found["plain"] < found["anchored"] < 1
    assert found["anchored_loss"] == pytest.approx(loss, abs=1e-4)
