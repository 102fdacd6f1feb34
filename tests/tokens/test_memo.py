"""What is known is not tokenised again, and the ids are those of tokenising everything."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tok
from tokenizers import models, pre_tokenizers, trainers

from tests.tokens.tokenizers_made import SPECIAL, gpt_2, llama_3
from thermocline.blocks.key import BlockKey, block_keys, root_key
from thermocline.tokens.chunks import CHUNK_BYTES
from thermocline.tokens.memo import Memo, Read
from thermocline.tokens.tokenizer import Tokenizer

ROOT = root_key(b"a tenant")
WORDS = (
    "plain words\nand a line, ",
    "\n\n  indented(",
    "user: ",
    "don't ",
    "日本語のテキスト\n",
    "e",
    "\u0301",
    " ",
    "\t\n",
    "\r\n",
)
MARKS = (*SPECIAL, "<tool_call>", "\nuser", "<mask>", "word")
pieces = st.one_of(st.sampled_from(WORDS), st.sampled_from(MARKS), st.text(max_size=5))
stretches = st.builds(lambda parts, times: "".join(parts) * times, st.lists(pieces, min_size=1), st.integers(1, 9))
Chain = list[BlockKey]


def keys_of(known: Chain | None, tokens: array[int], shared: int) -> Chain:
    """The keys of `blocks.key`, those of the known tokens taken over."""
    kept = known[: shared // 16] if known else []
    start = kept[-1] if kept else ROOT
    return kept + block_keys(tokens[len(kept) * 16 :], root=start, tokens_per_block=16)


def check(memo: Memo[Chain], tokenizer: Tokenizer, text: str, *, special: bool = True) -> Read[Chain]:
    found = memo.read(text, keys_of, special=special)
    whole = tokenizer.encode(text, special=special)
    assert found.tokens == whole
    assert found.chain == block_keys(whole, root=ROOT, tokens_per_block=16)
    return found


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_ids_are_those_of_tokenising_everything(tokenizer, data):
    """Whatever the texts and however they continue each other, ids and keys equal those of reading all of each."""
    memo: Memo[Chain] = Memo(tokenizer, 1 << 20)
    texts = ["".join(data.draw(st.lists(stretches, max_size=12)))]
    special = data.draw(st.booleans())
    for _ in range(4):
        check(memo, tokenizer, texts[-1], special=special)
        before = data.draw(st.sampled_from(texts))
        cut = data.draw(st.integers(0, len(before)))
        texts.append(before[:cut] + "".join(data.draw(st.lists(stretches, max_size=4))))


@given(parts=st.lists(stretches, min_size=1, max_size=8), other=stretches)
@settings(max_examples=15, deadline=None)
def test_a_cut_is_one_whatever_is_around_it(tokenizer, parts, other):
    """Text before a cut, and text behind it, have the ids that they have alone, and beside other texts."""
    text = "".join(parts)
    tokens, cuts = tokenizer.encode_with_cuts(text)
    for character, token in zip(cuts.characters, cuts.tokens, strict=True):
        before, behind = text[:character], text[character:]
        assert tokenizer.encode(behind, special=False) == tokens[token:]
        assert tokenizer.encode(before, special=False) == tokens[:token]
        if not before.endswith((" ", "\n")):
            mark = behind[: tokenizer.margin]
            assert tokenizer.encode(before + mark + other, special=False)[:token] == tokens[:token]


def turns(mark: str) -> list[str]:
    line = "what is known is not read again, and this goes on for a while. "
    system = mark + "system" + line * 20
    return [system + "".join(f"{mark}user{turn}" + line * 8 for turn in range(count)) for count in range(1, 6)]


@pytest.mark.parametrize("mark", ["<|im_start|>", "\n"])
def test_only_what_a_turn_adds_is_tokenised(mark):
    """Of a conversation's next turn all but the last known lines are taken over, with special tokens or without."""
    tokenizer = Tokenizer(gpt_2())
    memo: Memo[Chain] = Memo(tokenizer, 1 << 20)
    found = [check(memo, tokenizer, text) for text in turns(mark)]
    assert found[0].known_tokens == 0
    turn = len(found[2].tokens) - len(found[1].tokens)
    for before, after in pairwise(found):
        assert after.known_tokens >= len(before.tokens) - 2 * turn


def test_a_shared_beginning_is_read_once():
    """Conversations with the same system prompt take it over from each other."""
    tokenizer = Tokenizer(llama_3())
    memo: Memo[Chain] = Memo(tokenizer, 1 << 20)
    system = "<|im_start|>system\n" + "You are a helpful assistant.\n" * 100
    first = check(memo, tokenizer, system + "<|im_start|>user\nOne question" * 30)
    second = check(memo, tokenizer, system + "<|im_start|>user\nAnother one" * 30)
    assert second.known_tokens > 0.9 * len(tokenizer.encode(system))
    assert first.tokens[:100] == second.tokens[:100]
    assert first.tokens[0] == 0, "the token for the beginning is there"


def test_a_special_token_that_is_not_all_known_is_no_place_to_begin():
    """Where what is known ends inside a special token, the next text may go on otherwise, and so be split otherwise."""
    raw = Tok(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(["x !<! x !<! x"], trainers.BpeTrainer(special_tokens=["<s>"], show_progress=False))
    tokenizer = Tokenizer(raw)
    memo: Memo[Chain] = Memo(tokenizer, 1 << 20)
    known = "x " * 255 + "!<"
    assert len(known) == 2 * CHUNK_BYTES
    check(memo, tokenizer, known + "s> x")
    check(memo, tokenizer, known + "! x")


def test_tenants_do_not_share():
    """A text that is known under one salt is not known under another."""
    tokenizer = Tokenizer(gpt_2())
    memo: Memo[Chain] = Memo(tokenizer, 1 << 20)
    text = turns("<|im_start|>")[-1]
    memo.read(text, keys_of, special=True, apart=(b"one",))
    assert memo.read(text, keys_of, special=True, apart=(b"two",)).known_tokens == 0
    assert memo.read(text, keys_of, special=True, apart=(b"one",)).known_tokens > 0


def test_memory_is_bounded():
    """The texts read longest ago are forgotten, whole, and their place is free again."""
    tokenizer = Tokenizer(gpt_2())
    memo: Memo[Chain] = Memo(tokenizer, 60_000)
    for number in range(50):
        check(memo, tokenizer, f"{number} " + "\nline " * (20 * number))
        assert memo.nbytes <= 60_000
        held = {id(text) for text in memo._texts}
        assert {id(text) for text in memo._holders.values()} <= held
        assert memo.nbytes == sum(text.nbytes for text in memo._texts)
    assert check(memo, tokenizer, "x" * 100_000).known_tokens == 0, "what is too large is read, and not kept"
    assert memo.nbytes <= 60_000


def test_a_conversation_takes_its_own_place():
    """Turn by turn, one conversation is one entry."""
    tokenizer = Tokenizer(gpt_2())
    memo: Memo[Chain] = Memo(tokenizer, 1 << 24)
    text = "\nbegin"
    for _ in range(30):
        text += "\nuser: and another line, as long as a turn"
        check(memo, tokenizer, text)
    assert len(memo._texts) == 1
