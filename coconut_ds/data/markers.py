"""The marker tokens around thoughts, in the order in which they are added to a vocabulary."""

from __future__ import annotations

START_LATENT, END_LATENT, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"
MARKERS = (START_LATENT, END_LATENT, LATENT)
