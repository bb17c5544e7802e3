"""Comparing models over chunk widths: what is decoded, what is kept, and what is written."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import toy

from ssm_asr.cli import compare, stream
from ssm_asr.evaluation import streaming
from ssm_asr.evaluation.compare import cells
from ssm_asr.evaluation.streaming import recognise

Captured = pytest.CaptureFixture[str]
ENCODER = toy.EXPERIMENT["model"]["encoder"]
CURRENT_COMMIT = cells.current_commit
CHUNKS = ["--chunks", "160ms,2.56s", "--left", "128,1280ms"]


class Setting:
    """Two models and a test set, and what compare made of them."""

    def __init__(self, root: Path) -> None:
        self.attention, self.recurrent = root / "attention" / "model.pt", root / "recurrent" / "model.pt"
        toy.write_checkpoint(self.attention)
        toy.write_checkpoint(self.recurrent, model={"encoder": {**ENCODER, "left_context_frames": [0]}})
        self.cuts = toy.write_cuts(root / "data", "tones", 5)
        self.out = root / "out"
        assert compare.main(self.arguments(self.out)) == 0

    def arguments(self, out: Path, *options: str) -> list[str]:
        models = ["--checkpoints", str(self.attention), str(self.recurrent)]
        return [*models, "--cuts", str(self.cuts), "--out", str(out), *CHUNKS, *options]


@pytest.fixture(scope="module", autouse=True)
def commit() -> Iterator[None]:
    """Whatever happens to the checkout meanwhile, the commit stays the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "current_commit", lambda: "0123abc")
        yield


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("compare"))


