"""The HF model under Coconut and its tokenizer: from a hub id, a folder, or from scratch; marker tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from coconut_ds.data.markers import MARKERS, marker_ids
from coconut_ds.errors import ModelError, in_one_line
from coconut_ds.model.state_dicts import (
    PLAIN_NAMES,
    SECOND_TABLE,
    demand_finite,
    demand_plain_tensors,
    demand_whole,
    plain_name,
)

_MARKERS_START_FROM = "<<"

_POSITION_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_PROCESSED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Backbone:
    """A causal language model in fp32 and its tokenizer, which has an EOS and a padding token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def n_positions(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return n_positions(self.model)

    def marker_ids(self) -> dict[str, int]:
        """Ids of the marker tokens; raises ModelError when they were not added."""
        return marker_ids(self.tokenizer)


def load_backbone(name: str) -> Backbone:
    """Load a folder or a hub id; the hub is asked only for what neither the folder nor the cache has.

    Raises ModelError, one line, when it cannot be had, is not whole, or cannot carry Coconut.
    """
    backbone = Backbone(load_model(name), load_tokenizer(name))
    demand_rows(backbone.model, backbone.tokenizer, name)
    return backbone


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load_backbone` loads it."""
    tokenizer = _load(name, _tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no EOS token, which ends every answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Raises OSError if the tokenizer files are missing: for some families transformers returns an empty tokenizer."""
    reason = "an empty vocabulary"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as error:
        reason = in_one_line(error, 100)
    raise OSError(
        f"no tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json of the model beside its config.json"
    )


def backbone_from_config(name: str) -> Backbone:
    """As `load_backbone`, with random weights: of a folder or hub id only config.json and the tokenizer are read.

    For what depends on shapes alone, such as a plan of memory.
    """
    return Backbone(model_from_config(name), load_tokenizer(name))


def model_from_config(name: str) -> PreTrainedModel:
    """The model alone, in fp32, as `backbone_from_config` makes it."""
    model = _load(name, _untrained)
    demand_plain_head(model, name)
    return model


def _untrained(name: str, **options: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


def load_model(name: str) -> PreTrainedModel:
    """The model alone, in fp32, as `load_backbone` loads it.

    Prefixes of wrappers in the names of its weights are passed over. Raises ModelError naming each weight that is
    missing, unexpected, misshaped or not finite: transformers itself fills in random ones.
    """
    load = partial(
        _load,
        name,
        AutoModelForCausalLM.from_pretrained,
        dtype=torch.float32,
        output_loading_info=True,
        # Else the names of misshaped weights would only be in a log.
        ignore_mismatched_sizes=True,
    )
    model, report = load()
    if any(plain_name(key) != key for key in report["unexpected_keys"]):
        model, report = load(key_mapping=PLAIN_NAMES)
    demand_plain_head(model, name)
    _keep_own_head(model)
    misshaped = {key: f"{list(found)}, not {list(own)}" for key, found, own in sorted(report["mismatched_keys"])}
    # Published Coconut also stores its embedding table under a second name.
    unexpected = sorted(key for key in report["unexpected_keys"] if plain_name(key) != SECOND_TABLE)
    demand_whole(name, model, sorted(report["missing_keys"]), unexpected, misshaped)
    demand_plain_tensors(Path(name), model)
    demand_finite(name, dict(model.named_parameters()))
    return model


def _keep_own_head(model: PreTrainedModel) -> None:
    """A head that a folder holds beside the embedding is one, whatever its configuration says of tying them.

    transformers loads both, and would tie them when the embedding is resized.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False
        model.config.get_text_config(decoder=True).tie_word_embeddings = False


def demand_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ModelError where the tokenizer has ids that the embedding has no row for."""
    embeddings: Any = model.get_input_embeddings()
    n_rows, highest = len(embeddings.weight), max(tokenizer.get_vocab().values())
    if highest >= n_rows:
        raise ModelError(
            f"{name}: the tokenizer's highest id is {highest}, the embedding has {n_rows} rows; they are not of one "
            "model, or it was saved before tokens were added: call resize_token_embeddings and save it again"
        )


def _load(name: str, load: Callable[..., Any], **options: Any) -> Any:
    # Said, because transformers asks on the terminal where it is not.
    options["trust_remote_code"] = False
    _demand_weights_of_transformers(Path(name))
    try:
        return load(name, local_files_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:
        if Path(name).is_dir():
            raise ModelError(f"folder {name} is not a model for transformers: {in_one_line(error)}") from None
        if not isinstance(error, OSError | ValueError | SafetensorError):  # the files exist, but cannot be loaded
            raise ModelError(f"{name} cannot be loaded: {in_one_line(error)}") from None
    try:
        # One request with a time limit first: loading alone would retry for minutes where the hub cannot be reached.
        HfApi().model_info(name, timeout=10)
        return load(name, **options)
    except Exception as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor in the cache, and the hub did not give it "
            f"({type(error).__name__}); download it elsewhere and set model_id to its folder, or use model_id: scratch"
        ) from None


def _demand_weights_of_transformers(folder: Path) -> None:
    """Raise ModelError, with the way out, for folders of weights in forms that only their own tools read."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    shards = [folder] if any(folder.glob("*_states.pt")) else sorted(folder.glob("global_step*/"))
    if shards:
        top = shards[-1].parent
        command = f"python {quote(str(top / 'zero_to_fp32.py'))} {quote(str(top))} OUT"
        raise ModelError(
            f"{folder} is a DeepSpeed checkpoint, whose weights lie in pieces; put them together with the script that "
            f"DeepSpeed left there, `{command}`, and name the file in OUT, with model_id the model it was trained from"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a LoRA adapter and not a model; merge it into its base model with peft's merge_and_unload "
            "and name the folder that is saved from it"
        )


def n_positions(model: PreTrainedModel) -> int:
    """Longest sequence a model takes, in tokens; `sys.maxsize` for a family without such a limit (ALiBi, Bloom)."""
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in _POSITION_LIMITS)
    limit = next((int(limit) for limit in limits if limit and limit > 0), sys.maxsize)  # XLNet says -1
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Longer sequences turn all their positions otherwise, those of keys that are in the cache already, too.
        return min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def demand_plain_head(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError for a model whose logits are not its LM head applied to the states of a body of its own."""
    config = model.config.get_text_config(decoder=True)
    for key in _PROCESSED_LOGITS:
        if getattr(config, key, None) not in (None, 1.0):
            raise ModelError(f"{name} changes its logits after the LM head ({key}); not supported")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ModelError(f"{name} has no separate LM head; not supported")


def scratch_backbone(architecture: str, tokenizer: PreTrainedTokenizerBase, **shape: Any) -> Backbone:
    """A model with random weights (torch's global seed) for the tokenizer's vocabulary.

    `shape`: n_layer, n_embd, n_head, n_positions, dropout.
    """
    config = _SCRATCH_CONFIGS[architecture](tokenizer, **shape)
    return Backbone(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer)


def _gpt2_config(tokenizer: PreTrainedTokenizerBase, dropout: float, **shape: Any) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(tokenizer),
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )


def _llama_config(
    tokenizer: PreTrainedTokenizerBase, n_layer: int, n_embd: int, n_head: int, n_positions: int, dropout: float
) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=n_embd,
        intermediate_size=3 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        max_position_embeddings=n_positions,
        attention_dropout=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


_SCRATCH_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {"gpt2": _gpt2_config, "llama": _llama_config}


def word_tokenizer(texts: Iterable[str], n_positions: int) -> PreTrainedTokenizerBase:
    """A word-level tokenizer whose vocabulary is every word, punctuation mark and newline of `texts`.

    Words carry the space before them, and the first word of a text gets one, so that a word is the same token
    everywhere; decoding gives the text back.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"\n|(?<=\w)[.,;:!?]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("\n▁", "\n"), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    special = ["<|endoftext|>", "<|pad|>", "<|unknown|>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, vocab_size=2**31 - 1, show_progress=False)
    tokenizer.train_from_iterator(["###", *(text + "\n" for text in sorted(set(texts)))], trainer)
    eos, pad, unknown = special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=eos,
        pad_token=pad,
        unk_token=unknown,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )


def add_markers(backbone: Backbone) -> None:
    """Add the marker tokens; their rows start from `<<` where the vocabulary has it, else from the mean row.

    Nothing happens to a model that has them already.
    """
    model, tokenizer = backbone.model, backbone.tokenizer
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in vocabulary]
    if not missing:
        return
    source = vocabulary.get(_MARKERS_START_FROM)
    n_before = len(tokenizer)
    tokenizer.add_tokens(missing)
    embeddings: Any = model.get_input_embeddings()
    if embeddings.num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = [tokenizer.get_vocab()[marker] for marker in missing]
    tables: list[Any] = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not tables[0]:
        tables.append(model.get_output_embeddings().weight)
    with torch.no_grad():
        for weight in tables:
            weight[new] = weight[source].clone() if source is not None else weight[:n_before].mean(dim=0)
