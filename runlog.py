"""What a run writes: run.jsonl, and from it log.txt in the speedrun's form and summary.json; and its curve.

run.jsonl is the source: hash-chained events. `render` turns an event into the lines of log.txt and
`summarise` turns all of them into summary.json, so that both can be derived again from the chain, by anyone
(`records verify` does). A line is written whole or not at all: if the disk is full the file is cut back to
its last complete line, and the run ends with one message. No torch here.
"""

import errno
import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from common import files, untrusted
from common.errors import UserError
from common.interrupt import held

ROOT = Path(__file__).parent
RULER = "=" * 100
LOG_VERSION = 3  # 1 had no reset account, no first gradients, and a text log with lines of its own
# in 2, train_loss and probe of several processes were those of process 0 alone (`covers_all`)
READABLE = (2, 3)
PRIVATE = ("kind", "n", "wall_ms")  # fields of an event that belong to the chain, not to what it tells
# Variables that change numbers or times: declared with a plan, set to the same for every run of it, and told
# by each log.
VARIABLES = ("OMP_", "MKL_", "GOMP_", "KMP_", "TORCH", "PYTORCH_", "TRITON_", "NCCL_", "CUDA_", "CUBLAS_",
             "CUDNN_")
# events in which every null stands for a number that is not finite
MEASURED = ("probe", "validation", "experts")
NAMES = ("log.txt", "run.jsonl")


def source_files() -> list[str]:
    """Every file that a training runs through, relative to the checkout."""
    fixed = ["train_gpt.py", "model.py", "optim.py", "schedule.py", "runlog.py"]
    folders = ("settings", "updates", "kernels", "layers", "data", "system", "common")
    return fixed + [
        f"{folder}/{path.name}" for folder in folders for path in files.listed(ROOT / folder, "*.py")
    ]


def sources() -> tuple[str, str]:
    """(text, hash) of all source files."""
    text = "".join(
        f"# ----- {name}\n{(ROOT / name).read_text(encoding='utf-8')}\n" for name in source_files()
    )
    return text, source_hash(text)


