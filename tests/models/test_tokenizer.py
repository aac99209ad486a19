"""Text to ids and back; a stream gives the same text as decoding at once, whatever the tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import StreamDecoder, Tokenizer
from tests.models.families import write_tokenizer


@cache
def demo() -> Tokenizer:
    return Tokenizer.from_directory(DEMO_DIRECTORY, vocab_size=4096)


@cache
def byte_fallback() -> Tokenizer:
    """The kind that Llama 2 and Mistral use: U+2581 for spaces, byte tokens for the unknown, first space stripped."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = [("▁", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(tokenizer, {"bos_token": "<s>"}, add_bos=True)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.stream()
    return "".join(decoder.push(token) for token in ids) + decoder.flush()


TEXTS = ["Hello, world", "  two  spaces ", "naïve café 🙂👩‍👩‍👧 漢字\n\tx", "", "def f(x):\n    return x"]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(text: str) -> None:
    assert demo().decode(demo().encode(text, add_bos=False)) == text
    assert streamed(demo(), demo().encode(text, add_bos=True)) == text
    ids = byte_fallback().encode(text)
    assert ids[:1] == [1]
    assert streamed(byte_fallback(), ids) == byte_fallback().decode(ids)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_a_stream_gives_any_text_whole(text: str) -> None:
    for tokenizer in (demo(), byte_fallback()):
        ids = tokenizer.encode(text, add_bos=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(ids=st.lists(st.one_of(st.integers(0, 4095), st.integers(3, 258)), max_size=30))
def test_a_stream_of_any_tokens_equals_decoding_at_once(ids: list[int]) -> None:
    assert streamed(demo(), ids) == demo().decode(ids)


def test_unfinished_characters_are_held_back() -> None:
    ids = demo().encode("🙂!", add_bos=False)
    decoder = demo().stream()
    pieces = [decoder.push(token) for token in ids]
    assert len(ids) > 2
    assert pieces[-1] == "!"
    assert "".join(pieces) == "🙂!"
    assert all("\ufffd" not in piece for piece in pieces)
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_a_long_stream_keeps_only_a_few_tokens() -> None:
    decoder = StreamDecoder(demo())
    for token in demo().encode("word after word, " * 200, add_bos=False):
        decoder.push(token)
        assert len(decoder._ids) < 12


def test_special_tokens() -> None:
    tokenizer = demo()
    assert tokenizer.bos_token_id == 0
    assert tokenizer.encode("a", add_bos=True)[0] == 0
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=True)  # as its files ask
    assert tokenizer.encode("<|bos|>a", add_bos=False)[0] == 0
    assert tokenizer.decode([0, 1]) == ""
    assert tokenizer.decode([0], skip_special=False) == "<|bos|>"
    assert tokenizer.token_to_id("<|eos|>") == 1
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.vocab_size == 4096


def test_bos_is_not_put_twice(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    write_tokenizer(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "add_bos_token": True}))
    ids = Tokenizer.from_directory(tmp_path).encode("fox")
    assert ids[0] == 0
    assert ids.count(0) == 1


def test_bad_folders_and_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer is missing$"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokenizer\.model alone is not read"):
        Tokenizer.from_directory(tmp_path)
    for text in ("", "{", "{}", '{"model": {"type": "BPE"}}', "\0\0", '{"version": "9.0", "model": null}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match="not a readable tokenizer"):
            Tokenizer.from_directory(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="the model knows only 100 tokens"):
        Tokenizer.from_directory(tmp_path, vocab_size=100)
    with pytest.raises(InputError, match=r"cannot be encoded: not UTF-8 at the end of 'caf.*udce9'"):
        demo().encode("caf\udce9 au lait")  # what a shell hands over in Latin-1
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(tmp_path)
