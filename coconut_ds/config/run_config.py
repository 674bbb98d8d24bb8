"""RunConfig: the one owner of every training value. Loads a run YAML, applies overrides, checks, dumps.

The keys of the published configurations (facebookresearch/coconut `args/*.yaml`) keep their names and meanings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from coconut_ds import strict_json
from coconut_ds.config.foreign_keys import known_elsewhere
from coconut_ds.config.methods import METHODS, Method, Traits
from coconut_ds.errors import InputError, did_you_mean, problem_list

Scope = Literal["sequence", "last_pass"]
_PUBLISHED_SWITCHES = ("cot", "no_cot", "no_thoughts", "coconut")


def _positive_or_auto(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("must be a whole number of at least 1, or auto")
    return value


def _off_is_null(value: Any) -> Any:
    return None if value is False else value


# What YAML reads as false, off and no are the natural words for a part that is not wanted.
OrOff = BeforeValidator(_off_is_null)

AutoBatchSize = Annotated[int | Literal["auto"], PlainValidator(_positive_or_auto)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _published_spellings(cls, value: Any) -> Any:
        # The published YAMLs write None, which YAML reads as a string.
        return None if value == "None" else value


class LatentContextConfig(_Section):
    """The latent window: a thought is the weighted average of the last `len(weights)` hidden states."""

    weights: tuple[float, ...] | Literal["uniform", "exponential"] = (0.6, 0.3, 0.1)
    """Newest state first; each at least 0, the first above 0; normalised to sum to 1. `exponential`: `decay ** j`."""
    window: int | None = Field(None, ge=1)
    """m, the states in the window; needed where `weights` does not list them."""
    decay: float | None = Field(None, gt=0, le=1)
    """What one state weighs beside the next newer one under `exponential`; null is 0.5."""
    learned: bool = False
    """The weights are trained: a softmax of m logits that starts from `weights`."""
    scope: Scope = "sequence"
    """`sequence` reaches across passes; `last_pass` is what the code of coconut-contextual computes."""

    @field_validator("weights", mode="before")
    @classmethod
    def _known(cls, weights: Any) -> Any:
        if not isinstance(weights, list | tuple) and weights not in ("uniform", "exponential"):
            raise ValueError("must be a list of numbers, uniform or exponential")
        return weights

    @field_validator("weights")
    @classmethod
    def _usable(cls, weights: tuple[float, ...] | str) -> tuple[float, ...] | str:
        if not isinstance(weights, str) and (not weights or weights[0] <= 0 or min(weights) < 0):
            raise ValueError("needs at least one weight, the first above 0 and none negative")
        return weights

    @model_validator(mode="after")
    def _agreeing(self) -> LatentContextConfig:
        if isinstance(self.weights, str):
            if self.window is None:
                raise ValueError(f"weights: {self.weights} needs window, the number of states")
        elif self.window not in (None, len(self.weights)):
            listed = f"{list(self.weights)} has {len(self.weights)} weights"
            raise ValueError(f"window: {self.window}, but {listed}; list as many, or take uniform or exponential")
        if self.decay is not None and self.weights != "exponential":
            raise ValueError("decay: belongs to weights: exponential; leave it out")
        if self.learned and (len(self.newest_first) == 1 or min(self.newest_first) == 0):
            raise ValueError("learned: needs two weights or more, all above 0, since a softmax never gives 0")
        return self

    @property
    def newest_first(self) -> tuple[float, ...]:
        """The weights, or those that learning starts from."""
        if not isinstance(self.weights, str):
            return self.weights
        ratio = 1.0 if self.weights == "uniform" else self.decay or 0.5
        return tuple(ratio**back for back in range(self.window or 1))


class IcotConfig(_Section):
    """How iCoT removes the chain of thought (arXiv 2405.14838, section 3)."""

    tokens_per_stage: float = Field(8, gt=0)
    """Tokens removed over one stage, evenly over its steps; with `epochs_per_stage: 1` the paper's tokens per epoch."""
    all_beyond: int | None = Field(39, ge=0)
    """Once the schedule removes this many tokens the whole chain goes; null never. The published value for GSM8K."""
    smoothing: float | None = Field(4.0, gt=0)
    """Lambda: an example loses o tokens more with a probability proportional to exp(-lambda o); null is off."""


