"""What typed stores make of values, without a server: keys, normal texts, embeddings, similarity, variants."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.errors import NearError, SettingsError
from thermocline.near.embeddings import HEADER, Answer, Answers, Embeddings, Scope, Similar, pack, unpack
from thermocline.near.question import Space, digest, normalised
from thermocline.near.routes import Routes, Table
from thermocline.near.sessions import Sessions, Turn

TEXTS = st.text(st.characters(), max_size=20)
VECTORS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)
SUBJECTS = [f"user {number}" for number in range(4000)]


def always(query, answer):
    return True


@given(st.lists(TEXTS, max_size=4), st.lists(TEXTS, max_size=4))
def test_a_digest_stands_for_its_texts_in_their_order(one, other):
    """Two lists of texts have one digest only where they are the same list, surrogates included."""
    assert (digest(*one) == digest(*other)) == (one == other)
    assert len(digest("\ud800")) == 64


@given(st.tuples(TEXTS, TEXTS), st.tuples(TEXTS, TEXTS))
def test_no_tenant_names_a_key_of_another(one, other):
    """Whatever tenants and sessions are called, colons included, two of them never share a key."""
    keys = [Space(tenant).named("session", name) for tenant, name in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)
    assert all(key.count(":") == 3 for key in keys)


def test_what_is_the_same_text():
    """NFC and white space are evened out; case is kept unless asked, white space where asked."""
    assert normalised(" e\u0301te\u0301\t\n 1 ") == "\u00e9t\u00e9 1"
    assert normalised("A b") != normalised("a b")
    assert normalised("Stra\u00dfe", fold_case=True) == normalised("STRASSE", fold_case=True)
    assert normalised("if x:\n    y", keep_spaces=True) == "if x:\n    y"


@given(TEXTS, st.booleans(), st.booleans())
def test_normal_is_normal(text, fold_case, keep_spaces):
    """A text that is normal stays as it is."""
    once = normalised(text, fold_case=fold_case, keep_spaces=keep_spaces)
    assert normalised(once, fold_case=fold_case, keep_spaces=keep_spaces) == once


def test_stores_that_differ_in_what_is_the_same_share_nothing():
    """A store that folds case never leaves what it kept to one that does not, though the texts are one by then."""
    ways = [{"fold_case": fold, "keep_spaces": keep} for fold in (False, True) for keep in (False, True)]
    assert len({Embeddings("m", **way).get("abc").commands for way in ways}) == 4
    assert len({Answers(fold_case=fold).get(Scope("m"), "abc").commands for fold in (False, True)}) == 2


@given(VECTORS)
def test_an_embedding_comes_back(vector):
    """The same float32 numbers, which nobody can change."""
    found = unpack(pack(vector))
    assert found.tolist() == np.asarray(vector, np.float32).tolist()
    assert not found.flags.writeable


@given(VECTORS, st.data())
def test_damage_is_refused(vector, data):
    """A kept embedding with any byte changed, cut or longer is refused."""
    kept = bytearray(pack(vector))
    at = data.draw(st.integers(0, len(kept) - 1).filter(lambda at: at not in range(5, 8)))  # padding says nothing
    bad = data.draw(
        st.sampled_from(
            [bytes(kept[:at]), bytes(kept) + b"x", bytes(kept[:at]) + bytes([kept[at] ^ 1]) + kept[at + 1 :]]
        )
    )
    with pytest.raises(NearError) as found:
        unpack(bytes(bad))
    assert found.value.hint


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(kept):
    """Whatever bytes lie there, reading them gives an embedding or NearError, and takes no more than they are."""
    with contextlib.suppress(NearError):
        assert unpack(kept).nbytes == len(kept) - HEADER.size


@pytest.mark.parametrize("vector", [[], [math.nan], [math.inf], [[1.0], [2.0]], [1e39], range(70_000)])
def test_what_is_no_embedding(vector):
    """Nothing empty, not finite as float32, of two dimensions or of too many is kept."""
    with pytest.raises(NearError):
        Embeddings("model").put("text", vector)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, 1.9, math.nan, math.inf, True])
def test_thresholds_are_cosines(threshold):
    """A threshold outside 0..1 is refused: it would match everything, or nothing."""
    with pytest.raises(SettingsError):
        Similar(threshold, always)


def test_similar_takes_a_verifier():
    """Without a verifier there are no similar answers; with no candidates neither."""
    with pytest.raises(SettingsError):
        Similar(0.9, None)
    with pytest.raises(SettingsError):
        Similar(0.9, always, candidates_max=0)


def kept(answers, *vectors):
    """The candidates that putting these leaves in the list, latest first, and their keys."""
    puts = [answers.put(Scope("m"), f"query {at}", "text", vector) for at, vector in enumerate(vectors)]
    items = [next(words[2] for words in put.commands if words[0] == "LPUSH") for put in puts]
    return items[::-1], [put.commands[0][1] for put in puts]


@given(
    st.floats(0, 1),
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
    st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3),
)
def test_the_most_similar_is_found(threshold, vectors, asked):
    """The candidate of the highest cosine is found where that is at least the threshold, and no other ever."""
    similar = Similar(threshold, always)
    items, keys = kept(Answers(similar=similar), *vectors)
    wanted = np.asarray(asked, np.float32)
    found = similar.best(wanted, items)

    def cosine(vector):
        one, other = np.asarray(vector, np.float32).astype(float), wanted.astype(float)
        if not one.any() or not other.any():
            return -1.0
        return 1.0 if (one == other).all() else float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    best = max(map(cosine, vectors))
    if found is None:
        assert best < threshold + 1e-9 or threshold == 1.0
    else:
        assert found[1] >= threshold
        assert (
            found[1] == pytest.approx(cosine(vectors[keys.index(found[0])]), abs=1e-9) == pytest.approx(best, abs=1e-9)
        )


def test_thresholds_at_their_ends():
    """1.0 finds the very same embedding and no other, however close; 0.0 finds all that do not point away."""
    vector = np.asarray([0.1, 0.2, 0.3], np.float32)
    close = np.nextafter(vector, 1)
    strict, loose = Similar(1.0, always), Similar(0.0, always)
    items, keys = kept(Answers(similar=strict), close, vector, 2 * vector)
    assert strict.best(vector, items) == (keys[1], 1.0)
    assert strict.best(vector, items[2:]) is None
    assert loose.best(np.asarray([0.3, 0, -0.1], np.float32), items) is not None
    assert loose.best(-vector, items) is None
    assert loose.best(np.asarray([1.0], np.float32), items) is None  # of another model


def test_an_answers_key_is_all_that_it_depends_on():
    """Model, system prompt, tenant and every turn of the history are part of the key of an answer, and of its list."""
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    scopes = [Scope("m", "s", turns), Scope("m2", "s", turns), Scope("m", "s2", turns), Scope("m", "s", turns[:1])]
    scopes += [Scope("m", "s", turns[::-1]), Scope("m", "s"), Scope("m", "s", (Turn("user", "a\0assistant\0b"),))]
    keys = set()
    for tenant in ("", "acme", "umbra"):
        answers = Answers(Space(tenant), similar=Similar(0.5, always))
        for scope in scopes:
            keys |= {words[1] for words in answers.get(scope, "q", [1.0]).commands}
    assert len(keys) == 3 * len(scopes) * 2


def test_a_subject_keeps_its_variant():
    """Assignment is the same in every process and release, follows the weights, and differs from table to table."""
    table = Table("chat", 1, {"": {"a": 1, "b": 3, "off": 0}, "paid": {"big": 1}})
    assert [table.variant(subject) for subject in SUBJECTS[:8]] == ["a", *"bbbbbbb"]
    shares = Counter(map(table.variant, SUBJECTS))
    assert set(shares) == {"a", "b"}
    assert 0.22 < shares["a"] / len(SUBJECTS) < 0.28
    assert table.variant("anybody", "paid") == "big"
    assert table.variant("anybody", "unheard of") == table.variant("anybody")
    assert Table("chat", 1, {"paid": {"big": 1}}).variant("anybody") is None
    other = Table("mail", 1, table.segments)
    assert 0.3 < sum(other.variant(subject) != table.variant(subject) for subject in SUBJECTS) / len(SUBJECTS) < 0.45


def test_few_subjects_move():
    """When one variant's weight changes, subjects move to it or from it, never between others."""
    before = Table("chat", 1, {"": {"a": 1, "b": 1, "c": 1}})
    after = Table("chat", 2, {"": {"a": 1, "b": 1, "c": 2}})
    moved = [(before.variant(s), after.variant(s)) for s in SUBJECTS if before.variant(s) != after.variant(s)]
    assert moved
    assert {to for _, to in moved} == {"c"}


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": math.nan}, {"a": math.inf}])
def test_weights_are_shares(weights):
    """A table whose weights are no shares cannot be made, nor swapped in; one that was made cannot be changed."""
    with pytest.raises(SettingsError):
        Routes().swap("chat", {"": weights}, version=0)
    table = Table("chat", 1, {"": {"a": 1}})
    with pytest.raises(TypeError):
        table.segments[""]["a"] = 2


