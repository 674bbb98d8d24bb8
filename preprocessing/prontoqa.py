"""ProntoQA: convert the official generator's file, or generate one; check the proofs of a file, print statistics.

    python preprocessing/prontoqa.py convert 5hop_0shot_random.json.gz --out data/prontoqa
    python preprocessing/prontoqa.py generate --out data/prontoqa
    python preprocessing/prontoqa.py check data/prontoqa/prontoqa_train.json
    python preprocessing/prontoqa.py stats data/prontoqa/prontoqa_train.json

`convert` follows the published preprocessing of Coconut: question and query joined by a space, two sentences of the
chain of thought per step, the first 9,000 trials for training, 200 for validation, the rest for testing.
The task itself is in `prontoqa_generator.py`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean

from json_lists import write_list
from prontoqa_generator import (
    MOST_HOPS,
    NAMES,
    check_record,
    generate,
    pair_steps,
    proof_sentences,
    question_key,
    read_question,
    roles,
    shape,
)
from statistics_table import print_statistics

_GZIP_MAGIC = b"\x1f\x8b"
_JSON_NAMES = {tuple: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def load_json(path: Path, object_pairs_hook: Callable | None = None) -> object:
    """Load a UTF-8 JSON file, gzipped or not, with or without a byte order mark.

    Raises OSError if it cannot be read and ValueError, naming the file, if it has another format.
    """
    data = path.read_bytes()
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is cut off or damaged gzip: {error}") from None
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=object_pairs_hook)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither gzip nor UTF-8 (see byte {error.start}): save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is cut off: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a file of ProntoQA") from None


def read_trials(path: Path) -> list[tuple[str, object]]:
    """Trial ids with their trials, in file order, duplicates included; JSON objects are tuples of pairs.

    Raises as `load_json`, and ValueError unless the file is one object with at least one trial.
    """
    trials = load_json(path, object_pairs_hook=tuple)
    if not isinstance(trials, tuple):
        raise ValueError(f"{path} is {_kind(trials)}, not an object of trials as the official generator writes it")
    if not trials:
        raise ValueError(f"{path} has no trials")
    return list(trials)


def convert_trials(trials: list[tuple[str, object]]) -> Iterator[tuple[str, dict | None, str]]:
    """Yield (trial id, record, ""), or (trial id, None, the reason why the trial is invalid)."""
    ids: set[str] = set()
    asked_by: dict[str, str] = {}
    for trial_id, trial in trials:
        if trial_id in ids:
            yield trial_id, None, "its id stood before; only the first trial of an id is read"
            continue
        ids.add(trial_id)
        try:
            record = convert_trial(trial)
        except ValueError as error:
            yield trial_id, None, str(error)
            continue
        first = asked_by.setdefault(record["question"], trial_id)
        if first != trial_id:
            yield trial_id, None, f"the same question as trial {first!r}"
            continue
        yield trial_id, record, ""


def convert_trial(trial: object) -> dict:
    """The record of one trial; raises ValueError naming a key that is missing, mistyped, empty or duplicated."""
    example = _object(_object(trial, "the trial").get("test_example"), "'test_example'")
    question, query, answer = (_text(example.get(key), f"{key!r}") for key in ("question", "query", "answer"))
    if answer not in ("True", "False"):
        raise ValueError(f"'answer' is {answer!r}, not 'True' or 'False'")
    chain = example.get("chain_of_thought")
    if not isinstance(chain, list):
        raise ValueError(f"'chain_of_thought' is {_kind(chain)}, not a list")
    if not chain:
        raise ValueError("'chain_of_thought' is empty")
    sentences = [_text(sentence, f"sentence {number} of the chain") for number, sentence in enumerate(chain, start=1)]
    return {"question": f"{question} {query}", "steps": pair_steps(sentences), "answer": answer}


def _object(value: object, what: str) -> dict:
    if not isinstance(value, tuple):
        raise ValueError(f"{what} is {_kind(value)}, not an object")
    double = next((key for key, count in Counter(key for key, _ in value).items() if count > 1), None)
    if double is not None:
        raise ValueError(f"{what} has the key {double!r} more than once")
    return dict(value)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, not text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value


def _kind(value: object) -> str:
    return "missing or null" if value is None else _JSON_NAMES.get(type(value), "a number")


def convert(options: argparse.Namespace) -> int:
    """Write the three files; invalid trials are skipped and named on stderr. Raises ValueError if too few remain."""
    records = []
    trials = read_trials(options.file)
    for trial_id, record, problem in convert_trials(trials):
        if record is None:
            print(f"prontoqa.py convert: trial {trial_id!r} left out: {problem}", file=sys.stderr)
        else:
            records.append(record)
    if len(records) < len(trials):
        left_out = len(trials) - len(records)
        print(f"prontoqa.py convert: {left_out} of {len(trials)} trials left out", file=sys.stderr)
    bounds = options.train, options.train + options.valid
    if len(records) <= bounds[1]:
        raise ValueError(
            f"{options.file} has {len(records)} usable trials; --train {options.train} --valid {options.valid} "
            f"and a test set need at least {bounds[1] + 1}"
        )
    write_split(options.out, "train", records[: bounds[0]])
    write_split(options.out, "valid", records[bounds[0] : bounds[1]])
    write_split(options.out, "test", records[bounds[1] :])
    return 0


def write_split(folder: Path, split: str, records: list[dict]) -> None:
    write_list(folder / f"prontoqa_{split}.json", records)


def write_generated(options: argparse.Namespace) -> int:
    """Write the three files. Test and validation questions come first; training never repeats one of them."""
    seen: set[tuple] = set()
    for split, count in (("test", options.test), ("valid", options.valid), ("train", options.train)):
        records = list(generate(count, f"{options.seed}/{split}", hops=options.hops, exclude=seen))
        seen |= {question_key(record) for record in records}
        write_split(options.out, split, records)
    return 0


def read_records(path: Path) -> list:
    """The list in a file of records; raises as `load_json`, and ValueError unless it is a list that is not empty."""
    records = load_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} is not a list of records with question, steps and answer")
    return records


def find_problems(records: list) -> Iterator[tuple[int, str]]:
    """Index and reason of every record with an invalid proof or a repeated question."""
    asked_by: dict[tuple, int] = {}
    for index, record in enumerate(records):
        try:
            check_record(record)
        except ValueError as error:
            yield index, str(error)
            continue
        first = asked_by.setdefault(question_key(record), index)
        if first != index:
            yield index, f"the same question as record {first}"


def check(options: argparse.Namespace) -> int:
    """Print the number of valid proofs, and on stderr the invalid ones with the reason."""
    records = read_records(options.file)
    problems = list(find_problems(records))
    for index, problem in problems:
        print(f"prontoqa.py check: record {index}: {problem}", file=sys.stderr)
    print(f"{options.file}: {len(records)} records, {len(records) - len(problems)} hold, {len(problems)} do not")
    return 1 if problems else 0


def shortcuts(records: list[dict]) -> dict[str, float]:
    """The accuracy of answering from one surface cue each, without following the proof."""
    right: Counter[str] = Counter()
    for record in records:
        question = read_question(record["question"])
        asked = question.query
        on_it = [said for said in question.statements if said.predicate == asked.predicate]
        words = Counter(word for said in question.statements for word in said[:2])
        most_named = max(on_it, key=lambda said: words[said.subject])
        answer = record["answer"] == "True"
        right["always False"] += not answer
        right["sign of the query"] += answer == asked.holds
        right["first rule on it"] += answer == (on_it[0].holds == asked.holds)
        right["its concept named most"] += answer == (most_named.holds == asked.holds)
    return {cue: count / len(records) for cue, count in right.items()}


def statistics(records: list[dict]) -> dict[str, float | dict]:
    """Means over a file of checked records; shares are of the examples, the sentences or the rules.

    `shapes` counts questions that differ in more than words and signs. `asked_place` is the place of the proof's last
    rule among the rules (0 the first, 1 the last), `proof_in_order` the share of consecutive rules of a proof that are
    in the same order in the context.
    """
    questions = [read_question(record["question"]) for record in records]
    return {
        "examples": len(records),
        "distinct_questions": len({question_key(record) for record in records}),
        "shapes": len({shape(record) for record in records}),
        "sentences": mean(len(question.sentences) for question in questions),
        "question_words": mean(len(record["question"].split()) for record in records),
        "steps_share": _shares(len(record["steps"]) for record in records),
        "form_share": _shares(_form(sentence) for question in questions for sentence in question.sentences),
        "answer_true": mean(record["answer"] == "True" for record in records),
        "query_negated": mean(not question.query.holds for question in questions),
        "negated_share": _negated_shares(records),
        **_places(records),
        "shortcuts": shortcuts(records),
    }


def _shares(values: Iterable) -> dict:
    counts = Counter(values)
    return {value: counts[value] / sum(counts.values()) for value in sorted(counts)}


def _form(sentence: str) -> str:
    first = sentence.split()[0]
    return first if first in ("Each", "Every") else "fact" if first in NAMES else "plural"


def _negated_shares(records: list[dict]) -> dict[str, float]:
    """Share of negated rules about properties: the asked one, others on the proof's path, off it, the opposing one."""
    signs: dict[str, list[bool]] = {"asked": [], "on the path": [], "off the path": [], "opposing": []}
    for record in records:
        parts = roles(record)
        for subject, predicate, holds in read_question(record["question"]).statements:
            part = parts[subject]
            if parts[predicate] == "asked property":
                signs["asked" if part.startswith("path") else "opposing"].append(not holds)
            elif parts[predicate] == "property":
                signs["on the path" if part.startswith("path") else "off the path"].append(not holds)
    return {part: mean(negated) for part, negated in signs.items() if negated}


