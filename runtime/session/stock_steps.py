"""Steps by CrypTen's stock protocols, as a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mergec.runtime.session.steps import Session
from mergec.runtime.transport.traffic import Traffic

if TYPE_CHECKING:
    from mergec.runtime.engine.stock import StockExecutor


class StockSession(Session):
    """Runs steps with CrypTen's stock protocols; the dealer has no session."""

    def __init__(self, executor: StockExecutor, counted: Callable[[], Traffic]) -> None:
        super().__init__(executor.program)
        self._executor = executor
        self._counted = counted

    def setup(self) -> None:
        self._executor.setup()

    def traffic(self) -> Traffic:
        return self._counted().snapshot()

    def _start(self) -> dict[str, Any]:
        return self._executor.start()

    def _execute(self, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        return self._executor.step(inputs, outputs)

    def _cut(self, cache: Any, dim: int, length: int) -> Any:
        return cache.narrow(dim, 0, length)

    def _join(self, values: Sequence[Any]) -> Any:
        from mergec.runtime.crypten import compat as crypten

        return crypten.cat(list(values), 1)
