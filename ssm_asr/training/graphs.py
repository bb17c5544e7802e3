"""CUDA graphs of the forward and backward passes of training, used for the encoder and for the losses.

A graph is captured once for each set of argument shapes. Whatever else differs from batch to batch reaches it as
numbers on the device (ssm_asr.encoder.schedule.Draws, and the chunk).

Under autocast a graph may cast the weights of all linear layers by one kernel when it starts, and their gradients by
one kernel when it ends, instead of each by a kernel of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.schedule import Draws
from ssm_asr.ops.capture import (
    Captured,
    Outputs,
    autocast_in_graph,
    capturing,
    lower_precision,
    on_side_stream,
    signature,
)


class Graphs:
    """A function that is called in place of a function of a model, and replays captured graphs on a GPU.

    Calls on a CPU go to the function itself. In evaluation without gradients a graph is captured when shapes come for
    the second time, as those of validation do.

    The gradients of parameters lie in memory that the next backward pass overwrites. Set them to None between two
    passes, as `optimizer.zero_grad(set_to_none=True)` does.

    Args:
        function: maps tensors and constants to tensors. It must not wait for the device.
        modules: the modules that the function uses; their random decisions are drawn anew at every call.
        most_graphs: number of graphs to keep. They share their memory except for inputs and outputs. Calls with further
            shapes run without a graph.
        cast_together: whether the parameters of linear layers are cast all at once. The function must then use them
            only as linear layers do under autocast, in the lower precision.
    """

    def __init__(
        self, function: Callable[..., Outputs], modules: Iterable[nn.Module], most_graphs: int, *, cast_together: bool
    ) -> None:
        self.function, self.most_graphs, self.cast_together = function, most_graphs, cast_together
        self.modules = nn.ModuleList(modules)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.draws = Draws(self.device)
        self.graphs: dict[Any, _Graph] = {}
        self.rehearsing = False
        self.warmed_up: set[torch.dtype | None] = set()
        self.pool: Any = None
        self.weights: dict[torch.dtype | None, _Weights] = {}
        self.evaluation = Captured(function, most_graphs=most_graphs)
        # It makes autograd call the backward pass, which gives the parameters their gradients itself: for autograd to
        # carry a thousand of them takes the host several milliseconds.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)

    def __call__(self, *arguments: Any) -> Outputs:
        """Returns what the function returns."""
        if not (self.modules[0].training and torch.is_grad_enabled()):
            return self.function(*arguments) if torch.is_grad_enabled() else self.evaluation(*arguments)
        self.draws.renew()
        with self.draws.in_use():
            return self._by_graph(arguments) if self.device.type == "cuda" else self.function(*arguments)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Returns a context in which calls run both passes at once, without a graph, as before a capture.

        So a call asks for every kernel that its graph would launch; gradients at its outputs have no influence.
        """
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False

    def _by_graph(self, arguments: tuple[Any, ...]) -> Outputs:
        """Replays the graph for these shapes, captures it first if needed, or calls the function."""
        dtype = lower_precision()
        key = (*map(signature, arguments), dtype)
        graph = self.graphs.get(key)
        if graph is None and len(self.graphs) >= self.most_graphs:
            return self.function(*arguments)
        if graph is None:
            graph = _Graph(self, arguments, dtype)
            self.draws.draw_new()
        if not self.rehearsing:
            self.graphs[key] = graph
        outputs: Outputs = _Replay.apply(graph, self.anchor, *(x for x in arguments if isinstance(x, Tensor)))
        return outputs


class _Weights:
    """The tensors that graphs of one precision use as parameters, and the memory of their gradients.

    Copies of the parameters of linear layers lie end to end in the lower precision, so that one kernel casts all of
    them. All other parameters are used as they are, and without a lower precision all parameters are.

    Attributes:
        places: (module, name) of each parameter that is cast.
        originals: the parameters that are cast, in the order of `places`.
        wide: the parameters that are cast, end to end in float32.
        narrow: the parameters that are cast, end to end in the lower precision.
        gradient: their gradients, end to end in float32.
        tensors: for the id of each parameter the tensor that graphs use.
        gradients: for the id of each parameter the memory of its gradient.
        uncast: the parameters that graphs use as they are.
    """

    def __init__(self, modules: nn.Module, parameters: list[nn.Parameter], dtype: torch.dtype | None) -> None:
        linears = [module for module in modules.modules() if isinstance(module, nn.Linear)] if dtype else []
        self.places = [(m, name) for m in linears for name, p in m.named_parameters(recurse=False) if p.requires_grad]
        self.originals = [getattr(module, name) for module, name in self.places]
        sizes = [p.numel() for p in self.originals]
        self.wide, self.gradient = (torch.zeros(sum(sizes), device=parameters[0].device) for _ in range(2))
        self.narrow = self.wide.to(dtype)
        self.tensors: dict[int, Tensor] = {id(p): p for p in parameters}
        self.gradients = {id(p): self.gradient[:0] for p in parameters}
        parts = zip(self.narrow.split(sizes), self.gradient.split(sizes), self.originals, strict=True)
        for narrow, gradient, p in parts:
            self.tensors[id(p)] = narrow.view_as(p).detach().requires_grad_()
            self.gradients[id(p)] = gradient.view_as(p)
        self.uncast = [p for p in parameters if self.tensors[id(p)] is p]
        self.gradients |= {id(p): torch.zeros_like(p) for p in self.uncast}

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the parameters with their present values."""
        if self.places:
            torch.cat([p.flatten() for p in self.originals], out=self.wide)
            self.narrow.copy_(self.wide)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Returns a context in which the linear layers use the cast tensors as their parameters."""
        for module, name in self.places:
            module._parameters[name] = self.tensors[id(module._parameters[name])]  # type: ignore[assignment]
        try:
            yield
        finally:
            for (module, name), parameter in zip(self.places, self.originals, strict=True):
                module._parameters[name] = parameter

    def store_gradients(self, found: dict[int, Tensor | None]) -> None:
        """Copies gradients, given by the ids of their parameters, to their memory.

        A parameter of a linear layer that was not used, whose gradient is None, gets zeros.
        """
        if self.places:
            parts = [found[id(p)] for p in self.originals]
            pairs = zip(parts, self.originals, strict=True)
            flat = [torch.zeros_like(p, dtype=self.narrow.dtype) if part is None else part for part, p in pairs]
            self.gradient.copy_(torch.cat([part.flatten() for part in flat]))
        places, gradients = [], []  # one kernel copies all tensors that are contiguous
        for p in self.uncast:
            place, gradient = self.gradients[id(p)], found[id(p)]
            if gradient is not None and place.is_contiguous() and gradient.is_contiguous():
                places.append(place.view(-1))
                gradients.append(gradient.view(-1))
            elif gradient is not None:
                place.copy_(gradient)
        if places:
            torch._foreach_copy_(places, gradients)


