"""`python -m records variants`: the figures of the variants in docs/variants.md.

Parameters and FLOPs are counted on the full-width models, without values; step times come from the last table
that bench/experts.py left in bench/results, losses from the chains of sweep.py in evidence/results.
"""

import textwrap
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import untrusted
from common.arguments import Parser
from common.errors import UserError
from page import facts
from page.markdown import difference_text, line
from settings import deltas
from system.dry_run import context_text, flops

TIMES = Path(__file__).parent.parent / "bench/results/cpu_variants.json"


def arguments(p: Parser) -> None:
    """It has none."""


def run(options: Namespace) -> int:
    """`records variants`: print the table of variants as Markdown."""
    site = gather()
    print(markdown(site, read_times(TIMES)))
    print(*balance_table(latest_runs(site)), sep="\n")
    return 0


def gather() -> dict[str, Any]:
    """The part of facts.gather that the sweeps of variants need, in a second."""
    records = deltas.load_records()
    return {
        "records": records, "history": facts.read_history(records),
        "sweeps": facts.read_sweeps(facts.EVIDENCE)
    }


def read_times(path: Path) -> dict[str, Any]:
    """The JSON of bench/experts.py."""
    try:
        return untrusted.json_file(path)
    except UserError as error:
        raise UserError(
            f"{path}: cannot be read ({error}): write it with bench/experts.py --out {path}"
        ) from None


def counted(ref: str) -> tuple[int, int, float]:
    """(parameters, those active in a token, FLOPs of a token in training) at full width."""
    from model import without_values
    s = deltas.resolve(ref).settings
    model = without_values(s)
    return model.num_parameters(), model.num_active(), sum(flops(s, model))


def markdown(site: dict, times: dict) -> str:
    """The table, its caption, and where the time of the mixtures goes."""
    records, variants, measured = site["records"], facts.variants_of(site), facts.variants_measured(site)
    timed = {row["record"]: row for row in times["rows"]}
    heads = [
        "variant", "parameters, active", "FLOPs", "step time", *(f"loss at {scale}" for scale in measured),
        "what"
    ]
    lines = [line(heads), "|" + "---|" * len(heads)]
    parents = dict.fromkeys(r.parent for r in variants.values() if r.parent not in variants)
    for ref in parents:
        size, active, _ = counted(ref)
        lines.append(
            line(
                [
                    ref, sizes(size, active), 1, 1, *(control_loss(site, scale, ref) for scale in measured),
                    records[ref].title
                ]
            )
        )
    for ref, r in variants.items():
        (size, active, cost), parent_cost = counted(ref), counted(r.parent)[2]
        time = f"{timed[ref]['ratio']:.2f}" if ref in timed else "not measured"
        lines.append(line([ref, sizes(size, active), f"{cost / parent_cost:.3f}", time,
                           *(difference_text(found.get(ref)) for found in measured.values()), r.title]))
    return "\n".join([*lines, "", *caption(parents, times, measured), *where_time_goes(timed)])


def sizes(size: int, active: int) -> str:
    """Parameters and active parameters, in millions."""
    return f"{size / 1e6:.0f} M, {active / 1e6:.0f} M"


def control_loss(site: dict, scale: str, ref: str) -> str:
    """Mean final loss of a parent in the sweep of the variants at a scale."""
    control = facts.sweeps_of(site, "chain", scale, variants=True)[-1]["control"]
    return f"{control['mean']:.4f}, n {control['n']}" if control["arm"] == ref else ""


def caption(parents: Iterable[str], times: dict, measured: Iterable[str]) -> list[str]:
    """What the columns mean."""
    context = "; ".join(f"{ref}: {context_text(deltas.resolve(ref).settings)}" for ref in parents)
    files = " and ".join(f"[{scale}](../evidence/results/chain_variants_{scale}.md)" for scale in measured)
    about = times["about"]
    counted_over = ("Parameters at full width. FLOPs of a token in training at full width over the parent's, "
                    f"attention's own products among them ({context}).")
    return [*textwrap.wrap(counted_over, 116),
            f"Step time at {times['scale']} over the parent's, interleaved, on {about['threads']} threads of "
            f"{about['cpu']} ([bench/experts.py](../bench/results/{TIMES.name})).",
            "Loss less the parent's after the same tokens, with intervals that hold together at 95 %",
            f"({files})."]


def latest_runs(site: dict) -> dict[str, dict]:
    """Ref -> summary of the newest committed run of each variant with experts that tells MaxVio."""
    found = {}
    for ref, record in facts.variants_of(site).items():
        runs = [r for r in facts.read_runs(record) if "max_vio" in r]
        found |= {ref: max(runs, key=lambda r: r["utc"])} if runs else {}
    return found


def balance_table(runs: dict[str, dict]) -> list[str]:
    """The lines of a table of MaxVio. runs: ref -> summary; without runs there is no table."""
    if not runs:
        return []
    heads = ["variant", "scale", "steps", "MaxVio over the steps", "in validation", "worst layer there"]
    lines = [
        "", "MaxVio (largest load of an expert over the mean load, less 1; 0 is perfect), the mean over all "
        "layers: over", "all training steps, and of all validation tokens after the last one, from the "
        "committed logs:", "", line(heads), "|" + "---|" * len(heads)
    ]
    for ref, run in runs.items():
        told = run["max_vio"]
        worst = max(told["validation"])
        layer = told["layers"][told["validation"].index(worst)]
        lines.append(line([
            ref, run["scale"], run["steps"], f"{told['steps_mean']:.2f}", f"{told['validation_mean']:.2f}",
            f"{worst:.2f} (layer {layer})"
        ]))
    return lines


def where_time_goes(timed: dict[str, dict]) -> list[str]:
    """A table of the parts of the mixtures' layers, and what a loop over the experts would cost."""
    mixtures = {ref: row for ref, row in timed.items() if "parts_ms" in row}
    if not mixtures:
        return []
    gains = [row["parts_ms"]["plain"] / row["parts_ms"]["routed"] for row in mixtures.values()]
    lines = ["", "Milliseconds of a step in all layers of a mixture, forward and backward, and of the whole "
                 "update (the",
             "parent's):", ""]
    heads = ["variant", "routing", "sorting", "experts", "combining", "shared expert", "update"]
    lines += [line(heads), "|" + "---|" * len(heads)]
    for ref, row in mixtures.items():
        parts = [row["parts_ms"].get(name) for name in ("route", "permute", "multiply", "combine", "shared")]
        lines.append(line([ref, *("none" if ms is None else f"{ms:.0f}" for ms in parts),
                           f"{row['update_ms']:.0f} ({row['parent_update_ms']:.0f})"]))
    return [*lines, "", f"The routed part is {min(gains):.1f} to {max(gains):.1f} times as fast as a loop "
            "over the experts in plain torch."]
