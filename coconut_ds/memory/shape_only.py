"""A model of which only shapes matter, for memory plans: from its configuration alone, without weights.

Its parameters are memory that nothing writes to, which a system hands out without taking any: three billion fp32
numbers fit beside everything else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coconut_ds.data.markers import MARKERS
from coconut_ds.model import fast
from coconut_ds.model.adapters import Lora, adapt
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import model_of_config


def shape_of(name: str, lora: Lora | None = None, n_layers: int | None = None) -> Coconut:
    """Plain Coconut around a folder, a `config.json` or a hub id, with marker tokens, and adapters if `lora` says so.

    With `n_layers` of its layers, and memory for them; by default with all of them, on the meta device. Raises
    ModelError for a configuration that transformers has no causal language model for.
    """
    folder = str(Path(name).parent) if Path(name).name == "config.json" else name
    with torch.device("meta"):
        base = model_of_config(folder, len(MARKERS), n_layers)
    table: Any = base.get_input_embeddings()
    n_tokens = table.num_embeddings
    markers = tuple(range(n_tokens - len(MARKERS), n_tokens))
    if lora is not None:
        adapt(base, replace(lora, tokens=markers))
    start, end, latent = markers
    # On the meta device nothing is computed, and so nothing is checked either.
    model = Coconut(base, latent_token_id=latent, start_latent_id=start, end_latent_id=end, eos_token_id=0)
    fast.install(model)
    if n_layers is not None:
        _allocate(model)
    return model


def _allocate(model: nn.Module) -> None:
    """Move what is on the meta device into memory, uninitialised; tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                own = moved.get(id(parameter))
                if own is None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    own = moved[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                setattr(module, name, own)
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
