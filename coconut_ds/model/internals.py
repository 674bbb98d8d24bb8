"""Private names of torch and transformers that the model relies on, checked when a model is wrapped."""

from __future__ import annotations

from importlib.metadata import version

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from coconut_ds.errors import ModelError

_KNOWN_TO_WORK = {"transformers": "5.23.0", "torch": "2.13.0"}


def demand_names(model: PreTrainedModel) -> None:
    """Raise ModelError if a name used below is missing: results or speed would change without an error."""
    wanted = (
        ("transformers", model, "_can_compile_fullgraph"),
        ("transformers", model, "_is_stateful"),
        ("transformers", model.config.get_text_config(decoder=True), "_attn_implementation"),
        ("torch", torch._C, "_current_graph_task_id"),
    )
    for library, holder, name in wanted:
        if not hasattr(holder, name):
            raise ModelError(
                f"{library} {version(library)} has no {name}, which the passes rely on; install "
                f"{library}=={_KNOWN_TO_WORK[library]}"
            )


def takes_static_cache(model: PreTrainedModel) -> bool:
    """Whether the family declares that it decodes on a cache of fixed size."""
    return bool(model._can_compile_fullgraph)


def keeps_recurrent_state(model: PreTrainedModel) -> bool:
    """Whether the family declares state other than keys and values."""
    return bool(model._is_stateful)


def attention_of(config: PreTrainedConfig) -> str:
    """The name of the attention implementation that a model uses."""
    return str(config._attn_implementation)


def current_backward() -> int:
    """The id of the running backward, by which torch's own checkpointing also tells backwards apart."""
    return int(torch._C._current_graph_task_id())
