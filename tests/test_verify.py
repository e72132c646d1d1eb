"""Laws of `records verify`: the good claim, what a folder of logs may be, and that no input can crash it."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runlog
import schedule
from claim_builder import Forgery, built, claim, command, good, two_arms
from evidence import claim_folder, provenance, run_laws, verify
from common.errors import UserError
from settings import deltas

ROOT = Path(__file__).parent.parent


def test_the_good_claim_is_consistent_and_shown(good):
    results = verify.verify(good)
    assert results["problems"] == [] and results["reasons"] == []
    assert (results["verdict"], results["grade"]) == ("shown", "consistent")
    assert results["statistics"]["target"]["p"] < 0.01 and results["statistics"]["time"]["p_less"] < 0.01


def test_sealing_again_without_an_edit_changes_nothing(claim):
    paths = [p for p in sorted(claim.folder.rglob("*")) if p.is_file() and p.suffix != ".json"]
    before = [p.read_bytes() for p in paths]
    claim.seal()
    assert before == [p.read_bytes() for p in paths]
    assert verify.verify(claim.folder)["verdict"] == "shown"


# ----- warm-up of compiled models ---------------------------------------------------------------------------

def test_a_compiled_model_warms_up_each_of_its_windows():
    s = deltas.resolve("short/13", scale="micro").settings
    log = run_laws.Log("x", None, [({"kind": "start", "device": "1 x NVIDIA H100"}, "")], s)
    assert run_laws.warmup_steps(log) == 2 + len({p.shape.windows for p in schedule.plan(s)})
    log.links[0][0]["device"] = "CPU, 1 process, 2 threads"
    assert run_laws.warmup_steps(log) == 3
    log.settings = deltas.resolve("short/13", scale="micro", sets=["system.warmup_steps=0"]).settings
    assert run_laws.warmup_steps(log) == 0


# ----- code at a commit -------------------------------------------------------------------------------------

def test_sources_are_compared_with_the_files_of_their_commit_without_running_them():
    from evidence import arms
    if not arms.is_checkout():
        pytest.skip("no git checkout")
    commit = arms.line("rev-parse", "HEAD")
    declared = {"commit": commit, "tree": arms.line("rev-parse", "HEAD^{tree}")}
    tree = arms.line("ls-tree", "-r", "--name-only", commit).splitlines()
    names = provenance.listed_sources(arms.git("show", f"{commit}:runlog.py").decode(), tree)
    text = "".join(f"# ----- {n}\n{arms.git('show', f'{commit}:{n}').decode()}\n" for n in names)
    found = claim_folder.Evidence(Path("x"), None)

    def problems(text, arm):
        return list(provenance.check_commit(found, "new", arm, "0" * 16, text))

    assert problems(text, declared) == []
    assert "is not the code of commit" in problems(text.replace("import", "imp0rt", 1), declared)[0]
    assert (
        "which commit" not in problems(text, declared)
        and "tree 000" in problems(text, {**declared, "tree": "000"})[0]
    )
    assert "holds a file that commit" in problems(text + "# ----- extra.py\n\n", declared)[0]
    for name in ("optim.py", "kernels/__init__.py"):
        less = text.replace(f"# ----- {name}\n{arms.git('show', f'{commit}:{name}').decode()}\n", "")
        assert f"leaves out {name}, which commit" in problems(less, declared)[0]
    assert (
        "adds tests/conftest.py"
        in problems(
            f"{text}# ----- tests/conftest.py\n{arms.git('show', f'{commit}:tests/conftest.py').decode()}\n",
            declared,
        )[0]
    )
    assert "is no commit" in problems(text, {**declared, "commit": "--output=/etc/x"})[0]


# ----- other folders ----------------------------------------------------------------------------------------

def test_exit_codes_and_results_file(claim, capsys):
    assert command(claim.folder) == 0
    written = json.loads((claim.folder / "results.json").read_text())
    assert (
        written["verdict"] == "shown"
        and "SHOWN\ngrade: consistent\nwhat this cannot know:" in capsys.readouterr().out
    )
    assert command(claim.folder, json=True) == 0 and json.loads(capsys.readouterr().out) == written
    claim.events(3, "reset")[0]["state_after"] = "f" * 64
    claim.seal()
    assert command(claim.folder) == 2
    assert json.loads((claim.folder / "results.json").read_text())["verdict"] == "refused"
    assert "REFUSED: 1 problem\n  runs/" in capsys.readouterr().out


def test_a_comparison_is_checked_but_claims_nothing(tmp_path, capsys):
    results = built(tmp_path / "c", claim="comparison", record=None, alpha=0.05)
    assert results["verdict"] == "shown" and results["grade"] == "consistent" and results["comparisons"]
    assert command(tmp_path / "c") == 0
    out = capsys.readouterr().out
    assert results["comparisons"][0]["verdict"] in out and "grade: consistent" in out and "SHOWN" not in out
    claim = Forgery(tmp_path / "c")
    claim.events(3, "stream")[0]["digest"] = "d" * 64
    claim.seal()
    assert verify.verify(claim.folder)["verdict"] == "refused"


@pytest.mark.parametrize("fields, why", [
    ({"order": [{"arm": "new", "seed": 9, "discard": True}, *({"arm": a, "seed": i, "discard": False}
                                                             for a in ("new", "parent") for i in range(4))]},
     "the order of runs and their seeds are not what order_seed 7 draws"),
    ({"aa": True}, "aa is True, but its arms differ"),
    ({"arms": two_arms("short/11", "short/11")}, "aa is False, but its arms are the same")])
def test_a_comparison_keeps_the_laws_of_its_plan(fields, why, tmp_path):
    results = built(tmp_path / "c", claim="comparison", record=None, alpha=0.05, **fields)
    assert [why in p for p in results["problems"]] == [True], results["problems"]


def test_arms_that_read_different_numbers_of_shards_agree_if_the_declared_corpus_has_both(claim):
    for register in claim.of("register"):
        claim.events(register["run"], "start")[0] |= {
            "corpus": "own",
            "corpus_digest": "cd"[register["arm"] == "new"] * 64,
        }
    claim.seal()
    assert any("corpus_digest" in p for p in verify.verify(claim.folder)["problems"])
    claim.lines[0]["corpus_prefixes"] = ["c" * 64, "d" * 64]
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown"
    assert any("the corpus own: its digests are not pinned here" in u for u in results["unknown"])


LOSSES = [3.2783, 3.2772, 3.2791, 3.2778]


def text_folder(folder, losses=LOSSES, steps=1770):
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        (folder / f"{i}.txt").write_text(
            f"import torch\n{'=' * 100}\nstep:0/{steps} val_loss:10.8258 train_time:0ms "
            f"step_avg:nanms\nstep:{steps}/{steps} val_loss:{loss} train_time:{170000 + i}ms "
            "step_avg:96.05ms\n"
        )
    return folder


def test_text_logs_give_statistics_and_no_grade(tmp_path, capsys):
    folder = text_folder(tmp_path / "logs")
    assert command(folder, target=3.28) == 0 and not (folder / "results.json").exists()
    out = capsys.readouterr().out
    assert "4 text logs of 1770 steps" in out and "mean 3.27810" in out and "grade: none (text logs)" in out
    assert command(folder, target=3.279, json=True) == 3
    assert json.loads(capsys.readouterr().out)["target"]["p"] > 0.01


def test_a_cut_text_log_counts_as_failed(tmp_path):
    folder = text_folder(tmp_path / "logs")
    path = folder / "2.txt"
    path.write_text(path.read_text().replace("step:1770/1770", "step:1500/1770"))
    assert "2.txt: no final loss: it counts as failed" in verify.text_logs(folder, 3.28)["reasons"]


def test_bad_input_is_one_clear_line(good, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/photo.jpg").write_bytes(b"x")
    text_folder(tmp_path / "nested/baseline")
    mixed = text_folder(tmp_path / "mixed")
    (mixed / "9.txt").write_text("step:1750/1750 val_loss:3.27 train_time:1ms step_avg:1ms\n")
    twice = text_folder(tmp_path / "twice")
    shutil.copy(twice / "0.txt", twice / "9.txt")
    (tmp_path / "half.json").write_text('{"version": 1, "comm')
    run = next((good / "runs").glob("*/"))
    for folder, options, message in [
        (tmp_path / "none", {}, "no such folder"), (tmp_path / "empty", {}, "the folder is empty"),
        (tmp_path / "foreign", {}, "not a claim folder: it has no manifest.jsonl"),
        (run, {}, "a single run is evidence only as part of a claim"),
        (good / "runs", {}, "not a claim folder"),
        (tmp_path / "nested", {"target": 3.28}, "its logs lie in baseline"),
        (mixed, {"target": 3.28}, "runs of 1750, 1770 steps are different experiments"),
        (twice, {"target": 3.28}, "the same run as 0.txt: a copy"), (mixed, {}, "name the loss to reach"),
        (mixed, {"audit": "a.json"}, "text logs name neither code nor machine"),
        (good, {"target": 3.0}, "a claim declares its target before the first run"),
        (good, {"audit": str(tmp_path / "half.json")}, "not the result of an audit"),
        (good, {"reproduction": str(tmp_path / "empty")}, "the folder is empty")
    ]:
        with pytest.raises(UserError) as error:
            command(folder, **options)
        assert message in str(error.value) and "\n" not in str(error.value), folder


def test_half_written_manifests_are_refused_and_their_runs_still_checked(claim):
    path = claim.folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-60])
    (claim.folder / "runs" / claim.name(3) / "summary.json").write_text("{")
    problems = verify.verify(claim.folder)["problems"]
    assert any("is not a complete log line" in p for p in problems) and any(
        "summary.json: missing" in p for p in problems
    )


JUNK = [None, -1, 10 ** 400, "x", [], {}, [None], True, math.nan]


def test_no_value_in_any_field_of_a_log_can_crash_it(claim):
    """Every field of every event replaced by junk: refused or harmless, never an exception."""
    name, kinds = claim.name(3), set()
    original = json.dumps(claim.logs[name])
    for i, event in enumerate(json.loads(original)):
        if event["kind"] in kinds:
            continue
        kinds.add(event["kind"])
        for field in [f for f in event if f != "n"]:
            for junk in JUNK:
                claim.logs[name] = json.loads(original)
                claim.logs[name][i][field] = junk
                folder = rewritten(claim, name)
                log, problems = run_laws.read_log(folder, name)
                problems += run_laws.check_run(log) if log else []
                assert all(isinstance(p, str) for p in problems)


def test_what_a_mixture_tells_of_its_experts_is_read_and_checked(tmp_path):
    program = [
        sys.executable, "train_gpt.py", "variants/1", "--scale", "micro", "--set", "schedule.steps=3",
        "--out", str(tmp_path)
    ]
    subprocess.run(
        program, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    folder = next(tmp_path.glob("2*"))
    original = json.dumps(runlog.read_chain(folder / "run.jsonl"))
    at = next(i for i, e in enumerate(json.loads(original)) if e["kind"] == "experts")

    def problems(change):
        events = json.loads(original)
        change(events)
        for n, event in enumerate(events):
            event["n"] = n
        chained(folder, events)
        log, found = run_laws.read_log(folder, "run")
        return found + [p for p in (run_laws.check_run(log) if log else []) if "experts" in p]

    assert problems(lambda events: None) == []
    assert "told at steps [], due at [3]" in problems(lambda events: events.pop(at))[0]
    assert "told at steps [3, 3]" in problems(lambda events: events.insert(at - 1, events[at].copy()))[0]
    assert (
        "loads and dropped rows are not"
        in problems(lambda events: events[at]["load"][0].__setitem__(0, 7))[0]
    )
    lists = run_laws.LOADS + run_laws.LATER_LOADS
    assert (
        "of layers [0]"
        in problems(
            lambda events: events[at].update({n: events[at][n][:1] for n in lists}, layers=[0])
        )[0]
    )
    for name, loads in (("max_vio", "load"), ("max_vio_val", "val_load")):
        assert (
            f"{name} of layer 1 is not that of its {loads}"
            in problems(lambda events: events[at][name].__setitem__(0, events[at][name][0] + 0.01))[0]
        )
    assert "val_load does not add up" in problems(
        lambda events: events[at]["val_load"][0].__setitem__(0, 7)
    )[0]
    later = [*run_laws.LATER_LOADS, "val_load"]  # earlier logs have none of them
    assert problems(lambda events: [events[at].pop(n) for n in later]) == []
    for field in [*lists, "load", "val_load", "step"]:
        for junk in JUNK:
            found = problems(lambda events: events[at].__setitem__(field, junk))
            assert found and all(isinstance(p, str) for p in found), (field, junk)


def rewritten(claim, name):
    """The run's chain alone, hashed again (render and summarise may not survive the junk, and need not)."""
    return chained(claim.folder / "runs" / name, claim.logs[name])


def chained(folder, events):
    previous, lines = runlog.GENESIS, []
    for event in events:
        line, previous = runlog.chain_line(previous, event)
        lines.append(line)
    (folder / "run.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_no_value_in_any_field_of_a_manifest_can_crash_it(claim):
    draw, original = random.Random(3), json.dumps(claim.lines)
    places = [(i, f) for i in (0, 1, 2) for f in claim.lines[i] if f not in ("n", "kind")]
    places += [(0, f"arms.new.{f}") for f in claim.lines[0]["arms"]["new"]]
    for i, field in places:
        claim.lines = json.loads(original)
        *path, last = field.split(".")
        node = claim.lines[i]
        for key in path:
            node = node[key]
        node[last] = draw.choice(JUNK)
        previous, lines = runlog.GENESIS, []
        for event in claim.lines:
            line, previous = runlog.chain_line(previous, event)
            lines.append(line)
        (claim.folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        assert verify.verify(claim.folder)["verdict"] in ("refused", "shown", "not shown")
