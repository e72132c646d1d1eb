"""FineWeb in GPT-2 tokens from the Hugging Face hub: `python -m data.fineweb short/11 --scale small` fetches the validation
shard and the train shards that this record reads, `python -m data.fineweb 9` nine train shards.

Each shard is 100 M tokens (200 MB). Downloads resume, HF_ENDPOINT is honoured, size and header are checked; files that
are already right are left alone.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import NormalDist

from data import stream
from data.shards import read_header
from settings import LOGICAL_RANKS, SCALES, Settings, UserError

REPO = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = {REPO: 103, "kjj0/fineweb100B-gpt2": 1030}
SHARD_BYTES = 1024 + 2 * stream.FINEWEB_SHARD  # of every shard but the last train shard
# Documents of FineWeb in GPT-2 tokens: sample-10BT has about 14.9 M in 10.26 B tokens; the median is an estimate. Their
# lengths are about log-normal.
MEAN_DOCUMENT, MEDIAN_DOCUMENT = 690, 400
OFFLINE = ("offline: copy the .bin files into the folder by hand, make shards of your own text with "
           "`python -m data.tokenize`, or run ./run.sh, which needs no network")


# ----- how many shards ----------------------------------------------------------------------------------------------

def shards_needed(s: Settings) -> int:
    """Train shards of FineWeb that a run of these settings reads in one pass: what to download, for all texts that say so.

    Exact for loaders that go by position. Loaders that go by documents skip tokens, which is estimated from the lengths of
    FineWeb's documents; `stream.require_shards` then counts in the shards themselves.
    """
    about = stream.stream_arguments(s)
    if about["loader"] in stream.BY_DOCUMENT:
        read = LOGICAL_RANKS * document_tokens(s.data.loader, s.data.tokens_per_rank, s.data.max_document)
        per_shard = int(stream.FINEWEB_SHARD / read) - (s.data.loader == "bos_aligned")  # its last step is left out
        need = -(-s.schedule.steps // max(1, per_shard))
    else:
        about.pop("max_document")
        need = stream.shards_needed([], steps=s.schedule.steps, **about | {"wrap": False})
    return min(need, TRAIN_SHARDS[REPO]) if s.data.wrap else need


def document_tokens(loader: str, size: int, max_document: int | None) -> float:
    """Expected tokens of FineWeb that one logical rank passes over to read `size` of them."""
    mu, sigma = math.log(MEDIAN_DOCUMENT), math.sqrt(2 * math.log(MEAN_DOCUMENT / MEDIAN_DOCUMENT))

    def moment(k: int, limit: float) -> float:
        """Expectation of min(length, limit) ** k."""
        whole = math.exp(k * mu + (k * sigma) ** 2 / 2)
        if math.isinf(limit):
            return whole
        z = (math.log(limit) - mu) / sigma
        return whole * NormalDist().cdf(z - k * sigma) + limit ** k * NormalDist().cdf(-z)

    limit = max_document if loader == "packed" and max_document else math.inf
    skipped = moment(2, limit) / (2 * moment(1, limit))  # rest of the document in which a rank's tokens end
    return (size + skipped) * MEAN_DOCUMENT / moment(1, limit)


def get(s: Settings) -> str:
    """How to get the shards that a run of these settings reads, for messages."""
    need = shards_needed(s)
    return (f"`python -m data.fineweb {need}` downloads the {need} train shard{'s' if need > 1 else ''} that this run reads and "
            f"the validation shard ({(need + 1) * SHARD_BYTES / 1e9:.1f} GB); `python -m data.tokenize FILE --out DIR` makes "
            "shards of any text")


# ----- download -----------------------------------------------------------------------------------------------------

def names(count):
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]


def is_right(path):
    """Whether a whole shard lies there."""
    if not path.exists():
        return False
    try:
        return read_header(path) > 0
    except UserError:
        return False


def fetch(repo, name, folder):
    """Download one file and check it; a file that is wrong is fetched once more from the start."""
    from huggingface_hub import errors, hf_hub_download
    for attempt in (1, 2):
        try:
            hf_hub_download(repo, name, repo_type="dataset", local_dir=folder, force_download=attempt == 2)
        except (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise UserError(f"{repo} has no file {name}: check --repo and the number of shards") from None
        except PermissionError as error:
            raise UserError(f"cannot write {error.filename or folder}: {error.strerror}; choose another "
                            "--dir") from None
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
            raise UserError(f"cannot fetch {name} ({type(error).__name__}); what has arrived is kept, so try again; "
                            f"{OFFLINE}") from None
        except OSError as error:
            if error.errno is None:  # the HTTP client's own errors carry no errno
                raise UserError(f"the download of {name} broke off ({type(error).__name__}); what has arrived is kept, "
                                f"so try again; {OFFLINE}") from None
            raise UserError(f"cannot write {name} to {folder}: {error.strerror}") from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
                raise
            raise UserError(f"the download of {name} broke off ({type(error).__name__}); what has arrived is kept, so "
                            f"try again; {OFFLINE}") from None
        if is_right(folder / name):
            return
        (folder / name).unlink(missing_ok=True)
    raise UserError(f"{repo} serves {name} incomplete or damaged, twice: try later or another HF_ENDPOINT")


def download(count, folder, repo):
    """Fetch the validation shard and `count` train shards into a folder."""
    limit = TRAIN_SHARDS.get(repo)
    if count < 1 or (limit and count > limit):
        raise UserError(f"{count} train shards of {repo}: ask for " + (f"1 to {limit}" if limit else "1 or more"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --dir") from None
    for name in names(count):
        if is_right(folder / name):
            print(f"{folder / name}: there already", file=sys.stderr)
        else:
            fetch(repo, name, folder)


def asked(shards: str, scale: str | None) -> int:
    """Number of train shards that the command line asks for. UserError for no number and no record."""
    if shards.lstrip("-").isdecimal():
        if scale:
            raise UserError(f"--scale {scale} goes with a record: leave it away, or name a record instead of {shards}")
        return int(shards)
    from deltas import resolve_name
    return shards_needed(resolve_name(shards, scale=scale).settings)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m data.fineweb", description="Download tokenised FineWeb shards.")
    p.add_argument("shards", metavar="RECORD|N", help="a record, for the shards that it reads, or a number of train shards of "
                                                      "100 M tokens")
    p.add_argument("--scale", choices=list(SCALES), help="scale of the record (default full)")
    p.add_argument("--dir", default=str(Path(__file__).parent / "fineweb10B"))
    p.add_argument("--repo", default=REPO)
    o = p.parse_args(argv)
    try:
        count = asked(o.shards, o.scale)
        download(count, Path(o.dir), o.repo)
        print(f"{o.dir}: validation and {count} train shard{'s' if count > 1 else ''}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
