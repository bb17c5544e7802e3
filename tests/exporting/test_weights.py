"""The PyPI package with icefall's Zipformer loads all exported weights, and computes what the model computes."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import toy
from peer_zipformer import peer_encode, peer_model_by_options, peer_stream

from ssm_asr.checkpoint import load_model
from ssm_asr.cli import export, import_icefall
from ssm_asr.config import from_dict, load_experiment
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.exporting.weights import export_weights, icefall_options

TOLERANCE = {"atol": 1e-4, "rtol": 0}
PUBLISHED = {"embed_channels": [8, 32, 128]}


def model_section(**encoder: object) -> dict:
    return {"encoder": {**toy.EXPERIMENT["model"]["encoder"], **encoder}}


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_the_peer_computes_the_same(causal: bool, tmp_path: Path) -> None:
    section = model_section(**PUBLISHED, causal=causal, value_head_dim=6, pos_dim=20)
    loaded = toy.write_checkpoint(tmp_path / "model.pt", model=section)
    export_weights(loaded, tmp_path)
    options = icefall_options(loaded.experiment.model)
    peer = peer_model_by_options(options, loaded.tokenizer.vocab_size)
    peer.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    model = loaded.model
    features_BTF, lens_B = 3 * torch.randn(2, 2 * 160 + 13, 80) - 5, torch.tensor([333, 250])
    for chunk, left in [(-1, -1), (16, 64), (32, 64)] if causal else [(-1, -1)]:
        out = model.encode(features_BTF, lens_B, chunk, left)[0]
        torch.testing.assert_close(peer_encode(peer, features_BTF, lens_B, chunk, left), out, **TOLERANCE)
    torch.testing.assert_close(peer.ctc_output(out), model.ctc_output(out), **TOLERANCE)
    decoder_out = model.decoder(torch.tensor([[-1, 0], [3, 4]]), pad=False)
    torch.testing.assert_close(peer.decoder(torch.tensor([[-1, 0], [3, 4]]), need_pad=False), decoder_out)
    joined = model.joiner(out[:, :3], decoder_out)
    torch.testing.assert_close(peer.joiner(out[:, :3], decoder_out), joined, **TOLERANCE)
    if causal:
        chunks = features_BTF.unfold(1, 2 * 16 + 13, 2 * 16).transpose(2, 3).unbind(dim=1)
        state, outputs = model.init_state(2, 64), []
        for chunk_BTF in chunks:
            out_BSD, state = model.stream(chunk_BTF, state)
            outputs.append(out_BSD)
        torch.testing.assert_close(peer_stream(peer, chunks, 16, 64), torch.cat(outputs, dim=1), **TOLERANCE)


def test_files_and_the_way_back(tmp_path: Path) -> None:
    loaded = toy.write_checkpoint(tmp_path / "model.pt")
    out = tmp_path / "out"
    assert export.main(["--checkpoint", str(tmp_path / "model.pt"), "--format", "weights", "--out", str(out)]) == 0
    files = {"model.safetensors", "config.yaml", "tokens.txt", "word.model", "README.md"}
    assert {path.name for path in out.iterdir()} == files
    assert load_experiment(out / "config.yaml") == loaded.experiment
    assert Tokenizer.load(out).symbols == loaded.tokenizer.symbols
    arguments = ["--in", str(out / "model.safetensors"), "--tokens", str(out), "--out", str(tmp_path / "back")]
    assert import_icefall.main(arguments) == 0
    back = load_model(tmp_path / "back" / "model.pt")
    assert toy.differing(dict(back.model.state_dict()), dict(loaded.model.state_dict())) == []


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"kind": "conformer"}, "icefall has no such encoder"),
        (model_section(**PUBLISHED, long_range="none")["encoder"], "icefall has no such encoder"),
        (model_section()["encoder"], r"icefall's front end has \(8, 32, 128\) channels"),
    ],
)
def test_models_that_icefall_does_not_have(encoder: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icefall_options(from_dict({"model": {"encoder": encoder}}).model)
