"""Every family of causal language models in transformers, tiny and with random weights: exact, refused, or wrong.

    python -m tests.families [MODEL_TYPE ...] [--write]

A model of each family is made from its own configuration class with small numbers, wrapped, and trained and decoded
beside the naive twin (`naive.py`). Without names all of them are tried; `--write` then writes docs/FAMILIES.md. Status
1 when one was wrong.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "preprocessing")]

import naive  # noqa: E402
import tiny  # noqa: E402

from coconut_ds import Coconut, LatentContext  # noqa: E402
from coconut_ds.data.batches import Tokens, collate_training, training_sequence  # noqa: E402
from coconut_ds.data.stages import Layout  # noqa: E402
from coconut_ds.errors import ModelError, in_one_line  # noqa: E402
from coconut_ds.model import fast  # noqa: E402

PAGE = _TESTS.parent / "docs" / "FAMILIES.md"
_WINDOW = 5
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), tiny.VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "embed_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "emb_dim", "attention_hidden_size", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "decoder_ffn_dim", "dim_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "ffn_hidden_size", "d_inner", "mlp_hidden_size", "feed_forward_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "dim_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 96),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention"), _WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("full_attention_interval", "attn_layer_period", "layer_group_size"), 2),
    "v_head_dim": 6,
    "rotary_dim": 8,
    "attn_layer_offset": 1,
    **dict.fromkeys(("n_group", "topk_group", "num_memory_blocks"), 1),
    **dict.fromkeys(("pad_token_id",), tiny.PAD),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), tiny.EOS),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"), 0.0),
    "qk_head_dim": 8,
    "sliding_window_pattern": 2,
    "is_decoder": True,
    "initializer_range": 0.2,
    "first_k_dense_replace": 1,
}


Outcome = Literal["exact", "refused", "wrong", "not built"]


@dataclass(frozen=True)
class Tried:
    """What came of a family, and why it was not exact."""

    family: str
    outcome: Outcome
    remark: str = ""


def families() -> list[str]:
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def small_model(family: str) -> PreTrainedModel:
    """A tiny model of the family with random weights; raises whatever its classes raise for small numbers."""
    config_class = next(each for each in MODEL_FOR_CAUSAL_LM_MAPPING if each.model_type == family)
    config = _small_config(config_class)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms start from 1 and biases from 0, where a part that is left out would not show.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


_OF_FAMILY: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}


def _small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    known = config_class().to_dict()
    own = _OF_FAMILY.get(config_class.model_type, {})
    if "qk_rope_head_dim" in known:
        # There the head has two parts, and its size follows from theirs.
        known.pop("head_dim", None)
        own = {"num_key_value_heads": 4, **own}
    kinds = list(dict.fromkeys(known.get("layer_types") or ()))
    if len(kinds) > 1:
        own = {"layer_types": kinds, "num_hidden_layers": len(kinds), **own}
    parts = {
        key: {**_small_values(value), **own.get(key, {})}
        for key, value in known.items()
        if key.endswith("_config") and isinstance(value, dict)
    }
    return config_class(**_small_values(known) | own | {key: value for key, value in parts.items() if value})


def _small_values(known: dict[str, Any]) -> dict[str, Any]:
    """Of the same kind as those of the family: some configurations are strict about it."""
    return {
        key: type(known[key])(value) if isinstance(known[key], int | float) else value
        for key, value in _SMALL.items()
        if key in known
    }


TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
_ROWS = ((9, 2, 4), (12, 1, 2), (2, 1, 1), (7, 0, 0))
"""(question tokens, skipped steps, thoughts) of each row of a training batch."""
_PROMPTS = (
    [7, 8, 9, 10, 11, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END],
    [12, tiny.START, tiny.LATENT, tiny.END],
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
)
_NEW_TOKENS = 5
_WIDTH = 120


def try_family(family: str) -> Tried:
    try:
        base = small_model(family)
        with torch.no_grad():
            base(input_ids=torch.tensor([[7, 8, 9, 10]]), use_cache=False)
    except Exception as error:  # small numbers that the family's own code does not take
        return Tried(family, "not built", f"{type(error).__name__}: {in_one_line(error)}")
    try:
        model = Coconut(
            base,
            latent_token_id=tiny.LATENT,
            start_latent_id=tiny.START,
            end_latent_id=tiny.END,
            eos_token_id=tiny.EOS,
            latent_context=LatentContext((0.6, 0.3, 0.1)),
        )
        fast.install(model)  # as the trainer does
    except ModelError as error:
        return Tried(family, "refused", str(error))
    for difference in (_training_difference, _decoding_difference):
        try:
            problem = difference(model)
        except Exception as error:
            problem = f"{difference.__name__}: {type(error).__name__}: {in_one_line(error)}"
        if problem is not None:
            return Tried(family, "wrong", problem)
    return Tried(family, "exact", "" if model.decodes_on_static_cache else "decodes on a cache that grows")


def _training_difference(model: Coconut) -> str | None:
    """How loss or gradients of a ragged batch differ from the naive twin's."""
    rows = [tiny.row(question, [3, 4, 5], 4, seed) for seed, (question, _, _) in enumerate(_ROWS)]
    layouts = [Layout(n_skip, n_thoughts) for _, n_skip, n_thoughts in _ROWS]
    sequences = [training_sequence(row, layout, TOKENS) for row, layout in zip(rows, layouts)]
    inputs = collate_training(sequences, list(range(len(rows))), tiny.PAD).inputs
    fast = model(**inputs).loss_sum
    of_fast = _gradients(model, fast)
    slow = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    of_slow = _gradients(model, slow)
    if not abs(fast.item() / slow.item() - 1) < 1e-5:
        return f"loss {fast.item():.6f}, the naive twin has {slow.item():.6f}"
    whole = torch.cat([each.flatten() for each in of_slow.values()]).norm()
    for name, expected in of_slow.items():
        # Some gradients are 0 but for rounding, such as that of a bias of keys.
        error = float((of_fast[name] - expected).norm() / max(expected.norm(), 1e-3 * whole))
        if not error < 1e-3:
            return f"gradient of {name} differs by {error:.1e}"
    return None


