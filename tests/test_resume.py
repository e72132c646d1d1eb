"""Laws of checkpoints and --resume: nothing is lost, nothing else is used, and the log says what happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import runlog
import train_gpt
from common import arguments
from common.errors import UserError
from data.corpus import sample_corpus
from data.stream import Stream
from evidence import run_laws
from page import curves
from program import program_of
from settings import schema
from system import checkpoint, command_line, resume
from test_stream import make_corpus

program = program_of(__file__)
STEPS = 8
SMALL = (f"schedule.steps={STEPS}", "validation.tokens=1024", "validation.seq_len=128", "validation.every=4",
         "system.warmup_steps=1")


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does: no end in its log, no checkpoint."""


def options_of(ref, out, *more):
    sets = [part for x in SMALL for part in ("--set", x)]
    return command_line.command_line([ref, "--scale", "micro", *sets, "--out", str(out), "--checkpoint-every",
                                      "2", "--save-checkpoint", *more])


def train(options, resolved):
    return train_gpt.train(resolved, options)


def killed_at(step, monkeypatch, options, resolved):
    """The folder of a run that ends in the middle of this step."""
    plain = train_gpt.train_step

    def dies(run, plan, *rest, **more):
        if run.clock.began is not None and plan.step == step:
            run.checkpoints.report(wait=True)
            raise Killed
        return plain(run, plan, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(train_gpt, "train_step", dies)
        with pytest.raises(Killed):
            train(options, resolved)
    return next(Path(options.out).glob("*/run.jsonl")).parent


def go_on(folder, *more):
    return train(*command_line.command_line(["--resume", str(folder), "--checkpoint-every", "2",
                                             "--save-checkpoint", *more]))


def outcome(folder):
    """(parameters, losses, digest of the tokens) of a finished run."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    events = runlog.standing(runlog.read_chain(folder / "run.jsonl"))
    losses = [(e["step"], e["val_loss"], e["train_loss"]) for e in events if e["kind"] == "validation"]
    return saved, losses, next(e["digest"] for e in events if e["kind"] == "stream")


def kinds(folder):
    return [e["kind"] for e in runlog.read_chain(folder / "run.jsonl")]


# ----- the same bits

@pytest.mark.parametrize("ref, at", [("short/57", (5,)), ("variants/2", (1, 7))])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_left_alone(ref, at, tmp_path, monkeypatch, capsys):
    """Stages, an embedding that unties, groups with a cadence, YaRN and kept mantissas; experts with their
    biases. variants/2 is killed before its first checkpoint too."""
    options, resolved = options_of(ref, tmp_path / "whole")
    assert train(options, resolved) == 0
    whole = next((tmp_path / "whole").glob("*/run.jsonl")).parent
    options, resolved = options_of(ref, tmp_path / "killed")
    folder = killed_at(at[0], monkeypatch, options, resolved)
    for step in at[1:]:
        again = command_line.command_line(["--resume", "last", "--out", str(tmp_path / "killed"),
                                           "--checkpoint-every", "2"])
        assert killed_at(step, monkeypatch, *again) == folder
    assert go_on(folder) == 0
    (ours, losses, tokens), (theirs, expected, same) = outcome(folder), outcome(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses == expected and tokens == same
    assert "no record" in capsys.readouterr().out
    assert not (folder / checkpoint.FOLDER).exists()  # a finished run needs none
    if ref == "short/57":
        the_log_is_one_and_says_what_happened(folder)


def the_log_is_one_and_says_what_happened(folder):
    """Chained over the interruption; lost steps are on the clock; verify refuses it as a record, with this
    reason alone."""
    events = runlog.read_chain(folder / "run.jsonl")
    event = next(e for e in events if e["kind"] == "resume")
    # killed in step 5, behind the checkpoint of step 4: one step had been done in vain
    assert (event["step"], event["lost_steps"], event["checkpoint"]) == (4, 1, "step0000004.pt")
    assert event["lost_ms"] > 0 and event["digest"]
    before = max(e["train_time_ms"] for e in events[:event["n"]] if e["kind"] == "validation")
    after = [e["train_time_ms"] for e in events[event["n"]:] if e["kind"] == "validation"]
    assert before <= event["train_time_ms"] <= after[0]
    walls = [e["wall_ms"] for e in events]
    assert walls == sorted(walls)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["resumed"] == [4] and [step for step, _ in summary["curve"]] == [0, 4, 8]
    assert [p[0] for p in curves.read(folder).validations] == [0, 4, 8]
    assert (folder / "log.txt").read_text() == "".join(x + "\n" for e in events for x in runlog.render(e))
    log, unread = run_laws.read_log(folder, "runs/1")
    problems = list(run_laws.check_run(log))
    assert (
        unread == [] and len(problems) == 1
        and "resumed at step 4 after an interruption: a record is" in problems[0]
    )


def test_a_run_that_is_really_killed_ends_with_the_same_bits_too(tmp_path):
    """A sample of tests/kills.py: SIGKILL after a random time."""
    done = subprocess.run(
        [
            sys.executable, "tests/kills.py", "--kills", "1", "--steps", "8", "--records", "2", "--processes",
            "1"
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "SPEEDRUN_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith("| equal |"), done.stderr


@pytest.mark.parametrize("moment", ["weights", "end", "ring", "summary"])
def test_a_kill_while_the_end_is_written_down_loses_nothing_that_was_asked_for(moment, folder, monkeypatch):
    """checkpoint.pt comes before the log's end, the ring goes last; what follows from the log is made up."""
    def dies(*_, **__):
        raise Killed

    place = {"weights": (train_gpt.report, "write_checkpoint"), "end": (runlog.RunLog, "end"),
             "ring": (checkpoint.Checkpoints, "remove"), "summary": (runlog, "summarise")}[moment]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(*place, dies)
        go_on(folder)
    over = runlog.ended(runlog.read_chain(folder / "run.jsonl"))
    assert over == (moment in ("ring", "summary"))
    if over:
        with pytest.raises(SystemExit):
            command_line.command_line(["--resume", str(folder)])
    else:
        assert go_on(folder) in (0, 3)
    events = runlog.read_chain(folder / "run.jsonl")
    assert (folder / "checkpoint.pt").exists() and not (folder / checkpoint.FOLDER).exists()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert (folder / "log.txt").read_text() == "".join(x + "\n" for e in events for x in runlog.render(e))
    assert [e["kind"] for e in runlog.standing(events)].count("stream") == 1


# ----- another number of processes

ONE_RECORD = [("short/11", "float64", "auto")]
ALL_PLANS = [("short/11", "float32", "auto"), ("short/33", "float64", "auto"), ("short/6", "float64", "auto"),
             ("short/11", "float64", "bucketed"), ("variants/2", "float64", "experts"),
             ("short/92", "float64", "auto")]
# nats; the order of sums differs. Muon amplifies the rounding of gradients that are nearly zero (record 33).
NEAR = {"float64": 1e-12, "float32": 1e-6}


@pytest.mark.parametrize("ref, precision, comm", [
    *ONE_RECORD, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_PLANS)])
