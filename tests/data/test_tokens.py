"""Tokenizers: ids where decoders expect them, round trips, and checkpoints that load without running code."""

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
