"""Where the runs of a claim come from: settings that a record resolves to, code at a commit, tokens of a
corpus.

Each check is a generator of problems, one line each; what cannot be known here goes to `found.unknown`.
`found` is the evidence.claim_folder.Evidence of the claim folder. Nothing of a submission is executed: git is
only asked for the text of files.
"""

import ast
import collections
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runlog
import settings
from common import files, untrusted
from common.errors import UserError
from evidence import arms, foreign, manifest, plausible, stack
from evidence.claim_folder import Evidence
from evidence.run_laws import Log, alike, canonical
from settings import deltas, renames, scales, schema

SOURCES_LIMIT = 20_000_000  # bytes of an archive that are read
FLAGS = {"--revert": "revert", "--with": "with_", "--without": "without", "--set": "sets"}
RECORD_ARM = {"text": str, "record": str, "preset": str, "scale": str, "changes": list, "ml_hash": str,
              "system_hash": str, "settings": dict, "argv": list,
              "commit": (str, type(None)), "tree": (str, type(None))}
COMPILED = (".pyc", ".pyo", ".so", ".pyd", ".dll", ".dylib")
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "triton", "tiktoken", "huggingface_hub", "scipy",
                                       "matplotlib", "rich", "submitit", "sitecustomize", "usercustomize"}
MALFORMED = (UserError, TypeError, AttributeError, ValueError)


# ----- arms and records -------------------------------------------------------------------------------------

def check_arm(found: Evidence, name: str, arm: dict) -> Iterator[str]:
    """All runs of an arm are one program with the settings that were declared and that this checkout
    resolves."""
    if arm["kind"] == "script":
        found.unknown.append(f"what the script of arm {name} computed, on which data and with which settings")
        return
    bad = [k for k, types in RECORD_ARM.items() if not isinstance(arm.get(k), types)]
    if bad or not all(isinstance(x, str) for x in arm["changes"]):
        yield f"{manifest.NAME}: arm {name} lacks {', '.join(bad) or 'readable changes'}"
        return
    if arm["scale"] != found.declaration["scale"]:
        yield f"{manifest.NAME}: arm {name} has scale {arm['scale']}, declared {found.declaration['scale']}"
    for log in found.of(name):
        for key in ("record", "preset", "changes", "ml_hash", "system_hash"):
            if log.start[key] != arm[key]:
                yield f"{log.where}: {key} {log.start[key]!r}, arm {name} was declared with {arm[key]!r}"
        if canonical(log.start["settings"]) != canonical(arm["settings"]):  # 1 is neither 1.0 nor true
            paths = differing(log.start["settings"], arm["settings"])
            yield f"{log.where}: settings differ from those declared for arm {name}: {', '.join(paths)}"
    # a kernel that fell back in one run makes it another program
    for key in ("attention", "comm", "parameters"):
        yield from alike([(log.where, log.start[key]) for log in found.of(name)], f"{key} (arm {name})")
    yield from check_words(found, name, arm)
    yield from check_code(found, name, arm)
    yield from check_resolves(found, name, arm)


def check_words(found: Evidence, name: str, arm: dict) -> Iterator[str]:
    """The command line of a record's arm says its record, its scale and its changes, and nothing else."""
    if found.declaration["claim"] == "comparison":
        return
    changes = [word for x in arm["changes"] for word in x.split(" ", 1)]
    due = [arm["record"], *changes, "--scale", arm["scale"]]
    words = arm.get("argv")
    if words[:1] != due[:1] or pairs(words) != pairs(due):
        yield (f"{manifest.NAME}: arm {name} is started with {' '.join(map(str, words))!r:.80}, declared are "
               f"{' '.join(due)!r:.80}")


def pairs(words: list[str]) -> list[str]:
    """Options of a command line with their values, sorted: without order, and without spaces at the `=`."""
    return sorted(f"{a} {str(b).replace(' ', '')}" for a, b in zip(words[1::2], [*words[2::2], ""]))


