"""A model's tokenizer: text to token ids, and the places where tokenising may begin anew."""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from thermocline.errors import ModelError

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CUT_EVERY_CHARACTERS = 256
TEXT_CHARACTERS_MAX = 32 << 20

_LOCAL_PIECES = frozenset({"ByteLevel", "Digits", "Punctuation", "Sequence", "Split", "Whitespace", "WhitespaceSplit"})
_LOCAL_FORMS = frozenset({"Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Sequence"})
_LOOKS_BACK = re.compile(r"\(\?<|\\[bBAG]|(?<!\[)\^")
_AROUND = ("bos_token", "eos_token")
_LINE = re.compile(r"\n[!-~]")


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where tokenising may begin anew: before character `characters[i]`, which is where token `tokens[i]` begins."""

    characters: array[int]
    tokens: array[int]

    @property
    def last(self) -> int:
        """The last of them; 0 where there is none."""
        return self.characters[-1] if self.characters else 0

    def before(self, character: int) -> tuple[int, int]:
        """The last cut at or before that character and its token; the beginning where there is none."""
        at = bisect_right(self.characters, character) - 1
        return (self.characters[at], self.tokens[at]) if at >= 0 else (0, 0)

    def behind(self, first: Cuts, character: int, token: int) -> Cuts:
        """The cuts of a text whose beginning, up to there, has the cuts `first`, and whose rest has these."""
        kept = bisect_right(first.characters, character)
        characters = first.characters[:kept] + array("I", [character + at for at in self.characters])
        return Cuts(characters, first.tokens[:kept] + array("I", [token + at for at in self.tokens]))


class Tokenizer:
    """Text to ids, as transformers and vLLM give them. Safe to use from several threads; encoding releases the GIL.

    Truncation and padding, which a tokenizer's file may ask for, are off. `begin` and `end` are the ids that `special`
    puts around a text; by default what the file says.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, begin: list[int] | None = None, end: list[int] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        found = _around(tokenizer)
        self.begin = array("I", found[0] if begin is None else begin)
        self.end = array("I", found[1] if end is None else end)
        added = tokenizer.get_added_tokens_decoder()
        self._marks = {
            at: token.content for at, token in added.items() if not token.normalized and not token.single_word
        }
        self._lines = _is_local(tokenizer)
        self.margin = 1 + max((len(token.content) for token in added.values()), default=0)
        """Characters behind a cut that must be known before it is one: a longer special token could begin before it."""

    def encode(self, text: str, *, special: bool = True) -> array[int]:
        """Token ids; `special` adds what the model expects around a text, such as a token for its beginning."""
        ids = array("I", self._encode(text).ids)
        return self.begin + ids + self.end if special else ids

    def encode_with_cuts(self, text: str) -> tuple[array[int], Cuts]:
        """Token ids with nothing around them, and where tokenising may begin anew.

        Text before a cut has the same ids whatever follows it, and text behind a cut has the same ids whatever is
        before it. That holds (1) at the beginning of a special token, at which tokenizers split a text before anything
        else, and (2) at a visible ASCII character that begins a line, where tokens never reach across a line's end and
        the rules by which a text is split do not look back. Where the split is not seen there, it is no cut.
        """
        encoded = self._encode(text)
        ids = array("I", encoded.ids)
        places = [(encoded.token_to_chars(at), at) for at, token in enumerate(ids) if token in self._marks]
        found = [(chars[0], at) for chars, at in places if chars and text.startswith(self._marks[ids[at]], chars[0])]
        line = _LINE.search(text) if self._lines else None
        while line:
            start = line.end() - 1
            found.append((start, encoded.char_to_token(start) or 0))
            line = _LINE.search(text, start + CUT_EVERY_CHARACTERS)
        cuts = Cuts(array("I"), array("I"))
        for character, token in sorted(found):
            if character >= CUT_EVERY_CHARACTERS + cuts.last and _begins(encoded, token, character):
                cuts.characters.append(character)
                cuts.tokens.append(token)
        return ids, cuts

    def decode(self, tokens: Any) -> str:  # noqa: ANN401  # any sequence of ints
        """The text of some tokens; incomplete characters become replacement characters."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _encode(self, text: str) -> tokenizers.Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)


def load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer in a folder, and its configuration, where the names of special tokens stand.

    Raises ModelError where there is none that can be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / FILE if path.is_dir() else path))
    except Exception as error:  # noqa: BLE001  # the binding raises nothing narrower
        raise ModelError(
            f"cannot read a tokenizer from {path}: {error}", hint=f"name the folder with the model's {FILE}"
        ) from None
    config = read_json(folder / CONFIG_FILE)
    if {"add_bos_token", "add_eos_token"}.isdisjoint(config):
        return Tokenizer(tokenizer), config
    names = special_names(config)
    ids = [tokenizer.token_to_id(names.get(name, "")) if config.get(f"add_{name}") else None for name in _AROUND]
    begin, end = ([] if token is None else [token] for token in ids)
    return Tokenizer(tokenizer, begin=begin, end=end), config


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a configuration names (`bos_token`, `eos_token`...), as templates are told them."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none. Raises ModelError for one that is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="fetch the model's files again") from None
    return found if isinstance(found, dict) else {}


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the file's post-processor puts before and behind a text. It must not depend on the text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    raise ModelError("this tokenizer changes a text's own ids when it adds special ones", hint="route without it")


def _begins(encoded: tokenizers.Encoding, token: int, character: int) -> bool:
    """True where that token begins exactly there, as the first of its piece of text."""
    chars = encoded.token_to_chars(token)
    return (
        token > 0
        and chars is not None
        and chars[0] == character
        and encoded.char_to_token(character - 1) != token
        and (encoded.token_to_word(token) is None or encoded.token_to_word(token) != encoded.token_to_word(token - 1))
    )


def _is_local(tokenizer: tokenizers.Tokenizer) -> bool:
    """True where what becomes of a line depends on nothing before it, as far as the parts' names and rules tell."""
    pieces, forms = _parts(tokenizer.pre_tokenizer, "pretokenizers"), _parts(tokenizer.normalizer, "normalizers")
    return (
        bool(pieces)
        and all(piece["type"] in _LOCAL_PIECES and not piece.get("add_prefix_space") for piece in pieces)
        and all(form["type"] in _LOCAL_FORMS for form in forms)
        and not any(_LOOKS_BACK.search(piece.get("pattern", {}).get("Regex", "")) for piece in pieces)
    )


def _parts(step: Any, nested: str) -> list[dict[str, Any]]:  # noqa: ANN401  # pre-tokenizers and normalizers
    """A step of a tokenizer and those in it, as its file has them."""
    if step is None:
        return []
    waiting, found = [json.loads(step.__getstate__())], []
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].get(nested, [])
    return found
