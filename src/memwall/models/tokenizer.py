"""Text to token ids and back, from a model folder's `tokenizer.json`, and detokenization of a stream token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.models.config import checked_directory

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 256_000_000
UNFINISHED = "\ufffd"  # what decoding puts for bytes that are no whole character (yet)
CHARACTER_BYTES = 4  # the longest character in UTF-8
MAX_HELD_TOKENS = 32
WORD_BEGIN = "\u2581"
"""Stands for a blank in vocabularies of sentencepiece."""


class Tokenizer:
    """The `tokenizers` library behind the few calls that the rest of memwall needs."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special_tokens: Mapping[str, str], add_bos: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = dict(special_tokens)
        self._add_bos = add_bos
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        self._added = {number: token.content.encode() for number, token in added.items() if not token.special}
        self._of_bytes: dict[str, int] | None = None

    @staticmethod
    def from_directory(directory: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Reads `tokenizer.json` and the special tokens; `vocab_size` of the model, when given, bounds the ids."""
        import tokenizers

        folder = checked_directory(directory)
        path = folder / "tokenizer.json"
        if not path.is_file():
            other = " (tokenizer.model alone is not read: save the tokenizer with transformers first)"
            hint = other if (folder / "tokenizer.model").is_file() else ""
            raise InputError(f"{path}: the tokenizer is missing{hint}")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise InputError(f"{path}: larger than {MAX_TOKENIZER_BYTES:,} bytes, which no tokenizer is")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for all faults of the file
            raise InputError(f"{path}: not a readable tokenizer: {str(error)[:200]}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _settings(folder)
        # counted, not listed: a dictionary of a large vocabulary would stay in the process as tens of megabytes
        largest = max([tokenizer.get_vocab_size(with_added_tokens=False) - 1, *tokenizer.get_added_tokens_decoder()])
        if vocab_size is not None and largest >= vocab_size:
            raise InputError(f"{path}: has token ids up to {largest}, but the model knows only {vocab_size} tokens")
        return Tokenizer(tokenizer, special_tokens(settings), settings.get("add_bos_token") is True)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        token = self.special_tokens.get("bos_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids. `add_bos`: True puts the begin token in front, False leaves all special tokens out, None does what
        the
        model's files say. Special tokens written out in the text (chat templates do that) are recognized in each case.
        """
        try:
            text.encode()
            ids = list(self._tokenizer.encode(text, add_special_tokens=add_bos is None).ids)
        except UnicodeEncodeError as error:
            near = text[max(error.start - 20, 0) : error.end].encode(errors="backslashreplace").decode()
            raise InputError(f"the text cannot be encoded: not UTF-8 at the end of {near!r}") from None
        except TypeError as error:
            raise InputError(f"the text cannot be encoded: {error}") from None
        begin = self.bos_token_id
        wanted = self._add_bos if add_bos is None else add_bos
        if wanted and begin is not None and (add_bos or not ids or ids[0] != begin):
            ids.insert(0, begin)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to the text, which may end within a character; None for special tokens and unknown ids."""
        if self.is_special(token_id):
            return None
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        if self._of_bytes is None:
            self._of_bytes = _byte_letters() if "ByteLevel" in str(self._tokenizer.decoder) else {}
        if self._of_bytes:
            return bytes(self._of_bytes[letter] for letter in token if letter in self._of_bytes)
        if len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return str(token).replace(WORD_BEGIN, " ").encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for one stream of tokens."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Gives the text of a stream as soon as it is certain: whole characters only, leading spaces kept.

    Tokens are decoded together with the piece before them, since many decoders treat the first token of a sequence
    differently. Only that piece and the tokens not yet given out are kept, so that a step costs the same however long
    the stream is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._num_context = 0  # how many of the ids belong to the piece before
        self._num_given = 0  # characters of the decoded ids that were given out
        self._num_unfinished = 0  # tokens since the text last ended with a whole character

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token; empty while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        self._num_unfinished = self._num_unfinished + 1 if text.endswith(UNFINISHED) else 0
        if 0 < self._num_unfinished < MAX_HELD_TOKENS:
            # as many tokens as a character has bytes and still no text: only the last mark can change
            return self._give(text, len(text) - 1) if self._num_unfinished >= CHARACTER_BYTES else ""
        piece = self._give(text, len(text))
        if piece:
            self._num_unfinished = 0
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._num_given = len(self._decode(self._ids))
        return piece

    def flush(self) -> str:
        """What is left at the end of the stream; an unfinished character becomes U+FFFD. The decoder starts anew."""
        text = self._decode(self._ids)
        piece = self._give(text, len(text))
        self._ids, self._num_context, self._num_given, self._num_unfinished = [], 0, 0, 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def _give(self, text: str, stop: int) -> str:
        piece = text[self._num_given : stop]
        self._num_given = max(self._num_given, stop)
        return piece


def _byte_letters() -> dict[str, int]:
    """Letters that stand for bytes in byte-level vocabularies, as GPT-2 gave them out: printable ones for themselves,
    the others in order from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` over `special_tokens_map.json`, both optional."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = checked_json.read(folder / name)
            settings.update({key: value for key, value in found.items() if value is not None})
    return settings


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like as plain strings; they stand as strings or as objects with `content`."""
    found = {}
    for name, value in settings.items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(content, str):
                found[name] = content
    return found


def read_settings(directory: str | Path) -> dict[str, Any]:
    """The tokenizer settings of a model folder, for the chat template too."""
    return _settings(checked_directory(directory))
