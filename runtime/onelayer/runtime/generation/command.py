"""A model, an adapter and a prompt in, text out: loaded as any program loads them, so it shows what they serve.

The model is held as a whole, over the devices that accelerate finds room on. Emulators load too.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.devices import forked_random
from onelayer.compiler.results import Result
from onelayer.compiler.settings import settings_keywords
from onelayer.compiler.storage.checkpoint import resolve_model
from onelayer.runtime.generation.settings import GenerateKeywords, GenerateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GenerateResult(Result):
    """What `generate_text` wrote: `text` without the prompt, of `tokens` tokens."""

    model: str
    adapter: str | None
    prompt: str
    text: str
    tokens: int


@settings_keywords(GenerateSettings, GenerateKeywords)
def generate_text(
    model: str | Path, prompt: str, adapter: str | Path | None = None, **settings: Unpack[GenerateKeywords]
) -> GenerateResult:
    """Continue a prompt, or answer it if the model has a chat template, with an adapter if there is one.

    `model` is a directory, a GGUF file or a Hub id of an original, a merged model or an emulator. Raises `InputError`
    for a model that writes no text, a damaged directory, or an adapter of other modules.
    """
    asked = GenerateSettings.of(settings)
    if not prompt:
        raise InputError("--prompt: is empty; give some text")
    directory = resolve_model(model, asked.revision)
    import torch
    from transformers import set_seed

    from onelayer.compiler.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(directory)
    inputs = _inputs(prompt, tokenizer, asked.chat)
    loaded = _loaded(directory, adapter)
    chosen: dict[str, Any] = {"do_sample": asked.temperature > 0, "max_new_tokens": asked.max_new_tokens}
    if asked.temperature > 0:
        chosen["temperature"] = asked.temperature
    with forked_random(), torch.no_grad():
        set_seed(asked.seed)
        written = loaded.generate(**{name: ids.to(loaded.device) for name, ids in inputs.items()}, **chosen)
    tokens = written[0, inputs["input_ids"].shape[1] :] if not loaded.config.is_encoder_decoder else written[0]
    return GenerateResult(
        model=str(model),
        adapter=None if adapter is None else str(adapter),
        prompt=prompt,
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        tokens=len(tokens),
    )


def _inputs(prompt: str, tokenizer: "PreTrainedTokenizerBase", chat: bool) -> dict[str, Any]:
    """Tokenize the prompt to ids (1, T) and a mask."""
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _loaded(directory: Path, adapter: str | Path | None) -> Any:
    """Load the model, and its adapter, as any program does."""
    import onelayer.runtime.modules.transformers_plugin  # noqa: F401  # registers the loader of emulators
    from onelayer.compiler.adapters.reader import Adapter
    from onelayer.compiler.data.classes import is_transcriber
    from onelayer.compiler.libraries.transformers_models import load_config, model_class
    from onelayer.compiler.machine.half_products import quicken_half_products
    from onelayer.compiler.storage.checkpoint import Checkpoint

    checkpoint, config = Checkpoint.open(directory), load_config(directory)
    cls = model_class(config, directory)
    if not cls.can_generate():
        raise InputError(f"{directory}: {cls.__name__} writes no text; give a language model")
    if is_transcriber(cls):
        raise InputError(
            f"{directory}: {cls.__name__} writes what it hears or sees, and reads no prompt; use it in code"
        )
    if adapter is not None:
        Adapter.open(adapter)
    packed: dict[str, Any] = (
        {"gguf_file": checkpoint.files[0].name, "dtype": config.dtype} if checkpoint.is_gguf else {}
    )
    quicken_half_products()
    model: Any = cls.from_pretrained(directory, device_map="auto", **packed)
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except (ValueError, RuntimeError) as error:  # other modules, other shapes
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{adapter}: does not fit {directory} ({reason}); give an adapter of it") from None
    return model.eval()
