"""The `records` command. What only reads the records is here; judging, comparing and verifying have modules
of their own.

    python -m records list | show short/9 | diff short/5 short/9 | features [WORD]
    python -m records plot | watch | export | judge | compare | submit | promote | withdraw | verify | audit
    python -m records replay | task | referee | variants | leaderboard
"""

from common import environment  # first: refuses a Python that is too old

import argparse
import contextlib
import importlib
import inspect
import json
import re
import sys
from typing import NoReturn

from common import arguments, console, errors, lines
from common.errors import UserError
from common.interrupt import INTERRUPTED
from settings import deltas, renames, schema
from settings.scales import SCALES

# Commands whose output is all there is to them: it heeds the terminal's width, and is an error if it is lost.
PRODUCTS = ("list", "show", "diff", "features", "judge")
VARIANTS = "variants/"  # refs of this project's own branches, listed apart: nothing is published about them


def tiny_loss(record: deltas.Record) -> str:
    """Final validation loss of the committed tiny run, or of the parent's where both compute the same, or
    ''."""
    path = record.folder / "tiny" / "summary.json"
    if path.exists():
        return f"{json.loads(path.read_text(encoding='utf-8'))['val_loss']:.3f}"
    parent = deltas.load_records().get(record.parent)
    same = parent and all(p.startswith("system.") for p in record.delta)
    return tiny_loss(parent) if same else ""


def list_records(options: argparse.Namespace) -> None:
    """One line per record: what, when, who, published minutes, evidence; then one per variant: what and on
    which parent."""
    everything = deltas.load_records().values()
    records = [r for r in everything if not r.ref.startswith(VARIANTS) and not r.claimed]
    variants = [r for r in everything if r.ref.startswith(VARIANTS)]
    columns = lines.room()
    # a narrow terminal: without badge and kind, which `show` tells
    brief = columns is not None and columns < 100

    def row(*cells):
        left = "{:10} {:>7} {:>7} {:>6}  {:10}".format(*cells[:5])
        left += "" if brief else " {:8} {:9}".format(*cells[5:7])
        title = cells[-1] if columns is None else lines.clipped(cells[-1], columns - len(left) - 1)
        print(f"{left} {title}")

    row("record", "minutes", "loss", "tiny", "date", "badge", "kind", "title")
    for r in records:
        p = r.published
        row(r.ref, p.get("minutes", ""), p.get("val_loss", ""), tiny_loss(r), r.date, r.badge, r.kind,
            f"{r.title} ({', '.join(r.people)})")
    for name in deltas.preset_names():
        fixed, _ = deltas.load_preset(name)
        print(f"{name:10} preset: {fixed['name']} at scale {fixed['scale']}, frozen, with its own target")
    list_claims([r for r in everything if r.claimed], columns)
    if variants:
        print(f"\n{'variant':12} {'parent':10} {'tiny':>6}  {'date':10} {'badge':8} {'kind':9} title")
    for r in variants:
        left = f"{r.ref:12} {r.parent or 'none':10} {tiny_loss(r):>6}  {r.date:10} {r.badge:8} {r.kind:9}"
        print(f"{left} {r.title if columns is None else lines.clipped(r.title, columns - len(left) - 1)}")
    list_attempts(columns)


def list_claims(claims: list[deltas.Record], columns: int | None) -> None:
    """One line per claimed result, with its author's figures: steps, mean loss, number of runs."""
    if claims:
        print(f"\n{'claimed':16} {'steps':>6} {'loss':>8} {'runs':>5}  {'date':10} {'badge':8} title")
    for r in claims:
        p = r.published
        left = (f"{r.ref:16} {p.get('steps', ''):>6} {p.get('mean', p.get('val_loss', '')):>8.6} "
                f"{p.get('runs', ''):>5}  {r.date:10} {r.badge:8}")
        title = f"{r.title} ({', '.join(r.people)})"
        print(f"{left} {title if columns is None else lines.clipped(title, columns - len(left) - 1)}")


