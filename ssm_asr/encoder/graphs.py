"""CUDA graphs of the encoder's forward and backward pass in training.

On a fast GPU the encoder's thousands of small kernels take less time than the host needs to launch them. A graph
launches all at once. It is captured once for every shape of batch, chunk and left context; what else differs from
batch to batch reaches it as numbers on the device (ssm_asr.encoder.schedule.Draws). Under autocast all weights are cast
at once where it begins, and all gradients where it ends, instead of each by a kernel of its own.

Shapes: B batch, T feature frames, F mels, S output frames, D encoder width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr.encoder.schedule import Draws

Encode = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
WARM_UPS = 2  # eager passes before a capture, in which libraries choose their algorithms


class EncoderGraphs:
    """Stands in for `encode` of a model; passes that are not for training on a GPU go to `encode` itself.

    So does the first batch of a shape: one that comes only once is not worth a capture. A gradient that it leaves at a
    parameter is overwritten by its next backward pass: set gradients to None between.

    Args:
        encode: features (B, T, F), lengths, chunk and left context -> (B, S, D) and lengths.
        modules: those that `encode` uses; their decisions are drawn at every call from now on.
        most: graphs to keep, which share their memory but for input and output; further shapes run without.
    """

    def __init__(self, encode: Encode, modules: Iterable[nn.Module], most: int = 256) -> None:
        self.encode, self.most = encode, most
        self.modules = nn.ModuleList(modules)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.draws = Draws(self.modules, self.parameters[0].device)
        self.graphs: dict[Any, _Graph | None] = {}
        self.pool: Any = None
        self.weights: dict[torch.dtype | None, _Weights] = {}

    def __call__(
        self, features_BTF: Tensor, lens_B: Tensor, chunk: int = -1, left_context: int = -1
    ) -> tuple[Tensor, Tensor]:
        """As `encode`."""
        training = self.modules[0].training and torch.is_grad_enabled()
        if training:
            self.draws.renew()
        if not training or not features_BTF.is_cuda:
            return self.encode(features_BTF, lens_B, chunk, left_context)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (features_BTF.shape, chunk, left_context, dtype)
        if key not in self.graphs:
            if len(self.graphs) < self.most:
                self.graphs[key] = None
            return self.encode(features_BTF, lens_B, chunk, left_context)
        graph = self.graphs[key] or _Graph(self, features_BTF, lens_B, chunk, left_context, dtype)
        self.graphs[key] = graph
        out_BSD, lens_B = _Replay.apply(graph, features_BTF, lens_B, *self.parameters)
        return out_BSD, lens_B


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
        others = [(self.gradients[id(p)], found[id(p)]) for p in self.others]
        targets, gradients = zip(*((target, g) for target, g in others if g is not None), strict=True)
        torch._foreach_copy_(targets, gradients)


class _Graph:
    """The graphs for one shape. Gradients end in one place, that of the owner's weights of this precision."""

    def __init__(
        self,
        owner: EncoderGraphs,
        features_BTF: Tensor,
        lens_B: Tensor,
        chunk: int,
        left_context: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.owner, self.features_BTF, self.lens_B = owner, features_BTF.clone(), lens_B.clone()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        owner.pool = owner.pool or torch.cuda.graph_pool_handle()
        if dtype not in owner.weights:
            owner.weights[dtype] = _Weights(owner.modules, owner.parameters, dtype)
        self.weights = owner.weights[dtype]

        def encode() -> tuple[Tensor, Tensor]:
            self.weights.refresh()
            # Other casts of weights must be inside the graph as well, not kept from before it.
            autocast = torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)
            with autocast, self.weights.in_use():
                return owner.encode(self.features_BTF, self.lens_B, chunk, left_context)

        self._warm_up(encode)
        mode = {"pool": owner.pool, "capture_error_mode": "thread_local"}  # loaders pin memory in other threads
        with torch.cuda.graph(self.forward, **mode):
            out_BSD, self.out_lens_B = encode()
        self.grad_BSD = torch.zeros_like(out_BSD)
        with torch.cuda.graph(self.backward, **mode):
            self._differentiate(out_BSD)
        self.out_BSD = out_BSD.detach()  # and let go of what the backward pass needed, for the next graph to use

    def _differentiate(self, out_BSD: Tensor) -> None:
        tensors = self.weights.tensors
        found = torch.autograd.grad(out_BSD, list(tensors.values()), self.grad_BSD, allow_unused=True)
        self.used = [gradient is not None for gradient in found]
        self.weights.take(dict(zip(tensors, found, strict=True)))

    def _warm_up(self, encode: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Leaves random numbers and buffers, of whitening and batch norm, as they were."""
        random_state = torch.cuda.get_rng_state()
        buffers = [(buffer, buffer.clone()) for buffer in self.owner.modules.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                out_BSD, _ = encode()
                self.grad_BSD = torch.zeros_like(out_BSD)
                self._differentiate(out_BSD)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in buffers:
            buffer.copy_(value)
        torch.cuda.set_rng_state(random_state)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, features_BTF: Tensor, lens_B: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        ctx.graph = graph
        graph.features_BTF.copy_(features_BTF)
        graph.lens_B.copy_(lens_B)
        graph.forward.replay()
        return graph.out_BSD.detach(), graph.out_lens_B.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        graph.grad_BSD.copy_(grads[0])
        graph.backward.replay()
        pairs = zip(graph.weights.gradients.values(), graph.used, strict=True)
        return None, None, None, *(gradient.detach() if used else None for gradient, used in pairs)
