"""The work of a streamed pass grows with the number of layers, not with its square."""

import cProfile
import pstats
from pathlib import Path

from helpers.tiny_models import causal, tiny_tokenizer
from onelayer.compiler.evaluate.command import evaluate_model


def calls_for(layers: int, directory: Path) -> int:
    """Count the function calls of an evaluation; unlike a time, a busy machine does not change it."""
    causal("Llama", num_hidden_layers=layers).save_pretrained(directory)
    tiny_tokenizer(directory)
    (directory / "data.jsonl").write_text('{"text": "the quick brown fox"}\n')
    with cProfile.Profile() as profile:
        evaluate_model(directory, directory / "data.jsonl", device="cpu")
    stats: dict[object, tuple[int, int]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return sum(total for _, total, *_ in stats.values())


def test_calls_grow_linearly_with_depth(tmp_path: Path) -> None:
    calls_for(1, tmp_path / "first")  # what is only done once in a process
    one, two, four = (calls_for(layers, tmp_path / str(layers)) for layers in (4, 8, 16))
    assert four - two < 1.15 * 2 * (two - one), (one, two, four)
