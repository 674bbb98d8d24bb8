"""ProntoQA examples: vocabulary, sentences, random generation, and proof checking.

The task is that of the PrOntoQA paper (arXiv 2210.01240) as the Coconut paper uses it (arXiv 2412.06769): five hops,
fictional concepts, distractors, sentences in random order. Its parts and shares are those of 10,000 trials written by
the official generator with `--ordering random --ontology fictional --min-hops 5 --max-hops 5`. Every question of
that file has the same 23 rules and two facts up to names. With five hops:

* a path of 5 concepts from the first concept of the entity to the concept that has the property asked about;
* every concept of the path has a second parent beside the path, the last one a third parent, the top, without a
  property;
* a second fact about the entity, whose concept has one parent without a property;
* a property of each concept on the path, of each beside it and of that of the second fact, no two of one family;
* an opposing rule: a concept named nowhere else has the property asked about with the other sign.

Other numbers of hops draw the same parts; only five were compared with the official generator.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

NAMES = "Alex Fae Max Polly Rex Sally Sam Stella Wren".split()
CONCEPTS = (
    "brimpus dumpus gorpus grimpus impus jompus lempus lorpus numpus rompus shumpus sterpus tumpus vumpus wumpus "
    "yumpus zumpus"
).split()
# A question uses at most one word of a family, so that its properties are independent.
FAMILIES = [
    family.split()
    for family in (
        "blue brown orange red",
        "large small",
        "liquid luminous metallic wooden",
        "opaque transparent",
        "feisty happy nervous shy",
        "bright dull",
        "bitter sour spicy sweet",
        "earthy floral fruity",
        "cold hot temperate",
        "aggressive amenable angry kind mean",
        "discordant loud melodic muffled",
        "fast moderate slow",
        "overcast rainy snowy sunny windy",
    )
]
QUERY = "True or false: "
MOST_HOPS = min((len(CONCEPTS) - 4) // 2, (len(FAMILIES) - 1) // 2)

# A property is negated with probability 1/3. The official walk up the path stops and asks about the property of the
# current concept with weight 0.3, or 0.7 if it is negated, against weight 1 for continuing; walks of another length are
# discarded. By Bayes' rule that leaves fewer negations on the way (13/47) and more at its end (91/193).
NEGATED = 1 / 3
NEGATED_ON_THE_WAY = (1 / 1.7) / (1 / 1.7 + 2 / 1.3)
NEGATED_ASKED = (0.7 / 1.7) / (0.7 / 1.7 + 2 * 0.3 / 1.3)


class Statement(NamedTuple):
    """`subject` (a name or a concept) is `predicate` (a concept or a property), or is not if `holds` is False."""

    subject: str
    predicate: str
    holds: bool = True

    def opposite(self) -> Statement:
        return self._replace(holds=not self.holds)


class Question(NamedTuple):
    """The sentences of the context, their statements, and the query."""

    sentences: tuple[str, ...]
    statements: tuple[Statement, ...]
    query: Statement


def forms(statement: Statement) -> tuple[str, ...]:
    """All sentences for `statement`: one about a name, three about a concept (plural, each, every)."""
    subject, predicate, holds = statement
    negation = "" if holds else "not "
    article = "" if predicate not in CONCEPTS else "an " if predicate[0] in "aeiou" else "a "
    one = f"{negation}{article}{predicate}"
    if subject in NAMES:
        return (f"{subject} is {one}.",)
    many = negation + predicate + ("es" if predicate in CONCEPTS else "")
    return f"{subject.capitalize()}es are {many}.", f"Each {subject} is {one}.", f"Every {subject} is {one}."


def _every_statement() -> Iterator[Statement]:
    for subject in NAMES + CONCEPTS:
        for concept in CONCEPTS:
            yield Statement(subject, concept)
        for family in FAMILIES:
            for word in family:
                yield from (Statement(subject, word, True), Statement(subject, word, False))


# The language is finite, so a table parses it; other sentences are not part of the task.
_READ = {sentence: statement for statement in _every_statement() for sentence in forms(statement)}


def read_sentence(sentence: str) -> Statement:
    """Parse a sentence; raises ValueError if it is not one of the task."""
    statement = _READ.get(sentence)
    if statement is None:
        raise ValueError(f"{sentence!r} is not a sentence of the task")
    return statement


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, which are separated by single spaces."""
    parts = text.split(". ")
    return [part + "." for part in parts[:-1]] + parts[-1:]


