"""Laws of `records task` and `records referee`: a task holds no later record, a candidate is data until it
runs, and the score is 0 for the parent, 1 for the goal and a share between them, or none.

One task (record 10 to 11 at micro, few steps) and one set of references serve all tests; a scripted agent of
three edits goes through the commands.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from evidence import referee, task
from records.__main__ import main
from settings import deltas
from settings.scales import SCALES

ROOT = Path(__file__).parent.parent
GOAL = deltas.load_records()["short/11"].delta


def command(*words):
    """Exit code of a `records` command."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    return stop.value.code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one task, whose referee remembers its references there."""
    folder = tmp_path_factory.mktemp("referee")
    old = os.environ.get("SPEEDRUN_CACHE")
    os.environ["SPEEDRUN_CACHE"] = str(folder / "cache")
    assert command("task", "short/10", "--scale", "micro", "--steps", "4", "--out", folder / "task") == 0
    yield folder
    os.environ.pop("SPEEDRUN_CACHE")
    if old is not None:
        os.environ["SPEEDRUN_CACHE"] = old


@pytest.fixture(scope="module")
def about(place):
    return referee.read_task(place / "task")


def candidate(place, tmp_path, *edits):
    """A copy of the task's candidate with (file, old text, new text) replaced, or with new files."""
    folder = tmp_path / "candidate"
    shutil.copytree(place / "task" / "candidate", folder)
    for name, old, new in edits:
        text = (folder / name).read_text() if old else ""
        assert not old or text.count(old) == 1, (name, old)
        (folder / name).write_text(text.replace(old, new) if old else new)
    return folder


DELTA = (task.RECORD_TOML, "[delta]\n", "[delta]\n")
SUBSUMED = (
    task.RECORD_TOML, 'subsumed = "nothing is changed yet: remove this line with the first change"\n', ""
)


def delta(*lines):
    return DELTA[:2] + ("[delta]\n" + "\n".join(lines) + "\n",)


# ----- the task

def test_a_task_holds_the_parent_and_no_later_record(place, about):
    folder = place / "task" / "candidate"
    held = sorted(path.parent.name for path in folder.glob("records/short/*/record.toml"))
    assert held == [r.folder.name for r in deltas.chain(deltas.find_record("short/10"))]
    assert not [
        name for name in about["files"] if name.startswith(("tests", "evidence", "page", "site", "docs"))
    ]
    assert (about["goal"], about["next"], about["head"]) == (
        "short/11", "short/11", deltas.find_record("short/head").ref
    )


def test_hints_grow_from_nothing_to_the_names_of_the_settings():
    pages = []
    for level in task.HINTS:
        options = task_options(record="short/33", to="short/34", hints=level)
        pages.append(task.page(task.declare(options)).partition("## Hints")[2])
    assert pages[0] == "" and all(len(a) < len(b) for a, b in zip(pages, pages[1:]))
    smear = deltas.find_record("short/34")
    assert smear.title not in pages[1] and smear.title in pages[2]
    assert "`model.embed.smear = ...`" in pages[3] and "model.embed.smear" not in pages[2]
    assert "channels = 12" not in "".join(pages)


def task_options(**given):
    from argparse import Namespace

    defaults = {
        "record": "short/33", "to": None, "open": False, "scale": "tiny", "hints": "none", "measure": None,
        "seeds": None, "steps": None, "data": None, "out": None
    }
    return Namespace(**{**defaults, **given})


def test_every_record_but_the_heads_starts_a_task():
    for ref, record in deltas.load_records().items():
        if task.children(record):
            declared = task.declare(task_options(record=ref, scale="micro"))
            assert set(declared) == {*task.FIELDS} and declared["transitions"]
        else:
            with pytest.raises(UserError, match="is the head of its lineage"):
                task.declare(task_options(record=ref, scale="micro"))


@pytest.mark.parametrize("scale", SCALES)
def test_a_task_has_seeds_and_memory_at_every_scale(scale):
    assert task.declare(task_options(scale=scale))["seeds"] >= task.FAIR_SEEDS
    assert referee.MEMORY_MIB[scale] >= 4096


def test_no_hint_is_given_twice():
    text = task.page(task.declare(task_options(record="short/10", hints="text"))).partition("## Hints")[2]
    given = [line for line in text.splitlines() if line]
    assert len(given) == len(set(given)) and any("peak learning rate" in line for line in given)


def test_bad_input_is_one_line(place, tmp_path, capsys):
    capsys.readouterr()
    (tmp_path / "task.json").write_text('{"version": 9}')
    for words, text in [
        (["task", "short/10", "--out", place / "task"], "is there already"),
        (["task", "short/head"], "is the head of its lineage"),
        (["task", "short/33", "--to", "short/3"], "it does not descend from short/33"),
        (["referee", tmp_path, tmp_path], "not a task of this version"),
        (["referee", tmp_path / "none", tmp_path], "no such file"),
        (["referee", place / "task", tmp_path / "none"], "no such folder"),
    ]:
        assert command(*words) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and text in err and not out


