"""Laws of curves: `records plot` and `records export`, of runs that ended in any way or not yet."""

import csv
import json
import math
import sys

import pytest
import torch

from records import __main__ as command
from page import curves, plot
from runlog import chain_line, GENESIS
from common.errors import UserError
from settings import deltas, schema


def make_run(
    folder, record="short/11", scale="micro", seed=0, sets=(), losses=(7.0, 6.0, 5.5), status="finished",
    **start
):
    """A run folder: validations every two steps of 1,024 tokens, a second each; status None: no end yet."""
    resolved = deltas.resolve(record, scale=scale, sets=sets)
    events = [
        {
            "kind": "start", "record": record, "preset": "", "scale": scale, "seed": seed, "registered": "",
            "log_version": 3, "processes": 1, "changes": list(resolved.changes),
            "settings": schema.plain(resolved.settings), **start
        }
    ]
    for i, loss in enumerate(losses):
        train = [9.0 - i, 8.5 - i] if i else []
        events.append(
            {
                "kind": "validation", "step": 2 * i, "scheduled_steps": 20, "val_loss": loss,
                "train_loss": train, "train_time_ms": 1000.0 * i, "tokens": 2048 * i, "epoch": 0
            }
        )
    events += [{"kind": "end", "status": status}] if status else []
    folder.mkdir(parents=True)
    previous = GENESIS
    with open(folder / "run.jsonl", "w") as file:
        for n, event in enumerate(events):
            line, previous = chain_line(previous, {"n": n, "wall_ms": 1.0, **event})
            print(line, file=file)
    return folder


def drawn(monkeypatch):
    """The axes of the next plot, when it is made."""
    found = []
    real = plot.draw
    monkeypatch.setattr(plot, "draw", lambda axes, *rest: (found.append(axes), real(axes, *rest)))
    return found


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    "runs, common, names",
    [
        ([{}], "short/11, micro, seed 0", ["short/11, micro, seed 0"]),
        ([{}, {"seed": 3}], "short/11, micro", ["seed 0", "seed 3"]),
        ([{}, {"record": "short/10"}], "micro, seed 0", ["short/11", "short/10"]),
        ([{}, {"scale": "tiny", "seed": 1}], "short/11", ["micro, seed 0", "tiny, seed 1"]),
        ([{}, {"sets": ["optim.muon.lr=0.5"]}], "short/11, micro, seed 0", ["as it is", "optim.muon.lr=0.5"]),
        (
            [
                {"sets": ["schedule.steps=20", "optim.muon.lr=0.5"]},
                {"sets": ["schedule.steps=20", "optim.muon.lr=0.9"], "seed": 1},
            ],
            "short/11, micro",
            ["optim.muon.lr=0.5, seed 0", "optim.muon.lr=0.9, seed 1"],
        ),
        ([{}, {"processes": 4}], "short/11, micro, seed 0", ["processes 1", "processes 4"]),
        ([{"code": "aaaa"}, {"code": "bbbb"}], "short/11, micro, seed 0", ["code aaaa", "code bbbb"]),
        ([{}, {}], "short/11, micro, seed 0", ["short/11 (0)", "short/11 (1)"]),
    ],
)
def test_labels_say_what_differs_and_the_title_what_does_not(runs, common, names, tmp_path):
    found = [curves.read(make_run(tmp_path / str(i), **facts)) for i, facts in enumerate(runs)]
    assert curves.labels(found) == (common, names)


def test_settings_that_differ_without_a_typed_change_are_named(tmp_path):
    """Two versions of a record, or of a scale."""
    found = [
        curves.read(make_run(tmp_path / str(i), sets=[f"optim.muon.lr={lr}"], changes=[]))
        for i, lr in enumerate((0.5, 0.9))
    ]
    assert curves.labels(found)[1] == ["optim.muon.lr = 0.5", "optim.muon.lr = 0.9"]


