"""RunConfig: the one owner of every training value, as a run file gives them; `auto` is not resolved in it.

The keys of the published configurations (facebookresearch/coconut `args/*.yaml`) keep their names and meanings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from coconut_ds.config.methods import METHODS, Method, Traits
from coconut_ds.config.sections import (
    ActivationCheckpointingConfig,
    AutoBatchSize,
    IcotConfig,
    LatentContextConfig,
    OffIsZero,
    OrOff,
    ScratchModelConfig,
    Section,
)

PUBLISHED_SWITCHES = ("cot", "no_cot", "no_thoughts", "coconut")
"""The published spellings of `method`."""


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
    load_model_path: Annotated[str | None, OrOff] = None
    """Weights to start from: a checkpoint, an HF folder or hub id, or a published `.pt` state dict."""

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
    """Micro-batches per optimizer step and rank; worked out from `train_batch_size` if that is given, else 1."""
    train_batch_size: int | None = Field(None, ge=1)
    """Examples per optimizer step over all ranks."""
    lr: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: Annotated[float, OffIsZero] = Field(0.0, ge=0)
    """Gradients are clipped to this norm; 0 is off, as published."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps."""
    reset_optimizer: Literal[False, "stage", "epoch"] = False
    """`true` means `stage`, what the paper describes; `epoch` is what the published code does."""
    loss_normalization: Literal["token", "micro_batch"] = "token"
    group_by_length: bool = True
    """Micro-batches of examples of similar prefix length, to save padding."""

    # Memory strategy and precision
    deepspeed: str = "ds_configs/zero2_offload.json"
    precision: Annotated[Literal["fp32", "bf16", "fp16", "auto"] | None, OrOff] = None
    """Null follows `bf16`; `auto` is bf16 if the device has it, else fp16 on CUDA, else fp32."""
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
    """Neither wandb nor TensorBoard ever stops a run. A resumed run continues its wandb run."""
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
        chosen = [name for name in PUBLISHED_SWITCHES if _is_on(values.get(name))]
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
    return _switch(value) is True  # a value that is not a switch is reported where the key is checked
