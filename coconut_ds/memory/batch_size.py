"""`batch_size_training: auto` and `eval_batch_size: auto`: the largest batch that fits in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from datasets import Dataset

from coconut_ds.config.resolved_run import DraftRun
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.batches import Tokens, TokenSequence, to_device
from coconut_ds.data.stages import Curriculum
from coconut_ds.errors import InputError
from coconut_ds.memory.activations import (
    batch_of,
    in_training,
    measure,
    predicted_peak,
    total_loss,
    widest_mixed_sequence,
    widest_sequence,
)
from coconut_ds.memory.meter import GIB
from coconut_ds.memory.model_states import Elements
from coconut_ds.model.backbone import cast_parameters
from coconut_ds.model.coconut import Coconut
from coconut_ds.runs.terminal import say
from coconut_ds.runtime import distributed

USABLE_SHARE = 0.9
"""Share of the free memory to take; the rest is for fragmentation, CUDA workspaces and what the meter cannot see."""
CARD_OVERHEAD_GIB = 0.7
"""Of an empty card, before the first tensor: the CUDA context (0.3 to 0.45) and NCCL (0.1 to 0.3), as users report."""
CARD_SHARE = 0.93
"""Share of what is left that a plan counts on. `auto` counts on less: nobody is there to try a smaller batch."""
_MOST_EVAL_ROWS = 256


def card_budget(seen_gib: float) -> int:
    """Bytes for model states and activations on an empty card of which torch sees `seen_gib`; 0 if there is no room."""
    return int(max(0.0, CARD_SHARE * (seen_gib - CARD_OVERHEAD_GIB)) * GIB)


def memory_budget() -> int:
    """Bytes this rank may use now: of its GPU's free memory, which CUDA and NCCL have left, or of the host's."""
    if distributed.device().type == "cuda":
        return int(USABLE_SHARE * torch.cuda.mem_get_info(distributed.device())[0])
    return int(USABLE_SHARE * psutil.virtual_memory().available / distributed.ranks_here())


def distinct_stages(config: RunConfig, curriculum: Curriculum) -> list[int]:
    """The stages of a run with different layouts, in order."""
    stages = {curriculum.stage(epoch) for epoch in range(config.resume, config.num_epochs)}
    return sorted({min(stage, curriculum.max_latent_stage + 1) for stage in stages})


def choose_micro_batch(
    draft: DraftRun, model: Coconut, examples: Dataset, curriculum: Curriculum, tokens: Tokens
) -> int:
    """The largest micro-batch that divides `train_batch_size` over the ranks and fits in every stage of the run.

    Each rank predicts its own, and on a GPU tries the longest possible batch; the minimum over ranks is returned.
    Raises InputError if not even one example fits.
    """
    world = draft.sizes.world
    per_rank = draft.sizes.total // world
    kept = kept_between_steps(model, draft.ds_config)
    budget = memory_budget() - kept
    deciding = deciding_sequences(draft.config, examples, curriculum, tokens)
    dtype = memory_dtype(draft.ds_config)
    on_card = distributed.device().type == "cuda"
    rows = min(measure(model, sequence, dtype, on_card).most_rows(budget) for sequence in deciding)
    micro = largest_divisor(per_rank, rows)
    if on_card:
        # A copy: the weights to train keep their precision.
        trial = copy.deepcopy(model)
        cast_parameters(trial, dtype)
        micro = halved_until_it_fits(trial, deciding, micro, per_rank, kept)
    micro = distributed.min_over_ranks(micro)
    if micro == 0:
        raise InputError(
            "batch_size_training: auto: not even one example fits beside the model; switch activation_checkpointing "
            "on, use a deepspeed file that keeps less on the device, or leave long examples out"
        )
    say(f"batch_size_training: auto is {micro}: {micro} x {per_rank // micro} accumulated x {world} ranks")
    return micro


def planned_peak(
    model: Coconut, ds_config: dict[str, Any], sequences: Sequence[TokenSequence], micro: int
) -> tuple[int, int]:
    """Bytes per rank: kept between steps, and added at most by a forward and backward over `micro` rows."""
    dtype, on_card = memory_dtype(ds_config), distributed.device().type == "cuda"
    activations = max(predicted_peak(model, batch_of(sequence, micro), dtype, on_card) for sequence in sequences)
    return kept_between_steps(model, ds_config), activations


def kept_between_steps(model: Coconut, ds_config: dict[str, Any]) -> int:
    """Bytes of a rank's model states on its GPU, or on the host if there is no GPU."""
    states = Elements.of(model).states(ds_config, distributed.world_size())
    return states.device if distributed.device().type == "cuda" else states.device + states.host


def deciding_sequences(
    config: RunConfig, examples: Dataset, curriculum: Curriculum, tokens: Tokens
) -> list[TokenSequence]:
    """The longest sequences of the stages that decide whether a run fits."""
    widest = [widest_sequence(examples, curriculum, stage, tokens) for stage in distinct_stages(config, curriculum)]
    if curriculum.uniform_prob:
        widest.append(widest_mixed_sequence(examples, curriculum, tokens))
    # The number of columns costs most, then the number of passes.
    deciding = [max(widest, key=lambda each: len(each.ids)), max(widest, key=lambda each: each.n_thoughts)]
    # Of what is written from thoughts, the number of tokens, as texts are padded to the longest.
    deciding.append(max(widest, key=lambda each: sum(map(len, each.written))))
    return [each for place, each in enumerate(deciding) if each not in deciding[:place]]


def memory_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The type in which a run computes."""
    if ds_config["fp16"]["enabled"]:
        return torch.float16
    return torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`; 0 if there is none."""
    return next((size for size in range(min(number, limit), 0, -1) if number % size == 0), 0)


def halved_until_it_fits(model: Coconut, sequences: list[TokenSequence], micro: int, per_rank: int, kept: int) -> int:
    """`micro`, at least halved for each time it runs out of memory; 0 if nothing fits."""
    while micro and not all(_fits(model, sequence, micro, kept) for sequence in sequences):
        micro = largest_divisor(per_rank, micro // 2)
    return micro


def _fits(model: Coconut, sequence: TokenSequence, rows: int, kept: int) -> bool:
    device = distributed.device()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    try:
        model.to(device)
        # Stands for what the engine will keep beside the weights.
        reserved = torch.empty(max(0, kept - weights), dtype=torch.uint8, device=device)
        with in_training(model):
            total_loss(model(**to_device(batch_of(sequence, rows).inputs))).backward()
        del reserved
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


@torch.no_grad()
def choose_eval_batch(model: Coconut, prompt_columns: int, new_tokens: int, n_examples: int) -> int:
    """Rows of a decoding batch that fit in half of the free memory, at most 256 and the size of the set.

    A row costs its keys and values up to the last new token, the widest activations of one layer over the prompt, and
    its logits.
    """
    config = model.base_causallm.config
    width = next(model.parameters()).element_size()
    columns = prompt_columns + new_tokens
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * columns * key_value_heads * head_size * width
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    layer = prompt_columns * (2 * inner + 8 * config.hidden_size) * width + 2 * prompt_columns**2 * 4
    row = cache + layer + 4 * config.vocab_size * 4
    rows = max(1, min(_MOST_EVAL_ROWS, n_examples, memory_budget() // 2 // row))
    return distributed.min_over_ranks(rows)
