"""Laws of attempts: run by name, head of nothing; only a shown claim is promoted, and a promotion or a claim
can be undone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from claim_builder import arm, build, declaration
from evidence import arms, attempts, manifest, promote, submit, verify, withdraw
from common.errors import UserError
from settings import deltas, schema

ROOT = Path(__file__).parent.parent
TOML = ('title = "A higher rate"\nparent = "short/57"\ndate = 2026-02-01\npeople = ["@me"]\nkind = '
        '"ml"\nsource = "log"\n\n'
        '[delta]\n"optim.muon.lr" = 0.0543\n')
SETS = ["validation.target=5.2"]


def git(*args, cwd):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", *args], cwd=cwd, env=clean, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A small checkout of its own: the record.toml files up to record 57, and one committed attempt."""
    for path in (ROOT / "records").glob("*/*/record.toml"):
        number = re.match(r"\d+", path.parent.name)  # claims have none
        if number is None or int(number[0]) > 57:  # so that the tests do not change with the head
            continue
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    shutil.copytree(ROOT / "records/presets", tmp_path / "records/presets")
    (tmp_path / "attempts/my_idea").mkdir(parents=True)
    (tmp_path / "attempts/my_idea/record.toml").write_text(TOML)
    for name, value in (("RECORDS", "records"), ("ATTEMPTS", "attempts")):
        monkeypatch.setattr(deltas, name, tmp_path / value)
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    deltas.load_records.cache_clear()
    for words in (
        ["init", "--quiet"], ["config", "user.name", "t"], ["config", "user.email", "t@t"], ["add", "--all"],
        ["commit", "--quiet", "--message", "all"]
    ):
        git(*words, cwd=tmp_path)
    yield tmp_path
    monkeypatch.undo()
    deltas.load_records.cache_clear()


def claim(folder, loss=None, **more):
    """Invented runs of attempts/my_idea against its parent; shown unless `loss` says otherwise."""
    s = deltas.resolve(
        deltas.parse_record(deltas.tomllib.loads(TOML), folder / "record.toml", "attempts"), scale="micro",
        sets=SETS
    ).settings
    both = {"new": arm("attempts/my_idea", SETS, s=s), "parent": arm("short/57", SETS)}
    with pytest.MonkeyPatch.context() as patch:
        return build(folder, patch, declaration(both, record="attempts/my_idea", **more), loss)


def call(module, *args):
    import argparse
    p = argparse.ArgumentParser()
    module.arguments(p)
    return module.run(p.parse_args(args))


def refused(message, module, *args):
    with pytest.raises(UserError) as error:
        call(module, *args)
    assert message in str(error.value) and "\n" not in str(error.value), error.value


# ----- named in full, head of nothing -----------------------------------------------------------------------

def test_an_attempt_runs_by_its_name_with_its_parent_s_chain_and_is_in_no_lineage(here):
    for name in ("attempts/my_idea", "attempts/my_idea/"):
        found = deltas.resolve(name, scale="micro")
        assert found.record.ref == "attempts/my_idea" and found.settings.optim.muon.lr == 0.0543
    assert [r.ref for r in deltas.chain(found.record)][-2:] == ["short/57", "attempts/my_idea"]
    parent = deltas.resolve("short/57", scale="micro").settings
    assert [path for path, _, _ in schema.difference(parent, found.settings)] == ["optim.muon.lr"]
    assert deltas.find_record("short/head").ref == "short/57"
    assert not any(ref.startswith("attempts") for ref in deltas.load_records())
    with pytest.raises(UserError, match="did you mean attempts/my_idea"):
        deltas.find_record("my_idea")


def test_a_few_lines_are_enough_to_run(here):
    (here / "attempts/six").mkdir()
    (here / "attempts/six/record.toml").write_text('parent = "short/11"\n[delta]\n"model.num_layers" = 6\n')
    assert deltas.resolve("attempts/six", scale="micro").settings.model.num_layers == 6


