"""GSM8K-Aug: nothing is lost or changed by the conversion, no input ends it, and the checker finds what is wrong."""

from __future__ import annotations

import json
import random
import threading
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import gsm8k
import gsm8k_check
import pytest
from gsm8k import Counts

from coconut_ds.data.files import read_records

GOOD = b"How many are 2 and 3?||<<2+3=5>> <<5*2=10>> #### 10\n"
QUOTED = "\u201cé\u2028\U0001f600\u201d"  # beyond ASCII, and what str.splitlines takes for a line end
GOOD_RECORD = {"question": "How many are 2 and 3?", "steps": ["<<2+3=5>>", "<<5*2=10>>"], "answer": "10"}


@pytest.fixture
def convert(tmp_path):
    """Convert bytes; return the records (None when nothing was written) and the counts or the refusal."""

    def run(content: bytes) -> tuple[list[dict] | None, Counts | gsm8k.FileError]:
        source, target = tmp_path / "some.txt", tmp_path / "out" / "some.json"
        target.unlink(missing_ok=True)
        source.write_bytes(content)
        try:
            result = gsm8k.convert(source, target)
        except gsm8k.FileError as error:
            result = error
        records = json.loads(target.read_text(encoding="utf-8")) if target.exists() else None
        assert [path.name for path in target.parent.iterdir()] == ["some.json"] * (records is not None)
        return records, result

    return run


@pytest.fixture
def valid_text(shared):
    return shared / "datasets" / "gsm8k_aug_valid.txt"


@pytest.fixture
def valid_json(valid_text, tmp_path):
    path = tmp_path / "gsm_valid.json"
    gsm8k.convert(valid_text, path)
    return path


def rebuilt(record: dict) -> str:
    return f"{record['question']}||{' '.join(record['steps'])} #### {record['answer']}\n"


@pytest.mark.shared
def test_the_published_lines_can_be_rebuilt(valid_text, valid_json):
    records = read_records(valid_json)  # what the trainer accepts
    assert "".join(map(rebuilt, records)).encode() == valid_text.read_bytes()
    assert len(records) == 500
    assert sum(record["steps"] == [] for record in records) == 6


@pytest.mark.shared
def test_statistics_of_the_published_lines(valid_json, capsys):
    found = gsm8k.statistics(gsm8k.load(valid_json))
    assert found["examples"] == 500
    assert found["steps"] == 1573 / 500
    assert found["steps_share"] == {
        steps: count / 500 for steps, count in enumerate([6, 26, 155, 140, 91, 53, 18, 8, 3])
    }
    assert found["question_words"] == pytest.approx(45.04, abs=0.005)
    assert found["whole_answers"] == 1
    assert gsm8k.main(["stats", str(valid_json)]) == 0
    assert "2: 31.0%" in capsys.readouterr().out


@pytest.mark.shared
def test_where_the_published_answers_come_from(valid_json, capsys):
    report = gsm8k_check.check(gsm8k.load(valid_json))
    assert (report.records, report.steps, report.bare_steps) == (500, 1573, 25)
    assert report.wrong_steps == []
    outcomes = dict(report.outcomes)
    assert len(outcomes.pop(gsm8k_check.LAST)) == 466
    assert outcomes == {
        gsm8k_check.EARLIER: [47, 141, 316],
        gsm8k_check.ABSENT: [
            *(9, 15, 33, 45, 63, 68, 84, 107, 160, 173, 184, 192, 219),
            *(224, 261, 297, 324, 328, 370, 374, 395, 396, 402, 410, 448),
        ],
        gsm8k_check.NO_STEPS: [89, 186, 327, 411, 445, 468],
        gsm8k_check.NOT_EVALUABLE: [],
    }
    assert report.restated == [77, 272, 392, 469]
    assert gsm8k.main(["check", str(valid_json)]) == 1
    assert "no steps  6 (1.2%): records 89, 186, 327, 411, 445, 468" in capsys.readouterr().out


@pytest.mark.shared
def test_all_published_steps_are_exact(valid_json):
    steps = [gsm8k_check.read_step(step) for record in gsm8k.load(valid_json) for step in record["steps"]]
    assert sum(step.exact == step.written for step in steps) == len(steps) == 1573


