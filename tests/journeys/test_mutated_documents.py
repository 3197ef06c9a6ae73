"""Every reader of a file gets 2,000 mutated ones: each is read, or refused in one short line; none hangs or swells."""

import json
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from transformers import TrainerState

from helpers.mutations import mutated_bytes, mutated_json
from helpers.peft_adapters import random_adapter
from helpers.tiny_models import save_tiny
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.compile.command import compile_emulator
from onelayer.compiler.data.readers import read_examples
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import MESSAGE_CHARACTERS, InputError
from onelayer.compiler.inspect import inspect_path
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.storage.work_directory import WorkKind, begin
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.housekeeping import list_artifacts
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.spectra import left_out, read_spectra
from onelayer.runtime.store.record import StepSpec
from onelayer.runtime.store.store import ArtifactStore
from onelayer.runtime.training.callbacks import logged_losses
from onelayer.runtime.training.checkpoints import check_state
from onelayer.runtime.training.inputs import read_model

CASE_SECONDS = 4.0
HEADROOM_BYTES = 1 << 30

MANIFEST = """
version: 1
model: {path: model}
emulator: {calibration: {data: [mix.jsonl], samples: 64, max_length: 512}, keep_bytes: 0.25}
train: &t
  lora: {r: 8, alpha: 8, target_modules: [q_proj, v_proj]}
  activations: {rank: 0.125, where: sublayer}
  args: {learning_rate: 2.0e-4, max_steps: 500}
correct: {limit: 3.0}
polish: {steps: 10, batch_size: 64}
tasks:
  sql: {train: mix.jsonl, test: mix.jsonl}
  support: {train: [mix.jsonl], test: mix.jsonl, args: {max_steps: 200}, ratio: 0.1}
"""


@dataclass(frozen=True)
class Reader:
    """A file, the reader of it, and how many mutations of it are tried."""

    file: Path
    read: Callable[[], object]
    cases: int

    def mutation(self, right: bytes, generator: random.Random) -> bytes:
        if self.file.suffix in (".json", ".jsonl"):
            return mutated_json(json.loads(right), generator)
        if self.file.suffix == ".yaml":
            if generator.random() < 0.5:
                return mutated_bytes(right, generator)
            return mutated_json(yaml.safe_load(right), generator)  # which is YAML too
        return mutated_header(right, generator)


