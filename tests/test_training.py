"""Laws of the trainer at `micro`: in this process, as the program that a user runs, and as several processes
with gloo."""

import functools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import repository
import process_group
import train_gpt
from model import GPT, segments
from page import plot
from evidence import run_laws
from runlog import read_chain, read_links, render, summarise
from settings import deltas
from small_models import each_record
from common.errors import UserError
from data.batch import count_documents, to_rows
from system import command_line, load, preflight, warmup
from system.run import Run
from system.world import World
from system.sync import no_host_reads

ROOT = Path(__file__).parent.parent
RECORDS = [r for r in deltas.load_records()]
LATER = [f"short/{n}" for n in range(34, 58)]  # each has most of what the one before has
MEDIUM = [f"medium/{n}" for n in range(1, 18) if n != 16]  # 16 has what is in the others
# 46 has most of what is in the others
OPTIMIZER = [f"optimizer/{n}" for n in range(1, 46) if n not in (13, 36)]
OPTIMIZER += [r.ref for r in deltas.load_records().values() if r.claimed and r.ref != "optimizer/c2540"]

def short(ref, steps=3):
    """Arguments of a short training: few validation tokens, in rows of the record's length or of 256."""
    rows = min(256, deltas.resolve(ref, scale="micro").settings.validation.seq_len)
    sets = (f"schedule.steps={steps}", "validation.tokens=2048", f"validation.seq_len={rows}")
    return [ref, "--scale", "micro", *(word for one in sets for word in ("--set", one))]


def run(out, *args, processes=1, env=None, **kwargs):
    """(completed process, summary or None) of one training."""
    done = process_group.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *args, "--out", str(out)], processes, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, timeout=280, **kwargs
    )
    return done, summary_below(out)


def summary_below(out):
    """The summary of the last run of a folder, or None."""
    found = sorted(Path(out).glob("*/summary.json"))
    return json.loads(found[-1].read_text()) if found else None


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """once(*args, processes=1) -> folder of that training, which the tests that only read it share."""
    @functools.cache
    def folder(*args, processes=1):
        out = tmp_path_factory.mktemp("run")
        done, _ = run(out, *args, processes=processes)
        assert done.returncode == 0, done.stderr
        return out

    return folder


def train_here(out, *args):
    """(exit code, summary) of a training in this process, which has torch already."""
    options, resolved = command_line.command_line([*args, "--out", str(out)])
    return train_gpt.train(resolved, options), summary_below(out)


@pytest.mark.parametrize(
    "ref", each_record([ref for ref in RECORDS if ref not in LATER + MEDIUM + OPTIMIZER])
)
def test_every_record_trains_three_steps(ref, tmp_path):
    code, summary = train_here(tmp_path, *short(ref), "--set", "system.warmup_steps=1")
    assert code == 0 and summary["steps"] == 3 and summary["val_loss"] < summary["curve"][0][1]
    events = read_chain(next(tmp_path.glob("*/run.jsonl")))
    routed = ["experts"] if events[0]["settings"]["model"]["mlp"]["moe"] else []
    assert [e["kind"] for e in events] == [
        "start", "probe", "reset", "validation", "validation", *routed, "stream", "end"
    ]
    assert re.search(r"^step:3/3 val_loss:\d\.\d{6} train_time:\d+ms step_avg:\d+\.\d\dms( .*)?$",
                     next(tmp_path.glob("*/log.txt")).read_text(), re.M)


@pytest.mark.slow
@pytest.mark.parametrize("ref", MEDIUM + OPTIMIZER)
def test_every_record_of_the_other_tracks_trains_three_steps(ref, tmp_path):
    code, summary = train_here(tmp_path, *short(ref))
    assert code == 0 and summary["steps"] == 3 and summary["val_loss"] < summary["curve"][0][1]


@pytest.mark.parametrize("ref", each_record(LATER))
def test_every_record_from_34_on_trains_eight_steps(ref, tmp_path, capsys):
    """All stages, an extension, a rest of the scalars, and the split of the table."""
    code, summary = train_here(tmp_path, *short(ref, steps=8), "--set", "validation.every=8")
    assert code == 0 and summary["steps"] == 8 and summary["val_loss"] < summary["curve"][0][1] - 0.1
    assert summary["reset"]["state_before"] == summary["reset"]["state_after"]


