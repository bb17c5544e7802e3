"""S4D against golden arrays; its forms against each other, in values, final states and gradients."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_asr.ssm.parameters import ssm_parameters
from ssm_asr.ssm.s4d import DIRECT_TAPS, S4D, causal_convolution

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "ssm.npz")
EXACT = {"atol": 1e-9, "rtol": 1e-9}
BOTH = pytest.mark.parametrize("states, kind", [(1, "real"), (4, "real"), (2, "lin"), (8, "lin")])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(2)


def module(states, kind, channels=6):
    """One in float64 whose parameters have all moved a little from where they start."""
    s4d = S4D(channels, states, kind).double()
    with torch.no_grad():
        for p in s4d.parameters():
            p += 0.2 * torch.randn_like(p)
    return s4d


def golden(name):
    arrays = {key.split("/")[1]: torch.from_numpy(GOLDEN[key]) for key in GOLDEN if key.startswith(f"s4d_{name}/")}
    kind, numbers = name.rstrip("0123456789"), [arrays["C_re"]]
    numbers += [arrays["C_im"]] if kind == "lin" else []
    s4d = S4D(len(arrays["D"]), int(name.removeprefix(kind)), kind).double()
    with torch.no_grad():
        # The poles are where every module starts, but that was float32.
        torch.testing.assert_close(-s4d.A_log.exp(), arrays["A_re"], atol=1e-6, rtol=0)
        s4d.A_log.copy_((-arrays["A_re"]).log())
        if s4d.A_imag is not None:
            torch.testing.assert_close(s4d.A_imag.data, arrays["A_im"], atol=1e-6, rtol=0)
            s4d.A_imag.copy_(arrays["A_im"])
        s4d.C.copy_(torch.cat(numbers, dim=1))
        s4d.D.copy_(arrays["D"])
        s4d.log_dt.copy_(arrays["dt"].log())
    return s4d, arrays


@pytest.mark.parametrize("name", ["real2", "real4", "lin4", "lin8"])
def test_golden_kernels_and_outputs(name):
    s4d, arrays = golden(name)
    u, y = arrays["u"].transpose(1, 2), arrays["y"].transpose(1, 2)
    zero = s4d.init_state(len(u))
    torch.testing.assert_close(s4d.kernel(50), arrays["kernel"], **EXACT)
    for out in (s4d(u), s4d.recurrence(u, zero)[0], s4d.stream(u, zero)[0]):
        torch.testing.assert_close(out, y, **EXACT)


def results(form, s4d, u, state):
    """Output, final state, and the gradients of a scalar made of both."""
    s4d.zero_grad()
    u, state = u.clone().requires_grad_(), state.clone().requires_grad_()
    y, last = form(u, state)
    mix = torch.Generator().manual_seed(0)
    total = (y * torch.randn(y.shape, generator=mix, dtype=y.dtype)).sum()
    (total + (last * torch.randn(last.shape, generator=mix, dtype=y.dtype)).sum()).backward()
    return [y, last, u.grad, state.grad, *[p.grad for p in s4d.parameters()]]


def in_chunks(s4d, size):
    def form(u, state):
        outputs = []
        for chunk in u.split(size, dim=2):
            y, state = s4d.stream(chunk, state)
            outputs.append(y)
        return torch.cat(outputs, dim=2), state

    return form


@BOTH
@pytest.mark.parametrize("size", [1, 2, 7, 16, 64, 150])
def test_chunks_equal_the_recurrence_from_any_state(states, kind, size):
    assert DIRECT_TAPS < 150, "the longest chunk should take the FFT"
    s4d, u, state = module(states, kind), torch.randn(2, 6, 150).double(), torch.randn(2, 6, states).double()
    expected = results(s4d.recurrence, s4d, u, state)
    for got, want in zip(results(in_chunks(s4d, size), s4d, u, state), expected, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@BOTH
@pytest.mark.parametrize("frames", [1, DIRECT_TAPS, DIRECT_TAPS + 1, 150])
def test_the_convolution_equals_the_recurrence(states, kind, frames):
    s4d, u = module(states, kind), torch.randn(2, 6, frames).double()
    zero = s4d.init_state(2)
    expected = results(lambda u, state: (s4d.recurrence(u, zero)[0], 0 * state), s4d, u, zero)
    got = results(lambda u, state: (s4d(u), 0 * state), s4d, u, zero)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("taps", [1, 5, DIRECT_TAPS, DIRECT_TAPS + 1, 200])
def test_causal_convolution_by_its_definition(taps):
    x, taps_DL = torch.randn(2, 3, 90).double(), torch.randn(3, taps).double()
    expected = torch.zeros_like(x)
    for lag in range(min(taps, 90)):
        expected[..., lag:] += taps_DL[:, lag, None] * x[..., : 90 - lag]
    torch.testing.assert_close(causal_convolution(x, taps_DL), expected, **EXACT)


@BOTH
def test_what_follows_an_utterance_does_not_reach_it(states, kind):
    s4d, u = module(states, kind), torch.randn(2, 6, 100).double()
    for length in (30, 80):
        valid = torch.arange(100) < length
        torch.testing.assert_close(s4d(u * valid)[..., :length], s4d(u[..., :length]), **EXACT)


@BOTH
def test_float32_on_a_long_sequence(states, kind):
    exact, u = S4D(6, states, kind).double(), torch.randn(1, 6, 3000)
    single = S4D(6, states, kind)
    single.load_state_dict({name: p.float() for name, p in exact.state_dict().items()})
    with torch.no_grad():
        expected, _ = exact.recurrence(u.double(), exact.init_state(1))
        for out in (single(u), in_chunks(single, 32)(u, single.init_state(1))[0]):
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


def test_small_steps_lose_no_digits():
    s4d = S4D(4, 8, "lin")
    exact = S4D(4, 8, "lin").double()
    exact.load_state_dict({name: p.double() for name, p in s4d.state_dict().items()})
    for one in (s4d, exact):
        one.log_dt.data.fill_(math.log(1e-5))
    # Relative to |B̄| = 1e-5: its imaginary parts are far smaller still.
    torch.testing.assert_close(s4d._input().double(), exact._input(), atol=1e-11, rtol=0)
    torch.testing.assert_close(exact._input()[:, :4], torch.full((4, 4), 1e-5).double(), atol=0, rtol=1e-4)


@BOTH
def test_start(states, kind):
    s4d = S4D(2000, states, kind)
    dt = s4d.log_dt.exp()
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert abs(math.log(1e-2) - s4d.log_dt.mean()) < 0.1
    assert s4d.init_state(3).shape == (3, 2000, states)
    impulse = torch.zeros(1, 2000, 9)
    impulse[..., 0] = 1
    torch.testing.assert_close(s4d(impulse)[0], s4d.impulse_response(9))


def test_impossible_numbers_of_states_are_refused():
    with pytest.raises(ValueError, match="3 states of S4D lin: give an even number"):
        S4D(4, 3, "lin")
    with pytest.raises(ValueError, match="'diag'"):
        S4D(4, 4, "diag")


class RealOnly(TorchDispatchMode):
    """Refuses every operation with a complex result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.is_complex()), func
        return out


@BOTH
def test_streaming_needs_no_complex_numbers(states, kind):
    s4d = S4D(6, states, kind)
    with torch.no_grad(), RealOnly():
        s4d.stream(torch.randn(2, 6, DIRECT_TAPS), s4d.init_state(2))
    with torch.no_grad(), pytest.raises(AssertionError), RealOnly():
        s4d(torch.randn(2, 6, DIRECT_TAPS + 1))


@BOTH
def test_autocast_changes_nothing(states, kind):
    s4d, u = S4D(6, states, kind), torch.randn(2, 6, 40)
    state = torch.randn(2, 6, states)
    with torch.no_grad():
        expected = s4d(u), s4d.kernel(7), *s4d.stream(u, state)
        with torch.autocast("cpu", torch.bfloat16):
            got = s4d(u), s4d.kernel(7), *s4d.stream(u, state)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_ssm_parameters_are_found_in_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), S4D(3, 4, "real"), S4D(3, 4, "lin"))
    found = {id(p) for p in ssm_parameters(model)}
    assert len(ssm_parameters(model)) == 9
    assert found == {id(p) for name, p in model.named_parameters() if not name.startswith("0.")}