@pytest.mark.parametrize("text, message", [
    ('[delta]\n"optim.muon.lr" = 0.05', "the line 'parent' is missing"),
    ('parent = "attempts/my_idea"\n[delta]\n"optim.muon.lr" = 0.05', "promote that one first"),
    ('parent = "short/577"\n[delta]\n"optim.muon.lr" = 0.05', "does not exist (did you mean short/57"),
    ('id = "58"\nparent = "short/57"\n[delta]\n"optim.muon.lr" = 0.05', "an attempt has no id"),
    ('parent = "short/57"\n', "an empty [delta]"),
    ('parent = 33\n[delta]\n"optim.muon.lr" = 0.05', "parent = 33: expected text in quotes"),
    ('parent = "short/57"\ndelta = 3', "delta = 3: expected a table [delta]"),
    ('parent = "short/57"\npeople = "@me"\n[delta]\n"optim.muon.lr" = 0.05', 'expected a list like ["@me"]'),
    ('parent = "short/57"\nparents = "x"\n[delta]\n"optim.muon.lr" = 0.05', "unknown line 'parents'"),
    ('parent = "short/57"\n[delta]\n"optim.muon.lrr" = 0.05', "unknown setting 'optim.muon.lrr'"),
    ('parent = "short/57', "record.toml: "),
    ("\xff", "record.toml: "),
    (None, "unknown attempt 'attempts/other'")])
