"""Keys: the same chain everywhere, resumable anywhere."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys
from array import array
from itertools import pairwise

import numpy as np
import pytest

from thermocline.blocks.key import FORMAT_VERSION, KEY_BYTES, NO_PARENT, block_keys, root_key

TOKENS = np.arange(64, dtype=np.uint32)
WIDE = np.array([0xFFFFFFFF, 2**31, 1, 151643] * 8, dtype=np.uint32)
ROOT = root_key()


def _keys_of(tokens, size=16, *, root=ROOT, extras=()):
    return block_keys(tokens, root=root, tokens_per_block=size, extras=extras)


def _by_hand(tokens, root, extras=()):
    """The definition, word by word."""
    suffix = hashlib.sha256(b"".join(len(x).to_bytes(4, "little") + x for x in extras)).digest() if extras else b""
    key, chain = root, []
    for start in range(0, len(tokens) // 16 * 16, 16):
        ids = b"".join(int(token).to_bytes(4, "little") for token in tokens[start : start + 16])
        key = hashlib.sha256(key + ids + suffix).digest()
        chain.append(key)
    return chain


def test_golden_roots():
    """The root of a salt is this very value, in every release that names this format version."""
    assert FORMAT_VERSION == b"thermocline key 1"
    assert root_key().hex() == "08f747fdf3f945dbb6929bdc653b9017f5ae80a961b31ada5d3fe2ce620f238e"
    assert root_key(b"tenant-7").hex() == "26629261fd53698266793fafe81dc8399a543c09d0c01413b76bfa2793de3772"


def test_golden_keys():
    """The keys of fixed tokens are these very values: they name blocks on disk and on other machines."""
    assert [key.hex() for key in _keys_of(TOKENS)] == [
        "cbd98e96d10915c6a17c55f1df1cb4c1259a75a7f8b138687c92e073bec2ee37",
        "7a52098cf69fe0a38d5b6ba48ca4acde4fde6c174c571dfbf116bf959c06bda8",
        "0e58ce463b4e34743f596c5bd59009c9ce5b4047a3a1829cd65458ed23bce244",
        "698d63e07f98c66d1151bac54f8b5038e3ff3ebafccba24be87e279bfb816762",
    ]
    assert (
        _keys_of(TOKENS, 64, root=root_key(b"tenant-7"))[0].hex()
        == "171237a7b6673576c7db5334155cebf154c3ea0d4951aa3233c3a2bca96adc8b"
    )
    assert (
        _keys_of(TOKENS, 64, extras=[b"lora-a", b"image"])[0].hex()
        == "0153cf86afbd54185a2e2fe0d50de6e805dbec48873b55944503c6aec436d4f4"
    )
    assert _keys_of(WIDE, 32)[0].hex() == "e90ae093a414afaa1a07d212c561e48061dd3233744c7c3ef10c6997dcf89629"


def test_definition():
    """Keys follow the definition in the module's docstring, with and without extras."""
    assert _keys_of(WIDE) == _by_hand(WIDE, ROOT)
    assert _keys_of(TOKENS, extras=[b"a", b""]) == _by_hand(TOKENS, ROOT, [b"a", b""])
    assert root_key(b"s") == hmac.digest(hashlib.sha256(b"s").digest(), FORMAT_VERSION, "sha256")


def test_resume_at_every_multiple_of_16():
    """Hashing the rest of a prompt from any key gives the keys of the whole."""
    tokens = np.random.default_rng(1).integers(0, 2**32, 1024, np.uint32)
    whole = _keys_of(tokens)
    assert len(whole) == 64
    for done in range(1, 64):
        assert _keys_of(tokens[16 * done :], root=whole[done - 1]) == whole[done:]


