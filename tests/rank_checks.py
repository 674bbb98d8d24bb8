"""What the engine tests run on ranks: `launching.on_ranks` starts these under the DeepSpeed launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from datasets import Dataset
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

from coconut_ds import Coconut, LatentContext, distributed
from coconut_ds.config import BatchSizes, RunConfig
from coconut_ds.curriculum.collator import Batch, Tokens, collate_training, training_sequence
from coconut_ds.curriculum.loaders import TrainingWindows
from coconut_ds.curriculum.stages import Curriculum
from coconut_ds.engine.build import build_engine, describe_device, start_process_group
from coconut_ds.engine.ds_config import read_ds_json, resolve_ds_config
from coconut_ds.engine.model_states import model_states
from coconut_ds.engine.stage_boundary import new_schedule, reset_optimizer_state
from coconut_ds.model.backbone import Backbone, word_tokenizer
from coconut_ds.training.checkpoint import Checkpoints, Progress, read_progress
from coconut_ds.training.step import NonFiniteLossError, optimizer_step

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
CONTEXT = LatentContext((0.6, 0.3, 0.1))


def ds_config(name: str, config: RunConfig, sizes: BatchSizes) -> dict[str, Any]:
    return resolve_ds_config(read_ds_json(f"ds_configs/{name}.json"), config, sizes, describe_device())


def curriculum() -> Curriculum:
    """Every second example draws its stage, so that rows and ranks have different numbers of thoughts."""
    return Curriculum("coconut", 1, 1, 3, False, 0.5, 0)


def examples(count: int) -> Dataset:
    return Dataset.from_list([tiny.row(4 + index % 5, [3, 2 + index % 3, 4], 3, index) for index in range(count)])


def undivided(rows: Dataset, epoch: int) -> Batch:
    plan = curriculum()
    sequences = [
        training_sequence(row, plan.training_layout(plan.stage(epoch), len(row["steps_ids"]), epoch, index), TOKENS)
        for index, row in enumerate(rows)
    ]
    return collate_training(sequences, list(range(len(rows))), tiny.PAD)


def gradient_errors(names: list[str], splits: list[list[int]], checkpointed: bool) -> dict[str, float]:
    """Largest difference between a gradient through the engine and that of one undivided batch of 8 in plain torch.

    `checkpointed` recomputes activations in the engine's model. One step of SGD with learning rate 1 turns the gradient
    into a difference of weights.
    """
    start_process_group()
    rows = examples(8)
    reference = tiny.coconut(context=CONTEXT)
    reference(**undivided(rows, epoch=2).inputs).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    world = distributed.world_size()
    errors = {}
    for name in names:
        for micro, accumulation in splits:
            sizes = BatchSizes(micro, accumulation, world)
            model = tiny.coconut(context=CONTEXT)
            if checkpointed:
                model.enable_activation_checkpointing()
            before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
            settings = ds_config(name, RunConfig(), sizes) | {"zero_force_ds_cpu_optimizer": False}
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=settings
            )
            # Accumulation is long enough for all eight, so the epoch is one window.
            window = TrainingWindows(rows, curriculum(), TOKENS, sizes, distributed.rank(), epoch=2)[0]
            step = optimizer_step(engine, window, "token")
            assert step.n_targets == undivided(rows, epoch=2).n_targets
            assert abs(step.loss - reference(**undivided(rows, epoch=2).inputs).loss.item()) < 1e-5
            weights = {key: safe_get_full_fp32_param(value) for key, value in model.named_parameters()}
            weights = {key: value if value is not None else model.get_parameter(key) for key, value in weights.items()}
            worst = max((before[key] - weights[key] - expected[key]).abs().max().item() for key in before)
            errors[f"{name} {micro}x{accumulation}"] = worst
    return errors


def micro_batch_loss() -> list[float]:
    """The step's loss under `micro_batch`, and the mean of the micro-batches' means, fillers left out."""
    start_process_group()
    rows, sizes = examples(5), BatchSizes(2, 2, distributed.world_size())
    config = RunConfig()
    model = tiny.coconut(context=CONTEXT)
    engine = build_engine(model, config, ds_config("zero2", config, sizes))
    everything = [TrainingWindows(rows, curriculum(), TOKENS, sizes, rank, 1)[0] for rank in range(sizes.world)]
    with torch.no_grad():
        means = [model(**b.inputs).loss.item() for window in everything for b in window if b.n_targets]
    assert sum(not b.n_targets for window in everything for b in window) == 1, "one of them is a filler"
    return [optimizer_step(engine, everything[distributed.rank()], "micro_batch").loss, sum(means) / len(means)]


def reset_against_fresh(name: str, precision: str) -> dict[str, Any]:
    """Three steps, a reset, three steps; against three steps of a fresh engine on the weights at the reset."""
    start_process_group()
    sizes = BatchSizes(2, 1, distributed.world_size())
    config = RunConfig(lr=1e-2, precision=precision, warmup_steps=1)
    rows = examples(12)

    def steps(engine, epoch: int) -> list[float]:
        schedule = new_schedule(engine, config, 10)
        windows = TrainingWindows(rows, curriculum(), TOKENS, sizes, distributed.rank(), epoch)
        losses = []
        for number in range(3):
            losses.append(optimizer_step(engine, windows[number], "token").loss)
            schedule.step()
        return losses

    def weights(model: Coconut) -> dict[str, torch.Tensor]:
        found = {key: safe_get_full_fp32_param(value) for key, value in model.named_parameters()}
        return {k: (v if v is not None else model.get_parameter(k)).detach().clone() for k, v in found.items()}

    model = tiny.coconut(context=CONTEXT)
    engine = build_engine(model, config, ds_config(name, config, sizes))
    steps(engine, epoch=1)
    at_reset = weights(model)
    reset_optimizer_state(engine)
    assert all(torch.equal(value, at_reset[key]) for key, value in weights(model).items()), "a reset keeps the weights"
    continued, after_reset = steps(engine, epoch=2), weights(model)

    fresh_model = tiny.coconut(context=CONTEXT)
    with torch.no_grad():
        for key, parameter in fresh_model.named_parameters():
            parameter.copy_(at_reset[key])
    fresh = build_engine(fresh_model, config, ds_config(name, config, sizes))
    if precision != "fp32":
        # A 16-bit engine starts its fp32 weights from rounded ones; the comparison wants those of the reset.
        for key, parameter in fresh_model.named_parameters():
            safe_set_full_fp32_param(parameter, at_reset[key])
    from_fresh, after_fresh = steps(fresh, epoch=2), weights(fresh_model)

    kept_model = tiny.coconut(context=CONTEXT)
    kept = build_engine(kept_model, config, ds_config(name, config, sizes))
    steps(kept, epoch=1)
    steps(kept, epoch=2)
    return {
        "same_losses": continued == from_fresh,
        "largest_difference": max((after_reset[k] - after_fresh[k]).abs().max().item() for k in after_reset),
        "reset_matters": max((after_reset[k] - weights(kept_model)[k]).abs().max().item() for k in after_reset),
    }


def saved_and_restored(name: str, precision: str, folder: str) -> dict[str, Any]:
    """Two steps, a checkpoint, two more; then a new engine from the checkpoint does the two again."""
    start_process_group()
    sizes = BatchSizes(2, 1, distributed.world_size())
    config = RunConfig(lr=1e-2, precision=precision, lr_schedule="linear")
    rows = examples(16)
    windows = TrainingWindows(rows, curriculum(), TOKENS, sizes, distributed.rank(), 1)
    tokenizer = word_tokenizer(["a b"], 96)

    def build(seed: int):
        torch.manual_seed(seed)
        model = tiny.coconut(context=CONTEXT)
        with torch.no_grad():
            model.lm_head.weight.add_(0.1 * seed)
        engine = build_engine(model, config, ds_config(name, config, sizes))
        return engine, new_schedule(engine, config, 10), Backbone(model.base_causallm, tokenizer)

    def steps(engine, schedule, first: int) -> list[float]:
        losses = []
        for number in (first, first + 1):
            losses.append(optimizer_step(engine, windows[number], "token").loss)
            schedule.step()
        return [*losses, *schedule.get_last_lr()]

    checkpoints = Checkpoints(Path(folder), keep=None)
    engine, schedule, backbone = build(seed=0)
    steps(engine, schedule, 0)
    path = checkpoints.save(engine, backbone, {}, schedule, Progress(epochs=1, step=2))
    drawn = torch.rand(3).tolist()
    going_on = steps(engine, schedule, 2)
    restored, restored_schedule, _ = build(seed=1)
    checkpoints.restore(path, restored, restored_schedule)
    return {
        "same_draws": drawn == torch.rand(3).tolist(),
        "going_on": going_on,
        "restored": steps(restored, restored_schedule, 2),
        "step": read_progress(path).step,
    }


def non_finite_stops() -> dict[str, Any]:
    """A weight that is not a number on one rank stops the step on all ranks, before any update."""
    start_process_group()
    sizes = BatchSizes(2, 1, distributed.world_size())
    config = RunConfig()
    model = tiny.coconut(context=CONTEXT)
    engine = build_engine(model, config, ds_config("zero2", config, sizes))
    window = TrainingWindows(examples(4), curriculum(), TOKENS, sizes, distributed.rank(), 1)[0]
    if distributed.rank() == 0:
        model.lm_head.weight.data[7] = float("nan")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    try:
        optimizer_step(engine, window, "token")
    except NonFiniteLossError as error:
        same = all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in model.named_parameters())
        return {"message": str(error), "unchanged": same, "indices": [i for b in window for i in b.indices]}
    raise AssertionError("a step with a loss that is not finite went through")


def states_against_engine(name: str) -> list[int]:
    """Bytes an engine keeps between steps, gradients and buckets aside, and what `model_states` says of them."""
    start_process_group()
    sizes = BatchSizes(2, 1, distributed.world_size())
    config = RunConfig()
    model = tiny.coconut(context=CONTEXT, n_layer=8)
    settings = ds_config(name, config, sizes)
    engine = build_engine(model, config, settings)
    optimizer_step(engine, TrainingWindows(examples(4), curriculum(), TOKENS, sizes, distributed.rank(), 1)[0], "token")
    numels = [parameter.numel() for parameter in model.parameters()]
    without_buckets = settings | {"zero_optimization": settings["zero_optimization"] | {"reduce_bucket_size": 0}}
    states = model_states(without_buckets, sum(numels), 0, sizes.world)
    zero = settings["zero_optimization"]
    gradients = 4 * sum(numels) // (sizes.world if zero.get("stage", 0) == 2 else 1)
    return [sum(held_bytes(engine)), states.device + states.host - gradients]


def held_bytes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Bytes of each storage that holds weights, fp32 masters or moments."""
    held = [*engine.module.parameters()]
    for group in engine.basic_optimizer.param_groups:
        held += group["params"]
    held += [value for state in engine.basic_optimizer.state.values() for value in state.values()]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in held
        if isinstance(value, torch.Tensor)
    }
    return list(storages.values())
