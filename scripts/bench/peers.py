"""Runs ours and other tools on the same work: exact steps, evaluation and merging, each in a process of its own.

    python -m scripts.bench.peers --work DIR [--rounds 3] [--rows 4] [--tokens 128]
        [--width 512] [--layers 8] [--only WORK ...]

Models of random weights are made in DIR, and airllm 4.0.0 is installed there, for the torch of this environment. Each
line is one JSON object: wall and processor seconds of every round, growth of the process, bytes of weights that were
read in all rounds, and losses. What cannot run is a line with its error. Files come from the page cache.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onelayer.compiler.machine.meter import Meter
from scripts.bench.options import parser_of

AIRLLM = "airllm==4.0.0"
# The linears that airllm adapts in a decoder of its class.
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|in_proj_\w+|out_proj|gate_proj|up_proj|down_proj)"
RANK, ALPHA, RATE = 16, 32, 1e-3
Figures = dict[str, Any]


def write_models(work: Path, width: int, layers: int) -> None:
    """Write a small model of airllm's class, in several shards as it needs, and a Llama with data."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    from scripts.bench.compile import make_model

    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": width // 8}
    linear = {"linear_key_head_dim": width // 8, "linear_value_head_dim": width // 8}
    number = {"linear_num_key_heads": 8, "linear_num_value_heads": 8}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width}
    text = {**shape, **heads, **linear, **number, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    model.save_pretrained(work / "qwen", max_shard_size=width * 4096 * 4)  # the embedding has its own
    make_model(work / "llama", 512, 6, samples=16, tokens=128)


def batch(arguments: argparse.Namespace) -> torch.Tensor:
    """Make the rows that every trainer gets."""
    return torch.randint(3, 4000, (arguments.rows, arguments.tokens), generator=torch.Generator().manual_seed(0))


def rounds(arguments: argparse.Namespace, work: Callable[[], float]) -> Figures:
    """Run a piece of work so often; return its seconds, processor seconds and losses, which it returns."""
    figures: Figures = {"seconds": [], "processor_seconds": [], "losses": []}
    for _ in range(arguments.rounds):
        wall, processor = time.perf_counter(), time.process_time()
        figures["losses"].append(round(work(), 5))
        figures["processor_seconds"].append(round(time.process_time() - processor, 3))
        figures["seconds"].append(round(time.perf_counter() - wall, 3))
    return figures


def peft_steps(arguments: argparse.Namespace, model: Any) -> Figures:
    """Train the adapter of a model, in memory or streamed, with one step a round."""
    import peft

    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0), batch(arguments)

    def step() -> float:
        optimizer.zero_grad()
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return rounds(arguments, step)


def step_onelayer(arguments: argparse.Namespace) -> Figures:
    """Train a streamed model."""
    from onelayer.runtime import streamed_for_training

    model: Any = streamed_for_training(arguments.work / "qwen", device="cpu")
    figures = peft_steps(arguments, model)
    return {**figures, "bytes_read": model.streaming.report().bytes_read}


def step_peft(arguments: argparse.Namespace) -> Figures:
    """Train the model in memory, with checkpointing."""
    from transformers import Qwen3_5ForConditionalGeneration

    model: Any = Qwen3_5ForConditionalGeneration.from_pretrained(arguments.work / "qwen")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return peft_steps(arguments, model)


def step_airllm(arguments: argparse.Namespace) -> Figures:
    """Train with airllm's class, which reads its own copy of the layers."""
    from airllm import AirLLMLoRA  # type: ignore[import-not-found]

    class Counting(AirLLMLoRA):  # type: ignore[misc]
        bytes_read = 0

        def load_layer_to_cpu(self, layer_name: str) -> Any:
            state = super().load_layer_to_cpu(layer_name)
            Counting.bytes_read += sum(tensor.nbytes for tensor in state.values())
            return state

    settings = {"lora_r": RANK, "lora_alpha": ALPHA, "lr": RATE, "dtype": torch.float32}
    model = Counting(str(arguments.work / "qwen"), device="cpu", **settings)
    ids = batch(arguments)
    figures = rounds(arguments, lambda: float(model.train_step(ids)))
    return {**figures, "bytes_read": Counting.bytes_read}


