"""The benchmarks of data, a chunk, the loss and training run, and print rows of numbers that can be right."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import bench_chunk, bench_data, bench_distributed, bench_loss, bench_train, peer

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "egs" / "librispeech" / "conf"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def plain_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips a test where the peer is not installed; compiling its activations would take longer than a test may."""
    try:
        peer.register()
    except peer.PeerMissing as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs a program in this process, and restores the number of threads that it sets."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        return module.main()
    finally:
        torch.set_num_threads(threads)


def test_data(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    config = TINY / "zipformer_s.yaml"  # it has fixed shapes
    arguments = ["--config", config, "--utterances", 12, "--batches", 1, "--workers"]
    assert run(bench_data, monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    costs = {
        name: {part: float(ms) for part, ms in re.findall(r"(\w+(?: \w+)?) (\d+)[,)]", parts)}
        for name, parts in re.findall(r"\n([\w ]+)\n  processor time: .* of audio (\(.*\))", printed)
    }
    assert set(costs) == {"on the fly", "stored", "shards"}
    assert costs["on the fly"].keys() >= {"read audio", "make features"}
    for stored in ("stored", "shards"):
        assert "read features" in costs[stored] and "read audio" not in costs[stored]


def test_chunk_beside_the_peer(plain_peer: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    configs = [TINY / "zipformer_tiny.yaml", TINY / "sammo_tiny.yaml"]
    arguments = ["--chunk-frames", 16, "--left-context", 64, "--rounds", 1]
    assert run(bench_chunk, monkeypatch, "--config", *configs, *arguments) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[10:34].strip() for row in rows] == ["zipformer_tiny", "peer", "peer, plain", "sammo_tiny"]
    # A configuration that the peer does not have is refused, not compared.
    assert run(bench_chunk, monkeypatch, "--config", configs[1], *arguments) == 2
    refused = f"{configs[1]}: not the peer's encoder; give a Zipformer, or --no-peer"
    assert capsys.readouterr().err.splitlines()[-1] == refused


def test_training_beside_the_peer(plain_peer: None, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(bench_train, "FIXED", [(1, 2.0)])
    monkeypatch.setattr(bench_train, "MIX", [(1, 1.5), (1, 2.0)])
    arguments = ["--device", "cpu", "--batch-scale", "1", "--vocab-size", "30", "--repeats", "1"]
    run(bench_train, monkeypatch, *arguments)
    printed = capsys.readouterr().out
    differences = re.search(r"peer against plain .*: outputs differ by (\S+), gradients by (\S+)\n", printed)
    assert differences and 0 < float(differences[1]) < 1e-5 and 0 < float(differences[2]) < 0.01
    rows = [row.split() for row in printed.splitlines() if row.startswith(("fixed", "mix")) and ":" not in row]
    wanted = [[s, k, side] for s in ("fixed", "mix") for k in bench_train.KINDS for side in ("peer", "plain")]
    assert [row[:3] for row in rows] == [row for row in wanted if row[1:] != ["loss", "peer"]]
    assert all(float(figure) > 0 for row in rows for figure in row[3:])


def test_loss_step_has_finite_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    for joiner_dim in (0, 16):
        bench_loss.make_step(bench_loss.Case(2, 20, 5, 30, joiner_dim), "ssm_asr")()
    monkeypatch.setattr(bench_loss, "PEERS", ("no_such_library",))
    assert bench_loss.importable_peer() is None


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (bench_distributed, [], "one process has none to be compared with; start it by torchrun, as above"),
        (bench_distributed, ["--device", "gpu"], "device 'gpu': give auto, cpu or cuda"),
        (
            bench_train,
            ["--device", "cpu", "--precision", "bf16"],
            "--precision bf16: on a CPU the peer takes float32",
        ),
        (bench_train, ["--peer", "/none"], "--peer /none: no such folder; pip install --no-deps zipformer"),
    ],
)
def test_mistakes(
    module: ModuleType, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with pytest.raises(SystemExit):
        run(module, monkeypatch, *arguments)
    assert f"{module.__name__}: error: {message}" in capsys.readouterr().err


def test_two_processes() -> None:
    options = ["--device", "cpu", "--config", TINY / "zipformer_tiny.yaml", "--precision", "float32", "--repeats", 1]
    options += ["--seconds", 1, "--utterances", 2]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ROOT / "benchmarks/bench_distributed.py",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, [*command, *options])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    error = re.search(r"gradients of 2 processes differ from those of one by (\S+) of", done.stdout)
    assert error and 0 < float(error[1]) < 1e-5
    way = re.search(r"after 20 steps the weights have gone ways that differ by (\S+) of", done.stdout)
    assert way and 0 < float(way[1]) < 0.02
    assert re.search(r"one process [\d.]+ ms a step, 2 together [\d.]+ ms; efficiency [\d.]+ %", done.stdout)
