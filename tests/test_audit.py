"""Laws of `records audit`: the present code passes; each kind of cheat or bug fails the check that is meant
for it.

Each edit is made in a copy of the working tree, where only the check that must find it is run.
"""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evidence import audit, audit_probe
from records.__main__ import main
from common.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The working tree, copied once."""
    folder = tmp_path_factory.mktemp("tree")
    audit.copy(ROOT, folder, folder.parent / "git")
    return folder


def edited(tree, folder, *edits):
    """A copy of the tree with (file, old text, new text) replaced; files that stay are links."""
    shutil.copytree(tree, folder, copy_function=os.link)
    for name, old, new in edits:
        text = (folder / name).read_text()
        assert text.count(old) == 1, (
            f"{name} has {text.count(old)} times {old!r}: this test edits code that has changed"
        )
        (folder / name).unlink()
        (folder / name).write_text(text.replace(old, new))
    return str(folder)


def test_the_present_code_passes_every_check_and_says_what_an_audit_cannot_know(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["audit", str(ROOT), "--record", "short/11", "--json", str(tmp_path / "audit.json")])
    out, _ = capsys.readouterr()
    assert stop.value.code == 0 and "What an audit cannot know" in out, out
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["passed"] and [c["name"] for c in result["checks"]] == list(audit.CHECKS)
    assert all(c["passed"] is True and c["detail"] for c in result["checks"])
    assert (result["version"], result["scale"], result["record"]) == (1, "micro", "short/11")


@pytest.mark.parametrize(
    "record, checks", [("short/head", ["causality"]), ("variants/4", ["causality", "no_trace"])]
)
def test_the_head_and_a_mixture_of_experts_are_causal_with_all_their_features(tree, record, checks):
    result = audit.audit(str(tree), record, only=checks)
    assert result["passed"], result["checks"]


@pytest.mark.parametrize("record, sets", [("variants/4", ["system.experts=padded"]), ("short/11", [])])
def test_mixtures_are_audited_in_blocks_where_no_token_can_move_another_s_rounding(record, sets):
    assert audit_probe.facts({"record": record, "scale": "micro"})["sets"] == sets


CHEATS = {
    "attention that sees the future": (
        "causality", "moved an earlier loss",
        [("kernels/attention.py", "is_causal=causal,", "is_causal=False,")]
    ),
    "a loss that is scaled": (
        "normalisation",
        "sum to",
        [
            (
                "model.py", "(aux - aux.detach()).view(targets.shape)\n        return losses\n",
                "(aux - aux.detach()).view(targets.shape)\n"
                "        return losses * (1.0 if self.training else 0.9999)\n"
            )
        ],
    ),
    "validation over fewer tokens, at full scale only": (
        "validation_targets",
        "8,388,608 targets instead of 10,485,760",
        [
            (
                "data/stream.py", "    if tokens % (LOGICAL_RANKS * seq_len):\n",
                "    tokens = min(tokens, 2 ** 23)\n    if tokens % (LOGICAL_RANKS * seq_len):\n"
            )
        ],
    ),
    "validation on training tokens": (
        "validation_targets", "the validation reads training tokens",
        [("data/stream.py", "    ids = open_shard(corpus.val)[", "    ids = open_shard(corpus.train[0])[")]
    ),
    "validation that trains": (
        "no_trace",
        "validation 0 changed",
        [
            (
                "train_gpt.py", "    model.train()\n    sums =",
                "    next(model.parameters()).mul_(0.999)\n    model.train()\n    sums ="
            )
        ],
    ),
    "a warm-up that leaks": (
        "warm_up",
        "validation losses at step 0",
        [
            (
                "system/warmup.py", "    run.model.initialise(seed)\n    run.optimizer.reset()\n",
                "    run.optimizer.reset()\n"
            ),
            ("system/warmup.py", "    if before != after:\n", "    if False:\n"),
        ],
    ),
    "randomness without a seed": (
        "seed",
        "two trainings with seed 0 differ in training losses",
        [
            (
                "train_gpt.py", "run.compiled(x, y, context, target_weights=weights).mean()\n",
                "run.compiled(x, y, context, target_weights=weights).mean() "
                "* (1 + __import__('random').random())\n"
            )
        ],
    ),
    "a batch fetched before the clock": (
        "clock",
        "2 batches and 3 steps of 3",
        [
            ("train_gpt.py", "    run.clock.start()  # before", "    # before"),
            (
                "train_gpt.py", "    for step in range(len(run.plans) + 1):\n",
                "    run.batches.ahead = run.batches.fetch()\n    run.clock.start()\n    for step in "
                "range(len(run.plans) + 1):\n"
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_the_right_check_fails(name, tree, tmp_path):
    check, words, edits = CHEATS[name]
    result = audit.audit(edited(tree, tmp_path / "cheat", *edits), "short/11", only=[check])
    assert [(c["name"], c["passed"]) for c in result["checks"]] == [(check, False)]
    assert words in result["checks"][0]["detail"] and not result["passed"]


# ----- judgement of logs, without trainings

def logged(final=7.0, train=(7.5, 7.25), **more):
    curve = [{"step": 0, "val_loss": 7.5, "train_loss": [], "train_time_ms": 0.0},
             {"step": 2, "val_loss": final, "train_loss": list(train), "train_time_ms": 3003000e3}]
    return {"curve": curve, "final": final, "stream": ["s"], "exit": 0, **more}


def summary(reached, target, loss=7.0):
    return {"summary": {"val_loss": loss, "target": target, "reached": reached}, "exit": 0 if reached else 3}


def test_reached_must_be_the_comparison_to_the_last_bit():
    below = 6.999999999999999
    honest = {"again": logged(**summary(True, 7.0)), "cold": logged(**summary(False, below))}
    assert audit.target(honest)[0]
    for lie in (summary(True, below), summary(False, below) | {"exit": 0}, summary(False, below, loss=6.9)):
        assert not audit.target({**honest, "cold": logged(**lie)})[0]
    assert not audit.target({**honest, "again": logged(**summary(False, 7.0))})[0]


def test_one_bit_of_one_loss_or_another_stream_is_a_difference():
    plain = logged()
    for other in (logged(final=7.000000000000001), logged(train=(7.5, 7.250001)), logged(stream=["t"])):
        assert not audit.warm_up({"plain": plain, "cold": plain, "real": other})[0]
        assert not audit.seed({"plain": plain, "again": other, "model": logged(train=(1.0, 2.0))})[0]
    assert audit.warm_up({"plain": plain, "cold": plain, "real": plain})[0]
    assert audit.seed({"plain": plain, "again": plain, "model": logged(train=(1.0, 2.0))})[0]
    assert not audit.seed({"plain": plain, "again": plain, "model": plain})[0]  # the seed does nothing


def test_a_validation_that_changes_later_losses_is_a_trace():
    model = {"checks": {"no_trace": [True, "nothing in reach"]}}
    often = logged()
    often["curve"].insert(1, {"step": 1, "val_loss": 7.4, "train_loss": [7.5]})
    often["curve"][2]["train_loss"] = [7.25]
    assert audit.no_trace({"model": model, "plain": logged(), "often": often})[0]
    often["curve"][2]["train_loss"] = [7.26]
    passed, detail = audit.no_trace({"model": model, "plain": logged(), "often": often})
    assert not passed and "training losses of step 2: 7.25 and 7.26" in detail


@pytest.mark.parametrize(
    "total_s, passed",
    [(3003000.7, True), (3004002.0, True), (3002000.9, False), (2003000.1, False), (1003003000.2, False)],
)
def test_the_clock_must_hold_every_batch_and_step_and_no_validation(total_s, passed):
    run = logged()
    run["curve"][-1]["train_time_ms"] = 1000 * total_s
    assert audit.clock({"real": run})[0] is passed


# ----- the checkout and the confinement

def test_a_git_ref_is_exported_without_a_trace_and_interrupted_audits_leave_nothing(tree, tmp_path):
    """In a repository of its own, whose auditor is this one's: the ref's tree, and Ctrl-C in the middle of a
    training."""
    edited(tree, tmp_path / "repository")
    repository, scratch = tmp_path / "repository", tmp_path / "scratch"
    scratch.mkdir()

    def git(*args):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=repository, check=True,
            capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    git("add", "--all", "--force")
    git("commit", "--quiet", "-m", "all")
    files = sorted(str(p) for p in (repository / ".git").rglob("*"))
    commit, exported = audit.check_out(str(repository), scratch)
    assert (commit, exported) == (git("rev-parse", "HEAD"), git("rev-parse", "HEAD^{tree}"))
    shutil.rmtree(scratch / "checkout")
    shutil.rmtree(scratch / "git")
    process = subprocess.Popen(
        [sys.executable, "-m", "records", "audit", "HEAD", "--only", "warm_up"], cwd=repository,
        env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith(f"audit of HEAD: commit {commit}, tree {exported[:12]}")
    while not list(scratch.glob("*/plain")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "interrupted: the audit was not finished\n"
    assert not list(scratch.iterdir()) and sorted(str(p) for p in (repository / ".git").rglob("*")) == files


@pytest.mark.skipif(sys.platform != "linux", reason="confinement needs Linux")
def test_audited_code_has_no_network_no_environment_and_cannot_write_outside(tree, tmp_path, monkeypatch):
    """Its settings try all three when they are imported, and tell by the message of their own error."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    attempt = f"""
