"""Triton kernels of elementwise chains against the plain forms: on a GPU, or without one by Triton's interpreter."""

from contextlib import nullcontext

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.encoder.convolution import ConvolutionModule
from ssm_asr.encoder.long_range import NonlinAttention
from ssm_asr.encoder.modules import FeedForward, SwooshL, SwooshR
from ssm_asr.encoder.regularize import Balancer, Dropout, Schedule, Whiten
from ssm_asr.encoder.schedule import Chance, Draws
from ssm_asr.ops import dispatch
from ssm_asr.ops.gates_kernel import gated, mixed
from ssm_asr.ops.swoosh_kernel import balance

LIMITS = dict(positive=(0.3, 0.6), abs=(0.5, 2.0))
EXACT = dict(atol=1e-5, rtol=1e-5)
# To bfloat16, to the nearest; the interpreter cuts digits off.
ONE_ROUNDING = dict(atol=1e-5, rtol=2**-8 if DEVICE == "cuda" else 2**-7)
ACTS, RESTS = dict(prob=1.0), dict(prob=0.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def uneven(*shape, channel_dim=-1):
    """Numbers whose channels differ in mean and size, so that balancers find all kinds of faults."""
    channels = shape[channel_dim]
    x = torch.randn(*shape).movedim(channel_dim, -1)
    x = x * torch.linspace(0.05, 4, channels) + torch.linspace(-2, 2, channels)
    return x.movedim(-1, channel_dim)


def balancer_and_settings(prob, **kwargs):
    """A balancer with fixed limits, and those as a kernel takes them."""
    balancer = Balancer(**LIMITS, prob=prob, **kwargs)
    by = balancer.settings(torch.ones(1, requires_grad=True))
    return balancer, torch.tensor(by.numbers, device=DEVICE)


def compare(plain, kernel, inputs, dtype=torch.float32, tolerance=EXACT):
    """Output and gradients of `kernel` against those of `plain` in float64 for the same numbers; returns the former."""
    results = []
    weight = None
    for run, used in ((plain, torch.float64), (kernel, dtype)):
        # Cast with the strides kept: inputs may be slices of larger tensors.
        leaves = [x.to(dtype).to(DEVICE, used).requires_grad_() for x in inputs]
        torch.manual_seed(2)
        y = run(*leaves)
        weight = torch.randn(y.shape).to(dtype) if weight is None else weight
        results.append([y, *torch.autograd.grad(y, leaves, weight.to(DEVICE, used))])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, **tolerance)
    return results[1]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, EXACT), (torch.bfloat16, ONE_ROUNDING)])
@pytest.mark.parametrize("module", [SwooshL(), SwooshR()])
def test_swoosh(module, dtype, tolerance, monkeypatch):
    def by_kernel(x):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
        return module(x)

    x = torch.cat([torch.randn(2000) * 10, torch.tensor([-1e4, 1e4, 0.0])])[None]
    compare(module, by_kernel, [x], dtype, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, EXACT), (torch.bfloat16, ONE_ROUNDING)])
