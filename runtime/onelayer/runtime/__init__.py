"""onelayer.runtime holds the emulator; importing it lets transformers load emulators, without importing torch itself.

Names load on first use. See `registration.py` for how the loader is registered without importing transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onelayer.runtime.registration import register_loader

if TYPE_CHECKING:
    from onelayer.runtime.activations import ActivationCompression as ActivationCompression
    from onelayer.runtime.activations import compress_activations as compress_activations
    from onelayer.runtime.model import LowRankLinear as LowRankLinear
    from onelayer.runtime.model import load_emulator as load_emulator
    from onelayer.runtime.plan import PlanResult as PlanResult
    from onelayer.runtime.plan import plan_run as plan_run
    from onelayer.runtime.train import TrainResult as TrainResult
    from onelayer.runtime.train import train_lora as train_lora

_HOME_OF = {
    "ActivationCompression": "activations",
    "LowRankLinear": "model",
    "PlanResult": "plan",
    "TrainResult": "train",
    "compress_activations": "activations",
    "load_emulator": "model",
    "plan_run": "plan",
    "train_lora": "train",
}
__all__ = sorted(_HOME_OF)

register_loader()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
