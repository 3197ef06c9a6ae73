"""Several processes, as `torchrun` starts them: the results of one process, one output, failures in one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser  # type: ignore[import-untyped]
from accelerate.utils.launch import prepare_multi_gpu_env  # type: ignore[import-untyped]
from safetensors.torch import load_file

from helpers.launched import Launched, launch
from helpers.launched_work import compare_sharded, run_with_environment, run_with_full_disk
from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import causal, save_tiny, tiny_tokenizer
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, polish_adapter, refine_emulator
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.storage.digests import sha256_file

TEXTS = [f"the quick brown fox {count} jumps over the lazy dog" + " again" * (count % 3) for count in range(7)]
SMALL: dict[str, Any] = {"max_length": 16, "batch_size": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its emulator, an adapter and data: an odd number of rows, of several lengths."""
    path: Path = tmp_path_factory.mktemp("processes")
    save_tiny("llama", path / "model")
    (path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    compile_emulator(path / "model", path / "data.jsonl", path / "emulator", **SMALL, keep_bytes=0.4)
    random_adapter(load_original(path / "model"), path / "adapter", size=0.1, r=2, target_modules=["q_proj"])
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer whose rows are long enough for codes."""
    path: Path = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_key_value_heads": 4}
    causal("Llama", **shape).save_pretrained(path)
    tiny_tokenizer(path)
    return path


def document(launched: Launched) -> Any:
    """The JSON that process 0 printed, once all have ended well."""
    assert set(launched.codes) == {0}, launched.printed
    printed = "\n" + launched.printed
    return json.JSONDecoder().raw_decode(printed[printed.index("\n{") + 1 :])[0]


def weights(directory: Path) -> dict[str, str]:
    """Hashes of the files of tensors."""
    return {file.name: sha256_file(file) for file in directory.glob("*.safetensors")}


def options(**fields: Any) -> list[Any]:
    """Command-line options of these names."""
    return [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]


def accelerated(count: int) -> dict[str, str]:
    """The variables that `accelerate launch` sets for its processes."""
    given = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    chosen = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    found: dict[str, str] = prepare_multi_gpu_env(
        launch_command_parser().parse_args([*given, *chosen, "--module", "onelayer.runtime"])
    )
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_training_in_two_processes_publishes_one_adapter(place: Path, tmp_path: Path, launcher: str) -> None:
    sizes = ["--batch-size", "2", "--max-length", "16", "--max-steps", "3", "--lora-rank", "2"]
    command = ["train", place / "emulator", "--data", place / "data.jsonl", "--output", tmp_path / "adapter", *sizes]
    variables = accelerated(2) if launcher == "accelerate launch" else {}
    assert bool(variables) == (launcher == "accelerate launch")
    launched = launch(2, [json.dumps(variables), *command, "--json"], tmp_path / "logs", work=run_with_environment)
    assert launched.codes == [0, 0], launched.printed
    assert launched.printed.count('"train_loss"') == 1
    assert len(Adapter.open(tmp_path / "adapter").modules) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "logs"}


def test_anchored_training_in_two_processes_is_that_of_one(place: Path, tmp_path: Path) -> None:
    """Each process anchors its own rows: half of each step's, whose batch is twice as large in one process."""
    sizes = ["--max-length", "16", "--max-steps", "4", "--lora-rank", "2", "--learning-rate", "0.01"]
    anchor = ["--model", place / "model", "--anchor-every", "3", "--anchor-bits", "32"]
    # An even number of rows: of an odd one, the last step of an epoch would take a row twice in two processes.
    data = tmp_path / "even.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, TEXTS[0]]))
    found = []
    for count in (1, 2):
        command = ["train", place / "emulator", "--data", data, "--output", tmp_path / f"of {count}"]
        launched = launch(count, [*command, *sizes, *anchor, "--batch-size", 4 // count], tmp_path / f"logs {count}")
        assert launched.codes == [0] * count, launched.printed
        found.append(json.loads((tmp_path / f"of {count}" / "onelayer.json").read_text())["training"])
    one, two = found
    assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in one["losses"]], rel=1e-4)
    assert one["losses"][3] != one["losses"][0]
    # Each epoch has two steps. Each process reads the original once for each renewal.
    assert two["anchors"]["renewals"] == one["anchors"]["renewals"] == 2
    assert two["anchors"]["bytes_read"] == pytest.approx(one["anchors"]["bytes_read"], rel=0.05)
    assert two["anchors"]["offset_bytes"] < one["anchors"]["offset_bytes"]


@pytest.mark.parametrize("form", [{"form": "coded", "keep_bytes": 0.25}, {"form": "factors", "ratio": 0.3}], ids=str)
def test_a_pass_back_in_two_processes_gives_what_one_gives(
    place: Path, wide: Path, tmp_path: Path, form: dict[str, Any]
) -> None:
    compile_emulator(wide, place / "data.jsonl", tmp_path / "one", **SMALL, **form, backward=True)
    command = ["compile", wide, "--backward", *options(calibration=place / "data.jsonl", **SMALL, **form)]
    document(launch(2, [*command, "--output", tmp_path / "two", "--json"], tmp_path / "logs"))
    one, two = (Emulator.open(tmp_path / name) for name in ("one", "two"))
    assert one.facts.codes == two.facts.codes
    assert bool(one.facts.codes) == (form["form"] == "coded")
    for name in one.facts.compressed:
        (first, second), (other, another) = one.factors(name), two.factors(name)
        found = [a if b is None else a @ b for a, b in ((first, second), (other, another))]
        assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_bad_input_is_one_line_whatever_the_number_of_processes(place: Path, tmp_path: Path) -> None:
    command = ["evaluate", place / "nowhere", "--data", place / "data.jsonl"]
    launched = launch(2, command, tmp_path / "logs")
    assert launched.codes == [2, 2]
    assert launched.printed.count("onelayer: error") == 1
    refused = launch(
        2, ["slice", place / "emulator", "--ratio", "0.2", "--output", tmp_path / "out"], tmp_path / "more"
    )
    assert refused.codes == [2, 2]
    assert "start it without torchrun" in refused.printed


def test_sums_do_not_depend_on_the_number_of_processes(place: Path, tmp_path: Path) -> None:
    model, data = place / "model", place / "data.jsonl"
    compiled = ["compile", model, *options(calibration=data, output=tmp_path / "emulator", keep_bytes=0.4, **SMALL)]
    document(launch(3, [*compiled, "--json"], tmp_path / "logs"))
    assert weights(tmp_path / "emulator") == weights(place / "emulator")

    scored = evaluate_model(model, data, adapters=[place / "adapter"], against=place / "emulator", **SMALL)
    command = ["evaluate", model, *options(data=data, adapter=place / "adapter", against=place / "emulator", **SMALL)]
    found = document(launch(2, [*command, "--json"], tmp_path / "logs"))
    assert found["results"] == scored.model_dump(mode="json")["results"]
    assert scored.against is not None
    assert found["against"]["kl_per_token"] == scored.against.kl_per_token

    given: dict[str, Any] = {"emulator": place / "emulator", "model": model, "data": data}
    correct_adapter(place / "adapter", output=tmp_path / "one", **given)
    document(
        launch(
            2, ["correct", place / "adapter", *options(output=tmp_path / "two", **given), "--json"], tmp_path / "logs"
        )
    )
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_steps_of_several_processes_are_those_of_one_up_to_rounding(place: Path, tmp_path: Path) -> None:
    model, data = place / "model", place / "data.jsonl"
    steps: dict[str, Any] = {"steps": 3, "step_samples": 3, **SMALL}
    refined = refine_emulator(place / "emulator", model=model, calibration=data, output=tmp_path / "refined", **steps)
    fields = {"model": model, "calibration": data, "output": tmp_path / "refined-by-two", **steps}
    found = document(launch(2, ["refine", place / "emulator", *options(**fields), "--json"], tmp_path / "logs"))
    wanted = [unit.after for unit in refined.units]
    assert [unit["after"] for unit in found["units"]] == pytest.approx(wanted, rel=1e-5)

    steps = {"steps": 2, "batch_size": 4, "lora_rank": 2, "max_length": 16}
    polished = polish_adapter(None, model=model, data=data, output=tmp_path / "polished", **steps)
    fields = {"model": model, "data": data, "output": tmp_path / "polished-by-two", **steps}
    found = document(launch(2, ["polish", *options(**fields), "--json"], tmp_path / "logs"))
    assert [step["loss"] for step in found["steps"]] == pytest.approx([step.loss for step in polished.steps], rel=1e-6)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("polished", "polished-by-two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_a_killed_process_ends_the_others_at_once_and_one_process_resumes(tmp_path: Path) -> None:
    causal("Llama", num_hidden_layers=6).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    compiled = ["compile", tmp_path / "model", *options(calibration=data, output=tmp_path / "cut", ratio=0.5, **SMALL)]
    first_unit = tmp_path / ".cut.compile" / "unit-00000.json"
    launched = launch(2, compiled, tmp_path / "logs", kill=(1, first_unit))
    assert launched.codes == [1, -9], launched.printed
    assert launched.printed.count("onelayer: error") == 1
    assert "another process" in launched.printed
    assert launched.seconds < 10
    assert first_unit.exists()
    compile_emulator(tmp_path / "model", data, tmp_path / "cut", ratio=0.5, **SMALL)
    compile_emulator(tmp_path / "model", data, tmp_path / "whole", ratio=0.5, **SMALL)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("form", ["factors", "coded"])
def test_fsdp_spreads_an_emulator_over_the_processes(place: Path, wide: Path, tmp_path: Path, form: str) -> None:
    """The packed tensors too: each process holds a part, and losses and gradients are those of the whole emulator."""
    compiled: dict[str, Any] = {"form": form, "keep_bytes": 0.25, "backward": False}
    compile_emulator(wide, place / "data.jsonl", tmp_path / "emulator", **SMALL, **compiled)
    found = document(launch(2, [tmp_path / "emulator"], tmp_path / "logs", work=compare_sharded))
    assert found["same_names"]
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    assert found["error"] < 1e-5 * found["largest"]
    assert sum(found["held_bytes"]) == found["packed_bytes"] > 0
    assert max(found["held_bytes"]) < 0.6 * found["packed_bytes"]


def test_more_processes_than_batches(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": TEXTS[0]}))
    compile_emulator(place / "model", data, tmp_path / "one", **SMALL, keep_bytes=0.4)
    compiled = ["compile", place / "model", *options(calibration=data, output=tmp_path / "two", keep_bytes=0.4)]
    document(launch(2, [*compiled, *options(**SMALL), "--json"], tmp_path / "logs"))
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def failed(launched: Launched, message: str) -> None:
    """Check that all processes failed soon, and that one of them said why."""
    assert 0 not in launched.codes, launched.printed
    assert launched.printed.count("onelayer: error") == 1, launched.printed
    assert message in launched.printed
    assert launched.seconds < 10


TRAINED = {"batch_size": 1, "max_length": 16, "lora_rank": 2, "save_steps": 1}


def test_a_full_disk_in_one_process_of_a_training_ends_all(place: Path, tmp_path: Path) -> None:
    command = ["train", place / "emulator", *options(data=place / "data.jsonl", output=tmp_path / "out", **TRAINED)]
    failed(launch(2, command, tmp_path / "logs", work=run_with_full_disk), "the disk is full")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path: Path) -> None:
    """One of two rows has the token of the broken embedding, so one process alone sees it in the first step."""
    model = causal("Llama", tie_word_embeddings=False)
    tokenizer = tiny_tokenizer(tmp_path / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("?")] = float("nan")
    model.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("the quick fox", "the quick fox?")))
    command = ["train", tmp_path / "model", *options(data=data, output=tmp_path / "out", **TRAINED)]
    failed(launch(2, command, tmp_path / "logs"), "the loss is nan in step 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_of_a_training_ends_the_other(place: Path, tmp_path: Path, rank: int) -> None:
    fields = {**TRAINED, "data": place / "data.jsonl", "output": tmp_path / "out", "max_steps": 1000}
    launched = launch(
        2,
        ["train", place / "emulator", *options(**fields)],
        tmp_path / "logs",
        kill=(rank, tmp_path / ".out.training" / "checkpoint-1" / "complete"),
    )
    assert launched.codes[rank] == -9
    failed(launched, "another process")
    assert not (tmp_path / "out").exists()
