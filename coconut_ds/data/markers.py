"""The special tokens of thoughts, in the order in which they are added to a vocabulary."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from coconut_ds.errors import ModelError

START_LATENT, END_LATENT, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"
MARKERS = (START_LATENT, END_LATENT, LATENT)


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the marker tokens; raises ModelError when they were not added."""
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in vocabulary]
    if missing:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no {', '.join(missing)}, so it is not the "
            "one the weights were trained with; copy the tokenizer's files from the checkpoint's model/ folder"
        )
    return {marker: vocabulary[marker] for marker in MARKERS}
