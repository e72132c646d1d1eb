"""Laws of sweeps: what is run, which finished runs count, and one sweep that trains. In the others a fake
trainer writes the logs."""

import dataclasses
import json
import subprocess
import tomllib

import pytest

from settings import deltas, schema
from sweeps import queue, worker, report as sweep_report
from sweeps.plan import grouped, pairs_of, split
from common.errors import UserError
from fake_sweep import LAM, NORM, ROOT, TWO, call, command, fake, made, planned, results, starts, wait_for


# ----- what is run ------------------------------------------------------------------------------------------

def test_targets_go_seed_by_seed_and_the_control_has_as_many_runs_or_unpaired_about_sqrt_arms_times():
    args = ["ablate", "short/11", "--seeds", 3, "--features", "model.attn", "model.head", "--no-screen"]
    paired, plan = planned(*args), planned(*args, "--no-paired")
    assert paired["paired"] and paired["controls"] == 3
    assert len(queue.targets(paired)) == 3 + 3 * len(pairs_of(paired))
    arms = len(pairs_of(plan))
    todo = queue.targets(plan)
    assert plan["controls"] == round(3 * arms ** 0.5) and len(todo) == plan["controls"] + 3 * arms
    rounds = [seed for _, arm, seed in todo if arm["role"] != "control"]
    assert rounds == sorted(rounds)
    first = todo[:next(i for i, t in enumerate(todo) if t[1]["role"] != "control" and t[2] == 1)]
    assert {arm["label"] for _, arm, _ in first} == {a["label"] for a in plan["arms"]}
    assert sorted(seed for _, arm, seed in todo if arm["role"] == "control") == list(range(plan["controls"]))


def test_what_computes_the_same_shares_its_runs_and_inert_arms_share_the_control():
    plan = planned("ablate", "short/11", "--features", "numerics", "model.mlp", "--seeds", 2)
    control, inert = (
        plan["arms"][0],
        [a for a in plan["arms"][1:] if a["ml_hash"] == plan["arms"][0]["ml_hash"]],
    )
    assert len(inert) >= 5 and not [t for t in queue.targets(plan) if t[1] in inert]
    assert len(pairs_of(plan)) == len(plan["arms"]) - 1 - len(inert)
    found = sweep_report.evidence(plan, results(plan, lambda a, s: 5 + 0.01 * s), {}, None, "x")
    row = next(r for r in found["rows"] if r["arm"] == inert[0]["label"])
    assert "inert at scale micro" in row["note"] and row["effect"] is None and not row["runs"]
    plan = planned("chain", "short/5..short/8", "--seeds", 2)
    assert [a["label"] for a, _ in pairs_of(plan)] == ["short/6", "short/8"]  # 7 is another PyTorch
    assert len(queue.targets(plan)) == 2 * 3
    plan = planned(
        "axis", "short/11", "schedule.lr=trapezoid,cosine", "schedule.cooldown_steps=0", "--seeds", 2
    )
    assert control["ml_hash"] != plan["arms"][1]["ml_hash"] and len(pairs_of(plan)) == 2


def test_an_axis_is_every_combination_of_values_in_the_grammar_of_set():
    plan = planned("axis", "short/11", "optim.muon.lr=0.02,0.08", "model.mlp.activation=gelu,relu_sq")
    assert [a["label"] for a in plan["arms"][1:]] == [
        f"optim.muon.lr={lr} model.mlp.activation=\"{act}\"" for lr in (0.02, 0.08)
        for act in ("gelu", "relu_sq")
    ]
    assert split("a={x = [1, 2], y = 3},{x = 4},\"p,q\"") == ["{x = [1, 2], y = 3}", "{x = 4}", '"p,q"']


def parents_of(lineage):
    """{ref: parent} as the lineage's record.toml files say, in the order of their folders."""
    tomls = [
        tomllib.loads(path.read_text()) for path in sorted((ROOT / "records" / lineage).glob("*/record.toml"))
    ]
    return {f"{lineage}/{toml['id']}": toml.get("parent") for toml in tomls}


