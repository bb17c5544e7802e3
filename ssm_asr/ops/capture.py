"""CUDA graphs: how launches become a graph, and functions without gradients that replay graphs.

On a fast GPU the many small kernels of a pass take less time than the host needs to launch them one by one. A CUDA
graph launches all of them at once.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Returns the stream of all captures and warm-ups; memory that was used on one stream is not used on another."""
    return torch.cuda.Stream()


@contextmanager
def on_side_stream() -> Iterator[None]:
    """Returns a context whose launches go to `side_stream`, after those before it and before those after it."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Returns a context whose launches become a graph.

    Unlike in `torch.cuda.graph`, Python's collector does not run and no memory is given back before each capture.
    """
    with on_side_stream():
        # In the stricter modes nothing can be loaded during a capture.
        graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        try:
            yield
        finally:
            graph.capture_end()


def signature(argument: Any) -> Any:
    """Returns what a graph depends on: a constant's value, or a tensor's shape, type and need of a gradient."""
    return (argument.shape, argument.dtype, argument.requires_grad) if isinstance(argument, Tensor) else argument


def lower_precision() -> torch.dtype | None:
    """Returns the type that autocast computes in on a GPU, or None where it is off."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def autocast_in_graph(dtype: torch.dtype | None) -> torch.autocast:
    """Returns a context of autocast for a capture: weights are cast inside the graph, and do not come from a cache."""
    return torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)


class Captured:
    """A function that is called in place of another one, and replays a graph for each set of argument shapes on a GPU.

    Gradients are not followed. On a CPU it calls the function. On a GPU it does, too, when arguments of given shapes
    come for the first time, because many shapes come only once; then libraries choose their algorithms as well.

    Args:
        function: maps tensors and constants to a tuple of tensors. It must not wait for the device.
        most_graphs: number of graphs to keep, those that were used last. They share their memory except for inputs and
            outputs.
    """

    def __init__(self, function: Callable[..., Outputs], most_graphs: int = 16) -> None:
        self._function, self._most_graphs = function, most_graphs
        self._seen: set[Any] = set()
        self._graphs: dict[Any, _Graph] = {}  # in the order of their last use
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Outputs:
        """Returns what the function returns."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if not (tensors and tensors[0].is_cuda):
            return self._function(*arguments)
        key = (lower_precision(), *map(signature, arguments))
        if key not in self._seen:
            self._seen.add(key)
            return self._function(*arguments)
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            if len(self._graphs) >= self._most_graphs:
                del self._graphs[next(iter(self._graphs))]
            graph = _Graph(self._function, arguments, self._pool)
        self._graphs[key] = graph
        return graph.replay(tensors)


class _Graph:
    """The captured graph for one set of shapes, with the memory of its inputs and outputs."""

    def __init__(self, function: Callable[..., Outputs], arguments: tuple[Any, ...], pool: Any) -> None:
        static = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        self._inputs = [x for x in static if isinstance(x, Tensor)]
        self._graph = torch.cuda.CUDAGraph()
        dtype = lower_precision()
        with capturing(self._graph, pool), autocast_in_graph(dtype):
            self._outputs = function(*static)

    def replay(self, tensors: list[Tensor]) -> Outputs:
        """Copies the inputs in, launches the graph and copies the outputs out, which the next replay overwrites."""
        copy_all(self._inputs, tensors)
        self._graph.replay()
        outputs = tuple(torch.empty_like(x) for x in self._outputs)
        copy_all(list(outputs), list(self._outputs))
        return outputs


def copy_all(places: list[Tensor], tensors: list[Tensor]) -> None:
    """Copies each tensor to its place, with few kernels."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for place, x in zip(places, tensors, strict=True):
        by_type[place.dtype][0].append(place)
        by_type[place.dtype][1].append(x)
    for those, sources in by_type.values():
        torch._foreach_copy_(those, sources)