@pytest.mark.parametrize("acts", [ACTS, RESTS])
@pytest.mark.parametrize("drawn", [False, True])
def test_balancer_swoosh_and_dropout(acts, drawn, dtype, tolerance, monkeypatch):
    """One kernel does all three, with numbers of the host or drawn; x and its gradient are slices of wider tensors."""
    activation, balancer = SwooshL(), Balancer(**LIMITS, **acts)
    dropout = Dropout(Schedule((0, 0.3)), shared_dim=1)

    def plain(x):
        return dropout(activation(balancer(x[..., :70])))

    def by_kernel(x):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
        with Draws(torch.device(DEVICE)).in_use() if drawn else nullcontext():
            return torch.cat([activation(x[..., :70], balancer, dropout), x[..., 70:]], dim=-1)[..., :70]

    y, _ = compare(plain, by_kernel, [uneven(3, 75, 80)], dtype, tolerance)
    assert set((y == 0).all(dim=1).flatten().tolist()) == {True, False}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_balancer_and_swoosh_of_images(memory_format, monkeypatch):
    activation, balancer = SwooshR(), Balancer(**LIMITS, **ACTS, channel_dim=1)

    def by_kernel(x):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
        with Draws(torch.device(DEVICE)).in_use():
            return activation(x, balancer)

    x = uneven(2, 6, 9, 5, channel_dim=1).contiguous(memory_format=memory_format)
    for tensor in compare(lambda x: activation(balancer(x)), by_kernel, [x]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_swoosh_in_evaluation(monkeypatch):
    """Swoosh's kernel alone, with a balancer and dropout that do nothing."""
    module = FeedForward(8, 12, Schedule((0, 0.3))).to(DEVICE).eval()
    x = torch.randn(2, 5, 8, device=DEVICE)
    expected = module(x)
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, EXACT), (torch.bfloat16, ONE_ROUNDING)])
@pytest.mark.parametrize("frames, channels", [(500, 70), (7, 3)])
def test_balance(frames, channels, dtype, tolerance):
    x, grad = uneven(frames, channels).to(dtype), torch.randn(frames, channels).to(dtype)
    x[:, 1] = 0.0
    balancer, settings = balancer_and_settings(1.0)
    x64 = x.double().requires_grad_()
    balancer(x64).backward(grad.double())
    x, grad = x.to(DEVICE), grad.to(DEVICE)
    actual = balance(x, grad, settings, 0.04)
    rest = [i for i in range(channels) if i != 1]  # of a channel of zeros only rounding tells what is added
    torch.testing.assert_close(actual.double().cpu()[:, rest], x64.grad[:, rest], **tolerance)
    assert actual.isfinite().all() and not torch.equal(actual, grad)
    settings[0] = 0.0
    assert torch.equal(balance(x, grad, settings, 0.04), grad)


def test_balance_of_other_layouts():
    """Slices, transposed tensors and images give what contiguous ones do, in the layout of the gradient."""
    _, settings = balancer_and_settings(1.0)
    x, grad = uneven(4, 21, 10).to(DEVICE), torch.randn(4, 21, 10).to(DEVICE)
    expected = balance(x, grad, settings, 0.04)
    wide = torch.cat([x, x], dim=-1)
    assert torch.equal(balance(wide[..., 10:], torch.cat([grad, x], dim=-1)[..., :10], settings, 0.04), expected)
    actual = balance(x.transpose(1, 2), grad.transpose(1, 2), settings, 0.04, channel_dim=1)
    assert torch.equal(actual.transpose(1, 2), expected) and actual.stride() == grad.transpose(1, 2).stride()
    images = [y.reshape(4, 7, 3, 10).permute(0, 3, 1, 2) for y in (x, grad)]
    actual = balance(*images, settings, 0.04, channel_dim=1)
    assert torch.equal(actual.permute(0, 2, 3, 1).reshape(4, 21, 10), expected)
    assert actual.stride() == images[1].stride()
    actual = balance(images[0].contiguous(), images[1].contiguous(), settings, 0.04, channel_dim=1)
    assert torch.equal(actual.permute(0, 2, 3, 1).reshape(4, 21, 10), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, EXACT), (torch.bfloat16, ONE_ROUNDING)])
@pytest.mark.parametrize("prob", [1.0, 0.0])
def test_gated_linear_unit(prob, dtype, tolerance):
    """With every third frame's padding mask, as a slower stack has it."""
    balancer, settings = balancer_and_settings(prob)
    padding = (torch.rand(3, 3 * 71) < 0.2)[:, ::3].to(DEVICE)

    def plain(both):
        x, gate = both.chunk(2, dim=-1)
        return (x * balancer(gate).sigmoid()).masked_fill(padding[..., None], 0.0)

    def by_kernel(both):
        return gated(both, "sigmoid", padding, settings, balancer.grad_scale)

    for tensor in compare(plain, by_kernel, [uneven(3, 71, 140)], dtype, tolerance):
        assert tensor.is_contiguous()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, EXACT), (torch.bfloat16, ONE_ROUNDING)])