@pytest.fixture
def copy(setting: Setting, tmp_path: Path) -> Path:
    """A copy of what compare wrote."""
    return shutil.copytree(setting.out, tmp_path / "out")


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def modified(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


# --- what is decoded


def test_cells(setting: Setting) -> None:
    """At 2560 ms left contexts of 64 and 128 frames are both one chunk; without left context there is one cell."""
    rows = results(setting.out)["cells"]
    assert [(r["model"], r["chunk_ms"], r["left_frames"], r["asked_left_frames"]) for r in rows] == [
        ("attention", 160, 64, [64]),
        ("attention", 160, 128, [128]),
        ("attention", 2560, 128, [64, 128]),
        ("recurrent", 160, 0, [0]),
        ("recurrent", 2560, 0, [0]),
    ]
    assert len({row["error_rate"] for row in rows}) > 2 and len({row["state_bytes"] for row in rows}) == 3


def test_numbers_are_those_of_stream(setting: Setting, tmp_path: Path) -> None:
    for row in results(setting.out)["cells"]:
        options = ["--checkpoint", row["checkpoint"], "--cuts", str(setting.cuts), "--out", str(tmp_path)]
        assert stream.main([*options, "--chunk", str(row["chunk_ms"] // 20), "--left", str(row["left_frames"])]) == 0
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert [row["interval_low"], row["interval_high"]] == summary["interval"]
        assert (row["length"], row["left_frames"]) == (summary["reference_length"], summary["left_context_frames"])
        for key in ("error_rate", "errors", "utterances", "state_bytes", "method", "device", "unit", "cuts"):
            assert row[key] == summary[key], key
        assert row["lag_ms"] > row["chunk_ms"] + 130 and row["real_time_factor"] > 0
        texts = [directory / "hypotheses.tsv" for directory in (tmp_path, setting.out / "cells" / row["directory"])]
        assert texts[0].read_bytes() == texts[1].read_bytes()


def test_characters_and_processes(setting: Setting, tmp_path: Path, capsys: Captured) -> None:
    options = ["--unit", "char", "--limit", "2", "--jobs", "2", "--chunks", "2560ms"]
    assert compare.main(setting.arguments(tmp_path, *options)) == 0
    rows = results(tmp_path)["cells"]
    assert [(row["unit"], row["utterances"], row["chunk_ms"]) for row in rows] == [("char", 2, 2560)] * 2
    assert "tones: CER % at each chunk width" in capsys.readouterr().out
    assert "characters, spaces left out" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- what is kept


def test_a_finished_comparison_is_not_decoded_again(setting: Setting, copy: Path, capsys: Captured) -> None:
    before = modified(copy)
    assert compare.main(setting.arguments(copy)) == 0
    assert modified(copy) == before
    assert "5 cells, 5 of them finished before" in capsys.readouterr().out
    for name in ("results.json", "results.csv", "table.md", "report.html", "chunk_width.svg", "state_bytes.png"):
        assert (copy / name).read_bytes() == (setting.out / name).read_bytes(), name


def test_a_model_beside_itself(setting: Setting, tmp_path: Path) -> None:
    options = ["--chunks", "2560ms", "--limit", "2", "--checkpoints", str(setting.attention), str(setting.attention)]
    assert compare.main(setting.arguments(tmp_path, *options, "--names", "one", "again")) == 0
    rows = results(tmp_path)["cells"]
    assert rows[0]["directory"] == rows[1]["directory"] and len(list((tmp_path / "cells").iterdir())) == 1


def test_stopping_loses_one_cell(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    heard = []

    def stopped(*args: Any, **options: Any) -> str:
        heard.append(1)
        if len(heard) == 8:  # of 5 utterances a cell
            raise KeyboardInterrupt
        return recognise(*args, **options)

    monkeypatch.setattr(streaming, "recognise", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.main(setting.arguments(tmp_path))
    assert len(modified(tmp_path)) == 1 and not (tmp_path / "results.json").exists()
    (first,) = modified(tmp_path).items()
    assert compare.main(setting.arguments(tmp_path)) == 0
    assert "5 cells, 1 of them finished before" in capsys.readouterr().out
    assert len(heard) == 8 + 4 * 5 and first in modified(tmp_path).items()
    assert modified(tmp_path).keys() == modified(setting.out).keys()
    rates = [[row["error_rate"] for row in results(out)["cells"]] for out in (tmp_path, setting.out)]
    assert rates[0] == rates[1]


def test_a_half_written_cell_is_not_taken_for_finished(
    setting: Setting, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = results(copy)["cells"][1]["directory"]
    shutil.rmtree(copy / "cells" / lost)

    def fails(out: Path, *rest: Any) -> None:
        out.mkdir(parents=True)
        (out / "summary.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(cells, "write_results", fails)
        compare.main(setting.arguments(copy))
    assert compare.main(setting.arguments(copy)) == 0
    assert modified(copy).keys() == modified(setting.out).keys()
    assert results(copy)["cells"][1]["error_rate"] == results(setting.out)["cells"][1]["error_rate"]


def test_other_inputs_are_other_cells(setting: Setting, tmp_path: Path) -> None:
    def names(checkpoint: Path, cuts: Path, limit: int, unit: str) -> set[str]:
        models, sets = cells.load_models([checkpoint], ["name"], unit), cells.load_test_sets([cuts], limit)
        return {cell.directory for cell in cells.plan(models, sets, [8], [64], "cpu")}

    other_cuts = toy.write_cuts(tmp_path, "tones", 5, seed=7)
    toy.write_checkpoint(tmp_path / "model.pt", train={"seed": 1})
    found = [
        names(setting.attention, setting.cuts, 0, "word"),
        names(tmp_path / "model.pt", setting.cuts, 0, "word"),
        names(setting.attention, other_cuts, 0, "word"),
        names(setting.attention, setting.cuts, 3, "word"),
        names(setting.attention, setting.cuts, 0, "char"),
    ]
    assert len(set.union(*found)) == len(found)
    assert names(setting.attention, setting.cuts, 9, "word") == found[0]  # there are only five


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", CURRENT_COMMIT())
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert CURRENT_COMMIT() == "unknown"


# --- what is written


class Page(HTMLParser):
    """The tags of a page and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("href", "xlink:href", "src", "data")]


def test_files(setting: Setting) -> None:
    tree = results(setting.out)
    assert [model["name"] for model in tree["models"]] == ["attention", "recurrent"]
    assert tree["models"][1]["config"]["model"]["encoder"]["left_context_frames"] == [0]
    with open(setting.out / "results.csv", encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))
    assert [float(row["error_rate"]) for row in shown] == [row["error_rate"] for row in tree["cells"]]
    assert shown[2]["asked_left_frames"] == "64 128" and shown[0].keys() == tree["cells"][0].keys()
    rate = 100 * tree["cells"][2]["error_rate"]
    table = (setting.out / "table.md").read_text(encoding="utf-8")
    assert f"| {rate:.2f} [" in table and table.count("| attention | 1280 |") == 1  # 64 frames; 128 is another line
    for stem in ("chunk_width", "state_bytes"):
        assert (setting.out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        svg = (setting.out / f"{stem}.svg").read_text(encoding="utf-8")
        texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert "WER (%)" in texts and "tones" in texts
        assert "currentColor" in svg and "#1b1c1f" in svg.split("</style>")[0] and "dc:date" not in svg
    assert "2560" in texts or "chunk 2560 ms" in texts


def test_the_page_needs_nothing_else(setting: Setting) -> None:
    text = (setting.out / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.tags.count("svg") == 2 and not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert found.links and all(link.startswith("#") for link in found.links)
    assert "@import" not in text and "url(http" not in text
    assert text.count("prefers-color-scheme: dark") == 1 and "embed_channels: [4, 4, 8]" in text
    assert "Commit 0123abc." in text and results(setting.out)["commit"] == "0123abc"


def test_texts_are_escaped(setting: Setting, copy: Path) -> None:
    bad, name = "</pre><script>alert(1)</script>", "<b>$a_1$|&--"
    for row in results(copy)["cells"]:
        path = copy / "cells" / row["directory"] / "hypotheses.tsv"
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        spoilt = [f"{line.rpartition(chr(9))[0]}\t{bad}\n" for line in lines]
        path.write_text(header + "\n" + "".join(spoilt), encoding="utf-8")
    assert compare.main(setting.arguments(copy, "--names", name, "other", "--note", bad)) == 0
    text = (copy / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert "script" not in found.tags and "b" not in found.tags
    assert text.count("&lt;script&gt;alert(1)") > 2 and "&lt;b&gt;$a_1$|&amp;--" in text
    svg = (copy / "chunk_width.svg").read_text(encoding="utf-8")
    assert "&lt;b&gt;$a_1$|&amp;--, left context 1280 ms</text>" in svg
    assert "| <b>$a_1$\\|&-- |" in (copy / "table.md").read_text(encoding="utf-8")


# --- mistakes


def test_bare_milliseconds_are_refused(setting: Setting, tmp_path: Path, capsys: Captured) -> None:
    """As chunk widths were once given here."""
    with pytest.raises(SystemExit) as caught:
        compare.main(setting.arguments(tmp_path / "out", "--chunks", "8,320"))
    assert caught.value.code == 2
    assert "--chunks: 320: a bare number is frames of 20 ms; write 320ms\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunks", "160ms,180ms"], "attention/model.pt at 180 ms: chunk of 9 frames (180 ms): give a multiple of 2"),
        (["--left=-1"], "attention/model.pt at 160 ms: left context of -1 frames: with chunks, give 0 or more"),
        (["--checkpoints", "none.pt"], "none.pt: no such checkpoint"),
        (["--checkpoints", "full.pt"], "full.pt at 160 ms: this model was trained without chunks"),
        (["--names", "one"], "2 checkpoints named one: give --names, one each, no two alike"),
        (["--names", "one", "one"], "2 checkpoints named one, one: give --names, one each, no two alike"),
        (["--cuts", "none.jsonl.gz"], "none.jsonl.gz: no cut manifest"),
        (
            ["--cuts", "x/cuts_a.jsonl.gz", "y/cuts_a.jsonl.gz"],
            "y/cuts_a.jsonl.gz: another manifest is called 'a'",
        ),
        (["--limit", "-1"], "--jobs 1, --limit -1: give 1 or more jobs, and no negative limit"),
        (["--jobs", "0"], "--jobs 0, --limit 0: give 1 or more jobs, and no negative limit"),
        (["--device", "gpu"], "device 'gpu': give auto, cpu or cuda"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    message: str,
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "full.pt" in options:
        toy.write_checkpoint(tmp_path / "full.pt", model={"encoder": {**ENCODER, "causal": False}})
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copy(setting.cuts, tmp_path / folder / "cuts_a.jsonl.gz")
    assert compare.main(setting.arguments(tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
