"""Decisions drawn outside the model, and captured graphs of its passes, against the plain path."""

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from toy import experiment
from waits import Refuse

from ssm_asr.encoder.regularize import load_whitening_flags, whitening_flags
from ssm_asr.encoder.schedule import Draws, set_batch_count
from ssm_asr.ops.devices import to_host
from ssm_asr.training import graphs as graphs_module
from ssm_asr.training.fast import Fast, make_passes
from ssm_asr.training.graphs import Graphs, _Weights
from ssm_asr.transducer.model import Transducer
from ssm_asr.transducer.pruned_loss import Lattices

BATCH_COUNT = 10000.0  # where no rate of the schedules is 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(long_range="nonlin_attention", graphs=False, most=256):
    torch.manual_seed(0)
    encoder: dict[str, Any] = {**experiment().model.encoder.__dict__, "long_range": long_range, "dim": (64, 64)}
    config = experiment().model
    config.encoder = type(config.encoder)(**encoder)
    model = Transducer(config, 5).to(DEVICE)
    set_batch_count(model, BATCH_COUNT)
    return model, make_passes(model, Fast("", "", ""), "torch", most) if graphs else None


def step(model_and_passes, seed, frames=120, left_context=32):
    """The output, the gradients of the encoder's parameters and the whitening flags, for given random numbers."""
    model, passes = model_and_passes
    encode = passes.encode if passes else model.encode
    random.seed(seed)
    torch.manual_seed(seed)
    features = torch.randn(3, frames, 80, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    random.seed(seed)
    torch.manual_seed(seed)
    out, lens = encode(features, torch.tensor([frames, frames - 10, frames - 30]).to(DEVICE), 16, left_context)
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"out": out.detach().clone(), "lens": lens.clone(), **gradients}


def assert_close(actual, expected, tolerance):
    """Each value to a share of the largest finite number, for a gradient that of its layer.

    Not of a bias alone: that of attention's keys has a gradient of 0, since a softmax does not see it, and what is
    there is the rounding of sums as large as those for the weights.
    """
    assert actual.keys() == expected.keys()
    largest: dict[str, float] = {}
    for name, value in expected.items():
        layer = name.rpartition(".")[0] or name
        largest[layer] = max(largest.get(layer, 0.0), float(value[value.isfinite()].abs().max()))
    for name, value in expected.items():
        atol = tolerance * largest[name.rpartition(".")[0] or name]
        torch.testing.assert_close(
            actual[name], value, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("long_range", ["nonlin_attention", "mamba2"])
def test_graphs_equal_the_plain_path(long_range):
    """On a CPU without the capture: then this is about the decisions alone, and nothing may differ at all."""
    # On a GPU both take their decisions from outside, since that switches on kernels, which have tests of their own.
    plain, graphs = make_model(long_range, DEVICE == "cuda", most=0), make_model(long_range, graphs=True)
    # The last one again: at the second call of a shape a graph is replayed.
    for seed, frames in ((1, 120), (2, 120), (3, 90), (4, 120), (5, 90)):
        expected, actual = step(plain, seed, frames), step(graphs, seed, frames)
        assert_close(actual, expected, 0.0 if DEVICE == "cpu" else 1e-4)
        assert whitening_flags(graphs[0]) == whitening_flags(plain[0])


def losses(model_and_passes, seed, tokens=32, left_context=32, chunk=16):
    """The losses of a batch, and the gradients of all parameters, for given random numbers."""
    model, passes = model_and_passes
    random.seed(seed)
    torch.manual_seed(seed)
    features, tokens_BU = torch.randn(3, 120, 80).to(DEVICE), torch.randint(1, 5, (3, tokens)).to(DEVICE)
    lens_B, token_lens_B = torch.tensor([120, 100, 90]), torch.tensor([9, 4, tokens])
    found = model(features, lens_B, tokens_BU, token_lens_B, chunk, left_context, passes)
    (0.5 * found.simple_B + found.pruned_B).masked_fill(found.simple_B.isposinf(), 0.0).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"simple": found.simple_B.detach().clone(), "pruned": found.pruned_B.detach().clone(), **gradients}


@pytest.mark.parametrize("rnnt_type", ["regular", "modified"])
def test_graphs_of_the_losses_equal_the_plain_path(rnnt_type):
    """With other transcripts, left contexts and chunks at each call; in a modified lattice one has no alignment."""
    plain, graphs = make_model(graphs=DEVICE == "cuda", most=0), make_model(graphs=True)
    for model, _ in (plain, graphs):
        model.config.rnnt_type = rnnt_type
    for call in ((1, 32, 32, 16), (2, 32, 16, 8), (3, 48, 0, 32), (4, 32, -1, -1), (5, 48, 16, 64)):
        expected, actual = losses(plain, *call), losses(graphs, *call)
        assert expected["simple"].isposinf().tolist() == [False, False, rnnt_type == "modified"]
        assert_close(actual, expected, 1e-4)
    assert len(graphs[1].encode.graphs) == (DEVICE == "cuda")  # one for all left contexts and chunks


class NoGraph:
    """Stands for a CUDA graph on a CPU: launching it changes nothing, so its results are those of its capture."""

    def replay(self) -> None:
        pass


