"""Packed rows: which are packed together, gradients equal to separate rows, and models that mix packed rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.polish_runs import WORDS, polished, prepare, write_rows
from helpers.tiny_models import TINY, causal, save_tiny
from onelayer.compiler.data.packing import join_rows, packs_of
from onelayer.compiler.data.tokens import IGNORED, Tokens
from onelayer.compiler.errors import InputError
from onelayer.compiler.polish.packing_check import change_of

# All linears of a mixture would be more than plain LoRA.
MIXTURES = ("mixtral", "qwen3_moe")
# OPT makes its masks without a look at positions.
PACKABLE = [name for name in TINY if name not in ("bert", "t5", "opt")]


def rows_of(lengths: list[int]) -> list[Tokens]:
    return [Tokens([place] * length, [place] * length) for place, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 10), max_size=30))
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths: list[int]) -> None:
    packs = packs_of(rows_of(lengths), 10)
    assert sorted(row.input_ids for pack in packs for row in pack) == sorted(row.input_ids for row in rows_of(lengths))
    sizes = [sum(len(row.input_ids) for row in pack) for pack in packs]
    assert all(1 <= size <= 10 for size in sizes)
    # No row is left out of a pack that it would fit.
    assert all(a + b > 10 for i, a in enumerate(sizes) for b in sizes[:i])


def test_a_row_goes_where_the_least_room_is_left() -> None:
    packs = packs_of(rows_of([3, 6, 8, 2]), 10)
    assert [[len(row.input_ids) for row in pack] for pack in packs] == [[8, 2], [6, 3]]


def test_a_pack_begins_its_positions_anew_and_predicts_no_first_token() -> None:
    row = join_rows([Tokens([5, 6, 7], [5, 6, 7]), Tokens([8, 9], [IGNORED, 9])])
    assert row.input_ids == [5, 6, 7, 8, 9]
    assert row.labels == [IGNORED, 6, 7, IGNORED, 9]
    assert row.positions == [0, 1, 2, 0, 1]


def polish_both(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Compute the gradients of the first step, separate and packed."""
    found: list[dict[str, torch.Tensor]] = []

    def watching(parameters: Any, norm: float) -> torch.Tensor:
        found.append({str(place): item.grad.clone() for place, item in enumerate(parameters) if item.grad is not None})
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watching)
    results = [
        polished(directory, steps=1, batch_size=9, packing=packing, output=directory / str(packing))
        for packing in (False, True)
    ]
    alone, packed = (result.steps[0] for result in results)
    assert alone.sequences == 9
    assert packed.sequences < 5
    assert packed.tokens == alone.tokens
    assert packed.loss == pytest.approx(alone.loss, rel=1e-6)
    return found


@pytest.mark.parametrize("name", PACKABLE)
def test_gradients_are_those_of_the_rows_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: str | list[str] = ["q_proj", "v_proj", "o_proj"] if name in MIXTURES else "all-linear"
    alone, packed = polish_both(prepare(tmp_path, name, targets), monkeypatch)
    assert alone.keys() == packed.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for place, gradient in alone.items():
        assert float((packed[place] - gradient).abs().max()) <= 1e-5 * largest, place
    assert largest > 0


@pytest.mark.parametrize(
    ("name", "targets", "word"),
    [
        ("t5", ["q"], "T5ForConditionalGeneration does not predict"),
        ("mamba2", ["in_proj"], "Mamba2ForCausalLM does not predict"),
        ("bamba", ["gate_proj"], "BambaForCausalLM has layers whose state runs on"),
        ("lfm2", ["q_proj"], "Lfm2ForCausalLM has layers whose state runs on"),
        ("opt", ["q_proj"], "OPTForCausalLM does not keep packed rows apart"),
        ("llama", ["q_proj"], "LlamaForCausalLM does not keep packed rows apart"),
    ],
)
def test_models_that_do_not_keep_rows_apart_are_refused_by_name(
    name: str, targets: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, "mamba2", lambda: causal("Mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1))
    monkeypatch.setitem(TINY, "lfm2", lambda: causal("Lfm2", layer_types=["conv", "full_attention"]))
    monkeypatch.setitem(TINY, "bamba", lambda: causal("Bamba", mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1))
    save_tiny(name, tmp_path / "model")
    write_rows(tmp_path)
    if name == "llama":  # as a model behaves that makes its masks by itself
        import transformers.masking_utils

        monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(InputError, match=f"--packing: {word}"):
        polished(tmp_path, adapter=None, lora_rank=2, target_modules=targets, steps=1, packing=True)
    assert not (tmp_path / "out").exists()


def test_rows_that_fill_a_pack_each_need_no_trial(tmp_path: Path) -> None:
    prepare(tmp_path)
    rows = [{"text": " ".join(WORDS)} for _ in range(3)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    result = polished(tmp_path, data=tmp_path / "long.jsonl", steps=1, batch_size=3, max_length=12, packing=True)
    assert result.steps[0].sequences == 3


def test_a_moved_first_row_is_ignored_and_rounding_follows_the_dtype() -> None:
    alone = torch.full((10,), 2.0, dtype=torch.float64)
    moved = torch.full((10,), 1e-4, dtype=torch.float64)
    moved[:5] = 1.0
    change, allowed = change_of(alone + moved, alone, 5, torch.float32)
    assert change == pytest.approx(1e-4)
    assert allowed == pytest.approx(2e-5)
    assert change_of(alone, alone, 5, torch.bfloat16)[1] == pytest.approx(0.02)
