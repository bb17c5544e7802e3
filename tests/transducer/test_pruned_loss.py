"""Tests of the pruned transducer loss: recorded results of k2, gradients by finite differences, bad input.

A golden file holds arrays and a list of calls, in which "@x" stands for the array x. The recorded gradients are
gradients of (loss * cotangent).sum(); the cotangent is 1 unless the call names one.

Shapes are named as in ssm_asr/transducer/pruned_loss.py.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import joiner_terms, pieces
from ssm_asr.ops.lattice import lattice_score
from ssm_asr.transducer import pruned_loss
from ssm_asr.transducer import rnnt_loss as rnnt
from ssm_asr.transducer.prune_ranges import limit_rise, suffix_minimum

GOLDEN = Path(__file__).parents[1] / "golden" / "rnnt"
TOLERANCE = {
    torch.int64: dict(rtol=0, atol=0),
    torch.float64: dict(rtol=1e-8, atol=1e-8),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
}
Golden = dict[str, Any]


@functools.cache
def load(file: str) -> tuple[Golden, dict[str, Golden]]:
    """Reads a golden file; returns its arrays as tensors, and its calls by id."""
    with np.load(GOLDEN / file) as archive:
        calls = json.loads(str(archive["json"]))["calls"]
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "json"}
    arrays["None"] = None
    return arrays, {call["id"]: call for call in calls}


def kind(call: Golden) -> str:
    """Says which test a recorded call belongs to."""
    return "pipeline" if call["fn"] == "pipeline" else "error" if "raises" in call else "function"


def calls(wanted: str) -> list[tuple[str, str]]:
    """Lists (file, id) of all calls of one kind."""
    files = sorted(path.name for path in GOLDEN.glob("*.npz"))
    return [(file, name) for file in files for name, call in load(file)[1].items() if kind(call) == wanted]


def arguments(arrays: Golden, call: Golden, leaves: tuple[str, ...]) -> Golden:
    """Returns the arguments of a call; the tensors that `leaves` names require gradients."""
    args = {}
    for name, value in call["args"].items():
        args[name] = arrays[value[1:]] if isinstance(value, str) and value.startswith("@") else value
        if name in leaves:
            args[name] = args[name].clone().requires_grad_()
    return args


def run(call: Golden, args: Golden) -> dict[str, Tensor]:
    """Runs a call; returns its outputs by their golden names."""
    name = call["fn"].removeprefix("k2.")
    if name in OTHER_FUNCTIONS:
        return OTHER_FUNCTIONS[name](**args)
    results = getattr(pruned_loss, name)(**args)
    if name == "get_rnnt_prune_ranges":
        return {"ranges": results}
    if name == "do_rnnt_pruning":
        return dict(zip(("am_pruned", "lm_pruned"), results, strict=True))
    if args.get("return_grad"):
        loss, (px_grad, py_grad) = results
        return {"loss": loss, "px_grad": px_grad, "py_grad": py_grad}
    return {"loss": results}


def smoothed_arcs(
    lm: Tensor, am: Tensor, lm_only_scale: float = 0.0, am_only_scale: float = 0.0, **args: Any
) -> dict[str, Tensor]:
    symbols, blank = args["symbols"], args["termination_symbol"]
    symbol_BTU, blank_BTU = rnnt.smoothed_terms(lm, am, symbols, blank, lm_only_scale, am_only_scale)
    return golden_arcs(symbol_BTU, blank_BTU, args)


def joint_arcs(logits: Tensor, **args: Any) -> dict[str, Tensor]:
    return pruned_arcs(logits, torch.arange(logits.shape[2]).expand(logits.shape[:3]), **args)


def pruned_arcs(logits: Tensor, ranges: Tensor, **args: Any) -> dict[str, Tensor]:
    next_symbol_BTR = rnnt.next_symbols(args["symbols"], ranges)
    cells = joiner_terms.LogitTerms.apply(logits, next_symbol_BTR, args["termination_symbol"])
    nothing_BTU = torch.full((*ranges.shape[:2], args["symbols"].shape[1] + 1), -torch.inf, dtype=logits.dtype)
    return golden_arcs(*(nothing_BTU.scatter(2, ranges, cell_BTR) for cell_BTR in cells), args)


def golden_arcs(symbol_BTU: Tensor, blank_BTU: Tensor, args: Golden) -> dict[str, Tensor]:
    """Returns px, (B, S, T+1) if regular, else (B, S, T), and py (B, S+1, T), in the layout of k2."""
    B, T, U = symbol_BTU.shape
    boundary = args["boundary"]
    if boundary is None:
        boundary = torch.tensor([0, 0, U - 1, T]).expand(B, 4)
    px = rnnt.symbol_arcs(symbol_BTU, blank_BTU, boundary, args["rnnt_type"], 0.0)[:, :, :-1].mT
    if args["rnnt_type"] == "regular":
        px = functional.pad(px, (0, 1), value=-torch.inf)
    return {"px": px, "py": blank_BTU.mT}


def recursion(px: Tensor, py: Tensor, boundary: Tensor | None, return_grad: bool) -> dict[str, Tensor]:
    B, U, T = py.shape
    regular = px.shape[2] == T + 1
    if boundary is None:
        boundary = torch.tensor([0, 0, U - 1, T]).expand(B, 4)
    if regular:  # symbols may come after the last blank, in a frame of their own
        py = functional.pad(py, (0, 1), value=-torch.inf)
    lattice = lattice_score(functional.pad(px.mT, (0, 1), value=-torch.inf), py.mT, boundary, px.shape[1], regular)
    return {
        "scores": lattice.score_B,
        "px_grad": lattice.symbol_occupation_BTR[:, :, :-1].mT,
        "py_grad": lattice.blank_occupation_BTR[:, :T].mT,
    }


OTHER_FUNCTIONS = {
    "get_rnnt_logprobs": smoothed_arcs,
    "get_rnnt_logprobs_smoothed": smoothed_arcs,
    "get_rnnt_logprobs_joint": joint_arcs,
    "get_rnnt_logprobs_pruned": pruned_arcs,
    "mutual_information_recursion": recursion,
    "_monotonic_lower_bound": lambda x: {"y": suffix_minimum(x)},
    "_adjust_pruning_lower_bound": lambda s_begin, s_range: {"y": limit_rise(suffix_minimum(s_begin), s_range - 1)},
}


@pytest.mark.parametrize(("file", "name"), calls("function"))
def test_golden_call(file: str, name: str) -> None:
    arrays, by_name = load(file)
    call = by_name[name]
    args = arguments(arrays, call, tuple(call.get("grads", ())))
    outputs = run(call, args)
    actual = {what: (outputs[what].detach(), arrays[expected]) for what, expected in call["outputs"].items()}
    if "grads" in call:
        total = outputs.get("loss", outputs.get("scores"))
        cotangent = arrays[call["cotangent"][1:]] if "cotangent" in call else torch.ones_like(total)
        (total * cotangent).sum().backward()
        # For an utterance without an alignment k2 recorded the gradients of some path; ours are zero.
        infeasible = total.isinf().view(-1, 1, 1) if total.ndim else torch.tensor(False)
        for what in {"px_grad", "py_grad"} & set(actual):
            actual[what] = (actual[what][0], actual[what][1].masked_fill(infeasible, 0.0))
        for what, expected in call["grads"].items():
            zeroed = infeasible.view(-1, *[1] * (args[what].ndim - 1)) if total.ndim else infeasible
            actual["d_" + what] = (args[what].grad, arrays[expected].masked_fill(zeroed, 0.0))
    if "px" in actual:
        actual = {what: within_frames(what, args, *pair) for what, pair in actual.items()}
    for what, (ours, expected) in actual.items():
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **TOLERANCE[ours.dtype], msg=lambda m, w=what: f"{w}: {m}")


def within_frames(what: str, args: Golden, *arcs: Tensor) -> tuple[Tensor, ...]:
    """Sets arcs of frames after the end to 0, because no alignment takes them."""
    if args["boundary"] is None:
        return arcs
    t_end_B11 = args["boundary"][:, 3, None, None]
    if what == "px" and args["rnnt_type"] == "regular":
        t_end_B11 = t_end_B11 + 1
    return tuple(x.masked_fill(torch.arange(x.shape[2]) >= t_end_B11, 0.0) for x in arcs)


@pytest.mark.parametrize(("file", "name"), calls("error"))
def test_golden_error(file: str, name: str) -> None:
    arrays, by_name = load(file)
    with pytest.raises(ValueError, match=r"frames|regular lattice|blank 0"):
        run(by_name[name], arguments(arrays, by_name[name], ()))


class Joiner(nn.Module):
    def __init__(self, weight_VJ: Tensor, bias_V: Tensor) -> None:
        super().__init__()
        self.output_linear = nn.Linear(*weight_VJ.mT.shape, dtype=weight_VJ.dtype)
        self.output_linear.weight.data.copy_(weight_VJ)
        self.output_linear.bias.data.copy_(bias_V)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool) -> Tensor:
        assert not project_input
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


def unfused_losses(
    am: Tensor,
    lm: Tensor,
    enc: Tensor,
    dec: Tensor,
    joiner: nn.Module,
    prune_boundary: Tensor,
    s_range: int,
    scales: dict[str, float],
    **common: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (simple loss, pruned loss, ranges) step by step, by the functions that have names of k2."""
    simple, occupations = pruned_loss.rnnt_loss_smoothed(lm, am, **scales, return_grad=True, **common)
    ranges = pruned_loss.get_rnnt_prune_ranges(*occupations, prune_boundary, s_range)
    logits = joiner(*pruned_loss.do_rnnt_pruning(enc, dec, ranges), project_input=False)
    return simple, pruned_loss.rnnt_loss_pruned(logits, ranges=ranges, **common), ranges


