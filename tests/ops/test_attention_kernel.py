"""Attention's Triton kernels against the plain forms: on a GPU where there is one, else by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.ops.attention import (
    LARGE_SCORE,
    Context,
    chunk_mask,
    context_on_device,
    visible_span,
    weights_of_scores,
)
from ssm_asr.ops.attention_kernel import attention_weights
from ssm_asr.ops.weighted_sums_kernel import weighted_sums

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies the bits of bfloat16
B, H, D, X = 2, 3, 5, 3
# Frames at 50 Hz, factor, chunk, left context, and how many frames the second sequence has, at 50 Hz.
CASES = [
    (70, 1, 4, 8, 41), (70, 1, 16, 0, 17), (37, 1, -1, -1, 30), (150, 2, 8, -1, 149), (77, 4, 8, 16, 3),
    (70, 1, 8, -1, 60), (1, 1, -1, -1, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def context_of(frames, factor, chunk, left_context, length):
    lens_B = torch.tensor([frames, length])
    return Context(
        chunk_mask(frames, chunk, left_context, lens_B.device),
        torch.arange(frames) >= lens_B[:, None],
        visible_span(lens_B, frames, chunk, left_context),
    ).every(factor)


def hidden_keys(context, T):
    hidden_BTK = context.padding_mask_BK[:, None].expand(B, T, T)
    return hidden_BTK if context.chunk_mask_TK is None else hidden_BTK | context.chunk_mask_TK


@pytest.mark.parametrize("case", CASES)
def test_span_is_what_the_masks_say(case):
    """Also where chunk and left context are numbers on the device."""
    context = context_of(*case)
    frames, factor, chunk, left_context, length = case
    numbers = context_on_device(chunk, left_context, torch.device("cpu"))
    for actual, expected in zip(context_of(frames, factor, *numbers, length), context, strict=True):
        assert torch.equal(actual, torch.zeros_like(actual) if expected is None else expected)
    first_BT, end_BT = context.span_2BT
    key_K = torch.arange(first_BT.shape[1])
    visible_BTK = (key_K >= first_BT[..., None]) & (key_K < end_BT[..., None])
    assert torch.equal(visible_BTK, ~hidden_keys(context, len(key_K)))


def plain_weights(query_BTQ, key_BKQ, pos_query_BTY, pos_key_HPX, context, skip, acts):
    def heads(x):
        return x.reshape(B, x.shape[1], H, -1).transpose(1, 2)

    content = heads(query_BTQ) @ heads(key_BKQ).transpose(2, 3)
    position = heads(pos_query_BTY * (1 - skip)) @ pos_key_HPX.transpose(1, 2)
    return weights_of_scores(content, position, context, 0.01 * acts)


@pytest.mark.parametrize("skip, acts", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("case", CASES)
def test_attention_weights(case, skip, acts):
    """Weights and all gradients; queries, keys and position queries lie side by side in one tensor."""
    context = context_of(*case)
    T = context.padding_mask_BK.shape[1]
    projected, pos_key = torch.randn(B, T, H * (2 * D + X)) * 2.5, torch.randn(H, 2 * T - 1, X)
    # Users of the weights: both or one of those of all heads, and one of the first head or none.
    users = [torch.randn(B, H, T, T), torch.randn(B, H, T, T), torch.randn(B, T, T)][: 3 if acts else 1]
    results = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (projected, pos_key)]
        parts = inputs[0].split([H * D, H * D, H * X], dim=-1)
        if dtype == torch.float64:
            weights = plain_weights(*parts, inputs[1], context, torch.tensor(skip), torch.tensor(acts))
            outputs = (weights, weights, weights[:, 0])
        else:
            numbers = [torch.tensor(number, device=device) for number in (skip, acts)]
            outputs = attention_weights(*parts, inputs[1], context.span_2BT.to(device), *numbers, LARGE_SCORE, 0.01)
        grads = torch.autograd.grad(outputs[: len(users)], inputs, [user.to(device, dtype) for user in users])
        results.append([*outputs, *grads])
    for expected, actual in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(actual.double().cpu(), expected, atol=1e-5 * max(scale, 1e-3), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_weighted_sums(case):
    """Sums and gradients, that of the weights where a key is visible; rows of weights lie further apart than K."""
    context = context_of(*case)
    T = context.padding_mask_BK.shape[1]
    hidden_BTK = hidden_keys(context, T)
    weights = weights_of_scores(torch.randn(B, H, T, T), None, context, 0.0)
    value, weight = torch.randn(B, T, H * D), torch.randn(B, T, H * D)
    results = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        rows, inputs = torch.nn.functional.pad(weights, (0, 5)).to(device, dtype), value.to(device, dtype)
        rows, inputs = rows[..., :T].requires_grad_(), inputs.requires_grad_()
        if dtype == torch.float64:
            mixed = (rows @ inputs.reshape(B, T, H, D).transpose(1, 2)).transpose(1, 2).reshape(B, T, H * D)
        else:
            mixed = weighted_sums(rows, inputs, context.span_2BT.to(device))
        drows, dinputs = torch.autograd.grad(mixed, [rows, inputs], weight.to(device, dtype))
        results.append([mixed, drows.masked_fill(hidden_BTK[:, None].to(device), 0.0), dinputs])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double().cpu(), expected, atol=1e-5, rtol=1e-5)


def test_attention_in_half_precision():
    """Weights, sums and gradients are within its rounding of those in float32."""
    context, T = context_of(*CASES[0]), CASES[0][0]
    projected, pos_key = (torch.randn(B, T, H * (2 * D + X)) * 0.8).to(HALF), torch.randn(H, 2 * T - 1, X).to(HALF)
    value, weight = torch.randn(B, T, H * D).to(HALF), torch.randn(B, T, H * D).to(HALF)
    numbers = [torch.tensor(number, device=DEVICE) for number in (0.0, 1.0)]
    results = []
    for dtype in (torch.float32, HALF):
        inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (projected, pos_key, value)]
        parts = inputs[0].split([H * D, H * D, H * X], dim=-1)
        span_2BT = context.span_2BT.to(DEVICE)
        weights, _, _ = attention_weights(*parts, inputs[1], span_2BT, *numbers, LARGE_SCORE, 1e-4)
        mixed = weighted_sums(weights, inputs[2], span_2BT)
        results.append([weights, mixed, *torch.autograd.grad(mixed, inputs, weight.to(DEVICE, dtype))])
        assert all(x.dtype == dtype for x in results[-1])
    for expected, actual in zip(*results, strict=True):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error.item() < torch.finfo(HALF).eps
