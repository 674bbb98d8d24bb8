"""What the engine tests run on ranks: `launching.on_ranks` starts these under the DeepSpeed launcher."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cpuinfo
import deepspeed
import hardware
import tiny
import torch
from datasets import Dataset
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from coconut_ds import Coconut, LatentContext
from coconut_ds.checkpoints.store import Checkpoints, Progress, Stored, read_stored, restore
from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import resolve_ds_config
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.batches import Batch, Tokens, collate_training, training_sequence
from coconut_ds.data.loaders import TrainingSteps
from coconut_ds.data.stages import Curriculum
from coconut_ds.engine import internals
from coconut_ds.engine.build import build_engine, describe_device, start_process_group
from coconut_ds.engine.internals import InternalsError, loss_scale
from coconut_ds.engine.reset import new_schedule, reset_optimizer_state
from coconut_ds.engine.states import gather, updates_done
from coconut_ds.engine.states import restore as restore_states
from coconut_ds.memory.model_states import Elements, model_states
from coconut_ds.model import fast
from coconut_ds.model.adapters import load_adapter
from coconut_ds.model.backbone import Backbone
from coconut_ds.model.distillation import Distillation
from coconut_ds.model.folder import context_settings, load_window
from coconut_ds.model.jacobi import Jacobi
from coconut_ds.model.scratch import word_tokenizer
from coconut_ds.model.step_decoder import copy_of
from coconut_ds.runtime import distributed
from coconut_ds.training.step import LOSSES, SEQUENCES_ALONE, NonFiniteLossError, Weights, optimizer_step

# DeepSpeed's CPU Adam asks for the processor's name each time it is made, which takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
# DeepSpeed refuses fp16 on most CPUs, whose torch computes it all the same.
os.environ[hardware.VARIABLE] = hardware.WITH_FP16
hardware.settle()

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
# With everything in it that ZeRO could get wrong: a parameter outside the backbone, used by some micro-batches only.
CONTEXT = LatentContext((0.6, 0.3, 0.1), learned=True, norm="embedding", projection=8)
LATENT_SETTINGS = {"latent_context": context_settings(CONTEXT), "latent_projection": CONTEXT.projection}


def ds_config(name: str, config: RunConfig, sizes: BatchSizes) -> dict[str, Any]:
    """`name` is one of ds_configs/, or hf_trainer: a JSON as people write it for the HF Trainer."""
    folder = "tests/golden" if name == "hf_trainer" else "ds_configs"
    return resolve_ds_config(read_ds_json(f"{folder}/{name}.json"), config, sizes, describe_device())


def curriculum() -> Curriculum:
    """Every second example draws its stage, so that rows and ranks have different numbers of thoughts."""
    return Curriculum("coconut", 1, 1, 3, False, 0.5, 0)


def examples(count: int) -> Dataset:
    return Dataset.from_list([tiny.row(4 + index % 5, [3, 2 + index % 3, 4], 3, index) for index in range(count)])


def undivided(rows: Dataset, epoch: int, tokens: Tokens = TOKENS) -> Batch:
    plan = curriculum()
    sequences = [
        training_sequence(row, plan.training_layout(len(row["steps_ids"]), epoch, index), tokens)
        for index, row in enumerate(rows)
    ]
    has = (tokens.step_end is not None, tokens.reads_steps, tokens.answers_alone)
    return collate_training(sequences, list(range(len(rows))), tiny.PAD, *has)


def windows_of(name: str, rows: Dataset, sizes: BatchSizes, epoch: int, tokens: Tokens = TOKENS) -> TrainingSteps:
    """This rank's windows of an epoch, as the ZeRO file wants them."""
    in_step = name.startswith("zero3")
    return TrainingSteps(rows, curriculum(), tokens, sizes, distributed.rank(), epoch, in_step=in_step)


