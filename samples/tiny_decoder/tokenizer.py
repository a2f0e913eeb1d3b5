"""The byte-pair tokenizer of llama2.c, which is sentencepiece's: `tok512.bin` and its like."""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from pathlib import Path

BOS = 1
FIRST_BYTE = 3
"""The token of byte 0; <unk>, <s> and </s> stand before it."""

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        path: A file of llama2.c: int32 longest piece, then per token a float32 score, an int32 length, and its bytes.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        offset = 4
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8 + length
            self.pieces.append(data[offset - length : offset])
            self.scores.append(score)
        self.ids: dict[bytes, int] = {}
        for index, piece in enumerate(self.pieces):
            self.ids.setdefault(piece, index)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, BOS first: its characters or their bytes, then ever the pair of the best score merged.

        All pairs that make the same piece are merged together. That is as good as one after the other: a piece's score
        is its age, so what a merge makes possible never comes before the merge.
        """
        if not text:
            return [BOS]
        ids = [token for character in " " + text for token in self._character(character.encode())]
        while (best := self._best_merge(ids)) is not None:
            ids = self._merged(ids, best)
        return [BOS, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without BOS and without the space that `encode` puts in front."""
        text = b"".join(self._bytes(token) for token in ids if token != BOS)
        return text.decode(errors="replace").removeprefix(" ")

    def _character(self, character: bytes) -> list[int]:
        if character in self.ids:
            return [self.ids[character]]
        return [FIRST_BYTE + byte for byte in character]

    def _pair(self, left: int, right: int) -> int | None:
        """The piece that two make together, if there is one."""
        return self.ids.get(self.pieces[left] + self.pieces[right])

    def _best_merge(self, ids: list[int]) -> int | None:
        pieces = (self._pair(left, right) for left, right in set(pairwise(ids)))
        return max((piece for piece in pieces if piece is not None), key=self.scores.__getitem__, default=None)

    def _merged(self, ids: list[int], piece: int) -> list[int]:
        """`ids` with every pair that makes `piece` replaced by it, from left to right."""
        result: list[int] = []
        for token in ids:
            if result and self._pair(result[-1], token) == piece:
                result[-1] = piece
            else:
                result.append(token)
        return result

    def _bytes(self, token: int) -> bytes:
        piece = self.pieces[token]
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece
