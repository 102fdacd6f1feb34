"""Tokenizers of the kinds that models have, trained in a moment on the texts that ship with the package."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from thermocline.engines import tiny

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "[INST]", "[/INST]", "<start_of_turn>")


UNKNOWN = SPECIAL[1]


def _trained(tokenizer: Tokenizer, *, byte_alphabet: bool = True) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_alphabet else []
    kind = trainers.WordPieceTrainer if isinstance(tokenizer.model, models.WordPiece) else trainers.BpeTrainer
    trainer = kind(vocab_size=1500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text[:20_000] for text in tiny.texts()], trainer)
    return tokenizer


def gpt_2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer)


def roberta() -> Tokenizer:
    """A blank goes before every stretch of text that has none."""
    tokenizer = gpt_2()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def looking_back() -> Tokenizer:
    """Words are told by what is before them: a letter that begins a text is not one behind a line's end."""
    tokenizer = gpt_2()
    split = pre_tokenizers.Split(Regex(r"(?<=\n)\w|\w+|\W"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def llama_3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = _trained(tokenizer)
    begin = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return tokenizer


def qwen() -> Tokenizer:
    tokenizer = llama_3()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("\nuser", normalized=True)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it: no words, one blank put before every stretch of text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer = _trained(tokenizer, byte_alphabet=False)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", 0)])
    return tokenizer


def mistral() -> Tokenizer:
    """As Mistral's later files have it: a blank before the very first word only."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = _trained(tokenizer, byte_alphabet=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def swallowing() -> Tokenizer:
    """Special tokens that take the blanks around them, and one that counts as a word of its own only."""
    tokenizer = gpt_2()
    tokenizer.add_special_tokens(
        [
            AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("word", single_word=True, normalized=False),
        ]
    )
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (gpt_2, roberta, looking_back, llama_3, qwen, sentencepiece, mistral, gemma, bert, swallowing)
}
