"""Products of one column of few rows: in blocks on all threads (`model/fast/few_rows.py`) beside torch's own.

    python benchmarks/few_rows.py --tokenizer FOLDER [--rows 1 2 4 8 16] [--rounds 21]
    python benchmarks/few_rows.py --toy

One column goes through the weights of all linear layers of the decoder, as a thought or a decoded token does. Both ways
run in turn, and the order changes every round. `Conv1D` are weights (inputs, outputs) as GPT-2 has them, `Linear` their
transposes. One row shows why it is left to torch. Prints a table and one JSON line; ratios, of seconds and of CPU
seconds (which other processes disturb less), are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import workload
from transformers.pytorch_utils import Conv1D

from coconut_ds.model.fast.few_rows import in_blocks

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def main() -> None:
    parser = workload.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=21)
    options = workload.parse(parser, rows=[1, 2], rounds=2)
    workload.begin(options)
    decoder = workload.backbone_of(options).model.base_model
    weights = [module.weight.detach() for module in decoder.modules() if type(module) is Conv1D]
    layouts = {"Conv1D": weights, "Linear": [weight.T.contiguous().T for weight in weights]}
    print(f"{'layout':>6}  rows  {'in blocks, s':>19}  {'plain, s':>19}  ratio  ratio of CPU time")
    results = []
    for layout, matrices in layouts.items():
        for rows in options.rows:
            found = _compare(matrices, rows, options.rounds)
            results.append({"layout": layout, "rows": rows, **found})
            spread = {name: workload.spread(values) for name, values in found["seconds"].items()}
            print(
                f"{layout:>6}  {rows:>4}  {spread['blocks']:>19}  {spread['plain']:>19}  {found['ratio']:>5.2f}  "
                f"{found['cpu_ratio']:.2f}",
                flush=True,
            )
    workload.finish(options, ratios=results)


def _compare(matrices: Sequence[torch.Tensor], rows: int, rounds: int) -> dict[str, Any]:
    """Seconds by round of both ways, and the ratios of blocks to plain."""
    inputs = {size: torch.randn(rows, 1, size) for size in {len(matrix) for matrix in matrices}}
    cpu: dict[str, list[float]] = {"blocks": [], "plain": []}

    def timed(name: str, multiply: Product) -> None:
        started = time.process_time()
        for matrix in matrices:
            multiply(inputs[len(matrix)], matrix)
        cpu[name].append(time.process_time() - started)

    threads = torch.get_num_threads()
    ways: dict[str, Product] = {
        "blocks": lambda column, matrix: in_blocks(column, matrix, threads),
        "plain": lambda column, matrix: F.linear(column, matrix.T),
    }
    work = {name: lambda name=name, way=way: timed(name, way) for name, way in ways.items()}
    seconds = workload.seconds_by_round(work, rounds)
    measured = {name: values[1:] for name, values in cpu.items()}  # the first round warms up
    ratios = {
        "ratio": workload.ratio(seconds, "blocks", "plain"),
        "cpu_ratio": workload.ratio(measured, "blocks", "plain"),
    }
    return {"seconds": seconds, **ratios}


if __name__ == "__main__":
    main()
