"""An original and its emulator with the same adapter, and a dense reference for the anchored emulator."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.classifiers import save_classifier
from helpers.mixtures import compiled, save_mixture, with_products
from helpers.reference_emulators import dense_reference, write_emulator
from helpers.resident_gradients import batch_for, with_lora
from helpers.tiny_models import save_tiny
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.machine.meter import Meter
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.modules.low_rank_linear import load_emulator


class Pair:
    """The models `original`, `emulator` and `dense`, an emulator without factors, in evaluation mode, one adapter."""

    def __init__(self, name: str, root: Path) -> None:
        lora: dict[str, Any] = {}
        if name == "mixtral":
            model = save_mixture(name, root)
            compiled(root)
            dense = with_products(model, root / "emulator")
        else:
            is_classifier = name == "classifier"
            save = partial(save_classifier, "bert") if is_classifier else partial(save_tiny, name)
            model, dense = save(root / "model"), save(root / "dense")
            write_emulator(model, root / "model", root / "emulator", ratio=0.5, skip=("classifier",))
            dense_reference(dense, root / "emulator")
            lora = {"modules_to_save": ["classifier"]} if is_classifier else {}
        self.root, self.batch = root, batch_for(model)
        if name == "classifier":
            self.batch["labels"] = torch.tensor([0, 2])
        self.emulator = with_lora(load_emulator(root / "emulator"), **lora).eval()
        trained = {key: value for key, value in self.emulator.named_parameters() if value.requires_grad}
        with torch.no_grad():
            for value in trained.values():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(4)), alpha=0.02)
        self.original, self.dense = (with_lora(item, **lora).eval() for item in (model, dense))
        for item in (self.original, self.dense):
            assert not item.load_state_dict(trained, strict=False).unexpected_keys

    @contextmanager
    def anchors(self, bits: int) -> Iterator[Anchors]:
        """Make anchors of the emulator, not yet renewed."""
        facts = Emulator.open(self.root / "emulator").facts
        with Meter(torch.device("cpu")) as meter:
            anchors = Anchors(self.emulator, facts, self.root / "model", bits, meter, nullcontext)
            yield anchors
            anchors.remove()

    def logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**self.batch).logits
        return found

    @contextmanager
    def dense_offsets(self, units: Mapping[str, Any]) -> Iterator[None]:
        """Give every unit of the dense emulator, by name, what makes it answer what the original answers.

        Found as written in the definition: the outputs of all units of the original, then the dense units, each on the
        original's input.
        """
        wanted: dict[str, torch.Tensor] = {}
        offsets: dict[str, torch.Tensor] = {}

        def first(output: Any) -> Any:
            return output[0] if isinstance(output, tuple) else output

        def keep(name: str, module: Any, args: Any, output: Any) -> None:
            wanted[name] = first(output).detach()

        def move_on(name: str, module: Any, args: Any, output: Any) -> Any:
            offsets[name] = wanted[name] - first(output)
            return (wanted[name], *output[1:]) if isinstance(output, tuple) else wanted[name]

        def add(name: str, module: Any, args: Any, output: Any) -> Any:
            total = first(output) + offsets[name]
            return (total, *output[1:]) if isinstance(output, tuple) else total

        for model, hook in ((self.original, keep), (self.dense, move_on), (self.dense, add)):
            base = model.get_base_model()
            handles = [base.get_submodule(name).register_forward_hook(partial(hook, name)) for name in units]
            if hook is add:
                yield
            else:
                self.logits(model)
            for handle in handles:
                handle.remove()
