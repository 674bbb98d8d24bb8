"""Thoughts in Jacobi iterations: against the naive twin, and equal to the sequential method after enough of them."""

from __future__ import annotations

import json

import naive
import pytest
import tiny
import torch

from coconut_ds import LatentContext
from coconut_ds.data.batches import Tokens, collate_prompts, prompt_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.errors import InputError, ModelError
from coconut_ds.model import fast
from coconut_ds.model.jacobi import Jacobi
from coconut_ds.model.thought_readings import read_thoughts

TOKENS = Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)
WINDOWS = {
    "plain": None,
    "sequence": LatentContext((0.6, 0.3, 0.1)),
    "last_pass": LatentContext((0.1, 0.3, 0.6), "last_pass"),
    "learned": LatentContext((0.5, 0.3, 0.2), learned=True, norm="embedding"),
}
# (question tokens, skipped steps, thoughts) of each row.
ALIGNED = [(9, 2, 3), (14, 1, 3), (2, 1, 3)]
RAGGED = [(9, 2, 4), (12, 1, 2), (2, 1, 1), (7, 0, 0)]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def demand_equal(ours, theirs, tolerance: float) -> None:
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shapes", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize(
    ("iterations", "gradient", "speed"),
    [(1, "all", "plain"), (2, "all", "fast"), (2, "all", "recomputed"), (2, "last", "fast"), (3, "last", "plain")],
)
def test_loss_and_gradients_equal_the_naive_twin(family, window, shapes, iterations, gradient, speed):
    model = tiny.coconut(family, WINDOWS[window], plain=speed == "plain")
    if speed == "recomputed":
        model.enable_activation_checkpointing()
    model.solver = Jacobi(iterations, gradient)
    inputs = tiny.batch_of(shapes).inputs
    loss = model(**inputs).loss_sum
    loss.backward()
    ours = gradients(model)
    twin = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    twin.backward()
    assert loss.item() == pytest.approx(twin.item(), rel=1e-6)
    demand_equal(ours, gradients(model), 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("speed", ["plain", "fast"])
def test_as_many_iterations_as_thoughts_are_the_sequential_method(family, window, speed):
    model = tiny.coconut(family, WINDOWS[window], plain=True).double()
    if speed == "fast":
        fast.install(model)
    inputs = tiny.batch_of(RAGGED).inputs
    results = []
    for solver in (None, Jacobi(4), Jacobi(9), Jacobi(1)):
        model.solver = solver
        loss = model(**inputs).loss_sum
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (expected, gradient), *enough, (too_few, _) = results
    for loss, found in enough:
        assert loss == pytest.approx(expected, rel=1e-6)
        demand_equal(found, gradient, 1e-6)
    assert too_few != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("static", [True, False], ids=["static cache", "growing cache"])
def test_answers_continue_from_the_thoughts_of_the_last_iteration(family, static):
    model = tiny.coconut(family, WINDOWS["sequence"]).eval()
    model.decodes_on_static_cache = static
    prompts = [prompt_sequence(tiny.row(question, [3], 4, question), Layout(0, 3), TOKENS) for question in (5, 9)]
    inputs = collate_prompts(prompts, [0, 1], tiny.PAD).inputs
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    model.solver = Jacobi(2)
    tokens = model.generate(**given, max_new_tokens=1)
    for row, prompt in enumerate(prompts):
        hidden, _ = naive.jacobi_states(model, prompt.ids)
        assert tokens[row, 0] == model.lm_head(hidden[-1]).argmax()
    answers = {}
    for name, solver in (("sequential", None), ("enough", Jacobi(3))):
        model.solver = solver
        answers[name] = model.generate(**given, max_new_tokens=6)
    assert torch.equal(answers["sequential"], answers["enough"])


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_what_is_read_of_thoughts_is_what_was_fed(iterations):
    model = tiny.coconut("llama", WINDOWS["sequence"])
    model.solver = Jacobi(iterations)
    inputs = tiny.batch_of(RAGGED[:3]).inputs
    with torch.no_grad():
        encoded = model.encode(inputs["input_ids"], inputs["attention_mask"])
    thoughts = read_thoughts(model, encoded, inputs["input_ids"], inputs["attention_mask"])
    for row, count in enumerate(thoughts.counts.tolist()):
        torch.testing.assert_close(thoughts.averages[row, :count], thoughts.fed[row, :count])


def test_a_model_with_a_mask_of_its_own_is_refused():
    model = tiny.coconut("mistral")
    model.solver = Jacobi(2)
    with pytest.raises(ModelError, match="makes its own attention mask"):
        model(**tiny.batch_of(ALIGNED).inputs)


@pytest.mark.parametrize(("arguments", "message"), [((0,), "at least 1"), ((2, "none"), "'all' or 'last'")])
def test_solvers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Jacobi(*arguments)


@pytest.mark.parametrize("change", [{"kind": "newton"}, {"iterations": 0}, {"iterations": None}])
def test_a_stored_solver_that_cannot_be_is_refused(tmp_path, change):
    model = tiny.coconut("llama")
    model.solver = Jacobi(2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "coconut.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"solver": settings["solver"] | change}))
    with pytest.raises(InputError, match=r"coconut\.json cannot be used"):
        type(model).from_pretrained(tmp_path)


def test_a_saved_model_keeps_its_solver(tmp_path):
    model = tiny.coconut("llama", WINDOWS["sequence"])
    model.solver = Jacobi(2, "last")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.solver == Jacobi(2), "which gradients it was trained with does not matter any more"
