"""Laws of the house: what may import what, how long files, functions and lines may be, and that public parts
say what they do and of which types.

Files that do not keep a limit yet stand in house_debts.toml with their count, which may fall and never rise.
`python tests/test_house.py` writes the present counts there where they are lower.
"""

import ast
import functools
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEDGER = Path(__file__).parent / "house_debts.toml"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 900, 60, 110

# Rooms from the roof to the ground. A room is a folder or a file; it may import from the floors below and
# from its own floor.
FLOORS = [
    {"installation", "bench"},
    {"sweep", "records"},
    {"page"},
    {"sweeps"},
    {"evidence"},
    {"train_gpt", "sample"},
    {"system"},
    {"model", "optim"},
    {"layers", "updates", "schedule", "data", "runlog"},
    {"kernels"},
    {"settings"},
    {"common"},
]
HEIGHT = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}

# Tools start runs as processes and read logs, so they do not import what trains; these functions do, when
# they are called.
TOOLS = {"records", "evidence", "sweep", "sweeps", "page"}
TRAINS = {"train_gpt", "sample", "model", "optim", "layers", "updates"}
EXCEPTIONS = {
    "evidence.audit_model:__init__": "the audit calls the model of the audited code, in a process of its own",
    "evidence.audit_probe:clock": "the audit runs that code's trainer, in a process of its own",
    "evidence.model_facts:counted": "a log's number of parameters is held against the model of its settings",
    "evidence.run_laws:": "layers.specs, which has no torch, tells which layers a log speaks of",
    "sweeps.optimizers:state_bytes": "the table of rules tells the memory of each one's state",
    "page.variant_table:counted": "parameters and FLOPs are counted on the model",
}


# ----- reading the checkout

