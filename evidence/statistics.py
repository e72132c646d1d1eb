"""The statistics of records, comparisons and sweeps. Losses in nats per token, times in any one unit.

Every function takes plain lists and returns plain numbers. A value that is not finite, an empty group or a
nonsensical level is a UserError that names it. What cannot be known from the data is None, never a guess:
there is no spread and no interval from one run, and none from runs that agree to the last bit (deterministic
repeats are one run, not many). Distributions and tests are scipy's; `tests/test_statistics.py` simulates the
error rates that are promised here.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from common import environment
from common.errors import UserError

try:
    from scipy import optimize, stats
except ImportError as error:
    raise UserError(environment.without(error)) from None

ROUNDING = 1e-12  # a spread below this share of the values' size is rounding, not variation
LAST_POINTS = 5  # validations from which the slope at the end of a curve is taken
MOST_RUNS = 10_000  # more fresh runs than anyone will make
# Share of a sweep's promised error rate that its tests use. The rest covers skewed noise, under which a t
# test of few runs errs more often than it says (bench/intervals.py, bench/results/intervals.md).
SPENT = 0.75


def numbers(values: Iterable[float], name: str, least: int = 1) -> np.ndarray:
    """`values` as a float array of finite numbers, at least `least` of them.

    UserError, which names the values by `name`, if they are not.
    """
    try:
        array = np.asarray(list(values), dtype=float)
    except (TypeError, ValueError):
        raise UserError(f"{name}: expected a list of numbers, got {values!r:.80}") from None
    if array.ndim != 1 or len(array) < least:
        raise UserError(f"{name}: {len(array)} values, at least {least} needed")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"{name}: value {bad + 1} of {len(array)} is {array[bad]}; a diverged run has no "
                        "loss to average, it must be counted as failed")
    return array


def level(value: float, name: str) -> float:
    """A probability strictly between 0 and 1, or a UserError."""
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise UserError(f"{name} {value}: must lie between 0 and 1")
    return float(value)


def spread(array: np.ndarray) -> float | None:
    """Standard deviation with n-1; None for one value; exactly 0.0 where the values differ by
    rounding only."""
    if len(array) < 2:
        return None
    sd = float(array.std(ddof=1))
    return sd if sd > ROUNDING * float(np.abs(array).max()) else 0.0


def describe(values: Iterable[float], name: str = "values") -> dict:
    """n, mean, sd (n-1) and standard error of the mean; sd and se are None for one value."""
    x = numbers(values, name)
    sd = spread(x)
    return {
        "n": len(x), "mean": float(x.mean()), "sd": sd, "se": None if sd is None else sd / math.sqrt(len(x))
    }


# ----- one group against a fixed target ---------------------------------------------------------------------

def target_test(losses: Iterable[float], target: float, alpha: float = 0.01, name: str = "losses") -> dict:
    """One-sided t test that the mean loss lies below `target`: the speedrun's rule with alpha = 0.01.

    passed: p < alpha. margin: how far below the target the mean must lie at this n and sd. runs_for: the
    number of runs at which a FRESH set passes with 90 % power if this mean and sd were the true ones (None:
    never, or above 10,000); it sizes a new experiment and must not be used to extend this one. t, p, margin
    and runs_for are None, and passed is False, for one run or for runs without any spread: such a set shows
    nothing about the next run.
    """
    x, alpha = numbers(losses, name), level(alpha, "alpha")
    target = float(numbers([target], "target")[0])
    out = describe(x) | {
        "target": target, "alpha": alpha, "t": None, "p": None, "passed": False, "margin": None,
        "runs_for": None
    }
    if out["sd"]:
        test = stats.ttest_1samp(x, target, alternative="less")
        out |= {"t": float(test.statistic), "p": float(test.pvalue), "passed": bool(test.pvalue < alpha),
                "margin": float(stats.t.isf(alpha, len(x) - 1)) * out["se"],
                "runs_for": runs_for(target - out["mean"], out["sd"], alpha)}
    return out


def standardised(groups: Iterable[Iterable[float]]) -> list[float]:
    """All residuals of groups of runs in units of their group's sd, as one centred list. Groups without
    spread are left out."""
    arrays = [x for x in (numbers(values, "group", 2) for values in groups) if spread(x)]
    pool = np.concatenate([(x - x.mean()) / spread(x) for x in arrays])
    return (pool - pool.mean()).tolist()


def bootstrap_t(n: int, residuals: Sequence[float], draws: int = 100_000, seed: int = 0) -> np.ndarray:
    """Sorted one-sample t of `draws` samples of n residuals, whose mean is 0: t under this noise."""
    pool, rng, found = np.asarray(residuals), np.random.default_rng(seed), []
    for _ in range(0, draws, 10_000):
        x = rng.choice(pool, (10_000, n))
        found.append(x.mean(1) / np.maximum(x.std(1, ddof=1), 1e-300) * math.sqrt(n))
    return np.sort(np.concatenate(found))


def runs_for(distance: float, sd: float, alpha: float = 0.01, power: float = 0.9) -> int | None:
    """Least n >= 2 whose one-sided t test at `alpha` detects a mean `distance` below the target;
    None above 10,000."""
    if distance <= 0 or sd <= 0:
        return None
    n = np.arange(2, MOST_RUNS + 1)
    # beyond a normal approximation's n plus a little the answer is certain, so few quantiles are needed
    rough = ((stats.norm.isf(alpha) + stats.norm.ppf(power)) * sd / distance) ** 2
    n = n[: int(min(rough + 20, MOST_RUNS))]
    reached = stats.nct.sf(stats.t.isf(alpha, n - 1), n - 1, distance / sd * np.sqrt(n)) >= power
    return int(n[reached][0]) if reached.any() else None


def z_rule(
    mean: float, n: int, target: float = 3.28, needed: float = 0.004, sigma: float = 0.0013
) -> dict:
    """Rule of the optimizer track: (target - mean) sqrt(n) >= needed. Works for n = 1,
    since the sd is taken as known.

    p: of the z test behind it with sd 0.0013, where 0.004 stands for 3.08 sd, p = 0.001. Met up to rounding,
    as means are published with few digits.
    """
    score = float((target - numbers([mean], "mean")[0]) * math.sqrt(n))
    return {"score": score, "p": float(stats.norm.sf(score / sigma)), "passed": score >= needed - 1e-9}


def z_pairwise(
    new: float, n_new: int, old: float, n_old: int, steps_saved: int, slope: float = 0.0045,
    needed: float = 0.004, sigma: float = 0.0013
) -> dict:
    """Pairwise rule of the optimizer track: (old - new + slope steps_saved / 100) / sqrt(1/n
    + 1/n') >= needed.

    new, old: mean losses. slope: what 100 steps are worth at the end of result 12 (nats). p: one-sided, of
    the z test.
    """
    new, old = numbers([new, old], "mean")
    score = float((old - new + slope * steps_saved / 100) / math.sqrt(1 / n_new + 1 / n_old))
    return {"score": score, "p": float(stats.norm.sf(score / sigma)), "passed": score >= needed - 1e-9}


def spend(looks: Iterable[int], alpha: float = 0.01) -> list[float]:
    """How much of alpha each look may use: shares proportional to the runs it adds; they sum to alpha.

    looks: cumulative numbers of runs, like [4, 8, 12]. The bound is Bonferroni's, so the false record rate is
    at most alpha whatever the correlation of the looks (linear spending after Lan and DeMets, 1983, without
    its gain from the correlation, which would need the variance to be known).
    """
    alpha, looks = level(alpha, "alpha"), list(looks)
    if not looks or any(isinstance(n, bool) or not isinstance(n, int) for n in looks):
        raise UserError(f"looks {looks}: expected whole numbers of runs, like [4, 8, 12]")
    if looks[0] < 2 or any(b <= a for a, b in zip(looks, looks[1:])):
        raise UserError(f"looks {looks}: cumulative runs must rise, from at least 2")
    alphas = [alpha * (n - before) / looks[-1] for before, n in zip([0, *looks], looks[:-1])]
    return [*alphas, alpha - sum(alphas)]


# ----- two groups -------------------------------------------------------------------------------------------

def pairs_of(a: Iterable[float], b: Iterable[float], paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Both groups as arrays; equally long if paired."""
    a, b = numbers(a, "first group"), numbers(b, "second group")
    if paired and len(a) != len(b):
        raise UserError(f"pairs need equal numbers of runs, got {len(a)} and {len(b)}; compare them unpaired")
    return a, b


def two_groups(a: np.ndarray, b: np.ndarray, paired: bool) -> tuple[float, float | None, float | None]:
    """(estimate, standard error, df) of mean a - mean b: paired t, or Welch.

    Standard error and df are None if there are too few runs to estimate them.
    The standard error is 0.0 with df None where all runs of both groups (paired: all differences) are equal.
    """
    estimate = float(a.mean() - b.mean())
    if paired:
        d = a - b
        if len(d) < 2:
            return estimate, None, None
        sd, size = float(d.std(ddof=1)), float(max(np.abs(a).max(), np.abs(b).max()))
        if sd <= ROUNDING * size:
            return estimate, 0.0, None
        return estimate, sd / math.sqrt(len(d)), len(d) - 1
    if min(len(a), len(b)) < 2:
        return estimate, None, None
    va, vb = spread(a) ** 2 / len(a), spread(b) ** 2 / len(b)
    if va + vb == 0:
        return estimate, 0.0, None
    return estimate, math.sqrt(va + vb), float((va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)))


