"""What a server's limits leave one client: lengths, and tokens a minute."""

from __future__ import annotations

import math
from typing import Any

from mergec.runtime.program.manifest import Manifest
from mergec.runtime.roles.settings import Limits
from mergec.runtime.roles.worker import Parent


class Allowance:
    """Asks the parent process, which counts the tokens of a client's sessions together."""

    def __init__(self, limits: Limits, manifest: Manifest, parent: Parent) -> None:
        self._limits, self._manifest, self._parent = limits, manifest, parent

    def refusal(self, length: int, tokens: int) -> dict[str, Any]:
        """Why an answer of this length is refused, and when to retry; empty if it is allowed."""
        if reason := self.too_long(length, tokens):
            return {"reason": reason}
        reason, wait = self.used_up()
        return {"reason": reason, "wait": wait} if wait else {}

    def too_long(self, length: int, tokens: int) -> str:
        """Why a prompt and an answer of these lengths are more than is allowed, or nothing."""
        limits = self._limits
        most = [n for n in (limits.length, self._manifest.max_length) if n]
        if most and length + tokens > min(most):
            return f"prompt and answer may have {min(most)} tokens together"
        if limits.tokens and tokens > limits.tokens:
            return f"an answer may have {limits.tokens} tokens"
        return ""

    def used_up(self) -> tuple[str, int]:
        """Why the client has to wait, and for how many seconds; 0 if it need not."""
        wait = math.ceil(self._parent.ask(kind="allowance")[0]["wait"])
        return f"{self._limits.rate} tokens a minute are used up; try again in {wait} s", wait
