"""Own keys of vLLM's requests: what is computed alike has one key, and nothing else has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines_vllm.mini import Request, image, lora
from thermocline.blocks.key import block_keys, root_key
from thermocline.engines.vllm.prompts import prompt_of

TEXT = [at * 31 % 5000 for at in range(256)]


def keys(block=32, tokens=TEXT, **fields):
    """The keys of a whole request."""
    prompt = prompt_of(Request("r", tokens, **fields), block)
    return None if prompt is None else list(prompt.grow(tokens, len(tokens) // block))


def test_a_plain_prompt_has_the_keys_of_every_engine():
    """Without salt, adapter and images the keys are those that the transformers engine and any router make."""
    expected = block_keys(np.array(TEXT, np.uint32).data, root=root_key(), tokens_per_block=32)
    assert keys() == expected
    assert keys(64) == expected[1::2], "whatever the size of a block"


@given(cuts=st.lists(st.integers(0, 8), min_size=1, max_size=5), offset=st.integers(0, 200))
def test_growing_changes_no_key(cuts, offset):
    """A text that grows has the keys that it has all at once, with images and adapters too."""
    fields = {"mm_features": [image("i", offset, 40)], "lora_request": lora("a", "/a"), "cache_salt": "s"}
    prompt = prompt_of(Request("r", TEXT, **fields), 32)
    for blocks in sorted(cuts):
        prompt.grow(TEXT[: blocks * 32 + 3], blocks)
    assert list(prompt.grow(TEXT, 8)) == keys(**fields)


def test_what_differs_has_other_keys():
    """Salt, adapter, its path, and images by content, place and length: each makes other keys."""
    forms = {
        "plain": {},
        "salt": {"cache_salt": "a"},
        "other salt": {"cache_salt": "b"},
        "adapter": {"lora_request": lora("a", "/a")},
        "other adapter": {"lora_request": lora("b", "/a")},
        "moved adapter": {"lora_request": lora("a", "/b")},
        "image": {"mm_features": [image("i", 0, 40)]},
        "other image": {"mm_features": [image("j", 0, 40)]},
        "shifted image": {"mm_features": [image("i", 1, 40)]},
        "longer image": {"mm_features": [image("i", 0, 41)]},
        "two images": {"mm_features": [image("i", 0, 20), image("i", 20, 20)]},
    }
    made = {name: keys(**fields) for name, fields in forms.items()}
    assert len({chain[0] for chain in made.values()}) == len(made)
    assert len({chain[-1] for chain in made.values()}) == len(made)


def test_a_family_may_share_blocks():
    """Prompts of one salt and adapter are a family, whatever they say and show; another of either is another one."""
    forms = ({}, {"cache_salt": "a"}, {"lora_request": lora("a", "/a")}, {"lora_request": lora("b", "/a")})
    families = {prompt_of(Request("r", TEXT, **fields), 32).family for fields in forms}
    assert len(families) == len(forms)
    shown = prompt_of(Request("r", TEXT[1:], mm_features=[image("i", 0, 40)]), 32)
    assert shown.family == root_key()


def test_an_image_matters_from_where_it_stands():
    """Blocks before an image are shared with prompts that have another one there, or none."""
    plain = keys()
    one, other = (keys(mm_features=[image(name, 130, 50)]) for name in "ij")
    assert plain[:4] == one[:4] == other[:4]
    assert not {*plain[4:]} & {*one[4:]}
    assert not {*one[4:]} & {*other[4:]}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_embeds": object()},
        {"prompt_is_token_ids": [True]},
        {"resumable": True},
        {"mm_features": [image("", 0, 4)]},
    ],
)
def test_what_tokens_do_not_tell_is_not_cached(fields):
    """Embeddings, items without a digest and sessions whose text changes have no keys."""
    assert keys(**fields) is None
