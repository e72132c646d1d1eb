"""Command lines: a parser whose errors are one line, and types that keep every number within
what the programs can compute.

A type is what `add_argument(type=...)` takes: a function of the typed text that returns the number, or
raises. Bounds are stated here, once, so that no number passes a check and crashes later. No torch here.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from common import console

# torch's generators take 64 bits; a warm-up adds 1 and comparisons count on from the first seed
SEED_LIMIT = 2 ** 63 - 1
COUNT_LIMIT = 10 ** 9  # of anything that is counted out one by one: steps, tokens, seconds
RUNS_LIMIT = 10_000  # of one arm: a plan lists every run


class Parser(argparse.ArgumentParser):
    """argparse whose refusal is one line on stderr, without the usage, and exit code 2;
    help that was lost is an error."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message and console.speaks():
            self._print_message(message, sys.stderr)
        sys.exit(console.settle(status))

    def add_subparsers(self, **options: Any) -> Any:
        return super().add_subparsers(**({"parser_class": Command} | options))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; `{self.prog} --help` explains the arguments\n")


class Command(Parser):
    """The parser of one command of a program: it refuses an unknown option itself, so that the error names
    the help of the command."""

    def parse_known_args(self, *args: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(*args, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def shortened(text: str, length: int = 40) -> str:
    """The text quoted as typed, cut to a length that leaves a message readable."""
    return repr(text if len(text) <= length else text[:length - 1] + "...")


def integer(low: int, high: int = COUNT_LIMIT) -> Callable[[str], int]:
    """Type: a whole number in low..high, in plain digits."""
    def parse(text: str) -> int:
        # int() itself fails at thousands of digits
        typed = re.fullmatch(r"([+-]?)0*([0-9]{1,20})", text.strip())
        value = int("".join(typed.groups())) if typed else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {high}, got {shortened(text)}")
        return value
    return parse


def number(low: float, high: float = 1e9, *, above: bool = False,
           below: bool = False) -> Callable[[str], float]:
    """Type: a finite number in low..high. above, below: the limit itself is not allowed."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low) or (below and value == high):
            limits = f"from {low:g} to {high:g}"
            if above or below:
                limits = (
                    f"{'above' if above else 'at least'} {low:g} and {'below' if below else 'at most'} "
                    f"{high:g}"
                )
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {shortened(text)}")
        return value
    return parse


def rising(text: str) -> list[int]:
    """Type: whole numbers that rise, like 4,8,16."""
    counts = [integer(1, RUNS_LIMIT)(part) for part in text.split(",")]
    if any(a >= b for a, b in zip(counts, counts[1:])):
        raise argparse.ArgumentTypeError(f"expected rising numbers like 4,8,16, got {shortened(text)}")
    return counts


def steps_range(text: str) -> tuple[int, int]:
    """Type: A:B with A < B, like 10:14."""
    start, colon, end = text.partition(":")
    try:
        found = (integer(0)(start), integer(1)(end))
    except argparse.ArgumentTypeError:
        found = (0, 0)
    if not colon or found[0] >= found[1]:
        raise argparse.ArgumentTypeError(f"expected A:B with A < B, like 10:14, got {shortened(text)}")
    return found


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def interval(text: str) -> tuple[str, float] | None:
    """Type: every so many steps (`100`), or after so much time (`90s`, `10m`, `2h`); None for `never`.

    Returns ("steps", n) or ("seconds", t).
    """
    typed = re.fullmatch(r"([0-9]{1,9})([smh]?)", text.strip())
    if text.strip() == "never":
        return None
    if typed is None or int(typed[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"expected steps like 100, a time like 90s, 10m or 2h, or never, got {shortened(text)}")
    return ("seconds", int(typed[1]) * UNITS[typed[2]]) if typed[2] else ("steps", int(typed[1]))


def duration(text: str) -> tuple[str, float] | None:
    """Type: a time like `90s`, `10m` or `2h` as ("seconds", t); None for `never`."""
    found = interval(text)
    if found is not None and found[0] == "steps":
        raise argparse.ArgumentTypeError(
            f"expected a time like 90s, 10m or 2h, or never, got {shortened(text)}")
    return found


def temperature(text: str) -> float:
    """Type: 0 (the most likely token), or a number by which logits can be divided without overflow."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value != 0 and not 1e-3 <= value <= 1e3:
        raise argparse.ArgumentTypeError(f"expected 0 or a number from 0.001 to 1000, got {shortened(text)}")
    return value


seed = integer(0, SEED_LIMIT)
first_seed = integer(0, 2 ** 62)  # of many: those counted on from it are seeds too
runs = integer(1, RUNS_LIMIT)
confidence = number(0, 1, above=True, below=True)
probability = number(0, 1, above=True)  # top-p
