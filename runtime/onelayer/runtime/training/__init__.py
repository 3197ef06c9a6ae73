"""LoRA training on an emulator, with PEFT, transformers and TRL."""