def mutated_header(right: bytes, generator: random.Random) -> bytes:
    """Write a safetensors file with a fault in its header, in the header's length, or at its end."""
    length = int.from_bytes(right[:8], "little")
    header, data = right[8 : 8 + length], right[8 + length :]
    kind = generator.choice(("header", "header", "header", "length", "data"))
    if kind == "header":
        header = mutated_json(json.loads(header), generator)
    elif kind == "data":
        data = data[: generator.randrange(len(data))]
    length = len(header) if kind != "length" else generator.choice((0, 1, length - 1, length + 1, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + header + data


@contextmanager
def bounded(seconds: float, headroom_bytes: int) -> Iterator[None]:
    """Raise `TimeoutError` after some seconds, `MemoryError` beyond some more address space."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    address_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes + headroom_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def fault_of(read: Callable[[], object]) -> str | None:
    """Return what is wrong with the refusal of a file; None if it was read, or refused correctly."""
    try:
        with bounded(CASE_SECONDS, HEADROOM_BYTES):
            read()
    except InputError as error:
        clear = len(str(error)) <= MESSAGE_CHARACTERS and str(error).isprintable()
        return None if clear else f"message of {len(str(error))}: {str(error)[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model in three shards, its emulator, an adapter, data, a manifest and a store with one artifact."""
    root = tmp_path_factory.mktemp("right")
    model = save_tiny("llama", root / "model", shards=3)
    (root / "mix.jsonl").write_text('{"prompt": "the quick", "completion": "brown fox"}\n')
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (root / "data.jsonl").write_text(json.dumps({"messages": turns}))
    compile_emulator(root / "model", root / "mix.jsonl", root / "emulator", ratio=0.25, samples=1, device="cpu")
    random_adapter(model, root / "adapter", target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4})
    (root / "adapter" / "onelayer.json").write_text(
        json.dumps({"kind": "adapter", "base": {"digest": "a" * 64}, "trained_on": {"digest": "b" * 64}})
    )
    (root / "manifest.yaml").write_text(MANIFEST)
    return root


def checkpoint_weights(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def store_with_one_artifact(root: Path) -> ArtifactStore:
    store = ArtifactStore(root / "home")

    def make(folder: Path) -> dict[str, Any]:
        folder.mkdir()
        (folder / "file").write_text("content")
        return {"report": {"peak_device_bytes": 1}}

    store.ensure(StepSpec(kind="train", step_version=1, fields={"r": 8}, inputs={"data": "d"}), make)
    return store


def use_store(store: ArtifactStore) -> None:
    for row in list_artifacts(store):
        store.find(row["key"])
    store.verify()


def sliced(root: Path) -> None:
    shutil.rmtree(root / "slice", ignore_errors=True)
    slice_emulator(root / "emulator", ratio=0.1, output=root / "slice")


def take_up(root: Path) -> None:
    kind = WorkKind("work", finished="*.done", record="settings.json")
    begin(root / "work", kind, {"steps": 3, "data": {"path": "mix", "rows": 7}}, resume=True)


def resumed_losses(checkpoint: Path) -> list[tuple[int, float]]:
    check_state(checkpoint)
    return logged_losses(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history)


def readers(root: Path) -> dict[str, Reader]:
    """List every reader by name; a reader of several files has a row for each."""
    store = store_with_one_artifact(root)
    record = next(store.root.glob("*/artifact.json"))
    (root / "work").mkdir()
    (root / "work" / "settings.json").write_text(json.dumps({"steps": 3, "data": {"path": "mix", "rows": 7}}))
    (root / "work" / "some.done").write_text("")
    trained = root / "training" / "checkpoint-3"
    trained.mkdir(parents=True)
    history = [{"loss": 2.5, "step": 3}]
    state = {"epoch": 0.5, "global_step": 3, "max_steps": 9, "log_history": history, "stateful_callbacks": {}}
    (trained / "trainer_state.json").write_text(json.dumps(state))
    model, emulator, adapter = root / "model", root / "emulator", root / "adapter"
    shapes = read_shapes(model)
    shard = sorted(model.glob("*.safetensors"))[0]
    return {
        "header": Reader(shard, lambda: checkpoint_weights(model), 300),
        "index": Reader(model / "model.safetensors.index.json", lambda: checkpoint_weights(model), 150),
        "config, streamed": Reader(model / "config.json", lambda: StreamedModel(model), 150),
        "config, planned": Reader(model / "config.json", lambda: read_shapes(model), 100),
        "config, trained": Reader(model / "config.json", lambda: read_model(model, "model"), 60),
        "config, inspected": Reader(model / "config.json", lambda: inspect_path(model), 60),
        "tokenizer config": Reader(model / "tokenizer_config.json", lambda: load_tokenizer(model), 40),
        "tokenizer": Reader(model / "tokenizer.json", lambda: load_tokenizer(model), 40),
        "emulator config": Reader(emulator / "config.json", lambda: Emulator.open(emulator), 150),
        "emulator record, sliced": Reader(emulator / "emulator.json", lambda: sliced(root), 100),
        "emulator record, planned": Reader(
            emulator / "emulator.json", lambda: left_out(shapes, 0.2, read_spectra(emulator)), 100
        ),
        "emulator record, inspected": Reader(emulator / "emulator.json", lambda: inspect_path(emulator), 60),
        "adapter config": Reader(adapter / "adapter_config.json", lambda: Adapter.open(adapter), 150),
        "adapter weights": Reader(adapter / "adapter_model.safetensors", lambda: Adapter.open(adapter), 100),
        "adapter record": Reader(adapter / "onelayer.json", lambda: Adapter.open(adapter).recorded_digest("base"), 60),
        "manifest": Reader(root / "manifest.yaml", lambda: load_manifest(root / "manifest.yaml"), 200),
        "store record": Reader(record, lambda: use_store(store), 100),
        "work record": Reader(root / "work" / "settings.json", lambda: take_up(root), 60),
        "trainer state": Reader(trained / "trainer_state.json", lambda: resumed_losses(trained), 100),
        "rows": Reader(root / "data.jsonl", lambda: read_examples(root / "data.jsonl"), 60),
    }


def test_mutated_documents(place: Path) -> None:
    faults: list[str] = []
    table = readers(place)
    assert sum(reader.cases for reader in table.values()) >= 2000
    for name, reader in table.items():
        generator = random.Random(name)
        right = reader.file.read_bytes()
        assert fault_of(reader.read) is None, name
        for number in range(reader.cases):
            reader.file.write_bytes(reader.mutation(right, generator))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if fault := fault_of(reader.read):
                    faults.append(f"{name} {number}: {fault}")
        reader.file.write_bytes(right)
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