def evaluate_onelayer(arguments: argparse.Namespace) -> Figures:
    """Score the rows of the Llama's data."""
    from onelayer.compiler import evaluate_model

    folder, read = arguments.work / "llama", list[int]()

    def score() -> float:
        result = evaluate_model(folder / "model", folder / "data.jsonl", batch_size=4, max_length=128, device="cpu")
        read.append(result.report.bytes_read)
        return float(result.results[0].loss)

    return {**rounds(arguments, score), "bytes_read": sum(read)}


def evaluate_accelerate(arguments: argparse.Namespace) -> Figures:
    """Score the same rows with accelerate's disk offload."""
    from accelerate.utils import OffloadedWeightsLoader  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = arguments.work / "llama"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "data.jsonl").read_text().splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][:128] for line in lines]
    assert len(set(map(len, rows))) == 1
    disk = {"device_map": {"": "disk"}, "offload_folder": str(arguments.work / "offloaded")}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **disk)
    read, loaded = list[int](), OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> Any:
        tensor = loaded(self, key)
        read.append(tensor.nbytes)
        return tensor

    OffloadedWeightsLoader.__getitem__ = counted

    def score() -> float:
        batches = [torch.tensor(rows[start : start + 4]) for start in range(0, len(rows), 4)]
        with torch.no_grad():
            return sum(float(model(input_ids=ids, labels=ids).loss) for ids in batches) / len(batches)

    return {**rounds(arguments, score), "bytes_read": sum(read)}


def write_adapter(work: Path) -> None:
    """Write an adapter of the Llama whose factors are random."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(work / "llama" / "model")
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(str(work / "adapter"))


def merge_onelayer(arguments: argparse.Namespace) -> Figures:
    """Merge the adapter in a stream."""
    from onelayer.compiler import merge_adapter

    work, numbers = arguments.work, iter(range(arguments.rounds))

    def merge() -> float:
        output = work / f"merged {next(numbers)}"
        merge_adapter(work / "adapter", model=work / "llama" / "model", output=output)
        return 0.0

    return {name: values for name, values in rounds(arguments, merge).items() if name != "losses"}


def merge_peft(arguments: argparse.Namespace) -> Figures:
    """Load the model and its adapter, merge and save."""
    import peft
    from transformers import AutoModelForCausalLM

    work, numbers = arguments.work, iter(range(arguments.rounds))

    def merge() -> float:
        model: Any = AutoModelForCausalLM.from_pretrained(work / "llama" / "model")
        merged: Any = peft.PeftModel.from_pretrained(model, work / "adapter").merge_and_unload()
        merged.save_pretrained(work / f"merged by peft {next(numbers)}")
        return 0.0

    return {name: values for name, values in rounds(arguments, merge).items() if name != "losses"}


WORKS = (
    *(step_onelayer, step_peft, step_airllm),
    *(evaluate_onelayer, evaluate_accelerate, merge_onelayer, merge_peft),
)


def run_here(arguments: argparse.Namespace, number: int) -> None:
    """Run one piece of work in this process; print its line, or one with its error."""
    work = WORKS[number]
    sys.path.append(str(arguments.work / "packages"))
    torch.set_num_threads(1)
    figures: Figures = {"work": work.__name__}
    try:
        with Meter(torch.device("cpu")) as meter:
            figures |= work(arguments)
            figures["peak_bytes"] = meter.sample()
    except Exception as error:
        figures["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(json.dumps(figures), flush=True)


def main() -> None:
    """Make the models, install what is compared, run each in a child process."""
    parser = parser_of(__doc__, rounds=3, rows=4, tokens=128, layers=8)
    parser.add_argument("--work", type=Path, required=True, help="an empty or missing directory")
    parser.add_argument("--width", type=int, default=512, help="of the model that is trained")
    parser.add_argument("--only", nargs="+", choices=[work.__name__ for work in WORKS], help="default: all")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    os.environ["ONELAYER_HOME"] = str(arguments.work / "home")
    write_models(arguments.work, arguments.width, arguments.layers)
    write_adapter(arguments.work)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", arguments.work / "packages", AIRLLM], check=False)
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["onelayer.runtime.streamed.engine", "peft", "transformers"])
    for number, work in enumerate(WORKS):
        if arguments.only is not None and work.__name__ not in arguments.only:
            continue
        child = children.Process(target=run_here, args=(arguments, number))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