def test_a_lineage_is_every_record_of_it_against_its_parent():
    for lineage, seeds in (("short", 2), ("variants", 4)):
        plan, parents = planned("chain", lineage, "--seeds", seeds, "--scale", "tiny"), parents_of(lineage)
        assert plan["name"] == f"chain_{lineage}_tiny" and plan["base"] == lineage
        children = {ref: parent for ref, parent in parents.items() if parent}
        control, found = plan["arms"][0], {a["label"]: a["parent"] for a in plan["arms"][1:]}
        assert control["label"] == next(iter(children.values())) and control["role"] == "control"
        outside = set(children.values()) - set(parents) - {control["label"]}
        assert {ref: parent for ref, parent in found.items() if ref not in outside} == children
        # variant 9 stands on record 12, which runs too and is compared with record 8
        assert found.keys() - children.keys() == outside == ({"short/12"} if lineage == "variants" else set())
        assert all(found[ref] == control["label"] for ref in outside)
        assert all(b["label"] == found[a["label"]] for a, b in pairs_of(plan))


def test_unpaired_branches_of_one_parent_get_more_runs_of_it_and_a_chain_of_several_parents_does_not(
    monkeypatch,
):
    # parents: records 8 and 12, variant 4
    assert planned("chain", "variants", "--no-paired")["controls"] == 4
    several = planned("chain", "short/5..short/9", "--no-paired")
    assert not several["paired"] and several["controls"] == 4
    records = deltas.load_records()
    branches = {ref: r for ref, r in records.items() if ref not in ("variants/9", "variants/10")}
    monkeypatch.setattr(deltas, "load_records", lambda: branches)
    plan = planned("chain", "variants", "--no-paired")
    arms = len(pairs_of(plan))
    assert arms == 8 and plan["controls"] == round(4 * arms ** 0.5)
    assert len(queue.targets(plan)) == plan["controls"] + arms * 4
    assert planned("chain", "variants", "--controls", 8)["controls"] == 8
    assert planned("chain", "variants")["controls"] == 4


def test_a_parent_outside_the_lineage_runs_and_is_compared_with_its_nearest_ancestor_that_runs(monkeypatch):
    records = dict(deltas.load_records())
    new = dataclasses.replace(records["variants/5"], ref="variants/99", parent="short/11")
    monkeypatch.setattr(deltas, "load_records", lambda: records | {"variants/99": new})
    monkeypatch.setattr(deltas, "find_record", lambda name: deltas.load_records()[name])
    plan = planned("chain", "variants")
    assert [(a["label"], a["parent"]) for a in plan["arms"][-2:]] == [
        ("short/11", "short/8"),
        ("variants/99", "short/11"),
    ]
    assert plan["controls"] == plan["seeds"]
    assert len(pairs_of(plan)) == len(parents_of("variants")) + 3  # variant 99, records 11 and 12


def test_features_that_cannot_be_switched_off_are_listed_with_the_reason():
    skipped = {s["feature"]: s["reason"] for s in planned("ablate", "short/11")["skipped"]}
    # the bias is off in record 11; data.wrap is off there too, and on at this scale, which sets it
    assert "no sensible off" in skipped["schedule.steps"] and not {"model.bias", "data.wrap"} & set(skipped)


def test_groups_are_the_sections_and_a_lonely_feature_joins_the_section_above():
    assert grouped(["a.b.x", "a.b.y", "a.c.z", "a.w", "d.e"]) == {
        "a.b": ["a.b.x", "a.b.y"],
        "a": ["a.w", "a.c.z"],
    }


def test_few_features_are_not_screened_and_the_plan_says_why():
    plan = planned("ablate", "short/11")
    assert not plan["groups"] and "pays from 4 features a section" in plan["screening"]
    assert planned("ablate", "short/11", "--screen")["groups"]
    assert planned("ablate", "short/11", "--features", "model.attn")["groups"] == ["model.attn"]
    assert not planned("ablate", "short/11", "--features", "model.attn", "--no-screen")["groups"]


