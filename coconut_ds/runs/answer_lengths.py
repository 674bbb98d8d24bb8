"""How long answers were, and which were cut, in words: what ends at `max_new_tokens` looks like a wrong answer."""

from __future__ import annotations


def lengths_text(mean_new_tokens: float, mean_thoughts: float, n_cut: int, max_new_tokens: int) -> str:
    """The lengths of the answers of an evaluation, for its line; the means are per question."""
    parts = ""
    if mean_thoughts:
        parts = f" ({mean_thoughts:.1f} thoughts + {mean_new_tokens - mean_thoughts:.1f} generated)"
    cut = f", {n_cut} cut by max_new_tokens {max_new_tokens}" if n_cut else ""
    return f"{mean_new_tokens:.1f} tokens an answer{parts}{cut}"


def cut_warning(n_cut: int, n_total: int, max_new_tokens: int, key: str = "max_new_tokens") -> str:
    """What it means that answers were cut, and the way out; `key` is how the limit is spelled where it was set."""
    return (
        f"{n_cut} of {n_total} answers reached {key} ({max_new_tokens}) before their end and are compared as cut off "
        f"there; raise {key}, unless the model is not trained enough yet to end its answers"
    )
