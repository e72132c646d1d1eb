"""Laws of `records verify`: what a consistent claim shows, what raises its grade, and what logs cannot
know."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from claim_builder import MACHINE, TARGET, Forgery, arm, built, claim, command, good, systems, two_arms
from common.errors import UserError
from evidence import provenance, run_laws, signing, verify
from settings import deltas, schema

ROOT = Path(__file__).parent.parent


def test_a_diverged_run_fails_the_claim(tmp_path):
    results = built(tmp_path / "c", status={3: "diverged"})
    assert results["problems"] == [] and results["verdict"] == "not shown"
    assert (
        "no final loss of seed" in results["reasons"][0]
        and "every registered run counts" in results["reasons"][0]
    )


def test_a_record_must_be_faster_than_its_parent(tmp_path):
    results = built(tmp_path / "c", step_ms={"new": 2000.0, "parent": 2000.0})
    assert results["verdict"] == "not shown" and "not shown to be faster" in results["reasons"][0]


def test_a_record_must_reach_the_target_with_few_enough_doubts(tmp_path, capsys):
    results = built(tmp_path / "c", loss={"new": 5.1955, "parent": 5.27})
    assert results["verdict"] == "not shown" and results["reasons"][0].startswith("target 5.2: mean 5.19")
    assert results["statistics"]["target"]["runs_for"] > 4
    verify.report(results, "")
    assert "a FRESH set with this mean and sd would need" in capsys.readouterr().out


def test_an_ml_claim_needs_a_target(tmp_path):
    results = built(tmp_path / "c", two_arms(sets=[]), target=None)
    assert results["verdict"] == "not shown" and "scale micro has no target to reach" in results["reasons"][0]


def test_looks_use_their_share_of_alpha_and_are_taken_again(tmp_path):
    plan = {"looks": [{"runs": 3, "alpha": 0.005}, {"runs": 6, "alpha": 0.005}]}
    results = built(tmp_path / "a", plan=plan, look=3)
    assert results["verdict"] == "shown" and results["statistics"]["alpha"] == 0.005
    assert results["statistics"]["arms"]["new"]["n"] == 3
    late = built(tmp_path / "b", plan=plan, look=6)
    assert late["verdict"] == "not shown"
    assert late["reasons"] == ["the look at 3 runs was booked as 'continue', its runs pass at 0.005"]
    early = built(tmp_path / "c", plan=plan, look=3, loss={"new": 5.199, "parent": 5.27})
    assert "the look at 3 runs was booked as 'passed', its runs do not pass at 0.005" in early["reasons"]


def test_a_killed_run_is_made_again_and_told(claim):
    run = claim.counted()[1]
    claim.again(run, note="the power went")
    claim.logs[claim.name(run)] = claim.events(run)[:6]
    claim.of("finish", run)[0]["status"] = "failed"
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown" and results["excluded"][0]["note"] == "the power went"


def test_a_systems_claim_keeps_loss_and_gradients_seed_by_seed(tmp_path):
    results = systems(tmp_path / "systems")
    assert results["verdict"] == "shown", results
    parity = results["statistics"]["parity"]
    assert parity["precision"] == "float32" and [r["seed"] for r in parity["rows"]] == [0, 1, 2, 3]
    assert 0 < max(r["worst"] for r in parity["rows"]) < parity["gradient"] == 1e-4
    assert results["statistics"]["noninferior"]["against"] == "short/5"


@pytest.mark.parametrize(
    "edit, reason",
    [
        (
            lambda probe: probe["gradients"]["blocks.3.mlp.c_fc"].__setitem__(1, 0.5),
            r"gradients differ by .*blocks\.3\.mlp\.c_fc",
        ),
        (
            lambda probe: [m.__setitem__(0, 1.001 * m[0]) for m in probe["gradients"].values()],
            "gradients differ by 1.0e-03",
        ),
        (lambda probe: probe.update(loss=probe["loss"] + 0.001), "loss differs by 1.4e-04"),
        (
            lambda _, validation: validation["train_loss"].__setitem__(
                3, validation["train_loss"][3] + 0.001
            ),
            "the first 5 timed training losses differ by 1.4e-04",
        ),
    ],
)
def test_another_loss_or_gradient_of_the_same_seed_is_no_systems_change(edit, reason, tmp_path):
    """A change that acts from the fourth step on shows in the training losses."""
    systems(tmp_path / "systems")
    claim = Forgery(tmp_path / "systems")
    run = claim.counted()[0]
    given = (claim.events(run, "probe")[0], claim.events(run, "validation")[1])
    edit(*given[:edit.__code__.co_argcount])
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "not shown" and len(results["reasons"]) == 1
    assert re.match(r"parity: seed \d: " + reason, results["reasons"][0]), results["reasons"]


def test_probes_of_one_process_and_of_all_are_not_compared(monkeypatch):
    """Logs of version 2 with several processes hold those of process 0 alone; alike ones are compared as
    ever."""
    def events(version, processes):
        return [{"kind": "start", "log_version": version, "processes": processes},
                {"kind": "probe", "step": 2, "tokens": "random", "loss": 7.0, "gradients": {"w": [1.0, 0.5]}},
                {"kind": "validation", "train_loss": [7.0] * 8}]

    claim = SimpleNamespace(declaration={"arms": {"new": {"settings": {"numerics": {}}}}})
    found = {"new": [{"seed": 0, "log": (3, 2)}], "parent": [{"seed": 0}]}
    monkeypatch.setattr(verify, "events_of", lambda claim, row: events(*row["log"]))
    for log, comparable in (((3, 4), True), ((2, 1), True), ((2, 2), False)):
        found["parent"][0]["log"] = log
        failures = verify.check_parity(claim, found)["failures"]
        assert failures == [] if comparable else "of process 0 alone" in failures[0] and len(failures) == 1


def worse(folder, **more):
    """A systems claim whose record loses 0.01 nats, with noise of its own along the curve: no shifted
    copy."""
    systems(folder, loss={"new": 5.31, "parent": 5.3}, **more)
    claim, draw = Forgery(folder), random.Random(1)
    for run in claim.counted():
        for event in claim.events(run, "validation")[2:]:  # the first training losses are held alike
            event["train_loss"] = [x + 0.02 * draw.gauss(0, 1) for x in event["train_loss"]]
    claim.seal()
    return verify.verify(folder)


def test_a_systems_claim_may_not_lose_more_than_the_margin(tmp_path):
    results = worse(tmp_path / "systems")
    assert results["verdict"] == "not shown" and "upper bound" in results["reasons"][0]


def test_a_systems_record_on_a_systems_record_is_held_against_the_last_ml_record(tmp_path):
    """By the fields: record 21t is a re-timing by its kind, and changes what is computed."""
    arms = {"new": arm("short/23", []), "parent": arm("short/22", [])}
    results = systems(tmp_path / "a", arms)
    assert any("run the last ml record, short/21t, as arm base" in r for r in results["reasons"]), results
    results = systems(
        tmp_path / "b", {**arms, "base": arm("short/21t", [])}, {"new": 5.3, "parent": 5.3, "base": 5.3}
    )
    assert results["verdict"] == "shown" and results["statistics"]["noninferior"]["against"] == "short/21t"
    results = systems(tmp_path / "c", {**arms, "base": arm("short/21", [])})
    assert any("arm base runs short/21, the last ml record is short/21t" in p for p in results["problems"])
    # called systems; its Muon rounds elsewhere
    assert provenance.last_ml(deltas.find_record("short/7")).ref == "short/6"


def test_a_new_record_is_resolved_from_the_delta_it_carries(tmp_path):
    line = (
        'id = "901"\ntitle = "t"\nparent = "short/11"\ndate = 2026-01-01\npeople = ["@x"]\nkind = '
        '"ml"\nsource = "log"\n'
    )
    parent = deltas.resolve("short/11", scale="micro", sets=TARGET).settings
    s = schema.assign(parent, "optim.muon.lr", 0.05, "test")
    arms = {"new": arm("short/901", TARGET, s=s), "parent": arm("short/11", TARGET)}
    folder = tmp_path / "c"
    results = built(folder, arms, record="short/901")
    assert any("neither in this checkout nor in record.toml of the claim" in p for p in results["problems"])
    (folder / "record.toml").write_text(line + '[delta]\n"optim.muon.lr" = 0.05\n')
    assert verify.verify(folder)["problems"] == []
    assert verify.verify(folder)["verdict"] == "shown"
    (folder / "record.toml").write_text(line + '[delta]\n"optim.muon.lr" = 0.06\n')
    assert verify.verify(folder)["problems"] == [
        "arm new: short/901 at scale micro --set validation.target=5.2 resolves to other settings here: "
        "optim.muon.lr"]
    (folder / "record.toml").write_text(
        line.replace("short/11", "short/10") + '[delta]\n"optim.muon.lr" = 0.05\n'
    )
    assert any("the parent of short/901 is short/10" in p for p in verify.verify(folder)["problems"])


# ----- grades -----------------------------------------------------------------------------------------------

def audit_file(tmp_path, **fields):
    from evidence.audit import CHECKS

    result = {
        "version": 1, "ref": "x", "commit": "1" * 40, "tree": "2" * 40, "record": "short/11", "passed": True,
        "seeds": [77, 78, 0, 1, 2, 3],
        "checks": [{"name": name, "passed": True, "detail": ""} for name in CHECKS],
        "confined": {"network": "cut off", "writes": "limited to the audit's folder"}, **fields
    }
    (tmp_path / "audit.json").write_text(json.dumps(result))
    return tmp_path / "audit.json"


@pytest.fixture
def known(monkeypatch):
    """This repository has the commit of the tests' claims."""
    monkeypatch.setattr(verify, "tree_of", lambda commit: "2" * 40)