def test_same_seed_twice_gives_identical_logs_apart_from_times(tmp_path):
    def stripped(out, **env):
        run(out, *short("short/11"), "--seed", "5", env=env)
        events = read_chain(next(out.glob("*/run.jsonl")))
        machine = ("utc", "verdict", *load.FIELDS)  # a verdict says when the machine was busy
        return [{k: v for k, v in e.items() if k not in machine and not k.endswith("_ms")} for e in events]

    assert stripped(tmp_path / "a") == stripped(tmp_path / "b", PYTHONHASHSEED="2")  # sets in another order


def test_text_log_and_summary_follow_from_the_chain(once):
    folder = next(once(*short("short/11")).glob("2*"))
    links = read_links(folder / "run.jsonl")
    events = [event for event, _ in links]
    assert "".join(line + "\n" for e in events for line in render(e)) == (folder / "log.txt").read_text()
    assert summarise(events, links[-1][1]) == json.loads((folder / "summary.json").read_text())


def test_the_probe_sees_every_gradient(once):
    """Three untimed steps: a zero head hides all other gradients in the first one, zero projections some in
    the second."""
    probe = read_chain(next(once(*short("short/11")).glob("*/run.jsonl")))[1]
    marks = probe["gradients"]
    assert probe["step"] == 2 and len(marks) > 36 and all(norm > 0 for norm, _ in marks.values())


def marks(folder):
    probe = read_chain(next(folder.glob("*/run.jsonl")))[1]
    return [x for pair in probe["gradients"].values() for x in pair]


def test_the_probe_does_not_depend_on_how_a_step_is_run(once):
    """Ranks in a forward, ordered sums: the same gradients, up to their rounding."""
    one = marks(once(*short("short/11")))
    largest = max(map(abs, one))
    for change in ("system.ranks_per_microbatch=2", "system.reduction=ordered"):
        other = marks(once(*short("short/11"), "--set", change))
        assert all(abs(a - b) < 1e-4 * largest for a, b in zip(one, other))


def losses(out):
    summary = summary_below(out)
    return [loss for _, loss in summary["curve"]], summary["stream_digest"]


def told(out):
    """(training losses, loss of the probe, gradient checksums) of the run below a folder."""
    events = read_chain(next(out.glob("*/run.jsonl")))
    probe = next(e for e in events if e["kind"] == "probe")
    return (
        [x for e in events if e["kind"] == "validation" for x in e["train_loss"]], probe["loss"],
        probe["gradients"]
    )


def check_probes(one, other, tolerance):
    """Checksums of the gradients agree relative to each norm, or to a thousandth of the largest one."""
    largest = max(norm for norm, _ in one.values())
    assert one.keys() == other.keys()
    for name, (norm, turned) in one.items():
        floor = tolerance * max(norm, 1e-3 * largest)
        assert abs(other[name][0] - norm) <= floor and abs(other[name][1] - turned) <= floor, name


def test_ordered_reduction_gives_the_same_bits_on_1_2_and_4_processes(once, tmp_path):
    """And the log says the same of training and of the last untimed step: of all processes, not of the first
    one. With two processes each has its own order of sets, as ever."""
    args = [*short("short/11"), "--set", "system.reduction=ordered"]
    alone = once(*args)
    train_losses, probe_loss, gradients = told(alone)
    for processes in (2, 4):
        out = tmp_path / str(processes)
        run(out, *args, processes=processes, env={"PYTHONHASHSEED": "random"} if processes == 2 else None)
        assert losses(out) == losses(alone)
        again, loss, marks = told(out)
        assert again == train_losses and loss == pytest.approx(probe_loss, abs=1e-7)
        check_probes(gradients, marks, 1e-5)


@pytest.mark.parametrize("comm", ["sharded", "replicated", "bucketed", "allreduce_updates"])
def test_two_processes_agree_with_one_up_to_rounding(comm, once):
    args = [*short("short/11")]
    one, digest = losses(once(*args))
    two, other = losses(once(*args, "--set", f"system.comm={comm}", processes=2))
    assert digest == other
    assert all(abs(a - b) < 2e-4 for a, b in zip(one, two))


