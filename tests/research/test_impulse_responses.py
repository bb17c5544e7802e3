"""The analysis of trained kernels writes tables and figures, and a fit changes nothing in a model but its kernels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from research import impulse_responses
from ssm_asr import checkpoint

CONFORMER = {
    **{"kind": "conformer", "layers": 2, "dim": 32, "heads": 2, "feedforward_dim": 32, "embed_dim": 32},
    **{"embed_channels": [4, 4, 8], "chunk_frames": [16], "left_context_frames": [64]},
}


def write_model(path: Path, **encoder: Any) -> checkpoint.Loaded:
    return toy.write_checkpoint(path, model={"encoder": CONFORMER | encoder}, train={"seed": 1})


@pytest.mark.parametrize(
    ("settings", "poles", "bound"),
    [
        ({"mixer": "dir", "ssm_states": 4}, 4, 3),
        ({"mixer": "com", "conv_kernel": 4, "ssm_states": 4, "ssm_param": "lin"}, 2, None),
        ({"mixer": "rep", "ssm_states": 1}, 1, 0),
    ],
    ids=["dir", "com", "rep"],
)
def test_state_space_models(tmp_path: Path, settings: dict, poles: int, bound: int | None) -> None:
    loaded = write_model(tmp_path / "model.pt", **settings)
    assert impulse_responses.main(["--checkpoint", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out")]) == 0
    layers = json.loads((tmp_path / "out" / "kernels.json").read_text())["layers"]
    assert len(layers) == 2
    for layer in layers:
        shapes = [len(layer[name]) for name in ("hankel_singular_values", "effective_rank", "sign_changes")]
        assert shapes == [32, 32, 32] and len(layer["hankel_singular_values"][0]) == settings["ssm_states"]
        assert layer["most_sign_changes"] == bound and (bound is None or max(layer["sign_changes"]) <= bound)
        # The model is as its seed makes it, since it was not trained.
        assert layer["time_constants_before_ms"] == layer["time_constants_after_ms"]
    ssm = loaded.model.encoder.layers[1].conv_module.mixer.ssm
    first_ms = 40 / (float((ssm.A_log[0, 0] + ssm.log_dt[0]).detach().exp()))
    assert layers[1]["time_constants_after_ms"][0][0] == pytest.approx(first_ms, rel=1e-5)
    assert len(layers[1]["time_constants_after_ms"][0]) == poles
    text = (tmp_path / "out" / "kernels.md").read_text()
    assert ("as it must be" in text) == (bound is not None)
    for name in ("kernels", "hankel", "time_constants"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000 and (tmp_path / "out" / f"{name}.svg").exists()


def test_before_can_be_a_checkpoint(tmp_path: Path) -> None:
    loaded = write_model(tmp_path / "model.pt", mixer="dir")
    with torch.no_grad():
        for layer in loaded.model.encoder.layers:
            layer.conv_module.mixer.ssm.log_dt.add_(torch.tensor(2.0).log())
    packed = checkpoint.load(tmp_path / "model.pt") | {"model": loaded.model.state_dict()}
    checkpoint.save(packed, tmp_path / "before.pt")
    arguments = ["--checkpoint", str(tmp_path / "model.pt"), "--before", str(tmp_path / "before.pt")]
    assert impulse_responses.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    layer = json.loads((tmp_path / "out" / "kernels.json").read_text())["layers"][0]
    before_ms, after_ms = (torch.tensor(layer[f"time_constants_{when}_ms"]) for when in ("before", "after"))
    torch.testing.assert_close(2 * before_ms, after_ms)


def test_convolutions_and_their_fits(tmp_path: Path) -> None:
    """The convolutions are such that one pole can make them, so models with the fits give equal outputs and words."""
    loaded = write_model(tmp_path / "first.pt", mixer="conv", conv_kernel=16)
    with torch.no_grad():
        for layer in loaded.model.encoder.layers:
            pole_D1 = torch.linspace(0.1, 0.5, 32)[:, None]
            layer.conv_module.mixer.weight_DL.copy_(torch.randn(32, 1) * pole_D1 ** torch.arange(16))
            layer.conv_module.mixer.weight_DL[:, 0] += torch.randn(32)
    packed = checkpoint.load(tmp_path / "first.pt") | {"model": loaded.model.state_dict()}
    checkpoint.save(packed, tmp_path / "model.pt")
    cuts = toy.write_cuts(tmp_path, "test", 3)
    out = tmp_path / "out"
    assert (
        impulse_responses.main(["--checkpoint", str(tmp_path / "model.pt"), "--cuts", str(cuts), "--out", str(out)])
        == 0
    )
    tree = json.loads((out / "kernels.json").read_text())
    assert [fit["states"] for fit in tree["fits"]] == [1, 2, 4, 8]
    features, lens = torch.randn(2, 200, 80), torch.tensor([200, 120])
    for fit in tree["fits"]:
        assert max(max(errors) for errors in fit["relative_errors"]) < 0.01
        assert fit["decoding"]["errors"] == tree["decoding"]["errors"]
        model = checkpoint.load_model(out / f"fit-{fit['states']}.pt")
        encoder = model.experiment.model.encoder
        assert (encoder.mixer, encoder.ssm_states, encoder.ssm_param) == ("dir", fit["states"], "real")
        with torch.no_grad():
            one, other = (m.encode(features, lens, 16, 64)[0] for m in (model.model, loaded.model))
        torch.testing.assert_close(one, other, atol=0.02, rtol=0)
    text = (out / "kernels.md").read_text()
    assert text.count("| real poles, N = ") == 4 and "–" in text
    assert (out / "fits.svg").exists() and not (out / "time_constants.svg").exists()


def test_what_has_no_kernels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.write_checkpoint(tmp_path / "zipformer.pt")
    write_model(tmp_path / "none.pt", mixer="none")
    for name in ("zipformer.pt", "none.pt"):
        assert impulse_responses.main(["--checkpoint", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert f"{name}: has no kernels of S4D or convolutions; give a Conformer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
