"""The memory contract with images, in fresh processes: patches of a tower count, the number of images does not."""

import json
from pathlib import Path

import pytest

from helpers.media_files import picture
from helpers.promised_runs import check_promise, compiled, measured, polished, refined
from onelayer.compiler.results import Report
from scripts.sweep.vision_models import save_vision_model

PATCH, WIDTH = 14, 128
SAID = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a thing"}]


def prepared(root: Path, side: int, count: int) -> Path:
    """Save a model that reads images of a side in pixels, and write as many of these with a row each."""
    save_vision_model("llava", root / "model", side=side, patch=PATCH, width=WIDTH)
    rows = []
    for number in range(count):
        picture(side, side, seed=number).save(root / f"{number}.png")
        rows.append({"image": f"{number}.png", "messages": SAID})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.filterwarnings("ignore")
def test_passes_stay_within_the_prediction_for_small_and_large_images(tmp_path: Path, own_store: Path) -> None:
    """A pass that promised by the tokens of the text alone would hold 6 times as many rows as it said."""
    found: dict[int, list[Report]] = {}
    for side in (224, 560):
        root = tmp_path / str(side)
        root.mkdir()
        prepared(root, side, 1)
        found[side] = [
            measured(command, root, own_store, max_length=2048, **settings)
            for command, settings in ((compiled, {}), (refined, {"steps": 1}), (polished, {"batch_size": 1}))
        ]
    for small, large in zip(found[224], found[560], strict=True):
        check_promise(small)
        check_promise(large)
        assert large.peak_device_bytes > small.peak_device_bytes + (8 << 20), "too little to be seen"


@pytest.mark.filterwarnings("ignore")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, own_store: Path) -> None:
    few, many = 4, 32
    root = prepared(tmp_path, 224, many)
    rows = (root / "data.jsonl").read_text().splitlines(keepends=True)
    found = {}
    for count in (few, many):
        (root / "data.jsonl").write_text("".join(rows[:count]))
        found[count] = measured(compiled, root, own_store, max_length=2048, batch_size=1)
        check_promise(found[count])
        (root / "emulator").rename(root / f"of {count}")
    assert found[few].workspace_bytes == found[many].workspace_bytes
    pixel_bytes = (many - few) * 3 * 224 * 224 * 4
    assert found[many].peak_device_bytes < found[few].peak_device_bytes + pixel_bytes
