"""Prepares the demo on SmolLM2-135M-Instruct, and lets the model answer a question before and after.

In: the model from the package index (`scripts.real_models`) and Python's standard library. Out: a directory with the
model and the task's files, and the answers of the original with each adapter.
"""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from onelayer.compiler.storage.digests import sha256_json
from onelayer.compiler.storage.files import atomic_directory, onelayer_home, read_json, write_text
from scripts.demo.pages import write_pages
from scripts.real_models import real_model

VERSION = 1  # raise it by hand when the output of this file or of pages.py changes
ANSWER_TOKENS = 72


def smollm2_directory() -> Path:
    """Return the directory with `model/`, the task's files and the question; make it once.

    Raises `InputError` if the package index does not have the model.
    """
    model = real_model("smollm2")
    recipe = {"version": VERSION, "model": model.name, "python": platform.python_version()}
    directory = onelayer_home() / "demo" / sha256_json(recipe)[:12]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not directory.exists():
            with atomic_directory(directory) as partial:
                write_pages(partial)
                (partial / "model").symlink_to(model)
    return directory


def answers(directory: Path, adapters: Mapping[str, Path]) -> str:
    """Show the question, and what the original answers, alone and with each adapter, by title; asked only once."""
    kept = directory / f"answers-{sha256_json({title: str(path) for title, path in adapters.items()})[:12]}.txt"
    if not kept.exists():
        write_text(kept, _answers(directory, adapters))
    return kept.read_text(encoding="utf-8")


def _answers(directory: Path, adapters: Mapping[str, Path]) -> str:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    question = read_json(directory / "question.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(directory / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer() -> str:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return "\n".join(f"    {line}" for line in text.strip().splitlines())

    shown = [f"Question: {question[0]['content']}", f"\nThe original answers:\n\n{answer()}"]
    for title, path in adapters.items():
        model = PeftModel.from_pretrained(model, str(path)).eval()
        shown.append(f"\n{title} answers:\n\n{answer()}")
        model = model.unload()
    return "\n".join(shown)
