"""The tokenizer of a Hugging Face folder: its tokenizer.json, and what its configurations say of the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.tokenizer.parts import Encoder, TokenizerParts, one_line
from realtime_serve.tokenizer.vocabulary import (
    SPACE,
    ByteLevelVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    byte_of,
)

_SUPPORTED = (
    f"ByteLevel, Metaspace, and a Sequence of Replace ({SPACE} by a space), ByteFallback, Fuse, Strip (a space)"
)


class _Spelling(NamedTuple):
    """How a decoder that is not byte-level reads one token; what it does to whole texts is left out."""

    space: str
    byte_fallback: bool


def read_folder(folder: Path) -> TokenizerParts:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"{path}: not there, and the model's tokenizer is read from it")
    import tokenizers  # 60 ms that a worker need not spend on a GGUF file

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise ModelLoadError(f"{path}: not a tokenizer: {one_line(error)}") from None
    # What training or batch use left there is not for prompts.
    backend.no_truncation()
    backend.no_padding()

    added = backend.get_added_tokens_decoder()
    ids = backend.get_vocab(with_added_tokens=True)
    entries = [""] * (max(ids.values(), default=-1) + 1)
    for entry, token in ids.items():
        entries[token] = entry
    special = frozenset(token for token, entry in added.items() if entry.special)

    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    vocabulary: Vocabulary
    if decoder["type"] == "ByteLevel":
        vocabulary = ByteLevelVocabulary(entries, source=str(path), verbatim=added)
    else:
        spelling = _spelling(decoder)
        if spelling is None:
            raise UnsupportedModelError(
                f"{path}: decoder {_describe(decoder)} is not supported; supported: {_SUPPORTED}"
            )
        fallback = [
            token for token, entry in enumerate(entries) if spelling.byte_fallback and byte_of(entry) is not None
        ]
        vocabulary = SentencePieceVocabulary(entries, fallback=fallback, space=spelling.space)
    return TokenizerParts(
        vocabulary,
        special=special,
        eos=_end_tokens(folder, len(entries)),
        make_encoder=lambda: Encoder(backend),
    )


def _spelling(decoder: dict[str, Any]) -> _Spelling | None:
    """None for a decoder whose text is not its tokens' texts in a row."""
    match decoder:
        case {"type": "Metaspace", "replacement": str(pattern)}:
            return _Spelling(pattern, byte_fallback=False)
        case {"type": "Sequence", "decoders": list(steps)}:
            pass
        case _:
            return None
    space: str | None = None
    byte_fallback = fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": " "} if (
                space is None and not fused
            ):
                space = pattern
            case {"type": "Metaspace", "replacement": str(pattern)} if space is None and not fused:
                space = pattern
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0} if fused:
                pass
            case _:
                return None
    return None if space is None else _Spelling(space, byte_fallback)


def _describe(decoder: dict[str, Any]) -> str:
    if decoder["type"] != "Sequence":
        return str(decoder["type"])
    return f"Sequence of {', '.join(step['type'] for step in decoder['decoders']) or 'nothing'}"


def _end_tokens(folder: Path, size: int) -> frozenset[int]:
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ModelLoadError(f"{path}: not readable as JSON: {one_line(error)}") from None
        eos = values.get("eos_token_id") if isinstance(values, dict) else None
        if eos is None:
            continue
        tokens = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and 0 <= token < size for token in tokens):
            raise ModelLoadError(f"{path}: eos_token_id must be ids of the {size} tokens")
        return frozenset(tokens)
    return frozenset()