def difference(a: Iterable[float], b: Iterable[float], paired: bool, confidence: float = 0.95) -> dict:
    """Mean of a minus mean of b with a two-sided t interval (paired, or Welch's for unequal variances).

    low, high, p and df are None where the data give no spread (one run per group, or runs without variation);
    if all runs of both groups, or the two of each pair, are equal, low = high = 0 and p = 1. correlation: of
    the pairs (Pearson); None if unpaired, with fewer than three pairs or with a constant group.
    """
    confidence = level(confidence, "confidence")
    a, b = pairs_of(a, b, paired)
    estimate, se, df = two_groups(a, b, paired)
    out = {
        "estimate": estimate, "low": None, "high": None, "p": None, "df": df, "correlation": None,
        "paired": bool(paired)
    }
    if df is not None:
        half = float(stats.t.isf((1 - confidence) / 2, df)) * se
        out |= {
            "low": estimate - half, "high": estimate + half,
            "p": float(2 * stats.t.sf(abs(estimate) / se, df))
        }
    elif se == 0 and same(a, b):
        out |= {"estimate": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    if paired and len(a) > 2 and spread(a) and spread(b):
        out["correlation"] = float(np.corrcoef(a, b)[0, 1])
    return out


def same(a: np.ndarray, b: np.ndarray) -> np.bool_:
    """Whether two groups without spread agree up to rounding."""
    return abs(a.mean() - b.mean()) <= ROUNDING * np.abs(a).max()


def ratio(a: Iterable[float], b: Iterable[float], paired: bool, confidence: float = 0.95) -> dict:
    """Ratio a / b of positive quantities (times) with an interval; p_less: one-sided p of "a is below b".

    Works on logarithms: the estimate is the ratio of geometric means, which for times that vary by a percent
    is the ratio of the means to 1e-4. None as in `difference`; equal groups give 1 with p_less = 1.
    """
    confidence = level(confidence, "confidence")
    a, b = pairs_of(a, b, paired)
    for name, x in (("first", a), ("second", b)):
        if (x <= 0).any():
            raise UserError(f"{name} group: {x.min():g} is not a positive time")
    estimate, se, df = two_groups(np.log(a), np.log(b), paired)
    out = {"estimate": math.exp(estimate), "low": None, "high": None, "p_less": None, "df": df}
    if df is not None:
        half = float(stats.t.isf((1 - confidence) / 2, df)) * se
        out |= {"low": math.exp(estimate - half), "high": math.exp(estimate + half),
                "p_less": float(stats.t.cdf(estimate / se, df))}
    elif se == 0 and same(a, b):
        out |= {"estimate": 1.0, "low": 1.0, "high": 1.0, "p_less": 1.0}
    return out


def noninferior(
    new: Iterable[float], old: Iterable[float], margin: float, paired: bool, alpha: float = 0.01
) -> dict:
    """Whether the new loss is worse by less than `margin` nats:
    upper (1 - alpha) bound of new - old below the margin.

    upper is None, and passed False, where the data give no spread; if all losses, or both of each pair, are
    equal it is 0.
    """
    alpha = level(alpha, "alpha")
    if not isinstance(margin, (int, float)) or not 0 < margin < math.inf:
        raise UserError(f"margin {margin}: expected a positive loss difference, like 0.002")
    new, old = pairs_of(new, old, paired)
    estimate, se, df = two_groups(new, old, paired)
    upper = None
    if df is not None:
        upper = estimate + float(stats.t.isf(alpha, df)) * se
    elif se == 0 and same(new, old):
        upper = estimate = 0.0
    return {"estimate": estimate, "upper": upper, "margin": float(margin), "alpha": alpha,
            "passed": upper is not None and upper < margin}


# ----- many groups ------------------------------------------------------------------------------------------

def pooled(groups: Sequence[np.ndarray]) -> tuple[float | None, int]:
    """(sd, df) of the variation within groups, weighted by their degrees of freedom. sd is None at df = 0."""
    df = sum(len(x) for x in groups) - len(groups)
    if df == 0:
        return None, 0
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in groups)
    sd = math.sqrt(squares / df)
    return (sd if sd > ROUNDING * max(float(np.abs(x).max()) for x in groups) else 0.0), df


