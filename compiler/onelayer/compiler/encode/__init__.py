"""The encode pass: images and captions become the inputs of a denoiser."""
