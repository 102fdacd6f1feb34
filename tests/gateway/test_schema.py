"""The gateway's own API is what its OpenAPI document says, whatever is asked of it."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis

from tests.gateway.serving import served
from thermocline.gateway.routes import openapi

SCHEMA = schemathesis.openapi.from_dict(openapi())
EXAMPLES = 10


@pytest.fixture(scope="module")
def url():
    with served() as (door, _):
        yield f"http://127.0.0.1:{door.port}"


@SCHEMA.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=list(hypothesis.HealthCheck))
def test_own_api(case, url):
    """Every operation answers as it is documented, also to requests that break the document."""
    case.call_and_validate(base_url=url)
