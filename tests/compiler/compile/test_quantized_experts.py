"""Experts with quantized factors, with ranks chosen by spectrum, and with damaged files."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.mixtures import (
    compiled,
    error_of,
    logits,
    save_mixture,
    stack_products,
    weight_of,
    what_experts_read,
    with_products,
)
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import FactorDtype
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.runtime import load_emulator


@pytest.mark.parametrize("factor_dtype", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_quantized_experts_compute_what_their_products_do(name: str, factor_dtype: FactorDtype, tmp_path: Path) -> None:
    model = save_mixture(name, tmp_path)
    large = compiled(tmp_path, factor_dtype=factor_dtype)
    assert all(item.form == "factors" for item in large.stacks)
    emulator = load_emulator(tmp_path / "emulator")
    reference = logits(with_products(model, tmp_path / "emulator"))
    torch.testing.assert_close(logits(emulator), reference, rtol=1e-3, atol=1e-3)
    emulator.save_pretrained(tmp_path / "again")
    again = logits(type(emulator).from_pretrained(tmp_path / "again"))
    torch.testing.assert_close(again, logits(emulator), rtol=1e-4, atol=1e-4)
    small = slice_emulator(tmp_path / "emulator", 0.2, tmp_path / "small")
    reference = logits(with_products(model, tmp_path / "small"))
    torch.testing.assert_close(logits(load_emulator(tmp_path / "small")), reference, rtol=1e-3, atol=1e-3)
    assert all(a.error >= b.error for a, b in zip(small.stacks, large.stacks, strict=True))
    whole = compiled(tmp_path, "whole", factor_dtype=factor_dtype, ratio=1.0)
    assert all(item.form == "dense" for item in whole.stacks)
    reference = logits(with_products(model, tmp_path / "whole"))
    torch.testing.assert_close(logits(load_emulator(tmp_path / "whole")), reference, rtol=1e-3, atol=1e-3)


def test_reported_errors_of_quantized_experts_are_those_of_the_files(tmp_path: Path) -> None:
    model = save_mixture("qwen3_moe", tmp_path)
    result = compiled(tmp_path, factor_dtype="nf4")
    products, rows_of = stack_products(tmp_path / "emulator"), what_experts_read(model, tmp_path)
    for item in result.stacks:
        path, _, leaf = item.name.rpartition(".")
        if item.name.endswith("gate_up_proj"):  # moments of inputs: exact
            lost = energy = 0.0
            for expert, rows in enumerate(rows_of[item.name]):
                weight = weight_of(model.get_submodule(path), leaf, expert)
                part = float((rows @ weight.T).square().sum())
                lost += error_of(products[item.name][expert], weight, rows) ** 2 * part
                energy += part
            assert item.error == pytest.approx((lost / energy) ** 0.5, rel=0.02)


@pytest.mark.parametrize("factor_dtype", [None, "nf4"])
def test_ranks_by_spectrum_leave_experts_uniform(factor_dtype: FactorDtype | None, tmp_path: Path) -> None:
    save_mixture("mixtral", tmp_path)
    uniform = compiled(tmp_path, factor_dtype=factor_dtype, ratio=0.3)
    spectrum = compiled(tmp_path, "spectrum", factor_dtype=factor_dtype, ratio=0.3, rank_allocation="spectrum")
    assert [(a.name, a.rank) for a in spectrum.stacks] == [(a.name, a.rank) for a in uniform.stacks]
    assert spectrum.parameters_after <= uniform.parameters_after
    assert torch.isfinite(logits(load_emulator(tmp_path / "spectrum"))).all()


def test_a_damaged_emulator_of_experts_is_refused(tmp_path: Path) -> None:
    save_mixture("mixtral", tmp_path)
    compiled(tmp_path)
    config = tmp_path / "emulator" / "config.json"
    good = read_json(config)
    name = "model.layers.0.mlp.experts.down_proj"
    bad = json.loads(json.dumps(good))
    bad["quantization_config"]["stacks"][name]["rank"] += 1
    write_json(config, bad)
    with pytest.raises(InputError, match=r"experts\.down_proj' lacks .*lr_up_down_proj"):
        Emulator.open(tmp_path / "emulator")
    bad["quantization_config"]["stacks"][name] = {"shape": [4, 7, 7], "rank": 3}
    write_json(config, bad)
    with pytest.raises(InputError, match="no stack of"):
        load_emulator(tmp_path / "emulator")
    bad["quantization_config"]["stacks"][name] = {"shape": [4, 32, 64], "rank": None}
    write_json(config, bad)
    with pytest.raises(InputError, match="without a rank, or of codes, is quantized"):
        Emulator.open(tmp_path / "emulator")


def test_absent_stacks_refuse_arithmetic_and_are_copied(tmp_path: Path) -> None:
    save_mixture("mixtral", tmp_path)
    compiled(tmp_path)
    module: Any = load_emulator(tmp_path / "emulator").get_submodule("model.layers.0.mlp.experts")
    assert module.gate_up_proj.shape == (4, 128, 32)
    for stack in (module.gate_up_proj, pickle.loads(pickle.dumps(module.gate_up_proj))):
        with pytest.raises(InputError, match="holds two low-rank factors"):
            stack[0]
