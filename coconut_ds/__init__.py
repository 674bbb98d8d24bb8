"""coconut_ds: contextual Coconut (Chain of Continuous Thought) trained by DeepSpeed."""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "Coconut": "coconut_ds.model.coconut",
    "LatentContext": "coconut_ds.model.latents",
    "RunConfig": "coconut_ds.config.run_config",
}
__all__ = ["Coconut", "LatentContext", "RunConfig", "__version__"]


def __getattr__(name: str):
    # Lazy, so that `import coconut_ds` loads neither torch nor transformers.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
