"""Does it fit? What a run needs per rank, and the batch size that fits."""