@pytest.mark.parametrize("ref", ["short/1", "short/3", "short/5", "short/20", "short/33"])
def test_two_processes_on_representative_records(ref, once):
    """1: clipping and AdamW; 3: joint qkv; 5: tied head; 20: block windows, value tables; 33: packed
    documents, gates.

    In float64, because float32 hides errors: Muon makes all singular values of a gradient equal, so where
    some are nearly zero (record 28's gates at the start) it amplifies the rounding of a sum to 1e-3 nats
    within three steps.
    """
    exact = [*short(ref), "--set", "system.precision=float64"]
    alone, both = once(*exact), once(*exact, processes=2)
    (one, digest), (two, other) = losses(alone), losses(both)
    assert digest == other and all(abs(a - b) < 1e-9 for a, b in zip(one, two))
    (train_one, probe_one, gradients), (train_two, probe_two, marks) = told(alone), told(both)
    assert train_two == pytest.approx(train_one, abs=1.1e-6) and probe_two == pytest.approx(
        probe_one, abs=1.1e-8
    )
    check_probes(gradients, marks, 1e-7)


def test_ranks_per_forward_changes_only_rounding(once):
    one, _ = losses(once(*short("short/11")))
    two, _ = losses(once(*short("short/11"), "--set", "system.ranks_per_microbatch=2"))
    assert all(abs(a - b) < 2e-4 for a, b in zip(one, two))


def test_real_and_random_warm_up_tokens_give_the_same_losses(once):
    a = losses(once(*short("short/11"), "--set", "system.warmup_tokens=real"))
    b = losses(once(*short("short/11"), "--set", "system.warmup_steps=0"))
    assert a == b == losses(once(*short("short/11")))


def test_a_run_whose_first_step_stands_in_a_late_stage_is_reset_to_its_own_start(once):
    """One step is of the last stage, whose windows have grown already (YaRN); the start has none of that."""
    assert losses(once(*short("short/77", 1)))[0]


def test_missed_target_exits_3_and_reached_exits_0(tmp_path):
    done, summary = run(tmp_path / "a", *short("short/5"), "--set", "validation.target=1.0")
    assert done.returncode == 3 and summary["reached"] is False and "MISSED" in done.stdout
    done, summary = run(tmp_path / "b", *short("short/5"), "--set", "validation.target=9.0")
    assert done.returncode == 0 and summary["reached"] is True and "REACHED" in done.stdout


def test_a_diverging_run_says_so_and_exits_4(tmp_path):
    done, summary = run(tmp_path, *short("short/2"), "--set", "optim.matrix.lr=1e30")
    assert done.returncode == 4 and summary["status"] == "diverged" and "Traceback" not in done.stderr


