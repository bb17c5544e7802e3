"""Decides which utterances can be trained on, and reports those that cannot."""

from functools import partial

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import compute_num_frames

from ssm_asr.data.config import DataConfig
from ssm_asr.data.report import Report
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.units import FRAME_SHIFT_MS, SAMPLE_RATE_HZ, output_frames


def num_feature_frames(cut: Cut) -> int:
    """Returns the number of feature frames of a cut, whether its features are stored or not."""
    if cut.has_features:
        return cut.num_frames
    return compute_num_frames(cut.duration, FRAME_SHIFT_MS / 1000, SAMPLE_RATE_HZ)


def text_of(cut: Cut) -> str:
    """Returns the transcript of a cut: the texts of its supervisions in order of time, joined with spaces."""
    segments = sorted(cut.supervisions, key=lambda segment: segment.start)
    return " ".join(segment.text.strip() for segment in segments if segment.text)


def filter_cuts(cuts: CutSet, tokenizer: Tokenizer, config: DataConfig) -> tuple[CutSet, Report]:
    """Leaves out the utterances that cannot be trained on.

    An utterance is left out if it is too short or too long, if its transcript is empty or has a token outside the
    vocabulary, or if it has fewer output frames of the encoder than tokens, so that no alignment exists.

    Args:
        cuts: training cuts, eager or lazy; they are iterated once here.
        tokenizer: counts the tokens.
        config: has the limits of duration.

    Returns:
        The kept cuts (lazy if `cuts` is) and a report with an entry for each cut left out.

    Raises:
        ValueError: if nothing is left.
    """
    report = Report()
    dropped: set[str] = set()
    for cut in cuts:
        reason, detail = _objection(cut, tokenizer, config)
        if reason:
            report.leave_out(cut.id, reason, detail)
            dropped.add(cut.id)
        else:
            report.num_kept += 1
    if not report.num_kept:
        raise ValueError(f"no utterance left for training: {report.summary()}")
    return (cuts.filter(partial(_is_kept, dropped)) if dropped else cuts), report


def _is_kept(dropped: set[str], cut: Cut) -> bool:
    return cut.id not in dropped


def _objection(cut: Cut, tokenizer: Tokenizer, config: DataConfig) -> tuple[str, str]:
    """Returns why a cut cannot be trained on, as (reason, detail); ("", "") if it can."""
    if not config.min_utterance_s <= cut.duration <= config.max_utterance_s:
        side = "short" if cut.duration < config.min_utterance_s else "long"
        limits = f"{config.min_utterance_s:g} - {config.max_utterance_s:g} s"
        return f"too {side}", f"{cut.duration:.2f} s, allowed {limits}"
    text = text_of(cut)
    if not text:
        return "empty transcript", ""
    ids = tokenizer.encode(text)
    if tokenizer.unk_id in ids:
        return "token outside the vocabulary", text
    num_frames = output_frames(num_feature_frames(cut))
    if len(ids) > num_frames:
        return "fewer frames than tokens", f"{num_frames} output frames, {len(ids)} tokens"
    return "", ""
