"""Slow spikes of the training loss: a rise that stays, which no single step shows. No torch here.

    spikes = Spikes()
    found = spikes.see(step, loss)      # a Spike, or None

The smoothed loss is compared with its recent minimum, as a person does who looks at the curve:

    smooth(t) = mean of the losses of steps t-5 .. t without the largest of them
    z(t) = (smooth(t) - lowest smooth of the 32 steps before t) / scatter

scatter is 1.4826 times the median distance of the losses of that window from their running mean, and at
least half a per cent of the lowest. Above LIMIT it is a spike. The largest loss is left out, and the scatter
is a median, so that one odd batch (a fast spike: system.rescue) is none and hides none. tests/spikes.md has
the scores of undisturbed runs and of runs with a burst of the learning rate.
"""

import collections
import dataclasses
import itertools
import statistics

SPIKE = "spike"
RECENT, WINDOW = 6, 32  # steps
LEAST = 16  # steps of the window, without which nothing is a spike
LIMIT = 5.0
FLOOR = 0.005  # of the lowest smoothed loss


@dataclasses.dataclass(frozen=True)
class Spike:
    """A rise of the loss: the step that showed it, and the first step that may have caused it."""
    step: int
    since: int
    loss: float
    lowest: float
    z: float

    def fields(self) -> dict:
        """The fields of the event `guard`."""
        return {"what": SPIKE, "step": self.step, "since": self.since, "tensors": [], "message": (
            f"step {self.step}: the smoothed training loss has risen from {self.lowest:.4f} to "
            f"{self.loss:.4f} since step {self.since} (z {self.z:.1f})"
        )}


class Spikes:
    """The detector of a run, which is shown the loss of every step in order."""

    def __init__(self) -> None:
        self.losses = collections.deque(maxlen=WINDOW + 2 * RECENT)
        # of each of these losses but the first ones: smoothed, and its distance from the running mean
        self.smooth = collections.deque(maxlen=WINDOW + RECENT + 1)
        self.away = collections.deque(maxlen=WINDOW + RECENT + 1)

    def add(self, loss: float) -> None:
        """Take the loss of the next step."""
        self.losses.append(loss)
        if len(self.losses) < RECENT:
            return
        recent = [*itertools.islice(self.losses, len(self.losses) - RECENT, None)]
        self.smooth.append((sum(recent) - max(recent)) / (RECENT - 1))
        self.away.append(abs(loss - sum(recent) / RECENT))

    def see(self, step: int, loss: float) -> Spike | None:
        """The spike that the loss of this step shows, or None. loss: finite."""
        self.add(loss)
        if len(self.smooth) < LEAST + RECENT + 1:
            return None
        *before, now = [*self.smooth][-WINDOW - 1:]
        lowest = min(before)
        scatter = max(1.4826 * statistics.median([*self.away][:-RECENT + 1]), FLOOR * lowest)
        z = (now - lowest) / scatter
        if z <= LIMIT:
            return None
        low = max(i for i, x in enumerate(before) if x <= lowest + scatter)  # the last step that was low
        return Spike(step, max(0, step - len(before) + low - (RECENT - 1)), now, lowest, z)

    def state(self) -> dict:
        """What a checkpoint keeps, as plain JSON values."""
        return {"losses": [*self.losses]}

    def load(self, state: dict) -> None:
        """Go on from what a checkpoint has kept."""
        self.__init__()
        for loss in state["losses"]:
            self.add(loss)
