"""CSJ's manifests: four modes of transcripts, and what is said of each fault of a corpus."""

from pathlib import Path

import pytest
from csj_corpus import Corpus, line, plain, run
from lhotse import CutSet, RecordingSet, SupervisionSegment, SupervisionSet

from ssm_asr.cli.prepare import check, make_parser

TRAIN, DEV, EVAL1 = "A01F9001", "A01M0264", "A01M0110"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = Corpus(tmp_path / "usb" / "CSJ")
    for talk in (TRAIN, DEV, EVAL1):
        corpus.add(talk, plain(talk))
    return corpus


def prepare(corpus: Corpus, *options: str) -> tuple[dict[str, list[SupervisionSegment]], str, str]:
    """The supervisions of each set, the lines of all reports, and what was printed."""
    out = corpus.root.parent / "out"
    done = run(
        "manifests.py", "--corpus", corpus.root, "--out", out, "--transcripts", out / "trans", "--jobs", 1, *options
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    sets = {}
    for path in sorted(out.glob("*_supervisions.jsonl.gz")):
        name = path.name.removesuffix("_supervisions.jsonl.gz")
        sets[name] = list(SupervisionSet.from_file(path))
        recordings = {recording.id for recording in RecordingSet.from_file(out / f"{name}_recordings.jsonl.gz")}
        assert recordings >= {segment.recording_id for segment in sets[name]}
    reports = "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("*.left_out.tsv")))
    return sets, reports, done.stdout


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("mode", "text", "marked"),
    [
        ("disfluent", "えー二十", "(えー)二十"),
        ("fluent", "二十", None),
        ("number", "20", None),
        ("symbol", "#二十", "(#)二十"),
    ],
)
def test_modes_and_sets(corpus: Corpus, mode: str, text: str, marked: str | None) -> None:
    before = snapshot(corpus.root)
    sets, _, _ = prepare(corpus, "--transcript-mode", mode)
    assert snapshot(corpus.root) == before
    assert {name: [s.id for s in segments] for name, segments in sets.items()} == {
        "train": [f"{TRAIN}_0001", f"{TRAIN}_0002"],
        "dev": [f"{DEV}_0001", f"{DEV}_0002"],
        "test-eval1": [f"{EVAL1}_0001", f"{EVAL1}_0002"],
    }
    first, second = sets["train"]
    assert (first.start, first.duration, first.text, second.text) == (0.5, 1.5, text, "京都")
    texts = {"disfluent": "えー二十", "fluent": "二十", "number": "20", "symbol": "#二十"}
    assert first.custom == texts | ({"marked": marked} if marked else {})


def test_joining(corpus: Corpus) -> None:
    """Up to 10 s where less than 1 s is between; not over what was made unrecognisable."""
    times_s = [(0.0, 3.0), (3.9, 6.0), (6.5, 9.9), (10.0, 12.0), (13.0, 14.0), (14.5, 15.0), (15.5, 16.0), (16.2, 17.0)]
    surfaces = ["東", "京", "都", "大", "阪", "(R ××)", "犬", "猫"]
    lines = [line(TRAIN, i, *time, text) for i, (time, text) in enumerate(zip(times_s, surfaces, strict=True), start=1)]
    corpus.add(TRAIN, lines, duration_s=20.0)
    sets, reports, printed = prepare(corpus)
    assert [(s.id[-1], s.text, s.start, round(s.end, 3)) for s in sets["train"]] == [
        ("1", "東京都", 0.0, 9.9),
        ("4", "大", 10.0, 12.0),
        ("5", "阪", 13.0, 14.0),
        ("7", "犬猫", 15.5, 17.0),
    ]
    assert f"{TRAIN}_0006\tmade unrecognisable (×)\t{corpus.sdb(TRAIN)}\n" in reports
    assert "train (1 talks): utterances kept 4, left out 1: 1 made unrecognisable (×)" in printed


