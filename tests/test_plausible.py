"""The bounds of evidence.plausible and evidence.off_clock are measured again on the honest logs that are
committed: none of them is refused."""

import csv
import functools
import itertools
import json
import math
from pathlib import Path

import pytest

import runlog
import settings
from evidence import claim_folder, fact_laws, manifest, off_clock, plausible, replay, run_laws
from common.errors import UserError
from settings import schema

ROOT = Path(__file__).parent.parent


@functools.lru_cache
def honest():
    """Logs of all committed runs, with the settings that they had."""
    logs = []
    for path in sorted(ROOT.glob("records/*/*/tiny/run.jsonl")):
        log = run_laws.Log(path.parent.parent.name, path.parent, runlog.read_links(path))
        log.settings = settings.check(schema.from_plain(log.start["settings"]))
        logs.append(log)
    return logs


@pytest.fixture
def found():
    """All committed runs as if they were one claim."""
    logs = dict(enumerate(honest()))
    claim = manifest.Claim(Path("x") / manifest.NAME)
    claim.declaration = {"arms": {}, "claim": "comparison"}
    return claim_folder.Evidence(Path("x"), claim, logs)


def test_no_committed_log_is_refused_by_what_a_log_suffices_to_see(found):
    assert len(found.logs) == len(list(ROOT.glob("records/*/*/tiny/run.jsonl")))
    assert list(plausible.check(found)) == [] and list(off_clock.check(found)) == [] and found.unknown == []


