"""The statistics of records, comparisons and sweeps. Losses in nats per token, times in any one unit.

Every function takes plain lists and returns plain numbers. A value that is not finite, an empty group or a
nonsensical level is a UserError that names it. What cannot be known from the data is None, never a guess:
there is no spread and no interval from one run, and none from runs that agree to the last bit (deterministic
repeats are one run, not many). Distributions and tests are scipy's; `tests/test_statistics.py` simulates the
error rates that are promised here.
"""

import math

import numpy as np

from common import environment
from common.errors import UserError

try:
    from scipy import optimize, special, stats
except ImportError as error:
    raise UserError(environment.without(error)) from None

ROUNDING = 1e-12  # a spread below this share of the values' size is rounding, not variation
LAST_POINTS = 5  # validations from which the slope at the end of a curve is taken
MOST_RUNS = 10_000  # more fresh runs than anyone will make


def numbers(values, name, least=1):
    """`values` as a float array of finite numbers, at least `least` of them;
    else a UserError naming `name`."""
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


def level(value, name):
    """A probability strictly between 0 and 1, or a UserError."""
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise UserError(f"{name} {value}: must lie between 0 and 1")
    return float(value)


def spread(array):
    """Standard deviation with n-1; None for one value; exactly 0.0 where the values differ by
    rounding only."""
    if len(array) < 2:
        return None
    sd = float(array.std(ddof=1))
    return sd if sd > ROUNDING * float(np.abs(array).max()) else 0.0


def describe(values, name="values"):
    """n, mean, sd (n-1) and standard error of the mean; sd and se are None for one value."""
    x = numbers(values, name)
    sd = spread(x)
    return {
        "n": len(x), "mean": float(x.mean()), "sd": sd, "se": None if sd is None else sd / math.sqrt(len(x))
    }


# ----- one group against a fixed target ---------------------------------------------------------------------

def target_test(losses, target, alpha=0.01, name="losses"):
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


def runs_for(distance, sd, alpha=0.01, power=0.9):
    """Least n >= 2 whose one-sided t test at `alpha` detects a mean `distance` below the target;
    None above 10,000."""
    if distance <= 0 or sd <= 0:
        return None
    n = np.arange(2, MOST_RUNS + 1)
    # beyond a normal approximation's n plus a little the answer is certain,
    # so that few quantiles are computed
    rough = ((stats.norm.isf(alpha) + stats.norm.ppf(power)) * sd / distance) ** 2
    n = n[: int(min(rough + 20, MOST_RUNS))]
    reached = stats.nct.sf(stats.t.isf(alpha, n - 1), n - 1, distance / sd * np.sqrt(n)) >= power
    return int(n[reached][0]) if reached.any() else None


def z_rule(mean, n, target=3.28, needed=0.004, sigma=0.0013):
    """Rule of the optimizer track: (target - mean) sqrt(n) >= needed. Works for n = 1,
    since the sd is taken as known.

    p: of the z test behind it with sd 0.0013, where 0.004 stands for 3.08 sd, p = 0.001. Met up to rounding,
    as means are published with few digits.
    """
    score = float((target - numbers([mean], "mean")[0]) * math.sqrt(n))
    return {"score": score, "p": float(stats.norm.sf(score / sigma)), "passed": score >= needed - 1e-9}


def z_pairwise(new, n_new, old, n_old, steps_saved, slope=0.0045, needed=0.004, sigma=0.0013):
    """Pairwise rule of the optimizer track: (old - new + slope steps_saved / 100) / sqrt(1/n
    + 1/n') >= needed.

    new, old: mean losses. slope: what 100 steps are worth at the end of result 12 (nats). p: one-sided, of
    the z test.
    """
    new, old = numbers([new, old], "mean")
    score = float((old - new + slope * steps_saved / 100) / math.sqrt(1 / n_new + 1 / n_old))
    return {"score": score, "p": float(stats.norm.sf(score / sigma)), "passed": score >= needed - 1e-9}


def spend(looks, alpha=0.01):
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

def pairs_of(a, b, paired):
    """Both groups as arrays; equally long if paired."""
    a, b = numbers(a, "first group"), numbers(b, "second group")
    if paired and len(a) != len(b):
        raise UserError(f"pairs need equal numbers of runs, got {len(a)} and {len(b)}; compare them unpaired")
    return a, b


