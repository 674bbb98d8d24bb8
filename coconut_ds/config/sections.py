"""The sections of a run file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Scope = Literal["sequence", "last_pass"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _published_spellings(cls, value: Any) -> Any:
        # The published YAMLs write None, which YAML reads as a string.
        return None if value == "None" else value


def on_or_off(value: Any) -> Any:
    """A switch for a section of defaults."""
    return {} if value is True else None if value is False else value


class ColumnsConfig(Section):
    """Where the parts of a record stand in the data files."""

    question: str = "question"
    steps: str = "steps"
    answer: str = "answer"


class LatentContextConfig(Section):
    """The latent window: a thought is the weighted average of the last `len(weights)` hidden states."""

    weights: tuple[float, ...] | Literal["uniform", "exponential"] = (0.6, 0.3, 0.1)
    """Newest state first; each at least 0, the first above 0; normalised to sum to 1. `exponential`: `decay ** j`."""
    window: int | None = Field(None, ge=1)
    """m, the states in the window; needed where `weights` does not list them."""
    decay: float | None = Field(None, gt=0, le=1)
    """Weight of a state relative to the next newer one under `exponential`; null is 0.5."""
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
            raise ValueError(f"window: {self.window}, but {listed}; list that number, or take uniform or exponential")
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


class IcotConfig(Section):
    """How iCoT removes the chain of thought (arXiv 2405.14838, section 3)."""

    tokens_per_stage: float = Field(8, gt=0)
    """Tokens removed over one stage, evenly over its steps; with `epochs_per_stage: 1` the paper's tokens per epoch."""
    all_beyond: int | None = Field(39, ge=0)
    """Once the schedule removes this many tokens the whole chain goes; null never. The published value for GSM8K."""
    smoothing: float | None = Field(4.0, gt=0)
    """Lambda: an example loses o tokens more with a probability proportional to exp(-lambda o); null is off."""


class StepSupervisionConfig(Section):
    """The model also learns to write each replaced step from its thoughts alone (SIM-CoT, arXiv 2509.20317)."""

    weight: float = Field(1.0, ge=0)
    """Of the cross entropy of the written steps, a mean over their tokens, beside that of the sequence; 0 is off."""
    decoder: Literal["shared", "copy"] = "shared"
    """Who writes: the model itself, or a copy with weights of its own that starts from the model's and is dropped by
    export and inference."""


class DistillationConfig(Section):
    """The state before the answer learns from the model's own with all steps visible (CODI, arXiv 2502.21074).

    The weights are named as in the paper: alpha of the teacher's cross entropy, beta of that with thoughts, gamma of
    the distance between the states.
    """

    alpha: float = Field(1.0, ge=0)
    beta: float = Field(1.0, ge=0)
    gamma: float = Field(1.0, ge=0)
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Whose states are compared: 0 are the embeddings, l is layer l; null is all of them."""
    deviation: Literal["example", "micro_batch"] = "example"
    """A layer's distance is divided by the standard deviation of the teacher's states: of the example, which no split
    of the batch changes, or of the micro-batch, as in the published code."""
    omit_last_step: bool = False
    """The teacher reads all steps but the last, so that it cannot copy the answer from it; the published choice."""

    @field_validator("layers")
    @classmethod
    def _once_each(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError("names a layer twice")
        return layers

    @property
    def is_on(self) -> bool:
        """Whether the teacher has anything to do."""
        return self.alpha > 0 or self.gamma > 0


class MixtureConfig(Section):
    """Weights of the losses of every example in three layouts: with thoughts, with all steps, and the answer alone."""

    latent: float = Field(1.0, ge=0)
    verbal: float = Field(0.0, ge=0)
    direct: float = Field(0.0, ge=0)


class SupervisionConfig(Section):
    """What thoughts learn from besides the tokens after them."""

    steps: Annotated[StepSupervisionConfig | None, BeforeValidator(on_or_off)] = None
    distill: Annotated[DistillationConfig | None, BeforeValidator(on_or_off)] = None
    mixture: Annotated[MixtureConfig | None, BeforeValidator(lambda value: None if value is False else value)] = None


class SolverConfig(Section):
    """In which order thoughts are computed: all at once, several times over (PCCoT, arXiv 2506.18582)."""

    kind: Literal["jacobi"] = "jacobi"
    iterations: int = Field(3, ge=1)
    """T; as many as there are thoughts give what the sequential method gives."""
    gradient: Literal["all", "last"] = "all"
    """The iterations through which gradients go back."""


class LoraConfig(Section):
    """Low-rank adapters on a frozen model (arXiv 2106.09685), by peft (extra `lora`)."""

    r: int = Field(16, ge=1)
    """Rank of the product that is added to a weight."""
    alpha: int = Field(32, ge=1)
    """The product is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the inputs of the adapters."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Ends of the names of linear layers, such as q_proj; null is all of them but the LM head."""
    trainable_tokens: bool = True
    """The rows of the marker tokens in the embedding are trained as well."""


class ScratchModelConfig(Section):
    """A small model with random weights, used when `model_id` is `scratch`."""

    architecture: Literal["gpt2", "llama"] = "gpt2"
    n_layer: int = Field(2, ge=1)
    n_embd: int = Field(128, ge=1)
    n_head: int = Field(4, ge=1)
    n_positions: int = Field(128, ge=1)
    """Longest sequence in tokens, thoughts and markers included."""
    dropout: float = Field(0.0, ge=0, lt=1)


class ActivationCheckpointingConfig(Section):
    """Which activations are kept for the backward and which are computed again (`model/fast/checkpointing.py`)."""

    enabled: bool = True
    every_n_layers: int = Field(1, ge=1)
    """Every n-th decoder layer is recomputed, the others keep their activations."""
    offload: bool = False
    """Layer inputs of the prefix wait in pinned host memory; no effect on a CPU."""
