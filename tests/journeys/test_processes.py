"""Several processes, as `torchrun` starts them: the results of one process, one output, failures in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.launched import Launched, launch
from helpers.peft_adapters import load_original, random_adapter
from helpers.tiny_models import VOCAB, causal, save_tiny, seeded, tiny_tokenizer
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


def test_training_in_two_processes_publishes_one_adapter(place: Path, tmp_path: Path) -> None:
    sizes = ["--batch-size", "2", "--max-length", "16", "--max-steps", "3", "--lora-rank", "2"]
    command = ["train", place / "emulator", "--data", place / "data.jsonl", "--output", tmp_path / "adapter", *sizes]
    launched = launch(2, [*command, "--json"], tmp_path / "logs")
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
def test_a_pass_back_in_two_processes_gives_what_one_gives(place: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4)
    config.vocab_size = VOCAB
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    compile_emulator(tmp_path / "model", place / "data.jsonl", tmp_path / "one", **SMALL, **form, backward=True)
    command = ["compile", tmp_path / "model", "--backward", *options(calibration=place / "data.jsonl", **SMALL, **form)]
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
