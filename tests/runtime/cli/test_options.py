"""The frozen option set, its help, and its defaults, which are those of the Python functions."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import onelayer.compiler
import onelayer.runtime
from onelayer.runtime.cli.app import app
from onelayer.runtime.cli.main import main

# Scripts and manifests depend on these names: a change here affects every user.
OPTIONS = {
    "plan": (
        "MODEL --batch-size --emulator --factor-dtype --form --host-memory --hours --image-side --images --json "
        "--lora-rank --max-length --max-steps --memory"
    ),
    "compile": (
        "MODEL --backward --batch-size --calibration --columns --config --device --factor-dtype --form --host-memory "
        "--json --keep-bytes --max-image-pixels --max-length --memory --output --rank-allocation --ratio --resume "
        "--samples --seed --solver --split"
    ),
    "encode": (
        "MODEL --class-data --class-prompt --data --device --guidance --instance-prompt --json --output --resolution "
        "--resume --seed"
    ),
    "slice": "EMULATOR --json --output --ratio",
    "refine": (
        "EMULATOR --backward --batch-size --calibration --columns --config --device --host-memory --inputs --json "
        "--learning-rate --max-image-pixels --max-length --model --output --resume --samples --seed --split "
        "--step-samples --steps"
    ),
    "train": (
        "EMULATOR --activation-rank --activation-report --activations --anchor-bits --anchor-every --batch-size "
        "--cache --columns --config --data --dropout --epochs --eval-data --eval-steps --gradient-accumulation --json "
        "--learning-rate --lora-alpha --lora-rank --max-image-pixels --max-length --max-steps --method "
        "--micro-batch-size --model --output --prior-weight --report-to --resume --sample-prompt "
        "--sample-resolution --sample-steps --save-steps --seed --split --target-modules --warmup --way --weighting"
    ),
    "correct": (
        "ADAPTER --columns --config --data --emulator --json --limit --max-image-pixels --model --output --split"
    ),
    "polish": (
        "ADAPTER --activations --batch-size --columns --config --data --device --eval-data --eval-steps --host-memory "
        "--json --learning-rate --lora-alpha --lora-rank --max-gradient-norm --max-image-pixels --max-length "
        "--micro-batch-size --model --output --packing --prior-weight --resume --seed --split --steps "
        "--target-modules --warmup-steps --weighting"
    ),
    "merge": "ADAPTER... --json --model --output --weight",
    "evaluate": (
        "MODEL --adapter --against --batch-size --columns --config --data --device --json --max-image-pixels "
        "--max-length --noise-samples --split"
    ),
    "sample": "MODEL --adapter --device --json --output --prompt --resolution --resume --seed --steps",
    "generate": "MODEL --adapter --chat --json --max-new-tokens --prompt --revision --seed --temperature",
    "inspect": "PATH --json --plot",
    "run": "MANIFEST --dry-run --json --task",
    "artifacts list": "--json",
    "artifacts verify": "--json",
    "artifacts prune": "--dry-run --json --keep --max-size --older-than-days",
}
FUNCTIONS = {
    "plan": "plan_run",
    "compile": "compile_emulator",
    "encode": "encode_images",
    "slice": "slice_emulator",
    "refine": "refine_emulator",
    "train": "train_lora",
    "correct": "correct_adapter",
    "polish": "polish_adapter",
    "merge": "merge_adapter",
    "evaluate": "evaluate_model",
    "generate": "generate_text",
    "sample": "sample_pictures",
}


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def words(command: Any) -> str:
    arguments = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
    options = [name for p in command.params if p.param_type_name == "option" for name in p.opts if name != "--help"]
    return " ".join([*arguments, *sorted(options)])


def test_the_option_set_is_frozen() -> None:
    assert {name: words(command) for name, command in commands(typer.main.get_command(app))} == OPTIONS


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in commands(typer.main.get_command(app)):
        with pytest.raises(SystemExit) as ended:
            main([*name.split(), "--help"])
        assert ended.value.code == 0
        assert "Usage: onelayer" in capsys.readouterr().out
        assert all(parameter.help for parameter in command.params), name
        if " " not in name:
            assert f"onelayer {name}" in str(command.help), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_are_those_of_the_python_function(name: str) -> None:
    module: Any = onelayer.runtime if name in ("plan", "train", "generate") else onelayer.compiler
    parameters = inspect.signature(getattr(module, FUNCTIONS[name])).parameters
    command = dict(commands(typer.main.get_command(app)))[name]
    # `--adapter` repeated is `adapters`; the options of `reads_data` are fields of `data_set`; `compile --memory` only
    # chooses the ratio.
    own = {"as_json", "help", "adapter", "columns", "split", "config", *({"memory_bytes"} if name == "compile" else ())}
    for parameter in command.params:
        if parameter.name not in own:
            default = parameters[parameter.name].default
            expected = None if default is inspect.Parameter.empty else default
            assert parameter.default == expected, parameter.name
