"""Contradictions: values of a run file that are valid one by one and invalid together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coconut_ds.config.run_config import PUBLISHED_SWITCHES, RunConfig
from coconut_ds.config.sections import MixtureConfig
from coconut_ds.errors import InputError, problem_list


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run: the keys it concerns and what to do about it."""

    keys: tuple[str, ...]
    message: str


class ConfigError(InputError):
    """Everything wrong with a configuration, found in one pass."""

    def __init__(self, source: str, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__(problem_list(source, [problem.message for problem in problems]))


def contradictions(config: RunConfig) -> list[Problem]:
    """Values that are valid one by one and invalid together."""
    rules = (_method_rules, _model_rules, _data_rules, _batch_rules)
    return [Problem(keys, message) for rule in rules for keys, message in rule(config)]


_Found = Iterator[tuple[tuple[str, ...], str]]


def _method_rules(config: RunConfig) -> _Found:
    method, all_switches = config.method, ", ".join(PUBLISHED_SWITCHES)
    if "method" not in config.model_fields_set:
        yield ("method", *PUBLISHED_SWITCHES), f"method: missing, and {all_switches} are all false; name the method"
    switches = [name for name in PUBLISHED_SWITCHES if getattr(config, name)]
    if set(switches) - ({method, "coconut"} if method == "no_thoughts" else {method}):
        other = f"true, but method is {method}; drop one of them"
        what = "only one of them can be true" if method in switches else other
        yield ("method", *switches), f"{', '.join(switches)}: {what}"
    has_thoughts, steps = config.traits.thoughts != "none", config.traits.steps
    if has_thoughts and config.c_thought == 0:
        instead = "no_thoughts" if steps == "replaced by stage" else "no_cot"
        yield ("c_thought", method), f"c_thought: 0 with {method}: use method: {instead}, or at least 1"
    if has_thoughts and config.max_latent_stage == 0 and steps == "dropped":
        rule = "it stands for max_latent_stage steps; set at least 1"
        yield ("max_latent_stage", method), f"max_latent_stage: 0 with {method}: {rule}"
    if config.traits.thoughts != "continuous":
        without = f"{method} has no continuous thoughts"
        if config.latent_context:
            yield ("latent_context", method), f"latent_context: {without}; set latent_context to null"
        if config.latent_norm != "none":
            yield ("latent_norm", method), f"latent_norm: {without}; set latent_norm to none"
        if config.latent_projection:
            yield ("latent_projection", method), f"latent_projection: {without}; set latent_projection to null"
        if config.solver:
            yield ("solver", method), f"solver: {without}; set solver to null"
        if config.step_weight:
            yield ("supervision", method), f"supervision.steps: {without} to write steps from; leave it out"
        if config.distillation:
            what = "to teach what all steps in sight say; leave it out"
            yield ("supervision", method), f"supervision.distill: {without} {what}"
    if config.mixture != MixtureConfig():
        if config.traits.thoughts == "none":
            what = "to mix other layouts with; leave it out"
            yield ("supervision", method), f"supervision.mixture: {method} has no thoughts or pauses {what}"
        if config.distillation:
            rule = "whose teacher is the verbal layout; set its alpha and beta instead"
            yield ("supervision",), f"supervision.mixture: together with supervision.distill, {rule}"
        if not (config.mixture.latent or config.mixture.verbal or config.mixture.direct):
            yield ("supervision",), "supervision.mixture: all weights are 0; leave one above it"
    if method == "codi" and not config.distillation:
        yield ("method", "supervision"), "supervision.distill: off with codi, which then is method: no_curriculum"
    if method == "codi" and not config.pad_latent_to_max:
        rule = "the number of thoughts, c_thought * max_latent_stage, is fixed; leave it out"
        yield ("method", "pad_latent_to_max"), f"pad_latent_to_max: false with codi: {rule}"
    if config.uniform_prob and method in ("pause", "no_curriculum", "icot", "codi"):
        rule = f"draws stages, and {method} does not replace steps by stage; set 0"
        yield ("uniform_prob", method), f"uniform_prob: {config.uniform_prob} {rule}"
    if config.curriculum == "reversed" and steps != "replaced by stage":
        rule = f"says in which order steps are replaced, and {method} does not replace them by stage; leave it out"
        yield ("curriculum", method), f"curriculum: reversed {rule}"
    if config.curriculum == "reversed" and config.save_only_improve:
        rule = "with curriculum: reversed the accuracy of a stage with visible steps is one with these steps given"
        yield ("save_only_improve", "curriculum"), f"save_only_improve: true: {rule}; set it to false"
    if config.icot is not None and method != "icot":
        yield ("icot", "method"), f"icot: a section for method: icot, but method is {method}; drop one of them"


def _model_rules(config: RunConfig) -> _Found:
    if config.model is not None and config.model_id != "scratch":
        rule = f"describes a model from scratch, but model_id is {config.model_id!r}; drop one of them"
        yield ("model", "model_id"), f"model: {rule}"
    if config.model_id == "scratch" and config.model is None:
        yield ("model", "model_id"), "model_id: scratch needs a `model:` section (architecture, n_layer, ...)"
    if config.lora and config.model_id == "scratch" and not config.load_model_path:
        rule = "has random weights, which adapters would freeze; set load_model_path, or leave lora out"
        yield ("lora", "model_id"), f"lora: model_id scratch {rule}"
    if config.model and config.model.n_embd % config.model.n_head:
        rule = f"must be a multiple of model.n_head ({config.model.n_head})"
        yield ("model",), f"model.n_embd: {config.model.n_embd} {rule}"
    checkpointing = config.activation_checkpointing
    if config.fast == "off" and checkpointing is not None and checkpointing.enabled:
        message = (
            "fast: off, but activation_checkpointing is on, which needs the KV cache of the speed layer; "
            "set fast to auto or activation_checkpointing.enabled to false"
        )
        yield ("fast", "activation_checkpointing"), message
    if config.bf16 and config.precision not in (None, "bf16"):
        yield ("bf16", "precision"), f"bf16: true, but precision is {config.precision}; drop one of them"
    if config.resume and not config.load_model_path:
        message = (
            f"resume: {config.resume} starts a run from other weights at that epoch and needs load_model_path; "
            "an interrupted run continues by itself when it is started again"
        )
        yield ("resume", "load_model_path"), message


def _data_rules(config: RunConfig) -> _Found:
    if config.shuffle_facts and config.prompt_format == "chat":
        rule = "moves facts of a plain question; set prompt_format to plain"
        yield ("shuffle_facts", "prompt_format"), f"shuffle_facts: {config.shuffle_facts!r} {rule}"
    if config.eval_thoughts is not None and not (config.only_eval and config.traits.thoughts != "none"):
        rule = "is for the evaluation of a model with thoughts or pauses; leave it out"
        yield ("eval_thoughts", "only_eval", "method"), f"eval_thoughts: {config.eval_thoughts} {rule}"
    if config.only_eval:
        if not config.load_model_path:
            yield ("only_eval", "load_model_path"), "only_eval: needs load_model_path, what to evaluate"
        if not (config.test_path or config.val_path):
            yield ("only_eval", "val_path"), "only_eval: needs test_path or val_path, the set"
        return
    for key in ("train_path", "val_path"):
        if not getattr(config, key):
            yield (key,), f"{key}: missing; name a data file"
    if config.resume >= config.num_epochs:
        message = f"resume: {config.resume} leaves nothing to train, num_epochs is {config.num_epochs}"
        yield ("resume", "num_epochs"), message


def _batch_rules(config: RunConfig) -> _Found:
    accumulation, micro = config.gradient_accumulation_steps, config.batch_size_training
    keys = ("batch_size_training", "train_batch_size", "gradient_accumulation_steps")
    if micro == "auto":
        if config.train_batch_size is None:
            yield keys, "batch_size_training: auto needs train_batch_size, the examples of an optimizer step"
        if accumulation is not None:
            yield keys, f"gradient_accumulation_steps: {accumulation} with batch_size_training: auto; leave it out"
        micro = 1
    whole = micro * (accumulation or 1)
    if config.train_batch_size and config.train_batch_size % whole:
        what = "batch_size_training" if accumulation is None else "batch_size_training * gradient_accumulation_steps"
        yield keys, f"train_batch_size: {config.train_batch_size} must be a multiple of {what} ({whole})"
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        yield ("adam_betas",), f"adam_betas: {list(config.adam_betas)}: each must be at least 0 and below 1"
