"""Files on disk: the safetensors format, checkpoints, digests, writers, work directories."""
