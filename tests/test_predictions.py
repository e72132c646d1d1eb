"""Laws of the table of predictions: published effects in nats, signs and ranks, by hand."""

import json
import math

import pytest
from scipy import stats

from evidence import predictions, statistics
from fake_sweep import call
from settings import deltas

SLOPE = (-0.2, 0.05)


def history(tokens, loss, kind="ml", runs="4"):
    return {"tokens": str(tokens), "val_loss": str(loss), "kind": kind, "runs": runs}


def row(what, effect, half, kind="chain", **more):
    about = {"record": what, "parent": more.pop("parent", None), "changes": []} if kind == "chain" else {
        "record": None, "changes": [f"--without {what}"]}
    low, high = (None, None) if half is None else (effect - half, effect + half)
    return {"effect": effect, "low": low, "high": high, "note": "",
            "resolved": half is not None and abs(effect) > half, **about, **more}


def sweep(kind, rows, base="short/1..short/5"):
    return {"name": "x", "kind": kind, "scale": "tiny", "base": base, "rows": rows}


def test_a_record_that_needs_fewer_tokens_for_the_same_loss_is_worth_the_slope():
    """e times fewer tokens at equal loss are worth the slope; a higher loss takes its part back."""
    out = predictions.of_record(history(1e9, 3.28), history(1e9 * math.e, 3.28), SLOPE)
    noise = predictions.USUAL_SD * math.sqrt(2 / 4)
    assert out["effect"] == pytest.approx(-0.2) and out["se"] == pytest.approx(math.hypot(0.05, noise))
    out = predictions.of_record(history(1e9, 3.29), history(1e9 * math.e, 3.28), SLOPE)
    assert out["effect"] == pytest.approx(-0.19)
    more = predictions.of_record(history(1e9 * math.e, 3.28), history(1e9, 3.28), SLOPE)
    assert more["effect"] == pytest.approx(0.2)


def test_a_record_of_equal_tokens_predicts_a_loss_only_if_it_changes_the_mathematics():
    for kind in ("systems", "retiming"):
        out = predictions.of_record(history(1e9, 3.27, kind), history(1e9, 3.28), SLOPE)
        assert out == {"effect": None, "se": None, "why": "speed only"}
        assert predictions.of_record(history(9e8, 3.27, kind), history(1e9, 3.28), SLOPE)["effect"]
    for kind in ("ml", "both"):
        assert predictions.of_record(history(1e9, 3.27, kind), history(1e9, 3.28), SLOPE)["effect"] == (
            pytest.approx(-0.01))
    for lacking in (None, history("", 3.28), history(1e9, "")):
        assert "nothing published" in predictions.of_record(history(1e9, 3.28), lacking, SLOPE)["why"]


def test_features_in_steps_nats_and_seconds():
    """50 steps fewer at 950: the slope times ln(950 / 1000). 35 more: a loss."""
    effect = {"effect": "-50", "n": "", "measure": "steps"}
    assert predictions.of_feature(effect, 950, SLOPE)["effect"] == pytest.approx(-0.2 * math.log(1000 / 950))
    assert predictions.of_feature(effect, 950, SLOPE)["se"] == pytest.approx(0.05 * math.log(1000 / 950))
    assert predictions.of_feature(effect | {"effect": "35"}, 1705, SLOPE)["effect"] > 0
    nats = predictions.of_feature({"effect": "-0.01", "n": "8", "measure": "loss"}, 950, SLOPE)
    assert nats == {"effect": -0.01, "se": predictions.USUAL_SD * 0.5, "why": ""}
    assert predictions.of_feature(effect | {"measure": "seconds"}, 950, SLOPE)["why"] == "speed only"


def test_the_slope_is_the_mean_of_the_published_pairs():
    value, error = predictions.slope()
    expected = [-0.0091 / math.log(3350 / 3150), -0.0014 / math.log(1393 / 1383),
                -0.0015 / math.log(1770 / 1760), -0.001 / math.log(1660 / 1650)]
    assert value == pytest.approx(sum(expected) / 4) and error == pytest.approx(stats.tstd(expected))
    assert -0.25 < value < -0.15


def test_signs_and_ranks_of_a_small_chain_by_hand():
    """Records 2 to 5 of the real history: published better by 0.13, 0.06, 0.02, 0.04, so ranks 1, 2, 4, 3."""
    refs = [f"short/{i}" for i in range(1, 6)]
    measured = dict(zip(refs[1:], [(-0.5, 0.1), (-0.2, 0.3), (0.1, 0.05), (-0.1, 0.2)]))
    found = predictions.table(sweep("chain", [
        row(ref, *measured[ref], parent=parent) for parent, ref in zip(refs, refs[1:])]))
    published = [r["published"]["effect"] for r in found["rows"]]
    assert sorted(range(4), key=published.__getitem__) == [0, 1, 3, 2]
    assert [r["agrees"] for r in found["rows"]] == [True, True, False, True]
    # Wilson's interval by its roots: (p - k/n)^2 = z^2 p (1 - p) / n
    z2, signs = stats.norm.isf(0.025) ** 2, found["signs"]
    assert (signs["k"], signs["n"]) == (3, 4)
    for p in (signs["low"], signs["high"]):
        assert (p - 0.75) ** 2 == pytest.approx(z2 * p * (1 - p) / 4)
    assert (found["signs_resolved"]["k"], found["signs_resolved"]["n"]) == (1, 2)  # records 2 and 4
    assert (found["signs_published"]["k"], found["signs_published"]["n"]) == (3, 4)  # all four are told apart
    assert found["ranks"]["rho"] == pytest.approx(1.0)  # measured ranks 1, 2, 4, 3
    text = predictions.markdown([found])
    assert "3 of 4 agree, 75 % [30, 95]" in text and "+0.1000 [+0.0500, +0.1500] | differs" in text


