"""A toy model that recognises two recordings, made in half a second.

Its encoder is random. Only the last layer of its joiner is trained, a convex problem: to emit each word in the output
frame in which the middle of its tone lies.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
import toy

from ssm_asr import checkpoint
from ssm_asr.data.features import OnlineFbank
from ssm_asr.search.encoding import encode_as_streamed

TEXTS = {"a": "LOW HIGH MID", "b": "MID LOW HIGH LOW"}
CHUNKS = (8, 16, 64, -1)  # what it is trained for, in frames of 20 ms


def recording(name: str) -> np.ndarray:
    """samples_S of a text, with 0.2 s of silence before it and 0.5 s after it."""
    quiet_S = 0.003 * np.random.default_rng(len(TEXTS[name])).standard_normal(11200).astype(np.float32)
    return np.concatenate([quiet_S[:3200], toy.tones(TEXTS[name]), quiet_S[3200:]])


def emission_frames(name: str) -> list[int]:
    """The output frame in which the middle of each tone lies. Tones last 0.25 s; the first starts at 0.3 s."""
    return [int((0.3 + 0.35 * k + 0.125) / 0.04) for k in range(len(TEXTS[name].split()))]


def write_checkpoint(path: Path) -> None:
    """Writes the model into a checkpoint; its chunk is 320 ms and its left context 1.28 s."""
    loaded = toy.write_checkpoint(path, model={"joiner_dim": 256})
    model, tokenizer = loaded.model, loaded.tokenizer
    encoder_out, contexts, labels = [], [], []
    for (name, text), chunk in itertools.product(TEXTS.items(), CHUNKS):
        fbank = OnlineFbank()
        features_TF = torch.cat([fbank.push(recording(name)), fbank.finish()])
        lens_B, left = torch.tensor([len(features_TF)]), 64 if chunk > 0 else -1
        with torch.no_grad():
            out_BSD, (count,) = encode_as_streamed(model, features_TF[None], lens_B, chunk, left)
        encoder_out.append(out_BSD[0, :count])
        emitted = dict(zip(emission_frames(name), tokenizer.encode(text), strict=True))
        for t in range(count):
            contexts.append([-1, 0, *(token for frame, token in emitted.items() if frame < t)][-2:])
            labels.append(emitted.get(t, tokenizer.blank_id))
    joiner, labels_S = model.joiner, torch.tensor(labels)
    with torch.no_grad():
        joiner.decoder_proj.weight.normal_()  # so that the words before count as much as the sound
        decoder_SJ = joiner.decoder_proj(model.decoder(torch.tensor(contexts), pad=False)[:, 0])
        hidden_SJ = torch.tanh(joiner.encoder_proj(torch.cat(encoder_out)) + decoder_SJ)
    optimizer = torch.optim.LBFGS(joiner.output_linear.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(joiner.output_linear(hidden_SJ), labels_S)
        value.backward()
        return value

    optimizer.step(loss)
    checkpoint.save(checkpoint.pack(loaded.experiment, tokenizer, model.state_dict(), {"batch": 0}), path)
