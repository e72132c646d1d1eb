"""The surroundings of torch.compile: its cache folders, the account of its time, a portable cache file.

Nothing here imports the compiler unless the settings ask for it. Only the time of a run depends on this
module, not what a graph computes.
"""

import hashlib
import json
import os
import shlex
import stat
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import files
from common.errors import UserError
from kernels.device import c_compiler, triton_version

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
FILE_VERSION = 1
PARTS_KEPT = 16  # of each process: as many runs that had something new to compile, the newest ones


# ----- before anything is compiled --------------------------------------------------------------------------

def check_compilers(cuda: bool) -> None:
    """UserError if torch.compile lacks its compiler: a C compiler (Triton) on a GPU, a C++ one on a CPU."""
    if cuda:
        if c_compiler() is None:
            raise UserError("torch.compile needs a C compiler for Triton, and there is no gcc, clang or $CC "
                            "here: install one (Debian, Ubuntu: apt install gcc), or --set "
                            "system.compile=off, which is slower")
        return
    from torch._inductor import cpp_builder
    try:
        found = cpp_builder.get_cpp_compiler()
    except RuntimeError:  # torch's InvalidCxxCompiler
        name = os.environ.get("CXX")
        what = f"$CXX, {name}, cannot be started" if name else "there is no g++ or clang++ here, and no $CXX"
        raise UserError(f"system.compile=on needs a C++ compiler, and {what}: install one (Debian, Ubuntu: "
                        "apt install g++; macOS: xcode-select --install), or leave system.compile at "
                        "auto") from None
    if not is_plain(found):
        raise UserError("system.compile=on: torch cannot call a C++ compiler with a space or quote in its "
                        f"path ({found}): set CXX to another")


def is_plain(path: str | Path) -> bool:
    """Whether a path has no spaces or quotes: torch's C++ builder writes it unquoted into a command line."""
    try:
        return shlex.split(str(path)) == [str(path)]
    except ValueError:  # a single quote
        return False


def cache_place(cache: str | Path) -> Path:
    """`cache`/compiled as an absolute path, or if that has spaces or quotes, another folder of this user."""
    folder = Path(cache).absolute() / "compiled"
    if is_plain(folder):
        return folder
    name = "speedrun-" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    try:
        home = Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        home = None
    if home is not None and is_plain(home) and os.access(home.parent, os.W_OK):
        return home / name
    place = Path(tempfile.gettempdir()) / f"{name}-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    if not is_plain(place):
        raise UserError(f"torch's C++ builder takes no path with spaces, and {folder} and {place} have some: "
                        "set SPEEDRUN_CACHE to a folder without")
    # anybody may make folders there, and what lies in this one is executed
    place.mkdir(mode=0o700, exist_ok=True)
    state = place.lstat()
    if hasattr(os, "getuid") and (
        not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022
    ):
        raise UserError(f"{place} belongs to somebody else: set SPEEDRUN_CACHE to a folder of your own "
                        "without spaces in its path")
    return place


def quote_library_folders() -> None:
    """Let torch's C++ builder link with a torch whose path has spaces.

    torch 2.11 to 2.13 quote the folders of headers, but not those of libraries.
    """
    if is_plain(Path(torch.__file__).parent):
        return
    from torch._inductor import cpp_builder
    base = cpp_builder.BuildOptionsBase
    if not hasattr(base, "unquoted_libraries_dirs"):
        base.unquoted_libraries_dirs = base.get_libraries_dirs
        base.get_libraries_dirs = lambda self: [
            shlex.quote(folder) for folder in self.unquoted_libraries_dirs()
        ]


