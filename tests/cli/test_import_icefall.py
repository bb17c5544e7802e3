"""Models of the PyPI package `zipformer`, taken over: the same outputs, and all that can be done with a checkpoint."""

import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toy
from golden_model import golden_model
from peer_zipformer import peer_encode, peer_model, peer_model_by_options, peer_stream
from test_checkpoint import Bomb

from ssm_asr import checkpoint
from ssm_asr.cli import decode, import_icefall, stream, train
from ssm_asr.config import load_experiment
from ssm_asr.exporting.icefall import infer_config, read_weights
from ssm_asr.exporting.weights import icefall_options
from ssm_asr.transducer.model import Transducer

CONF = Path(__file__).parents[2] / "egs" / "librispeech" / "conf"
TOLERANCE = {"atol": 1e-4, "rtol": 0}
WORDS = [f"▁W{i}" for i in range(27)]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokens.txt as in the language directories of published models."""
    path = tmp_path_factory.mktemp("lang") / "tokens.txt"
    symbols = ["<blk>", "<sos/eos>", "<unk>", *WORDS, "#0", "#1"]
    path.write_text("".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols)), encoding="utf-8")
    return path


def take_over(path: Path, tokens: Path, out: Path, *options: str) -> checkpoint.Loaded:
    arguments = ["--in", str(path), "--tokens", str(tokens), "--out", str(out), *options]
    assert import_icefall.main(arguments) == 0
    return checkpoint.load_model(out / "model.pt")


def features() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(2, 2 * 160 + 13, 80) - 5, torch.tensor([2 * 160 + 13, 250])


# --- the same outputs


@pytest.mark.parametrize("causal", [True, False])
def test_whole_and_chunk_masked_outputs(causal: bool, tokens: Path, tmp_path: Path) -> None:
    peer = peer_model(causal=causal, use_ctc=causal)
    torch.save({"model": peer.state_dict()}, tmp_path / "pretrained.pt")
    loaded = take_over(tmp_path / "pretrained.pt", tokens, tmp_path / "out")
    model, (features_BTF, lens_B) = loaded.model, features()
    torch.testing.assert_close(
        model.encoder_embed(features_BTF, lens_B)[0], peer.encoder_embed(features_BTF, lens_B)[0], **TOLERANCE
    )
    for chunk, left in [(-1, -1), (16, 64), (32, 64), (32, -1)] if causal else [(-1, -1)]:
        expected = peer_encode(peer, features_BTF, lens_B, chunk, left)
        torch.testing.assert_close(model.encode(features_BTF, lens_B, chunk, left)[0], expected, **TOLERANCE)
    assert loaded.experiment.model.ctc == causal
    if causal:
        torch.testing.assert_close(model.ctc_output(expected), peer.ctc_output(expected), **TOLERANCE)
    decoder_out = peer.decoder(torch.tensor([[-1, 0, 5], [3, 4, 29]]), need_pad=False)
    torch.testing.assert_close(model.decoder(torch.tensor([[-1, 0, 5], [3, 4, 29]]), pad=False), decoder_out)
    joined = peer.joiner(expected[:, :5], decoder_out)
    torch.testing.assert_close(model.joiner(expected[:, :5], decoder_out), joined, **TOLERANCE)


@pytest.mark.parametrize("chunk", [16, 32])
def test_streamed_outputs(chunk: int, tokens: Path, tmp_path: Path) -> None:
    peer = peer_model(causal=True)
    torch.save(peer.state_dict(), tmp_path / "pretrained.pt")
    model = take_over(tmp_path / "pretrained.pt", tokens, tmp_path / "out").model
    chunks = features()[0].unfold(1, 2 * chunk + 13, 2 * chunk).transpose(2, 3).unbind(dim=1)
    assert len(chunks) == 160 // chunk
    expected = peer_stream(peer, chunks, chunk, 64)
    state, outputs = model.init_state(2, 64), []
    for features_BTF in chunks:
        out_BSD, state = model.stream(features_BTF, state)
        outputs.append(out_BSD)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **TOLERANCE)


# --- the configuration


@pytest.mark.parametrize("size", ["s", "m", "l"])
@pytest.mark.parametrize("causal", [True, False])
def test_published_sizes(size: str, causal: bool) -> None:
    overrides = [f"model.encoder.causal={str(causal).lower()}"]
    config = load_experiment(CONF / f"zipformer_{size}.yaml", overrides).model
    with torch.device("meta"):
        peer = peer_model_by_options(icefall_options(config), 500)
    assert infer_config(peer.state_dict(), 4) == config


@pytest.mark.parametrize("name", ["causal", "full"])
def test_golden_models(name: str) -> None:
    model, _ = golden_model(name)
    inferred = infer_config(model.state_dict(), 4).encoder
    for field, value in vars(model.config.encoder).items():
        if field != "unmasked_dim":  # in no weight
            assert getattr(inferred, field) == value, field


def test_heads_of_another_width(tokens: Path, tmp_path: Path, capsys: Captured) -> None:
    peer = peer_model(causal=False, pos_head_dim="3", num_heads="4,6,4")
    torch.save(peer.state_dict(), tmp_path / "pretrained.pt")
    arguments = ["--in", str(tmp_path / "pretrained.pt"), "--tokens", str(tokens), "--out", str(tmp_path / "out")]
    assert import_icefall.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/pretrained.pt: stack 0 has position queries, queries and values of 12, 64 and 32 in all, which "
        "are no heads with position queries of 4; give another --pos-head-dim\n"
    )
    loaded = take_over(tmp_path / "pretrained.pt", tokens, tmp_path / "out", "--pos-head-dim", "3")
    assert loaded.experiment.model.encoder.heads == (4, 6, 4)
    expected = peer_encode(peer, *features(), -1, -1)
    torch.testing.assert_close(loaded.model.encode(*features())[0], expected, **TOLERANCE)
    assert "position queries of 3 (--pos-head-dim), that is (4, 6, 4) heads" in capsys.readouterr().out


# --- decoding, streaming and training on


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> toy.Corpus:
    return toy.Corpus(tmp_path_factory.mktemp("corpus"), num_train=3, num_valid=4)


@pytest.fixture(scope="module")
def imported(corpus: toy.Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model that emits all its tokens."""
    out = tmp_path_factory.mktemp("imported")
    peer = peer_model(causal=True, use_ctc=True, vocab_size=corpus.tokenizer.vocab_size)
    torch.save(peer.state_dict(), out / "silent.pt")
    model = take_over(out / "silent.pt", corpus.tokens, out).model
    toy.vary_output(model)
    peer.load_state_dict(model.state_dict(), strict=True)
    torch.save({"model": peer.state_dict()}, out / "pretrained.pt")
    take_over(out / "pretrained.pt", corpus.tokens / "word.model", out)
    return out


