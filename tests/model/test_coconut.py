"""The multi-pass forward against the naive twin, and the properties of the contextual window."""

from __future__ import annotations

import naive
import pytest
import tiny
import torch

from coconut_ds import LatentContext
from coconut_ds.data.batches import Tokens, collate_prompts, collate_training, prompt_sequence, training_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.model.latents import next_thought, window_shares

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
CONTEXTS = {
    "plain": None,
    "sequence": LatentContext((0.6, 0.3, 0.1)),
    "wide": LatentContext((0.3, 0.2, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1)),
    "last_pass": LatentContext((0.1, 0.3, 0.6), "last_pass"),
    "learned": LatentContext((0.5, 0.3, 0.2), learned=True),
    "projected": LatentContext((0.6, 0.3, 0.1), learned=True, projection=12),
    "rms": LatentContext((0.6, 0.3, 0.1), norm="rms"),
    "embedding": LatentContext((0.6, 0.3, 0.1), "last_pass", learned=True, norm="embedding"),
}
# (question tokens, skipped steps, thoughts) of each row; one question is shorter than the widest window.
ALIGNED = [(9, 2, 3), (14, 1, 3), (2, 1, 3)]
RAGGED = [(9, 2, 4), (12, 1, 2), (2, 1, 1), (7, 0, 0)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_loss_and_gradients_equal_the_naive_twin(family, context, shapes, plain):
    model = tiny.coconut(family, CONTEXTS[context], plain=plain)
    batch = tiny.batch_of(shapes)
    output = model(**batch.inputs)
    output.loss.backward()
    fast = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    inputs = batch.inputs
    total = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    (total / batch.n_targets).backward()
    assert int(output.n_targets) == batch.n_targets
    assert output.loss_sum.item() == pytest.approx(total.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        error = (fast[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_steps_before_the_thoughts_are_learned_like_those_after_them(plain):
    rows = [tiny.row(question, [3, 4, 5], 4, seed) for seed, question in enumerate((9, 2, 7))]
    layouts = [Layout(1, 2, first=2, n_before=2), Layout(2, 3, first=1, n_before=1), Layout(3, 4)]
    sequences = [training_sequence(row, layout, TOKENS) for row, layout in zip(rows, layouts)]
    batch = collate_training(sequences, [0, 1, 2], tiny.PAD)
    assert batch.n_targets == sum(5 + length for length in (7, 3, 0))
    model = tiny.coconut("llama", CONTEXTS["sequence"], plain=plain)
    inputs = batch.inputs
    total = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    assert model(**inputs).loss_sum.item() == pytest.approx(total.item(), rel=1e-6)


def test_a_learned_window_starts_from_its_weights_and_moves():
    model = tiny.coconut(context=LatentContext((2.0, 1.0, 1.0), learned=True))
    assert model.latent_window.current() == pytest.approx([0.5, 0.25, 0.25])
    given = tiny.coconut(context=LatentContext((2.0, 1.0, 1.0)))
    inputs = tiny.batch_of(RAGGED).inputs
    loss = model(**inputs).loss
    assert loss.item() == pytest.approx(given(**inputs).loss.item(), rel=1e-6)
    loss.backward()
    assert model.latent_window.logits.grad.norm() > 1e-4
    assert not list(given.latent_window.parameters())


def test_a_learned_window_can_be_wide():
    weights = tuple(0.1**back for back in range(64))
    model = tiny.coconut(context=LatentContext(weights, learned=True))
    assert torch.isfinite(model.latent_window.logits).all()
    assert model.latent_window.current()[:2] == pytest.approx([0.9, 0.09], rel=1e-5)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_numbers(weight):
    with pytest.raises(ValueError, match="must be finite"):
        LatentContext((1.0, weight))


@pytest.mark.parametrize("shapes", [[(5, 0, 0), (3, 0, 0)], []], ids=["stage 0", "filler"])
def test_a_learned_window_has_a_gradient_without_thoughts(shapes):
    model = tiny.coconut(context=CONTEXTS["projected"])
    model(**tiny.batch_of(shapes).inputs).loss_sum.backward()
    assert model.latent_window.logits.grad.tolist() == [0, 0, 0]
    gradients = [parameter.grad for parameter in model.latent_window.projection.parameters()]
    assert len(gradients) == 6
    assert not any(each.any() for each in gradients)


def test_a_projection_has_an_inner_size():
    with pytest.raises(ValueError, match="latent projection 0: must be at least 1, its inner size"):
        LatentContext(projection=0)


@pytest.mark.parametrize("context", ["learned", "projected"])
def test_the_windows_gradient_is_ready_before_the_prefix_and_after_the_thoughts(context):
    """ZeRO fills its buckets in this order, which must be the same on every rank."""
    orders = []
    for shapes in (RAGGED, [(5, 0, 0)], [(9, 2, 1)], []):
        model, order = tiny.coconut("llama", CONTEXTS[context]), []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        model(**tiny.batch_of(shapes).inputs).loss_sum.backward()
        orders.append(order)
    assert "latent_window.logits" in orders[0]
    assert orders[1:] == orders[:1] * 3


def thoughts_of(context: LatentContext) -> tuple[torch.Tensor, dict]:
    """Thoughts (N, D) of a batch of two rows with three each, and the batch."""
    inputs = tiny.batch_of([(9, 2, 3), (4, 1, 3)]).inputs
    fed = tiny.coconut(context=context).encode(*(inputs[key] for key in ("input_ids", "attention_mask")))
    return fed.inputs_embeds[inputs["input_ids"] == tiny.LATENT], inputs


def test_norms_of_thoughts():
    free, _ = thoughts_of(LatentContext((0.6, 0.3, 0.1)))
    assert free.norm(dim=1).std() > 0.01
    scaled, _ = thoughts_of(LatentContext(norm="rms"))
    assert scaled.square().mean(dim=1).tolist() == pytest.approx([1.0] * 6, rel=1e-5)
    scaled, inputs = thoughts_of(LatentContext(norm="embedding"))
    norms = tiny.coconut().base_causallm.get_input_embeddings()(inputs["input_ids"]).norm(dim=2)
    # The question and the start marker, without padding: columns 0 to 9 of the first row, 5 to 9 of the second.
    expected = [norms[0, :10].mean().item()] * 3 + [norms[1, 5:10].mean().item()] * 3
    assert scaled.norm(dim=1).tolist() == pytest.approx(expected, rel=1e-5)


def test_what_the_collator_did_not_say_is_found():
    model = tiny.coconut(context=CONTEXTS["sequence"])
    inputs = dict(tiny.batch_of(RAGGED).inputs)
    with_span = model(**inputs).loss
    del inputs["thought_span"], inputs["position_ids"], inputs["supervised"]
    assert torch.equal(model(**inputs).loss, with_span)


def _gradient_reaching_thought(model, source: int, target: int) -> float:
    """How much thought `target` depends on the hidden state at thought `source`, every route but the window cut."""
    columns = [10 + k for k in range(4)]
    ids = torch.tensor([[*range(5, 15), *[tiny.LATENT] * 4, 20, 21]])
    states: dict[int, torch.Tensor] = {}
    start = 0

    def cut(module, args, kwargs, output):
        nonlocal start
        if start in columns:
            # Cut off from what it was computed from, so that the KV cache connects nothing.
            states[start] = output.last_hidden_state = output.last_hidden_state.detach().requires_grad_()
        start += kwargs["inputs_embeds"].shape[1]
        return output

    hook = model.base_causallm.base_model.register_forward_hook(cut, with_kwargs=True)
    fed = model.encode(ids).fed
    hook.remove()
    gradient = torch.autograd.grad(
        fed[1 + target][:, 0].square().sum(), states[columns[source]], allow_unused=True, retain_graph=True
    )[0]
    return 0.0 if gradient is None else float(gradient.norm())


@pytest.mark.parametrize(("context", "direct"), [("sequence", True), ("plain", False), ("last_pass", False)])
def test_thought_k_depends_on_thought_k_minus_2_through_the_window_itself(context, direct):
    # Thought 3, in column 13, is made from the states of columns 12, 11 and 10; column 10 is thought 0.
    model = tiny.coconut(context=CONTEXTS[context])
    assert (_gradient_reaching_thought(model, source=1, target=3) > 0) is direct
    assert (_gradient_reaching_thought(model, source=0, target=3) > 0) is direct
    assert _gradient_reaching_thought(model, source=2, target=3) > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_padding_never_leaks_in(family, context):
    model = tiny.coconut(family, CONTEXTS[context]).eval()
    batch = tiny.batch_of(RAGGED)
    inputs = dict(batch.inputs)
    loss = model(**inputs).loss
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    inputs["input_ids"] = torch.where(padding, 17, inputs["input_ids"])
    assert torch.equal(model(**inputs).loss, loss)


def test_rows_do_not_see_each_other():
    model = tiny.coconut(context=CONTEXTS["sequence"]).eval()
    whole = model(**tiny.batch_of(RAGGED).inputs).loss_sum.item()
    alone = sum(model(**batch_of_row(index).inputs).loss_sum.item() for index in range(len(RAGGED)))
    assert whole == pytest.approx(alone, rel=1e-5)


def batch_of_row(index):
    question, n_skip, n_thoughts = RAGGED[index]
    row = tiny.row(question, [3, 4, 5], 4, index)
    return collate_training([training_sequence(row, Layout(n_skip, n_thoughts), TOKENS)], [index], tiny.PAD)


def test_the_lm_head_sees_supervised_columns_only():
    model = tiny.coconut()
    batch = tiny.batch_of(RAGGED)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model(**batch.inputs)
    assert seen == [(batch.n_targets, tiny.VOCABULARY)]


@pytest.mark.parametrize("family", ["gpt2", "llama"], ids=["tied", "untied"])
def test_a_filler_has_no_loss_and_zero_gradients(family):
    """Also for a head that sees no position: ZeRO with offload would use the gradient of the window before again."""
    model = tiny.coconut(family)
    filler = collate_training([], [], tiny.PAD)
    output = model(**filler.inputs)
    output.loss_sum.backward()
    assert output.loss.item() == 0
    assert filler.n_targets == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_a_thought_without_a_token_before_it_is_refused():
    model = tiny.coconut()
    with pytest.raises(ValueError, match="column 0"):
        model(input_ids=torch.tensor([[tiny.LATENT, 7, 8]]))


def prompts(thoughts: list[int]):
    rows = [tiny.row(question, [3, 3], 2, seed) for seed, question in enumerate((6, 13, 2, 9))]
    sequences = [prompt_sequence(row, Layout(0, count), TOKENS) for row, count in zip(rows, thoughts)]
    return sequences, collate_prompts(sequences, list(range(4)), tiny.PAD).inputs


# A cache of fixed size holds layers of both kinds: all columns, and a sliding window (here 5 columns).
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("thoughts", [[3, 3, 3, 3], [4, 1, 2, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_batched_generation_equals_one_at_a_time(family, context, thoughts, plain):
    model = tiny.coconut(family, CONTEXTS[context], plain=plain).eval()
    sequences, inputs = prompts(thoughts)
    together = model.generate(inputs["input_ids"], inputs["attention_mask"], 12, inputs["thought_span"])
    assert together.shape == (4, 12)
    for sequence, tokens in zip(sequences, together.tolist()):
        alone = naive.greedy(model, sequence.ids, 12)
        assert tokens == alone + [tiny.EOS] * (12 - len(alone))


def test_a_prompt_ending_in_a_thought_or_in_padding_is_refused():
    model = tiny.coconut().eval()
    with pytest.raises(ValueError, match="end in a thought"):
        model.generate(torch.tensor([[7, 8, tiny.LATENT]]))
    with pytest.raises(ValueError, match=r"prompts \[1\]"):
        model.generate(torch.tensor([[7, 8], [7, 0]]), torch.tensor([[1, 1], [1, 0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_thought_in_half_precision_is_averaged_in_fp32_and_rounded_once(dtype):
    states = torch.randn(256, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.tensor([0.6, 0.3, 0.1])
    thought = next_thought(states, torch.full((256,), 3), weights)
    exact = torch.einsum("j,bjd->bd", weights.double(), states.double())
    assert thought.dtype == dtype
    # Many averages lie in the middle between two values: which one they become hangs on the processor's last bit.
    nearest = (exact.to(dtype).double() - exact).abs()
    assert ((thought.double() - exact).abs() <= nearest + 1e-6).all()
    length = (thought.double() * exact).sum() / exact.square().sum()
    assert length.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n_states", [1, 2, 3, 5])
def test_in_fp32_and_fp64_a_thought_is_the_plain_average_bit_for_bit(n_states):
    for dtype in (torch.float32, torch.float64):
        found = []
        for average in (next_thought, lambda *args: torch.einsum("bj,bjd->bd", window_shares(*args[1:]), args[0])):
            generator = torch.Generator().manual_seed(0)
            states = torch.randn(5, n_states, 64, generator=generator, dtype=dtype).requires_grad_()
            weights = torch.rand(n_states, generator=generator, dtype=dtype).requires_grad_()
            thought = average(states, torch.arange(1, 6), weights)
            thought.backward(torch.randn(5, 64, generator=generator, dtype=dtype))
            found.append((thought, states.grad, weights.grad))
        assert all(torch.equal(*pair) for pair in zip(*found))


@pytest.mark.parametrize(
    ("weights", "scope"), [((), "sequence"), ((0.0, 1.0), "sequence"), ((1.0, -0.1), "sequence"), ((1.0,), "all")]
)
def test_unusable_windows_are_refused(weights, scope):
    with pytest.raises(ValueError, match="latent"):
        LatentContext(weights, scope)
