"""Time of a training step: multi-pass Coconut beside one plain pass and beside a straightforward multi-pass loop.

    python benchmarks/train_step.py --data PROSQA.json --tokenizer FOLDER [--micro-batch 4 8] [--rounds 5]
        [--rows floor coconut "window of 3" recomputed straightforward] [--precision fp16]
    python benchmarks/train_step.py --toy

Forward and backward on a micro-batch of median length, without the optimizer, which is the same for all; in half
precision without a loss scale, which costs nothing. Rows:
  floor          one plain pass over the same columns, LM head on supervised positions only
  coconut        thoughts from the newest state alone
  window of 3    contextual thoughts
  recomputed     the same with activation checkpointing
  straightforward  the published loop: cache on, logits of every column in every pass, one forward per thought, inputs
                 put together again for each. The published code also asks the device for the column of every thought
A row that runs out of memory stays in the table. Prints a table and one JSON line; ratios are medians over rounds of
the ratio within a round. `window_extra` compares whole steps, whose times differ by more than a window costs;
`window_extra_alone` times what makes the thoughts, forward and backward, in a model that has embeddings and no layers:
the difference between windows of 3 and 1 in medians, over the median step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import workload
from transformers import DynamicCache

from coconut_ds import Coconut, LatentContext
from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.data.batches import Batch, to_device
from coconut_ds.data.loaders import TrainingSteps
from coconut_ds.data.records import tokenize
from coconut_ds.data.stages import Curriculum
from coconut_ds.model.backbone import Backbone

_WINDOW_ROUNDS = 200
ROWS = ("floor", "coconut", "window of 3", "recomputed", "straightforward")
_RATIOS = {
    "step_over_floor": ("coconut", "floor"),
    "checkpointed_over_plain": ("recomputed", "window of 3"),
    "window_over_one": ("window of 3", "coconut"),
    "straightforward_over_floor": ("straightforward", "floor"),
}


def main() -> None:
    parser = workload.parser(__doc__)
    parser.add_argument("--data", help="ProsQA JSON")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dropout", type=float, default=0.1, help="0.1 is GPT-2's own")
    parser.add_argument("--precision", choices=workload.DTYPES, default="fp32")
    options = workload.parse(parser, micro_batch=[1, 2], rounds=1)
    workload.begin(options)
    backbone = workload.backbone_of(options, options.dropout)
    print(f"{'micro-batch':>11}  {'':15}  {'median s (fastest-slowest)':>27}  {'tokens/s':>8}  ratio to floor")
    results: dict[str, dict[str, Any]] = {}
    for micro in options.micro_batch:
        batch = _batch(options, backbone, micro)
        found = measure(backbone, batch, options.precision, options.rows, options.rounds)
        for name in options.rows:
            print(f"{micro:>11}  {name:15}  {_line(found, name)}")
        if "coconut" in found["seconds"]:
            extra = _window_seconds(options, batch)
            found["window_extra_alone"] = extra / statistics.median(found["seconds"]["coconut"])
            print(f"{micro:>11}  a window of 3 takes {1000 * extra:.2f} ms more than one of 1 to make the thoughts")
        results[str(micro)] = found
    last = {name: found[name] for name in (*_RATIOS, "window_extra", "window_extra_alone") if name in found}
    workload.finish(options, **last, by_micro_batch=results)


def measure(
    backbone: Backbone, batch: Batch, precision: str, rows: Sequence[str] = ROWS, rounds: int = 5
) -> dict[str, Any]:
    """Seconds by round and tokens per second of each row that fits, what did not fit, and the ratios between rows."""
    variants = _variants(backbone, batch, workload.DTYPES[precision])
    seconds = workload.seconds_by_round({name: variants[name] for name in rows}, rounds)
    return {
        **_ratios(seconds),
        "columns": batch.inputs["input_ids"].shape[1],
        "n_targets": batch.n_targets,
        "n_tokens": batch.n_tokens,
        "seconds": seconds,
        "tokens_per_second": {name: batch.n_tokens / statistics.median(values) for name, values in seconds.items()},
        "out_of_memory": [name for name in rows if name not in seconds],
    }


def _line(found: dict[str, Any], name: str) -> str:
    """A row of the table after its names."""
    seconds = found["seconds"]
    if name not in seconds:
        return "out of memory"
    over_floor = f"{workload.ratio(seconds, name, 'floor'):.3f}" if "floor" in seconds else ""
    return f"{workload.spread(seconds[name]):>27}  {found['tokens_per_second'][name]:>8.0f}  {over_floor}"


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The figures the timed rows allow."""
    found = {
        name: workload.ratio(seconds, *rows) for name, rows in _RATIOS.items() if all(row in seconds for row in rows)
    }
    if "window_over_one" in found:
        found["window_extra"] = found.pop("window_over_one") - 1
    return found


