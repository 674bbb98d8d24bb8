"""Compatibility check of a model: a few tokens through the passes of training and decoding, against plain forwards.

Nothing in transformers says whether a causal language model computes the same in several forwards on a KV cache as in
one, honours the embeddings, positions and padding it is given, or has only a linear head above its hidden states. If
one of these does not hold, losses and answers are wrong without an error, so it is tested when a model is wrapped.

Shapes: B rows, T columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from coconut_ds.errors import ModelError, in_one_line
from coconut_ds.model.backbone import demand_plain_head, n_positions
from coconut_ds.model.decoding import next_token_logits
from coconut_ds.model.internals import keeps_recurrent_state
from coconut_ds.model.passes import TOKEN_IDS, LatentPasses

_COLUMNS, _PADDING = 7, 2
_THOUGHTS = (3, 5)
"""The columns of the thoughts: a prefix before them, a tail after."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Relative to the largest logit. Rounding gave 2.5e-6, 4e-3 and 1e-2 in SmolLM2-135M (fp32, fp16, bf16); a part that is
left out changes logits by a good share of their own size."""
_WITH_TF32 = 1e-2
_ALIKE = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Families whose layers differ in `layer_types` only, so that testing a few of them is enough."""


def demand_fit(model: LatentPasses) -> None:
    """Raise ModelError, with what differs, for a backbone that the passes or the decoder do not fit.

    Chooses the decoder's cache: of fixed size if the family supports one and its logits are right, else a growing one.
    Weights without data (meta device, ZeRO-3) are not tested. Modes, gradients and random numbers are not changed.
    """
    base: Any = model.base_causallm
    demand_plain_head(base, type(base).__name__)
    table = base.get_input_embeddings().weight
    for name in TOKEN_IDS:
        token = getattr(model, name)
        if token is not None and token >= len(table):
            raise ModelError(
                f"{name} {token}, the embedding has {len(table)} rows; add the marker tokens and call "
                "resize_token_embeddings, or take the tokenizer that belongs to the weights"
            )
    columns = min(_COLUMNS, n_positions(base) - 1)
    if table.is_meta or not table.numel() or columns <= _THOUGHTS[1]:
        return
    ids, mask = _ragged_pair(model, table, columns)
    with torch.no_grad(), _evaluating(model), _few_layers(base):
        with _trial(base, "a forward over a few tokens"):
            expected = _plain_logits(base, mask, input_ids=ids)
        try:
            if model.latent_token_id is None:
                _demand_head(model, ids, mask, expected)
            else:
                _demand_passes(model, ids, mask)
            _demand_decoding(model, ids, mask, expected)
        except ModelError:
            # In one pass without a cache: if this differs too, passes and decoding are not the cause, and it says so.
            _demand_head(model, ids, mask, expected)
            raise


