"""Compares an exported file with the model from which it was made."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssm_asr.exporting.parts import Part

TOLERANCE = 1e-4  # the largest `difference` allowed of a file in float32
ROUNDING_ERRORS = 4.0  # where a model's own rounding error is large, a difference of so many of them is allowed too
BATCH_SIZES = (1, 3)
CHUNKS = 4


def difference(expected: Tensor, actual: Tensor, is_state: bool = False) -> float:
    """Returns the largest difference between two tensors: absolute for values up to 1, relative for larger values.

    The differences of a state are relative to its largest value. In a recurrence large numbers cancel out, so that its
    small numbers have the rounding errors of large ones. Errors that matter show in the outputs of later chunks.

    Args:
        expected: what the model computed.
        actual: what the file computed.
        is_state: whether the tensors are a streaming state.

    Raises:
        ValueError: if the shapes differ.
    """
    if expected.shape != actual.shape:
        raise ValueError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    expected, actual = expected.double(), actual.double()
    size = expected.abs().max() if is_state else expected.abs()
    return float(((actual - expected).abs() / size.clamp(min=1.0)).max())


def listed(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the outputs of a module as a sequence, even if there is only one."""
    return [outputs] if isinstance(outputs, Tensor) else outputs


@torch.inference_mode()
def worst_difference(part: Part, run: Callable[..., Tensor | Sequence[Tensor]]) -> float:
    """Returns the largest `difference` of any output, new states included, over CHUNKS chunks and all BATCH_SIZES.

    Model and file get equal random inputs, which do not change from call to call. Each carries its own states from
    chunk to chunk.

    Args:
        part: the part of the model that was exported.
        run: calls the file: it takes the arguments of the part's module and returns the outputs in the same order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _worst_difference(part, run)


def rounding_error(part: Part) -> float:
    """Returns the largest difference between the model in float32 and the model in float64.

    It is large where large numbers in the model cancel out. No file can be expected to be nearer to the model.
    """
    module = copy.deepcopy(part.module).double()
    return worst_difference(part, lambda *inputs: module(*(x.double() if x.is_floating_point() else x for x in inputs)))


def _worst_difference(part: Part, run: Callable[..., Tensor | Sequence[Tensor]]) -> float:
    differences = []
    for size in BATCH_SIZES:
        inputs = part.draw(size)
        mine: Sequence[Tensor] = inputs[len(inputs) - part.states :]
        theirs = mine
        for _ in range(CHUNKS):
            fresh = part.draw(size)[: len(inputs) - part.states]
            expected, actual = listed(part.module(*fresh, *mine)), listed(run(*fresh, *theirs))
            outputs = len(expected) - part.states
            differences += [
                difference(*pair, is_state=number >= outputs)
                for number, pair in enumerate(zip(expected, actual, strict=True))
            ]
            mine, theirs = expected[outputs:], actual[outputs:]
    return float(torch.tensor(differences).max())  # unlike Python's max, NaN if there is one
