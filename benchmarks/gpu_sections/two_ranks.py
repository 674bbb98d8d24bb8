"""Two gloo ranks on one GPU, which NCCL refuses: ZeRO's partitions on CUDA. May fail without failing the check."""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch.multiprocessing

from coconut_ds import strict_json
from gpu_sections import Row, tried

_FILES, _EXAMPLES = ("zero1", "zero2"), 12


def rows(options: argparse.Namespace) -> Iterator[Row]:
    found: dict[str, Row] = {}
    yield tried("two ranks start and end", _ranks, options, found)
    for file, row in found.items():
        yield {"name": f"two ranks: {file}", **row}


def _ranks(options: argparse.Namespace, rows: dict[str, Row]) -> Row:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    into = options.work / "of_two_ranks.jsonl"
    try:
        # Raises what a rank raised.
        torch.multiprocessing.spawn(_rank, (port, into, options), nprocs=2)
    finally:
        lines = into.read_text().splitlines() if into.exists() else []
        rows |= dict(map(json.loads, lines))
    return {"ok": list(rows) == list(_FILES)}


def _rank(rank: int, port: int, into: Path, options: argparse.Namespace) -> None:
    # Both are the first of their machine, and so on its first GPU.
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    import deepspeed

    from coconut_ds.engine.build import start_process_group
    from coconut_ds.engine.states import gather
    from coconut_ds.training.step import optimizer_step
    from gpu_sections import begin, engines

    begin(options)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    start_process_group()
    expected, weights, moved = engines.plain_steps(engines.undivided(_EXAMPLES, 4))
    for file in _FILES:
        engine = engines.engine(file, "fp32")
        losses = [optimizer_step(engine, batches, "token").loss for batches in engines.steps_of(file, _EXAMPLES, 4, 1)]
        final = gather(engine)
        if rank == 0:
            apart = max(abs(mine - other) for mine, other in zip(losses, expected, strict=True))
            worst = max(float((final[name].cpu() - weights[name])[moved[name]].abs().max()) for name in weights)
            found = {"ok": apart < 1e-5 and worst < 5e-4, "loss_error": apart, "weight_error": worst}
            with into.open("a", encoding="utf-8") as file_of_rows:
                file_of_rows.write(strict_json.dumps([file, found]) + "\n")
