"""Makes the demo's model and data once, from the standard library's source: a trained model and two tasks' files.

The model is a small Llama with its own tokenizer, trained from random weights for a fixed number of steps. It is
undertrained, but it shows learned weights and activations, which a random model would not.
"""

import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import atomic_directory, onelayer_home
from scripts.demo.data import SEED, standard_library, write_tasks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1  # raise it by hand when the output of this file or of data.py changes
END_OF_TEXT = "<|end|>"
VOCABULARY = 2048
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
STEPS, BATCH, LENGTH = 320, 8, 128
WARM_UP, DECAY = 20, 200  # steps
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3


def demo_directory() -> Path:
    """Return the directory with `model/`, the tasks' data and the calibration mix; make it once, in 90 seconds."""
    recipe = {"version": VERSION, "shape": SHAPE, "steps": STEPS, "python": platform.python_version()}
    directory = onelayer_home() / "demo" / sha256_json(recipe)[:12]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not directory.exists():
            with atomic_directory(directory) as partial:
                code = standard_library()
                write_tasks(partial, code)
                train_model(code, partial / "model")
    return directory


def train_model(code: Sequence[str], directory: Path) -> None:
    """Train tokenizer and model on the code and save both as a transformers directory."""
    import torch
    from torch.nn.utils import clip_grad_norm_
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = list(code)
    random.Random(SEED).shuffle(texts)
    bpe = byte_pair_encoding(texts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=LENGTH
    )
    end = bpe.token_to_id(END_OF_TEXT)
    ids = torch.tensor([token for encoding in bpe.encode_batch(texts) for token in (*encoding.ids, end)])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(SEED))]

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPE, **tokens))
    # Use Muon for the layers' matrices: in so few steps it gets twice as far as AdamW alone.
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95)),
    ]
    rates = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_at) for optimizer in optimizers]
    progress = tqdm(range(STEPS), desc="train the demo's model", unit="step", disable=None, leave=False)
    for step in progress:
        batch = blocks[step * BATCH : (step + 1) * BATCH]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))


def byte_pair_encoding(texts: Sequence[str]) -> "Tokenizer":
    """Train a byte-level tokenizer on the first part of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text[:20_000] for text in texts], trainer)
    return bpe


def _rate_at(step: int) -> float:
    """Return the share of the full learning rate: a short warm-up, a plateau, a linear decay."""
    return min(1.0, (step + 1) / WARM_UP, max(0.02, (STEPS - step) / DECAY))
