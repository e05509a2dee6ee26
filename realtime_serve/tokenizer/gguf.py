"""The tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from realtime_serve._core import GgufFile
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.tokenizer.metadata import TokenizerMetadata
from realtime_serve.tokenizer.parts import Encoder, TokenizerParts, one_line
from realtime_serve.tokenizer.vocabulary import (
    SPACE,
    ByteLevelVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    byte_of,
)

if TYPE_CHECKING:
    import tokenizers

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# A file's `eos_token_id` is one id, and chat models end with another one than base models: files from before
# `eot_token_id` have that by its name alone.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_NAMES = frozenset(
    {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}
)
# Characters of a piece. The ways to cut a piece in two take up memory with their square.
_LONGEST_PIECE = 1024
# Of Phi-3's named tokens these alone leave the white space behind them.
_PHI3_KEEPING_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class _Tokens(NamedTuple):
    """The vocabulary by id, and which ids are not plain pieces of text."""

    entries: list[str]
    types: list[int]
    special: frozenset[int]
    user_defined: frozenset[int]
    eos: frozenset[int]

    def of_type(self, kind: int) -> list[int]:
        return [token for token, its_kind in enumerate(self.types) if its_kind == kind]


class _Model(NamedTuple):
    vocabulary: Vocabulary
    make_backend: Callable[[], tuple[tokenizers.Tokenizer, bool]]
    """Also says whether a text begins with the bos token, where the file does not."""


def read_gguf(path: Path) -> TokenizerParts:
    try:
        metadata = TokenizerMetadata(GgufFile(path).metadata, str(path))
    except RuntimeError as error:
        raise ModelLoadError(str(error)) from None
    kind = metadata.require("model", str)
    build = _MODELS.get(kind)
    if build is None:
        known = ", ".join(map(repr, _MODELS))
        raise UnsupportedModelError(f"{path}: tokenizer model {kind!r} is not supported; supported: {known}")
    tokens = _tokens(metadata)
    size = len(tokens.entries)
    model = build(metadata, tokens)

    def make_encoder() -> Encoder:
        backend, add_bos = model.make_backend()
        return Encoder(
            backend,
            prefix=metadata.around("bos", size, default=add_bos),
            suffix=metadata.around("eos", size, default=False),
        )

    return TokenizerParts(model.vocabulary, special=tokens.special, eos=tokens.eos, make_encoder=make_encoder)


def _tokens(metadata: TokenizerMetadata) -> _Tokens:
    entries = metadata.array("tokens", str)
    types = metadata.array("token_type", int, default=[])
    if types and len(types) != len(entries):
        raise metadata.error(f"{len(entries)} tokens, and the types of {len(types)}")
    control = {token for token, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)}
    user_defined = {token for token, kind in enumerate(types) if kind == _USER_DEFINED}
    named = (metadata.token(key, len(entries)) for key in _END_KEYS)
    eos = {token for token in named if token is not None}
    eos |= {token for token in control | user_defined if entries[token] in _END_NAMES}
    special = control | eos
    return _Tokens(entries, types, frozenset(special), frozenset(user_defined - special), frozenset(eos))


def _byte_level(metadata: TokenizerMetadata, tokens: _Tokens) -> _Model:
    names = tokens.entries.copy()  # an unused token's as well
    for unused in tokens.of_type(_UNUSED):
        tokens.entries[unused] = ""
    vocabulary = ByteLevelVocabulary(tokens.entries, source=metadata.source, verbatim=tokens.user_defined)
    return _Model(vocabulary, lambda: _byte_level_backend(metadata, tokens, names))


def _byte_level_backend(
    metadata: TokenizerMetadata, tokens: _Tokens, names: list[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    from realtime_serve.tokenizer.byte_level import PRE_TOKENIZERS, build_byte_level

    name = metadata.require("pre", str)
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(map(repr, PRE_TOKENIZERS))
        raise UnsupportedModelError(f"{metadata.source}: pre-tokenizer {name!r} is not supported; supported: {known}")
    try:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata.array("merges", str))]
    except ValueError:
        raise metadata.key_error("merges", "has an element that is not two tokens with a space between them") from None
    ids = {entry: token for token, entry in enumerate(names)}
    try:
        backend = build_byte_level(ids, merges, pre)
    except Exception as error:  # the library raises no narrower type
        raise metadata.error(f"tokens and merges do not fit together: {one_line(error)}") from None
    backend.add_special_tokens([_named(names[token], special=True) for token in sorted(tokens.special)])
    backend.add_tokens([_named(names[token]) for token in sorted(tokens.user_defined)])
    return backend, pre.add_bos


def _sentencepiece(metadata: TokenizerMetadata, tokens: _Tokens) -> _Model:
    entries = tokens.entries
    if not tokens.types:
        raise metadata.key_error("token_type", "is missing")
    if metadata.get("remove_extra_whitespaces", bool):
        raise UnsupportedModelError(f"{metadata.source}: a tokenizer that removes extra white space is not supported")
    space_before = metadata.get("add_space_prefix", bool) is not False
    fallback = tokens.of_type(_BYTE)
    _check_bytes(metadata, [entries[token] for token in fallback])
    for token in fallback:
        entries[token] = f"<0x{byte_of(entries[token]):02X}>"
    # As some converters write them already.
    for token in tokens.user_defined:
        entries[token] = entries[token].replace(SPACE, " ")
    for unused in tokens.of_type(_UNUSED):
        entries[unused] = ""
    vocabulary = SentencePieceVocabulary(entries, fallback=fallback)
    return _Model(vocabulary, lambda: _sentencepiece_backend(metadata, tokens, space_before=space_before))


def _sentencepiece_backend(
    metadata: TokenizerMetadata, tokens: _Tokens, *, space_before: bool
) -> tuple[tokenizers.Tokenizer, bool]:
    from realtime_serve.tokenizer.sentencepiece import build_sentencepiece

    entries = tokens.entries
    scores = _piece_scores(metadata, tokens)
    ids = {entry: token for token, entry in enumerate(entries) if entry}
    if len(ids) < sum(map(bool, entries)):
        twice = next(entry for entry, count in Counter(entries).items() if entry and count > 1)
        raise metadata.error(f"more than one token is {twice!r}")
    try:
        backend = build_sentencepiece(ids, scores, space_before=space_before)
    except Exception as error:  # the library raises no narrower type
        raise metadata.error(f"its tokens make no tokenizer: {one_line(error)}") from None

    keeping_space = _PHI3_KEEPING_SPACE if metadata.architecture == "phi3" else frozenset(entries)
    backend.add_special_tokens(
        [
            _named(entries[token], special=True, rstrip=entries[token] not in keeping_space)
            for token in sorted(tokens.special)
        ]
    )
    # Where no space is put before each part of a text, they are looked for with spaces escaped, as SentencePiece does:
    # Gemma's runs of spaces.
    backend.add_tokens(
        [
            _named(entries[token], rstrip=entries[token] not in keeping_space, normalized=not space_before)
            for token in sorted(tokens.user_defined)
        ]
    )
    return backend, True


def _piece_scores(metadata: TokenizerMetadata, tokens: _Tokens) -> dict[str, float]:
    """By piece, of those that text is made into."""
    scores = metadata.scores()
    if len(scores) != len(tokens.entries):
        raise metadata.error(f"{len(tokens.entries)} tokens, and the scores of {len(scores)}")
    pieces = {}
    for token in tokens.of_type(_NORMAL):
        piece = tokens.entries[token]
        if len(piece) > _LONGEST_PIECE:
            raise metadata.error(f"token {token} has {len(piece)} characters; at most {_LONGEST_PIECE} can be served")
        if piece and token not in tokens.special:
            pieces[piece] = scores[token]
    return pieces


# By `tokenizer.ggml.model`.
_MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _check_bytes(metadata: TokenizerMetadata, entries: list[str]) -> None:
    """That there is one token for each byte, so that every text has its tokens."""
    bytes_ = Counter(map(byte_of, entries))
    if bytes_[None]:
        wrong = next(entry for entry in entries if byte_of(entry) is None)
        raise metadata.error(f"token {wrong!r} is of type byte, and not spelled as <0x00> to <0xFF>")
    for byte in range(256):
        if bytes_[byte] != 1:
            count = "no token is" if not bytes_[byte] else "more than one token is"
            raise metadata.error(f"{count} the byte <0x{byte:02X}>")


def _named(
    text: str, *, special: bool = False, rstrip: bool = False, normalized: bool = False
) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    return AddedToken(text, special=special, rstrip=rstrip, normalized=normalized)
