"""The limit chosen on held-out data: each loss is the loss of the adapter that the candidate would write."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.corrections import TEXTS, Setting
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.correct import choose
from onelayer.compiler.correct.candidates import CANDIDATES
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.compiler.evaluate.samples import Samples
from onelayer.compiler.evaluate.scoring import parked_bytes
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.files import read_json
from onelayer.compiler.streaming.spill import SpillPool

LORA: dict[str, dict[str, Any]] = {
    "llama": {"r": 3, "lora_alpha": 12, "target_modules": "all-linear"},
    "gpt2": {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"]},
    "qwen3_moe": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]},
    "gemma2": {"r": 2, "use_rslora": True, "target_modules": ["up_proj"], "modules_to_save": ["norm"]},
    "llama_tied": {"r": 2, "target_modules": ["v_proj"], "trainable_token_indices": [5, 3]},
}


@pytest.mark.parametrize("family", LORA)
def test_every_loss_is_that_of_the_adapter_the_candidate_would_write(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, family, **LORA[family])
    result = setting.correct("auto", limit="auto", data=setting.data, batch_size=2)
    assert result.candidates is not None
    assert [(item.solver, item.limit, item.scale) for item in result.candidates] == list(CANDIDATES)
    best = min(result.candidates, key=lambda candidate: candidate.loss)
    assert (result.limit, result.solver, result.scale) == (best.limit, best.solver, best.scale)
    assert len({round(candidate.loss, 5) for candidate in result.candidates}) > 2
    # Every family tries a third of the candidates alone, another third than its neighbor, and the best.
    chosen = {*range(list(LORA).index(family) % 3, len(CANDIDATES), 3), result.candidates.index(best)}
    paths = {}
    for number in sorted(chosen):
        solver, limit, scale = CANDIDATES[number]
        if (solver, scale) == ("span", 1.0):
            paths[number] = Path(setting.correct(f"alone-{number}", limit=limit).output)
        else:
            monkeypatch.setattr("onelayer.compiler.correct.choose.CANDIDATES", ((solver, limit, scale),))
            paths[number] = Path(setting.correct(f"alone-{number}", limit="auto", data=setting.data).output)
            monkeypatch.undo()
    adapters = [tmp_path / "adapter", *paths.values()]
    scores = evaluate_model(tmp_path / "original", setting.data, adapters=adapters).results[1:]
    for number, score in zip(paths, scores[1:], strict=True):
        assert result.candidates[number].loss == pytest.approx(score.loss, rel=1e-5)
    assert scores[0].loss == pytest.approx(result.candidates[0].loss, rel=1e-5), "limit 0 is the adapter as trained"
    assert Checkpointless(tmp_path / "auto").close_to(Checkpointless(paths[result.candidates.index(best)]))
    record = read_json(tmp_path / "auto/onelayer.json")
    assert (record["limit"], record["solver"], record["scale"]) == (best.limit, best.solver, best.scale)
    assert record["candidates"] == [candidate.model_dump() for candidate in result.candidates]
    assert len(record["validation"]["digest"]) == 64


class Checkpointless:
    """Read the tensors of a written adapter."""

    def __init__(self, directory: Path) -> None:
        from safetensors.torch import load_file

        self.tensors = load_file(directory / "adapter_model.safetensors")

    def close_to(self, other: "Checkpointless") -> bool:
        assert self.tensors.keys() == other.tensors.keys()
        return all(
            torch.allclose(tensor, other.tensors[name], rtol=1e-4, atol=1e-5) for name, tensor in self.tensors.items()
        )


@pytest.mark.usefixtures("factor_dtype")
def test_the_losses_are_those_of_the_emulators_own_weights(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", **LORA["llama"])
    found = setting.correct("auto", limit="auto", data=setting.data).candidates
    assert found is not None
    alone = setting.correct("alone", limit=None).output
    (score,) = evaluate_model(tmp_path / "original", setting.data, adapters=[alone]).results[1:]
    whole = next(item for item in found if (item.solver, item.limit, item.scale) == ("span", None, 1))
    assert whole.loss == pytest.approx(score.loss, rel=1e-5)


@pytest.mark.usefixtures("factor_dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_reads_what_one_evaluation_reads_and_the_emulators_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", dtype, **LORA["llama"])
    result = setting.correct("auto", limit="auto", data=setting.data)
    one_pass = evaluate_model(tmp_path / "original", setting.data).report.bytes_read
    tensors = Checkpoint.open(tmp_path / "emulator").tensors.values()
    factors = sum(info.size_bytes for info in tensors if ".lr_" in info.name)
    assert result.report.bytes_read == one_pass + factors
    assert result.report.peak_host_bytes > 0


def test_parked_states_are_predicted_and_go_to_disk_beyond_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every variant parks fits the prediction, or the budget; tensors are wide enough to be worth filing."""
    setting = Setting(tmp_path, "llama", **LORA["llama"])
    setting.data.write_text("".join(json.dumps({"text": f"{text} " * 20}) + "\n" for text in TEXTS * 2))
    made: list[SpillPool] = []
    held: list[int] = []
    own = SpillPool.hold

    class Noted(SpillPool):
        def __init__(self, budget_bytes: int | None = None) -> None:
            super().__init__(budget_bytes)
            made.append(self)

        def hold(self, arguments: Any) -> None:
            own(self, arguments)
            held.append(self.held_bytes)

    monkeypatch.setattr("onelayer.compiler.correct.choose.SpillPool", Noted)
    free = setting.correct("free", limit="auto", data=setting.data)
    most = max(held)
    assert most > 0
    tokenizer = load_tokenizer(tmp_path / "original")
    batches = Samples.read(setting.data, tokenizer, 512).batches(StreamedModel(tmp_path / "original").config, 1)
    streamed, variants = StreamedModel(tmp_path / "original"), 1 + len(CANDIDATES)
    predicted = parked_bytes(streamed, batches, variants, made[0])
    assert most <= predicted
    assert free.report.workspace_bytes >= predicted
    held.clear()
    tight = setting.correct("tight", limit="auto", data=setting.data, host_memory_bytes=most // 4)
    assert max(held) <= most // 4
    assert made[1].spilled_bytes > most // 4
    assert free.report.workspace_bytes - tight.report.workspace_bytes >= most // 2
    assert tight.candidates == free.candidates
    assert Checkpointless(tmp_path / "tight").close_to(Checkpointless(tmp_path / "free"))


def test_linears_that_the_data_never_reaches_are_corrected_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, "llama", **LORA["llama"])
    monkeypatch.setattr("onelayer.compiler.correct.choose.CANDIDATES", (("span", 3.0, 1.1),))
    setting.correct("auto", limit="auto", data=setting.data)
    whole = choose.score_candidates

    def without_last(*arguments: Any) -> Any:
        found = whole(*arguments)
        return replace(found, gaps={name: gap for name, gap in found.gaps.items() if "layers.1" not in name})

    monkeypatch.setattr("onelayer.compiler.correct.command.score_candidates", without_last)
    setting.correct("again", limit="auto", data=setting.data)
    assert Checkpointless(tmp_path / "again").close_to(Checkpointless(tmp_path / "auto"))