def _demand_passes(model: LatentPasses, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Passes with thoughts give the logits of plain forwards over the same embeddings, thoughts among them."""
    base = model.base_causallm
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_thought = (columns >= _THOUGHTS[0]) & (columns < _THOUGHTS[1])
    with_thoughts = ids.masked_fill(is_thought, model.latent_token_id or 0)
    thoughts: list[torch.Tensor] = []

    def note(number: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
        thoughts.append(thought.detach().clone())  # before it is fed: CTRL scales its inputs in place
        return thought

    with _trial(base, "a prefix, two thoughts and the rest on the KV cache"):
        # With a graph: training uses different kernels.
        with torch.enable_grad():
            encoded = model.encode(with_thoughts, mask, thought_span=_THOUGHTS, intervene=note)
        given = model.lm_head(encoded.hidden.detach())
        fed = base.get_input_embeddings()(ids)
        last = thoughts[-int(is_thought.sum()) :]  # a solver computes each thought once per iteration
        fed[:, is_thought] = torch.stack(last, dim=1).to(fed.dtype)
        with _trial(base, "a forward over embeddings"):
            expected = _plain_logits(base, mask, inputs_embeds=fed)
        _demand_equal(base, given, expected, mask)


def _demand_decoding(model: LatentPasses, ids: torch.Tensor, mask: torch.Tensor, expected: torch.Tensor) -> None:
    """The logits of the first decoded token are the last ones of plain forwards, `expected` (B, T, V)."""
    base = model.base_causallm
    try:
        with _trial(base, "a decoded token"):
            _demand_equal(base, next_token_logits(model, ids, mask), expected, mask)
    except ModelError:
        if not model.decodes_on_static_cache:
            raise
        model.decodes_on_static_cache = False
        _demand_decoding(model, ids, mask, expected)


def _demand_head(model: LatentPasses, ids: torch.Tensor, mask: torch.Tensor, expected: torch.Tensor) -> None:
    """The LM head on the states of one pass gives the logits of plain forwards, for the first row and for both."""
    base = model.base_causallm
    for what, some in (("its LM head on the states of its body", slice(0, 1)), ("rows padded on the left", slice(2))):
        with _trial(base, what):
            states = model.encode(ids[some], mask[some], thought_span=())
            _demand_equal(base, model.lm_head(states.hidden), expected[some], mask[some])


def _plain_logits(base: PreTrainedModel, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of plain forwards of the model, one per row without its padding: (B, T, V), 0 in padding."""
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    rows = []
    for row, real in enumerate(mask.bool()):
        options = {name: value[row, real][None] for name, value in inputs.items()}
        if takes_positions:
            options["position_ids"] = torch.arange(int(real.sum()), device=mask.device)[None]
        logits = base(**options, use_cache=False).logits[0]
        rows.append(F.pad(logits, (0, 0, len(real) - len(logits), 0)))
    return torch.stack(rows)


class _Difference(Exception):
    """Logits that are not those of a plain forward; the message says how they differ."""


@contextmanager
def _trial(base: PreTrainedModel, what: str) -> Iterator[None]:
    """Raises ModelError for a difference inside, and for any error of model code that was not written for passes."""
    try:
        yield
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:
        fails = "" if isinstance(error, _Difference) else f"fails with {type(error).__name__}: "
        state = " (it keeps recurrent or convolutional state beside keys and values)" * keeps_recurrent_state(base)
        raise ModelError(
            f"{type(base).__name__} does not fit Coconut's passes{state}: {what}: {fails}{in_one_line(error)}; losses "
            "or answers would be wrong, take another model (docs/FAMILIES.md lists the families that were tried)"
        ) from error


def _demand_equal(base: PreTrainedModel, given: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    """Compare `given` (B, columns, V) with the last columns of `expected` (B, T, V), padding aside."""
    expected = expected[:, -given.shape[1] :]
    if given.shape != expected.shape:
        raise _Difference(f"gives logits of shape {list(given.shape)} and not {list(expected.shape)}")
    real = mask[:, -given.shape[1] :].bool()
    one, other = given[real], expected[real]
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    share = float(apart.max() / other.nan_to_num().abs().max())
    # The precision of `expected`: `generate` always returns logits in fp32.
    may_use_tf32 = expected.is_cuda and expected.dtype == torch.float32
    tolerance = _WITH_TF32 if may_use_tf32 else _TOLERANCES.get(expected.dtype, 1e-1)
    if math.isnan(share):
        raise ModelError(
            f"{type(base).__name__}: the logits of a few tokens are not finite; the weights are damaged or overflow, "
            "take an earlier checkpoint"
        )
    if not share <= tolerance:
        raise _Difference(f"logits differ from those of a plain forward by {share:.1e} of the largest")


def _ragged_pair(model: LatentPasses, table: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinary token ids (2, columns) and their mask; the second row is padded on the left."""
    config = model.base_causallm.config.get_text_config(decoder=True)
    special = {getattr(model, name) for name in TOKEN_IDS}
    special |= {getattr(config, "pad_token_id", None), getattr(config, "bos_token_id", None)}
    ordinary = [token for token in range(min(len(table), 10 * columns)) if token not in special]
    places = torch.arange(2 * columns, device=table.device) * 2 % len(ordinary)
    ids = torch.tensor(ordinary, device=table.device)[places].unflatten(0, (2, columns))
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    return ids, mask


@contextmanager
def _few_layers(base: PreTrainedModel) -> Iterator[None]:
    """Cuts a known family to its first layers, at least two and one of each kind, since its layers are alike."""
    if base.config.model_type not in _ALIKE:
        yield
        return
    body = base.base_model
    name, layers = next((name, each) for name, each in body.named_children() if isinstance(each, nn.ModuleList))
    kinds = list(getattr(base.config, "layer_types", None) or [])
    setattr(body, name, layers[: max([2, *(kinds.index(kind) + 1 for kind in kinds)])])
    try:
        yield
    finally:
        setattr(body, name, layers)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; afterwards every module is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
