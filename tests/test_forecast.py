"""Laws of a dry run: it needs neither data nor GPU, and every number says where it is from."""

import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import schedule
import sweep
from evidence import statistics
from settings import deltas
from settings.data import tokens_per_step
from sweeps import forecast
from common.errors import UserError
from one_control import against_control

ROOT = Path(__file__).parent.parent


def dry(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*map(str, args), "--dry-run"])
    got = capsys.readouterr()
    return stopped.value.code, got.out, got.err


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """No GPU, no FineWeb, no earlier run; a trainer that says no."""
    (tmp_path / "fails.py").write_text("import sys\nsys.exit('error: this trainer trains nothing')\n")
    monkeypatch.setenv("SPEEDRUN_SWEEP_TRAINER", str(tmp_path / "fails.py"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("data.corpus.HERE", tmp_path)
    return tmp_path


def test_a_gpu_scale_is_planned_without_data_or_gpu(bare, capsys):
    code, out, err = dry(
        capsys, "axis", "short/11", "optim.muon.lr=0.02", "--scale", "small", "--runs", bare / "runs"
    )
    assert code == 0 and err == "" and not (bare / "runs").exists()
    assert "disk: 1 train shard of FineWeb and the validation shard, 0.4 GB" in out
    assert "(counted, not measured)" in out and "a card of 24 GiB" in out
    assert "an ESTIMATE for one H100, not measured" in out
    s, full = (deltas.resolve("short/11", scale=x).settings for x in ("small", "full"))
    share = s.schedule.steps * tokens_per_step(s) / (full.schedule.steps * tokens_per_step(full))
    assert f"({7.2 * 60 * 8 * share:.1f} s a run" in out


def test_without_dry_run_missing_data_is_refused(bare):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(
            ["axis", "short/11", "optim.muon.lr=0.02", "--scale", "small", "--runs", str(bare / "runs")]
        )
    assert stopped.value.code == 2 and not (bare / "runs").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--scale", "micro"],
            "told after the first run, a trial of 10 steps failed: this trainer trains nothing",
        ),
        (["--scale", "small", "--set", "system.device=cpu"], "nobody has timed this scale on a CPU"),
        (["--scale", "micro", "--data", "/no/such"], "data: no data folder /no/such"),
    ],
)
def test_what_is_not_known_is_not_printed_as_a_number(bare, capsys, args, message):
    code, out, _ = dry(capsys, "axis", "short/11", "optim.muon.lr=0.02", *args, "--runs", bare / "runs")
    assert code == 0 and message in out and "expected time: 0" not in out


def test_an_estimate_takes_the_published_minutes_of_the_nearest_record():
    plan = {"scale": "full", "common": [], "arms": [{"record": "variants/1", "changes": [], "label": "v"}]}
    seconds, source = forecast.published(plan)
    assert "short/8's published 10.8 min on 8 x H100" in source and seconds == pytest.approx(10.8 * 60 * 8)


def log(s, start_ms, token_ms, validation_ms, end_ms):
    """Events of a run that takes exactly these times."""
    wall, ms, events = start_ms, 0.0, [{"kind": "reset", "wall_ms": start_ms}]
    plans, tokens = schedule.plan(s), 0
    for step in range(s.schedule.steps + 1):
        if schedule.validates(s, step):
            wall += validation_ms
            events.append({
                "kind": "validation", "step": step, "train_time_ms": ms, "wall_ms": wall, "tokens": tokens
            })
        if step < s.schedule.steps:
            took, tokens = token_ms * plans[step].tokens, tokens + plans[step].tokens
            wall, ms = wall + took, ms + took
    return [*events, {"kind": "end", "wall_ms": wall + end_ms}]


def test_a_trial_is_extrapolated_to_the_time_of_the_whole_run():
    draw = random.Random(0)
    for _ in range(20):
        record = draw.choice(["short/1", "short/11", "short/33", "short/57"])
        short, whole = (
            deltas.resolve(record, scale="micro", sets=sets).settings for sets in (["schedule.steps=10"], [])
        )
        times = [draw.uniform(1, 9000) for _ in range(4)]
        predicted = forecast.extrapolated(log(short, *times), whole)
        assert predicted == pytest.approx(log(whole, *times)[-1]["wall_ms"] / 1000)


def test_a_real_trial_of_a_preset_gives_seconds(tmp_path):
    """One training of ten steps: the frozen preset's own number of steps is replaced."""
    out = subprocess.run(
        [
            sys.executable, "sweep.py", "axis", "tiny-v3", "optim.muon.lr=0.02", "--seeds", "1", "--set",
            "validation.tokens=4096", "--set", "data.tokens_per_rank=128", "--runs", str(tmp_path),
            "--dry-run"
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        out.returncode == 0 and "extrapolated from a trial of 10 steps on this machine just now" in out.stdout
    ), out
    assert not any(tmp_path.iterdir())


# ----- seeds for an effect ----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "effect, sd, arms", [(0.005, 0.0088, 1), (0.02, 0.0136, 1), (0.01, 0.008, 5), (0.1, 0.001, 1)]
)
def test_the_seeds_for_an_effect_are_the_least_that_resolve_it(effect, sd, arms):
    n = statistics.seeds_for(effect, sd, arms)
    assert statistics.minimal_detectable_effect(sd, n, n, arms) <= effect
    assert n == 2 or statistics.minimal_detectable_effect(sd, n - 1, n - 1, arms) > effect


def test_so_many_seeds_resolve_the_effect_in_four_of_five_sweeps():
    draw, effect, sd = np.random.default_rng(0), 0.005, 0.0088
    n = statistics.seeds_for(effect, sd)
    found = 0
    for _ in range(800):
        rows = against_control(draw.normal(0, sd, n), {"a": draw.normal(effect, sd, n)})["rows"]
        found += rows["a"]["resolved"]
    assert n == 56 and abs(found / 800 - 0.8) < 0.05


def test_an_effect_beyond_all_patience_is_said():
    assert statistics.seeds_for(1e-6, 0.01) is None
    for effect, sd in ((0, 1), (1, 0), (math.nan, 1), (1, math.inf)):
        with pytest.raises(UserError):
            statistics.seeds_for(effect, sd)


def test_power_takes_the_sd_of_the_committed_sweeps_or_one_that_is_stated(capsys):
    for args, message in (
        (["--sd", "0.0088", "--no-paired"], "an effect of 0.005 nats needs 56 seeds an arm"),
        (["--sd", "0.0088"], "an effect of 0.005 nats needs 29 seeds an arm"),
        (["--scale", "micro", "--effect", "0.02"], "chain_1-33_micro.json")
    ):
        with pytest.raises(SystemExit) as stopped:
            sweep.main(["power", *args])
        assert stopped.value.code == 0 and message in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["power", "--scale", "small"])
    err = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and err.count("\n") == 1
        and "measured at scale small" in err
    )


def test_the_numbers_of_the_page_on_one_gpu_come_from_these_commands(capsys, bare):
    """docs/one-gpu.md says what the commands print."""
    page = (ROOT / "docs/one-gpu.md").read_text()
    with pytest.raises(SystemExit):
        sweep.main(["power", "--no-paired", "--sd", "0.0088"])
    for line in capsys.readouterr().out.splitlines():
        assert line in page
    _, out, _ = dry(
        capsys, "axis", "short/11", "optim.muon.lr=0.02", "--scale", "small", "--sd", "0.0088", "--runs",
        bare / "runs"
    )
    for line in out.splitlines():
        if not line.startswith("data: "):
            assert line in page, line
