"""Models whose KV is not one list of equal layers: sliding windows, latent attention, recurrent states."""

from __future__ import annotations

import pytest

from tests.vllm.architectures import make
from tests.vllm.arms import cold, loaded, same, saved
from tests.vllm.prompts import all_prompts, loadable
from tests.vllm.server import StartError

pytestmark = pytest.mark.vllm_long
PROMPTS = all_prompts()[::2]
OPTIONS = {"llama": {}, "sliding": {}, "latent": {"block": None}}


@pytest.mark.parametrize("kind", OPTIONS)
def test_identical(kind, start_node, start_vllm, tiny_model, tmp_path):
    """Each architecture answers from the store what it answers without one, and loads what vLLM itself would reuse."""
    model = make(kind, tmp_path / kind, tiny_model)
    node = start_node()
    server = start_vllm(model=model, node=node.socket, **OPTIONS[kind])
    expected = cold(server, PROMPTS)
    same(cold(server, PROMPTS), expected, f"{kind}, again")
    own = []
    for each in PROMPTS:
        server.forget()
        server.ask(each, 1)
        own.append(server.ask(each))
    same(own, expected, f"{kind}, vLLM's own hit")
    if kind == "latent":
        assert not any(each.cached_tokens for each in own), "vLLM reuses no latent KV on a CPU, and neither do we"
        again = server.ask_all(PROMPTS)
        same(again, expected, "latent, with the connector")
        assert not any(each.loaded for each in again)
    else:
        saved(server, PROMPTS, expected)
        assert loaded(server, PROMPTS, expected, kind).by_tier["memory"] >= sum(map(loadable, PROMPTS))


def test_recurrent_states_are_refused(start_node, start_vllm, tiny_model, tmp_path):
    """A model with recurrent state does not start with the connector, and is told why and what to do."""
    model = make("recurrent", tmp_path / "recurrent", tiny_model)
    node = start_node()
    with pytest.raises(StartError) as refused:
        start_vllm(model=model, node=node.socket, block=None)
    assert "recurrent" in refused.value.log
    assert "hint:" in refused.value.log
