"""Compares the encoder with Triton kernels and without, on a GPU if there is one, else in Triton's interpreter."""

import random
from contextlib import nullcontext

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.encoder.schedule import Draws, set_batch_count
from ssm_asr.encoder.subsampling import ConvSubsampling
from ssm_asr.encoder.zipformer import Zipformer, ZipformerConfig
from ssm_asr.ops import dispatch

SMALL = dict(
    layers=(1, 1), downsampling=(1, 2), dim=(64, 64), unmasked_dim=(64, 64), feedforward_dim=(32, 32), heads=(2, 2),
    conv_kernel=(7, 7), query_head_dim=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("long_range", ["nonlin_attention", "mamba2"])
def test_the_whole_encoder(long_range, monkeypatch):
    """In a training pass the kernels, with `Draws` in use, are about as near to float64 as the plain forms are."""
    results = []
    for use, dtype in ((False, torch.float64), (False, torch.float32), (True, torch.float32)):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        torch.manual_seed(0)
        config = ZipformerConfig(**SMALL, long_range=long_range)
        model = torch.nn.ModuleList([ConvSubsampling(64, (2, 2, 4), 0.1), Zipformer(config)]).to(DEVICE, dtype)
        set_batch_count(model, 10000.0)  # where no rate of the schedules is 0
        features = torch.randn(2, 57, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        random.seed(0)
        torch.manual_seed(0)
        with Draws(torch.device(DEVICE)).in_use() if use else nullcontext():
            x, lens = model[0](features, torch.tensor([57, 50], device=DEVICE))
            out, _ = model[1](x, lens, 16, 32)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        parameters = [p for name, p in model.named_parameters() if not name.endswith("layers.0.bypass_scale")]
        names = [name for name, _ in model.named_parameters() if not name.endswith("layers.0.bypass_scale")]
        gradients = torch.autograd.grad(out, parameters, weight)
        results.append({"out": out.detach(), **dict(zip(names, gradients, strict=True))})
    for name, exact in results[0].items():
        plain_error, error = (float((found[name] - exact).norm() / exact.norm()) for found in results[1:])
        # Gradients that nearly cancel, such as the gradient of a softmax's bias, are mere rounding errors.
        assert error < 10 * plain_error + 1e-5, name
