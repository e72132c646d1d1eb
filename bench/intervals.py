"""Which intervals of a sweep hold: simulations that chose the method of evidence/statistics.py `successive`.

    python bench/intervals.py                     # the tables of bench/results/intervals.{json,md}, 5 minutes
    python bench/intervals.py --simulations 200 --out /tmp/intervals    # a look

Every arm's true effect is 0, so each row that a method resolves is wrong. Noise of one run: normal, or a
centred gamma distribution of skewness 1 (the largest among committed arms of 8 and more runs) or 2; all arms
of one sd, deviations spread from 0.0048 to 0.0215 (those of ablate_33_micro), one noisy arm among equal ones,
or sds and correlations of each arm as measured in ablate_33_micro; runs of a seed correlated by 0 to 0.98.
Power: share of sweeps that resolve one arm with the effect that the pooled method detects in 80 % of sweeps
of equal, uncorrelated arms. Methods at a promise of 5 %:

pooled      Dunnett's with one pooled variance and sqrt(arms) times as many controls: what stood here before
block       differences within seeds, one pooled residual variance (randomised blocks), Bonferroni
moderated   differences within seeds, variances shrunk to each other (Smyth, 2004), Bonferroni
pretest     pooled where Bartlett's test of equal variances has p > 0.1, otherwise within_seeds
welch       differences of means, own variances and Welch's degrees of freedom (Games-Howell), sqrt(arms)
            times as many controls, Bonferroni; `successive` takes those of the smaller group instead
bootstrap   differences within seeds, seeds resampled, largest |t| of a sweep
seeds_full  differences within seeds, own variances, Bonferroni at the whole 5 %
seeds       the same at SPENT of it: the method of `successive`

A method that holds for arms of any variances cannot use the other arms' runs to know an arm's variance, so
that n pairs give n - 1 degrees of freedom: with uncorrelated seeds none that holds in all cells has more
power than seeds_full (five arms, eight seeds: 38 %, pooled 79 %). It gains only from seeds that correlate.
Welch's test has 67 % there, with more controls, holds for five arms of normal noise and errs in up to 53 %
elsewhere.
"""

import functools
import json
import math
from pathlib import Path

import measure  # first: it finds the repository
import numpy as np
from scipy import integrate, optimize, special, stats

from common import arguments, files
from evidence import statistics

ROOT = Path(__file__).parent.parent
ALPHA = 0.05
LOW, HIGH = 0.0048, 0.0215  # deviations of single arms in ablate_33_micro
SD = math.sqrt(LOW * HIGH)
SKEWNESS = (0, 1, 2)
KINDS = ("equal", "spread", "one noisy", "committed")
CORRELATIONS = (0.0, 0.71, 0.9, 0.98)
METHODS = ("pooled", "block", "moderated", "pretest", "welch", "bootstrap", "seeds_full", "seeds")
BATCH = 1000


# ----- noise ------------------------------------------------------------------------------------------------

def draw(rng: np.random.Generator, skewness: float, *shape: int) -> np.ndarray:
    """Standardised noise: normal, or a centred gamma of this skewness."""
    if not skewness:
        return rng.normal(size=shape)
    k = 4 / skewness ** 2
    return (rng.gamma(k, size=shape) - k) / math.sqrt(k)


@functools.cache
def committed() -> tuple[np.ndarray, np.ndarray]:
    """(sds, loadings on the control's noise) of control and arms of ablate_33_micro."""
    found = json.loads((ROOT / "evidence/results/ablate_33_micro.json").read_text(encoding="utf-8"))
    control = {r["seed"]: r["val_loss"] for r in found["control"]["runs"]}
    sds, loadings = [found["control"]["sd"]], [1.0]
    for row in found["rows"]:
        values = {r["seed"]: r["val_loss"] for r in row["runs"]}
        sds.append(row["sd"])
        loadings.append(float(np.corrcoef(list(values.values()), [control[s] for s in values])[0, 1]))
    return np.array(sds), np.array(loadings)


