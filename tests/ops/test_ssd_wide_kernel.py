"""The kernels for large states, by the functions of test_ssd_kernel.py. Shapes are those of ssm_asr/ops/ssd.py."""

import pytest
import test_ssd_kernel
from kernel_device import DEVICE
from test_ssd_kernel import assert_as_reference, operands, seed  # noqa: F401

from ssm_asr.ops import ssd_kernel as ssd_kernels
from ssm_asr.ops import ssd_wide_kernel as kernels
from ssm_asr.ops.ssd import WIDE_STATES, SsdInputs, ssd
from ssm_asr.ops.ssd_wide_kernel import BLOCK_FRAMES

TILES = {name: getattr(kernels, name) for name in vars(kernels) if name.endswith(("_CHANNELS", "_STATES"))}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(test_ssd_kernel, "ssd_kernel", kernels.ssd_wide)
    if DEVICE == "cpu":  # the interpreter takes its time for every program and every tile, also of zeros
        monkeypatch.setattr(ssd_kernels, "PASS_NUMBERS", 4096)
        for name in TILES:
            monkeypatch.setattr(kernels, name, 16)


def take_frames(monkeypatch, frames):
    for name in ("READ_FRAMES", "GIVEN_FRAMES", "SHARED_FRAMES"):
        monkeypatch.setattr(kernels, name, frames)


@pytest.mark.parametrize("N, name", [(WIDE_STATES - 1, "narrow"), (WIDE_STATES, "wide")])
def test_large_states_take_these_kernels(monkeypatch, N, name):
    monkeypatch.setattr("ssm_asr.ops.dispatch.use_kernels", lambda x: True)
    monkeypatch.setattr("ssm_asr.ops.ssd_kernel.ssd_kernel", lambda inputs, least: "narrow")
    monkeypatch.setattr(kernels, "ssd_wide", lambda inputs, least: "wide")
    assert ssd(SsdInputs(*(x.float() for x in operands(N=N)))) == name


@pytest.mark.parametrize("T", [1, BLOCK_FRAMES, BLOCK_FRAMES + 1, 2 * BLOCK_FRAMES + 5])
def test_lengths(monkeypatch, T):
    monkeypatch.setattr(ssd_kernels, "PASS_BLOCKS", 2)
    assert_as_reference(operands(B=1, T=T, H=1, G=1))


@pytest.mark.parametrize("P, G, N", [(9, 1, 128), (12, 4, 32), (18, 2, 64), (24, 1, 128)])
def test_sizes_of_the_presets(monkeypatch, P, G, N):
    for name, tile in TILES.items():
        monkeypatch.setattr(kernels, name, tile)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "BLOCK_FRAMES", 32)
        take_frames(monkeypatch, 32)
    assert_as_reference(operands(B=1, T=20, H=4 if DEVICE == "cpu" else 16, P=P, G=G, N=N))


@pytest.mark.parametrize("G, tiles, more", [(1, 1, 7), (2, 2, 3), (4, 0, 5)])
def test_groups_and_states(G, tiles, more):
    assert_as_reference(operands(B=1, T=20, H=4, G=G, N=tiles * kernels.SHARED_STATES + more))


def test_more_channels_than_a_program_takes():
    assert_as_reference(operands(B=1, T=20, H=2, G=1, P=kernels.READ_CHANNELS + 1))


@pytest.mark.parametrize("frames", [16, 32, 64])
def test_frames_that_a_program_takes(monkeypatch, frames):
    take_frames(monkeypatch, frames)
    for name in TILES:
        monkeypatch.setattr(kernels, name, 32)
    assert_as_reference(operands(B=1, T=70, H=2, G=1, P=9, N=21))


@pytest.mark.parametrize("block_frames", [32, 128])
def test_lengths_of_blocks(monkeypatch, block_frames):
    monkeypatch.setattr(kernels, "BLOCK_FRAMES", block_frames)
    take_frames(monkeypatch, 32)
    assert_as_reference(operands(B=1, T=140, H=1, G=1))


def test_inputs_of_other_strides():
    assert_as_reference(operands(B=1, T=20, channels_first=True))


@pytest.mark.parametrize("steps", [1e-4, 1.0, 30.0])
def test_slow_and_fast_decays(steps):
    assert_as_reference(operands(B=1, T=70, H=2, steps=steps))


def test_frames_without_a_step_change_nothing():
    test_ssd_kernel.test_frames_without_a_step_change_nothing()
