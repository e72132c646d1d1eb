"""Candidate classes of a sampled softmax (record 92): the targets of a batch, filled up from a sweep of all
classes.

Each logical rank goes through the classes in the order k -> 20011 k mod V, from its own start; a batch takes
up where the one before left off.
"""

import numpy as np

from common.errors import UserError
from settings.data import LOGICAL_RANKS

STRIDE = 20011  # has no factor in common with the sizes of vocabularies in use
SPARE = 256  # classes drawn beyond 1.7 times those that are lacking, most of which are new


def require_room(rank: int, targets: int, size: int) -> None:
    """UserError if a logical rank has more distinct targets in a step than there are candidates."""
    if targets > size:
        raise UserError(f"model.head.candidates.sizes: rank {rank} has {targets} distinct targets in a step, "
                        f"and {size} candidates: give at least as many")


class Sweep:
    """The sweep of one logical rank. classes: V. offset: place in the order of classes."""

    def __init__(self, classes: int, rank: int) -> None:
        self.classes, self.offset = classes, classes * rank // LOGICAL_RANKS
        if np.gcd(STRIDE, classes) != 1:
            raise UserError(f"model.head.candidates: a sweep of {classes} classes in steps of {STRIDE} does "
                            "not reach all of them: set another model.pad_vocab_to")

    def candidates(self, targets: np.ndarray, size: int) -> np.ndarray:
        """`size` classes in growing order (int64), all of `targets` among them.

        If there are more distinct targets, these. The sweep moves on only if classes are lacking. A window of
        it with too few new classes is passed over for evenly spaced ones.
        """
        taken = np.zeros(self.classes, bool)
        taken[targets.reshape(-1)] = True
        lacking = size - int(taken.sum())
        if lacking <= 0:
            return np.flatnonzero(taken)
        drawn = min(self.classes, int(1.7 * lacking) + SPARE)
        window = STRIDE * (self.offset + np.arange(drawn, dtype=np.int64)) % self.classes
        self.offset = (self.offset + drawn) % self.classes
        fresh = window[~taken[window]]
        if len(fresh) < lacking:
            free = np.flatnonzero(~taken)
            fresh = free[::max(1, len(free) // lacking)]
        taken[fresh[:lacking]] = True
        return np.flatnonzero(taken)
