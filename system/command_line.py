"""The command line of the trainer, without torch, so that a wrong setting is refused at once."""

import argparse

from common import arguments
from common.console import fail
from common.errors import UserError
from settings.data import LOGICAL_RANKS
from settings.deltas import Resolved, resolve_name
from settings.scales import SCALES
from system.place import PROCESSES, Place
from system import resume
from system.cards import CARDS

EVERY = ("seconds", 600.0)  # the default of --checkpoint-every
STALLED = ("seconds", 600.0)  # the default of --stall-timeout
KEEP = 2  # the default of --keep-checkpoints
SKIP, REWIND = "skip", "rewind"
# With --rescue rewind, if nothing is asked for: a checkpoint every 100 steps, or every 20th part of a shorter
# run, and so many of them that the ring reaches back further than a spike is seen late.
REWIND_EVERY, REWIND_PART, REWIND_KEEP = 100, 20, 6
UNSET = ("unset", 0.0)


def parser() -> arguments.Parser:
    """The trainer's options."""
    p = arguments.Parser(
        prog="train_gpt.py", description="Train a record of the NanoGPT speedrun, or any change to one.",
        epilog="Records: `python -m records list`. Settings: `python -m records features`.")
    p.add_argument(
        "record", nargs="?",
        help="short/9, short/head, short/unet_double_lr, attempts/my_idea or a preset (tiny-v3)"
    )
    p.add_argument(
        "--scale", choices=list(SCALES),
        help="full (as published, the default), small (one GPU), tiny (CPU), mini (questions on a CPU), "
        "micro (checks)"
    )
    p.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="PATH=VALUE", help="literal value"
    )
    p.add_argument("--with", dest="with_", action="append", default=[], metavar="PATH[=VALUE|@RECORD]",
                   help="turn a feature on")
    p.add_argument(
        "--without", action="append", default=[], metavar="PATH", help="turn a feature off (ablation)"
    )
    p.add_argument(
        "--revert", action="append", default=[], metavar="RECORD", help="replay the chain without its delta"
    )
    execution(p)
    return p


def execution(p: arguments.Parser) -> None:
    """Options that say how and where a run is executed, not what it trains."""
    p.add_argument("--seed", type=arguments.seed, default=0, help="seed of the initial weights")
    p.add_argument("--nproc", type=arguments.integer(1, 8), metavar="N",
                   help="run as so many processes of this machine, one per GPU (1, 2, 4 or 8)")
    p.add_argument(
        "--data", metavar="DIR",
        help="folder of shards (default: the embedded corpus at tiny, mini and micro, data/fineweb10B "
        "otherwise)"
    )
    p.add_argument("--out", default="runs", metavar="DIR", help="where run folders go (default runs)")
    p.add_argument("--save-checkpoint", action="store_true", help="write checkpoint.pt at the end")
    # the former name of --save-checkpoint
    p.add_argument("--save", dest="save_checkpoint", action="store_true", help=argparse.SUPPRESS)
    checkpoints(p)
    p.add_argument(
        "--log-to", action="append", default=[], choices=["wandb", "trackio", "tensorboard"],
        help="copy the curve there at each validation, while the clock stands; the package must be installed "
        "(may be given again)"
    )
    p.add_argument(
        "--compile-cache", metavar="FILE",
        help="compiled code in one file, for machines that start bare: read if it "
        "exists, written after the warm-up if something new was compiled"
    )
    p.add_argument(
        "--registered", default="", metavar="HASH",
        help="entry of a manifest that announced this run (set by `records compare` and `records submit`)"
    )
    p.add_argument(
        "--dry-run", "--plan", dest="plan", action="store_true",
        help="print the differences from the parent, "
        "settings, schedule, shapes and parameters; train nothing (--plan is the same)"
    )
    p.add_argument(
        "--plot", metavar="FILE",
        help="with --dry-run: draw the schedules of the run as a picture (.png or .svg; needs matplotlib)"
    )
    p.add_argument(
        "--card", type=str.lower, choices=list(CARDS),
        help="with --dry-run: estimate the milliseconds of a step on this GPU (on --nproc of them)"
    )
    p.add_argument(
        "--strict", action="store_true",
        help="refuse to run in a slower way than the record and the device allow, "
        "and fail if anything was compiled after the warm-up"
    )
    p.add_argument(
        "--check-sync", action="store_true",
        help="stop at the first operation of a timed step that makes the program wait for the device"
    )
    p.add_argument(
        "--profile", type=arguments.steps_range, metavar="A:B",
        help="torch.profiler trace of steps A..B-1 into the run folder"
    )


