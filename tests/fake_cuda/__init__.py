"""Forward, backward, evaluation and decoding on tensors of device `cuda:0`, on machines without a GPU.

`hooks.cpp` makes torch believe in a GPU. It has to be loaded before torch starts, so the checks run in a process of
their own (`child.py`), which a test starts once for all its cases (`run.py`) and whose facts it asserts on.

What this says: which device and precision every tensor has, what the host waits for, the order of gradients, the thread
of the backward, live bytes under the attention kernel of a GPU. What it cannot say: time, rounding and correctness of
CUDA's kernels, races between streams, the allocator's fragments and workspaces, NCCL, DeepSpeed's own operations.
"""

LIBRARY = "FAKE_CUDA_LIBRARY"
"""The environment variable that names the compiled hooks to the process that loads them."""