def list_attempts(columns: int | None) -> None:
    """One line per attempt: parent, where it stands, what; or why its record.toml cannot be read."""
    names = deltas.attempt_names()
    if not names:
        return
    from evidence import attempts
    print(f"\n{'attempt':24} {'parent':10} {'claim':14} title")
    for name in names:
        standing = attempts.status(deltas.ATTEMPTS / name)
        try:
            record = deltas.find_attempt(name)
        except UserError as error:  # one broken file hides no other
            print(f"{deltas.ATTEMPT + name:24} {'':10} {standing:14} {error}")
            continue
        left = f"{record.ref:24} {record.parent:10} {standing:14}"
        title = record.title if columns is None else lines.clipped(record.title, columns - len(left) - 1)
        print(f"{left} {title}")


def show(options: argparse.Namespace) -> None:
    """Delta, facts and, with --scale, what becomes of each line there; of a preset its own lines first."""
    resolved = deltas.resolve_name(options.record, scale=options.scale)
    r, scale = resolved.record, resolved.scale
    if resolved.preset:
        show_preset(resolved)
    print(f"{r.ref}  {r.title}\n{r.date}  {', '.join(r.people)}  kind {r.kind}  reproduces {r.source}  badge "
          f"{r.badge}")
    if r.claimed:
        print("claimed: the figures are its author's, and it is no record of its lineage")
    print(f"parent {r.parent or 'none (the defaults of settings/)'}")
    if r.subsumed:
        print(f"subsumed: {r.subsumed}")
    if r.notes:
        print(r.notes)
    if r.delta:
        print("\ndelta:")
    for path, value in r.delta.items():
        print(f"  {path} = {schema.show(value)}" + effect_at(r, path, scale))
    print("\npublished: " + (", ".join(f"{k} {v}" for k, v in r.published.items()) or "nothing"))
    print(f"ml_hash {schema.ml_hash(resolved.settings)} at scale {scale}")
    if options.params:
        from system.dry_run import size
        print(size(resolved.settings))


def show_preset(resolved: deltas.Resolved) -> None:
    """The lines that a preset adds to its record."""
    fixed, pinned = deltas.load_preset(resolved.preset)
    print(f"{resolved.preset}  preset: {fixed['name']} at scale {fixed['scale']}, frozen at ml_hash "
          f"{pinned}, and")
    for line in fixed["sets"]:
        path, value = schema.parse_assignment(line, "set")
        print(f"  {path} = {schema.show(value)}")
    print()


def effect_at(record: deltas.Record, path: str, scale: str) -> str:
    """'  [active]', or inert / distorted: whether a delta line still does what it does at full scale."""
    if scale == "full":
        return ""
    full = deltas.resolve(record.ref).settings
    small = deltas.resolve(record.ref, scale=scale).settings
    before_full = deltas.replay(deltas.chain(record)[:-1], set())[0]
    parent = deltas.resolve(record.parent, scale=scale).settings if record.parent else type(small)()
    now, was = deltas.lookup(small, path), deltas.lookup(parent, path)
    if now == was:
        return (
            "  [inert]" if deltas.lookup(full, path) != deltas.lookup(before_full, path) else "  [unchanged]"
        )
    return "  [active]" if now == deltas.lookup(full, path) else f"  [distorted: {schema.show(now)} here]"


def diff(options: argparse.Namespace) -> None:
    """Every setting in which two records or presets differ, and who set it.

    Without --scale a record next to a preset is taken at the preset's scale.
    """
    names, presets = (options.left, options.right), deltas.preset_names()
    frozen = {name: deltas.load_preset(name)[0]["scale"] for name in names if name in presets}
    scale = options.scale or next(iter(frozen.values()), None)
    a, b = (deltas.resolve_name(name, scale=options.scale if name in frozen else scale) for name in names)
    if frozen and not options.scale:
        print(f"{options.left} at scale {a.scale}, {options.right} at scale {b.scale}")
    rows = schema.difference(a.settings, b.settings)
    narrow = lines.room() is not None  # columns no wider than what they hold
    wide = max((len(path) for path, *_ in rows), default=0) if narrow else 40
    middle = min(24, max((len(schema.show(left)) for _, left, _ in rows), default=0)) if narrow else 24
    for path, left, right in rows:
        print(f"{path:{wide}} {schema.show(left):>{middle}} -> {schema.show(right)}{setter(path, b)}")
    if not rows:
        print("no setting differs")


