"""Mamba-2: forms of the operation, the block against golden arrays, streaming, padding, precision and sizes.

Shapes are those of ssm_asr/ssm/mamba2.py.
"""

import functools
import json
import math

import pytest
import torch
from golden_model import load

from ssm_asr.encoder.state import state_sizes
from ssm_asr.ops.ssd import BLOCK_FRAMES, RECURRENT_FRAMES, SsdInputs, ssd, ssd_chunked, ssd_recurrent
from ssm_asr.ssm import mamba2
from ssm_asr.ssm.mamba2 import Mamba2, Mamba2State

EXACT = {"atol": 1e-9, "rtol": 1e-9}  # in float64
GOLDEN = load("ssm.npz")

# Size M of the encoder: the width of every layer, and (groups, state size) of each Sammo preset.
LAYER_DIMS = [192] * 2 + [256] * 2 + [384] * 3 + [512] * 4 + [384] * 3 + [256] * 2
PRESETS = [(8, 16), (4, 32), (2, 64), (1, 128)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def operands(B=2, T=37, H=4, P=3, G=2, N=5, dtype=torch.float64, dt_shift=-1.0):
    """Random inputs of the operation, with gradients: x, dt, A, B, C, D, state."""
    inputs = (
        torch.randn(B, T, H, P, dtype=dtype),
        torch.nn.functional.softplus(torch.randn(B, T, H, dtype=dtype) + dt_shift),
        -torch.rand(H, dtype=dtype) * 4,
        torch.randn(B, T, G, N, dtype=dtype),
        torch.randn(B, T, G, N, dtype=dtype),
        torch.randn(H, dtype=dtype),
        torch.randn(B, H, P, N, dtype=dtype),
    )
    return tuple(x.requires_grad_() for x in inputs)


def with_gradients(outputs, inputs):
    """Outputs, and gradients of the inputs for a fixed random weighting of all outputs."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_same(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def assert_near(actual, expected, tolerance):
    """Each finite, and within tolerance × its standard deviation of the expected float64 values."""
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * e.std().item())


def make_block(d_model=16, d_inner=12, d_state=5, nheads=4, ngroups=2, dtype=torch.float64):
    return Mamba2(d_model, d_inner, d_state, nheads, ngroups).to(dtype)


def random_state(block, batch_size):
    return Mamba2State(*(torch.randn_like(x).requires_grad_() for x in block.init_state(batch_size)))


# The operation


@pytest.mark.parametrize("T", [1, 2, RECURRENT_FRAMES, RECURRENT_FRAMES + 1, BLOCK_FRAMES, 2 * BLOCK_FRAMES + 3])
@pytest.mark.parametrize("H, G", [(4, 1), (4, 2), (3, 3)])
def test_forms_are_equal(T, H, G):
    inputs = operands(T=T, H=H, G=G)
    expected = with_gradients(ssd_recurrent(SsdInputs(*inputs)), inputs)
    assert_same(with_gradients(ssd_chunked(SsdInputs(*inputs)), inputs), expected, **EXACT)
    assert_same(with_gradients(ssd(SsdInputs(*inputs)), inputs), expected, **EXACT)


def test_recurrence_by_hand():
    def scalar(*values):
        return torch.tensor(values, dtype=torch.float64)

    inputs = SsdInputs(
        scalar(2.0, 5.0).view(1, 2, 1, 1),
        scalar(math.log(2.0), 1.0).view(1, 2, 1),
        scalar(-1.0),
        scalar(3.0, 7.0).view(1, 2, 1, 1),
        scalar(1.0, -1.0).view(1, 2, 1, 1),
        scalar(0.5),
        scalar(8.0).view(1, 1, 1, 1),
    )
    y, state = ssd_recurrent(inputs)
    first = 8.0 / 2 + math.log(2.0) * 2 * 3
    second = first / math.e + 5 * 7
    torch.testing.assert_close(y.flatten(), scalar(first + 1.0, -second + 2.5))
    torch.testing.assert_close(state.flatten(), scalar(second))


@pytest.mark.parametrize("block_frames", [1, 2, 7, 36, 37, 38, 1000])
def test_the_length_of_blocks_does_not_matter(block_frames):
    inputs = operands()
    actual = with_gradients(ssd_chunked(SsdInputs(*inputs), block_frames=block_frames), inputs)
    assert_same(actual, with_gradients(ssd_recurrent(SsdInputs(*inputs)), inputs), **EXACT)


@pytest.mark.parametrize("form", [ssd_recurrent, functools.partial(ssd_chunked, block_frames=3)])
def test_gradients_are_those_of_finite_differences(form):
    assert torch.autograd.gradcheck(lambda *inputs: form(SsdInputs(*inputs)), operands(B=1, T=5, H=2, P=2, G=1, N=2))


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_chunked, ssd])
def test_no_frames_leave_the_state_as_it_is(form):
    *inputs, state = operands(T=0)
    y, new_state = form(SsdInputs(*inputs, state))
    assert y.shape == inputs[0].shape
    assert torch.equal(new_state, state)


@pytest.mark.parametrize("G, N", PRESETS)
def test_long_sequences_in_float32(G, N):
    inputs = operands(B=1, T=5000, H=16, P=9, G=G, N=N, dtype=torch.float32, dt_shift=-3.0)
    with torch.no_grad():
        exact = ssd_recurrent(SsdInputs(*(x.double() for x in inputs)))
        for form in (ssd_recurrent, ssd_chunked):
            assert_near(form(SsdInputs(*inputs)), exact, 1e-4)


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_chunked])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_extreme_step_sizes(form, dtype, tolerance):
    x, _, A, *rest = operands(T=100, dtype=dtype)
    raw = torch.full((2, 100, 4), -20.0, dtype=dtype)
    raw[:, 20:60] = 20.0  # forgets all at once, 40 times over, then keeps all
    raw[:, 60:80:3] = 20.0
    inputs = (x, torch.nn.functional.softplus(raw).requires_grad_(), (4 * A).detach().requires_grad_(), *rest)
    wide = tuple(value.detach().double().requires_grad_() for value in inputs)
    expected = with_gradients(ssd_recurrent(SsdInputs(*wide)), wide)
    assert_near(with_gradients(form(SsdInputs(*inputs)), inputs), expected, tolerance)


# The block against golden arrays


@pytest.mark.parametrize("name", ["m2a", "m2b"])
@pytest.mark.parametrize("chunk", [37, 5, 1])
def test_golden_arrays(name, chunk):
    block = Mamba2(**json.loads(GOLDEN["config"])[name]).double()
    prefix = f"{name}/param/"
    block.load_state_dict({k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)})
    u = GOLDEN[f"{name}/u"]
    state, ys = block.init_state(u.shape[0]), []
    for u_chunk in u.split(chunk, dim=1):
        y, state = block.stream(u_chunk, state)
        ys.append(y)
    assert_same(
        [torch.cat(ys, dim=1), state.ssm_BHPN, state.conv_BCK.mT],  # the golden file has time first
        [GOLDEN[f"{name}/{key}"] for key in ("y", "ssm_state", "conv_state")],
        atol=1e-10,
        rtol=0,
    )


# Streaming and padding


@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 64])
def test_chunks_equal_one_pass(chunk):
    block, u = make_block(), torch.randn(2, 150, 16, dtype=torch.float64, requires_grad=True)
    start = random_state(block, 2)
    inputs = [u, *start, *block.parameters()]
    y, end = block(u, state=start)
    expected = with_gradients([y, *end], inputs)
    state, ys = start, []
    for u_chunk in u.split(chunk, dim=1):
        y, state = block.stream(u_chunk, state)
        ys.append(y)
    assert_same(with_gradients([torch.cat(ys, dim=1), *state], inputs), expected, **EXACT)


def test_the_future_is_not_seen():
    block, u = make_block(), torch.randn(1, 100, 16, dtype=torch.float64)
    changed = u.clone()
    changed[:, 41:] += 1.0
    one, two = block(u)[0], block(changed)[0]
    torch.testing.assert_close(one[:, :41], two[:, :41], **EXACT)
    assert not torch.isclose(one[:, 41], two[:, 41]).any()


def test_streaming_leaves_the_old_state_as_it_was():
    block = make_block()
    state = random_state(block, 1)
    before = [x.clone() for x in state]
    block.stream(torch.randn(1, 6, 16, dtype=torch.float64), state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_no_frames_in_a_chunk():
    block = make_block()
    state = random_state(block, 2)
    y, new_state = block.stream(torch.zeros(2, 0, 16, dtype=torch.float64), state)
    assert y.shape == (2, 0, 16)
    assert_same(new_state, state, atol=0, rtol=0)


@pytest.mark.parametrize("lens", [(70, 41, 3, 2, 1, 0), (4, 3, 1, 0)])
def test_a_ragged_batch_equals_each_sequence_alone(lens):
    block, T = make_block(), max(lens)
    mask = torch.arange(T) >= torch.tensor(lens)[:, None]
    u = torch.randn(len(lens), T, 16, dtype=torch.float64).masked_fill(mask[..., None], torch.nan)
    start = random_state(block, len(lens))
    together, state = block(u, mask, start)
    for b, length in enumerate(lens):
        y, end = block(u[b : b + 1, :length], state=Mamba2State(*(x[b : b + 1] for x in start)))
        torch.testing.assert_close(together[b : b + 1, :length], y, **EXACT)
        assert_same([x[b : b + 1] for x in state], end, **EXACT)


def test_padding_has_no_gradient():
    block, u = make_block(), torch.randn(2, 9, 16, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([9, 5])[:, None]
    alone = with_gradients([block(u[:1])[0], block(u[1:, :5])[0]], list(block.parameters()))[2:]
    u[1, 5:] = 1e3
    u.requires_grad_()
    y, _ = block(u, mask)
    together = with_gradients([y[:1], y[1:, :5]], [u, *block.parameters()])[2:]
    assert together[0][1, 5:].abs().max() == 0
    assert_same(together[1:], alone, **EXACT)


# Precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half):
    block = make_block(dtype=torch.float32)
    u, start = torch.randn(2, 100, 16), Mamba2State(*(x.detach().float() for x in random_state(block, 2)))
    y, end = block(u, state=start)
    with torch.autocast("cpu", half):
        y_half, end_half = block(u, state=start)
        y_low, _ = block(u.to(half), state=start)
    assert (y_half.dtype, y_low.dtype) == (torch.float32, half)
    assert [x.dtype for x in end_half] == [torch.float32] * 2
    for a, e in zip((y_half, y_low.float(), *end_half), (y, y, *end), strict=True):
        assert (a - e).abs().max() < 0.03 * e.abs().max()
    assert not torch.equal(y_half, y)  # half precision was in use


def test_the_operation_is_in_float32_under_autocast(monkeypatch):
    def checked(inputs):
        assert not torch.is_autocast_enabled("cpu")
        assert [x.dtype for x in inputs] == [torch.float32] * 7
        return ssd(inputs)

    monkeypatch.setattr(mamba2, "ssd", checked)
    with torch.autocast("cpu", torch.bfloat16):
        make_block(dtype=torch.float32)(torch.randn(2, 10, 16, dtype=torch.bfloat16))


# Sizes and the start


@pytest.mark.parametrize("groups, state", PRESETS)
def test_sizes_of_the_presets(groups, state):
    with torch.device("meta"):
        blocks = [Mamba2(dim, dim * 3 // 4, state, 16, groups) for dim in LAYER_DIMS]
        sizes = [state_sizes(block.init_state(1)) for block in blocks]
    # Against size M of the Zipformer, and its nonlin attention: 3·D² + 3.25·D parameters a layer.
    nonlin = sum(3 * dim * dim + 13 * dim // 4 for dim in LAYER_DIMS)
    assert nonlin == 6_826_272
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    assert 71_783_997 - nonlin + parameters == 71_677_277
    for dim, size in zip(LAYER_DIMS, sizes, strict=True):
        assert size == {"ssm": dim * 3 // 4 * state, "conv": (dim * 3 // 4 + 2 * 128) * 3}
    # The rest: two convolutions a layer keep 15 or 7 frames, and the front end 128 channels × 3 × 19.
    convolutions = sum(2 * dim * (7 if dim > 256 else 15) for dim in LAYER_DIMS)
    total = convolutions + 128 * 3 * 19 + sum(sum(size.values()) for size in sizes)
    assert total == {16: 204_832, 32: 273_952, 64: 412_192, 128: 688_672}[state]


def test_names_are_those_of_published_checkpoints():
    assert {name: tuple(p.shape) for name, p in make_block().named_parameters()} == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (12 + 12 + 2 * 2 * 5 + 4, 16),
        "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,),
        "norm.weight": (12,),
        "out_proj.weight": (16, 12),
    }


def test_the_start():
    block = Mamba2(8, 4096, 1, nheads=4096, ngroups=1)
    A, dt = block.A_log.exp(), torch.nn.functional.softplus(block.dt_bias)
    assert 0.999 < A.min() < 1.1 and 15.9 < A.max() < 16.001
    assert abs(A.mean() - 8.5) < 0.3
    assert 0.999e-3 < dt.min() < 1.05e-3 and 0.095 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.1
    assert torch.equal(block.D, torch.ones(4096))


@pytest.mark.parametrize("sizes", [{"d_inner": 13}, {"ngroups": 3}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="multiple of"):
        make_block(**sizes)
