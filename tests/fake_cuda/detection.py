"""Small operations on fake CUDA: whether the host waits, and whether devices meet, as on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fake_cuda.device import CUDA
from fake_cuda.tensors import FakeCuda

WAITING = {
    "item": lambda values: values.sum().item(),
    "bool": lambda values: bool(values.any()),
    "tolist": lambda values: values.tolist(),
    "cpu": lambda values: values.cpu(),
    "nonzero": lambda values: values.nonzero(),
    "mask as index": lambda values: values[values > 0],
    "values for a mask": lambda values: values.index_put((values > 0,), values[:2]),
    "index of the host": lambda values: values[torch.tensor([0, 1])],
    "equal": lambda values: torch.equal(values, values),
    "from the host": lambda values: torch.ones(3).to(CUDA),
    "new from a list": lambda values: torch.tensor([1.0, 2.0], device=CUDA),
    "copied from the host": lambda values: values.copy_(torch.ones(3)),
}
NOT_WAITING = {
    "sums": lambda values: (values * 2 + 1).sum(),
    "fill by a mask": lambda values: values.masked_fill(values > 0, 0.0),
    "choose by a mask": lambda values: torch.where(values > 0, values, 0.0),
    "index": lambda values: values[torch.arange(2, device=CUDA)],
    "a number of the host": lambda values: values * torch.tensor(2.0),
    "from pinned memory": lambda values: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
    "made there": lambda values: torch.full((2,), 3.0, device=CUDA),
    "other precision": lambda values: values.half().float(),
}
REFUSED = {
    "sum over devices": lambda values: values + torch.ones(3),
    "tensor of the host by an index of the GPU": lambda values: torch.ones(3)[torch.arange(2, device=CUDA)],
    "tensor of the host by a mask of the GPU": lambda values: torch.ones(3)[values > 0],
    "numpy": lambda values: values.numpy(),
}


def seen(name: str) -> dict[str, Any]:
    """What the host waits for in an operation, and the message of its error."""
    with FakeCuda() as cuda:
        values = torch.tensor([1.0, 2.0, 0.0], device=CUDA)
        cuda.waits.clear()
        try:
            {**WAITING, **NOT_WAITING, **REFUSED}[name](values)
        except (RuntimeError, TypeError) as error:
            return {"waits": list(cuda.waits), "error": str(error)}
    return {"waits": list(cuda.waits), "error": None}