def prepare(cache: str | Path, cuda: bool, processes: int = 1) -> None:
    """Set the folders of compiled code and start the compiler's workers.

    Call it before the compiler is loaded. The folders are in `cache`/compiled, unless the environment names
    others. On a GPU the workers, processes that compile Triton kernels, take seconds to start, during which
    data and model are prepared; the `processes` of this machine share its cores. On a CPU threads compile C++
    kernels. UserError if a folder cannot be made, or a compiler is missing.
    """
    for variable, name in FOLDERS.items():
        if variable not in os.environ:
            folder = Path(cache) / "compiled"
            try:
                folder = cache_place(cache) / name
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write the cache folder {folder}: {error.strerror}; set "
                                "SPEEDRUN_CACHE to a folder you may write") from None
            os.environ[variable] = str(folder)
        elif not cuda and not is_plain(os.environ[variable]):
            raise UserError(
                f"{variable}={os.environ[variable]}: torch's C++ builder takes no path with spaces or "
                "quotes: set it to another folder"
            )
    if processes > 1:  # torch's own default: as many as there are cores, at most 32, in every process
        threads = max(1, min(32, (os.cpu_count() or 1) // processes))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    check_compilers(cuda)
    if not cuda:
        quote_library_folders()
    else:
        from torch._inductor import async_compile
        getattr(async_compile, "maybe_warm_pool", lambda: None)()


# ----- what it cost -----------------------------------------------------------------------------------------

def graph_count() -> int:
    """Number of graphs that torch.compile has made in this process so far."""
    # importing it takes a second, and a run that does not compile has none
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["stats"]["unique_graphs"] if dynamo else 0


def account() -> dict[str, float] | None:
    """The compiler's time in this process so far, by its parts; None if it compiled nothing.

    Seconds of wall time, none counted twice: dynamo_s from Python to graphs, inductor_s from graphs to source
    code (AOTAutograd and Inductor; with a warm cache what reading it took), kernels_s making machine code
    (C++ or Triton, waiting for workers included) and loading it, autotune_s trying out Triton configurations
    at the first run. hits, misses: graphs found in the cache (code for forward and backward) or not; a graph
    that dynamo began again is missed twice. Triton kernels of kernels/ are not in it.
    """
    utils = sys.modules.get("torch._dynamo.utils")  # who does not compile has none
    if utils is None or not utils.counters["stats"]["unique_graphs"]:
        return None
    spent = {name: sum(times) for name, times in utils.compilation_time_metrics.items()}
    frames, backends, backward, kernels, autotune = (
        spent.get(name, 0.0)
        for name in (
            "_compile.compile_inner", "OutputGraph.call_user_compiler", "backward._backward_impl",
            "PyCodeCache.load_by_key_path", "CachingAutotuner.benchmark_all_configs"
        )
    )
    found = utils.counters["aot_autograd"]
    parts = {"dynamo_s": frames - backends, "inductor_s": backends + backward - kernels, "kernels_s": kernels,
             "autotune_s": autotune}
    return {
        **{name: round(max(0.0, value), 3) for name, value in parts.items()},
        "hits": found["autograd_cache_hit"],
        "misses": found["autograd_cache_miss"] + found["autograd_cache_bypass"]
    }


# ----- one file ---------------------------------------------------------------------------------------------

class CacheFile:
    """Compiled code of many runs in one file, for machines that start bare: --compile-cache FILE.

    A zip archive: about.json says what it was made by and holds for each part (of one process in one run) the
    hashes of its artefacts; each part is what torch.compiler.save_cache_artifacts gives. A part that a newer
    one covers is dropped. What the compiler takes from it is checked by its own keys (source of the graph,
    torch, device), so another commit costs misses and no errors. It unpickles: load only files of your own.

    A file of another torch, Triton or device is left alone: on its own machine it is still good. A broken one
    is replaced. Neither stops a run.
    """

    def __init__(self, path: str | Path, rank: int, device: torch.device) -> None:
        """UserError if the folder does not exist."""
        self.path, self.rank = Path(path), rank
        if not self.path.absolute().parent.is_dir() or self.path.is_dir():
            raise UserError(f"--compile-cache {path}: must be a file in a folder that exists")
        name = f"CPU {torch.backends.cpu.get_cpu_capability()}"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        self.made_by = {
            "compile_cache": FILE_VERSION, "torch": torch.__version__, "triton": triton_version(),
            "device": name
        }
        self.foreign = self.loaded = False

    def read(self) -> tuple[dict, dict[str, bytes]]:
        """(about, {name of part: bytes}), both empty if there is no file. ValueError if it is broken."""
        if not self.path.exists():
            return {"parts": {}}, {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                about = json.loads(archive.read("about.json"))
                return about, {name: archive.read(name) for name in about["parts"]}
        except (
            zipfile.BadZipFile, KeyError, TypeError, AttributeError, EOFError, OSError, ValueError,
            RuntimeError
        ) as error:
            raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from None

    def load(self) -> list[str]:
        """Give the compiler this process's parts. Returns lines to say."""
        try:
            about, parts = self.read()
            made_by = {key: about.get(key) for key in self.made_by}
            self.foreign = bool(parts) and made_by != self.made_by
            if self.foreign:
                return [f"compile cache {self.path} was made by {described(made_by)}, this is "
                        f"{described(self.made_by)}: nothing loaded, nothing will be saved; name another "
                        "file"]
            for name, data in parts.items():
                if about["parts"][name]["rank"] == self.rank:
                    if torch.compiler.load_cache_artifacts(data) is None:
                        raise ValueError("torch cannot unpack it")
                    self.loaded = True
        except Exception as error:  # whatever torch makes of it: compiling again is always possible
            return [f"compile cache {self.path}: {first_line(error)}; compiling, and writing it anew"]
        return []

    def save(self, gather: Callable[[Any], list], main: bool) -> list[str]:
        """Add what the processes compiled, if something was new. Returns lines to print.

        gather: World.gather_objects. main: whether this is process 0.
        """
        cost, part, lines = account(), None, []
        if cost and (cost["misses"] or not self.loaded) and not self.foreign:
            try:
                data, info = torch.compiler.save_cache_artifacts()
                part = (
                    self.rank, data,
                    sorted(key_hash(kind, k) for kind, keys in info.artifacts.items() for k in keys)
                )
            except Exception as error:  # TypeError where torch has nothing to give
                lines = [f"compile cache {self.path}: {first_line(error)}; nothing saved"]
        fresh = [x for x in gather(part) if x is not None]  # every process takes part
        if main and fresh:
            try:
                lines.append(f"compile cache {self.path}: saved, {self.write(fresh) / 2 ** 20:.1f} MiB")
            except UserError as error:
                lines.append(f"compile cache: {error}; the run goes on")
        return lines

    def write(self, fresh: list[tuple[int, bytes, list[str]]]) -> int:
        """Replace the file by one with these parts and the old ones that they do not cover.

        fresh: [(rank, bytes, hashes)]. Returns the size of the file in bytes.
        """
        try:
            about, parts = self.read()
        except ValueError:
            about, parts = {"parts": {}}, {}
        kept = {n: (p, parts[n]) for n, p in about["parts"].items()}
        for rank, data, keys in fresh:
            for name, (part, _) in list(kept.items()):
                if part["rank"] == rank and set(part["keys"]) <= set(keys):
                    del kept[name]
            mine = [name for name, (part, _) in kept.items() if part["rank"] == rank]
            for name in mine[:max(0, len(mine) - PARTS_KEPT + 1)]:
                del kept[name]
            kept[f"{rank}-{hashlib.sha256(data).hexdigest()[:16]}"] = {"rank": rank, "keys": keys}, data
        with (
            files.writing(self.path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            about = {**self.made_by, "parts": {name: part for name, (part, _) in kept.items()}}
            archive.writestr("about.json", files.json_text(about))
            for name, (_, data) in kept.items():
                archive.writestr(name, data)
        return self.path.stat().st_size


def failure(error: BaseException, folder: Path | None) -> str | None:
    """One line for an error of torch.compile, or None for any other error.

    The whole error goes to a file in the run folder; folder: that folder, or None on other processes.
    """
    if type(error).__module__.partition(".")[0] != "torch" or not any(
            part in type(error).__module__ for part in ("._inductor", "._dynamo", "._functorch")):
        return None
    whole = "see the log of process 0"
    if folder is not None:
        path = folder / "compile_error.txt"
        try:
            files.write(path, "".join(traceback.format_exception(error)))
            whole = f"all of it is in {path}"
        except UserError as failed:
            whole = str(failed)
    said = [line for line in str(error).splitlines() if " error: " in line] or [first_line(error)]
    return (
        f"torch.compile failed ({said[0].strip()[:200]}; {whole}): set system.compile=off, or mend the "
        "compiler"
    )


def key_hash(kind: str, key: str) -> str:
    """16 hex digits that name an artefact of the compiler."""
    return hashlib.sha256(f"{kind} {key}".encode()).hexdigest()[:16]


def described(made_by: dict[str, Any]) -> str:
    """One line on what made a cache file."""
    return f"torch {made_by['torch']}, triton {made_by['triton']}, {made_by['device']}"


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