def golden_pipeline(arrays: Golden, call: Golden) -> tuple[Golden, Tensor]:
    args = arguments(arrays, call, ("am", "lm", "enc", "dec"))
    B, T, _ = args["am"].shape
    boundary = args["boundary"]
    if boundary is None:
        boundary = torch.tensor([0, 0, args["symbols"].shape[1], T]).expand(B, 4)
    return args, boundary


def compare_pipeline(arrays: Golden, name: str, ours: Golden) -> None:
    for what, value in ours.items():
        expected = arrays[f"{name}.{what}"]
        torch.testing.assert_close(value.detach(), expected, **TOLERANCE[value.dtype], msg=lambda m, w=what: w + m)


@pytest.mark.parametrize(("file", "name"), calls("pipeline"))
def test_golden_pipeline_by_steps(file: str, name: str) -> None:
    arrays, by_name = load(file)
    args, boundary = golden_pipeline(arrays, by_name[name])
    joiner = Joiner(args["W"].mT, torch.zeros(args["W"].shape[1]))
    scales = {scale: args.pop(scale) for scale in ("lm_only_scale", "am_only_scale")}
    inputs = [args.pop(x) for x in ("am", "lm", "enc", "dec")]
    del args["W"]
    simple, pruned, ranges = unfused_losses(*inputs, joiner, boundary, args.pop("s_range"), scales, **args)
    (0.5 * simple + pruned).backward()
    grads = dict(zip(("d_am", "d_lm", "d_enc", "d_dec"), (x.grad for x in inputs), strict=True))
    d_weight = joiner.output_linear.weight.grad.mT
    compare_pipeline(
        arrays,
        name,
        {"simple_loss": simple, "pruned_loss": pruned, "ranges": ranges, "d_W": d_weight, **grads},
    )