def differing(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Paths at which two nested dicts of settings differ, whichever names they were written under."""
    if not prefix and isinstance(a, dict) and isinstance(b, dict):
        a, b = renames.present_settings(a), renames.present_settings(b)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if canonical(a) == canonical(b) else [prefix or "."]  # 1 is neither 1.0 nor true
    return [
        p for k in sorted({*a, *b}) for p in differing(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else k)
    ]


def check_resolves(found: Evidence, name: str, arm: dict) -> Iterator[str]:
    """The declared settings are what the record, its scale and its changes resolve to here."""
    scale, comparison = found.declaration["scale"], found.declaration["claim"] == "comparison"
    claimed = f"{arm['record']} at scale {scale}" + "".join(f" {c}" for c in arm["changes"])
    try:
        record, carried = known_record(found, arm["record"])
        if record is None and comparison:
            found.unknown.append(
                f"arm {name}: whether {claimed} has these settings: it is not in this checkout"
            )
            return
        if record is None:
            raise UserError("the record is neither in this checkout nor in record.toml of the claim")
        unknown = foreign.projected(arm["settings"])[1]
        if unknown:
            yield from check_foreign(found, name, arm, claimed, unknown)
            return
        resolved = (resolve_carried if carried else resolve_here)(record, scale, arm["changes"])
        paths = [p for p, _, _ in schema.difference(schema.from_plain(arm["settings"]), resolved)]
    except MALFORMED as error:
        yield f"arm {name}: {claimed} cannot be resolved here: {error}"
        return
    # two refs may be compared because a record changed
    if paths and comparison and arm.get("ref") is not None:
        found.unknown.append(
            f"arm {name}: {claimed} has other settings here than at {arm['ref']}: {', '.join(paths)}"
        )
    elif paths:
        yield f"arm {name}: {claimed} resolves to other settings here: {', '.join(paths)}"


def check_foreign(found: Evidence, name: str, arm: dict, claimed: str, unknown: list[str]) -> Iterator[str]:
    """Settings with words that this checkout lacks are what the code of the claim resolves, in a sandbox."""
    runs, digests = found.folder / "runs", {log.start["sources"] for log in found.of(name)}

    def archive():
        text, problem = read_sources(runs, min(digests, default=""))
        if problem:
            raise UserError(problem)
        return text

    answer, where = foreign.answer_of(found.folder, arm, archive)
    paths = differing(arm["settings"], answer["settings"])
    if paths:
        yield f"arm {name}: {claimed} resolves to other settings by {where}: {', '.join(paths)}"
    for key in ("ml_hash", "system_hash"):
        if answer.get(key) != arm[key]:
            yield f"arm {name}: {key} {arm[key]}, by {where} it is {str(answer.get(key))[:16]}"
    said = f"what {', '.join(unknown)} mean: this checkout does not know them, {where} does"
    if said not in found.unknown:
        found.unknown.append(said)


def resolve_here(record: deltas.Record, scale: str, changes: list[str]) -> settings.Settings:
    """Settings of a record with the changes of a command line, as this checkout resolves them."""
    given = collections.defaultdict(list)
    for change in changes:
        flag = change.partition(" ")[0]
        if flag not in FLAGS:
            raise UserError(f"unknown change {change!r}")
        given[FLAGS[flag]].append(renames.present_change(change).partition(" ")[2])
    return deltas.resolve(record.ref, scale=scale, **given).settings


def resolve_carried(record: deltas.Record, scale: str, changes: list[str]) -> settings.Settings:
    """Settings of a record that no folder of this checkout holds; only --set may change it (all else is for
    its delta)."""
    if scale not in scales.SCALES:
        raise UserError(f"unknown scale {scale!r}")
    s = scales.scaled(deltas.replay(deltas.chain(record), set())[0], scale)
    named = []
    for change in changes:
        flag, _, text = renames.present_change(change).partition(" ")
        if flag != "--set":
            raise UserError(f"{change}: a new record is claimed as it is, put this into its delta")
        path, value = schema.parse_assignment(text, "--set")
        s = schema.assign(s, path, value, "--set")
        named.append(path)
    return settings.check(scales.lifted(s, named))


def known_record(found: Evidence, ref: str | None) -> tuple[deltas.Record | None, bool]:
    """(Record or None, is it only in the claim folder?). The claim's record.toml must not contradict this
    checkout."""
    here, carried = known_here(ref), read_carried(found.folder, found.declaration["record"])
    if carried is None or not carried.answers(ref):
        return here, False
    if here is None:
        return carried, True
    same = {f.name for f in dataclasses.fields(here)} - {"folder", "slug"}  # both say where it lies
    if carried.ref != here.ref:  # a copy from before the attempt became a record
        same -= {"ref", "order", "attempt"}
    differ = sorted(k for k in same if getattr(carried, k) != getattr(here, k))
    if differ:
        raise UserError(f"record.toml of the claim and of {here.folder.name} differ in {', '.join(differ)}")
    return here, False


def known_here(ref: str | None) -> deltas.Record | None:
    """The Record of a ref in this checkout: of a lineage, or an attempt (which may have become a record
    since). Or None."""
    if not isinstance(ref, str) or not ref.startswith(deltas.ATTEMPT):
        return deltas.load_records().get(ref)
    try:
        return deltas.find_record(ref)
    except UserError:
        return None


def same_record(a: str | None, b: str | None) -> bool:
    """Do two refs name one record? An attempt that was promoted has two."""
    found = known_here(a)
    return a == b or (found is not None and found.answers(b))


def read_carried(folder: Path, ref: str | None) -> deltas.Record | None:
    """The Record of DIR/record.toml, or None. `ref` is the one that the manifest claims: lineage/id or
    attempts/name.

    A record that was promoted carries an id, and the name of the attempt that the manifest claims.
    """
    path = folder / "record.toml"
    if not path.exists() or not isinstance(ref, str):
        return None
    lineage, _, name = ref.partition("/")
    if lineage + "/" == deltas.ATTEMPT:
        lineage = lineage_of(path) or lineage
    record = deltas.read_record(path, lineage)
    # the folder may have been copied under another name
    if ref.startswith(deltas.ATTEMPT) and not record.attempt:
        record = dataclasses.replace(record, ref=ref, slug=name)
    if not record.answers(ref):
        raise UserError(f"record.toml has id {record.ref.partition('/')[2]!r}, the manifest claims {ref}")
    if record.parent is not None and record.parent not in deltas.load_records():
        raise UserError(f"parent {record.parent!r} of record.toml is not in this checkout")
    return record


def lineage_of(path: Path) -> str:
    """Lineage of a record.toml that says which attempt it was: that of its folder, elsewhere its parent's. ''
    for an attempt."""
    try:
        toml = untrusted.toml_file(path)[1]
    except UserError:
        return ""  # read_record says what is wrong
    if "attempt" not in toml:
        return ""
    above = path.absolute().parent.parent.name
    return above if above in deltas.LINEAGES else str(toml.get("parent")).partition("/")[0]


def last_ml(record: deltas.Record | None) -> deltas.Record | None:
    """The nearest of a record and its ancestors that changed what is computed at full scale: by ml_hash, not
    by `kind`."""
    while record is not None and record.parent is not None and same_result(record.ref, record.parent):
        record = deltas.load_records().get(record.parent)
    return record


def same_result(a: str, b: str) -> bool:
    """True if two records compute the same."""
    return len({schema.ml_hash(deltas.resolve(ref).settings) for ref in (a, b)}) == 1


def check_lineage(found: Evidence) -> Iterator[str]:
    """A claim runs the record it names against the parent that record names, all arms with the same changes
    or none."""
    d, where = found.declaration, manifest.NAME
    new, parent = d["arms"]["new"], d["arms"]["parent"]
    if new.get("record") != d["record"]:
        yield f"{where}: claims {d['record']}, arm new runs {new.get('record')}"
    try:
        record, carried = known_record(found, d["record"])
    except MALFORMED as error:
        yield f"record.toml: {error}"
        return
    if record is not None and found.folder.joinpath("record.toml").exists():
        yield from plausible.check_record(record)
    if record is not None and (carried or record.ref.startswith(deltas.ATTEMPT)):
        yield from plausible.check_new_record(record)
    yield from stack.check(found, record)
    if record is not None and parent.get("record") != record.parent:
        yield (
            f"{where}: arm parent runs {parent.get('record')}, the parent of {d['record']} is {record.parent}"
        )
    if "base" in d["arms"]:
        last = last_ml(deltas.load_records().get(parent.get("record")))
        if last is not None and d["arms"]["base"].get("record") != last.ref:
            yield (
                f"{where}: arm base runs {d['arms']['base'].get('record')}, the last ml record is {last.ref}"
            )
    for name, arm in d["arms"].items():
        free = d["scale"] == "full" and not all(stack.allowed(found, x) for x in arm.get("changes") or [])
        if arm.get("changes") and (free or arm["changes"] != new.get("changes")):
            changes = " ".join(map(str, arm["changes"]))
            yield (f"{where}: arm {name} runs with {changes}: a record runs as it is (below scale full all "
                   "arms may share changes)")


# ----- code -------------------------------------------------------------------------------------------------

def check_code(found: Evidence, name: str, arm: dict) -> Iterator[str]:
    """One commit per arm, clean for a record; its sources are there, hash right and are the files of that
    commit."""
    record_claim, logs, dirty = found.declaration["claim"] != "comparison", found.of(name), arm.get("dirty")
    for log in logs:
        code = log.start["code"]
        if code.endswith("-dirty") and (record_claim or not dirty):
            yield f"{log.where}: ran uncommitted changes (code {code[:12]}-dirty)"
        elif arm["commit"] is not None and code != arm["commit"] + ("-dirty" if dirty else ""):
            yield f"{log.where}: code {code[:12]}, arm {name} was declared at {arm['commit'][:12]}"
    if record_claim and (dirty or arm["commit"] is None):
        yield f"arm {name}: declared with " + (
            "uncommitted changes" if dirty else "code outside a git checkout, of no name"
        )
    elif dirty:
        yield from check_patch(found, name, arm)
    elif record_claim and not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(arm["tree"])):
        yield f"arm {name}: {arm['tree']!r:.50} is no tree of a commit"
    yield from alike([(log.where, log.start["sources"]) for log in logs], f"sources (arm {name})")
    for digest in sorted({log.start["sources"] for log in logs}):
        text, problem = read_sources(found.folder / "runs", digest)
        if problem:
            yield problem
            continue
        if record_claim:
            yield from check_whole(digest, text)
        if arm["commit"] and not dirty:
            yield from check_commit(found, name, arm, digest, text)


def check_patch(found: Evidence, name: str, arm: dict) -> Iterator[str]:
    """The uncommitted changes of a comparison's arm lie in the folder."""
    try:
        path = arms.patch_path(found.folder, arm)
        held = arms.hash_of(untrusted.bytes_of(path))
    except (UserError, TypeError, ValueError):
        held = None
    if held != arm["dirty"]:
        yield f"arm {name}: the patch of its uncommitted changes is missing or was changed"


def read_sources(runs: Path, digest: str) -> tuple[str | None, str]:
    """(text, problem) of the archive runs/sources-<digest>.txt or .txt.xz."""
    if not re.fullmatch("[0-9a-f]{16}", digest):
        return None, f"sources {digest!r:.40} is no hash of sources"
    for path in (runs / f"sources-{digest}.txt", runs / f"sources-{digest}.txt.xz"):
        if path.exists():
            read = untrusted.xz_of if path.suffix == ".xz" else untrusted.bytes_of
            try:
                text = untrusted.decoded(read(path, SOURCES_LIMIT), str(path))
            except UserError as error:
                return None, str(error).replace(f"{runs.parent}/", "")
            held = runlog.source_hash(text)
            return (
                text, "" if held == digest
                else f"runs/{path.name}: its text hashes to {held}: the sources were swapped"
            )
    return None, f"runs/sources-{digest}.txt: missing: the sources of the runs belong to the claim"


def check_commit(found: Evidence, name: str, arm: dict, digest: str, text: str) -> Iterator[str]:
    """The archive equals the files of the declared commit, where this repository has it."""
    commit = arm["commit"]
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", commit):
        yield f"arm {name}: {commit!r:.50} is no commit"
        return
    try:
        tree = arms.line("rev-parse", "--verify", "--quiet", commit + "^{tree}")
    except UserError:
        found.unknown.append(
            f"whether the sources of arm {name} are those of commit {commit[:12]}: this repository does "
            "not have it (fetch it)"
        )
        return
    if arm["tree"] != tree:
        yield f"arm {name}: tree {str(arm['tree'])[:12]}, commit {commit[:12]} has {tree[:12]}"
    yield from check_archive(commit, digest, text, name)


def check_archive(commit: str, digest: str, text: str, name: str) -> Iterator[str]:
    """The archive holds exactly the sources of a commit of this repository, byte for byte."""
    where = f"runs/sources-{digest}.txt"
    names = sections(text)
    tree = arms.line("ls-tree", "-r", "--name-only", commit).splitlines()
    held = set(tree)
    if odd := hidden_code(tree):
        yield f"{where}: commit {commit[:12]}: {odd}"
        return
    if extra := [n for n in names if n not in held]:
        yield f"{where}: holds a file that commit {commit[:12]} has not ({extra[0]})"
        return
    try:
        due = listed_sources(arms.git("show", f"{commit}:runlog.py").decode(), tree)
        whole = "".join(f"# ----- {n}\n{arms.git('show', f'{commit}:{n}').decode()}\n" for n in names)
    except (UserError, UnicodeDecodeError) as error:
        yield f"{where}: cannot be compared with commit {commit[:12]} ({error})"
        return
    if lacking := sorted(set(due or ()) - set(names)):
        yield f"{where}: leaves out {lacking[0]}, which commit {commit[:12]} runs through"
    elif added := [n for n in names if due is not None and n not in due]:
        yield f"{where}: adds {added[0]}, which is no source of commit {commit[:12]}"
    elif whole != text or "train_gpt.py" not in names:
        yield f"{where}: is not the code of commit {commit[:12]}, which arm {name} declares"


def hidden_code(names: list[str]) -> str:
    """Words for a file of a tree that runs in place of the source that a reader sees, or ''.

    Compiled code next to its sources runs instead of them, and a module in the top folder that has the name
    of a library runs instead of it, in a run but not in an audit, which has imported the libraries before.
    """
    for name in names:
        if name.endswith(COMPILED):
            return f"{name} is compiled code, whose source cannot be told"
        module = re.fullmatch(r"([^/]+?)(\.py|/__init__\.py)", name)
        if module and module[1] in LIBRARIES:
            return f"{name} has the name of a library, and would run in its place"
    return ""


def sections(text: str) -> list[str]:
    """Names of the files in an archive of sources, in order."""
    return re.findall(r"^# ----- ((?:[a-z0-9_]+/)?[a-z0-9_]+\.py)$", text, re.M)


def listed_sources(runlog_text: str, tree: list[str]) -> list[str] | None:
    """The files that a program's runlog.source_files names: its literals, read without running them.

    tree: all files of the program, for its folders. None where the function is written in another way.
    """
    try:
        function = next(n for n in ast.walk(ast.parse(runlog_text))
                        if isinstance(n, ast.FunctionDef) and n.name == "source_files")
        given = {n.targets[0].id: ast.literal_eval(n.value) for n in function.body
                 if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
        fixed, folders = list(given["fixed"]), tuple(given["folders"])
    except (StopIteration, SyntaxError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return [*fixed, *(n for folder in folders for n in sorted(tree)
                      if re.fullmatch(rf"{re.escape(str(folder))}/[^/.][^/]*\.py", n))]


@functools.lru_cache(maxsize=16)
def check_whole(digest: str, text: str) -> tuple[str, ...]:
    """Problems of an archive by itself, as a tuple: what its own runlog.py lists is there, nothing twice,
    nothing else. Its folders are known by the imports of the archive only; the commit tells them all."""
    where, names = f"runs/sources-{digest}.txt", sections(text)
    parts = dict(zip(names, re.split(r"^# ----- (?:[a-z0-9_]+/)?[a-z0-9_]+\.py\n", text, flags=re.M)[1:]))
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        return (f"{where}: holds {twice} twice",)
    due = listed_sources(parts.get("runlog.py", ""), names)
    if due is None:
        return (f"{where}: leaves out runlog.py, or its list of sources",)
    missing = set(due) | {n for body in parts.values() for n in imported(body, parts)}
    if missing := sorted(missing - set(names)):
        return (f"{where}: leaves out {missing[0]}, which it runs through",)
    extra = sorted(set(names) - set(due))
    return (f"{where}: adds {extra[0]}, which its runlog.py does not list",) if extra else ()


def imported(text: str, parts: dict[str, str]) -> Iterator[str]:
    """Files of the folders of an archive that a file imports: a/b.py of `import a.b`, `from a import b` and
    `from a.b import c`. A name that folder a's __init__.py speaks of itself is left out."""
    rooms = {n.partition("/")[0] for n in parts if "/" in n}
    for module, listed in re.findall(r"^[ \t]*from ([a-z_0-9.]+) import (\([^)]*\)|[^\n#]+)", text, re.M):
        room, dot, below = module.partition(".")
        if room in rooms and dot:
            yield f"{room}/{below}.py"
        elif room in rooms:
            own = set(re.findall(r"\w+", parts.get(f"{room}/__init__.py", "")))
            named = [x.split()[0] for x in listed.strip("() \n").split(",") if x.split()]
            yield from (f"{room}/{x}.py" for x in named if x not in own)
    for room, below in re.findall(r"^[ \t]*import ([a-z_0-9]+)\.([a-z_0-9]+)", text, re.M):
        if room in rooms:
            yield f"{room}/{below}.py"


def check_diff(found: Evidence) -> Iterator[str]:
    """code.diff is the difference of the two trees, recomputed where this repository has both."""
    d = found.declaration
    both = [d["arms"].get(name) for name in ("parent", "new")]
    if d["claim"] == "comparison" or any(a is None or a["kind"] != "record" for a in both):
        return
    trees, told = [a.get("tree") for a in both], d.get("code_diff")
    if told is not None and found.folder.joinpath("code.diff").exists() and held_diff(found.folder) != told:
        return  # claim_laws.check_artefacts says what is wrong with the file
    if (trees[0] == trees[1]) != (told is None):
        yield ("code.diff: the arms run " + ("one tree, and a difference is declared" if told is not None else
                                             "two trees, and no difference is declared"))
        return
    if trees[0] == trees[1]:
        sources = {log.start["sources"] for name in ("parent", "new") for log in found.of(name)}
        if len(sources) > 1:
            yield f"{manifest.NAME}: the arms declare one tree, and their runs have different sources"
        return
    try:
        for tree in trees:
            arms.line("rev-parse", "--verify", "--quiet", "--end-of-options", f"{tree}^{{tree}}")
        fresh = arms.code_diff(*both)
        held = untrusted.bytes_of(found.folder / "code.diff").decode("utf-8", "replace")
    except UserError:
        found.unknown.append("whether code.diff is the difference of the arms' code: this repository does "
                             "not "
                             "have both trees")
        return
    if plain_diff(held) != plain_diff(fresh):
        yield (f"code.diff: is not the difference of the trees {trees[0][:12]} and {trees[1][:12]}, which "
               "this "
               "repository has")


def held_diff(folder: Path) -> str:
    """Hash of the code.diff of a folder, or '' of one that cannot be read."""
    try:
        return arms.hash_of(untrusted.bytes_of(folder / "code.diff"))
    except UserError:
        return ""


def plain_diff(text: str) -> list[str]:
    """A difference without the lines that depend on the repository: abbreviated hashes of files."""
    return [x.rstrip() for x in text.splitlines() if not x.startswith("index ")]


# ----- tokens -----------------------------------------------------------------------------------------------

def check_corpus(found: Evidence) -> Iterator[str]:
    """One corpus and one validation set; their digests are right where this checkout knows them by name."""
    logs = list(found.logs.values())
    for key in ("corpus", "val_digest"):
        yield from alike([(log.where, log.start[key]) for log in logs], key)
    # runs of different length read different numbers of shards
    prefixes = found.declaration.get("corpus_prefixes")
    if isinstance(prefixes, list) and all(log.start["corpus_digest"] in prefixes for log in logs):
        for name in found.declaration["arms"]:
            yield from alike(
                [(log.where, log.start["corpus_digest"]) for log in found.of(name)], "corpus_digest"
            )
    else:
        yield from alike([(log.where, log.start["corpus_digest"]) for log in logs], "corpus_digest")
    for log in logs:
        if log.settings is not None:
            yield from check_tokens(found, log)


def check_tokens(found: Evidence, log: Log) -> Iterator[str]:
    """Law: digests of a log's tokens are those of the corpus that it names, where they are pinned here."""
    corpus = log.start["corpus"]
    try:
        known = known_digests(corpus, log.settings.validation.tokens)
    except UserError as error:
        known, why = None, str(error)
    else:
        why = "its digests are not pinned here"
    text = f"whether the tokens are those of the corpus {corpus}: {why}"
    if known is None and text not in found.unknown:
        found.unknown.append(text)
    for name, digest in (known or {}).items():
        if log.start[name] != digest:
            yield (
                f"{log.where}: {name} {log.start[name][:12]}, that of the corpus {corpus!r} is "
                f"{digest[:12]}: other tokens"
            )


def known_digests(corpus: str, validation_tokens: int) -> dict[str, str] | None:
    """{corpus_digest, val_digest} of a corpus that this program carries itself, or None."""
    if corpus != "sample":
        return None
    from data.corpus import sample_corpus
    from data.shards import corpus_digest, val_digest
    sample = sample_corpus(files.default_cache())
    return {"corpus_digest": corpus_digest(sample, 1), "val_digest": val_digest(sample, validation_tokens)}