def test_decode_and_stream(imported: Path, corpus: toy.Corpus, tmp_path: Path) -> None:
    options = ["--checkpoint", str(imported / "model.pt"), "--cuts", str(corpus.valid_cuts), "--chunk", "16"]
    assert decode.main([*options, "--left", "64", "--device", "cpu", "--out", str(tmp_path / "decode")]) == 0
    assert stream.main([*options, "--left", "64", "--out", str(tmp_path / "stream")]) == 0
    decoded, streamed = ((tmp_path / name / "hypotheses.tsv").read_text() for name in ("decode", "stream"))
    assert decoded == streamed
    assert {"LOW", "MID", "HIGH"} <= {word for row in decoded.splitlines()[1:] for word in row.split("\t")[2].split()}


def test_train_on(imported: Path, corpus: toy.Corpus, tmp_path: Path, capsys: Captured) -> None:
    exp_dir = tmp_path / "exp"
    settings = ["train.num_epochs=1", "train.average_period=1", "data.num_workers=0", "optim.base_lr=0.001"]
    arguments = [
        *("--config", str(imported / "config.yaml"), "--tokens", str(imported / "tokens")),
        *("--init-from", str(imported / "model.pt"), "--exp-dir", str(exp_dir), "--device", "cpu"),
        *("--train-cuts", str(corpus.train_cuts), "--valid-cuts", str(corpus.valid_cuts)),
        *(f"--set={setting}" for setting in settings),
    ]
    with torch.enable_grad():
        assert train.main(arguments) == 0
    before, after = checkpoint.load(imported / "model.pt")["model"], checkpoint.load(exp_dir / "epoch-1.pt")["model"]
    out = capsys.readouterr().out
    assert f"copied {len(before)} weights\n  not in it, left as they start: none\n  in it, of no use here: none" in out
    assert json.loads((exp_dir / "trained.json").read_text())["batch"] == 1
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * len(before)
    assert all(torch.allclose(before[name], after[name], atol=0.1) for name in before)


