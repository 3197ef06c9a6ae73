"""Multiply-adds of a token: an embedding is looked up, a head multiplies, also where the two are one table."""

import pytest

from onelayer.runtime.planning.read_shapes import shapes_of

HIDDEN, VOCABULARY = 8, 300
LAYER = {f"layers.0.mlp.{name}.weight": (HIDDEN, HIDDEN) for name in ("up", "down")}
TABLE, WIDE = (VOCABULARY, HIDDEN), (VOCABULARY - 1, 3 * HIDDEN)


@pytest.mark.parametrize(
    ("kind", "outside", "multiplied"),
    [
        ("LlamaForCausalLM", {"embed_tokens": TABLE, "lm_head": TABLE}, VOCABULARY * HIDDEN),
        ("LlamaForCausalLM", {"embed_tokens": TABLE}, VOCABULARY * HIDDEN),
        ("LlamaForSequenceClassification", {"embed_tokens": TABLE, "score": (2, HIDDEN)}, 2 * HIDDEN),
        ("Gemma3nForConditionalGeneration", {"embed_tokens": TABLE, "per_layer": WIDE}, VOCABULARY * HIDDEN),
        ("AlbertForMaskedLM", {"embeddings": (VOCABULARY, 4), "up": (HIDDEN, 4)}, VOCABULARY * 4 + HIDDEN * 4),
    ],
)
def test_a_token_is_multiplied_by_the_head_and_not_by_the_embedding(
    kind: str, outside: dict[str, tuple[int, ...]], multiplied: int
) -> None:
    config = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "architectures": [kind]}
    table = LAYER | {f"{name}.weight": shape for name, shape in outside.items()}
    shapes = shapes_of("typed in", config, table, 4, False)
    assert shapes.active_parameters == 2 * HIDDEN * HIDDEN + multiplied
