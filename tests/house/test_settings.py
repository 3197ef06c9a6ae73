"""Each setting is declared once; signature, command, manifest and planner follow its model."""

import inspect
from typing import Any, get_type_hints

import pytest

import onelayer.compiler
import onelayer.runtime
from helpers.reimported import printed_by
from onelayer.compiler.compile.settings import CompileKeywords, CompileSettings
from onelayer.compiler.correct.settings import CorrectKeywords, CorrectSettings
from onelayer.compiler.encode.settings import EncodeKeywords, EncodeSettings
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.settings import EvaluateKeywords, EvaluateSettings
from onelayer.compiler.polish.settings import PolishKeywords, PolishSettings
from onelayer.compiler.refine.settings import RefineKeywords, RefineSettings
from onelayer.compiler.sampling.settings import SampleKeywords, SampleSettings
from onelayer.compiler.settings import Settings
from onelayer.runtime.streamed.settings import StreamedKeywords, StreamedSettings
from onelayer.runtime.training.settings import TrainKeywords, TrainSettings

PASSES: list[tuple[Any, type[Settings], type]] = [
    (onelayer.compiler.compile_emulator, CompileSettings, CompileKeywords),
    (onelayer.compiler.refine_emulator, RefineSettings, RefineKeywords),
    (onelayer.compiler.correct_adapter, CorrectSettings, CorrectKeywords),
    (onelayer.compiler.polish_adapter, PolishSettings, PolishKeywords),
    (onelayer.compiler.encode_images, EncodeSettings, EncodeKeywords),
    (onelayer.compiler.sample_pictures, SampleSettings, SampleKeywords),
    (onelayer.compiler.evaluate_model, EvaluateSettings, EvaluateKeywords),
    (onelayer.runtime.train_lora, TrainSettings, TrainKeywords),
    (onelayer.runtime.streamed_for_training, StreamedSettings, StreamedKeywords),
]
# Changes the source of settings modules during their import, then prints every default that should follow.
PROBE = """
import importlib.util, inspect, json, sys
from importlib.machinery import SourceFileLoader

for module in dict.fromkeys(module for module, _, _ in argument):
    spec = importlib.util.find_spec(module)
    source = SourceFileLoader(module, spec.origin).get_source(module)
    for old, new in (change[1:] for change in argument if change[0] == module):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    changed = importlib.util.module_from_spec(spec)
    sys.modules[module] = changed
    exec(compile(source, spec.origin, "exec"), changed.__dict__)

import typer.main
import onelayer.compiler, onelayer.runtime
from onelayer.runtime.cli.app import app
from onelayer.runtime.manifest import sections
from onelayer.runtime.pipeline import emulator_size
from onelayer.runtime.planning import plan, speed, train_memory

seen = {}
for name in ("compile_emulator", "refine_emulator", "correct_adapter", "polish_adapter", "evaluate_model"):
    seen[name] = inspect.signature(getattr(onelayer.compiler, name)).parameters
seen |= {name: inspect.signature(getattr(onelayer.runtime, name)).parameters for name in ("train_lora", "plan_run")}
found = {f"{name}.{key}": item.default for name, items in seen.items() for key, item in items.items()}
for name, command in typer.main.get_command(app).commands.items():
    found |= {f"{name} {item.name}": item.default for item in command.params}
for name, section in vars(sections).items():
    if isinstance(section, type) and issubclass(section, sections.Section):
        found |= {f"{name}:{key}": field.default for key, field in section.model_fields.items()}
found |= {"planned": plan.SAMPLES, "polished": plan.POLISH_BATCH, "trained": emulator_size.DEFAULT_BATCH_SIZE}
found |= {"refined": speed.REFINE_SAMPLES, "refined tokens": speed.REFINE_TRAINED // 8}
found |= {"planned rank": train_memory.PlannedRun.lora_rank}
print(json.dumps(found, default=str))
"""