@pytest.mark.shared
def test_every_corrupted_step_and_answer_is_found(valid_json):
    records = gsm8k.load(valid_json)
    sound = gsm8k_check.check(records).outcomes[gsm8k_check.LAST]
    for index in sound:
        record = records[index]
        place = index % len(record["steps"])
        expression, value = record["steps"][place][2:-2].split("=")
        changed = [*record["steps"]]
        changed[place] = f"<<{expression}={Fraction(value) + 1}>>"
        report = gsm8k_check.check([record | {"steps": changed}])
        assert [found for found, _ in report.wrong_steps] == [0]
        assert not report.holds
        values = {Fraction(step[2:-2].split("=")[1]) for step in record["steps"]}
        wrong = next(number for number in range(1, 100) if number not in values)
        report = gsm8k_check.check([record | {"answer": str(wrong)}])
        assert report.outcomes[gsm8k_check.ABSENT] == [0]
        assert not report.holds


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1.5*2+.5", "3.5"),
        ("80-(1/2)*80", "40"),
        ("-3+5", "2"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("17%5", "2"),
        ("17%(2+3)", "2"),
        ("20%*50", "10"),
        ("100/20%", "500"),
        ("$1,200*2", "2400"),
        ("12,000,000/4", "3000000"),
        ("0.1+0.2", "0.3"),
        ("9" * 400, "9" * 400),
        ("+7", "7"),
    ],
)
def test_expressions_are_evaluated_exactly(expression, value):
    assert gsm8k_check.evaluate(expression) == Fraction(value)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            "x+1",
            "__import__('os')",
            "1/0",
            "5%0",
            "2+",
            "(2",
            "1e9",
            "1_000",
            "2//1",
            "1,2",
            "...",
            "5(3)",
            "\uff15",
        ),
        *("9**9**9", "9**99999999999", "0.5**-9999999", "4**.5", "1+" * 5000 + "1", "(" * 250 + "1" + ")" * 250),
        "((9**999)**9)**9",
    ],
)
def test_other_expressions_are_refused(expression):
    with pytest.raises(ValueError, match=r"not arithmetic|by zero|not evaluated|characters|has a|Invalid literal"):
        gsm8k_check.evaluate(expression)


@pytest.mark.parametrize(
    ("step", "holds"),
    [
        ("<<10/3=3.33>>", True),
        ("<<2/3=0.67>>", True),
        ("<<1/8=.13>>", True),
        ("<<10/3=3.34>>", False),
        ("<<2/3=0.66>>", False),
        ("<<10/3=3>>", False),
        ("<<2+2=5>>", False),
        ("<<2*2.25=4.50>>", True),
        ("<<3-5=-2>>", True),
        ("<<50%*3=150%>>", True),
    ],
)
def test_a_value_may_be_rounded_at_its_last_decimal(step, holds):
    assert gsm8k_check.read_step(step).holds is holds


@pytest.mark.parametrize(
    ("steps", "answer", "outcome"),
    [
        (["<<2+3=5>>", "<<5*1000=5000>>"], "5,000", gsm8k_check.LAST),
        (["<<2+3=5>>", "<<5*1000=5000.00>>"], "$5000", gsm8k_check.LAST),
        (["<<2+3=5>>", "<<5*1000=5000>>"], "5", gsm8k_check.EARLIER),
        (["<<2+3=5>>"], "6", gsm8k_check.ABSENT),
        (["<<2+3=5>>"], "five", gsm8k_check.ABSENT),
        ([], "5", gsm8k_check.NO_STEPS),
        (["<<two+3=5>>"], "5", gsm8k_check.NOT_EVALUABLE),
        (["2+3=5"], "5", gsm8k_check.NOT_EVALUABLE),
    ],
)
def test_where_an_answer_comes_from(steps, answer, outcome):
    report = gsm8k_check.check([{"question": "q", "steps": steps, "answer": answer}])
    assert report.outcomes == {each: [0] * (each == outcome) for each in gsm8k_check.OUTCOMES}
    assert report.holds is (outcome in (gsm8k_check.LAST, gsm8k_check.EARLIER, gsm8k_check.NO_STEPS))


def test_numbers_too_large_to_print_are_still_reported():
    power = "*".join(["9**999"] * 20)
    steps = [f"<<{power}=1>>", f"<<{power}/7=1>>", f"<<1/({power})=1>>"]
    report = gsm8k_check.check([{"question": "q", "steps": steps, "answer": "1"}])
    assert [problem.split()[-1] for _, problem in report.wrong_steps] == ["10^19066", "10^19065", "10^-19066"]


