"""Word sums: a count that a short story changes step by step, in English (docs/datasets/WORD_SUMS.md).

    python preprocessing/word_sums.py generate --out data/word_sums
    python preprocessing/word_sums.py ood --out data/word_sums --steps 5 6
    python preprocessing/word_sums.py check data/word_sums/word_sums_train.json
    python preprocessing/word_sums.py stats data/word_sums/word_sums_train.json

"Mia has 7 shells. She finds 5 more. She doubles them. She gives away 9. How many shells does Mia have?" A step is one
calculation, "7 + 5 = 12"; the answer is the last result. No story is in two splits.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from json_lists import UnusableError, add_readers, read_list, run_command, write_list

SPLITS = ("test", "valid", "train")
PEOPLE = {"She": "Ada Eva Ida Lea Mia Nora Ruth Zoe".split(), "He": "Ben Carl Finn Hugo Leo Max Otto Tom".split()}
THINGS = "apples books cards coins pens shells stamps stones".split()
GAINS, LOSSES = ("finds", "buys", "gets"), ("loses", "sells", "gives away")
_DOUBLING = "doubles them"
MOST = 60
"""No result is larger."""
_STORY = re.compile(r"(\w+) has (\d+) (\w+)\. (.+) How many \3 does \1 have\?")
_CHANGE = r"(?:He|She) (?:{}) (\d+){}"
_GAIN = re.compile(_CHANGE.format("|".join(GAINS), " more"))
_LOSS = re.compile(_CHANGE.format("|".join(LOSSES), ""))


def make_example(rng: random.Random, n_steps: int) -> dict[str, Any]:
    """One story of `n_steps` changes with its steps and answer."""
    pronoun = rng.choice(list(PEOPLE))
    name, thing, count = rng.choice(PEOPLE[pronoun]), rng.choice(THINGS), rng.randint(2, 9)
    sentences = [f"{name} has {count} {thing}."]
    for _ in range(n_steps):
        change, count = _change(rng, count)
        sentences.append(f"{pronoun} {change}.")
    return told(" ".join([*sentences, f"How many {thing} does {name} have?"]))


def _change(rng: random.Random, count: int) -> tuple[str, int]:
    # A count of 0 would make the changes before it idle.
    possible = {"gain": count + 9 <= MOST, "loss": count > 2, "double": 2 * count <= MOST}
    kinds = [kind for kind, is_possible in possible.items() if is_possible]
    kind = rng.choice(kinds)
    if kind == "double":
        return _DOUBLING, 2 * count
    if kind == "gain":
        more = rng.randint(2, 9)
        return f"{rng.choice(GAINS)} {more} more", count + more
    fewer = rng.randint(2, min(9, count - 1))
    return f"{rng.choice(LOSSES)} {fewer}", count - fewer


def told(question: str) -> dict[str, Any]:
    """A record with the steps and the answer that follow from a story; raises ValueError for any other text."""
    story = _STORY.fullmatch(question)
    if story is None:
        raise ValueError("is not a word sums story")
    _, start, _, changes = story.groups()
    count, steps = int(start), []
    for sentence in changes.removesuffix(".").split(". "):
        if sentence.endswith(f" {_DOUBLING}"):
            term, result = "* 2", 2 * count
        elif gain := _GAIN.fullmatch(sentence):
            term, result = f"+ {gain[1]}", count + int(gain[1])
        elif loss := _LOSS.fullmatch(sentence):
            term, result = f"- {loss[1]}", count - int(loss[1])
        else:
            raise ValueError(f"has a sentence {sentence!r} that is none of this task")
        steps.append(f"{count} {term} = {result}")
        count = result
    return {"question": question, "steps": steps, "answer": str(count)}


def problem_with(record: Any) -> str | None:
    """Why the steps or the answer of a record do not follow from its question; None if they do."""
    try:
        right = told(record["question"])
        for key in ("steps", "answer"):
            if record[key] != right[key]:
                return f"the {key} {'are' if key == 'steps' else 'is'} {record[key]!r}, the story's {right[key]!r}"
    except (KeyError, TypeError) as error:
        return f"is not a record of this task: {type(error).__name__}: {error}"
    except ValueError as error:
        return f"the question {error}"
    return None


def generate(
    count: int, seed: str, n_steps: tuple[int, ...], exclude: set[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield `count` different records, none with a question in `exclude`; each has one of the numbers of steps."""
    rng, asked = random.Random(seed), set(exclude or ())
    made = 0
    while made < count:
        record = make_example(rng, rng.choice(n_steps))
        if record["question"] not in asked:
            asked.add(record["question"])
            made += 1
            yield record


