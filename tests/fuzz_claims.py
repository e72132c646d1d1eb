"""Random edits of a good claim folder: of its tree, of the bytes of a file, and of the values in it.

    python tests/fuzz_claims.py 2000 [SEED]     # as tests/long.sh does: prints what is not refused
"""

import json
import lzma
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import runlog
from common.errors import UserError
from evidence import verify

VALUES = [None, -1, 0, 10 ** 30, 1e308, "", "x", "\x1b[2J", "\ud800", "a\nb", [], {}, [[]], {"": None}, True,
          0.5, float("nan"), float("inf"), "../../x", "/dev/zero", "x" * 200_000, "x" * 300, 2 ** 63, "-1",
          "short/11"]
SECONDS = 60.0  # of one case


def files_of(folder: Path) -> list[Path]:
    """Every file of a claim."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


# ----- the tree ---------------------------------------------------------------------------------------------

def bend_tree(folder: Path, draw: random.Random) -> str:
    """Put something that is no plain file into the tree, or take something out of it."""
    victim = draw.choice(files_of(folder))
    how = draw.choice(["link", "pipe", "folder", "gone", "outside", "name", "deep", "case", "many", "swap"])
    if how == "link":
        victim.unlink()
        victim.symlink_to(draw.choice(["/dev/zero", "/etc/passwd", ".", "nothing", victim.name]))
    elif how == "pipe":
        victim.unlink()
        os.mkfifo(victim)
    elif how == "folder":
        victim.unlink()
        victim.mkdir()
    elif how == "gone":
        victim.unlink()
    elif how == "outside":
        os.link(victim, folder.parent / f"outside{draw.random()}")
    elif how == "name":
        (victim.parent / draw.choice(["a\nb", "\x1b[1m", "x" * 230, "\u202ex", "con:", "a\\b", " "])).touch()
    elif how == "deep":
        (victim.parent / "/".join("d" * 40)).mkdir(parents=True)
    elif how == "case":
        (victim.parent / victim.name.swapcase()).touch()
    elif how == "many":
        for i in range(30):
            (folder / "runs" / f"extra{i}").mkdir()
            (folder / "runs" / f"extra{i}" / "run.jsonl").write_bytes(victim.read_bytes())
    else:
        other = draw.choice([p for p in files_of(folder) if p.read_bytes() != victim.read_bytes()])
        held = victim.read_bytes()
        victim.write_bytes(other.read_bytes())
        other.write_bytes(held)
    return f"{how} {victim.relative_to(folder)}"


# ----- bytes ------------------------------------------------------------------------------------------------

def bend_bytes(folder: Path, draw: random.Random) -> str:
    """Change the bytes of one file."""
    victim = draw.choice(files_of(folder))
    data = victim.read_bytes()
    at = draw.randrange(len(data)) if data else 0
    how = draw.choice(["cut", "flip", "repeat", "insert", "empty", "mark", "crlf", "utf16", "long", "xz"])
    odd = [b"\x00", b"\xff", b"\x1b[2J", b"[" * 100_000, b"9" * 5000, b"NaN", b'"', b"\n", b"{}",
           b'{"a": 1}\n']
    data = {
        "cut": data[:at], "empty": b"", "repeat": data + b"\n" + data,
        "flip": data[:at] + bytes([(data[at] if data else 0) ^ 1 << draw.randrange(8)]) + data[at + 1:],
        "insert": data[:at] + draw.choice(odd) + data[at:],
        "mark": b"\xef\xbb\xbf" + data, "crlf": data.replace(b"\n", b"\r\n"), "long": data + b"x" * 10 ** 6,
        "utf16": data.decode("utf-8", "replace").encode("utf-16"), "xz": lzma.compress(data),
    }[how]
    victim.write_bytes(data)
    return f"{how} {victim.relative_to(folder)} at {at}"


# ----- values -----------------------------------------------------------------------------------------------

def places(value: object) -> Iterator[tuple]:
    """(holder, key) of every value inside a plain value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def bend_value(value: object, draw: random.Random) -> str:
    """Change, remove or add one value inside a plain value."""
    holder, key = draw.choice(list(places(value)))
    how = draw.choice(["set", "set", "remove", "add", "nest"])
    if how == "set":
        holder[key] = draw.choice(VALUES)
    elif how == "remove":
        del holder[key]
    elif how == "nest":
        for _ in range(draw.choice([1, 60])):
            holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        holder[draw.choice(["extra", "\x1b", "", "kind"])] = draw.choice(VALUES)
    else:
        holder.append(draw.choice(VALUES))
    return f"{how} {key!r:.40}"


