"""Experts as low-rank factors: what compile writes, compared with the closed form and the resident model."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.mixtures import (
    IDS,
    MIXTURES,
    best_error,
    compiled,
    error_of,
    inner,
    logits,
    modules_of_experts,
    save_mixture,
    stack_products,
    tensors,
    weight_of,
    what_experts_read,
    with_products,
)
from onelayer.compiler.correct.command import correct_adapter
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.compiler.evaluate.samples import Samples
from onelayer.compiler.factors.ranks import rank_for
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.storage.checkpoint import model_digest
from onelayer.compiler.storage.files import read_json
from onelayer.compiler.streaming import spill
from onelayer.runtime import load_emulator, train_lora


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Make a mixture and its emulator of half the weights; return the resident model and the folder of both."""
    root = tmp_path_factory.mktemp(request.param)
    model = save_mixture(request.param, root)
    compiled(root)
    return model, root


@pytest.mark.parametrize("name", MIXTURES)
def test_at_full_rank_the_emulator_is_the_original(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_mixture(name, tmp_path)
    monkeypatch.setattr(
        "onelayer.compiler.compile.selection.rank_for",
        lambda ratio, out_features, in_features: min(out_features, in_features),
    )
    result = compiled(tmp_path)
    assert result.layer_parameters_stacked == 0
    assert len(result.stacks) == 2 * len(modules_of_experts(model))
    torch.testing.assert_close(logits(load_emulator(tmp_path / "emulator")), logits(model), rtol=1e-3, atol=1e-3)


def test_every_expert_is_at_its_optimum(mixture: tuple[Any, Path]) -> None:
    model, root = mixture
    products, document = stack_products(root / "emulator"), read_json(root / "emulator" / "emulator.json")
    rows_of = what_experts_read(model, root)
    assert products.keys() == rows_of.keys() == {row["name"] for row in document["stacks"]}
    checked = 0
    for row in document["stacks"]:
        path, _, leaf = row["name"].rpartition(".")
        module = model.get_submodule(path)
        lost = energy = 0.0
        for expert, rows in enumerate(rows_of[row["name"]]):
            assert row["rows"][expert] == len(rows)
            weight, product = weight_of(module, leaf, expert), products[row["name"]][expert]
            if not len(rows):
                continue
            error, part = error_of(product, weight, rows), float((rows @ weight.T).square().sum())
            assert error <= best_error(weight, rows, row["rank"]) + 1e-4
            lost, energy = lost + error * error * part, energy + part
            checked += 1
        assert row["error"] == pytest.approx((lost / energy) ** 0.5, rel=1e-3, abs=1e-4)
        assert row["optimal_error"] <= row["error"] + 1e-4
        assert row["rank"] == rank_for(0.5, *row["shape"][1:])
    assert checked > len(document["stacks"])


def test_the_emulator_computes_what_its_products_do(mixture: tuple[Any, Path]) -> None:
    model, root = mixture
    emulator, reference = load_emulator(root / "emulator"), with_products(model, root / "emulator")
    torch.testing.assert_close(logits(emulator), logits(reference), rtol=1e-4, atol=1e-4)
    reference.set_experts_implementation("eager")
    torch.testing.assert_close(logits(emulator), logits(reference), rtol=1e-4, atol=1e-4)
    emulator.set_experts_implementation("eager")  # whatever is asked for, experts that are factors stay with theirs
    torch.testing.assert_close(logits(emulator), logits(reference), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for name, parameter in emulator.named_parameters() if ".lr_" in name)


def test_it_is_saved_again_and_generates(mixture: tuple[Any, Path], tmp_path: Path) -> None:
    _, root = mixture
    emulator: Any = load_emulator(root / "emulator")
    wanted = logits(emulator)
    emulator.save_pretrained(tmp_path / "again")
    again: Any = type(emulator).from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)  # weights lie at other addresses
    before, after = tensors(root / "emulator"), load_file(tmp_path / "again" / "model.safetensors")
    factors = {name for name in before if ".lr_" in name}
    assert factors == {name for name in after if ".lr_" in name}
    assert all(torch.equal(before[name], after[name]) for name in factors)
    kept = read_json(tmp_path / "again" / "config.json")["quantization_config"]["stacks"]
    assert kept == read_json(root / "emulator" / "config.json")["quantization_config"]["stacks"]
    found = again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert found.shape == (1, IDS.shape[1] + 4)
    torch.testing.assert_close(logits(copy.deepcopy(emulator)), wanted, rtol=1e-4, atol=1e-4)