def test_a_task_of_other_sources_is_refused(place, tmp_path):
    about = json.loads((place / "task" / "task.json").read_text())
    about["files"]["model.py"] = "0" * 64
    (tmp_path / "task.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"written from other sources \(model.py\)"):
        referee.read_task(tmp_path)


# ----- the score

def test_the_score_is_zero_for_the_parent_one_for_the_goal_and_a_share_between():
    parent, goal = [3.5, 3.6, 3.55], [3.4, 3.49, 3.46]
    half = [(p + g) / 2 for p, g in zip(parent, goal)]
    assert referee.recovered(parent, goal, parent)[:2] == (0.0, [0.0, 0.0])
    assert referee.recovered(parent, goal, goal)[:2] == (1.0, [1.0, 1.0])
    score, (low, high), resolved = referee.recovered(parent, goal, half)
    assert score == pytest.approx(0.5) and (low, high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert resolved == "yes"
    worse = [2 * p - g for p, g in zip(parent, goal)]
    assert referee.recovered(parent, goal, worse)[0] == pytest.approx(-1)


def test_the_interval_is_fiellers():
    """Against its definition: the ratios r for which the mean of gain - r full is not significant."""
    from scipy import stats
    parent, goal, mine = [3.5, 3.6, 3.55, 3.52], [3.4, 3.47, 3.46, 3.40], [3.46, 3.53, 3.49, 3.48]
    _, interval, _ = referee.recovered(parent, goal, mine)
    for bound in interval:
        d = [(p - m) - bound * (p - g) for p, g, m in zip(parent, goal, mine)]
        assert stats.ttest_1samp(d, 0).pvalue == pytest.approx(0.05, abs=1e-9)


def test_a_goal_that_shows_no_improvement_gives_no_score():
    parent, goal = [3.5, 3.6], [3.49, 3.61]
    score, interval, resolved = referee.recovered(parent, goal, [3.4, 3.5])
    assert score is None and interval is None and resolved.startswith("no: on these 2 seeds")
    assert (
        referee.way({"minutes": {"a": 3, "b": 2}, "parent": "a", "goal": "b", "next": "b", "head": "b"}, None)
        is None
    )


def test_the_way_is_a_share_of_published_minutes():
    about = {
        "minutes": {"p": 10, "n": 8, "g": 6, "h": 2}, "parent": "p", "next": "n", "goal": "g", "head": "h"
    }
    assert referee.way(about, 0.5) == {"next": 1.0, "head": 0.25}


def test_time_counts_only_at_no_worse_loss():
    runs = {"parent": [{"loss": x} for x in (3.5, 3.6, 3.7)]}
    assert referee.too_high({**runs, "candidate": runs["parent"]}) == ""
    assert referee.too_high({**runs, "candidate": [{"loss": x} for x in (3.5001, 3.6002, 3.7)]}) == ""
    assert "may be above" in referee.too_high(
        {**runs, "candidate": [{"loss": x} for x in (3.51, 3.61, 3.72)]}
    )


def test_steps_to_a_loss_are_read_off_the_curve():
    assert referee.steps_to([[0, 7.0], [10, 5.0], [20, 4.0]], 4.5) == 15
    assert referee.steps_to([[0, 7.0], [10, 5.0]], 3.0) == 10


def test_knowledge_after_a_record_s_date_is_contamination(about):
    day = about["dates"]["short/11"]
    assert referee.contamination(about, {"knowledge": day})["published_before"] == ["short/11"]
    assert referee.contamination(about, {"knowledge": "2024-01-01"})["published_before"] == []
    assert referee.contamination(about, {})["published_before"] is None


# ----- candidates that are refused before anything of them runs, or by what their settings are

def link(folder):
    (folder / "layers" / "extra.py").symlink_to("/etc/hostname")


def pipe(folder):
    os.mkfifo(folder / "layers" / "extra.py")


def removed(folder):
    (folder / "system" / "run.py").unlink()


REFUSED = {
    "an edited trainer": (
        [("train_gpt.py", "    run.clock.stop()\n", "    pass\n")], None,
        "train_gpt.py is not among the files that may change"
    ),
    "an edited stream": (
        [("data/stream.py", "import hashlib\n", "import hashlib  # \n")],
        None,
        "data/stream.py is not among the files that may change",
    ),
    "a module that shadows another": (
        [("torch.py", "", "")], None, "torch.py is not among the files that may"
    ),
    "a file that is gone": ([], removed, "system/run.py is not among the files that may change"),
    "a link": ([], link, "layers/extra.py: is a symbolic link"),
    "a pipe": ([], pipe, "layers/extra.py: is a pipe"),
    "another parent": (
        [(task.RECORD_TOML, 'parent = "short/10"', 'parent = "short/9"')], None,
        "has the parent 'short/9', the task starts at short/10"
    ),
    "knowledge that is no date": ([(task.ABOUT, '""', '"soon"')], None, 'expected {"knowledge"'),
}
OF_SETTINGS = {
    "a shorter validation": ([SUBSUMED, delta('"validation.seq_len" = 512')], "changes validation.seq_len"),
    "a setting that does not exist": ([SUBSUMED, delta('"model.magic" = true')], "cannot be resolved"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_candidate_is_refused_as_data(name, place, about, tmp_path):
    edits, act, words = REFUSED[name]
    folder = candidate(place, tmp_path, *edits)
    if act:
        act(folder)
    with pytest.raises(referee.Invalid) as error:
        referee.admit(about, folder, tmp_path / "private")
    assert words in str(error.value)


@pytest.mark.parametrize("name", OF_SETTINGS)
def test_a_candidate_is_refused_by_its_settings(name, place, about, tmp_path):
    edits, words = OF_SETTINGS[name]
    private, _, _ = referee.admit(about, candidate(place, tmp_path, *edits), tmp_path / "private")
    with pytest.raises(referee.Invalid) as error:
        referee.settings_of(about, private)
    assert words in str(error.value)


def test_runs_must_be_those_of_the_task(about):
    good = {
        "val_digest": "v", "scale": "micro", "corpus_digest": "c", "numerics": 2, "ml_hash": "m",
        "tokens": 10, "claimed_s": 1.0, "outside_s": 2.0, "curve": [[0, 7.0], [4, 6.0]], "steps": 4
    }
    referee.check_runs(about, {"candidate": [good], "parent": [good]}, "m")
    for change, words in [
        ({"tokens": 11}, "the budget is 10"), ({"claimed_s": 3.5}, "outside passed 2.0 s"),
        ({"val_digest": "w"}, "another validation shard"),
        ({"ml_hash": "x"}, "other settings than its record"),
        ({"curve": [[1, 7.0], [4, 6.0]]}, "did not validate at its first"),
        ({"numerics": 1}, "numerics version")
    ]:
        with pytest.raises(referee.Invalid, match=words):
            referee.check_runs(about, {"candidate": [{**good, **change}], "parent": [good]}, "m")


# ----- the scripted agent: three edits through both commands

def test_a_scripted_agent_goes_over_a_cheat_to_the_next_record(place, tmp_path, capsys, monkeypatch):
    """Its edits: none (score 0); a loss that is scaled (invalid, by the audit); record 11's delta (score
    1)."""
    monkeypatch.setattr(referee, "CHECKS", ("normalisation",))
    scaled = ("model.py", "(aux - aux.detach()).view(targets.shape)\n        return losses\n",
              "(aux - aux.detach()).view(targets.shape)\n        return losses * 0.9\n")
    honest = [SUBSUMED, (task.RECORD_TOML, "[delta]\n", "[delta]\n" + toml_of(GOAL))]
    verdicts = []
    for i, (edits, code) in enumerate([((), 0), ((scaled,), 1), (honest, 0)]):
        folder = candidate(place, tmp_path / str(i), *edits)
        capsys.readouterr()
        assert command("referee", place / "task", folder) == code
        out, err = capsys.readouterr()
        verdicts.append(json.loads(out))
        seeds = json.loads(next((place / "cache" / "referee").glob("*.json")).read_text())["seeds"]
        assert not any(str(seed) in out for seed in seeds)
    nothing, cheat, goal = verdicts
    assert (nothing["valid"], nothing["score"], nothing["way"]["next"]) == (True, 0.0, 0.0)
    assert (goal["valid"], goal["score"], goal["interval"], goal["way"]["next"]) == (
        True, 1.0, [1.0, 1.0], 1.0
    )
    assert goal["loss"]["mean"] == goal["loss"]["goal"] != nothing["loss"]["mean"]
    assert not cheat["valid"] and "(normalisation): probabilities of 1280 targets sum to" in cheat["why"][0]
    assert [v["attempt"] for v in verdicts] == [1, 2, 3] and all(v["cost"]["cpu_s"] > 0 for v in verdicts)
    assert goal["time"]["claimed"] < goal["time"]["mean"] and goal["candidate"]["changed"] == [
        task.RECORD_TOML
    ]


def toml_of(delta):
    """The lines of a delta, as record.toml has them."""
    text = (deltas.find_record("short/11").folder / "record.toml").read_text()
    return text.partition("[delta]\n")[2].partition("\n[")[0] + "\n"
