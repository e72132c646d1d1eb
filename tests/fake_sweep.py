"""A trainer that writes logs without training, and plans and results of sweeps, for the tests of sweeps."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

import runlog
import sweep
from sweeps import queue
from sweeps.plan import make_plan

ROOT = Path(__file__).parent.parent
NORM, LAM, CAP = "model.embed.norm", "model.attn.value_residual", "model.head.softcap"
TWO = ["--features", NORM, CAP]

# Writes the run folder that the trainer would write. EFFECTS: loss by change; FAIL: changes of the arm that
# fails, or all; SECONDS: how long a run takes; STARTED: a file that gets a line per start. Noise depends on
# seed and settings only; SAME_NOISE: on settings only.
FAKE = """
import json, os, random, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import runlog
from settings import schema
from system import command_line
options, resolved = command_line.command_line()
plan = json.loads((Path(options.out).parent / "plan.json").read_text())
s, effects = resolved.settings, json.loads(os.environ.get("EFFECTS", "{{}}"))
ml_hash, changes = schema.ml_hash(s), list(resolved.changes)
with open(os.environ["STARTED"], "a") as file:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
    print(f"{{ml_hash}}_s{{options.seed}}", os.getpid(), gpu, os.nice(0), file=file)
runlog.sources = lambda: ("fake", runlog.source_hash("fake"))
name = f"{{resolved.record.ref.replace('/', '-')}}_{{resolved.scale}}_{{ml_hash[:8]}}_s{{options.seed}}"
log = runlog.RunLog(options.out, name)
log.start(dict(record=resolved.record.ref, scale=resolved.scale, seed=options.seed, changes=changes,
               ml_hash=ml_hash, numerics_version=plan["numerics_version"], registered=options.registered,
               device="fake", cpu="", machine="m", torch=os.environ.get("FAKE_TORCH", "0"), code="c" * 40,
               profiled=False, processes=1,
               **plan["digests"][ml_hash]), schema.plain(s))
time.sleep(float(os.environ.get("SECONDS", 0)))
if os.environ.get("FAIL") in ("all", " ".join(changes)):
    sys.exit("error: the disk of the fake is full")
seed = 0 if "SAME_NOISE" in os.environ else options.seed
noise = random.Random(f"{{ml_hash}} {{seed}}").gauss(0, 0.01)
loss = 5 + noise + sum(effects.get(c, 0) for c in changes)
diverged = "DIVERGE" in os.environ
loss, status = (float("nan"), "diverged") if diverged else (loss, "finished")
for step, value in ((0, 7.0), (3, loss)) if not diverged else ():
    log.event("validation", step=step, scheduled_steps=3, val_loss=value, train_loss=[],
              train_time_ms=10.0 * step / 3, tokens=33 * step, epoch=0)
log.end(status=status, steps=3, scheduled_steps=3, val_loss=loss, train_time_ms=10.0, tokens=99, epoch=0,
        target=None, reached=None, verdict=[])
sys.exit(4 if diverged else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Path of the file that lists all starts of the fake trainer."""
    (tmp_path / "fake.py").write_text(FAKE.format(root=str(ROOT)))
    monkeypatch.setenv("SPEEDRUN_SWEEP_TRAINER", str(tmp_path / "fake.py"))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "started").touch()
    # the fake logs these sources, so they are what runs here
    monkeypatch.setattr(runlog, "sources", lambda: ("fake", runlog.source_hash("fake")))
    return tmp_path / "started"


def starts(path):
    return [line.split()[0] for line in path.read_text().splitlines()]


def command(*args):
    return [sys.executable, str(ROOT / "sweep.py"), *map(str, args)]


def call(*args):
    """Exit code of a sweep command in this process."""
    with pytest.raises(SystemExit) as stop:
        sweep.main(list(map(str, args)))
    return stop.value.code


def planned(*args):
    return make_plan(sweep.parser().parse_args(list(map(str, args))))


def made(root, *args):
    plan = planned(*args)
    queue.create(root, plan)
    return plan


def results(plan, loss, survivors=None, status="finished"):
    """Settled runs as the queue gives them, of all targets: loss(arm, seed)."""
    return {
        name: {
            "status": status, "val_loss": loss(arm, seed), "seed": seed, "arm": arm["label"],
            "train_time_ms": 1.0, "ml_hash": arm["ml_hash"], "last_hash": name, "device": "d", "cpu": "c",
            "machine": "m", "torch": "t", "code": "x"
        }
        for name, arm, seed in queue.targets(plan, survivors)
    }


def wait_for(condition, seconds=240):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "waited in vain"
        time.sleep(0.02)


def noisy(plan, effects, sd=0.01, seed=0):
    """Results with normal noise and the given effects by label."""
    rng = np.random.default_rng(seed)
    return results(plan, lambda a, s: 5 + effects.get(a["label"], 0) + sd * rng.normal())
