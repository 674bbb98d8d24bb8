"""Which file of `ds_configs/` should be faster than a run's and still fits: judged by what it copies and sends.

In order of what is given up: gathering weights layer by layer (stage 3), copies between card and host (offload), and
messages after every micro-batch instead of one per step (stage 2). A file is named only if it does nothing that the
run's file does not do, so that no measurement is needed to say so. Stage 0 is left out: it sends what stage 1 sends,
and every rank updates all weights.
"""

from __future__ import annotations

from typing import Any

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import Device, resolve_ds_config
from coconut_ds.config.ds_json import DeepSpeedConfigError, read_ds_json, shipped_ds_jsons
from coconut_ds.config.run_config import RunConfig
from coconut_ds.memory.meter import GIB
from coconut_ds.memory.model_states import Elements

_GATHERS = "does not gather the weights of each layer in each pass"
_OFFLOADS = "keeps optimizer states on the card (no copies over PCIe, no update on the host)"
_SENDS = "sends gradients once per step, not after every micro-batch"


def faster_file(
    config: RunConfig,
    ds_config: dict[str, Any],
    sizes: BatchSizes,
    device: Device,
    elements: Elements,
    budget: int,
) -> str | None:
    """Names the shipped file to try, and why; None if the run's own is the fastest that fits.

    `ds_config` is the run's, resolved; `elements` are those of its model; `budget` bytes of a card are for model
    states, beside the activations of a micro-batch.
    """
    own = costs(ds_config, sizes)
    found: list[tuple[int, str, str, list[str]]] = []
    for path in shipped_ds_jsons():
        try:
            other = resolve_ds_config(read_ds_json(path), config, sizes, device)
        except DeepSpeedConfigError:
            continue
        theirs = costs(other, sizes)
        n_bytes = elements.states(other, sizes.world).device
        if other["zero_optimization"].get("stage", 0) > 0 and set(theirs) < set(own) and n_bytes <= budget:
            saved = [cost for cost in own if cost not in theirs]
            found.append((len(theirs), path, f"({n_bytes / GIB:.2f} of {budget / GIB:.2f} GiB)", saved))
    if not found:
        return None
    _, path, size, saved = min(found)
    return f"{path} fits too {size} and should be faster: it {', and '.join(saved)}"


def costs(ds_config: dict[str, Any], sizes: BatchSizes) -> list[str]:
    """What a file copies and sends beyond one exchange of gradients and weights per step, the dearest first."""
    zero = ds_config["zero_optimization"]
    stage = zero.get("stage", 0)
    sections = (zero.get(section) or {} for section in ("offload_optimizer", "offload_param"))
    found = {
        _GATHERS: stage == 3,
        _OFFLOADS: any(section.get("device", "none") != "none" for section in sections),
        _SENDS: stage >= 2 and sizes.world > 1 and sizes.accumulation > 1,
    }
    return [cost for cost, is_so in found.items() if is_so]