def setter(path: str, resolved: deltas.Resolved) -> str:
    """Which record or preset gave a setting its value, as a short note."""
    if resolved.preset and path in [
        line.partition("=")[0] for line in deltas.load_preset(resolved.preset)[0]["sets"]
    ]:
        return f"  ({resolved.preset})"
    links = deltas.chain(resolved.record)
    found = [r.ref for r in links if path in r.delta or any(x in r.delta for x in schema.prefixes(path))]
    return f"  ({found[-1]})" if found else ""


# ----- features ---------------------------------------------------------------------------------------------

def features(options: argparse.Namespace) -> None:
    """Every setting of the vocabulary, by section: meaning, values, default, since when, what --without
    does."""
    first = first_setters()
    shown = [f for f in schema.fields().values() if mentions(f, options.word)]
    if not shown:
        if (present := renames.present_path(options.word)) in schema.fields():
            raise UserError(f"{options.word} is now called {present}")
        near = errors.near(options.word, list(schema.fields()))
        raise UserError(f"no setting mentions {options.word!r}{near}")
    for section in (f for f in schema.fields().values() if f.is_section):
        own = [f for f in shown if not f.is_section and schema.above(f.path) == section.path]
        if section in shown or own:
            print_section(section, first, whole=section in shown)
        for i, f in enumerate(own):
            print("\n" * (i == 0) + f"  {f.path}{' *' if f.is_feature else ''}")
            print(f"      {sentence(f.metadata['doc'])}\n      [{facts(f, first)}]")
    print("\n* a feature: --with and --without turn it on and off")


def mentions(f: schema.Field, word: str | None) -> bool:
    """True if a word occurs in a setting's path or text, in any case; without a word always."""
    text = f"{f.path} {f.metadata['doc']} {f.type.__doc__ if f.is_section else ''}"
    return word is None or word.casefold() in text.casefold()


def first_setters() -> dict[str, str]:
    """Path -> ref of the first record that set it."""
    first = {}
    for r in deltas.load_records().values():
        for path, value in r.delta.items():
            for p in [path, *(f"{path}.{k}" for k in (value if isinstance(value, dict) else ()))]:
                first.setdefault(p, r.ref)
    return first


def print_section(f: schema.Field, first: dict[str, str], whole: bool) -> None:
    """The heading of a section. whole: with its explanation, not only its sentence."""
    explanation = inspect.cleandoc(f.type.__doc__).split("\n\n") if whole else []
    paragraphs = [" ".join(p.split()) for p in explanation]
    name = re.split(r"[:;.(]", f.metadata["doc"])[0].strip()
    if not paragraphs or name.casefold() not in paragraphs[0].casefold():  # an explanation may say it all
        paragraphs.insert(0, sentence(f.metadata["doc"]))
    print(f"\n{f.path}{' *' if f.is_feature else ''}")
    for paragraph in paragraphs:
        print("  " + paragraph)
    if f.optional:
        print(f"  [{facts(f, first)}]")


