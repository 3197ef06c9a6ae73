"""`emulator.keep_bytes` of a manifest: the resulting ratio, keys, reasons, slices from the store, and mistakes."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.fake_steps import FakeSteps, write_project
from helpers.tiny_models import save_tiny
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.store import ArtifactStore

PLAIN = "emulator: {calibration: {data: mix.jsonl}}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture
def fakes(path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    monkeypatch.setenv("ONELAYER_HOME", str(path.parent / "home"))
    return FakeSteps(monkeypatch)


def put_model(path: Path, dtype: torch.dtype) -> None:
    """Replace the stand-in by a model with headers to plan from."""
    shutil.rmtree(path.parent / "model")
    save_tiny("llama", path.parent / "model", dtype)


def say(path: Path, settings: str) -> None:
    """Replace the emulator block by these settings."""
    lines = path.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("emulator:"))
    lines[at] = PLAIN.removesuffix("}") + f", {settings}}}"
    path.write_text("\n".join(lines) + "\n")


def go(path: Path, fakes: FakeSteps) -> list[str]:
    assert not run(load_manifest(path), ArtifactStore(path.parent / "home")).failed
    return fakes.taken()


@pytest.mark.parametrize(
    ("dtype", "factors", "ratio"),
    [
        (torch.float32, "", 0.2 * 2 / 0.53125),
        (torch.bfloat16, ", factor_dtype: bf16", 0.2),
        (torch.float32, ", factor_dtype: bf16", 0.2),
        (torch.bfloat16, ", factor_dtype: int8", 0.2 * 2 / 1.03125),
        (torch.float32, ", factor_dtype: nf4", 0.2 * 2 / 0.53125),
    ],
)
def test_a_share_of_bytes_becomes_a_ratio(
    path: Path, fakes: FakeSteps, dtype: torch.dtype, factors: str, ratio: float
) -> None:
    put_model(path, dtype)
    say(path, f"keep_bytes: 0.2{factors}")
    assert go(path, fakes)[0] == "compile"
    assert fakes.arguments["compile"]["ratio"] == pytest.approx(ratio)
    assert go(path, fakes) == []


@pytest.mark.parametrize(
    ("dtype", "share", "kind"),
    [
        (torch.bfloat16, 0.9, "int8"),
        (torch.float32, 0.9, "int8"),
        (torch.bfloat16, 0.5, "int8"),
        (torch.bfloat16, 0.4, "nf4"),
        (torch.float32, 0.1, "nf4"),
    ],
)
def test_a_share_of_bytes_chooses_the_factor_dtype(
    path: Path, fakes: FakeSteps, dtype: torch.dtype, share: float, kind: str | None
) -> None:
    put_model(path, dtype)
    say(path, f"keep_bytes: {share}")
    go(path, fakes)
    assert fakes.arguments["compile"]["factor_dtype"] == kind
    assert fakes.arguments["compile"]["rank_allocation"] == "spectrum"


def test_too_little_memory_is_refused_before_anything_runs(path: Path, fakes: FakeSteps) -> None:
    put_model(path, torch.bfloat16)
    say(path, "memory: 1MiB")
    store = ArtifactStore(path.parent / "home")
    for go_on in (plan, run):
        with pytest.raises(InputError, match=r"emulator\.memory: "):
            go_on(load_manifest(path), store)
    assert fakes.calls == []


def test_a_dry_run_shows_the_cost_of_a_share_of_bytes(path: Path, fakes: FakeSteps) -> None:
    put_model(path, torch.bfloat16)
    written = {}
    for settings in (
        "keep_bytes: 0.3, factor_dtype: bf16",
        "ratio: 0.3",
        "keep_bytes: 0.3, factor_dtype: nf4",
        "factor_dtype: nf4",
        "keep_bytes: 0.25",
    ):
        say(path, settings)
        written[settings] = plan(load_manifest(path), ArtifactStore(path.parent / "home")).steps[0].write_bytes
    sizes = list(written.values())
    assert sizes[0] == sizes[1]
    assert sizes[3] == sizes[4], "the default is a quarter of the bytes, in nf4"
    assert sizes[2] is not None
    assert sizes[0] == pytest.approx(sizes[2], rel=0.03), "equal bytes up to the rounding of ranks"
    assert sizes[3] is not None
    assert sizes[3] < sizes[2]


def test_a_smaller_share_is_sliced_from_the_larger_emulator(path: Path, fakes: FakeSteps) -> None:
    put_model(path, torch.float32)
    as_stored = "factor_dtype: bf16, rank_allocation: uniform"
    say(path, f"keep_bytes: 0.6, {as_stored}")
    go(path, fakes)
    say(path, f"keep_bytes: 0.2, {as_stored}")
    first = plan(load_manifest(path), ArtifactStore(path.parent / "home")).steps[0]
    assert first.reason == "field keep_bytes 0.6 -> 0.2; sliced from the emulator of keep_bytes 0.6 in the store"
    assert go(path, fakes)[0] == "slice 0.2"
    say(path, f"keep_bytes: 0.7, {as_stored}")
    assert go(path, fakes)[0] == "compile"
    # Quantized factors are rounded for their rank, and ranks by spectrum are chosen again for each size.
    for otherwise in ("factor_dtype: int8, rank_allocation: uniform", "rank_allocation: uniform", "factor_dtype: bf16"):
        say(path, f"keep_bytes: 0.5, {otherwise}")
        assert go(path, fakes)[0] == "compile"
        say(path, f"keep_bytes: 0.1, {otherwise}")
        assert go(path, fakes)[0] == "compile"


def test_a_ratio_and_a_share_of_bytes_are_different_settings(path: Path, fakes: FakeSteps) -> None:
    put_model(path, torch.bfloat16)
    path.write_text(path.read_text().replace("train: {", "train: {anchor: none, "))
    say(path, "ratio: 0.2")
    go(path, fakes)
    say(path, "keep_bytes: 0.2, factor_dtype: bf16, rank_allocation: uniform, refine: none")
    reason = plan(load_manifest(path), ArtifactStore(path.parent / "home")).steps[0].reason
    assert reason == "field factor_dtype not set -> bf16; field keep_bytes not set -> 0.2; field ratio 0.2 -> not set"
    # The emulator is identical, so no later step runs.
    assert go(path, fakes) == ["compile"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("keep_bytes: 1.5", r"emulator\.keep_bytes: input should be less than 1, not 1\.5"),
        ("keep_bytes: 0.2, ratio: 0.2", r"emulator\.keep_bytes: ratio is given too, keep one of them"),
        ("memory: 8GiB, keep_bytes: 0.2", r"emulator\.memory: keep_bytes is given too, keep one of them"),
        ("memory: 8GiB, keep_bytes: 0.2, ratio: 0.2", r"emulator\.keep_bytes: ratio .*; emulator\.memory: ratio"),
    ],
)
def test_mistakes_are_named(path: Path, settings: str, message: str) -> None:
    say(path, settings)
    with pytest.raises(InputError, match=message):
        load_manifest(path)


def test_a_slice_is_smaller_than_a_share_of_bytes_allows(path: Path) -> None:
    path.write_text(
        path.read_text().replace("support: {train: support.jsonl", "support: {train: support.jsonl, ratio: 0.5")
    )
    say(path, "keep_bytes: 0.2, factor_dtype: nf4")
    assert load_manifest(path).tasks["support"].ratio == 0.5
    say(path, "keep_bytes: 0.1, factor_dtype: nf4")
    with pytest.raises(InputError, match=r"tasks\.support\.ratio: must be below 0\.3765"):
        load_manifest(path)
