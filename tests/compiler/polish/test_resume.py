"""A polish that is stopped or killed, or whose loss is not finite: what resumes, what is kept, what is refused."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.children import fork_server
from helpers.polish_runs import polished, prepare, same, weights
from onelayer.compiler.errors import InputError
from onelayer.compiler.polish.resume import PolishState
from onelayer.compiler.storage.files import read_json


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def test_a_stopped_run_goes_on_where_it_was(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = polished(setup, output=setup / "whole", steps=4, eval_data=setup / "dev.jsonl")
    real = PolishState.save

    def stopping(self: PolishState, directory: Path) -> None:
        real(self, directory)
        if len(self.steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PolishState, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        polished(setup, steps=4, eval_data=setup / "dev.jsonl")
    monkeypatch.setattr(PolishState, "save", real)
    assert not (setup / "out").exists()
    with pytest.raises(InputError, match="learning_rate"):
        polished(setup, steps=4, eval_data=setup / "dev.jsonl", learning_rate=0.1)
    result = polished(setup, steps=4, eval_data=setup / "dev.jsonl")
    assert same(setup / "whole", setup / "out")
    assert [step.loss for step in result.steps] == [step.loss for step in expected.steps]
    assert result.held_out == expected.held_out
    assert not (setup / ".out.polish").exists()


def polished_here(setup: Path, home: str) -> None:
    os.environ["ONELAYER_HOME"] = home
    torch.set_num_threads(1)  # as these tests do: sums over several threads come out otherwise
    polished(setup, steps=14)


def test_a_kill_loses_the_step_in_progress_and_no_more(setup: Path, own_store: Path) -> None:
    whole = polished(setup, output=setup / "whole", steps=14)
    state = setup / ".out.polish" / "state.safetensors"
    for finished in (1, 5):
        process = fork_server().Process(target=polished_here, args=(setup, str(own_store)))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline and steps_in(state) < finished:
            time.sleep(0.01)
        assert process.is_alive(), "the run ended before it could be killed"
        process.kill()
        process.join()
        assert steps_in(state) >= finished
    result = polished(setup, steps=14)
    assert same(setup / "whole", setup / "out")
    assert [step.loss for step in result.steps] == [step.loss for step in whole.steps]


def steps_in(state: Path) -> int:
    from safetensors import safe_open

    if not state.is_file():
        return 0
    with safe_open(state, framework="pt") as file:
        return len(json.loads(file.metadata()["history"])["steps"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_steps_before(setup: Path) -> None:
    with pytest.raises(RuntimeError, match=r"step 2: the loss is not finite.*holds the adapter of the 1 steps"):
        polished(setup, learning_rate=1e30, max_gradient_norm=1e30)
    assert all(tensor.isfinite().all() for tensor in weights(setup / "out").values())
    record = read_json(setup / "out" / "onelayer.json")
    assert len(record["steps"]) == 1
    assert "not finite" in record["stopped"]


def test_a_loss_that_is_never_finite_leaves_nothing(setup: Path) -> None:
    file = setup / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))].fill_(1e38)
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match="step 1: the loss is not finite"):
        polished(setup)
    assert not (setup / "out").exists()