class ScratchModelConfig(_Section):
    """A small model with random weights, used when `model_id` is `scratch`."""

    architecture: Literal["gpt2", "llama"] = "gpt2"
    n_layer: int = Field(2, ge=1)
    n_embd: int = Field(128, ge=1)
    n_head: int = Field(4, ge=1)
    n_positions: int = Field(128, ge=1)
    """Longest sequence in tokens, thoughts and markers included."""
    dropout: float = Field(0.0, ge=0, lt=1)


class ActivationCheckpointingConfig(_Section):
    """Which activations are kept for the backward and which are computed again (`model/fast/checkpointing.py`)."""

    enabled: bool = True
    every_n_layers: int = Field(1, ge=1)
    """Every n-th decoder layer is recomputed, the others keep their activations."""
    offload: bool = False
    """Layer inputs of the prefix wait in pinned host memory; no effect on a CPU."""


class RunConfig(_Section):
    """Every training value of a run. Units: epochs and optimizer steps from 0 here, tokens, examples."""

    # What is trained, under which name
    project: str = "coconut_ds"
    name: str = "run"
    save_path: str = "runs"
    """The run folder is `save_path/name`."""
    only_eval: bool = False
    """Evaluate `load_model_path` on `test_path` (or `val_path`) and stop."""
    debug: bool = False
    """At most 5000 training and 32 validation examples, no checkpoints, no wandb, as published; no TensorBoard."""

    # Method
    method: Method = "coconut"
    """See docs/METHODS.md. The next four are its published spellings."""
    coconut: bool = False
    cot: bool = False
    no_cot: bool = False
    no_thoughts: bool = False
    c_thought: int = Field(1, ge=0)
    """Thoughts per replaced step."""
    epochs_per_stage: int = Field(1, ge=1)
    max_latent_stage: int = Field(0, ge=0)
    """Steps replaced at most; in the stage after it all remaining steps are dropped."""
    pad_latent_to_max: bool = False
    """Beyond the last latent stage every example gets the same number of thoughts."""
    uniform_prob: float = Field(0.0, ge=0, le=1)
    """Probability with which a training example draws its stage uniformly."""
    latent_context: Annotated[LatentContextConfig | None, OrOff] = None
    """Null is plain Coconut."""
    latent_norm: Literal["none", "rms", "embedding"] = "none"
    """Every thought is scaled to a root mean square of 1, or to the mean norm of its question's token embeddings."""
    icot: Annotated[IcotConfig | None, OrOff] = None
    """For `method: icot`; null is its defaults."""

    # Model
    model_id: str = "openai-community/gpt2"
    """Hub id, folder, or `scratch`."""
    model: ScratchModelConfig | None = None
    load_model_path: str | None = None
    """Weights to start from: a checkpoint of ours, an HF folder or hub id, or a published `.pt` state dict."""

    # Data
    train_path: str | None = None
    val_path: str | None = None
    test_path: str | None = None
    shuffle_facts: Annotated[str | None, OrOff] = None
    """The token that ends a fact of a question; a training question's facts stand in another order every epoch."""

    # Optimisation
    seed: int = Field(0, ge=0)
    resume: int = Field(0, ge=0)
    """First epoch, from 0, of a run that starts from `load_model_path`; with `only_eval` it selects the stage."""
    num_epochs: int = Field(1, ge=1)
    batch_size_training: AutoBatchSize = 32
    """Micro-batch: examples per rank in one forward; `auto` is the largest that fits and divides `train_batch_size`."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Micro-batches per optimizer step and rank; worked out from `train_batch_size` where that is given, else 1."""
    train_batch_size: int | None = Field(None, ge=1)
    """Examples per optimizer step over all ranks."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(0.0, ge=0)
    """Gradients are clipped to this norm; 0 is off, as published."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps."""
    reset_optimizer: Literal[False, "stage", "epoch"] = False
    """`true` means `stage`, what the paper describes; `epoch` is what the published code does."""
    loss_normalization: Literal["token", "micro_batch"] = "token"
    group_by_length: bool = True
    """Micro-batches of examples of like prefix length, so that little is padded."""

    # Memory strategy and precision
    deepspeed: str = "ds_configs/zero2_offload.json"
    precision: Literal["fp32", "bf16", "fp16", "auto"] | None = None
    """Null follows `bf16`; `auto` is bf16 where the device has it, else fp16 on CUDA, else fp32."""
    bf16: bool = False
    fast: Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)] = "auto"
    """`off` trains without the speed layer of `model/fast`: same numbers up to rounding, more time and memory."""
    activation_checkpointing: ActivationCheckpointingConfig | None = None
    """Null keeps all activations, unless the `deepspeed` file has an `activation_checkpointing` block."""

    # Evaluation
    eval_batch_size: AutoBatchSize = 16
    """Examples per rank in one decoding batch; `auto` is what the free memory holds."""
    max_new_tokens: int = Field(128, ge=1)

    # Records
    save_only_improve: bool = False
    save_every_steps: Annotated[int | None, OrOff] = Field(None, ge=1)
    """Optimizer steps between checkpoints within an epoch; null saves at the end of epochs only."""
    keep_checkpoints: Annotated[int | None, OrOff] = Field(None, ge=1)
    """How many checkpoints stay on disk, the best one always among them; null keeps one for every epoch."""
    hang_limit_s: int = Field(1800, ge=1)
    """Seconds that an optimizer step, a batch of an evaluation or a part of a checkpoint may take."""
    log_every_steps: int = Field(1, ge=1)
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Neither wandb nor TensorBoard ever stops a run. A run that goes on continues its wandb run."""
    tensorboard: bool = False
    """Event files in `tensorboard/` of the run folder; needs the extra `tensorboard`."""

    @field_validator("reset_optimizer", mode="before")
    @classmethod
    def _true_means_stage(cls, value: Any) -> Any:
        if value is None or value in ("None", "none"):
            return False
        return "stage" if value is True else value

    @field_validator("wandb", mode="before")
    @classmethod
    def _switch_of_wandb(cls, value: Any) -> Any:
        is_on = _switch(value)
        if is_on is None:
            return value.lower() if isinstance(value, str) else value
        return "online" if is_on else "disabled"

    @field_validator("tensorboard", mode="before")
    @classmethod
    def _switch_of_tensorboard(cls, value: Any) -> Any:
        is_on = _switch(value)
        return value if is_on is None else is_on

    @field_validator("latent_norm", mode="before")
    @classmethod
    def _no_norm(cls, value: Any) -> Any:
        return "none" if value in (None, "None", False) else value

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _switch_of_checkpointing(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    @model_validator(mode="before")
    @classmethod
    def _method_of_published_switches(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "method" in values:
            return values
        # Published runs of no_thoughts may set `coconut` as well, which therefore comes last.
        chosen = [name for name in _PUBLISHED_SWITCHES if _is_on(values.get(name))]
        return values | {"method": chosen[0]} if chosen else values

    @property
    def traits(self) -> Traits:
        return METHODS[self.method]

    @property
    def thoughts_per_step(self) -> int:
        return 0 if self.traits.thoughts == "none" else self.c_thought

    @property
    def run_folder(self) -> Path:
        return Path(self.save_path) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _switch(value: Any) -> bool | None:
    """Whether a value switches something on or off, in YAML's words or spelled out; None for any other value."""
    if value is None:
        return False
    if isinstance(value, str) and value.lower() in ("enabled", "disabled", "none", "null"):
        return value.lower() == "enabled"
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return None


