"""Contradictions: values of a run file that are valid one by one and invalid together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coconut_ds.config.run_config import PUBLISHED_SWITCHES, RunConfig
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


_Found = list[tuple[tuple[str, ...], str]]


def _method_rules(config: RunConfig) -> _Found:
    found: _Found = []
    method = config.method
    switches = [name for name in PUBLISHED_SWITCHES if getattr(config, name)]
    if "method" not in config.model_fields_set:
        keys = ("method", *PUBLISHED_SWITCHES)
        found.append((keys, f"method: missing, and {', '.join(PUBLISHED_SWITCHES)} are all false; name the method"))
    allowed = {method, "coconut"} if method == "no_thoughts" else {method}
    if set(switches) - allowed:
        what = f"{', '.join(switches)}: only one of them can be true"
        if method not in switches:
            what = f"{', '.join(switches)}: true, but method is {method}; drop one of them"
        found.append((("method", *switches), what))
    if config.traits.thoughts != "none":
        found += _thought_rules(config)
    if config.traits.thoughts != "continuous":
        without = f"{method} has no continuous thoughts"
        if config.latent_context:
            found.append((("latent_context", method), f"latent_context: {without}; set latent_context to null"))
        if config.latent_norm != "none":
            found.append((("latent_norm", method), f"latent_norm: {without}; set latent_norm to none"))
    if config.uniform_prob and method in ("pause", "no_curriculum", "icot"):
        message = (
            f"uniform_prob: {config.uniform_prob} draws stages, and {method} does not replace steps by stage; set 0"
        )
        found.append((("uniform_prob", method), message))
    if config.icot is not None and method != "icot":
        found.append(
            (("icot", "method"), f"icot: a section for method: icot, but method is {method}; drop one of them")
        )
    return found


def _thought_rules(config: RunConfig) -> _Found:
    found: _Found = []
    method = config.method
    if config.c_thought == 0:
        instead = "no_thoughts" if config.traits.steps == "replaced by stage" else "no_cot"
        message = f"c_thought: 0 with {method}: use method: {instead}, or at least 1"
        found.append((("c_thought", method), message))
    if config.max_latent_stage == 0 and config.traits.steps == "dropped":
        message = f"max_latent_stage: 0 with {method}: it stands for max_latent_stage steps; set at least 1"
        found.append((("max_latent_stage", method), message))
    return found


def _model_rules(config: RunConfig) -> _Found:
    found: _Found = []
    if config.model is not None and config.model_id != "scratch":
        message = f"model: describes a model from scratch, but model_id is {config.model_id!r}; drop one of them"
        found.append((("model", "model_id"), message))
    if config.model_id == "scratch" and config.model is None:
        found.append((("model", "model_id"), "model_id: scratch needs a `model:` section (architecture, n_layer, ...)"))
    if config.model and config.model.n_embd % config.model.n_head:
        message = f"model.n_embd: {config.model.n_embd} must be a multiple of model.n_head ({config.model.n_head})"
        found.append((("model",), message))
    checkpointing = config.activation_checkpointing
    if config.fast == "off" and checkpointing is not None and checkpointing.enabled:
        message = (
            "fast: off, but activation_checkpointing is on, which needs the KV cache of the speed layer; "
            "set fast to auto or activation_checkpointing.enabled to false"
        )
        found.append((("fast", "activation_checkpointing"), message))
    if config.bf16 and config.precision not in (None, "bf16"):
        message = f"bf16: true, but precision is {config.precision}; drop one of them"
        found.append((("bf16", "precision"), message))
    if config.resume and not config.load_model_path:
        message = (
            f"resume: {config.resume} starts a run from other weights at that epoch and needs load_model_path; "
            "an interrupted run continues by itself when it is started again"
        )
        found.append((("resume", "load_model_path"), message))
    return found


def _data_rules(config: RunConfig) -> _Found:
    found: _Found = []
    if config.only_eval:
        if not config.load_model_path:
            found.append((("only_eval", "load_model_path"), "only_eval: needs load_model_path, what to evaluate"))
        if not (config.test_path or config.val_path):
            found.append((("only_eval", "val_path"), "only_eval: needs test_path or val_path, the set"))
        return found
    for key in ("train_path", "val_path"):
        if not getattr(config, key):
            found.append(((key,), f"{key}: missing; name a JSON file"))
    if config.resume >= config.num_epochs:
        message = f"resume: {config.resume} leaves nothing to train, num_epochs is {config.num_epochs}"
        found.append((("resume", "num_epochs"), message))
    return found


def _batch_rules(config: RunConfig) -> _Found:
    found: _Found = []
    accumulation, micro = config.gradient_accumulation_steps, config.batch_size_training
    if micro == "auto":
        keys = ("batch_size_training", "train_batch_size", "gradient_accumulation_steps")
        if config.train_batch_size is None:
            found.append((keys, "batch_size_training: auto needs train_batch_size, the examples of an optimizer step"))
        if accumulation is not None:
            message = f"gradient_accumulation_steps: {accumulation} with batch_size_training: auto; leave it out"
            found.append((keys, message))
        micro = 1
    whole = micro * (accumulation or 1)
    if config.train_batch_size and config.train_batch_size % whole:
        what = "batch_size_training" if accumulation is None else "batch_size_training * gradient_accumulation_steps"
        message = f"train_batch_size: {config.train_batch_size} must be a multiple of {what} ({whole})"
        found.append((("train_batch_size", "batch_size_training", "gradient_accumulation_steps"), message))
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        found.append((("adam_betas",), f"adam_betas: {list(config.adam_betas)}: each must be at least 0 and below 1"))
    return found
