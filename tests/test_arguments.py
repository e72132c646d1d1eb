"""Numbers on command lines: what no program can compute with is refused in one line, by every program."""

import argparse

import pytest

from common import arguments

HUGE = "9" * 5000  # int() of CPython refuses to convert it


@pytest.mark.parametrize(
    "kind, text",
    [
        (arguments.seed, "-1"), (arguments.seed, str(2**63)), (arguments.seed, HUGE), (arguments.seed, "²"),
        (arguments.seed, "1e3"), (arguments.seed, ""), (arguments.runs, "0"), (arguments.runs, HUGE),
        (arguments.temperature, "nan"), (arguments.temperature, "inf"), (arguments.temperature, "1e-300"),
        (arguments.temperature, "-0.5"), (arguments.confidence, "nan"), (arguments.confidence, "1"),
        (arguments.probability, "0"), (arguments.probability, "1e400"), (arguments.rising, "8,4"),
        (arguments.rising, ","), (arguments.steps_range, "²:4"), (arguments.steps_range, "4"),
        (arguments.steps_range, f"0:{HUGE}")
    ],
)
def test_a_number_that_would_crash_later_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        kind(text)
    assert len(str(refused.value)) < 200 and "got '" in str(refused.value)


def test_numbers_within_the_bounds_are_taken():
    assert arguments.seed(str(arguments.SEED_LIMIT)) == 2 ** 63 - 1
    assert arguments.seed("0" * 5000 + "7") == 7
    assert arguments.temperature("0") == 0 and arguments.temperature("0.8") == 0.8
    assert arguments.rising("4,8") == [4, 8] and arguments.steps_range("10:14") == (10, 14)


def test_a_refusal_is_one_line(capsys):
    p = arguments.Parser(prog="x")
    p.add_argument("--seed", type=arguments.seed)
    for words in (["--seed", "a\nb"], ["--sed", "1"], ["--seed"]):
        with pytest.raises(SystemExit) as end:
            p.parse_args(words)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_an_unknown_option_of_a_command_names_the_command_s_help(capsys):
    program = arguments.Parser(prog="records")
    program.add_subparsers(dest="command").add_parser("submit").add_argument("name")
    with pytest.raises(SystemExit) as ended:
        program.parse_args(["submit", "x", "--dry-run"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --dry-run; `records submit --help` explains the arguments\n"
    )