def _places(records: list[dict]) -> dict[str, float]:
    facts_last, proof_fact_first, in_order, asked = [], [], [], []
    for record in records:
        question = read_question(record["question"])
        place = {sentence: index for index, sentence in enumerate(question.sentences)}
        proof = [place[sentence] for sentence in proof_sentences(record["steps"])[1::2]]
        facts = [index for index, said in enumerate(question.statements) if said.subject in NAMES]
        n_rules = len(place) - len(facts)
        facts_last.append(facts[0] == n_rules)
        proof_fact_first.append(record["steps"][0].startswith(question.sentences[facts[0]]))
        in_order += [before < after for before, after in pairwise(proof)]
        asked.append(proof[-1] / max(n_rules - 1, 1))
    return {
        "facts_last": mean(facts_last),
        "proof_fact_first": mean(proof_fact_first),
        "proof_in_order": mean(in_order or [1]),
        "asked_place": mean(asked),
    }


def describe(options: argparse.Namespace) -> int:
    records = read_records(options.file)
    problem = next(find_problems(records), None)
    if problem is not None:
        raise ValueError(f"{options.file}: record {problem[0]}: {problem[1]}; `check` names every such record")
    print_statistics(statistics(records))
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _check_options(options)
        return options.run(options)
    except (OSError, ValueError) as error:
        print(f"prontoqa.py {options.command}: {error}", file=sys.stderr)
        return 2


