"""The diffusion service: noise and embeddings to latents."""
