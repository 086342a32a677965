"""Tests of an application's checks before it serves, and of its health."""

import asyncio
from typing import Any

import httpx
import pytest

from pi0fm.serve.app import create_app, warm_up
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.served import synthetic_observation
from pi0fm_client.errors import ConfigError, ServingError


@pytest.mark.parametrize("token", ["", "two words", "schlüssel", "line\nbreak"])
def test_a_token_that_no_header_can_carry_is_refused(fake_policy: Any, token: str) -> None:
    policy = fake_policy()
    with pytest.raises(ConfigError, match="token"):
        create_app(policy, ServingLimits(), tokens=[token])


def test_before_it_is_warm_and_after_its_end_a_server_says_so(fake_policy: Any) -> None:
    policy = fake_policy()
    app = create_app(policy, ServingLimits())

    async def story() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as browser:
            cold = await browser.get("/healthz")
            assert (cold.status_code, cold.text) == (503, "warming up\n")
            async with app.router.lifespan_context(app):
                warm = await browser.get("/healthz")
                assert (warm.status_code, warm.text) == (200, "OK\n")
                assert (await browser.get("/")).status_code == 426
            assert (await browser.get("/healthz")).status_code == 503

    asyncio.run(story())
    assert policy.batches == [(1, None), (1, None), (8, None), (8, None)]


def test_a_policy_that_cannot_infer_is_never_announced(fake_policy: Any) -> None:
    policy = fake_policy()
    policy.metadata["state_dim"] = 7  # its own observation() wants three
    app = create_app(policy, ServingLimits())
    with pytest.raises(ServingError, match="failed on a synthetic observation"):
        asyncio.run(warm_up(app))


def test_metadata_that_names_no_cameras_cannot_be_warmed_up_with() -> None:
    with pytest.raises(ServingError, match="cameras"):
        synthetic_observation({"state_key": "s", "state_dim": 3})