def _check_options(options: argparse.Namespace) -> None:
    for name in ("train", "valid", "test"):
        count = getattr(options, name, None)
        if count is not None and count < 1:
            raise ValueError(f"--{name} {count}: a split needs at least 1 example")
    hops = getattr(options, "hops", 1)
    if not 1 <= hops <= MOST_HOPS:
        raise ValueError(f"--hops {hops}: the concepts and properties of the task are enough for 1 to {MOST_HOPS}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("convert", help="write prontoqa_{train,valid,test}.json from the official file")
    read.add_argument("file", type=Path, help="5hop_0shot_random.json of the official generator, gzip or not")
    make = commands.add_parser("generate", help="write prontoqa_{train,valid,test}.json without the official file")
    for command in (read, make):
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
        command.add_argument("--train", type=int, default=9000, help="number of examples (published: 9000)")
        command.add_argument("--valid", type=int, default=200, help="number of examples (published: 200)")
    make.add_argument("--test", type=int, default=800, help="number of examples (published: 800)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--hops", type=int, default=5, help=f"rules in a proof, 1 to {MOST_HOPS} (published: 5)")
    follow = commands.add_parser("check", help="verify every proof of a file; exit status 1 if one is invalid")
    stats = commands.add_parser("stats", help="print the statistics of a file")
    for command in (follow, stats):
        command.add_argument("file", type=Path, help="a file that `convert` or `generate` wrote")
    for command, run in ((read, convert), (make, write_generated), (follow, check), (stats, describe)):
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
