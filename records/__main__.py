"""The `records` command: list, show, diff, features, plot.

    python -m records list
    python -m records show short/9 [--scale tiny] [--params]
    python -m records diff short/5 short/9
    python -m records features [WORD]
    python -m records plot runs/...
"""

import argparse
import json
import signal

import deltas
from settings import SCALES, UserError


def tiny_loss(record):
    """Final validation loss of the committed tiny run, or ''."""
    path = record.folder / "tiny" / "summary.json"
    return f"{json.loads(path.read_text())['val_loss']:.3f}" if path.exists() else ""


def list_records(options):
    """One line per record: what, when, who, published minutes, evidence."""
    if options.markdown:
        print("| record | minutes | loss | tiny | date | by | what |\n|---|---|---|---|---|---|---|")
        for r in deltas.load_records().values():
            p = r.published
            print(f"| {r.ref} | {p.get('minutes', '')} | {p.get('val_loss', '')} | {tiny_loss(r)} | {r.date} | "
                  f"{', '.join(r.people)} | {r.title} |")
        return
    print(f"{'record':10} {'minutes':>7} {'loss':>7} {'tiny':>6}  {'date':10} {'badge':8} {'kind':9} title")
    for r in deltas.load_records().values():
        p = r.published
        print(f"{r.ref:10} {p.get('minutes', ''):>7} {p.get('val_loss', ''):>7} {tiny_loss(r):>6}  {r.date:10} {r.badge:8} "
              f"{r.kind:9} {r.title} ({', '.join(r.people)})")
    for name in deltas.preset_names():
        fixed, _ = deltas.load_preset(name)
        print(f"{name:10} preset: {fixed['name']} at scale {fixed['scale']}, frozen, with its own target")


def show(options):
    """Delta, facts and, with --scale, what becomes of each line there."""
    r = deltas.find_record(options.record)
    resolved = deltas.resolve(r.ref, scale=options.scale)
    print(f"{r.ref}  {r.title}\n{r.date}  {', '.join(r.people)}  kind {r.kind}  reproduces {r.source}  badge {r.badge}")
    print(f"parent {r.parent or 'none (the defaults of settings.py)'}")
    if r.subsumed:
        print(f"subsumed: {r.subsumed}")
    if r.notes:
        print(r.notes)
    if r.delta:
        print("\ndelta:")
    for path, value in r.delta.items():
        print(f"  {path} = {deltas.show(value)}" + effect_at(r, path, options.scale))
    print("\npublished: " + ", ".join(f"{k} {v}" for k, v in r.published.items()))
    print(f"ml_hash {deltas.ml_hash(resolved.settings)} at scale {options.scale}")
    if options.params:
        from records.plan import parameters
        print(f"{parameters(resolved.settings):,} parameters")


def effect_at(record, path, scale):
    """'  [active]', or inert / distorted: whether a delta line still does what it does at full scale."""
    if scale == "full":
        return ""
    full = deltas.resolve(record.ref).settings
    small = deltas.resolve(record.ref, scale=scale).settings
    before_full = deltas.replay(deltas.chain(record)[:-1], set())[0]
    parent = deltas.resolve(record.parent, scale=scale).settings if record.parent else type(small)()
    now, was = deltas.lookup(small, path), deltas.lookup(parent, path)
    if now == was:
        return "  [inert]" if deltas.lookup(full, path) != deltas.lookup(before_full, path) else "  [unchanged]"
    return "  [active]" if now == deltas.lookup(full, path) else f"  [distorted: {deltas.show(now)} here]"


def diff(options):
    """Every setting in which two records differ, and who set it."""
    a, b = (deltas.resolve(name, scale=options.scale) for name in (options.left, options.right))
    rows = deltas.difference(a.settings, b.settings)
    for path, left, right in rows:
        print(f"{path:40} {deltas.show(left):>24} -> {deltas.show(right)}{setter(path, b)}")
    if not rows:
        print("no setting differs")


def setter(path, resolved):
    links = deltas.chain(resolved.record)
    found = [r.ref for r in links if path in r.delta or any(x in r.delta for x in deltas.prefixes(path))]
    return f"  ({found[-1]})" if found else ""


def features(options):
    """Every setting of the vocabulary: meaning, unit, since when, what --without does, what it needs."""
    since = {}
    for r in deltas.load_records().values():
        for path, value in r.delta.items():
            for p in [path, *(f"{path}.{k}" for k in (value if isinstance(value, dict) else ()))]:
                since.setdefault(p, r.ref)
    shown = [f for f in deltas.schema().values() if "." in f.path and (f.optional or not f.is_section)]
    shown = [f for f in shown if options.word is None or options.word in f.path or options.word in f.metadata["doc"]]
    if not shown:
        raise UserError(f"no setting mentions {options.word!r}{deltas.near(options.word, list(deltas.schema()))}")
    for f in shown:
        m = f.metadata
        default = "off" if f.default is None else deltas.show(f.default)
        off = "off" if f.optional else {deltas.REFUSE: "refused", deltas.BEFORE: "value before its record"}.get(
            m["off"] if isinstance(m["off"], str) else None, deltas.show(m["off"]))
        facts = [f"default {default}"] + ([m["unit"]] if m["unit"] else [])
        facts += [f"since {since[f.path]}"] if f.path in since else []
        facts += [f"--without: {off}"] + ([f"needs {m['needs']}"] if m["needs"] else [])
        print(f"{f.path}{'  *' if f.is_feature else ''}\n    {m['doc']}\n    [{'; '.join(facts)}]")
    print("\n* a feature: --with and --without turn it on and off")


def plot(options):
    from records.plot import plot
    print(f"plot: {plot(options.runs, options.out)}")


def parser():
    p = argparse.ArgumentParser(prog="python -m records", description="The records of the speedrun.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run):
        c = commands.add_parser(name, help=run.__doc__.splitlines()[0] if run.__doc__ else "curves of runs as a PNG")
        c.set_defaults(run=run)
        return c

    c = command("list", list_records)
    c.add_argument("--markdown", action="store_true", help="the table of the README")
    c = command("show", show)
    c.add_argument("record")
    c.add_argument("--scale", choices=list(SCALES), default="full")
    c.add_argument("--params", action="store_true", help="count parameters (imports torch)")
    c = command("diff", diff)
    c.add_argument("left")
    c.add_argument("right")
    c.add_argument("--scale", choices=list(SCALES), default="full")
    c = command("features", features)
    c.add_argument("word", nargs="?", help="show only settings that mention this word")
    c = command("plot", plot)
    c.add_argument("runs", nargs="+", help="run folders")
    c.add_argument("--out", help="PNG to write (default curve.png in the first folder)")
    return p


def main(argv=None):
    options = parser().parse_args(argv)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `records features | head` ends quietly
    try:
        options.run(options)
    except UserError as error:
        deltas.fail(error)


if __name__ == "__main__":
    main()
