"""Triton kernels of convolutions against PyTorch's: on a GPU where there is one, else by the interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.encoder.convolution import ChunkCausalConv
from ssm_asr.encoder.subsampling import ConvSubsampling
from ssm_asr.ops import depthwise2d_kernel as depthwise2d
from ssm_asr.ops import depthwise_kernel as depthwise
from ssm_asr.ops import dispatch
from ssm_asr.ops import first_conv_kernel as first_conv
from ssm_asr.ops.depthwise2d_kernel import depthwise_conv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


# To the nearest of 8 bits on a GPU; the interpreter cuts off what is beyond them.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


def outputs_and_gradients(run, tensors, weight):
    tensors = [x.detach().requires_grad_() for x in tensors]
    y = run(*tensors)
    return [y, *torch.autograd.grad(y, tensors, weight.to(y))]


def assert_near(actual, expected, dtype):
    """The output and the gradient of x are rounded to the type of x, and not the gradients of the weights."""
    for i, (found, exact) in enumerate(zip(actual, expected, strict=True)):
        found, exact = found.detach().double().cpu(), exact.detach()
        assert float((found - exact).abs().max() / exact.abs().max()) < (ROUNDING[dtype] if i < 2 else 1e-5), i


@pytest.mark.parametrize(
    "frames, chunk, kernel, channels, dtype",
    [
        (50, 16, 31, 40, torch.float32),
        (40, -1, 15, 64, torch.float32),
        (80, 8, 15, 64, torch.bfloat16),
        (9, 4, 7, 3, torch.bfloat16),
        (7, 1, 5, 66, torch.float32),
        (23, 3, 15, 8, torch.float32),  # two chunks share a tile
        (20, 24, 15, 8, torch.float32),  # the chunk ends after the sequence
    ],
)
def test_chunk_causal_conv(frames, chunk, kernel, channels, dtype, monkeypatch):
    """Outputs and all gradients against the plain form in float64, with several chunks a program.

    The kernels get the chunk as a number on the device.
    """
    monkeypatch.setattr(depthwise, "WARPS", 24)
    conv = ChunkCausalConv(channels, kernel)
    torch.nn.init.normal_(conv.chunkwise_conv_scale)
    plain = ChunkCausalConv(channels, kernel).double()
    plain.load_state_dict(conv.state_dict())
    conv.to(DEVICE)
    x, weight = torch.randn(2, channels, frames).to(dtype), torch.randn(2, channels, frames).to(dtype)
    results = []
    for module in (plain, conv):
        inputs = (x.double() if module is plain else x.to(DEVICE)).requires_grad_()
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, module=module: module is conv)
        y = module(inputs, torch.tensor(chunk, dtype=torch.int32, device=DEVICE) if module is conv else chunk)
        results.append([y, *torch.autograd.grad(y, [inputs, *module.parameters()], weight.to(y))])
    assert results[1][0].dtype == results[1][1].dtype == dtype
    assert_near(results[1], results[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 5, 17, 9), (1, 40, 2, 3)])
def test_two_dimensions(sizes, dtype):
    """Images in both kinds of memory, longer and shorter than a tile, with more and fewer channels than one."""
    channels = sizes[1]
    x, weight = (torch.randn(sizes).to(DEVICE, dtype) for _ in range(2))
    parameters = [torch.randn(size, device=DEVICE) for size in ((channels, 1, 7, 7), (channels,))]
    plain = outputs_and_gradients(
        lambda x, w, b: torch.nn.functional.conv2d(x, w, b, padding=3, groups=channels),
        [tensor.double().cpu() for tensor in (x, *parameters)],
        weight.double().cpu(),
    )
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        actual = outputs_and_gradients(depthwise_conv, [images, *parameters], weight)
        assert actual[0].dtype == actual[1].dtype == dtype
        assert actual[0].is_contiguous(memory_format=torch.channels_last)
        assert_near(actual, plain, dtype)


def test_slabs(monkeypatch):
    """The weights' gradient from several slabs of rows."""
    x, weight = torch.randn(2, 3, 11, 4, device=DEVICE), torch.randn(2, 3, 11, 4)
    parameters = torch.randn(3, 1, 7, 7, device=DEVICE), torch.randn(3, device=DEVICE)
    whole = outputs_and_gradients(depthwise_conv, [x, *parameters], weight)
    monkeypatch.setattr(depthwise2d, "SLAB_ROWS", 4)
    for expected, actual in zip(whole, outputs_and_gradients(depthwise_conv, [x, *parameters], weight), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 40, 20), (3, 4, 5)])
def test_first_conv(sizes, dtype, monkeypatch):
    """The convolution of one channel, with several tiles a slab."""
    monkeypatch.setattr(first_conv, "SLABS", 3)
    x, weight = torch.randn(sizes, device=DEVICE), torch.randn(sizes[0], 6, sizes[1] - 2, sizes[2]).to(DEVICE, dtype)
    parameters = [torch.randn(size, device=DEVICE) for size in ((6, 1, 3, 3), (6,))]
    plain = outputs_and_gradients(
        lambda w, b: torch.nn.functional.conv2d(x[:, None].double().cpu(), w, b, padding=(0, 1)),
        [tensor.double().cpu() for tensor in parameters],
        weight.double().cpu(),
    )
    y, *gradients = outputs_and_gradients(lambda w, b: first_conv.first_conv(x, w, b, dtype), parameters, weight)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_near([y], plain[:1], dtype)
    assert_near(gradients, plain[1:], torch.float32)


@pytest.mark.parametrize("half", [False, True])
def test_front_end(half, monkeypatch):
    """The front end with kernels is about as near to float64 as without, also under autocast."""
    features, weight = torch.randn(1, 27, 80), torch.randn(1, 10, 8)
    results = []
    for use, dtype in ((False, torch.float64), (False, torch.float32), (True, torch.float32)):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        torch.manual_seed(0)
        module = ConvSubsampling(8, (2, 2, 4), 0.0).eval().to(DEVICE, dtype)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half and dtype == torch.float32):
            y, _ = module(features.to(DEVICE, dtype), torch.tensor([27], device=DEVICE))
        grads = torch.autograd.grad(y, list(module.parameters()), weight.to(y))
        results.append([y.dtype, *(x.detach().double() for x in (y, *grads))])
    (_, *exact), (plain_dtype, *plain), (actual_dtype, *actual) = results
    assert actual_dtype == plain_dtype
    for i, expected in enumerate(exact):
        plain_error, error = (float((found[i] - expected).norm() / expected.norm()) for found in (plain, actual))
        # The gradient of a single number is in half precision a difference of many, of chance size.
        assert error < 3 * plain_error + (2**-6 if half and expected.numel() == 1 else 1e-6), i
