"""Does an exported file compute what the model computes?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssm_asr.exporting.parts import Part

TOLERANCE = 1e-4
BATCH_SIZES = (1, 3)
CHUNKS = 4


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest absolute difference, of values above 1 relative to the value.

    Raises:
        ValueError: if the shapes differ.
    """
    if expected.shape != actual.shape:
        raise ValueError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    expected, actual = expected.double(), actual.double()
    return float(((actual - expected).abs() / expected.abs().clamp(min=1.0)).max())


def listed(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Outputs as a sequence, be it of one."""
    return [outputs] if isinstance(outputs, Tensor) else outputs


@torch.inference_mode()
def worst_difference(part: Part, run: Callable[..., Tensor | Sequence[Tensor]]) -> float:
    """The worst `difference` of any output, new states included, over several chunks and batch sizes.

    Both sides get the same random inputs, and carry their own states from chunk to chunk.

    Args:
        run: takes the tensors that the part's module takes, and returns what it returns.
    """
    differences = []
    for size in BATCH_SIZES:
        inputs = part.draw(size)
        mine: Sequence[Tensor] = inputs[len(inputs) - part.states :]
        theirs = mine
        for _ in range(CHUNKS):
            fresh = part.draw(size)[: len(inputs) - part.states]
            expected, actual = listed(part.module(*fresh, *mine)), listed(run(*fresh, *theirs))
            differences += [difference(*pair) for pair in zip(expected, actual, strict=True)]
            mine, theirs = expected[len(expected) - part.states :], actual[len(actual) - part.states :]
    return float(torch.tensor(differences).max())  # NaN if there is one