def two_groups(a, b, paired):
    """(estimate, standard error, df) of mean a - mean b: paired t, or Welch. (estimate, None,
    None) if unknowable.

    The standard error is 0.0 with df None where all runs of both groups (paired: all differences) are equal.
    """
    estimate = float(a.mean() - b.mean())
    if paired:
        d = a - b
        if len(d) < 2:
            return estimate, None, None
        sd, size = float(d.std(ddof=1)), float(max(np.abs(a).max(), np.abs(b).max()))
        return (estimate, sd / math.sqrt(len(d)), len(d) - 1) if sd > ROUNDING * size else (estimate, 0.0,
                                                                                            None)
    if min(len(a), len(b)) < 2:
        return estimate, None, None
    va, vb = spread(a) ** 2 / len(a), spread(b) ** 2 / len(b)
    if va + vb == 0:
        return estimate, 0.0, None
    return estimate, math.sqrt(va + vb), float((va + vb)**2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)))


def difference(a, b, paired, confidence=0.95):
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


def same(a, b):
    """Whether two groups without spread agree up to rounding."""
    return abs(a.mean() - b.mean()) <= ROUNDING * np.abs(a).max()


def ratio(a, b, paired, confidence=0.95):
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


def noninferior(new, old, margin, paired, alpha=0.01):
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

def pooled(groups):
    """(sd, df) of the variation within groups, weighted by their degrees of freedom. sd is None at df = 0."""
    df = sum(len(x) for x in groups) - len(groups)
    if df == 0:
        return None, 0
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in groups)
    sd = math.sqrt(squares / df)
    return (sd if sd > ROUNDING * max(float(np.abs(x).max()) for x in groups) else 0.0), df


def against_control(control, arms, confidence=0.95):
    """Each arm's mean minus the control's, with intervals that hold for all arms at once (Dunnett,
    JASA 1955).

    arms: name -> values. Variance pooled over all groups. p is adjusted, so that `resolved` (p < 1 -
    confidence, which is an interval without 0) is wrong for any arm in at most that share of sweeps. low,
    high and p are None and nothing is resolved if no group has two runs, or no run differs from another of
    its group.
    """
    confidence, control = level(confidence, "confidence"), numbers(control, "control")
    if not arms:
        raise UserError("no arm to compare with the control")
    groups = {name: numbers(values, name) for name, values in arms.items()}
    counts = [len(x) for x in groups.values()]
    sd, df = pooled([control, *groups.values()])
    critical = dunnett_point(counts, len(control), df, confidence) if sd else None
    rows = {}
    for name, x in groups.items():
        effect, row = float(x.mean() -
                            control.mean()), {"low": None, "high": None, "p": None, "resolved": False}
        if sd:
            se = sd * math.sqrt(1 / len(x) + 1 / len(control))
            p = dunnett_p(abs(effect) / se, counts, len(control), df)
            row = {"low": effect - critical * se, "high": effect + critical * se, "p": p,
                   "resolved": abs(effect) > critical * se}
        rows[name] = {"n": len(x), "mean": float(x.mean()), "effect": effect, **row}
    return {"pooled_sd": sd, "df": df, "rows": rows}


def dunnett_below(c, counts, n_control, df):
    """Probability that |t| stays below c in all comparisons of groups of `counts` runs with
    one control of n_control.

    Given the control's error z and the pooled sd s (unit: true sd) the comparisons are independent, so the 1
    + len(counts) fold integral is a double one of smooth functions, done here by the trapezoid rule (in z and
    in log s) to 1e-9. scipy.stats.dunnett computes the same by quasi Monte Carlo to 2e-4 (the reference of
    the tests): 100 s for 80 arms.
    """
    z = np.linspace(-8.5, 8.5, 171)
    weight_z = np.exp(-z ** 2 / 2)
    low, high = np.log([stats.chi2.ppf(1e-14, df) / df, stats.chi2.isf(1e-14, df) / df]) / 2
    s = np.exp(np.linspace(low, high, 301))
    weight_s = stats.chi2.pdf(df * s ** 2, df) * s ** 2
    inside = np.ones((len(s), len(z)))
    for n, times in zip(*np.unique(counts, return_counts=True)):
        shared = math.sqrt(n / (n + n_control))
        own = math.sqrt(1 - shared ** 2)
        high, low = ((side * c * s[:, None] + shared * z) / own for side in (1, -1))
        inside *= (special.ndtr(high) - special.ndtr(low)) ** times
    return float(weight_s @ inside @ weight_z / weight_s.sum() / weight_z.sum())


def dunnett_p(t, counts, n_control, df):
    """Adjusted two-sided p of one |t|; between the unadjusted p and Bonferroni's,
    which also keeps tiny values exact."""
    single = float(2 * stats.t.sf(t, df))
    return min(max(1 - dunnett_below(t, counts, n_control, df), single), len(counts) * single, 1.0)