# Module, what declares the default, and the places that follow; each gets a value of its own. Others import the first.
CHANGES = [
    (
        "onelayer.compiler.settings",
        "max_length: MaxLength = 512",
        "compile_emulator.max_length/train_lora.max_length/plan_run.max_length/evaluate_model.max_length/"
        "compile max_length/polish max_length/plan max_length/Calibration:max_length/Training:max_length",
    ),
    (
        "onelayer.compiler.compile.settings",
        "samples: Samples = 64",
        "compile_emulator.samples/compile samples/Calibration:samples/planned",
    ),
    (
        "onelayer.compiler.refine.settings",
        'description="Training steps for each layer.")] = 100',
        "refine_emulator.steps/refine steps/Refine:steps/refined tokens",
    ),
    (
        "onelayer.compiler.refine.settings",
        "samples: Samples = 256",
        "refine_emulator.samples/refine samples/Refine:samples/refined",
    ),
    (
        "onelayer.compiler.polish.settings",
        'description="Examples per step.")] = 64',
        "polish_adapter.batch_size/polish batch_size/Polish:batch_size/polished",
    ),
    (
        "onelayer.runtime.training.settings",
        "batch_size: BatchSize = 8",
        "train_lora.batch_size/train batch_size/plan_run.batch_size/plan batch_size/trained",
    ),
    (
        "onelayer.runtime.training.settings",
        "lora_rank: LoraRank = 8",
        "train_lora.lora_rank/train lora_rank/plan_run.lora_rank/plan lora_rank/Lora:r/planned rank",
    ),
]


@pytest.fixture(scope="module")
def changed_defaults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Map every place to its default in a process whose settings modules declare 77, 78, ... for `CHANGES`."""
    changes = [
        (module, declared, f"{declared.rpartition(' ')[0]} {value}")
        for value, (module, declared, _) in enumerate(CHANGES, 77)
    ]
    defaults: dict[str, Any] = printed_by(PROBE, changes, tmp_path_factory.mktemp("defaults"))
    return defaults


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=[declared for _, declared, _ in CHANGES])
def test_a_changed_default_is_seen_everywhere(changed_defaults: dict[str, Any], number: int) -> None:
    places = CHANGES[number][2].split("/")
    assert {place: changed_defaults[place] for place in places} == dict.fromkeys(places, 77 + number)


@pytest.mark.parametrize(("function", "model", "keywords"), PASSES)
def test_keywords_model_and_signature_agree(function: Any, model: type[Settings], keywords: type) -> None:
    parameters = inspect.signature(function).parameters
    assert get_type_hints(keywords).keys() == model.model_fields.keys() <= parameters.keys()
    assert all(parameters[name].default == field.default for name, field in model.model_fields.items())
    assert all(field.description for field in model.model_fields.values())
    # The source lists only what is read and written, and gives defaults only for what may be absent.
    own = set(parameters) - model.model_fields.keys()
    assert all(parameters[name].default in (inspect.Parameter.empty, None, ()) for name in own)


@pytest.mark.parametrize(("function", "model", "keywords"), PASSES)
def test_unknown_keywords_are_refused_by_name(function: Any, model: type[Settings], keywords: type) -> None:
    parameters = inspect.signature(function).parameters.values()
    required = {item.name: "none" for item in parameters if item.default is inspect.Parameter.empty}
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        function(**required, sample=1)


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        (CompileSettings, {"samples": 0}, "--samples 0: must be at least 1"),
        (CompileSettings, {"max_length": 1}, "--max-length 1: must be at least 2"),
        (CompileSettings, {"solver": "best"}, "--solver best: is none of exact, fast"),
        (CompileSettings, {"ratio": 0.2, "keep_bytes": 0.2}, "--ratio and --keep-bytes say the same in two ways"),
        (CompileSettings, {"ratio": float("nan")}, "--ratio nan: must lie between 0 and 1, for example 0.25"),
        (RefineSettings, {"learning_rate": 0}, "--learning-rate 0: must be above 0, for example 0.01"),
        (RefineSettings, {"host_memory_bytes": "much"}, "--host-memory much: "),
        (PolishSettings, {"warmup_steps": 10}, "--warmup-steps 10: must lie between 0 and --steps 10"),
        (PolishSettings, {"activations": 1.5}, "--activations 1.5: must be a number of rows, or a share"),
        (PolishSettings, {"max_gradient_norm": float("nan")}, "--max-gradient-norm nan: must be greater than 0"),
        (TrainSettings, {"sample_steps": 4}, "--sample-steps: nothing is drawn; give --sample-prompt too"),
        (TrainSettings, {"sample_prompt": [" "]}, "sample_prompt[0]: "),
        (TrainSettings, {"batch_size": 0}, "batch_size: input should be greater than 0, not 0"),
    ],
)
def test_a_wrong_value_is_named_by_its_option(model: type[Settings], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        model.of(keywords)
    assert str(caught.value).startswith(message)
