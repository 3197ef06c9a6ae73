"""Predicts what would fit on cards of 8 to 24 GB, for public models given by their dimensions, as markdown.

python -m scripts.plan.table

Nothing here is measured except two figures of the EMLoC paper (arXiv 2506.12015, table 1), shown next to models of
their size. Durations assume the disk and the card named in the table's caption.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from onelayer.runtime.planning.plan import PlanResult, plan_run
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.speed import Speed
from onelayer.runtime.planning.train_memory import PlannedRun, emulator_bytes, train_memory

GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24)
MAX_LENGTH, BATCH_SIZE = 1024, 4
TILES = 3  # of the image in an example of a vision-language model: 768 tokens of its text
ASSUMED = Speed(read_bytes_per_second=3e9, flops_per_second=6e13, device="assumed")

# Dimensions from the models' own config.json. `paper`: GB that EMLoC reports for tuning a model of about this size.
DENSE: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
MIXTURE: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16"}


def _dense(
    hidden: int, inner: int, layers: int, heads: int, groups: int, width: int, vocabulary: int
) -> dict[str, Any]:
    return DENSE | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


def _vision(text: dict[str, Any]) -> dict[str, Any]:
    """Return an InternVL of InternViT-6B, tiles of 448 pixels, and a language model."""
    tower = {
        **{"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25},
        **{"image_size": [448, 448], "patch_size": [14, 14], "norm_type": "rms_norm", "use_qk_norm": True},
    }
    kind = {"architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "dtype": "bfloat16"}
    return {**kind, "text_config": text, "vision_config": tower, "image_seq_length": 256, "downsample_ratio": 0.5}


MODELS: dict[str, dict[str, Any]] = {
    "8B dense (Llama 3 8B)": _dense(4096, 14336, 32, 32, 8, 128, 128256),
    "14B dense (Qwen3 14B)": _dense(5120, 17408, 40, 40, 8, 128, 151936),
    "20B dense (InternLM 2.5 20B)": _dense(6144, 16384, 48, 48, 8, 128, 92544),
    "32B dense (Qwen3 32B)": _dense(5120, 25600, 64, 64, 8, 128, 151936),
    "70B dense (Llama 3 70B)": _dense(8192, 28672, 80, 64, 8, 128, 128256),
    "30B mixture, 3B active (Qwen3 30B-A3B)": MIXTURE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "26B vision-language (InternVL 2.5 26B)": _vision(_dense(6144, 16384, 48, 48, 8, 128, 92553)),
    "38B vision-language (InternVL 2.5 38B)": _vision(_dense(5120, 27648, 64, 40, 8, 128, 151674)),
}

PAPER_MODELS = ("26B vision-language (InternVL 2.5 26B)", "38B vision-language (InternVL 2.5 38B)")
PAPER_NOTE = "EMLoC reports 18.6 GB for a 26B and 20.1 GB for a 38B vision-language model, both with an emulator of 5B"


def main() -> None:
    """Print the table."""
    print(f"Predictions, not measurements: LoRA of rank 8, batches of {BATCH_SIZE} x {MAX_LENGTH} tokens, bfloat16.")
    print(
        "A cell gives the dtype of the emulator's factors and the ratio of the weights they keep, or the share of the"
    )
    print("16-bit bytes that codes take, how activations are stored, and the peaks of training / compiling on the card")
    print("in GiB. A polish step of 64 sequences assumes a disk of 3 GB/s and a card of 60 TFLOP/s.\n")
    head = ["model", *(f"{card} GB card" for card in CARDS_GIB), "polish step"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, config in MODELS.items():
        plans = [planned(config, card * GIB) for card in CARDS_GIB]
        assert plans[-1].seconds is not None
        print(f"| {' | '.join([name, *map(cell, plans), f'{plans[-1].seconds.polish_step:.0f} s'])} |")
    print(f"\n{PAPER_NOTE}. With an emulator of 5B")
    print(f"and one example of {MAX_LENGTH} tokens and {TILES} tiles of an image at a time, each layer")
    print("recomputed from its exact input:\n")
    for name in PAPER_MODELS:
        emulator, peak = small_emulator(MODELS[name])
        print(f"- {name}: emulator {emulator / 1e9:.1f} GB, training {peak / 1e9:.1f} GB, predicted")


def planned(config: dict[str, Any], memory_bytes: int) -> PlanResult:
    """Plan for one card."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return plan_run(folder, memory_bytes, max_length=MAX_LENGTH, batch_size=BATCH_SIZE, images=TILES, speed=ASSUMED)


def cell(plan: PlanResult) -> str:
    """Format factor dtype and ratio, or the share that codes take, how activations are stored, and the two peaks."""
    if plan.ratio is None:
        return "does not fit"
    stored = "whole" if plan.activations == "none" else f"{plan.activations} 1/{round(1 / (plan.activation_rank or 1))}"
    peaks = f"{plan.predicted.train_bytes / GIB:.1f} / {plan.predicted.compile_bytes / GIB:.1f}"
    linears = f"{plan.factor_dtype} {plan.ratio:.2f}" if plan.keep_bytes is None else f"codes {plan.keep_bytes:.3f}"
    return f"{linears}, {stored}, {peaks}"


def small_emulator(config: dict[str, Any]) -> tuple[int, int]:
    """Predict the bytes of an emulator of 5B parameters, and of training on it with layers recomputed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shapes = read_shapes(Path(folder), TILES).at_length(MAX_LENGTH)
    ratios = [step / 1000 for step in range(10, 950)]
    ratio = max(ratio for ratio in ratios if emulator_bytes(shapes, ratio) <= 5e9 * shapes.value_bytes)
    emulator = emulator_bytes(shapes, ratio)
    return emulator, train_memory(shapes, emulator, PlannedRun(1, MAX_LENGTH, where="layer")).peak


if __name__ == "__main__":
    main()
