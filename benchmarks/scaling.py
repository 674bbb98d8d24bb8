"""How a training step's time grows with prefix length, thoughts and micro-batch.

    python benchmarks/scaling.py --tokenizer FOLDER [--rounds 3]
    python benchmarks/scaling.py --toy

One quantity varies at a time from 192 prefix columns, 4 thoughts and a micro-batch of 4; time ~ quantity ** exponent is
fitted by least squares on logarithms of those that fit into memory. Prints tables and one JSON line.
"""

from __future__ import annotations

import functools
import statistics

import numpy as np
import workload

from coconut_ds import Coconut
from coconut_ds.data.batches import to_device
from coconut_ds.memory.activations import batch_of

_BASE = {"prefix": 192, "thoughts": 4, "micro_batch": 4}
_ANSWER = 20
_VALUES = {"prefix": (48, 96, 192, 384), "thoughts": (1, 2, 4, 8, 16), "micro_batch": (1, 2, 4, 8)}
_TOY_BASE = {"prefix": 16, "thoughts": 2, "micro_batch": 2}
_TOY_VALUES = {"prefix": (8, 16, 32), "thoughts": (1, 2), "micro_batch": (1, 2)}


def main() -> None:
    parser = workload.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = workload.parse(parser, rounds=1)
    workload.begin(options)
    model = workload.coconut(workload.backbone_of(options))
    exponents = {}
    base = _TOY_BASE if options.toy else _BASE
    for quantity, tried in (_TOY_VALUES if options.toy else _VALUES).items():
        work = {str(value): functools.partial(_step, model, **(base | {quantity: value})) for value in tried}
        seconds = workload.seconds_by_round(work, options.rounds)
        values = [value for value in tried if str(value) in seconds]
        if len(values) < 2:
            parser.error(f"out of memory: fewer than two values of {quantity} fit")
        medians = [statistics.median(seconds[str(value)]) for value in values]
        exponents[quantity] = float(np.polyfit(np.log(values), np.log(medians), 1)[0])
        for value in values:
            print(f"{quantity:>12} {value:>4}: {workload.spread(seconds[str(value)])} s")
        print(f"{quantity:>12} exponent {exponents[quantity]:.2f}")
    workload.finish(options, exponents=exponents)


def _step(model: Coconut, prefix: int, thoughts: int, micro_batch: int) -> None:
    columns = prefix + thoughts + 1 + _ANSWER
    sequence = workload.sequence_of(columns, thoughts, int(model.latent_token_id or 0), _ANSWER)
    model(**to_device(batch_of(sequence, micro_batch).inputs)).loss.backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
