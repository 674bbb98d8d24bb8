"""Model families: the common ones are exact or refused, as docs/FAMILIES.md says; what the check leaves as it was."""

from __future__ import annotations

import re
import sys

import families
import naive
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
)

from coconut_ds import Coconut
from coconut_ds.checkpoints.weights import load_initial
from coconut_ds.config.run_config import RunConfig
from coconut_ds.errors import ModelError
from coconut_ds.model import self_check
from coconut_ds.model.backbone import n_positions
from coconut_ds.model.fast.checkpointing import decoder_layers
from coconut_ds.model.scratch import word_tokenizer
from coconut_ds.model.self_check import demand_fit
from coconut_ds.training.setup import build_coconut

EXACT = """gpt2 llama mistral qwen2 qwen3 gemma gemma3 gemma3_text phi3 opt gpt_neox gpt_neo gptj bloom mpt falcon olmo2
smollm3 granite starcoder2 qwen3_moe mixtral gpt_oss deepseek_v3""".split()
REFUSED = {
    "bert": "its LM head on the states of its body: logits differ",
    "roberta": "its LM head on the states of its body: logits differ",
    "bart": "rows padded on the left: logits differ",
    "electra": "its LM head on the states of its body: logits differ",
    "gemma2": "changes its logits after the LM head (final_logit_softcapping)",
    "cohere": "changes its logits after the LM head (logit_scale)",
    "mamba": "it keeps recurrent or convolutional state",
    "mamba2": "it keeps recurrent or convolutional state",
    "jamba": "it keeps recurrent or convolutional state",
    "qwen3_next": "it keeps recurrent or convolutional state",
    "recurrent_gemma": "it keeps recurrent or convolutional state",
    "rwkv": "it keeps recurrent or convolutional state",
    "lfm2": "a prefix, two thoughts and the rest on the KV cache",
    "xlnet": "a prefix, two thoughts and the rest on the KV cache",
    "gemma4_text": "a prefix, two thoughts and the rest on the KV cache: fails with RuntimeError",
    "llama4_text": "has no separate LM head",
}


def listed() -> dict[str, str]:
    """What the page says of each family."""
    _, exact, refused, _ = re.split(r"^## .*$", families.PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = re.findall(r"[\w-]+", exact.strip().split("\n\n")[1])
    return {**dict.fromkeys(names, "exact"), **dict.fromkeys(re.findall(r"^\| ([\w-]+) ", refused, re.M), "refused")}


LISTED = listed()


@pytest.mark.parametrize("family", EXACT)
def test_a_family_that_fits_equals_the_naive_twin(family):
    tried = families.try_family(family)
    assert (tried.outcome, LISTED[family]) == ("exact", "exact"), tried.remark


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_fit_is_refused_with_what_differs(family):
    tried = families.try_family(family)
    assert (tried.outcome, LISTED[family]) == ("refused", "refused"), tried.remark
    assert REFUSED[family] in tried.remark
    assert type(families.small_model(family)).__name__ in tried.remark


def wrapped(base, **ids) -> Coconut:
    known = {"latent_token_id": tiny.LATENT, "start_latent_id": tiny.START, "end_latent_id": tiny.END}
    return Coconut(base, **known | {"eos_token_id": tiny.EOS} | ids)


def test_the_check_changes_no_mode_no_gradient_and_no_random_number():
    base = tiny.backbone("gpt2", dropout=0.3).train()
    state = torch.get_rng_state()
    model = wrapped(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    base.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    demand_fit(model)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_known_family_is_tried_with_a_few_layers_and_has_all_of_them_again(family):
    """ZeRO fills its buckets in the order of the parameters."""
    base = tiny.backbone(family, n_layer=5)
    names, ran = [name for name, _ in base.named_parameters()], set()
    for number, layer in enumerate(decoder_layers(base)):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.add(number))
    wrapped(base)
    assert ran == {0, 1}
    assert [name for name, _ in base.named_parameters()] == names
    assert len(decoder_layers(base)) == 5


def test_of_layers_of_several_kinds_one_of_each_is_tried():
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 2
    config = Qwen3Config(num_hidden_layers=5, layer_types=kinds, use_sliding_window=True, sliding_window=4, **shape)
    base, ran = AutoModelForCausalLM.from_config(config), set()
    for number, layer in enumerate(decoder_layers(base)):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.add(number))
    wrapped(base)
    assert ran == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3"])