def by_seed(values: dict[int, float] | Sequence[float], name: str) -> dict[int, float]:
    """{seed: loss} of a group: a dict as it is, a list counted from seed 0."""
    found = values if isinstance(values, dict) else dict(enumerate(values))
    return dict(zip(found, numbers(list(found.values()), name).tolist()))


def successive(
    groups: dict[str, dict[int, float] | Sequence[float]], pairs: Iterable[tuple[str, str]],
    confidence: float = 0.95, paired: bool = False
) -> dict:
    """Differences mean(child) - mean(parent) for each (child, parent) of `pairs`, each with its own error.

    Args:
        groups: name -> losses, as {seed: loss} or as a list whose place is the seed.
        pairs: (child, parent), each child once. Rows are named by child.
        paired: differences within the seeds that both have, and their t interval with n - 1 degrees of
            freedom; exact for normal noise whatever the spread of each group and their correlation.
            Otherwise differences of means with Welch's error and the degrees of freedom of the smaller
            group, which never errs more often than it says under normal noise (Mickey and Brown, 1966);
            Welch's own degrees of freedom give up to 47 % of false sweeps (bench/results/intervals.md).

    No variance is pooled over groups: the spread of differences varies 200-fold within a committed sweep, and
    bench/intervals.py shows what pooling costs then. p and the intervals are Bonferroni's over all pairs at
    SPENT of the level: a row is `resolved` (p < 1 - confidence, an interval without 0) wrongly for any pair
    in at most 1 - confidence of sweeps, and all intervals hold together in at least `confidence` of them,
    also with moderately skewed noise. low, high and p are None without a spread of the row; a row whose runs
    are equal to the last bit is 0 with p = 1. sd: of the differences (paired). pooled_sd and df: the spread
    within groups, told for its size and used for nothing.
    """
    confidence = level(confidence, "confidence")
    groups = {name: by_seed(values, str(name)) for name, values in groups.items()}
    pairs = list(pairs)
    if not pairs or len({child for child, _ in pairs}) < len(pairs):
        raise UserError("pairs: expected (child, parent) with each child once")
    for name in (name for pair in pairs for name in pair):
        if name not in groups:
            raise UserError(f"pairs name {name!r}, which has no runs; groups: {', '.join(map(str, groups))}")
    rows = {c: {"parent": p} | one_row(groups[c], groups[p], paired, SPENT * (1 - confidence) / len(pairs))
            for c, p in pairs}
    for row in rows.values():
        if row["p"] is not None:
            p = min(1.0, row["p"] * len(pairs) / SPENT)
            row |= {"p": p, "resolved": p < 1 - confidence}
    sd, df = pooled([np.array(list(x.values())) for x in groups.values()])
    return {"pooled_sd": sd, "df": df, "rows": rows}