def test_interrupt_leaves_a_valid_log_that_says_so(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable, str(ROOT / "train_gpt.py"), "short/11", "--scale", "micro", "--set",
            "schedule.steps=5000", "--out", str(tmp_path)
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 240
    while not any("step:0/" in p.read_text() for p in tmp_path.glob("*/log.txt")) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert "interrupted after" in out and "Ctrl-C again" in err
    assert json.loads(next(tmp_path.glob("*/summary.json")).read_text())["status"] == "interrupted"
    assert read_chain(next(tmp_path.glob("*/run.jsonl")))[-1]["status"] == "interrupted"


@pytest.mark.parametrize("steps", [5000, 40])
def test_a_run_whose_reader_is_gone_trains_on_and_ends_its_log(steps, tmp_path):
    """As in `train_gpt.py ... 2>&1 | tee log`: Ctrl-C ends tee first. 40: without Ctrl-C."""
    reads, writes = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable, str(ROOT / "train_gpt.py"), "short/11", "--scale", "micro", "--set",
            f"schedule.steps={steps}", "--out", str(tmp_path)
        ],
        cwd=ROOT,
        stdout=writes,
        stderr=writes,
    )
    os.close(writes)
    deadline = time.time() + 240
    while not any("step:0/" in p.read_text() for p in tmp_path.glob("*/log.txt")) and time.time() < deadline:
        time.sleep(0.2)
    os.close(reads)
    if steps == 5000:
        process.send_signal(signal.SIGINT)
    assert process.wait(240) == (130 if steps == 5000 else 0)
    status = "interrupted" if steps == 5000 else "finished"
    assert json.loads(next(tmp_path.glob("*/summary.json")).read_text())["status"] == status


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_training_on_triton_kernels_equals_one_on_torch(tmp_path):
    """Loss, MLP, Muon, and QK norm with rotary positions in Triton's interpreter: two steps of a two-layer
    record 29 through the whole trainer."""
    small = [
        "short/29", "--scale", "micro", "--without", "model.attn.value_embed", "--without",
        "model.residual.unet_skips"
    ]
    for x in (
        "schedule.steps=2", "validation.seq_len=64", "validation.tokens=512", "system.warmup_steps=0",
        "data.seq_len=64", "data.tokens_per_rank=64",
        "model.num_layers=2", "model.attn.drop_layers=[]", "model.attn.window.long_layers=[1]"
    ):
        small += ["--set", x]
    fused = [
        part for op in ("loss", "mlp", "muon", "qk") for part in ("--set", f"system.kernels.{op}=triton")
    ]
    _, plain = run(tmp_path / "torch", *small)
    done, triton = run(tmp_path / "triton", *small, *fused, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    for (_, a), (_, b) in zip(plain["curve"], triton["curve"], strict=True):
        assert abs(a - b) < 2e-5


def test_out_of_memory_is_one_line_that_names_the_setting_to_lower(tmp_path):
    script = ("import torch, train_gpt\nfrom system import command_line\n"
              "def fail(*args, **more): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate "
              "2 GiB. GPU 0 has ...')\ntrain_gpt.train_step = fail\n"
              "train_gpt.main(*command_line.command_line(['short/11', '--scale', 'micro', '--out', "
              f"{str(tmp_path)!r}]))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        "error: out of memory with 8 logical ranks a forward (CUDA out of memory): "
        "--set system.kernels.loss=chunks, so that the head's logits never exist in full\n"
    )


def test_processes_with_16_bit_banks_and_one_forward_a_step_end_as_one_process(tmp_path):
    """The probe of the warm-up looks at gradients before they are reduced: what it leaves must fit the steps
    after it."""
    found = [
        run(tmp_path / str(n), *short("short/11"), "--set", "system.precision=record", processes=n)
        for n in (1, 2)
    ]
    assert all(done.returncode == 0 for done, _ in found), found[1][0].stderr
    assert abs(found[0][1]["val_loss"] - found[1][1]["val_loss"]) < 1e-4


@pytest.mark.parametrize("ref", ["short/1", "short/11", "short/21", "short/33", "variants/2", "variants/7"])
def test_no_timed_step_reads_what_the_device_has_computed(ref, tmp_path):
    windows = (
        [] if ref in ("short/1", "short/11") or "variants" in ref else ["--set", "system.attention=banded"]
    )
    done, summary = run(tmp_path, *short(ref), "--check-sync", *windows)
    assert done.returncode == 0 and summary["steps"] == 3, done.stderr


def test_a_read_in_a_timed_step_is_named_with_its_place(tmp_path):
    """Attention by documents has shapes that depend on the data."""
    done, _ = run(tmp_path, *short("short/33"), "--check-sync", "--set", "system.attention=documents")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        r"error: step 0 waits for the device: aten::nonzero in kernels/attention.py:\d+; keep", done.stderr
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0), lambda x: bool((x > 0).any()), lambda x: x.unique(),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())), lambda x: torch.equal(x, x)
    ],
)
def test_every_kind_of_read_is_seen_and_arithmetic_is_none(read):
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with no_host_reads(False, "step 7"):
        y = torch.where(x > 0, x, -x).softmax(0)[torch.arange(3)] * x.max()
    assert y.shape == (3,)
    with pytest.raises(UserError, match="^step 7 waits for the device"), no_host_reads(False, "step 7"):
        read(x)


def test_what_torch_says_of_a_gpu_is_one_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(UserError, match="^step 1 waits for the device: a synchronising CUDA operation"):
        with no_host_reads(True, "step 1"):
            raise RuntimeError("called a synchronizing CUDA operation")
    with pytest.raises(RuntimeError, match="other"), no_host_reads(True, "step 1"):
        raise RuntimeError("other")
    assert modes == ["error", "default"] * 2


def test_strict_refuses_what_runs_in_a_slower_form(tmp_path):
    slow = [*short("short/33"), "--set", "system.precision=record"]
    reason = "numerics.fp8_head is computed in its reference form: 8-bit products need compute capability 8.9"
    done, summary = run(tmp_path / "strict", *slow, "--strict")
    told = f"error: {reason}; leave out --strict to run it so\n"
    assert done.returncode == 2 and done.stderr == told and summary is None
    done, _ = run(tmp_path / "lenient", *slow)
    assert done.returncode == 0 and f"slower than it could be: {reason}" in done.stdout
    events = read_chain(next((tmp_path / "lenient").glob("*/run.jsonl")))
    assert events[0]["fallbacks"] == [reason]