def sentence(text: str) -> str:
    """A text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def facts(f: schema.Field, first: dict[str, str]) -> str:
    """Values, unit, default, since when, what --without does, and conditions of a setting, in one line."""
    m = f.metadata
    named = {deltas.REFUSE: "refused", deltas.BEFORE: "the value before its record"}
    off = "off" if f.optional else named.get(m["off"]) if isinstance(m["off"], str) else schema.show(m["off"])
    parts = ["on or off" if f.is_section else schema.values_text(f)]
    parts += [f"unit {m['unit']}"] if m["unit"] else []
    parts += [f"default {'off' if f.default is None else schema.show(f.default)}"]
    parts += [f"since {first[f.path]}"] if f.path in first else []
    parts += [f"--without: {off}"]
    parts += [f"needs {m['needs']}"] if m["needs"] else []
    parts += [f"no effect with {m['idle']}"] if m["idle"] else []
    return "; ".join(parts)


# Commands with a module of their own (arguments(parser), run(options) -> exit code), imported only
# when they are called, because some need numpy, scipy or matplotlib.
MODULES = {
    "plot": ("page.plot", "curves of runs as a picture, by steps, tokens or time"),
    "watch": ("page.watch", "runs in the terminal while they train, several over each other"),
    "export": ("page.export", "a checkpoint as safetensors, curves of runs as CSV"),
    "judge": ("evidence.judge", "every published record judged again from its raw runs"),
    "compare": ("evidence.compare", "arms against each other, interleaved on this machine"),
    "submit": ("evidence.submit", "try an idea: declare, run, verify and write up a claim in attempts/"),
    "promote": ("evidence.promote", "make a record of an attempt whose claim is shown"),
    "withdraw": ("evidence.withdraw", "give up an attempt, or a promoted record that nothing is built on"),
    "verify": ("evidence.verify", "check a claim from its logs alone"),
    "audit": ("evidence.audit", "test the code at a git ref in a process of its own"),
    "replay": ("evidence.replay", "run again what a log describes, and compare"),
    "task": ("evidence.task", "write a task for a program: improve on a record, with hints or without"),
    "referee": ("evidence.referee", "one JSON verdict on a candidate for a task, run in the sandbox"),
    "variants": (
        "page.variant_table",
        "the table of docs/variants.md: sizes, FLOPs, step times, losses (imports torch)",
    ),
    "leaderboard": ("page.leaderboard", "write the index, LINEAGE.md and the page from the committed data"),
}


LEGEND = (  # of the words of `records list` and `records show`
    "minutes, loss: as published. tiny: loss of the runs at that scale here. badge: spec, written from the "
    "record's description; math, equal to the original in float64; numerics, GPU precision checked; trained, "
    "trained at full scale. kind: ml (another computation), systems (the same one, faster), both, retiming "
    "(timed again), baseline. At a scale a line of a delta is active, inert (it changes nothing there) or "
    "distorted (it has another value there)."
)


def parser(command: str | None = None) -> arguments.Parser:
    """The parser of all commands; only the module of `command` is imported."""
    p = arguments.Parser(prog="python -m records", description="The records of the speedrun.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, help, epilog=None):
        c = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=epilog)
        c.set_defaults(run=run)
        return c

    add("list", list_records, "one line per record: what, when, who, published minutes, evidence", LEGEND)
    c = add("show", show, "a record's delta and facts and, with --scale, what becomes of each line there",
            LEGEND)
    c.add_argument("record", help="a record or a preset (tiny-v3)")
    c.add_argument("--scale", choices=list(SCALES), help="default: full, or that of the preset")
    c.add_argument("--params", action="store_true", help="count parameters and FLOPs (imports torch)")
    c = add("diff", diff, "every setting in which two records differ, and who set it")
    c.add_argument("left", help="a record or a preset (tiny-v3)")
    c.add_argument("right", help="a record or a preset")
    c.add_argument("--scale", choices=list(SCALES), help="default: full, or that of the preset")
    c = add("features", features, "the whole vocabulary: meaning, values, since when, what --without does")
    c.add_argument("word", nargs="?", help="show only settings that mention this word")
    for name, (path, help) in MODULES.items():
        c = add(name, None, help)
        if name == command:
            module = importlib.import_module(path)
            module.arguments(c)
            c.set_defaults(run=module.run)
    return p


def main(argv: list[str] | None = None) -> NoReturn:
    """The `records` command."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parser(argv[0] if argv else None).parse_args(argv)
        product = options.command in PRODUCTS
        fits = product and not getattr(options, "markdown", False)
        with lines.fitted() if fits else contextlib.nullcontext():
            code = options.run(options) or 0
        sys.exit(console.settle(code) if product else code)
    except UserError as error:
        console.fail(error)
    except OSError as error:
        console.fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        console.fail("interrupted", INTERRUPTED)
    except ImportError as error:
        console.fail(environment.without(error))


if __name__ == "__main__":
    console.program(main)
