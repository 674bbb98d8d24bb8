"""The speed layer put on a model, and taken off again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn
from transformers import Cache
from transformers.activations import NewGELUActivation

from coconut_ds.model.fast import checkpointing, low_rank_attention, low_rank_linear
from coconut_ds.model.fast.kv_cache import TrainingCache
from coconut_ds.model.passes import LatentPasses
from coconut_ds.model.self_check import demand_fit


def install(model: LatentPasses) -> None:
    """Speed up the passes of `model`: same losses and gradients up to rounding. Nothing happens if that is done.

    Its backbone is changed in place until `uninstall`: linear layers and attention of passes over few columns, and
    GPT-2's GELU. What is saved holds no trace of it. Raises ModelError for a backbone that the layer does not fit.
    """
    if model.speed_layer is not None:
        return
    model.speed_layer = Installed(model)
    try:
        demand_fit(model)
    except Exception:
        uninstall(model)
        raise


def uninstall(model: LatentPasses) -> None:
    """Give the backbone of `model` its own modules, forwards and attention back; nothing happens without `install`."""
    if isinstance(model.speed_layer, Installed):
        model.speed_layer.remove()
        model.speed_layer = None


class Installed:
    """The speed layer of one model; see `SpeedLayer`."""

    def __init__(self, model: LatentPasses):
        self._base = model.base_causallm
        self._gelus = fuse_gelu(self._base)
        low_rank_linear.install(self._base.base_model)
        self._has_attention = low_rank_attention.install(self._base)
        self._checkpoints_layers = False

    def remove(self) -> None:
        self.restore_layers()
        if self._has_attention:
            low_rank_attention.uninstall(self._base)
        low_rank_linear.uninstall(self._base.base_model)
        for name, gelu in self._gelus.items():
            self._base.set_submodule(name, gelu)

    def cache(self, n_columns: int) -> Cache:
        return TrainingCache(n_columns)

    def forward(self) -> Callable[[bool], AbstractContextManager[None]]:
        return low_rank_linear.passes_of_a_forward()

    def checkpoint_layers(self, every_n_layers: int, offload: bool) -> None:
        checkpointing.checkpoint_layers(self._base, every_n_layers, offload)
        self._checkpoints_layers = True

    def restore_layers(self) -> None:
        if self._checkpoints_layers:
            checkpointing.restore_layers(self._base)
        self._checkpoints_layers = False


def fuse_gelu(model: nn.Module) -> dict[str, nn.Module]:
    """Use torch's GELU for GPT-2's, which runs eight operations that keep four tensors of the MLP's width.

    Returns the modules replaced, by name. Measured on a CPU in fp32 (docs/PERFORMANCE.md); one kernel instead of eight
    on a GPU, too.
    """
    replaced: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, NewGELUActivation)
    }
    for name in replaced:
        model.set_submodule(name, nn.GELU(approximate="tanh"))
    return replaced
