"""FineWeb in GPT-2 tokens from the Hugging Face hub: `python -m data.fineweb short/11 --scale small` fetches
the validation shard and the train shards that this record reads, `python -m data.fineweb 9` nine train
shards.

Each shard is 100 M tokens (200 MB). Downloads resume and HF_ENDPOINT is honoured. Size and SHA-256 of every
file are compared with the published ones and kept in shards.json next to the shards; files that are right are
left alone.
"""

from common import environment  # first: refuses a Python that is too old

import contextlib
import hashlib
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

if __name__ == "__main__":
    environment.require("numpy", "huggingface_hub")

from common import arguments, console, files
from data import stream
from data.shards import GPT2, MANIFEST, check_hole, read_header, read_manifest, shard_facts
from common.errors import UserError
from settings import Settings
from settings.data import LOGICAL_RANKS, longest_document, per_stage
from settings.scales import SCALES

REPO = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = {REPO: 103, "kjj0/fineweb100B-gpt2": 1030}
SHARD_BYTES = 1024 + 2 * stream.FINEWEB_SHARD  # of every shard but the last train shard
LAST_SHARD_BYTES = 1024 + 2 * 55_324_043  # train shard 103
# Documents of FineWeb in GPT-2 tokens: sample-10BT has about 14.9 M in 10.26 B tokens; the median is an
# estimate. Their lengths are about log-normal.
MEAN_DOCUMENT, MEDIAN_DOCUMENT = 690, 400
OFFLINE = ("offline: copy the .bin files into the folder by hand, make shards of your own text with "
           "`python -m data.tokenize`, or run ./run.sh, which needs no network")


# ----- how many shards --------------------------------------------------------------------------------------

