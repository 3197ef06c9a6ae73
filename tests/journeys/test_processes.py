"""Several processes, as `torchrun` starts them: the results of one process, and one output."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.children import at_call
from helpers.launched import Launched, launch, options, written
from helpers.launched_work import Call, called, compare_sharded, run_calls
from helpers.media_files import picture
from helpers.peft_adapters import random_adapter
from helpers.tiny_models import causal, save_tiny, tiny_tokenizer
from onelayer.compiler import compile_emulator
from onelayer.compiler.adapters.reader import WEIGHTS_FILE
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.polish.job import PolishJob
from onelayer.compiler.polish.resume import STATE_FILE
from onelayer.compiler.refine.job import UnitTraining
from onelayer.compiler.storage.digests import sha256_file
from onelayer.compiler.storage.safetensors_format import read_header
from scripts.sweep.classifiers import prepare
from scripts.sweep.vision_models import save_vision_model

TEXTS = [f"the quick brown fox {count} jumps over the lazy dog" + " again" * (count % 3) for count in range(7)]
SMALL: dict[str, Any] = {"max_length": 16, "batch_size": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its emulator and data."""
    path: Path = tmp_path_factory.mktemp("processes")
    save_tiny("llama", path / "model")
    compile_emulator(path / "model", texts(path), path / "emulator", **SMALL, keep_bytes=0.4)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer whose rows are long enough for codes."""
    path: Path = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_key_value_heads": 4}
    causal("Llama", **shape).save_pretrained(path)
    tiny_tokenizer(path)
    return path


def printed_by_first(launched: Launched) -> list[Any]:
    """The results that process 0 printed as JSON, once all have ended well."""
    assert set(launched.codes) == {0}, launched.printed
    printed = "\n" + launched.printed
    results: list[Any] = json.JSONDecoder().raw_decode(printed[printed.index("\n{") + 1 :])[0]["results"]
    return results


def by_one(calls: Sequence[Call]) -> list[Any]:
    """The results of calls in this process."""
    return [result.model_dump(mode="json") for result in called(calls)]


def by_several(count: int, calls: Sequence[Call], logs: Path) -> list[Any]:
    """The results of calls in several processes."""
    return printed_by_first(launch(count, [json.dumps(calls, default=str)], logs, work=run_calls))


def texts(path: Path) -> Path:
    """Write an odd number of rows, of several lengths."""
    return written(path / "data.jsonl", [{"text": text} for text in TEXTS])


def weights(directory: Path) -> dict[str, str]:
    """Hashes of the files of tensors."""
    return {file.name: sha256_file(file) for file in directory.glob("*.safetensors")}


def reader_of_images(path: Path) -> tuple[Any, Path]:
    """Save a model that reads images; its rows have one, none or two."""
    for number, size in enumerate([(50, 40), (40, 64)]):
        picture(*size, seed=number).save(path / f"{number}.png")
    said = {"role": "assistant", "content": "a thing"}
    rows = [
        {"images": images, "messages": [{"role": "user", "content": "<image>" * len(images) + "what is it?"}, said]}
        for images in (["0.png"], [], ["0.png", "1.png"])
    ]
    return save_vision_model("llava", path / "model"), written(path / "rows.jsonl", rows)


# What saves a model in a directory with data, and how many processes there are: for images, more than batches.
KINDS: dict[str, tuple[Callable[[Path], tuple[Any, Path]], int]] = {
    "text": (lambda path: (save_tiny("llama", path / "model"), texts(path)), 4),
    "experts": (lambda path: (save_tiny("mixtral", path / "model"), texts(path)), 3),
    "images": (reader_of_images, 4),
    "classes of images": (lambda path: (prepare("vit", path), path / "data"), 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_sums_do_not_depend_on_the_number_of_processes(tmp_path: Path, kind: str) -> None:
    make, count = KINDS[kind]
    original, data = make(tmp_path)
    model, adapter, sizes = tmp_path / "model", tmp_path / "adapter", {"max_length": 256, "batch_size": 1}
    random_adapter(original, adapter, size=0.1, r=2, target_modules=["q_proj"], task_type=None)

    def calls(root: Path) -> list[Call]:
        emulator = root / "emulator"
        given = {"emulator": emulator, "model": model, "data": data, "output": root / "corrected", **sizes}
        return [
            ("compile_emulator", [model, data, emulator], {"ratio": 0.5, **sizes}),
            ("evaluate_model", [model, data], {"adapters": [adapter], "against": emulator, **sizes}),
            ("correct_adapter", [adapter], given),
        ]

    roots = tmp_path / "of one", tmp_path / "of more"
    found = by_one(calls(roots[0])), by_several(count, calls(roots[1]), tmp_path / "logs")
    for one, more in zip(*found, strict=True):
        for result, root in zip((one, more), roots, strict=True):
            del result["report"]
            result.update(json.loads(json.dumps(result).replace(str(root), "")))
        assert one == more
    for name in ("emulator", "corrected"):
        assert weights(roots[0] / name) == weights(roots[1] / name)


FORMS: dict[str, dict[str, Any]] = {
    "coded": {"form": "coded", "keep_bytes": 0.25},
    "factors": {"form": "factors", "ratio": 0.3},
}


@pytest.fixture(scope="module")
def steps(place: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The results, by name, of one and of more processes for what is equal up to rounding; outputs lie in a directory.

    Four processes also go on with what one was stopped in.
    """
    root: Path = tmp_path_factory.mktemp("steps")
    model, data = place / "model", place / "data.jsonl"
    refined = {"model": model, "calibration": data, "steps": 3, "step_samples": 3, **SMALL}
    polished = {"model": model, "data": data, "steps": 2, "batch_size": 4, "lora_rank": 2, "max_length": 16}

    def calls(run: str) -> dict[str, Call]:
        found: dict[str, Call] = {
            "refine": ("refine_emulator", [place / "emulator"], {"output": root / run / "refine", **refined}),
            "polish": ("polish_adapter", [None], {"output": root / run / "polish", **polished}),
        }
        for form, settings in FORMS.items():
            fields = {**SMALL, **settings, "backward": True}
            found[form] = ("compile_emulator", [wide, data, root / run / form], fields)
        return found

    stopped, of_four = ([calls(run)[name] for name in ("refine", "polish")] for run in ("stopped", "four"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONELAYER_HOME", str(root / "home"))
        with patch.context() as stopping:
            for stepping, name in ((UnitTraining, "_train"), (PolishJob, "_step")):
                stopping.setattr(stepping, name, at_call(stepping, name, 2, interrupt))
            for call in stopped:
                with pytest.raises(KeyboardInterrupt):
                    called([call])
        begun = read_header(root / "stopped" / ".polish.polish" / STATE_FILE)[1]["history"]
        one, two = calls("one"), calls("two")
        by_two = by_several(2, [*two.values()], root / "logs")
        by_four = by_several(4, [*of_four, *stopped], root / "logs")
    found = {name: [*pair] for name, *pair in zip(one, by_one([*one.values()]), by_two, strict=True)}
    for name, result in zip(("refine", "polish") * 2, by_four, strict=True):
        found[name].append(result)
    return root, {**found, "begun": json.loads(begun)["steps"]}


def interrupt() -> None:
    """Stop as Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_back_in_two_processes_gives_what_one_gives(steps: tuple[Path, Any], form: str) -> None:
    one, two = (Emulator.open(steps[0] / run / form) for run in ("one", "two"))
    assert one.facts.codes == two.facts.codes
    assert bool(one.facts.codes) == (form == "coded")
    for name in one.facts.compressed:
        (first, second), (other, another) = one.factors(name), two.factors(name)
        found = [a if b is None else a @ b for a, b in ((first, second), (other, another))]
        assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_steps_of_processes_are_those_of_one_up_to_rounding(steps: tuple[Path, dict[str, list[Any]]]) -> None:
    """Also where four processes go on with what one has begun."""
    root, found = steps
    for result in found["refine"][1:]:
        wanted = [unit["after"] for unit in found["refine"][0]["units"]]
        assert [unit["after"] for unit in result["units"]] == pytest.approx(wanted, rel=1e-5)
    for result in found["polish"][1:]:
        wanted = [step["loss"] for step in found["polish"][0]["steps"]]
        assert [step["loss"] for step in result["steps"]] == pytest.approx(wanted, rel=1e-6)
    one, *others = (load_file(root / run / "polish" / WEIGHTS_FILE) for run in ("one", "two", "four", "stopped"))
    for other in others:
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
    # What one process had finished was not done again.
    assert found["polish"][3]["steps"][0] == found["begun"][0]
    assert found["refine"][3]["units"][0] == found["refine"][0]["units"][0]


def test_bad_input_is_one_line_whatever_the_number_of_processes(place: Path, tmp_path: Path) -> None:
    for command, said in (
        (["evaluate", place / "nowhere", "--data", place / "data.jsonl"], "nowhere"),
        (["slice", place / "emulator", "--ratio", "0.2", "--output", tmp_path / "out"], "start it without torchrun"),
    ):
        launched = launch(2, command, tmp_path / "logs")
        assert launched.codes == [2, 2]
        assert launched.printed.count("onelayer: error") == 1
        assert said in launched.printed


def test_one_of_four_processes_prints_though_there_are_fewer_batches(place: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "few.jsonl", [{"text": text} for text in TEXTS[:3]])
    compile_emulator(place / "model", data, tmp_path / "one", **SMALL, keep_bytes=0.4)
    fields = options(calibration=data, output=tmp_path / "four", keep_bytes=0.4, **SMALL)
    launched = launch(4, ["compile", place / "model", *fields, "--json"], tmp_path / "logs")
    assert launched.codes == [0] * 4, launched.printed
    assert launched.printed.count('"linears"') == 1
    assert weights(tmp_path / "four") == weights(tmp_path / "one")


def test_fsdp_spreads_an_emulator_over_the_processes(place: Path, wide: Path, tmp_path: Path) -> None:
    """The packed tensors too: each process holds a part, and losses and gradients are those of the whole emulator."""
    for form in ("factors", "coded"):
        compiled: dict[str, Any] = {"form": form, "keep_bytes": 0.25, "backward": False}
        compile_emulator(wide, place / "data.jsonl", tmp_path / form, **SMALL, **compiled)
    launched = launch(2, [tmp_path / "factors", tmp_path / "coded"], tmp_path / "logs", work=compare_sharded)
    for found in printed_by_first(launched):
        assert found["same_names"]
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
        assert found["error"] < 1e-5 * found["largest"]
        assert sum(found["held_bytes"]) == found["packed_bytes"] > 0
        assert max(found["held_bytes"]) < 0.6 * found["packed_bytes"]
