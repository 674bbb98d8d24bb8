"""What a new shape costs with cuDNN attention and without: it builds a plan for each, and here every step is new."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
import workload

from coconut_ds.data.batches import to_device
from coconut_ds.memory.activations import batch_of
from gpu_sections import NOT_ON_A_CPU, Row, begin, benchmark_options, synchronize, tried


def rows(options: argparse.Namespace) -> Iterator[Row]:
    device = begin(options)
    for dropout, is_on in ((0.1, False), (0.1, True), (0.0, False), (0.0, True)):
        name = f"new shapes: dropout {dropout}, cuDNN {'on' if is_on else 'off'}"
        row = tried(name, _new_shapes, options, device, dropout, is_on)
        yield row if device.type == "cuda" or row["ok"] is False else {**row, "why": NOT_ON_A_CPU}


def _new_shapes(options: argparse.Namespace, device: torch.device, dropout: float, is_on: bool) -> Row:
    """Seconds of the first and second step of each of three shapes, in bf16."""
    backbone = workload.backbone_of(benchmark_options(options), dropout)
    model = workload.cast(workload.coconut(backbone), torch.bfloat16)
    latent = workload.tokens_of(backbone).latent or 0
    # Shapes of their own for every setting: a plan that is made stays.
    first = 30 if options.toy else 300 + 7 * (2 * is_on + int(dropout > 0))
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    seconds = []
    for columns in (first, first + 30, first + 60):
        inputs = to_device(batch_of(workload.sequence_of(columns, 2, latent, 5), 8).inputs, device)
        for _ in range(2):
            synchronize()
            started = time.perf_counter()
            model(**inputs).loss.backward()
            synchronize()
            seconds.append(time.perf_counter() - started)
            model.zero_grad()
    torch.backends.cuda.enable_cudnn_sdp(False)
    return {"first_s": seconds[2::2], "second_s": seconds[3::2], "start_s": seconds[:2]}
