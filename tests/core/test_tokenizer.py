"""Byte-level GGUF tokenizers against a plain implementation, and against ids that transformers gave."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from hypothesis import given
from tokenizer_files import CONTROL, HARD_TEXTS, NORMAL, UNUSED, USER_DEFINED, streamed, texts, write_tokenizer_gguf
from tokenizers import models, pre_tokenizers, trainers

from realtime_serve._core import GgufFile
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.tokenizer import Tokenizer
from realtime_serve.tokenizer.byte_level import PRE_TOKENIZERS

# The patterns as their models publish them, with \s as the Unicode property that it is there.
SPACE, NO_SPACE = r"\p{White_Space}", r"\P{White_Space}"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^{SPACE}\p{{L}}\p{{N}}]+|{SPACE}+(?!{NO_SPACE})|{SPACE}+"
GPT4 = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|DIGITS| ?[^{SPACE}\p{{L}}\p{{N}}]+[\r\n]*"
    rf"|{SPACE}*[\r\n]+|{SPACE}+(?!{NO_SPACE})|{SPACE}+"
)
LLAMA3 = GPT4.replace("DIGITS", r"\p{N}{1,3}")
QWEN2 = GPT4.replace("DIGITS", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    rf"| ?[^{SPACE}\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}*[\r\n]+|{SPACE}+(?!{NO_SPACE})|{SPACE}+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|\p{{N}}{{1,3}}| ?[^{SPACE}\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}*[\r\n]+|{SPACE}+(?!{NO_SPACE})|{SPACE}+"
)

# Bytes that print stand for themselves, the others for the characters from U+0100 on.
PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = {byte: chr(byte) for byte in PRINTING}
ALPHABET |= {byte: chr(0x100 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTING)))}


class PlainBpe:
    """Cut into pieces, then in each the pair that was merged first in training, again and again."""

    def __init__(self, entries: list[str], merges: list[str], cut: Callable[[str], list[str]]) -> None:
        self.ids = {entry: token for token, entry in enumerate(entries)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.cut = cut

    def encode(self, text: str) -> list[int]:
        return [self.ids[symbol] for piece in self.cut(text) for symbol in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        symbols = [ALPHABET[byte] for byte in piece.encode() if ALPHABET[byte] in self.ids]
        while ranked := [(self.ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in self.ranks]:
            _, i = min(ranked)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return symbols


def cut_smollm(text: str) -> list[str]:
    return [piece for part in regex.findall(r"\p{N}|\P{N}+", text) for piece in regex.findall(GPT2, part)]


# The default model


@pytest.fixture(scope="session")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return Tokenizer.load(default_model_path)


@pytest.fixture(scope="session")
def plain(default_model_path: Path) -> PlainBpe:
    metadata = GgufFile(default_model_path).metadata
    return PlainBpe(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"], cut_smollm)


# From transformers.AutoTokenizer.from_pretrained(folder, gguf_file=…), which takes 14 s, with the pre-tokenizer of the
# model's tokenizer.json: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]).
RECORDED = [
    ("The capital of France is", [504, 3575, 282, 4649, 314]),
    (
        "Once upon a time, in 1984, there were 12345 birds.",
        [6403, 1980, 253, 655, 28, 281, 216, 33, 41, 40, 36, 28, 665, 592, 216, 33, 34, 35, 36, 37, 4255, 30],
    ),
    (
        "def f(n):\n    return n if n < 2 else f(n - 1)\n",
        [1604, 275, 24, 94, 727, 472, 1003, 304, 585, 304, 2067, 216, 34, 1745, 275, 24, 94, 731, 216, 33, 25, 198],
    ),
    (
        "  two spaces,\ttab\r\nnext  \n\n  end  ",
        [216, 827, 5600, 28, 197, 15999, 201, 198, 11282, 256, 8866, 1112, 256],
    ),
    ("I'm we'll they've 'quoted' IT'S", [57, 5248, 392, 3060, 502, 3543, 637, 385, 5036, 23, 9627, 23, 67]),
    ("Ünïcödé naïve café", [142, 246, 94, 25972, 83, 7466, 84, 2756, 15486, 46494, 37366]),
    ("Привет, мир!", [155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175, 17]),
    ("مرحبا بالعالم", [21706, 20602, 44626, 31462, 10805, 45726, 22208, 34966, 22208, 21706]),
    ("你好，世界", [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230]),
    ("½ x² ٣٤ Ⅷ 十二", [16738, 1792, 19133, 216, 164, 113, 164, 114, 216, 173, 223, 117, 13223, 231, 219, 16736, 230]),
    ("\u00a0\u2003\u3000nbsp", [15442, 321, 221, 12109, 218, 94, 32093]),
    ("e\u0301 decomposed", [85, 151, 219, 48304]),
    (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198],
    ),
    ("<|im_start|> <|im_end|><|endoftext|>", [1, 216, 2, 0]),
    ("", []),
]


@pytest.mark.parametrize(("text", "ids"), RECORDED)
def test_the_default_model_has_transformers_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


@given(text=texts)
def test_the_default_model_is_plain_bpe(tokenizer: Tokenizer, plain: PlainBpe, text: str) -> None:
    assert tokenizer.encode(text) == plain.encode(text)


@pytest.fixture(scope="session")
def printed(tokenizer: Tokenizer) -> list[bytes]:
    return tokenizer.vocabulary_tokens()


@given(text=texts)
def test_encoded_text_prints_as_it_was(tokenizer: Tokenizer, printed: list[bytes], text: str) -> None:
    # Six control characters and the lead bytes of characters beyond U+3FFFF are in no token of this vocabulary.
    lacking = set(range(256)) - {token[0] for token in printed if len(token) == 1}
    assert lacking == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    expected = bytes(byte for byte in text.encode() if byte not in lacking)
    assert b"".join(printed[token] for token in tokenizer.encode(text)) == expected


def test_the_default_models_special_tokens(tokenizer: Tokenizer, printed: list[bytes]) -> None:
    assert tokenizer.size == len(printed) == 49152
    assert tokenizer.special_tokens == frozenset(range(17))
    # <|im_end|>, which the file names, and <|endoftext|>.
    assert tokenizer.eos_tokens == {0, 2}
    assert [token for token, text in enumerate(printed) if not text] == list(range(17))


def test_a_fork_after_encoding_is_silent(default_model_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from realtime_serve.tokenizer import Tokenizer\n"
        "Tokenizer.load(Path(sys.argv[1])).encode('some text ' * 1000)\n"
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0)\n"
        "else: Tokenizer.load(Path(sys.argv[1])).encode('some text')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", code, str(default_model_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout + done.stderr == ""


# Small GGUF files

MERGES = ["h e", "he l", "l o", "hel lo", "Ġ hello", "1 2", "12 3", "3 4", "Ã ©", "' S"]
BASE = [ALPHABET[byte] for byte in range(256)]
MERGED = [merge.replace(" ", "") for merge in MERGES]
EXTRA = {
    "<s>": CONTROL,
    "</s>": CONTROL,
    "<|eot_id|>": CONTROL,
    "<think>": USER_DEFINED,
    "世": USER_DEFINED,
    "[PAD]": UNUSED,
}
TOKENS = [*BASE, *MERGED, *EXTRA]
ID = {token: id for id, token in enumerate(TOKENS)}
BOS, EOS, EOT, THINK = (ID[token] for token in ("<s>", "</s>", "<|eot_id|>", "<think>"))


def write_gguf(path: Path, **changes: Any) -> Path:
    """A vocabulary of bytes, some merges and some special tokens; a change of None leaves a key out."""
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": TOKENS,
        "token_type": [NORMAL] * (len(TOKENS) - len(EXTRA)) + list(EXTRA.values()),
        "merges": MERGES,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return write_tokenizer_gguf(path, **(values | changes))


def load_gguf(tmp_path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.load(write_gguf(tmp_path / "model.gguf", **changes))


CUTS: dict[str, Callable[[str], list[str]]] = {
    "gpt-2": lambda text: regex.findall(GPT2, text),
    "olmo": lambda text: regex.findall(GPT2, unicodedata.normalize("NFC", text)),
    "smollm": cut_smollm,
    "dbrx": lambda text: regex.findall(LLAMA3, text),
    "llama-bpe": lambda text: regex.findall(LLAMA3, text),
    "qwen2": lambda text: regex.findall(QWEN2, unicodedata.normalize("NFC", text)),
    "gpt-4o": lambda text: regex.findall(GPT4O, text),
    "tekken": lambda text: regex.findall(TEKKEN, text),
}


@pytest.fixture(scope="module")
def learnt() -> tuple[list[str], list[str]]:
    """Tokens and merges of hard texts that nothing cut: many would join what a pre-tokenizer cuts apart."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = [text[at : at + 12] for text in HARD_TEXTS for at in range(0, len(text), 6)] * 3
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(pieces, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    assert len(merges) > 600
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


@pytest.fixture(scope="module", params=CUTS)
def cutting(
    request: pytest.FixtureRequest, learnt: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PlainBpe]:
    tokens, merges = learnt
    path = tmp_path_factory.mktemp("cutting") / "model.gguf"
    changes = {"token_type": None, "bos_token_id": None, "eos_token_id": None, "add_bos_token": False}
    write_gguf(path, pre=request.param, tokens=tokens, merges=merges, **changes)
    return Tokenizer.load(path), PlainBpe(tokens, merges, CUTS[request.param])


def check_cutting(cutting: tuple[Tokenizer, PlainBpe], text: str) -> None:
    tokenizer, plain = cutting
    ids = tokenizer.encode(text)
    assert ids == plain.encode(text)
    printed = tokenizer.vocabulary_tokens()
    assert streamed([printed[token] for token in ids]) == "".join(plain.cut(text))


def check_cuts(pre: str, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    cut = [piece for piece, _ in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
    assert cut == ["".join(ALPHABET[byte] for byte in piece.encode()) for piece in CUTS[pre](text)]


@pytest.mark.parametrize("pre", CUTS)
def test_cuts_of_hard_texts(pre: str) -> None:
    for text in HARD_TEXTS:
        check_cuts(pre, text)


@pytest.mark.parametrize("pre", CUTS)
@given(text=texts)
def test_cuts(pre: str, text: str) -> None:
    check_cuts(pre, text)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_pre_tokenizers_on_hard_texts(cutting: tuple[Tokenizer, PlainBpe], text: str) -> None:
    check_cutting(cutting, text)


@given(text=texts)
def test_pre_tokenizers(cutting: tuple[Tokenizer, PlainBpe], text: str) -> None:
    check_cutting(cutting, text)


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    assert load_gguf(tmp_path, pre="qwen2").encode("e\u0308") == [ID["Ã"], ID["«"]]  # ë


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_pieces_that_are_tokens_whatever_their_merges(tmp_path: Path, pre: str) -> None:
    tokens = [*TOKENS, "llo"]  # that no merge makes
    tokenizer = load_gguf(tmp_path, pre=pre, tokens=tokens, token_type=None, add_bos_token=False)
    assert tokenizer.encode("llo") == [len(TOKENS)]
    tokenizer = load_gguf(tmp_path, pre="dbrx", tokens=tokens, token_type=None)
    assert tokenizer.encode("llo") == [ID["l"], ID["lo"]]


def test_named_tokens_in_text(tmp_path: Path) -> None:
    tokenizer = load_gguf(tmp_path)
    assert tokenizer.encode("hello<s><think>世</s> hello") == [ID["hello"], BOS, THINK, ID["世"], EOS, ID["Ġhello"]]
    printed = tokenizer.vocabulary_tokens()
    assert len(printed) == tokenizer.size == len(TOKENS)
    assert printed[:256] == [bytes([byte]) for byte in range(256)]
    named = {token: printed[ID[token]].decode() for token in ("Ã©", "Ġhello", "<think>", "世", "<s>", "[PAD]")}
    assert named == {"Ã©": "é", "Ġhello": " hello", "<think>": "<think>", "世": "世", "<s>": "", "[PAD]": ""}
    assert tokenizer.special_tokens == {BOS, EOS, EOT}


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [BOS], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [], [EOS]),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
        ({"pre": "llama-bpe"}, [BOS], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"pre": "tekken"}, [BOS], []),
        ({"pre": "dbrx"}, [], []),
    ],
)
def test_tokens_around_text(tmp_path: Path, changes: dict[str, Any], before: list[int], after: list[int]) -> None:
    tokenizer = load_gguf(tmp_path, **changes)
    assert tokenizer.encode("hello") == [*before, ID["hello"], *after]
    assert tokenizer.encode("") == [*before, *after]


