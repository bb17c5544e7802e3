"""CUDA graphs of forward and backward passes in training: of the encoder, and of the losses.

On a fast GPU the thousands of small kernels of a pass take less time than the host needs to launch them. A graph
launches all at once. It is captured once for all arguments of the same shapes; what else differs from batch to batch
reaches it as numbers on the device (ssm_asr.encoder.schedule.Draws). Under autocast the weights of all layers may be
cast at once where it begins, and their gradients where it ends, instead of each by a kernel of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.schedule import Draws

Outputs = tuple[Tensor, ...]


class Graphs:
    """Stands in for a function of a model; calls that are not for training on a GPU go to the function itself.

    So does the first call with arguments of given shapes: what comes only once is not worth a capture. A gradient that
    it leaves at a parameter is overwritten by its next backward pass: set gradients to None between.

    Args:
        function: tensors and constants -> tensors. It may not wait for the device.
        modules: those that it uses; their decisions are drawn at every call from now on.
        most: graphs to keep, which share their memory but for input and output; further shapes run without.
        cast_together: whether the weights of linear layers are cast at once, for functions that use them in layers.
    """

    def __init__(
        self, function: Callable[..., Outputs], modules: Iterable[nn.Module], most: int, *, cast_together: bool
    ) -> None:
        self.function, self.most, self.cast_together = function, most, cast_together
        self.modules = nn.ModuleList(modules)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.draws = Draws(self.device)
        self.graphs: dict[Any, _Graph | None] = {}
        self.pool: Any = None
        self.weights: dict[torch.dtype | None, _Weights] = {}

    def __call__(self, *arguments: Any) -> Outputs:
        """As the function."""
        if not (self.modules[0].training and torch.is_grad_enabled()):
            return self.function(*arguments)
        self.draws.renew()
        with self.draws.in_use():
            return self._by_graph(arguments) if self.device.type == "cuda" else self.function(*arguments)

    def _by_graph(self, arguments: tuple[Any, ...]) -> Outputs:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (*map(_kind, arguments), dtype)
        if key not in self.graphs:
            if len(self.graphs) < self.most:
                self.graphs[key] = None
            return self.function(*arguments)
        graph = self.graphs[key] or _Graph(self, arguments, dtype)
        self.graphs[key] = graph
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        outputs: Outputs = _Replay.apply(graph, *tensors, *self.parameters)
        return outputs


def _kind(argument: Any) -> Any:
    """What of an argument is captured, and may not change."""
    return (argument.shape, argument.dtype, argument.requires_grad) if isinstance(argument, Tensor) else argument


class _Weights:
    """What stands in for the parameters in graphs of one precision, and the place of their gradients.

    The parameters of linear layers lie end to end in the lower precision, so that one kernel casts all of them; the
    others, and without a lower precision all, are themselves.
    """

    def __init__(self, modules: nn.Module, parameters: list[nn.Parameter], dtype: torch.dtype | None) -> None:
        linears = [module for module in modules.modules() if isinstance(module, nn.Linear)] if dtype else []
        self.places = [(m, name) for m in linears for name, p in m.named_parameters(recurse=False) if p.requires_grad]
        self.own = [getattr(module, name) for module, name in self.places]
        sizes = [p.numel() for p in self.own]
        self.wide, self.gradient = (torch.zeros(sum(sizes), device=parameters[0].device) for _ in range(2))
        self.narrow = self.wide.to(dtype)
        self.tensors: dict[int, Tensor] = {id(p): p for p in parameters}
        self.gradients = {id(p): self.gradient[:0] for p in parameters}
        for narrow, gradient, p in zip(self.narrow.split(sizes), self.gradient.split(sizes), self.own, strict=True):
            self.tensors[id(p)] = narrow.view_as(p).detach().requires_grad_()
            self.gradients[id(p)] = gradient.view_as(p)
        self.others = [p for p in parameters if self.tensors[id(p)] is p]
        self.gradients |= {id(p): torch.zeros_like(p) for p in self.others}

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the parameters as they are now."""
        if self.places:
            torch.cat([p.flatten() for p in self.own], out=self.wide)
            self.narrow.copy_(self.wide)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the layers use the cast tensors."""
        for module, name in self.places:
            module._parameters[name] = self.tensors[id(module._parameters[name])]  # type: ignore[assignment]
        try:
            yield
        finally:
            for (module, name), parameter in zip(self.places, self.own, strict=True):
                module._parameters[name] = parameter

    def take(self, found: dict[int, Tensor | None]) -> None:
        """Copies gradients to their place; those of linear layers that are not used are 0."""
        if self.places:
            parts = [found[id(p)] for p in self.own]
            pairs = zip(parts, self.own, strict=True)
            flat = [torch.zeros_like(p, dtype=self.narrow.dtype) if part is None else part for part, p in pairs]
            self.gradient.copy_(torch.cat([part.flatten() for part in flat]))
        places, gradients = [], []  # those that one kernel can copy, which other strides than its own prevent
        for p in self.others:
            place, gradient = self.gradients[id(p)], found[id(p)]
            if gradient is not None and place.is_contiguous() and gradient.is_contiguous():
                places.append(place.view(-1))
                gradients.append(gradient.view(-1))
            elif gradient is not None:
                place.copy_(gradient)
        if places:
            torch._foreach_copy_(places, gradients)


class _Graph:
    """The graphs for one shape. Gradients end in one place, that of the owner's weights of this precision."""

    def __init__(self, owner: Graphs, arguments: tuple[Any, ...], dtype: torch.dtype | None) -> None:
        self.owner = owner
        own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]
        self.inputs = [x for x in own if isinstance(x, Tensor)]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        owner.pool = owner.pool or torch.cuda.graph_pool_handle()
        if dtype not in owner.weights:
            cast_to = dtype if owner.cast_together else None
            owner.weights[dtype] = _Weights(owner.modules, owner.parameters, cast_to)
        self.weights = owner.weights[dtype]

        def run() -> Outputs:
            self.weights.refresh()
            # Other casts of weights must be inside the graph as well, not kept from before it.
            autocast = torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)
            with autocast, self.weights.in_use():
                return owner.function(*own)

        self._warm_up(run)
        mode = {"pool": owner.pool, "capture_error_mode": "thread_local"}  # loaders pin memory in other threads
        with torch.cuda.graph(self.forward, **mode):
            outputs = run()
        self._make_gradients(outputs)
        with torch.cuda.graph(self.backward, **mode):
            self._differentiate(outputs)
        self.outputs = [x.detach() for x in outputs]  # and let go of what the backward pass needed, for the next graph

    def _make_gradients(self, outputs: Outputs) -> None:
        """The places of the gradients of the outputs, None of those that have none."""
        self.output_gradients = [torch.zeros_like(x) if x.requires_grad else None for x in outputs]

    def _differentiate(self, outputs: Outputs) -> None:
        tensors = self.weights.tensors
        wanted = [x for x in self.inputs if x.requires_grad]
        pairs = [(x, g) for x, g in zip(outputs, self.output_gradients, strict=True) if g is not None]
        results, gradients = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, [*wanted, *tensors.values()], gradients, allow_unused=True)
        of_inputs, of_weights = iter(found[: len(wanted)]), found[len(wanted) :]
        self.input_gradients = [next(of_inputs) if x.requires_grad else None for x in self.inputs]
        self.used = [gradient is not None for gradient in of_weights]
        self.weights.take(dict(zip(tensors, of_weights, strict=True)))

    def _warm_up(self, run: Callable[[], Outputs]) -> None:
        """An eager pass, in which kernels are compiled and libraries choose their algorithms.

        Leaves random numbers and buffers, of whitening and batch norm, as they were.
        """
        random_state = torch.cuda.get_rng_state()
        buffers = [(buffer, buffer.clone()) for buffer in self.owner.modules.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = run()
            self._make_gradients(outputs)
            self._differentiate(outputs)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in buffers:
            buffer.copy_(value)
        torch.cuda.set_rng_state(random_state)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> Outputs:
        ctx.graph = graph
        with torch.no_grad():
            for place, x in zip(graph.inputs, tensors, strict=False):  # the parameters follow
                place.copy_(x)
        graph.forward.replay()
        return tuple(x.detach() for x in graph.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        for place, gradient in zip(graph.output_gradients, grads, strict=True):
            if place is not None:
                place.copy_(gradient)
        graph.backward.replay()
        pairs = zip(graph.weights.gradients.values(), graph.used, strict=True)
        of_weights = (gradient.detach() if used else None for gradient, used in pairs)
        return None, *(None if x is None else x.detach() for x in graph.input_gradients), *of_weights
