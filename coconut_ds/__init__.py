"""coconut_ds: contextual Coconut (Chain of Continuous Thought) trained by DeepSpeed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut_ds.config.run_config import RunConfig as RunConfig
    from coconut_ds.model.coconut import Coconut as Coconut
    from coconut_ds.model.latents import LatentContext as LatentContext

__version__ = "0.1.0"

__all__ = ["Coconut", "LatentContext", "RunConfig", "__version__"]
_EXPORTS = {"Coconut": "model.coconut", "LatentContext": "model.latents", "RunConfig": "config.run_config"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import coconut_ds` loads neither torch nor transformers.
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
