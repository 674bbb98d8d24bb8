"""Decoding: batched on the cached thoughts beside one question at a time without a cache.

    python benchmarks/decode.py --data PROSQA.json --tokenizer FOLDER [--batch 16] [--new-tokens 64] [--rounds 3]
    python benchmarks/decode.py --toy

Random weights never end an answer on purpose, so every row decodes all its tokens. Prints a table and one JSON line.
"""

from __future__ import annotations

from typing import Any

import torch
import workload

from coconut_ds import Coconut
from coconut_ds.data.batches import to_device
from coconut_ds.data.loaders import prompt_loader
from coconut_ds.data.records import tokenize
from coconut_ds.data.stages import Curriculum


def main() -> None:
    parser = workload.parser(__doc__)
    parser.add_argument("--data", help="ProsQA JSON")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = workload.parse(parser, batch=2, new_tokens=4, rounds=1)
    workload.begin(options)
    backbone = workload.backbone_of(options)
    model = workload.coconut(backbone).eval()
    # An end that does not come: a marker is one token in 50,260 of an untrained model.
    model.eos_token_id = int(model.start_latent_id or 0)
    examples = tokenize(workload.records(options, 4 * options.batch), backbone.tokenizer)
    curriculum = Curriculum("coconut", 1, 1, options.thoughts, True, 0.0, 0)
    loader = prompt_loader(
        examples, curriculum, workload.tokens_of(backbone), options.thoughts, options.batch, rank=0, world=1
    )
    inputs = to_device(list(loader)[1].inputs)
    one = _row(inputs, 0)

    def batched() -> None:
        model.generate(inputs["input_ids"], inputs["attention_mask"], options.new_tokens, inputs["thought_span"])

    seconds = workload.seconds_by_round(
        {"batched": batched, "alone": lambda: _without_cache(model, one, options.new_tokens)}, options.rounds
    )
    if missing := {"batched", "alone"} - seconds.keys():
        parser.error(f"out of memory: {', '.join(sorted(missing))}; lower --batch")
    speedup = options.batch * workload.ratio(seconds, "alone", "batched")
    print(f"prompt of {inputs['input_ids'].shape[1]} columns, {options.new_tokens} new tokens")
    for name, rows in (("batched", options.batch), ("alone", 1)):
        rate = [rows / value for value in seconds[name]]
        print(f"{name:>8}: {rows:>3} rows, {workload.spread(seconds[name])} s, {workload.spread(rate)} examples/s")
    print(f"batched over alone: {speedup:.1f} x")
    workload.finish(options, decode_speedup=speedup, seconds=seconds)


def _row(inputs: dict[str, Any], row: int) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


@torch.no_grad()
def _without_cache(model: Coconut, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding as the published code does it: every thought and every token runs the whole sequence again."""
    backbone = model.base_causallm
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    embeds = backbone.get_input_embeddings()(ids)
    for column in torch.eq(ids[0], model.latent_token_id or 0).nonzero().flatten().tolist():
        hidden = backbone.base_model(inputs_embeds=embeds[:, :column], use_cache=False).last_hidden_state
        weights = torch.tensor(model.latent_context.weights, device=ids.device)
        newest_first = hidden[0, -len(weights) :].flip(0)
        embeds[0, column] = (weights[:, None] * newest_first).sum(dim=0) / weights.sum()
    given: list[int] = []
    while len(given) < new_tokens:
        logits = backbone(inputs_embeds=embeds, use_cache=False).logits
        given.append(int(logits[0, -1].argmax()))
        newest = torch.tensor([[given[-1]]], device=ids.device)
        embeds = torch.cat([embeds, backbone.get_input_embeddings()(newest)], dim=1)
    return given


if __name__ == "__main__":
    main()
