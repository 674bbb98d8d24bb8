"""The naive twin: Coconut straight from its definition (DESIGN section 4), with no cache and no batching.

For every thought the whole prefix is computed again, one row at a time, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from coconut_ds import Coconut
from coconut_ds.data.teacher import Taught


def row_states(model: Coconut, ids: list[int], n_prompt: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and embeddings (T, D) of one unpadded sequence, thoughts filled in from left to right.

    From column `n_prompt` on the marker is a token like any other: a model can generate it.
    """
    context = model.latent_context
    base = model.base_causallm
    embeds = list(base.get_input_embeddings()(torch.tensor(ids)))  # T tensors (D,)
    positions = torch.arange(len(ids))[None]
    previous_thought = None
    window = context.weights
    if context.learned:
        window = torch.softmax(model.latent_window.logits, dim=0)
    for column, token in enumerate(ids):
        if token != model.latent_token_id or (n_prompt is not None and column >= n_prompt):
            continue
        hidden = _run(base, torch.stack(embeds[:column]), positions[:, :column])
        reach = column
        if context.scope == "last_pass" and previous_thought is not None:
            reach = column - previous_thought
        weights = window[: min(len(window), reach)]
        weighted = [weight * hidden[column - 1 - back] for back, weight in enumerate(weights)]
        thought = _projected(model, sum(weighted) / sum(weights))
        embeds[column] = _with_norm(thought, context.norm, embeds[: ids.index(token)])
        previous_thought = column
    stacked = torch.stack(embeds)
    return _run(base, stacked, positions), stacked


