"""The record of an adapter, next to its weights and inside them, and its digest without torch."""

import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from helpers.peft_adapters import folded, random_adapter
from helpers.tiny_models import tiny_llama
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.adapters.writer import Base, write_adapter

LLAMA = Base("org/original", "abc", "LlamaForCausalLM", "transformers.models.llama.modeling_llama", False)


def test_the_record_is_beside_and_inside_the_weights(tmp_path: Path) -> None:
    random_adapter(tiny_llama(), tmp_path / "a", r=2, target_modules=["q_proj"])
    source = Adapter.open(tmp_path / "a")
    assert source.provenance is None
    record = {"kind": "adapter", "corrected": True, "limit": None, "base": {"digest": "d0"}, "linears": [1]}
    (tmp_path / "b").mkdir()
    write_adapter(
        tmp_path / "b", folded(source), source=source, base=LLAMA, targets=sorted(source.modules), provenance=record
    )
    assert Adapter.open(tmp_path / "b").provenance == record
    with safe_open(tmp_path / "b/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "onelayer.kind": "adapter",
            "onelayer.corrected": "true",
            "onelayer.limit": "null",
            "onelayer.base.digest": "d0",
        }
    card = (tmp_path / "b/README.md").read_text()
    assert "base_model: org/original" in card
    assert "library_name: peft" in card


def test_reading_a_digest_does_not_import_torch(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    random_adapter(tiny_llama(), directory, r=2, target_modules=["q_proj"])
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from onelayer.compiler.adapters.reader import Adapter, adapter_digest\n"
        f"adapter_digest({str(directory)!r}); Adapter.open({str(directory)!r})\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
