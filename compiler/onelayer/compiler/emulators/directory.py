"""The files that make an emulator's directory load everywhere: a shim, the config's `auto_map` and a model card.

Tools that never import onelayer load an emulator with `trust_remote_code=True`. transformers has no entry points, so
only the emulator's own directory can say how it is read. The shim is written next to the weights, its map into
config.json.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelayer.compiler.storage.companions import copy_companions
from onelayer.compiler.storage.files import read_json, write_json, write_text
from onelayer.compiler.storage.model_config import is_diffusers_config, read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


SHIM_FILE = "modeling_onelayer.py"

# transformers switches off its key conversions for custom code, and a subclass of the stock model would count as such.
# So the class only delegates to the requested Auto class. `auto_map` is deleted, not emptied: an empty one would be
# saved with the model and break the next load. Some tools (`trl sft`) load by the class that the architecture names,
# without the Auto classes, but read the configuration first. So the configuration also comes from this file.
SHIM_TEXT = '''"""Loads this emulator with trust_remote_code=True; it needs `pip install onelayer`."""

import transformers

import onelayer.runtime  # registers the loader of emulators


class EmulatorModel(transformers.PreTrainedModel):
    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        stock = getattr(transformers, cls._auto_class)
        del config.auto_map
        kwargs["trust_remote_code"] = False
        return stock.from_pretrained(path, *args, config=config, **kwargs)


class EmulatorConfig(transformers.PreTrainedConfig):
    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        kwargs["trust_remote_code"] = False
        return transformers.AutoConfig.from_pretrained(path, *args, **kwargs)
'''

# Auto classes that load a model with weights, and the transformers table of the models that each can load.
AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}


def auto_map(config: "PreTrainedConfig") -> dict[str, str]:
    """Make the `auto_map` of a config.json: the shim for AutoConfig and every Auto class that can load it."""
    import transformers

    module = SHIM_FILE.removesuffix(".py")
    models = {
        auto_class: f"{module}.EmulatorModel"
        for auto_class, mapping in AUTO_CLASSES.items()
        if type(config) in getattr(transformers, mapping)
    }
    return {"AutoConfig": f"{module}.EmulatorConfig", **models}


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy what belongs beside the weights of the emulator `source`, with a shim of our own whatever lies there."""
    copy_companions(source, target)
    if is_diffusers_config(read_model_config(source)):
        return
    document: dict[str, Any] = read_json(source / "config.json")
    own = f"{SHIM_FILE.removesuffix('.py')}."
    pointers = document.pop("auto_map", None) or {}
    if kept := {name: value for name, value in pointers.items() if isinstance(value, str) and value.startswith(own)}:
        document["auto_map"] = kept
    write_json(target / "config.json", document)
    write_text(target / SHIM_FILE, SHIM_TEXT)


FORMAT_VERSION = 1
# The version of an emulator with compressed experts: a reader that does not know them would load random weights there.
STACKS_VERSION = 2
# With codes, of linears or of experts. Versions 3 and 4 had codes of eight bits, and are still read.
CODES_VERSION = 5
INDEX_FILE = "emulator.safetensors.index.json"
# diffusers refuses a method that nobody registered, so emulators of its models can have the names that it looks for.
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
DIFFUSERS_INDEX = f"{DIFFUSERS_WEIGHTS}.safetensors.index.json"
_CARD = """---
base_model: {model}
tags:
- onelayer
---

# Emulator of {model}

A compact low-rank stand-in, made to train LoRA on and for nothing else. Load it with transformers after
`import onelayer.runtime`, or with `trust_remote_code=True` where onelayer is installed. Train with `onelayer train` or
any trainer that takes a PEFT adapter, then make the adapter fit the original with `onelayer correct`.
`emulator.json` says how it was made and {distances}.
"""


def card(model: str, refined: bool) -> str:
    """Write the model card of an emulator's directory; `model` is the original's name in its records."""
    distances = (
        "how far each layer was from the original before its factors\nwere trained, and since, given its inputs"
        if refined
        else "how far each linear is from the original"
    )
    return _CARD.format(model=model, distances=distances)
