"""What the laws of claims read: a claim folder with its logs, and what was found in it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evidence.manifest import Claim
from evidence.run_laws import Log


@dataclass
class Evidence:
    """A claim folder as read.

    logs: by number of a run, the log of a record's run, None where it cannot be read. scripts: likewise what
    evidence.textlog tells of a script's run. problems, unknown: sentences, on what is wrong and what no log
    tells.
    """
    folder: Path
    claim: Claim
    logs: dict[int, Log | None] = field(default_factory=dict)
    scripts: dict[int, dict] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    ledger: Any = None  # evidence.ledger.Ledger of its idea

    @property
    def declaration(self) -> dict | None:
        return self.claim.declaration

    def of(self, arm: str) -> list[Log]:
        """The logs of all runs of an arm, discarded ones included."""
        return [self.logs[r.run] for r in self.claim.runs if r.arm == arm and r.run in self.logs]
