"""The runtime of emulators: importing it lets transformers load them, without importing torch itself.

Names load on first use. See `modules/import_hook.py` for how the loader is registered without importing transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onelayer.runtime.modules.import_hook import register_loader

if TYPE_CHECKING:
    __version__: str
    from onelayer.runtime.activations.compression import ActivationCompression as ActivationCompression
    from onelayer.runtime.activations.compression import compress_activations as compress_activations
    from onelayer.runtime.generation.command import GenerateResult as GenerateResult
    from onelayer.runtime.generation.command import generate_text as generate_text
    from onelayer.runtime.modules.low_rank_linear import LowRankLinear as LowRankLinear
    from onelayer.runtime.modules.low_rank_linear import load_emulator as load_emulator
    from onelayer.runtime.planning.plan import PlanResult as PlanResult
    from onelayer.runtime.planning.plan import plan_run as plan_run
    from onelayer.runtime.streamed.model import streamed_for_training as streamed_for_training
    from onelayer.runtime.training.train import TrainResult as TrainResult
    from onelayer.runtime.training.train import train_lora as train_lora

_HOME_OF = {
    "ActivationCompression": "activations.compression",
    "GenerateResult": "generation.command",
    "LowRankLinear": "modules.low_rank_linear",
    "PlanResult": "planning.plan",
    "TrainResult": "training.train",
    "compress_activations": "activations.compression",
    "generate_text": "generation.command",
    "load_emulator": "modules.low_rank_linear",
    "plan_run": "planning.plan",
    "streamed_for_training": "streamed.model",
    "train_lora": "training.train",
}
__all__ = sorted(_HOME_OF)

register_loader()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return str(import_module(f"{__name__}.version").installed_version())
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
