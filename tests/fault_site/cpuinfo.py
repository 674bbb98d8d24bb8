"""Stands before py-cpuinfo on the path of what the tests start: what it finds of the processor is found once a session.

DeepSpeed's CPU Adam asks twice, and a rank spends two seconds of a core on the answers, more than on its imports.
"""

import json
import os
import sys
import tempfile
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = str(Path(__file__).parent)
_package = PathFinder.find_spec("cpuinfo", [entry for entry in sys.path if entry != _HERE])
_spec = PathFinder.find_spec("cpuinfo.cpuinfo", _package.submodule_search_locations)
_library = module_from_spec(_spec)
_spec.loader.exec_module(_library)


def get_cpu_info():
    # A folder of this session alone, which conftest.py makes and removes.
    answer = Path(os.environ.get("HF_DATASETS_CACHE", tempfile.gettempdir())) / "cpuinfo.json"
    if not answer.is_file():
        with tempfile.NamedTemporaryFile("w", dir=answer.parent, delete=False) as file:
            json.dump(_library.get_cpu_info(), file)
        os.replace(file.name, answer)
    return json.loads(answer.read_text())