def test_word_pieces_without_their_model_decode(corpus: toy.Corpus, tmp_path: Path, capsys: Captured) -> None:
    torch.save(peer_model(causal=True, vocab_size=6).state_dict(), tmp_path / "pretrained.pt")
    lang = tmp_path / "tokens.txt"
    lang.write_text("<blk> 0\n<sos/eos> 1\n<unk> 2\n▁AN 3\nDY 4\n▁BOB 5\n", encoding="utf-8")
    loaded = take_over(tmp_path / "pretrained.pt", lang, tmp_path)
    assert "needs the sentencepiece model of the tokens; import with --tokens bpe.model" in capsys.readouterr().out
    assert loaded.tokenizer.decode([3, 4, 5]) == "ANDY BOB" and loaded.experiment.tokens.kind == "bpe"
    options = ["--checkpoint", str(tmp_path / "model.pt"), "--cuts", str(corpus.valid_cuts)]
    assert decode.main([*options, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["utterances"] == 4
    arguments = [*corpus.arguments(tmp_path / "exp"), "--tokens", str(tmp_path)]
    assert train.main(arguments) == 2
    assert "word pieces cannot be found in a text by their list; give their bpe.model" in capsys.readouterr().err


# --- files


def test_kinds_of_files(tmp_path: Path) -> None:
    peer = peer_model(causal=True)
    state = peer.state_dict()
    path = tmp_path / "epoch-1.pt"
    training = {"model": state, "model_avg": peer_model(2).state_dict(), "exp_dir": tmp_path, "best_train_loss": 1.0}
    training["optimizer"] = torch.optim.Adam(peer.parameters()).state_dict()
    half = {name: value.half() for name, value in state.items()}
    for content, exact, entry in ((state, True, ""), (training, True, "model"), ({"model": half}, False, "model")):
        torch.save(content, path)
        weights, found = read_weights(path, last=True)
        assert found == entry
        assert weights.keys() == state.keys()
        for name, value in weights.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, state[name] if exact else half[name].float())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert toy.differing(read_weights(tmp_path / "model.safetensors")[0], dict(state)) == []
    torch.save(training, path)
    mean, entry = read_weights(path)
    assert entry == "model_avg" and toy.differing(mean, dict(training["model_avg"])) == []


def test_the_running_mean_is_taken_and_said(tokens: Path, tmp_path: Path, capsys: Captured) -> None:
    both = {"model": peer_model(causal=True).state_dict(), "model_avg": peer_model(causal=True).state_dict()}
    both["model_avg"] = {name: value + 0.25 for name, value in both["model_avg"].items()}
    torch.save(both, tmp_path / "epoch-9.pt")
    arguments = ["--in", str(tmp_path / "epoch-9.pt"), "--tokens", str(tokens), "--out"]
    for options, entry in ([], "model_avg"), (["--last-weights"], "model"):
        assert import_icefall.main([*arguments, str(tmp_path / entry), *options]) == 0
        said = "takes model_avg, the running mean of the weights; --last-weights takes the last ones"
        assert (said in capsys.readouterr().out) == (entry == "model_avg")
        saved = checkpoint.load(tmp_path / entry / "model.pt")["model"]
        assert all(torch.equal(saved[name], value.float()) for name, value in both[entry].items())


def test_damaged_and_broken_weights(tmp_path: Path) -> None:
    """A flipped bit is found by the checksums in the file, in weights that are read without complaint otherwise."""
    path = tmp_path / "pretrained.pt"
    torch.save({"model": {"a": torch.ones(1000), "b": torch.ones(1000)}}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.ones(100).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"^{path}: .*the checksum of .* is wrong, so the file is damaged"):
        read_weights(path)
    for value in (float("nan"), float("inf")):
        torch.save({"a": torch.ones(3), "b": torch.tensor([1.0, value])}, path)
        with pytest.raises(ValueError, match=f"^{path}: b has weights that are NaN or infinite"):
            read_weights(path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "pretrained.pt"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"model": {"w": torch.zeros(1)}, "x": Bomb(mark)}, path, **options)
        with pytest.raises(ValueError, match=rf"^{path}: refused: .*may be code; save the state dict alone"):
            read_weights(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_weights(path)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_files_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pt"
    with pytest.raises(ValueError, match=f"^{path}: no such file; give the pretrained.pt"):
        read_weights(path)
    for content in (torch.zeros(2), {}, {"model": 3}, {"epoch": 1, "w": torch.zeros(1)}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"^{path}: holds no state dict, neither plain nor under 'model'"):
            read_weights(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    broken = tmp_path / "broken.safetensors"
    for file in (path, broken):
        broken.write_bytes(b"hello")
        with pytest.raises(ValueError, match=f"^{file}: no weights that can be read .*; give a state dict$") as caught:
            read_weights(file)
        assert "\n" not in str(caught.value)


# --- mistakes


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"joiner.output_linear.weight": None}, ["lacks joiner.output_linear.weight; give the state dict of a Zipf"]),
        (
            {"joiner.output_linear.bias": None, "encoder.encoders.1.out_combiner.bypass_scale": None},
            ["lacks encoder.encoders.1.out_combiner.bypass_scale, joiner.output_linear.bias; is it the whole"],
        ),
        (
            {"new.a": torch.zeros(2), "new.b": torch.zeros(2)},
            ["has what this program does not know: new.a, new.b; leave it out with --drop PREFIX"],
        ),
        (
            {"joiner.output_linear.bias": torch.zeros(31), "decoder.extra": torch.zeros(1)},
            [
                "has what this program does not know: decoder.extra;",
                "has weights of other shapes than the rest implies: joiner.output_linear.bias (31,), not (30,);",
            ],
        ),
        (
            {f"encoder.encoders.0.layers.0.feed_forward{i}.{p}.weight": None for i in "13" for p in ("in_proj",)}
            | {f"encoder_embed.{name}.bias": None for name in ("conv.0", "conv.4", "conv.7", "out", "out_norm")},
            ["encoder_embed.out_norm.bias and 2 more; is it the whole state dict"],
        ),
    ],
)
def test_weights_that_do_not_fit(
    change: dict, lines: list[str], tokens: Path, tmp_path: Path, capsys: Captured
) -> None:
    weights = {**peer_model(causal=False).state_dict(), **change}
    path = tmp_path / "pretrained.pt"
    torch.save({name: value for name, value in weights.items() if value is not None}, path)
    arguments = ["--in", str(path), "--tokens", str(tokens), "--out", str(tmp_path / "out")]
    assert import_icefall.main(arguments) == (2 if lines else 0)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(lines)
    for error, line in zip(errors, lines, strict=True):
        assert error.startswith(f"{path}: ") and line in error
    assert (tmp_path / "out").exists() == (not lines)


