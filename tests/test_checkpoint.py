"""Checkpoints: written whole or not at all, read without running anything, and complete."""

import os
import pickle
import re
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from ssm_asr import checkpoint
from ssm_asr.checkpoint import CheckpointError
from ssm_asr.config import Experiment
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.training.experiment_dir import resumable
from ssm_asr.training.resume import make_ready
from ssm_asr.transducer.model import ModelConfig, Transducer


def plain(**entries: Any) -> dict[str, Any]:
    return {"format": checkpoint.FORMAT, **entries}


def refusal(path: Path) -> str:
    """The message for a file that is refused: one line, which names the file."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "model.pt"
    first = toy.write_checkpoint(path, train={"seed": 5})
    again = checkpoint.load_model(path)
    assert again.experiment == first.experiment == toy.experiment(train={"seed": 5})
    assert again.tokenizer.symbols == first.tokenizer.symbols
    assert again.tokenizer.encode("LOW HIGH") == first.tokenizer.encode("LOW HIGH")
    assert again.progress == {"batch": 0}
    assert not again.model.training
    features = torch.randn(1, 60, 80)
    with torch.no_grad():
        out, other = (loaded.model.encode(features, torch.tensor([60]), 16, 64)[0] for loaded in (first, again))
    assert torch.equal(out, other)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type) -> None:
    path = tmp_path / "model.pt"
    checkpoint.save(plain(x=torch.arange(5)), path)
    before = path.read_bytes()
    real_save = torch.save

    def save_half(value: Any, file: Any) -> None:
        real_save(value, file)
        file.truncate(100)
        raise failure("amid writing")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises((failure, CheckpointError)):
        checkpoint.save(plain(x=torch.arange(6)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    checkpoint.save(plain(x=1), path)
    seen = []
    real_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        seen.append((checkpoint.load(source)["x"], checkpoint.load(target)["x"]))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(plain(x=2), path)
    assert seen == [(2, 1)] and checkpoint.load(path)["x"] == 2


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path, message = tmp_path / "model.pt", tmp_path / "message"
    pid = os.fork()  # a process of its own, since a limit of file sizes cannot be taken back
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            checkpoint.save(plain(x=torch.zeros(100_000)), path)
        except CheckpointError as error:
            message.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert re.fullmatch(f"{path}: cannot be written .*; is the disk full.", message.read_text())
    assert list(tmp_path.iterdir()) == [message]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_file_mode_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        checkpoint.save(plain(), tmp_path / "model.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.pt").stat().st_mode) == 0o666 & ~mask


class Bomb:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(plain(x=Bomb(mark))))
    assert refusal(path) == "no checkpoint of this program, or a damaged one; was it copied whole?"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(plain(x=Bomb(mark)), path, **options)
        refusal(path)
    torch.save(plain(x=Bomb(mark)), path)
    assert refusal(path) == "refused: damaged, or holds more than tensors and plain values, which may be code"
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the bomb works
    assert mark.exists()


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    checkpoint.save(plain(x=torch.randn(1000)), path)
    whole = path.read_bytes()
    broken = "no checkpoint of this program, or a damaged one; was it copied whole?"
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 4]) + whole[middle + 4 :]
    for content in (b"", b"hello\nworld\n", whole[:middle], whole[:-10], whole[10:], flipped):
        path.write_bytes(content)
        assert refusal(path) == broken
    for value in ([1, 2], {"model": torch.zeros(1)}):
        torch.save(value, path)
        assert refusal(path) == broken
    for version in ("2", 0, True, torch.ones(2)):
        torch.save({"format": version}, path)
        assert refusal(path) == broken
    torch.save({"format": 99}, path)
    assert refusal(path) == "format 99 is of a newer version of ssm-asr, this one reads up to 2; update ssm-asr"
    assert refusal(tmp_path) == "cannot be read: Is a directory"
    assert refusal(tmp_path / "none.pt") == "no such checkpoint; train first, or give another path"


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_checkpoints_of_version_0_1_are_read_and_resumed(tmp_path: Path, cuda_graphs: bool) -> None:
    """Their configuration has train.cuda_graphs, and neither train.fast nor a section for the losses."""
    path = tmp_path / "checkpoint-4.pt"
    now = toy.write_checkpoint(path)
    old = {**checkpoint.load(path), "format": 1, "training": {"data": "data"}, "progress": {"epoch": 1}}
    del old["config"]["loss"], old["config"]["train"]["fast"]
    old["config"]["train"]["cuda_graphs"] = cuda_graphs
    checkpoint.save(old, path)
    again = checkpoint.load_model(path)
    assert again.experiment == now.experiment
    assert again.experiment.train.fast == "auto" and again.experiment.loss.backend == "torch"
    assert toy.differing(dict(again.model.state_dict()), dict(now.model.state_dict())) == []
    assert checkpoint.load(path)["format"] == checkpoint.FORMAT
    make_ready(tmp_path, now.experiment, "data")
    assert list(resumable(tmp_path).values()) == [path], "a run goes on from it"


def test_checkpoints_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    toy.write_checkpoint(path)
    good = checkpoint.load(path)
    without_tokens = {name: value for name, value in good.items() if name != "tokens"}
    other_field = {**good, "config": {**good["config"], "model": {"depth": 3}}}
    fewer_weights = {**good, "model": dict(list(good["model"].items())[1:])}
    too_many_layers = {**good, "config": {**good["config"], "model": {"encoder": {"layers": [10**9]}}}}
    for changed, reason in (
        (without_tokens, "'tokens'"),
        (other_field, "model.depth: no such field"),
        (too_many_layers, "model.encoder.layers[0] is 1000000000; give a whole number from 1 to 1000"),
        ({**good, "config": [good["config"]]}, "the configuration is [{'model': "),
        ({**good, "model": 5}, ""),
        (fewer_weights, "Error(s) in loading state_dict for Transducer: Missing key(s)"),
    ):
        checkpoint.save(changed, path)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_model(path)
        assert str(caught.value).startswith(f"{path}: does not fit this version: {reason}")
        assert "\n" not in str(caught.value)


def test_warm_start_copies_all_that_fits_and_says_what_it_left_out(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"layers": (1, 1), "downsampling": (1, 2), "dim": (32, 48), "unmasked_dim": (32, 32), "heads": (4, 4)}
    sizes |= {"feedforward_dim": (48, 64), "conv_kernel": (7, 7)}
    settings = {"mamba_heads": 4, "mamba_groups": 2, "mamba_states": 8}
    zipformer, sammo = (
        ModelConfig(ZipformerConfig(**sizes, **settings, long_range=kind), 24, 28)
        for kind in ("nonlin_attention", "mamba2")
    )
    tokenizer = Tokenizer("char", symbols=["<blk>", "A", "B", "<unk>", "<sos/eos>"])
    source, target = Transducer(zipformer, 5), Transducer(sammo, 5)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    path = tmp_path / "zipformer.pt"
    checkpoint.save(checkpoint.pack(Experiment(model=zipformer), tokenizer, source.state_dict(), {}), path)
    warm = checkpoint.warm_start(target, path)
    assert all(".mamba2." in name for name in warm.kept) and len(warm.kept) == 16
    assert all(".nonlin_attention." in name for name in warm.unused) and len(warm.unused) == 8
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name in warm.kept else source.state_dict()[name])
    assert "mamba2.dt_bias (1)" in warm.summary() and "nonlin_attention.in_proj.weight (1)" in warm.summary()


def test_warm_start_from_a_model_with_nothing_in_common(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    model = Transducer(ModelConfig(ZipformerConfig(), 24, 28), 5)
    for content in ({"format": checkpoint.FORMAT, "model": {"w": torch.zeros(3)}}, {"format": checkpoint.FORMAT}):
        torch.save(content, path)
        with pytest.raises(checkpoint.CheckpointError, match="none of its weights has the name and shape"):
            checkpoint.warm_start(model, path)


def test_file_and_name_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First what the file holds, and after the renaming its name."""
    flushed: list[tuple[bool, list[str]]] = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda place: flushed.append((stat.S_ISDIR(os.fstat(place).st_mode), sorted(os.listdir(tmp_path)))),
    )
    checkpoint.save({"format": checkpoint.FORMAT}, tmp_path / "a.pt")
    assert flushed == [(False, [".a.pt.part"]), (True, ["a.pt"])]