def one_row(child: dict[int, float], parent: dict[int, float], paired: bool, alpha: float) -> dict:
    """A row of `successive` by itself, with an interval at 1 - alpha. child, parent: {seed: loss}."""
    common = [seed for seed in child if seed in parent] if paired else []
    if paired and not common:
        raise UserError("pairs need a seed that both groups have; compare them unpaired")
    a, b = ([x[seed] for seed in common] if paired else list(x.values()) for x in (child, parent))
    found = difference(a, b, paired, 1 - alpha)
    if not paired and found["df"]:
        estimate, se, _ = two_groups(np.array(a), np.array(b), False)
        df = min(len(a), len(b)) - 1
        half = float(stats.t.isf(alpha / 2, df)) * se
        found |= {"low": estimate - half, "high": estimate + half,
                  "p": float(2 * stats.t.sf(abs(estimate) / se, df))}
    sd = spread(np.array(a) - np.array(b)) if paired and found["df"] else None
    return {"n": len(a), "mean": float(np.mean(a)), "effect": found["estimate"], "low": found["low"],
            "high": found["high"], "p": found["p"], "resolved": False, "sd": sd}


def minimal_detectable_effect(
    sd: float, n: int, n_control: int, arms: int, confidence: float = 0.95, power: float = 0.8,
    paired: bool = False
) -> float:
    """The effect (unit of sd) that one arm of n runs shows as resolved with probability `power` (two-sided).

    arms: number of comparisons. sd: of the differences within seeds if paired (then n_control is n),
    otherwise of single runs, equal in both groups.
    """
    confidence, power = level(confidence, "confidence"), level(power, "power")
    if power < 0.5:
        raise UserError(f"power {power}: at least 0.5, less is not a plan")
    if not 0 < sd < math.inf or min(n, n_control) < 2 or arms < 1:
        raise UserError(
            f"{arms} arms of {n} runs and {n_control} controls with sd {sd}: no spread could be estimated; "
            "plan at least two runs of each and give a positive sd")
    if paired:
        se, df = sd / math.sqrt(n), n - 1
    else:
        se, df = sd * math.sqrt(1 / n + 1 / n_control), min(n, n_control) - 1
    return shift_for(float(stats.t.isf(SPENT * (1 - confidence) / 2 / arms, df)), df, power) * se


