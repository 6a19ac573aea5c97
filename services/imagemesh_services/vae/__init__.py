"""The VAE service: latents to pictures and back."""