@pytest.mark.parametrize("size", [16, 32, 48, 64, 128, 256, 1024])
def test_block_size_does_not_matter(size):
    """A block of any size is named by the key at its end, which is the same for every size."""
    tokens = np.random.default_rng(2).integers(0, 2**32, 1024 + 15, np.uint32)
    per_block = size // 16
    assert _keys_of(tokens, size) == _keys_of(tokens)[per_block - 1 :: per_block]


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 33])
def test_partial_blocks_have_no_key(length):
    """Only full blocks have keys, and tokens behind the last full block change none."""
    assert len(_keys_of(TOKENS[:length])) == length // 16
    assert _keys_of(TOKENS[:length]) == _keys_of(TOKENS)[: length // 16]
    assert _keys_of(TOKENS[:length], 32) == _keys_of(TOKENS, 32)[: length // 32]


def test_every_token_counts():
    """Changing any one token changes the key of its block and of every later one, and none before."""
    whole = _keys_of(TOKENS)
    for at in range(64):
        changed = TOKENS.copy()
        changed[at] ^= 1
        same = [a == b for a, b in zip(whole, _keys_of(changed), strict=True)]
        assert same == [block < at // 16 for block in range(4)]


SALTS = [
    b"",
    b"\0",
    b"a",
    b"a\0",
    b"A",
    b"b",
    b"ab",
    bytes(64),
    bytes(65),
    b"x" * 64,
    b"x" * 65,
    hashlib.sha256(b"x" * 65).digest(),
]


def test_salts_separate():
    """Different salts never share a key, also where they differ in trailing zero bytes or exceed a hash block."""
    chains = [_keys_of(TOKENS, root=root_key(salt)) for salt in SALTS]
    assert len({key for chain in chains for key in chain}) == 4 * len(SALTS)


def test_extras_separate():
    """Extras separate by value, order and cut, and an empty extra differs from none."""
    variants = [(), (b"",), (b"", b""), (b"ab",), (b"a", b"b"), (b"b", b"a"), (b"a",), (b"a", b"")]
    chains = [_keys_of(TOKENS, extras=extras) for extras in variants]
    assert len({key for chain in chains for key in chain}) == 4 * len(variants)


def test_extras_from_a_point_on():
    """Where extras change inside a prompt, the stretch before keeps its keys."""
    head, tail = _keys_of(TOKENS[:32]), _keys_of(TOKENS[32:], root=_keys_of(TOKENS[:32])[-1], extras=[b"image"])
    assert head == _keys_of(TOKENS)[:2]
    assert not set(tail) & set(_keys_of(TOKENS))


def test_buffers():
    """Any u32 buffer of the same bytes gives the same keys."""
    expected = _keys_of(TOKENS)
    assert _keys_of(array("I", TOKENS.tolist())) == expected
    assert _keys_of(TOKENS.tobytes()) == expected
    assert _keys_of(memoryview(TOKENS)) == expected


def test_keys_are_32_bytes():
    """Every key is 32 bytes, none is the one that stands for no parent, and no two of a chain are equal."""
    chain = _keys_of(np.zeros(16 * 1000, np.uint32))
    assert {len(key) for key in chain} == {KEY_BYTES}
    assert len(set(chain)) == 1000
    assert NO_PARENT not in chain
    assert all(a != b for a, b in pairwise(chain))


@pytest.mark.parametrize("size", [0, -16, 1, 8, 15, 17, 24, 100])
def test_odd_block_sizes_are_refused(size):
    """A block size that is not a positive multiple of 16 is an error, never other keys."""
    with pytest.raises(ValueError, match="positive multiple of 16"):
        _keys_of(TOKENS, size)


CHILD = """
import sys
import numpy as np
from thermocline.blocks.key import block_keys, root_key
tokens = np.arange(4096, dtype=np.uint32) * 2654435761 % 151936
keys = block_keys(tokens.astype(np.uint32), root=root_key(b"salt"), tokens_per_block=32, extras=[b"lora"])
sys.stdout.write(b"".join(keys).hex())
"""


def test_processes_agree():
    """Three processes with different hash seeds compute the same keys."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", CHILD],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "12345", "random")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) == 128 * 64
