"""The memory contract with images, in fresh processes: patches of a tower count, the number of images does not."""

import json
from pathlib import Path

import pytest

from helpers.media_files import picture
from helpers.promised_runs import check_promise, compiled, measured, polished, refined
from onelayer.compiler.results import Report
from onelayer.runtime.planning.pass_memory import pass_bytes
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.train_memory import PlannedRun
from scripts.sweep.vision_models import save_vision_model

PATCH, WIDTH = 14, 128
SAID = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a thing"}]


def prepared(root: Path, side: int, count: int, width: int = WIDTH) -> Path:
    """Save a model that reads images of a side in pixels, and write as many of these with a row each."""
    save_vision_model("llava", root / "model", side=side, patch=PATCH, width=width)
    rows = []
    for number in range(count):
        picture(side, side, seed=number).save(root / f"{number}.png")
        rows.append({"image": f"{number}.png", "messages": SAID})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.filterwarnings("ignore")
def test_images_count_by_their_patches_and_not_by_their_number(tmp_path: Path, own_store: Path) -> None:
    """A pass that promised by the tokens of the text alone would hold 6 times as many rows of 560 pixels as it said."""
    found: dict[tuple[int, int], list[Report]] = {}
    few, many = 1, 16
    for side, count in ((224, few), (560, few), (224, many)):
        root = tmp_path / f"{side} {count}"
        root.mkdir()
        prepared(root, side, count)
        passes = (
            (compiled, {"batch_size": 1}),
            (refined, {"steps": 1, "batch_size": 1}),
            (polished, {"batch_size": count, "micro_batch_size": 1}),
        )
        found[side, count] = [measured(command, root, own_store, max_length=2048, **given) for command, given in passes]
        for report in found[side, count]:
            check_promise(report)
    for small, large in zip(found[224, few], found[560, few], strict=True):
        assert large.peak_device_bytes > small.peak_device_bytes + (8 << 20), "too little to be seen"
    pixel_bytes = (many - few) * 3 * 224 * 224 * 4
    for less, more in zip(found[224, few], found[224, many], strict=True):
        assert less.workspace_bytes == more.workspace_bytes
        assert more.peak_device_bytes < less.peak_device_bytes + pixel_bytes


@pytest.mark.filterwarnings("ignore")
def test_a_plan_counts_what_an_image_takes_on_a_host(tmp_path: Path, own_store: Path) -> None:
    """Without holes in the heap and the unit that is read ahead, a plan counted half of what 560 pixels take.

    The holes differ by run (85 to 119 MiB in all, of 134 planned), so the bound above is wide.
    """
    side, wide = 560, 512
    prepared(tmp_path, side, 1, wide)
    report = measured(compiled, tmp_path, own_store, max_length=2048, batch_size=1)
    shapes = read_shapes(tmp_path / "model", 1, side)
    assert shapes.media is not None
    tokens = shapes.media.tokens + 30
    planned = PlannedRun(1, tokens, on_gpu=False, allocation="uniform")
    held = pass_bytes(shapes.at_length(tokens), 0.2, planned)["compile"]
    assert report.peak_device_bytes <= held <= 2 * report.peak_device_bytes