def test_parts_can_be_left_out(tokens: Path, tmp_path: Path) -> None:
    weights = peer_model(causal=False).state_dict()
    path = tmp_path / "pretrained.pt"
    torch.save({**weights, "attention_decoder.a": torch.zeros(2), "attention_decoder.b": torch.zeros(2)}, path)
    loaded = take_over(path, tokens, tmp_path, "--drop", "attention_decoder.")
    assert toy.differing(dict(loaded.model.state_dict()), dict(weights)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<blk> 0\n<unk> 1\nA 2\n", "tokens.txt: 3 tokens, but .*/pretrained.pt tells 30 apart; give those that it"),
        ("<blk> 0\n<unk> 1\nA\n", "tokens.txt: no tokens that can be used: the line 'A' is not 'symbol id'"),
        ("<blk> 0\n<unk> 1\nA 3\n", "tokens.txt: no tokens that can be used: the ids of its 3 symbols are not 0 to 2"),
        ("A 0\n<unk> 1\n", "tokens.txt: no tokens that can be used: .* need <blk> as id 0 and <unk> among the symbols"),
        (None, "tokens.txt: no tokens.txt and no bpe/unigram/word.model; "),
    ],
)
def test_tokens_that_do_not_fit(text: str | None, message: str, tmp_path: Path, capsys: Captured) -> None:
    tokens, path = tmp_path / "tokens.txt", tmp_path / "pretrained.pt"
    if text:
        tokens.write_text(text)
    torch.save(peer_model(causal=False).state_dict(), path)
    assert import_icefall.main(["--in", str(path), "--tokens", str(tokens), "--out", str(tmp_path / "out")]) == 2
    assert re.fullmatch(rf"{tmp_path}/{message}[^\n]*\n", capsys.readouterr().err)


def test_summary_and_help(tokens: Path, tmp_path: Path, capsys: Captured) -> None:
    torch.save(peer_model(causal=False).state_dict(), tmp_path / "pretrained.pt")
    loaded = take_over(tmp_path / "pretrained.pt", tokens, tmp_path)
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in loaded.model.parameters())
    assert f"Zipformer, {parameters:,} parameters, whole utterances only, 30 tokens, without CTC head\n" in out
    assert "downsampling (1, 4, 2)" in out and "unmasked_dim (64, 96, 80)" in out
    assert load_experiment(tmp_path / "config.yaml") == loaded.experiment
    assert isinstance(loaded.model, Transducer) and loaded.progress == {"imported_from": "pretrained.pt"}
    with pytest.raises(SystemExit):
        import_icefall.main(["--help"])
    assert "ssm-asr import-icefall --in pretrained.pt" in capsys.readouterr().out
