"""RunConfig: the one owner of every training value, as a run file gives them; `auto` is not resolved in it.

The keys of the published configurations (facebookresearch/coconut `args/*.yaml`) keep their names and meanings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError, model_validator

from coconut_ds.config.methods import METHODS, Method, Traits
from coconut_ds.config.sections import (
    ActivationCheckpointingConfig,
    ColumnsConfig,
    DistillationConfig,
    IcotConfig,
    LatentContextConfig,
    LoraConfig,
    MixtureConfig,
    ScratchModelConfig,
    Section,
    SolverConfig,
    SupervisionConfig,
    on_or_off,
)

PUBLISHED_SWITCHES = ("cot", "no_cot", "no_thoughts", "coconut")
"""The published spellings of `method`."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _positive_or_auto(value: Any) -> Any:
    if value != "auto" and not _is_count(value):
        raise ValueError("must be a whole number of at least 1, or auto")
    return value


def _one_or_several(value: Any) -> Any:
    if _is_count(value):
        return value
    if not isinstance(value, list | tuple) or not value or not all(map(_is_count, value)):
        raise ValueError("must be a whole number of at least 1, or a list of them such as [6, 3]")
    return tuple(value)


def _switch(value: Any) -> Any:
    """True or False for what switches something on or off, in YAML's words or spelled out; any other value as it is."""
    if isinstance(value, str) and value.lower() in ("enabled", "disabled", "none", "null"):
        return value.lower() == "enabled"
    try:
        return value is not None and TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return value


def _wandb_mode(value: Any) -> Any:
    mode = _switch(value)
    if isinstance(mode, bool):
        return "online" if mode else "disabled"
    return mode.lower() if isinstance(mode, str) else mode


# Other words for a value. YAML reads true, on and yes as True, and false, off and no as False.
_OrOff = BeforeValidator(lambda value: None if value is False else value)
_OffIsZero = BeforeValidator(lambda value: 0 if value is None else value)
_OffIsNone = BeforeValidator(lambda value: "none" if value in (None, False) else value)
_OffIsOff = BeforeValidator(lambda value: "off" if value is False else value)
_OnIsStage = BeforeValidator(lambda value: "stage" if value is True else False if value in (None, "none") else value)
_OnIsEnabled = BeforeValidator(lambda value: {"enabled": value} if isinstance(value, bool) else value)

_AutoBatchSize = Annotated[int | Literal["auto"], PlainValidator(_positive_or_auto)]