import os, socket
def tried(what):
    try:
        return what() and "done"
    except OSError:
        return "refused"
found = dict(write=tried(lambda: open({str(tmp_path / 'stolen')!r}, "w")), remove=tried(lambda: os.unlink(__file__) or True),
             connect=tried(lambda: socket.create_connection(("127.0.0.1", {port}), 5)), secret="SECRET_TOKEN" in os.environ,
             interfaces=len(socket.if_nameindex()))
raise UserError("found " + repr(found))
"""
    folder = edited(tree, tmp_path / "spy")
    (Path(folder) / "settings.py").unlink()
    (Path(folder) / "settings.py").write_text((tree / "settings.py").read_text() + attempt)
    with pytest.raises(UserError, match="found") as error:
        audit.audit(folder, only=["clock"])
    found = ast.literal_eval(str(error.value).partition("found ")[2])
    probe = f"import json, pathlib, runpy; probe = runpy.run_path({str(audit.PROBE)!r}); "
    confine = f"print(json.dumps(probe['confine'](pathlib.Path({str(tmp_path)!r}), 60)))"
    possible = json.loads(
        subprocess.run([sys.executable, "-c", probe + confine], capture_output=True, text=True).stdout
    )
    assert found["secret"] is False
    # Linux before 5.13 has no Landlock, and the audit says so
    if possible["writes"] == "limited to the audit's folder":
        assert found["write"] == found["remove"] == "refused" and not (tmp_path / "stolen").exists()
    if possible["network"] == "cut off":
        assert found["connect"] == "refused" and found["interfaces"] <= 1


def test_code_that_is_imported_from_elsewhere_is_refused(tree, tmp_path):
    folder = Path(edited(tree, tmp_path / "link"))
    (folder / "settings.py").unlink()
    (folder / "settings.py").symlink_to(tree / "settings.py")
    with pytest.raises(UserError, match="settings was imported from .*not in the audited checkout"):
        audit.audit(str(folder), only=["clock"])


def test_a_process_that_takes_too_long_is_ended_and_fails_its_checks(tree, tmp_path):
    folder = edited(
        tree, tmp_path / "slow", ("train_gpt.py", "import math\n", "import math\ntime.sleep(600)\n")
    )
    result = audit.audit(folder, only=["clock"], timeout=3)
    assert result["checks"] == [
        {"name": "clock", "passed": False, "detail": "the real process did not end in 3 s"}
    ]


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for args, text in [
        (["no-such-branch"], "unknown git ref 'no-such-branch'"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "empty")], "is not a checkout of this project: it has no train_gpt.py"),
        ([".", "--record", "short/999"], ".: unknown record 'short/999'"),
        ([".", "--record", "tiny-v3"], ".: tiny-v3 is frozen at --scale tiny"),
        ([".", "--json", "x.json", "--only", "seed"], "--json holds a whole audit"),
        ([".", "--json", str(tmp_path / "none" / "x.json")], "its folder does not exist")
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["audit", *args])
        out, err = capsys.readouterr()
        assert (
            stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and text in err
            and not out
        )
