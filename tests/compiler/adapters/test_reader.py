"""Adapter files read and written without the model: PEFT is the oracle of what they mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, KasaConfig, PeftModel, VeloraConfig
from safetensors.torch import load_file, save_file

from helpers.peft_adapters import ATTENTION, deltas, load_adapter, quiet_peft, random_adapter
from helpers.tiny_models import TINY, tiny_llama
from onelayer.compiler.adapters.reader import Adapter, adapter_digest
from onelayer.compiler.adapters.writer import Base, write_adapter
from onelayer.compiler.errors import InputError

LLAMA = Base("org/original", "abc", "LlamaForCausalLM", "transformers.models.llama.modeling_llama", False)

PLAIN: dict[str, dict[str, Any]] = {
    "alpha differs from r": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, r"layers\..*\.down_proj": 3},
    },
    "patterns and rslora": {
        "r": 4,
        "use_rslora": True,
        "target_modules": r".*\.(q_proj|up_proj)",
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"up_proj": 32},
    },
    "embedding and head": {"r": 4, "lora_alpha": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "one layer": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "qalora flag": {"r": 2, "target_modules": ["q_proj"], "use_qalora": True},
    "velora": {"r": 2, "target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)},
}


@pytest.fixture(params=PLAIN, ids=lambda name: name.replace(" ", "_"))
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PeftModel, Path]:
    return random_adapter(tiny_llama(), tmp_path / "adapter", **PLAIN[request.param]), tmp_path / "adapter"


def product(adapter: Adapter, name: str) -> torch.Tensor:
    a, b = adapter.factors(name)
    delta = adapter.modules[name].scaling * b @ a
    return delta.T if adapter.modules[name].embedding else delta


def test_the_deltas_are_those_of_peft(plain: tuple[PeftModel, Path]) -> None:
    adapted, directory = plain
    adapter, wanted = Adapter.open(directory), deltas(adapted)
    assert adapter.modules.keys() == wanted.keys()
    assert len(wanted) > 0
    for name, delta in wanted.items():
        torch.testing.assert_close(product(adapter, name), delta)


def test_written_uniform_it_computes_the_same(plain: tuple[PeftModel, Path], tmp_path: Path) -> None:
    adapted, directory = plain
    source = Adapter.open(directory)
    factors = {
        name: (source.factors(name)[0], m.scaling * source.factors(name)[1]) for name, m in source.modules.items()
    }
    output = tmp_path / "out"
    output.mkdir()
    write_adapter(
        output,
        factors,
        source=source,
        base=LLAMA,
        targets=sorted(source.modules),
        provenance={"kind": "adapter", "corrected": True},
    )

    rank = max(module.rank for module in source.modules.values())
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["target_modules"] == sorted(source.modules)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/original", "abc")
    back = Adapter.open(output)
    assert {module.scaling for module in back.modules.values()} == {1.0}

    loaded = load_adapter(tiny_llama(), output)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


CARRIED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [5, 3]},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [7]}},
    "bias all": {"bias": "all"},
    "bias of adapted": {"bias": "lora_only"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("options", CARRIED.values(), ids=[name.replace(" ", "_") for name in CARRIED])
def test_other_contents_are_carried_through(options: dict[str, Any], tmp_path: Path) -> None:
    adapted = random_adapter(TINY["qwen2"](), tmp_path / "a", **{"r": 2, "target_modules": ["q_proj"], **options})
    source = Adapter.open(tmp_path / "a")
    assert source.dense or source.token_rows
    factors = {
        name: (source.factors(name)[0], m.scaling * source.factors(name)[1]) for name, m in source.modules.items()
    }
    (tmp_path / "out").mkdir()
    write_adapter(
        tmp_path / "out",
        factors,
        source=source,
        base=LLAMA,
        targets=sorted(source.modules),
        provenance={"kind": "adapter"},
    )
    before, after = (
        load_file(tmp_path / "a/adapter_model.safetensors"),
        load_file(tmp_path / "out/adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    carried = [key for key in before if "lora_" not in key]
    assert carried
    assert all(torch.equal(before[key], after[key]) for key in carried)
    loaded = load_adapter(TINY["qwen2"](), tmp_path / "out")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_digest_follows_config_and_weights_only(tmp_path: Path) -> None:
    random_adapter(tiny_llama(), tmp_path / "a", r=2, target_modules=["q_proj"])
    digest = adapter_digest(tmp_path / "a")
    (tmp_path / "a/README.md").write_text("other")
    assert adapter_digest(tmp_path / "a") == digest
    edit(tmp_path / "a", lora_alpha=9)
    assert adapter_digest(tmp_path / "a") != digest


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def saved(directory: Path, **config: Any) -> Path:
    random_adapter(TINY["qwen2"](), directory, **{"r": 2, "target_modules": ["q_proj"], **config})
    return directory


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "mica"}, "MiCA"),
        ({"kasa_config": KasaConfig()}, "KaSA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variant_saved_by_peft_is_refused_by_name(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=name):
        Adapter.open(saved(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
        ({"init_lora_weights": "brandnew"}, "init_lora_weights is 'brandnew'"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"monteclora_config": {"samples": 4}}, "MonteCLoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_future": True}, "field use_future is not known"),
        ({"r": 0}, "field r:"),
        ({"r": "2"}, "field r:"),
        ({"lora_alpha": None}, "field lora_alpha:"),
        ({"r": 3}, "has rank 2, but adapter_config.json"),
        ({"rank_pattern": {"q_proj": 5}}, r"says 5"),
    ],
)
def test_an_untrustworthy_configuration_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    edit(saved(tmp_path / "a"), **fields)
    with pytest.raises(InputError, match=message):
        Adapter.open(tmp_path / "a")


@pytest.mark.parametrize("fields", [{"init_lora_weights": "eva"}, {"use_future": False}, {"other_future": None}])
def test_harmless_fields_are_accepted(fields: dict[str, Any], tmp_path: Path) -> None:
    edit(saved(tmp_path / "a"), **fields)
    assert len(Adapter.open(tmp_path / "a").modules) == 2


def test_eva_changes_nothing_but_the_start(tmp_path: Path) -> None:
    adapted = quiet_peft(tiny_llama(), r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig())
    adapted.save_pretrained(str(tmp_path / "a"))
    assert len(Adapter.open(tmp_path / "a").modules) == 2


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update({"base_model.model.odd.weight": torch.ones(1)}), "'base_model.model.odd.weight' is not"),
        (lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(1)}), "lora_magnitude_vector' is not"),
        (lambda t: t.update({f"{PREFIX}.bias": torch.ones(1)}), "q_proj.bias' is not understood"),
        (lambda t: t.update({f"{PREFIX}.lr_up": torch.ones(1)}), "factors of an emulator"),
        (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(2, 32)}), "does not start with"),
        (lambda t: t.pop(f"{PREFIX}.lora_A.weight"), "B has no A"),
        (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), "A has no B"),
        (lambda t: t.update({f"{PREFIX}.lora_B.weight": torch.ones(32, 3)}), "differ in rank"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(2, 3, 1, 1)}), "must be matrices"),
        (lambda t: t.clear(), "holds no adapter weights"),
    ],
)
def test_a_weights_file_with_anything_unaccounted_for_is_refused(
    damage: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    file = saved(tmp_path / "a") / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        Adapter.open(tmp_path / "a")


def test_missing_and_pickled_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        Adapter.open(tmp_path / "none")
    directory = saved(tmp_path / "a")
    weights = directory / "adapter_model.safetensors"
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin: a pickle"):
        Adapter.open(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: no such file"):
        Adapter.open(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: not valid JSON"):
        Adapter.open(directory)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: no such file"):
        Adapter.open(directory)


def test_token_rows_must_match_their_numbers(tmp_path: Path) -> None:
    directory = saved(tmp_path / "a", trainable_token_indices=[1, 2])
    edit(directory, trainable_token_indices=[1, 2, 3])
    with pytest.raises(InputError, match="trainable_token_indices"):
        Adapter.open(directory)


def test_a_foreign_record_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path / "a") / "onelayer.json").write_text('{"kind": "emulator"}')
    with pytest.raises(InputError, match="field kind"):
        Adapter.open(tmp_path / "a")
