"""Text → token ids, and what each id prints as; from a GGUF file's own metadata or a folder's tokenizer.json.

Byte-level vocabularies only: every token is a run of bytes, and each byte has a printable character that stands for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from realtime_serve._core import GgufFile, decode_byte_level
from realtime_serve.errors import ModelLoadError, UnsupportedModelError

T = TypeVar("T")


class Tokenizer:
    """Immutable; any thread may call it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        entries: list[str],
        *,
        source: str,
        special: Iterable[int],
        verbatim: Iterable[int],
        eos: Iterable[int],
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
    ) -> None:
        """`entries` has the vocabulary by id: byte-level but for the ids in `special`, which print as nothing, and
        those in `verbatim`, which are plain text. Ids of `prefix` and `suffix` go around every text.
        """
        self.special_tokens = frozenset(special)
        self.eos_tokens = frozenset(eos)
        self._backend = backend
        self._entries = entries
        self._source = source
        self._verbatim = frozenset(verbatim) - self.special_tokens
        self._prefix, self._suffix = prefix, suffix

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer of a GGUF file or a Hugging Face folder.

        Raises UnsupportedModelError or ModelLoadError in one line that names the file and what is wrong.
        """
        return _from_folder(path) if path.is_dir() else _from_gguf(path)

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return len(self._entries)

    def encode(self, text: str) -> list[int]:
        """As the model's own tokenizer does it: a special token's name in the text becomes that token, and bytes that
        the vocabulary lacks are left out.
        """
        return [*self._prefix, *self._backend.encode(text).ids, *self._suffix]

    def vocabulary_tokens(self) -> list[bytes]:
        """What each token prints as, by id; nothing for special tokens and for ids that are not used."""
        spelled = self._entries.copy()
        for token in self.special_tokens | self._verbatim:
            spelled[token] = ""
        try:
            printed: list[bytes] = decode_byte_level(spelled)
        except ValueError as error:
            raise ModelLoadError(f"{self._source}: {error}") from None
        for token in self._verbatim:
            printed[token] = self._entries[token].encode()
        return printed


class _PreTokenizer(NamedTuple):
    """How text is cut before merges apply."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    """A piece that is a token as it stands is taken so, whatever its merges would make of it."""
    add_bos: bool = False
    """Where the file does not say."""


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _words_split(digits: str) -> str:
    """GPT-4's pattern, which its descendants vary in how many digits stay together."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# GPT-2's pattern is built into the library.
_GPT2 = _PreTokenizer(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False))
_SMOLLM = _PreTokenizer(
    lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
)
_LLAMA3 = _PreTokenizer(lambda: _split(_words_split(r"\p{N}{1,3}")), ignore_merges=True, add_bos=True)
_QWEN2 = _PreTokenizer(lambda: _split(_words_split(r"\p{N}")), normalizer=normalizers.NFC)

# By `tokenizer.ggml.pre`. What each stands for is in the tokenizer.json of the models that it is named after, and in
# llama.cpp's src/llama-vocab.cpp, which chose the names (and has the rules for BOS).
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}

# Values of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
# A file's `eos_token_id` is one id, and chat models end with another one than base models: files from before
# `eot_token_id` have that by its name alone.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_NAMES = frozenset({"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"})


def _from_gguf(path: Path) -> Tokenizer:
    try:
        metadata = _Metadata(GgufFile(path).metadata, str(path))
    except RuntimeError as error:
        raise ModelLoadError(str(error)) from None
    kind = metadata.require("model", str)
    if kind != "gpt2":
        raise UnsupportedModelError(f"{path}: tokenizer model {kind!r} is not supported; supported: 'gpt2'")
    name = metadata.require("pre", str)
    pre = _PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(map(repr, _PRE_TOKENIZERS))
        raise UnsupportedModelError(f"{path}: pre-tokenizer {name!r} is not supported; supported: {known}")

    entries = metadata.array("tokens", str)
    types = metadata.array("token_type", int, default=[])
    if types and len(types) != len(entries):
        raise ModelLoadError(f"{path}: {len(entries)} tokens, and the types of {len(types)}")
    control = {token for token, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)}
    named = (metadata.token(key, len(entries)) for key in _END_KEYS)
    eos = {token for token in named if token is not None}
    eos |= {token for token in control if entries[token] in _END_NAMES}
    special = control | eos
    verbatim = {token for token, kind in enumerate(types) if kind == _USER_DEFINED}

    backend = metadata.build_bpe(entries, pre)
    backend.add_special_tokens([_added(entries[token], special=True) for token in sorted(special)])
    backend.add_tokens([_added(entries[token], special=False) for token in sorted(verbatim - special)])
    for unused in (token for token, kind in enumerate(types) if kind == _UNUSED):
        entries[unused] = ""
    return Tokenizer(
        backend,
        entries,
        source=str(path),
        special=special,
        verbatim=verbatim,
        eos=eos,
        prefix=metadata.around("bos", len(entries), default=pre.add_bos),
        suffix=metadata.around("eos", len(entries), default=False),
    )


