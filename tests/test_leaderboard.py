"""Laws of the generated pages: same data in, same bytes out; what is said is what the data gives; nothing is
hidden."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import browser_page
import claim_builder
from one_control import against_control
from records import __main__ as records_command
from page import leaderboard
from evidence import statistics, verify
from page import facts, sections, tags
from common.errors import UserError
from settings import deltas, schema

ROOT = Path(__file__).parent.parent
VOID = {"meta", "link", "input", "br", "col", "wbr", "img", "hr"}
SHAPES = {"line", "circle", "path", "rect"}


# ----- sweeps made up for these tests -----------------------------------------------------------------------

def arm(label, changes, losses, effect, record=None, note="", **more):
    name, about = (
        record or "short/11",
        statistics.describe(losses) if losses else {"n": 0, "mean": None, "sd": None},
    )
    digest = facts.expected_hash(name, "tiny", changes)
    runs = [{"seed": i, "val_loss": x, "train_time_ms": 1000.0 + i, "ml_hash": digest, "last_hash": "ab"}
            for i, x in enumerate(losses)]
    row = {k: (effect or {}).get(k) for k in ("effect", "low", "high", "p")}
    return {
        "arm": label, "changes": changes, "record": record, **{k: about[k] for k in ("n", "mean", "sd")},
        **row, "resolved": bool(effect and effect["resolved"]), "note": note, "runs": runs, **more
    }


def sweep(name, kind, base, control, rows, **more):
    return {
        "version": 1, "kind": kind, "name": name, "base": base, "scale": "tiny", "confidence": 0.95,
        "method": "means", "paired": False, "pooled_sd": 0.004, "df": 12, "mde": 0.01,
        "hardware": "CPU, 1 process, 2 threads", "cpu": "Test CPU", "torch": "2.13.0", "code": ["0" * 40],
        "control": control, "rows": rows, **more
    }


ABLATED = {
    "optim.muon": 4.60, "model.head.softcap": 4.061, "model.residual.unet_skips": 4.02,
    "model.residual.x0_mix": 4.08, "model.attn.value_residual": 4.09, "optim.muon.momentum_warmup": 4.075
}
# of short/8: better, unresolved, worse
BRANCHES = {"variants/1": 4.24, "variants/2": 4.263, "variants/3": 4.31}
CHAINED = {"short/8": 4.26, "short/9": 4.27, "short/10": 4.265, "short/11": 4.06}


def spread(mean):
    return [mean - 0.004, mean - 0.001, mean + 0.002, mean + 0.003]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """A folder with an ablation of record 11, a chain 8..11, three variants, and one arm that does nothing at
    this scale."""
    folder = tmp_path_factory.mktemp("evidence")
    analysis = against_control(
        spread(4.06), {p: spread(x) for p, x in (ABLATED | {"all": 4.7}).items()}
    )
    found = analysis["rows"]
    rows = [arm(f"--without {p}", [f"--without {p}"], spread(x), found[p]) for p, x in ABLATED.items()]
    inert, both = (
        ["--without model.attn.qk_norm.order"],
        ["--without optim.muon", "--without model.head.softcap"],
    )
    rows.append(arm(inert[0], inert, [], None, note="inert <here>"))
    rows.append(arm("--without all", both, spread(4.7), found["all"]))
    control, pooled = arm("short/11", [], spread(4.06), None), {k: analysis[k] for k in ("pooled_sd", "df")}
    (folder / "ablate.json").write_text(
        json.dumps(sweep("ablate", "ablate", "short/11", control, rows, **pooled))
    )
    pairs = list(zip(list(CHAINED)[1:], CHAINED))
    analysis = statistics.successive({r: spread(x) for r, x in CHAINED.items()}, pairs)
    found, pooled = analysis["rows"], {k: analysis[k] for k in ("pooled_sd", "df")}
    rows = [arm(c, [], spread(CHAINED[c]), found[c], record=c, parent=p) for c, p in pairs]
    control = arm("short/8", [], spread(CHAINED["short/8"]), None, record="short/8")
    made = sweep("chain", "chain", "short/8..short/11", control, rows, **pooled)
    (folder / "chain.json").write_text(json.dumps(made))
    analysis = against_control(spread(4.26), {ref: spread(x) for ref, x in BRANCHES.items()})
    found, pooled = analysis["rows"], {k: analysis[k] for k in ("pooled_sd", "df")}
    rows = [arm(ref, [], spread(x), found[ref], record=ref, parent="short/8") for ref, x in BRANCHES.items()]
    made = sweep("chain_variants_tiny", "chain", "variants", control, rows, **pooled)
    (folder / "chain_variants_tiny.json").write_text(json.dumps(made))
    return folder


@pytest.fixture(scope="module")
def site(evidence):
    return facts.gather(evidence)


@pytest.fixture(scope="module")
def built():
    """Path -> text of every generated file, of the committed data."""
    return leaderboard.build()


@pytest.fixture(scope="module")
def built_here(evidence):
    """The same of this file's own evidence."""
    return leaderboard.build(evidence)