def test_dialogue(corpus: Corpus) -> None:
    corpus.add("D01F9002", [*plain("D01F9002"), line("D01F9002", 3, 6.0, 7.0, "大阪", channel="R")])
    sets, _, _ = prepare(corpus)
    said = {(s.recording_id, s.text) for s in sets["train"] if s.recording_id[0] == "D"}
    assert said == {("D01F9002-L", "えー二十"), ("D01F9002-L", "京都"), ("D01F9002-R", "大阪")}


def test_evaluation_talks_are_excluded_or_missing(corpus: Corpus) -> None:
    corpus.add("S05M0613", plain("S05M0613"))
    sets, reports, printed = prepare(corpus)
    assert not [s for segments in sets.values() for s in segments if s.recording_id == "S05M0613"]
    assert "excluded (1 talks): a speaker of eval2 speaks in them\n" in printed
    assert f"A01M0137\ttalk is missing\tno MORPH/SDB/*/A01M0137.sdb in {corpus.root}\n" in reports
    assert "test-eval2 (0 talks): utterances kept 0, left out 10: 10 talk is missing (e.g. A01M0056)" in printed


BROKEN = line(TRAIN, 3, 6.0, 7.0, "大阪")


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (BROKEN.rsplit("\t", 13)[0], "4 columns, 6 or more are expected"),
        (BROKEN.replace("00006.000-00007.000", "6 s"), "column 3 is '0003 6 s L:-001-001'; expected SEGMENT START-END"),
        (BROKEN.replace("00007.000", "00010.500"), "times 00006.000 - 00010.500 s in audio of 10.000 s"),
        (BROKEN.replace("00007.000", "00006.000"), "times 00006.000 - 00006.000 s in audio"),
        (line(TRAIN, 3, 6.0, 7.0, "(F えー"), "column 5: a bracket is never closed"),
        (line(TRAIN, 3, 6.0, 7.0, "大)阪"), "column 5: ) without ( in '大)阪'"),
        (line(TRAIN, 3, 6.0, 7.0, "大阪", "(W オー"), "column 10: a bracket is never closed"),
        (line(TRAIN, 3, 6.0, 7.0, "(Q えー)"), "column 5: unknown tag (Q in '(Q えー)'"),
        (line(TRAIN, 3, 6.0, 7.0, "(えー)"), "column 5: unknown tag ( in '(えー)'"),
        (BROKEN.replace(TRAIN, ""), "column 2, the talk, is empty"),
    ],
)
def test_a_broken_line_costs_its_segment(corpus: Corpus, broken: str, fault: str) -> None:
    around = [line(TRAIN, 3, 6.0, 7.0, "大阪"), broken, line(TRAIN, 4, 8.5, 9.0, "学校")]
    if "6 s" in broken:  # nobody knows which segment it is of
        around.insert(2, line(TRAIN, 3, 6.0, 7.0, "大阪"))
    corpus.add(TRAIN, [*plain(TRAIN), *around])
    sets, reports, printed = prepare(corpus)
    assert [s.text for s in sets["train"]] == ["えー二十", "京都", "学校"]
    entry = next(text for text in reports.splitlines() if "broken SDB line" in text)
    assert entry.startswith(f"{corpus.sdb(TRAIN)}:5\tbroken SDB line\t{fault}")
    assert entry.endswith("[segment left out: 0003]")
    assert "left out 1: 1 broken SDB line" in printed and f"  {entry}" in printed.splitlines()


def test_a_line_that_is_no_shift_jis(corpus: Corpus) -> None:
    sdb = corpus.sdb(TRAIN)
    sdb.write_bytes(sdb.read_bytes().replace("京都".encode("shift_jis"), b"\xff\xff"))
    sets, reports, _ = prepare(corpus)
    assert [s.text for s in sets["train"]] == ["えー二十"]
    assert f"{sdb}:3\tbroken SDB line\tno Shift-JIS from byte " in reports


def test_a_lost_segment_takes_the_bracket_of_another(corpus: Corpus) -> None:
    corpus.add(TRAIN, [*plain(TRAIN), line(TRAIN, 3, 6.0, 7.0, "(F えー"), line(TRAIN, 4, 7.5, 12.0, "あ)")])
    sets, reports, _ = prepare(corpus)
    assert [s.text for s in sets["train"]] == ["えー二十", "京都"]
    assert f"{corpus.sdb(TRAIN)}:5\tbroken SDB line\ttimes" in reports
    assert f"{corpus.sdb(TRAIN)}:4\tbroken SDB line\tcolumn 5: a bracket is never closed" in reports