def test_other_precisions_pass_and_are_told_from_a_model_that_does_not_fit(family, dtype):
    wrapped(tiny.backbone(family).to(dtype))
    with pytest.raises(ModelError, match="its LM head on the states of its body"):
        wrapped(families.small_model("bert").to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_decoded_token_in_half_precision_is_no_difference(dtype, monkeypatch):
    """The logits of `generate` are fp32, and rounded as those of the model."""
    exact = self_check.next_token_logits
    monkeypatch.setattr(self_check, "next_token_logits", lambda *given: exact(*given).float() * 1.004)
    assert wrapped(tiny.backbone("llama").to(dtype)).decodes_on_static_cache
    with pytest.raises(ModelError, match="a decoded token"):
        wrapped(tiny.backbone("llama"))


@pytest.mark.parametrize("latent", [tiny.LATENT, None], ids=["with thoughts", "without"])
def test_a_head_with_further_layers_is_refused_with_and_without_thoughts(latent):
    with pytest.raises(ModelError, match=r"^BertLMHeadModel does not fit.*docs/FAMILIES\.md"):
        wrapped(families.small_model("bert"), latent_token_id=latent)


def test_a_scale_that_no_configuration_names_is_found():
    base = tiny.backbone("gpt2")
    wrapped(base)
    forward = base.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    base.forward = scaled
    with pytest.raises(ModelError, match=r"its LM head on the states of its body: logits differ .* by 9\.9e-03"):
        wrapped(base)


def test_weights_without_data_are_not_tried():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2))
    demand_fit(wrapped(base))


@pytest.mark.parametrize("name", ["latent_token_id", "start_latent_id", "end_latent_id", "eos_token_id"])
def test_an_id_without_a_row_in_the_embedding_is_named(name):
    with pytest.raises(ModelError, match=rf"{name} 40, the embedding has 40 rows; add the marker tokens"):
        wrapped(tiny.backbone("gpt2"), **{name: 40})


def test_positions_of_families_that_call_them_otherwise():
    shape = {"vocab_size": 40, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    assert n_positions(AutoModelForCausalLM.from_config(BloomConfig(**shape))) == sys.maxsize
    mpt = MptConfig(vocab_size=40, d_model=32, n_layers=1, n_heads=2, max_seq_len=77)
    assert n_positions(AutoModelForCausalLM.from_config(mpt)) == 77
    assert n_positions(families.small_model("gemma3")) == 96
    assert n_positions(families.small_model("xlnet")) == sys.maxsize  # says -1


def test_a_family_without_positions_goes_through_the_doors_of_a_run(tmp_path):
    words = ["Is", "Alex", "a", "wumpus", "?"]
    tokenizer = word_tokenizer(words, 64)
    base = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = RunConfig(method="coconut")
    backbone = load_initial(config.model_id, str(tmp_path), has_thoughts=True)
    assert backbone.n_positions == sys.maxsize
    model, _ = build_coconut(config, backbone)
    assert not model.decodes_on_static_cache


def test_a_folder_that_does_not_fit_is_refused_before_it_trains(tmp_path):
    tokenizer = word_tokenizer(["Alex is a wumpus"], 64)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = RunConfig(method="coconut")
    with pytest.raises(ModelError, match="BertLMHeadModel does not fit"):
        build_coconut(run, load_initial(run.model_id, str(tmp_path), has_thoughts=True))


def test_values_of_another_size_than_keys():
    """DeepSeek's heads have 192 for keys and 128 for values."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        DeepseekV3Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            initializer_range=0.2,
        )
    )
    model = wrapped(base)
    ids = torch.tensor([[7, 8, 9, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END, 11, 12]])
    loss = model(ids, labels=ids).loss_sum
    assert loss.item() == pytest.approx(naive.batch_loss(model, ids, torch.ones_like(ids), ids).item(), rel=1e-5)


def test_decoding_past_a_local_window_that_a_fixed_cache_does_not_know():
    """GPT-Neo: right on a cache that grows alone."""
    model = wrapped(families.small_model("gpt_neo"))
    assert model.base_causallm.config.window_size == 5
    prompt = [*range(7, 20), tiny.START, tiny.LATENT, tiny.END]
    given = model.eval().generate(torch.tensor([prompt]), max_new_tokens=12)[0].tolist()
    expected = naive.greedy(model, prompt, 12)
    assert given[: len(expected)] == expected


@pytest.mark.parametrize(
    "stored",
    [
        {"repetition_penalty": 1.8},
        {"suppress_tokens": list(range(20))},
        {"forced_eos_token_id": tiny.EOS},
        {"guidance_scale": 1.5},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"max_length": 2, "min_new_tokens": 9},
    ],
    ids=str,
)
def test_greedy_is_greedy_whatever_a_folder_stores_for_generation(stored):
    base = tiny.backbone("qwen2")
    prompt = torch.tensor([[7, 8, 9, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END]])
    plain = wrapped(base).generate(prompt, max_new_tokens=8)
    own = GenerationConfig(**stored)
    base.generation_config = own
    model = wrapped(base)
    assert torch.equal(model.generate(prompt, max_new_tokens=8), plain)
    assert base.generation_config is own


def test_positions_that_turn_otherwise_in_longer_sequences_are_not_counted():
    """LongRoPE has other factors beyond the original length, for keys in the cache, too."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(
        num_attention_heads=4,
        max_position_embeddings=96,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
        **shape,
    )
    assert n_positions(AutoModelForCausalLM.from_config(config)) == 16
