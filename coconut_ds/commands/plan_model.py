"""What fits of a model whose run file is not written yet: every ZeRO file, all weights or LoRA, kept or recomputed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import Device, resolve_ds_config
from coconut_ds.config.ds_json import DeepSpeedConfigError, read_ds_json, shipped_ds_jsons
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import LoraConfig
from coconut_ds.data.batches import TokenSequence
from coconut_ds.memory.activations import ActivationCost, measure
from coconut_ds.memory.batch_size import CARD_OVERHEAD_GIB, CARD_SHARE, card_budget
from coconut_ds.memory.faster_file import costs
from coconut_ds.memory.meter import GIB
from coconut_ds.memory.model_states import Elements, ModelStates
from coconut_ds.memory.shape_only import shape_of
from coconut_ds.model.adapters import Lora

# Cards of 11 GB have no bf16.
_CARD = Device(kind="cuda", has_bf16=False, has_fp16=True)
_FEW, _MORE = 2, 4
"""Layers of the models that are measured."""
_WANTED = 8
"""Examples of a micro-batch from which a card computes at full speed on short questions."""


@dataclass(frozen=True)
class Lengths:
    """Of the longest example, in tokens, and its thoughts."""

    question: int
    steps: int
    answer: int
    thoughts: int


@dataclass(frozen=True)
class Choice:
    """One way to train, and what fits."""

    lora: LoraConfig | None
    recomputed: bool
    file: str
    states: ModelStates
    largest: int
    """Micro-batch."""
    slower_by: int
    """What the file copies and sends beyond the fastest."""

    def order(self) -> tuple[bool, int, bool]:
        """All weights before adapters, then the file with the fewest copies, then activations that are kept."""
        return self.lora is not None, self.slower_by, self.recomputed


def plan_of_model(name: str, memory: float, ranks: int, lengths: Lengths, rank: int) -> str:
    """The tables and a line to start with; `memory` in GiB of one card, `rank` of the adapters."""
    budget = card_budget(memory)
    choices: list[Choice] = []
    sizes: list[Elements] = []
    for lora in (None, LoraConfig(r=rank)):
        adapters = None if lora is None else Lora(lora.r, lora.alpha)
        whole = shape_of(name, adapters)
        sizes.append(Elements.of(whole))
        n_layers = whole.base_causallm.config.get_text_config(decoder=True).num_hidden_layers
        for recomputed in (False, True):
            measured = _measured(name, adapters, recomputed, lengths, n_layers)
            config = RunConfig(method="coconut", precision="auto", lora=lora)
            choices += _choices(config, recomputed, sizes[-1], measured, ranks, budget)
    n_parameters = sum(sizes[0].trained)
    lines = [
        f"{name}: {n_parameters / 1e6:,.0f} M parameters on {ranks} card{'s' * (ranks > 1)} of {memory:g} GiB, fp16",
        f"Longest example: a question of {lengths.question} tokens, steps of {lengths.steps}, an answer of "
        f"{lengths.answer}, {lengths.thoughts} thoughts.",
        f"Counted on are {budget / GIB:.2f} GiB a card: {CARD_SHARE:.0%} of what CUDA and NCCL leave, which take about "
        f"{CARD_OVERHEAD_GIB:g}. Host memory is for all ranks together.",
        "",
        _row("trained", "activations", "deepspeed file", "on the card", "in host memory", "largest micro-batch"),
        *(_line(each, ranks) for each in choices),
        "",
        _recommendation(name, choices, ranks),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Deeper:
    """The cost of `n_layers` layers, from those of two numbers of them: what every further layer adds is the same."""

    few: ActivationCost
    more: ActivationCost
    n_layers: int

    def peak(self, rows: int) -> int:
        few, more = self.few.peak(rows), self.more.peak(rows)
        return few + (more - few) * (self.n_layers - _FEW) // (_MORE - _FEW)

    def most_rows(self, budget: int) -> int:
        return bisect_right(range(1, 2**20), budget, key=self.peak)


def _measured(name: str, lora: Lora | None, recomputed: bool, lengths: Lengths, n_layers: int) -> list[Deeper]:
    """Of each of `_sequences`, in fp16."""
    by_depth = []
    for depth in (_FEW, _MORE):
        model = shape_of(name, lora, depth)
        if recomputed:
            model.enable_activation_checkpointing()
        sequences = _sequences(lengths, model.latent_token_id)
        by_depth.append([measure(model, each, torch.float16, for_card=True) for each in sequences])
    return [Deeper(few, more, n_layers) for few, more in zip(*by_depth)]


def _sequences(lengths: Lengths, latent: int | None) -> Iterator[TokenSequence]:
    """The longest sequence with all steps and without thoughts, and the one with all thoughts and no step."""
    assert latent is not None
    prefix = lengths.question + 1
    tail = lengths.steps + lengths.answer
    yield TokenSequence([0] * (prefix + 1 + tail), prefix, 0, prefix + 1)
    ids = [0] * prefix + [latent] * lengths.thoughts + [0] * (1 + lengths.answer)
    yield TokenSequence(ids, prefix, lengths.thoughts, len(ids) - lengths.answer)


def _choices(
    config: RunConfig, recomputed: bool, elements: Elements, measured: list[Deeper], ranks: int, budget: int
) -> Iterator[Choice]:
    sizes = BatchSizes(1, 1, ranks)
    for path in shipped_ds_jsons():
        try:
            resolved = resolve_ds_config(read_ds_json(path), config, sizes, _CARD)
        except DeepSpeedConfigError:  # stage 0 has no fp16
            continue
        states = elements.states(resolved, ranks)
        largest = min(cost.most_rows(budget - states.device) for cost in measured)
        yield Choice(config.lora, recomputed, path, states, largest, len(costs(resolved, sizes)))


def _row(trained: str, activations: str, file: str, card: str, host: str, largest: str) -> str:
    return f"{trained:<12}  {activations:<11}  {file:<30}  {card:>11}  {host:>14}  {largest:>19}"


def _line(choice: Choice, ranks: int) -> str:
    trained = "all weights" if choice.lora is None else f"LoRA, r {choice.lora.r}"
    sizes = f"{choice.states.device / GIB:.2f}", f"{choice.states.host * ranks / GIB:.2f}"
    return _row(trained, "recomputed" if choice.recomputed else "kept", choice.file, *sizes, str(choice.largest))


def _recommendation(name: str, choices: list[Choice], ranks: int) -> str:
    """The first choice in order with a micro-batch of the size wanted, else the one with the largest."""
    fitting = [each for each in choices if each.largest >= _WANTED]
    best = min(fitting, key=Choice.order) if fitting else max(choices, key=lambda each: each.largest)
    if not best.largest:
        return "Nothing fits; take a smaller model, shorter examples or larger cards."
    words = [
        f"model_id={name}",
        f"deepspeed={best.file}",
        "precision=auto",
        "batch_size_training=auto",
        f"activation_checkpointing={str(best.recomputed).lower()}",
    ]
    if best.lora is not None:
        words.append(f"lora.r={best.lora.r}")
    return f"start: deepspeed --num_gpus {ranks} coconut_ds/train.py --run RUN.yaml {' '.join(words)}"
