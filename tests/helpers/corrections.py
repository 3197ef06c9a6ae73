"""An original, an emulator, an adapter and held-out rows, to correct the adapter with."""

import json
from pathlib import Path
from typing import Any

import torch

from helpers.peft_adapters import load_original, random_adapter
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny
from onelayer.compiler.correct.command import CorrectResult, correct_adapter

TEXTS = ["the quick brown fox jumps over the lazy dog", "what is the sum of two and three ?", "name a city"]


class Setting:
    """The files of one correction, in `root`; `lora` are fields of the adapter's LoraConfig."""

    def __init__(self, root: Path, family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> None:
        self.root = root
        model = save_tiny(family, root / "original", dtype, shards=2)
        skip = ("gate", "experts") if "moe" in family else ()
        write_emulator(model, root / "original", root / "emulator", ratio=0.3, skip=skip)
        random_adapter(load_original(root / "original"), root / "adapter", **lora)
        self.data = root / "held-out.jsonl"
        self.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def correct(self, name: str, **changes: Any) -> CorrectResult:
        """Write the corrected adapter to the directory `name`."""
        paths = {"emulator": self.root / "emulator", "model": self.root / "original", "output": self.root / name}
        return correct_adapter(self.root / "adapter", **{**paths, **changes})
