"""Tokenizers give the ids that decoders expect, decode what they encode, and load without running code."""

import io
import pickle
from pathlib import Path

import pytest
import torch

from ssm_asr.data.tokens import KINDS, Tokenizer, train_tokenizer

ENGLISH = ["THE CAT SAT ON THE MAT", "A DOG SAW THE CAT", "THE MAT IS RED", "ON AND ON"] * 5
JAPANESE = ["今日は良い天気です", "良い 本 を読む", "本です"]
VOCAB_SIZES = {"bpe": 40, "unigram": 22}


def make(kind: str) -> Tokenizer:
    return train_tokenizer(JAPANESE if kind == "char" else ENGLISH, kind, VOCAB_SIZES.get(kind))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_sentencepiece_ids_and_round_trip(kind: str) -> None:
    tokenizer = make(kind)
    assert tokenizer.symbols[:3] == ["<blk>", "<sos/eos>", "<unk>"]
    assert (tokenizer.blank_id, tokenizer.unk_id) == (0, 2)
    assert tokenizer.vocab_size == len(tokenizer.symbols) == VOCAB_SIZES.get(kind, 14)
    for text in ENGLISH:
        ids = tokenizer.encode(text)
        assert min(ids) > 2
        assert tokenizer.decode(ids) == text
        assert tokenizer.symbols[ids[0]].startswith("▁")
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_char_ids_and_round_trip() -> None:
    tokenizer = make("char")
    chars = sorted(set("".join(JAPANESE)) - {" "})
    assert tokenizer.symbols == ["<blk>", *chars, "<unk>", "<sos/eos>"]
    assert tokenizer.unk_id == len(chars) + 1
    assert tokenizer.decode(tokenizer.encode("良い 本")) == "良い本"
    assert tokenizer.encode("本x<") == [1 + chars.index("本"), tokenizer.unk_id, tokenizer.unk_id]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind: str) -> None:
    tokenizer = make(kind)
    known = tokenizer.encode("本" if kind == "char" else "CAT")
    sos_eos = tokenizer.symbols.index("<sos/eos>")
    assert tokenizer.decode([0, *known, 0, sos_eos]) == tokenizer.decode(known)
    assert tokenizer.unk_id in tokenizer.encode("é")
    assert "⁇" in tokenizer.decode([tokenizer.unk_id])
    # Transcripts cannot produce blank, whatever they say.
    assert 0 not in tokenizer.encode("<blk> CAT <sos/eos>")


@pytest.mark.parametrize("kind", KINDS)
def test_survives_checkpoint_pickle_and_directory(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind)
    buffer = io.BytesIO()
    torch.save({"tokens": tokenizer.to_dict()}, buffer)
    buffer.seek(0)
    from_checkpoint = Tokenizer.from_dict(torch.load(buffer, weights_only=True)["tokens"])
    tokenizer.save(tmp_path / "tokens")
    text = (JAPANESE if kind == "char" else ENGLISH)[0]
    for copy in (from_checkpoint, pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tmp_path / "tokens")):
        assert (copy.kind, copy.symbols, copy.unk_id) == (kind, tokenizer.symbols, tokenizer.unk_id)
        assert copy.encode(text) == tokenizer.encode(text)
    lines = (tmp_path / "tokens" / "tokens.txt").read_text().splitlines()
    assert lines == [f"{symbol} {i}" for i, symbol in enumerate(tokenizer.symbols)]


def test_another_kind_in_the_same_directory(tmp_path: Path) -> None:
    """No file of the first tokenizer may stay, since it would be read before the tokens.txt of the second."""
    texts = ["one two", "two three"]
    for kind in ("word", "char", "word"):
        train_tokenizer(texts, kind).save(tmp_path)
        assert Tokenizer.load(tmp_path).kind == kind


def test_clear_errors(tmp_path: Path) -> None:
    for kind in ("bpe", "unigram"):
        with pytest.raises(ValueError, match=r"vocabulary size 5000 .*largest possible .* is \d+") as caught:
            train_tokenizer(ENGLISH, kind, 5000)
        largest = int(str(caught.value).rsplit(" ", 1)[1])
        assert train_tokenizer(ENGLISH, kind, largest).vocab_size == largest
    with pytest.raises(ValueError, match=r"vocabulary size 5 .*smallest possible .* is \d+"):
        train_tokenizer(ENGLISH, "bpe", 5)
    with pytest.raises(ValueError, match="all are empty"):
        train_tokenizer(["", " "], "bpe", 100)
    with pytest.raises(ValueError, match="give one for bpe and unigram only"):
        train_tokenizer(ENGLISH, "word", 100)
    with pytest.raises(ValueError, match="choose one of bpe"):
        train_tokenizer(ENGLISH, "phone", 100)
    with pytest.raises(FileNotFoundError, match=r"prepare tokens"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_without_their_model_decode_alike(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=r"tokens.txt: word pieces .*; give their bpe.model$"):
        Tokenizer.load(tmp_path / "tokens.txt")
    pieces = Tokenizer.load(tmp_path / "tokens.txt", to_encode=False)
    assert tokenizer.can_encode and not pieces.can_encode
    assert pieces.symbols == tokenizer.symbols and pieces.kind == "bpe"
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(tokenizer.vocab_size, (9,), generator=rng).tolist()
        assert pieces.decode(ids) == tokenizer.decode(ids)
    assert pieces.encode("THE CAT") == [pieces.unk_id] * 2
    again = pickle.loads(pickle.dumps(Tokenizer.from_dict(pieces.to_dict())))
    assert again.decode(range(22)) == pieces.decode(range(22)) and not again.can_encode


def test_files_of_published_models(tmp_path: Path) -> None:
    tokenizer = make("bpe")
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path / "bpe.model").encode(ENGLISH[0]) == tokenizer.encode(ENGLISH[0])
    tokens = tmp_path / "lang" / "tokens.txt"
    tokens.parent.mkdir()
    tokens.write_text("<unk>\t2\r\n<blk> 0\n<sos/eos> 1\n#1 3\n本 4\n#0 5\n#1 6\n\n", encoding="utf-8")
    char = Tokenizer.load(tokens.parent)
    assert (char.kind, char.symbols) == ("char", ["<blk>", "<sos/eos>", "<unk>", "#1", "本"])
    (tmp_path / "bpe.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"^.*bpe.model: no tokens that can be used: [^\n]*$"):
        Tokenizer.load(tmp_path)


def test_tokens_txt_as_others_write_it(tmp_path: Path) -> None:
    """A byte order mark is no part of the first token, and a line of only an id is the space, as in sherpa-onnx."""
    (tmp_path / "tokens.txt").write_text("\ufeff<blk> 0\n<unk> 1\n  2\na 3\n", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokens.txt", to_encode=False)
    assert list(tokenizer.symbols) == ["<blk>", "<unk>", " ", "a"]
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again", to_encode=False).symbols == tokenizer.symbols