def seeds_for(
    effect: float, sd: float, arms: int = 1, confidence: float = 0.95, power: float = 0.8,
    paired: bool = False
) -> int | None:
    """Least n >= 2 runs of each arm, and of the control, that resolve an effect with this power;
    None above MOST_RUNS."""
    if not (0 < effect < math.inf and 0 < sd < math.inf):
        raise UserError(f"effect {effect} and sd {sd}: must be positive numbers")

    def shown(n):
        return minimal_detectable_effect(sd, n, n, arms, confidence, power, paired) <= effect

    low, high = 1, 2  # shown at high, not at low
    while not shown(high):
        low, high = high, 2 * high
        if low > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high if high <= MOST_RUNS else None


def shift_for(critical: float, df: float, power: float) -> float:
    """The effect, in standard errors, whose t passes the critical value with probability `power`."""
    # resolved on the wrong side is left out: at this power it happens in less than 1e-6 of sweeps
    if critical > 40:  # scipy's noncentral t loses its digits there; t is then ruled by its denominator
        return critical * math.sqrt(float(stats.chi2.ppf(power, df)) / df)

    def lacking(shift):
        return power - stats.nct.sf(critical, df, shift)

    high = critical
    while lacking(high) > 0:
        high *= 1.5
    return float(optimize.brentq(lacking, 0.0, high, xtol=1e-6))


