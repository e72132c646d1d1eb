"""FineWeb in GPT-2 tokens from the Hugging Face hub: `python -m data.fineweb 9` (validation and 9 train shards).

Each shard is 100 M tokens (200 MB). Downloads resume, HF_ENDPOINT is honoured, size and header are checked; files that
are already right are left alone.
"""

import environment  # first: refuses a Python that is too old

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    environment.require("numpy", "huggingface_hub")

from data.shards import read_header
from settings import UserError

TRAIN_SHARDS = {"kjj0/fineweb10B-gpt2": 103, "kjj0/fineweb100B-gpt2": 1030}
OFFLINE = ("offline: copy the .bin files into the folder by hand, make shards of your own text with "
           "`python -m data.tokenize`, or run ./run.sh, which needs no network")


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


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m data.fineweb", description="Download tokenised FineWeb shards.")
    p.add_argument("shards", type=int, help="train shards, 100 M tokens each; 16 are enough for record 11")
    p.add_argument("--dir", default=str(Path(__file__).parent / "fineweb10B"))
    p.add_argument("--repo", default="kjj0/fineweb10B-gpt2")
    o = p.parse_args(argv)
    try:
        download(o.shards, Path(o.dir), o.repo)
        print(f"{o.dir}: validation and {o.shards} train shards")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
