"""Set-up of every test: no network, no writes to the user's store, serial small kernels."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On some processors MKL's sums depend on where in memory their operands lie, and equal work differs in its last bits.
os.environ.setdefault("MKL_CBWR", "AUTO")

import torch
import transformers

from helpers.reference_emulators import FACTOR_DTYPES, stored_as

if TYPE_CHECKING:
    from scripts.sweep.encoded_pipelines import EncodedPipeline

# On matrices this small a second thread only waits for the first.
torch.set_num_threads(1)
# A busy machine is no fault of the code, so no example has a limit of time.
hypothesis.settings.register_profile("onelayer", deadline=None)
hypothesis.settings.load_profile("onelayer")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def pytest_configure() -> None:
    """Let nothing wait for the disk, which takes 5 ms for each file: no test cuts the power."""
    pytest.MonkeyPatch().setattr(os, "fsync", lambda descriptor: None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave all that is imported out of the garbage collections of the tests.

    Trainers ask for some in each run, and one that looks at half a million objects takes as long as a tiny training.
    """
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


@pytest.fixture(params=FACTOR_DTYPES, ids=str)
def factor_dtype(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Run the test with emulators of every factor dtype."""
    with stored_as(request.param):
        yield request.param


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> "EncodedPipeline":
    """Return a tiny FLUX with encoded images, which no test changes."""
    from scripts.sweep.encoded_pipelines import encoded_pipeline

    return encoded_pipeline("flux", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def flux_emulator(flux: "EncodedPipeline") -> Path:
    """Return an emulator of the tiny FLUX, which no test changes."""
    from onelayer.compiler import compile_emulator

    output = flux.pipeline.parent / "emulator"
    compile_emulator(flux.pipeline, flux.images, output, keep_bytes=0.25, factor_dtype="nf4", samples=6)
    return output


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own store."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("ONELAYER_HOME", str(home))
    return home
