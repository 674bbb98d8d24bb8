"""The hooks, loaded; imported before torch, in the process of `child.py` only."""

from __future__ import annotations

import ctypes
import os
import sys

from fake_cuda import LIBRARY

assert "torch" not in sys.modules, "torch looks its hooks up when it starts: fake_cuda.device comes before it"
_hooks = ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

CUDA = torch.device("cuda", 0)
assert torch.accelerator.current_accelerator().type == CUDA.type
# Called before the first tensor of the device is made, outside of torch's own fake tensors.
torch.cuda._lazy_init = lambda: None

PLAIN, EFFICIENT = 0, 2
"""Values of SDPBackend: attention by plain operations; the memory-efficient kernel, a GPU's with a mask."""


def choose_attention(backend: int) -> None:
    """Which attention torch takes on CUDA from now on; on a GPU its own rules choose."""
    _hooks.choose_attention(ctypes.c_int64(backend))