def test_what_is_slower_on_a_gpu_is_listed(monkeypatch):
    s = deltas.resolve(
        "variants/1", scale="micro", sets=["system.experts=padded", "system.compile=off"]
    ).settings
    model, world = GPT(s), SimpleNamespace(cuda=True, device=torch.device("cuda"))
    model.passed = {"attention backend flash3 needs its package"}
    assert preflight.fallbacks(model, world) == [
        "attention backend flash3 needs its package", "nothing is compiled: system.compile is off",
        "experts are multiplied in padded blocks: system.experts is padded"]
    s = deltas.resolve("short/33", scale="micro", sets=["system.precision=record"]).settings
    for capability, lines in ((89, 0), (80, 1)):
        monkeypatch.setattr(preflight, "capability", lambda device: capability)
        assert len(preflight.fallbacks(GPT(s), world)) == lines


def test_full_disk_keeps_a_valid_log_and_says_what_to_do(tmp_path):
    out = tmp_path / "runs"
    run(out, *short("short/11"))  # writes the sources file, which the limit would not let through
    room = next(out.glob("*/run.jsonl")).stat().st_size - 400
    for folder in out.glob("2*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    def tight():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done, summary = run(out, *short("short/11"), preexec_fn=tight)
    assert done.returncode == 2 and summary is None
    assert (
        "cannot write" in done.stderr and "free some space" in done.stderr and "Traceback" not in done.stderr
    )
    assert read_chain(next(out.glob("*/run.jsonl")))  # complete lines only


def test_a_checkpoint_that_does_not_fit_costs_nothing_else(tmp_path):
    """The verdict comes first and the log is whole; also in a C locale, and where the environment names
    another repository."""
    def tight():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # sources have room, 1.8 MB of weights have not
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_400_000, 1_400_000))

    done, summary = run(
        tmp_path / "runs", *short("short/11"), "--set", "validation.target=1.5", "--save-checkpoint",
        preexec_fn=tight,
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "GIT_DIR": str(tmp_path), "GIT_WORK_TREE": str(tmp_path)}
    )
    folder, = (tmp_path / "runs").glob("*/")
    assert (
        done.returncode == 2 and done.stderr.startswith("error: cannot write")
        and done.stderr.count("\n") == 1
    )
    assert (
        "checkpoint.pt: File too large; the log is complete" in done.stderr
        and "target 1.5 MISSED" in done.stdout
    )
    assert sorted(p.name for p in folder.iterdir()) == ["log.txt", "run.jsonl", "summary.json"]
    assert summary["status"] == "finished" and summary["reached"] is False
    assert summary["code"].removesuffix("-dirty") == repository.code_version().removesuffix("-dirty")
    if load.busy_seconds() is not None:
        assert summary["own_cores"] > 0 and summary["other_cores"] >= 0 and summary["alone"] in (True, False)
    assert ("the machine was busy" in done.stdout) == (summary["alone"] is False)


