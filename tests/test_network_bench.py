"""The benchmark on emulated networks: its page, what it keeps, and what drafts take from it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mergec.runtime.core.network import Waiting
from tests.roles import ROOT
from tests.session import compiled


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import network

    return network


@pytest.fixture
def speculation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speculation

    return speculation


@pytest.fixture
def row(network: Any) -> Any:
    waiting = Waiting(latencies=9.8, online=0.5, to_client=0.25, to_server=12.0)
    return network.Row(
        "decode", "smollm2-135m", "wan", 1, 128, 491, 490, 8_000_000, 3_000_000, 150_000_000,
        waiting, 1.5, 1.0, 12.5, 11.0, "2 of mpc.attention",
    )  # fmt: skip


def test_the_page_has_a_table_for_each_part(network: Any, row: Any) -> None:
    drafts = [
        replace(row, part="drafts", new=new, measured=12.5 * share, local_prepared=None)
        for new, share in ((1, 1.0), (8, 1.25))
    ]
    prompt = replace(row, part="prompts", new=30, past=200, local_prepared=None, prepared=None)
    text = network.table([row, *drafts, prompt])
    counted = "491 | 490 | 8.00 | 3.00 | 150.00 | 9.80 | 0.50 | 12.00 | 1.50"
    # It waits for the dealer's bytes, or, if these are at hand, for the parties' messages.
    assert f"| smollm2-135m | wan | {counted} | 13.50 | 12.50 | 11.30 | 11.00 |" in text
    assert f"| smollm2-135m | 7 | {counted} | 13.50 | 15.62 | 1.25 |" in text
    assert f"| smollm2-135m | 30 | 200 | {counted} | 13.50 | 12.50 |" in text
    assert "* smollm2-135m, wan: 2 of mpc.attention" in text


def test_what_is_not_measured_again_stays(network: Any, row: Any, tmp_path: Path) -> None:
    near = replace(row, network="loopback")
    drafts = [replace(row, part="drafts", new=new) for new in (1, 2)]
    network.write([near, row, *drafts], tmp_path)
    old = network.stored(tmp_path / network.STORED)
    assert old == [near, row, *drafts]
    assert (tmp_path / "network.png").exists()
    again = replace(row, measured=13.0)
    assert network.merged(old, [again]) == [near, again, *drafts]
    other = replace(row, model="gpt2-base")
    assert network.merged(old, [other]) == [other, near, row, *drafts]
    assert network.merged(old, [drafts[0]]) == [near, row, drafts[0]]


def test_rows_of_another_form_are_left(network: Any, row: Any, tmp_path: Path) -> None:
    path = tmp_path / network.STORED
    assert network.stored(path) == []
    stated = json.loads(json.dumps(asdict(row)))
    path.write_text(json.dumps([stated, {"model": "gpt2-base"}, stated | {"more": 1}]))
    assert network.stored(path) == [row]


def test_drafts_take_seconds_of_a_program_like_theirs_alone(
    network: Any, speculation: Any, row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "PAST", 8)
    monkeypatch.setattr(speculation, "RESULTS", tmp_path)
    _, program = compiled("llama", network="wan", speculate_up_to=speculation.MOST)
    by = speculation.costs(program)
    assert all(by[name] == {} for name in speculation.MEASURED)
    assert list(by["wan"]) == list(range(1, 9))
    rows = [
        replace(
            row, part="drafts", new=new, past=8, rounds=by["rounds"][new],
            online_bytes=by["online"][new], to_client_bytes=0, to_server_bytes=by["dealt"][new],
            local=0.5 + new, measured=12.0 + new,
        )
        for new in by["rounds"]
    ]  # fmt: skip
    network.write(rows, tmp_path)
    found = speculation.costs(program)
    assert found["loopback, measured"] == {new: 0.5 + new for new in range(1, 9)}
    assert found["wan, measured"] == {new: 12.0 + new for new in range(1, 9)}
    assert {name: found[name] for name in ("rounds", "wan")} == {
        name: by[name] for name in ("rounds", "wan")
    }
    dealt = rows[0].to_server_bytes
    network.write([replace(rows[0], to_server_bytes=round(1.04 * dealt)), *rows[1:]], tmp_path)
    assert speculation.costs(program)["wan, measured"] == found["wan, measured"]
    for changed in (
        rows[:-1],
        [replace(rows[0], rounds=rows[0].rounds + 1), *rows[1:]],
        [replace(rows[0], online_bytes=round(1.06 * rows[0].online_bytes)), *rows[1:]],
        [replace(rows[0], to_server_bytes=round(1.06 * dealt)), *rows[1:]],
    ):
        network.write(changed, tmp_path)
        assert speculation.costs(program)["wan, measured"] == {}
