"""What tests of several processes do in each of them, other than to run a command as it is."""

import errno
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from helpers.launched import run_command
from onelayer.compiler.machine.distributed import processes
from onelayer.runtime.training.guarded import GuardedTrainer


def run_with_environment(arguments: Sequence[str]) -> None:
    """Set the variables that the first argument holds as JSON, and run the command of the others."""
    os.environ |= json.loads(arguments[0])
    run_command(arguments[1:])


def run_with_full_disk(arguments: Sequence[str]) -> None:
    """Run a command; the disk of the second process is full when it writes its part of a checkpoint."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if processes().rank == 1:
        GuardedTrainer._save_rng_state = full  # type: ignore[method-assign, assignment]
    run_command(arguments)


def compare_sharded(arguments: Sequence[str]) -> None:
    """Print, as JSON, how an emulator that FSDP2 spreads over the processes differs from the whole one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    team = processes()
    model = AutoModelForCausalLM.from_pretrained(arguments[0])
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
    figures = {
        "losses": [loss, sharded_loss],
        "same_names": full.keys() == wanted.keys(),
        "largest": max(float(gradient.abs().max()) for gradient in full.values()),
        "error": max(float((full[name] - wanted[name] / team.count).abs().max()) for name in wanted),
        "packed_bytes": packed_bytes,
        "held_bytes": held_bytes,
    }
    if team.is_first:
        print(json.dumps(figures, indent=2))
    team.wait()
    distributed.destroy_process_group()