def gradient_errors(
    names: list[str],
    splits: list[list[int]],
    speed: str,
    weights: Weights = SEQUENCES_ALONE,
    everything: bool = False,
    lora: bool = False,
) -> dict[str, float]:
    """Largest difference between a gradient through the engine and that of one undivided batch of 8 in plain torch.

    `speed` of the engine's model: plain passes, fast ones, or fast with activations recomputed; `weights` of the
    losses; `everything`: steps written by a decoder of its own, and thoughts in Jacobi iterations; `lora`: of adapters
    and rows on a frozen model. One step of SGD with learning rate 1 turns the gradient into a difference of weights.
    """
    start_process_group()
    tokens = replace(TOKENS, step_end=tiny.EOS) if weights[1] else TOKENS
    if weights[3]:
        tokens = replace(tokens, answer_lead=(), reads_steps=True, answers_alone=True)
    rows = examples(8)
    reference = _model("plain", everything, lora)
    whole = undivided(rows, 2, tokens)
    output = reference(**whole.inputs)
    losses = [
        each / count if each is not None else torch.zeros(())
        for each, count in zip(output.sums_of_losses, whole.counts_of_losses)
    ]
    sum(weight * loss for weight, loss in zip(weights, losses)).backward()
    expected = {name: parameter.grad for name, parameter in _trained(reference).items()}
    world = distributed.world_size()
    errors = {}
    for name in names:
        for micro, accumulation in splits:
            sizes = BatchSizes(micro, accumulation, world)
            model = _model(speed, everything, lora)
            before = {key: parameter.detach().clone() for key, parameter in _trained(model).items()}
            settings = ds_config(name, RunConfig(), sizes) | {"zero_force_ds_cpu_optimizer": False}
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.SGD(_trained(model).values(), lr=1.0), config=settings
            )
            # Accumulation is long enough for all eight, so the epoch is one window.
            window = windows_of(name, rows, sizes, 2, tokens)[0]
            step = optimizer_step(engine, window, "token", weights)
            assert step.n_targets == whole.n_targets
            for loss_name, loss in zip(LOSSES, losses):
                assert abs((getattr(step, loss_name) or 0.0) - loss.item()) < 1e-5
            after = {key: safe_get_full_fp32_param(value) for key, value in _trained(model).items()}
            after = {key: value if value is not None else model.get_parameter(key) for key, value in after.items()}
            worst = max((before[key] - after[key] - expected[key]).abs().max().item() for key in before)
            errors[f"{name} {micro}x{accumulation}"] = worst
    return errors


def bf16_error(name: str, accumulation: int) -> float:
    """Relative error of a step's gradient in bf16, all parameters as one vector; 64 examples in micro-batches."""
    start_process_group()
    rows, sizes = examples(64), BatchSizes(64 // accumulation, accumulation, 1)
    reference = tiny.coconut(context=CONTEXT, plain=True)
    reference(**undivided(rows, epoch=2).inputs).loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
    settings = ds_config(name, RunConfig(precision="bf16"), sizes) | {"zero_force_ds_cpu_optimizer": False}
    model = tiny.coconut(context=CONTEXT)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=settings
    )

    def masters() -> torch.Tensor:
        return torch.cat([safe_get_full_fp32_param(each).flatten() for each in model.parameters()])

    before = masters()
    optimizer_step(engine, windows_of(name, rows, sizes, epoch=2)[0], "token")
    return float((before - masters() - expected).norm() / expected.norm())


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _model(speed: str, everything: bool = False, lora: bool = False) -> Coconut:
    model = tiny.coconut(context=CONTEXT, plain=True, lora=tiny.LORA if lora else None)
    model.distillation = Distillation()
    if everything:
        model.step_decoder, model.solver = copy_of(model.base_causallm), Jacobi(2)
    if speed != "plain":
        fast.install(model)
    if speed == "recomputed":
        model.enable_activation_checkpointing()
    return model


def micro_batch_loss() -> list[float]:
    """The step's loss under `micro_batch`, and the mean of the micro-batches' means, fillers left out."""
    start_process_group()
    rows, sizes = examples(5), BatchSizes(2, 2, distributed.world_size())
    config = RunConfig()
    model = tiny.coconut(context=CONTEXT)
    engine = build_engine(model, config, ds_config("zero2", config, sizes))
    everything = [TrainingSteps(rows, curriculum(), TOKENS, sizes, rank, 1)[0] for rank in range(sizes.world)]
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
        windows = windows_of(name, rows, sizes, epoch)
        losses = []
        for number in range(3):
            losses.append(optimizer_step(engine, windows[number], "token").loss)
            schedule.step()
        return losses

    def weights(engine) -> dict[str, torch.Tensor]:
        """fp32 weights, the same on every rank."""
        found = distributed.from_main(gather(engine))
        return {key: value.clone() for key, value in found.items()}

    model = tiny.coconut(context=CONTEXT)
    engine = build_engine(model, config, ds_config(name, config, sizes))
    steps(engine, epoch=1)
    at_reset, scale = weights(engine), loss_scale(engine)
    reset_optimizer_state(engine)
    assert loss_scale(engine) == scale
    assert all(torch.equal(value, at_reset[key]) for key, value in weights(engine).items()), "a reset keeps the weights"
    continued, after_reset = steps(engine, epoch=2), weights(engine)

    fresh_model = tiny.coconut(context=CONTEXT)
    with torch.no_grad():
        for key, parameter in fresh_model.named_parameters():
            parameter.copy_(at_reset[key])
    fresh = build_engine(fresh_model, config, ds_config(name, config, sizes))
    # A 16-bit engine starts its fp32 weights from rounded ones; the comparison wants those of the reset.
    restore_states(fresh, 0, at_reset, {})
    from_fresh, after_fresh = steps(fresh, epoch=2), weights(fresh)

    kept = build_engine(tiny.coconut(context=CONTEXT), config, ds_config(name, config, sizes))
    steps(kept, epoch=1)
    steps(kept, epoch=2)
    after_kept = weights(kept)
    return {
        "same_losses": continued == from_fresh,
        "largest_difference": max((after_reset[k] - after_fresh[k]).abs().max().item() for k in after_reset),
        "reset_matters": max((after_reset[k] - after_kept[k]).abs().max().item() for k in after_reset),
    }