def read_question(text: str) -> Question:
    """Parse context and query; raises ValueError with a sentence that is not one of the task."""
    *sentences, query = split_sentences(text)
    if not query.startswith(QUERY):
        raise ValueError(f"the question ends in {query!r}, not in {QUERY + '...'!r}")
    asked = read_sentence(query[len(QUERY) :])
    if asked.subject not in NAMES:
        raise ValueError(f"the query is about {asked.subject!r}, not about one of {', '.join(NAMES)}")
    return Question(tuple(sentences), tuple(read_sentence(sentence) for sentence in sentences), asked)


def question_key(record: dict) -> tuple:
    """A key that is equal for equal questions, regardless of order and form of the sentences."""
    question = read_question(record["question"])
    return frozenset(question.statements), question.query


def pair_steps(chain: list[str]) -> list[str]:
    """Two sentences per step (a fact, the rule applied to it); the last conclusion stands alone."""
    return [" ".join(chain[start : start + 2]) for start in range(0, len(chain), 2)]


def modus_ponens(fact: Statement, rule: Statement) -> Statement | None:
    """The conclusion from a fact and a rule; None if the rule does not apply."""
    if not fact.holds or fact.predicate != rule.subject:
        return None
    return Statement(fact.subject, rule.predicate, rule.holds)


def draw_record(rng: random.Random, hops: int = 5) -> dict:
    """Draw one example: question, steps and answer."""
    concepts = rng.sample(CONCEPTS, 2 * hops + 4)
    path, beside = concepts[:hops], concepts[hops : 2 * hops]
    top, second, above_second, opposing = concepts[2 * hops :]
    words = iter([rng.choice(family) for family in rng.sample(FAMILIES, 2 * hops + 1)])

    def give_property(concept: str, negated: float) -> Statement:
        return Statement(concept, next(words), rng.random() >= negated)

    asked = give_property(path[-1], NEGATED_ASKED)
    way = [Statement(child, parent) for child, parent in pairwise(path)] + [asked]
    rules = [
        *way,
        *(Statement(child, parent) for child, parent in zip(path, beside)),
        Statement(path[-1], top),
        Statement(second, above_second),
        *(give_property(concept, NEGATED_ON_THE_WAY) for concept in path[:-1]),
        *(give_property(concept, NEGATED) for concept in (*beside, second)),
        Statement(opposing, asked.predicate, not asked.holds),
    ]
    said = {rule: rng.choices(forms(rule), (2, 1, 1))[0] for rule in rules}
    name = rng.choice(NAMES)
    facts = rng.sample([Statement(name, path[0]), Statement(name, second)], 2)
    context = [said[rule] for rule in rng.sample(rules, len(rules))] + [_say(fact) for fact in facts]
    answer = rng.random() < 0.5
    conclusion = Statement(name, asked.predicate, asked.holds)
    query = conclusion if answer else conclusion.opposite()
    chain = [_say(Statement(name, path[0]))]
    for rule in way:
        chain += [said[rule], _say(Statement(name, rule.predicate, rule.holds))]
    return {
        "question": f"{' '.join(context)} {QUERY}{_say(query)}",
        "steps": pair_steps(chain),
        "answer": str(answer),
    }


def _say(statement: Statement) -> str:
    return forms(statement)[0]


def generate(count: int, seed: str, *, hops: int = 5, exclude: Iterable[tuple] = ()) -> Iterator[dict]:
    """Yield `count` checked examples with different questions, whose `question_key` is not in `exclude`."""
    rng = random.Random(seed)
    seen = set(exclude)
    made = 0
    while made < count:
        record = draw_record(rng, hops)
        check_record(record)
        key = question_key(record)
        if key in seen:
            continue
        seen.add(key)
        made += 1
        yield record


def derive(statements: Iterable[Statement]) -> set[Statement]:
    """All facts about names that the statements contain or imply."""
    rules: dict[str, list[Statement]] = {}
    frontier = []
    for statement in statements:
        if statement.subject in NAMES:
            frontier.append(statement)
        else:
            rules.setdefault(statement.subject, []).append(statement)
    found = set(frontier)
    for fact in frontier:
        for rule in rules.get(fact.predicate, ()):
            new = modus_ponens(fact, rule)
            if new is not None and new not in found:
                found.add(new)
                frontier.append(new)
    return found


