"""The process with fake CUDA: `python -m fake_cuda.child MODULE:FUNCTION CASES`, started by `run.py`."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from typing import Any

from fake_cuda.device import torch  # the hooks come first


def main(target: str, cases: str) -> None:
    torch.set_num_threads(1)
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    for number, case in enumerate(json.loads(cases)):
        torch.manual_seed(0)
        print(json.dumps({"case": number, **_result(function, case)}), flush=True)


def _result(function: Any, case: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"facts": function(**case)}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main(*sys.argv[1:])
