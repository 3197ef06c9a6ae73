"""Draws forms, writes questions about them as rows, and trains the tiny vision-language model that reads them.

A form is a page of 64 x 64 pixels with four lines `key:value`, drawn in the font that comes with Pillow. `read` asks
for the value of a key and `all` for the whole page; the base is shown both, in black on white. Two tasks are new to it:
`faint`, the whole page in gray on gray, and `half`, only the first two lines. Nothing can be answered without the page.
A row holds its page as a data URI.
"""

import base64
import io
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as library
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import cross_entropy

from onelayer.compiler.data.labeled_rows import read_tokens
from onelayer.compiler.data.media_tokens import load_reader
from onelayer.compiler.data.tokens import IGNORED
from scripts.sweep.vision_models import template, tokenizer

transformers: Any = library  # its classes are only partly typed
KEYS = ("age", "day", "fee", "gas", "job", "lot", "net", "oil", "pin", "qty", "tax", "vat")
SIDE, LINES, LINE, COLUMN, DIGITS, FONT_SIZE = 64, 4, 16, 8, 4, 13
IMAGE_TOKENS, LENGTH, BATCH = 16, 160, 32
FRAME = ("<fake_token_around_image>", "<global-img>")
FAINT = (120, 180)  # the tones of text and ground of a faint page
TASKS = {"faint": ("all", True), "half": ("half", False)}  # what is asked, and whether the page is faint
BASE_KINDS = ("read", "all", "all")
HELD_OUT, TRAINED = 3_000_000, 2_000_000  # the first numbers of forms that the base has not seen


@cache
def _glyph(char: str) -> np.ndarray:
    font = ImageFont.load_default(FONT_SIZE)
    image = Image.new("L", (COLUMN, LINE), 255)
    ImageDraw.Draw(image).text((COLUMN / 2, LINE / 2), char, font=font, fill=0, anchor="mm")
    return np.asarray(image)


def example(number: int, kinds: Sequence[str], faint: bool) -> tuple[np.ndarray, str, str]:
    """Return the page (SIDE, SIDE, 3), the question and the answer of a form; a number always gives the same."""
    numbers = random.Random(number)
    lines = [(key, str(numbers.randrange(10 ** (DIGITS - 1), 10**DIGITS))) for key in numbers.sample(KEYS, LINES)]
    key, value = numbers.choice(lines)
    asked, answer = {
        "read": (f"{key}?", value),
        "all": ("all?", " ".join(f"{key} {value}" for key, value in lines)),
        "half": ("half?", " ".join(f"{key} {value}" for key, value in lines[: LINES // 2])),
    }[numbers.choice(kinds)]
    page = np.full((SIDE, SIDE), 255, dtype=np.uint8)
    for row, (key, value) in enumerate(lines):
        for column, char in enumerate(f"{key}:{value}"):
            page[row * LINE : (row + 1) * LINE, column * COLUMN : (column + 1) * COLUMN] = _glyph(char)
    colors = np.stack([page] * 3, axis=-1)
    if faint:
        colors = (FAINT[0] + (FAINT[1] - FAINT[0]) * (colors / 255)).astype(np.uint8)
    return colors, asked, answer


def write_rows(path: Path, task: str, first: int, count: int) -> None:
    """Write rows of one task from the forms of some numbers."""
    kind, faint = TASKS[task]
    rows = []
    for number in range(first, first + count):
        page, asked, answer = example(number, [kind], faint)
        file = io.BytesIO()
        Image.fromarray(page).save(file, "PNG")
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        said = [{"role": "user", "content": asked}], [{"role": "assistant", "content": answer}]
        rows.append({"image": source, "prompt": said[0], "completion": said[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _new_model() -> tuple[Any, Any]:
    """Return an Idefics3 of 2.4M parameters, and its processor."""
    tokens = tokenizer(["<image>", *FRAME, "<end_of_utterance>"], "<image>")
    ids = tokens.convert_tokens_to_ids
    text = {
        **{"model_type": "llama", "vocab_size": len(tokens), "hidden_size": 128, "intermediate_size": 352},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        **{"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "tie_word_embeddings": False,
    }
    tower = {
        **{"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"image_size": SIDE, "patch_size": 8},
    }
    config = transformers.Idefics3Config(
        text_config=text, vision_config=tower, image_token_id=ids("<image>"), scale_factor=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    size = {"longest_edge": SIDE}
    images = transformers.Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    chat = template("<image>")
    processor = transformers.Idefics3Processor(images, tokens, image_seq_len=IMAGE_TOKENS, chat_template=chat)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _batch(tokens: Any, numbers: range, kinds: Sequence[str], faint: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """Make inputs and labels of forms as the product reads their rows, without files between."""
    pages, rows, starts = [], [], []
    for number in numbers:
        page, asked, answer = example(number, kinds, faint)
        before = f"<s><user>{FRAME[0]}{FRAME[1]}{'<image>' * IMAGE_TOKENS}{FRAME[0]}{asked}\n<assistant>"
        head, said = (tokens(text, add_special_tokens=False)["input_ids"] for text in (before, f"{answer}</s>\n"))
        pages.append(page)
        rows.append(head + said)
        starts.append(len(head))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, IGNORED)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        labels[place, start : len(row)] = torch.tensor(row[start:])
    pixels = torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2)[:, None].float() / 127.5 - 1
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}, labels


def train_base(output: Path, steps: int) -> None:
    """Train the base on its two questions, and save it: Muon for matrices, AdamW for the rest."""
    torch.manual_seed(0)
    model, processor = _new_model()
    tables = ("embed", "lm_head")
    matrices = {name for name, x in model.named_parameters() if x.ndim == 2 and not any(t in name for t in tables)}
    groups = [[x for name, x in model.named_parameters() if (name in matrices) is muon] for muon in (True, False)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(groups[0], lr=0.02, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(groups[1], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model.train()
    for step in range(steps):
        inputs, labels = _batch(processor.tokenizer, range(step * BATCH, (step + 1) * BATCH), BASE_KINDS, False)
        logits = model(**inputs, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.4 * steps))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9:
            print(f"base: step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    model.config.dtype = torch.float32
    partial = output.with_name(output.name + ".partial")
    model.eval().save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(output)


def check_reading(model: Path, rows: Path, task: str, first: int) -> None:
    """Check that the product reads a row as the base was trained on it. Raises `ValueError` if it does not."""
    reader: Any = load_reader(model, transformers.Idefics3ForConditionalGeneration)
    row = read_tokens(rows, reader, LENGTH)[0]
    kind, faint = TASKS[task]
    inputs, labels = _batch(reader.tokenizer, range(first, first + 1), [kind], faint)
    assert row.inputs is not None
    pixels = row.inputs.tensors()["pixel_values"]
    same = [row.input_ids == inputs["input_ids"][0].tolist(), row.labels == labels[0].tolist()]
    if not all(same) or not torch.allclose(pixels, inputs["pixel_values"], atol=1e-6):
        raise ValueError(f"{rows}: is read otherwise than the base was trained")
