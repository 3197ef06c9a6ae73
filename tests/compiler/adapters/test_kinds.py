"""Adapters of every kind on every architecture: evaluate, polish, correct and merge do what PEFT's own model does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.adapter_kinds import SHAPES, by_peft, kinds_of, load_model, mean_loss, save_adapter, save_model
from helpers.reference_emulators import write_emulator
from onelayer.compiler import correct_adapter, evaluate_model, merge_adapter, polish_adapter
from onelayer.compiler.errors import InputError

CASES = [(name, kind) for name in SHAPES for kind in kinds_of(name)]
# In a model that ties its head to its embedding, a merged checkpoint could not hold what these do. PEFT ties a saved
# copy only if the embedding has one of the names that it knows.
ONE_SIDE_OF_A_TIE = {
    *("saved head", "saved head, all biases", "saved embedding", "adapted head", "adapted embedding"),
    *("adapted embedding, tied", "token rows, adapted head", "token rows of the head", "token rows of both"),
}


def every(step: int, start: int) -> list[tuple[str, str]]:
    """Choose some of the cases, each kind with other architectures: evaluation tests on all what the passes share."""
    numbered = [(name, kind, i + j) for i, name in enumerate(SHAPES) for j, kind in enumerate(kinds_of(name))]
    return [(name, kind) for name, kind, number in numbered if number % step == start]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a folder for each architecture, with its model, an emulator of it and rows."""
    found = {}
    for name in SHAPES:
        found[name] = tmp_path_factory.mktemp(name)
        save_model(name, found[name])
        write_emulator(load_model(found[name]), found[name] / "model", found[name] / "emulator", ratio=0.5)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_adapters_of_all_kinds_are_evaluated_together_as_in_peft(name: str, roots: dict[str, Path]) -> None:
    root = roots[name]
    adapters = {kind: save_adapter(name, kind, root) for kind in kinds_of(name)}
    result = evaluate_model(root / "model", root / "rows.jsonl", adapters=list(adapters.values()))
    found = {kind: score.loss for kind, score in zip(adapters, result.results[1:], strict=True)}
    with torch.no_grad():
        wanted = {kind: float(mean_loss(by_peft(root, adapter), root)) for kind, adapter in adapters.items()}
        assert result.results[0].loss == pytest.approx(float(mean_loss(load_model(root), root)), rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_saved_table_changes_what_is_tied_to_it(roots: dict[str, Path], tmp_path: Path) -> None:
    root = roots["qwen2_tied"]
    adapter = save_adapter("qwen2_tied", "changed embedding", root)
    shutil.copytree(adapter, tmp_path / "alone")
    tensors = load_file(adapter / "adapter_model.safetensors")
    alone = {key: tensor for key, tensor in tensors.items() if "lm_head" not in key}
    assert any("embed_tokens" in key for key in alone)
    save_file(alone, tmp_path / "alone" / "adapter_model.safetensors", {"format": "pt"})
    result = evaluate_model(root / "model", root / "rows.jsonl", adapters=[tmp_path / "alone"])
    with torch.no_grad():
        wanted = float(mean_loss(by_peft(root, adapter), root))
    assert result.results[1].loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), every(6, 0))
def test_a_step_of_polish_is_that_of_peft(name: str, kind: str, roots: dict[str, Path], tmp_path: Path) -> None:
    root = roots[name]
    adapter = save_adapter(name, kind, root)
    options: dict[str, Any] = {"steps": 1, "batch_size": 9, "learning_rate": 1e-12, "max_length": 64}
    result = polish_adapter(adapter, model=root / "model", data=root / "rows.jsonl", output=tmp_path / "out", **options)
    model = by_peft(root, adapter)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    loss = mean_loss(model, root, ended=True)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in trained if parameter.grad is not None]).norm()
    assert result.steps[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.steps[0].gradient_norm == pytest.approx(float(norm), rel=1e-4)
    with torch.no_grad():  # a step of almost no length: what is written is what was read, in another form
        assert float(mean_loss(by_peft(root, tmp_path / "out"), root, ended=True)) == pytest.approx(
            float(loss), rel=1e-4
        )


@pytest.mark.parametrize(("name", "kind"), every(3, 1))
def test_without_a_limit_to_correct_it_stays_what_peft_has(
    name: str, kind: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    root = roots[name]
    adapter = save_adapter(name, kind, root)
    correct_adapter(adapter, emulator=root / "emulator", model=root / "model", output=tmp_path / "out", limit=0.0)
    with torch.no_grad():
        wanted, found = (float(mean_loss(by_peft(root, path), root)) for path in (adapter, tmp_path / "out"))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen2_tied", "all biases"), ("bert", "saved head, all biases"), ("gpt2", "token rows")]
)
def test_corrections_are_tried_on_what_peft_has(name: str, kind: str, roots: dict[str, Path], tmp_path: Path) -> None:
    root = roots[name]
    adapter = save_adapter(name, kind, root)
    result = correct_adapter(
        adapter, emulator=root / "emulator", model=root / "model", output=tmp_path / "out", data=root / "rows.jsonl"
    )
    assert result.candidates is not None
    with torch.no_grad():
        assert result.candidates[0].limit == 0.0
        assert result.candidates[0].loss == pytest.approx(float(mean_loss(by_peft(root, adapter), root)), rel=1e-5)
        best = min(candidate.loss for candidate in result.candidates)
        assert float(mean_loss(by_peft(root, tmp_path / "out"), root)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_merge_is_what_peft_has_or_is_refused(name: str, kind: str, roots: dict[str, Path], tmp_path: Path) -> None:
    root = roots[name]
    adapter = save_adapter(name, kind, root)
    tied = name in ("qwen2_tied", "t5", "gpt2", "mamba")
    if tied and (kind in ONE_SIDE_OF_A_TIE or (kind == "saved embedding, tied" and name != "qwen2_tied")):
        with pytest.raises(InputError, match="shares its weight with"):
            merge_adapter(adapter, model=root / "model", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merge_adapter(adapter, model=root / "model", output=tmp_path / "out")
    with torch.no_grad():
        wanted, found = mean_loss(by_peft(root, adapter), root), mean_loss(load_model(root, tmp_path / "out"), root)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "mamba"])
def test_an_embedding_saved_under_a_name_that_says_nothing_is_refused(name: str, roots: dict[str, Path]) -> None:
    adapter = save_adapter(name, "changed embedding", roots[name])
    with pytest.raises(InputError, match=f"{SHAPES[name].embedding}.weight' is not understood"):
        evaluate_model(roots[name] / "model", roots[name] / "rows.jsonl", adapters=[adapter])
