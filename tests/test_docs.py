"""Laws of README.md and docs/: commands are ones that the parsers take, links and settings exist, generated
parts are where they belong."""

import re
import shlex
from pathlib import Path

import pytest

import sample
import sweep
from common.errors import UserError
from data import fineweb, tokenize
from evidence import arms
from installation import run as run_script
from records import __main__ as records_command
from settings import deltas, schema
from system import command_line

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "data/README.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = {
    "sweep.py": sweep.parser, "sample.py": sample.parser, "data.tokenize": tokenize.parser,
    "data.fineweb": fineweb.parser
}
STARTS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python |torchrun |\./run\.sh|\./test\.sh|bench/\w+\.sh|tests/\w+\.sh)"
)
INDENTED = re.compile(r"^    (?:\$ )?(.+)$", re.M)


def code(text: str) -> str:
    """The lines of a page's code blocks, indented or fenced, continued lines joined."""
    fenced = "\n".join(block for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    return "\n".join([*INDENTED.findall(text.replace("\\\n", " ")), fenced])


def commands(text: str) -> list[str]:
    """The commands in the code blocks of a page."""
    return [line.strip() for line in code(text).splitlines() if STARTS.match(line.strip())]


def mentions(text: str) -> list[str]:
    """The commands between backticks in the prose of a page."""
    prose = re.sub(r"^    .*$", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return [line for line in re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", prose)) if STARTS.match(line)]


def words_of(command: str) -> list[str]:
    """The words of a command without a comment and without the variables that it sets."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def check_record(name: str, **changes) -> None:
    """Refuse a record that cannot be resolved; attempts in the pages are a reader's own."""
    if not name.startswith(deltas.ATTEMPT):
        deltas.resolve_name(name, **changes)


def check_trainer(args: list[str]) -> None:
    o = command_line.parser().parse_args(args)
    if o.record is not None:
        check_record(o.record, scale=o.scale, sets=o.sets, with_=o.with_, without=o.without, revert=o.revert)


def check_records(args: list[str]) -> None:
    o = records_command.parser(args[0]).parse_args(args)
    for name in [getattr(o, "left", None), getattr(o, "right", None), getattr(o, "record", None)]:
        if name and o.command in ("show", "diff", "audit", "submit"):
            check_record(name)
    for arm in map(arms.parse, o.arms if o.command == "compare" else []):
        if arm.kind == "record":
            changes = command_line.parser().parse_args(list(arm.argv))
            check_record(
                changes.record, scale=o.scale, sets=changes.sets, with_=changes.with_,
                without=changes.without, revert=changes.revert
            )


def check_sweep(args: list[str]) -> None:
    o = sweep.parser().parse_args(args)
    if o.kind in ("ablate", "axis"):
        check_record(o.base, scale=o.scale)
    for axis in getattr(o, "axes", ()):
        schema.find_field(axis.partition("=")[0])


def check_program(program: str, args: list[str]) -> None:
    """One program of the checkout with its arguments; a program without `parser` must at least name the
    options."""
    if program == "train_gpt.py":
        return check_trainer(args)
    if program == "records":
        return check_records(args)
    if program == "sweep.py":
        return check_sweep(args)
    if program in PROGRAMS:
        PROGRAMS[program]().parse_args(args)
        return None
    texts = [(ROOT / program).read_text()] + [
        (ROOT / "bench" / name).read_text() for name in ("report.py", "steps.py")
    ]
    for option in (a.partition("=")[0] for a in args if a.startswith("--")):
        assert any(f'add_argument("{option}"' in text for text in texts), f"{program} takes no {option}"
    return None


def check_command(command: str, bare: bool = False) -> None:
    """bare: a program or a subcommand may be named without its arguments."""
    words = words_of(command)
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[0] == "python":
        module = words[1] == "-m"
        program, args = (words[2], words[3:]) if module else (words[1], words[2:])
        where = ROOT / (program.replace(".", "/") if module else program)
        assert where.is_file() or where.with_suffix(".py").is_file() or (where / "__main__.py").is_file(), (
            program
        )
        if bare and program == "records" and len(args) == 1:
            assert args[0] in [*records_command.MODULES, "list", "show", "diff", "features"], command
        elif args or not bare:
            check_program(program, args)
    elif words[0] == "torchrun":
        if not bare or "train_gpt.py" in words:
            check_trainer(words[words.index("train_gpt.py") + 1:])
    elif words[0] == "./run.sh":
        run_script.read(words[1:])
    else:
        assert (ROOT / words[0]).is_file(), words[0]


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent != ROOT / "data" else "data"
)
def test_every_command_of_a_page_is_one_that_its_program_takes(page, capsys):
    text = page.read_text()
    for command in [*commands(text), *mentions(text)]:
        try:
            check_command(command, bare=command in mentions(text))
        except (SystemExit, UserError) as error:
            pytest.fail(f"{page.name}: {command}: {error} {capsys.readouterr().err}")


def test_a_command_that_its_program_does_not_take_is_found(capsys):
    for wrong in (
        "python train_gpt.py short/11 --scales tiny", "python train_gpt.py short/11 --set optim.muon.rl=1",
        "python -m records compare short/11 'short/11 --without model.unet'", "python -m records liste",
        "python sweep.py axis short/11 optim.muon.rl=0.02", "./run.sh short/1000",
        "python -m data.fineweb 1 --folder x", "python bench/throughput.py --quickly",
        "python bench/no_such.py", "bench/no_such.sh"
    ):
        with pytest.raises((SystemExit, UserError, AssertionError)):
            check_command(wrong)
    assert "--scales" in capsys.readouterr().err


def test_the_commands_of_the_pages_are_found():
    text = (
        "    $ python -m records \\\n        list  # all\n\ntext `python\nsweep.py power` "
        "text\n\n```\n./test.sh -k x\n```\n"
    )
    assert [words_of(c) for c in commands(text)] == [
        ["python", "-m", "records", "list"],
        ["./test.sh", "-k", "x"],
    ]
    assert mentions(text) == ["python sweep.py power"]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 80


# ----- names and links --------------------------------------------------------------------------------------

def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "records/README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_inside_the_repository_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [
        page.name for page in PAGES if page.parent == ROOT / "docs" and f"(docs/{page.name})" not in text
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_a_page_names_exist(page):
    """`model.attn.gate` and the like between backticks; programs such as `data.tokenize` are modules."""
    for path in re.findall(
        r"`((?:model|optim|schedule|data|validation|numerics|system)\.[a-z0-9_.]+)", page.read_text()
    ):
        module = ROOT / (path.replace(".", "/") + ".py")
        if not (module.exists() or (ROOT / path).exists()):
            schema.find_field(path)


def test_the_readme_is_short_and_names_every_room():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    rooms = [folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists()]
    for page in (text, (ROOT / "docs/architecture.md").read_text()):
        assert rooms and [room for room in rooms if f"`{room}/`" not in page] == []
