"""Compares predicted peaks with measured ones: compiles, trainings and corrections of small random models.

python -m scripts.plan.measure [--only NAME ...] [--json]

The measured value is the largest size of live tensors at any moment: every operation is watched, and each storage is
counted from its first use until it is freed. Of what a kernel allocates and frees within one operation, only the
workspace of an eigenproblem is counted.
Exits with 1 if a prediction of training or compiling is off by more than 10 %.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onelayer.compiler import compile_emulator, correct_adapter
from onelayer.compiler.models.unit_memory import SLICE_BYTES
from onelayer.runtime import train_lora
from onelayer.runtime.planning.pass_memory import compile_bytes, correct_bytes
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.train_memory import PlannedRun, emulator_bytes, expert_factor_bytes, train_memory

ALLOWED, RATIO, SAMPLES = 0.10, 0.3, 4


@dataclass(frozen=True)
class Case:
    """One shape: a config class with its fields, and how it is trained."""

    kind: str
    config: Mapping[str, Any]
    batch_size: int
    max_length: int
    where: Any = "none"
    rank: float = 0.125
    dtype: str = "float32"


def _llama(hidden: int, inner: int, heads: int, groups: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }


QWEN = {**_llama(384, 1152, 6, 2, 5, 8000), "head_dim": 96, "layer_types": None}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}
MIXTURE = {**_llama(256, 704, 4, 2, 4, 1000), "head_dim": 64, **EXPERTS}
SMALL = _llama(128, 384, 4, 2, 3, 1000)
CASES = {
    "small, stored whole": Case("Llama", SMALL, 2, 128),
    "small, layer 1/8": Case("Llama", SMALL, 2, 128, "layer"),
    "small, sublayer 1/8": Case("Llama", SMALL, 2, 128, "sublayer"),
    "llama, stored whole": Case("Llama", _llama(256, 704, 4, 2, 8, 4096), 8, 256),
    "llama, long, layer 1/8": Case("Llama", _llama(512, 1536, 8, 8, 4, 2000), 2, 1024, "layer"),
    "llama, large vocabulary, sublayer 1/8": Case("Llama", _llama(320, 1024, 5, 1, 6, 32000), 4, 256, "sublayer"),
    "llama, bfloat16, stored whole": Case("Llama", _llama(512, 1536, 8, 2, 6, 4096), 4, 512, dtype="bfloat16"),
    "llama, bfloat16, sublayer 1/8": Case(
        "Llama", _llama(512, 1536, 8, 2, 6, 4096), 4, 512, "sublayer", dtype="bfloat16"
    ),
    "qwen3, stored whole": Case("Qwen3", QWEN, 4, 256),
    "mixture, stored whole": Case("Qwen3Moe", MIXTURE, 4, 256),
    "mixture, bfloat16, stored whole": Case("Qwen3Moe", MIXTURE, 4, 256, dtype="bfloat16"),
    "mixture, sublayer 1/8": Case("Qwen3Moe", MIXTURE, 4, 256, "sublayer"),
}


class LiveBytes(TorchDispatchMode):
    """A counter of the bytes of live storages, among those that any operation inside `with` reads or makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record its tensors."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._linalg_eigh.default:  # the vectors, and twice as much workspace
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + 3 * args[0].nbytes)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._see(value)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a stand-in that stores nothing
            return
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def make_model(directory: Path, case: Case) -> Path:
    """Make a random model with a tokenizer of words, and data of as many words as the case trains on."""
    config = getattr(transformers, f"{case.kind}Config")(
        **case.config, dtype=case.dtype, pad_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config).to(getattr(torch, case.dtype))
    model.save_pretrained(directory / "model")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, 1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory / "model")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 1000, (3 * case.batch_size, case.max_length), generator=generator).tolist()
    text = [json.dumps({"text": " ".join(f"w{word}" for word in row[:-1])}) for row in rows]
    (directory / "data.jsonl").write_text("\n".join(text))
    return directory / "model"


def watched(run: Callable[[], Any]) -> int:
    """Measure the peak bytes of tensors while a function runs."""
    live = LiveBytes()
    with live:
        run()
    return live.peak_bytes


def measure(case: Case) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each pass with its predicted and measured bytes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, data = make_model(directory, case), directory / "data.jsonl"
        shapes, config = read_shapes(model), transformers.AutoConfig.from_pretrained(model)
        calibrated: dict[str, Any] = {
            "ratio": RATIO,
            "samples": SAMPLES,
            "max_length": case.max_length,
            "device": "cpu",
        }
        compiled = watched(lambda: compile_emulator(model, data, directory / "emulator", **calibrated))
        # On a CPU the count also includes what would wait on the host (embeddings, states, rotary angles), and at the
        # end matrices that are copied in slices.
        width = int(getattr(config.get_text_config(), "head_dim", 0) or 0)
        waiting = SAMPLES * case.max_length * 2 * (shapes.hidden + width) * shapes.value_bytes
        # The inputs of a block's experts wait there too, and so do their factors: first one by one, then stacked.
        if shapes.blocks[0].experts is not None:
            waiting += SAMPLES * case.max_length * shapes.hidden * shapes.value_bytes
            waiting += 2 * expert_factor_bytes(shapes, RATIO)
        copied = min(SLICE_BYTES, shapes.vocabulary * shapes.hidden * shapes.value_bytes)
        yield "compile", max(compile_bytes(shapes, RATIO, case.max_length) + waiting, copied), compiled
        precision = {"bf16": True} if case.dtype == "bfloat16" else {}
        trained = watched(
            lambda: train_lora(
                directory / "emulator",
                data,
                directory / "adapter",
                max_steps=3,
                batch_size=case.batch_size,
                max_length=case.max_length,
                activations=case.where,
                activation_rank=case.rank,
                args={"use_cpu": True, **precision},
            )
        )
        rank = None if case.where == "none" else case.rank
        planned = PlannedRun(case.batch_size, case.max_length, 8, case.where, rank, on_gpu=False)
        yield "train", train_memory(shapes, emulator_bytes(shapes, RATIO), planned).peak, trained
        corrected = watched(
            lambda: correct_adapter(
                directory / "adapter", emulator=directory / "emulator", model=model, output=directory / "corrected"
            )
        )
        yield "correct", correct_bytes(shapes, RATIO, 8), corrected


def main() -> int:
    """Measure every case and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for name in arguments.only or CASES:
        with contextlib.redirect_stdout(sys.stderr):
            found = list(measure(CASES[name]))
        for step, predicted, measured in found:
            off = predicted / measured - 1
            rows.append({"case": name, "step": step, "predicted": predicted, "measured": measured, "off": off})
            if not arguments.json:
                print(f"{name:40} {step:8} {predicted / 1e6:9.1f} MB {measured / 1e6:9.1f} MB {off:+7.1%}", flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return int(any(abs(row["off"]) > ALLOWED for row in rows if row["step"] != "correct"))


if __name__ == "__main__":
    sys.exit(main())
