"""The size of ZeRO's buckets is a matter of memory and messages, not of results."""

from __future__ import annotations

import json

import launching
import pytest
import tiny


@pytest.mark.ranks
def test_losses_do_not_depend_on_the_buckets(tmp_path):
    raw = json.loads((launching.ROOT / "ds_configs" / "zero2_offload.json").read_text(encoding="utf-8"))
    losses = []
    # The first is smaller than most gradients, which then are sent one by one.
    for size in (100, raw["zero_optimization"]["reduce_bucket_size"]):
        file = tmp_path / f"{size}.json"
        sizes = {"reduce_bucket_size": size, "allgather_bucket_size": size}
        file.write_text(json.dumps(raw | {"zero_optimization": raw["zero_optimization"] | sizes}), encoding="utf-8")
        run = tiny.run(tmp_path) | {
            "name": str(size),
            "num_epochs": 2,
            "deepspeed": str(file),
            "save_path": str(tmp_path),
        }
        launching.train(run, tmp_path, 2)
        steps = launching.events(tmp_path / str(size), "train_step")
        losses.append([(event["loss"], event["grad_norm"]) for event in steps])
    assert losses[0] == losses[1]
    assert losses[0]