# ----- curves and ranks -------------------------------------------------------------------------------------

def equivalent(loss_difference: float, curve_points: Iterable[Sequence[float]]) -> dict:
    """What a loss difference is worth in steps, and in seconds, at the end of a curve.

    curve_points: (step, val_loss) or (step, val_loss, train_time_ms), in order. The slope is that of a
    straight line through the last five validations (at least three); steps = difference / -slope, so a loss
    that is higher by the difference lies `steps` behind (negative: ahead). steps_se and seconds_se carry the
    slope's standard error only; that of the difference comes on top. A curve still bends where the line is
    drawn, and a shorter schedule is not an earlier point of a longer one, so this is an order of magnitude.
    Never beyond the fitted range: then steps is None and reason says why.
    """
    difference_ = float(numbers([loss_difference], "loss difference")[0])
    out = {
        "steps": None, "steps_se": None, "seconds": None, "seconds_se": None, "slope": None, "slope_se": None,
        "points": 0, "reason": None
    }
    points = [tuple(p) for p in curve_points][-LAST_POINTS:]
    if any(len(p) not in (2, 3) for p in points) or any(b[0] <= a[0] for a, b in zip(points, points[1:])):
        raise UserError("curve: expected (step, val_loss[, train_time_ms]) with rising steps")
    for p in points:
        numbers(p, "curve")
    out["points"] = len(points)
    if len(points) < 3:
        return out | {"reason": f"{len(points)} validations, a slope needs three"}
    steps, losses = (np.array([p[i] for p in points], dtype=float) for i in (0, 1))
    fit = stats.linregress(steps, losses)
    out |= {"slope": float(fit.slope), "slope_se": float(fit.stderr)}
    if fit.slope >= -2 * fit.stderr or fit.slope == 0:
        return out | {"reason": "the last validations do not fall by more than twice the slope's error"}
    worth = difference_ / -fit.slope
    if abs(worth) > steps[-1] - steps[0]:
        return out | {"reason": f"the difference is worth more than the {steps[-1] - steps[0]:.0f} steps "
                                "that were fitted"}
    out |= {"steps": float(worth), "steps_se": float(abs(worth * fit.stderr / fit.slope))}
    if all(len(p) == 3 for p in points) and points[-1][2] > points[0][2]:
        step_s = (points[-1][2] - points[0][2]) / 1000 / (steps[-1] - steps[0])
        out |= {"seconds": float(out["steps"] * step_s), "seconds_se": float(out["steps_se"] * step_s)}
    return out


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a share of k in n, after Wilson (JASA 1927)."""
    if not 0 <= k <= n or n < 1:
        raise UserError(f"share {k} of {n}: expected 0 <= k <= n and n at least 1")
    z = float(stats.norm.isf((1 - level(confidence, "confidence")) / 2))
    middle, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def rank_correlation(x: Iterable[float], y: Iterable[float], confidence: float = 0.95) -> dict:
    """Spearman's rho of paired values with Fisher's interval (variance after Bonett and Wright, 2000).

    rho is None with fewer than three pairs or a constant side; the interval is None with fewer than five
    pairs or a perfect order, where the approximation has nothing to say.
    """
    (x, y), confidence = pairs_of(x, y, paired=True), level(confidence, "confidence")
    out = {"rho": None, "low": None, "high": None, "n": len(x)}
    if len(x) < 3 or not spread(x) or not spread(y):
        return out
    rho = float(stats.spearmanr(x, y).statistic)
    out["rho"] = rho
    if len(x) >= 5 and abs(rho) < 1 - 1e-9:
        half = float(stats.norm.isf((1 - confidence) / 2)) * math.sqrt((1 + rho ** 2 / 2) / (len(x) - 3))
        out |= {"low": math.tanh(math.atanh(rho) - half), "high": math.tanh(math.atanh(rho) + half)}
    return out