def _is_on(value: Any) -> bool:
    return _switch(value) is True  # what is no switch is reported where the key is checked


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


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run YAML and apply `key=value` overrides (dotted keys reach into sections).

    Raises ConfigError with every unknown key, wrong value and contradiction together.
    """
    values = _read_yaml(path)
    problems = [problem for text in overrides if (problem := _apply_override(values, text))]
    config, invalid = _validate(values)
    problems += invalid
    named = {key for problem in invalid for key in problem.keys}
    problems += [problem for problem in contradictions(config) if not named & set(problem.keys)]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        message = f"run file {path} cannot be read: {error.strerror}; name a YAML such as run_configs/prosqa.yaml"
        raise InputError(message) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"run file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"run file {path} must hold `key: value` lines, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], text: str) -> Problem | None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return Problem((text,), f"{text!r}: an override is written key=value")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    try:
        target[last] = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        return Problem((key,), f"{key}: {raw!r} is not a YAML value: {' '.join(str(error).split())}")
    return None


def override(key: str, text: str) -> str:
    """`key=value` for a text, which `load_run_config` reads as YAML: quoted where YAML would take it for another."""
    try:
        is_plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_plain = False
    return f"{key}={text if is_plain else strict_json.dumps(text, ensure_ascii=False)}"


def _validate(values: dict[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """The configuration with unusable keys left at their defaults, and a problem for each of them."""
    try:
        return RunConfig.model_validate(values), []
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()]
        rejected = {str(item["loc"][0]) for item in error.errors()}
        usable = {key: value for key, value in values.items() if str(key) not in rejected}
        return RunConfig.model_validate(usable), problems


def _describe(item: Any) -> Problem:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        section = location[0] if len(location) > 1 else ""
        fields = _SECTIONS.get(section, RunConfig).model_fields
        hint = known_elsewhere(location[-1], section) or did_you_mean(location[-1], fields)
        return Problem((location[0],), f"{key}: unknown key{hint}")
    rule = item["msg"].removeprefix("Value error, ")
    return Problem((location[0],), f"{key}: {item['input']!r}: {rule[0].lower()}{rule[1:]}")


_SECTIONS: dict[str, type[BaseModel]] = {
    "latent_context": LatentContextConfig,
    "icot": IcotConfig,
    "model": ScratchModelConfig,
    "activation_checkpointing": ActivationCheckpointingConfig,
}


def contradictions(config: RunConfig) -> list[Problem]:
    """Values that are fine one by one and cannot stand together."""
    rules = (_method_rules, _model_rules, _data_rules, _batch_rules)
    return [Problem(keys, message) for rule in rules for keys, message in rule(config)]


_Found = list[tuple[tuple[str, ...], str]]


def _method_rules(config: RunConfig) -> _Found:
    found: _Found = []
    method = config.method
    switches = [name for name in _PUBLISHED_SWITCHES if getattr(config, name)]
    if "method" not in config.model_fields_set:
        keys = ("method", *_PUBLISHED_SWITCHES)
        found.append((keys, f"method: missing, and {', '.join(_PUBLISHED_SWITCHES)} are all false; name the method"))
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


@dataclass(frozen=True)
class BatchSizes:
    """How an optimizer step is split: `total = micro * accumulation * world`, in examples."""

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world


def batch_sizes(config: RunConfig, world: int) -> BatchSizes:
    """Split the effective batch over `world` ranks; raises ConfigError where it does not divide.

    `batch_size_training: auto` counts as 1 here, until a size has been chosen.
    """
    micro, accumulation = config.batch_size_training, config.gradient_accumulation_steps
    if micro == "auto":
        micro = 1
    if config.train_batch_size is None:
        return BatchSizes(micro, accumulation or 1, world)
    if accumulation is None and config.train_batch_size % (micro * world) == 0:
        accumulation = config.train_batch_size // (micro * world)
    if accumulation is None or micro * accumulation * world != config.train_batch_size:
        accumulated = f" x {accumulation} accumulated" if accumulation else ""
        message = (
            f"train_batch_size: {config.train_batch_size} cannot be made from {micro} a micro-batch{accumulated} "
            f"x {world} ranks; "
            "change batch_size_training, or leave gradient_accumulation_steps out so that it is worked out"
        )
        raise ConfigError("batch sizes", [Problem(("train_batch_size",), message)])
    return BatchSizes(micro, accumulation, world)
