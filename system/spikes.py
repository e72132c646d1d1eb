"""Slow spikes: an update that is far too large, or a loss that has risen and stays. No torch here.

    spikes = Spikes()
    found = spikes.see(step, loss, update)      # a Spike, or None

The size of the update (system.movement) is compared with the largest of the last WINDOW steps, so that groups
with a cadence of their own raise no alarm. Above FACTOR times it is a spike: a wrong learning rate, or a
state of the optimizer that is broken.

The smoothed loss is compared with its recent minimum, as a person does who looks at the curve:

    smooth(t) = mean of the losses of steps t-5 .. t without the largest of them
    z(t) = (smooth(t) - lowest smooth of the WINDOW steps before t) / scatter

scatter is 1.4826 times the median distance of the losses of that window from their running mean, and at
least half a per cent of the lowest. Above LIMIT it is a spike. The largest loss is left out, and the scatter
is a median, so that one odd batch (a fast spike: system.rescue) is none and hides none. The limit lies above
what a change of topic does in a small corpus: tests/faults.md has the figures.
"""

import collections
import dataclasses
import itertools
import math
import statistics

SPIKE = "spike"
RECENT, WINDOW = 6, 32  # steps
LEAST = 16  # steps of the window, without which nothing is a spike
LIMIT = 10.0
FLOOR = 0.005  # of the lowest smoothed loss
FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class Spike:
    """What was seen in a step, and the first step that may have caused it."""
    step: int
    since: int
    said: str

    def fields(self) -> dict:
        """The fields of the event `guard`."""
        return {"what": SPIKE, "step": self.step, "since": self.since, "tensors": [],
                "message": f"step {self.step}: {self.said}"}


class Spikes:
    """The detector of a run, which is shown every step in order."""

    def __init__(self) -> None:
        self.losses = collections.deque(maxlen=WINDOW + 2 * RECENT)
        # of each of these losses but the first ones: smoothed, and its distance from the running mean
        self.smooth = collections.deque(maxlen=WINDOW + RECENT + 1)
        self.away = collections.deque(maxlen=WINDOW + RECENT + 1)
        self.updates = collections.deque(maxlen=WINDOW)

    def see(self, step: int, loss: float, update: float) -> Spike | None:
        """The spike that a step shows, or None. loss: finite. update: its size."""
        # zeros, as of a learning rate that begins at 0, are no history
        largest = (max(self.updates) if len(self.updates) >= LEAST else 0.0) or math.inf
        self.add(loss, update)
        if not update <= FACTOR * largest:
            return Spike(step, step, f"the update was {update / largest:.1f} times as large as any of the "
                                     f"{len(self.updates)} before it")
        if (z := self.score()) <= LIMIT:
            return None
        *before, now = [*self.smooth][-WINDOW - 1:]
        lowest = min(before)
        edge = lowest + (now - lowest) / z
        low = max(i for i, x in enumerate(before) if x <= edge)  # the last step that was low
        since = max(0, step - len(before) + low - (RECENT - 1))
        return Spike(step, since, f"the smoothed training loss has risen from {lowest:.4f} to {now:.4f} "
                                  f"since step {since} (z {z:.1f})")

    def add(self, loss: float, update: float) -> None:
        """Take the numbers of the next step."""
        self.updates.append(update)
        self.losses.append(loss)
        if len(self.losses) < RECENT:
            return
        recent = [*itertools.islice(self.losses, len(self.losses) - RECENT, None)]
        self.smooth.append((sum(recent) - max(recent)) / (RECENT - 1))
        self.away.append(abs(loss - sum(recent) / RECENT))

    def score(self) -> float:
        """z of the last step, 0 without a history."""
        if len(self.smooth) < LEAST + RECENT + 1:
            return 0.0
        *before, now = [*self.smooth][-WINDOW - 1:]
        scatter = 1.4826 * statistics.median([*self.away][:-RECENT + 1])
        return (now - min(before)) / max(scatter, FLOOR * min(before), 1e-12)

    def state(self) -> dict:
        """What a checkpoint keeps, as plain JSON values."""
        return {"losses": [*self.losses], "updates": [*self.updates]}

    def load(self, state: dict) -> None:
        """Go on from what a checkpoint has kept; {}: without a history."""
        self.__init__()
        for loss in state.get("losses", ()):
            self.add(loss, 0.0)
        self.updates.clear()
        self.updates.extend(state.get("updates", ()))
