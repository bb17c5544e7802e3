"""Where kernels run, and what is said where they do not."""

import types

import pytest
import torch

from ssm_asr.ops import dispatch


def on_gpu(dtype: torch.dtype) -> torch.Tensor:
    """What dispatch looks at of a tensor on a GPU."""
    return types.SimpleNamespace(is_cuda=True, dtype=dtype)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def look_anew() -> None:
    dispatch.set_kernels(True)  # a benchmark or a run in this process may have turned them off
    dispatch.missing.cache_clear()
    yield
    dispatch.missing.cache_clear()
    dispatch.set_kernels(True)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("SSM_ASR_KERNELS", raising=False)


@pytest.mark.usefixtures("with_gpu")
def test_kernels_run_on_a_gpu_in_float32_and_below() -> None:
    assert dispatch.missing() == ""
    assert [dispatch.use_kernels(on_gpu(d)) for d in (torch.float32, torch.bfloat16, torch.float16)] == [True] * 3
    assert not dispatch.use_kernels(on_gpu(torch.float64))
    assert not dispatch.use_kernels(torch.zeros(1))
    dispatch.set_kernels(False)
    assert not dispatch.use_kernels(on_gpu(torch.float32))


@pytest.mark.usefixtures("with_gpu")
def test_the_environment_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_ASR_KERNELS", "0")
    assert dispatch.missing() == "SSM_ASR_KERNELS is 0"
    assert not dispatch.use_kernels(on_gpu(torch.float32))


@pytest.mark.usefixtures("with_gpu")
def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dispatch.missing() == "Triton is not installed"
    dispatch.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.missing() == "there is no GPU"
