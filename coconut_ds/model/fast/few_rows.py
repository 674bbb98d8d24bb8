"""Products of one column with a large matrix on every thread of a CPU.

What a thought or a decoded token costs is reading the weights. The BLAS behind `torch.mm` (MKL on an AMD processor,
torch 2.13) divides a product by its rows, so that one of few rows runs on one thread; as a batch of blocks of the
matrix's columns it runs on all of them. Nothing changes on a GPU.

Shapes: B rows, T columns of the pass, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def product(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` (B, T, I) times `matrix` (I, O) plus `bias` (O,): (B, T, O)."""
    blocks = torch.get_num_threads()
    is_one_column = rows.ndim == 3 and rows.shape[1] == 1
    if rows.is_cuda or blocks == 1 or matrix.shape[1] % blocks or not is_one_column:
        return F.linear(rows, matrix.T, bias)
    by_columns = matrix.unflatten(1, (blocks, -1)).movedim(1, 0)  # (blocks, I, O / blocks)
    done = torch.bmm(rows.movedim(1, 0).expand(blocks, -1, -1), by_columns)  # (blocks, B, O / blocks)
    done = done.movedim(0, 1).reshape(len(rows), 1, -1)
    return done if bias is None else done + bias