@pytest.mark.parametrize("most", [1, None])
def test_the_report_names_as_many_records_as_asked(most):
    record = {"question": "q", "steps": ["<<1+1=3>>"], "answer": "4"}
    text = "\n".join(gsm8k_check.lines(gsm8k_check.check([record] * 3), most))
    assert text.count("<<1+1=3>> should be 2") == (most or 3)
    assert ("records 0 and 2 more" if most else "records 0, 1, 2") in text
    assert ("and 2 more\nanswer:" in text) is bool(most)


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (GOOD, GOOD_RECORD),
        (GOOD.replace(b"\n", b"\r\n"), GOOD_RECORD),
        (GOOD[:-1], GOOD_RECORD),
        (b"\xef\xbb\xbf" + GOOD, GOOD_RECORD),
        (b"q|| #### 26\n", {"question": "q", "steps": [], "answer": "26"}),
        (b"q||####26\n", {"question": "q", "steps": [], "answer": "26"}),
        (b"q||a  b\t#### 1,200 \n", {"question": "q", "steps": ["a", "b"], "answer": "1,200"}),
        (b"Is #### text? a|b||a #### 1\n", {"question": "Is #### text? a|b", "steps": ["a"], "answer": "1"}),
        (b"q||a #### " + b"7" * 400 + b"\n", {"question": "q", "steps": ["a"], "answer": "7" * 400}),
        (f"{QUOTED}||a #### 1\n".encode(), {"question": QUOTED, "steps": ["a"], "answer": "1"}),
        (b"q" * 1_000_000 + b"||a #### 1\n", {"question": "q" * 1_000_000, "steps": ["a"], "answer": "1"}),
    ],
)  # fmt: skip
def test_lines_that_are_examples(convert, line, record):
    assert convert(line) == ([record], Counts(lines=1, records=1))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"no bars #### 5\n", "has 0 '||'"),
        (b"q||a||b #### 5\n", "has 2 '||'"),
        (b"q||a 5\n", "has 0 '####' after '||'"),
        (b"#### 5 q||a\n", "has 0 '####' after '||'"),
        (b"q||a #### 5 #### 6\n", "has 2 '####' after '||'"),
        (b"  ||a #### 5\n", "has an empty question"),
        (b"q||a #### \r\n", "has an empty answer"),
        (b"q||a #### 5\0\n", "has a NUL character"),
        (b"q\xff||a #### 5\n", "is not UTF-8: invalid start byte at byte 1"),
        (b"q\xed\xa0\x80||a #### 5\n", "is not UTF-8: invalid continuation byte at byte 1"),
        (b"q" * (3 << 20) + b"||a #### 5\n", "is longer than 1,048,576 bytes"),
        (b"9 * 3||1 8 + 0 2 #### 7 2\n", "has 5 steps that are numbers and signs, '1 8 + 0 2', and none that is a"),
        (b"5 6 * 7||5 5 6 + 0 ( 5 1 ) + 0 6 #### 5\n", "has 12 steps that are numbers and signs, '5 5 6 + 0 ( 5 1 ) +"),
        (b"q||12.5 + 3 = 15.5 #### 15.5\n", "has 5 steps that are numbers and signs"),
        (b"q||7 #### 7\n", "has 1 steps that are numbers and signs"),
    ],
)
def test_malformed_lines_are_named_and_counted(convert, line, reason, capsys):
    assert convert(GOOD + line + GOOD) == ([GOOD_RECORD] * 2, Counts(lines=3, records=2, malformed=1, repeated=1))
    assert f"some.txt: line 2 {reason}" in capsys.readouterr().err
    records, refusal = convert(line)
    assert records is None
    assert str(refusal).endswith("none of its 1 lines is an example 'question||steps #### answer'")


@pytest.mark.parametrize("steps", ["Ann has 3 pens.", "2+3=5", "<<2+3=5>> so", "<<2 + 3=5>>", "<<5>>"])
def test_steps_that_are_no_calculations_are_converted_counted_and_said(tmp_path, capsys, steps):
    (tmp_path / "train.txt").write_bytes(GOOD + f"q||{steps} #### 5\n".encode() + GOOD)
    assert gsm8k.main(["convert", str(tmp_path / "train.txt"), "--out", str(tmp_path), "--strict"]) == 0
    assert read_records(tmp_path / "gsm_train.json")[1]["steps"] == steps.split()
    said = capsys.readouterr().err
    assert "1 of 3 examples have steps that are not calculations <<2+3=5>>, the first on line 2; " in said


@pytest.mark.shared
def test_of_the_published_lines_nothing_is_said(valid_text, tmp_path, capsys):
    assert gsm8k.main(["convert", str(valid_text), "--out", str(tmp_path), "--strict"]) == 0
    assert "not calculations" not in capsys.readouterr().err