BAD = [
    (["axis", "short/11", "optim.muon.lrr=1,2"], "did you mean"),
    (["axis", "short/11", "optim.muon.lr=0.1,many"], "expected a number"),
    (["axis", "short/11", "optim.muon.lr=0.1,,0.2"], "empty value"),
    (["axis", "short/11", "optim.muon.lr"], "expected path=value"),
    (["axis", "short/11", "optim.muon.lr=0.1,0.1"], "given twice"),
    (["axis", "short/11", "optim.muon.lr=0.1", "optim.muon.lr=0.2"], "given twice"),
    (["axis", "short/11", "optim.muon.lr=0.1", "--set", "optim.muon.lr=0.2"], "given twice"),
    (["axis", "short/2", "optim.muon.lr=0.1"], "optim.muon is off"),
    (["axis", "short/11", "model.attn.num_heads=6,7"], "not divisible"),
    (["axis", "short/11", "system.comm=sharded"], "nothing to run"),
    (["ablate", "short/99"], "unknown record"),
    (["ablate", "short/11", "--features", "model.embed.nrom"], "did you mean"),
    (["ablate", "short/11", "--features", "model.bias"], "already"),
    (["ablate", "short/11", "--features", "system"], "has no feature below it"),
    (["ablate", "short/11", "--set", "schedule.stepz=3"], "did you mean schedule.steps"),
    (["ablate", "short/11", "--controls", "2"], "at least as many controls"),
    (["ablate", "short/11", "--confidence", "95"], "above 0 and below 1"),
    (["ablate", "short/11", "--paired", "--controls", "9"], "leave it out"),
    (["ablate", "short/11", "--data", "/no/such/place"], "no data folder"),
    (["ablate", "short/11", "--reuse", "/no/such/place"], "no such folder"),
    (["ablate", "short/11", "--scale", "small", "--data", "DATA"], "needs one"),
    (["ablate", "short/11", "--dir", "/dev/null/x"], "choose another with --dir"),
    (["chain", "short/1"], "FIRST..LAST"),
    (["chain", "variant"], "did you mean variants?"),
    (["chain", "short", "--controls", "9"], "leave it out"),
    (["chain", "short/9..short/4"], "not an ancestor"),
    (["chain", "short/6..short/7"], "nothing to run"),
    (["work", "/no/such/place"], "no sweep here"),
    (["status", "/"], "no sweep here"),
    (["ablate", "short/11", "--launcher", "slurm"], "no Slurm here"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_clear_line_before_anything_starts(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", "")
    if "DATA" in args:
        from common.files import default_cache
        from data.corpus import sample_corpus
        args = [str(sample_corpus(default_cache()).folder) if a == "DATA" else a for a in args]
        args += ["--set", "model.vocab_size=1257"]
    if args[0] in ("axis", "ablate", "chain"):
        args = [*args, "--runs", str(tmp_path / "runs")]
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


def test_a_lineage_without_parents_is_no_chain(monkeypatch, capsys):
    monkeypatch.setattr(deltas, "LINEAGES", (*deltas.LINEAGES, "empty"))
    assert call("chain", "empty") == 2
    assert "no record of this lineage has a parent" in capsys.readouterr().err


def test_another_sweep_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    assert call("ablate", "short/11", *TWO, "--seeds", 3, "--dir", tmp_path / "q") == 2
    assert "holds another sweep (seeds: 4 there, 3 here)" in capsys.readouterr().err


def test_a_plan_in_other_words_is_the_same_sweep(tmp_path):
    plan = made(tmp_path, "ablate", "short/11", *TWO)
    assert not queue.create(
        tmp_path, plan | {"code": "later", "skipped": [{"feature": "new", "reason": "off"}]}
    )


def test_a_checkout_that_computes_something_else_does_not_join(tmp_path):
    plan = made(tmp_path, "ablate", "short/11", *TWO)
    plan["arms"][1]["ml_hash"] = "0" * 16
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="the sweep was planned with 0000"):
        worker.Worker(tmp_path, [{}])


# ----- runs that exist already ------------------------------------------------------------------------------

def test_finished_runs_of_the_same_experiment_are_adopted_once(tmp_path, fake, capsys):
    assert call("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 3, "--dir", tmp_path / "a") == 0
    folders = sorted((tmp_path / "a/runs").glob("2*_s0"))
    broken = folders[0] / "run.jsonl"  # the control's, first in time
    broken.write_text(broken.read_text().replace('"seed": 0', '"seed": 7'))
    args = ["ablate", "short/11", "--features", NORM, LAM, "--seeds", 1, "--controls", 3]
    assert (
        call(*args, "--dir", tmp_path / "b", "--reuse", tmp_path / "a", "--reuse", tmp_path / "a/runs") == 0
    )
    assert "adopted 3 finished runs" in capsys.readouterr().out  # controls 1 and 2, and NORM
    assert len(starts(fake)) == 5 + 2
    done, _ = queue.settled(tmp_path / "b")
    adopted = [r for r in done.values() if "adopted_from" in r]
    assert len(adopted) == 3 and all(
        (tmp_path / "b/runs" / r["folder"] / "run.jsonl").exists() for r in adopted
    )
    assert list((tmp_path / "b/runs").glob("sources-*.txt"))
    assert sweep_report.report(tmp_path / "b")[0]["adopted"] == 3
    assert call(*args, "--dir", tmp_path / "c", "--set", "schedule.steps=9", "--reuse", tmp_path / "b") == 0
    assert len(starts(fake)) == 5 + 2 + 5  # another experiment


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 5), ("scale", "tiny"), ("numerics_version", 0), ("profiled", True), ("val_digest", "0"),
        ("corpus_digest", "0"), ("ml_hash", "0" * 16)
    ],
)
def test_a_run_that_differs_in_anything_that_counts_is_foreign(key, value):
    plan = planned("ablate", "short/11", *TWO)
    arm = plan["arms"][1]
    run = {
        "ml_hash": arm["ml_hash"], "seed": 0, "scale": "micro", "numerics_version": plan["numerics_version"],
        "profiled": False, **plan["digests"][arm["ml_hash"]]
    }
    assert not queue.foreign(run, plan, arm, 0) and f"{key} is {value}" in queue.foreign(
        run | {key: value}, plan, arm, 0
    )