def test_four_processes_save_and_two_and_one_go_on(ref, precision, comm):
    """Named tensors without padding: shards of four processes become those of two and of one."""
    losses = program(ref, precision, comm, OMP_NUM_THREADS="1")
    assert losses["4 -> 4"] == losses["4"]
    assert all(abs(losses[f"4 -> {n}"] - losses["4"]) < NEAR[precision] for n in (1, 2)), losses


def reshard(ref, precision, comm):
    """{"4": validation loss of four processes, "4 -> n": that of n which went on from the middle}."""
    import kills
    found, scratch = {}, Path(tempfile.mkdtemp())
    os.environ["KILLS_OUTPUT"] = str(scratch / "output.txt")
    how = "system.expert_parallel=true" if comm == "experts" else f"system.comm={comm}"
    sets = ("schedule.steps=6", "validation.every=6", *SMALL[1:3], "system.warmup_steps=1",
            f"system.precision={precision}", how)
    argv = [ref, "--scale", "micro", "--checkpoint-every", "3"]
    argv += [part for x in sets for part in ("--set", x)]

    def run(argv, processes, out):
        codes = kills.waited(kills.begin([*argv, "--out", str(out)], processes), 280)
        assert {*codes.values()} == {0}, (scratch / "output.txt").read_text()[-3000:]
        return json.loads(next(out.glob("*/summary.json")).read_text())["val_loss"]

    checkpoint.Checkpoints.remove = keep_copy
    found["4"] = run(argv, 4, scratch / "4")
    whole = next((scratch / "4").glob("*/run.jsonl")).parent
    for n in (4, 2, 1):
        folder = shutil.copytree(whole, scratch / f"to{n}" / whole.name)
        events = (folder / "run.jsonl").read_text().splitlines(keepends=True)
        kept = next(i for i, line in enumerate(events) if '"kind": "checkpoint"' in line)
        (folder / "run.jsonl").write_text("".join(events[:kept + 1]))  # as if it had been killed then
        found[f"4 -> {n}"] = run(["--resume", str(folder)], n, scratch / f"to{n}")
    shutil.rmtree(scratch)
    return found