def test_a_diverged_run_is_strict_json_and_can_be_plotted(tmp_path, capsys):
    done, summary = run(
        tmp_path, *short("short/1"), "--set", "optim.embed.lr=1e38", "--set", "schedule.warmup_steps=0"
    )
    assert (
        done.returncode == train_gpt.DIVERGED and summary["status"] == "diverged"
        and summary["val_loss"] is None
    )
    folder, = (p.parent for p in tmp_path.glob("*/run.jsonl"))
    for name in ("run.jsonl", "summary.json"):
        text = (folder / name).read_text()
        for part in text.splitlines() if name == "run.jsonl" else [text]:
            json.loads(part, parse_constant=pytest.fail)  # called for a bare NaN
    log, problems = run_laws.read_log(folder, "run")
    assert (
        problems == [] and list(run_laws.check_run(log)) == [] and log.one("guard")["what"] == "finite"
    )
    assert [v["step"] for v in log.validations] == [0] and log.one("guard")["step"] < 3  # at once
    path = plot.plot([folder], tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG") and "this run diverged" in capsys.readouterr().out


BAD = [
    (
        ["short/20", "--scale", "micro", "--set", "system.kernels.loss=triton"],
        "system.kernels.loss=triton needs CUDA",
    ),
    (["short/3", "--scale", "micro", "--set", "system.kernels.muon=triton"], "computes the factored form"),
    (
        ["short/4", "--scale", "micro", "--set", "system.kernels.mlp=triton"],
        "needs model.mlp.activation=relu_sq",
    ),
    (["short/1", "--scale", "micro", "--set", "system.kernels.qk=triton"], "needs model.attn.rope"),
    (
        ["variants/5", "--scale", "micro", "--set", "system.kernels.qk=triton"],
        "system.kernels.qk=triton turns whole heads, model.attn.latent a part of them: leave it at auto",
    ),
    (["short/99"], "unknown record 'short/99'"),
    (["short/9", "--set", "model.atn.rope=true"], "did you mean model.attn.rope"),
    (["short/9", "--set", "schedule.steps=many"], "expected a whole number"),
    (["short/9", "--set", "optim.muon.scale=sqrt_maxx"], "did you mean sqrt_max"),
    (["short/9", "--without", "optim.muon", "--with", "optim.muon"], "both in --with and --without"),
    (["short/9", "--set", "schedule.steps=3", "--set", "schedule.steps=4"], "given twice"),
    (["short/9", "--without", "model.model_dim"], "no sensible off"),
    (["short/4", "--without", "model.attn.qk_norm"], "already off"),
    (["short/9", "--revert", "short/11"], "not an ancestor"),
    (["short/9", "--scale", "tiny", "--set", "data.seq_len=60"], "not a multiple of data.seq_len"),
    (["short/9", "--scale", "tiny", "--set", "model.attn.num_heads=7"], "not divisible"),
    (["short/9", "--profile", "7:3", "--scale", "tiny"], "expected A:B"),
    ([], "no record named"),
    (["short/9", "--scale", "tiny", "--data", "/no/such/folder"], "no data folder"),
    (["short/9", "--scale", "tiny", "--out", "/dev/null/runs"], "choose another with --out"),
    (["short/9", "--scale", "micro", "--profile", "3:900", "--out", "/tmp"], "the run has 72 steps"),
    (["short/9"], "--scale tiny"),
    (["tiny-v9"], "did you mean tiny-v3"),
    (["tiny-v3", "--scale", "micro"], "frozen at --scale tiny"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input_is_one_clear_line(args, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *args], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ")


def test_a_number_of_processes_that_does_not_divide_eight_is_refused(tmp_path):
    done, _ = run(tmp_path, *short("short/9"), processes=3)
    assert done.returncode != 0 and "3 processes do not divide the 8 logical ranks" in done.stderr


def test_an_unwritable_cache_is_named(tmp_path):
    done, _ = run(tmp_path, *short("short/9"), env={"SPEEDRUN_CACHE": "/dev/null/cache"})
    assert done.returncode == 2 and "SPEEDRUN_CACHE" in done.stderr and "Traceback" not in done.stderr


def test_profile_writes_a_trace(tmp_path):
    done, _ = run(tmp_path, *short("short/11"), "--profile", "1:2")
    assert done.returncode == 0
    assert json.loads(next(tmp_path.glob("*/trace.json")).read_text())["traceEvents"]


def test_a_checkpoint_generates_text(tmp_path):
    run(tmp_path, *short("short/11"), "--save-checkpoint")
    done = subprocess.run(
        [
            sys.executable, "sample.py", str(next(tmp_path.glob("*/checkpoint.pt"))), "--tokens", "90",
            "--prompt", "The people"
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and done.stdout.startswith("The people") and len(done.stdout) > 60
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["cache", "dense"], done.stderr
    done = subprocess.run(
        [sys.executable, "sample.py", "README.md"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "not a checkpoint" in done.stderr


@pytest.mark.parametrize("comm", ["sharded", "replicated"])
def test_step_1_gradients_of_two_processes_equal_those_of_one(comm, tmp_path):
    for processes, sets in ((1, []), (2, [f"system.comm={comm}"])):
        command = [sys.executable, str(ROOT / "tests/gradients.py"), str(tmp_path / f"{processes}.pt"), *sets]
        done = process_group.run(command, processes, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    for name, grad in one.items():
        assert (grad - two[name]).abs().max() <= 1e-6 * grad.abs().max(), name


@pytest.mark.parametrize("piece", [3, 1000])
def test_checksums_are_of_the_gradients_of_all_processes(piece, monkeypatch):
    """Summands are added; stretches of experts that one process has alone follow each other. In any
    pieces."""
    monkeypatch.setattr(warmup, "PIECE", piece)
    shares = torch.randn((2, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taken = []

    def parts(mine):  # of the second process: what both have at the place that the first one asks for
        taken.append(len(mine))
        start = sum(taken[:-1])
        return [mine, shares[1][start:start + len(mine)]]

    for own, whole in ((False, shares.sum(0)), (True, shares.flatten())):
        taken.clear()
        norm, turned = warmup.checksums_of(shares[0], own, SimpleNamespace(parts=parts))
        cosines = torch.arange(len(whole)).cos().double()
        assert norm == pytest.approx(whole.norm().item()) and turned == pytest.approx(
            (whole @ cosines).item()
        )


def test_a_loss_that_one_process_finds_not_finite_stops_all_of_them():
    """Each process has its own training losses, and all have the same mean: none goes on alone into a
    collective."""
    seen = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([5.0, math.nan], dtype=torch.float64)]
    for mine in seen:
        world = SimpleNamespace(size=2, parts=lambda values: seen)
        world.mean = lambda values, world=world: World.mean(world, values)
        run = SimpleNamespace(train_losses=list(mine), world=world)
        first, second = Run.mean_train_losses(run)
        assert first == 4.0 and math.isnan(second) and run.train_losses == []


def test_the_documents_of_rows_are_counted_from_their_first_token_or_the_rows():
    rows = np.array([[5, 0, 5, 5, 5, 0], [5, 5, 0, 0, 5, 5]])  # 1, 4, 1; 2, 1, 3
    assert count_documents(rows, 0)[:2] == (6, 4)
    assert count_documents(rows[1:], 0)[:2] == (3, 3) and count_documents(rows, 9)[:2] == (2, 6)


@pytest.mark.feature("model.attn.segment")
@pytest.mark.parametrize("segment", [2, 3, 7, 64])
def test_the_host_counts_as_many_segments_as_the_model_cuts(segment):
    """FlashAttention gets these numbers; with fewer documents than there are, some would see each other."""
    random = np.random.default_rng(segment)
    for rows in (np.where(random.random((3, 24)) < share, 0, 5) for share in (0.0, 0.1, 0.4, 1.0)):
        number, longest, _ = count_documents(rows, 0, segment)
        cut = segments(torch.from_numpy(rows == 0), segment)
        lengths = [count for row in cut for count in row.unique(return_counts=True)[1].tolist()]
        assert (number, longest) == (len(lengths), max(lengths))


def test_a_warm_up_validates_one_chunk_of_one_rank_whatever_is_left():
    class Model(torch.nn.Module):
        calls = 0

        def forward(self, inputs, targets, context):
            self.calls += 1
            return torch.zeros(inputs.shape)

    world = SimpleNamespace(cuda=False, device=torch.device("cpu"), gather=lambda sums: sums)
    rows, model = np.zeros((8, 20, 1025), np.int32), Model()
    for limit, calls in ((1, 1), (None, 8 * 5)):  # chunks of 4,096 tokens
        model.calls = 0
        assert (
            train_gpt.validate(model, rows, world, lambda tokens, read: None, limit) == 0
            and model.calls == calls
        )


def test_rows_come_with_the_number_and_the_longest_of_their_documents():
    """Each begins with `bos` or a row; the token after the last one is a target only."""
    batch = np.array([[0, 5, 0, 5, 0, 5, 5, 5, 0], [5, 5, 5, 5, 0, 0, 0, 5, 5]], np.int32)
    inputs, targets, documents = to_rows(batch, 4, torch.device("cpu"), 0)
    assert inputs.shape == targets.shape == (2, 2, 4) and [found[:2] for found in documents] == [
        (3, 4),
        (4, 4),
    ]
    assert all(np.array_equal(found.targets, rank.flatten()) for found, rank in zip(documents, targets))
    for rows, found in zip(inputs, documents):
        begun = rows == 0
        begun[:, 0] = True
        assert begun.sum() == found.number
    assert torch.equal(inputs.flatten(1)[:, 1:], targets.flatten(1)[:, :-1])
