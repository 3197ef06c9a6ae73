"""The device that a pass computes on, and moving tensors to it."""

from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from torch.utils._pytree import tree_map_only

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.distributed import local_rank, processes
from onelayer.compiler.machine.half_products import quicken_half_products


def pick_device(name: str | None) -> torch.device:
    """Return the named device; without a name a GPU, else the CPU. Raises `InputError` if not available.

    Of several processes each takes the GPU of its own number. A CPU is made quick in half precision.
    """
    own = "cuda" if processes().is_alone else f"cuda:{local_rank()}"
    if name is None:
        name = own if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(own if name == "cuda" else name)
        torch.empty(1, device=device).item()  # `meta` holds no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available ({str(error).splitlines()[0]}); use cpu or cuda") from None
    if device.type == "cpu":
        quicken_half_products()
    return device


def move(values: Any, device: torch.device) -> Any:
    """Move the tensors of a tree of values to `device`."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of `device` that nobody holds."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def forked_random(device: torch.device | None = None) -> AbstractContextManager[None]:
    """Restore the random generators of the host and of `device`, whatever its kind, on exit.

    Without a device, restore those of all accelerators.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            return torch.random.fork_rng(devices=[])
        return torch.random.fork_rng(devices=range(torch.accelerator.device_count()), device_type=accelerator.type)
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the random generators of the host and of `device`."""
    host = [torch.get_rng_state()]
    return host if device.type == "cpu" else [*host, torch.get_device_module(device).get_rng_state(device)]


def seed_random(device: torch.device, seed: int) -> None:
    """Seed the random generators of the host and of `device`.

    `torch.manual_seed` seeds every kind of accelerator, and for each kind that was not used yet it keeps a stack trace.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        seed_all = getattr(module, "manual_seed_all", None) or module.manual_seed  # MPS has one device
        seed_all(seed)
