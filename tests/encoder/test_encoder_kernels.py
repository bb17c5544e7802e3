"""Triton kernels of the encoder against the plain forms: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, at the import below
pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch for GPUs)")

from ssm_asr.encoder.attention import LARGE_SCORE, Context, weights_of_scores  # noqa: E402
from ssm_asr.encoder.convolution import ChunkCausalConv  # noqa: E402
from ssm_asr.encoder.kernels.attention import attention_weights  # noqa: E402
from ssm_asr.encoder.kernels.elementwise import balance, swoosh  # noqa: E402
from ssm_asr.encoder.modules import SwooshL, SwooshR  # noqa: E402
from ssm_asr.encoder.regularize import (  # noqa: E402
    Balancer,
    Whiten,
    _mean_limit,
    _rms_limit,
    _whitened_bfloat16,
)
from ssm_asr.encoder.schedule import Draws, set_batch_count  # noqa: E402
from ssm_asr.encoder.subsampling import ConvSubsampling  # noqa: E402
from ssm_asr.encoder.zipformer import Zipformer, ZipformerConfig  # noqa: E402
from ssm_asr.ssm import kernels  # noqa: E402

SMALL = dict(
    layers=(1, 1), downsampling=(1, 2), dim=(64, 64), unmasked_dim=(64, 64), feedforward_dim=(32, 32), heads=(2, 2),
    conv_kernel=(7, 7), query_head_dim=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("frames, chunk, kernel", [(70, 16, 31), (70, -1, 15), (130, 32, 31), (9, 4, 7), (64, 64, 15)])
def test_chunk_causal_conv(frames, chunk, kernel):
    """Outputs and all gradients against the plain form in float64."""
    conv = ChunkCausalConv(40, kernel)
    torch.nn.init.normal_(conv.chunkwise_conv_scale)
    plain = ChunkCausalConv(40, kernel).double()
    plain.load_state_dict(conv.state_dict())
    conv.to(DEVICE)
    x, weight = torch.randn(2, 40, frames), torch.randn(2, 40, frames)
    results = []
    for module, run in ((plain, plain), (conv, lambda x, c: conv._by_kernel(x.transpose(1, 2), c).transpose(1, 2))):
        like = next(module.parameters())
        inputs = x.to(like).requires_grad_()
        y = run(inputs, frames if chunk < 0 else chunk)
        grads = torch.autograd.grad(y, [inputs, *module.parameters()], weight.to(like))
        results.append([y, *grads])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(
            actual.double().cpu(), expected, atol=2e-5 * float(expected.detach().abs().max()), rtol=0
        )


@pytest.mark.parametrize("frames, left, masks", [(37, 0, True), (37, 0, False), (2, 6, True), (5, 12, True)])
def test_attention_weights(frames, left, masks):
    """Weights and the gradients of both kinds of scores; every third frame's mask, as a slower stack has it."""
    B, H, T, K = 2, 3, frames, left + frames
    chunk = torch.rand(3 * T, 3 * K)[::3, ::3] < 0.3 if masks else None
    padding = torch.rand(B, 3 * K)[:, ::3] < 0.2 if masks else None
    content, position, weight = (
        torch.randn(B, H, T, K) * 20,
        torch.randn(B, H, T, K + T - 1) * 20,
        torch.randn(B, H, T, K),
    )
    results = []
    for run, dtype, device in ((weights_of_scores, torch.float64, "cpu"), (attention_weights, torch.float32, DEVICE)):
        scores = [x.to(device, dtype).requires_grad_() for x in (content, position)]
        hidden = [mask if mask is None else mask.to(device) for mask in (chunk, padding)]
        if run is weights_of_scores:
            weights = run(*scores, Context(*hidden), 0.1)
        else:
            weights = run(*scores, *hidden, LARGE_SCORE, torch.full((), 0.1, device=device))
        results.append([weights, *torch.autograd.grad(weights, scores, weight.to(device, dtype))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double().cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("module", [SwooshL(), SwooshR()])
def test_swoosh(module):
    x = torch.cat([torch.randn(2000) * 10, torch.tensor([-1e4, 1e4, 0.0])]).double().requires_grad_()
    dy = torch.randn(2003)
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, dy.double())
    x32, dy = x.detach().float().to(DEVICE), dy.to(DEVICE)
    torch.testing.assert_close(
        swoosh(x32, module.shift, module.offset).double().cpu(), y.detach(), atol=1e-5, rtol=1e-6
    )
    torch.testing.assert_close(swoosh(x32, module.shift, 0.0, dy).double().cpu(), dx, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frames, channels", [(500, 70), (7, 3)])
def test_balance(frames, channels):
    x, grad = (
        torch.randn(frames, channels) * torch.linspace(0.05, 4, channels) + torch.linspace(-2, 2, channels),
        torch.randn(frames, channels),
    )
    x[:, 1] = 0.0
    balancer = Balancer(positive=(0.3, 0.6), abs=(0.5, 2.0), prob=1.0)
    x64 = x.double().requires_grad_()
    balancer(x64).backward(grad.double())
    limits = [_mean_limit(0.3), _mean_limit(0.6), _rms_limit(0.5), _rms_limit(2.0)]
    x, grad = x.to(DEVICE), grad.to(DEVICE)
    actual = balance(x, grad, torch.tensor([1.0, *limits], device=DEVICE), 0.04)
    rest = [i for i in range(channels) if i != 1]  # of a channel of zeros only rounding tells what is added
    torch.testing.assert_close(actual.double().cpu()[:, rest], x64.grad[:, rest], atol=1e-5, rtol=1e-4)
    assert actual.isfinite().all() and not torch.equal(actual, grad)
    assert torch.equal(balance(x, grad, torch.tensor([0.0, *limits], device=DEVICE), 0.04), grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="products of bfloat16 with sums in float32 are for GPUs")
@pytest.mark.parametrize("groups", [1, 4])
def test_whitening_in_bfloat16(groups):
    x = (torch.randn(3000, 64) @ torch.randn(64, 64) + torch.randn(64)).to(DEVICE, torch.bfloat16)
    grad = torch.randn(3000, 64).to(DEVICE, torch.bfloat16)
    whiten = Whiten(1.0, groups, grad_scale=0.5, prob=1.0).to(DEVICE)
    wide = x.float().requires_grad_()
    whiten(wide).backward(grad.float())
    actual = _whitened_bfloat16(x, grad, whiten, 1.0, 1.0)
    assert float((actual - wide.grad).norm() / wide.grad.norm()) < 0.01
    assert torch.equal(_whitened_bfloat16(x, grad, whiten, 1e9, 1.0), grad)


@pytest.mark.parametrize("long_range", ["nonlin_attention", "mamba2"])
def test_the_whole_encoder(long_range, monkeypatch):
    """A training pass with all kernels, its decisions drawn outside, is about as near to float64 as the plain one."""
    results = []
    for use, dtype in ((False, torch.float64), (False, torch.float32), (True, torch.float32)):
        monkeypatch.setattr(kernels, "usable", lambda x, use=use: use)
        torch.manual_seed(0)
        config = ZipformerConfig(**SMALL, long_range=long_range)
        model = torch.nn.ModuleList([ConvSubsampling(64, (2, 2, 4), 0.1), Zipformer(config)]).to(DEVICE, dtype)
        set_batch_count(model, 10000.0)  # where no rate of the schedules is 0
        if use:
            Draws(model, torch.device(DEVICE))
        features = torch.randn(2, 57, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        random.seed(0)
        torch.manual_seed(0)
        x, lens = model[0](features, torch.tensor([57, 50], device=DEVICE))
        out, _ = model[1](x, lens, 16, 32)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        parameters = [p for name, p in model.named_parameters() if not name.endswith("layers.0.bypass_scale")]
        names = [name for name, _ in model.named_parameters() if not name.endswith("layers.0.bypass_scale")]
        gradients = torch.autograd.grad(out, parameters, weight)
        results.append({"out": out.detach(), **dict(zip(names, gradients, strict=True))})
    for name, exact in results[0].items():
        plain_error, error = (float((found[name] - exact).norm() / exact.norm()) for found in results[1:])
        # Gradients that nearly cancel, as those of a softmax's bias, are a few numbers of chance size.
        assert error < 10 * plain_error + 1e-5, name
