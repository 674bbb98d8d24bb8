"""Products of one column of a few rows with a large matrix, on every thread of a CPU.

What a thought or a decoded token costs is reading the weights. The BLAS behind `torch.mm` (MKL on an AMD processor,
torch 2.13) divides a product by its rows, so that one of few rows runs on one thread; as a batch of blocks of the
matrix's columns it runs on all of them. Measured by `benchmarks/few_rows.py` (docs/PERFORMANCE.md) in fp32 on a CPU
with 2 threads: it pays from 2 to 16 rows, and takes several times as long as torch for a single row, which torch runs
as a product with a vector. Everything that was not measured is left to torch.

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
