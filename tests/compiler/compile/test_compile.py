"""The compile pass: an emulator on disk that matches its record, for every architecture, or nothing at all."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.children import fork_server
from helpers.tiny_models import TINY, causal, save_tiny, tiny_tokenizer
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.checkpoint import model_digest

TEXTS = ["the quick brown fox jumps over the lazy dog " * 2, "what is the sum of two and three ?", "name a city ; rome"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8))
    return path


def linear_outputs(
    model: Any, names: list[str], batches: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, list[torch.Tensor]]:
    """Collect inputs and outputs (before the bias) of named linears, as the resident model computes them."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_hook(lambda m, args, out, name=name: found[name].append(args[0].detach()))
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_compiles_to_the_optimum_and_loads(name: str, tmp_path: Path, data: Path) -> None:
    model = save_tiny(name, tmp_path / "model", shards=3)
    result = compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, max_length=24)
    emulator = type(model).from_pretrained(tmp_path / "emulator")
    assert sum(parameter.numel() for parameter in emulator.parameters()) == result.parameters_after
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters_before
    assert result.layer_parameters_after < result.layer_parameters_before
    tokens = read_tokens(data, load_tokenizer(tmp_path / "model"), 24)
    batches = [batch.inputs for batch in make_batches(tokens, model.config, 1)]
    inputs = linear_outputs(model, [linear.name for linear in result.linears], batches)
    for linear in result.linears:
        X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[linear.name]]).double()
        weight = model.get_submodule(linear.name).weight.detach().double()
        W = (
            weight
            if weight.shape[1] == X.shape[1] and not hasattr(model.get_submodule(linear.name), "nf")
            else weight.T
        )
        singular = torch.linalg.svdvals(X @ W.T)
        optimum = float((singular[linear.rank :].square().sum() / singular.square().sum()).sqrt())
        low_rank = emulator.get_submodule(linear.name)
        Y_k = X @ low_rank.lr_down.double().T @ low_rank.lr_up.double().T
        achieved = float((X @ W.T - Y_k).norm() / (X @ W.T).norm())
        assert linear.optimal_error == pytest.approx(optimum, rel=1e-4)
        assert linear.error == pytest.approx(achieved, rel=1e-4)
        assert achieved == pytest.approx(optimum, rel=1e-4)


