"""Installs the speed layer on a model, and uninstalls it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from coconut_ds.model.fast import checkpointing, low_rank_attention, low_rank_linear
from coconut_ds.model.fast.kv_cache import TrainingCache
from coconut_ds.model.passes import LatentPasses
from coconut_ds.model.self_check import demand_fit


def install(model: LatentPasses) -> None:
    """Speed up the passes of `model`: same losses and gradients up to rounding. Does nothing if it is installed.

    Changes the backbone in place until `uninstall`: linear layers and attention of passes over few columns, and GPT-2's
    GELU. Saved models are not affected. Raises ModelError for a backbone that the layer does not fit.
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
    """Restore the modules, forwards and attention of the backbone of `model`; does nothing without `install`."""
    if isinstance(model.speed_layer, Installed):
        model.speed_layer.remove()
        model.speed_layer = None


class Installed:
    """The speed layer of one model; see `SpeedLayer`."""

    cache = staticmethod(TrainingCache)
    forward = staticmethod(low_rank_linear.passes_of_a_forward)

    def __init__(self, model: LatentPasses):
        self._model, self._base = model, model.base_causallm
        self._gelus = fuse_gelu(self._base)
        low_rank_linear.install(self._base.base_model)
        self._has_attention = low_rank_attention.install(self._base)

    def remove(self) -> None:
        self.restore_layers()
        if self._has_attention:
            low_rank_attention.uninstall(self._base)
        low_rank_linear.uninstall(self._base.base_model)
        for name, gelu in self._gelus.items():
            self._base.set_submodule(name, gelu)

    def checkpoint_layers(self, every_n_layers: int, offload: bool) -> None:
        for model in self._checkpointed():
            checkpointing.checkpoint_layers(model, every_n_layers, offload)

    def restore_layers(self) -> None:
        for model in self._checkpointed():
            checkpointing.restore_layers(model)

    def _checkpointed(self) -> list[PreTrainedModel]:
        return [each for each in (self._base, self._model.step_decoder) if each is not None]


def fuse_gelu(model: nn.Module) -> dict[str, nn.Module]:
    """Replace GPT-2's GELU, eight operations that keep four tensors of the MLP's width, by torch's, a single kernel.

    Returns the replaced modules by name. Measured on a CPU in fp32 (docs/PERFORMANCE.md).
    """
    replaced: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, NewGELUActivation)
    }
    for name in replaced:
        model.set_submodule(name, nn.GELU(approximate="tanh"))
    return replaced
