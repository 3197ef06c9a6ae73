"""Norms are recognized by what they compute: the right form of each, also in low precision and on unusual tokens."""

import pytest
import torch
from torch import nn

from helpers.resident_gradients import adapted, batch_for, distance, gradients
from helpers.tiny_models import HIDDEN, causal
from onelayer.runtime import compress_activations
from onelayer.runtime.activations.norms import Norm, recognize

FEATURES = 64


class Centered(nn.Module):
    """A LayerNorm that is not torch's, as in some models."""

    def __init__(self, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, FEATURES))
        self.plus_one, self.variance_epsilon = plus_one, 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() + 1 if self.plus_one else self.weight.float()
        return nn.functional.layer_norm(x.float(), (FEATURES,), weight, eps=self.variance_epsilon).to(x.dtype)


def tokens(dtype: torch.dtype, mean: float = 0.0, massive: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Make 24 tokens of a given mean, in units of their deviation, with one massive channel."""
    x = torch.randn(2, 12, FEATURES, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True) + mean
    x[..., 7] += massive
    return (x * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mean", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("massive", [0.0, 10.0, 100.0])
def test_norms_that_subtract_the_mean_are_recognized(dtype: torch.dtype, mean: float, massive: float) -> None:
    x = tokens(dtype, mean, massive)
    rms, layer = nn.RMSNorm(FEATURES, eps=1e-6).to(dtype), nn.LayerNorm(FEATURES).to(dtype)
    own, shifted = Centered().to(dtype), Centered(plus_one=True).to(dtype)
    assert recognize(rms, x, rms(x)) == Norm(centered=False, plus_one=False, epsilon=1e-6)
    assert recognize(layer, x, layer(x)) == Norm(centered=True, plus_one=False, epsilon=1e-5)
    assert recognize(own, x, own(x)) == Norm(centered=True, plus_one=False, epsilon=1e-5)
    assert recognize(shifted, x, shifted(x)) == Norm(centered=True, plus_one=True, epsilon=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_module_that_keeps_normalized_tokens_is_not_a_norm(dtype: torch.dtype) -> None:
    x = nn.functional.layer_norm(tokens(torch.float32), (FEATURES,)).to(dtype)
    for module in (nn.Identity(), nn.Dropout(0.0)):
        assert recognize(module, x, module(x)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modules_that_are_no_norm_over_the_features_are_left_alone(dtype: torch.dtype) -> None:
    x = tokens(dtype, mean=0.1)
    for module in (nn.GroupNorm(4, 12).to(dtype), nn.Softmax(-1), nn.GELU()):
        assert recognize(module, x, module(x)) is None
    scaled = Centered().to(dtype)
    assert recognize(scaled, x, x / x.abs().mean(-1, keepdim=True)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_an_unnamed_epsilon_is_found(dtype: torch.dtype, scale: float) -> None:
    module, x = nn.RMSNorm(FEATURES).to(dtype), tokens(dtype, scale=scale)
    norm = recognize(module, x, module(x))
    assert norm is not None
    expected = module(x).float()
    assert (norm.normalize(x)[0].float() - expected).norm() < 0.01 * expected.norm()


def test_an_epsilon_only_in_the_forward_is_found() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (FEATURES,), eps=1e-5)

    x = tokens(torch.float32, scale=0.02)
    assert recognize(Bare(), x, Bare()(x)) == Norm(centered=True, plus_one=False, epsilon=1e-5)


@pytest.mark.parametrize("massive", [0.0, 10.0])
def test_layer_norms_in_bf16_have_the_gradient_of_the_model(massive: float) -> None:
    model = causal("GPTNeoX", hidden_size=512, hidden_dropout=0.0, use_parallel_residual=False, initializer_range=0.02)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 7] += massive * embedding.std()
    model.to(torch.bfloat16).train()
    batch = batch_for(model, padded=False)
    plain = gradients(model, batch)
    compression = compress_activations(model, rank=64)
    compression.rank = None
    assert distance(plain, gradients(model, batch)) < 0.01
    assert len(compression.norms) == 4


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_norms_in_float32_in_a_model_in_bf16(name: str) -> None:
    model = adapted(name).to(torch.bfloat16)
    for key, module in model.named_modules():
        if "norm" in key or "ln_" in key:
            module.float()
    batch = batch_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, batch)
        compression = compress_activations(model, rank=HIDDEN)
        assert distance(plain, gradients(model, batch)) < 0.02
    assert len(compression.norms) == (8 if name == "gemma3" else 4)


def test_rebuilt_tensors_have_the_precision_of_the_output() -> None:
    model = adapted("llama").to(torch.bfloat16)
    decoder = model.get_base_model().model
    for module in (decoder.layers[0].post_attention_layernorm, decoder.layers[1].post_attention_layernorm):
        module.float()
    seen: list[torch.dtype] = []
    decoder.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        compress_activations(model, rank=8)
        gradients(model, batch_for(model))
    assert seen == [torch.float32] * 2  # run and recomputed
