"""Triton kernels of both joints' log-probabilities against the plain form: on a GPU, or by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.encoder.modules import scaled_linear
from ssm_asr.ops import dispatch, pieces, sum_joint
from ssm_asr.ops import joiner_terms as log_probs
from ssm_asr.ops import sum_joint_kernel as sum_joint_kernels
from ssm_asr.transducer import pruned_loss, rnnt_loss
from ssm_asr.transducer.predictor import Joiner

EXACT = dict(atol=1e-5, rtol=1e-5)
B, T, U, J, R = 2, 19, 7, 20, 3


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    torch.manual_seed(1)
    if DEVICE == "cpu":  # whose interpreter has no products of bfloat16
        monkeypatch.setattr(sum_joint_kernels, "PART", torch.float32)


def joiner_batch(V, scale=1.0):
    """Leaves encoder, decoder, weight, bias; rows and symbols of the cells; the frames that count."""
    leaves = [torch.randn(B, T, J), torch.randn(B, U, J), torch.randn(V, J) * scale, torch.randn(V) * scale]
    start_BT = torch.randint(0, U - R + 1, (B, T)).sort(1).values
    row_BTR = start_BT[..., None] + torch.arange(R)
    symbol_BTR = torch.randint(0, V, (B, T, R))  # the blank among them
    frames_BT = torch.arange(T) < torch.tensor([[T], [T - 4]])
    return leaves, row_BTR, symbol_BTR, frames_BT.flatten().nonzero()[:, 0]


def joiner_terms(batch, weights, dtype, matmul_dtype, use, monkeypatch, blank=2):
    """The terms (2, B, T, R) and the gradients of all leaves, weighted."""
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: use)
    leaves, *ids = batch
    leaves = [x.detach().clone().to(DEVICE, dtype).requires_grad_() for x in leaves]
    terms = torch.stack(log_probs.JoinerTerms.apply(*leaves, *(x.to(DEVICE) for x in ids), blank, matmul_dtype))
    return [x.double().cpu() for x in (terms, *torch.autograd.grad(terms, leaves, weights.to(terms)))]


@pytest.mark.parametrize("V, piece_frames", [(5, 100), (64, 6), (100, 5), (700, 100), (700, 16)])
def test_joiner_terms(V, piece_frames, monkeypatch):
    batch, weights = joiner_batch(V), torch.randn(2, B, T, R)
    for device in ("CPU", "GPU"):
        monkeypatch.setattr(pieces, f"PIECE_NUMEL_{device}", piece_frames * R * max(V, J))
    expected = joiner_terms(batch, weights, torch.float64, torch.float64, False, monkeypatch)
    plain = joiner_terms(batch, weights, torch.float32, torch.float32, False, monkeypatch)
    actual = joiner_terms(batch, weights, torch.float32, torch.float32, True, monkeypatch)
    for ours, single, double in zip(actual, plain, expected, strict=True):
        torch.testing.assert_close(ours, double, **EXACT)
        torch.testing.assert_close(ours, single, **EXACT)
    terms, d_encoder, *_ = actual
    assert terms[:, 1, T - 4 :].count_nonzero() == 0 and d_encoder[1, T - 4 :].count_nonzero() == 0
    assert (terms[:, 0] < 0).all()


def test_joiner_terms_of_large_logits(monkeypatch):
    """Where float32 has no exponential of a logit nor of its negative; a symbol that cannot be has -inf alone."""
    batch, weights = joiner_batch(70, scale=100.0), torch.randn(2, B, T, R)
    expected = joiner_terms(batch, weights, torch.float64, torch.float64, False, monkeypatch)
    actual = joiner_terms(batch, weights, torch.float32, torch.float32, True, monkeypatch)
    assert all(x.isfinite().all() for x in actual)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-3, rtol=1e-5)
    batch[0][3][69] = -torch.inf
    batch[2].clamp_(max=68)
    assert all(
        x.isfinite().all() for x in joiner_terms(batch, weights, torch.float32, torch.float32, True, monkeypatch)
    )


def test_joiner_terms_in_half_precision(monkeypatch):
    """Inputs and products in bfloat16: as near to the truth as the plain form is."""
    batch, weights = joiner_batch(100), torch.randn(2, B, T, R)
    batch[0][:2] = [x.bfloat16() for x in batch[0][:2]]
    expected = joiner_terms(batch, weights, torch.float64, torch.float64, False, monkeypatch)
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
    leaves, *ids = batch
    leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
    ids = [x.to(DEVICE) for x in ids]
    terms = torch.stack(log_probs.JoinerTerms.apply(*leaves, *ids, 2, torch.bfloat16))
    assert terms.dtype == torch.float32
    gradients = torch.autograd.grad(terms, leaves, weights.to(DEVICE))
    for leaf, ours, double in zip((terms, *leaves), (terms, *gradients), expected, strict=True):
        assert ours.dtype == leaf.dtype
        size = float(double.detach().abs().max())
        torch.testing.assert_close(ours.double().cpu(), double, rtol=0.02, atol=0.02 * size)


def smoothed_terms(terms_of, leaves, symbols_BS, weights, dtype):
    """The terms and the gradients of both leaves, weighted."""
    inputs = [x.detach().to(DEVICE, dtype).requires_grad_() for x in leaves]
    symbol_BTU, blank_BTU = terms_of(*inputs, symbols_BS.to(DEVICE), 3)
    assert (symbol_BTU[:, :, -1] == -torch.inf).all() and symbol_BTU.dtype in (torch.float32, torch.float64)
    terms = (symbol_BTU[:, :, :-1], blank_BTU)
    gradients = torch.autograd.grad(terms, inputs, [x.to(terms[0]) for x in weights])
    assert all(x.dtype == dtype for x in gradients)
    return [x.double().cpu() for x in (*terms, *gradients)]


def by_torch(lm, am, symbols_BS, blank):
    return rnnt_loss.smoothed_terms(lm, am, symbols_BS, blank, 0.25, 0.0)


def by_kernels(lm, am, symbols_BS, blank):
    return sum_joint_kernels.SmoothedTerms.apply(am, lm, symbols_BS, blank, 0.25)


def simple_batch(T, U, V, scale=1.0):
    """lm and am, symbols, and weights for the terms. A token follows itself, the blank stands where others do."""
    symbols_BS = torch.randint(0, V, (B, U - 1))
    symbols_BS[:, 2], symbols_BS[0, 3] = symbols_BS[:, 1], 3
    weights = [2 * torch.rand(B, T, U - 1) - 1, 2 * torch.rand(B, T, U) - 1]
    return [torch.randn(B, U, V) * scale, torch.randn(B, T, V) * scale], symbols_BS, weights


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("T, U, V", [(19, 7, 5), (70, 40, 64), (19, 130, 100), (19, 7, 5000)])
def test_smoothed_terms(T, U, V, scale, monkeypatch):
    """In float32, so that only the kernels' own rounding counts; also where no token is likely to both joint halves."""
    batch = simple_batch(T, U, V, scale)
    actual = smoothed_terms(by_kernels, *batch, torch.float32)
    smallest = torch.finfo(torch.float32).tiny
    monkeypatch.setattr(sum_joint, "smallest", lambda dtype: smallest)
    for ours, exact in zip(actual, smoothed_terms(by_torch, *batch, torch.float64), strict=True):
        # Two weights of at most 1 for each number, times factors that each have an error of up to 2^-16.
        torch.testing.assert_close(ours, exact, **(EXACT if DEVICE == "cpu" else dict(atol=2 * 3 * 2.0**-16, rtol=0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smoothed_terms_in_half_precision(dtype, monkeypatch):
    """As the projections leave them under autocast: nothing but the gradients is rounded to half precision."""
    leaves, *rest = simple_batch(19, 7, 100)
    leaves = [x.to(dtype) for x in leaves]
    double = smoothed_terms(by_torch, leaves, *rest, torch.float64)
    monkeypatch.setattr(dispatch, "use_kernels", lambda x: True)
    actual = smoothed_terms(by_torch, leaves, *rest, dtype)
    for ours, exact in zip(actual[:2], double[:2], strict=True):
        torch.testing.assert_close(ours, exact, **EXACT)
    for ours, exact in zip(actual[2:], double[2:], strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=2.0**-7)  # the interpreter rounds towards zero
    by_itself = smoothed_terms(by_kernels, leaves, *rest, dtype)
    assert all(torch.equal(ours, again) for ours, again in zip(actual, by_itself, strict=True))


@pytest.mark.parametrize("am_scale", [0.0, 0.1])
@pytest.mark.parametrize("V", [37, 64])
def test_both_losses(V, am_scale, monkeypatch):
    """From the projections' inputs on: losses and the gradients of inputs and parameters."""
    D = 6
    layers = torch.nn.ModuleList([scaled_linear(D, V, 1.0), scaled_linear(D, V, 1.0), Joiner(D, D, J, V)])
    encoder_BTD, decoder_BUD = torch.randn(B, T, D), torch.randn(B, U, D)
    symbols_BS = torch.randint(1, V, (B, U - 1))
    results = []
    for dtype, use in ((torch.float64, False), (torch.float32, True)):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        am_proj, lm_proj, joiner = layers.to(DEVICE, dtype)
        inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (encoder_BTD, decoder_BUD)]
        simple_B, pruned_B = pruned_loss.pruned_transducer_loss(
            pruned_loss.vocabulary_projection(am_proj, inputs[0]),
            pruned_loss.vocabulary_projection(lm_proj, inputs[1]),
            joiner.encoder_proj(inputs[0]),
            joiner.decoder_proj(inputs[1]),
            joiner,
            symbols_BS.to(DEVICE),
            torch.tensor([T, T - 4]),
            torch.tensor([U - 1, 2]),
            prune_range=R,
            am_scale=am_scale,
            backend="torch",
        )
        gradients = torch.autograd.grad((simple_B + pruned_B).sum(), [*inputs, *layers.parameters()])
        results.append([x.double().cpu() for x in (simple_B, pruned_B, *gradients)])
    for double, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, double, **EXACT)
