"""The fast paths are decided in one place, with the reason for each that is off."""

import pytest
import torch
import toy

from ssm_asr.ops import dispatch
from ssm_asr.training.fast import Fast, make_passes, resolve_fast
from ssm_asr.training.graphs import Graphs
from ssm_asr.transducer.model import Transducer

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "missing", lambda: "")
    yield
    dispatch.set_kernels(True)


def lines(wanted: str = "auto", device: torch.device = GPU, fixed_shapes: bool = True, backend: str = "torch") -> list:
    return list(resolve_fast(wanted, device, fixed_shapes=fixed_shapes, loss_backend=backend).lines())


def test_what_is_on_and_what_is_not() -> None:
    assert lines() == ["fast: kernels, graphs of the encoder, graphs of the losses"]
    assert lines("off") == ["fast: nothing", f"  without {ALL}: train.fast is off"]
    assert lines(device=torch.device("cpu")) == ["fast: nothing", f"  without {ALL}: training runs on cpu"]
    assert lines(fixed_shapes=False) == [
        "fast: kernels",
        "  without graphs of the encoder, graphs of the losses: data.fixed_shapes is false",
    ]
    assert lines(backend="k2") == [
        "fast: kernels, graphs of the encoder",
        "  without graphs of the losses: loss.backend is k2",
    ]


def test_without_triton_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "missing", lambda: "Triton is not installed")
    assert lines() == ["fast: nothing", f"  without {ALL}: Triton is not installed"]


ALL = "kernels, graphs of the encoder, graphs of the losses"


def test_passes_are_captured_where_that_is_on() -> None:
    experiment = toy.experiment()
    model = Transducer(experiment.model, 5)
    plain = make_passes(model, Fast("no", "no", "no"), "torch")
    assert plain.encode == model.encode and not plain.context_on_device and not plain.every_frame
    assert not dispatch._wanted
    half = make_passes(model, Fast("", "", "k2"), "torch")
    assert isinstance(half.encode, Graphs) and half.context_on_device
    assert not isinstance(half.losses, Graphs) and not half.every_frame
    assert dispatch._wanted
    both = make_passes(model, Fast("", "", ""), "torch")
    assert isinstance(both.losses, Graphs) and both.every_frame


def test_a_backend_that_is_not_there_is_refused() -> None:
    model = Transducer(toy.experiment().model, 5)
    with pytest.raises(ValueError, match="loss backend 'warp': give one of torch, k2"):
        make_passes(model, Fast("no", "no", "no"), "warp")
