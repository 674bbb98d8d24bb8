"""Entry of every run: `deepspeed --num_gpus 2 coconut_ds/train.py --run run_configs/prosqa.yaml [key=value ...]`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the launcher starts it by path: this folder is first on sys.path, the package lies above
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE)]
    # Before torch is imported: ranks on one machine share its cores, and a card's memory fits steps of every shape.
    _CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _RANKS_HERE = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun has the second
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _CORES // _RANKS_HERE)))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"))

import argparse
import traceback

from coconut_ds import strict_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError
from coconut_ds.runs.lock import run_folder_held
from coconut_ds.runs.paths import RunFolder


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run YAML, see run_configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and DeepSpeed configurations")
    parser.add_argument("--verbose", action="store_true", help="show what libraries print, instead of writing run.log")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by the launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the YAML")
    return parser.parse_intermixed_args(arguments)  # options may stand between overrides


def main(arguments: list[str] | None = None) -> int:
    """Status 0: complete, or stopped on request; 2: the user has to fix something; 130: a second SIGINT; else 1."""
    from coconut_ds.runtime import distributed

    options = parse_arguments(arguments)
    try:
        run(load_run_config(options.run, options.overrides), options)
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        return distributed.report_failure(f"error: {error}", 2)
    except Exception:
        return distributed.report_failure(traceback.format_exc(), 1)
    distributed.close()
    return 0


def run(config: RunConfig, options: argparse.Namespace) -> None:
    from coconut_ds.runs.terminal import libraries_to, say

    folder = RunFolder(config.run_folder)
    log = None if options.verbose or options.dry_run else folder.log
    with run_folder_held(None if options.dry_run else folder.path), libraries_to(log):
        from coconut_ds.config.ds_json import read_ds_json  # in here: libraries have something to say on import
        from coconut_ds.config.resolved_run import resolve
        from coconut_ds.engine.build import describe_device
        from coconut_ds.runtime.distributed import world_size
        from coconut_ds.runtime.torch_settings import prepare_device
        from coconut_ds.training import session

        prepare_device()
        draft = resolve(config, read_ds_json(config.deepspeed), describe_device(), world_size(), options.run)
        if options.dry_run:
            say(f"# run\n{draft.config.to_yaml()}\n# deepspeed\n{strict_json.dumps(draft.ds_config, indent=2)}")
        elif config.only_eval:
            session.evaluate(draft)
        else:
            session.train(draft)


if __name__ == "__main__":
    from coconut_ds.runtime.distributed import end_process

    end_process(main())
