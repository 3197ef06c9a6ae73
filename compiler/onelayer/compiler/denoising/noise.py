"""How a scheduler adds noise and what its denoiser predicts: flow matching, epsilon, or v prediction, by its config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onelayer.compiler.denoising.settings import Weighting
from onelayer.compiler.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Noisy:
    """A noisy sample, the scheduler's time, and what the denoiser should answer, with the weight of that row."""

    sample: torch.Tensor
    time: float
    target: torch.Tensor
    weight: float


class NoiseProcess:
    """The process of a scheduler. `weighting` names the density of times and the weight of losses in flow matching.

    Names and formulas are those of diffusers' training scripts (SD3, arXiv 2403.03206, section 3.1).
    """

    def __init__(self, class_name: str, config: Mapping[str, Any], weighting: Weighting = "none") -> None:
        """Read a scheduler's config. Raises `InputError` if it predicts something unknown."""
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        prediction = config.get("prediction_type")
        self.is_flow = (
            class_name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas")) or prediction == "flow_prediction"
        )
        self.weighting = weighting
        scheduler: Any
        if self.is_flow:
            shift = config.get("flow_shift") or config.get("shift") or 1.0
            # A shift by resolution is for sampling only, as in diffusers' training scripts.
            kept = {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": shift}
            scheduler = FlowMatchEulerDiscreteScheduler(**kept)
        else:
            if prediction not in (None, *PREDICTIONS):
                raise InputError(
                    f"scheduler {class_name}: prediction_type {prediction!r} is unknown; give a pipeline with one of "
                    f"{', '.join(PREDICTIONS)} or flow matching"
                )
            plain: Any = DDPMScheduler
            scheduler = plain.from_config(dict(config))
        self._scheduler = scheduler
        self._steps = int(scheduler.config.num_train_timesteps)

    def drawn(self, generator: torch.Generator) -> float:
        """Draw a place in 0..1 on the axis of times, as training does."""
        if not self.is_flow:
            return float(torch.rand(1, generator=generator))
        from diffusers.training_utils import compute_density_for_timestep_sampling

        drawn: torch.Tensor = compute_density_for_timestep_sampling(
            self.weighting, 1, 0.0, 1.0, 1.29, generator=generator
        )
        return float(drawn)

    def noisy(self, latent: torch.Tensor, place: float, generator: torch.Generator) -> Noisy:
        """Add noise to a latent (1, ...) at a place in 0..1 on the axis of times."""
        noise = torch.randn(latent.shape, generator=generator)
        index = min(int(place * self._steps), self._steps - 1)
        if not self.is_flow:
            time = torch.tensor([index])
            sample = self._scheduler.add_noise(latent, noise, time)
            prediction = self._scheduler.config.prediction_type
            target = noise if prediction == "epsilon" else latent
            if prediction == "v_prediction":
                target = self._scheduler.get_velocity(latent, noise, time)
            return Noisy(sample, float(index), target, 1.0)
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        sigma = self._scheduler.sigmas[index]
        weight = compute_loss_weighting_for_sd3(self.weighting, sigma[None])
        sample = (1 - sigma) * latent + sigma * noise
        return Noisy(sample, float(self._scheduler.timesteps[index]), noise - latent, float(weight))
