"""Laws of what a sweep concludes: screening, effects, intervals, ranks, the report."""

import json

import numpy as np
import pytest
from scipy import stats

import runlog
from evidence import statistics
from page import facts
from sweeps import queue, report as sweep_report
from sweeps.plan import pairs_of
from fake_sweep import CAP, LAM, NORM, TWO, call, fake, made, noisy, planned, results, starts


# ----- screening --------------------------------------------------------------------------------------------

def test_screening_finds_the_guilty_member_and_spares_the_innocent_group(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("EFFECTS", json.dumps({f"--without {CAP}": 0.3}))
    assert (
        call(
            "ablate", "short/11", "--features", "model.head", "model.init", "--screen", "--seeds", 2, "--dir",
            tmp_path / "q"
        )
        == 0
    )
    survivors = json.loads((tmp_path / "q/survivors.json").read_text())
    assert survivors["kept"] == ["model.head"] and survivors["dropped"] == ["model.init"]
    found, _ = sweep_report.report(tmp_path / "q")
    rows = {r["arm"]: r for r in found["rows"]}
    assert [r["arm"] for r in found["rows"] if r["resolved"]] == [
        "--without model.head (2 features)",
        f"--without {CAP}",
    ]
    spared = rows["--without model.init.zero_proj"]
    assert "not run apart" in spared["note"] and spared["n"] == 0
    assert rows["--without model.init (2 features)"]["n"] == 2 and found["complete"]
    last_group = max(
        i
        for i, t in enumerate(starts(fake))
        if t
        in [
            queue.name_of(a, s) for a in queue.load_plan(tmp_path / "q")["arms"] if a["role"] == "group"
            for s in range(2)
        ]
    )
    assert len(starts(fake)) - 1 - last_group == 2 * 2  # the members came after all groups


def quick_dunnett(cache):
    """statistics.against_control with remembered critical values: the same intervals, a thousand times
    faster."""
    def against_control(control, arms, confidence):
        groups = [np.array(control), *map(np.array, arms.values())]
        (sd, df), n, m = statistics.pooled(groups), len(groups[1]), len(control)
        key = (len(arms), n, m)
        if key not in cache:
            cache[key] = statistics.dunnett_critical(*key, confidence)
        half, rows = cache[key] * sd * (1 / n + 1 / m) ** 0.5, {}
        for name, x in zip(arms, groups[1:]):
            effect = float(x.mean() - groups[0].mean())
            rows[name] = {"effect": effect, "low": effect - half, "high": effect + half, "p": None,
                          "resolved": abs(effect) > half}
        return {"pooled_sd": sd, "df": df, "rows": rows}
    return against_control


def test_after_screening_the_intervals_still_cover_all_effects_together(monkeypatch):
    """Groups and tested members, one guilty member: any interval misses in at most 5 % of sweeps (400; 3
    sigma = 3.3 %)."""
    plan = planned(
        "ablate", "short/11", "--features", "model.attn", "model.head", "model.init", "--screen", "--seeds", 4
    )
    mde = statistics.minimal_detectable_effect(1.0, plan["seeds"], plan["controls"], len(pairs_of(plan)))
    monkeypatch.setattr(statistics, "minimal_detectable_effect", lambda sd, *a: sd * mde)
    monkeypatch.setattr(statistics, "against_control", quick_dunnett({}))
    rng, missed, kept = np.random.default_rng(0), 0, 0
    truth = {f"--without {LAM}": 1.5, "--without model.attn (6 features)": 1.5}
    for _ in range(400):
        done = results(plan, lambda a, s: truth.get(a["label"], 0) + rng.normal(), {"kept": plan["groups"]})
        survivors = sweep_report.screen(plan, done)
        done = {name: done[name] for name, _, _ in queue.targets(plan, survivors)}
        found = sweep_report.effects(plan, done)["rows"]
        missed += any(not row["low"] <= truth.get(arm["label"], 0) <= row["high"] for arm in plan["arms"]
                      if (row := found.get(arm["ml_hash"])))
        kept += "model.attn" in survivors["kept"]
    assert missed / 400 < 0.05 + 0.033 and kept / 400 > 0.8


# ----- what is concluded ------------------------------------------------------------------------------------

def test_effects_and_intervals_are_those_of_the_statistics_module():
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    done = noisy(plan, {f"--without {CAP}": 0.2})
    arms = {
        a["label"]: [done[queue.name_of(a, s)]["val_loss"] for s in queue.seeds_of(plan, a)]
        for a in plan["arms"]
    }
    control = arms.pop("short/11")
    expected = statistics.against_control(control, arms)
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert found["method"] == "dunnett" and len(control) == 7 and found["control"]["n"] == 7
    assert (found["pooled_sd"], found["df"]) == (expected["pooled_sd"], expected["df"])
    for row in found["rows"]:
        assert {k: row[k] for k in ("effect", "low", "high", "p")} == {
            k: expected["rows"][row["arm"]][k] for k in ("effect", "low", "high", "p")}
    assert found["mde"] == statistics.minimal_detectable_effect(expected["pooled_sd"], 4, 7, 3)
    chain = planned("chain", "short/3..short/8", "--seeds", 3)
    done = noisy(chain, {"short/4": -0.3})
    groups = {a["label"]: [done[queue.name_of(a, s)]["val_loss"] for s in range(3)] for a in chain["arms"]}
    groups.pop("short/7")
    expected = statistics.successive(
        groups,
        [("short/4", "short/3"), ("short/5", "short/4"), ("short/6", "short/5"), ("short/8", "short/6")],
    )
    found = {r["arm"]: r for r in sweep_report.evidence(chain, done, {}, None, "x")["rows"]}
    assert (
        found["short/7"]["effect"] is None and found["short/7"]["n"] == 3
        and "inert" in found["short/7"]["note"]
    )
    for name, row in expected["rows"].items():
        assert (found[name]["effect"], found[name]["p"]) == pytest.approx((row["effect"], row["p"]), rel=1e-9)
    assert found["short/4"]["parent"] == "short/3" and found["short/4"]["record"] == "short/4"


def test_branches_of_one_parent_are_compared_by_dunnett():
    """Also the effect that the plan says it can detect; the pages accept what is written."""
    plan = planned("chain", "variants")
    done = noisy(plan, {"variants/2": -0.3})
    arms = {
        a["label"]: [
            done[queue.name_of(a, s)]["val_loss"] for s in range(11 if a["label"] == "short/8" else 4)
        ]
        for a in plan["arms"]
    }
    expected = statistics.against_control(arms.pop("short/8"), arms)
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert (found["method"], found["control"]["n"], found["df"]) == ("dunnett", 11, 7 * 3 + 10)
    assert found["mde"] == statistics.minimal_detectable_effect(expected["pooled_sd"], 4, 11, 7)
    for row in found["rows"]:
        assert {k: row[k] for k in ("effect", "low", "high", "p")} == {
            k: expected["rows"][row["arm"]][k] for k in ("effect", "low", "high", "p")
        } and row["parent"] == "short/8"
    assert [r["arm"] for r in found["rows"] if r["resolved"]] == ["variants/2"]
    assert not facts.misstated(json.loads(json.dumps(found)))


def test_paired_seeds_give_the_paired_t_test_for_one_arm_and_cancel_common_shifts():
    rng = np.random.default_rng(1)
    shift = rng.normal(size=6)
    y = {
        "a": (shift + 0.1 * rng.normal(size=6)).tolist(),
        "b": (shift + 0.5 + 0.1 * rng.normal(size=6)).tolist(),
    }
    found, expected = (
        sweep_report.blocked(y, [("b", "a")], 0.95)["rows"]["b"],
        stats.ttest_rel(y["b"], y["a"]),
    )
    assert found["p"] == pytest.approx(expected.pvalue) and found["resolved"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    plan = planned("ablate", "short/11", *TWO, "--paired")
    assert plan["controls"] == plan["seeds"]
    done = results(plan, lambda a, s: 5 + 3 * s + 0.01 * rng.normal() + 0.1 * (CAP in a["label"]))
    rows = sweep_report.evidence(plan, done, {}, None, "x")["rows"]
    assert [r["resolved"] for r in rows] == [False, True]
    done.pop(queue.name_of(plan["arms"][1], 2))
    row = sweep_report.evidence(plan, done, {}, None, "x")["rows"][0]
    assert row["effect"] is None and "need every seed" in row["note"]


def test_paired_intervals_hold_together():
    """1000 sweeps of 5 arms and a control over 4 seeds: any of five effects is wrongly resolved in at most 5
    %."""
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(1000):
        y = rng.normal(size=(6, 4)) + 5 * rng.normal(size=4)
        rows = sweep_report.blocked(
            {str(i): v for i, v in enumerate(y)}, [(str(i), "0") for i in range(1, 6)], 0.95
        )["rows"]
        wrong += any(r["resolved"] for r in rows.values())
    assert 0.02 < wrong / 1000 < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5


def test_unresolved_rows_say_so_and_have_no_rank():
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    found = sweep_report.evidence(
        plan, noisy(plan, {f"--without {LAM}": 0.1, f"--without {CAP}": 0.3}), {}, None, "x"
    )
    ranks = sweep_report.ranked(found)
    assert [(rank, row["arm"]) for rank, row in ranks] == [(1, f"--without {CAP}"), (2, f"--without {LAM}"),
                                                           (None, f"--without {NORM}")]
    texts = [sweep_report.effect_text(row) for _, row in ranks]
    half = (ranks[2][1]["high"] - ranks[2][1]["low"]) / 2
    assert texts[2] == f"unresolved (+-{half:.4f})" and texts[0].startswith("+0.29")


def test_ranks_go_from_the_most_helpful_down_and_a_chain_keeps_its_order():
    plan = planned("axis", "short/11", "optim.muon.lr=0.01,0.02,0.03", "--seeds", 4)
    found = sweep_report.evidence(
        plan, noisy(plan, {"optim.muon.lr=0.01": 0.2, "optim.muon.lr=0.03": -0.2}), {}, None, "x"
    )
    ranks = [(rank, row["arm"][-4:]) for rank, row in sweep_report.ranked(found)]
    assert ranks == [(1, "0.03"), (2, "0.01"), (None, "0.02")]
    plan = planned("chain", "short/3..short/6", "--seeds", 4)
    found = sweep_report.evidence(plan, noisy(plan, {"short/5": -0.2, "short/6": -0.5}), {}, None, "x")
    ranks = [(rank, row["arm"]) for rank, row in sweep_report.ranked(found)]
    assert ranks == [(None, "short/4"), (2, "short/5"), (1, "short/6")]


def test_an_arm_that_changes_no_bit_is_told_apart_from_one_with_a_small_effect():
    plan = planned("ablate", "short/11", *TWO)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=9)
    done = results(plan, lambda a, s: 5 + noise[s] + (1e-9 if CAP in a["label"] else 0))
    notes = {r["arm"]: r["note"] for r in sweep_report.evidence(plan, done, {}, None, "x")["rows"]}
    assert "to the last bit" in notes[f"--without {NORM}"] and not notes[f"--without {CAP}"]


def test_an_arm_much_noisier_than_the_pool_is_marked():
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    rng = np.random.default_rng(0)
    done = results(plan, lambda a, s: 5 + (0.3 if LAM in a["label"] else 0.01) * rng.normal())
    notes = {r["arm"]: r["note"] for r in sweep_report.evidence(plan, done, {}, None, "x")["rows"]}
    assert "times the pooled one" in notes[f"--without {LAM}"] and not notes[f"--without {NORM}"]


def test_one_run_an_arm_gives_effects_without_intervals():
    plan = planned("ablate", "short/11", "--features", NORM, "--seeds", 1)
    row = sweep_report.evidence(plan, results(plan, lambda a, s: 5.0), {}, None, "x")["rows"][0]
    assert row["effect"] == 0 and row["low"] is None and not row["resolved"] and "one run each" in row["note"]


def test_the_report_is_complete_in_all_its_forms(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("EFFECTS", json.dumps({f"--without {CAP}": 0.3}))
    monkeypatch.setattr(sweep_report, "earlier_sd", lambda plan: None)
    assert call("ablate", "short/11", *TWO, "--seeds", 2, "--dir", tmp_path / "q", "--cost-per-hour", 36) == 0
    said = capsys.readouterr().out
    assert "minimal detectable effect: 4.02 sd" in said and "from the sd" in said and ", cost 0.00" in said
    assert call("report", tmp_path / "q", "--out", tmp_path / "evidence/abl") == 0
    found = json.loads((tmp_path / "evidence/abl.json").read_text())
    assert (
        found["name"] == "abl" and found["kind"] == "ablate" and found["complete"] and found["version"] == 1
    )
    run = found["rows"][0]["runs"][0]
    assert (
        set(run) == {"seed", "val_loss", "train_time_ms", "ml_hash", "last_hash"}
        and len(found["rows"][0]["runs"]) == 2
    )
    links = runlog.read_links(next((tmp_path / "q/runs").glob(f"*_{run['ml_hash'][:8]}_s0")) / "run.jsonl")
    assert links[-1][1] == run["last_hash"] and found["code"] == ["c" * 40] and found["hardware"] == "fake"
    lines = (tmp_path / "evidence/abl.csv").read_text().splitlines()
    assert lines[0].startswith("rank,arm,") and lines[1].startswith(f"1,--without {CAP}") and len(lines) == 3
    assert "unresolved (+-" in (tmp_path / "evidence/abl.md").read_text()
    assert (tmp_path / "evidence/abl.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert call("status", tmp_path / "q") == 0
    assert "7 of 7 runs done, 0 failed" in capsys.readouterr().out


def test_an_unfinished_sweep_is_called_incomplete(tmp_path, capsys):
    plan = made(tmp_path / "q", "ablate", "short/11", *TWO)
    done = dict(list(noisy(plan, {}).items())[:9])
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert not found["complete"] and sweep_report.headline(found).startswith("INCOMPLETE")
    assert call("report", tmp_path / "q") == 2 and "no run has finished yet" in capsys.readouterr().err


def test_the_sd_of_earlier_sweeps_of_the_same_kind_of_run_is_pooled(tmp_path):
    plan = planned("ablate", "short/11", *TWO)
    for name, sd, more in (
        ("a", 0.01, {}), ("b", 0.03, {}), ("c", 1.0, {"scale": "tiny"}), ("d", 1.0, {"common": ["x"]})
    ):
        found = sweep_report.evidence(plan, noisy(plan, {}, sd=sd), {}, None, name) | more
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "other.json").write_text("[1]")
    sd, df, names = sweep_report.earlier_sd(plan, tmp_path)
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    assert names == ["a.json", "b.json"] and df == a["df"] + b["df"]
    assert sd ** 2 * df == pytest.approx(a["pooled_sd"] ** 2 * a["df"] + b["pooled_sd"] ** 2 * b["df"])
    assert sweep_report.earlier_sd(plan, tmp_path / "none") is None