def test_the_committed_runs_are_a_chain_of_one_run_each():
    """A record's effect is its loss less that of the nearest record before it that has a run."""
    records = deltas.load_records()
    rows = {r["record"]: r for r in predictions.of_runs()["rows"]}
    assert sorted(rows) == sorted(ref for ref in records if ref.startswith("short/") and ref != "short/1")

    def run(ref):
        path = records[ref].folder / "tiny/summary.json"
        return json.loads(path.read_text()) if path.exists() else run(records[ref].parent)

    for ref, row in rows.items():
        own, before = run(ref), run(records[ref].parent)
        if own["record"] != ref:
            assert row["effect"] is None and row["note"].startswith("inert at scale tiny")
        elif own["numerics_version"] != before["numerics_version"]:
            assert row["effect"] is None and "two numerics versions" in row["note"]
        else:
            assert row["effect"] == own["val_loss"] - before["val_loss"] and not row["resolved"]
    found = predictions.table(predictions.of_runs())
    assert found["signs_resolved"]["n"] == 0 < found["signs_published"]["n"] < found["signs"]["n"]


def test_an_ablation_is_turned_and_what_is_not_measured_is_not_counted():
    rows = [
        row("model.attn.value_residual", 0.02, 0.005, "ablate"),  # leaving it out hurts: it helps
        {**row("model.head.softcap", 0.0, 0.1, "ablate"), "effect": None, "low": None, "high": None,
         "note": "inert at scale tiny: the same"},
        row("model.bias", 0.5, 0.1, "ablate"),  # nothing is published about it
        row("model.residual.x0_mix", 0.0, 0.1, "ablate"),
    ]
    found = predictions.table(sweep("ablate", rows, "short/11"))
    value, softcap, mix = found["rows"]
    assert value["measured"] == {"effect": -0.02, "low": -0.025, "high": -0.015, "resolved": True, "note": ""}
    assert value["agrees"] and softcap["agrees"] is None and mix["agrees"] is None
    assert predictions.cells(softcap)[2] == "inert at scale tiny"
    assert (found["signs"]["n"], found["ranks"]["n"]) == (1, 2) and found["ranks"]["rho"] is None


def test_the_effect_of_a_feature_is_the_one_stated_nearest_to_the_record():
    """The bigram table saved seconds in record 62, nats in 92; a skip of record 45 is none of 33's."""
    def said(ref, path):
        found = predictions.table(sweep("ablate", [row(path, 0.1, 0.05, "ablate")], ref))["rows"]
        return [(r["published"]["effect"], r["published"]["why"]) for r in found]

    assert said("short/61", "model.embed.bigram") == []
    assert said("short/89", "model.embed.bigram") == [(None, "speed only")]
    assert said("short/92", "model.embed.bigram") == [(-0.0358, "")]
    assert said("short/33", "model.residual.unet_skips") == []
    assert said("short/57", "model.residual.unet_skips") == [(-0.0025, "")]


def test_wilsons_interval_covers_as_the_binomial_says():
    """Mean coverage over shares of 0.05 to 0.95 at n = 10 and 26 is near 95 %, each not far below."""
    for n in (10, 26):
        coverage = []
        for p in [i / 20 for i in range(1, 20)]:
            bounds = [statistics.wilson(k, n) for k in range(n + 1)]
            inside = [k for k, (low, high) in enumerate(bounds) if low <= p <= high]
            coverage.append(sum(stats.binom.pmf(k, n, p) for k in inside))
        assert min(coverage) > 0.89 and sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.015)


def test_the_command_prints_every_committed_table_and_refuses_other_files(tmp_path, capsys):
    assert call("predictions", "--json", tmp_path / "t.json") == 0
    out, tables = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert {t["name"] for t in tables} >= {"chain_1-33_micro", "ablate_33_tiny"} and "Rank correlation" in out
    last = out.split("all of them:\n")[1].splitlines()
    assert [line.split()[0] for line in last] == ["sweep", *(t["name"] for t in tables)]
    assert not any("variants" in t["name"] for t in tables)
    axis, cut = '{"rows": [], "kind": "axis", "name": "a"}', '{"rows": [1], "kind": "chain"}'
    for content in ("[", "{}", axis, cut):
        (tmp_path / "x.json").write_text(content)
        assert call("predictions", tmp_path / "x.json") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
