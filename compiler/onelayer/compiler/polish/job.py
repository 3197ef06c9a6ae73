"""One polish in progress: every step streams the original forward and back, then moves the adapter once.

In: the original with its adapter attached, training rows, held-out batches. Out: the state after the last step. Held on
the device: one unit, its recomputation for one micro-batch, the adapter and its optimizer. Kept unit inputs lie on the
host and, beyond the budget, in mapped files.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from onelayer.compiler.data.batches import make_batches
from onelayer.compiler.data.packing import join_rows, packs_of
from onelayer.compiler.data.train_rows import TrainRows
from onelayer.compiler.denoising.batches import DrawnImages, joined_batches
from onelayer.compiler.machine.console import Progress
from onelayer.compiler.models.linears import head_workspace
from onelayer.compiler.models.unit_memory import graph_bytes, step_bytes
from onelayer.compiler.polish.packing_check import check_apart, check_takes_positions
from onelayer.compiler.polish.resume import PolishState
from onelayer.compiler.polish.settings import PolishSettings
from onelayer.compiler.streaming.denoising_loss import DenoisingLoss, PassBatch, loss_of
from onelayer.compiler.streaming.gradient_stream import GradientStream
from onelayer.compiler.streaming.token_loss import TokenLoss
from onelayer.compiler.streaming.unit_loads import UnitLoads

if TYPE_CHECKING:
    from onelayer.compiler.models.streamed_model import StreamedModel


class NotFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the adapter is as the last good step left it."""


