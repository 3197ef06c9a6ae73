"""Settings of training: names are checked, numbers coerced, and bad values refused before anything is read."""

from typing import Any

import pytest
from trl.trainer.sft_config import SFTConfig

from onelayer.compiler.errors import InputError
from onelayer.runtime.training.settings import TRAINER_NAMES, TrainSettings, lora_fields, trainer_arguments
from onelayer.runtime.training.trainer_args import REFUSED_ARGS, RENAMED_ARGS, TRAINER_DEFAULTS

COMPRESSED = {"model.layers.0.mlp.up_proj": 4}


def check(**keywords: Any) -> None:
    """Run the checks that `train_lora` makes before it reads a model."""
    settings = TrainSettings.of(keywords)
    lora_fields(settings, COMPRESSED)
    trainer_arguments(settings)


def test_numbers_written_as_text_become_numbers() -> None:
    args = {"learning_rate": "1e-4", "warmup_steps": "3", "weight_decay": 0.1, "optim": "adafactor"}
    arguments = trainer_arguments(TrainSettings(args=args))
    assert (arguments["learning_rate"], arguments["warmup_steps"], arguments["optim"]) == (1e-4, 3, "adafactor")
    assert arguments["per_device_train_batch_size"] == 8
    assert trainer_arguments(TrainSettings())["learning_rate"] == 1e-3
    assert SFTConfig.__dataclass_fields__.keys() >= TRAINER_DEFAULTS.keys() | arguments.keys()


def test_old_and_new_names_of_an_argument_are_one() -> None:
    arguments = trainer_arguments(TrainSettings(args={"gradient_checkpointing": "true"}))
    assert arguments["activation_checkpointing"] is True
    assert "gradient_checkpointing" not in arguments


def test_every_name_exists_in_the_installed_trl() -> None:
    names = {*REFUSED_ARGS, *RENAMED_ARGS, *RENAMED_ARGS.values(), *TRAINER_DEFAULTS, *TRAINER_NAMES.values()}
    assert names <= SFTConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"args": {"learning_rte": 1}}, r"args\.learning_rte: unknown field, nearest is `learning_rate`"),
        ({"args": {"learning_rate": "fast"}}, r"args\.learning_rate: .*'fast'"),
        ({"args": {"learning_rate": 1e-3}, "learning_rate": 1e-2}, r"learning_rate is 0\.01 and args\.learning_rate"),
        ({"args": {"output_dir": "x"}}, r"args\.output_dir: cannot be set here"),
        ({"args": {"eval_strategy": "steps"}}, "give eval_data and eval_steps"),
        ({"lora": {"rank": 4}}, r"lora\.rank: unknown field"),
        ({"lora": {"r": 16}, "lora_rank": 4}, r"lora_rank is 4 and lora\.r is 16"),
        ({"lora": {"use_dora": True}}, r"lora\.use_dora: DoRA"),
        ({"lora": {"init_lora_weights": "pissa_niter_4"}}, r"lora\.init_lora_weights: PiSSA"),
        ({"lora": {"init_lora_weights": "olora"}}, "OLoRA"),
        ({"lora": {"lora_bias": True}}, "lora_bias"),
        ({"lora": {"kasa_config": {"beta": 1}}}, "KaSA"),
        ({"lora": {"modules_to_save": ["up_proj"]}}, r"layers\.0\.mlp\.up_proj is compressed"),
        ({"epochs": 1, "max_steps": 2}, "max_steps and epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(**settings)


def test_modules_that_are_not_compressed_may_be_saved() -> None:
    fields = lora_fields(TrainSettings(lora={"modules_to_save": ["lm_head"]}), {"model.layers.0.mlp.up_proj": 4})
    assert fields.modules_to_save == ["lm_head"]
