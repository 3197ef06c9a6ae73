"""Emulators in processes of their own: loud failures without the plugin, remote code, and the order of imports."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.places import ROOT
from helpers.reference_emulators import FACTOR_DTYPES, dense_reference, stored_as, write_emulator
from helpers.tiny_models import save_tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Any]:
    """Dense references of emulators of every factor dtype, by the directory that holds `emulator`."""
    models = dict[Path, Any]()
    for kind in FACTOR_DTYPES:
        folder = tmp_path_factory.mktemp(str(kind))
        model = models[folder] = save_tiny("llama", folder / "original")
        with stored_as(kind):
            write_emulator(model, folder / "original", folder / "emulator", 1.0)
        if kind is not None:
            dense_reference(model, folder / "emulator")
    return models


def run_python(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a script in a fresh process that can import onelayer but has not imported it."""
    path = os.pathsep.join([str(ROOT / "compiler"), str(ROOT / "runtime"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_without_the_plugin_only_remote_code_loads_saves_and_reloads(models: dict[Path, Any], tmp_path: Path) -> None:
    """A process without the plugin must not train noise. It takes seconds to import, so it does the rest too."""
    code = """
        import os, sys
        os.environ["HF_MODULES_CACHE"] = sys.argv[1]
        import torch, transformers
        from safetensors.torch import save_file
        ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])
        for folder in sys.argv[2:]:
            try:
                transformers.AutoModelForCausalLM.from_pretrained(folder + "/emulator")
            except OSError as error:
                assert "model.safetensors" in str(error), error
            else:
                raise AssertionError(folder)
        for number, folder in enumerate(sys.argv[2:]):
            emulator, again = folder + "/emulator", folder + "/again"
            assert number or not any(name.startswith("onelayer") for name in sys.modules)
            model = transformers.AutoModelForCausalLM.from_pretrained(emulator, trust_remote_code=True)
            assert type(model) is transformers.LlamaForCausalLM, type(model)
            model.save_pretrained(again)
            saved = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
            bare = transformers.AutoModel.from_pretrained(emulator, trust_remote_code=True)
            assert type(bare) is transformers.LlamaModel, type(bare)
            with torch.no_grad():
                out = model(ids).logits
                assert torch.equal(out, saved(ids).logits)
            save_file({"logits": out}, folder + "/out.safetensors")
    """
    done = run_python(code, tmp_path / "modules", *models)
    assert done.returncode == 0, done.stderr
    for folder, model in models.items():
        assert "auto_map" not in json.loads((folder / "again" / "config.json").read_text())
        with torch.no_grad():
            wanted = model(IDS).logits
        torch.testing.assert_close(load_file(folder / "out.safetensors")["logits"], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", ["onelayer.runtime", "transformers.quantizers", "transformers"])
def test_the_loader_registers_whichever_comes_first_and_torch_comes_last(first: str) -> None:
    code = """
        import importlib, sys
        if sys.argv[1] == "onelayer.runtime":
            import onelayer.runtime
            import onelayer.runtime.manifest
            assert not {"torch", "transformers"} & set(sys.modules)
        importlib.import_module(sys.argv[1])
        import onelayer.runtime
        import transformers.quantizers.auto as registry
        assert "onelayer" in registry.AUTO_QUANTIZER_MAPPING
        waiting = [finder.registry for finder in sys.meta_path if "onelayer" in type(finder).__module__]
        assert waiting == ["diffusers.quantizers.auto"]  # which is not imported here
        import inspect
        assert "HfQuantizer" in inspect.getsource(sys.modules["transformers.quantizers"])
    """
    done = run_python(code, first)
    assert done.returncode == 0, done.stderr
