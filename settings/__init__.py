"""The vocabulary of a record: nested frozen dataclasses whose defaults are record 1.

Three axes. `model`, `optim`, `schedule`, `data` and `validation` say what is computed (axis ml). `numerics`
says in which precision; it changes losses, so it belongs to a record's identity. `system` says how a run is
executed; it may change the order of sums, but nothing else in the mathematics. Each part has the file of its
name here (`validation` in data.py), the larger ones with files of their own for what they hold: init.py and
mixing.py of the model, muon.py and wrappers.py of the optimizer. declare.py is the form of a declaration.
schema.py reads and writes settings by path, deltas.py makes them from records and command lines, scales.py
makes them smaller, and renames.py knows the former names.

Each field is declared once, with `declare.opt(...)`: its meaning, unit, range, what `--without` does to it,
what it needs and what a scale makes of it. A dataclass whose fields must agree with each other or with
another part has a method `check(self, s)` that yields one message per contradiction. One whose fields are
not all read by every rule has a method `inert(self)`, which yields the path of each unread field and that of
the setting which makes it so. These texts are printed by `python -m records features`; no list of settings
stands anywhere else. Nothing here imports torch, so that bad settings are refused in a tenth of a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import UserError
from settings.data import Data, Validation
from settings.declare import bound_faults, opt, unmet_needs, walk
from settings.model import Model
from settings.numerics import Numerics
from settings.optim import Optim
from settings.schedule import Schedule
from settings.system import System


@dataclass(frozen=True)
class Settings:
    """A complete description of what a run computes and how."""
    model: Model = opt(Model, "the model, a transformer")
    optim: Optim = opt(Optim, "the optimizer")
    schedule: Schedule = opt(Schedule, "the schedules over the steps of a run")
    data: Data = opt(Data, "the stream of training tokens")
    validation: Validation = opt(Validation, "the measurement of the validation loss")
    numerics: Numerics = opt(Numerics, "the precision plan")
    system: System = opt(System, "the execution of a run")


def check(s: Settings) -> Settings:
    """The same settings, or a UserError for the first contradiction, which names the paths and the remedy."""
    for message in faults(s):
        raise UserError(message)
    return s


def faults(s: Settings) -> Iterator[str]:
    """Messages on numbers out of bounds, then on parts that contradict each other, then on unmet needs.

    A check may rely on what was checked before it, so only the first message is certain to be right.
    """
    for path, f, value in walk(s):
        yield from bound_faults(path, f.metadata["bounds"], value)
    for _, _, node in walk(s):
        if hasattr(node, "check"):
            yield from node.check(s)
    for path, needs, default in unmet_needs(s):
        remedy = f"leave {path} at its default" if default is not None else f"switch it off: --without {path}"
        yield f"{path} needs {needs}: set it too, or {remedy}"


def check_processes(s: Settings, processes: int) -> None:
    """UserError if experts or rows of a table cannot be shared out among so many processes.

    Every process calls this before init_process_group, so that the error is printed once.
    """
    moe = s.model.mlp.moe
    if s.system.expert_parallel and moe.num_experts % processes:
        raise UserError(f"system.expert_parallel: {processes} processes do not divide {moe.num_experts} "
                        "experts: change one of them")
    bigram = s.model.embed.bigram
    if s.system.table_parallel and bigram.rows % processes:
        raise UserError(f"system.table_parallel: {processes} processes do not divide {bigram.rows} rows of "
                        "model.embed.bigram: change one of them")