@pytest.fixture
def key(tmp_path):
    """A judge's key."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    for name in ("judge", "thief"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True
        )
    return tmp_path / "judge"


def test_an_audit_counts_if_the_judge_signed_it_or_made_it_now(good, tmp_path, known, key, monkeypatch):
    path, public = audit_file(tmp_path), key.with_suffix(".pub")
    typed = json.loads(path.read_text())

    def refused_because(text, key=None, audit=path):
        results = verify.verify(good, audit, key=key)
        return results["grade"] == "consistent" and any(text in u for u in results["unknown"])

    assert refused_because("text that anyone can type") and refused_because(
        "is not signed by the key", public
    )
    assert verify.verify(good, typed)["grade"] == "audited"  # made in this call
    signed = signing.signed(typed, key)
    path.write_text(json.dumps(signed))
    assert verify.verify(good, path, key=public)["grade"] == "audited"
    assert verify.verify(good, path, key=key)["grade"] == "audited"
    assert refused_because("is not signed by the key thief.pub", tmp_path / "thief.pub")
    path.write_text(json.dumps({**signed, "seconds": 1}))  # anything of it edited
    assert refused_because("is not signed by the key", public)
    path.write_text(json.dumps(signing.signed(typed, tmp_path / "thief")))
    assert refused_because("is not signed by the key", public)
    monkeypatch.setattr(verify, "tree_of", lambda commit: None)
    assert refused_because("which this repository does not have", public)
    monkeypatch.setattr(verify, "tree_of", lambda commit: "5" * 40)
    assert refused_because("commit 111111111111 has 555555555555", public)


def test_an_audit_made_now_is_kept_with_the_judge_s_signature(
    claim, tmp_path, known, key, monkeypatch, capsys
):
    result = json.loads(audit_file(tmp_path).read_text())
    monkeypatch.setattr(verify, "audit_now", lambda folder: result)
    assert command(claim.folder, audit="now", judge_key=str(key)) == 0
    capsys.readouterr()
    assert command(claim.folder, judge_key=str(key) + ".pub", json=True) == 0
    assert json.loads(capsys.readouterr().out)["grade"] == "audited"
    assert command(claim.folder, json=True) == 0  # who does not name the key does not count it
    assert json.loads(capsys.readouterr().out)["grade"] == "consistent"
    with pytest.raises(UserError, match="no such file; make one with `ssh-keygen"):
        command(claim.folder, judge_key=str(tmp_path / "none"))


def test_an_audit_of_other_code_record_or_scope_does_not_raise_the_grade(good, tmp_path, known):
    for fields, why in (
        ({"commit": "3" * 40}, "the audit is of commit 333333333333"),
        ({"record": "short/5"}, "short/5"),
        ({"record": None}, "the audit is of None"),
        (
            {"confined": {"network": "cut off", "writes": "not limited (needs Linux with Landlock)"}},
            "the audit ran without a sandbox",
        ),
        ({"checks": [{"name": "causality", "passed": True, "detail": ""}]}, "the audit lacks"),
        ({"seeds": [77, 78, 0, 2]}, "the audit did not look at seeds 1, 3 of the claim"),
        ({"seeds": [77, 78, 0, 1, 2, "3"]}, "the audit did not look at seeds 3 of the claim"),
        ({"seeds": None}, "the audit did not look at seeds 0, 1, 2, 3 of the claim"),
    ):
        results = verify.verify(good, json.loads(audit_file(tmp_path, **fields).read_text()))
        assert results["grade"] == "consistent" and any(why in u for u in results["unknown"]), why


def test_a_failed_audit_speaks_against_the_claim(good, tmp_path):
    failed = audit_file(tmp_path, passed=False, checks=[{"name": "causality", "passed": False, "detail": ""}])
    results = verify.verify(good, failed)
    assert results["verdict"] == "not shown" and results["reasons"] == [
        "the audit of its code failed: causality"
    ]


def test_a_reproduction_is_another_claim_on_another_machine(good, tmp_path):
    other = {**MACHINE, "machine": "ba9876543210"}
    built(tmp_path / "again", machine=other)
    results = verify.verify(good, reproduction=tmp_path / "again")
    assert results["grade"] == "reproduced" and results["reproduction"]["machine"] == "ba9876543210"
    for how, why in (
        ({}, "it ran on the same machine"),
        (
            {"machine": other, "arms": two_arms("short/9", "short/8"), "record": "short/9"},
            "its record is short/9, here short/11",
        ),
        ({"machine": other, "step_ms": {"new": 3000.0, "parent": 2400.0}}, "not shown to be faster"),
        (
            {"machine": other, "loss": {"new": 5.25, "parent": 5.27}},
            "its own runs do not show the claim (target",
        ),
    ):
        folder = tmp_path / re.sub(r"\W", "_", why)
        built(folder, **how)
        results = verify.verify(good, reproduction=folder)
        assert results["grade"] == "consistent" and any(why in u for u in results["unknown"]), why


def test_the_parent_s_own_claim_does_not_reproduce_a_systems_record(tmp_path):
    """It has the same ml_hash and target: a systems record is reproduced by its own code and settings
    only."""
    target, other = ["validation.target=5.5"], {**MACHINE, "machine": "ba9876543210"}
    assert systems(tmp_path / "systems", sets=target, target=5.5)["verdict"] == "shown"
    parent = built(tmp_path / "parent", two_arms("short/5", "short/4", target), {"new": 5.3, "parent": 5.4},
                   record="short/5", target=5.5, machine=other)
    assert parent["verdict"] == "shown"
    results = verify.verify(tmp_path / "systems", reproduction=tmp_path / "parent")
    assert results["grade"] == "consistent" and any(
        "its record is short/5, here short/901" in u for u in results["unknown"]
    )
    systems(tmp_path / "again", sets=target, target=5.5, machine=other)
    assert verify.verify(tmp_path / "systems", reproduction=tmp_path / "again")["grade"] == "reproduced"


def test_a_systems_record_may_not_eat_the_buffer_below_the_target(tmp_path):
    """The target is reached with ease, and the loss is worse than the last ml record's by more than the
    margin."""
    results = worse(tmp_path / "c", sets=["validation.target=5.5"], target=5.5)
    assert results["statistics"]["target"]["passed"] and results["verdict"] == "not shown"
    assert any("loss against short/5" in r and "must be below 0.002" in r for r in results["reasons"])


def test_what_raised_the_grade_is_kept_and_a_lower_one_is_told(claim, tmp_path, capsys, known, monkeypatch):
    monkeypatch.setattr(verify, "uncounted", lambda *_: "")
    built(tmp_path / "again", machine={**MACHINE, "machine": "ba9876543210"})
    assert command(claim.folder, audit=str(audit_file(tmp_path)), reproduction=str(tmp_path / "again")) == 0
    capsys.readouterr()
    assert command(claim.folder, json=True) == 0
    assert json.loads(capsys.readouterr().out)["grade"] == "reproduced"
    shutil.rmtree(claim.folder / "reproduction")
    command(claim.folder)
    assert "note: it was reproduced, now it is audited" in capsys.readouterr().out
    (claim.folder / "audit.json").unlink()
    command(claim.folder)
    assert "note: it was audited, now it is consistent" in capsys.readouterr().out


def test_a_claim_does_not_reproduce_itself(good, claim):
    for events in claim.logs.values():
        events[0]["machine"] = "ba9876543210"
    claim.lines[0]["machine"]["machine"] = "ba9876543210"
    claim.seal()
    results = verify.verify(good, reproduction=claim.folder)
    assert results["grade"] == "consistent" and any(
        "it holds runs of this claim" in u for u in results["unknown"]
    )


def test_a_consistent_forgery_passes_and_the_documentation_says_so(claim):
    """Whoever rewrites everything together is not found out by logs; the page for users must not pretend
    otherwise."""
    for run in claim.counted():
        for event in claim.events(run):
            if event["kind"] in ("validation", "end"):
                event["val_loss"] -= 0.1 * event.get("step", 72) / 72
        claim.events(run, "end")[0]["verdict"] = [
            f"final validation loss {claim.events(run, 'end')[0]['val_loss']:.4f}"
        ]
    claim.seal()
    results = verify.verify(claim.folder)
    text = "rewrites manifest, logs and summaries together"
    assert results["verdict"] == "shown" and any(text in u for u in results["unknown"])
    assert text in (ROOT / "docs/evidence.md").read_text()


def test_the_documentation_names_every_grade_and_tolerance():
    page = (ROOT / "docs/evidence.md").read_text()
    for text in ("`consistent`", "`audited`", "`reproduced`", "1e-4", "5e-2", f"{run_laws.LOSS_LIMIT:g}"):
        assert text in page, text