def source_hash(text: str) -> str:
    """16 hex digits of a source text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
    """CPU name, cores, platform, and an anonymous id that is the same for all runs of one machine."""
    name, identity = platform.processor() or platform.machine(), platform.node()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
        identity = Path("/etc/machine-id").read_text(encoding="utf-8", errors="replace").strip() or identity
    except OSError:
        pass
    return {
        "cpu": name, "cores": os.cpu_count(), "platform": platform.platform(),
        "python": platform.python_version(),
        "machine": hashlib.sha256(f"speedrun {identity} {name}".encode()).hexdigest()[:12]
    }


def environment() -> dict[str, str]:
    """The variables of this process that change numbers or times (paths and choice of GPU left out)."""
    return {k: v for k, v in sorted(os.environ.items())
            if k.startswith(VARIABLES) and k != "CUDA_VISIBLE_DEVICES" and "/" not in v}


def covers_all(start: dict) -> bool:
    """Are the training losses and the probe of a run with this start event those of all processes?"""
    return start["log_version"] > 2 or start["processes"] == 1


# ----- the chain --------------------------------------------------------------------------------------------

GENESIS = "0" * 64
LOG_LIMIT = 256 * 2 ** 20  # bytes of a chained file that is read


def chain_hash(previous: str, body: dict) -> str:
    """Hash of a chained line: sha256 of the hash before it and its canonical JSON."""
    return hashlib.sha256((previous + json.dumps(body, sort_keys=True)).encode()).hexdigest()


def chain_line(previous: str, body: dict) -> tuple[str, str]:
    """(line of JSON with its `hash`, hash)."""
    body = files.strict(body)
    digest = chain_hash(previous, body)
    return files.json_text(body, sort_keys=True)[:-1] + f', "hash": "{digest}"}}', digest


def plain_event(**fields) -> dict:
    """The event as a reader of its line gets it: plain JSON values, null where a number is not finite."""
    return json.loads(files.json_text(fields))


def measured(event: dict) -> dict:
    """The event with its numbers to compute with: null is NaN again where only a number can stand.

    Lines hold null there, as JSON has no NaN.
    """
    def numbers(value):
        if isinstance(value, dict):
            return {k: numbers(v) for k, v in value.items()}
        if isinstance(value, list):
            return [numbers(v) for v in value]
        return math.nan if value is None else value

    if event["kind"] in MEASURED:
        return numbers(event)
    if event["kind"] == "end" and event.get("status") == "diverged" and event.get("val_loss", 0) is None:
        return {**event, "val_loss": math.nan}
    return event


class Empty(UserError):
    """A chained file without a whole line."""


def read_chain(path: Path | str) -> list[dict]:
    """Events of a chained file, checked. Raises UserError at the first line that breaks the chain."""
    return [event for event, _ in read_links(path)]


def read_links(path: Path | str, torn: bool = False) -> list[tuple[dict, str]]:
    """[(event, hash)] of a chained file, checked: complete lines, numbered from 0, each hash over all before
    it, each spelled as `chain_line` spells it, so that no two files tell the same. torn: a last line without
    its end, which a kill may leave, is left out."""
    previous, links = GENESIS, []
    text = untrusted.text_of(path, LOG_LIMIT, torn)
    lines = text.split("\n")
    odd = set()  # words like NaN, which old logs have for losses that are not finite
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        try:
            event = untrusted.json_value(line, f"{path}: line {number}", constants=odd)
        except untrusted.Malformed:
            event = None
        if not isinstance(event, dict) or not {"hash", "kind", "n"} <= event.keys():
            raise UserError(f"{path}: line {number} is not a complete log line")
        claimed, kind, n = event.pop("hash"), event["kind"], event["n"]
        body = json.dumps(event, sort_keys=True)
        if not odd and line != f'{body[:-1]}, "hash": {json.dumps(claimed)}}}':
            raise UserError(f"{path}: line {number} ({kind}) is spelled in another way than logs are written")
        if odd and kind not in (*MEASURED, "end"):
            raise UserError(f"{path}: line {number}: holds {min(odd)}, which is no number")
        odd.clear()
        previous = hashlib.sha256((previous + body).encode()).hexdigest()
        if claimed != previous or type(n) is not int or n != number - 1:
            raise UserError(
                f"{path}: line {number} ({kind}) breaks the hash chain: it or a line before it was changed"
            )
        links.append((measured(event), claimed))
    if not links:
        raise Empty(f"{path}: the file holds no whole line" if torn else f"{path}: the file is empty")
    if lines[-1]:
        raise UserError(f"{path}: line {len(lines)} lacks its end: the file is cut")
    return links


def readable(path: Path | str) -> list[dict]:
    """The whole events of a log that may be under way or torn; [] if it cannot be read."""
    try:
        return [event for event, _ in read_links(path, torn=True)]
    except UserError:
        return []


# ----- what follows from the chain --------------------------------------------------------------------------

def render(event: dict) -> list[str]:
    """The lines of log.txt that an event stands for."""
    kind = event["kind"]
    facts = {k: v for k, v in event.items() if k not in PRIVATE}
    if kind == "start":
        settings, digest = facts.pop("settings"), facts.pop("sources")
        return [f"sources: sources-{digest}.txt", RULER, *(f"{k}: {v}" for k, v in sorted(facts.items())),
                f"settings: {json.dumps(settings, sort_keys=True)}", RULER]
    if kind == "reset" and "compile" in event:
        spent = sum(value for name, value in event["compile"].items() if name.endswith("_s"))
        start, warmup = event["start_ms"] / 1000, event["warmup_ms"] / 1000
        return [
            f"started in {start + warmup:.1f} s: {start:.1f} s imports and data, {spent:.1f} s compiling "
            f"{event['graphs']} graphs ({event['compile']['hits']} from the cache), "
            f"{max(0.0, warmup - spent):.1f} s warm-up"
        ]
    if kind == "validation":
        ms, step = event["train_time_ms"], event["step"]
        raw = f" raw_val_loss:{event['raw_val_loss']:.6f}" if "raw_val_loss" in event else ""
        told = f"{raw} readout:{'+'.join(event['readout'])}" if "readout" in event else ""
        return [
            f"step:{step}/{event['scheduled_steps']} val_loss:{event['val_loss']:.6f} train_time:{ms:.0f}ms "
            f"step_avg:{ms / max(step, 1):.2f}ms{told}"
        ]
    if kind == "experts":
        worst = max(event["max_vio"])
        measured_too = "" if "max_vio_steps" not in event else (
            f"; {mean(event['max_vio_steps']):.2f} over the steps, "
            f"{mean(event['max_vio_val']):.2f} in validation"
        )
        return [
            f"experts: MaxVio {mean(event['max_vio']):.2f} mean, {worst:.2f} in layer "
            f"{event['layers'][event['max_vio'].index(worst)]}{measured_too}; {sum(event['idle'])} idle; "
            f"{sum(event['dropped'])} rows dropped; entropy {mean(event['entropy']):.3f}"
        ]
    if kind == "checkpoint":
        if "error" in event:
            return [f"no checkpoint of step {event['step']}: {event['error']}; the run goes on"]
        return [
            f"checkpoint of step {event['step']}: {event['bytes'] / 1e6:.1f} MB, {event['copy_ms']:.1f} ms "
            f"on the clock, {event['write_ms'] / 1000:.2f} s written in the background"
        ]
    if kind == "resume":
        lines = [f"passed over {name}: {reason}" for name, reason in event["passed"]]
        source = f"from {event['checkpoint']}" if event["checkpoint"] else "without a checkpoint"
        return lines + [
            f"resumed {source} at step {event['step']}, {event['utc']}: {event['lost_steps']} steps, "
            f"{event['lost_ms'] / 1000:.1f} s on the clock, are done again"
        ]
    if kind == "guard":
        return [f"guard: {event['message']}"]
    if kind == "end":
        memory = (
            [f"peak memory allocated: {event['peak_memory_mib']} MiB"] if event.get("peak_memory_mib") else []
        )
        return memory + [f"run {event['status']} after {event['steps']} steps", *event["verdict"]]
    return []


def mean(values: Sequence[float]) -> float:
    """The mean of a list of numbers."""
    return sum(values) / len(values)


def balance(events: list[dict]) -> dict:
    """How evenly the experts of a run were loaded, from its events `experts`; {} if they do not tell.

    Returns {"max_vio": {"layers": [layer], "steps": [mean over all steps up to the last validation],
    "validation": [of the last validation], "steps_mean", "validation_mean": means over the layers}}.
    """
    told = [e for e in events if e["kind"] == "experts" and "max_vio_steps" in e]
    if not told:
        return {}
    spans = [e["step"] - before for e, before in zip(told, [0, *(e["step"] for e in told)])]
    steps = []
    for means in zip(*(e["max_vio_steps"] for e in told)):  # of one layer, a mean for each event
        steps.append(round(sum(n * x for n, x in zip(spans, means)) / sum(spans), 4))
    last = told[-1]
    return {"max_vio": {
        "layers": last["layers"], "steps": steps, "validation": last["max_vio_val"],
        "steps_mean": round(mean(steps), 4), "validation_mean": round(mean(last["max_vio_val"]), 4)
    }}


def is_account(compile: Any) -> bool:
    """Can `render` read it as what system.compiler.account gives?"""
    return (
        isinstance(compile, dict) and "hits" in compile
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in compile.values())
    )


def standing(events: list[dict]) -> list[dict]:
    """The events without those that a run did again, when it was resumed or went back (--rescue rewind): one
    line of events to its end."""
    kept = []
    for event in events:
        back = event["to"] if event["kind"] == "guard" and "to" in event else None
        if event["kind"] == "resume":
            back = event["step"]
            kept = [e for e in kept if e["kind"] not in ("stream", "guard", "end")]
        if back is not None:
            kept = [e for e in kept
                    if e["kind"] not in ("validation", "experts", "checkpoint") or e["step"] < back]
        kept.append(event)
    return kept


def summarise(events: list[dict], last_hash: str) -> dict:
    """summary.json of a run: what its events say, in one flat table."""
    resumed = [e["step"] for e in events if e["kind"] == "resume"]
    guards = [e["message"] for e in events if e["kind"] == "guard"]
    events = standing(events)
    by_kind = {e["kind"]: {k: v for k, v in e.items() if k not in PRIVATE} for e in events}
    curve = [[e["step"], e["val_loss"]] for e in events if e["kind"] == "validation"]
    end = by_kind.get("end", {})
    rate = round(end["tokens"] / max(end["train_time_ms"], 1e-9) * 1000) if end else 0
    return {
        **end, "tokens_per_second": rate, "curve": curve,
        "stream_digest": by_kind.get("stream", {}).get("digest"), "reset": by_kind.get("reset"),
        **balance(events), **({"resumed": resumed} if resumed else {}),
        **({"guards": guards} if guards else {}), **by_kind["start"],
        "last_hash": last_hash
    }


def utc() -> str:
    """The date and time, as events have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def new_folder(out: Path | str, name: str) -> Path:
    """Make the folder of a new run, whose name no other run has."""
    Path(out).mkdir(parents=True, exist_ok=True)
    stamp, n = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        folder = Path(out) / (f"{stamp}_{name}" + (f"_{n}" if n else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            n += 1


def claim(file: BinaryIO, folder: Path | str) -> None:
    """Hold the log for this process alone, until it ends. UserError if another one writes it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: is under way in another process: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks


def held_by_process(folder: Path | str) -> bool | None:
    """Whether a process of this machine holds the log of a run (`claim`), as each does until it ends.

    None where the system does not tell. Reads the kernel's list of locks: to try the lock would be in the way
    of a run that is about to begin.
    """
    try:
        inode = (Path(folder) / "run.jsonl").stat().st_ino
        return f":{inode} " in Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return None


def ended(events: list[dict]) -> bool:
    """Has a run with these events nothing left to do?"""
    return bool(events) and events[-1]["kind"] == "end" and events[-1]["status"] != "interrupted"


def refuse_ended(folder: Path | str, events: list[dict]) -> None:
    """UserError if the events are those of a run that has nothing left to do."""
    if ended(events):
        end = events[-1]
        raise UserError(
            f"{folder}: the run has {end['status']} after {end['steps']} steps: nothing to resume"
        )


def complete(folder: Path | str) -> None:
    """Write log.txt and summary.json of an ended run again where a kill, after its last event, has left them
    behind. UserError if the run is under way."""
    folder = Path(folder)
    with open(folder / "run.jsonl", "ab") as file:
        claim(file, folder)
        links = read_links(folder / "run.jsonl", torn=True)
        events = [event for event, _ in links]
        text = "".join(f"{line}\n" for event in events for line in render(event))
        summary = files.json_text(summarise(events, links[-1][1]), indent=1) + "\n"
        for name, content in (("log.txt", text), ("summary.json", summary)):
            path = folder / name
            if not path.exists() or path.read_bytes() != files.encoded(content):
                files.write(path, content)


class RunLog:
    """The run's folder. On all processes but the first (`active` False) nothing is written."""

    def __init__(
        self, out: Path | str, name: str, active: bool = True, began: float | None = None,
        folder: Path | str | None = None
    ) -> None:
        """out: where run folders go. began: perf_counter() at the start of the process, from which wall_ms
        counts. folder: of a run that is resumed; None: a new one."""
        self.active, self.events, self.previous = active, [], GENESIS
        self.links = []  # (event, hash)
        self.lock = threading.RLock()  # one event at a time
        self.began = time.perf_counter() if began is None else began
        self.before_ms = 0.0  # wall_ms of the last event before a resume
        if not active:
            if folder is not None:
                self.events = readable(Path(folder) / "run.jsonl")[:1]
            return
        try:
            self.folder = new_folder(out, name) if folder is None else Path(folder)
            self.files = {f: open(self.folder / f, "ab", buffering=0) for f in NAMES}
        except OSError as error:
            where = f"run folder under {out}" if folder is None else folder
            remedy = "choose another with --out" if folder is None else "make it writable"
            raise UserError(f"cannot write {where}: {error.strerror}; {remedy}") from None
        claim(self.files["run.jsonl"], self.folder)
        if folder is not None:
            self.continue_chain()

    def continue_chain(self) -> None:
        """Take over the events of the folder, without a line that a kill or a full disk has torn.

        UserError if the chain is broken or the run has ended.
        """
        path = self.folder / "run.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0]
        os.ftruncate(self.files["run.jsonl"].fileno(), len(whole) + bool(whole))
        links = read_links(path)
        refuse_ended(self.folder, [event for event, _ in links])
        self.events, self.previous = [event for event, _ in links], links[-1][1]
        self.links = links
        self.before_ms = self.events[-1]["wall_ms"]
        # the text may lag behind the chain by the lines that were being written
        os.ftruncate(self.files["log.txt"].fileno(), 0)
        for event in self.events:
            for text in render(event):
                self.write("log.txt", text)

    def write(self, name: str, line: str) -> None:
        """Append one line, or cut the file back to its last complete line and raise."""
        file, data = self.files[name], files.encoded(line) + b"\n"
        start = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):  # unbuffered: a full disk may take a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            try:
                os.ftruncate(file.fileno(), start)
            except OSError:
                pass
            raise UserError(
                f"cannot write {self.folder / name}: {error.strerror}; the log is complete up to here, "
                f"free some space and start again"
            ) from None

    @held
    def elapsed_ms(self) -> float:
        """Wall milliseconds since the process began, after those of the processes that it continues."""
        return self.before_ms + 1000 * (time.perf_counter() - self.began)

    def event(self, kind: str, **fields) -> dict:
        """Add an event: one chained line of run.jsonl, and its lines of log.txt. Returns the event."""
        with self.lock:
            event = plain_event(n=len(self.events), kind=kind, wall_ms=round(self.elapsed_ms(), 3), **fields)
            line, self.previous = chain_line(self.previous, event)
            event = measured(event)
            if self.active:
                self.write("run.jsonl", line)
                for text in render(event):
                    self.write("log.txt", text)
            self.events.append(event)
            self.links.append((event, self.previous))
            return event

    def last_event(self, kind: str, **fields) -> dict:
        """An event after which this process ends: no other thread can add one any more."""
        self.lock.acquire()
        return self.event(kind, **fields)

    def start(self, about: dict, settings: dict) -> None:
        """Sources (once per content, next to the run folders), environment and settings (nested plain
        values)."""
        self.event(
            "start", log_version=LOG_VERSION, utc=utc(), sources=self.keep_sources(), settings=settings,
            **about
        )

    def keep_sources(self) -> str:
        """Write the program's sources next to the run folders, once per content. Returns their hash."""
        text, digest = sources()
        if self.active:
            path = self.folder.parent / f"sources-{digest}.txt"
            if not path.exists():
                files.write(path, text, remedy="free some space, or choose another folder with --out")
        return digest

    def close(self) -> None:
        """Let another process write the log."""
        for file in self.files.values() if self.active else ():
            file.close()

    @held
    def end(self, **fields) -> dict:
        """The last event, both logs made to last, then summary.json. Returns the summary."""
        self.event("end", **fields)
        summary = summarise(self.events, self.previous)
        if self.active:
            try:
                for file in self.files.values():
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(
                    f"cannot write {self.folder}: {error.strerror}; the disk has lost parts of the log"
                ) from None
            files.write(self.folder / "summary.json", files.json_text(summary, indent=1) + "\n",
                        remedy="run.jsonl next to it is complete; free some space")
        return summary


# ----- what a person sees -----------------------------------------------------------------------------------

def crossing(points: Sequence[Sequence[float]], target: float) -> float | None:
    """First step at which a curve of (step, loss) is at or below target, linear between them; None: never."""
    for (a, above), (b, below) in zip(points, points[1:]):
        if below <= target:
            return a + (b - a) * (above - target) / (above - below) if above > target else float(a)
    return None


def terminal_curve(
    points: Sequence[Sequence[float]], target: float | None = None, width: int = 64, height: int = 10
) -> str:
    """Text chart of (step, val_loss) points, lowest values resolved best: the first point may lie off the
    top."""
    points = [p for p in points if p[1] == p[1]]
    if len(points) < 2:
        return ""
    losses = [loss for _, loss in points]
    low = min([*losses, target] if target else losses)
    high = sorted(losses)[-2] if len(losses) > 3 else max(losses)
    span = max(high - low, 1e-9)
    grid = [[" "] * width for _ in range(height)]
    last = points[-1][0] or 1

    def row(loss):
        return max(0, min(height - 1, round((high - loss) / span * (height - 1))))

    if target:
        grid[row(target)] = ["-"] * width
    for column in range(width):  # straight lines between validations
        step = column / (width - 1) * last
        right = next(i for i, p in enumerate(points) if p[0] >= step - 1e-9)
        (s0, l0), (s1, l1) = points[max(0, right - 1)], points[right]
        loss = l1 if s1 == s0 else l0 + (l1 - l0) * (step - s0) / (s1 - s0)
        if loss <= high + 0.5 * span / height:
            grid[row(loss)][column] = "*"
    lines = [f"{high - i / (height - 1) * span:8.3f} |{''.join(cells)}" for i, cells in enumerate(grid)]
    if target:
        lines[row(target)] += f" target {target:g}"
    return "\n".join(lines + [" " * 9 + "+" + "-" * width, " " * 10 + f"0{'step ' + str(last):>{width - 1}}"])