def test_the_bounds_are_what_the_committed_logs_measure():
    shares, jumps = [], []
    for log in honest():
        last = log.validations[-1]
        rests = sorted(rest for _, _, rest in log.intervals)
        per_token = last["train_time_ms"] / last["tokens"]
        shares.append(rests[len(rests) // 2] / (per_token * log.settings.validation.tokens))
        jumps.append(plausible.jump([(v["step"], v["val_loss"]) for v in log.validations]))
    assert 0.3 < max(shares) < 0.5 < off_clock.VALIDATION_AS_TRAINING
    assert max(jumps) == pytest.approx(0.0180, abs=1e-4) and 2 * max(jumps) <= plausible.JUMP_NATS["tiny"]


def test_no_published_curve_jumps_at_its_end():
    """Curves of the short and medium track, of full size; a tail average is a jump that the bound allows."""
    jumps = []
    for path in sorted(ROOT.glob("records/*/*/reference.csv")):
        with open(path, newline="") as file:
            rows = [
                (int(float(r["step"])), float(r["val_loss"])) for r in csv.DictReader(file) if r["val_loss"]
            ]
        jumps.append(plausible.jump(sorted(dict(rows).items())))
    jumps = [x for x in jumps if x is not None]
    assert len(jumps) > 40 and max(jumps) < plausible.JUMP_NATS["full"] / 2


def test_no_two_committed_runs_are_near_copies_unless_they_compute_the_same():
    """Records 5 and 6, 32 and 33, and 46 and 47 compute the same at tiny; no other pair comes within twice
    the bound."""
    curves = {log.where: plausible.train_losses(log) for log in honest()}
    near, pairs = {}, 0
    for a, b in itertools.combinations(curves, 2):
        close = plausible.closeness(curves[a], curves[b])
        if close is None:
            continue
        pairs += 1
        assert close[1] > plausible.COPY_NATS or close[0] <= max(plausible.SHIFTED * close[1],
                                                                 plausible.ROUNDING_NATS)
        if close[1] < 2 * plausible.COPY_NATS:
            near[a[:3], b[:3]] = close[1]
    assert pairs > 300 and set(near) == {("005", "006"), ("032", "033"), ("046", "047")}


def test_what_is_left_of_a_curve_after_a_fit_sees_neither_shift_nor_drift():
    base = [5 + math.sin(7 * i) / 3 for i in range(60)]
    for change in (lambda x, i: x - 0.3, lambda x, i: 0.9 * x, lambda x, i: x - 0.001 * i):
        assert plausible.closeness([change(x, i) for i, x in enumerate(base)], base)[1] < 1e-9
    other = [5 + math.sin(7.1 * i) / 3 for i in range(60)]
    assert plausible.closeness(other, base)[1] > 0.01
    assert plausible.closeness(base[:5], base[:5]) is None and plausible.closeness(base, other[1:]) is None


def test_committed_records_stand_behind_their_parents_in_time():
    from settings import deltas
    # a result of the optimizer track stands on the one whose settings are nearest, which may be a later one
    wrong = [(r.ref, p) for r in deltas.load_records().values() for p in plausible.check_record(r)
             if not (r.ref.startswith("optimizer/") and "is before that of its parent" in p)]
    assert wrong == []
    assert json.dumps(sorted(plausible.JUMP_NATS)) == json.dumps(["full", "micro", "small", "tiny"])


# ----- replay: step 0, and the mean over a claim ------------------------------------------------------------

def curve(*losses):
    """A log as replay reads it, with these validation losses at steps 0, 9, 18, ..."""
    start = {"settings": {"numerics": {}}}
    return {
        "curve": [[9 * i, x] for i, x in enumerate(losses)], "train_loss": [], "stream": None, "digits": None,
        "start": start
    }


@pytest.mark.parametrize(
    "first, code", [(7.0, 0), (7.0 * (1 + 5e-7), 0), (7.0 * (1 + 2e-6), 3), (math.nan, 3)]
)
def test_a_replay_begins_at_the_very_loss_of_the_log(first, code, capsys):
    """Whatever the tolerance of what training makes of it."""
    assert replay.report(curve(first, 6.0, 5.0), curve(7.0, 6.0, 5.0001), False, 0.005) == code
    assert ("before any training" in capsys.readouterr().out) is bool(code)


@pytest.mark.parametrize(
    "gaps, code",
    [
        ([0.0009, -0.0007, 0.0004, -0.0008], 0), ([-0.0009, -0.0008, -0.0009, -0.0007], 3), ([0.0006] * 4, 3),
        ([0.0], 0)
    ],
)
def test_logs_that_all_lie_below_their_replays_are_not_replayed(gaps, code, capsys):
    """Each run is within the tolerance of a single one."""
    assert replay.judge_claim(gaps, 0.001) == code
    assert ("to one side" in capsys.readouterr().out) is bool(code)


# ----- before a plan goes on --------------------------------------------------------------------------------

def plan(**fields):
    claim = manifest.Claim(Path("x") / manifest.NAME)
    claim.declaration = {"machine": fact_laws.programs(), "arms": {}, "corpus_prefixes": None, **fields}
    return claim


def test_a_careless_resume_is_refused_before_a_run_is_registered(tmp_path):
    here = fact_laws.programs()
    fact_laws.require_same(plan(), [], None)
    fact_laws.require_same(plan(), [here], None)
    for key in here:
        with pytest.raises(
            UserError, match=f"the runs of this plan have {key} 'other'.*no run was registered"
        ):
            fact_laws.require_same(plan(), [{**here, key: "other"}], None)
        with pytest.raises(UserError, match="no run was registered"):
            fact_laws.require_same(plan(machine={**here, key: "other"}), [], None)
    with pytest.raises(UserError, match="declared with the embedded corpus: no run was registered"):
        fact_laws.require_same(plan(), [], tmp_path)


def test_other_shards_are_refused_before_a_run_is_registered(tmp_path, monkeypatch):
    monkeypatch.setattr("evidence.arms.corpus_prefixes", lambda folder: ["a", "b"])
    with pytest.raises(UserError, match="other training tokens than the plan was declared with: no run was"):
        fact_laws.require_same(plan(corpus_prefixes=["a", "c"]), [], tmp_path)
    # fewer shards, the same tokens
    fact_laws.require_same(plan(corpus_prefixes=["a", "b", "c"]), [], tmp_path)
    monkeypatch.setattr("data.shards.open_corpus", lambda folder: folder)
    monkeypatch.setattr("data.shards.val_digest", lambda corpus, tokens: "v" * tokens)
    arms = {"new": {"settings": {"validation": {"tokens": 3}}}}
    fact_laws.require_same(plan(corpus_prefixes=["a"], arms=arms), [{"val_digest": "vvv"}], tmp_path)
    with pytest.raises(UserError, match="other validation tokens than those of the runs so far"):
        fact_laws.require_same(plan(corpus_prefixes=["a"], arms=arms), [{"val_digest": "www"}], tmp_path)