def shards_needed(s: Settings) -> int:
    """Train shards of FineWeb that a run of these settings reads in one pass: what to download, for all texts
    that say so.

    Exact for loaders that go by position. Loaders that go by documents skip tokens, which is estimated from
    the lengths of FineWeb's documents; `stream.require_shards` then counts in the shards themselves.
    """
    about = stream.stream_arguments(s)
    if about["loader"] in stream.BY_DOCUMENT:
        read = LOGICAL_RANKS * document_tokens(
            s.data.loader, max(per_stage(s.data.tokens_per_rank)), longest_document(s)
        )
        # its last step is left out
        per_shard = int(stream.FINEWEB_SHARD / read) - (s.data.loader == "bos_aligned")
        need = -(-s.schedule.steps // max(1, per_shard))
    else:
        about.pop("max_doc_len")
        need = stream.shards_needed([], steps=s.schedule.steps, **about | {"wrap": False})
    return min(need, TRAIN_SHARDS[REPO]) if s.data.wrap else need


def document_tokens(loader: str, size: int, max_doc_len: int | None) -> float:
    """Expected tokens of FineWeb that one logical rank passes over to read `size` of them."""
    mu, sigma = math.log(MEDIAN_DOCUMENT), math.sqrt(2 * math.log(MEAN_DOCUMENT / MEDIAN_DOCUMENT))

    def moment(k: int, limit: float) -> float:
        """Expectation of min(length, limit) ** k."""
        whole = math.exp(k * mu + (k * sigma) ** 2 / 2)
        if math.isinf(limit):
            return whole
        z = (math.log(limit) - mu) / sigma
        return whole * NormalDist().cdf(z - k * sigma) + limit ** k * NormalDist().cdf(-z)

    limit = max_doc_len if loader == "packed" and max_doc_len else math.inf
    skipped = moment(2, limit) / (2 * moment(1, limit))  # rest of the document in which a rank's tokens end
    return (size + skipped) * MEAN_DOCUMENT / moment(1, limit)


def get(s: Settings) -> str:
    """How to get the shards that a run of these settings reads, for messages."""
    need = shards_needed(s)
    shards, gigabytes = f"{need} train shard{'s' if need > 1 else ''}", (need + 1) * SHARD_BYTES / 1e9
    return (f"`python -m data.fineweb {need}` downloads the {shards} that this run reads and the validation "
            f"shard ({gigabytes:.1f} GB); `python -m data.tokenize FILE --out DIR` makes shards of any text")


# ----- what is known of a published shard -------------------------------------------------------------------

def published(repo: str, name: str) -> tuple[int | None, str | None]:
    """(bytes, SHA-256) of a published shard, None for what is not known here.

    fineweb_sha256.txt has what the hub's pages of these files say under "Git LFS Details"; for other shards
    the hub's answer at the download counts.
    """
    if repo != REPO:
        return None, None
    size = LAST_SHARD_BYTES if name == f"fineweb_train_{TRAIN_SHARDS[REPO]:06d}.bin" else SHARD_BYTES
    lines = (Path(__file__).parent / "fineweb_sha256.txt").read_text(encoding="utf-8").splitlines()
    return size, {name: digest for digest, name in map(str.split, lines)}.get(name)


@contextlib.contextmanager
def hub_errors(repo: str, name: str, folder: Path) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    from huggingface_hub import errors
    again = f"what has arrived is kept, so try again; {OFFLINE}"
    try:
        yield
    except (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(f"{repo} has no file {name}: check --repo and the number of shards") from None
    except errors.HFValidationError:
        raise UserError(f"--repo {repo}: not a repository's name, like {REPO}") from None
    except PermissionError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; choose another --dir"
        ) from None
    except (
        errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.FileMetadataError, ConnectionError
    ) as error:
        raise UserError(f"cannot fetch {name} ({type(error).__name__}); {again}") from None
    except OSError as error:
        if error.errno is None:  # the HTTP client's own errors carry no errno
            raise UserError(f"the download of {name} broke off ({type(error).__name__}); {again}") from None
        raise UserError(
            f"cannot write {name} to {folder}: {error.strerror}; free some space or choose another --dir"
        ) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in (
            "httpx", "httpx2", "httpcore", "httpcore2", "requests"
        ):
            raise
        raise UserError(f"the download of {name} broke off ({type(error).__name__}); {again}") from None


def hub_says(repo: str, name: str, folder: Path) -> tuple[int | None, str | None]:
    """(bytes, SHA-256) of a file as the hub tells them, None where it does not; checked against what is known
    here."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    with hub_errors(repo, name, folder):
        found = get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset"))
    digest = found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else None  # LFS files only
    for called, here, there in zip(("size", "SHA-256"), published(repo, name), (found.size, digest)):
        if None not in (here, there) and here != there:
            raise UserError(
                f"the hub offers {name} with {called} {there}, published is {here}: check HF_ENDPOINT"
            )
    return found.size, digest


# ----- download and check -----------------------------------------------------------------------------------

def names(count: int) -> list[str]:
    """File names of the validation shard and of `count` train shards."""
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]


def is_whole(path: Path) -> bool:
    """Whether a shard lies there whose header and size agree."""
    if not path.exists():
        return False
    try:
        return read_header(path) > 0
    except UserError:
        return False


def examine(path: Path) -> dict:
    """What the manifest keeps of a file: bytes, time, SHA-256 of the file and of its tokens. UserError for a
    hole of zeros."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts, about = shard_facts(path, GPT2["bos"]), path.stat()
    check_hole(path, facts)
    return {
        "bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "sha256": digest,
        "tokens_sha256": facts["sha256"]
    }


def unchanged(path: Path, entry: dict) -> bool:
    """True if size and time of a file are those at its last verification."""
    about = path.stat()
    return (about.st_size, about.st_mtime_ns) == (entry.get("bytes"), entry.get("mtime_ns"))


def fetch(repo: str, name: str, folder: Path) -> dict:
    """Download one file and check it; returns the manifest's entry. A wrong file is fetched once more from
    the start."""
    from huggingface_hub import hf_hub_download
    size, digest = hub_says(repo, name, folder)
    for attempt in (1, 2):
        with hub_errors(repo, name, folder):
            hf_hub_download(repo, name, repo_type="dataset", local_dir=folder, force_download=attempt == 2)
        try:
            entry = examine(folder / name)
            if size in (None, entry["bytes"]) and digest in (None, entry["sha256"]):
                return entry | {"verified": digest is not None}
        except UserError:  # not a whole shard
            pass
        (folder / name).unlink(missing_ok=True)
    raise UserError(f"{repo} serves {name} incomplete or damaged, twice: try later or another HF_ENDPOINT")


def check(repo: str, name: str, folder: Path, entry: dict, verify: bool) -> dict | None:
    """The manifest's entry of a file that lies there, None if the file has to be fetched again.

    A file that has not changed since it was verified is not read again, unless `verify` asks for it.
    """
    path = folder / name
    if not is_whole(path):
        return None
    if entry.get("verified") and unchanged(path, entry) and not verify:
        return entry
    try:
        found, (size, digest) = examine(path), published(repo, name)
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return None
    if digest is None and entry.get("verified"):
        digest = entry["sha256"]
    if digest is None:
        try:
            size, digest = hub_says(repo, name, folder)
        except UserError as error:
            print(f"note: {name} is not compared with the hub: {error}", file=sys.stderr)
    if size not in (None, found["bytes"]) or digest not in (None, found["sha256"]):
        print(f"{path} is not the published file: fetched again", file=sys.stderr)
        path.unlink()
        return None
    return found | {"verified": digest is not None}


def download(count: int, folder: Path, repo: str, verify: bool = False) -> list[str]:
    """Fetch the validation shard and `count` train shards into a folder; returns the names that could not be
    verified."""
    limit = TRAIN_SHARDS.get(repo)
    if count < 1 or (limit and count > limit):
        raise UserError(
            f"{count} train shards of {repo}: ask for " + (f"1 to {limit}" if limit else "1 or more")
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --dir") from None
    missing = sum(not (folder / name).exists() for name in names(count))
    need = missing * SHARD_BYTES
    if repo in TRAIN_SHARDS and need > free:
        raise UserError(f"{missing} shards need {need / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free: "
                        "free some space or choose another --dir")
    manifest = read_manifest(folder)
    for name in names(count):
        there = check(repo, name, folder, manifest.get(name, {}), verify)
        manifest[name] = there or fetch(repo, name, folder)
        files.write(folder / MANIFEST, files.json_text(manifest, indent=1) + "\n")
        state = "verified" if manifest[name]["verified"] else "whole, but no SHA-256 of it is known"
        print(f"{folder / name}: {'there already, ' if there else ''}{state}", file=sys.stderr)
    return [name for name in names(count) if not manifest[name]["verified"]]


def asked(shards: str, scale: str | None) -> int:
    """Number of train shards that the command line asks for. UserError for no number and no record."""
    if shards.lstrip("-").isdecimal():
        if scale:
            raise UserError(
                f"--scale {scale} goes with a record: leave it out, or name a record instead of {shards}"
            )
        return int(shards)
    from settings.deltas import resolve_name
    return shards_needed(resolve_name(shards, scale=scale).settings)


def parser() -> arguments.Parser:
    """Options of `python -m data.fineweb`."""
    p = arguments.Parser(prog="python -m data.fineweb", description="Download tokenised FineWeb shards.")
    p.add_argument(
        "shards", metavar="RECORD|N",
        help="a record, for the shards that it reads, or a number of train shards of 100 M tokens"
    )
    p.add_argument("--scale", choices=list(SCALES), help="scale of the record (default full)")
    p.add_argument("--dir", default=str(Path(__file__).parent / "fineweb10B"), metavar="DIR",
                   help="where the shards go (default data/fineweb10B, where the trainer looks for them)")
    p.add_argument("--repo", default=REPO, help=f"dataset on the Hugging Face hub (default {REPO})")
    p.add_argument(
        "--verify", action="store_true", help="read files that are there again and compare their SHA-256"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line of the download."""
    o = parser().parse_args(argv)
    try:
        count = asked(o.shards, o.scale)
        unverified = download(count, Path(o.dir), o.repo, o.verify)
        print(f"{o.dir}: validation and {count} train shard{'s' if count > 1 else ''}, "
              + (f"{len(unverified)} not verified" if unverified else "verified"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    console.program(main)