class _Graph:
    """The captured forward and backward graphs for one set of shapes.

    All graphs of one precision write the gradients of parameters to one memory, which `_Weights` holds.
    """

    def __init__(self, owner: Graphs, arguments: tuple[Any, ...], dtype: torch.dtype | None) -> None:
        self.owner, self.is_rehearsal = owner, owner.rehearsing
        static = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]
        self.inputs = [x for x in static if isinstance(x, Tensor)]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        owner.pool = owner.pool or torch.cuda.graph_pool_handle()
        if dtype not in owner.weights:
            cast_to = dtype if owner.cast_together else None
            owner.weights[dtype] = _Weights(owner.modules, owner.parameters, cast_to)
        self.weights = owner.weights[dtype]

        def run() -> Outputs:
            self.weights.refresh()
            with autocast_in_graph(dtype), self.weights.in_use():
                return owner.function(*static)

        if self.is_rehearsal:
            self.outputs = [x.detach() for x in self._warm_up(run)]
            return
        if dtype not in owner.warmed_up:
            self._warm_up(run)
            owner.warmed_up.add(dtype)
            torch.cuda.empty_cache()  # what the warm-up has used is of no use to the graph, which has its own memory
        with capturing(self.forward, owner.pool):
            outputs = run()
        self._make_gradients(outputs)
        with capturing(self.backward, owner.pool):
            self._differentiate(outputs)
        # Without their history, so that the next graph can use the memory of the backward pass.
        self.outputs = [x.detach() for x in outputs]

    def _make_gradients(self, outputs: Outputs) -> None:
        """Makes the memory of the gradients of the outputs, None for outputs without a gradient."""
        self.output_gradients = [torch.zeros_like(x) if x.requires_grad else None for x in outputs]

    def _differentiate(self, outputs: Outputs) -> None:
        """Computes the gradients of inputs and parameters, and copies the latter to their memory."""
        tensors = self.weights.tensors
        wanted = [x for x in self.inputs if x.requires_grad]
        pairs = [(x, g) for x, g in zip(outputs, self.output_gradients, strict=True) if g is not None]
        results, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, [*wanted, *tensors.values()], gradients, allow_unused=True)
        of_inputs, of_weights = iter(found[: len(wanted)]), found[len(wanted) :]
        self.input_gradients = [next(of_inputs) if x.requires_grad else None for x in self.inputs]
        self.used = [gradient is not None for gradient in of_weights]
        self.weights.store_gradients(dict(zip(tensors, of_weights, strict=True)))

    def _warm_up(self, run: Callable[[], Outputs]) -> Outputs:
        """Runs both passes without a graph once, so that kernels are loaded and libraries set themselves up.

        Afterwards the state of the random numbers and the buffers, of whitening and batch norm, are as before.
        """
        random_state = torch.cuda.get_rng_state()
        buffers = [(buffer, buffer.clone()) for buffer in self.owner.modules.buffers()]
        with nullcontext() if self.is_rehearsal else on_side_stream():
            outputs = run()
            self._make_gradients(outputs)
            self._differentiate(outputs)
        for buffer, value in buffers:
            buffer.copy_(value)
        torch.cuda.set_rng_state(random_state)
        return outputs


class _Replay(torch.autograd.Function):
    """Replays the graphs: copies inputs in, launches a graph, and returns its outputs, forward and backward.

    The backward pass sets the gradients of the parameters, or adds to those that are there.
    """

    @staticmethod
    def forward(ctx: Any, graph: _Graph, anchor: Tensor, *tensors: Tensor) -> Outputs:
        ctx.graph = graph
        with torch.no_grad():
            for place, x in zip(graph.inputs, tensors, strict=True):
                place.copy_(x)
        if not graph.is_rehearsal:
            graph.forward.replay()
        return tuple(x.detach() for x in graph.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        for place, gradient in zip(graph.output_gradients, grads, strict=True):
            if place is not None:
                place.copy_(gradient)
        if not graph.is_rehearsal:
            graph.backward.replay()
        of_parameters = zip(graph.owner.parameters, graph.weights.gradients.values(), graph.used, strict=True)
        for parameter, gradient, used in of_parameters:
            if used:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return None, None, *(None if x is None else x.detach() for x in graph.input_gradients)