def _gradients(model: Coconut, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for name, each in model.named_parameters()
    }


@torch.no_grad()
def _decoding_difference(model: Coconut) -> str | None:
    """How greedy continuations of left-padded prompts differ from the naive twin's."""
    width = max(map(len, _PROMPTS))
    ids = torch.tensor([[tiny.PAD] * (width - len(each)) + each for each in _PROMPTS])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in _PROMPTS])
    for prompt, given in zip(_PROMPTS, model.generate(ids, mask, max_new_tokens=_NEW_TOKENS).tolist()):
        expected = naive.greedy(model, prompt, _NEW_TOKENS)
        if given[: len(expected)] != expected:
            return f"decoded {given}, the naive twin {expected}"
    return None


def page(tried: Sequence[Tried]) -> str:
    """docs/FAMILIES.md."""

    def named(outcome: Outcome) -> list[Tried]:
        return [each for each in tried if each.outcome == outcome]

    def listed(text: str) -> str:
        return fill(text, _WIDTH, break_on_hyphens=False)

    exact = named("exact")
    growing = [each.family for each in exact if each.remark]
    return f"""# Model families

Any causal language model of transformers can be named in a run. Whether the passes fit it is tried on a few tokens when
it is wrapped (`coconut_ds/model/self_check.py`), because transformers does not say. This page has the result for every
family of transformers {version("transformers")}, each as a tiny model with random weights and a sliding window of 5
where it has one: loss, gradients and greedy continuations of ragged batches with thoughts beside the naive twin of the
tests. `python -m tests.families --write` makes it (torch {version("torch").split("+")[0]}, CPU);
`tests/model/test_families.py` repeats the common ones.

## Exact: {len(exact)}

Loss to 1e-5, gradients to 1e-3, the same tokens.

{listed(", ".join(each.family for each in exact) + ".")}

{listed(f"Of these, {', '.join(growing)} decode on a cache that grows, the others on one of fixed size, faster.")}

## Refused: {len(named("refused"))}

With exit status 2 and the reason, before anything is trained or answered.

{_table(named("refused"))}

## Not tried: {len(named("not built"))}

Their own code takes no model this small, or wants libraries or inputs beside text. The check is made for them too.

{_table(named("not built"))}
"""


def _table(rows: Sequence[Tried]) -> str:
    lines = [f"| {each.family} | {_reason(each.remark)} |" for each in rows]
    return "\n".join(["| family | why |", "|---|---|", *lines])


def _reason(remark: str) -> str:
    """What is particular to the family."""
    own = remark.split("does not fit Coconut's passes")[-1].split("; losses or answers")[0].strip(": ")
    return own.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} when all were tried")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tried = []
    for family in options.families or families():
        tried.append(try_family(family))
        print(f"{family:<28}  {tried[-1].outcome:<9}  {_reason(tried[-1].remark)}", flush=True)
    if options.write and not options.families:
        PAGE.write_text(page(tried), encoding="utf-8")
    return int(any(each.outcome == "wrong" for each in tried))


if __name__ == "__main__":
    sys.exit(main())