_EPOCHS = (1, 2)
"""Two stages; nine examples in windows of eight leave one for the last, in which a second rank has only a filler."""
_EXAMPLES, _TOTAL = 9, 8
_RATE = 3e-3


def _alone() -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plain torch: losses of each step, final weights, and which of their elements had a gradient to speak of.

    Undivided windows, AdamW, a new one for each stage. Where a gradient is rounding alone, as for the biases of the
    keys, Adam makes whole steps of it in any direction.
    """
    model = tiny.coconut(context=CONTEXT, plain=True)
    rows, losses = examples(_EXAMPLES), []
    moved = {key: torch.ones_like(value, dtype=torch.bool) for key, value in model.named_parameters()}
    for epoch in _EPOCHS:
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
        windows = TrainingSteps(rows, curriculum(), TOKENS, BatchSizes(_TOTAL, 1, 1), 0, epoch)
        for number in range(len(windows)):
            loss = model(**windows[number][0].inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        for key, parameter in model.named_parameters():
            moved[key] &= optimizer.state[parameter]["exp_avg_sq"].sqrt() > 1e-5
    return losses, {key: value.detach() for key, value in model.named_parameters()}, moved


def matrix(cases: list[list[Any]]) -> list[dict[str, Any]]:
    """For each (ZeRO file, precision, speed): largest difference of a loss and of a weight from plain torch.

    `speed` is that of `gradient_errors`. In fp16 the loss scale starts so high that the first steps overflow; a step
    that was not applied is taken again.
    """
    start_process_group()
    world = distributed.world_size()
    sizes = BatchSizes(2, _TOTAL // (2 * world), world)
    expected, weights, moved = _alone()
    outcomes = []
    for name, precision, speed in cases:
        config = RunConfig(lr=_RATE, precision=precision)
        model = _model(speed)
        settings = ds_config(name, config, sizes)
        settings["fp16"]["initial_scale_power"] = 26
        engine = build_engine(model, config, settings)
        losses, overflows = [], 0
        for epoch in _EPOCHS:
            reset_optimizer_state(engine)
            new_schedule(engine, config, 10)
            windows = windows_of(name, examples(_EXAMPLES), sizes, epoch)
            for number in range(len(windows)):
                losses.append(optimizer_step(engine, windows[number], "token").loss)
                while not engine.was_step_applied():
                    overflows += 1
                    optimizer_step(engine, windows[number], "token")
        final = distributed.from_main(gather(engine))
        outcomes.append(
            {
                "loss": max(abs(mine - other) for mine, other in zip(losses, expected, strict=True)),
                "weight": max((final[key] - weights[key])[moved[key]].abs().max().item() for key in weights),
                "overflows": overflows,
            }
        )
    return outcomes


_COPIES = {
    "_restore_cpu_offload_grad_to_gpu": "back to the device",
    "async_accumulate_grad_in_cpu_via_gpu": "to a sum on the host",
    "async_inplace_copy_grad_to_fp32_buffer_from_gpu": "to the fp32 gradient on the host",
}


def offloaded_steps(precision: str, accumulation: int, fast: str) -> dict[str, Any]:
    """Steps with an offloaded optimizer: losses and weights, and what the last step copies and waits for."""
    start_process_group()
    sizes = BatchSizes(8 // accumulation, accumulation, 1)
    config = RunConfig(lr=1e-2, precision=precision, fast=fast)
    settings = ds_config("zero2_offload", config, sizes)
    settings["fp16"]["initial_scale_power"] = 26
    engine = build_engine(tiny.coconut(context=CONTEXT), config, settings)
    new_schedule(engine, config, 10)
    window = windows_of("zero2_offload", examples(8), sizes, epoch=1)[0]
    counted: Counter[str] = Counter()
    with ExitStack() as counting:
        losses = []
        for _ in range(24):
            if engine.global_steps == 23:
                for name, copy in _COPIES.items():
                    counting.enter_context(_counted(engine.optimizer, name, counted, copy))
                counting.enter_context(_Waits(counted))
            losses.append(optimizer_step(engine, window, "token").loss)
    return {
        "losses": losses,
        "weights": hashlib.sha256(b"".join(each.numpy().tobytes() for each in gather(engine).values())).hexdigest(),
        "applied": engine.was_step_applied(),
        "parameters": len(list(engine.module.parameters())),
        "counted": dict(counted),
    }


@contextmanager
def _counted(holder: Any, name: str, counted: Counter[str], what: str) -> Iterator[None]:
    original = getattr(holder, name)

    def count(*given: Any) -> Any:
        counted[what] += 1
        return original(*given)

    with mock.patch.object(holder, name, count):
        yield


class _Waits(TorchDispatchMode):
    """Counts the numbers that the host reads one by one; those of a tensor that was fetched whole are there already."""

    def __init__(self, counted: Counter[str]):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(function) and args[0].untyped_storage().nbytes() == args[0].element_size():
            self.counted["waits"] += 1
        return function(*args, **(kwargs or {}))


def reset_growth(name: str) -> list[int]:
    """Bytes the engine holds after a step, before and after ten resets with a step each."""
    start_process_group()
    sizes = BatchSizes(4, 1, distributed.world_size())
    config = RunConfig()
    engine = build_engine(tiny.coconut(context=CONTEXT), config, ds_config(name, config, sizes))
    window = windows_of(name, examples(8), sizes, epoch=1)[0]
    held = []
    for _ in range(11):
        optimizer_step(engine, window, "token")
        held.append(sum(held_bytes(engine)))
        reset_optimizer_state(engine)
    return [held[0], held[-1]]


def _four_a_step(name: str, precision: str, weights: Path | None = None, done: int = 0, lora: bool = False):
    """Engine, schedule, backbone, and a function that takes optimizer steps of four examples and returns their losses.

    `weights` is a checkpoint to take them from, `done` the steps its schedule has taken; `lora` trains adapters alone.
    """
    world = distributed.world_size()
    sizes = BatchSizes(4 // world, 1, world)
    config = RunConfig(lr=1e-2, precision=precision, lr_schedule="linear")
    windows = windows_of(name, examples(16), sizes, epoch=1)
    model = tiny.coconut(context=CONTEXT, lora=tiny.LORA if lora else None)
    if weights is not None and lora:
        load_adapter(model.base_causallm, weights / "model")
    elif weights is not None:
        model.base_causallm.load_state_dict(load_file(weights / "model" / "model.safetensors"), strict=False)
    if weights is not None:
        load_window(model.latent_window, str(weights))
    backbone = Backbone(model.base_causallm, word_tokenizer(["a b"], 96))
    engine = build_engine(model, config, ds_config(name, config, sizes))
    schedule = new_schedule(engine, config, 10, done)

    def steps(*numbers: int) -> list[float]:
        losses = []
        for number in numbers:
            losses.append(optimizer_step(engine, windows[number], "token").loss)
            schedule.step()
        return [*losses, *schedule.get_last_lr()]

    return engine, schedule, backbone, steps


def saved(cases: list[list[str]], folder: str, lora: bool = False) -> list[dict[str, Any]]:
    """For each (ZeRO file, precision): two steps, a checkpoint in `folder`, and what the two steps after it give."""
    start_process_group()
    outcomes = []
    for name, precision in cases:
        engine, schedule, backbone, steps = _four_a_step(name, precision, lora=lora)
        steps(0, 1)
        if precision == "fp16":
            engine.optimizer.loss_scaler.cur_scale = 2.0**9
        checkpoints = Checkpoints(Path(folder, f"{name}_{precision}"), keep=None)
        stored = Stored(Progress(epochs=1, step=2), 4, 0, updates_done(engine), schedule.last_epoch, loss_scale(engine))
        path = checkpoints.save(engine, backbone, LATENT_SETTINGS, stored)
        assert checkpoints.newest_intact() == path
        outcome = {"drawn": torch.rand(3).tolist(), "losses": steps(2, 3), "loss_scale": loss_scale(engine)}
        outcomes.append({"path": str(path), **outcome})
    return outcomes


def gone_on(cases: list[list[str]], paths: list[str], lora: bool = False) -> list[list[dict[str, Any]]]:
    """For each (ZeRO file, precision) and each checkpoint: a new engine from it, and what the next two steps give."""
    start_process_group()
    outcomes: list[list[dict[str, Any]]] = []
    for name, precision in cases:
        outcomes.append([])
        for path in map(Path, paths):
            engine, _, _, steps = _four_a_step(name, precision, path, read_stored(path).scheduled, lora)
            restore(path, engine)
            outcome = {"drawn": torch.rand(3).tolist(), "losses": steps(2, 3), "loss_scale": loss_scale(engine)}
            outcomes[-1].append(outcome)
    return outcomes


def non_finite_stops() -> dict[str, Any]:
    """A weight that is not a number on one rank stops the step on all ranks, before any update."""
    start_process_group()
    sizes = BatchSizes(2, 1, distributed.world_size())
    config = RunConfig()
    model = tiny.coconut(context=CONTEXT)
    engine = build_engine(model, config, ds_config("zero2", config, sizes))
    window = TrainingSteps(examples(4), curriculum(), TOKENS, sizes, distributed.rank(), 1)[0]
    if distributed.rank() == 0:
        model.lm_head.weight.data[7] = float("nan")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    try:
        optimizer_step(engine, window, "token")
    except NonFiniteLossError as error:
        same = all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in model.named_parameters())
        return {"message": str(error), "unchanged": same, "indices": [i for b in window for i in b.indices]}
    raise AssertionError("a step with a loss that is not finite went through")


def states_against_engine(name: str, lora: bool = False) -> list[int]:
    """Bytes an engine keeps between steps, gradients and buckets aside, and what `model_states` says of them."""
    start_process_group()
    sizes = BatchSizes(2, 1, distributed.world_size())
    config = RunConfig()
    model = tiny.coconut(context=CONTEXT, n_layer=8, lora=tiny.LORA if lora else None)
    elements = Elements.of(model)
    settings = ds_config(name, config, sizes)
    engine = build_engine(model, config, settings)
    optimizer_step(engine, TrainingSteps(examples(4), curriculum(), TOKENS, sizes, distributed.rank(), 1)[0], "token")
    without_buckets = settings | {"zero_optimization": settings["zero_optimization"] | {"reduce_bucket_size": 0}}
    states = model_states(without_buckets, sum(elements.trained), 0, sizes.world, elements.frozen)
    zero = settings["zero_optimization"]
    gradients = 4 * sum(elements.trained) // (sizes.world if zero.get("stage", 0) == 2 else 1)
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


def without_names(cases: list[tuple[str, str, list[str]]]) -> dict[str, str | None]:
    """By dotted name, from an engine on: what `build_engine` says without it; None if it accepts the engine."""
    start_process_group()
    found: dict[str, str | None] = {}
    for name, precision, names in cases:
        config, sizes = RunConfig(precision=precision), BatchSizes(2, 1, 1)
        settings = ds_config(name, config, sizes)
        engine = build_engine(tiny.coconut(context=CONTEXT), config, settings)
        initialized = mock.patch.object(deepspeed, "initialize", lambda engine=engine, **_: (engine,))
        optimizer_step(engine, windows_of(name, examples(8), sizes, 0)[0], "token")
        for path in names:
            holder: Any = engine
            first, *others = path.split(".")
            if first == "a_parameter":
                holder, (first, *others) = list(engine.module.parameters())[-1], others
            for each in others:
                holder, first = getattr(holder, first), each
            with _taken_away(holder, first), initialized:
                found[path] = _refusal(config, settings)
        with initialized:
            assert _refusal(config, settings) is None, "everything is back in its place"
            if precision == "fp16":
                with mock.patch.object(internals, "_AT_MINIMUM", "another text"):
                    found["the error of the loss scale"] = _refusal(config, settings)
            if (name, precision) == ("zero0", "bf16"):
                first_master, *others = engine.optimizer.fp32_groups[0]
                engine.optimizer.fp32_groups[0] = [first_master.clone(), *others]
                found["the masters"] = _refusal(config, settings)
    return found


def _refusal(config: RunConfig, settings: dict[str, Any]) -> str | None:
    try:
        build_engine(tiny.coconut(context=CONTEXT), config, settings)
    except InternalsError as error:
        return str(error)
    return None


@contextmanager
def _taken_away(holder: Any, name: str) -> Iterator[None]:
    """Inside it `holder` has no attribute `name`, wherever it comes from."""
    owners = [holder, *type(holder).__mro__]
    removed = [(owner, vars(owner)[name]) for owner in owners if name in getattr(owner, "__dict__", {})]
    for owner, _ in removed:
        delattr(owner, name)
    try:
        yield
    finally:
        for owner, value in removed:
            setattr(owner, name, value)
