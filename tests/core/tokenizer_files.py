"""GGUF files with a tokenizer and no weights, and texts that are hard to cut, for tests of tokenizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
from hypothesis import strategies as st

from realtime_serve import _core

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_tokenizer_gguf(path: Path, architecture: str = "llama", **values: Any) -> Path:
    """A file with these `tokenizer.ggml.*` keys; None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
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


def streamed(tokens: list[bytes]) -> str:
    """The text of tokens that come one by one, as it is sent to a client."""
    detokenizer = _core.Detokenizer()
    return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()


def frequent_characters(texts: Iterable[str], count: int) -> list[str]:
    """The alphabet of a vocabulary: a trainer that chooses it itself chooses at random among the equally frequent."""
    counts = Counter("".join(texts).replace(" ", "▁"))
    return sorted(counts, key=lambda character: (-counts[character], character))[:count]


# A text of each kind that tokenizers differ in.
HARD_TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 'quoted', I'LL say; they've HELLO'd McDonaldsHTTPServer.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। สวัสดีชาวโลก. გამარჯობა. Բարեւ.",
    "你好，世界。こんにちは、世界！カタカナ 안녕하세요 세계 ᠮᠣᠩᠭᠣᠯ བོད་སྐད ᏣᎳᎩ አማርኛ ꦧꦱꦗꦮ 𐤀𐤁 𒀀𒀁 𝔘𝔫𝔦",
    "naïve café Ünïcödé e\u0301 a\u0308\u0323 o\u0328\u0304 q\u0307\u0323 \u1100\u1161\u11a8 \u0301alone",
    "QX\u0301Bc ﬁ Ǆ ǅ ß ſ İ ı ʰ ªº",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷🏴󠁧󠁢󠁥󠁮󠁧󠁿 👍🏽 ❤️ 🎉🎉🎉 1️⃣ ☃ ☃️",
    " leading,  two,   three,        eight and trailing    ",
    "\ttab\t\ttabs \r\n crlf\r\n\r\n\n\nlines\n   \n \x0b\x0c\x85",
    "nbsp\u00a0\u00a0 line\u2028par\u2029ideo\u3000\u3000 thin\u2009zero\u200b",
    "\x00\x01\x1b[31m\x7f\x80\x9f\ufeffmark\ufeff \u061c\u202e\u2066",
    "3 33 333 3333 33333 1234567890123456789012345678901234567890 3.14e-10 0x1F ½ x² ٣٤ Ⅷ 十二 १२३",
    "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x)]  # all\n\n\nclass A(B):\n\tpass\n",
    "for (auto& [k, v] : m) { if (k->x != v.y) return std::move(v); }  // !!! ??? ... --- === <<>> &&||",
    "!\n//x ?\r\n/ /\n\n/y --/ \n/z it's IT'S 'Re we'llX can'T",
    "\u0378 \U000e0fff \U0002fffe \ue000 \uffff unassigned",
    "▁▁ ▁literal <0x41> <s >\\n &amp; %20 http://a.b/c?d=e#f user@example.com",
    "",
    " ",
    "\n",
]

# Characters that are assigned in one library's version of Unicode and not in the other's are left out.
_characters = st.characters(exclude_categories=["Cs", "Cn"])
_pieces = st.one_of(
    st.text(_characters, max_size=6),
    st.text(" \t\r\n\u00a0\u2028\u3000\x85", max_size=6),
    st.text("0123456789½²٣Ⅷ", max_size=7),
    st.text("abAB'sStT ▁/!\n\u0301", max_size=8),
    st.tuples(st.sampled_from(HARD_TEXTS), st.integers(0, 80), st.integers(1, 30)).map(
        lambda cut: cut[0][cut[1] : cut[1] + cut[2]]
    ),
)
texts = st.lists(_pieces, max_size=8).map("".join)
