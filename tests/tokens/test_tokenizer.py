"""A tokenizer's ids are those that transformers gives."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokens.conftest import made
from tests.tokens.tokenizers_made import MAKERS
from thermocline.engines import tiny
from thermocline.errors import ModelError
from thermocline.tokens.tokenizer import load_tokenizer

AROUND = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "",
    "a",
    " Hello  world\n\n<|im_start|>user\ndon't<|im_end|>",
    "Grüße, 世界 e\u0301 🌊",
    "<s>twice</s>",
    "x" * 999,
]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("around", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_ids_are_those_of_transformers(tmp_path, name, around):
    """With special tokens around a text and without, as the tokenizer's file or its configuration wants it."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=made(name), **AROUND, **around)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | around))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours, _ = load_tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special=special).tolist() == theirs.encode(text, add_special_tokens=special)


def test_truncation_and_padding_are_off(tmp_path):
    """A tokenizer's file may ask for both, which would change long and short prompts."""
    tokenizer = MAKERS["gpt_2"]()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, config = load_tokenizer(tmp_path / "tokenizer.json")
    assert config == {}
    assert len(ours.encode("one two three four five six seven")) > 3
    assert len(ours.encode("a")) == 1


def test_what_is_no_tokenizer_is_told(tmp_path):
    """A folder without one, or with a damaged one, is named in the error."""
    with pytest.raises(ModelError, match="cannot read a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read a tokenizer"):
        load_tokenizer(tmp_path)
    MAKERS["gpt_2"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ModelError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


def test_the_built_in_models_tokenizer_is_read():
    """The folder of the built-in model is one that can be read."""
    tokenizer, config = load_tokenizer(tiny.ensure())
    assert tokenizer.decode(tokenizer.encode("some words")) == "some words"
    assert config["chat_template"] if "chat_template" in config else (tiny.folder() / "chat_template.jinja").is_file()
