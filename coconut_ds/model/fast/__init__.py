"""Why is it fast and small? An optional speed layer over `model/`: `install` and `uninstall`.

Without it every result is the same up to rounding, but each pass copies the KV cache to extend it, and computes the
gradients of all weights, keys and values in full. Two ideas remove both:

* One buffer of keys and values per layer, into which each pass writes its columns (`kv_cache.py`).
* Low rank. A pass over n rows (batch times columns), with X (n, I) the inputs of a linear layer and G (n, O) the
  gradient of its outputs, gives its weight the gradient dW = X^T G, of rank n at most. Keep X and G of every short
  pass, and multiply once when the backward reaches the prefix:

      dW = X_prefix^T G_prefix + [X_1; ..; X_k]^T [G_1; ..; G_k]           (low_rank_linear.py)

  With Q (n, d) the queries of a pass, S its attention weights, dZ the gradient of its scores, and dO that of its
  outputs, keys and values get sums over passes of the same kind:

      dK = [dZ_1; ..; dZ_k]^T [Q_1; ..; Q_k],   dV = [S_1; ..; S_k]^T [dO_1; ..; dO_k]    (low_rank_attention.py)

Read `kv_cache.py`, `low_rank.py`, `low_rank_linear.py`, `low_rank_attention.py`, then `install.py`, which also replaces
GPT-2's GELU. `checkpointing.py` recomputes decoder layers on the buffer; `few_rows.py` multiplies a column of few rows
on all CPU threads.

Where each part is on (measurements: docs/PERFORMANCE.md): low rank (`low_rank.pays`) and `few_rows.py` in fp32 on a
CPU only, where they were measured. The buffer and the GELU everywhere, although measured on a CPU only: checkpointing
needs the buffer, and both keep fewer tensors by construction. Nothing was measured on a GPU.

The order of gradients: ZeRO's buckets hold gradients in the order in which they become ready, which must be the same on
every rank, in micro-batches with and without thoughts. With and without this layer a weight's gradient becomes ready
after the backward of the prefix, the last one to run. So every forward has a prefix (`passes.LatentPasses.encode`),
also without thoughts, and weight and bias of a linear layer become ready together.
"""

from coconut_ds.model.fast.install import install as install
from coconut_ds.model.fast.install import uninstall as uninstall
