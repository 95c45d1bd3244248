import hashlib
import sysconfig
from pathlib import Path

import pytest

from megamoe.common.errors import DataError
from megamoe.config.data import DataConfig
from megamoe.data.manifest import TOKENIZER, Manifest
from megamoe.data.tokenizer import Tokenizer, train_tokenizer

DIFFICULT = [
    "",
    " ",
    "  lead and trail  ",
    "\ttab\t\tindent\n\n\n    four\n",
    "CRLF\r\nand CR\r alone",
    "caf\u00e9 cafe\u0301 \ufb01 \u212b \u00a0 \u3000 \ufeff",  # what a normalising tokenizer would change
    "\u4f60\u597d \U0001f600 \U0001f469\u200d\U0001f4bb \U0010ffff",
    "\u2581 \u2581\u2581a\u2581",  # the character that sentencepiece writes for a space
    "nul \0 bell \a",
    "<eod> <unk> <s> </s> <0x41>",
    "0123456789 3.14e-10",
]


@pytest.fixture(scope="module")
def tokenizer(prepared: tuple[DataConfig, Manifest]) -> Tokenizer:
    return Tokenizer(Path(prepared[0].prepared_dir) / TOKENIZER)


@pytest.mark.parametrize("text", DIFFICULT)
def test_difficult_text_comes_back_unchanged(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_files_of_the_standard_library_come_back_unchanged(tokenizer: Tokenizer):
    files = sorted(Path(sysconfig.get_path("stdlib"), "encodings").glob("*.py"))[:40]
    texts = [path.read_bytes().decode() for path in files]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts, 2)] == texts


def test_a_batch_is_encoded_like_its_texts(tokenizer: Tokenizer):
    assert tokenizer.encode_batch(DIFFICULT, 2) == [tokenizer.encode(text) for text in DIFFICULT]


def test_a_decoded_end_of_document_is_nothing(tokenizer: Tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id, *tokenizer.encode("b")]) == "ab"


def test_digest_is_the_files(tokenizer: Tokenizer):
    assert tokenizer.digest == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_training_is_deterministic():
    lines = [f"line {i} of {i * i} words" for i in range(500)]
    assert train_tokenizer(lines, 295) == train_tokenizer(lines, 295)


def test_a_vocabulary_larger_than_the_text_is_an_error():
    with pytest.raises(DataError, match=r"vocab_size=5000; sentencepiece says: Vocabulary size too high"):
        train_tokenizer(["few words"], 5000)


def test_a_missing_model_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.model cannot be read"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_damaged_model_is_an_error(tokenizer: Tokenizer, tmp_path: Path, keep: int):
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(tokenizer.path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"damaged\.model is damaged"):
        Tokenizer(damaged)
