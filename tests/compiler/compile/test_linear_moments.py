"""The hooks that gather moments: which moments are shared, which stop being shared, and what is not a linear."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.mixtures import MIXTURES, inner, modules_of_experts
from onelayer.compiler.compile.expert_factors import ExpertCalls, hooks_on
from onelayer.compiler.compile.linear_moments import MomentHooks
from onelayer.compiler.models.experts import stacks_below
from onelayer.compiler.streaming.spill import SpillPool

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Attention(nn.Module):
    """q, k and v read one input, k first and narrower than its input; o reads another; one linear is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v = nn.Linear(16, 4), nn.Linear(16, 16), nn.Linear(16, 4, bias=False)
        self.o, self.idle = Conv1D(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.k(x)
        mixed: torch.Tensor = self.o(self.q(x) + torch.cat([k, self.v(x), k, k], dim=-1))
        return mixed


def test_hooks_gather_the_narrow_side_and_share_what_is_shared() -> None:
    torch.manual_seed(0)
    module = Attention().double()
    linears: dict[str, nn.Module] = {
        name: part for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)
    }
    hooks = MomentHooks(linears, CPU)
    xs = [random(2, 5, 16, seed=i) for i in range(3)]
    with hooks.attached(), torch.no_grad():
        for x in xs:
            hooks.next_batch()
            module(x)
    X = torch.cat([x.reshape(-1, 16) for x in xs])
    assert set(hooks.moments) == {"k", "q", "v", "o"}
    assert not hooks.moments["k"].of_input, "narrower than its input, and first: its own output's moment"
    assert hooks.moments["q"].gram is hooks.moments["v"].gram
    torch.testing.assert_close(hooks.moments["q"].gram.total_FF, X.T @ X)
    K = X @ module.k.weight.T
    torch.testing.assert_close(hooks.moments["k"].gram.total_FF, K.T @ K)
    torch.testing.assert_close(hooks.moments["k"].input_energy, X.square().sum(dim=0), rtol=1e-6, atol=0)
    assert max(len(moments.gram.total_FF) for moments in hooks.moments.values()) <= 16
    assert hooks.moments["o"].gram.total_FF.shape == (8, 8)
    assert all(not part._forward_hooks for part in linears.values())


# What the first of two linears reads, and what the second does: None for the very same.
Call = tuple[torch.Tensor, *tuple[torch.Tensor | None, ...]]