def chained(events: list) -> str:
    """Lines of a chained file whose hashes are right, whatever the events hold."""
    previous, lines = runlog.GENESIS, []
    for event in events:
        previous = runlog.chain_hash(previous, event)
        end = f', "hash": "{previous}"}}' if isinstance(event, dict) else ""
        text = json.dumps(event, sort_keys=True)
        lines.append(text[:-1].removesuffix("{") + ("{" if text == "{}" else "") + end if end else text)
    return "".join(line + "\n" for line in lines)


def bend_chain(folder: Path, draw: random.Random) -> str:
    """Change a value of a chained file and chain it again."""
    path = draw.choice([p for p in files_of(folder) if p.suffix == ".jsonl"])
    events = [event for event, _ in runlog.read_links(path)]
    before = repr(events)
    while repr(events) == before:
        said = bend_value(events, draw)
    path.write_text(chained(events), encoding="utf-8")
    return f"{said} in {path.relative_to(folder)}"


def bend_json(folder: Path, draw: random.Random) -> str:
    """Change a value of a JSON file."""
    path = draw.choice([p for p in files_of(folder) if p.suffix == ".json"])
    value = json.loads(path.read_text())
    before = repr(value)
    while repr(value) == before:
        said = bend_value(value, draw)
    path.write_text(json.dumps(value))
    return f"{said} in {path.relative_to(folder)}"


# ----- running ----------------------------------------------------------------------------------------------

def judged(folder: Path) -> str:
    """What verify makes of a claim: "" if it is refused in printable lines; otherwise what is wrong with
    that."""
    begun = time.process_time()
    try:
        results = verify.verify(folder)
        said = [*results["problems"], *results["reasons"]]
        if results["verdict"] != "refused":
            return f"accepted ({results['verdict']})"
    except UserError as error:
        said = [str(error)]
    except Exception:
        return traceback.format_exc()
    if time.process_time() - begun > SECONDS:
        return f"took {time.process_time() - begun:.0f} s"
    odd = [line for line in said if not line.isprintable() or len(line) > 5000]
    return f"said {odd[0]!r:.300}" if odd else ""


def fuzzed(good: Path, place: Path, cases: int, seed: int = 0) -> Iterator[str]:
    """For each case "" or what is wrong with the answer to it."""
    before = {p.relative_to(good): p.read_bytes() for p in files_of(good)}
    for case in range(cases):
        draw = random.Random(f"{seed} {case}")
        folder = place / f"case{case}" / "claim"
        shutil.copytree(good, folder)
        bend = draw.choice([bend_tree, bend_bytes, bend_chain, bend_chain, bend_json])
        said = bend(folder, draw)
        plain = all(not p.is_symlink() and (p.is_dir() or p.is_file()) for p in folder.rglob("*"))
        same = plain and {p.relative_to(folder): p.read_bytes() for p in files_of(folder)} == before
        wrong = judged(folder) if not same or said.split()[0] in ("deep", "outside", "name") else ""
        shutil.rmtree(folder.parent)
        yield f"case {case} ({bend.__name__}: {said}): {wrong}" if wrong else ""


def main(cases: int, seed: int) -> int:
    """Fuzz a fresh good claim. Returns the exit code."""
    import tempfile

    import pytest
    from claim_builder import build, declaration, two_arms
    odd, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        good = build(Path(place) / "good", patch, declaration(two_arms()))
        assert verify.verify(good)["verdict"] == "shown"
        for wrong in fuzzed(good, Path(place), cases, seed):
            odd += bool(wrong)
            print(wrong, flush=True) if wrong else None
    print(f"{cases} structures, seed {seed}: {odd} not refused in one printable line, "
          f"{time.monotonic() - begun:.0f} s")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