def test_replayed_passes_give_parameters_their_gradients(monkeypatch):
    """Those of the layers that are cast and of the others, and none to parameters that are not used."""
    nothing = {name: lambda *_, **__: None for name in ("graph_pool_handle", "get_rng_state", "set_rng_state")}
    for name, value in {**nothing, "CUDAGraph": NoGraph, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs_module, "capturing", lambda *_: nullcontext())
    monkeypatch.setattr(graphs_module, "on_side_stream", nullcontext)
    # The gradients of the sum of squares are there when the backward pass is captured.
    monkeypatch.setattr(
        graphs_module._Graph,
        "_make_gradients",
        lambda graph, outputs: setattr(graph, "output_gradients", [2 * x.detach() for x in outputs]),
    )
    torch.manual_seed(1)
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(5, 4), "n": torch.nn.LayerNorm(4), "unused": torch.nn.Linear(2, 2)}
    )
    x = torch.randn(3, 5)
    graphs = Graphs(lambda x: (model["n"](model["a"](x)).tanh(),), [model], 4, cast_together=True)
    expected = torch.autograd.grad(
        model["n"](model["a"](x)).tanh().square().sum(), [*model["a"].parameters(), *model["n"].parameters()]
    )
    for _ in range(2):
        graphs._by_graph((x,))[0].square().sum().backward()
        found = [p.grad for p in (*model["a"].parameters(), *model["n"].parameters())]
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
        assert model["unused"].weight.grad is None
        model.zero_grad(set_to_none=True)
    model["a"].bias.grad = torch.ones(4)
    graphs._by_graph((x,))[0].square().sum().backward()
    assert torch.allclose(model["a"].bias.grad, expected[1] + 1.0, atol=1e-6)


def test_new_numbers_at_every_call():
    model = make_model(graphs=True)
    outputs = [step(model, seed)["out"] for seed in (1, 1, 2)]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_schedules_go_on():
    model = make_model()
    draws = Draws(torch.device(DEVICE))
    with draws.in_use():
        step(model, 1)
    before = draws.all.clone()
    set_batch_count(model[0], 0.0)
    random.seed(1)
    draws.renew()
    assert not torch.equal(before, draws.all)


class RefuseNew(Refuse):
    """Also at numbers of the host's as tensors, for which the device would have to be waited."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_losses_wait_for_nothing():
    model, _ = make_model()
    features, tokens = torch.randn(3, 120, 80, device=DEVICE), torch.randint(1, 5, (3, 9), device=DEVICE)
    frames = torch.tensor([28, 25, 20])
    lattices = Lattices.from_lengths(
        frames, torch.tensor([9, 4, 7]), 28, 9, 5, "regular", features.device, every_frame=True
    )
    draws = Draws(torch.device(DEVICE))
    for mode in (nullcontext(), RefuseNew()):  # the first pass finds the numbers of the predictor, which may wait
        with draws.in_use():
            out_BSD = model.encode(features, torch.tensor([120, 110, 90], device=DEVICE))[0]
        with mode, draws.in_use(), torch.autograd.set_multithreading_enabled(False):
            simple_B, pruned_B = model.transducer_losses(out_BSD, tokens, *lattices)
            (simple_B + pruned_B).sum().backward(inputs=[*model.decoder.parameters(), *model.joiner.parameters()])


def test_nothing_waits_for_the_device():
    for long_range in ("nonlin_attention", "mamba2"):
        model, _ = make_model(long_range)
        draws = Draws(torch.device(DEVICE))
        features, lens = torch.randn(3, 120, 80, device=DEVICE), torch.tensor([120, 110, 90], device=DEVICE)
        with draws.in_use():
            model.encode(features, lens, 16, 32)  # finds the numbers, which may wait
        flags = whitening_flags(model)
        load_whitening_flags(model, [True] * len(flags))
        with Refuse(), draws.in_use(), torch.autograd.set_multithreading_enabled(False):
            model.encode(features, lens, 16, 32)[0].sum().backward()


def test_numbers_wait_for_nothing_later():
    x = torch.arange(-1.0, 2.0, device=DEVICE)
    x += 1.0  # what is used for the first time is loaded, which may wait
    numbers = to_host(x)
    if DEVICE == "cuda":
        torch.cuda._sleep(10**9)  # about half a second
    x += 1.0
    assert numbers() == [0.0, 1.0, 2.0]
    assert DEVICE == "cpu" or not torch.cuda.current_stream().query()


def test_evaluation_is_the_plain_path():
    plain, graphs = make_model(), make_model(graphs=True)
    for model, _ in (plain, graphs):
        model.eval()
    for name, value in step(plain, 1).items():
        assert torch.equal(step(graphs, 1)[name], value)


def test_weights_cast_together():
    """As autocast casts each, in values and gradients; the layers have their own again afterwards."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).to(DEVICE)
    parameters, x = list(model.parameters()), torch.randn(4, 6, device=DEVICE)
    weights = _Weights(model, parameters, torch.bfloat16)
    weights.refresh()
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = torch.autograd.grad(model(x).float().square().sum(), parameters)
        with weights.in_use():
            assert model[2].weight.dtype == torch.bfloat16
            loss = model(x).float().square().sum()
    found = torch.autograd.grad(loss, list(weights.tensors.values()))
    weights.store_gradients(dict(zip(weights.tensors, found, strict=True)))
    assert list(map(id, model.parameters())) == list(map(id, parameters)) == list(weights.gradients)
    for p, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(weights.gradients[id(p)], gradient)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    weights.refresh()
    assert torch.equal(weights.tensors[id(parameters[0])], parameters[0].bfloat16())
