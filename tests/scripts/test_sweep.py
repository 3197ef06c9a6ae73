"""The architecture sweep on a few models that differ as much as possible in structure."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from helpers.places import ROOT
from onelayer.compiler.streaming.stream import BatchError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("class_name", "registry", "kind"),
    [
        ("DeepseekV3ForCausalLM", "causal-lm", "text"),  # latent attention, routed and shared experts, stacked on load
        ("Mamba2ForCausalLM", "causal-lm", "text"),  # a state-space model
        ("Gemma3nForCausalLM", "causal-lm", "text"),  # layers that share keys and values; projections around the stack
        ("ZambaForCausalLM", "causal-lm", "text"),  # one layer's weights tied into others
        ("MarianMTModel", "seq2seq-lm", "text"),  # parameters that the checkpoint lacks and the class computes
        ("NeoMMEForMaskedLM", "masked-lm", "text"),  # multiplies by the weight of a module that it never calls
        ("FunnelForMaskedLM", "masked-lm", "text"),  # nested lists of layers
        ("Idefics3ForConditionalGeneration", "image-text-to-text", "mixed"),  # reads the device of its weights
        ("Lfm3VlForConditionalGeneration", "image-text-to-text", "mixed"),  # text layers registered before vision
        ("Qwen2_5_VLForConditionalGeneration", "image-text-to-text", "mixed"),  # images as a flat list of patches
        ("WhisperForConditionalGeneration", "speech-seq2seq", "sound"),
        ("ViTForImageClassification", "image-classification", "images"),
    ],
)
def test_streamed_equals_resident_and_every_unit_is_loaded_once(class_name: str, registry: str, kind: str) -> None:
    from scripts.sweep.architectures import verdict

    result, detail = verdict(getattr(transformers, class_name), registry)
    assert result == "identical", detail
    assert detail.startswith(f"{kind};"), detail
    assert "times" not in detail


@pytest.mark.parametrize("class_name", ["Llama4ForCausalLM", "Zamba2ForCausalLM", "Gemma3nForCausalLM"])
def test_compiled_linears_are_the_best_of_their_rank(class_name: str) -> None:
    from scripts.sweep.architectures import compiled

    result, detail = compiled(getattr(transformers, class_name), "causal-lm")
    assert result == "optimal", detail


def test_code_that_edits_weights_between_units_is_refused_by_name(tmp_path: Path) -> None:
    from scripts.sweep.architectures import small_models
    from scripts.sweep.compare import streamed_outputs

    model = next(small_models(transformers.RwkvForCausalLM))()
    model.config.rescale_every = 1  # weakens the weights of later layers in place, on the first call
    model.save_pretrained(tmp_path)
    with pytest.raises(BatchError, match="div_ needs the values of a weight outside its unit"):
        streamed_outputs(tmp_path, [{"input_ids": torch.tensor([[5, 6, 7]])}])


def test_a_sweep_takes_the_pretend_device() -> None:
    command = [sys.executable, "-m", "scripts.sweep.architectures", "--device", "pretend", "--only", "llama,mamba2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "causal-lm: 2 of 2 identical" in done.stdout, done.stdout


def test_a_difference_is_seen() -> None:
    from scripts.sweep.compare import difference

    one = [[torch.tensor([1.0, 2.0])]]
    assert difference(one, one) == 0.0
    assert difference([[torch.tensor([1.0, 2.5])]], one) == 0.25
    assert difference([[torch.tensor([1.0])]], one) == float("inf")