def test_end_tokens(tmp_path: Path) -> None:
    assert load_gguf(tmp_path).eos_tokens == {EOS, EOT}
    assert load_gguf(tmp_path, eos_token_id=None).eos_tokens == {EOT}
    assert load_gguf(tmp_path, eot_token_id=THINK, eom_token_id=BOS).eos_tokens == {EOS, EOT, THINK, BOS}
    # The ends that a file names are special even if it does not type them so; a name alone is not enough.
    tokenizer = load_gguf(tmp_path, token_type=None)
    assert tokenizer.eos_tokens == tokenizer.special_tokens == {EOS}
    assert tokenizer.encode("</s>") == [EOS]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "t5"}, UnsupportedModelError, "tokenizer model 't5' is not supported; supported: 'gpt2', 'llama'"),
        (
            {"pre": "viking"},
            UnsupportedModelError,
            "pre-tokenizer 'viking' is not supported; supported: 'gpt-2', 'phi-2', 'olmo', 'smollm', 'dbrx',"
            " 'llama-bpe', 'llama3', 'llama-v3', 'qwen2', 'deepseek-r1-qwen', 'gpt-4o', 'tekken'",
        ),
        ({"model": None}, ModelLoadError, "metadata key 'tokenizer.ggml.model' is missing"),
        ({"pre": None}, ModelLoadError, "metadata key 'tokenizer.ggml.pre' is missing"),
        ({"tokens": None}, ModelLoadError, "metadata key 'tokenizer.ggml.tokens' is missing"),
        ({"merges": None}, ModelLoadError, "metadata key 'tokenizer.ggml.merges' is missing"),
        ({"pre": 7}, ModelLoadError, "metadata key 'tokenizer.ggml.pre' is not of type str"),
        (
            {"tokens": [1, 2]},
            ModelLoadError,
            "metadata key 'tokenizer.ggml.tokens' has elements that are not of type str",
        ),
        ({"token_type": [1, 3]}, ModelLoadError, f"{len(TOKENS)} tokens, and the types of 2"),
        (
            {"merges": ["h e", "hello"]},
            ModelLoadError,
            "metadata key 'tokenizer.ggml.merges' has an element that is not two tokens with a space between them",
        ),
        (
            {"merges": ["x y"]},
            ModelLoadError,
            "tokens and merges do not fit together: Error while initializing BPE: Token `xy` out of vocabulary",
        ),
        (
            {"eos_token_id": 9999},
            ModelLoadError,
            f"metadata key 'tokenizer.ggml.eos_token_id' is 9999, and there are {len(TOKENS)} tokens",
        ),
        (
            {"add_bos_token": True, "bos_token_id": None},
            ModelLoadError,
            "metadata key 'tokenizer.ggml.bos_token_id' is missing, and is to be added to every text",
        ),
    ],
)
def test_refused_files(tmp_path: Path, changes: dict[str, Any], kind: type[ModelLoadError], message: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        load_gguf(tmp_path, **changes)
    assert str(refused.value) == f"{tmp_path / 'model.gguf'}: {message}"
    assert type(refused.value) is kind


def test_a_token_outside_the_byte_alphabet(tmp_path: Path) -> None:
    tokenizer = load_gguf(tmp_path, token_type=None)  # so that "世" is no longer text
    with pytest.raises(ModelLoadError, match=rf"model\.gguf: vocabulary entry {ID['世']}: the character at byte 0"):
        tokenizer.vocabulary_tokens()


def test_files_that_are_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ModelLoadError, match=r"model\.gguf"):
        Tokenizer.load(path)
    path.write_bytes(b"GGUF and no more")
    with pytest.raises(ModelLoadError, match=r"model\.gguf"):
        Tokenizer.load(path)
