"""What is a thought? The multi-pass model: backbone, latents, forward, decoding."""
