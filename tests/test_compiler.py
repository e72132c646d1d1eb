"""Laws of system/compiler.py: folders, account and cache file, and what the trainer logs of a start.

Run as a program it compiles one small graph with a --compile-cache file and prints JSON: `round FILE`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

import runlog
import schedule
from evidence import run_laws
from common.errors import UserError
from system import command_line, compiler, dry_run

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def program(*args, **env):
    run = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=280,
                         env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env)
    assert run.returncode == 0, run.stderr[-4000:]
    return run


# ----- one file

def compile_once(path):
    """Load, compile and run a product with its gradient, save; then meet the same file as if on another
    GPU."""
    file = compiler.CacheFile(path, 0, CPU)
    said = file.load()
    f = torch.compile(lambda x, w: x @ w, dynamic=False)
    x, w = (torch.arange(n, dtype=torch.float64).view(3, -1).requires_grad_() for n in (6, 9))
    y = f(x.mT, w)
    y.sum().backward()
    said += file.save(lambda part: [part], True)
    saved = path.read_bytes()
    other = compiler.CacheFile(path, 0, CPU)
    other.made_by["device"] = "another GPU"
    elsewhere = other.load() + other.save(lambda part: [part], True)
    return {"said": said, "elsewhere": elsewhere, "kept": path.read_bytes() == saved, **compiler.account(),
            "value": (y.sum() + x.grad.sum() + w.grad.sum()).item()}


def test_a_cache_file_gives_another_machine_everything_that_was_compiled(tmp_path):
    """A broken file is one line and replaced, a foreign one is one line and kept; read back it leaves nothing
    to compile."""
    path, found = tmp_path / "compiled.zip", []
    path.write_bytes(b"PK this is no archive")
    for folder in ("a", "b"):
        run = program(__file__, "round", str(path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / folder))
        found.append(json.loads(run.stdout.splitlines()[-1]))
    first, second = found
    assert (
        len(first["said"]) == 2 and "cannot be read (BadZipFile" in first["said"][0]
        and ": saved, " in first["said"][1]
    )
    assert (
        first["hits"] == 0 < first["misses"] and second["misses"] == 0 < second["hits"]
        and second["said"] == []
    )
    for out in found:
        line, = out["elsewhere"]
        assert "another GPU: nothing loaded, nothing will be saved" in line and out["kept"]
    x, w = range(6), range(9)
    y = sum(x[2 * k + i] * w[3 * k + j] for i in range(2) for j in range(3) for k in range(3))
    # w meets two rows of x, x three columns of w
    assert first["value"] == second["value"] == y + 2 * sum(w) + 3 * sum(x)


def parts(path):
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("about.json"))["parts"]
        return sorted((p["rank"], archive.read(name).decode()) for name, p in about.items())


def test_a_cache_file_keeps_what_other_runs_and_processes_need_and_drops_what_is_covered(tmp_path):
    file = compiler.CacheFile(tmp_path / "f", 0, CPU)
    file.write([(0, b"a", ["1"]), (1, b"b", ["1"])])
    file.write([(0, b"c", ["1", "2"])])  # covers a, not process 1's b
    assert parts(file.path) == [(0, "c"), (1, "b")]
    file.write([(0, b"d", ["3"])])
    assert parts(file.path) == [(0, "c"), (0, "d"), (1, "b")]
    for n in range(compiler.PARTS_KEPT):
        file.write([(0, b"%d" % n, [f"n{n}"])])
    # c, d: the oldest
    assert parts(file.path) == sorted([(1, "b"), *((0, str(n)) for n in range(compiler.PARTS_KEPT))])


def test_a_file_that_cannot_be_written_is_one_line_and_every_process_still_takes_part(tmp_path, monkeypatch):
    file, asked = compiler.CacheFile(tmp_path / "f", 0, CPU), []
    monkeypatch.setattr(compiler, "account", lambda: {"misses": 1})
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)  # torch has nothing to give
    assert len(file.save(lambda part: asked.append(part) or [part], True)) == 1 and asked == [None]
    info = types.SimpleNamespace(artifacts={"inductor": ["k"]})
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"x", info))
    file.path = tmp_path / "no folder" / "f"
    line, = file.save(lambda part: [part], True)
    assert f"cannot write {file.path}: " in line and line.endswith("; the run goes on")
    with pytest.raises(UserError, match="must be a file in a folder that exists"):
        compiler.CacheFile(tmp_path / "none" / "f", 0, CPU)


# ----- folders and account

def test_caches_lie_in_the_projects_cache_unless_the_environment_names_them(tmp_path, monkeypatch):
    for name in (*compiler.FOLDERS, "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # so that what prepare sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr(os, "cpu_count", lambda: 26)
    compiler.prepare(tmp_path, cuda=False, processes=4)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled" / "inductor")
    assert (tmp_path / "compiled" / "inductor").is_dir() and os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "6"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.raises(UserError, match="set SPEEDRUN_CACHE to a folder you may write"):
        compiler.prepare("/dev/null/cache", cuda=False)


def test_the_account_counts_no_second_twice(monkeypatch):
    """Frames hold their backends, backends and the backward pass hold the kernels; autotuning is at the first
    run."""
    times = {
        "_compile.compile_inner": [10.0, 2.0], "OutputGraph.call_user_compiler": [7.0, 1.0],
        "compile_file": [90.0], "backward._backward_impl": [5.0], "PyCodeCache.load_by_key_path": [3.0, 1.0],
        "CachingAutotuner.benchmark_all_configs": [0.5]
    }
    cache = {"autograd_cache_hit": 1, "autograd_cache_miss": 1, "autograd_cache_bypass": 1}
    utils = types.SimpleNamespace(
        compilation_time_metrics=times, counters={"stats": {"unique_graphs": 3}, "aot_autograd": cache}
    )
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", utils)
    assert compiler.account() == {"dynamo_s": 4.0, "inductor_s": 9.0, "kernels_s": 4.0, "autotune_s": 0.5,
                                  "hits": 1, "misses": 2}
    utils.counters["stats"]["unique_graphs"] = 0
    assert compiler.account() is None


# ----- compilers and paths with spaces

def test_compiled_code_goes_where_torchs_builder_can_write_it(tmp_path, monkeypatch):
    """Into the cache, or for one in a path with spaces or quotes into a folder of the user, a folder for each
    cache."""
    assert compiler.cache_place(tmp_path) == tmp_path / "compiled"
    monkeypatch.setenv("HOME", str(tmp_path))
    places = [
        compiler.cache_place(tmp_path / odd / "cache")
        for odd in ("a b", "it's", 'say "x"', "tab\there", "back\\slash")
    ]
    assert len(set(places)) == 5 and all(
        p.parent == tmp_path / ".cache" and compiler.is_plain(p) for p in places
    )
    monkeypatch.setenv("HOME", str(tmp_path / "no home"))
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    place = compiler.cache_place(tmp_path / "a b")
    assert place.parent == tmp_path and place.stat().st_mode & 0o777 == 0o700
    place.rmdir()
    place.symlink_to(tmp_path)  # as somebody else would plant it
    with pytest.raises(UserError, match="belongs to somebody else"):
        compiler.cache_place(tmp_path / "a b")
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path / "c d"))
    with pytest.raises(UserError, match="set SPEEDRUN_CACHE"):
        compiler.cache_place(tmp_path / "a b")


def test_a_torch_in_a_path_with_spaces_is_linked_with(monkeypatch):
    from torch._inductor import cpp_builder
    base = cpp_builder.BuildOptionsBase
    monkeypatch.setattr(base, "get_libraries_dirs", base.get_libraries_dirs)  # so that it is undone
    monkeypatch.setattr(base, "unquoted_libraries_dirs", None, raising=False)
    del base.unquoted_libraries_dirs
    monkeypatch.setattr(compiler, "torch", types.SimpleNamespace(__file__="/a b/torch/__init__.py"))
    compiler.quote_library_folders()
    compiler.quote_library_folders()  # twice changes nothing more
    options = base(
        compiler="g++", libraries_dirs=["/a b/torch/lib", "/usr/lib"], include_dirs=["/a b/include"]
    )
    words = shlex.split(
        cpp_builder.CppBuilder(name="x", sources=["x.cpp"], BuildOption=options).get_command_line()
    )
    assert {"-L/a b/torch/lib", "-L/usr/lib", "-I/a b/include"} <= set(words)


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    from kernels import device
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs a C compiler for Triton"):
        compiler.check_compilers(cuda=True)
    monkeypatch.setattr(device, "HAS_TRITON", True)
    monkeypatch.setattr(device, "HAS_C_COMPILER", device.c_compiler() is not None)
    assert "needs a C compiler" in device.refusal(torch.device("cuda"), torch.float32)
    args = [
        "train_gpt.py", "short/2", "--scale", "micro", "--set", "system.compile=on", "--out",
        str(tmp_path / "runs")
    ]
    for env in ({"PATH": str(tmp_path)}, {"CXX": "/no/compiler"}):
        run = subprocess.run(
            [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=280,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "SPEEDRUN_CACHE": str(tmp_path)} | env
        )
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and "needs a C++ compiler" in run.stderr, (
            run.stderr
        )
    assert not (tmp_path / "runs").exists()


def test_an_error_of_the_compiler_is_one_line_and_a_file(tmp_path):
    from torch._inductor.exc import CppCompileError

    error = CppCompileError(
        ["g++", "x.cpp"], "x.cpp: In function f:\nx.cpp:1:1: error: no such thing\n" + 90 * "note\n"
    )
    line = compiler.failure(error, tmp_path)
    assert (
        "error: no such thing" in line and "\n" not in line
        and "note" in (tmp_path / "compile_error.txt").read_text()
    )
    assert "cannot write" in compiler.failure(error, tmp_path / "none") and compiler.failure(error, None)
    assert compiler.failure(RuntimeError("a collective broke off"), tmp_path) is None


# ----- the trainer

TRAIN = """
import sys, torch
from system import command_line
if sys.argv[1] != "uncompiled":  # no C++: graphs and their account are what counts here
    whole = torch.compile
    torch.compile = lambda model, **kwargs: whole(model, backend=sys.argv[1], **kwargs)
