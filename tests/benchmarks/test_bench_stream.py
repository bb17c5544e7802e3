"""The streaming benchmark runs exported models and prints a row for each model, left context and number of streams."""

from pathlib import Path

import pytest
import toy
from encoders import ENCODERS

from benchmarks import bench_stream
from ssm_asr.cli.describe import describe
from ssm_asr.config import to_yaml

Captured = pytest.CaptureFixture[str]


def test_rows(tmp_path: Path, capsys: Captured) -> None:
    configs = []
    for name in ("zipformer", "sammo"):
        configs.append(tmp_path / f"{name}.yaml")
        configs[-1].write_text(to_yaml(toy.experiment(model={"encoder": ENCODERS[name][0]})), encoding="utf-8")
    arguments = ["--config", *map(str, configs), "--left", "32", "--streams", "2", "--seconds", "0.01"]
    assert bench_stream.main([*arguments, "--vocab-size", "7", "--precision", "int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chunk 320 ms, 7 tokens, random weights, one thread" and len(lines) == 6
    assert lines[3].count("|") == lines[2].count("|") == 12
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[:3] for row in rows] == [
        ["zipformer", "int8", "640"],
        ["sammo", "int8", "0"],  # it is trained without left context
    ]
    floats = describe(toy.experiment(model={"encoder": ENCODERS["zipformer"][0]}), 7, 16, 32)["state_floats"]
    assert rows[0][3] == f"{4 * floats / 2**20:.2f}"
    for row in rows:
        audio_s_a_second, _, p50_ms, p99_ms, rounds, factor = (float(cell) for cell in row[5:])
        assert audio_s_a_second > 0 and 0 < p50_ms <= p99_ms and factor > 0 and rounds >= bench_stream.LEAST_ROUNDS


def test_a_chunk_that_does_not_fit(capsys: Captured) -> None:
    assert bench_stream.main(["--chunk", "12"]) == 2
    assert capsys.readouterr().err == "chunk of 12 frames (240 ms): give a multiple of 8 frames (160 ms)\n"