class PolishJob:
    """The loop over steps. `save` keeps the state; `kept_bytes` is the most that the host held of unit inputs."""

    def __init__(
        self,
        stream: GradientStream,
        state: PolishState,
        rows: TrainRows | DrawnImages,
        held_out: Sequence[PassBatch],
        settings: PolishSettings,
        save: Callable[[], None],
    ) -> None:
        self.stream = stream
        self.state = state
        self.rows = rows
        self.held_out = list(held_out)
        self.settings = settings
        self.save = save
        self.kept_bytes = 0

    def run(self) -> str | None:
        """Take all steps that are not done yet, each durable; return why it stopped early, if it did.

        Raises `NotFiniteError` if no step was good, so that there is nothing to publish.
        """
        try:
            self._run()
        except NotFiniteError as error:
            if not self.state.steps:
                raise
            return str(error)
        return None

    def _run(self) -> None:
        units = len(self.stream.streamed.units)
        first = len(self.state.steps)
        total = 2 * units * (self.settings.steps - first) + (units if self.held_out else 0)
        with Progress(total, "polish") as bar, self.stream:
            self.stream.bar = bar
            if self.settings.packing and first == 0:
                self._check_packing()
            if self.settings.activation_rank is not None and self.state.gradient_cosine is None:
                self.state.gradient_cosine = self._cosine()
            for step in range(first, self.settings.steps):
                bar.begin(2 * units * (step - first), self._describe(step))
                self.state.steps.append(self._step(step))
                self.save()
            if self.held_out and not any(item["step"] == self.settings.steps for item in self.state.held_out):
                bar.begin(2 * units * (self.settings.steps - first), "held-out loss")
                self._measure()
                self.save()

    def _describe(self, step: int) -> str:
        last = self.state.steps[-1] if self.state.steps else None
        figures = (
            f", loss {last['loss']:.3f}, {last['seconds']:.0f} s and {last['bytes_read'] / 1e9:.2f} GB" if last else ""
        )
        return f"polish step {step + 1}/{self.settings.steps}{figures}"

    def _step(self, step: int) -> dict[str, Any]:
        """Compute the gradients of one large batch and move the adapter once; return the figures of the step."""
        start_seconds, start_bytes = time.perf_counter(), self.stream.streamed.checkpoint.bytes_read
        batches = self._batches(step)
        asked = self.held_out if step % self.settings.eval_steps == 0 else []
        loss = loss_of([*batches, *asked], len(batches), self.stream.device, self.stream.team, self.stream.spill_pool)
        self.stream.trained, self.stream.seed = loss.trained, self.settings.seed * 1_000_003 + step
        self.stream.rank, self.stream.places = self.settings.activation_rank, loss.places
        self.stream.run(loss.inputs, loss.take)
        self.kept_bytes = max(self.kept_bytes, self.stream.spill_pool.held_bytes)
        if not loss.finish():
            raise NotFiniteError(f"step {step + 1}: the loss is not finite")
        self._note_held_out(loss)
        self.stream.reverse()
        self._add_up_gradients()
        return {
            "loss": loss.loss,
            "gradient_norm": self._move(step),
            "learning_rate": self.settings.learning_rate_at(step),
            "tokens": loss.trained_tokens,
            "sequences": sum(len(batch.order) for batch in batches),
            "seconds": round(time.perf_counter() - start_seconds, 3),
            "bytes_read": self.stream.streamed.checkpoint.bytes_read - start_bytes,
        }

    def _batches(self, step: int) -> Sequence[PassBatch]:
        """Return the examples of a step as the model is called with them."""
        if isinstance(self.rows, DrawnImages):
            return joined_batches(self.rows.step(step), self.settings.micro_batch_size)
        rows = self.rows.batch(step)
        if self.settings.packing:
            rows = [join_rows(pack) for pack in packs_of(rows, self.settings.max_length)]
        return make_batches(rows, self.stream.streamed.config, self.settings.micro_batch_size)

    def _check_packing(self) -> None:
        """Try the fullest pack of all steps and the one with the longest row, which show differences by length."""
        check_takes_positions(self.stream.streamed.model)
        rows = self.rows
        assert isinstance(rows, TrainRows), "images are not packed"
        steps = (packs_of(rows.batch(step), self.settings.max_length) for step in range(self.settings.steps))
        shared = [pack for packs in steps for pack in packs if len(pack) > 1]
        if shared:
            fullest = max(shared, key=lambda pack: sum(len(row.input_ids) for row in pack))
            longest = max(shared, key=lambda pack: len(pack[0].input_ids))
            self.stream.trained = 0
            check_apart(self.stream, [fullest] if longest is fullest else [fullest, longest])

    def _add_up_gradients(self) -> None:
        """Give every process the gradients of all."""
        if not self.stream.team.is_alone:
            for parameter in self.state.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.stream.team.add_up([parameter.grad])

    def _move(self, step: int) -> float:
        """Clip the gradients, step, and clear them; return their norm before clipping."""
        parameters = list(self.state.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_gradient_norm))
        if not math.isfinite(norm):
            raise NotFiniteError(f"step {step + 1}: the gradient is not finite")
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        return norm

    def _cosine(self) -> float:
        """Compare the gradients of the first micro-batch with compressed and with exact inputs; return the cosine."""
        (batch, *_) = self._batches(0)
        found = []
        for rank in (None, self.settings.activation_rank):
            self.stream.trained, self.stream.seed, self.stream.rank = 1, self.settings.seed, rank
            self.stream.places = ()
            loss = loss_of([batch], 1, self.stream.device, pool=self.stream.spill_pool)  # in every process the same
            self.stream.run(loss.inputs, loss.take)
            loss.finish()
            self.stream.reverse()
            gradients = [parameter.grad for parameter in self.state.parameters.values()]
            found.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
            self.state.optimizer.zero_grad(set_to_none=True)
        return float(torch.nn.functional.cosine_similarity(found[0], found[1], dim=0))

    def _measure(self) -> None:
        """Measure the held-out loss of the present adapter in its own forward stream."""
        self.stream.trained = 0
        loss = loss_of(self.held_out, 0, self.stream.device, self.stream.team, self.stream.spill_pool)
        self.stream.run(loss.inputs, loss.take)
        loss.finish()
        self._note_held_out(loss)

    def _note_held_out(self, loss: TokenLoss | DenoisingLoss) -> None:
        """Note a held-out loss, if it is finite. It may not be, even after a step whose own loss was."""
        if loss.held_out_loss is None:
            return
        if not math.isfinite(loss.held_out_loss):
            raise NotFiniteError(f"step {len(self.state.steps)}: the held-out loss is not finite")
        self.state.measured(loss.held_out_loss)


def polish_workspace(
    streamed: "StreamedModel",
    loads: UnitLoads,
    state: "PolishState",
    on_gpu: bool,
) -> int:
    """Predict the workspace of a polish that is about to run."""
    graph = graph_bytes(loads.most_values(streamed), streamed.dtype.itemsize, on_gpu)
    head = head_workspace(streamed, loads.most_rows)
    unit_bytes, last_bytes = streamed.largest_unit_bytes, streamed.units[-1].weight_bytes
    return step_bytes(unit_bytes, last_bytes, head, graph, state.bytes, on_gpu)
