"""What a denoiser is trained and scored on: encoded images, noise, and the loss."""
