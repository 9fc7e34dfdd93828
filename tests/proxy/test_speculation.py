"""The endpoint with drafts: the same answers, and what its usage says of drafts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import characters
from tests.services import START, deployment, role

openai = pytest.importorskip("openai", reason="the openai package is not installed")


def test_usage_counts_right_and_wrong_drafts(tmp_path: Path) -> None:
    folder = characters.save(tmp_path / "bundles", speculate_up_to=3)
    expected = characters.plaintext(folder, "abcab", 20)
    with deployment(folder, serve=("--timeout", str(START))) as made:
        at = ("--server", str(made.server.address), "--dealer", str(made.dealer.address))
        drafts = ("--speculate", "lookup", "--speculate-tokens", "3")
        with role("proxy", folder, *at, "--plaintext", *drafts) as endpoint:
            client = openai.OpenAI(
                base_url=f"http://{endpoint.address}/v1",
                api_key="none",
                max_retries=0,
                timeout=START,
            )
            asked = {"model": "tiny", "prompt": "abcab", "max_tokens": 20, "temperature": 0}
            whole = client.completions.create(**asked)
            assert whole.choices[0].text == expected
            details = whole.usage.completion_tokens_details
            right, wrong = (
                details.accepted_prediction_tokens,
                details.rejected_prediction_tokens,
            )
            assert right + wrong > 0
            assert 0 <= right < whole.usage.completion_tokens
            stream = client.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
            assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
            assert chunks[-1].usage.completion_tokens_details == details
