"""Each kind of tokenizer is made once."""

from __future__ import annotations

from functools import cache

import pytest

from tests.tokens.tokenizers_made import MAKERS
from thermocline.tokens.tokenizer import Tokenizer

made = cache(lambda name: MAKERS[name]())


@pytest.fixture(scope="session", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Ours, of every kind."""
    return Tokenizer(made(request.param))
