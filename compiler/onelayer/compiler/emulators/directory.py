"""The file that lets tools which never import onelayer load an emulator with `trust_remote_code=True`.

Without it they could not: transformers has no entry points, so nobody but the emulator's own folder can tell it how the
folder is read. The text is written next to the weights, the map into config.json.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


SHIM_FILE = "modeling_onelayer.py"

# A subclass of the stock model would count as custom code, for which transformers switches its key conversions off. So
# the class only hands over to the Auto class that was asked for. `auto_map` is deleted and not emptied: an empty one
# would be saved with the model and break the next load. Some tools (`trl sft`) load by the class that the architecture
# names, past the Auto classes, but read the configuration first: so the configuration, too, comes by way of this file.
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

# Auto classes that load a model with weights, and the table in which transformers lists what each can load.
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
    """The `auto_map` of an emulator's config.json: the shim for AutoConfig and every Auto class that can load it."""
    import transformers

    module = SHIM_FILE.removesuffix(".py")
    models = {
        auto_class: f"{module}.EmulatorModel"
        for auto_class, mapping in AUTO_CLASSES.items()
        if type(config) in getattr(transformers, mapping)
    }
    return {"AutoConfig": f"{module}.EmulatorConfig", **models}


FORMAT_VERSION = 1
# Of an emulator whose experts are factors: a reader that knows none of them would fill their place with random numbers.
STACKS_VERSION = 2
INDEX_FILE = "emulator.safetensors.index.json"
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
    """The model card of an emulator's directory; `model` as its records name the original."""
    distances = (
        "how far each layer was from the original before its factors\nwere trained, and since, given its inputs"
        if refined
        else "how far each linear is from the original"
    )
    return _CARD.format(model=model, distances=distances)
