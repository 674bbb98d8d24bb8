"""Why is it fast and small? A layer over `model/` that `install` puts on and `uninstall` takes off.

Without it every number is the same up to rounding; the passes copy the KV cache each time it grows, and write out the
gradients of all weights, keys and values in each pass. Two ideas remove both, and one file each has the details:

* `kv_cache.py`: one buffer per layer, into which each pass writes its columns.
* `low_rank.py`: a pass over n rows (batch times columns) gives a weight the gradient dW = X^T G with X (n, I) and
  G (n, O), of rank n at most. Keep X and G of every short pass, and multiply once with those of the prefix:
  dW = [X_prefix; X_1; ..; X_k]^T [G_prefix; G_1; ..; G_k]. `low_rank_linear.py` does it for linear layers,
  `low_rank_attention.py` for keys and values, where dK = S^T Q and dV = P^T O are sums over passes of the same kind.

`checkpointing.py` recomputes decoder layers on that buffer. `few_rows.py` multiplies one column on all CPU threads.
`install.py` also replaces GPT-2's GELU.

The order of gradients: ZeRO's buckets hold gradients in the order in which they become ready, and all ranks must agree
on it, in micro-batches with and without thoughts. A weight's gradient becomes ready when its prefix is done, with and
without this layer, because the prefix is the last pass that a backward comes to; `low_rank_linear.py` keeps it so.
"""

from coconut_ds.model.fast.install import install as install
from coconut_ds.model.fast.install import uninstall as uninstall
