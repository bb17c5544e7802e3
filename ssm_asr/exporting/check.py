"""Does an exported file compute what the model computes?"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssm_asr.exporting.parts import Part

TOLERANCE = 1e-4
ROUNDING_ERRORS = 4.0  # of the model's own: more of them are allowed than TOLERANCE
BATCH_SIZES = (1, 3)
CHUNKS = 4


def difference(expected: Tensor, actual: Tensor, is_state: bool = False) -> float:
    """The largest absolute difference, of values above 1 relative to the value; of states to the largest of all.

    In the state of a recurrence large numbers cancel out, and leave rounding errors of their size to small ones. What
    matters of these shows in the outputs of later chunks.

    Raises:
        ValueError: if the shapes differ.
    """
    if expected.shape != actual.shape:
        raise ValueError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    expected, actual = expected.double(), actual.double()
    size = expected.abs().max() if is_state else expected.abs()
    return float(((actual - expected).abs() / size.clamp(min=1.0)).max())


def listed(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Outputs as a sequence, be it of one."""
    return [outputs] if isinstance(outputs, Tensor) else outputs


@torch.inference_mode()
def worst_difference(part: Part, run: Callable[..., Tensor | Sequence[Tensor]]) -> float:
    """The worst `difference` of any output, new states included, over several chunks and batch sizes.

    Both sides get the same random inputs, the same at every call, and carry their own states from chunk to chunk.

    Args:
        run: takes the tensors that the part's module takes, and returns what it returns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _worst_difference(part, run)


def rounding_error(part: Part) -> float:
    """The worst difference between the model in float32 and in float64.

    Where it is large, numbers in the model cancel out, and a file can be no nearer to the model than that.
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
    return float(torch.tensor(differences).max())  # NaN if there is one