def sweeps(
    rng: np.random.Generator, count: int, kind: str, rho: float, skewness: float, arms: int, n: int,
    n_control: int
) -> tuple[np.ndarray, np.ndarray]:
    """(control (S, n_control), arms (S, arms, n)): losses of sweeps without any effect."""
    groups = arms + 1
    loading = np.full(groups, math.sqrt(rho))
    if kind == "committed":
        sd, loading = committed()
    elif kind == "spread":
        sd = rng.permuted(np.tile(np.geomspace(LOW, HIGH, groups), (count, 1)), axis=1)
    elif kind == "one noisy":
        sd = np.r_[np.full(arms, SD), HIGH]
    else:
        sd = np.full(groups, SD)
    sd, own = np.broadcast_to(sd, (count, groups))[:, :, None], np.sqrt(1 - loading ** 2)[:, None]
    z = draw(rng, skewness, count, 1, n_control)
    noise = sd * (loading[:, None] * z + own * draw(rng, skewness, count, groups, n_control))
    return noise[:, 0], noise[:, 1:, :n]


# ----- methods: (control, arms) to True for every resolved row, (S, arms) -----------------------------------

@functools.cache
def dunnett_point(arms: int, n: int, n_control: int) -> float:
    """|t| that the largest of the comparisons with one control exceeds in 5 % of sweeps (Dunnett, 1955)."""
    df, shared = arms * (n - 1) + n_control - 1, math.sqrt(n / (n + n_control))
    z, s = np.linspace(-8.5, 8.5, 171), np.linspace(1e-3, 4, 1201)
    weight = stats.chi.pdf(s * math.sqrt(df), df)

    def above(c):
        inside = [(special.ndtr((side * c * s[:, None] + shared * z) / math.sqrt(1 - shared ** 2)))
                  for side in (1, -1)]
        given = integrate.trapezoid((inside[0] - inside[1]) ** arms * stats.norm.pdf(z), z, axis=1)
        return 1 - ALPHA - integrate.trapezoid(given * weight, s) / integrate.trapezoid(weight, s)

    return float(optimize.brentq(above, 1, 20, xtol=1e-6))


def pooled(control: np.ndarray, arms: np.ndarray) -> np.ndarray:
    """Dunnett's procedure with one variance."""
    (_, k, n), m = arms.shape, control.shape[1]
    squares = (arms.var(2, ddof=1) * (n - 1)).sum(1) + control.var(1, ddof=1) * (m - 1)
    se = np.sqrt(squares / (k * (n - 1) + m - 1) * (1 / n + 1 / m))
    return np.abs(arms.mean(2) - control.mean(1)[:, None]) > dunnett_point(k, n, m) * se[:, None]


def within(control: np.ndarray, arms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance) of the differences within seeds."""
    d = arms - control[:, None, :arms.shape[2]]
    return d.mean(2), d.var(2, ddof=1)


def bonferroni(
    mean: np.ndarray, variance: np.ndarray, n: int, df: float | np.ndarray, alpha: float = ALPHA
) -> np.ndarray:
    """Two-sided t tests at alpha over all arms."""
    critical = stats.t.isf(alpha / 2 / mean.shape[1], df)
    return np.abs(mean) > critical * np.sqrt(variance / n)


def block(control: np.ndarray, arms: np.ndarray) -> np.ndarray:
    """Randomised blocks: the seeds' common shifts drop out of one residual variance."""
    y = np.concatenate([control[:, None, :arms.shape[2]], arms], 1)
    _, groups, n = y.shape
    rest = y - y.mean(2, keepdims=True) - y.mean(1, keepdims=True) + y.mean((1, 2), keepdims=True)
    df = (groups - 1) * (n - 1)
    return bonferroni(within(control, arms)[0], 2 * (rest ** 2).sum((1, 2))[:, None] / df, n, df)