def _added(text: str, *, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


class _Metadata:
    """A GGUF file's `tokenizer.ggml.*` keys, checked as they are read: the file may hold anything."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None or type(value) is kind:
            return value
        raise self._error(key, f"is not of type {kind.__name__}")

    def require(self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise self._error(key, "is missing")
        return value

    def array(self, key: str, kind: type[T], default: list[T] | None = None) -> list[T]:
        values = self.require(key, list) if default is None else self.get(key, list)
        if values is None:
            return default or []
        if not all(type(value) is kind for value in values):
            raise self._error(key, f"has elements that are not of type {kind.__name__}")
        return values.copy()

    def token(self, key: str, size: int) -> int | None:
        """A token id, if the file has it."""
        token = self.get(key, int)
        if token is not None and not 0 <= token < size:
            raise self._error(key, f"is {token}, and there are {size} tokens")
        return token

    def around(self, name: str, size: int, *, default: bool) -> tuple[int, ...]:
        """The token that goes before or after every text, if one does."""
        wanted = self.get(f"add_{name}_token", bool)
        if not (default if wanted is None else wanted):
            return ()
        token = self.token(f"{name}_token_id", size)
        if token is None:
            raise self._error(f"{name}_token_id", "is missing, and is to be added to every text")
        return (token,)

    def build_bpe(self, entries: list[str], pre: _PreTokenizer) -> tokenizers.Tokenizer:
        try:
            merges = [(left, right) for left, right in (merge.split(" ") for merge in self.array("merges", str))]
        except ValueError:
            raise self._error("merges", "has an element that is not two tokens with a space between them") from None
        vocabulary = {entry: token for token, entry in enumerate(entries)}
        try:
            bpe = models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges)
        except Exception as error:  # the library raises no narrower type
            raise ModelLoadError(f"{self._source}: tokens and merges do not fit together: {_line(error)}") from None
        backend = tokenizers.Tokenizer(bpe)
        backend.pre_tokenizer = pre.build()
        if pre.normalizer is not None:
            backend.normalizer = pre.normalizer()
        return backend

    def _error(self, key: str, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self._source}: metadata key 'tokenizer.ggml.{key}' {what}")


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"{path}: not there, and the model's tokenizer is read from it")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ModelLoadError(f"{path}: not a tokenizer: {_line(error)}") from None
    if not isinstance(backend.decoder, decoders.ByteLevel):
        name = type(backend.decoder).__name__ if backend.decoder is not None else "none"
        raise UnsupportedModelError(f"{path}: decoder {name} is not supported; supported: ByteLevel")
    # What training or batch use left there is not for prompts.
    backend.no_truncation()
    backend.no_padding()

    added = backend.get_added_tokens_decoder()
    ids = backend.get_vocab(with_added_tokens=True)
    entries = [""] * (max(ids.values(), default=-1) + 1)
    for entry, token in ids.items():
        entries[token] = entry
    return Tokenizer(
        backend,
        entries,
        source=str(path),
        special=(token for token, entry in added.items() if entry.special),
        verbatim=added,
        eos=_folder_eos(folder, len(entries)),
    )


def _folder_eos(folder: Path, size: int) -> list[int]:
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ModelLoadError(f"{path}: not readable as JSON: {_line(error)}") from None
        eos = values.get("eos_token_id") if isinstance(values, dict) else None
        if eos is None:
            continue
        tokens = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and 0 <= token < size for token in tokens):
            raise ModelLoadError(f"{path}: eos_token_id must be ids of the {size} tokens")
        return tokens
    return []


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
