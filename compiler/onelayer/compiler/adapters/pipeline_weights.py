"""An adapter of a denoiser as diffusers' pipelines load it: `pipe.load_lora_weights(directory)`.

Pipelines scale an adapter by alpha over rank, and take alpha to be the rank if the file names none. So the scaling of
each module is in its B.
"""

from pathlib import Path

from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.errors import InputError
from onelayer.compiler.storage.pipeline_directory import weights_name
from onelayer.compiler.storage.safetensors_writer import tensor_entry, write_safetensors

PIPELINE_FILE = "pytorch_lora_weights.safetensors"


def write_pipeline_weights(directory: Path, class_name: str) -> None:
    """Write the file of pipelines next to the adapter in `directory`, for a denoiser of a class.

    Raises `InputError` for an adapter that replaces parameters, which that file cannot hold.
    """
    adapter = Adapter.open(directory)
    if replaced := [*adapter.dense, *adapter.token_rows]:
        raise InputError(f"{directory}: replaces {min(replaced)}, which no pipeline loads; train plain LoRA")
    prefix, entries = weights_name(class_name), []
    for name, module in sorted(adapter.modules.items()):
        a, b = (adapter.read(key).float() for key in (module.key_a, module.key_b))
        for side, factor in (("lora_A", a), ("lora_B", module.scaling * b)):
            entries.append(tensor_entry(f"{prefix}.{name}.{side}.weight", factor.contiguous()))
    write_safetensors(directory / PIPELINE_FILE, entries, {"format": "pt"})
