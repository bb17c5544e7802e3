"""Turns texts into token ids and back.

There are two families of tokens, with the ids that the usual decoders expect:

- sentencepiece (`bpe`, `unigram`, `word`) has `<blk>` 0, `<sos/eos>` 1, `<unk>` 2, then the pieces; a piece that
  starts a word begins with `▁`;
- `char`, for text written without spaces, has `<blk>` 0, the characters in code point order, `<unk>`, `<sos/eos>`.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch

BLANK, SOS_EOS, UNK = "<blk>", "<sos/eos>", "<unk>"
SENTENCEPIECE_KINDS = ("bpe", "unigram", "word")
KINDS = (*SENTENCEPIECE_KINDS, "char")
UNKNOWN_MARK = "⁇"  # <unk> is decoded to this
WORD_START = "▁"


class Tokenizer:
    """Encodes texts to token ids and decodes them.

    A tokenizer can be pickled (for worker processes), written to a directory with `save`, and turned into a dict of
    strings, lists and uint8 tensors with `to_dict`, which torch.load(weights_only=True) accepts.

    Attributes:
        kind: one of KINDS.
        symbols: the token of each id, as in tokens.txt.
        blank_id: always 0.
        unk_id: id of `<unk>`.
    """

    blank_id = 0

    def __init__(self, kind: str, model: bytes | None = None, symbols: list[str] | None = None) -> None:
        """Takes a serialised sentencepiece model, or the list of symbols, which is enough for kind `char`.

        For the other kinds, symbols alone make a tokenizer that decodes but cannot encode.

        Raises:
            ValueError: if the symbols lack `<blk>` as id 0, or `<unk>`.
        """
        self.kind = kind
        self._model = model
        self._pieces: sentencepiece.SentencePieceProcessor | None = None
        if model is not None:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            symbols = [self._pieces.id_to_piece(i) for i in range(self._pieces.get_piece_size())]
        if not symbols or symbols[0] != BLANK or UNK not in symbols:
            raise ValueError(f"tokens of kind {kind}: need {BLANK} as id 0 and {UNK} among the symbols")
        self.symbols = symbols
        self.unk_id = symbols.index(UNK)
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}
        self._special_ids = {self._ids[s] for s in (BLANK, SOS_EOS) if s in self._ids}

    @property
    def vocab_size(self) -> int:
        """Is the number of tokens, blank included."""
        return len(self.symbols)

    @property
    def can_encode(self) -> bool:
        """Tells whether texts can be encoded; word pieces without their sentencepiece model cannot."""
        return self._pieces is not None or self.kind == "char"

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text; what the vocabulary lacks becomes `unk_id`. Kind `char` ignores spaces.

        A tokenizer that cannot encode gives `unk_id` for every word.
        """
        if self._pieces is not None:
            return self._pieces.encode(text)
        if not self.can_encode:
            return [self.unk_id] * len(text.split())
        return [
            self.unk_id if char in (BLANK, UNK, SOS_EOS) else self._ids.get(char, self.unk_id)
            for char in text
            if not char.isspace()
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; blank and `<sos/eos>` vanish, `<unk>` becomes "⁇"."""
        kept = [int(i) for i in ids if int(i) not in self._special_ids]
        if self._pieces is not None:
            return " ".join(self._pieces.decode(kept).split())
        if self.kind == "char":
            return "".join(UNKNOWN_MARK if i == self.unk_id else self.symbols[i] for i in kept)
        text = "".join(f" {UNKNOWN_MARK} " if i == self.unk_id else self.symbols[i] for i in kept)
        return " ".join(text.replace(WORD_START, " ").split())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain strings, lists and tensors from which `from_dict` makes an equal tokenizer."""
        if self._model is None:
            return {"kind": self.kind, "symbols": self.symbols}
        return {"kind": self.kind, "model": torch.frombuffer(bytearray(self._model), dtype=torch.uint8)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Tokenizer":
        """Makes the tokenizer that `to_dict` was called for."""
        if "model" in saved:
            return cls(saved["kind"], model=saved["model"].numpy().tobytes())
        return cls(saved["kind"], symbols=list(saved["symbols"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.kind, self._model, self.symbols if self._model is None else None)

    def save(self, directory: Path | str) -> None:
        """Writes tokens.txt ("symbol id" lines) and, for sentencepiece, KIND.model into the directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for kind in SENTENCEPIECE_KINDS:  # `load` would take the model of another kind
            (directory / f"{kind}.model").unlink(missing_ok=True)
        if self._model is not None:
            (directory / f"{self.kind}.model").write_bytes(self._model)
        lines = [f"{symbol} {i}\n" for i, symbol in enumerate(self.symbols)]
        (directory / "tokens.txt").write_text("".join(lines), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, to_encode: bool = True) -> "Tokenizer":
        """Reads what `save` wrote, or the tokens of a published model.

        Args:
            path: the directory, or one file: a sentencepiece model (*.model) or tokens.txt.
            to_encode: False accepts the tokens.txt of word pieces without their sentencepiece model.

        Raises:
            FileNotFoundError: if there is neither a sentencepiece model nor a tokens.txt.
            ValueError: if the file holds no tokens, or cannot serve to encode.
        """
        path = Path(path)
        names = [*(f"{kind}.model" for kind in SENTENCEPIECE_KINDS), "tokens.txt"]
        files = [path / name for name in names] if path.is_dir() else [path]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{path}: no tokens.txt and no {'/'.join(SENTENCEPIECE_KINDS)}.model; "
                "make them with ssm-asr prepare tokens"
            )
        try:
            tokenizer = cls._from_file(file)
        except (ValueError, RuntimeError) as error:  # sentencepiece raises RuntimeError
            raise ValueError(f"{file}: no tokens that can be used: {' '.join(str(error).split())}") from None
        if to_encode and not tokenizer.can_encode:
            raise ValueError(f"{file}: word pieces cannot be found in a text by their list; give their bpe.model")
        return tokenizer

    @classmethod
    def _from_file(cls, file: Path) -> "Tokenizer":
        if file.suffix == ".model":
            return cls(file.stem if file.stem in SENTENCEPIECE_KINDS else "bpe", model=file.read_bytes())
        symbols = _parse_symbols(file.read_text(encoding="utf-8"))
        return cls("bpe" if any(symbol.startswith(WORD_START) for symbol in symbols) else "char", symbols=symbols)


def _parse_symbols(text: str) -> list[str]:
    """Returns the symbols of a tokens.txt by id, without those at its end (#0, #1, …) that only decoding graphs use."""
    rows = [line.split() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    rows = [[" ", *row] if len(row) == 1 and row[0].isdecimal() else row for row in rows]  # as sherpa-onnx reads it
    wrong = next((row for row in rows if len(row) != 2 or not row[1].isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"the line {' '.join(wrong)!r} is not 'symbol id'")
    rows.sort(key=lambda row: int(row[1]))
    if [int(i) for _, i in rows] != list(range(len(rows))):
        raise ValueError(f"the ids of its {len(rows)} symbols are not 0 to {len(rows) - 1}")
    symbols = [symbol for symbol, _ in rows]
    while symbols and re.fullmatch(r"#\d+", symbols[-1]):
        symbols.pop()
    return symbols


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int | None = None) -> Tokenizer:
    """Makes a tokenizer from training texts.

    Args:
        texts: transcripts; they are iterated once.
        kind: one of KINDS.
        vocab_size: number of tokens, the three special ones included. `bpe` and `unigram` need it; `word` and
            `char` take every word or character of the texts and accept no number.

    Raises:
        ValueError: if the kind is unknown, there is no text, or the vocabulary size does not suit the texts;
            in the last case the message names the largest (or smallest) possible one.
    """
    if kind not in KINDS:
        raise ValueError(f"token kind {kind!r}: choose one of {', '.join(KINDS)}")
    if (vocab_size is None) != (kind in ("word", "char")):
        raise ValueError(f"vocabulary size {vocab_size} for kind {kind}: give one for bpe and unigram only")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("no transcripts to make tokens from: all are empty")
    if kind == "char":
        chars = {char for text in texts for char in text if not char.isspace()}
        return Tokenizer(kind, symbols=[BLANK, *sorted(chars), UNK, SOS_EOS])
    return Tokenizer(kind, model=_train_sentencepiece(texts, kind, vocab_size))


def _train_sentencepiece(texts: list[str], kind: str, vocab_size: int | None) -> bytes:
    """Returns a serialised sentencepiece model of the texts."""
    size = {"vocab_size": vocab_size} if vocab_size is not None else {"use_all_vocab": True}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=kind,
            control_symbols=[BLANK, SOS_EOS],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            character_coverage=1.0,
            # Nothing is rewritten, since decoded text must equal the transcript.
            normalization_rule_name="identity",
            max_sentence_length=1 << 20,  # longer lines would be skipped
            minloglevel=2,
            **size,
        )
    except RuntimeError as error:
        message = str(error)
        largest = re.search(r"value <= (\d+)", message)
        smallest = re.search(r"\d+ vs (\d+)", message)
        if largest:
            bound = f"the largest possible for these {len(texts)} texts is {largest[1]}"
        elif smallest:
            bound = f"the smallest possible for these {len(texts)} texts is {smallest[1]}"
        else:
            bound = message
        raise ValueError(f"vocabulary size {vocab_size} (tokens.vocab_size) for kind {kind}: {bound}") from error
    return model.getvalue()
