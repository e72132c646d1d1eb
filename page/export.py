"""`python -m records export`: what other programs read. A checkpoint as safetensors,
curves of runs as CSV."""

import csv
import io
import math
import sys
from argparse import Namespace
from pathlib import Path

from common import files
from common.arguments import Parser
from common.errors import UserError
from page import curves

COLUMNS = ("run", "step", "tokens", "time_ms", "val_loss", "train_loss")


def arguments(p: Parser) -> None:
    """Options of `records export`."""
    p.add_argument("sources", nargs="+", metavar="SOURCE",
                   help="a checkpoint (safetensors), or run folders (csv)")
    p.add_argument("--to", required=True, choices=("safetensors", "csv"),
                   help="safetensors of a checkpoint, or the curves of runs as csv")
    p.add_argument("--out", metavar="FILE", help="file to write, - for stdout (csv); default: "
                   "checkpoint.safetensors next to the checkpoint, curve.csv in the first run folder")
    p.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(options: Namespace) -> None:
    """`records export`: a checkpoint as safetensors, or curves as CSV."""
    if options.to == "csv":
        return export_csv(options)
    if len(options.sources) > 1:
        raise UserError(
            f"--to safetensors takes one checkpoint, not {len(options.sources)}: export one by one")
    if options.out == "-":
        raise UserError("--out -: safetensors are binary: name a file")
    source = Path(options.sources[0])
    source = source / "checkpoint.pt" if source.is_dir() else source
    out = place(options, source.with_suffix(".safetensors"))
    files.write(out, safetensors_of(source))
    print(f"safetensors: {out}")


def place(options: Namespace, default: Path) -> Path:
    """Where the file goes; UserError if something is there and --overwrite is not given."""
    out = Path(options.out) if options.out else default
    if out.is_dir():
        raise UserError(f"{out}: a folder: name a file with --out")
    if out.exists() and not options.overwrite:
        raise UserError(f"{out} exists: add --overwrite to replace it, or name another file with --out")
    return out


# ----- checkpoint -------------------------------------------------------------------------------------------

def safetensors_of(path: Path) -> bytes:
    """The tensors of a checkpoint in the safetensors format; its metadata: settings (JSON), tokenizer,
    val_loss."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--to safetensors needs the package safetensors: `pip install safetensors`") from None
    import torch
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        # cloned, because the format has no tensors that share memory
        tensors = {name: tensor.contiguous().clone() for name, tensor in saved["model"].items()}
        metadata = {"format": "pt", "settings": files.json_text(saved["settings"], sort_keys=True),
                    "tokenizer": str(saved["tokenizer"]), "val_loss": files.json_text(saved.get("val_loss"))}
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train with --save-checkpoint to get one") from None
    except Exception as error:  # torch.load raises many kinds for a file that is not a checkpoint
        raise UserError(f"{path}: not a checkpoint of this program ({type(error).__name__})") from None
    return save(tensors, metadata)


# ----- curves -----------------------------------------------------------------------------------------------

def export_csv(options: Namespace) -> None:
    """One row for each step of each run: what was validated there, and the training loss of the step."""
    found = {source: curves.read(source) for source in options.sources}  # the same run twice is one
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for source, curve in found.items():
        writer.writerows([source, *row] for row in rows(curve))
    if options.out == "-":
        sys.stdout.write(text.getvalue())
        return
    out = place(options, next(iter(found.values())).folder / "curve.csv")
    files.write(out, text.getvalue())
    states = [f"{source}: {curve.state()}" for source, curve in found.items() if curve.state()]
    print("\n".join([*states, f"csv: {out}"]))


def rows(curve: curves.Curve) -> list[list]:
    """[step, tokens, time_ms, val_loss, train_loss] of each step; '' for what is not known or not finite."""
    validated = {step: (tokens, ms, loss) for step, tokens, ms, loss in curve.validations}
    trained = {step: (tokens, loss) for step, tokens, loss in curve.train}
    out = []
    for step in sorted({*validated, *trained}):
        tokens, ms, loss = validated.get(step, (trained.get(step, (curves.NAN,))[0], curves.NAN, curves.NAN))
        train_loss = trained.get(step, (None, curves.NAN))[1]
        out.append([step, "" if math.isnan(tokens) else round(tokens),
                    *("" if math.isnan(x) else files.json_text(x) for x in (ms, loss, train_loss))])
    return out