def _batch(options: argparse.Namespace, backbone: Backbone, micro: int) -> Batch:
    examples = tokenize(workload.records(options, 128), backbone.tokenizer)
    # The second of two stages replaces every step, here by as many thoughts as are asked for.
    curriculum = Curriculum("coconut", options.thoughts, 1, 1, True, 0.0, 0)
    windows = TrainingSteps(examples, curriculum, workload.tokens_of(backbone), BatchSizes(micro, 1, 1), 0, epoch=2)
    batches = sorted((windows[n][0] for n in range(len(windows))), key=lambda each: each.inputs["input_ids"].shape[1])
    return batches[len(batches) // 2]


def _variants(backbone: Backbone, batch: Batch, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs = to_device(batch.inputs)
    plain = workload.cast(workload.coconut(backbone, LatentContext()), dtype)
    window = workload.cast(workload.coconut(backbone), dtype)

    def step(model: Coconut, **changes: Any) -> None:
        model(**(inputs | changes)).loss.backward()
        model.zero_grad()

    def recomputed() -> None:
        window.enable_activation_checkpointing()
        step(window)
        window.disable_activation_checkpointing()

    def straightforward() -> None:
        _straightforward_loss(plain, inputs).backward()
        plain.zero_grad()

    return {
        # Without a span the latent tokens are tokens like any other.
        "floor": functools.partial(step, plain, thought_span=()),
        "coconut": functools.partial(step, plain),
        "window of 3": functools.partial(step, window),
        "recomputed": recomputed,
        "straightforward": straightforward,
    }


def _window_seconds(options: argparse.Namespace, batch: Batch) -> float:
    """Seconds that thoughts made from three states take longer than from one, in a model without layers."""
    inputs = {key: value for key, value in to_device(batch.inputs).items() if key not in ("labels", "supervised")}
    backbone = workload.backbone_of(options, dropout=0.0, n_layer=0)
    # Writing out the gradient of a whole vocabulary would take longer than the thoughts.
    backbone.model.get_input_embeddings().requires_grad_(False)

    def passes(model: Coconut) -> None:
        model.encode(**inputs).hidden.sum().backward()
        model.zero_grad()

    work = {"one": workload.coconut(backbone, LatentContext()), "three": workload.coconut(backbone)}
    rounds = 2 if options.toy else _WINDOW_ROUNDS
    seconds = workload.seconds_by_round(
        {name: functools.partial(passes, model) for name, model in work.items()}, rounds
    )
    return statistics.median(seconds["three"]) - statistics.median(seconds["one"])


def _straightforward_loss(model: Coconut, inputs: dict[str, Any]) -> torch.Tensor:
    backbone = model.base_causallm
    first, end = inputs["thought_span"]
    columns = inputs["input_ids"].shape[1]
    embeds = backbone.get_input_embeddings()(inputs["input_ids"])
    cache = DynamicCache(config=backbone.config)
    logits = []
    starts = [0, *range(first, end)]
    for start, stop in zip(starts, [*starts[1:], columns]):
        out = backbone(
            inputs_embeds=embeds[:, start:stop],
            attention_mask=inputs["attention_mask"][:, :stop],
            position_ids=inputs["position_ids"][:, start:stop],
            past_key_values=cache,
            output_hidden_states=True,
        )
        logits.append(out.logits)
        if stop < columns:
            rows = []
            for row in range(len(embeds)):
                each = [embeds[row, column] for column in range(columns)]
                if inputs["input_ids"][row, stop] == model.latent_token_id:
                    each[stop] = out.hidden_states[-1][row, -1]
                rows.append(torch.stack(each))
            embeds = torch.stack(rows)
    predicted = torch.cat(logits, dim=1)[:, :-1]
    return F.cross_entropy(predicted.flatten(0, 1), inputs["labels"][:, 1:].flatten())


if __name__ == "__main__":
    main()
