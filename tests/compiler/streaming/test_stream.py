"""Lockstep compared with the resident model: bit for bit, every unit once, any architecture; no hang on errors."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import TINY, build, causal, save_tiny, tiny_tokenizer
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.devices import pick_device
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.models.deferred_logits import DeferredLogits
from onelayer.compiler.models.lazy_tensors import DiskMatrix
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.compiler.models.units import Unit
from onelayer.compiler.storage.checkpoint import Checkpoint
from onelayer.compiler.streaming.stream import BatchError, Stream

CPU = torch.device("cpu")


def batches_for(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, length in ((2, 7), (1, 12), (1, 12), (3, 20)):
        batch = {"input_ids": torch.randint(3, 128, (rows, length), generator=generator)}
        if name == "t5":
            batch["decoder_input_ids"] = torch.randint(3, 128, (rows, length // 2), generator=generator)
        batches.append(batch)
    return batches


def run(
    streamed: StreamedModel, batches: list[dict[str, torch.Tensor]], on_unit: Any = None, stop_after: int | None = None
) -> dict[int, Any]:
    outputs: dict[int, Any] = {}
    with Meter(CPU) as meter:
        Stream(streamed, CPU, meter, on_unit=on_unit, stop_after=stop_after).run(batches, outputs.__setitem__)
    return outputs


def logits_of(output: Any) -> torch.Tensor:
    logits = output.logits
    return logits.materialize() if isinstance(logits, DeferredLogits) else logits


@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("name", TINY)
def test_streamed_equals_resident_and_loads_every_unit_once(name: str, shards: int | None, tmp_path: Path) -> None:
    resident = type(save_tiny(name, tmp_path, shards=shards)).from_pretrained(tmp_path).eval()
    streamed = StreamedModel(tmp_path)
    loads: Counter[str] = Counter()

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        others = [part for part in streamed.units if part is not unit]
        held = [
            name
            for part in others
            for name, tensor in streamed.tensors_of(part).items()
            if not (tensor.is_meta or isinstance(tensor, DiskMatrix))
        ]
        assert not held, f"{held} are resident with {unit.name}"
        yield

    batches = batches_for(name)
    outputs = run(streamed, batches, on_unit)
    for index, batch in enumerate(batches):
        with torch.no_grad():
            expected = resident(**batch).logits
        assert torch.equal(logits_of(outputs[index]), expected)
    assert set(loads.values()) == {1}
    assert len(loads) >= len([unit for unit in streamed.units if unit.is_block])
    assert all(tensor.is_meta for unit in streamed.units for tensor in streamed.tensors_of(unit).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_run_in_their_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    resident = type(save_tiny("llama", tmp_path, dtype=dtype)).from_pretrained(tmp_path).eval()
    batch = batches_for("llama")[0]
    with torch.no_grad():
        expected = resident(**batch).logits
    output = logits_of(run(StreamedModel(tmp_path), [batch])[0])
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_bytes_read_are_those_of_the_units_once(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    streamed = StreamedModel(tmp_path)
    blocks = [unit for unit in streamed.units if unit.is_block]
    # Rows of the embedding, those of a batch that says the same again only once.
    batches = [{"input_ids": torch.tensor([[5 + i, 6 + i, 7 + i]])} for i in (0, 1, 2, 2)]
    run(streamed, batches, stop_after=blocks[-1].position)
    rows = 3 * 3 * 32 * 4
    assert streamed.checkpoint.bytes_read == sum(unit.weight_bytes for unit in blocks) + rows


def test_the_head_is_not_read_until_somebody_asks(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    streamed = StreamedModel(tmp_path)
    (output,) = run(streamed, [{"input_ids": torch.tensor([[5, 6]])}]).values()
    before = streamed.checkpoint.bytes_read
    assert output.logits.shape == (1, 2, 128)
    assert streamed.checkpoint.bytes_read == before
    output.logits.sum()
    assert streamed.checkpoint.bytes_read == before + 128 * 32 * 4


def test_a_layer_that_is_called_again_stays_resident(tmp_path: Path) -> None:
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": 128,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
    }
    config = transformers.AlbertConfig(**shape, num_attention_heads=4)
    model = transformers.AlbertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path)
    loads: Counter[str] = Counter()

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[None]:
        loads[unit.name] += 1
        yield

    batches = batches_for("albert")
    outputs = run(streamed, batches, on_unit)
    for index, batch in enumerate(batches):
        with torch.no_grad():
            assert torch.equal(logits_of(outputs[index]), model(**batch).logits)
    assert set(loads.values()) == {1}


def test_a_failing_batch_is_named_and_releases_the_others(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    streamed = StreamedModel(tmp_path)
    entered: list[int] = []

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[Any]:
        def fail(index: int, args: Any, kwargs: Any) -> Any:
            entered.append(index)
            if index == 1 and unit.is_block:
                raise ZeroDivisionError("on purpose")
            return unit.forward(*args, **kwargs)

        yield fail

    with pytest.raises(BatchError, match=r"batch 1, unit model\.layers\.0: ZeroDivisionError: on purpose"):
        run(streamed, batches_for("llama"), on_unit)
    gc.collect()
    assert all(tensor.is_meta for unit in streamed.units for tensor in streamed.tensors_of(unit).values())
    assert all("forward" not in vars(unit.module) for unit in streamed.units)
    assert len(run(streamed, batches_for("llama"))) == 4


def test_an_interrupt_passes_through(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    streamed = StreamedModel(tmp_path)

    @contextmanager
    def on_unit(unit: Unit) -> Iterator[Any]:
        def stop(index: int, args: Any, kwargs: Any) -> Any:
            raise KeyboardInterrupt

        yield stop

    with pytest.raises(KeyboardInterrupt):
        run(streamed, batches_for("llama"), on_unit)


def test_a_token_outside_the_vocabulary_is_an_error_that_says_so(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(BatchError, match="outside an embedding of 128 rows"):
        run(StreamedModel(tmp_path), [{"input_ids": torch.tensor([[500]])}])


@pytest.mark.parametrize(("name", "rows"), [("gpt2", 128), ("opt", 130)])
def test_rows_longer_than_the_table_of_positions_name_the_option(name: str, rows: int, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    streamed = StreamedModel(tmp_path)
    with pytest.raises(InputError, match=rf"^--max-length: .* ends after 128 \({rows} rows\); give --max-length 128$"):
        run(streamed, [{"input_ids": torch.full((1, 140), 3), "attention_mask": torch.ones(1, 140, dtype=torch.long)}])
    with pytest.raises(BatchError, match="index 500 is outside an embedding of 128 rows"):
        run(streamed, [{"input_ids": torch.full((1, 10), 500)}])


def test_rotary_positions_have_no_end(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    assert len(run(StreamedModel(tmp_path), [{"input_ids": torch.full((1, 140), 3)}])) == 1


def test_many_parked_batches_run(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    batches = [{"input_ids": torch.tensor([[3 + i % 100, 7]])} for i in range(300)]
    assert len(run(StreamedModel(tmp_path), batches)) == 300


def test_a_head_of_many_slices_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    resident = type(save_tiny("gemma2", tmp_path)).from_pretrained(tmp_path).eval()
    monkeypatch.setattr("onelayer.compiler.models.lazy_tensors.SLICE_BYTES", 17 * 32 * 4)
    batch = batches_for("gemma2")[0]
    output = run(StreamedModel(tmp_path), [batch])[0]
    assert isinstance(output.logits, DeferredLogits)
    assert output.logits.steps, "the soft cap should have been remembered, not applied"
    with torch.no_grad():
        torch.testing.assert_close(output.logits.materialize(), resident(**batch).logits, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' first"):
        StreamedModel(tmp_path)


def test_a_shape_that_does_not_fit_the_config_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight: shape \(3, 3\)"):
        run(StreamedModel(tmp_path), batches_for("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "martian"}, "model_type 'martian' is unknown"),
        ({"architectures": ["MartianForCausalLM"]}, "is not one class of transformers"),
        ({"architectures": None}, "is not one class of transformers"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "'aqlm' weights"),
        ({"quantization_config": {"quant_method": "onelayer"}}, "is an emulator"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    import json

    save_tiny("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        StreamedModel(tmp_path)


def test_peak_does_not_grow_with_depth(tmp_path: Path) -> None:
    for depth in (2, 12):
        model = causal("Llama", num_hidden_layers=depth)
        model.save_pretrained(tmp_path / str(depth))
        tiny_tokenizer(tmp_path / str(depth))
    shallow, deep = (StreamedModel(tmp_path / str(depth)) for depth in (2, 12))
    assert shallow.largest_unit_bytes == deep.largest_unit_bytes
    assert len(Checkpoint.open(tmp_path / "12").tensors) > len(Checkpoint.open(tmp_path / "2").tensors)


def test_computed_weights_are_there_with_an_adapter_too(tmp_path: Path) -> None:
    """Angles of positions are not in a checkpoint; wrapping the empty model must not change them."""
    shape = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    resident = build("MarianConfig", "MarianMTModel", **shape, **heads, **tokens)
    resident.save_pretrained(tmp_path)
    seen: list[str] = []
    wrapped = StreamedModel(tmp_path, lambda model: seen.extend(name for name, _ in model.named_parameters()))
    name = "model.encoder.embed_positions.weight"
    assert name in seen
    assert torch.equal(wrapped.model.get_parameter(name), StreamedModel(tmp_path).model.get_parameter(name))


@pytest.mark.parametrize("name", ["warp", "meta"])
def test_an_unknown_device_is_refused(name: str) -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match=f"--device {name}"):
        pick_device(name)