def jacobi_states(model: Coconut, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`row_states` by the model's solver: all thoughts from the states of the iteration before, a whole forward."""
    context, base = model.latent_context, model.base_causallm
    embeds = list(base.get_input_embeddings()(torch.tensor(ids)))
    positions = torch.arange(len(ids))[None]
    thoughts = [column for column, token in enumerate(ids) if token == model.latent_token_id]
    window = torch.softmax(model.latent_window.logits, dim=0) if context.learned else context.weights
    for number in range(model.solver.iterations if thoughts else 0):
        hidden = _run(base, torch.stack(embeds), positions)
        if model.solver.gradient == "last" and number + 1 == model.solver.iterations:
            hidden = torch.cat([hidden[: thoughts[0]], hidden[thoughts[0] :].detach()])
        for column in thoughts:
            is_alone = context.scope == "last_pass" and column - 1 in thoughts
            weights = window[: min(len(window), 1 if is_alone else column)]
            weighted = [weight * hidden[column - 1 - back] for back, weight in enumerate(weights)]
            thought = _projected(model, sum(weighted) / sum(weights))
            embeds[column] = _with_norm(thought, context.norm, embeds[: thoughts[0]])
    stacked = torch.stack(embeds)
    return _run(base, stacked, positions), stacked


def _projected(model: Coconut, thought: torch.Tensor) -> torch.Tensor:
    if model.latent_context.projection is None:
        return thought
    into, _, out, norm = model.latent_window.projection
    back = out.weight @ F.gelu(into.weight @ thought + into.bias) + out.bias
    centred = back - back.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def _with_norm(thought: torch.Tensor, norm: str, before_thoughts: list[torch.Tensor]) -> torch.Tensor:
    if norm == "rms":
        return thought / thought.square().mean().sqrt()
    if norm == "embedding":
        return thought / thought.norm() * torch.stack(before_thoughts).detach().norm(dim=1).mean()
    return thought


def _run(base, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return base.base_model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False).last_hidden_state[0]


def batch_loss(model: Coconut, input_ids, attention_mask, labels) -> torch.Tensor:
    """Sum of the cross entropies of all supervised tokens of a padded batch, computed row by row without padding."""
    total = torch.zeros(())
    for ids, mask, targets in zip(input_ids, attention_mask.bool(), labels):
        states = row_states if model.solver is None else jacobi_states
        hidden, _ = states(model, ids[mask].tolist())
        logits = model.lm_head(hidden[:-1])
        total = total + F.cross_entropy(logits, targets[mask][1:], ignore_index=-100, reduction="sum")
    return total


def step_loss(model: Coconut, rows: list[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
    """Sum of the cross entropies of the texts of all groups of thoughts, one group at a time (SIM-CoT).

    A row is an unpadded sequence with the texts of its groups; a group is an equal share of its thoughts.
    """
    total = torch.zeros(())
    for ids, texts in rows:
        for own, text in zip(groups_of(model, ids, max(1, len(texts))), texts):
            for place, token in enumerate(text):
                total = total + F.cross_entropy(logits_after(model, own, text[:place]), torch.tensor(token))
    return total


def groups_of(model: Coconut, ids: list[int], n_groups: int) -> list[list[torch.Tensor]]:
    """The vectors fed for the thoughts of an unpadded sequence, in `n_groups` equal shares."""
    _, fed = row_states(model, ids)
    thoughts = [fed[column] for column, token in enumerate(ids) if token == model.latent_token_id]
    share = len(thoughts) // n_groups
    return [thoughts[group * share : (group + 1) * share] for group in range(n_groups)]


def logits_after(model: Coconut, thoughts: list[torch.Tensor], text: Sequence[int]) -> torch.Tensor:
    """Of the token that a decoder of steps writes after the thoughts of one group and `text`."""
    decoder = model.step_decoder or model.base_causallm
    embeddings = model.base_causallm.get_input_embeddings()
    read = torch.stack([*thoughts, *embeddings(torch.tensor(text, dtype=torch.long))])
    return decoder.get_output_embeddings()(_run(decoder, read, torch.arange(len(read))[None])[-1])


def teacher_losses(model: Coconut, rows: list[tuple[list[int], Taught]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the teacher's cross entropies and of the states' distances from the teacher's, row by row (CODI).

    A row is an unpadded sequence with thoughts, and what its teacher reads.
    """
    base, settings = model.base_causallm, model.distillation
    written, distances, pairs = torch.zeros(()), [], []
    for ids, (teacher_ids, first_target, n_answer) in rows:
        _, fed = row_states(model, ids)
        of_student = _layers(base, fed)
        of_teacher = _layers(base, base.get_input_embeddings()(torch.tensor(teacher_ids)))
        written = written + plain_loss(model, teacher_ids, first_target)
        chosen = range(len(of_student)) if settings.layers is None else settings.layers
        pairs.append([(of_student[each][-1 - n_answer], of_teacher[each][-1 - n_answer].detach()) for each in chosen])
    for layer in range(len(pairs[0])):
        everything = torch.cat([row[layer][1] for row in pairs])
        for row in pairs:
            student, teacher = row[layer]
            scale = teacher.std() if settings.deviation == "example" else everything.std()
            difference = (student - teacher).abs()
            smooth = torch.where(difference < 1, difference.square() / 2, difference - 0.5)
            distances.append(smooth.mean() / scale / len(pairs[0]))
    return written, torch.stack(distances).sum()


def plain_loss(model: Coconut, ids: list[int], first_target: int) -> torch.Tensor:
    """Sum of the cross entropies of the tokens from `first_target` on, of a sequence without thoughts."""
    base = model.base_causallm
    hidden = _run(base, base.get_input_embeddings()(torch.tensor(ids)), torch.arange(len(ids))[None])
    logits = model.lm_head(hidden[first_target - 1 : -1])
    return F.cross_entropy(logits, torch.tensor(ids[first_target:]), reduction="sum")


def _layers(base, embeds: torch.Tensor) -> list[torch.Tensor]:
    """The embeddings with their positions, and the states after each layer, (T, D) each; the last after the norm."""
    positions = torch.arange(len(embeds))[None]
    read = base.base_model(
        inputs_embeds=embeds[None], position_ids=positions, use_cache=False, output_hidden_states=True
    )
    return [each[0] for each in read.hidden_states]


def greedy(model: Coconut, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy continuation of one prompt, everything computed again for every token; ends after EOS."""
    ids = list(prompt)
    for _ in range(n_tokens):
        hidden, _ = row_states(model, ids, len(prompt))
        ids.append(int(model.lm_head(hidden[-1]).argmax()))
        if ids[-1] == model.eos_token_id:
            break
    return ids[len(prompt) :]