def moderated(control: np.ndarray, arms: np.ndarray) -> np.ndarray:
    """Smyth's moderated t (2004): d0 and s0 from the moments of log variance."""
    mean, variance = within(control, arms)
    n, d = arms.shape[2], arms.shape[2] - 1
    e = np.log(variance) - special.digamma(d / 2) + math.log(d / 2)
    excess = np.maximum(e.var(1, ddof=1) - special.polygamma(1, d / 2), 1e-6)
    half = 0.5 + 1 / excess
    for _ in range(30):  # Newton on trigamma(half) = excess
        trigamma = special.polygamma(1, half)
        half = half + trigamma * (1 - trigamma / excess) / special.polygamma(2, half)
    d0 = 2 * half[:, None]
    s0 = np.exp(e.mean(1)[:, None] + special.digamma(d0 / 2) - np.log(d0 / 2))
    return bonferroni(mean, (d0 * s0 + d * variance) / (d0 + d), n, np.minimum(d0 + d, d * mean.shape[1]))


def pretest(control: np.ndarray, arms: np.ndarray) -> np.ndarray:
    """Pooled where Bartlett's test finds no difference of variances."""
    (_, k, n), m = arms.shape, control.shape[1]
    v = np.concatenate([control.var(1, ddof=1)[:, None], arms.var(2, ddof=1)], 1)
    d = np.array([m - 1] + [n - 1] * k)
    log = d.sum() * np.log((v * d).sum(1) / d.sum()) - (np.log(v) * d).sum(1)
    equal = stats.chi2.sf(log / (1 + ((1 / d).sum() - 1 / d.sum()) / (3 * k)), k) > 0.1
    return np.where(equal[:, None], pooled(control, arms), seeds(control, arms, 1))


def welch(control: np.ndarray, arms: np.ndarray) -> np.ndarray:
    """Welch's t tests with their own degrees of freedom."""
    n, m = arms.shape[2], control.shape[1]
    a, c = arms.var(2, ddof=1) / n, control.var(1, ddof=1)[:, None] / m
    df = (a + c) ** 2 / (a ** 2 / (n - 1) + c ** 2 / (m - 1))
    return bonferroni(arms.mean(2) - control.mean(1)[:, None], a + c, 1, df)


def bootstrap(control: np.ndarray, arms: np.ndarray, draws: int = 199) -> np.ndarray:
    """The largest |t| of a sweep against those of resampled seeds, centred."""
    mean, variance = within(control, arms)
    d, n = arms - control[:, None, :arms.shape[2]] - mean[:, :, None], arms.shape[2]
    rng, largest = np.random.default_rng(0), []
    for _ in range(draws):
        again = d[:, :, rng.integers(n, size=n)]
        t = np.abs(again.mean(2)) / np.sqrt(np.maximum(again.var(2, ddof=1), 1e-30) / n)
        largest.append(t.max(1))
    critical = np.quantile(largest, 1 - ALPHA, axis=0)
    return np.abs(mean) > critical[:, None] * np.sqrt(variance / n)


def seeds(control: np.ndarray, arms: np.ndarray, spent: float = statistics.SPENT) -> np.ndarray:
    """Differences within seeds, each arm with its own variance."""
    n = arms.shape[2]
    return bonferroni(*within(control, arms), n, n - 1, spent * ALPHA)


def seeds_full(control: np.ndarray, arms: np.ndarray) -> np.ndarray:
    """The same at the whole level."""
    return seeds(control, arms, 1)


# ----- tables -----------------------------------------------------------------------------------------------

