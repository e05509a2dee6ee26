"""GGUF files with SentencePiece vocabularies, against plain implementations and tokenizers of the families' shapes."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import (
    BYTE,
    CONTROL,
    HARD_TEXTS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    frequent_characters,
    streamed,
    texts,
    write_tokenizer_gguf,
)
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.tokenizer import Tokenizer
from realtime_serve.tokenizer.sentencepiece import merges_of

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Family(NamedTuple):
    architecture: str
    control: list[str]
    user_defined: tuple[str, ...] = ()
    space_before: bool = True
    rstrip: frozenset[str] = frozenset()
    """Named tokens that take the white space behind them along."""


FAMILIES = {
    "llama": Family("llama", ["<s>", "</s>", "[INST]", "[/INST]"]),
    "gemma": Family(
        "gemma2",
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        (*("\n" * n for n in range(1, 6)), *("▁" * n for n in range(2, 8)), "<table>"),
        space_before=False,
    ),
    "phi3": Family(
        "phi3",
        ["<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>"],
        ("<|tool|>",),
        rstrip=frozenset({"</s>", "<|user|>", "<|end|>", "<|tool|>"}),
    ),
}


def train_pieces(size: int) -> list[str]:
    """Pieces in the order in which they were merged, and behind them the characters that are frequent enough."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    texts = [text for text in HARD_TEXTS for _ in range(3)] + ["aaa abab aabaa"] * 9
    alphabet = frequent_characters(texts, 90)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    characters = [piece for piece, _ in pieces if len(piece) == 1]
    return [piece for piece, _ in pieces if len(piece) > 1] + ["▁▁", "▁▁▁", "▁▁▁▁"] + characters


class Model(NamedTuple):
    """A family's vocabulary by id, and its tokenizer as its tokenizer.json has it."""

    family: Family
    entries: list[str]
    types: list[int]
    scores: list[float]
    reference: tokenizers.Tokenizer

    def write(self, path: Path, **changes: Any) -> Path:
        values = {
            "model": "llama",
            "tokens": self.entries,
            "token_type": self.types,
            "scores": self.scores,
            "bos_token_id": self.entries.index(self.family.control[0]),
            "add_bos_token": False,
            "add_space_prefix": self.family.space_before,
        }
        return write_tokenizer_gguf(path, self.family.architecture, **(values | changes))


def make_model(family: Family) -> Model:
    pieces = [piece for piece in train_pieces(420) if piece not in family.user_defined]
    kinds = [
        ("<unk>", UNKNOWN),
        *((entry, CONTROL) for entry in family.control),
        *((entry, BYTE) for entry in BYTES),
        *((entry, USER_DEFINED) for entry in family.user_defined),
        *((entry, NORMAL) for entry in pieces),
    ]
    entries = [entry for entry, _ in kinds]
    types = [kind for _, kind in kinds]
    scores = [-float(token) if kind == NORMAL else -1000.0 for token, kind in enumerate(types)]
    return Model(family, entries, types, scores, make_reference(family, entries, pieces))


def make_reference(family: Family, entries: list[str], pieces: list[str]) -> tokenizers.Tokenizer:
    ids = {entry: token for token, entry in enumerate(entries)}
    # SentencePiece looks for the longest run of spaces: as merges, those before all others and the longest first.
    ranked = [entry for entry in family.user_defined[::-1] if entry.startswith("▁")] + pieces
    rank = {piece: at for at, piece in enumerate(ranked)}
    merges = [(left, right) for left, right in product(ranked, repeat=2) if left + right in rank]
    merges.sort(key=lambda merge: (rank[merge[0] + merge[1]], -len(merge[0])))
    reference = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family.space_before:
        reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        reference.normalizer = replace
    reference.decoder = decoders.Sequence(steps)
    for entry in ["<unk>", *family.control]:
        token = AddedToken(entry, special=True, normalized=False, rstrip=entry in family.rstrip)
        reference.add_special_tokens([token])
    for entry in family.user_defined:
        if not entry.startswith("▁"):
            reference.add_tokens([AddedToken(entry, normalized=False, rstrip=entry in family.rstrip)])
    assert reference.get_vocab_size() == len(entries)
    return reference


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Model:
    return make_model(FAMILIES[request.param])


