"""Scales and precisions: the same record at a smaller size, or with every number in one dtype.

    scaled(settings, "tiny")   sizes, budget and precision of a scale, by the `shrink=` of each field
    lifted(settings)           system.precision, by the `exact=` of each field

No record and no setting is named in a list here.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from settings import Settings
from settings.data import LOGICAL_RANKS, row_limit, tokens_per_step
from settings.declare import AS_IS, PRECISION, PRODUCTS
from settings.optim import BLOCK_MATRICES, LABELS, Optim


@dataclass(frozen=True)
class Scale:
    """Divisors of a record's sizes and the budget in training tokens (None: the record's own value)."""
    width: int
    length: int
    batch: int
    budget_tokens: int | None
    validation_tokens: int | None
    vocab_size: int | None
    precision: str

    @property
    def embedded(self) -> bool:
        """Whether it is a scale for a CPU: a run reads the embedded corpus, whose vocabulary is small."""
        return self.vocab_size is not None


# Chosen on models shaped like records 1, 5, 11, 33, 57 and 89; docs/scales.md says why. The vocabulary of
# the embedded corpus is 256 bytes + 1000 merges + end of text, the small image of GPT-2's 256 + 50,000 + 1.
# The CPU scales lift the precision plan to float32, which is faster than bfloat16 at these widths
# (bench/throughput.py).
SCALES = {
    "full": Scale(1, 1, 1, None, None, None, "record"),
    "small": Scale(1, 1, 8, 40_000_000, 2_097_152, None, "record"),
    "tiny": Scale(8, 16, 128, 720_896, 65_536, 1257, "float32"),
    "mini": Scale(16, 16, 256, 1_048_576, 65_536, 1257, "float32"),
    "micro": Scale(16, 16, 512, 73_728, 8_192, 1257, "float32"),
}


def rules(scale: Scale, steps: int, ratio: float) -> dict[str, Callable]:
    """The rules that `shrink=` of a field names: value at full scale -> value at this scale.

    Args:
        steps: optimizer steps at this scale.
        ratio: steps / the record's steps.
    """
    return {
        "width": lambda v: v // scale.width,
        "length": lambda v: max(1, v // scale.length),
        "length0": lambda v: v // scale.length,
        "batch": lambda v: v // scale.batch,
        "batch1": lambda v: max(1, v // scale.batch),  # divisor of a sum over tokens; 1: of none
        "vocab": lambda v: scale.vocab_size or v,
        "width_quads": lambda v: max(4, v // scale.width // 4 * 4),  # for pairs of which half rotate
        "vocab_share": lambda v: max(2, v * scale.vocab_size // 50257) if scale.vocab_size else v,
        # hashed rows, in two halves; more than 16 a token are no question for a CPU
        "hash_rows": lambda v: (max(2, min(v * scale.vocab_size // 50257, 16 * scale.vocab_size)) // 2 * 2
                                if scale.vocab_size else v),
        "validation": lambda v: scale.validation_tokens,
        "rsqrt_width": lambda v: v * math.sqrt(scale.width),  # terms in 1/sqrt(width)
        "turns": lambda v: v / scale.length,  # of a rotary pair within a window
        "steps": lambda v: max(1, round(v * ratio)) if v else 0,
        "eighth": lambda v: max(1, round(steps / 8)),  # enough validations for a curve
        "late": lambda v: max(1, round(steps / 32)),
        "target": lambda v: None,  # a target belongs to a scale and a corpus; presets set their own
        "reread": lambda v: True,  # a small corpus is read again, and the log says how often
        "precision": lambda v: scale.precision,
    }


def scaled(s: Settings, name: str) -> Settings:
    """The settings at a scale.

    Widths, lengths and the batch are divided by the scale's divisors. Every setting counted in steps is
    multiplied by steps / record's steps (and stays at least 1 if it was). At the scales for a CPU some
    learning rates follow the batch and the width (`rated`). Head counts and windows in blocks stay. A row is
    never longer than a rank's share of the batch or of the validation tokens.
    """
    scale = SCALES[name]
    if name == "full":
        return s
    steps = max(1, round(scale.budget_tokens * scale.batch / tokens_per_step(s)))
    s = shrunk(s, rules(scale, steps, steps / s.schedule.steps))
    if scale.embedded:
        s = dataclasses.replace(s, optim=rated(s, scale))
    data = dataclasses.replace(s.data, seq_len=min(s.data.seq_len, row_limit(s)))
    rows = s.validation.tokens // LOGICAL_RANKS
    validation = dataclasses.replace(s.validation, seq_len=min(s.validation.seq_len, rows))
    return dataclasses.replace(s, data=data, validation=validation)


def rated(s: Settings, scale: Scale) -> Optim:
    """The optimizer's settings with the peak learning rates of a scale for a CPU.

    Measured at widths of 48 and 96 and batches of 1/128 to 1/512 (docs/scales.md):

    - Learned scalars: 1/sqrt(batch divisor). A smaller batch has noisier gradients, whose size AdamW divides
      away, so that a scalar wanders by its learning rate in each step.
    - The head, and block matrices that AdamW updates: sqrt(width divisor). AdamW moves each entry by the
      learning rate, and a narrower layer sums over fewer entries. A head whose logits are divided by
      sqrt(width) gains this factor there. Gates stay: they read as many channels at any width.
    - Muon with scale = sqrt_max: sqrt(width divisor), which that scale loses. In its other forms the size of
      an update does not depend on the width.
    """
    o, wider, calmer = s.optim, math.sqrt(scale.width), 1 / math.sqrt(scale.batch)
    factors = dict.fromkeys(("scalar", *LABELS["scalar"]), calmer)
    factors |= {name: wider for name in BLOCK_MATRICES if o.group("matrix", name).rule == "adamw"}
    factors["matrix"] = wider
    if s.model.head.logit_scale != "rsqrt_dim":
        factors["lm_head"] = wider
    if o.muon and o.muon.scale == "sqrt_max":
        factors["muon"] = wider
    changes = {}
    for name, factor in factors.items():
        group = getattr(o, name)
        if group is not None and group.lr is not None:
            changes[name] = dataclasses.replace(group, lr=group.lr * factor)
    return dataclasses.replace(o, **changes)


def shrunk(node: object, rule: dict[str, Callable]) -> object:
    """A dataclass whose fields, nested ones too, went through the rules that they name; None stays None."""
    changes = {}
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = shrunk(value, rule)
        elif f.metadata["shrink"] and value is not None:
            changes[f.name] = elementwise(rule[f.metadata["shrink"]], value)
    return dataclasses.replace(node, **changes)


def elementwise(rule: Callable, value: object) -> object:
    """rule(value); for a setting with one value per stage, the rule applied to each value."""
    return tuple(elementwise(rule, v) for v in value) if isinstance(value, tuple) else rule(value)


# ----- precision --------------------------------------------------------------------------------------------

# system.precision -> values of the fields whose `exact` is PRECISION or PRODUCTS. Products are half of a tiny
# step on a CPU, and those of bfloat16 take half the time (docs/performance.md).
LIFTS = {
    "float32": {PRECISION: "float32", PRODUCTS: "matmul"},
    "float64": {PRECISION: "float64", PRODUCTS: "matmul"},
    "bf16_matmul": {PRECISION: "float32", PRODUCTS: "bfloat16"},
}


def lifted(s: Settings, named: Collection[str] = ()) -> Settings:
    """The settings with every dtype set to that of system.precision, unless this is `record`; the hash tells
    it.

    Args:
        named: paths that `--set` assigns. Such a field keeps its value, and so does a field with a named path
            above or below it, because `--set` is literal.
    """
    if s.system.precision == "record":
        return s
    values = LIFTS[s.system.precision]

    def lift(node, prefix):
        changes = {}
        for f in dataclasses.fields(node):
            path, value, exact = prefix + f.name, getattr(node, f.name), f.metadata["exact"]
            if path in named:
                continue
            if exact == AS_IS and dataclasses.is_dataclass(value):
                changes[f.name] = lift(value, path + ".")
            elif exact != AS_IS and not any(n.startswith(path + ".") for n in named):
                changes[f.name] = values.get(exact, exact)
        return dataclasses.replace(node, **changes)

    return lift(s, "")


def lift_lines(before: Settings, s: Settings) -> list[str]:
    """One line on what `lifted` changed from `before`, or none."""
    old, new = before.numerics, s.numerics
    moved = [f for f in dataclasses.fields(new) if getattr(old, f.name) != getattr(new, f.name)]
    off = [f.name for f in moved if f.metadata["exact"] in (None, False)]
    dtypes = [f.name for f in moved if f.name not in off]
    parts = [", ".join(dtypes)] if dtypes else []
    parts += [f"without {', '.join(off)}"] if off else []
    return [f"numerics lifted to {s.system.precision}: {'; '.join(parts)}"] if moved else []