def checkpoints(p: arguments.Parser) -> None:
    """Options of what a run keeps to go on from."""
    p.add_argument(
        "--checkpoint-every", type=arguments.interval, default=UNSET, metavar="N|TIME",
        help="keep a checkpoint to resume from every N steps, or after 90s, 10m, 2h; and when the run is "
        "told to stop (default 10m; `never`, also the default of a registered run)"
    )
    p.add_argument(
        "--keep-checkpoints", type=arguments.integer(1, 1000), metavar="K",
        help="so many of the last checkpoints are kept until the run has finished (default 2; "
        "with --rescue rewind 6)"
    )
    p.add_argument(
        "--stall-timeout", type=arguments.duration, default=STALLED, metavar="TIME",
        help="end a run that makes no progress for so long, with a report of each process (90s, 10m, 2h; "
        "default 10m; `never`)"
    )
    p.add_argument(
        "--rescue", choices=[SKIP, REWIND],
        help="skip: leave out the update of a step whose loss or gradient norm is far above those before it; "
        "rewind: when the loss has risen and stays, or is not finite, go back to a checkpoint and on with "
        "other batches; such a run is no record"
    )
    p.add_argument(
        "--resume", metavar="RUN|last",
        help="continue a run that was interrupted, from its last good checkpoint: its folder, or the newest "
        "one under --out; settings and seed are those of the run"
    )


def command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, Resolved]:
    """(options, Resolved), or a one-line error on stderr and exit code 2. Imports no torch."""
    options = parser().parse_args(argv)
    try:
        resume.choose(options)
        if options.record is None and options.resume is None:
            raise UserError(
                "no record named. On a CPU type `./run.sh` (two minutes) or `train_gpt.py short/head "
                "--scale tiny`; on 8 GPUs `train_gpt.py short/head --nproc 8` "
                "after `python -m data.fineweb short/head`"
            )
        if options.nproc is not None and options.nproc not in PROCESSES:
            raise UserError(
                f"--nproc {options.nproc}: must be 1, 2, 4 or 8, to share the {LOGICAL_RANKS} logical ranks"
            )
        if options.plot is not None and not options.plan:
            raise UserError(
                f"--plot {options.plot}: the plan is drawn with --dry-run: add it (curves of runs: python -m "
                "records plot)"
            )
        if options.card and not options.plan:
            raise UserError(f"--card {options.card} is for estimates: add --dry-run, or leave it out")
        if not options.plan:
            place = Place.read()
            if place.launched and options.nproc not in (None, place.size):
                raise UserError(f"--nproc {options.nproc}: a launcher started {place.size} processes "
                                "already: leave --nproc out")
        if options.rescue and options.registered:
            raise UserError("--rescue: a registered run is not assisted: leave --rescue out")
        resolved = None
        if options.record is not None:
            resolved = resolve_name(
                options.record, scale=options.scale, sets=options.sets, with_=options.with_,
                without=options.without, revert=options.revert
            )
        if options.resume is not None:
            resolved = resume.settings_of(options, resolved)
        choose_checkpoints(options, resolved.settings.schedule.steps)
    except UserError as error:
        fail(error)
    return options, resolved


def choose_checkpoints(options: argparse.Namespace, steps: int) -> None:
    """Set how often a run of so many steps keeps a checkpoint, and how many, where nothing is asked for.

    UserError for a run that may go back and keeps none.
    """
    back = options.rescue == REWIND
    if options.checkpoint_every is UNSET:
        every = ("steps", max(1, min(REWIND_EVERY, steps // REWIND_PART))) if back else EVERY
        options.checkpoint_every = None if options.registered else every
    if back and options.checkpoint_every is None:
        raise UserError("--rescue rewind goes back to checkpoints: leave `--checkpoint-every never` out")
    if options.keep_checkpoints is None:
        options.keep_checkpoints = REWIND_KEEP if back else KEEP