def test_diverged_and_unfinished_runs_are_drawn_as_far_as_they_are_finite(tmp_path, monkeypatch, capsys):
    """nan and null of the log are the same; the notes and the legend say what became of a run."""
    axes = drawn(monkeypatch)
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", seed=1, losses=(7.0, 6.5, None), status="diverged"),
        make_run(tmp_path / "c", seed=2, losses=(7.0, math.nan), status="diverged"),
        make_run(tmp_path / "d", seed=3, losses=(7.0, 6.1), status=None),
        make_run(tmp_path / "e", seed=4, losses=(7.0,), status="interrupted"),
        make_run(tmp_path / "f", seed=5, losses=(math.inf,), status="diverged")
    ]
    path = plot.plot(folders, train=True)
    assert path == tmp_path / "a/curve.png" and path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == [
        "seed 1: this run diverged; its curve ends at step 2, the last loss that is a number",
        "seed 2: this run diverged; its curve ends at step 0, the last loss that is a number",
        "seed 3: running, step 2 of 20",
        "seed 4: interrupted, step 0 of 20",
        "seed 5: this run diverged; none of its losses is a number, and it has no curve",
    ]
    assert legend(axes[0])[:6] == [
        "seed 0", "seed 1 (diverged after step 3)", "seed 2 (diverged after step 1)",
        "seed 3 (running, step 2 of 20)", "seed 4 (interrupted, step 0 of 20)", "seed 5 (diverged)"
    ]
    assert plot.plot(folders[5:]).exists() and "has no curve" in capsys.readouterr().out
    with pytest.raises(UserError, match="no validation yet"):
        plot.plot([make_run(tmp_path / "g", losses=(), status=None)])


def test_axes_by_steps_tokens_and_time_and_the_caption_of_times(tmp_path, monkeypatch, capsys):
    axes = drawn(monkeypatch)

    def notes(*args):
        plot.plot(*args)
        return capsys.readouterr().out.splitlines()

    apart = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    (tmp_path / "c").mkdir()
    (tmp_path / "c/manifest.jsonl").write_text("")
    turns = [make_run(tmp_path / f"c/runs/{i}", seed=i, registered="abc") for i in range(2)]
    last = {"steps": 4, "tokens": 4096, "time": 2}
    for x, end in last.items():
        assert (plot.BUSY in notes(apart, tmp_path / "p.svg", x)) == (x == "time")
        assert axes[-1].lines[0].get_xdata()[-1] == end and axes[-1].get_xlabel() == plot.UNITS[x][1]
        assert ("did not take turns" in (tmp_path / "p.svg").read_text()) == (x == "time")
        assert notes(turns, tmp_path / "p.svg", x) == []
    assert notes(apart[:1], tmp_path / "p.pdf", "time") == []  # nothing it is compared with


def test_training_losses_lie_at_their_steps_and_smooth_is_their_running_mean(tmp_path):
    curve = curves.read(make_run(tmp_path / "a"))
    assert curve.train == [(0, 0, 8.0), (1, 1024, 7.5), (2, 2048, 7.0), (3, 3072, 6.5)]
    line = plot.Line(curve, "a", "time")
    assert line.train == [(0.0, 8.0), (0.5, 7.5), (1.0, 7.0), (1.5, 6.5)]
    assert line.smooth() == [(0.0, 8.0), (0.5, 7.75), (1.0, 7.5), (1.5, 7.25)]


def test_a_log_of_version_2_says_whose_training_losses_it_has(tmp_path, capsys):
    old, alone = make_run(tmp_path / "a", log_version=2, processes=8), make_run(tmp_path / "b", log_version=2)
    plot.plot([old], tmp_path / "p.png", train=True)
    assert "those of process 0" in capsys.readouterr().out
    plot.plot([old], tmp_path / "p.png")
    plot.plot([alone], tmp_path / "p.png", train=True)
    assert capsys.readouterr().out == ""


def test_the_published_curve_is_drawn_at_full_scale_only_where_it_has_the_axis(tmp_path, monkeypatch):
    axes = drawn(monkeypatch)
    full = make_run(tmp_path / "a", record="short/11", scale="full")
    for x, there in (("steps", True), ("time", False)):
        plot.plot([full], tmp_path / "p.png", x)
        assert ("short/11 published" in legend(axes[-1])) == there
    plot.plot([make_run(tmp_path / "b")], tmp_path / "p.png")
    assert "short/11 published" not in legend(axes[-1])