@pytest.fixture(scope="module")
def tokenizer(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(model.write(tmp_path_factory.mktemp("sentencepiece") / "model.gguf"))


@pytest.fixture(scope="module")
def printed(tokenizer: Tokenizer) -> list[bytes]:
    return tokenizer.vocabulary_tokens()


class PlainSentencePiece:
    """By the definition: of all neighbours that make a piece, those of the best score are joined, the leftmost first,
    again and again; tokens that a user defined are whole from the start.
    """

    def __init__(self, model: Model) -> None:
        kinds = list(zip(model.entries, model.types, model.scores, strict=True))
        self.ids = {entry: token for token, entry in enumerate(model.entries)}
        self.scores = {entry: score for entry, kind, score in kinds if kind == NORMAL}
        self.whole = sorted((entry for entry, kind, _ in kinds if kind == USER_DEFINED), key=len, reverse=True)

    def encode(self, text: str) -> list[int]:
        symbols = regex.findall("|".join([*map(regex.escape, self.whole), "."]), text.replace(" ", "▁"), regex.DOTALL)
        frozen = frozenset(self.whole)
        while True:
            candidates = [
                (-self.scores[left + right], i)
                for i, (left, right) in enumerate(pairwise(symbols))
                if left + right in self.scores and not {left, right} & frozen
            ]
            if not candidates:
                break
            _, i = min(candidates)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [token for symbol in symbols for token in self.tokens(symbol)]

    def tokens(self, symbol: str) -> list[int]:
        if symbol in self.scores or symbol in self.whole:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def check_encoding(model: Model, tokenizer: Tokenizer, text: str) -> None:
    plain = PlainSentencePiece(model)
    before = "▁" if model.family.space_before and text else ""
    assert tokenizer.encode(text) == plain.encode(before + text)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts(model: Model, tokenizer: Tokenizer, printed: list[bytes], text: str) -> None:
    check_encoding(model, tokenizer, text)
    ids = tokenizer.encode(text)
    assert ids == model.reference.encode(text).ids
    before = " " if model.family.space_before and text else ""
    assert streamed([printed[token] for token in ids]) == before + text.replace("▁", " ")


@given(text=texts)
def test_encoding_is_by_score(model: Model, tokenizer: Tokenizer, text: str) -> None:
    check_encoding(model, tokenizer, text)


@given(text=texts)
def test_encoding_is_that_of_the_familys_tokenizer_json(model: Model, tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == model.reference.encode(text).ids


@given(data=st.data())
def test_named_tokens(model: Model, tokenizer: Tokenizer, data: st.DataObject) -> None:
    named = [*model.family.control, *model.family.user_defined]
    text = "".join(data.draw(st.lists(st.one_of(st.sampled_from([*named, " ", "  ", "\n"]), texts), max_size=6)))
    assert tokenizer.encode(text) == model.reference.encode(text).ids


@given(data=st.data())
def test_generated_text_follows_its_prompt(
    model: Model, tokenizer: Tokenizer, printed: list[bytes], data: st.DataObject
) -> None:
    """Prompt and answer are what the reference makes of both: an answer's first space is not taken away."""
    prompt = tokenizer.encode(data.draw(texts.filter(bool)))
    answer = model.reference.encode(data.draw(texts)).ids
    before, whole = (model.reference.decode(ids) for ids in (prompt, prompt + answer))
    assert whole == before + streamed([printed[token] for token in answer])


@given(data=st.data())
def test_streamed_text_is_the_whole_decoded(model: Model, printed: list[bytes], data: st.DataObject) -> None:
    """Of any tokens in any order, so also of bytes that are parts of characters and of ends within one."""
    ids = data.draw(st.lists(st.integers(0, len(printed) - 1) | st.integers(0xC0, 0x105), max_size=20))
    tokens = [printed[token] for token in ids]
    assert streamed(tokens) == b"".join(tokens).decode(errors="replace")


@given(character=st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), cut=st.integers(1, 3))
def test_a_characters_bytes_come_out_as_one(printed: list[bytes], model: Model, character: str, cut: int) -> None:
    tokens = [printed[model.entries.index(f"<0x{byte:02X}>")] for byte in character.encode()]
    assert tokens == [bytes([byte]) for byte in character.encode()]
    assert streamed([b"a", *tokens, b"b"]) == f"a{character}b"
    assert streamed([b"a", *tokens[:-1][:cut]]) == ("a\ufffd" if len(tokens) > 1 else "a")


def test_what_tokens_print(model: Model, tokenizer: Tokenizer, printed: list[bytes]) -> None:
    assert tokenizer.size == len(printed) == len(model.entries)
    for entry, kind, text in zip(model.entries, model.types, printed, strict=True):
        if kind == BYTE:
            assert text == bytes.fromhex(entry[3:5])
        elif kind in (CONTROL, UNKNOWN):
            assert text == b""
        else:
            assert text == entry.replace("▁", " ").encode()
    special = {token for token, kind in enumerate(model.types) if kind in (CONTROL, UNKNOWN)}
    assert tokenizer.special_tokens == special


# One family is enough for what they share


@pytest.fixture(scope="module")
def llama() -> Model:
    return make_model(FAMILIES["llama"])


@pytest.fixture(scope="module")
def gemma() -> Model:
    return make_model(FAMILIES["gemma"])


def load(model: Model, tmp_path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.load(model.write(tmp_path / "model.gguf", **changes))


def replaced(values: list[Any], at: int, value: Any) -> list[Any]:
    return [*values[:at], value, *values[at + 1 :]]


def test_tokens_around_text(llama: Model, tmp_path: Path) -> None:
    bos, eos = (llama.entries.index(entry) for entry in ("<s>", "</s>"))
    plain = load(llama, tmp_path).encode("abc")
    assert load(llama, tmp_path, add_bos_token=None).encode("abc") == [bos, *plain]
    assert load(llama, tmp_path, add_bos_token=True).encode("") == [bos]
    assert load(llama, tmp_path, add_eos_token=True, eos_token_id=eos).encode("abc") == [*plain, eos]


def test_a_space_goes_before_text_where_the_file_does_not_say(llama: Model, tmp_path: Path) -> None:
    space = llama.entries.index("▁")
    assert load(llama, tmp_path, add_space_prefix=None).encode("\x00")[0] == space
    assert load(llama, tmp_path, add_space_prefix=False).encode("\x00") == [llama.entries.index("<0x00>")]


def test_end_tokens(llama: Model, gemma: Model, tmp_path: Path) -> None:
    eos = llama.entries.index("</s>")
    assert load(llama, tmp_path, eos_token_id=eos).eos_tokens == {eos}
    eos, turn = (gemma.entries.index(entry) for entry in ("<eos>", "<end_of_turn>"))
    assert load(gemma, tmp_path, eos_token_id=eos).eos_tokens == {eos, turn}
    # Gemma's own model file has it as one that a user defined.
    types = gemma.types.copy()
    types[turn] = USER_DEFINED
    tokenizer = load(gemma, tmp_path, token_type=types)
    assert tokenizer.eos_tokens == {turn}
    assert turn in tokenizer.special_tokens
    assert tokenizer.vocabulary_tokens()[turn] == b""


def test_runs_of_spaces_may_be_spelled_with_spaces(gemma: Model, tmp_path: Path) -> None:
    user_defined = {token for token, kind in enumerate(gemma.types) if kind == USER_DEFINED}
    entries = [entry.replace("▁", " ") if token in user_defined else entry for token, entry in enumerate(gemma.entries)]
    assert entries != gemma.entries
    tokenizer = load(gemma, tmp_path, tokens=entries)
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == gemma.reference.encode(text).ids
    assert tokenizer.vocabulary_tokens()[gemma.entries.index("▁▁")] == b"  "


@pytest.mark.parametrize("spelled", ["▁▁", "  "])
def test_defined_spaces_where_a_space_goes_before_text(llama: Model, tmp_path: Path, spelled: str) -> None:
    at, space, nul = (llama.entries.index(entry) for entry in ("▁▁", "▁", "<0x00>"))
    changes = {"tokens": replaced(llama.entries, at, spelled), "token_type": replaced(llama.types, at, USER_DEFINED)}
    tokenizer = load(llama, tmp_path, **changes)
    assert tokenizer.encode("\x00  \x00") == [space, nul, at, space, nul]
    assert tokenizer.vocabulary_tokens()[at] == b"  "


def test_merges_are_ranked_by_what_they_make() -> None:
    scores = {"a": -5.0, "b": -6.0, "c": -7.0, "bc": -3.0, "ab": -2.0, "abc": -1.0, "aab": -2.0, "xa": 0.0}
    merges = [("ab", "c"), ("a", "bc"), ("a", "b"), ("a", "ab"), ("b", "c")]
    assert merges_of(scores) == merges


def test_equal_scores_are_in_the_order_of_ids(llama: Model, tmp_path: Path) -> None:
    tokenizer = load(llama, tmp_path, scores=[0.0] * len(llama.entries))
    for text in HARD_TEXTS:
        assert tokenizer.encode(text) == llama.reference.encode(text).ids


def test_unused_tokens(llama: Model, tmp_path: Path) -> None:
    unused = llama.entries.index("▁▁")
    types = llama.types.copy()
    types[unused] = UNUSED
    tokenizer = load(llama, tmp_path, token_type=types)
    assert unused in load(llama, tmp_path).encode(" \x00")
    assert unused not in tokenizer.encode(" \x00")
    assert tokenizer.vocabulary_tokens()[unused] == b""


def test_a_long_text(llama: Model, tmp_path: Path) -> None:
    text = HARD_TEXTS[0] * 2000
    tokenizer = load(llama, tmp_path)
    assert tokenizer.encode(text) == llama.reference.encode(text).ids


def test_refused_files(llama: Model, tmp_path: Path) -> None:
    byte_a, piece = llama.entries.index("<0x41>"), llama.entries.index("▁▁")
    size = len(llama.entries)

    def refusal(kind: type[ModelLoadError] = ModelLoadError, **changes: Any) -> str:
        with pytest.raises(ModelLoadError) as refused:
            load(llama, tmp_path, **changes)
        assert type(refused.value) is kind
        assert "\n" not in str(refused.value)
        return str(refused.value).removeprefix(f"{tmp_path / 'model.gguf'}: ")

    assert refusal(token_type=None) == "metadata key 'tokenizer.ggml.token_type' is missing"
    assert refusal(token_type=llama.types[1:]) == f"{size} tokens, and the types of {size - 1}"
    assert refusal(scores=None) == "metadata key 'tokenizer.ggml.scores' is missing"
    assert refusal(scores=llama.scores[1:]) == f"{size} tokens, and the scores of {size - 1}"
    not_numbers = "metadata key 'tokenizer.ggml.scores' has elements that are not numbers"
    assert refusal(scores=["0"] * size) == not_numbers
    assert refusal(scores=replaced(llama.scores, piece, float("nan"))) == not_numbers
    assert refusal(token_type=replaced(llama.types, byte_a, NORMAL)) == "no token is the byte <0x41>"
    doubled = replaced(llama.entries, byte_a, "<0x42>")
    assert refusal(tokens=doubled) == "no token is the byte <0x41>"
    assert refusal(tokens=[*llama.entries, "<0x42>"], token_type=[*llama.types, BYTE], scores=[*llama.scores, 0.0]) == (
        "more than one token is the byte <0x42>"
    )
    misspelled = "is of type byte, and not spelled as <0x00> to <0xFF>"
    assert refusal(tokens=replaced(llama.entries, byte_a, "A")) == f"token 'A' {misspelled}"
    assert refusal(tokens=replaced(llama.entries, byte_a, "<0x041>")) == f"token '<0x041>' {misspelled}"
    assert refusal(tokens=replaced(llama.entries, piece, "▁▁▁")) == "more than one token is '▁▁▁'"
    assert refusal(tokens=replaced(llama.entries, piece, "a" * 1025)) == (
        f"token {piece} has 1025 characters; at most 1024 can be served"
    )
    assert (
        refusal(eos_token_id=size)
        == f"metadata key 'tokenizer.ggml.eos_token_id' is {size}, and there are {size} tokens"
    )
    assert refusal(bos_token_id=None, add_bos_token=True) == (
        "metadata key 'tokenizer.ggml.bos_token_id' is missing, and is to be added to every text"
    )
    assert refusal(UnsupportedModelError, remove_extra_whitespaces=True) == (
        "a tokenizer that removes extra white space is not supported"
    )
    not_utf8 = replaced([entry.encode() for entry in llama.entries], piece, b"\xff")
    assert refusal(tokens=not_utf8).startswith("its tokens make no tokenizer: ")


@settings(deadline=None)
@given(data=st.data())
def test_any_file_loads_or_is_refused(
    llama: Model, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Entries, types and scores that nobody wrote on purpose."""
    values: dict[str, list[Any]] = {"tokens": llama.entries, "token_type": llama.types, "scores": llama.scores}
    strange = {
        "tokens": st.sampled_from(["", "▁", "<0x0A>", "<s>", "\x00", "a" * 1024]) | st.text(max_size=3),
        "token_type": st.integers(-1, 9),
        "scores": st.floats(width=32),
    }
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(values)))
        values[key] = replaced(values[key], data.draw(st.integers(0, len(values[key]) - 1)), data.draw(strange[key]))
    path = llama.write(tmp_path_factory.mktemp("any") / "model.gguf", **values)
    try:
        tokenizer = Tokenizer.load(path)
    except ModelLoadError:
        return
    assert all(0 <= token < tokenizer.size for token in tokenizer.encode(HARD_TEXTS[0]))
    assert len(tokenizer.vocabulary_tokens()) == len(llama.entries)
