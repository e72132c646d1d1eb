"""`--rescue skip`: leave out the update of a step whose loss or gradient norm is far above those before it.

As in llm.c and OLMo-core: z = (x - mean) / deviation over the last WINDOW steps that were not skipped,
one-sided. A skip leaves parameters, momentum and update counts as they were: one gradient that is 1,000 times
too large would otherwise fill a momentum buffer of 0.95 for 135 steps. The host reads the decision in every
step, because counts of updates are numbers of the host; that wait is why this is an option and not a guard. A
run with it is no record.
"""

import collections
import math
import statistics

import torch

from optim import Bank, Optimizer
from runlog import RunLog
from system.command_line import SKIP
from system.guards import Guards
from system.world import World

WINDOW, LEAST = 128, 20  # steps of the history; without LEAST of them only what is not finite is skipped
LIMIT = 6.0  # z above which a step is skipped
IN_A_ROW = 10  # after so many skips the update is made: what the run meets is no spike
FLOOR = 0.01  # deviations are at least this part of the mean


class Skip:
    """Judges each step before its update, on all processes alike."""

    def __init__(self, world: World, optimizer: Optimizer, guards: Guards, log: RunLog) -> None:
        self.world, self.optimizer, self.guards, self.log = world, optimizer, guards, log
        self.history = {name: collections.deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.step, self.loss, self.in_a_row = 0, None, 0

    def state(self) -> dict:
        """What a checkpoint keeps, as plain JSON values."""
        return {"history": {name: [*x] for name, x in self.history.items()}, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Go on from what a checkpoint has kept."""
        for name, history in self.history.items():
            history.clear()
            history.extend(state["history"][name])
        self.in_a_row = state["in_a_row"]

    def before_update(self, step: int, loss: torch.Tensor) -> None:
        """Announce a step and this process's loss, 0-d float64."""
        self.step, self.loss = step, loss

    def __call__(self, gradients: dict[Bank, tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether the update is made. gradients: as for Guards.watch. Collective; waits for the device."""
        norm = self.optimizer.global_norm(list(gradients), [seen for _, seen in gradients.values()])
        values = {"loss": float(self.world.mean(self.loss)), "gradient norm": float(norm)}
        scores = {name: score(x, self.history[name]) for name, x in values.items()}
        if max(scores.values()) <= LIMIT or self.in_a_row == IN_A_ROW:
            self.in_a_row = 0
            for name, x in values.items():
                if math.isfinite(x):
                    self.history[name].append(x)
            return True
        self.in_a_row += 1
        self.guards.excuse()
        told = ", ".join(f"{name} {x:.4g} (z {scores[name]:.1f})" for name, x in values.items())
        self.log.event("guard", what=SKIP, step=self.step, tensors=[],
                       message=f"step {self.step}: its update is skipped: {told}")
        return False


def score(x: float, history: collections.deque) -> float:
    """Standard score of a value against those before it; inf if it is not finite, 0 if there are too few."""
    if not math.isfinite(x):
        return math.inf
    if len(history) < LEAST:
        return 0.0
    mean = statistics.fmean(history)
    return (x - mean) / max(statistics.pstdev(history, mean), FLOOR * abs(mean), 1e-12)
