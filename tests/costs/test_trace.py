"""Readers of request traces."""

from __future__ import annotations

import contextlib
import json
import lzma
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs import trace
from thermocline.costs.trace import Mix, read
from thermocline.errors import TraceError

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
published = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")


def written(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


numbers = st.one_of(st.integers(-5, 1 << 70), st.floats(allow_nan=False), st.none(), st.integers(0, 600))
anything = st.one_of(
    st.fixed_dictionaries(
        {
            "timestamp": numbers,
            "input_length": numbers,
            "output_length": numbers,
            "hash_ids": st.lists(numbers, max_size=3),
        }
    ),
    st.fixed_dictionaries(
        {
            "block_size": st.sampled_from([0, 1, 7, 64, 512, 1024]),
            "tool": numbers,
            "sys": numbers,
            "req": st.lists(
                st.tuples(
                    numbers, numbers, numbers, st.lists(st.tuples(numbers, numbers), max_size=2), numbers, numbers
                ),
                max_size=2,
            ),
        }
    ),
    st.fixed_dictionaries({"timestamp": numbers, "input": st.text(), "output": st.text(), "session_id": st.text()}),
    st.lists(numbers),
)


def hashed(at, tokens, ids, **more):
    return {"timestamp": at, "input_length": tokens, "output_length": 7, "hash_ids": ids, **more}


def test_mooncake(tmp_path):
    """Requests come in order of time, in seconds from the first; the size of blocks follows from the lengths."""
    rows = [hashed(3000, 40, [0, 1, 2]), hashed(1000, 33, [0, 1, 9]), hashed(2000, 16, [0])]
    found = read(written(tmp_path / "some.jsonl", *rows))
    assert (found.name, found.tokens_per_block, found.distinct_blocks, found.skipped) == ("some", 16, 4, 0)
    assert found.arrival_seconds.tolist() == [0.0, 1.0, 2.0]
    assert found.input_tokens.tolist() == [33, 16, 40]
    assert found.output_tokens.tolist() == [7, 7, 7]
    paths = [found.path(at).tolist() for at in range(3)]
    assert paths[0][:2] == paths[2][:2]
    assert paths[1] == paths[0][:1]
    assert paths[0][2] != paths[2][2]


def test_packed(tmp_path):
    """A trace may be packed with xz."""
    path = tmp_path / "some.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(hashed(0, 512, [0])).encode()))
    assert read(path).tokens_per_block == 512


def test_lines_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    """A line that is no request, too long, negative, or of another block size is passed over and counted."""
    monkeypatch.setattr(trace, "LINE_BYTES_MAX", 200)
    bad = ["{", "[]", hashed(-1, 16, [0]), hashed(1, -1, []), hashed(1, 1600, [0]), hashed(1, 16, ["x" * 999])]
    found = read(written(tmp_path / "some.jsonl", hashed(0, 40, [0, 1, 2]), *bad, "", hashed(5, 17, [0, 1])))
    assert (len(found), found.skipped) == (2, len(bad))


def test_as_much_as_we_take(tmp_path, monkeypatch):
    """A trace that is larger than we take is cut, and says so."""
    monkeypatch.setattr(trace, "LINES_MAX", 3)
    found = read(written(tmp_path / "some.jsonl", *(hashed(at, 16, [at]) for at in range(9))))
    assert len(found) == 3
    assert "only the first 3 requests" in found.notes[-1]


def test_content_hashes_become_prefixes(tmp_path):
    """Where a block's number names its content, the same content behind another prefix is another block."""
    rows = [hashed(0, 48, [1, 2, 2]), hashed(1, 48, [9, 2, 2]), hashed(2, 40, [1, 2, 2])]
    found = read(written(tmp_path / "some.jsonl", *rows))
    paths = [found.path(at).tolist() for at in range(3)]
    assert found.distinct_blocks == 6
    assert paths[0] == paths[2]
    assert not set(paths[0]) & set(paths[1])


def test_sessions(tmp_path):
    """Sessions are those that the trace names; else requests that share a block that is rare belong together."""
    rows = [hashed(at, 32, [0, 1 + at % 3]) for at in range(30)]
    found = read(written(tmp_path / "some.jsonl", *rows))
    assert found.sessions.tolist() == [at % 3 for at in range(30)]
    assert "names none" in found.notes[0]
    named = [row | {"session_id": f"s{at % 2}"} for at, row in enumerate(rows)]
    found = read(written(tmp_path / "some.jsonl", *named))
    assert found.sessions.tolist() == [at % 2 for at in range(30)]
    assert not found.notes


def test_texts(tmp_path):
    """A trace of texts has blocks of 64 characters, and says what it takes for a token."""
    rows = [
        {"timestamp": at * 1e6, "input": "x" * 64 * 2 + "y" * at, "output": "abcde", "session_id": f"{at % 2}"}
        for at in range(4)
    ]
    found = read(written(tmp_path / "some.jsonl", *rows))
    assert (found.tokens_per_block, found.distinct_blocks) == (16, 2)
    assert found.input_tokens.tolist() == [32, 33, 33, 33]
    assert found.output_tokens.tolist() == [2] * 4
    assert found.sessions.tolist() == [0, 1, 0, 1]
    assert "4 characters" in found.notes[0]


def test_conversations(tmp_path):
    """Conversations become one stream; those with the same tools and system prompt share its blocks."""
    turns = [[0.0, 1024, 5, [[1, 16]], 1.0, None], [5000.0, 1536, 5, [[1, 24]], None, 2.0]]
    rows = [{"id": f"t{at}", "block_size": 64, "tool": 400, "sys": 200, "req": turns} for at in range(3)]
    found = read(written(tmp_path / "some.jsonl", *rows), Mix(conversations=2, seed=7))
    assert (len(found), found.tokens_per_block) == (4, 512)
    assert found.distinct_blocks == 1 + 2 * 2
    assert len({int(found.path(at)[0]) for at in range(4)}) == 1
    assert np.bincount(found.sessions).tolist() == [2, 2]
    assert found.seconds < 1000
    assert "pauses are cut to 600 s" in found.notes[0]


def test_lengths_only(tmp_path):
    """A trace of lengths has no blocks."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44"]
    rows += ["2023-11-16 18:15:48.6805900,-3,1", "x", "2023-11-16 18:15:50.6805900,3,1"]
    found = read(written(tmp_path / "some.csv", *rows))
    assert (found.has_blocks, found.seconds, found.skipped) == (False, 4.0, 2)
    assert found.input_tokens.tolist() == [374, 3]


@pytest.mark.parametrize("text", ["", "hello\n", '{"hash_ids": 3}\n', '{"req": []}\n'])
def test_what_is_no_trace(tmp_path, text):
    """What holds no request is an error with a hint, and so is what is not there."""
    (tmp_path / "some.gz").write_bytes(b"\x1f\x8b\x08" + bytes(30))
    for path in (tmp_path / "some.gz", written(tmp_path / "some.jsonl", text), tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(TraceError) as raised:
            read(path)
        assert raised.value.hint


@given(
    st.sampled_from(["hash_ids", "req", "session_id", "ContextTokens"]),
    st.lists(st.one_of(st.binary(max_size=60), st.builds(json.dumps, anything).map(str.encode)), max_size=6),
)
def test_whatever_a_file_holds(mark, lines):
    """Whatever a file holds, it is read or refused with a hint: nothing else happens, and what is read is whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.jsonl"
        path.write_bytes(b"\n".join([f'"{mark}"'.encode(), *lines]))
        with contextlib.suppress(TraceError):
            found = read(path)
            assert len(found) == len(found.input_tokens) == len(found.sessions) == len(found.starts) - 1
            assert found.starts[-1] == len(found.blocks)


def test_deep(tmp_path):
    """A line that is nested without end is passed over like any other that cannot be read."""
    path = tmp_path / "some.jsonl"
    path.write_text('{"x":' + "[" * 9000 + "\n" + json.dumps(hashed(0, 512, [0])) + "\n")
    with pytest.raises(TraceError):
        read(path)
    path.write_text(json.dumps(hashed(0, 512, [0])) + '\n{"x":' + "[" * 9000 + "\n")
    assert (len(read(path)), read(path).skipped) == (1, 1)


def test_damaged(tmp_path):
    """A packed file that ends early is an error."""
    path = tmp_path / "some.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(hashed(0, 512, [0])).encode())[:-20])
    with pytest.raises(TraceError):
        read(path)


@published
@pytest.mark.parametrize(
    ("name", "requests", "references", "distinct", "seconds", "cv"),
    [
        ("mooncake_conversation.jsonl.xz", 12_031, 288_500, 182_790, 3_537, 3.03),
        ("mooncake_synthetic.jsonl.xz", 3_993, 121_877, 43_924, 1_022, 1.01),
        ("kvct_001_369.jsonl.xz", 8_225, 1_991_323, 81_386, 31_123, None),
        ("azure_conv_2023.csv.xz", 19_366, 0, 0, 3_502, None),
        ("lmcache_miniswe.jsonl.xz", 402, None, None, 552, None),
        ("lmcache_taubench.jsonl.xz", 471, None, None, 181, None),
    ],
)
def test_published_traces(name, requests, references, distinct, seconds, cv):
    """Each public trace has the requests, blocks and times that are published of it, and no line is passed over."""
    found = read(TRACES / name)
    assert (len(found), found.skipped) == (requests, 0)
    assert round(found.seconds) == seconds
    assert references is None or (len(found.blocks), found.distinct_blocks) == (references, distinct)
    assert cv is None or found.arrival_cv == pytest.approx(cv, abs=0.005)