class Fickle(nn.Module):
    """Two linears that read one tensor, or two, as each call says; `b` is narrower than its input on request."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, out_features)

    def forward(self, first: torch.Tensor, *second: torch.Tensor | None) -> None:
        self.a(first)
        for x in second:
            self.b(first if x is None else x)


@pytest.mark.parametrize("out_features", [3, 4], ids=["output moment", "input moment"])
@pytest.mark.parametrize("last_is_apart", [False, True])
def test_sharing_that_ends_leaves_everyone_with_what_it_read(out_features: int, last_is_apart: bool) -> None:
    module = Fickle(out_features).double()
    hooks = MomentHooks({"a": module.a, "b": module.b}, CPU)
    x, y, z = (random(2, 5, 4, seed=seed) for seed in range(3))
    together: list[Call] = [(x, None), (y, None)]
    apart: list[Call] = [(z, y), (y, None, z), (z,)]  # another tensor, both, none at all
    calls = [*together, *apart, *([] if last_is_apart else together[:1])]
    with hooks.attached(), torch.no_grad():
        for call in calls:
            hooks.next_batch()
            module(*call)
    of_a = torch.cat([first for first, *_ in calls]).reshape(-1, 4)
    of_b = torch.cat([first if x is None else x for first, *second in calls for x in second]).reshape(-1, 4)
    torch.testing.assert_close(hooks.moments["a"].gram.total_FF, of_a.T @ of_a)
    b = hooks.moments["b"]
    assert b.gram.rows == len(of_b)
    if out_features == 4:
        torch.testing.assert_close(b.gram.total_FF, of_b.T @ of_b)
    else:
        outputs = of_b @ module.b.weight.T
        assert not b.of_input
        torch.testing.assert_close(b.gram.total_FF, outputs.T @ outputs)
        torch.testing.assert_close(b.input_energy, of_b.square().sum(dim=0), rtol=1e-6, atol=0)


def test_a_linear_that_joins_late_is_not_given_what_was_read_before() -> None:
    module = Fickle(4).double()
    hooks = MomentHooks({"a": module.a, "b": module.b}, CPU)
    x, y = (random(2, 5, 4, seed=seed) for seed in range(2))
    with hooks.attached(), torch.no_grad():
        for call in [(x,), (y, None)]:
            hooks.next_batch()
            module(*call)
    Y = y.reshape(-1, 4)
    torch.testing.assert_close(hooks.moments["b"].gram.total_FF, Y.T @ Y)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_that_is_not_finite_leaves_the_rest_of_its_batch_as_it_is(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 4, bias=bias).double()
    hooks = MomentHooks({"k": linear}, CPU)
    first, second = random(3, 5, 16, seed=0), random(3, 5, 16, seed=1)
    second[1, 2, 7] = float("nan")
    second[2, 0, 0] = float("inf")
    with hooks.attached(), torch.no_grad():
        for x in (first, second):
            hooks.next_batch()
            linear(x)
    X = torch.cat([first.reshape(-1, 16), second.reshape(-1, 16)])
    X = X[X.isfinite().all(dim=1)]
    moments = hooks.moments["k"]
    assert moments.gram.dropped_rows == 2 == 30 - len(X)
    torch.testing.assert_close(moments.input_energy, X.square().sum(dim=0), rtol=1e-6, atol=0)
    Y = X @ linear.weight.T
    torch.testing.assert_close(moments.gram.total_FF, Y.T @ Y)


def test_a_row_that_is_not_finite_leaves_the_rest_of_its_expert_as_it_is() -> None:
    (name, module), *_ = modules_of_experts(MIXTURES["mixtral"]()).items()
    calls = ExpertCalls(next(stacks_below(name, module)), SpillPool(), CPU, torch.float64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, module.config.hidden_size, generator=generator)
    hidden[20, 3] = float("inf")
    with torch.no_grad(), hooks_on([calls]):
        module(hidden, torch.tensor([[1, 2]] * 24), torch.full((24, 2), 0.5))
        calls.sort()
        found = calls.moments(1)["down_proj"]
    rows = inner(module, 1, torch.cat([hidden[:20], hidden[21:]]))
    assert found.gram.dropped_rows == 1
    torch.testing.assert_close(found.input_energy, rows.double().square().sum(dim=0), rtol=1e-5, atol=0)


def test_sharing_through_a_change_in_place_stops_with_a_name() -> None:
    module = Fickle(4)
    hooks = MomentHooks({"a": module.a, "b": module.b}, CPU)

    def run() -> None:
        x = torch.ones(2, 4)
        with hooks.attached(), torch.no_grad():
            module(x, None)
            hooks.next_batch()
            module.a(x)
            x += 1
            module.b(x)

    with pytest.raises(RuntimeError, match="a: its input was changed in place"):
        run()


class Spelled(nn.Linear):
    """Falcon's linear: the same product, written differently."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class Paired(nn.Linear):
    """A router's linear: it returns the scores and their input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits.softmax(dim=-1), logits  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_of_linear_is_judged_by_what_it_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linears: dict[str, nn.Module] = {
        "same": Spelled(8, 8, dtype=dtype), "clipped": Clipped(8, 8, dtype=dtype), "pair": Paired(8, 8, dtype=dtype)
    }  # fmt: skip
    hooks = MomentHooks({**linears, "unused": nn.Linear(8, 8)}, CPU)
    x = random(3, 8, seed=0).to(dtype)
    x[0] = float("nan")
    with hooks.attached(), torch.no_grad():
        for linear in linears.values():
            linear(x)
    assert set(hooks.moments) == {"same"}
    assert hooks.moments["same"].gram.dropped_rows == 1
    assert hooks.reason("clipped") == hooks.reason("pair") == "its forward is not that of a linear"
    assert "never called" in hooks.reason("unused")