def check_record(record: object) -> None:
    """Raise ValueError, with the reason, unless every line of the proof is valid and it proves the given answer."""
    record = _checked_fields(record)
    question = read_question(record["question"])
    conclusion = follow_proof(proof_sentences(record["steps"]), question)
    if conclusion[:2] != question.query[:2]:
        raise ValueError(f"the proof ends in {_say(conclusion)!r}, which does not decide {_say(question.query)!r}")
    if record["answer"] != str(conclusion == question.query):
        raise ValueError(
            f"the answer is {record['answer']!r}, but the proof ends in {_say(conclusion)!r} "
            f"and the question is {_say(question.query)!r}"
        )
    derived = derive(question.statements)
    contradicted = next((fact for fact in sorted(derived) if fact.opposite() in derived), None)
    if contradicted is not None:
        raise ValueError(f"the context gives both {_say(contradicted)!r} and its opposite")


def _checked_fields(record: object) -> dict:
    if not isinstance(record, dict):
        raise ValueError("it is not an object with question, steps and answer")
    for key, kind in (("question", str), ("steps", list), ("answer", str)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{key!r} is missing or is not a {kind.__name__}")
    if not all(isinstance(step, str) for step in record["steps"]):
        raise ValueError("'steps' has an entry that is not text")
    if record["answer"] not in ("True", "False"):
        raise ValueError(f"the answer is {record['answer']!r}, not 'True' or 'False'")
    return record


def proof_sentences(steps: list[str]) -> list[str]:
    """The sentences of the steps in order; raises ValueError unless the last step has one and all others two."""
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} step(s): a proof needs a step for its fact and one for its conclusion")
    pairs = [split_sentences(step) for step in steps]
    for number, pair in enumerate(pairs, start=1):
        expected = 1 if number == len(pairs) else 2
        if len(pair) != expected:
            raise ValueError(f"step {number} has {len(pair)} sentence(s), not {expected}: {steps[number - 1]!r}")
    return [sentence for pair in pairs for sentence in pair]


def follow_proof(sentences: list[str], question: Question) -> Statement:
    """The last conclusion of a proof of the form fact, rule, conclusion, rule, conclusion, and so on.

    Facts and rules must be sentences of the context, conclusions must follow from the two sentences before.
    Raises ValueError with the step (counted from 1) and the sentence that breaks this.
    """
    known: list[Statement] = []
    for index, sentence in enumerate(sentences):
        step = index // 2 + 1
        if index and index % 2 == 0:
            follows = modus_ponens(known[-2], known[-1])
            if follows is None or sentence not in forms(follows):
                raise ValueError(f"step {step}: {sentence!r} does not follow from the two sentences before")
        elif sentence not in question.sentences:
            raise ValueError(f"step {step}: {sentence!r} is not in the context")
        known.append(read_sentence(sentence))
    return known[-1]


def roles(record: dict) -> dict[str, str]:
    """Word -> its role in the question of a checked record, for name, concepts and properties."""
    question = read_question(record["question"])
    chain = [read_sentence(sentence) for sentence in proof_sentences(record["steps"])]
    about = [said for said in question.statements if said.predicate not in CONCEPTS]
    parts = {said.predicate: "property" for said in about}
    parts |= {question.query.subject: "name", question.query.predicate: "asked property"}
    parts |= {fact.predicate: f"path {number}" for number, fact in enumerate(chain[:-1:2], start=1)}
    for fact in question.statements:
        if fact.subject in NAMES:
            parts.setdefault(fact.predicate, "second")
    described = {rule.subject for rule in about}
    for child, parent, _ in [rule for rule in question.statements if rule.subject in parts]:
        parts.setdefault(parent, f"above {parts[child]}" if parent in described else f"above {parts[child]}, bare")
    for rule in about:
        if rule.predicate == question.query.predicate:
            parts.setdefault(rule.subject, "opposing")
    return {word: parts.get(word, "other") for said in question.statements for word in said[:2]}


def shape(record: dict) -> tuple[tuple[str, str], ...]:
    """Facts and rules of a checked record, with words replaced by roles: questions of one shape differ only in words
    and signs."""
    parts = roles(record)
    return tuple(sorted((parts[said[0]], parts[said[1]]) for said in read_question(record["question"]).statements))
