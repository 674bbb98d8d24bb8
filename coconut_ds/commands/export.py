"""Turn a checkpoint into a folder that plain transformers loads.

    python -m coconut_ds export CHECKPOINT OUT [--model-id MODEL] [--no-markers] [--push-to-hub REPO_ID [--private]]

CHECKPOINT is a checkpoint of a run, an HF folder, or a published `.pt` state dict, whose shape comes from MODEL. OUT
gets safetensors in fp32, the configuration, the tokenizer with the marker tokens and, if the checkpoint has latent
settings, `coconut.json` and a model card. It can be uploaded as it is, which `--push-to-hub` does.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from coconut_ds.checkpoints.weights import load_initial
from coconut_ds.commands.command_line import PROG, new_parser, run_command
from coconut_ds.config.methods import METHODS
from coconut_ds.errors import InputError, unwritable_output
from coconut_ds.model.adapters import is_adapted, merge
from coconut_ds.model.folder import push, stored_settings, stored_window, write_folder
from coconut_ds.runs import atomic_folder
from coconut_ds.runs.lock import output_held
from coconut_ds.runs.terminal import quiet_libraries


def main(arguments: list[str] | None = None, prog: str = f"{PROG} export") -> int:
    """0 if OUT was written; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model-id", default="openai-community/gpt2", help="model a `.pt` was trained from")
    parser.add_argument("--no-markers", action="store_true", help="weights of a method without thoughts")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload OUT to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", default=None, help="make REPO_ID a private repository")
    return run_command(_export, parser, arguments)


def _export(options: argparse.Namespace) -> None:
    quiet_libraries()
    export(options.checkpoint, options.out, options.model_id, not options.no_markers)
    print(f"written: {options.out}")
    if options.push_to_hub:
        print(f"uploaded: {push(options.out, options.push_to_hub, options.private)}")


def export(checkpoint: str, out: Path, model_id: str, with_markers: bool = True) -> None:
    """Write `out` atomically: until it is complete it is `OUT.unfinished`, which the next export replaces.

    Raises InputError for a damaged checkpoint, weights that do not fit, and an `out` that exists, is being written by
    another process, or cannot be written.
    """
    _demand_new(out)
    with output_held(out):
        # Another process may have finished writing it just now.
        _demand_new(out)
        settings = stored_settings(checkpoint)
        # A model saved outside of a run names no method.
        method = (settings or {}).get("method")
        has_thoughts = with_markers if method is None else METHODS[method].thoughts != "none"
        backbone, window = load_initial(model_id, checkpoint, has_thoughts), stored_window(checkpoint)
        if is_adapted(backbone.model):
            merge(backbone.model)
        with _unfinished(out) as folder:
            write_folder(folder, backbone.model, backbone.tokenizer, settings, window=window)


def _demand_new(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already; name a new folder")


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder to write to, renamed to `out` at the end and removed after an error."""
    folder = out.with_name(f"{out.name}.unfinished")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        yield folder
        atomic_folder.flush_folder(folder)
        folder.rename(out)
        atomic_folder.flush(out.parent)
    except OSError as error:
        raise unwritable_output(out, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
