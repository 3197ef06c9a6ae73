"""The wing that reads images and audio: sources in, decoded pixels and samples out, and a model's own processor."""