def test_the_emulator_says_what_it_is(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    result = compile_emulator(
        tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, samples=5, max_length=24, seed=3
    )
    emulator = Emulator.open(tmp_path / "emulator")
    document = json.loads((tmp_path / "emulator" / "emulator.json").read_text())
    assert document["digest"] == emulator.digest == model_digest(tmp_path / "emulator")
    assert document["base"]["digest"] == emulator.facts.base_digest == model_digest(tmp_path / "model")
    assert document["calibration"]["samples"] == 5
    assert document["settings"]["ratio"] == 0.5
    assert {row["name"] for row in document["linears"]} == set(emulator.facts.ranks)
    for row in document["linears"]:
        lost = 1 - sum(value**2 for value in row["singular_values"]) / row["output_energy"]
        assert max(lost, 0) ** 0.5 == pytest.approx(row["optimal_error"], abs=2e-3)
    assert document["report"] == result.report.model_dump(mode="json")
    assert (tmp_path / "emulator" / "tokenizer.json").read_bytes() == (
        tmp_path / "model" / "tokenizer.json"
    ).read_bytes()
    assert not list((tmp_path / "emulator").glob("model*.safetensors"))
    assert result.report.largest_unit_bytes > 0
    assert result.report.workspace_bytes > result.report.largest_unit_bytes


def test_the_same_call_gives_the_same_bytes(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    for name in ("a", "b"):
        compile_emulator(tmp_path / "model", data, tmp_path / name, ratio=0.4, samples=6, max_length=24)
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")


def test_batches_change_nothing_but_rounding(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    one, many = (
        compile_emulator(tmp_path / "model", data, tmp_path / str(size), ratio=0.5, max_length=24, batch_size=size)
        for size in (1, 8)
    )
    for left, right in zip(one.linears, many.linears, strict=True):
        assert left.error == pytest.approx(right.error, rel=1e-4)


def test_a_bfloat16_model_compiles_and_loads_in_bfloat16(tmp_path: Path, data: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    result = compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, max_length=24)
    emulator = type(model).from_pretrained(tmp_path / "emulator")
    assert {parameter.dtype for parameter in emulator.parameters()} == {torch.bfloat16}
    assert all((linear.optimal_error or 0) <= linear.error < 1 for linear in result.linears)


def test_routers_stay_dense(tmp_path: Path, data: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model")
    result = compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, max_length=24)
    assert all(".self_attn." in linear.name for linear in result.linears)
    emulator = type(model).from_pretrained(tmp_path / "emulator")
    before, after = model.state_dict(), emulator.state_dict()
    routers = [name for name in before if ".gate.weight" in name]
    assert routers
    assert all(torch.equal(before[name], after[name]) for name in routers)


def test_a_linear_that_is_never_called_stays_dense_and_is_named(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = save_tiny("llama", tmp_path / "model")
    by_hand = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * (x @ self.up_proj.weight.T))  # noqa: E731
    monkeypatch.setattr(LlamaMLP, "forward", by_hand)
    compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, max_length=24)
    document = json.loads((tmp_path / "emulator" / "emulator.json").read_text())
    assert {row["name"] for row in document["dense"]} == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    emulator = type(model).from_pretrained(tmp_path / "emulator")
    assert torch.equal(emulator.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_a_model_full_of_nan_stops_with_the_name_of_the_linear(tmp_path: Path, data: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][:] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.\w+: \d+ of \d+ calibration rows are not finite"):
        compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, max_length=24)
    assert not (tmp_path / "emulator").exists()


def test_what_a_person_can_get_wrong_is_one_line_and_leaves_nothing(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    faults: list[tuple[dict[str, Any], str]] = [
        ({"ratio": 1.5}, "--ratio"),
        ({"samples": 0}, "--samples"),
        ({"calibration": empty}, "no examples"),
        ({"calibration": tmp_path / "nowhere.jsonl"}, "nowhere"),
        ({"output": full}, "already holds files"),
        ({"max_length": 1}, "--max-length"),
    ]
    for change, message in faults:
        settings: dict[str, Any] = {
            "model": tmp_path / "model",
            "calibration": data,
            "output": tmp_path / "out",
            **change,
        }
        with pytest.raises(InputError, match=message) as caught:
            compile_emulator(**settings)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in full.iterdir()] == ["file"]
    assert not list(tmp_path.glob(".*partial*"))


def test_a_killed_writer_leaves_no_emulator(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    save_tiny("llama", tmp_path / "model")

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onelayer.compiler.compile.writer.write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        compile_emulator(tmp_path / "model", data, tmp_path / "emulator", ratio=0.5, max_length=24)
    assert not (tmp_path / "emulator").exists()


def test_ranks_by_spectrum_cost_no_more_and_err_less(tmp_path: Path, data: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    uniform, spectrum = (
        compile_emulator(tmp_path / "model", data, tmp_path / kind, ratio=0.3, max_length=24, rank_allocation=kind)
        for kind in ("uniform", "spectrum")
    )
    assert 0 <= uniform.parameters_after - spectrum.parameters_after < 96
    errors = [sum(linear.error**2 for linear in result.linears) for result in (uniform, spectrum)]
    assert errors[1] < errors[0]
    assert Emulator.open(tmp_path / "spectrum").facts.ranks == {item.name: item.rank for item in spectrum.linears}


def compile_in_child(model: Path, data: Path, output: Path, samples: int, home: str) -> None:
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)
    result = compile_emulator(model, data, output, samples=samples, max_length=100, host_memory_bytes=0, ratio=0.2)
    (output / "report.json").write_text(result.report.model_dump_json())


def test_memory_grows_neither_with_depth_nor_with_samples(tmp_path: Path, own_store: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(TEXTS) * 2 + str(i)}) + "\n" for i in range(96)))
    for layers in (2, 8):
        causal("Llama", num_hidden_layers=layers, **shape).save_pretrained(tmp_path / str(layers))
        tiny_tokenizer(tmp_path / str(layers))
    # A process that has computed before holds free memory, which would hide what the next pass takes: one child each.
    context = fork_server()

    def peak(layers: int, samples: int, run: int) -> int:
        output = tmp_path / f"emulator-{layers}-{samples}-{run}"
        arguments = (tmp_path / str(layers), data, output, samples, str(own_store))
        process = context.Process(target=compile_in_child, args=arguments)
        process.start()
        process.join()
        report = json.loads((output / "report.json").read_text())
        assert report["peak_device_bytes"] <= report["largest_unit_bytes"] + report["workspace_bytes"]
        return int(report["peak_device_bytes"])

    # What is held is there in every run, the holes that an allocator leaves in some: the lesser of two counts.
    least = min(peak(2, 4, run) for run in range(2))
    two_layers = 2 * 4 * (4 * 512 * 512 + 3 * 512 * 1024)
    for layers, samples, held in ((8, 4, "six more layers are held"), (2, 96, "92 more samples are held")):
        if peak(layers, samples, 0) - least >= two_layers:
            assert peak(layers, samples, 1) - least < two_layers, held


@pytest.mark.parametrize(("name", "refused"), [("bert", "BertForMaskedLM"), ("t5", None), ("llama", None)])
def test_a_model_that_train_will_refuse_is_told_before(
    name: str, refused: str | None, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(name, tmp_path / "model")
    compile_emulator(tmp_path / "model", data, tmp_path / "emulator", samples=2, max_length=8)
    told = capsys.readouterr().err
    assert ("onelayer train will refuse its emulator" in told) is (refused is not None)
    assert refused is None or refused in told
