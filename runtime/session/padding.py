"""How far the client pads a prompt, so that its length says less."""

from __future__ import annotations

from mergec.runtime.core.errors import PromptError
from mergec.runtime.program.manifest import Manifest


def check_padding(multiple: int, manifest: Manifest) -> None:
    """Raise PromptError unless a program can pad prompts to multiples of this number.

    multiple: 0 for no padding.
    """
    if multiple < 0:
        raise PromptError(f"pad_prompt is {multiple}; give a number of tokens above 0")
    if not multiple:
        return
    if manifest.pad_token < 0:
        raise PromptError(
            "this program takes no padding; compile it with pad_prompt, or leave pad_prompt out"
        )
    if 0 < manifest.max_length <= multiple:
        raise PromptError(
            f"a prompt of {multiple} tokens leaves no room in this program's "
            f"{manifest.max_length}; pad to fewer, or compile with a larger max_length"
        )


def padded_length(length: int, multiple: int, room: int) -> int:
    """The length to which a prompt is padded: the next multiple, or `room` if that is less.

    multiple: 0 for no padding. room: most tokens of a prompt, which is at least `length`; 0 for no
    limit. It follows from public numbers, so the result says no more of the length than between
    which multiples it is.
    """
    if not multiple:
        return length
    padded = -(-length // multiple) * multiple
    return min(padded, room) if room else padded
