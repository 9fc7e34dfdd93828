"""The bytes that a token stands for, read from the tokenizer's vocabulary.

Decoding a token alone does not give them: one that is part of a character decodes to U+FFFD, and
some decoders drop the space before a text's first word.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from tokenizers import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Bytes of the tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {
            number: str(token.content)
            for number, token in tokenizer.get_added_tokens_decoder().items()
        }
        decoder = tokenizer.decoder
        self._steps = [] if decoder is None else _flat(json.loads(decoder.__getstate__()))
        self._known = bool(self._steps) and all(map(_is_known, self._steps))

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a token inside of a text; of an added token, its name.

        None if the decoder's result depends on the tokens around it, or if there is no such token.
        """
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None or not self._known:
            return None
        fused = False
        for step in self._steps:
            kind = step["type"]
            if kind == "ByteLevel":
                return _byte_level(piece)
            if kind == "ByteFallback" and (byte := _FALLBACK.fullmatch(piece)):
                return bytes([int(byte[1], 16)])
            if kind == "Replace":
                piece = piece.replace(step["pattern"]["String"], step["content"])
            elif kind == "Metaspace":
                piece = piece.replace(step["replacement"], " ")
            elif kind == "BPEDecoder":
                piece = piece.replace(step["suffix"], " ")
            elif kind == "Strip" and not fused:
                piece = _stripped(piece, step)
            fused = fused or kind == "Fuse"
        return str(piece).encode()


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a decoder, in order."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _is_known(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] in ("ByteLevel", "ByteFallback", "Metaspace", "BPEDecoder", "Strip", "Fuse")


def _stripped(piece: str, step: dict[str, Any]) -> str:
    """A piece without up to `start` and `stop` occurrences of a character at its ends."""
    for _ in range(step["start"]):
        piece = piece.removeprefix(step["content"])
    for _ in range(step["stop"]):
        piece = piece.removesuffix(step["content"])
    return piece


@functools.cache
def _alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves; the others, in order, are the characters from 256 on.
    Source: GPT-2 (`bytes_to_unicode`), as in all byte-level tokenizers.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    table = _alphabet()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.encode()
