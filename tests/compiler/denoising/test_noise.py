"""The noise of denoisers, against its definition."""

import pytest
import torch

from onelayer.compiler.denoising.noise import NoiseProcess

pytest.importorskip("diffusers")


def test_flow_matching_moves_from_the_sample_to_the_noise() -> None:
    latent = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    noisy = NoiseProcess("FlowMatchEulerDiscreteScheduler", {}).noisy(latent, 0.25, torch.Generator().manual_seed(1))
    sigma = noisy.time / 1000
    torch.testing.assert_close(noisy.sample, latent + sigma * noisy.target, atol=1e-4, rtol=0)
    assert 0.7 < sigma < 0.8  # places run from pure noise to the sample
