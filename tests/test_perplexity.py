"""The program of the perplexity benchmark gives the logits of every new token."""

from __future__ import annotations

import pytest
import torch

from mergec import compile_decoder
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.session.plain import PlainSession
from tests.families import float_decoder, tokens
from tests.roles import ROOT


def test_every_position_is_revealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import perplexity

    model, captured = float_decoder("llama")
    program = compile_decoder(model, config=perplexity.CONFIG, captured=captured)
    ids = tokens(7)
    session = PlainSession(PlainExecutor(program.roles["server"]))
    rows = session.rows(5, 0, ids[0, :5].tolist())
    assert rows is not None
    later = session.rows(2, 5, ids[0, 5:].tolist())
    assert later is not None
    with torch.no_grad():
        wanted = model(ids).logits[0]
    assert torch.allclose(torch.cat([rows, later]).float(), wanted, atol=1e-4)
