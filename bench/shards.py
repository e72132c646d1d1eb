"""The shards that benches read: `python bench/shards.py FOLDER [DATA]` prints the folder for --data.

DATA: a folder with train and validation shards (`*_train_*.bin`, `*_val_*.bin`, data/shards.py), which is
printed as it is; or with such files compressed, `*.bin.xz` or `*.bin.gz`, which are unpacked into FOLDER
first, as a machine without a network gets them. Without DATA, shards of random tokens are made in FOLDER.
"""

import gzip
import lzma
import shutil
import sys
from pathlib import Path

import measure

from common import arguments, console, files
from data.shards import open_corpus
from common.errors import UserError

OPEN = {".xz": lzma.open, ".gz": gzip.open}
# 40 million for a training at scale small, and a rest of a step; one row of record 33 a rank
TOKENS = 48_000_000, 2_200_000


def prepare(folder: str | Path, data: str | Path | None) -> Path:
    """The folder of shards. UserError if there are none, or broken ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        measure.synthetic_shards(folder, *TOKENS)
        return folder
    data = Path(data)
    packed = [p for suffix in OPEN for p in files.listed(data, f"*.bin{suffix}")]
    if packed and not files.listed(data, "*.bin"):
        for path in packed:
            try:
                with OPEN[path.suffix](path) as source, files.writing(folder / path.stem) as target:
                    shutil.copyfileobj(source, target, 2 ** 20)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise UserError(f"cannot unpack {path}: {error}: compress the shard again") from None
        if (data / "corpus.json").exists():
            files.write(folder / "corpus.json", (data / "corpus.json").read_bytes())
        data = folder
    open_corpus(data)
    return data


def main() -> None:
    """Prepare the folder of shards and print what it holds."""
    p = arguments.Parser(prog="bench/shards.py", description=__doc__.partition("\n\n")[0])
    p.add_argument("folder", metavar="FOLDER", help="where unpacked or random shards go")
    p.add_argument("data", metavar="DATA", nargs="?",
                   help="folder of shards, packed or not (default: random tokens)")
    o = p.parse_args()
    try:
        print(prepare(o.folder, o.data))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    console.program(main)
