"""What the schedules over a run are: `schedule.*`. schedule.py makes the steps of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import REFUSE, opt


@dataclass(frozen=True)
class MatrixLR:
    """Learning rate of the parameters of role `matrix`, in place of the run's (optimizer track, result 5).

    Constant after the warm-up, then the cooldown to the floor, over schedule.horizon like the run's.
    """
    warmup_steps: int = opt(0, "learning-rate warm-up, linear", unit="step", off=0, shrink="steps", least=0)
    warmup_from_zero: bool = opt(False, "learning rate 0 in the first step, and the full one after the "
                                        "warm-up's last (off: both a step earlier)", off=False,
                                 needs="schedule.matrix.warmup_steps")
    cooldown_frac: float = opt(1.0, "cooldown as a fraction of the steps", off=0.0,
                               idle="schedule.matrix.cooldown_steps", least=0, most=1)
    cooldown_steps: int | float = opt(0, "cooldown in steps, in place of cooldown_frac", unit="step", off=0,
                                      shrink="steps", least=0)
    cooldown_power: float = opt(1.0, "power of the cooldown", off=1.0, above=0)
    floor: float = opt(0.0, "learning-rate factor at the end of the cooldown", off=0.0, least=0, most=1)
    horizon: int | None = opt(None, "steps over which it is laid out, in place of schedule.horizon (result "
                                    "27)", unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        if self.horizon is not None and self.horizon < s.schedule.steps:
            yield (f"schedule.matrix.horizon = {self.horizon} is shorter than the run: set it to "
                   f"schedule.steps = {s.schedule.steps} at least")


@dataclass(frozen=True)
class LateHorizon:
    """Another horizon of the learning rate from a step on (@jn2clark, claims from 2625 steps of the optimizer
    track: 2840 in place of 2900)."""
    start: int = opt(1400, "first step with it", unit="step", off=REFUSE, shrink="steps", least=1)
    steps: int = opt(2840, "steps over which the learning rate is laid out from then on", unit="step",
                     off=REFUSE, shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        if self.steps < s.schedule.steps:
            yield (f"schedule.late_horizon.steps = {self.steps} is shorter than the run: set it to "
                   f"schedule.steps = {s.schedule.steps} at least")


@dataclass(frozen=True)
class Schedule:
    """The schedules over the steps of a run (axis ml).

    The scheduled steps are those before the extension. Fractions of a run are fractions of them.
    """
    steps: int = opt(19560, "optimizer steps, those of the extension included", unit="step", off=REFUSE,
                     shrink="steps", least=1, most=1_000_000)
    extension_steps: int = opt(0, "extension (record 35): the last steps, after the end of all schedules; at "
                                  "most an eighth of the steps, so that a short trial has its schedules too",
                               unit="step", off=0, shrink="steps", least=0)
    extension_at: float = opt(1.0, "point at which the schedules stand during the extension, as a fraction "
                                   "of the scheduled steps (records 35 to 45 stop just before the end)",
                              off=1.0, needs="schedule.extension_steps", above=0, most=1)
    lr_spans_extension: bool = opt(False, "learning rate that falls during the extension too: its "
                                          "fractions are of all steps (record 41)", off=False,
                                   needs="schedule.extension_steps")
    lr: Literal["cosine", "trapezoid"] = opt(
        "cosine", "shape of the learning rate after its warm-up. cosine: a half cosine to zero. trapezoid: "
                  "constant, then linear over the cooldown")
    warmup_steps: int = opt(700, "learning-rate warm-up, linear", unit="step", off=0, shrink="steps", least=0)
    cooldown_frac: float = opt(0.0, "cooldown as a fraction of the steps, in place of cooldown_steps",
                               off=0.0, needs="schedule.lr=trapezoid", least=0, most=1)
    lr_floor: float = opt(0.0, "learning-rate factor at the end of the cooldown", off=0.0,
                          needs="schedule.lr=trapezoid", least=0, most=1)
    lr_peaks: tuple[tuple[float, float], ...] = opt(
        (), "learning-rate jumps (record 46), for batches that grow: pairs of a fraction of the scheduled "
        "steps and a factor. Beyond that fraction, the cooldown starts from this factor in place of 1",
        off=(), needs="schedule.lr=trapezoid", least=0
    )
    cooldown_steps: int | float = opt(0, "cooldown, the linear decay at the end", unit="step", off=0,
                                      needs="schedule.lr=trapezoid", shrink="steps", least=0)
    cooldown_power: float = opt(1.0, "power of the cooldown: the linear fall is raised to it (PowerCool of "
                                     "the optimizer track: 1.2)", off=1.0, needs="schedule.lr=trapezoid",
                                above=0)
    horizon: int | None = opt(
        None, "steps over which the learning rate is laid out, which may be more than the run has: the run "
        "then stops before the end of its cooldown (off: schedule.steps)", unit="step",
        needs="schedule.lr=trapezoid", shrink="steps", least=1
    )
    late_horizon: LateHorizon | None = opt(None, "late horizon: another one from a step on",
                                           needs="schedule.horizon")
    matrix: MatrixLR | None = opt(None, "own learning-rate schedule of the block matrices",
                                  needs="schedule.lr=trapezoid")
    stages: tuple[float, ...] = opt(
        (), "stages of the run: fractions of the scheduled steps, which add up to 1. A setting that has one "
        "value per stage goes through its values in this order and keeps the last one in the extension",
        off=(), above=0
    )
    stage_peaks: tuple[float, ...] = opt(
        (), "learning-rate factor of each stage (record 65), from which the cooldown starts, in place of "
            "lr_peaks",
        off=(), needs="schedule.lr=trapezoid", above=0
    )
    whole_steps: bool = opt(
        False, "whole steps (record 65): a stage ends, the cooldown begins and head and "
        "embedding part at a whole step, and what changes within a stage goes by its "
        "own steps (off: by fractions of the run)", off=False, needs="schedule.stages"
    )

    @property
    def extension(self) -> int:
        """Steps of the extension."""
        return min(self.extension_steps, self.steps // 8)

    def check(self, s: Any) -> Iterator[str]:
        if self.stages and abs(sum(self.stages) - 1) > 1e-6:
            yield f"schedule.stages = {list(self.stages)}: must add up to 1, the whole run"
        if self.cooldown_frac and self.cooldown_steps:
            yield ("schedule.cooldown_frac and schedule.cooldown_steps exclude each other: set one of them "
                   "to 0")
        if self.stage_peaks and len(self.stage_peaks) != len(self.stages):
            yield (f"schedule.stage_peaks has {len(self.stage_peaks)} factors and schedule.stages has "
                   f"{len(self.stages)}: give one factor per stage")
        if self.stage_peaks and self.lr_peaks:
            yield "schedule.stage_peaks and schedule.lr_peaks exclude each other: leave one empty"
        if self.horizon is not None and self.horizon < self.steps:
            yield (f"schedule.horizon = {self.horizon} is shorter than the run: set it to schedule.steps = "
                   f"{self.steps} at least")
        if self.horizon is not None and (self.extension_steps or self.stages):
            yield ("schedule.horizon ends a run before its schedules do: leave schedule.extension_steps and "
                   "schedule.stages off")
        ends = [end for end, _ in self.lr_peaks]
        if ends != sorted(set(ends)) or ends and ends[-1] >= 1:
            yield (f"schedule.lr_peaks = {[list(pair) for pair in self.lr_peaks]}: must list growing "
                   "fractions below 1, each with a factor")