def dunnett_point(counts, n_control, df, confidence=0.95):
    """The |t| that the largest of the comparisons exceeds in 1 - confidence of sweeps."""
    single, bonferroni = (float(stats.t.isf((1 - confidence) / 2 / k, df)) for k in (1, len(counts)))
    if len(counts) == 1:
        return single
    return float(
        optimize.brentq(
            lambda c: dunnett_below(c, counts, n_control, df) - confidence, 0.999 * single,
            1.001 * bonferroni, xtol=1e-9
        )
    )


def successive(groups, pairs, confidence=0.95):
    """Differences along a chain: mean(child) - mean(parent) for each (child, parent) of `pairs`;
    rows are named by child.

    Variance pooled over all groups. p is adjusted after Holm (1979) and decides `resolved`, so that any
    difference is wrongly resolved in at most 1 - confidence of chains; the intervals are Bonferroni's, a
    little wider than Holm's test: a resolved row may touch 0 by a hair. None as in `against_control`.
    """
    confidence = level(confidence, "confidence")
    groups = {name: numbers(values, name) for name, values in groups.items()}
    pairs = list(pairs)
    if not pairs or len({child for child, _ in pairs}) < len(pairs):
        raise UserError("pairs: expected (child, parent) with each child once")
    for name in (name for pair in pairs for name in pair):
        if name not in groups:
            raise UserError(f"pairs name {name!r}, which has no runs; groups: {', '.join(groups)}")
    sd, df = pooled(list(groups.values()))
    rows = {}
    for child, parent in pairs:
        x, y = groups[child], groups[parent]
        rows[child] = {
            "parent": parent, "n": len(x), "mean": float(x.mean()), "effect": float(x.mean() - y.mean()),
            "low": None, "high": None, "p": None, "resolved": False
        }
        if sd:
            se = sd * math.sqrt(1 / len(x) + 1 / len(y))
            half = float(stats.t.isf((1 - confidence) / 2 / len(pairs), df)) * se
            effect = rows[child]["effect"]
            rows[child] |= {
                "low": effect - half, "high": effect + half, "p": float(2 * stats.t.sf(abs(effect) / se, df))
            }
    if sd:
        for row, p in zip(rows.values(), holm([row["p"] for row in rows.values()])):
            row |= {"p": p, "resolved": p < 1 - confidence}
    return {"pooled_sd": sd, "df": df, "rows": rows}


def holm(ps):
    """Holm's step-down adjusted p-values, in the order given."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def minimal_detectable_effect(sd, n, n_control, arms, confidence=0.95, power=0.8):
    """The effect (unit of sd) that one arm of n runs shows as resolved with probability `power` (Dunnett,
    two-sided).

    arms: number of arms of n runs each, against a control of n_control. sd: a pilot's or an earlier sweep's.
    """
    confidence, power = level(confidence, "confidence"), level(power, "power")
    if power < 0.5:
        raise UserError(f"power {power}: at least 0.5, less is not a plan")
    df = arms * (n - 1) + n_control - 1
    if not 0 < sd < math.inf or min(n, n_control, arms) < 1 or df < 1:
        raise UserError(
            f"{arms} arms of {n} runs and {n_control} controls with sd {sd}: no spread could be estimated; "
            "plan at least two runs of one of them and give a positive sd")
    shift = shift_for(dunnett_critical(arms, n, n_control, confidence), df, power)
    return shift * sd * math.sqrt(1 / n + 1 / n_control)


def seeds_for(effect, sd, arms=1, confidence=0.95, power=0.8):
    """Least n >= 2 runs of each arm, and of the control, that resolve an effect with this power;
    None above MOST_RUNS."""
    if not (0 < effect < math.inf and 0 < sd < math.inf):
        raise UserError(f"effect {effect} and sd {sd}: must be positive numbers")

    def shown(n):
        return minimal_detectable_effect(sd, n, n, arms, confidence, power) <= effect

    low, high = 1, 2  # shown at high, not at low
    while not shown(high):
        low, high = high, 2 * high
        if low > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high if high <= MOST_RUNS else None


def shift_for(critical, df, power):
    """The effect, in standard errors, whose t passes the critical value with probability `power`."""
    # resolved on the wrong side is left out: at this power it happens in less than 1e-6 of sweeps
    def lacking(shift):
        return power - stats.nct.sf(critical, df, shift)

    high = critical
    while lacking(high) > 0:
        high *= 1.5
    return float(optimize.brentq(lacking, 0.0, high, xtol=1e-6))


def dunnett_critical(arms, n, n_control, confidence=0.95):
    """dunnett_point of a sweep of `arms` arms of n runs each, with the df of its pooled variance."""
    return dunnett_point([n] * arms, n_control, arms * (n - 1) + n_control - 1, confidence)


# ----- curves and ranks -------------------------------------------------------------------------------------

def equivalent(loss_difference, curve_points):
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


def rank_correlation(x, y, confidence=0.95):
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
