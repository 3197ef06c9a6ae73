"""Coded emulators: the stored bytes match the figures and the requested size, and stock transformers loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.loss_moments import moments
from helpers.tiny_models import VOCAB, save_tiny, seeded, tiny_tokenizer
from onelayer.compiler.codes import forms
from onelayer.compiler.codes.encode import decode, unpacked
from onelayer.compiler.codes.forms import coded_bytes, direction_bytes, fitting_codes
from onelayer.compiler.compile.coded import CodedCompilation
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.compile.settings import CompileSettings
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.factors.stored_forms import linear_bytes
from onelayer.compiler.refine.command import refine_emulator

TEXTS = ["the quick brown fox jumps over the lazy dog " * 2, "what is the sum of two and three ?", "name a city ; rome"]
KEEP_BYTES = 0.25
CODE = (2, 6)  # neighbors and bits: with finer codes no rank would be left for linears this small


def build() -> Any:
    """Save a Llama whose linears are wide enough for a codebook to pay."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    seeded(build).save_pretrained(directory / "model")
    tiny_tokenizer(directory / "model")
    (directory / "mix.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    return directory


@pytest.fixture(scope="module")
def emulator(source: Path) -> Path:
    return coded(source, source / "emulator")


def coded(source: Path, output: Path, **settings: Any) -> Path:
    settings = {"keep_bytes": KEEP_BYTES, "form": "coded", "max_length": 24, "device": "cpu", **settings}
    compile_emulator(source / "model", source / "mix.jsonl", output, **settings)
    return output


def test_figures_are_those_of_what_is_stored(source: Path, emulator: Path) -> None:
    opened, (H, G) = Emulator.open(emulator), moments(source)
    original: Any = LlamaForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    rows = {row["name"]: row for row in json.loads((emulator / "emulator.json").read_text())["linears"]}
    assert len(rows) == 14
    assert {row["form"] for row in rows.values()} == {"coded"}
    assert all(row["rank"] > 0 and (row["code_width"], row["code_bits"]) == CODE for row in rows.values())
    for name, row in rows.items():
        W = original.get_submodule(name).weight.detach().double()
        E = W - opened.factors(name)[0].double()
        forward = (((E @ H[name]) * E).sum() / ((W @ H[name]) * W).sum()) ** 0.5
        assert row["error"] == pytest.approx(float(forward), 1e-3)
        blocks = torch.block_diag(*(G[name][at : at + 64, at : at + 64] for at in range(0, len(W), 64)))
        blocks += 1e-2 * blocks.diagonal().mean() * torch.eye(len(W))
        both = (((blocks @ E @ H[name]) * E).sum() / ((blocks @ W @ H[name]) * W).sum()) ** 0.5
        assert row["gradient_error"] == pytest.approx(float(both), 1e-3)


def test_codes_with_factors_are_nearer_than_codes_alone(source: Path, emulator: Path) -> None:
    opened, (H, _) = Emulator.open(emulator), moments(source)
    original: Any = LlamaForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    for name in opened.facts.codes:
        W = original.get_submodule(name).weight.detach().double()
        read, width = opened.checkpoint.read, W.shape[1]
        stored = unpacked(read(name + ".lr_codes"), read(name + ".lr_codebook"), width, opened.facts.code_bits)
        codes = decode(stored, width, torch.float32)
        alone, together = W - codes.double(), W - opened.factors(name)[0].double()
        assert ((together @ H[name]) * together).sum() < ((alone @ H[name]) * alone).sum()


def test_an_emulator_takes_the_bytes_asked_for_and_loads_by_stock_means(source: Path, emulator: Path) -> None:
    document = json.loads((emulator / "emulator.json").read_text())
    assert 0.97 * KEEP_BYTES <= document["kept_bytes_share"] <= KEEP_BYTES
    assert document["format_version"] == 5
    model: Any = LlamaForCausalLM.from_pretrained(emulator)
    opened = Emulator.open(emulator)
    x = torch.randn(5, 128)
    for name in list(opened.facts.codes)[:4]:
        linear: Any = model.get_submodule(name)
        torch.testing.assert_close(linear(x), x @ opened.factors(name)[0].T, rtol=1e-4, atol=1e-5)
    model.save_pretrained(source / "again")
    again = LlamaForCausalLM.from_pretrained(source / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_gradients_of_a_coded_linear_are_those_of_its_weight(emulator: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(emulator)
    opened = Emulator.open(emulator)
    name = "model.layers.0.mlp.down_proj"
    x = torch.randn(3, 192, requires_grad=True)
    linear: Any = model.get_submodule(name)
    linear(x).square().sum().backward()
    W = opened.factors(name)[0]
    wanted = torch.autograd.grad((x @ W.T).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted, rtol=1e-3, atol=1e-3)


def test_codes_of_eight_bits_as_compiled_before_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "CODE_SHAPES", (forms.CodeShape(4, 8),))
    directory = coded(source, tmp_path / "emulator")
    written = Emulator.open(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"].pop("code_bits") == 8
    config["quantization_config"]["format_version"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    opened, model = Emulator.open(directory), LlamaForCausalLM.from_pretrained(directory)
    for name in opened.facts.codes:
        W, linear = opened.factors(name)[0], model.get_submodule(name)
        assert torch.equal(W, written.factors(name)[0])
        codes, residual = opened.coded(name)
        assert residual is not None
        values = codes.codebook.float()[codes.codes.long()].flatten(1) * codes.scales.float()
        torch.testing.assert_close(W, values + residual[0] @ residual[1])
        x = torch.randn(5, W.shape[1])
        torch.testing.assert_close(linear(x), x @ W.T, rtol=1e-4, atol=1e-5)


def test_a_second_compile_gives_the_same_bytes(source: Path, emulator: Path, tmp_path: Path) -> None:
    coded(source, tmp_path / "again")
    assert Emulator.open(tmp_path / "again").digest == Emulator.open(emulator).digest


def test_backward_weighs_by_gradients(source: Path, emulator: Path, tmp_path: Path) -> None:
    forward = coded(source, tmp_path / "forward", backward=False)
    rows = [json.loads((path / "emulator.json").read_text())["linears"] for path in (emulator, forward)]
    assert all(row["gradient_error"] is None for row in rows[1])
    assert sum(row["error"] for row in rows[1]) < sum(row["error"] for row in rows[0])


def test_a_model_without_a_loss_is_weighted_by_inputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4
    )
    seeded(lambda: BertModel(config)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    coded(tmp_path, tmp_path / "emulator")
    assert "there is no loss" in capfd.readouterr().err
    assert json.loads((tmp_path / "emulator" / "emulator.json").read_text())["settings"]["backward"] is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_bytes": None, "ratio": 0.25}, "--ratio: codes have no ratio"),
        ({"factor_dtype": "int8"}, "--form coded: stores its factors in nf4"),
        ({"rank_allocation": "spectrum"}, "--form coded: stores its factors in nf4"),
        ({"keep_bytes": 0.05}, "--form coded: needs --keep-bytes 0.072 or more"),
        ({"keep_bytes": 0.3}, "every weight fits whole in nf4"),
    ],
)
def test_settings_that_do_not_go_together(source: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        coded(source, tmp_path / "emulator", **settings)
    assert not (tmp_path / "emulator").exists()


def test_a_coded_emulator_cannot_be_sliced(emulator: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds codes, which cannot be sliced"):
        slice_emulator(emulator, 0.1, tmp_path / "slice")


def test_linears_that_are_too_small_for_codes(tmp_path: Path, source: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "mix.jsonl").write_bytes((source / "mix.jsonl").read_bytes())
    with pytest.raises(InputError, match=r"too small for codes within --keep-bytes 0\.25; give --form factors"):
        coded(tmp_path, tmp_path / "emulator")
    coded(tmp_path, tmp_path / "emulator", form="auto")
    assert not Emulator.open(tmp_path / "emulator").facts.codes


def test_a_share_of_bytes_alone_chooses_codes(source: Path, emulator: Path, tmp_path: Path) -> None:
    coded(source, tmp_path / "emulator", form="auto")
    assert Emulator.open(tmp_path / "emulator").digest == Emulator.open(emulator).digest


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({}, "coded"),
        ({"keep_bytes": 0.265}, "coded"),
        ({"keep_bytes": 0.266}, "factors"),
        ({"keep_bytes": 0.0719}, "coded"),
        ({"keep_bytes": 0.0718}, "factors"),
        ({"ratio": 0.2}, "factors"),
        ({"factor_dtype": "nf4"}, "factors"),
        ({"rank_allocation": "uniform"}, "factors"),
        ({"form": "factors"}, "factors"),
    ],
)
def test_the_form_by_what_is_given(settings: Any, form: str) -> None:
    resolved = CompileSettings.of(settings).resolved(2, is_bfloat16=True)
    assert resolved.form == form
    assert {"form", "backward"} <= resolved.recorded().keys() or form == "factors"


def test_ranks_of_residuals_spend_the_budget() -> None:
    shapes = {"wide": (1536, 576), "small": (192, 576), "narrow": (8, 64)}
    coded = fitting_codes(shapes, 0.145)
    assert coded is not None
    code, ranks = coded
    assert ranks["narrow"] is None
    stored = sum(coded_bytes(*shapes[name], code, ranks[name] or 0) for name in ("wide", "small"))
    stored += linear_bytes(8, 64, None, "nf4", 2)
    budget = 2 * 0.145 * sum(rows * columns for rows, columns in shapes.values())
    assert budget - direction_bytes(1536, 576) - direction_bytes(192, 576) < stored <= budget
    assert fitting_codes(shapes, 0.145, every=True) is None, "one is quantized whole"
    assert fitting_codes({"small": (96, 96)}, 0.145) is None, "codes and codebook leave no rank"


def stopped_after_a_unit(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stop a compile once a unit is coded; return a linear of that unit."""
    real, coded_units = CodedCompilation.compressed, list[str]()

    def dying(self: Any, linears: Any, hooks: Any) -> Any:
        if coded_units:
            raise KeyboardInterrupt
        coded_units.append(min(linears))
        return real(self, linears, hooks)

    monkeypatch.setattr(CodedCompilation, "compressed", dying)
    with pytest.raises(KeyboardInterrupt):
        coded(source, output)
    monkeypatch.undo()
    return coded_units[0]


def test_a_stopped_compile_goes_on_to_the_same_bytes(
    source: Path, emulator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stopped_after_a_unit(source, tmp_path / "again", monkeypatch)
    assert ".layers.1." in name, "units are written on the way back"
    coded(source, tmp_path / "again")
    assert Emulator.open(tmp_path / "again").digest == Emulator.open(emulator).digest


def test_units_of_other_codes_are_not_taken_up(
    source: Path, emulator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "CODE_SHAPES", (forms.CodeShape(3, 8),))  # as an earlier version would choose
    stopped_after_a_unit(source, tmp_path / "again", monkeypatch)
    with pytest.raises(InputError, match="codes"):
        coded(source, tmp_path / "again")
    coded(source, tmp_path / "again", resume=False)
    assert Emulator.open(tmp_path / "again").digest == Emulator.open(emulator).digest


@pytest.mark.parametrize("backward", [False, True])
def test_refinement_trains_codebooks_scales_and_factors(
    source: Path, emulator: Path, tmp_path: Path, backward: bool
) -> None:
    given: dict[str, Any] = {"calibration": source / "mix.jsonl", "output": tmp_path / "refined", "backward": backward}
    steps: dict[str, Any] = {"steps": 10, "learning_rate": 0.01, "step_samples": 4}  # fewer steps than the rate is for
    result = refine_emulator(emulator, model=source / "model", **given, **steps, batch_size=12)
    assert all(unit.after < unit.before for unit in result.units)
    if backward:
        errors = [(unit.gradients_before, unit.gradients_after) for unit in result.units]
        assert all(after < before for before, after in errors if before is not None and after is not None)
    assert all((unit.gradients_after is not None) is backward for unit in result.units)
    before, after = Emulator.open(emulator).checkpoint, Emulator.open(tmp_path / "refined").checkpoint
    name = "model.layers.0.mlp.down_proj"
    for ending in (".lr_codebook", ".lr_up", ".lr_down"):
        assert not torch.equal(before.read(name + ending), after.read(name + ending))
    codes = [item.read(name + ".lr_codes")[:, :64] for item in (before, after)]
    assert torch.equal(*codes), "192 inputs in threes are 64 codes, which stay; the scale after them is trained"
    LlamaForCausalLM.from_pretrained(tmp_path / "refined")