@functools.lru_cache
def files(tests: bool = False) -> tuple[str, ...]:
    """Python files of the program, or of its tests, in git or new."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True,
        check=True
    ).stdout.split()
    return tuple(
        sorted(file for file in set(listed) if file.startswith("tests/") == tests and (ROOT / file).exists())
    )


@functools.lru_cache
def text(file: str) -> str:
    """The text of a file of the checkout."""
    return (ROOT / file).read_text(encoding="utf-8")


@functools.lru_cache
def tree(file: str) -> ast.Module:
    """The syntax tree of a file of the checkout."""
    return ast.parse(text(file))


@functools.lru_cache
def modules() -> dict[str, str]:
    """File of each module by its name: data.shards -> data/shards.py."""
    return {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files()}


def targets(node: ast.AST) -> list[str]:
    """Modules of this project that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        below = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules() else node.module for name in below]
    else:
        names = []
    return [name for name in names if name in modules()]


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(imported module, name of the outermost function that imports it, or "") for each import of a
    module."""
    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            yield from ((name, function) for name in targets(child))
            named = isinstance(child, ast.FunctionDef) and not function
            yield from walk(child, child.name if named else function)

    yield from walk(tree(modules()[module]), "")


def room(module: str) -> str:
    """data.shards -> data."""
    return module.partition(".")[0]


# ----- imports

def test_every_room_has_its_floor():
    homeless = {room(module) for module in modules()} - HEIGHT.keys()
    assert not homeless, f"say in FLOORS on which floor these stand: {sorted(homeless)}"


def test_no_import_goes_up():
    upward = [f"{module} imports {name}" for module in modules() for name, _ in imports(module)
              if HEIGHT[room(module)] < HEIGHT[room(name)]]
    assert not upward


def test_no_circle_of_imports_not_even_inside_functions():
    above, done = [], set()

    def visit(module):
        assert module not in above, f"circle: {' -> '.join([*above[above.index(module):], module])}"
        if module not in done:
            above.append(module)
            for name in sorted({name for name, _ in imports(module)} - {module}):
                visit(name)
            above.pop()
            done.add(module)

    for module in modules():
        visit(module)


def test_tools_import_what_trains_only_where_it_is_said():
    found = {f"{module}:{function}" for module in modules() if room(module) in TOOLS
             for name, function in imports(module) if room(name) in TRAINS}
    assert found == EXCEPTIONS.keys()


# ----- sizes and prose

def functions(file: str) -> list[ast.AST]:
    """Every function and method of a file, inner ones too."""
    return [
        node for node in ast.walk(tree(file)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def long_file(file: str) -> int:
    """Lines of a file over the limit."""
    return max(0, len(text(file).splitlines()) - MAX_FILE_LINES)


def long_functions(file: str) -> int:
    """Functions over the limit."""
    return sum(node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES for node in functions(file))


def wide_lines(file: str) -> int:
    """Lines over the limit of columns."""
    return sum(len(line) > MAX_COLUMNS for line in text(file).splitlines())


def wide_code(file: str) -> int:
    """Lines over the limit of columns that are so without their strings: tests hold programs and messages as
    text."""
    wide = {i for i, line in enumerate(text(file).splitlines(), 1) if len(line) > MAX_COLUMNS}
    strings = [node for node in ast.walk(tree(file))
               if isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)]
    return len(wide - {i for node in strings for i in range(node.lineno, node.end_lineno + 1)})


def undocumented(file: str) -> int:
    """Public functions and classes of a module without a docstring."""
    parts = [node for node in tree(file).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return sum(not node.name.startswith("_") and not ast.get_docstring(node) for node in parts)


def untyped(file: str) -> int:
    """Public functions and methods without the types of all arguments and of the result.

    What Triton compiles is left out, because it reads the annotations, and autograd's functions, whose `ctx`
    has no type.
    """
    def methods(node):
        autograd = any(re.fullmatch(r"(.*\.)?Function", ast.unparse(base)) for base in node.bases)
        return [] if autograd else [part for part in node.body if isinstance(part, ast.FunctionDef)]

    body, left_out = tree(file).body, compiled_by_triton(file)
    parts = [(node, False) for node in body if isinstance(node, ast.FunctionDef)]
    parts += [(part, True) for node in body if isinstance(node, ast.ClassDef) for part in methods(node)]
    return sum(not typed(node, of_class) for node, of_class in parts
               if not re.match(r"_(?!_)", node.name) and node.name not in left_out)


def compiled_by_triton(file: str) -> set[str]:
    """Names of the functions that a file gives to triton.jit."""
    calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)
             and "triton.jit" in (ast.unparse(node.func), *map(ast.unparse, node.args))]
    return {name.id for call in calls for name in ast.walk(call) if isinstance(name, ast.Name)}


def typed(node: ast.FunctionDef, of_class: bool) -> bool:
    """Whether a function says the types of its arguments, but for `self`, and of its result."""
    named = [*node.args.posonlyargs, *node.args.args]
    static = any(ast.unparse(part) == "staticmethod" for part in node.decorator_list)
    if of_class and not static:
        named = named[1:]
    result = node.returns is not None or node.name == "__init__"
    return result and all(part.annotation for part in [*named, *node.args.kwonlyargs])


def packed_lines(file: str) -> int:
    """Lines with more than one statement."""
    packed = 0
    for node in ast.walk(tree(file)):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and body:  # a lambda's body is no list
                ends = [
                    0 if isinstance(node, ast.Module) else node.lineno,
                    *(part.end_lineno for part in body),
                ]
                packed += sum(end == part.lineno for end, part in zip(ends, body))
    return packed


def old_words(file: str) -> int:
    """Lines with words that are not plain English here: another word says the same."""
    return sum(bool(re.search(r"\b(shall|beside)\b", line)) for line in text(file).splitlines())


def unexplained(file: str) -> int:
    """Arguments of a command that its --help does not explain."""
    return sum(isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
               and "help" not in [keyword.arg for keyword in node.keywords] for node in ast.walk(tree(file)))


LIMITS = {
    rule.__name__: rule
    for rule in (long_file, long_functions, wide_lines, undocumented, untyped, packed_lines, unexplained,
                 old_words)
}


TESTS_KEEP = {rule.__name__: rule for rule in (long_file, wide_code)}


def allowed(debts: dict[str, int], file: str) -> int:
    """What the ledger grants a file: its own entry, or that of its folder (`system/`), otherwise nothing."""
    return debts.get(file, debts.get(file.partition("/")[0] + "/", 0) if "/" in file else 0)


def counts(rule: str) -> dict[str, int]:
    """What a rule finds, by file, without the files that keep it."""
    return {file: count for file in files() if (count := LIMITS[rule](file))}


@pytest.mark.parametrize("rule", LIMITS)
def test_no_file_exceeds_a_limit_or_its_debt(rule):
    debts = tomllib.loads(LEDGER.read_text(encoding="utf-8")).get(rule, {})
    over = {file: f"{count}, allowed {allowed(debts, file)}" for file, count in counts(rule).items()
            if count > allowed(debts, file)}
    assert not over, LIMITS[rule].__doc__


@pytest.mark.parametrize("rule", TESTS_KEEP)
def test_no_file_of_tests_exceeds_a_limit(rule):
    over = {file: count for file in files(tests=True) if (count := TESTS_KEEP[rule](file))}
    assert not over, TESTS_KEEP[rule].__doc__


def lowered() -> str:
    """The ledger with each debt at its present count where that is lower."""
    ledger = tomllib.loads(LEDGER.read_text(encoding="utf-8"))
    lines = ["# What exceeds a limit of test_house.py, by rule and file: it may fall, never rise. `python "
             "tests/test_house.py`",
             "# lowers it. A folder stands for each of its files that has no entry."]
    for rule in LIMITS:
        debts, found = ledger.get(rule, {}), counts(rule)
        kept = {
            file: min(count, found.get(file, 0)) for file, count in debts.items() if not file.endswith("/")
        }
        kept = {file: count for file, count in debts.items() if file.endswith("/")} | {
            f: n for f, n in kept.items() if n
        }
        lines += ["", f"[{rule}]", *(f'"{file}" = {count}' for file, count in sorted(kept.items()))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    LEDGER.write_text(lowered(), encoding="utf-8")
