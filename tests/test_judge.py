"""`records judge`: the published verdicts come out of the raw runs, and damage or misuse is one clear
line."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from evidence import judge
from evidence.statistics import target_test
from common.errors import UserError

ROOT = Path(__file__).parent.parent
TABLES = judge.load()
RESULT = judge.judge(TABLES)
RECORDS = {r["record"]: r for r in RESULT["records"]}


def numbers_of(track, verdict, why=None):
    return [
        r["record"].split("/")[1] for r in RECORDS.values()
        if r["track"] == track and r["verdict"] == verdict and why in (None, r["why"])
    ]


# ----- published figures

def test_all_published_runs_and_records_are_there():
    assert sum(len(runs) for runs in TABLES["runs"].values()) == 1691
    assert [sum(r["track"] == t for r in RESULT["records"]) for t in judge.TARGETS] == [91, 18, 46]


@pytest.mark.parametrize(
    "ref, n, mean, p",
    [
        ("short/89", 13, 3.2784, "0.000669"), ("short/34", 10, 3.2790, "0.0084"),
        ("short/13", 7, 3.27697, "0.0415"), ("short/36", 4, 3.27960, "0.093"),
        ("short/44", 5, 3.27800, "0.034"), ("short/67", 3, 3.27843, "0.039"),
        ("short/79", 5, 3.27938, "0.032"), ("short/84", 8, 3.27881, "0.0148"),
        ("short/80", 8, 3.27880, "0.0029"), ("short/26", 20, 3.2791, "0.0049"),
        ("short/28", 14, 3.2787, "0.0059"), ("short/30", 10, 3.2778, "0.0003"),
        ("short/37", 24, 3.2790, "0.0025"), ("short/48", 10, 3.2777, "0.0024"),
        ("short/50", 12, 3.2769, "0.0060"), ("short/57", 10, 3.2781, "0.0004"),
        ("short/60", 10, 3.2788, "0.0067"), ("medium/18", 2, 2.91655, "0.0046")
    ],
)
def test_published_means_and_p_values_come_out_of_the_raw_runs(ref, n, mean, p):
    r = RECORDS[ref]
    assert r["n"] == n and r["mean"] == pytest.approx(mean, abs=6e-5)
    assert f"{r['p']:.{len(p) - 2}f}" == p  # to the digits published


# of the runs with the linked log's source, records 58 to 89
@pytest.mark.parametrize("ref, n, mean, sd, seconds", [
    ("58", 5, 3.2788, 0.0006, 108.80), ("59", 5, 3.2787, 0.0008, 106.40), ("60", 10, 3.2788, 0.0012, 105.78),
    ("61", 8, 3.2782, 0.0015, 104.46), ("62", 6, 3.2776, 0.0012, 98.43), ("63", 10, 3.2784, 0.0009, 97.71),
    ("64", 7, 3.2783, 0.0012, 96.55), ("65", 7, 3.2781, 0.0012, 97.77), ("67", 3, 3.2784, 0.0008, 92.98),
    ("68", 8, 3.2784, 0.0015, 95.75), ("70", 10, 3.2782, 0.0015, 95.29), ("71", 5, 3.2785, 0.0014, 95.21),
    ("72", 15, 3.2781, 0.0015, 93.26), ("73", 8, 3.2786, 0.0008, 91.48), ("74", 4, 3.2788, 0.0005, 88.83),
    ("75", 4, 3.2785, 0.0005, 87.72), ("76", 6, 3.2789, 0.0006, 87.94), ("77", 8, 3.2780, 0.0009, 87.23),
    ("78", 8, 3.2784, 0.0013, 86.22), ("79", 5, 3.2794, 0.0005, 85.16), ("80", 8, 3.2788, 0.0009, 92.63),
    ("81", 10, 3.2780, 0.0009, 81.91), ("82", 10, 3.2786, 0.0010, 79.85), ("83", 20, 3.2792, 0.0012, 84.43),
    ("84", 8, 3.2788, 0.0012, 83.85), ("85", 10, 3.2785, 0.0010, 75.52), ("87", 13, 3.2789, 0.0014, 77.34),
    ("88", 10, 3.2785, 0.0015, 78.49), ("89", 13, 3.2784, 0.0014, 79.68)])
def test_published_means_of_records_58_to_89_come_out(ref, n, mean, sd, seconds):
    r = RECORDS[f"short/{ref}"]
    assert (
        r["n"] == n and r["mean"] == pytest.approx(mean, abs=6e-5) and r["sd"] == pytest.approx(sd, abs=6e-5)
    )
    assert r["mean_minutes"] * 60 == pytest.approx(seconds, abs=0.01)


def test_the_records_that_do_not_reach_one_percent():
    """The known list, and 59 and 71, which reach it only together with baseline or one-GPU logs of their
    folders."""
    missed = numbers_of("short", "miss")
    assert missed == ["13", "36", "44", "59", "67", "71", "79", "84"]
    assert [i for i in missed if RECORDS[f"short/{i}"]["waived"]] == ["36", "44", "59", "67", "71", "79"]
    assert RECORDS["short/13"]["before_rule"] and not RECORDS["short/84"]["waived"]
    for ref, p in (("59", 0.003), ("71", 0.002)):
        folder = RECORDS[f"short/{ref}"]["folder"].split("/")[0]
        losses = [r["val_loss"] for (_, d, _), runs in TABLES["runs"].items() if d == folder for r in runs]
        assert (
            target_test(losses, 3.28)["p"] == pytest.approx(p, abs=5e-4)
            and RECORDS[f"short/{ref}"]["p"] > 0.01
        )


def test_record_9_is_a_folder_of_ablations_of_which_one_log_counts():
    r = RECORDS["short/9"]
    groups = [g for g in TABLES["groups"] if g["dir"] == "2024-11-06_ShortcutsTweaks"]
    assert r["n"] == 1 and r["verdict"] == "cannot tell" and {g["group"]: g["runs"] for g in groups} == {
        "record": 1, "ablations": 5, "record 8": 1}


def test_what_rests_on_too_few_logs():
    """Records 1-12, 17-25, 27, 69 and 86, and the re-timings 21r, 21t and 66."""
    untold = {i for i in numbers_of("short", "cannot tell")}
    assert untold == {*map(str, range(1, 13)), *map(str, range(17, 26)), "21r", "21t", "27", "66", "69", "86"}
    assert numbers_of("short", "cannot tell", "no log") == ["3", "66", "86"]
    assert (
        RECORDS["short/21"]["why"] == "2 of 81 runs have a log"
        and RECORDS["short/69"]["why"] == "1 of 9 runs has a log"
    )


def test_the_split_groups_of_record_80():
    groups = {g["group"]: [r["val_loss"] for r in judge.runs_of(TABLES, g)] for g in TABLES["groups"]
              if g["dir"] == "2026-04-08_PairedHeadMuon"}
    assert {k: len(v) for k, v in groups.items()} == {"split_qk": 8, "baseline-1480": 8, "baseline-1490": 4}
    assert statistics.fmean(groups["baseline-1480"]) == pytest.approx(3.28, abs=1e-5)


def test_the_usual_spread_is_the_median_over_records():
    sds = [r["sd"] for r in RECORDS.values() if r["track"] == "short" and r["n"] >= 3]
    assert statistics.median(sds) == pytest.approx(judge.USUAL_SD["short"], abs=2e-5)


@pytest.mark.parametrize(
    "ref, published, logged",
    [
        ("short/4", 22.3, 22.32), ("short/5", 15.2, 15.18), ("short/12", 5.03, 5.03),
        ("short/19", 3.142, 3.142), ("short/29", 2.731, 2.727), ("short/41", 2.345, 2.342),
        ("short/44", 2.269, 2.293), ("short/48", 2.170, 2.212), ("short/58", 1.820, 1.812),
        ("short/62", 1.655, 1.634), ("short/65", 1.613, 1.630), ("short/72", 1.496, 1.551),
        ("short/80", 1.406, 1.545), ("short/82", 1.353, 1.331), ("short/84", 1.320, 1.398),
        ("short/88", 1.243, 9.93), ("short/89", 1.230, 1.326), ("medium/9", 24.12, 23.74),
        ("medium/13", 23.14, 23.38), ("medium/17", 22.98, 24.93)
    ],
)
def test_published_against_logged_minutes(ref, published, logged):
    r = RECORDS[ref]
    assert r["published_minutes"] == published and r["linked_minutes"] == pytest.approx(logged, abs=0.005)


def test_medium_rests_on_single_logs_with_these_margins():
    assert numbers_of("medium", "pass") == ["18"] and numbers_of("medium", "miss") == ["1"]
    assert numbers_of("medium", "cannot tell", "no log") == ["11"] and RECORDS["medium/17"]["waived"]
    assert RECORDS["medium/10"]["margin"] == pytest.approx(0.00004, abs=5e-6)
    assert RECORDS["medium/2"]["margin_in_sd"] == pytest.approx(0.0034 / 0.0008)


# ----- the optimizer track

def test_the_optimizer_rule_on_all_46_results():
    assert numbers_of("optimizer", "miss") == ["1", "2", "3"] and numbers_of("optimizer", "cannot tell") == [
        "41"
    ]
    assert len(numbers_of("optimizer", "pass")) == 42
    r = RECORDS["optimizer/7"]
    assert r["n"] == 1 and r["verdict"] == "pass"
    assert RECORDS["optimizer/41"]["why"] == "1 of 20 runs has a log; the published mean would pass"
    assert (RECORDS["optimizer/44"]["n"], RECORDS["optimizer/44"]["folder"].split("/")[1]) == (20, "H100")


def test_every_optimizer_mean_is_the_published_one():
    for r in RECORDS.values():
        if r["track"] == "optimizer" and r["verdict"] != "cannot tell":
            assert r["mean"] == pytest.approx(r["claimed_loss"], abs=2e-4) and r["n"] == r["claimed_runs"], r[
                "record"
            ]


def test_a_step_loss_lies_above_the_mean_where_the_runs_end():
    """A mean read before the end of the runs must be higher than at their end: else it is of something
    else."""
    for g in judge.counted(TABLES, "optimizer"):
        runs = judge.runs_of(TABLES, g)
        if g["step_loss"] and all(r["step"] > g["step"] for r in runs):
            assert g["step_loss"] > statistics.fmean(r["val_loss"] for r in runs) - 2e-4, g["record"]


def test_pairwise_claims_go_to_the_best_result_before():
    p = RECORDS["optimizer/11"]["pairwise"]
    assert p["against"] == "optimizer/9" and p["steps_saved"] == 25 and not p["passed"]
    assert (
        RECORDS["optimizer/42"]["pairwise"]["published"]
        and not RECORDS["optimizer/44"]["pairwise"]["published"]
    )
    for r in RECORDS.values():
        if r["pairwise"]:
            assert r["pairwise"]["steps_saved"] > 0


# ----- the result for programs

def test_the_committed_result_is_current():
    path = ROOT / "evidence/results/judge.json"
    assert path.read_text() == judge.as_text(RESULT), (
        "`python -m records judge --json evidence/results/judge.json`"
    )
    assert json.loads(path.read_text())["data"] == TABLES["digest"]


def test_no_code_names_a_record():
    """Which group counts, what was waived and what was claimed are columns."""
    code = re.sub(r'""".*?"""', "", (ROOT / "evidence/judge.py").read_text(), flags=re.S)
    assert not re.search(
        r"(short|medium|optimizer)/\d", re.sub(r"UserError\(.*?\)\n|help=.*", "", code, flags=re.S)
    )


# ----- commands

def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "records", "judge", *args], cwd=ROOT, capture_output=True, text=True
    )


def options(**kwargs):
    return type("Options", (), {"record": None, "track": None, "markdown": False, "json": None, **kwargs})


def test_the_command_prints_tables_and_counts(tmp_path):
    done = run("--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    for text in (
        "short/89   13  3.27837  0.00142  0.000669", "42 pass from their logs", "miss (waived)",
        "No log shows the runs that were not committed"
    ):
        assert text in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["tracks"]["optimizer"]["miss"] == ["1", "2", "3"]


def test_one_record_in_detail_shows_groups_baselines_and_runs(capsys):
    judge.run(options(record="80"))
    out = capsys.readouterr().out
    assert "split_qk" in out and "against baseline-1480: loss -0.00120" in out and "equal steps" in out
    assert out.count("at step 1480") == 8
    judge.run(options(record="optimizer/41"))
    assert "not proven pairwise" in capsys.readouterr().out


def test_markdown_tables_are_whole(capsys):
    for kwargs in ({"track": "medium"}, {"record": "short/80"}):
        judge.run(options(markdown=True, **kwargs))
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        blocks = {line.count("|") for line in table}
        assert len(table) > 3 and len(blocks) == (1 if "track" in kwargs else 2)


def test_names_of_published_records():
    assert judge.find(TABLES, "short/034") == judge.find(TABLES, "34", "short") == "short/34"
    assert judge.find(TABLES, "short/muon") == "short/3" and judge.find(TABLES, "80") == "short/80"
    for name, track, message in (
        ("short/99", None, "did you mean"), ("34", None, "say short/34 or optimizer/34"),
        ("short/3", "medium", "not on the medium track"), ("", None, "no published record"),
        ("tiny-v3", None, "no published record")
    ):
        with pytest.raises(UserError, match=message):
            judge.find(TABLES, name, track)


def test_misuse_is_one_line_and_exit_code_2(tmp_path):
    for args in (["short/99"], ["--json", str(tmp_path / "missing/x.json")]):
        done = run(*args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
            done.stderr
        )
    assert run("--track", "shrt").returncode == 2


# ----- damage

RUN_LINE = "optimizer,20260501_muonsq,,bb903816-ea27-4f5f-8028-c963d38c6a7f.txt,,3325,3.27523,350817\n"


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        (judge.RUNS, RUN_LINE, "", "declares 1 runs"),
        (judge.RUNS, RUN_LINE, RUN_LINE * 2, "repeats the run of line"),
        (judge.RUNS, "3325,3.27523", "3325,nan", "val_loss 'nan' is not a number"),
        (judge.RUNS, "3325,3.27523", "3325,327.523", "not a number between"),
        (judge.RUNS, "3325,3.27523", "3325,", "val_loss '' is not"),
        (judge.RUNS, "3325,3.27523", "3325", "another number of columns"),
        (
            judge.RUNS, "3325,3.27523,350817", "3324,3.27523,350817",
            "ends at step 3324, the loss counts at 3325"
        ),
        (judge.RUNS, "3325,3.27523,350817", "3325,3.27523,-5", "time_ms '-5'"),
        (judge.RUNS, "optimizer,20260501_muonsq,,", "optimizer,20260501_muonsq,x,", "declares 1 runs"),
        (
            judge.RUNS, "optimizer,20260501_muonsq,", "optimiser,20260501_muonsq,",
            "track 'optimiser' is none of"
        ),
        (judge.RUNS, "track,dir,group", "track,folder,group", "column dir is missing"),
        (judge.RUNS, "val_loss", "loss", "column val_loss is missing"),
        (judge.GROUPS, "20260501_muonsq,,record,1,", "20260501_muonsq,,recrd,1,", "role must be one of"),
        (judge.GROUPS, "20260501_muonsq,,record,1,", "20260501_muonsq,,record,2,", "declares 2 runs"),
        (judge.GROUPS, "optimizer,7,2026", "optimizer,6,2026", "has a second counted group"),
        (
            judge.GROUPS, "bb903816-ea27-4f5f-8028-c963d38c6a7f.txt", "other.txt",
            "linked_log 'other.txt' has no run"
        ),
        (judge.GROUPS, "8,3.2771,,5,", "8,3.2771,,77,", "previous '77' is no record"),
        (judge.GROUPS, ",1,3.2752,,,", ",,3.2752,,,", "needs its claimed_runs"),
    ],
)
def test_damaged_tables_are_refused_with_the_line(tmp_path, name, old, new, message):
    for file in (judge.RUNS, judge.GROUPS):
        shutil.copy(judge.HERE / file, tmp_path)
    text = (tmp_path / name).read_text()
    assert text.count(old) == 1, old
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        judge.load(tmp_path)
    assert "\n" not in str(caught.value) and re.search(
        r"(runs|groups).csv line \d+: .*; restore both", str(caught.value)
    )


@pytest.mark.parametrize("content", [b"", b"track,dir\n", b"\xff\xfe\x00", None])
def test_an_empty_foreign_or_missing_table_is_refused(tmp_path, content):
    shutil.copy(judge.HERE / judge.GROUPS, tmp_path)
    if content is not None:
        (tmp_path / judge.RUNS).write_bytes(content)
    with pytest.raises(UserError, match=judge.RUNS):
        judge.load(tmp_path)
