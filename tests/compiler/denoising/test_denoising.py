"""Noise, targets and layouts of encoded images, against diffusers' own formulas."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from onelayer.compiler.denoising.joining import SHARED, NotJoinedError, joined, joining_of, parts_of
from onelayer.compiler.denoising.layout import Layout, NotALayoutError
from onelayer.compiler.denoising.noise import NoiseProcess
from onelayer.compiler.denoising.template import NotATemplateError, Template, put_together, taken_apart
from onelayer.compiler.errors import InputError

LATENT = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4)


def drawn() -> torch.Tensor:
    return torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_goes_in_a_straight_line(shift: float) -> None:
    process = NoiseProcess("FlowMatchEulerDiscreteScheduler", {"shift": shift, "num_train_timesteps": 1000})
    noisy = process.noisy(LATENT, 0.25, torch.Generator().manual_seed(7))
    share = noisy.time / 1000
    plain = 1 - 0.25
    assert share == pytest.approx(shift * plain / (1 + (shift - 1) * plain), abs=1e-3)
    torch.testing.assert_close(noisy.sample, (1 - share) * LATENT + share * drawn())
    torch.testing.assert_close(noisy.target, drawn() - LATENT)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_scheduler_says_what_is_predicted(prediction: str) -> None:
    config = {"prediction_type": prediction, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    noisy = NoiseProcess("EulerDiscreteScheduler", config).noisy(LATENT, 0.3, torch.Generator().manual_seed(7))
    kind: Any = DDPMScheduler
    scheduler, time = kind.from_config(config), torch.tensor([300])
    assert noisy.time == 300
    torch.testing.assert_close(noisy.sample, scheduler.add_noise(LATENT, drawn(), time))
    wanted = {"epsilon": drawn(), "sample": LATENT, "v_prediction": scheduler.get_velocity(LATENT, drawn(), time)}
    torch.testing.assert_close(noisy.target, wanted[prediction])


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(InputError, match="prediction_type 'dreams' is unknown"):
        NoiseProcess("EulerDiscreteScheduler", {"prediction_type": "dreams"})


def test_times_are_drawn_by_the_density() -> None:
    middle = []
    for weighting in ("none", "logit_normal"):
        process = NoiseProcess("FlowMatchEulerDiscreteScheduler", {}, weighting)
        generator = torch.Generator().manual_seed(0)
        places = [process.drawn(generator) for _ in range(200)]
        middle.append(sum(0.25 < place < 0.75 for place in places) / 200)
    assert middle[0] == pytest.approx(0.5, abs=0.1)
    assert middle[1] > 0.65


def test_a_layout_is_found_and_inverted() -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))

    def through(values: torch.Tensor) -> torch.Tensor:
        return (values[order] * -2.5 + 0.25).reshape(4, 6)

    layout = Layout.found((2, 12), through)
    there = through(LATENT.flatten())
    torch.testing.assert_close(layout.forward(LATENT), there)
    torch.testing.assert_close(layout.backward(there).float(), LATENT.reshape(2, 12))
    again = Layout.stored(layout.tensors("a"), "a")
    torch.testing.assert_close(again.forward(LATENT), there)


@pytest.mark.parametrize(
    "through",
    [torch.sin, lambda values: values.flip(0) + values, lambda values: values * 0, lambda values: values**2],
)
def test_what_is_no_layout_is_refused(through: Any) -> None:
    with pytest.raises(NotALayoutError):
        Layout.found((24,), through)


def test_templates_find_the_open_places() -> None:
    def call(time: float, seed: int) -> dict[str, Any]:
        sample = torch.full((1, 4, 3), float(seed))
        more = {"text_embeds": torch.ones(1, 2), "time_ids": (torch.zeros(1, 2), None)}
        return {"sample": [sample], "timestep": torch.tensor([time / 1000]), "more": more, "return_dict": False}

    template = Template.of(call(500, 0), call(250, 0), call(500, 1))
    filled = template.arguments(torch.full((4, 3), 7.0), 100.0, torch.bfloat16)
    assert float(filled["timestep"]) == pytest.approx(0.1)
    assert filled["sample"][0].dtype == torch.bfloat16
    assert float(filled["sample"][0].mean()) == 7.0
    assert filled["more"]["time_ids"][1] is None
    with pytest.raises(NotATemplateError, match="still guides"):
        Template.of(call(500, 0), call(500, 0), call(500, 1))
    with pytest.raises(NotATemplateError, match="a function"):
        taken_apart({"hook": call}, [])
    leaves: list[torch.Tensor] = []
    form = taken_apart(call(1, 1), leaves)
    assert put_together(form, leaves)["return_dict"] is False


def test_arguments_of_several_images_become_those_of_one_call() -> None:
    def call(count: int, value: float, time: Any = None) -> dict[str, Any]:
        image = torch.full((1, 4, 3), value)
        time = torch.full((), value) if time is None else time
        more = {"ids": torch.arange(6).reshape(2, 3), "sizes": [(2, 2)] * count, "scale": None}
        return {"x": image.expand(count, 4, 3), "parts": [image[0]] * count, "time": time, "more": (more, 0.5)}

    joining = joining_of(call(1, 0.0), call(2, 0.0))
    found = joined(joining, [call(1, float(number)) for number in range(3)])
    assert (
        found["x"][:, 0, 0].tolist() == [part[0, 0] for part in found["parts"]] == found["time"].tolist() == [0, 1, 2]
    )
    assert found["more"][0]["sizes"] == [(2, 2)] * 3
    assert found["more"][0]["ids"].shape == (2, 3)
    for answer in (found["x"], found["parts"]):
        assert [float(torch.stack(list(part)).mean()) for part in parts_of(answer, 3)] == [0, 1, 2]
    longer = call(1, 1.0) | {"x": torch.ones(1, 5, 3)}
    elsewhere = call(1, 1.0) | {"more": ({**call(1, 1.0)["more"][0], "ids": torch.ones(2, 3).long()}, 0.5)}
    for other in (longer, elsewhere):
        with pytest.raises(NotJoinedError):
            joined(joining, [call(1, 0.0), other])
    with pytest.raises(NotJoinedError, match="other arguments for two images"):
        joining_of(call(1, 0.0), {**call(2, 0.0), "time": 7.0})
    with pytest.raises(NotJoinedError, match="all images share"):
        joined({**joining, "x": SHARED}, [call(1, 0.0), call(1, 1.0)])