def test_a_finished_run_that_its_dying_worker_did_not_record_is_not_repeated(tmp_path, fake):
    args = ["ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q"]
    assert call(*args) == 0
    record = sorted((tmp_path / "q/done").glob("*.json"))[0]
    before = json.loads(record.read_text())
    record.unlink()
    assert call(*args) == 0 and len(starts(fake)) == 4
    assert json.loads(record.read_text())["last_hash"] == before["last_hash"]


def test_a_report_refuses_runs_that_are_not_those_recorded(tmp_path, fake):
    assert call("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q") == 0
    log = sorted((tmp_path / "q/runs").glob("2*/run.jsonl"))[0]
    log.write_text(
        log.read_text() .replace('"val_loss": 5', '"val_loss": 4')
        .replace('"val_loss": 4.9', '"val_loss": 4.8')
    )
    with pytest.raises(UserError, match="breaks the hash chain"):
        sweep_report.report(tmp_path / "q")


# ----- in earnest -------------------------------------------------------------------------------------------

def test_a_real_sweep_killed_once_is_resumed_and_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = command(
        "ablate", "short/11", "--features", NORM, "--seeds", 1, "--controls", 1, "--dir", tmp_path / "q",
        "--set", "schedule.steps=3", "--set", "validation.tokens=4096"
    )
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    runs = tmp_path / "q/runs"
    wait_for(lambda: len(list(runs.glob("2*"))) == 2)
    process.kill()
    process.wait()
    finished = [p for p in runs.glob("2*") if (p / "summary.json").exists()]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout and len(list(runs.glob("2*"))) == 3 and len(finished) == 1
    found = json.loads(next((tmp_path / "q").glob("ablate*.json")).read_text())
    assert found["complete"] and found["rows"][0]["effect"] is not None and found["failed"] == 0
    assert schema.ml_hash(deltas.resolve("short/11", scale="micro", without=["model.embed.norm"], sets=[
        "schedule.steps=3", "validation.tokens=4096"]).settings) == found["rows"][0]["runs"][0]["ml_hash"]
