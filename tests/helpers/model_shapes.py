"""Shapes of models, written by hand for tests of the planner."""

from onelayer.runtime.planning.read_shapes import shapes_of
from onelayer.runtime.planning.shapes import ModelShapes

Table = dict[str, tuple[int, ...]]


def decoder(
    hidden: int, inner: int, layers: int, vocabulary: int, *, narrow: int | None = None, value_bytes: int = 2
) -> ModelShapes:
    """Return a Llama's shapes; `narrow` is the width of keys and values, by default that of the queries."""
    table: Table = {"embed.weight": (vocabulary, hidden), "head.weight": (vocabulary, hidden)}
    for number in range(layers):
        parts = dict.fromkeys(("attention.q", "attention.o"), (hidden, hidden))
        parts |= dict.fromkeys(("attention.k", "attention.v"), (narrow or hidden, hidden))
        parts |= {**dict.fromkeys(("mlp.gate", "mlp.up"), (inner, hidden)), "mlp.down": (hidden, inner)}
        table |= {f"layers.{number}.{part}.weight": shape for part, shape in parts.items()}
    return shapes_of("typed in", {"hidden_size": hidden, "vocab_size": vocabulary}, table, value_bytes, False)


def mixture(
    hidden: int, inner: int, layers: int, vocabulary: int, *, experts: int, per_token: int, value_bytes: int = 2
) -> ModelShapes:
    """Return the shapes of layers of attention and `experts`; a token is sent to `per_token` of them."""
    table: Table = {"embed.weight": (vocabulary, hidden)}
    for layer in range(layers):
        table |= {f"layers.{layer}.attention.{name}.weight": (hidden, hidden) for name in "qkvo"}
        for expert in range(experts):
            place = f"layers.{layer}.experts.{expert}"
            table |= {f"{place}.{name}.weight": (inner, hidden) for name in ("gate", "up")}
            table[f"{place}.down.weight"] = (hidden, inner)
    config = {"hidden_size": hidden, "vocab_size": vocabulary, "num_experts_per_tok": per_token}
    return shapes_of("typed in", config, table, value_bytes, False)
