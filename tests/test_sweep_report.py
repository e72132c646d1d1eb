"""Laws of what a sweep concludes: screening, effects, intervals, ranks, the report."""

import json

import numpy as np
import pytest

import runlog
from evidence import statistics
from page import facts
from sweeps import queue, report as sweep_report
from fake_sweep import CAP, LAM, NORM, TWO, call, fake, made, noisy, planned, results, starts
from one_control import against_control


# ----- screening --------------------------------------------------------------------------------------------

def test_screening_finds_the_guilty_member_and_spares_the_innocent_group(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("EFFECTS", json.dumps({f"--without {CAP}": 0.3}))
    assert (
        call(
            "ablate", "short/11", "--features", "model.head", "model.init", "--screen", "--seeds", 3, "--dir",
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
    assert rows["--without model.init (2 features)"]["n"] == 3 and found["complete"]
    last_group = max(
        i
        for i, t in enumerate(starts(fake))
        if t
        in [
            queue.name_of(a, s) for a in queue.load_plan(tmp_path / "q")["arms"] if a["role"] == "group"
            for s in range(3)
        ]
    )
    assert len(starts(fake)) - 1 - last_group == 3 * 2  # the members came after all groups


def test_after_screening_the_intervals_still_cover_all_effects_together():
    """Groups and tested members, one guilty member: any interval misses in at most 5 % of sweeps."""
    plan = planned(
        "ablate", "short/11", "--features", "model.attn", "model.head", "model.init", "--screen", "--seeds", 4
    )
    rng, missed, kept, count = np.random.default_rng(0), 0, 0, 120
    truth = {f"--without {LAM}": 9, "--without model.attn (6 features)": 9}
    for _ in range(count):
        done = results(plan, lambda a, s: truth.get(a["label"], 0) + rng.normal(), {"kept": plan["groups"]})
        survivors = sweep_report.screen(plan, done)
        done = {name: done[name] for name, _, _ in queue.targets(plan, survivors)}
        found = sweep_report.effects(plan, done)["rows"]
        missed += any(not row["low"] <= truth.get(arm["label"], 0) <= row["high"] for arm in plan["arms"]
                      if (row := found.get(arm["ml_hash"])))
        kept += "model.attn" in survivors["kept"]
    assert missed / count < 0.05 + 3 * (0.05 * 0.95 / count) ** 0.5 and kept / count > 0.8


# ----- what is concluded ------------------------------------------------------------------------------------

def losses_of(plan, done, arm, seeds):
    """{seed: loss} of an arm by its label."""
    arm = next(a for a in plan["arms"] if a["label"] == arm)
    return {s: done[queue.name_of(arm, s)]["val_loss"] for s in range(seeds)}


def same_figures(row, expected):
    """Whether a row of the report has the figures of a row of the statistics."""
    return {k: row[k] for k in ("effect", "low", "high", "p", "resolved", "sd_effect")} == {
        **{k: expected[k] for k in ("effect", "low", "high", "p", "resolved")}, "sd_effect": expected["sd"]}


@pytest.mark.parametrize("how, paired, controls", [
    ([], True, 4), (["--no-paired"], False, 7), (["--controls", 9], False, 9), (["--controls", 4], True, 4)])
def test_effects_and_intervals_are_those_of_the_statistics_module(how, paired, controls):
    """The design decides the method: within seeds, unless it has runs of the control that no arm shares."""
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP, *how)
    assert (plan["paired"], plan["controls"]) == (paired, controls)
    done = noisy(plan, {f"--without {CAP}": 0.2})
    arms = {a["label"]: losses_of(plan, done, a["label"], 4) for a in plan["arms"][1:]}
    control = losses_of(plan, done, "short/11", controls)
    expected = against_control(control, arms, paired=paired)
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert found["method"] == ("within seeds" if paired else "means") and found["control"]["n"] == controls
    assert (found["pooled_sd"], found["df"]) == (pytest.approx(expected["pooled_sd"]), expected["df"])
    assert all(same_figures(row, expected["rows"][row["arm"]]) for row in found["rows"])
    sd = sorted(r["sd"] for r in expected["rows"].values())[1] if paired else found["pooled_sd"]
    assert found["mde"] == statistics.minimal_detectable_effect(sd, 4, controls, 3, paired=paired)
    assert not facts.misstated(json.loads(json.dumps(found)))


def test_a_chain_compares_each_record_with_its_parent_within_seeds():
    chain = planned("chain", "short/3..short/8", "--seeds", 3)
    done = noisy(chain, {"short/4": -0.3})
    groups = {a["label"]: losses_of(chain, done, a["label"], 3) for a in chain["arms"]}
    groups.pop("short/7")
    expected = statistics.successive(
        groups,
        [("short/4", "short/3"), ("short/5", "short/4"), ("short/6", "short/5"), ("short/8", "short/6")],
        paired=True,
    )
    found = {r["arm"]: r for r in sweep_report.evidence(chain, done, {}, None, "x")["rows"]}
    assert (
        found["short/7"]["effect"] is None and found["short/7"]["n"] == 3
        and "inert" in found["short/7"]["note"]
    )
    assert all(same_figures(found[name], row) for name, row in expected["rows"].items())
    assert found["short/4"]["parent"] == "short/3" and found["short/4"]["record"] == "short/4"


def test_common_shifts_of_a_seed_cancel_and_a_missing_seed_is_said():
    rng = np.random.default_rng(1)
    plan = planned("ablate", "short/11", *TWO)
    done = results(plan, lambda a, s: 5 + 3 * s + 0.01 * rng.normal() + 0.3 * (CAP in a["label"]))
    rows = sweep_report.evidence(plan, done, {}, None, "x")["rows"]
    assert [r["resolved"] for r in rows] == [False, True]
    done.pop(queue.name_of(plan["arms"][1], 2))
    row = sweep_report.evidence(plan, done, {}, None, "x")["rows"][0]
    assert row["effect"] is None and "need every seed" in row["note"]


def test_a_noisy_arm_does_not_speak_for_a_quiet_one():
    """One arm's spread neither hides another's effect nor lends it an interval."""
    plan = planned("ablate", "short/11", "--features", NORM, LAM, CAP)
    rng = np.random.default_rng(3)
    sd = {f"--without {LAM}": 1.0, f"--without {CAP}": 1e-3, f"--without {NORM}": 1e-3, "short/11": 1e-3}
    done = results(plan, lambda a, s: 5 + sd[a["label"]] * rng.normal() + 0.05 * (CAP in a["label"]))
    rows = {r["arm"]: r for r in sweep_report.evidence(plan, done, {}, None, "x")["rows"]}
    assert rows[f"--without {CAP}"]["resolved"] and not rows[f"--without {LAM}"]["resolved"]
    width = {arm: r["high"] - r["low"] for arm, r in rows.items()}
    assert width[f"--without {LAM}"] > 100 * width[f"--without {CAP}"]


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
    assert texts[2] == f"unresolved (+-{half:.4f})" and texts[0].startswith("+0.3095 [+0.2")


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
    done = results(plan, lambda a, s: 5 + noise[s] + (1e-9 * s if CAP in a["label"] else 0))
    notes = {r["arm"]: r["note"] for r in sweep_report.evidence(plan, done, {}, None, "x")["rows"]}
    assert "to the last bit" in notes[f"--without {NORM}"] and not notes[f"--without {CAP}"]


def test_one_run_an_arm_gives_effects_without_intervals():
    plan = planned("ablate", "short/11", "--features", NORM, "--seeds", 1)
    row = sweep_report.evidence(plan, results(plan, lambda a, s: 5.0), {}, None, "x")["rows"][0]
    assert row["effect"] == 0 and row["low"] is None and not row["resolved"] and "one run each" in row["note"]


def test_the_report_is_complete_in_all_its_forms(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("EFFECTS", json.dumps({f"--without {CAP}": 0.3}))
    monkeypatch.setattr(sweep_report, "earlier_sd", lambda plan: None)
    assert call("ablate", "short/11", *TWO, "--seeds", 2, "--dir", tmp_path / "q", "--cost-per-hour", 36) == 0
    said = capsys.readouterr().out
    least = statistics.minimal_detectable_effect(1.0, 2, 2, 2, paired=True)
    assert f"effect: {least:.2f} sd of differences within seeds at 80 %" in said and ", cost 0.00" in said
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
    assert lines[0].startswith("rank,arm,") and f",--without {CAP}," in lines[2] and len(lines) == 3
    assert "unresolved (+-" in (tmp_path / "evidence/abl.md").read_text()
    assert (tmp_path / "evidence/abl.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert call("status", tmp_path / "q") == 0
    assert "6 of 6 runs done, 0 failed" in capsys.readouterr().out


def test_an_unfinished_sweep_is_called_incomplete(tmp_path, capsys):
    plan = made(tmp_path / "q", "ablate", "short/11", *TWO)
    done = dict(list(noisy(plan, {}).items())[:9])
    found = sweep_report.evidence(plan, done, {}, None, "x")
    assert not found["complete"] and sweep_report.headline(found).startswith("INCOMPLETE")
    assert call("report", tmp_path / "q") == 2 and "no run has finished yet" in capsys.readouterr().err


def test_the_sd_of_earlier_sweeps_of_the_same_scale_is_told(tmp_path):
    """Within seeds the median over their comparisons; for differences of means the pooled one."""
    plan = planned("ablate", "short/11", *TWO)
    for name, sd, more in (
        ("a", 0.01, {}), ("b", 0.03, {}), ("c", 1.0, {"scale": "tiny"}), ("d", 1.0, {"common": ["x"]})
    ):
        found = sweep_report.evidence(plan, noisy(plan, {}, sd=sd), {}, None, name) | more
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "other.json").write_text("[1]")
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    sds = sorted(row["sd_effect"] for x in (a, b) for row in x["rows"])
    assert sweep_report.earlier_sd(plan, tmp_path) == (sds[2], 4, ["a.json", "b.json"])
    sd, df, names = sweep_report.earlier_sd(plan | {"paired": False}, tmp_path)
    assert names == ["a.json", "b.json"] and df == a["df"] + b["df"]
    assert sd ** 2 * df == pytest.approx(a["pooled_sd"] ** 2 * a["df"] + b["pooled_sd"] ** 2 * b["df"])
    assert sweep_report.earlier_sd(plan, tmp_path / "none") is None


def test_a_written_report_is_stated_anew_from_its_own_losses(tmp_path, capsys):
    """A report of before, with one pooled variance, gets the method of today and says so; its runs stay."""
    plan = planned("ablate", "short/11", *TWO)
    found = sweep_report.evidence(plan, noisy(plan, {f"--without {CAP}": 0.3}), {}, None, "x")
    old = json.loads(json.dumps(found)) | {"method": "dunnett", "paired": False, "name": "old"}
    for row in old["rows"]:
        row |= {"low": -9.0, "high": 9.0, "p": 1.0, "resolved": False, "sd_effect": None,
                "note": "its sd is 2.1 times the pooled one: its own interval is wider"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert call("report", tmp_path / "old.json") == 0
    assert "planned before this method" in " ".join(capsys.readouterr().out.split())
    new = json.loads((tmp_path / "old.json").read_text())
    assert new["rows"] == json.loads(json.dumps(found["rows"])) and new["method"] == "within seeds"
    assert new["mde"] == found["mde"] and not facts.misstated(new)
    assert "[+0." in (tmp_path / "old.md").read_text()
    assert call("report", tmp_path / "old.json") == 0
    assert json.loads((tmp_path / "old.json").read_text()) == new
    capsys.readouterr()
    (tmp_path / "bad.json").write_text("{}")
    assert call("report", tmp_path / "bad.json") == 2
    assert "not the report of a sweep" in capsys.readouterr().err
