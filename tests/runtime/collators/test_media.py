"""Batches of rows with and without images, padded as the processor of their model pads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.media_files import picture
from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import IGNORED
from onelayer.runtime.collators.media import MediaCollator
from scripts.sweep.vision_models import save_vision_model

SAID = {"role": "assistant", "content": "a thing"}
ROWS = [
    {"image": "0.png", "messages": [{"role": "user", "content": "what is it?"}, SAID]},
    {"messages": [{"role": "user", "content": "what is the name?"}, SAID]},
    {"images": ["1.png", "0.png"], "messages": [{"role": "user", "content": "<image> or <image>?"}, SAID]},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_a_padded_batch_gives_each_row_the_logits_it_has_alone(family: str, tmp_path: Path) -> None:
    model: Any = save_vision_model(family, tmp_path / "m")
    for number, size in enumerate([(50, 40), (20, 30)]):
        picture(*size, seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = read_tokens(tmp_path / "rows.jsonl", load_reader(tmp_path / "m", type(model)), 256)
    features = [{"input_ids": row.input_ids, "labels": row.labels, "row": number} for number, row in enumerate(rows)]
    batch = MediaCollator([row.inputs for row in rows], 0)(features)
    assert {"pixel_values", "input_ids", "attention_mask", "labels"} <= batch.keys()
    with torch.no_grad():
        together = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        for number, row in enumerate(rows):
            length = len(row.input_ids)
            made = {} if row.inputs is None else row.inputs.tensors()
            alone = model(input_ids=torch.tensor([row.input_ids]), **made).logits[0]
            torch.testing.assert_close(together[number, :length], alone, rtol=1e-4, atol=1e-4)
            assert batch["labels"][number].tolist() == row.labels + [IGNORED] * (batch["labels"].shape[1] - length)
