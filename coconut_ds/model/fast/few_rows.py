"""Multi-threaded products of one column of a few rows with a large matrix on a CPU.

The cost of a thought or a decoded token is reading the weights. The BLAS behind `torch.mm` (MKL on an AMD processor,
torch 2.13) splits a product by its rows, so that few rows run on one thread; as a batch of blocks of the matrix's
columns it runs on all threads. Measured by `benchmarks/few_rows.py` (docs/PERFORMANCE.md) in fp32 on a CPU with 2
threads: faster from 2 to 16 rows, several times slower for a single row, which torch runs as a product with a vector.
Cases that were not measured are left to torch.

Shapes: B rows, T columns of the pass, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def product(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` (B, T, I) times `matrix` (I, O) plus `bias` (O,): (B, T, O)."""
    blocks = torch.get_num_threads()
    is_measured = rows.device.type == "cpu" and rows.dtype == torch.float32
    is_column_of_rows = rows.ndim == 3 and len(rows) > 1 and rows.shape[1] == 1
    if not (is_measured and is_column_of_rows) or blocks == 1 or matrix.shape[1] % blocks:
        return F.linear(rows, matrix.T, bias)
    done = in_blocks(rows, matrix, blocks)
    return done if bias is None else done + bias


def in_blocks(rows: torch.Tensor, matrix: torch.Tensor, blocks: int) -> torch.Tensor:
    """`rows` (B, 1, I) times `matrix` (I, O): (B, 1, O). `blocks` divides O."""
    by_columns = matrix.unflatten(1, (blocks, -1)).movedim(1, 0)  # (blocks, I, O / blocks)
    done = torch.bmm(rows.movedim(1, 0).expand(blocks, -1, -1), by_columns)  # (blocks, B, O / blocks)
    return done.movedim(0, 1).reshape(len(rows), 1, -1)
