"""The one exception that stands for a mistake a user can mend, and what its messages suggest."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Printed as one line that names the culprit and the remedy; exit code 2, never a traceback."""


def near(word: str, words: Iterable[str]) -> str:
    """' (did you mean ...?)' or ''."""
    return did_you_mean(difflib.get_close_matches(word, words, n=3, cutoff=0.55))


def did_you_mean(names: Sequence[str]) -> str:
    """" (did you mean X or Y?)", or nothing without names."""
    return f" (did you mean {' or '.join(names)}?)" if names else ""
