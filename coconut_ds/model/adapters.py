"""LoRA on a frozen backbone, by peft, and the trained rows of its embedding.

An adapted linear layer keeps its weight W (O, I) frozen and computes (arXiv 2106.09685, section 4.1)

    h = W x + alpha / r * B A x,    A (r, I) random, B (O, r) zero at first

The marker tokens are new to the model, so their rows of the embedding, and only these, are trained as well.

In a folder it is an adapter as peft loads it (`adapter_config.json`, `adapter_model.safetensors`), with the name of the
base model and a fingerprint of its weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut_ds.errors import InputError, ModelError, demand_libraries, in_one_line
from coconut_ds.model.backbone import trained_parameters

CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _ROWS, _PEFT_ROWS = "base_model.model.", ".rows", ".token_adapter.trainable_tokens_delta"
_BASE_PRINT = "base_fingerprint"
_SAMPLED = 1024


@dataclass(frozen=True)
class Lora:
    """What is adapted, and how."""

    r: int
    alpha: int
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """Ends of the names of linear layers; None is all of them but the LM head."""
    tokens: tuple[int, ...] = ()
    """Whose rows of the embedding are trained."""
    base: str = ""
    """The folder or hub id of the frozen model."""
    base_print: str = ""
    """Its `fingerprint`; empty if its weights were not loaded, as in a memory plan."""


def adapt(model: PreTrainedModel, lora: Lora) -> None:
    """Freeze `model` and add adapters to it, in place; A is drawn from torch's random numbers.

    Raises InputError without peft, and for targets that name no linear layer.
    """
    demand_libraries(["peft"], extra="lora")
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    config, head = _peft_config(model, lora), model.get_output_embeddings()
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # peft's message names the modules that it did not find
        raise InputError(f"lora.targets: {in_one_line(error)}") from None
    for name, layer in _adapted_layers(model).items():
        if layer is head or type(layer) not in (nn.Linear, Conv1D):
            what = "the LM head" if layer is head else type(layer).__name__
            raise InputError(f"lora.targets: {name} is {what}; name linear layers of the decoder")
    config.base_print = lora.base_print
    if lora.tokens:
        table = model.get_input_embeddings()
        rows = TrainedRows(table, lora.tokens)
        model.set_input_embeddings(rows)
        if head.weight is table.weight:
            model.set_output_embeddings(HeadOfRows(head, rows))


def _peft_config(model: PreTrainedModel, lora: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.targets is None else list(lora.targets),
        base_model_name_or_path=lora.base,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def is_adapted(model: nn.Module) -> bool:
    """Whether `adapt` was called on it."""
    return any(name.endswith("lora_A") for name, _ in model.named_modules())


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers below the adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: each.get_base_layer() for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)}


def difference(model: PreTrainedModel, lora: Lora) -> str | None:
    """In what the adapters of a model are not those of `lora`; None if they are."""
    config: Any = model.peft_config["default"]
    for key, own, wanted in (
        ("r", config.r, lora.r),
        ("alpha", config.lora_alpha, lora.alpha),
        ("dropout", config.lora_dropout, lora.dropout),
        ("trainable_tokens", isinstance(model.get_input_embeddings(), TrainedRows), bool(lora.tokens)),
    ):
        if own != wanted:
            return f"lora.{key}: {wanted!r} here, {own!r} there"
    head: Any = model.get_output_embeddings()
    head = head.head if isinstance(head, HeadOfRows) else head
    adapted = set(_adapted_layers(model))
    linear = {name for name, each in model.named_modules() if type(each) in (nn.Linear, Conv1D) and each is not head}
    linear = adapted | {name for name in linear if not any(name.startswith(f"{each}.") for each in adapted)}
    ends = lora.targets
    meant = {name for name in linear if ends is None or any(f".{name}".endswith(f".{end}") for end in ends)}
    if other := sorted(meant ^ adapted):
        what = "all linear layers" if ends is None else list(ends)
        return f"lora.targets: {what} here, and {other[0]} has {'no ' * (other[0] in meant)}adapter there"
    return None


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Undo `adapt`, with the adapters added to the weights and the trained rows put into the table."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(rows, TrainedRows):
        rows.table.weight[rows.tokens] = rows.rows.to(rows.table.weight.dtype)
        model.set_input_embeddings(rows.table)
    if isinstance(head, HeadOfRows):
        model.set_output_embeddings(head.head)
    model.requires_grad_(True)
    del model.peft_config


class TrainedRows(nn.Module):
    """A frozen embedding with a few trained rows.

    peft's own layer for this copies the whole table in every call, half a gigabyte for Llama 3.2 1B, and reads the
    numbers of the rows from the host.
    """

    def __init__(self, table: Any, tokens: Sequence[int]):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(table.weight.detach()[list(tokens)].clone())
        """(k, D)"""
        place = torch.full((len(table.weight),), -1)
        place[list(tokens)] = torch.arange(len(tokens))
        self.place: torch.Tensor
        self.register_buffer("place", place, persistent=False)
        self.tokens: torch.Tensor
        self.register_buffer("tokens", torch.tensor(list(tokens)), persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        """The frozen table (V, D), trained rows as they were."""
        weight: nn.Parameter = self.table.weight
        return weight

    @property
    def embedding_dim(self) -> int:
        return int(self.rows.shape[1])

    @property
    def num_embeddings(self) -> int:
        return len(self.place)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        place = self.place[input_ids]
        # Some tables multiply what they look up (Gemma).
        trained = F.embedding(place.clamp_min(0), self.rows) * getattr(self.table, "embed_scale", 1.0)
        frozen = self.table(input_ids)
        return torch.where(place[..., None] >= 0, trained.to(frozen.dtype), frozen)


class HeadOfRows(nn.Module):
    """The LM head that shares a `TrainedRows`' table."""

    def __init__(self, head: Any, rows: TrainedRows):
        super().__init__()
        self.head = head
        self.rows = rows.rows
        self.tokens: torch.Tensor
        self.register_buffer("tokens", rows.tokens, persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.head.weight
        return weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(states)
        return logits.index_copy(-1, self.tokens, F.linear(states, self.rows))


# Files


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of names, shapes and up to 1,024 evenly spaced fp32 values of every weight: other weights have another.

    Of all values it would take seconds for a billion weights.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLED), dtype=torch.float64).long()
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_adapter(folder: Path, model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Store the trained weights, by their names in `model`, and what was adapted."""
    rows: Any = model.get_input_embeddings()
    config: Any = model.peft_config["default"]
    # Set here alone: from it peft would make a layer of its own for the rows.
    config.trainable_token_indices = rows.tokens.tolist() if isinstance(rows, TrainedRows) else None
    # Of the base model with its markers; peft and the tokenizer's class look for it.
    model.config.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.save_pretrained(folder)
    # One entry: safetensors writes several in any order, and equal adapters shall be equal files.
    facts = {_BASE_PRINT: config.base_print}
    save_file({_peft_name(name): value for name, value in weights.items()}, folder / ADAPTER_FILE, facts)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters that a run has written."""
    return (folder / ADAPTER_FILE).is_file() and (folder / "coconut.json").is_file()


def stored_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights in a folder by their names in the model; empty if it holds a whole model.

    Raises InputError for a file that cannot be read.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return {}
    try:
        return {_own_name(name): value for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}; copy the folder again") from None


def stored_lora(folder: Path) -> Lora:
    """The description of the adapters in a folder; raises InputError if it cannot be read."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            base_print = file.metadata()[_BASE_PRINT]
        targets, tokens = tuple(sorted(values["target_modules"])), values["trainable_token_indices"] or ()
        sizes = values["r"], values["lora_alpha"], values["lora_dropout"]
        return Lora(*sizes, targets, tuple(tokens), values["base_model_name_or_path"], base_print)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: adapters cannot be read: {in_one_line(error)}; copy the folder again") from None


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Fill the adapters of `model` with those in `folder`; raises ModelError for other names or shapes."""
    own = trained_parameters(model)
    stored = stored_adapter(folder)
    if set(own) != set(stored):
        differing = sorted(set(own) ^ set(stored))
        raise ModelError(f"{folder}: {ADAPTER_FILE} does not fit the model: {differing[0]} ({len(differing)} names)")
    for name, parameter in own.items():
        if parameter.shape != stored[name].shape:
            shapes = f"{list(stored[name].shape)}, not {list(parameter.shape)}"
            raise ModelError(f"{folder}: {ADAPTER_FILE} does not fit the model: {name} is {shapes}")
        parameter.copy_(stored[name])


def _peft_name(name: str) -> str:
    own = name.removesuffix(_ROWS) + _PEFT_ROWS if name.endswith(_ROWS) else name.replace(".default.", ".")
    return _PREFIX + own


def _own_name(name: str) -> str:
    own = name.removeprefix(_PREFIX)
    if own.endswith(_PEFT_ROWS):
        return own.removesuffix(_PEFT_ROWS) + _ROWS
    return own.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