def test_empty_lines_are_counted(convert):
    assert convert(b"\n" + GOOD + b"\r\n \t \n") == ([GOOD_RECORD], Counts(lines=4, records=1, empty=3))
    assert convert(b"")[0] is None


def test_twenty_malformed_lines_are_named(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes(b"bad\n" * 50 + GOOD)
    assert gsm8k.main(["convert", str(tmp_path / "train.txt"), "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err.count(" has 0 '||'") == 20
    assert "30 more malformed lines" in output.err
    assert "1 examples of 51 lines (50 malformed, 0 empty), 0 questions repeated" in output.out


def mutated(rng: random.Random, line: bytes) -> bytes:
    pieces = (
        b"||",
        b"####",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b" ",
        b"|",
        b"#",
        b"\xef\xbb\xbf",
        rng.randbytes(4),
        b"\\",
        b'"',
    )
    content = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        content[start : start + rng.choice([0, 0, 1, 3, 40])] = rng.choice(pieces)
    return bytes(content)


@pytest.mark.shared
def test_mutated_lines_never_end_the_conversion(convert, valid_text, valid_json):
    rng = random.Random(0)
    lines = valid_text.read_bytes().splitlines(keepends=True)
    seen = Counts()
    for _ in range(40):
        content = b"".join(mutated(rng, line) for line in rng.sample(lines, 20)) + GOOD
        records, counts = convert(content)
        assert counts.lines == counts.records + counts.malformed + counts.empty == content.count(b"\n")
        assert len(records) == counts.records
        gsm8k_check.check(records)
        for name in vars(seen):
            setattr(seen, name, getattr(seen, name) + getattr(counts, name))
    assert seen.lines > 840  # the mutations were of every kind
    assert min(seen.records, seen.malformed) > 100
    assert seen.empty > 0


def numbered(count: int) -> bytes:
    text = "A shop sells {0} boxes of {1} pens each, " + "and the pens are red or blue, " * 5 + "how many pens? {0}"
    line = text + "||<<{0}*{1}={2}>> #### {2}\n"
    return "".join(line.format(number, number % 97, number * (number % 97)) for number in range(count)).encode()


def test_memory_does_not_grow_with_the_file_but_for_the_hashes(tmp_path):
    source, target = tmp_path / "some.txt", tmp_path / "some.json"
    source.write_bytes(numbered(40_000))

    def peak(run) -> float:
        tracemalloc.start()
        run()
        megabytes = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        return megabytes

    hashes = peak(lambda: {number.to_bytes(8, "big") for number in range(40_000)})
    assert peak(lambda: gsm8k.convert(source, target)) < hashes + 2
    assert peak(lambda: [gsm8k.parse(line) for line in source.read_text().splitlines()]) > hashes + 15
    assert len(gsm8k.load(target)) == 40_000


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, monkeypatch, error):
    def break_off(*_):
        raise error

    (tmp_path / "some.txt").write_bytes(GOOD * 3)
    (tmp_path / "some.json").write_text("before")
    monkeypatch.setattr(gsm8k, "parse", break_off)
    with pytest.raises((KeyboardInterrupt, gsm8k.FileError)):
        gsm8k.convert(tmp_path / "some.txt", tmp_path / "some.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.json", "some.txt"]
    assert (tmp_path / "some.json").read_text() == "before"


@pytest.mark.parametrize(
    ("name", "given", "target"),
    [
        ("train.txt", None, "gsm_train.json"),
        ("gsm8k_aug_valid.txt", None, "gsm_valid.json"),
        ("gsm-test.txt", None, "gsm_test.json"),
        ("train.txt", "small", "gsm_small.json"),
    ],
)
def test_names_of_the_json_files(tmp_path, name, given, target):
    (tmp_path / name).write_bytes(GOOD)
    arguments = ["convert", str(tmp_path / name), "--out", str(tmp_path / "out"), *(["--name", given] if given else [])]
    assert gsm8k.main(arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [target]


def test_strict_makes_malformed_lines_a_failure(tmp_path):
    for name, content in (("train.txt", GOOD), ("valid.txt", GOOD + b"bad\n")):
        (tmp_path / name).write_bytes(content)
    both = [str(tmp_path / "valid.txt"), str(tmp_path / "train.txt")]
    assert gsm8k.main(["convert", *both, "--out", str(tmp_path)]) == 0
    assert gsm8k.main(["convert", *both, "--out", str(tmp_path), "--strict"]) == 1
    assert gsm8k.main(["convert", both[1], "--out", str(tmp_path), "--strict"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "missing_train.txt"], "missing_train.txt: No such file or directory"),
        (["convert", "folder_train"], "folder_train: Is a directory"),
        (["convert", "other.txt"], "other.txt: its name does not end in train, valid or test; give it with --name"),
        (["convert", "other.txt", "--name", "a/b"], "--name 'a/b': must be letters"),
        (["convert", "train.txt", "a_train.txt"], "gsm_train.json would be written 2 times"),
        (["convert", "train.txt", "--out", "other.txt"], "other.txt: File exists"),
        (["convert", "bad_test.txt"], "bad_test.txt: none of its 2 lines is an example"),
        (["check", "missing.json"], "missing.json: No such file"),
        (["check", "train.txt"], "train.txt: is not JSON"),
        (["stats", "list.json"], "list.json: must hold a JSON list of records"),
        (["stats", "records.json"], "records.json: record 1 must have the texts question and answer"),
        (["check", "deep.json"], "deep.json: is not JSON"),
    ],
)
def test_unusable_files_say_why(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder_train").mkdir()
    for name, content in {
        "train.txt": GOOD,
        "a_train.txt": GOOD,
        "other.txt": GOOD,
        "bad_test.txt": b"bad\n\n",
        "list.json": b"[]",
        "records.json": json.dumps([GOOD_RECORD, GOOD_RECORD | {"steps": [1]}]).encode(),
        "deep.json": b"[" * 100_000,
    }.items():
        (tmp_path / name).write_bytes(content)
    if arguments[0] == "convert" and "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    assert gsm8k.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"gsm8k.py {arguments[0]}: " in error
    assert message in error
    assert not list(tmp_path.glob("out/*"))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The folder of a server on this machine, with small files in place of the published ones."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name, count in (("train.txt", 3), ("valid.txt", 2), ("test.txt", 1)):
        (folder / name).write_bytes(GOOD * count)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(
        gsm8k,
        "PUBLISHED",
        tuple(
            (replace(file, url=f"http://127.0.0.1:{server.server_port}/{file.name}", size=None, sha256=None), count)
            for (file, _), count in zip(gsm8k.PUBLISHED, (3, 2, 1))
        ),
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("command", ["download", "--download"])
def test_download_converts_the_three_files(command, published, tmp_path):
    assert gsm8k.main([command, "--out", str(tmp_path / "gsm8k")]) == 0
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        assert gsm8k.load(tmp_path / "gsm8k" / f"gsm_{split}.json") == [GOOD_RECORD] * count


def test_download_to_the_folder_the_run_files_read(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gsm8k.main(["--download"]) == 0
    assert (tmp_path / "data" / "gsm8k" / "gsm_train.json").exists()


def test_a_file_with_other_lines_than_published_is_refused(published, tmp_path, capsys):
    (published / "test.txt").write_bytes(GOOD * 2)
    assert gsm8k.main(["download", "--out", str(tmp_path / "out")]) == 2
    assert "test.txt: 2 lines, expected 1; delete it and run this again" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.json"))


def test_a_download_that_fails_says_how_to_go_on(published, tmp_path, capsys):
    (published / "valid.txt").unlink()
    assert gsm8k.main(["download", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gsm8k.py download: http://127.0.0.1:")
    place = tmp_path / "out" / "valid.txt"
    assert error.endswith(
        f"/valid.txt: HTTP 404 File not found; fetch the file by other means and put it at {place}, "
        "or name it to `gsm8k.py convert`\n"
    )


def test_a_folder_that_cannot_be_made_says_so(published, capsys):
    assert gsm8k.main(["download", "--out", str(published / "train.txt")]) == 2
    assert "train.txt: File exists" in capsys.readouterr().err


def test_the_published_files_are_pinned():
    for file, _ in gsm8k.PUBLISHED:
        assert "/e06a32ee5e4cd117171daeb4755d2a97ece62761/" in file.url
    assert [(file.name, lines) for file, lines in gsm8k.PUBLISHED] == [
        ("train.txt", 385_620),
        ("valid.txt", 500),
        ("test.txt", 1_319),
    ]


@pytest.mark.shared
def test_the_shared_validation_set_is_the_pinned_one(valid_text, tmp_path, capsys):
    file, n_lines = gsm8k.PUBLISHED[1]
    (tmp_path / file.name).write_bytes(valid_text.read_bytes())
    assert gsm8k.fetch([file], tmp_path) == [tmp_path / "valid.txt"]  # it is there, so nothing is fetched
    assert "SHA-256 as expected" in capsys.readouterr().out
    assert valid_text.read_bytes().count(b"\n") == n_lines
