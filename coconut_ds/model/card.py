"""The model card: contents of a folder, training, results and usage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from coconut_ds.config.methods import METHODS

_TITLES = {
    "method": "method",
    "c_thought": "thoughts per replaced step",
    "stage": "stage of the weights",
    "max_latent_stage": "latent stages",
    "pad_latent_to_max": "as many thoughts for every question",
    "curriculum": "order in which steps were replaced",
    "epochs": "epochs trained",
    "latent_norm": "norm of a thought",
    "latent_projection": "inner size of the projection of a thought",
}


def model_card(settings: Mapping[str, Any], backbone: str, is_adapter: bool = False) -> str:
    """Markdown with the hub's metadata block, from the contents of `coconut.json`; `backbone` describes it.

    `is_adapter`: the folder holds adapters and no weights of the backbone.
    """
    name = str(settings.get("name") or "Coconut model")
    return (
        f"---\n{_metadata(name, settings).to_yaml()}\n---\n\n# {name}\n\n{_about(settings)}\n\n"
        f"## Training\n\n{_training_table(settings, backbone)}\n\n"
        f"## Results\n\n{_results_text(settings)}\n\n## Use\n\n{_USE}{_OF_ADAPTERS if is_adapter else _OF_WEIGHTS}\n"
    )


def _kind_of_thoughts(settings: Mapping[str, Any]) -> str:
    """As in `methods.Traits`; a model saved outside of a run is a Coconut."""
    return METHODS[settings["method"]].thoughts if "method" in settings else "continuous"


def _about(settings: Mapping[str, Any]) -> str:
    paper = "Coconut, [arXiv 2412.06769](https://arxiv.org/abs/2412.06769)"
    return {
        "continuous": (
            f"A causal language model trained to reason in continuous thoughts ({paper}): the positions of "
            f"`<|latent|>` are fed {_window_text(settings)}."
        ),
        "pause": (
            "A causal language model trained with pauses before its answer: positions of `<|latent|>`, which has a "
            f"learned embedding like any token. A control of {paper}."
        ),
        "none": (
            "A causal language model trained without continuous thoughts, by the method "
            f"`{settings.get('method')}`. A baseline of {paper}."
        ),
    }[_kind_of_thoughts(settings)]


def _metadata(name: str, settings: Mapping[str, Any]) -> ModelCardData:
    results = settings.get("results")
    dataset = str((settings.get("data") or {}).get("validation", "validation set"))
    accuracy = [EvalResult("text-generation", dataset, dataset, "accuracy", results["accuracy"])] if results else None
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["coconut", "latent-reasoning"] if _kind_of_thoughts(settings) == "continuous" else [],
        base_model=settings.get("base_model"),
        model_name=name,
        eval_results=accuracy,
    )


def _window_text(settings: Mapping[str, Any]) -> str:
    solver = settings.get("solver")
    if solver:
        return (
            f"{_states_text(settings)}, in {solver['iterations']} Jacobi iterations over all of them (arXiv 2506.18582)"
        )
    return _states_text(settings)


def _states_text(settings: Mapping[str, Any]) -> str:
    projection = ", through a trained projection" if settings.get("latent_projection") else ""
    return f"{_average_text(settings)}{projection}"


def _average_text(settings: Mapping[str, Any]) -> str:
    window = settings.get("latent_context")
    if not window:
        return "the hidden state before them"
    reach = "the sequence" if window["scope"] == "sequence" else "the latest pass"
    kind = "learned weights that started from" if window.get("learned") else "weights"
    weights = ", ".join(f"{weight:.4g}" for weight in window["weights"])
    return (
        f"a weighted average of the last {len(window['weights'])} hidden states of {reach} ({kind} {weights}, newest "
        "first)"
    )


def _training_table(settings: Mapping[str, Any], backbone: str) -> str:
    # For a method without thoughts the other settings have no meaning.
    titles = _TITLES if _kind_of_thoughts(settings) != "none" else {"method": "method", "epochs": "epochs trained"}
    rows = {"backbone": backbone}
    rows |= {title: str(settings[key]) for key, title in titles.items() if settings.get(key) is not None}
    rows |= {f"{split} data": str(file) for split, file in (settings.get("data") or {}).items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows.items())])


def _results_text(settings: Mapping[str, Any]) -> str:
    results = settings.get("results")
    if not results:
        return "These weights have not been evaluated."
    loss, n_cut = results["valid_loss"], results.get("n_cut")  # earlier versions did not count truncated answers
    loss_text = "not finite" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"
    cut_text = f"; {n_cut} answers were cut by max_new_tokens ({settings.get('max_new_tokens')})" if n_cut else ""
    return (
        f"Validation set, greedy: accuracy {results['accuracy']:.1%} ({results['n_correct']} of {results['n_total']}), "
        f"loss {loss_text}, {results['mean_new_tokens']:.1f} tokens an answer, thoughts included{cut_text}."
    )


_USE = """With `coconut_ds` installed:

```python
from coconut_ds import Coconut

model = Coconut.from_pretrained("THIS FOLDER OR HUB ID")
```

or `python -m coconut_ds.ask FOLDER "a question"`. """
_OF_WEIGHTS = """The backbone alone, which knows no thoughts, loads in plain
transformers: `AutoModelForCausalLM.from_pretrained(...)`."""
_OF_ADAPTERS = """The folder holds LoRA adapters, and the
base model named in `adapter_config.json` has to be there; `python -m coconut_ds.export FOLDER OUT` merges both."""