def refusal(capsys, *args):
    """The one line on stderr of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        command.main([str(a) for a in args])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_what_cannot_be_drawn_or_written_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "runs/a")
    assert "the ending says the format: .png, .svg, .pdf" in refusal(
        capsys, "plot", run, "--out", tmp_path / "x.jpeg"
    )
    assert "cannot write" in refusal(capsys, "plot", run, "--out", tmp_path / "no/such/x.png")
    assert f"name one below it, like {run}" in refusal(capsys, "plot", tmp_path / "runs")
    assert "no run.jsonl here; name a run folder" in refusal(capsys, "plot", tmp_path / "nowhere")
    for below, said in (("a/b", "name one below it, like"), ("a/b/c", "name a run folder")):
        deep = tmp_path / f"in_{below[-1]}" / below
        deep.mkdir(parents=True)
        (deep / "run.jsonl").touch()
        assert said in refusal(capsys, "plot", tmp_path / f"in_{below[-1]}")
    (tmp_path / "other").mkdir()
    line, _ = chain_line(GENESIS, {"n": 0, "kind": "start", "wall_ms": 1.0})
    (tmp_path / "other/run.jsonl").write_text(line + "\n")
    assert "not the log of a run of this program" in refusal(capsys, "plot", tmp_path / "other")
    text = (run / "run.jsonl").read_text()
    (run / "run.jsonl").write_text(text.replace("6.0", "5.0"))
    assert "breaks the hash chain" in refusal(capsys, "plot", run)
    (run / "run.jsonl").write_text(text[:-20])
    assert "is not a complete log line" in refusal(capsys, "export", run, "--to", "csv")


# ----- export -----------------------------------------------------------------------------------------------

def test_curves_as_csv(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", losses=(7.0, math.nan), status="diverged")
    with pytest.raises(SystemExit) as ended:
        command.main(["export", str(a), str(b), "--to", "csv"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{b}: diverged after step 1\ncsv: {a / 'curve.csv'}\n"
    with open(a / "curve.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["run", "step", "tokens", "time_ms", "val_loss", "train_loss"]
    assert rows[1:6] == [[str(a), "0", "0", "0.0", "7.0", "8.0"], [str(a), "1", "1024", "", "", "7.5"],
                         [str(a), "2", "2048", "1000.0", "6.0", "7.0"], [str(a), "3", "3072", "", "", "6.5"],
                         [str(a), "4", "4096", "2000.0", "5.5", ""]]
    assert rows[6:] == [[str(b), "0", "0", "0.0", "7.0", "8.0"], [str(b), "1", "1024", "", "", "7.5"],
                        [str(b), "2", "2048", "1000.0", "", ""]]
    assert "curve.csv exists: add --overwrite to replace it" in refusal(capsys, "export", a, "--to", "csv")
    with pytest.raises(SystemExit) as ended:
        command.main(["export", str(a), "--to", "csv", "--overwrite", "--out", str(a / "curve.csv")])
    assert ended.value.code == 0 and len((a / "curve.csv").read_text().splitlines()) == 6
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(["export", str(a), "--to", "csv", "--out", "-"])
    assert capsys.readouterr().out == (a / "curve.csv").read_text()


def save_checkpoint(path):
    tied = torch.arange(6.0).view(2, 3)
    model = {"embed.weight": tied, "view": tied.t(), "half": torch.ones(2, dtype=torch.bfloat16)}
    settings = schema.plain(deltas.resolve("short/11", scale="micro").settings)
    torch.save({"model": model, "settings": settings, "tokenizer": "sample", "val_loss": 4.25}, path)
    return model, settings


def test_a_checkpoint_as_safetensors(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="an optional extra")
    from safetensors import safe_open
    model, settings = save_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as ended:
        command.main(["export", str(tmp_path), "--to", "safetensors"])
    assert ended.value.code == 0
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert set(file.keys()) == set(model) and all(
            torch.equal(file.get_tensor(k), v) for k, v in model.items()
        )
        metadata = file.metadata()
    assert schema.from_plain(json.loads(metadata["settings"])) == schema.from_plain(settings)
    assert (metadata["tokenizer"], metadata["val_loss"]) == ("sample", "4.25")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert "exists: add --overwrite" in refusal(capsys, "export", tmp_path, "--to", "safetensors")
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_that_cannot_be_exported_is_one_line(tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path / "checkpoint.pt")
    checkpoint = tmp_path / "checkpoint.pt"
    assert "takes one checkpoint, not 2" in refusal(
        capsys, "export", checkpoint, checkpoint, "--to", "safetensors"
    )
    assert "safetensors are binary" in refusal(
        capsys, "export", checkpoint, "--to", "safetensors", "--out", "-"
    )
    assert "a folder: name a file" in refusal(
        capsys, "export", checkpoint, "--to", "safetensors", "--out", tmp_path
    )
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
        assert "`pip install safetensors`" in refusal(capsys, "export", checkpoint, "--to", "safetensors")
        assert not (tmp_path / "checkpoint.safetensors").exists()
    for name, content in (("text.pt", b"no checkpoint"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "safetensors", sys)
            patched.setitem(sys.modules, "safetensors.torch", type(sys)("safetensors.torch"))
            patched.setattr(sys.modules["safetensors.torch"], "save", lambda *_: b"", raising=False)
            assert "not a checkpoint of this program" in refusal(
                capsys, "export", tmp_path / name, "--to", "safetensors"
            )
            assert "no such checkpoint" in refusal(
                capsys, "export", tmp_path / "none.pt", "--to", "safetensors"
            )
