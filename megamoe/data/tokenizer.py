"""The tokenizer: sentencepiece BPE that gives every text back unchanged."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megamoe.common.errors import DataError

EOD_PIECE = "<eod>"
# sentencepiece writes a space as this character, so the character itself would come back as a space.
_SPACE_MARK = "\u2581"
_SPACE_MARK_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
# A sentence is at most this long in the trainer; longer lines are cut, not left out.
_MAX_LINE_CHARS = 4096


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model on `lines` (without their line ends) and return it in sentencepiece's file format.

    Identity normalisation, kept white space and byte fallback make decode(encode(text)) == text for every
    string that UTF-8 can hold; a line end and an indentation are single tokens, digits are separate.

    Raises:
        DataError: the lines cannot fill `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(line[:_MAX_LINE_CHARS] for line in lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=4 * _MAX_LINE_CHARS,
            user_defined_symbols=["\n"],
            control_symbols=[EOD_PIECE],
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1]  # after its file, line and condition
        raise DataError(
            "The tokenizer cannot be trained on this corpus.",
            got=f"data.tokenizer.vocab_size={vocab_size}; sentencepiece says: {reason}",
            expected="a vocabulary that the text can fill",
            todo="lower data.tokenizer.vocab_size or add text",
        ) from error
    return model.getvalue()


class Tokenizer:
    """A sentencepiece model read from a file.

    Attributes:
        vocab_size: number of token ids.
        eod_id: the id that ends every document: `<eod>`, or the model's own end-of-sentence id.
        digest: sha256 of the model file, hexadecimal.

    Raises:
        DataError: the file is missing or damaged, or the model has no id that can end a document.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        model = _read_model(self.path)
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = _load_processor(self.path, model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id = self._find_eod()
        # Only models trained here are known to be exact; a foreign one keeps its own treatment of spaces.
        ours = self._processor.id_to_piece(self.eod_id) == EOD_PIECE
        self._space_mark = [self._processor.piece_to_id(p) for p in _SPACE_MARK_BYTES] if ours else []

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the end-of-document id; no text can produce that id."""
        if not self._space_mark or _SPACE_MARK not in text:
            ids: list[int] = self._processor.encode(text)
            return ids
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE_MARK))
        return [*first, *(token for part in rest for token in (*self._space_mark, *part))]

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """`encode` of every text, on sentencepiece's own threads, which run beside Python's lock."""
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=num_threads)
        for position, text in enumerate(texts):
            if self._space_mark and _SPACE_MARK in text:
                encoded[position] = self.encode(text)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; the end-of-document id gives nothing."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def _find_eod(self) -> int:
        eod: int = self._processor.piece_to_id(EOD_PIECE)
        if self._processor.id_to_piece(eod) == EOD_PIECE:
            return eod
        eos: int = self._processor.eos_id()
        if eos >= 0:
            return eos
        raise DataError(
            f"Tokenizer {self.path} has no id that can end a document.",
            got=f"neither {EOD_PIECE} nor an end-of-sentence piece",
            todo="train one here: leave data.tokenizer.path empty",
        )


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"Tokenizer {path} cannot be read.",
            got=str(error.strerror),
            expected="a sentencepiece model file",
            todo="correct data.tokenizer.path, or prepare the data again",
        ) from error


def _load_processor(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(
            f"Tokenizer {path} is damaged.",
            got=f"{len(model)} bytes that sentencepiece cannot read",
            expected="a sentencepiece model file",
            todo="restore the file, or prepare the data again with --overwrite",
        ) from error
    return processor
