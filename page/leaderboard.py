"""`python -m records leaderboard [--check]`: the index, LINEAGE.md and the page,
from the committed data and nothing else.

    records/README.md  index of the records here
    LINEAGE.md         every delta in one scroll
    site/index.html    one self-contained page
    site/history.svg   the plot of the README

Same files in, same bytes out: no clock, no git, no network. page/facts.py says what is read.
"""

import sys
from argparse import Namespace
from pathlib import Path

from common import files
from common.arguments import Parser
from page import facts, markdown, history as plot, sections

STALE = 3  # exit code of --check


def arguments(p: Parser) -> None:
    """Options of `records leaderboard`."""
    p.add_argument("--check", action="store_true",
                   help="write nothing; exit 3 if a generated file is not what the data gives")


def run(options: Namespace) -> int:
    """`records leaderboard`: write the generated pages, or check that they are current."""
    return settle(build(), facts.ROOT, options.check)


def build(evidence: Path = facts.EVIDENCE) -> dict[str, str]:
    """Path below the repository -> text of every generated file. evidence:
    folder with the JSON of sweeps and judge."""
    site = facts.gather(evidence)
    return {"records/README.md": markdown.index(site), "LINEAGE.md": markdown.lineage(site),
            "site/history.svg": plot.history(site), "site/index.html": sections.page(site)}


def settle(texts: dict[str, str], root: Path, check: bool = False) -> int:
    """Write the files that differ; with `check` only name them, in one line on stderr, and return STALE."""
    stale = [name for name, text in texts.items() if read(root / name) != text]
    if check and stale:
        print(f"error: {', '.join(stale)}: not what the committed data gives; run `python -m records "
              "leaderboard` and commit the result", file=sys.stderr)
        return STALE
    for name in stale:
        files.write(root / name, texts[name], parents=True)
        print(f"leaderboard: wrote {name}")
    if not stale:
        print(f"leaderboard: {len(texts)} files are what the data gives")
    return 0


def read(path: Path) -> str | None:
    """Text of a file, None if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
