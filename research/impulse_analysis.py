"""Analyses the impulse responses of a Conformer's mixers, and fits convolutions by real poles.

Shapes: D channels, L lags, M poles (both of a pair count), N states of a fit.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssm_asr import checkpoint, units
from ssm_asr.encoder.conformer import ConformerConfig, ConvolutionModule
from ssm_asr.encoder.mixer import ConvMixer, DropInMixer, Mixer
from ssm_asr.evaluation.offline import decode_cuts
from ssm_asr.evaluation.results import write_results
from ssm_asr.evaluation.test_sets import cuts_name, marked_texts, read_test_cuts, scoring_unit
from ssm_asr.search.offline import OfflineRecognizer
from ssm_asr.ssm.analysis import (
    Array,
    effective_rank,
    fit_real_poles,
    hankel_of_modes,
    hankel_of_taps,
    modes,
    set_modes,
    sign_changes,
)
from ssm_asr.ssm.s4d import S4D
from ssm_asr.transducer.model import Transducer

HORIZON_FRAMES = 1024  # sign changes are counted, and fits compared, over this many lags
RESPONSE_FRAMES = 24  # figures show this many lags
BATCH_S = 200.0  # seconds of audio that are decoded at a time


@dataclass
class Layer:
    """Holds the analysis of one layer.

    Attributes:
        number: which layer it is, from 1.
        response_DL: the impulse response of the whole mixer.
        singular_values_DM: its Hankel singular values.
        sign_changes_D: how often the sign of the kernel changes.
        most_sign_changes: how often it can change; None if there is no bound.
        before_DM_ms, after_DM_ms: the time constants of the poles before and after training, a pair counted once; None
            for a convolution.
    """

    number: int
    response_DL: Array
    singular_values_DM: Array
    sign_changes_D: Array
    most_sign_changes: int | None
    before_DM_ms: Array | None
    after_DM_ms: Array | None

    @property
    def effective_rank_D(self) -> Array:
        """Is how many states matter, as a real number from 1."""
        return effective_rank(self.singular_values_DM)


@dataclass
class Fit:
    """Holds the fits of all convolutions by N real poles.

    Attributes:
        states: N.
        errors: for each layer, the relative errors (D,) of the channels' kernels.
        model: the checkpoint in which the fits replace the convolutions.
        summary: the summary of decoding with it, if it was decoded.
    """

    states: int
    errors: list[Array]
    model: Path
    summary: dict[str, Any] | None = None


def mixers_of(model: Transducer, path: Path) -> list[Mixer]:
    """Returns the mixers of all layers.

    Raises:
        ValueError: if the model has no mixers to analyse.
    """
    encoder = model.config.encoder
    if not isinstance(encoder, ConformerConfig) or encoder.mixer == "none":
        raise ValueError(f"{path}: has no kernels of S4D or convolutions; give a Conformer whose mixer is not none")
    return [module.mixer for module in model.encoder.modules() if isinstance(module, ConvolutionModule)]


def time_constants_ms(ssm: S4D) -> Array:
    """Returns after how long each mode has fallen to 1/e, (D, M), a pair counted once."""
    with torch.no_grad():
        return (units.OUTPUT_FRAME_MS / (ssm.A_log.exp() * ssm.log_dt.exp()[:, None])).numpy()


def analyse(mixer: Mixer, before: Mixer, number: int) -> Layer:
    """Analyses the mixer of one layer; `before` is the mixer before training."""
    ssm, ssm_before = getattr(mixer, "ssm", None), getattr(before, "ssm", None)
    with torch.no_grad():
        if isinstance(mixer, ConvMixer):
            taps_DL = mixer.taps().numpy()
            return Layer(number, taps_DL, hankel_of_taps(taps_DL), sign_changes(taps_DL), None, None, None)
        assert isinstance(ssm, S4D) and isinstance(ssm_before, S4D)
        impulse = torch.zeros(1, ssm.channels, RESPONSE_FRAMES)
        impulse[..., 0] = 1
        response_DL = mixer(impulse)[0].numpy()
    poles_DM, weights_DM = modes(ssm)
    powers_DML = np.exp(np.log(poles_DM)[..., None] * np.arange(HORIZON_FRAMES))
    kernel_DL = (weights_DM[..., None] * powers_DML).sum(axis=1).real
    scale_DL = np.abs(weights_DM[..., None] * powers_DML).sum(axis=1)
    return Layer(
        number,
        response_DL,
        hankel_of_modes(poles_DM, weights_DM),
        sign_changes(kernel_DL, scale_DL),
        None if ssm.pairs else ssm.states - 1,
        time_constants_ms(ssm_before),
        time_constants_ms(ssm),
    )


def fit_model(loaded: checkpoint.Loaded, path: Path, states: int, out: Path) -> Fit:
    """Fits all convolutions by N = `states` real poles, and writes the model with the fits in their place to `out`."""
    config = loaded.experiment.model
    assert isinstance(config.encoder, ConformerConfig)
    encoder = replace(config.encoder, mixer="dir", ssm_states=states, ssm_param="real")
    experiment = replace(loaded.experiment, model=replace(config, encoder=encoder))
    model = Transducer(experiment.model, loaded.tokenizer.vocab_size)
    kept = {name: value for name, value in loaded.model.state_dict().items() if ".mixer." not in name}
    model.load_state_dict(kept, strict=False)
    errors = []
    pairs = zip(mixers_of(loaded.model, path), mixers_of(model, path), strict=True)
    for conv, fitted in pairs:
        assert isinstance(conv, ConvMixer) and isinstance(fitted, DropInMixer)
        taps_DL = conv.taps().detach()
        poles_DN, weights_DN = fit_real_poles(taps_DL, states)
        set_modes(fitted.ssm, poles_DN, weights_DN, taps_DL[:, 0].double())
        with torch.no_grad():
            missed_DL = fitted.ssm.impulse_response(HORIZON_FRAMES)
            missed_DL[:, : taps_DL.shape[1]] -= taps_DL
        errors.append((missed_DL.norm(dim=1) / taps_DL.norm(dim=1)).numpy())
    checkpoint.save(checkpoint.pack(experiment, loaded.tokenizer, model.state_dict(), loaded.progress), out)
    return Fit(states, errors, out)


def decode(model: Path, cuts_file: Path, out: Path) -> dict[str, Any]:
    """Decodes cuts with the settings of a checkpoint, writes the results, and returns their summary.

    Raises:
        ValueError: if the cuts cannot be read or scored.
    """
    loaded = checkpoint.load_model(model)
    cuts = read_test_cuts(cuts_file)
    refs, hyps, facts = decode_cuts(OfflineRecognizer(loaded), cuts, BATCH_S)
    facts |= {"cuts": cuts_name(cuts_file), "checkpoint": str(model.resolve())}
    return write_results(out, refs, hyps, scoring_unit(loaded, None), facts, marked_texts(cuts))
