"""The multi-pass model: backbone, latents, forward, generation."""
