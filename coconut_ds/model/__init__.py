"""What is a thought? A hidden state that is fed back to the model as its next input embedding.

Read in this order; after the first three files a thought is understood:

1. `latents.py`: earlier hidden states -> the next thought, as plain tensor functions (window, norm).
2. `masks.py`: which column may attend to which, once for all passes.
3. `passes.py`: the prefix, one pass per thought, and the tail, each on the KV cache of the passes before it
   (arXiv 2412.06769, section 3). `LatentPasses.encode` is the heart of the project.
4. `loss.py`: cross entropy of the supervised columns, in chunks.
5. `decoding.py`: an answer, decoded from the cached thoughts.
6. `coconut.py`: `Coconut`, the passes with that loss and decoder; loading and saving.
7. `self_check.py`: the compatibility check of a model family, run on a few tokens when a model is wrapped.

What else can be learned or solved: `jacobi.py` (all thoughts at once), `step_decoder.py` (steps written from thoughts),
`distillation.py` (states taught by the same model with its steps), `adapters.py` (LoRA on frozen weights).
`thought_readings.py` reads the thoughts of a batch back, for inspection. Around the model:

* `backbone.py` (the transformers model and its tokenizer, marker tokens), `loading.py` (from a folder or the hub),
  `scratch.py` (with random weights), `state_dicts.py` (weights saved by others).
* `folder.py` (the folder of a trained model) and `card.py` (its model card).
* `internals.py`: the private names of torch and transformers used here, checked when a model is wrapped.

All of it runs on the cache, attention and layers of transformers. Nothing here imports `fast/`, the optional layer that
makes it fast and small (`fast/__init__.py`), or reads a run configuration: arguments are plain.
"""
