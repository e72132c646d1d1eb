"""What ./run.sh does: train, then plot the curve and sample from the checkpoint,
which it has the trainer save.

Without a record: on a CPU the frozen preset tiny-v3 to its target (two minutes), or with --scale the head of
the lineage; on GPUs the head of the lineage on FineWeb. A record named without --scale runs at scale tiny on
a CPU. With 2, 4 or 8 GPUs it starts as many processes. Run folders go to runs/ of the checkout unless --out
names a place. All options are the trainer's.
"""

import os
import sys

if __name__ == "__main__":  # started as a file: modules are found from the checkout, not from this folder
    sys.path[0] = os.path.dirname(sys.path[0])
from common import environment  # noqa: E402  refuses a Python that is too old

import runpy
import signal
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import NoReturn

from common import files
from settings import deltas
from system import command_line

ROOT = Path(environment.ROOT)
PROCESSES = (8, 4, 2, 1)  # that eight logical ranks can be shared among


# ----- arguments --------------------------------------------------------------------------------------------

def read(argv: list[str]) -> Namespace:
    """The trainer's options of a command line of run.sh. Ends the program for --help (0) or a mistake (2).
    Imports no torch."""
    parser = command_line.parser()
    parser.prog, parser.description = "./run.sh", " ".join(__doc__.split())
    parser.set_defaults(out=None)
    options = parser.parse_args(argv)
    command_line.command_line(complete(argv, options, gpus=0))
    return options


def complete(argv: list[str], options: Namespace, gpus: int) -> list[str]:
    """The trainer's arguments: argv, and where they are missing a record, a scale,
    a place for the run and --save-checkpoint.

    options: argv as `read` gives it.
    """
    added = []
    if options.record is None:
        record = "tiny-v3" if gpus == 0 and options.scale is None else "short/head"
        argv = [record, *argv]
    elif gpus == 0 and options.scale is None and options.record not in deltas.preset_names():
        added += ["--scale", "tiny"]
    if options.out is None and Path.cwd() != ROOT:
        added += ["--out", str(ROOT / "runs")]
    if not (options.save_checkpoint or options.plan):
        added += ["--save-checkpoint"]
    return [*argv, *added]


def count_gpus() -> int:
    """GPUs that torch sees. Asked in a process of its own, as the trainer sets variables
    before torch is loaded."""
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
                          capture_output=True, text=True)
    words = done.stdout.split()
    return int(words[-1]) if done.returncode == 0 and words else 0  # without torch the trainer says so


# ----- training ---------------------------------------------------------------------------------------------

def train(argv: list[str], processes: int) -> int:
    """Run the trainer: one process here, so that signals reach it directly; several by torch's launcher.
    Returns the exit code."""
    trainer = str(ROOT / "train_gpt.py")
    if processes > 1:
        return launch(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={processes}", trainer, *argv
            ]
        )
    before, sys.argv = sys.argv, [trainer, *argv]
    try:
        runpy.run_path(trainer, run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return 0


def launch(command: list[str]) -> int:
    """Exit code of a command. Ctrl-C reaches it through the terminal; SIGTERM and SIGHUP are passed on."""
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code  # as a shell has it


def checkpoints(out: Path | str) -> set[Path]:
    """The checkpoints below a folder of runs."""
    return set(files.listed(out, "*/checkpoint.pt"))


def show(checkpoint: Path) -> None:
    """Curve and sample of a checkpoint. If one of them fails it says why, and the run's exit code stays."""
    for command in (["-m", "records", "plot", checkpoint.parent.absolute()],
                    [ROOT / "sample.py", checkpoint.absolute(), "--tokens", "60"]):
        subprocess.run([sys.executable, *command], cwd=ROOT)


def main(argv: list[str]) -> NoReturn:
    """./run.sh: train with sensible defaults for this machine, then show text of the model."""
    options = read(argv)
    gpus = count_gpus()
    out = options.out if options.out is not None else ROOT / "runs"
    before = checkpoints(out)
    code = train(complete(argv, options, gpus), next(n for n in PROCESSES if n <= max(1, gpus)))
    made = sorted(checkpoints(out) - before, key=lambda path: path.stat().st_mtime)
    if made:
        show(made[-1])
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