@pytest.fixture(scope="module")
def page(built_here):
    return built_here["site/index.html"]


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps attributes, ids, and the cells of table rows by their first
    cell."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.links, self.ids, self.rows, self.row = [], [], [], [], [], None
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [
            attributes[k] for k in ("src", "srcset", "data", "poster", "action") if k in attributes
        ]
        self.loads += [attributes["href"]] if "href" in attributes and tag != "a" else []
        self.links += [attributes["href"]] if "href" in attributes and tag == "a" else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID | SHAPES:
            self.open.append(tag)
        if tag == "tr":
            self.row = {"cells": [], **attributes}
            self.rows.append(self.row)
        elif tag in ("td", "th") and self.row is not None:
            self.row["cells"].append("")

    def handle_endtag(self, tag):
        if tag in SHAPES:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()
        if tag == "tr":
            self.row = None

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, text):
        if self.row is not None and self.row["cells"]:
            self.row["cells"][-1] += text


def row_of(page, code):
    """The worth row of a path or record: its cells as text."""
    first = re.search(r'<div class="panel".*?<details>', page, re.S).group()
    return next(
        r["cells"] for r in Reader(first.removesuffix("<details>") + "</div>").rows if code in r["cells"][0]
    )


# ----- generating -------------------------------------------------------------------------------------------

def test_two_builds_give_the_same_bytes(evidence, built_here):
    """The second in another process with another order of hashes."""
    script = (
        "from pathlib import Path; from page import leaderboard; import hashlib, json; "
        f"print(hashlib.sha256(json.dumps(leaderboard.build(Path({str(evidence)!r}))).encode()).hexdigest())"
    )
    # the words of this process are hashed with another seed, or without one
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PYTHONHASHSEED": seed, "PATH": ""}
    ).stdout
    assert other.strip() == hashlib.sha256(json.dumps(built_here).encode()).hexdigest()


def test_check_names_a_stale_file_in_one_line_and_exits_3(built, tmp_path, capsys):
    files = built
    assert leaderboard.settle(files, tmp_path) == 0 and leaderboard.settle(files, tmp_path, check=True) == 0
    (tmp_path / "LINEAGE.md").write_text(files["LINEAGE.md"] + "edited by hand\n")
    (tmp_path / "site/history.svg").unlink()
    capsys.readouterr()
    assert leaderboard.settle(files, tmp_path, check=True) == leaderboard.STALE == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "LINEAGE.md, site/history.svg: not what the committed data gives" in err
    assert "edited" in (tmp_path / "LINEAGE.md").read_text() and not (tmp_path / "site/history.svg").exists()
    assert leaderboard.settle(files, tmp_path) == 0 and "edited" not in (tmp_path / "LINEAGE.md").read_text()


def test_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "site").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write .*site"):
        leaderboard.settle({"site/index.html": "x"}, tmp_path)


# ----- the page ---------------------------------------------------------------------------------------------

def test_the_page_is_small_and_loads_nothing(page):
    assert len(page.encode()) < 1_500_000
    reader = Reader(page)
    assert reader.loads == ["data:,"]  # the empty icon
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", page)
    assert all(link.startswith(("#", "../", "https://")) for link in reader.links)
    # repository files that the page points to exist, apart from this test's own evidence
    for link in reader.links:
        assert (
            not link.startswith("../") or link.startswith("../evidence/results/")
            or (ROOT / "site" / link).exists()
        ), link


def test_the_page_is_well_formed_with_unique_ids_and_whole_anchors(page, built):
    for text in (page, built["site/index.html"]):
        reader = Reader(text)
        assert len(set(reader.ids)) == len(reader.ids) and not re.search(r"\{\{\w+\}\}", text)
        assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)


def test_every_published_record_appears(page, site, built):
    refs = [f"short/{i}" for i in [*range(1, 93), "21r", "21t"]] + [f"medium/{i}" for i in range(1, 19)]
    assert set(refs) <= {h["ref"] for h in site["history"]}
    files = built
    embedded = json.loads(page.split('id="data">')[1].split("</script>")[0])
    for ref in refs:
        h = next(h for h in site["history"] if h["ref"] == ref)
        assert f"| {ref} |" in files["LINEAGE.md"] or f"## {ref}: " in files["LINEAGE.md"], ref
        assert h["title"] in files["LINEAGE.md"] or h["title"].replace("|", "\\|") in files["LINEAGE.md"]
        assert ref in [point[0] for point in embedded["history"]]
        assert (f"| {ref} |" in files["records/README.md"]) == (ref in site["records"])
    assert {row["cells"][0] for row in Reader(page).rows} >= set(refs)