def statistics(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over a file; histograms are shares of the examples.

    `stopping_after` is the accuracy of an answer that makes j changes and stops there.
    """
    lengths = [len(record["steps"]) for record in records]
    answers = Counter(record["answer"] for record in records)
    results = [[step.split()[0] for step in record["steps"]] + [record["answer"]] for record in records]
    kinds = Counter(step.split()[1] for record in records for step in record["steps"])
    return {
        "examples": len(records),
        "question_words": mean(len(record["question"].split()) for record in records),
        "steps_share": {each: count / len(records) for each, count in sorted(Counter(lengths).items())},
        "changes_share": {kind: count / sum(lengths) for kind, count in sorted(kinds.items())},
        "distinct_answers": len(answers),
        "commonest_answer": max(answers.values()) / len(records),
        "stopping_after": {j: mean(row[j] == row[-1] for row in results) for j in range(min(lengths))},
    }


def main(arguments: list[str] | None = None) -> int:
    return run_command("word_sums.py", _parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write word_sums_{train,valid,test}.json")
    make.set_defaults(run=_generate)
    for split, count in (("train", 4000), ("valid", 200), ("test", 500)):
        make.add_argument(f"--{split}", type=int, default=count, help=f"number of examples (default: {count})")
    other = commands.add_parser("ood", help="write word_sums_ood_K.json: new stories of K steps")
    other.set_defaults(run=_write_longer_stories)
    other.add_argument("--count", type=int, default=500, help="number of examples (default: 500)")
    for command, steps in ((make, [3, 4]), (other, [5, 6])):
        usual = " ".join(map(str, steps))
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument(
            "--steps", type=int, nargs="+", default=steps, metavar="K", help=f"steps of a story (default: {usual})"
        )
    check = "work through every story of a file; exit status 1 if a step or an answer is wrong"
    add_readers(commands, "word sums", problem_with, statistics, check)
    return parser


def _demand_enough(n_steps: list[int], *counts: int) -> None:
    count = sum(counts)
    if min(counts) < 1:
        raise UnusableError(f"{min(counts)} examples: a split needs at least 1")
    if min(n_steps) < 1:
        raise UnusableError(f"--steps {min(n_steps)}: needs at least 1")
    # A story has at least 10 continuations by its first step alone, and eight times 16 names and things.
    if count > 128 * 10 ** min(n_steps):
        raise UnusableError(f"{count} examples of {min(n_steps)} steps: there are not as many stories; ask for fewer")


def _generate(options: argparse.Namespace) -> int:
    """Write the three files. Test and validation stories come first; training repeats none of them."""
    counts = {split: getattr(options, split) for split in SPLITS}
    _demand_enough(options.steps, *counts.values())
    seen: set[str] = set()
    for split in SPLITS:
        records = list(generate(counts[split], f"{options.seed}/{split}", tuple(sorted(set(options.steps))), seen))
        seen |= {record["question"] for record in records}
        write_list(options.out / f"word_sums_{split}.json", records)
    return 0


def _write_longer_stories(options: argparse.Namespace) -> int:
    _demand_enough(options.steps, options.count)
    paths = [options.out / f"word_sums_{split}.json" for split in SPLITS]
    seen = {each["question"] for path in paths if path.exists() for each in read_list(path, "word sums")}
    for n_steps in options.steps:
        records = list(generate(options.count, f"{options.seed}/ood/{n_steps}", (n_steps,), seen))
        write_list(options.out / f"word_sums_ood_{n_steps}.json", records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
