"""Tiny random models and a tiny tokenizer: a name in, a seeded transformers model or directory out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB = 128
HIDDEN = 32
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Assistant turns lie between generation tags, so that masks can be read off the template; EOS ends such a turn.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ; ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CORPUS = [
    "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs",
    "what is the sum of two and three ? the sum is five . what is one plus seven ? it is eight",
    "system: be brief ; user: name a colour ; assistant: blue user: name a city ; assistant: rome",
]


def tiny_tokenizer(directory: str | Path | None = None, generation_tags: bool = True) -> Any:
    """Train a BPE tokenizer of at most 128 tokens (letters, digits, some merges); save it if `directory` is given."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'\"-()_/=+*\n▁")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    template = CHAT_TEMPLATE if generation_tags else PLAIN_CHAT_TEMPLATE
    wrapper: Any = transformers.PreTrainedTokenizerFast
    tokenizer = wrapper(tokenizer_object=bpe, chat_template=template, model_max_length=128, **SPECIAL)
    if directory is not None:
        tokenizer.save_pretrained(str(directory))
    return tokenizer


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build a model from a private seed; norms and biases get noise too, since 1 and 0 would hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **SPECIAL_IDS,
}


def build(config_class: str, model_class: str, **fields: Any) -> Any:
    """Build a seeded model of the named transformers classes; results are `Any`: transformers is only partly typed."""
    config = getattr(transformers, config_class)(**fields)
    return seeded(lambda: getattr(transformers, model_class)(config))


def causal(family: str, **changes: Any) -> Any:
    """Build a tiny decoder of one family, e.g. `causal("Llama", num_hidden_layers=3)`."""
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return build(config_class, f"{family}ForCausalLM", **{**DECODER, **changes})


def tiny_llama(**changes: Any) -> Any:
    """Build the default model of most tests: two Llama layers, untied, float32."""
    return causal("Llama", **changes)


def _gpt2() -> Any:
    shape = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return build("GPT2Config", "GPT2LMHeadModel", **shape, **quiet, initializer_range=0.2, **SPECIAL_IDS)


def _opt() -> Any:
    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 64}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    return build("OPTConfig", "OPTForCausalLM", **shape, **depth, dropout=0.0, init_std=0.2, **SPECIAL_IDS)


def _bert() -> Any:
    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "initializer_range": 0.2}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build("BertConfig", "BertForMaskedLM", **shape, **depth, **quiet)


def _t5() -> Any:
    shape = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return build("T5Config", "T5ForConditionalGeneration", **shape, **tokens, dropout_rate=0.0)


_GEMMA: dict[str, Any] = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
TINY: dict[str, Callable[[], Any]] = {
    "llama": lambda: causal("Llama"),
    "llama_tied": lambda: causal("Llama", tie_word_embeddings=True),
    "qwen2": lambda: causal("Qwen2"),
    "qwen3": lambda: causal("Qwen3", head_dim=8, tie_word_embeddings=True),
    "mistral": lambda: causal("Mistral", sliding_window=8, num_hidden_layers=3),
    "gemma2": lambda: causal("Gemma2", tie_word_embeddings=True, **_GEMMA),
    "gemma3": lambda: causal(
        "Gemma3", tie_word_embeddings=True, layer_types=["sliding_attention", "full_attention"], **_GEMMA
    ),
    "phi3": lambda: causal("Phi3"),
    "gpt2": _gpt2,
    "gpt_neox": lambda: causal("GPTNeoX", hidden_dropout=0.0, attention_dropout=0.0),
    "opt": _opt,
    "mixtral": lambda: causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: causal("Qwen3Moe", head_dim=8, num_experts=4, norm_topk_prob=True, **_MOE),
    "bert": _bert,
    "t5": _t5,
}


def save_tiny(name: str, directory: str | Path, dtype: torch.dtype = torch.float32, shards: int | None = None) -> Any:
    """Save one model of `TINY` with its tokenizer, in about `shards` files; return the model, in `dtype`."""
    model = TINY[name]().to(dtype)
    model.config.dtype = dtype
    total_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(str(directory), max_shard_size=total_bytes // shards + 1 if shards else "1GB")
    tiny_tokenizer(directory)
    return model