@pytest.mark.parametrize(("file", "name"), calls("pipeline"))
def test_golden_pipeline_at_once(file: str, name: str) -> None:
    arrays, by_name = load(file)
    args, boundary = golden_pipeline(arrays, by_name[name])
    # pruned_transducer_loss needs blank 0, so that token 0 and the blank of the golden file are exchanged.
    order = torch.arange(args["am"].shape[2])
    order[[0, args["termination_symbol"]]] = order[[args["termination_symbol"], 0]]
    joiner = Joiner(args["W"].mT[order], torch.zeros(len(order)))
    simple_B, pruned_B = pruned_loss.pruned_transducer_loss(
        args["am"][:, :, order],
        args["lm"][:, :, order],
        args["enc"],
        args["dec"],
        joiner,
        order[args["symbols"]],
        boundary[:, 3],
        boundary[:, 2],
        args["s_range"],
        args["lm_only_scale"],
        args["am_only_scale"],
        args["rnnt_type"],
        args["delay_penalty"],
        backend="torch",
    )
    reduce = {"sum": torch.sum, "mean": torch.mean}[args["reduction"]]
    simple, pruned = reduce(simple_B), reduce(pruned_B)
    (0.5 * simple + pruned).backward()
    grads = {f"d_{x}": args[x].grad for x in ("am", "lm", "enc", "dec")}
    d_weight = joiner.output_linear.weight.grad[order].mT
    compare_pipeline(arrays, name, {"simple_loss": simple, "pruned_loss": pruned, "d_W": d_weight, **grads})