def rates(
    method: str, kind: str, rho: float, skewness: float, arms: int, n: int, count: int, effect: float = 0.0
) -> float:
    """Percent of sweeps in which the method resolves any row (effect 0), or the first arm."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(0, count, BATCH):
        size = min(BATCH, count)
        control, losses = sweeps(rng, size, kind, rho, skewness, arms, n, round(n * arms ** 0.5))
        losses[:, 0] += effect
        found = globals()[method](control, losses)
        hits += int((found[:, 0] if effect else found.any(1)).sum())
    return 100 * hits / (math.ceil(count / BATCH) * size)


def error_rows(count: int) -> list[dict]:
    """Share of sweeps with any false row, per method."""
    rows = []
    for skewness in SKEWNESS:
        for kind in KINDS:
            for rho in CORRELATIONS if kind != "committed" else (None,):
                for arms in (5, 20, 33) if kind != "committed" else (20,):
                    for n in (2, 4, 8):
                        row = {"skewness": skewness, "noise": kind, "correlation": rho, "arms": arms, "n": n}
                        few = min(count, 1000)  # of the resampling method, which is slow
                        rows.append(row | {
                            m: rates(m, kind, rho or 0, skewness, arms, n, few if m == "bootstrap" else count)
                            for m in METHODS if m != "bootstrap" or (n > 2 and rho in (None, 0.9))
                        })
    return rows


def power_rows(count: int) -> list[dict]:
    """Power of the methods in sweeps of equal arms, at the effect that `pooled` shows in 80 % of them."""
    rows = []
    for arms in (5, 20, 33):
        for n in (2, 4, 8):
            m = round(n * arms ** 0.5)
            df = arms * (n - 1) + m - 1
            effect = statistics.shift_for(dunnett_point(arms, n, m), df, 0.8) * SD * math.sqrt(1 / n + 1 / m)
            for rho in CORRELATIONS:
                row, few = {"correlation": rho, "arms": arms, "n": n, "effect": effect}, min(count, 1000)
                rows.append(row | {
                    x: rates(x, "equal", rho, 0, arms, n, few if x == "bootstrap" else count, effect)
                    for x in ("pooled", "block", "welch", "bootstrap", "seeds_full", "seeds")
                    if x != "bootstrap" or (n > 2 and rho == 0.9)
                })
    return rows


def markdown(found: dict) -> str:
    """Both tables, and what they say in figures."""
    def line(cells):
        return "| " + " | ".join(cells) + " |"

    def table(rows, keys):
        head = list(keys) + [x for x in METHODS if any(x in row for row in rows)]
        text = [line(head), line(["---"] * len(head))]
        for row in rows:
            shown = ["measured" if row[k] is None else f"{row[k]:g}" if isinstance(row[k], float) else
                     str(row[k]) for k in keys]
            text.append(line(shown + [f"{row[x]:.1f}" if x in row else "" for x in head[len(keys):]]))
        return text

    worst = {x: {s: max((row[x] for row in found["errors"] if row["skewness"] == s and x in row), default=0)
                 for s in SKEWNESS} for x in METHODS}
    return "\n".join([
        "# Intervals of a sweep: simulated error rates and power", "",
        f"`python bench/intervals.py`, {found['simulations']} sweeps a cell (bootstrap at most 1,000), so a "
        f"rate of 5 % has a standard error of {100 * math.sqrt(.0475 / found['simulations']):.2f}. What the "
        "methods are stands at the top of bench/intervals.py.", "",
        "## Largest share of sweeps with any false row, percent (promise: 5)", "",
        line(["skewness", *METHODS]), line(["---"] * (1 + len(METHODS))),
        *(line([str(s), *(f"{worst[x][s]:.1f}" for x in METHODS)]) for s in SKEWNESS), "",
        "## Power in sweeps of equal arms, percent", "",
        *table([{k: v for k, v in r.items() if k != "effect"} for r in found["power"]],
               ("arms", "n", "correlation")), "",
        "## Share of sweeps with any false row, percent", "",
        *table(found["errors"], ("skewness", "noise", "correlation", "arms", "n"))]) + "\n"


def main() -> None:
    """Simulate and write both files."""
    p = arguments.Parser(prog="bench/intervals.py", description=__doc__.splitlines()[0])
    p.add_argument("--simulations", type=arguments.integer(1), default=4000, metavar="S",
                   help="simulated sweeps a cell (default 4000)")
    p.add_argument("--out", default=str(ROOT / "bench/results/intervals"), metavar="NAME",
                   help="writes NAME.json and NAME.md (default bench/results/intervals)")
    options = p.parse_args()
    found = {"simulations": options.simulations, "spent": statistics.SPENT, "alpha": ALPHA,
             "code": measure.about()["code"], "errors": error_rows(options.simulations),
             "power": power_rows(options.simulations)}
    files.write(Path(options.out + ".json"), files.json_text(found, indent=1) + "\n")
    files.write(Path(options.out + ".md"), markdown(found))
    print(markdown(found).split("## Share")[0])


if __name__ == "__main__":
    main()
