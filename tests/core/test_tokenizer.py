"""Tokenizers against a plain implementation of byte-level BPE, and against ids that transformers gave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from realtime_serve._core import GgufFile
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.tokenizer import Tokenizer

# The patterns as their models publish them, with \s as the Unicode property that it is there.
SPACE, NO_SPACE = r"\p{White_Space}", r"\P{White_Space}"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^{SPACE}\p{{L}}\p{{N}}]+|{SPACE}+(?!{NO_SPACE})|{SPACE}+"
GPT4 = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|DIGITS| ?[^{SPACE}\p{{L}}\p{{N}}]+[\r\n]*"
    rf"|{SPACE}*[\r\n]+|{SPACE}+(?!{NO_SPACE})|{SPACE}+"
)
LLAMA3 = GPT4.replace("DIGITS", r"\p{N}{1,3}")
QWEN2 = GPT4.replace("DIGITS", r"\p{N}")

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


# Unassigned characters are left out: which those are depends on each library's version of Unicode.
characters = st.characters(exclude_categories=["Cs", "Cn"])
texts = st.lists(
    st.one_of(
        st.text(characters, max_size=6),
        st.text(" \t\r\n\u00a0\u3000", max_size=4),
        st.text("0123456789½²٣Ⅷ", max_size=7),
        st.sampled_from(
            ["the", " quick", "'re", "'LL", "'", "naïve", "def f(x):\n    ", "世界", "🎉", "👩‍👩‍👧", "_", "=="]
        ),
    ),
    max_size=8,
).map("".join)


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

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
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
        "token_type": [1] * (len(TOKENS) - len(EXTRA)) + list(EXTRA.values()),
        "merges": MERGES,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (values | changes).items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def load_gguf(tmp_path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.load(write_gguf(tmp_path / "model.gguf", **changes))


CUTS = {
    "gpt-2": lambda text: regex.findall(GPT2, text),
    "smollm": cut_smollm,
    "llama-bpe": lambda text: regex.findall(LLAMA3, text),
    "qwen2": lambda text: regex.findall(QWEN2, text),
}


@pytest.fixture(scope="module", params=CUTS)
def cutting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, PlainBpe]:
    """A pre-tokenizer with merges that would join much of what it cuts apart."""
    merges = [*MERGES, "Ġ Ġ", "ĠĠ Ġ", "Ċ Ċ", "o 1", "! Ċ", "! !", "Ġ 1", "' r", "Ġ !", "č Ċ", "l e", "ã Ģ", "ãĢ Ģ"]
    tokens = [*BASE, *(merge.replace(" ", "") for merge in merges)]
    path = tmp_path_factory.mktemp("cutting") / "model.gguf"
    write_gguf(path, pre=request.param, tokens=tokens, merges=merges, token_type=None, add_bos_token=False)
    return Tokenizer.load(path), PlainBpe(tokens, merges, CUTS[request.param])


@given(
    text=st.lists(
        st.sampled_from(
            [*"hello hé12345\n\r\t!'", "   ", "12345", "hello", "'re", "'S", "'Ll", "世", "½", "Ⅷ٣", "\u3000"]
        ),
        max_size=12,
    ).map("".join)
)
def test_pre_tokenizers(cutting: tuple[Tokenizer, PlainBpe], text: str) -> None:
    tokenizer, plain = cutting
    assert tokenizer.encode(text) == plain.encode(text)


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    assert load_gguf(tmp_path, pre="qwen2").encode("e\u0308") == [ID["Ã"], ID["«"]]  # ë


def test_llama3_takes_pieces_that_are_tokens(tmp_path: Path) -> None:
    tokens = [*TOKENS, "llo"]  # that no merge makes
    tokenizer = load_gguf(tmp_path, pre="llama-bpe", tokens=tokens, token_type=None, add_bos_token=False)
    assert tokenizer.encode("llo") == [len(TOKENS)]
    tokenizer = load_gguf(tmp_path, pre="gpt-2", tokens=tokens, token_type=None)
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
        ({"model": "llama"}, UnsupportedModelError, "tokenizer model 'llama' is not supported; supported: 'gpt2'"),
        (
            {"pre": "tekken"},
            UnsupportedModelError,
            "pre-tokenizer 'tekken' is not supported; supported: 'gpt-2', 'smollm', 'llama-bpe', 'llama3', 'llama-v3',"
            " 'qwen2'",
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


# Hugging Face folders


def write_folder(folder: Path, **configs: Any) -> Path:
    """The small vocabulary as a tokenizer.json, with a post-processor that puts <s> before every text."""
    backend = tokenizers.Tokenizer(
        models.BPE({token: id for token, id in ID.items() if token not in EXTRA}, [tuple(m.split(" ")) for m in MERGES])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token, kind in EXTRA.items():
        backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    for name, values in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_a_folder_encodes_as_its_tokenizer_json_says(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_folder(tmp_path))
    ids = [BOS, *[ID["hello"], THINK] * 10, EOS]  # neither cut to 4 nor filled up to 8
    assert tokenizer.encode("hello<think>" * 10 + "</s>") == ids
    assert tokenizer.encode("") == [BOS]
    printed = tokenizer.vocabulary_tokens()
    assert b"".join(printed[token] for token in ids) == b"hello<think>" * 10
    assert printed[:256] == [bytes([byte]) for byte in range(256)]
    assert (printed[ID["世"]], printed[ID["Ã©"]]) == ("世".encode(), "é".encode())
    assert tokenizer.special_tokens == {BOS, EOS, EOT}
    assert tokenizer.size == len(TOKENS)


@pytest.mark.parametrize(
    ("configs", "eos"),
    [
        ({}, set()),
        ({"config": {"eos_token_id": EOS}}, {EOS}),
        ({"config": {"eos_token_id": [EOS, EOT]}}, {EOS, EOT}),
        ({"config": {"eos_token_id": EOS}, "generation_config": {"eos_token_id": [EOT]}}, {EOT}),
        ({"config": {"eos_token_id": EOS}, "generation_config": {"eos_token_id": None}}, {EOS}),
        ({"config": {"eos_token_id": EOS}, "generation_config": {}}, {EOS}),
    ],
)
def test_a_folders_end_tokens(tmp_path: Path, configs: dict[str, Any], eos: set[int]) -> None:
    assert Tokenizer.load(write_folder(tmp_path, **configs)).eos_tokens == eos


def change_tokenizer_json(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ids_that_a_folder_leaves_out_print_as_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    model["vocab"]["z"] = 300
    change_tokenizer_json(tmp_path, model=model)
    printed = Tokenizer.load(tmp_path).vocabulary_tokens()
    assert len(printed) == 301
    assert (printed[300], printed[ID["z"]], printed[299]) == (b"z", b"", b"")


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "none"),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, "Metaspace"),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}]}, "Sequence"),
    ],
)
def test_decoders_that_are_not_byte_level(tmp_path: Path, decoder: Any, name: str) -> None:
    change_tokenizer_json(write_folder(tmp_path), decoder=decoder)
    with pytest.raises(UnsupportedModelError) as refused:
        Tokenizer.load(tmp_path)
    assert str(refused.value) == f"{tmp_path}/tokenizer.json: decoder {name} is not supported; supported: ByteLevel"


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not there, and the model's tokenizer is read from it$"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":\n "none"}')
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: not a tokenizer: .+$"):
        Tokenizer.load(tmp_path)
    write_folder(tmp_path, config={"eos_token_id": "</s>"})
    with pytest.raises(ModelLoadError, match=rf"/config\.json: eos_token_id must be ids of the {len(TOKENS)} tokens$"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"/config\.json: not readable as JSON: .+$"):
        Tokenizer.load(tmp_path)