def test_a_scale_holds_for_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without correction, the written adapter is the trained one, scaled, also for linears kept whole."""
    setting = Setting(tmp_path, "qwen3_moe", r=3, lora_alpha=6, target_modules=["q_proj", "lm_head", "embed_tokens"])
    monkeypatch.setattr("onelayer.compiler.correct.choose.CANDIDATES", (("span", 0.0, 1.2),))
    result = setting.correct("auto", limit="auto", data=setting.data)
    assert {linear.compressed for linear in result.linears} == {True, False}
    plain, scaled = (Adapter.open(tmp_path / name) for name in ("adapter", "auto"))
    for name, module in plain.modules.items():
        (a, b), (c, d) = plain.factors(name), scaled.factors(name)
        was, now = module.scaling * b @ a, scaled.modules[name].scaling * d @ c
        assert torch.allclose(1.2 * was, now, rtol=1e-4, atol=1e-6), name
    scores = evaluate_model(tmp_path / "original", setting.data, adapters=[tmp_path / "auto"]).results
    assert result.candidates is not None
    assert scores[1].loss == pytest.approx(result.candidates[0].loss, rel=1e-5)


def test_by_default_it_is_chosen_where_there_is_something_to_choose_by(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", **LORA["llama"])
    chosen, plain = setting.correct("chosen", data=setting.data), setting.correct("plain")
    assert chosen.candidates is not None
    assert (plain.candidates, plain.limit, plain.solver, plain.scale) == (None, 3.0, "span", 1.0)


def test_what_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "llama", **LORA["llama"])
    for changes, message in (
        ({"limit": "auto"}, "name some with --data"),
        ({"limit": 2.0, "data": setting.data}, "serves only --limit auto"),
        ({"limit": "most"}, "must be a number, none, auto or default"),
        ({"limit": "auto", "data": setting.data, "max_length": 1}, "--max-length 1: must be at least 2"),
        ({"limit": "auto", "data": setting.data, "batch_size": 0}, "at least 1"),
        ({"limit": "auto", "data": tmp_path / "nowhere.jsonl"}, "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            setting.correct("out", **changes)
    assert not (tmp_path / "out").exists()


def test_the_original_is_opened_without_weights(tmp_path: Path) -> None:
    """Two skeletons are built (with and without PEFT), and both are empty when the pass is over."""
    setting = Setting(tmp_path, "llama", **LORA["llama"])
    opened: list[StreamedModel] = []
    build = StreamedModel.__init__

    def noted(self: StreamedModel, *arguments: Any, **named: Any) -> None:
        opened.append(self)
        build(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StreamedModel, "__init__", noted)
        setting.correct("auto", limit="auto", data=setting.data)
    for streamed in opened:
        for name, parameter in streamed.model.named_parameters():
            assert parameter.is_meta or "lora_" in name, name


def test_a_choice_by_few_rows_or_at_the_end_of_the_scales_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, "llama", **LORA["llama"])  # noise, so the less of it the better
    assert setting.correct("few", data=setting.data).scale == 0.65
    told = capsys.readouterr().err
    assert "--data: 3 rows, and fewer than 100 choose by chance" in told
    assert "the scale 0.65 is the smallest that is tried" in told
    monkeypatch.setattr(choose, "FEW_ROWS", 3)
    monkeypatch.setattr(choose, "SCALES", (0.5, 1.5))
    setting.correct("enough", data=setting.data)
    told = capsys.readouterr().err
    assert "choose by chance" not in told
    assert "the scale" not in told
