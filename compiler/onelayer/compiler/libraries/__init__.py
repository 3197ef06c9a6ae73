"""The one seam to the libraries whose models are streamed: transformers and diffusers."""
