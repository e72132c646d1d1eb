"""Laws of claims whose settings have words that this checkout lacks: their own code resolves them, in a
sandbox, and nothing of it runs in the judge's process."""

import os
import shutil

import pytest

import runlog
from claim_builder import TARGET, arm, build, declaration
from common import sandbox
from common.errors import UserError
from evidence import arms, foreign, verify
from settings import Settings, deltas, schema

pytestmark = pytest.mark.skipif(
    not (os.name == "posix" and sandbox.probe().get("network") and sandbox.probe().get("writes")),
    reason="this machine has no sandbox for the code of others")

WORD = '    sparkle: float = opt(0.0, "sparkle of the logits", off=0.0)\n    vocab_size: int = opt('
RECORD = ('id = "901"\ntitle = "sparkle"\nparent = "short/10"\ndate = 2026-01-01\npeople = ["@x"]\n'
          'kind = "ml"\nsource = "own"\n[delta]\n"model.sparkle" = 0.5\n')


def new_sources(text):
    """This program with one more setting, model.sparkle."""
    return text.replace("    vocab_size: int = opt(", WORD, 1)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """{record: what that program resolves it to}, asked outside of any sandbox."""
    tree = tmp_path_factory.mktemp("code")
    foreign.write_sources(new_sources(runlog.sources()[0]), tree)
    (tree / "records/short/901_claimed").mkdir()
    (tree / "records/short/901_claimed/record.toml").write_text(RECORD)
    changes = ["--scale", "micro", "--set", *TARGET]
    return tree, {name: arms.resolve(tree, [name, *changes], name) for name in ("short/901", "short/10")}


def sparkling(folder, monkeypatch, code, **new):
    """A claim of short/901 on short/10, run by that program; new: other fields of its arm."""
    made = {}
    for name, record in (("new", "short/901"), ("parent", "short/10")):
        said = code[1][record]
        s = foreign.projected(said["settings"])[0]
        made[name] = arm(record, TARGET, s=s) | {k: said[k] for k in ("settings", "ml_hash", "system_hash")}
    made["new"] |= new
    text, read = new_sources(runlog.sources()[0]), schema.from_plain
    monkeypatch.setattr(runlog, "sources", lambda: (text, runlog.source_hash(text)))
    monkeypatch.setattr(schema, "from_plain", lambda values: read(foreign.known(values, Settings, "", [])))
    folder.mkdir(parents=True)
    (folder / "record.toml").write_text(RECORD)
    return build(folder, monkeypatch, declaration(made, record="short/901"))  # undoes both patches


def test_new_words_are_resolved_by_the_code_that_brought_them(code, tmp_path, monkeypatch):
    folder = sparkling(tmp_path / "claim", monkeypatch, code)
    results = verify.verify(folder)
    assert (results["verdict"], results["problems"]) == ("shown", [])
    said = "what model.sparkle mean: this checkout does not know them, the claim's own sources does"
    assert said in results["unknown"]
    assert results["arms"]["new"]["ml_hash"] != results["arms"]["parent"]["ml_hash"]
    verify.store(folder, results, page=True)
    assert "a setting that this checkout does not know" in (folder / "README.md").read_text()
    assert verify.verify(folder)["verdict"] == "shown"


def test_other_values_than_that_code_gives_are_refused(code, tmp_path, monkeypatch):
    said = code[1]["short/901"]["settings"]
    said = said | {"model": said["model"] | {"sparkle": 0.75}}
    folder = sparkling(tmp_path / "claim", monkeypatch, code, settings=said, ml_hash="0" * 16)
    problems = verify.verify(folder)
    for why in ("arm new: ml_hash 0000000000000000, by the claim's own sources it is",
                "resolves to other settings by the claim's own sources: model.sparkle"):
        assert any(why in p for p in problems["problems"]), problems


ATTACK = """
import os, sys, socket, subprocess
for path in ({victim!r}, os.path.expanduser('~/.profile'), 'stolen'):
    try: open(path, 'a').write('attacked')
    except OSError: pass
try:
    socket.create_connection(('127.0.0.1', {port}), 2)
    reached = 'reached'
except OSError: reached = 'refused'
raise SystemExit('network ' + reached + ', secret ' + str(os.path.exists({victim!r})))
"""


def test_that_code_cannot_act_on_the_judge(code, tmp_path, monkeypatch):
    victim = tmp_path / "profile"
    victim.write_text("mine")
    attack = ATTACK.format(victim=str(victim), port=9)
    place = tmp_path / "code"
    shutil.copytree(code[0], place)
    with open(place / "settings/model.py", "a") as file:
        file.write(attack)
    with pytest.raises(UserError) as error:
        foreign.ask(place, ["short/10"])
    assert victim.read_text() == "mine" and not (place / "stolen").exists()
    assert "network refused, secret False" in str(error.value)


@pytest.mark.parametrize("code_text, why", [
    ("while True: pass\n", "took too long"),
    ("x = [bytes(2 ** 27) for _ in range(64)]\n", "memory|MemoryError"),
    ("print('{}')\nraise SystemExit\n", "gives no settings"),
    ("print('[' * 10 ** 5)\nraise SystemExit\n", "nests"),
    ("print('\\x1b[2J')\nraise SystemExit(1)\n", "cannot resolve it"),
    ("print('{\"settings\": {}, \"x\": 1}')\nraise SystemExit\n", "has a field 'x'"),
], ids=["endless", "memory", "no settings", "deep", "escape codes", "more fields"])
def test_an_answer_is_data_too(code_text, why, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "SECONDS", 3.0)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/schema.py").write_text(code_text)
    with pytest.raises(UserError, match=why) as error:
        foreign.ask(tmp_path, ["short/10"])
    assert str(error.value).isprintable()


def test_without_a_sandbox_that_code_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/schema.py").write_text("raise SystemExit(99)")
    monkeypatch.setattr(sandbox, "probe", lambda: {"kind": "plain", "refused": []})
    with pytest.raises(UserError, match="NOT HELD: no network.* code of others is not run here"):
        foreign.ask(tmp_path, ["short/10"])


def test_what_counts_steps_and_tokens_must_be_known_here():
    plain = schema.plain(deltas.resolve("short/10", scale="micro").settings)
    s, unknown = foreign.projected(plain | {"model": plain["model"] | {"sparkle": 1, "a\x1b": {}}})
    assert unknown == ["model.a\\x1b", "model.sparkle"] and schema.plain(s) == plain
    for section in foreign.COUNTED:
        with pytest.raises(UserError, match=f"{section}.more: unknown here"):
            foreign.projected({**plain, section: plain[section] | {"more": 1}})
    with pytest.raises(UserError):
        foreign.projected({**plain, "schedule": plain["schedule"] | {"steps": "x"}})
    with pytest.raises(UserError, match="is not a table"):
        foreign.projected({**plain, "model": 3})