def test_numbers_in_the_worth_table_are_those_of_the_sweeps(page, site):
    ablation, chain = (next(s for s in site["sweeps"] if s["kind"] == k) for k in ("ablate", "chain"))
    for row in ablation["rows"][:len(ABLATED)]:
        today = row_of(page, row["changes"][0].split()[1])[2]
        if row["resolved"]:
            assert (
                tags.number(row["effect"], sign=True) in today
                and tags.interval(row["low"], row["high"]) in today
            )
        else:
            assert f"unresolved (±{(row['high'] - row['low']) / 2:.4f})" in today
    for row in chain["rows"]:  # in a chain a negative effect helps
        added = row_of(page, f"{row['record']} the whole record")[1]
        assert tags.interval(-row["high"], -row["low"]) in added
        assert tags.number(-row["effect"], sign=True) in added if row["resolved"] else "unresolved" in added
    assert "+0.0053 nats" in row_of(page, "model.head.softcap")[3]


def test_what_is_unresolved_has_no_rank_and_what_hurts_is_shown(page, site):
    rows = facts.techniques(site, "tiny")
    resolved = [r for r in rows if r["today"] and r["today"]["resolved"] and r["key"][0] != "arm"]
    ranks = facts.ranked(rows, "today")
    assert sorted(ranks.values()) == list(range(1, len(resolved) + 1)) and set(ranks) == {
        r["key"] for r in resolved
    }
    worth = [r["today"]["worth"] for r in sorted(resolved, key=lambda r: ranks[r["key"]])]
    assert worth == sorted(worth, reverse=True) and len(worth) >= 4
    panel = re.search(r'<div class="panel".*?</div><details>', page, re.S).group()
    groups = dict(re.findall(r'<tbody data-group="(\w+)">(.*?)</tbody>', panel, re.S))
    assert groups["resolved"].count('class="rank"') == len(ranks) + len(facts.ranked(rows, "added"))
    for group in ("unresolved", "several", "none"):
        assert groups[group] and 'class="rank"' not in groups[group]
    assert "hurts" in row_of(page, "model.residual.unet_skips")[2]
    assert (
        "no figure" in row_of(page, "qk_norm.order")[2] and "inert <here>" in row_of(page, "qk_norm.order")[2]
    )


def test_missing_evidence_is_said_plainly(tmp_path):
    text = sections.page(facts.gather(tmp_path))
    for sentence in (
        "No sweep is committed yet, so nothing here was measured",
        "nothing to compare with published effects", "No verdicts are committed yet",
        "No published time has been reproduced"
    ):
        assert sentence in text
    assert 'class="rank"' not in text


def test_a_sweep_whose_settings_changed_is_marked_stale(evidence, tmp_path):
    changed = json.loads((evidence / "ablate.json").read_text())
    for run in changed["rows"][0]["runs"]:
        run["ml_hash"] = "0" * 16
    (tmp_path / "ablate.json").write_text(json.dumps(changed))
    text = sections.page(facts.gather(tmp_path))
    assert (
        "stale" in row_of(text, "optim.muon")[2] and "stale" not in row_of(text, "model.residual.x0_mix")[2]
    )


