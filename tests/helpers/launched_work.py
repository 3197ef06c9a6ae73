"""What tests of several processes do in each of them, other than to run a command as it is."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import onelayer.compiler
from helpers.children import at_call
from helpers.launched import run_command
from onelayer.compiler.machine import distributed
from onelayer.compiler.machine.distributed import end_processes, processes
from onelayer.compiler.results import Result
from onelayer.compiler.streaming import spill

# A function's name, what it is given, and its keywords.
Call = tuple[str, Sequence[Any], dict[str, Any]]


def run_with_environment(arguments: Sequence[str]) -> None:
    """Set the variables that the first argument holds as JSON, and run the command of the others."""
    os.environ |= json.loads(arguments[0])
    run_command(arguments[1:])


# How long a process sleeps that is late: others do in that time what they can without it.
LATE_SECONDS = 1.5


@dataclass(frozen=True)
class Fault:
    """What befalls one process in a call (from 1) of an object's function.

    It is a signal, a full disk ("ENOSPC"), or that the process is late ("late").
    """

    rank: int
    act: str
    place: str  # as `module:object`
    name: str
    call: int

    def strikes(self) -> None:
        """Send the signal to this process, raise what the system raises, or sleep."""
        if self.act == "late":
            time.sleep(LATE_SECONDS)
            return
        if self.act == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.Signals[self.act])


def run_with_fault(arguments: Sequence[str]) -> None:
    """Run the command of all arguments but the first, which is a fault as JSON. All that can wait waits in files."""
    fault = Fault(**json.loads(arguments[0]))
    spill.SMALLEST_BYTES, spill.DEFAULT_SHARE = 1, 0.0
    if processes().rank == fault.rank:
        place = resolve_name(fault.place)
        setattr(place, fault.name, at_call(place, fault.name, fault.call, fault.strikes))
    run_command(arguments[1:])


def wait_alone(arguments: Sequence[str]) -> None:
    """Run a command in process 0. The other, which ends without one, sends SIGTERM there as a launcher then does."""
    store, *_ = next(rendezvous("env://"))
    if processes().is_first:
        store.set("process", str(os.getpid()))
        run_command(arguments)
    while not store.add(distributed._HERE, 0):
        time.sleep(0.01)
    os.kill(int(store.get("process")), signal.SIGTERM)
    sys.exit(1)


def run_calls(arguments: Sequence[str]) -> None:
    """Call functions of `onelayer.compiler`, which the first argument lists as JSON; print their results."""
    torch.set_num_threads(1)
    results = [result.model_dump(mode="json") for result in called(json.loads(arguments[0]))]
    if processes().is_first:
        print(json.dumps({"results": results}, indent=2))
    end_processes()


def called(calls: Sequence[Call]) -> list[Result]:
    """Call functions of `onelayer.compiler`, one after the other."""
    return [getattr(onelayer.compiler, name)(*given, **keywords) for name, given, keywords in calls]


def compare_sharded(arguments: Sequence[str]) -> None:
    """Print, as JSON, how emulators that FSDP2 spreads over the processes differ from the whole ones."""
    torch.set_num_threads(1)
    results = [sharded_figures(directory) for directory in arguments]
    if processes().is_first:
        print(json.dumps({"results": results}, indent=2))
    end_processes()


def sharded_figures(directory: str) -> dict[str, Any]:
    """Compare losses and gradients of an emulator with those of its parts in all processes."""
    torch.manual_seed(0)
    team = processes()
    model = AutoModelForCausalLM.from_pretrained(directory)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = get_peft_model(model, lora)
    ids = torch.arange(3, 15)[None] + team.rank

    def loss_and_gradients() -> tuple[float, dict[str, torch.Tensor]]:
        adapted.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        found = {name: item.grad for name, item in adapted.named_parameters() if item.grad is not None}
        return float(loss.detach()), found

    loss, wanted = loss_and_gradients()
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    team.add_up(list(wanted.values()))  # begins the group of processes too
    packed_bytes = sum(item.nbytes for item in adapted.parameters() if item.dtype == torch.uint8)
    for layer in adapted.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(adapted)
    held = [item for item in adapted.parameters() if item.dtype == torch.uint8 and isinstance(item, DTensor)]
    held_bytes = team.gather(sum(item.to_local().nbytes for item in held))
    sharded_loss, found = loss_and_gradients()
    full: dict[str, Any] = {name: gradient.full_tensor() for name, gradient in found.items()}  # type: ignore[attr-defined]
    return {
        "losses": [loss, sharded_loss],
        "same_names": full.keys() == wanted.keys(),
        "largest": max(float(gradient.abs().max()) for gradient in full.values()),
        "error": max(float((full[name] - wanted[name] / team.count).abs().max()) for name in wanted),
        "packed_bytes": packed_bytes,
        "held_bytes": held_bytes,
    }
