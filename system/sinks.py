"""Copies of a run's curve for wandb, trackio and TensorBoard (`--log-to NAME`).

They are written while the clock is stopped. run.jsonl stays the record of a run: a sink that fails is given
up with one line, and the run goes on. The packages are optional and imported only on request. Their own
helpers (the sending process of wandb, the thread of trackio) may still be busy when the clock starts again,
so the log names the sinks, and `records verify` does not accept such a run as timed.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError

MODULES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}
PROJECT = "speedrun"
# wandb samples the machine and copies the terminal while the clock runs: both off, unless the caller's
# environment says otherwise
QUIET = {"WANDB_CONSOLE": "off", "WANDB_X_DISABLE_STATS": "true"}
NEVER = 10 ** 7  # seconds; TensorBoard's thread writes when it is told to, at validations, and not by a timer


def require(names: Sequence[str]) -> None:
    """Import the packages of the named sinks. UserError with the remedy where one is missing or broken."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--log-to {name}: the package {name} is not installed: `pip install {name}`, or leave "
                "--log-to out"
            )
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # whatever a broken installation raises
            raise UserError(
                f"--log-to {name}: the package {name} cannot be imported ({reason(error)}): install it "
                "again, or leave --log-to out"
            ) from None


def reason(error: BaseException) -> str:
    """An exception in at most 200 characters of one line."""
    said = " ".join(str(error).split())
    return (f"{type(error).__name__}: {said}" if said else type(error).__name__)[:200]


class Sinks:
    """The open sinks of a run. Without names, as on all processes but the first, nothing is opened.

    folder: the run's; config: the start event; say: prints a line.
    """

    def __init__(self, names: Sequence[str] = (), folder: Path | None = None, config: dict | None = None,
                 say: Callable[[str], Any] = print) -> None:
        self.say, self.open = say, {}
        for name in dict.fromkeys(names):
            self.attempt(name, functools.partial(self.begin, name, folder, config))

    def begin(self, name: str, folder: Path, config: dict) -> None:
        """Open one sink."""
        kind = TensorBoard if name == "tensorboard" else Tracker
        self.open[name] = kind(name, folder, config)

    def attempt(self, name: str, act: Callable[[], Any]) -> None:
        """Call `act`; if it raises, the sink is given up and the run goes on."""
        try:
            act()
        except (Exception, SystemExit) as error:
            self.open.pop(name, None)
            self.say(f"--log-to {name}: given up ({reason(error)}); the run's own log goes on")

    def validation(self, event: dict) -> None:
        """Write the training losses since the last validation, then this validation event."""
        first = event["step"] - len(event["train_loss"])
        points = [(first + i, {"train_loss": loss}) for i, loss in enumerate(event["train_loss"])]
        told = ("val_loss", "raw_val_loss", "tokens", "train_time_ms")
        points.append((event["step"], {key: event[key] for key in told if key in event}))
        for name, sink in list(self.open.items()):
            self.attempt(name, functools.partial(sink.write, points))

    def close(self, end: dict) -> None:
        """Write how the run ended (its last event), and close."""
        told = ("status", "val_loss", "train_time_ms", "steps", "tokens", "reached")
        facts = {key: end[key] for key in told if key in end}
        for name, sink in list(self.open.items()):
            self.attempt(name, functools.partial(sink.close, facts))
        self.open = {}


class Tracker:
    """A run of wandb or trackio, which have the same calls.

    The environment names its project: WANDB_PROJECT or TRACKIO_PROJECT.
    """

    def __init__(self, name: str, folder: Path, config: dict) -> None:
        own = {"dir": str(folder)} if name == "wandb" else {"auto_log_gpu": False, "auto_log_cpu": False}
        if name == "wandb":
            for variable, value in QUIET.items():
                os.environ.setdefault(variable, value)
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        package = importlib.import_module(MODULES[name])
        self.run = package.init(project=project, name=folder.name, config=config, **own)

    def write(self, points: list) -> None:
        for step, values in points:
            self.run.log(values, step=step)

    def close(self, facts: dict) -> None:
        if hasattr(self.run, "summary"):  # trackio has none: its last validation says it
            self.run.summary.update(facts)
        self.run.finish()


class TensorBoard:
    """Event files in the folder `tensorboard` of the run's folder."""

    def __init__(self, name: str, folder: Path, config: dict) -> None:
        writer = importlib.import_module(MODULES[name]).SummaryWriter
        self.writer = writer(log_dir=str(folder / "tensorboard"), flush_secs=NEVER)
        self.writer.add_text("start", f"```\n{files.json_text(config, indent=1, sort_keys=True)}\n```")
        self.writer.flush()

    def write(self, points: list) -> None:
        for step, values in points:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, facts: dict) -> None:
        self.writer.add_text("end", files.json_text(facts, sort_keys=True))
        self.writer.close()