def test_a_tag_over_two_segments(corpus: Corpus) -> None:
    corpus.add(TRAIN, [line(TRAIN, 1, 1.0, 2.0, "(F えー"), line(TRAIN, 2, 4.5, 5.0, "あのー)京都")])
    sets, _, _ = prepare(corpus)
    (segment,) = sets["train"]
    assert (segment.text, segment.start, segment.end) == ("えーあのー京都", 1.0, 5.0)
    assert segment.custom["fluent"] == "京都"


def test_missing_and_bad_audio(corpus: Corpus) -> None:
    for talk in ("A01F9003", "A01F9004", "D01F9002"):
        corpus.add(talk, [*plain(talk), *(plain(talk, "R") if talk[0] == "D" else [])])
    corpus.wav("A01F9003").unlink()
    corpus.wav("A01F9004").write_bytes(b"no audio")
    corpus.wav("D01F9002-R").unlink()
    corpus.wav("A01F9005").write_bytes(corpus.wav(TRAIN).read_bytes())
    sets, reports, printed = prepare(corpus)
    assert {s.recording_id for s in sets["train"]} == {TRAIN, "D01F9002-L"}
    for name in ("A01F9003", "D01F9002-R"):
        assert f"{corpus.wav(name)}\ttranscript with no audio\t{corpus.sdb(name[:8])}" in reports
    assert f"{corpus.wav('A01F9004')}\ttruncated or no audio\t{corpus.sdb('A01F9004')}: " in reports
    assert f"{corpus.wav('A01F9005')}\taudio with no transcript\n" in reports
    assert "2 transcript with no audio" in printed


def test_a_talk_without_speech(corpus: Corpus) -> None:
    corpus.add("A01F9003", [])
    corpus.add("A01F9004", [line("A01F9004", 1, 1.0, 2.0, "<雑音>")])
    corpus.add("D01F9002", plain("D01F9002"))  # the other speaker says nothing
    sets, reports, _ = prepare(corpus)
    assert {s.recording_id for s in sets["train"]} == {TRAIN, "D01F9002-L"}
    for name in ("A01F9003", "A01F9004", "D01F9002-R"):
        detail = f"no segment of {corpus.sdb(name[:8])} has words"
        assert f"{corpus.wav(name)}\tno speech in this talk\t{detail}\n" in reports


def test_refused(corpus: Corpus) -> None:
    out = corpus.root.parent / "out"
    done = run("manifests.py", "--corpus", corpus.root / "WAV", "--out", out, "--transcripts", out)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{corpus.root / 'WAV'}: no CSJ here; expected MORPH/SDB/core/TALK.sdb, ")
    done = run("manifests.py", "--corpus", corpus.root, "--out", out, "--transcripts", corpus.root / "trans")
    assert "is within the corpus" in done.stderr and not (corpus.root / "trans").exists()
    corpus.sdb(TRAIN).write_text("")
    done = run("manifests.py", "--corpus", corpus.root, "--out", out, "--transcripts", out / "trans", "--jobs", 1)
    assert done.returncode == 1
    assert done.stderr.endswith(f"no usable utterance for train: see {out}/train.left_out.tsv\n")


def test_check_makes_cuts_of_them(corpus: Corpus) -> None:
    prepare(corpus)
    out = corpus.root.parent / "out"
    check(make_parser().parse_args(["check", "--manifests", str(out), "--out", str(out / "cuts"), "--jobs", "1"]))
    cuts = CutSet.from_file(out / "cuts" / "cuts_test-eval1.jsonl.gz")
    assert [(cut.id, cut.supervisions[0].custom["marked"]) for cut in cuts] == [
        (f"{EVAL1}_0001", "(えー)二十"),
        (f"{EVAL1}_0002", "京都"),
    ]
