"""Exported graphs compute what the model computes, and the checks find what is wrong with a graph."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import toy
from encoders import ENCODERS
from torch import Tensor

from ssm_asr import units
from ssm_asr.checkpoint import Loaded
from ssm_asr.encoder.state import leaves, stack_states
from ssm_asr.exporting import check, ctc, offline, onnx_files, parts, zipformer2
from ssm_asr.exporting.directory import ExportError, write_onnx_files
from ssm_asr.exporting.parts import Part
from ssm_asr.exporting.state import PackedState

CHUNK = 16


def make(tmp_path: Path, encoder: str) -> tuple[Loaded, int]:
    """Makes a toy model with this encoder, and returns it with its left context."""
    settings, left_context = ENCODERS[encoder]
    return toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": settings}), left_context


@pytest.fixture(scope="module")
def zipformer(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return make(tmp_path_factory.mktemp("zipformer"), "zipformer")[0]


def exported(part: Part, path: Path) -> float:
    """Writes a part as ONNX, and returns its difference from the model."""
    onnx_files.write_onnx(part, path)
    return check.worst_difference(part, onnx_files.runner(path))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_packed_encoder(tmp_path: Path, encoder: str) -> None:
    loaded, left_context = make(tmp_path, encoder)
    part = parts.packed_encoder(loaded.model, CHUNK, left_context)
    assert exported(part, tmp_path / "encoder.onnx") < check.TOLERANCE
    # sherpa-onnx reads these names and metadata, and ends the process if one is missing.
    model = onnx.load(tmp_path / "encoder.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "model_type": "lstm",
        "version": "1",
        "num_encoder_layers": "1",
        "T": "45",
        "decode_chunk_len": "32",
        "d_model": str(sum(tensor.numel() for _, tensor in leaves(loaded.model.init_state(1, left_context)))),
        "rnn_hidden_size": "1",
    }
    assert [node.name for node in model.graph.input] == ["x", "state0", "state1"]
    assert [node.name for node in model.graph.output] == ["encoder_out", "new_state0", "new_state1"]


@pytest.mark.parametrize(
    ("encoder", "chunk"),
    [("zipformer", 2), ("zipformer", 64), ("sammo", 2), ("sammo", 64), ("com_real", 2), ("com_real", 160)],
)
def test_chunks(tmp_path: Path, encoder: str, chunk: int) -> None:
    loaded, left_context = make(tmp_path, encoder)
    part = parts.packed_encoder(loaded.model, chunk, left_context)
    assert exported(part, tmp_path / "encoder.onnx") < check.TOLERANCE


def test_native_encoder(tmp_path: Path, zipformer: Loaded) -> None:
    part = zipformer2.native_encoder(zipformer.model, CHUNK, 64)
    assert exported(part, tmp_path / "encoder.onnx") < check.TOLERANCE
    states = part.draw(3)[1:]
    heads, queries, values = 2, 8, 12
    layer = [(3, heads * queries), (3, 24), (3, heads * values), (3, heads * values), (3, 32, 3), (3, 32, 3)]
    for k, left in ((0, 64), (1, 32)):
        shapes = [tuple(state.shape) for state in states[6 * k : 6 * k + 6]]
        by_time = [(left, *shape) for shape in layer[:4]]
        assert shapes == [by_time[0], (1, 3, left, 24), *by_time[2:], *layer[4:]]
    assert [tuple(state.shape) for state in states[12:]] == [(3, 128, 3, 19), (3,)]
    assert part.metadata["left_context_len"] == "64,32" and part.metadata["encoder_dims"] == "32,32"


@pytest.mark.parametrize(
    ("encoder", "what"),
    [("conformer", "no Zipformer"), ("sammo_left64", "no nonlin attention"), ("zipformer_left0", "no left context")],
)
def test_what_the_native_carrier_does_not_take(tmp_path: Path, encoder: str, what: str) -> None:
    loaded, left_context = make(tmp_path, encoder)
    with pytest.raises(ValueError, match=f"{what}; use the packed carrier"):
        zipformer2.native_encoder(loaded.model, CHUNK, left_context)


@pytest.mark.parametrize("encoder", ["zipformer", "sammo"])
def test_ctc_model(tmp_path: Path, encoder: str) -> None:
    loaded, left_context = make(tmp_path, encoder)
    part = ctc.ctc_model(loaded.model, CHUNK, left_context)
    assert exported(part, tmp_path / "model.onnx") < check.TOLERANCE
    inputs = part.draw(2)
    with torch.inference_mode():
        log_probs_NSV, *_ = part.module(*inputs)
        out_NSD, _ = loaded.model.stream(inputs[0], loaded.model.init_state(2, left_context))
        torch.testing.assert_close(log_probs_NSV, loaded.model.ctc_output(out_NSD))
    assert part.metadata["value_head_dims"] == (PackedState(loaded.model, left_context).size + 1) // 2


@pytest.mark.parametrize("encoder", ["zipformer", "sammo", "conformer", "com_real", "rep_lin", "full"])
def test_offline_encoder(tmp_path: Path, encoder: str) -> None:
    """The graph takes any number of utterances of any length, down to a few frames."""
    settings = ENCODERS["zipformer"][0] | {"causal": False} if encoder == "full" else ENCODERS[encoder][0]
    loaded = toy.write_checkpoint(tmp_path / "model.pt", model={"encoder": settings})
    part = offline.offline_encoder(loaded.model)
    assert exported(part, tmp_path / "encoder.onnx") < check.TOLERANCE
    run = onnx_files.runner(tmp_path / "encoder.onnx")
    for frames in (3, 9, 12, 14, 15, 16, 100, 301):
        lens_N = torch.tensor([frames, max(1, frames - 5)])
        features_NTF = parts.random_features(2, frames)
        out_NSJ, out_lens_N = run(features_NTF, lens_N)
        assert out_lens_N.tolist() == [units.output_frames(int(length)) for length in lens_N]
        if frames > part.module.least_frames:
            with torch.inference_mode():
                expected_NSD, _ = loaded.model.encode(features_NTF, lens_N)
                expected_NSJ = loaded.model.joiner.encoder_proj(expected_NSD)
            torch.testing.assert_close(out_NSJ, expected_NSJ, atol=check.TOLERANCE, rtol=0)


def test_decoder_and_joiner(tmp_path: Path, zipformer: Loaded) -> None:
    model = zipformer.model
    decoder, joiner = parts.decoder(model), parts.joiner(model)
    assert exported(decoder, tmp_path / "decoder.onnx") < check.TOLERANCE
    assert exported(joiner, tmp_path / "joiner.onnx") < check.TOLERANCE
    assert decoder.metadata == {"vocab_size": model.vocab_size, "context_size": 2}
    # At the start of a stream the last two tokens are (-1, blank).
    (start,) = onnx_files.runner(tmp_path / "decoder.onnx")(torch.tensor([[-1, 0]]))
    with torch.inference_mode():
        expected = model.joiner.decoder_proj(model.decoder(torch.tensor([[0]]))[:, -1])
    torch.testing.assert_close(start, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", ["zipformer", "sammo", "com_lin"])
def test_packing_keeps_every_state(tmp_path: Path, encoder: str) -> None:
    loaded, left_context = make(tmp_path, encoder)
    packed = PackedState(loaded.model, left_context)
    with torch.inference_mode():
        _, state = loaded.model.stream(torch.randn(2, 45, 80), loaded.model.init_state(2, left_context))
    vectors_ND = packed.pack(state)
    assert vectors_ND.shape == (2, packed.size) and vectors_ND.dtype == torch.float32
    for (name, tensor), (_, again) in zip(leaves(state), leaves(packed.unpack(vectors_ND)), strict=True):
        assert tensor.dtype == again.dtype and torch.equal(tensor, again), name
    # The vectors of a batch are the vectors of its streams.
    assert torch.equal(packed.pack(stack_states([state, state])), vectors_ND.repeat(2, 1))


def test_the_frame_counter_stops_where_it_makes_no_difference(zipformer: Loaded) -> None:
    packed, model = PackedState(zipformer.model, 64), zipformer.model
    state = model.init_state(1, 64)
    with torch.inference_mode():
        for _ in range(8):
            features_BTF = torch.randn(1, 45, 80)
            out, next_state = model.stream(features_BTF, state)
            out_packed, _ = model.stream(features_BTF, packed.unpack(packed.pack(state)))
            assert torch.equal(out, out_packed)
            state = next_state
    assert packed.pack(state)[0, -1] == 64 < state.processed[0]


def test_a_state_that_does_not_start_at_zero(zipformer: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    start = zipformer.model.init_state(1, 64)
    start.encoder[0][0].conv1_BDM[0, 3, 1] = 1.0
    monkeypatch.setattr(zipformer.model, "init_state", lambda *_: start)
    with pytest.raises(ValueError, match=r"state encoder\.0\.0\.conv1_BDM does not start at zero"):
        PackedState(zipformer.model, 64)


def test_a_wrong_state_is_found(zipformer: Loaded) -> None:
    part = parts.packed_encoder(zipformer.model, CHUNK, 64)

    def forgetful(*inputs: Tensor) -> list[Tensor]:
        out, state0, state1 = part.module(*inputs)
        state0[0, -1, 5] = 0.0  # one number, in one stream
        return [out, state0, state1]

    assert check.worst_difference(part, part.module) == 0.0
    assert check.worst_difference(part, forgetful) > check.TOLERANCE
    assert np.isnan(check.worst_difference(part, lambda *inputs: [x * np.nan for x in part.module(*inputs)]))
    with pytest.raises(ValueError, match="shape"):
        check.worst_difference(part, lambda *inputs: [x[:, :1] for x in part.module(*inputs)])


def test_small_numbers_of_a_state_have_rounding_errors_of_its_large_ones() -> None:
    expected, actual = torch.tensor([3000.0, 0.1]), torch.tensor([3000.0, 0.1006])
    assert check.difference(expected, actual) == pytest.approx(6e-4, rel=1e-3)
    assert check.difference(expected, actual, is_state=True) == pytest.approx(2e-7, rel=1e-3)


def test_the_models_own_rounding_error(zipformer: Loaded) -> None:
    class Cancels(torch.nn.Module):
        def forward(self, x_N: Tensor) -> Tensor:
            return (x_N + 1e4) - 1e4

    cancels = parts.Part("x", Cancels().eval(), lambda N: (torch.randn(N),), {}, {})
    assert 1e-4 < check.rounding_error(cancels) < 1e-3
    assert 0 < check.rounding_error(parts.packed_encoder(zipformer.model, CHUNK, 64)) < check.TOLERANCE


def test_what_ends_a_runtime_is_found(tmp_path: Path, zipformer: Loaded) -> None:
    part, path = parts.packed_encoder(zipformer.model, CHUNK, 64), tmp_path / "encoder.onnx"
    onnx_files.write_onnx(part, path)
    good = onnx.load(path)

    def broken(change: str) -> Path:
        model = onnx.ModelProto.FromString(good.SerializeToString())
        if change == "metadata":
            del model.metadata_props[-1]
        elif change == "order":
            model.graph.input.insert(0, model.graph.input.pop())
        elif change == "type":
            cast = onnx.helper.make_node("Cast", ["new_state1"], ["whole"], to=onnx.TensorProto.INT64)
            model.graph.node.append(cast)
            model.graph.output.pop()
            model.graph.output.append(onnx.helper.make_tensor_value_info("new_state1", onnx.TensorProto.INT64, None))
            model.graph.node[-1].output[0], model.graph.node[-1].input[0] = "new_state1", "raw"
            for node in model.graph.node[:-1]:
                node.output[:] = ["raw" if name == "new_state1" else name for name in node.output]
        onnx.save(model, tmp_path / "broken.onnx")
        return tmp_path / "broken.onnx"

    for change, message in (
        ("metadata", "metadata rnn_hidden_size is None, not '1'"),
        ("order", r"inputs are \['state1', 'x', 'state0'\]"),
        ("type", r"output new_state1 is tensor\(int64\), not tensor\(float\)"),
    ):
        with pytest.raises(ValueError, match=message):
            onnx_files.validate(part, broken(change))


def test_weights_that_half_precision_does_not_have(tmp_path: Path, zipformer: Loaded) -> None:
    joiner = copy.deepcopy(parts.joiner(zipformer.model))
    with torch.no_grad():
        joiner.module.get_parameter("model.joiner.output_linear.weight")[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"joiner.fp16.onnx: differs from the model by (inf|nan); leave out fp16"):
        write_onnx_files([joiner], ["fp32", "fp16"], tmp_path)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.1), ("int8", 2.0)])
def test_smaller_files(tmp_path: Path, zipformer: Loaded, precision: str, most: float) -> None:
    part, path, small = parts.packed_encoder(zipformer.model, CHUNK, 64), tmp_path / "e.onnx", tmp_path / "small.onnx"
    onnx_files.write_onnx(part, path)
    onnx_files.convert(path, precision, small)
    onnx_files.validate(part, small)
    assert 0 < check.worst_difference(part, onnx_files.runner(small)) < most
    weights, smaller = (
        sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(file).graph.initializer)
        for file in (path, small)
    )
    assert smaller < 0.75 * weights
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "small.onnx"]
