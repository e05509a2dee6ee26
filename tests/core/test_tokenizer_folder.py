"""Tokenizers of Hugging Face folders, against the tokenizers library's own encoding and decoding."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import HARD_TEXTS, frequent_characters, streamed, texts
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.tokenizer import Tokenizer

MERGES = [("h", "e"), ("l", "o"), ("he", "l"), ("hel", "lo"), ("Ã", "©")]
SPECIAL, PLAIN = ("<s>", "</s>", "<|eot_id|>"), ("<think>", "世")
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in MERGES), *SPECIAL, *PLAIN]
ID = {token: id for id, token in enumerate(TOKENS)}
BOS, EOS, EOT, THINK = (ID[token] for token in ("<s>", "</s>", "<|eot_id|>", "<think>"))


def write_folder(folder: Path, **configs: Any) -> Path:
    """The small vocabulary as a tokenizer.json, with a post-processor that puts <s> before every text."""
    backend = tokenizers.Tokenizer(
        models.BPE({token: id for token, id in ID.items() if token not in SPECIAL + PLAIN}, MERGES)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token in SPECIAL + PLAIN:
        backend.add_tokens([AddedToken(token, normalized=False, special=token in SPECIAL)])
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
    assert sorted(printed[:256]) == [bytes([byte]) for byte in range(256)]
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


# Decoders of the SentencePiece kind

REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
DECODERS = {
    "llama": {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE, STRIP]},
    "gemma": {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE]},
    "metaspace": METASPACE,
    "metaspace and bytes": {"type": "Sequence", "decoders": [METASPACE, FALLBACK, FUSE]},
}


def write_sentencepiece_folder(folder: Path, decoder: dict[str, Any]) -> Path:
    """Pieces of hard texts, bytes for rare characters, and three added tokens."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    alphabet = frequent_characters(HARD_TEXTS, 90)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=bytes_,
        show_progress=False,
    )
    backend.train_from_iterator(HARD_TEXTS * 2, trainer)
    backend.pre_tokenizer = None
    backend.save(str(folder / "tokenizer.json"))
    # The bytes must not be found in texts.
    change_tokenizer_json(folder, added_tokens=[], decoder=decoder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    backend.add_tokens([AddedToken("▁▁▁<tool>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=DECODERS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    folder = write_sentencepiece_folder(tmp_path_factory.mktemp("folder"), DECODERS[request.param])
    return Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def check_continuation(pair: tuple[Tokenizer, tokenizers.Tokenizer], prompt: str, answer: str) -> None:
    """What is streamed behind a prompt is what decoding both gives more than decoding the prompt."""
    tokenizer, library = pair
    ids = tokenizer.encode(answer)
    assert ids == library.encode(answer).ids
    before = tokenizer.encode(prompt)
    printed = tokenizer.vocabulary_tokens()
    text = streamed([printed[token] for token in ids])
    assert library.decode(before + ids) == library.decode(before) + text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_sentencepiece_decoders_on_hard_texts(pair: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    check_continuation(pair, "a prompt", text)


@given(prompt=texts.filter(bool), answer=texts)
def test_sentencepiece_decoders(pair: tuple[Tokenizer, tokenizers.Tokenizer], prompt: str, answer: str) -> None:
    check_continuation(pair, prompt, answer)


@given(data=st.data())
def test_added_tokens_of_sentencepiece_folders(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], data: st.DataObject
) -> None:
    parts = st.sampled_from(["▁▁▁<tool>", "<s>", "</s>", " a ", "  "])
    check_continuation(pair, "a prompt", "".join(data.draw(st.lists(parts, max_size=6))))


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "none"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
        ({"type": "Sequence", "decoders": []}, "Sequence of nothing"),
        ({"type": "Sequence", "decoders": [FUSE]}, "Sequence of Fuse"),
        ({"type": "Sequence", "decoders": [FALLBACK, FUSE, REPLACE]}, "Sequence of ByteFallback, Fuse, Replace"),
        # Before tokens are joined it strips each of them.
        ({"type": "Sequence", "decoders": [REPLACE, FALLBACK, STRIP]}, "Sequence of Replace, ByteFallback, Strip"),
        ({"type": "Sequence", "decoders": [REPLACE, FUSE, STRIP | {"stop": 1}]}, "Sequence of Replace, Fuse, Strip"),
        ({"type": "Sequence", "decoders": [REPLACE, FUSE, STRIP | {"start": 2}]}, "Sequence of Replace, Fuse, Strip"),
        ({"type": "Sequence", "decoders": [REPLACE | {"pattern": {"Regex": "▁"}}]}, "Sequence of Replace"),
        ({"type": "Sequence", "decoders": [REPLACE | {"content": "_"}]}, "Sequence of Replace"),
        (
            {"type": "Sequence", "decoders": [REPLACE, REPLACE | {"pattern": {"String": "_"}}]},
            "Sequence of Replace, Replace",
        ),
    ],
)
def test_decoders_that_are_not_supported(tmp_path: Path, decoder: Any, name: str) -> None:
    change_tokenizer_json(write_folder(tmp_path), decoder=decoder)
    with pytest.raises(UnsupportedModelError) as refused:
        Tokenizer.load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}/tokenizer.json: decoder {name} is not supported; supported: ByteLevel, Metaspace, and a Sequence"
        " of Replace (▁ by a space), ByteFallback, Fuse, Strip (a space)"
    )


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
