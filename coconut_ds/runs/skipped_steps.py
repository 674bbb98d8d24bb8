"""Optimizer steps that fp16 skipped because their gradients overflowed, in words."""

from __future__ import annotations


def skipped_text(n_skipped: int, n_steps: int) -> str:
    """For a line of figures; empty where no step was skipped. Both counts are of the whole run so far."""
    return f"{n_skipped} of {n_steps} steps skipped" if n_skipped else ""


def skips_most(n_skipped: int, n_steps: int) -> bool:
    return 2 * n_skipped > n_steps


def skipped_warning(n_skipped: int, n_steps: int) -> str:
    """What it means that most steps were skipped, and the way out."""
    return (
        f"fp16: {n_skipped} of {n_steps} optimizer steps were skipped because their gradients overflowed, the weights "
        f"were updated {n_steps - n_skipped} times; lower initial_scale_power (or loss_scale) in the deepspeed file, "
        "lower lr, or use bf16 or fp32"
    )