def keep_copy(checkpoints):
    """Leaves the checkpoints of a finished run where they are."""


# ----- files

@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run of two layers that was killed in step 5, with the checkpoints of steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patched:
        return killed_at(5, patched, *options_of(
            "short/2", tmp_path_factory.mktemp("stopped"), "--set", "model.num_layers=2"))


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / stopped.name))


def chosen(folder):
    log = SimpleNamespace(links=runlog.read_links(folder / "run.jsonl"))
    log.events = [event for event, _ in log.links]
    found, passed = checkpoint.choose(folder, log, log.events[0]["ml_hash"])
    return found and found.about["step"], passed


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def hollow(path):
    """What a disk may leave that lost power: the length, and zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def retold(path, **changes):
    """The same tensors with another account of the run, in good order."""
    found = checkpoint.read(path)
    tensors = {name: x.clone() for name, x in found.tensors.items()}
    checkpoint.write(path, found.about | changes, tensors)


DAMAGE = {
    "cut": (cut, "no whole checkpoint"), "flip": (flip, "not what was written"),
    "hollow": (hollow, "no whole checkpoint"), "empty": (lambda path: path.write_bytes(b""), "no whole"),
    "other settings": (lambda path: retold(path, ml_hash="0" * 16), "of other settings"),
    "other seed": (lambda path: retold(path, seed=7), "of seed 7"),
    "other run": (lambda path: retold(path, log=[3, "0" * 64]), "of another run"),
    "code": (lambda path: torch.save({"digest": subprocess.run}, path), "no whole checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_checkpoint_that_is_torn_or_foreign_is_named_and_the_one_before_it_is_used(kind, folder):
    damage, reason = DAMAGE[kind]
    assert chosen(folder) == (4, [])
    damage(folder / checkpoint.FOLDER / "step0000004.pt")
    step, [(name, said)] = chosen(folder)
    assert (step, name) == (2, "step0000004.pt") and reason in said


def test_a_torn_log_and_unfinished_files_are_cleared_and_a_run_without_a_good_checkpoint_begins_again(
        folder, capsys):
    for path in (folder / checkpoint.FOLDER).glob("step*.pt"):
        cut(path)
    (folder / checkpoint.FOLDER / ".step0000006.pt.x.tmp").write_bytes(b"half")
    with open(folder / "run.jsonl", "ab") as file:
        file.write(b'{"kind": "validation", "n"')
    assert go_on(folder) in (0, 3)
    events = runlog.read_chain(folder / "run.jsonl")
    event = next(e for e in events if e["kind"] == "resume")
    assert event["step"] == 0
    assert [name for name, _ in event["passed"]] == ["step0000004.pt", "step0000002.pt"]
    assert "passed over step0000004.pt: it is no whole checkpoint" in capsys.readouterr().out
    assert events[-1]["status"] == "finished"


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert go_on(folder) in (0, 3)
    failed = [
        e for e in runlog.read_chain(folder / "run.jsonl") if e["kind"] == "checkpoint" and e.get("error")
    ]
    assert [e["step"] for e in failed] == [6] and "are free: free some space" in failed[0]["error"]
    assert "no checkpoint of step 6" in capsys.readouterr().out


def test_a_write_that_fails_in_the_middle_leaves_the_ring_as_it_was(folder, monkeypatch):
    path = folder / checkpoint.FOLDER / "step0000004.pt"
    found, before = checkpoint.read(path), path.read_bytes()

    def full(through, data):
        through.error = OSError(28, "No space left on device")
        raise through.error

    monkeypatch.setattr(checkpoint.Through, "write", full)
    with pytest.raises(UserError, match="cannot write .*step0000004.pt: No space left on device; free some"):
        checkpoint.write(path, found.about, found.tensors)
    assert path.read_bytes() == before and not list(path.parent.glob(".*"))


def test_the_tensors_are_whole_and_named_after_parameters(folder):
    content = torch.load(folder / checkpoint.FOLDER / "step0000004.pt", weights_only=True)
    names = {name for name in content["tensors"] if name.startswith("optimizer/")}
    parameters = {name.partition("/")[2] for name in names if name.count("/") == 1}
    log = runlog.read_chain(folder / "run.jsonl")
    model = train_gpt.GPT(schema.from_plain(log[0]["settings"]))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert parameters == shapes.keys()
    assert all(content["tensors"][f"optimizer/{name}"].shape == shape for name, shape in shapes.items())
    assert "optimizer/embed.weight/exp_avg_sq" in names


# ----- what is refused

REFUSED = {
    ("--resume", "nowhere"): "no folder with a run.jsonl",
    ("--resume", "RUN", "--dry-run"): "leave --dry-run out",
    ("--resume", "RUN", "--registered", "x"): "trained in one piece",
    ("--resume", "RUN", "--seed", "3"): "its seed is 0",
    ("--resume", "RUN", "--set", "schedule.steps=9"): "continues with its own settings",
    ("short/2", "--scale", "micro", "--resume", "RUN"): "a run continues with its own settings",
    ("short/2", "--checkpoint-every", "5x"): "expected steps like 100",
    ("short/2", "--checkpoint-every", "0"): "expected steps like 100",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_continued_is_refused_in_one_line(words, stopped, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.command_line([str(stopped) if w == "RUN" else w for w in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and REFUSED[words] in said and said.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{}", b'{"kind": "start", "n": 0'])
def test_a_log_without_a_whole_line_is_refused_with_the_way_out(content, tmp_path, capsys):
    (tmp_path / "run.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        command_line.command_line(["--resume", str(tmp_path)])
    said = capsys.readouterr().err
    assert "holds no whole line; its settings are lost: name the record and start again" in said


def test_the_record_may_be_named_again_and_settings_of_the_system_may_differ(stopped):
    _, resolved = options_of("short/2", stopped.parent, "--set", "model.num_layers=2", "--set",
                             "system.ranks_per_microbatch=2", "--resume", str(stopped))
    assert resolved.settings.system.ranks_per_microbatch == 2
    _, alone = command_line.command_line(["--resume", str(stopped)])
    assert schema.ml_hash(alone.settings) == schema.ml_hash(resolved.settings)
    assert alone.record.ref == "short/2"


def test_a_run_under_way_and_a_finished_one_are_not_resumed(folder, tmp_path):
    first = runlog.RunLog(tmp_path, "", folder=folder)
    with pytest.raises(UserError, match="is under way in another process"):
        runlog.RunLog(tmp_path, "", folder=folder)
    first.end(status="finished", steps=8, tokens=1, train_time_ms=1.0, verdict=[], scheduled_steps=8)
    first.close()
    with pytest.raises(UserError, match="has finished after 8 steps: nothing to resume"):
        runlog.RunLog(tmp_path, "", folder=folder)


def test_other_validation_tokens_are_refused(folder, tmp_path):
    shutil.copytree(sample_corpus().folder, tmp_path / "other")
    path = next((tmp_path / "other").glob("*_val_*.bin"))
    data = bytearray(path.read_bytes())
    data[1026:1028] = data[1028:1030]
    path.write_bytes(data)
    with pytest.raises(UserError, match="begun with other tokens .* give --data as it was"):
        go_on(folder, "--data", str(tmp_path / "other"))


def test_torchrun_continues_the_run_of_its_launch(folder, monkeypatch):
    """The same command line, started again: the run whose first event names this launch."""
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert resume.restarted(str(folder.parent), environment) is None  # began without torchrun
    path, mine = folder / "run.jsonl", resume.launch(environment)
    events, previous, lines = runlog.read_chain(path), runlog.GENESIS, []
    for event in [events[0] | {"launch": mine}, *events[1:]]:
        line, previous = runlog.chain_line(previous, event)
        lines.append(line)
    path.write_text("\n".join(lines) + "\n")
    assert resume.restarted(str(folder.parent), environment) == folder
    assert resume.restarted(str(folder.parent), environment | {"TORCHELASTIC_RESTART_COUNT": "0"}) is None


def children(pid):
    """Ids of the processes that a process has started."""
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_goes_on(rank, tmp_path):
    """`torchrun --max-restarts`: one log, one run folder, and no word from anybody."""
    root = Path(__file__).parent.parent
    small = (*SMALL[1:3], "schedule.steps=30", "validation.every=15", "model.num_layers=2")
    sets = [part for x in small for part in ("--set", x)]
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max-restarts=2", "train_gpt.py", "short/2", "--scale", "micro", *sets, "--out", str(tmp_path),
         "--checkpoint-every", "2", "--save-checkpoint"],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 240
    while not list(tmp_path.glob("*/checkpoints/step*.pt")) and time.monotonic() < until:
        time.sleep(0.1)
    workers = [i for i in children(launched.pid)
               if b"train_gpt.py" in Path(f"/proc/{i}/cmdline").read_bytes()]
    os.kill(workers[rank], signal.SIGKILL)
    _, said = launched.communicate(timeout=280)
    assert launched.returncode == 0, said
    run_folder, = tmp_path.glob("*/run.jsonl")
    events = runlog.read_chain(run_folder)
    assert [e["step"] > 0 for e in events if e["kind"] == "resume"] == [True]
    assert events[-1]["status"] == "finished" and (run_folder.parent / "checkpoint.pt").exists()


# ----- tokens

def test_tokens_that_changed_since_are_refused(tmp_path):
    corpus = make_corpus(tmp_path, [range(900)] * 3)
    about = dict(ranks=range(8), tokens_per_rank=16, loader="synced", wrap=True)
    stream = Stream(corpus, **about)
    for _ in range(5):
        stream.next()
    assert stream.rank_digests(5) == stream.rank_digests() != stream.rank_digests(4)
    kept = {str(rank): digest for rank, digest in stream.rank_digests(4).items()}
    again = Stream(corpus, **about)
    again.skip(4, kept)
    again.next()
    assert again.rank_digests() == stream.rank_digests()
    with pytest.raises(UserError, match="the first 4 steps read other tokens than before"):
        Stream(make_corpus(tmp_path, [range(1, 901)] * 3), **about).skip(4, kept)


@pytest.mark.parametrize("loader", ["synced", "packed"])
def test_a_shard_that_disappears_or_is_cut_while_training_is_one_line(loader, tmp_path):
    tokens = [999 if i % 25 == 0 else i % 900 for i in range(2000)]
    about = dict(ranks=range(8), tokens_per_rank=16, loader=loader, wrap=True, max_doc_len=40)
    stream = Stream(make_corpus(tmp_path, [tokens] * 2), **about)
    stream.next()
    os.truncate(tmp_path / "x_train_000001.bin", 1500)
    with pytest.raises(UserError, match="x_train_000001.bin: was cut to 1500 bytes while it is being read"):
        stream.next()
    stream = Stream(make_corpus(tmp_path, [tokens] * 3), **about)
    stream.next()
    (tmp_path / "x_train_000003.bin").unlink()
    with pytest.raises(UserError, match="cannot read shard .*x_train_000003.bin: No such file"):
        while stream.epoch == 0:
            stream.next()


# ----- parts

def test_an_interval_is_steps_or_a_time():
    for text, found in {"100": ("steps", 100), "90s": ("seconds", 90), "10m": ("seconds", 600),
                        "2h": ("seconds", 7200), "never": None}.items():
        assert arguments.interval(text) == found


def test_registered_runs_keep_no_checkpoints_unless_they_are_asked_to():
    every = {words: command_line.command_line(["short/2", *words])[0].checkpoint_every for words in (
        (), ("--registered", "x"), ("--registered", "x", "--checkpoint-every", "5"))}
    assert [*every.values()] == [("seconds", 600.0), None, ("steps", 5)]


def test_a_heartbeat_outlives_its_process_and_damage_is_no_time(tmp_path):
    path = tmp_path / "c" / "clock"
    beats = checkpoint.Heartbeat(path)
    beats.beat(7, 1234.5)
    assert checkpoint.Heartbeat.read(path) == (7, 1234.5)
    for damage in (b"", b"short", b"\xff" * 16):
        path.write_bytes(damage)
        assert checkpoint.Heartbeat.read(path) == (0, 0.0)
    (tmp_path / "file").write_text("")
    checkpoint.Heartbeat(tmp_path / "file" / "clock").beat(1, 1.0)  # no folder: nothing is kept


if __name__ == "__main__":
    print(json.dumps(reshard(*sys.argv[1:])))