def test_today_prefers_the_newest_base_and_common_changes_count_in_the_hash(evidence, tmp_path):
    old = json.loads((evidence / "ablate.json").read_text())
    old |= {"name": "zzz_old", "base": "short/9", "common": ["--set schedule.steps=20"]}
    old["rows"] = [
        r for r in old["rows"] if r["arm"] in ("--without optim.muon", "--without model.head.softcap")
    ]
    losses = [[r["val_loss"] for r in row["runs"]] for row in (old["control"], *old["rows"])]
    found = against_control(losses[0], dict(enumerate(losses[1:])))
    old |= {k: found[k] for k in ("pooled_sd", "df")}
    for i, row in enumerate(old["rows"]):
        row.update({k: found["rows"][i][k] for k in ("effect", "low", "high", "p", "resolved")})
    digest = facts.expected_hash("short/9", "tiny", ["--set schedule.steps=20", "--without optim.muon"])
    for run in old["rows"][0]["runs"]:
        run["ml_hash"] = digest
    for name, content in (("a", old), ("b", json.loads((evidence / "ablate.json").read_text()))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    site = facts.gather(tmp_path)
    assert (
        site["sweeps"][0]["rows"][0]["current"] is True and site["sweeps"][0]["rows"][1]["current"] is False
    )
    assert facts.today_at(site, "tiny")["path", "optim.muon"]["base"] == "short/11"


def test_text_from_the_data_cannot_become_markup(site):
    effects = [{**e, "technique": "</script><script>alert(1)</script>"} for e in site["effects"]]
    history = [{**h, "title": "<img src=x onerror=alert(1)>"} for h in site["history"]]
    text = sections.page({**site, "effects": effects, "history": history})
    assert Reader(text).loads == ["data:,"] and text.count("<script") == 2


def test_colours_have_contrast_in_both_themes():
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    blocks = re.findall(r"color-scheme: (?:light|dark);(.*?)}", (ROOT / "page/style.css").read_text(), re.S)
    # dark is written twice
    assert len(blocks) == 3 and re.sub(r"\s+", "", blocks[1]) == re.sub(r"\s+", "", blocks[2])
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for name in ("ink", "soft", "accent", "helps", "hurts", "grey", "warn"):
            for ground in ("ground", "panel", "warn-ground") if name == "warn" else ("ground", "panel"):
                light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


# ----- variants ---------------------------------------------------------------------------------------------

def section_of(page, name):
    return re.search(rf'<section id="{name}".*?</section>', page, re.S).group()


def test_variants_stand_apart_from_the_records_of_the_speedrun(page, site, built):
    """No place in history, worth table, prediction or the records' table of the index; one in a part of their
    own."""
    assert not any(facts.is_variant(h["ref"]) for h in site["history"])
    assert (
        facts.head(site) == deltas.find_record("short/head").ref
        and facts.scales_measured({**site, "sweeps": [s for s in site["sweeps"] if s["base"] == "variants"]})
        == []
    )
    for name in ("worth", "history", "predict"):
        assert "variants/" not in section_of(page, name)
    index, lineage = (built[name].split("\n## Variants\n") for name in ("records/README.md", "LINEAGE.md"))
    for ref, record in facts.variants_of(site).items():
        assert (
            ref not in index[0] + lineage[0] and f"| {ref} | {record.parent} | {record.title} |" in index[1]
        )
        assert f"### {ref}: {record.title}\n" in lineage[1] and "Published: nothing" not in lineage[1]
        cells = next(r["cells"] for r in Reader(section_of(page, "variants")).rows if r["cells"][0] == ref)
        assert (
            cells[1] == record.parent and record.title in cells[2]
            and all(path in cells[3] for path in record.delta)
        )


def test_differences_of_variants_are_those_of_the_sweep(page, evidence, built_here):
    made = json.loads((evidence / "chain_variants_tiny.json").read_text())
    assert [row["resolved"] for row in made["rows"]] == [True, False, True]  # both kinds of cell
    index, lineage = (built_here[name] for name in ("records/README.md", "LINEAGE.md"))
    rows = {r["cells"][0]: r["cells"] for r in Reader(section_of(page, "variants")).rows}
    for row in made["rows"]:
        cell = rows[row["arm"]][4]
        assert (
            tags.number(row["effect"], sign=True) in cell and tags.interval(row["low"], row["high"]) in cell
        )
        assert ("unresolved" in cell) != row["resolved"] and "n 4 against 4" in cell
        line = next(x for x in index.splitlines() if x.startswith(f"| {row['arm']} |"))
        half = (row["high"] - row["low"]) / 2
        assert (
            f"| {row['effect']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], n 4 and 4 |" in line
            if row["resolved"] else f"| unresolved (+-{half:.4f}), n 4 and 4 |" in line
        )
        verb = "saves" if row["effect"] <= 0 else "costs"
        part = lineage.split(f"### {row['arm']}: ")[1].split("### ")[0]
        assert f"Measured at tiny: {verb} {abs(row['effect']):.4f} nats against its parent" in part
    assert rows["variants/4"][4] == "\N{EN DASH}" and "not measured |" in index
    assert "Not compared with its parent yet." in lineage.split("### variants/4: ")[1].split("### ")[0]


def test_variants_that_no_sweep_compared_say_so(tmp_path):
    files = leaderboard.build(tmp_path)
    assert "No sweep of the variants is committed yet" in section_of(files["site/index.html"], "variants")
    assert "No sweep has compared" in files["records/README.md"]
    assert files["LINEAGE.md"].count("Not compared with its parent yet.") == len(
        facts.variants_of(facts.gather(tmp_path))
    )


def test_an_incomplete_sweep_of_variants_is_called_interim(evidence, tmp_path):
    made = json.loads((evidence / "chain_variants_tiny.json").read_text()) | {"complete": False}
    (tmp_path / "x.json").write_text(json.dumps(made))
    files = leaderboard.build(tmp_path)
    assert "interim, the sweep is incomplete" in section_of(files["site/index.html"], "variants")
    assert (
        "n 4 and 4, interim |" in files["records/README.md"]
        and "interim: the sweep is incomplete" in files["LINEAGE.md"]
    )


def test_a_parent_that_a_lineages_sweep_compared_with_an_earlier_one_is_no_variants_and_no_records_worth(
    site, evidence
):
    sweeps = [s for s in site["sweeps"] if s["base"] == "variants"]
    other = {**sweeps[0], "rows": [{**sweeps[0]["rows"][0], "arm": "short/11", "record": "short/11"}]}
    for flag in (True, False):
        assert facts.added_at({**site, "sweeps": [other]}, "tiny", variants=flag) == {}
    assert set(facts.added_at(site, "tiny", variants=True)) == set(BRANCHES)


def test_a_records_worth_is_told_by_the_sweep_with_most_runs_of_it(site):
    chain = next(s for s in site["sweeps"] if s["kind"] == "chain" and s["base"] != "variants")

    def told(runs, **more):
        rows = [{**row, "n": runs, "effect": -9.0} for row in chain["rows"]]
        longer = {**chain, "about": "short/33", "rows": rows, **more}
        return facts.added_at({**site, "sweeps": [chain, longer]}, "tiny")["short/11"]["worth"]

    old = [{**row, "n": 9, "effect": -9.0, "current": False} for row in chain["rows"]]
    outdated = {**chain, "about": "short/33", "rows": old}
    now = facts.added_at(site, "tiny")["short/11"]["worth"]
    assert facts.added_at({**site, "sweeps": [chain, outdated]}, "tiny")["short/11"]["worth"] == now
    assert (
        told(4) == told(5) == 9.0
        and told(3) == told(5, complete=False) == facts.added_at(site, "tiny")["short/11"]["worth"]
    )


def test_the_list_names_every_record_once_and_variants_in_a_table_of_their_own(capsys):
    with pytest.raises(SystemExit) as stop:
        records_command.main(["list"])
    assert stop.value.code == 0
    records, variants = re.split(r"\n\n(?=variant )", capsys.readouterr().out)
    for ref, record in deltas.load_records().items():
        mine, other = (variants, records) if facts.is_variant(ref) else (records, variants)
        lines = [x for x in mine.splitlines() if re.match(rf"{ref}\s", x)]
        assert len(lines) == 1 and record.title in lines[0]
        assert not re.search(rf"^{ref}\s", other, re.M)
        if facts.is_variant(ref):
            assert record.parent in lines[0]
    assert "minutes" in records and "minutes" not in variants and "loss" not in variants


# ----- data -------------------------------------------------------------------------------------------------

def test_the_embedded_settings_give_the_differences_of_the_diff_command(page):
    embedded = json.loads(page.split('id="data">')[1].split("</script>")[0])["settings"]
    records = {r["ref"]: r for r in embedded["records"]}

    def settings(ref):
        before = settings(records[ref]["parent"]) if records[ref]["parent"] else {}
        return before | records[ref]["changes"]

    refs = list(records)
    for left, right in [(refs[0], refs[-1]), (refs[-1], refs[0]), *zip(refs, refs[1:])]:
        a, b = settings(left), settings(right)
        mine = [(p, a.get(p) or "off", b.get(p) or "off") for p in embedded["paths"] if a.get(p) != b.get(p)]
        theirs = schema.difference(deltas.resolve(left).settings, deltas.resolve(right).settings)
        assert mine == [(p, schema.show(x), schema.show(y)) for p, x, y in theirs]


def test_curves_in_the_page_are_the_committed_ones(page, site):
    embedded = json.loads(page.split('id="data">')[1].split("</script>")[0])
    for run in embedded["runs"]:
        assert any(run["points"][-1][3] == round(r["val_loss"], 4) and run["points"][-1][1] == r["tokens"]
                   for r in site["runs"][run["ref"]])
    last = {c["ref"]: c["points"][-1] for c in embedded["published"]}
    assert last["short/11"] == [3000, 3000 * 524288, 433570, 3.2753]
    assert last["short/1"][2] is None  # llm.c's log has no times


def test_the_index_tells_the_committed_losses(site, built):
    text = built["records/README.md"]
    for ref, runs in site["runs"].items():
        line = next(x for x in text.splitlines() if x.startswith(f"| {ref} |"))
        tiny = [r for r in runs if r["scale"] == "tiny"]
        tiny = [r for r in tiny if r["current"]] or tiny
        mean, stale = (
            sum(r["val_loss"] for r in tiny) / max(1, len(tiny)),
            not all(r["current"] for r in tiny),
        )
        assert not tiny or f"| {mean:.4f} ({len(tiny)}){' stale' if stale else ''} |" in line


def test_history_is_consistent(site):
    for h in site["history"]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", h["date"]) and h["title"]
        # the optimizer track counts steps; two of its results were never verified
        assert (h["minutes"] or 0) > 0 or h["ref"].startswith("optimizer/"), h["ref"]
        # a new release of a library is nobody's idea
        assert all(h["people"]) and (h["people"] or h["kind"] == "retiming"), h["ref"]
        assert h["status"] in ("record", "retiming", "claim") and h["scope"] in ("parametric", "retrieval")
        if h["steps"] and h["tokens_per_step"].isdigit():
            assert h["tokens"] == h["steps"] * int(h["tokens_per_step"])
    minutes = [
        (h["id"], h["minutes"]) for h in site["history"] if h["lineage"] == "short" and h["status"] != "claim"
    ]
    # two retimings made record 21 slower; 22 counts from there
    retimed = [i for i, _ in minutes].index("21r")
    for part in (minutes[:retimed], minutes[retimed + 1:]):
        assert [m for _, m in part] == sorted((m for _, m in part), reverse=True)
    for ref in site["records"].keys() - facts.variants_of(site).keys():
        h = next(h for h in site["history"] if h["ref"] == ref)
        steps = deltas.resolve(ref).settings.schedule.steps
        # record 91's published runs are those of its pull request, which is on record 89
        told = (1300, 1290) if ref == "short/91" else (steps, steps)
        assert not h["steps"] or (h["steps"], steps) == told


def test_history_and_judge_tell_the_same_minutes(site):
    minutes = {h["ref"]: h["minutes"] for h in site["history"]}
    judged = facts.read_json(facts.EVIDENCE / "judge.json")["records"]
    told = {
        r["record"]: r["published_minutes"] for r in judged
        if r["published_minutes"] and r["track"] != "optimizer"
    }
    assert len(told) > 100 and {ref: minutes[ref] for ref in told} == told


def test_a_correlation_is_given_only_with_what_it_can_say(site):
    found = facts.predictions(site, "tiny")
    assert {p["tag"] for p in found["features"]["points"]} == {
        "softcap", "x0_mix", "value_residual", "momentum_warmup"
    }
    assert {p["record"] for p in found["records"]["points"]} == {"short/9", "short/10", "short/11"}
    assert "too few for an interval: it shows nothing" in sections.correlation_text(found["records"])
    x = {"points": [0] * 9, "rho": 0.4, "low": -0.3, "high": 0.8}
    assert "not told apart from no relation" in sections.correlation_text(x)
    assert "too few" in sections.correlation_text({"points": [0], "rho": None, "low": None, "high": None})


BAD = [
    ("{", "cannot be read as JSON"),
    ('{"kind": "chain"}', "it lacks base, confidence"),
    (
        json.dumps(sweep("x", "ablate", "short/11", {"arm": "a", "n": 1}, [{"arm": "b"}])),
        "not a sweep's evidence",
    ),
    (json.dumps(sweep("x", "ablate", "short/999", {"arm": "a", "n": 1}, [])), "unknown record 'short/999'"),
]


@pytest.mark.parametrize("text, message", BAD, ids=[m for _, m in BAD])
def test_bad_evidence_is_one_clear_line(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        facts.gather(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_tables_are_one_clear_line(tmp_path, monkeypatch):
    records = deltas.load_records()
    monkeypatch.setattr(facts, "PUBLISHED", tmp_path)
    text = (ROOT / "evidence/published/history.csv").read_text()
    for old, new, message in (
        ("2024-05-28,45,", "2024-05-28,44,", "short/1 took 44 minutes"),
        ("2024-05-28,45,", "2024-05-28,soon,", "line 2: minutes is not a number: 'soon'"),
        ("2024-05-28,45,", "2024-05-28,", "line 2 has not as many columns")
    ):
        (tmp_path / "history.csv").write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            facts.read_history(records)
    effects = (ROOT / "evidence/published/effects.csv").read_text()
    (tmp_path / "effects.csv").write_text(effects.replace("model.residual.x0_mix", "model.residual.x0_mx"))
    with pytest.raises(UserError, match="did you mean model.residual.x0_mix"):
        facts.read_effects()


def test_a_new_record_needs_no_line_in_the_history():
    record = dataclasses.replace(
        deltas.load_records()["short/11"], ref="short/93", published={"minutes": 0.6}
    )
    rows = facts.read_history({**deltas.load_records(), "short/93": record})
    assert rows[-1]["ref"] == "short/93" and rows[-1]["minutes"] == 0.6 and rows[-1]["here"]


def claim(folder, verdict="shown", changes=(), **fields):
    """results.json as `records verify` writes it, of two runs of record 11 at scale full."""
    runs = [
        {
            "run": i, "seed": i, "status": "finished", "val_loss": 3.279 + i / 1000,
            "train_time_ms": 430_000 + i, "folder": f"run{i}", "last_hash": "ab"
        }
        for i in range(2)
    ]
    arms = {"new": {"n": 2, "runs": runs, "loss": statistics.describe([r["val_loss"] for r in runs]),
                    "time_ms": statistics.describe([r["train_time_ms"] for r in runs])}}
    return {
        "claim": "ml", "record": "short/11", "scale": "full", "verdict": verdict, "grade": "audited",
        "device": "8 x NVIDIA H100", "cpu": "Test CPU", "machine": "0123456789ab", "where": folder,
        "arms": {"new": {"changes": list(changes)}}, "statistics": {"arms": arms, "target": {"passed": True}},
        **fields
    }


def test_a_claim_gets_a_row_on_the_board_of_its_machine_and_takes_its_card_off_the_list(site):
    refused = {"claim": "ml", "record": "short/11", "scale": "full", "verdict": "refused", "grade": "none"}
    claims = [claim("records/x"), claim("records/y", changes=["--set schedule.steps=9"]), refused]
    text = sections.boards({**site, "claims": {**site["claims"], "short/11": claims}})
    board = text.split("<h3>8 x NVIDIA H100; machine 0123456789ab</h3>")[1].split("<h3>")[0]
    rows = [r["cells"] for r in Reader(board).rows][1:]
    assert rows[0] == ["short/11", "full", "2", "3.2795", "0.0007", "430.0", "", "claim shown, audited", "1"]
    assert rows[1][-2:] == ["claim shown, audited --set schedule.steps=9", ""] and len(rows) == 2
    assert "unclaimed" in text and "8 x NVIDIA H100<" not in text.split("Unclaimed")[1]


def test_times_at_cpu_scales_are_shown_only_of_runs_that_took_turns(site):
    """A run there measures what else the machine did; a declared plan runs its arms in random order, one at a
    time."""
    def heads(text):
        return {row["cells"][0]: row["cells"] for row in Reader(text).rows}["record"]

    entries = sections.board_entries(site)
    cpu = [e for rows in entries.values() for e in rows if e["scale"] in ("tiny", "micro")]
    assert len(cpu) > 30 and {(e["seconds"], e["rate"]) for e in cpu} == {(None, None)}
    assert all(heads(sections.board(site, m, rows)) == ["record", "scale", "runs", "loss", "sd", "from"]
               for m, rows in entries.items())
    run = dict(next(r for r in site["runs"]["short/11"] if r["scale"] == "tiny"), reached=True, target=4.09)
    assert {ms for _, _, ms, _ in sections.run_points(run)} == {None}
    assert sections.run_points({**run, "claimed": True})[-1][2] == round(run["train_time_ms"])
    assert sections.run_points({**run, "scale": "full"})[-1][2] == round(run["train_time_ms"])
    alone = {
        **site, "sweeps": [], "runs": {"short/11": [run]},
        "claims": {"short/11": [claim("records/x", scale="micro")]}
    }
    (machine, first), (other, second) = sections.board_entries(alone).items()
    # reached, but no time to rank
    assert first[0]["reached"] and "place" not in heads(sections.board(alone, machine, first))
    assert second[0]["seconds"] == 430.0005 and "train time, s" in heads(sections.board(alone, other, second))
    points = [p for r in json.loads(sections.data(site))["runs"] if r["scale"] != "full" for p in r["points"]]
    assert points and all(p[2] is None for p in points)


@pytest.mark.parametrize(
    "name, edit, what",
    [
        ("ablate", lambda s: s["rows"][0].update(effect=0.9), r"--without optim\.muon: effect"),
        ("ablate", lambda s: s["rows"][1].update(low=0.5), "low"),
        ("ablate", lambda s: s["rows"][2].update(p=0.04), "p: not"),
        ("ablate", lambda s: s["rows"][2].update(resolved=not s["rows"][2]["resolved"]), "resolved: not"),
        ("ablate", lambda s: s["control"].update(mean=4.0), r"short/11: mean"),
        ("ablate", lambda s: s.update(df=99), "df: not"),
        ("chain", lambda s: s["rows"][2]["runs"][0].update(val_loss=4.0), "short/11: mean"),
        ("chain", lambda s: s["rows"][2].update(effect=-0.3), "short/11: effect"),
        ("chain", lambda s: s.update(method="dunnett"), "method: 'dunnett' is stated anew by"),
        ("chain", lambda s: s.update(paired=True), "method: 'means'"),
        ("chain_variants_tiny", lambda s: s["rows"][0].update(low=-0.5), "variants/1: low"),
        ("chain_variants_tiny", lambda s: s.update(confidence=0.9), "variants/1: low")
    ],
)
def test_a_sweep_whose_figures_its_losses_do_not_give_is_refused(name, edit, what, evidence, tmp_path):
    made = json.loads((evidence / f"{name}.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(made))
    assert len(facts.read_sweeps(tmp_path)) == 1
    edit(made)
    (tmp_path / "x.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=what):
        facts.read_sweeps(tmp_path)


def test_a_claim_whose_results_its_logs_do_not_give_is_refused(tmp_path, monkeypatch):
    targets = ["validation.target=5.2"]
    folder = tmp_path / "records/short/011_x"
    arms = {
        name: claim_builder.arm(ref, targets) for name, ref in (("new", "short/11"), ("parent", "short/10"))
    }
    claim_builder.build(folder, monkeypatch, claim_builder.declaration(arms))
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    moved = dataclasses.replace(deltas.load_records()["short/11"], folder=folder)
    results = verify.verify(folder)
    verify.store(folder, results, page=True)
    found, = facts.read_claims(moved)
    assert (found["verdict"], found["where"]) == ("shown", "records/short/011_x")
    for edit in (lambda x: x.update(grade="reproduced"), lambda x: x.update(verdict="not shown"),
                 lambda x: x["statistics"]["arms"]["new"]["time_ms"].update(mean=1.0)):
        edited = json.loads(json.dumps(results))
        edit(edited)
        (folder / "results.json").write_text(json.dumps(edited))
        with pytest.raises(UserError, match="is not what its logs give"):
            facts.read_claims(moved)


def test_of_a_claim_only_its_counted_runs_are_curves(tmp_path, monkeypatch):
    record = deltas.load_records()["short/11"]
    folder = tmp_path / "records/short/011_x"
    for name in ("run0", "discarded"):
        shutil.copytree(record.folder / "tiny", folder / "runs" / name)
    (folder / "manifest.jsonl").write_text("")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    moved = dataclasses.replace(record, folder=folder)
    (folder / "results.json").write_text(json.dumps(claim("")))
    monkeypatch.setattr(verify, "verify", lambda folder: claim(""))  # runs of no plan
    claims = facts.read_claims(moved)
    assert [r["folder"] for r in facts.read_runs(moved, claims)] == ["records/short/011_x/runs/run0"]
    assert facts.read_runs(moved) == [] and claims[0]["where"] == "records/short/011_x"


# ----- in a browser -----------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(
    not browser_page.chromium(), reason="no Chromium on the PATH: the page is not opened"
)


@pytest.fixture(scope="module")
def page_file(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("site") / "index.html"
    path.write_text(page)
    return path


@needs_chromium
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_the_page_opens_without_messages_requests_or_sideways_scrolling(page_file, width, scheme):
    tab = browser_page.Page(width=width, height=844, scheme=scheme)
    try:
        tab.open(page_file)
        assert tab.run("innerWidth") == width and tab.run("document.documentElement.scrollWidth") <= width
        assert (
            tab.run(
                "document.querySelectorAll('#history-chart svg, #curves-charts svg, .scatter svg').length"
            )
            == 5
        )
        for select in ("#history-chart .mark", "#curves-charts .curve", ".scatter .spot"):
            assert tab.run(f"document.querySelectorAll({select!r}).length") > 5
        dark = tab.run("getComputedStyle(document.body).backgroundColor") != "rgb(251, 251, 249)"
        assert dark == (scheme == "dark")
        assert not tab.messages and tab.requests == [page_file.as_uri()]
    finally:
        tab.close()


@needs_chromium
def test_the_page_answers(page_file):
    """Theme, history by keyboard, axis, curves, settings, order of the worth table, folded parts."""
    tab = browser_page.Page()
    ground = "getComputedStyle(document.body).backgroundColor"
    try:
        tab.open(page_file)
        light = tab.run(ground)
        for label, other in (("light", False), ("dark", True), ("automatic", False)):
            tab.run("document.getElementById('theme').click()")
            assert label in tab.run("document.getElementById('theme').getAttribute('aria-label')")
            assert (tab.run(ground) != light) == other
        tab.run("document.querySelector('#history-chart .mark').focus()")
        tab.press("ArrowRight")
        assert tab.run("document.getElementById('history-readout').textContent").startswith(
            "short/2: 31.4 min, 2024-06-06"
        )
        shown = tab.run("document.querySelectorAll('#history-chart .mark').length")
        tab.run("document.querySelector('#history-controls [name=medium]').click()")
        assert tab.run("document.querySelectorAll('#history-chart .mark').length") == shown + 18
        for i, unit in enumerate(("steps", "tokens", "minutes")):
            tab.run(f"document.querySelectorAll('#curves-controls input')[{i}].click()")
            assert unit in tab.run("document.querySelector('#curves-charts').textContent")
        tab.run("[...document.querySelectorAll('#curves-chips button')].find(b => b.textContent === "
                "'none').click()")
        assert tab.run("document.querySelectorAll('#curves-charts .curve').length") == 0
        tab.run(
            "(() => { const f = document.getElementById('diff-controls').elements; f.left.value = 'short/5'; "
            "f.right.value = 'short/11'; f.left.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        rows = tab.run("[...document.querySelectorAll('#diff-table tbody tr')].map(r => "
                       "[r.querySelector('code'), ...r.querySelectorAll('td')].map(c => c.textContent))")
        theirs = schema.difference(*(deltas.resolve(r).settings for r in ("short/5", "short/11")))
        assert [r[:3] for r in rows] == [[p, schema.show(a), schema.show(b)] for p, a, b in theirs]
        assert [r[3] for r in rows if r[0] == "model.head.softcap.cap"] == ["short/9"]
        order = (
            "[...document.querySelectorAll('[data-group=resolved] tr[data-today]')].map(r => "
            "+r.dataset.today)"
        )
        tab.run("document.querySelector('.worth [data-sort=today]').click()")
        down = tab.run(order)
        tab.run("document.querySelector('.worth [data-sort=today]').click()")
        assert down == sorted(down, reverse=True) and tab.run(order) == down[::-1]
        tab.run("document.querySelectorAll('details').forEach(d => d.querySelector('summary').click())")
        assert tab.run("[...document.querySelectorAll('details')].every(d => d.open)") and not tab.messages
    finally:
        tab.close()
