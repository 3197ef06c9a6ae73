"""The trainers of preference tuning: TRL's, with rows and reference log-probabilities that are computed before.

Of TRL's semi-private surface this relies on `_prepare_dataset`, which prepares a data set before the first step, and on
`precompute_ref_logps`, by which the loss takes the reference from the batch instead of from the model without adapter.
It imports trl and torch, so import it only when training starts.
"""

from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from onelayer.runtime.training.anchored import AnchoredTrainer
from onelayer.runtime.training.guarded import GuardedTrainer


class _PreparedRows:
    """A part of a trainer whose rows hold token ids, and reference log-probabilities if the original gave them."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class DpoTrainer(_PreparedRows, AnchoredTrainer, GuardedTrainer, DPOTrainer):
    """The trainer for rows with a chosen and a rejected answer."""


class KtoTrainer(_PreparedRows, AnchoredTrainer, GuardedTrainer, KTOTrainer):
    """The trainer for rows with one answer that is desirable or not."""


CONFIGS = {"dpo": DPOConfig, "kto": KTOConfig}
TRAINERS: dict[str, Any] = {"dpo": DpoTrainer, "kto": KtoTrainer}


def preference_trainer(method: str, arguments: dict[str, Any], **parts: Any) -> DpoTrainer | KtoTrainer:
    """Make the trainer of a method from its arguments, and what all trainers are made of."""
    trainer: DpoTrainer | KtoTrainer = TRAINERS[method](args=CONFIGS[method](**arguments), **parts)
    trainer.precompute_ref_logps = any(name.startswith("ref_") for name in parts["train_dataset"].column_names)
    return trainer