def test_sizes_are_said(mixture: tuple[Any, Path]) -> None:
    model, root = mixture
    document = read_json(root / "emulator" / "emulator.json")
    stored = sum(tensor.numel() for tensor in tensors(root / "emulator").values())
    assert document["parameters_before"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert document["parameters_after"] == stored
    assert document["layer_parameters_stacked"] == 0
    assert document["format_version"] == 2
    assert not document["dense"]


def test_a_slice_is_what_compile_would_make(mixture: tuple[Any, Path], tmp_path: Path) -> None:
    _, root = mixture
    sliced = slice_emulator(root / "emulator", 0.25, tmp_path / "small")
    direct = compiled(root, str(tmp_path / "direct"), ratio=0.25)
    found, wanted = tensors(tmp_path / "small"), tensors(tmp_path / "direct")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    assert read_json(tmp_path / "small/config.json") == read_json(tmp_path / "direct/config.json")
    assert sliced.parameters_after == direct.parameters_after
    for a, b in zip(sliced.stacks, direct.stacks, strict=True):
        assert (a.name, a.rank, a.experts) == (b.name, b.rank, b.experts)
        assert a.error == pytest.approx(b.error, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(
        logits(load_emulator(tmp_path / "small")), logits(load_emulator(tmp_path / "direct")), rtol=1e-3, atol=1e-3
    )


def test_an_adapter_trains_is_corrected_and_scored(mixture: tuple[Any, Path], tmp_path: Path) -> None:
    _, root = mixture
    emulator, data = root / "emulator", root / "mix.jsonl"
    result = train_lora(emulator, data, tmp_path / "adapter", max_steps=2, batch_size=2, max_length=24)
    assert result.train_loss > 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not config["target_parameters"]
    corrected = correct_adapter(
        tmp_path / "adapter", emulator=emulator, model=root / "model", output=tmp_path / "corrected", device="cpu"
    )
    assert corrected.linears
    assert not any(".experts." in item.name for item in corrected.linears)
    scored = evaluate_model(
        root / "model", data, adapters=[tmp_path / "corrected"], against=emulator, max_length=24, device="cpu"
    )
    assert all(row.loss > 0 for row in scored.results)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_an_emulator_is_scored_beside_its_original_with_its_experts(kind: FactorDtype | None, tmp_path: Path) -> None:
    save_mixture("gpt_oss", tmp_path)
    compiled(tmp_path, factor_dtype=kind)
    scored = evaluate_model(
        tmp_path / "model", tmp_path / "mix.jsonl", against=tmp_path / "emulator", max_length=24, device="cpu"
    )
    emulator = load_emulator(tmp_path / "emulator")
    samples = Samples.read(tmp_path / "mix.jsonl", load_tokenizer(tmp_path / "model"), 24)
    losses, counts = [], []
    for batch in samples.batches(emulator.config, 1):
        with torch.no_grad():
            found = emulator(**batch.inputs, use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(found, batch.targets[0], reduction="sum"))
        counts.append(int((batch.targets[0] != -100).sum()))
    assert scored.against is not None
    assert scored.against.loss == pytest.approx(float(sum(losses)) / sum(counts), rel=1e-4)


def test_lora_on_experts_is_refused_by_name(tmp_path: Path) -> None:
    save_mixture("qwen3_moe", tmp_path)
    compiled(tmp_path)
    for targets in (["q_proj", "gate_proj", "up_proj", "down_proj"], ["gate_proj", "up_proj", "down_proj"]):
        with pytest.raises(InputError, match=r"down_proj, gate_up_proj are experts"):
            train_lora(tmp_path / "emulator", tmp_path / "mix.jsonl", tmp_path / "adapter", target_modules=targets)
    emulator = load_emulator(tmp_path / "emulator")
    alone = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match="target_parameters"):
        peft.get_peft_model(emulator, alone)


def starved(model: Any) -> None:
    """Make the second layer's router never choose expert 3, and choose expert 2 only if nothing else is left."""
    model.model.layers[1].mlp.router.bias[3] = -1e4


def test_an_expert_without_tokens_gets_factors_from_all_of_them(tmp_path: Path) -> None:
    model = save_mixture("gpt_oss", tmp_path, starved)
    compiled(tmp_path)
    document = read_json(tmp_path / "emulator" / "emulator.json")
    products, rows_of = stack_products(tmp_path / "emulator"), what_experts_read(model, tmp_path)
    module = model.model.layers[1].mlp.experts
    everyone = torch.cat(_all_tokens(model, tmp_path))
    for row in document["stacks"][2:]:
        assert row["rows"][3] == len(rows_of[row["name"]][3]) == 0
        told = [reason for reason, experts in row["expert_fallbacks"].items() if 3 in experts]
        assert told == [f"calibration determines 0 of {row['rank']} directions; all tokens together give others"]
        leaf = row["name"].rpartition(".")[2]
        rows = everyone if leaf == "gate_up_proj" else inner(module, 3, everyone)
        weight, product = weight_of(module, leaf, 3), products[row["name"]][3]
        assert torch.isfinite(product).all()
        assert error_of(product, weight, rows) <= best_error(weight, rows, row["rank"]) + 1e-4
    assert document["stacks"][2]["fallback"] is not None
    assert torch.isfinite(logits(load_emulator(tmp_path / "emulator"))).all()


def _all_tokens(model: Any, root: Path) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    what_experts_read(model, root)
    handle.remove()
    return seen


def test_a_class_that_does_something_else_stays_dense_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    model = save_mixture("mixtral", tmp_path)
    ordinary = MixtralExperts.forward
    monkeypatch.setattr(
        MixtralExperts, "forward", lambda self, x, index, weights: 2 * ordinary(self, x, index, weights)
    )
    result = compiled(tmp_path)
    document = read_json(tmp_path / "emulator" / "emulator.json")
    reasons = {row["name"]: row["reason"] for row in document["dense"]}
    assert reasons == dict.fromkeys(
        (f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (0, 1) for leaf in ("gate_up_proj", "down_proj")),
        "its forward is not that of transformers' experts interface",
    )
    experts = [tensor for name, tensor in model.state_dict().items() if ".experts." in name]
    assert result.layer_parameters_stacked == sum(tensor.numel() for tensor in experts) > 0
    assert (document["format_version"], document["stacks"]) == (1, [])
    emulator = load_emulator(tmp_path / "emulator").state_dict()
    names = [name for name in model.state_dict() if ".experts." in name]
    assert names
    assert all(torch.equal(model.state_dict()[name], emulator[name]) for name in names)


def test_rows_that_are_not_finite_stop_the_run_with_the_experts_name(tmp_path: Path) -> None:
    save_mixture("gpt_oss", tmp_path)
    for file in (tmp_path / "model").glob("*.safetensors"):
        held = load_file(file)
        if "model.layers.0.post_attention_layernorm.weight" in held:
            held["model.layers.0.post_attention_layernorm.weight"][0] = float("nan")
            save_file(held, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: .* rows are not finite"):
        compiled(tmp_path)


def test_parked_rows_in_files_change_nothing(tmp_path: Path, own_store: Path) -> None:

    save_mixture("mixtral", tmp_path)
    compiled(tmp_path, "held")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "SMALLEST_BYTES", 0)
        compiled(tmp_path, "spilled", host_memory_bytes=0)
    assert model_digest(tmp_path / "held") == model_digest(tmp_path / "spilled")