class RunConfig(Section):
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
    epochs_per_stage: Annotated[int | tuple[int, ...], BeforeValidator(_one_or_several)] = 1
    """Of a list the first number is that of stage 0, and the last holds for all stages from there on: `[6, 3]`."""
    curriculum: Literal["forward", "reversed"] = "forward"
    """Steps are replaced from the first on, as published, or from the last on."""
    max_latent_stage: int = Field(0, ge=0)
    """Steps replaced at most; in the stage after it all remaining steps are dropped."""
    pad_latent_to_max: bool = False
    """Beyond the last latent stage every example gets the same number of thoughts."""
    uniform_prob: float = Field(0.0, ge=0, le=1)
    """Probability with which a training example draws its stage uniformly."""
    latent_context: Annotated[LatentContextConfig | None, _OrOff] = None
    """Null is plain Coconut."""
    latent_norm: Annotated[Literal["none", "rms", "embedding"], _OffIsNone] = "none"
    """Every thought is scaled to a root mean square of 1, or to the mean norm of its question's token embeddings."""
    latent_projection: Annotated[Annotated[int, Field(ge=1)] | None, _OrOff] = None
    """Inner size of a trained MLP that every thought goes through (CODI: 768 for GPT-2); null is none."""
    solver: Annotated[SolverConfig | None, _OrOff] = None
    """Null computes one thought after another, as published."""
    supervision: Annotated[SupervisionConfig | None, _OrOff] = None
    """Null is the published loss."""
    icot: Annotated[IcotConfig | None, _OrOff] = None
    """For `method: icot`; null is its defaults."""

    # Model
    model_id: str = "openai-community/gpt2"
    """Hub id, folder, or `scratch`."""
    model: ScratchModelConfig | None = None
    lora: Annotated[LoraConfig | None, BeforeValidator(on_or_off)] = None
    """Null trains all weights."""
    load_model_path: Annotated[str | None, _OrOff] = None
    """Weights to start from: a checkpoint, an HF folder or hub id, or a published `.pt` state dict."""

    # Data
    train_path: str | None = None
    """JSON, JSON lines, CSV, Parquet, or `hub:OWNER/NAME:SPLIT`, by the ending; see docs/datasets/OWN_DATA.md."""
    val_path: str | None = None
    test_path: str | None = None
    columns: Annotated[ColumnsConfig | None, _OrOff] = None
    """Null is question, steps and answer."""
    steps_separator: Annotated[str | None, _OrOff] = Field(None, min_length=1)
    """Between the steps of a chain that is one text; null takes lists of steps alone."""
    train_size: Annotated[int | None, _OrOff] = Field(None, ge=1)
    """At most so many records are taken, drawn once for all seeds; null is all of them."""
    val_size: Annotated[int | None, _OrOff] = Field(None, ge=1)
    test_size: Annotated[int | None, _OrOff] = Field(None, ge=1)
    prompt_format: Literal["plain", "chat"] = "plain"
    """`chat`: a question stands in the tokenizer's chat template, thoughts and answer in the assistant's message."""
    shuffle_facts: Annotated[str | None, _OrOff] = None
    """The token that ends a fact of a question; a training question's facts stand in another order every epoch."""

    # Optimisation
    seed: int = Field(0, ge=0)
    deterministic: bool = False
    """Only deterministic kernels: on GPUs a run repeats bit for bit with it alone, and takes longer."""
    resume: int = Field(0, ge=0)
    """First epoch, from 0, of a run that starts from `load_model_path`; with `only_eval` it selects the stage."""
    num_epochs: int = Field(1, ge=1)
    batch_size_training: _AutoBatchSize = 32
    """Micro-batch: examples per rank in one forward; `auto` is the largest that fits and divides `train_batch_size`."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Micro-batches per optimizer step and rank; worked out from `train_batch_size` if that is given, else 1."""
    train_batch_size: int | None = Field(None, ge=1)
    """Examples per optimizer step over all ranks."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Annotated[float, _OffIsZero] = Field(0.0, ge=0)
    """Gradients are clipped to this norm; 0 is off, as published."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps."""
    reset_optimizer: Annotated[Literal[False, "stage", "epoch"], _OnIsStage] = False
    """`true` means `stage`, what the paper describes; `epoch` is what the published code does."""
    loss_normalization: Literal["token", "micro_batch"] = "token"
    group_by_length: bool = True
    """Micro-batches of examples of similar question length, to save padding."""

    # Memory strategy and precision
    deepspeed: str = "ds_configs/zero2_offload.json"
    precision: Annotated[Literal["fp32", "bf16", "fp16", "auto"] | None, _OrOff] = None
    """Null follows `bf16`; `auto` is bf16 if the device has it, else fp16 on CUDA, else fp32."""
    bf16: bool = False
    fast: Annotated[Literal["auto", "off"], _OffIsOff] = "auto"
    """`off` trains without the speed layer of `model/fast`: same numbers up to rounding, more time and memory."""
    activation_checkpointing: Annotated[ActivationCheckpointingConfig | None, _OnIsEnabled] = None
    """Null keeps all activations, unless the `deepspeed` file has an `activation_checkpointing` block."""

    # Evaluation
    eval_batch_size: _AutoBatchSize = 16
    """Examples per rank in one decoding batch; `auto` is what the free memory holds."""
    eval_thoughts: int | None = Field(None, ge=0)
    """With `only_eval`: thoughts (or pauses) before every answer, another number than the model was trained with."""
    max_new_tokens: int = Field(128, ge=1)
    answer_match: Literal["text", "number"] = "text"
    """`number`: an answer is right also as the same number otherwise written, 5 or 5.0 or $5."""

    # Records
    save_only_improve: bool = False
    save_every_steps: Annotated[int | None, _OrOff] = Field(None, ge=1)
    """Optimizer steps between checkpoints within an epoch; null saves at the end of epochs only."""
    keep_checkpoints: Annotated[int | None, _OrOff] = Field(None, ge=1)
    """How many checkpoints stay on disk, the best one always among them; null keeps one for every epoch."""
    num_workers: int | None = Field(None, ge=0)
    """Processes per rank that make batches ahead; null is 1 beside a GPU and none on a CPU."""
    hang_limit_s: int = Field(1800, ge=1)
    """Seconds that an optimizer step, a batch of an evaluation or a part of a checkpoint may take."""
    log_every_steps: int = Field(1, ge=1)
    wandb: Annotated[Literal["online", "offline", "disabled"], BeforeValidator(_wandb_mode)] = "disabled"
    """Neither wandb nor TensorBoard ever stops a run. A resumed run continues its wandb run."""
    tensorboard: Annotated[bool, BeforeValidator(_switch)] = False
    """Event files in `tensorboard/` of the run folder; needs the extra `tensorboard`."""

    @model_validator(mode="before")
    @classmethod
    def _method_of_published_switches(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "method" in values:
            return values
        # Published runs of no_thoughts may set `coconut` as well, which therefore comes last. A value that is no switch
        # is reported where the key is checked.
        chosen = [name for name in PUBLISHED_SWITCHES if _switch(values.get(name)) is True]
        return values | {"method": chosen[0]} if chosen else values

    @model_validator(mode="before")
    @classmethod
    def _what_codi_stands_for(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("method") != "codi":
            return values
        given = values.get("supervision")
        given = {} if given in (None, "None") else given
        supervision = {"distill": True} | given if isinstance(given, dict) else given
        return {"pad_latent_to_max": True} | values | {"supervision": supervision}

    @property
    def traits(self) -> Traits:
        return METHODS[self.method]

    @property
    def thoughts_per_step(self) -> int:
        return 0 if self.traits.thoughts == "none" else self.c_thought

    @property
    def step_weight(self) -> float:
        """Of the loss of steps written from their thoughts; 0 without step supervision."""
        return self.supervision.steps.weight if self.supervision and self.supervision.steps else 0.0

    @property
    def distillation(self) -> DistillationConfig | None:
        """The section `supervision.distill` if it is there and on."""
        distill = self.supervision.distill if self.supervision else None
        return distill if distill is not None and distill.is_on else None

    @property
    def mixture(self) -> MixtureConfig:
        """The section `supervision.mixture`, or one with thoughts alone."""
        given = self.supervision.mixture if self.supervision else None
        return given or MixtureConfig()

    @property
    def loss_weights(self) -> tuple[float, float, float, float, float]:
        """The weights of `training.step.LOSSES`."""
        latent, verbal, gamma, mixture = self.mixture.latent, self.mixture.verbal, 0.0, self.mixture
        if distill := self.distillation:
            latent, verbal, gamma = distill.beta, distill.alpha, distill.gamma
        return latent, self.step_weight, verbal, gamma, mixture.direct

    @property
    def has_copied_decoder(self) -> bool:
        """Whether steps are written by a decoder with weights of its own."""
        steps = self.supervision.steps if self.supervision else None
        return steps is not None and steps.weight > 0 and steps.decoder == "copy"

    @property
    def run_folder(self) -> Path:
        return Path(self.save_path) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