def test_a_broken_attempt_is_one_line_and_hurts_nothing_else(here, text, message):
    if text is not None:
        (here / "attempts/other").mkdir()
        (here / "attempts/other/record.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        deltas.resolve("attempts/other")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert deltas.resolve("attempts/my_idea") and deltas.resolve("short/head")


# ----- promote, and back ------------------------------------------------------------------------------------

def test_a_shown_claim_becomes_the_head_and_goes_back_when_it_is_withdrawn(here):
    folder = claim(here / "attempts/my_idea")
    assert call(verify, str(folder)) == verify.SHOWN and attempts.status(folder) == "shown"
    (here / "notes.txt").write_text("mine")  # untracked, and no business of a promotion
    # nor is what was edited meanwhile
    with open(here / "records/short/001_llmc_baseline/record.toml", "a") as file:
        file.write("# edited\n")
    edited = " M records/short/001_llmc_baseline/record.toml\n?? notes.txt\n"
    refused("shown at scale micro only", promote, "my_idea")
    call(promote, "attempts/my_idea/", "--accept-scale", "micro")
    record = deltas.find_record("short/head")
    assert (
        record.ref == "short/58" and record.folder == here / "records/short/058_my_idea"
        and not folder.exists()
    )
    assert deltas.find_record("attempts/my_idea") == record  # as its logs name it
    results = verify.verify(record.folder)
    assert (results["verdict"], results["problems"]) == ("shown", [])
    assert "# short/58: A higher rate" in (record.folder / "README.md").read_text()
    assert git("status", "--porcelain", cwd=here) == edited
    assert not {"notes.txt", "001_llmc_baseline"} & set(
        re.split(r"[/\n]", git("show", "--name-only", cwd=here))
    )

    call(withdraw, "short/58", "--why", "not seen on a second machine")
    assert deltas.find_record("short/head").ref == "short/57" and not record.folder.exists()
    assert (folder / "record.toml").read_text() == TOML and attempts.status(folder) == "withdrawn"
    assert git("status", "--porcelain", cwd=here) == edited
    assert "not seen on a second machine" in git("log", "-1", "--format=%s", cwd=here)
    results = verify.verify(folder)
    assert results["verdict"] == "not shown" and "not seen on a second machine" in results["reasons"][0]
    assert results["statistics"]["target"]["n"] == 4  # nothing of the evidence is lost
    assert "NOT SHOWN" in (folder / "README.md").read_text()
    refused("withdrawn", promote, "my_idea", "--accept-scale", "micro")


def test_only_a_shown_claim_is_promoted(here):
    refused("holds no claim", promote, "my_idea")
    folder = claim(here / "attempts/my_idea", loss={"new": 5.25, "parent": 5.27})
    refused("not shown (target 5.2", promote, "my_idea", "--accept-scale", "micro")
    (folder / "runs" / manifest.read(folder).runs[1].finish["folder"] / "log.txt").write_text("edited\n")
    refused("refused", promote, "my_idea", "--accept-scale", "micro")
    refused("unknown attempt 'my_ide' (did you mean my_idea?)", promote, "my_ide")
    assert deltas.find_record("short/head").ref == "short/57" and folder.exists()


def test_a_claim_on_an_older_record_is_a_branch(here, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TOML", TOML.replace("short/57", "short/11"))
    shutil.rmtree(here / "attempts/my_idea")
    s = deltas.resolve("short/11", scale="micro", sets=[*SETS, "optim.muon.lr=0.0543"]).settings
    both = {"new": arm("attempts/my_idea", SETS, s=s), "parent": arm("short/11", SETS)}
    (here / "attempts/my_idea").mkdir()
    (here / "attempts/my_idea/record.toml").write_text(TOML)
    build(
        here / "attempts/my_idea", monkeypatch_of := pytest.MonkeyPatch(),
        declaration(both, record="attempts/my_idea")
    )
    monkeypatch_of.undo()
    refused("short has come to short/57", promote, "my_idea", "--accept-scale", "micro")
    call(promote, "my_idea", "--accept-scale", "micro", "--lineage", "variants")
    record = deltas.find_record("attempts/my_idea")
    assert record.ref == "variants/11" and deltas.find_record("short/head").ref == "short/57"
    assert verify.verify(record.folder)["verdict"] == "shown"
    refused("was not made by", withdraw, "variants/7", "--why", "x")


def test_a_record_that_is_built_on_stays(here):
    claim(here / "attempts/my_idea")
    call(promote, "my_idea", "--accept-scale", "micro")
    (here / "attempts/next").mkdir()
    (here / "attempts/next/record.toml").write_text(
        TOML.replace("short/57", "short/58").replace("0.0543", "0.06")
    )
    refused("built on by attempts/next", withdraw, "short/58", "--why", "x")
    refused("was not made by `records promote`", withdraw, "short/57", "--why", "x")
    assert deltas.find_record("short/head").ref == "short/58"


def test_a_commit_that_git_refuses_leaves_everything_as_it_was(here):
    folder = claim(here / "attempts/my_idea")
    git("config", "commit.gpgsign", "true", cwd=here)
    git("config", "gpg.program", "false", cwd=here)
    before = sorted(p.relative_to(here) for p in here.glob("[ra]*/**/*"))
    with pytest.raises(UserError, match="git commit"):
        call(promote, "my_idea", "--accept-scale", "micro")
    names = {"README.md", "results.json"}
    assert [
        p for p in sorted(p.relative_to(here) for p in here.glob("[ra]*/**/*")) if p.name not in names
    ] == before
    assert (folder / "record.toml").read_text() == TOML and deltas.find_record("short/head").ref == "short/57"
    assert git("diff", "--cached", "--name-only", cwd=here) == ""


# ----- withdraw an attempt ----------------------------------------------------------------------------------

def test_a_claim_that_is_given_up_half_way_keeps_its_runs_and_takes_no_more(here):
    folder = claim(
        here / "attempts/my_idea", plan={"looks": [{"runs": 2, "alpha": 0.005}, {"runs": 4, "alpha": 0.005}]}
    )
    lines = (folder / manifest.NAME).read_text().splitlines(keepends=True)
    (folder / manifest.NAME).write_text("".join(lines[:4]))  # the second run is registered and died
    runs = sorted(folder.glob("runs/*/"))
    for path in runs[1:]:
        shutil.rmtree(path)
    with pytest.raises(UserError, match="says nothing"):
        call(withdraw, "my_idea", "--why", "  ")
    call(withdraw, "my_idea", "--why", "a better idea came")
    found = manifest.read(folder)
    assert found.withdrawn["why"] == "a better idea came" and sorted(folder.glob("runs/*/")) == runs[:1]
    assert call(verify, str(folder)) == verify.NOT_SHOWN and attempts.status(folder) == "withdrawn"
    refused("the claim was withdrawn: nothing follows", withdraw, "my_idea", "--why", "again")
    refused("withdrawn", submit, "my_idea", "--resume")
    assert deltas.resolve("attempts/my_idea")  # still to be run by name


def test_an_attempt_that_was_never_run_is_removed(here):
    call(withdraw, "my_idea", "--why", "a typing error")
    assert not (here / "attempts").exists() and git("status", "--porcelain", cwd=here) == ""
    assert git("log", "-1", "--format=%s", cwd=here) == "Withdraw attempts/my_idea: a typing error\n"


def test_a_withdrawal_is_part_of_the_chain(here):
    folder = claim(here / "attempts/my_idea")
    call(withdraw, "my_idea", "--why", "because")
    path = folder / manifest.NAME
    path.write_text(path.read_text().replace('"because"', '"no reason"'))
    assert "breaks the hash chain" in verify.verify(folder)["problems"][0]