@pytest.mark.parametrize("name", ["tanh", "identity"])
def test_gate_beside_other_channels(name, dtype, tolerance):
    """The gate and x are slices of one tensor."""
    balancer, settings = balancer_and_settings(1.0)
    activation = {"tanh": torch.tanh, "identity": lambda x: x}[name]

    def plain(both):
        gate, x, _ = both.chunk(3, dim=-1)
        return x * activation(balancer(gate))

    def by_kernel(both):
        gate, x, _ = both.chunk(3, dim=-1)
        return gated((x, gate), name, None, settings, balancer.grad_scale)

    both = uneven(2, 40, 39)
    both[0, 0, :3] = torch.tensor([-100.0, 0.0, 100.0])
    compare(plain, by_kernel, [both], dtype, tolerance)


def test_gate_without_balancer():
    compare(torch.mul, lambda x, y: gated((x, y), "identity"), [torch.randn(2, 9, 7), torch.randn(2, 9, 7)])


@pytest.mark.parametrize("even", [0.0, 1.0])
@pytest.mark.parametrize("queries, keys, channels", [(70, 70, 36), (5, 130, 70)])
def test_mixing_over_time(queries, keys, channels, even):
    """By one head's weights of several, some of them zero, or by even ones, which are constants."""
    weights = torch.rand(2, 3, queries, keys) * (torch.rand(2, 3, queries, keys) < 0.6)
    flag = torch.tensor(even, device=DEVICE)

    def plain(weights, x):
        visible = (weights[:, 0] > 0).to(x.dtype)
        return (visible / visible.sum(dim=-1, keepdim=True) if even else weights[:, 0]) @ x + 0 * weights.sum()

    def by_kernel(weights, x):
        return mixed(weights[:, 0], x, flag)

    compare(plain, by_kernel, [weights, torch.randn(2, keys, channels)])


def _numbers(model, constant_rate):
    """Fixes all decisions: balancers act, whitening does not, weights are even or not."""
    for module in model.modules():
        if isinstance(module, NonlinAttention):
            module.constant_rate = constant_rate
        elif isinstance(module, Balancer | Whiten):
            module.requests = (Chance(float(isinstance(module, Balancer))), *module.requests[1:])


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["nonlin", "convolution", "feedforward"])
def test_modules(kind, rate, monkeypatch):
    """Whole modules in training: outputs, and the gradients of input and parameters."""
    B, T, D = 2, 33, 12
    module = {
        "nonlin": lambda: NonlinAttention(D, 9),
        "convolution": lambda: ConvolutionModule(D, 7, causal=rate > 0),
        "feedforward": lambda: FeedForward(D, 20, Schedule((0, 0.2 + rate / 2))),
    }[kind]()
    _numbers(module, rate)
    weights = (torch.rand(B, 2, T, T) * (torch.rand(B, 2, T, T) < 0.5)).to(DEVICE)
    padding = (torch.rand(B, T) < 0.2).to(DEVICE)

    def run(x, *_):
        if kind == "nonlin":
            return module(x, weights[:, 0].to(x))[0]
        return module(x, padding, 8) if kind == "convolution" else module(x)

    results = []
    x, weight = torch.randn(B, T, D), torch.randn(B, T, D)
    for use, dtype in ((False, torch.float64), (True, torch.float32)):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        module.to(DEVICE, dtype)
        torch.manual_seed(3)
        leaf = x.to(DEVICE, dtype).requires_grad_()
        with Draws(torch.device(DEVICE)).in_use() if use else nullcontext():
            y = run(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], weight.to(y))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(
            actual.double(), expected, atol=2e-5 * float(expected.detach().abs().max()), rtol=1e-5
        )