import train_gpt
try:
    train_gpt.main(*command_line.command_line(sys.argv[2:]))
except SystemExit as ended:
    assert ended.code == 0, ended.code
print("compiler loaded:", "torch._dynamo" in sys.modules)
"""


def train(out, compiled):
    """(stdout, reset event, log.txt) of two steps of a two-layer record 2."""
    args = ["short/2", "--scale", "micro", "--out", str(out)]
    compile = f"system.compile={'on' if compiled else 'off'}"
    for x in ("schedule.steps=2", "validation.tokens=1024", "model.num_layers=2", compile):
        args += ["--set", x]
    run = program("-c", TRAIN, "aot_eager" if compiled else "uncompiled", *args)
    folder = next(out.glob("2*"))
    return run.stdout, runlog.read_chain(folder / "run.jsonl")[2], (folder / "log.txt").read_text()


def test_a_compiled_run_says_where_its_start_went(tmp_path):
    said, reset, text = train(tmp_path, compiled=True)
    cost = reset["compile"]
    assert reset["graphs"] > 1 and list(run_laws.misshapen(reset)) == []
    assert (
        0 < cost["dynamo_s"]
        and sum(v for k, v in cost.items() if k.endswith("_s")) <= reset["warmup_ms"] / 1000
    )
    assert 0 < reset["imports_ms"] <= reset["start_ms"]
    line, = runlog.render(reset)
    assert line in text.splitlines() and line in said.splitlines()
    assert f"compiling {reset['graphs']} graphs (0 from the cache)" in line


def test_an_uncompiled_run_loads_no_compiler_and_says_nothing_of_it(tmp_path):
    said, reset, text = train(tmp_path, compiled=False)
    assert said.splitlines()[-1] == "compiler loaded: False"
    assert "compile" not in reset and runlog.render(reset) == [] and "started in" not in text + said


# two layers, the last one long
LITTLE = ["short/33", "--scale", "micro", "--without", "model.attn.value_embed"]
for x in ("system.compile=on", "schedule.steps=8", "model.num_layers=2", "model.attn.drop_layers=[]",
          "model.attn.window.long_layers=[1]", "validation.tokens=1536", "validation.seq_len=192"):
    LITTLE += ["--set", x]


def graphs(out, *sets):
    """(graphs of the warm-up, graphs compiled in the clock) of LITTLE with settings, and how many --plan says
    at most."""
    args = [*LITTLE, *(x for text in sets for x in ("--set", text))]
    program("-c", TRAIN, "eager", *args, "--out", str(out))
    s = command_line.command_line(args)[1].settings
    events = runlog.read_chain(next(out.glob("2*")) / "run.jsonl")
    most = int(re.search(r"at most (\d+) graphs", "\n".join(dry_run.graphs(s, schedule.plan(s)))).group(1))
    return events[2]["graphs"], events[-1]["graphs_in_clock"], most


def test_nothing_is_compiled_inside_the_clock_because_the_warm_up_has_seen_every_window(tmp_path):
    """Three windows in training, a fourth in the last validation. After one step the clock meets two for the
    first time."""
    made, inside, most = graphs(tmp_path / "all", "validation.every=1")
    assert inside == 0 and made <= most <= made + 1
    assert graphs(tmp_path / "one", "validation.every=1", "system.warmup_steps=1") == (made - 2, 2, most)


@pytest.mark.slow  # the same law for fewer validations
def test_the_warm_up_sees_no_window_that_the_run_does_not_meet(tmp_path):
    """Two validations meet the windows of the first and the last step only; eight meet more."""
    rare, inside, most = graphs(tmp_path / "rare", "validation.every=8")
    assert inside == 0 and rare <= most <= rare + 1
    assert rare < graphs(tmp_path / "all", "validation.every=1")[0]


def test_what_the_start_cost_reads_as_one_line_and_only_numbers_are_accepted():
    cost = {"dynamo_s": 4.0, "inductor_s": 12.0, "kernels_s": 5.0, "autotune_s": 0.0, "hits": 12, "misses": 2}
    event = {
        "kind": "reset", "n": 2, "wall_ms": 1.0, "start_ms": 8000.0, "warmup_ms": 26_000.0, "graphs": 14,
        "compile": cost, "warmup_steps": 3, "state_before": "a", "state_after": "a"
    }
    assert runlog.render(event) == [
        "started in 34.0 s: 8.0 s imports and data, 21.0 s compiling 14 graphs (12 from the "
        "cache), 5.0 s warm-up"
    ]
    assert list(run_laws.misshapen(event)) == []
    for bad in ("text", {"dynamo_s": 1.0}, {**cost, "kernels_s": "5"}):
        assert any(
            "compile must be numbers" in line for line in run_laws.misshapen({**event, "compile": bad})
        )


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "nothing is compiled here"),
        (["--set", "system.compile=on"], "must be a file in a folder that exists"),
    ],
)
def test_a_cache_file_that_cannot_serve_is_refused_at_once(args, message, tmp_path):
    run = subprocess.run(
        [
            sys.executable, "train_gpt.py", "short/2", "--scale", "micro", "--out", str(tmp_path), *args,
            "--compile-cache", str(tmp_path / "none" / "f")
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "SPEEDRUN_CACHE": str(tmp_path)},
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and message in run.stderr, run.stderr


if __name__ == "__main__":
    print(json.dumps(compile_once(Path(sys.argv[2]))))
