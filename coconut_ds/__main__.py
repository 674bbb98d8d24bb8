"""One command line for everything: `python -m coconut_ds VERB ...`, where `VERB --help` explains a verb."""

from __future__ import annotations

import sys
from importlib import import_module

from coconut_ds.commands.command_line import PROG
from coconut_ds.errors import did_you_mean

# Verb, its module in commands/, what it does. A module is imported when its verb is used: some load torch.
_VERBS = (
    ("train", "train", "train a run on every GPU, or on CPU ranks without one"),
    ("eval", "evaluate", "evaluate a checkpoint of a run folder"),
    ("demo", "demo", "train a small model from scratch and print its accuracy per stage"),
    ("sweep", "sweep", "train a list of runs one after another, except those that are finished"),
    ("plan", "plan", "memory of a run, per stage and per DeepSpeed file, before it is started"),
    ("ask", "ask", "ask a trained model questions"),
    ("compare", "compare", "compare runs by their answers, with intervals and tests"),
    ("report", "report", "write an HTML page about one or more runs"),
    ("inspect", "inspect_latents", "look at the thoughts of a trained model"),
    ("export", "export", "turn a checkpoint into a folder that transformers loads"),
)


def main(arguments: list[str] | None = None) -> int:
    """The exit status of the verb; 2 for an unknown one."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(f"usage: {PROG} VERB ...\n")
        print("\n".join(f"  {name:<8}  {purpose}" for name, _, purpose in _VERBS))
        print(f"\n{PROG} VERB --help explains a verb.")
        return 0
    modules = {name: module for name, module, _ in _VERBS}
    if verb not in modules:
        hint = did_you_mean(verb, modules)
        print(f"error: unknown command {verb!r}{hint}; {PROG} --help lists the commands", file=sys.stderr)
        return 2
    status: int = import_module(f"coconut_ds.commands.{modules[verb]}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
