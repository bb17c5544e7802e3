"""The benchmarks of the data side, of a chunk and of the loss run, and print rows of numbers that can be right."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "egs" / "librispeech" / "conf"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        return module.main()
    finally:
        torch.set_num_threads(threads)


def test_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = TINY / "zipformer_s.yaml"  # with fixed shapes
    arguments = ["--config", config, "--utterances", 12, "--batches", 1, "--workers"]
    assert run(tool("bench_data"), monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    costs = {
        name: {part: float(ms) for part, ms in re.findall(r"(\w+(?: \w+)?) (\d+)[,)]", parts)}
        for name, parts in re.findall(r"\n([\w ]+)\n  processor time: .* of audio (\(.*\))", printed)
    }
    assert set(costs) == {"on the fly", "stored", "shards"}
    assert costs["on the fly"].keys() >= {"read audio", "fbank"}
    for stored in ("stored", "shards"):
        assert "read features" in costs[stored] and "fbank" not in costs[stored]


def test_chunk_beside_the_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("zipformer") is None:
        pytest.skip("the PyPI package zipformer is not installed")
    module = tool("bench_chunk")
    # Compiling the peer's activations takes longer than a test may.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    configs = [TINY / "zipformer_tiny.yaml", TINY / "sammo_tiny.yaml"]
    arguments = ["--chunk-frames", 16, "--left-context", 64, "--rounds", 1]
    assert run(module, monkeypatch, "--config", *configs, *arguments) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[10:34].strip() for row in rows] == ["zipformer_tiny", "peer", "peer, plain", "sammo_tiny"]
    # A configuration that the peer does not have is refused, not compared.
    assert run(module, monkeypatch, "--config", configs[1], *arguments) == 2
    assert "not the peer's encoder" in capsys.readouterr().err


# In a process of its own: the package can be loaded once only, and here in another way than for the tests beside it.
SHORT_BATCHES = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import bench_train
bench_train.FIXED, bench_train.MIX = [(1, 2.0)], [(1, 1.5), (1, 2.0)]
bench_train.main()
"""


def test_training_beside_the_peer() -> None:
    if importlib.util.find_spec("zipformer") is None:
        pytest.skip("the PyPI package zipformer is not installed")
    arguments = ["--device", "cpu", "--batch-scale", "1", "--vocab-size", "30", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_BATCHES, str(ROOT / "benchmarks"), *arguments],
        env={
            **os.environ,
            "TORCHDYNAMO_DISABLE": "1",
        },  # to compile the peer's activations takes longer than a test may
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    differences = re.search(r"peer against plain .*: outputs differ by (\S+), gradients by (\S+)\n", printed)
    assert differences and 0 < float(differences[1]) < 1e-5 and 0 < float(differences[2]) < 0.01
    rows = [row.split() for row in printed.splitlines() if row.startswith(("fixed", "mix")) and ":" not in row]
    kinds = ("encoder_step", "loss", "training_step", "evaluation")
    wanted = [[s, k, side] for s in ("fixed", "mix") for k in kinds for side in ("peer", "plain")]
    assert [row[:3] for row in rows] == [row for row in wanted if row[1:] != ["loss", "peer"]]
    assert all(float(figure) > 0 for row in rows for figure in row[3:])


def test_loss_step_has_finite_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tool("bench_loss")
    for joiner_dim in (0, 16):
        module.make_step(module.Case(2, 20, 5, 30, joiner_dim), "ssm_asr")()
    monkeypatch.setattr(module, "PEERS", ("no_such_library",))
    assert module.importable_peer() is None


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench_distributed", [], "one process has none to be compared with; start it by torchrun, as above"),
        ("bench_distributed", ["--device", "gpu"], "device 'gpu': give auto, cpu or cuda"),
        (
            "bench_train",
            ["--device", "cpu", "--precision", "bf16"],
            "--precision bf16: on a CPU the peer takes float32",
        ),
        ("bench_train", ["--peer", "/none"], "--peer /none: no such folder; pip install --no-deps zipformer"),
    ],
)
def test_mistakes(
    name: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tool(name), monkeypatch, *arguments)
    assert f"{name}: error: {message}" in capsys.readouterr().err


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