def random_batch(dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Golden:
    """Makes the arguments for a batch of three utterances of different lengths, one of them without symbols."""
    generator = torch.Generator().manual_seed(seed)
    B, T, S, V, J = 3, 7, 4, 6, 5

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return dict(
        simple_am_BTV=normal(B, T, V).requires_grad_(),
        simple_lm_BUV=normal(B, S + 1, V).requires_grad_(),
        encoder_out_BTJ=normal(B, T, J).requires_grad_(),
        decoder_out_BUJ=normal(B, S + 1, J).requires_grad_(),
        joiner=Joiner(normal(V, J), normal(V)),
        symbols_BS=torch.randint(1, V, (B, S), generator=generator),
        frames_B=torch.tensor([7, 5, 4]),
        symbols_lens_B=torch.tensor([4, 3, 0]),
        prune_range=3,
        backend="torch",
    )


def leaves(batch: Golden) -> list[Tensor]:
    return [x for x in batch.values() if isinstance(x, Tensor) and x.is_floating_point()] + list(
        batch["joiner"].parameters()
    )


def losses_and_gradients(batch: Golden) -> list[Tensor]:
    losses = pruned_loss.pruned_transducer_loss(**batch)
    (0.5 * losses[0] + losses[1]).sum().backward()
    return [x.detach() for x in losses] + [x.grad for x in leaves(batch)]


@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_gradients_by_finite_differences(rnnt_type: str) -> None:
    batch = random_batch(torch.float64) | dict(rnnt_type=rnnt_type, delay_penalty=0.1, am_scale=0.1)
    parameters = leaves(batch)

    def losses(*_: Tensor) -> tuple[Tensor, Tensor]:
        return pruned_loss.pruned_transducer_loss(**batch)

    assert torch.autograd.gradcheck(losses, parameters)


@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_at_once_equals_steps(rnnt_type: str) -> None:
    batch = random_batch(torch.float64) | dict(rnnt_type=rnnt_type)
    at_once = losses_and_gradients(batch)
    for x in leaves(batch):
        x.grad = None
    zeros = torch.zeros(3, dtype=torch.int64)
    boundary = torch.stack([zeros, zeros, batch["symbols_lens_B"], batch["frames_B"]], 1)
    simple, pruned, _ = unfused_losses(
        *list(batch.values())[:5],
        boundary,
        3,
        dict(lm_only_scale=0.25, am_only_scale=0.0),
        symbols=batch["symbols_BS"],
        termination_symbol=0,
        boundary=boundary,
        rnnt_type=rnnt_type,
        reduction="none",
    )
    (0.5 * simple + pruned).sum().backward()
    by_steps = [simple.detach(), pruned.detach()] + [x.grad for x in leaves(batch)]
    torch.testing.assert_close(at_once, by_steps, rtol=1e-10, atol=1e-12)


def test_pieces_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses_and_gradients(random_batch(torch.float64))
    monkeypatch.setattr(pieces, "PIECE_NUMEL_CPU", 1)
    torch.testing.assert_close(losses_and_gradients(random_batch(torch.float64)), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_agrees_with_float64(scale: float) -> None:
    single = losses_and_gradients(random_batch(torch.float32, scale))
    double = losses_and_gradients(random_batch(torch.float64, scale))
    for ours, expected in zip(single, double, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_losses_in_float32() -> None:
    full = losses_and_gradients(random_batch(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = random_batch(torch.float32)
        mixed = losses_and_gradients(batch)
    for what, (ours, expected) in enumerate(zip(mixed, full, strict=True)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02, msg=lambda m, w=what: f"{w}: {m}")
    assert torch.equal(mixed[0], full[0])  # the simple loss is computed in float32
    assert not torch.equal(mixed[1], full[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_gpu_agrees_with_cpu(rnnt_type: str) -> None:
    on_cpu = random_batch(torch.float64) | dict(rnnt_type=rnnt_type)
    on_gpu = random_batch(torch.float64) | dict(rnnt_type=rnnt_type)
    on_gpu["joiner"].cuda()
    for name, x in on_gpu.items():
        if isinstance(x, Tensor):
            on_gpu[name] = x.detach().cuda().requires_grad_(x.requires_grad)
    ours = [x.cpu() for x in losses_and_gradients(on_gpu)]
    torch.testing.assert_close(ours, losses_and_gradients(on_cpu), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_utterance_without_alignment_is_infinite_and_has_no_gradient(rnnt_type: str) -> None:
    expected = losses_and_gradients(random_batch(torch.float64) | dict(rnnt_type=rnnt_type))
    batch = random_batch(torch.float64) | dict(rnnt_type=rnnt_type)
    lens = {"regular": ([7, 0, 4], [4, 3, 0]), "modified": ([7, 2, 4], [4, 3, 0])}
    frames, symbols = lens.get(rnnt_type, lens["modified"])
    batch |= dict(frames_B=torch.tensor(frames), symbols_lens_B=torch.tensor(symbols))
    simple_B, pruned_B, *gradients = losses_and_gradients(batch)
    keep = torch.tensor([0, 2])
    for loss_B, expected_B in zip((simple_B, pruned_B), expected, strict=False):
        assert loss_B[1] == torch.inf
        torch.testing.assert_close(loss_B[keep], expected_B[keep])
    for gradient, expected_gradient in zip(gradients[:4], expected[2:6], strict=True):
        assert torch.all(gradient[1] == 0.0)
        torch.testing.assert_close(gradient[keep], expected_gradient[keep])
    assert all(x.isfinite().all() for x in gradients)


def test_impossible_symbol_makes_the_loss_infinite_without_nan() -> None:
    batch = random_batch(torch.float32)
    batch["joiner"].output_linear.bias.data[batch["symbols_BS"][0, 0]] = -torch.inf
    simple_B, pruned_B, *gradients = losses_and_gradients(batch)
    assert simple_B.isfinite().all()
    assert pruned_B[0] == torch.inf and pruned_B[2].isfinite()
    assert all(x.isfinite().all() for x in gradients)


def test_only_empty_transcripts() -> None:
    batch = random_batch(torch.float64)
    nothing = dict(symbols_lens_B=torch.zeros(3, dtype=torch.int64))
    expected = pruned_loss.pruned_transducer_loss(**batch | nothing)
    nothing |= dict(symbols_BS=batch["symbols_BS"][:, :0])
    nothing |= {x: batch[x][:, :1] for x in ("simple_lm_BUV", "decoder_out_BUJ")}
    torch.testing.assert_close(pruned_loss.pruned_transducer_loss(**batch | nothing), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(frames_B=torch.tensor([7, 8, 4])), "utterance 1: .* frames 0 to 8"),
        (dict(symbols_lens_B=torch.tensor([4, 3, 5])), "utterance 2: symbols 0 to 5"),
        (dict(frames_B=torch.tensor([7, 5])), "2 and 3 lengths for 3 utterances"),
        (dict(rnnt_type="monotonic"), "'monotonic'.*regular, modified, constrained"),
        (dict(backend="warp"), "loss backend 'warp': give one of torch, k2"),
    ],
)
def test_bad_input_is_named(change: Golden, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruned_loss.pruned_transducer_loss(**random_batch(torch.float32) | change)


def test_empty_batch_is_an_error() -> None:
    batch = {name: x[:0] if isinstance(x, Tensor) else x for name, x in random_batch(torch.float32).items()}
    with pytest.raises(ValueError, match="empty batch"):
        pruned_loss.pruned_transducer_loss(**batch)


def test_bad_steps_are_named() -> None:
    arrays, by_name = load("tiny_f64_regular.npz")
    args = arguments(arrays, by_name["pruned_hat.d0.sum"], ())
    with pytest.raises(ValueError, match="fall over time"):
        pruned_loss.rnnt_loss_pruned(**args | dict(ranges=args["ranges"].flip(1)))
    with pytest.raises(ValueError, match="blank 0"):
        pruned_loss.rnnt_loss_pruned(**args | dict(termination_symbol=1))
    with pytest.raises(ValueError, match="'max'"):
        pruned_loss.rnnt_loss_pruned(**args | dict(reduction="max"))


@pytest.fixture
def import_k2_anew() -> Any:
    pruned_loss._k2.cache_clear()
    yield
    pruned_loss._k2.cache_clear()


@pytest.mark.usefixtures("import_k2_anew")
@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_k2_that_cannot_be_imported_is_not_used(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k2.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "k2", raising=False)
    with pytest.raises(ValueError, match="loss backend 'k2': k2 cannot be imported here"):
        pruned_loss.pruned_transducer_loss(**random_batch(torch.float32) | dict(backend="k2"))


@pytest.mark.usefixtures("import_k2_anew")
def test_backends_are_interchangeable(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses_and_gradients(random_batch(torch.float64) | dict(frames_B=torch.tensor([7, 0, 4])))
    monkeypatch.setitem(sys.modules, "k2", rnnt)  # its functions have the names of k2
    batch = random_batch(torch.float64) | dict(frames_B=torch.tensor([7, 0, 4]), backend="k2")
    torch.testing.assert_close(losses_and_gradients(batch), expected, rtol=1e-10, atol=1e-12)