def test_what_is_refused_before_it_is_sent():
    """A turn too large, no turn, a segment that is no text, a session or an age without room: each with a hint."""
    sessions = Sessions(turn_bytes_max=100, bytes_max=200)
    for turns in [(), (Turn("user", "x" * 101),)]:
        with pytest.raises(NearError) as found:
            sessions.append("s", *turns)
        assert found.value.hint
    with pytest.raises(NearError):
        Routes().swap("chat", {"\ud800": {"a": 1}}, version=0)
    for wrong in (
        {"turns_max": 0},
        {"turn_bytes_max": 2 << 20},
        {"ttl_seconds": 0},
        {"class_ttl_seconds": {"free": -1}},
    ):
        with pytest.raises(SettingsError):
            Sessions(**wrong)


def test_no_server_takes_no_redis():
    """State in the process needs no Redis client, and loads none."""
    script = (
        "import sys\n"
        "from thermocline.near import LocalState, Sessions, Turn\n"
        "state, sessions = LocalState(1 << 20), Sessions()\n"
        "state.ask(sessions.append('s', Turn('user', 'hi')))\n"
        "assert state.ask(sessions.turns('s')) == (Turn('user', 'hi'),)\n"
        "assert 'redis' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_answer_is_a_value():
    """Answers, turns and results cannot be changed by who reads them."""
    with pytest.raises(AttributeError):
        Answer("q", "a").text = "b"
