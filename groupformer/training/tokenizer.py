"""Trains and measures GroupFormer's tokenizer. `docs/tokenizer.md` says what was tried, and what each step gave."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..model.tokenization_groupformer import SPECIAL_TOKENS, GroupFormerTokenizer


# A run of white space up to its last line break. `*+` never gives back what it took: with a plain `*`, millions of
# blanks without a line break would exceed the regular expression engine's limit on second tries, which is a panic.
LINE_BREAKS = r"(?:[^\S\r\n]*+[\r\n]+)+"

# What becomes one piece, before any merge. Every character matches some alternative, so nothing is lost.
PIECES = "|".join(
    (
        r"(?i:['’](?:s|t|re|ve|m|ll|d))",  # the end of a contraction, with a straight or a curly apostrophe
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word, with the space, quote, dot or underscore before it
        r" ?\p{N}",  # one digit
        rf" ?[^\s\p{{L}}\p{{N}}]+(?:{LINE_BREAKS}(?:[ \t]+(?![^ \t]))?)?",  # punctuation, with line breaks after it
        rf"{LINE_BREAKS}(?:[ \t]+(?!\S))?",  # line breaks and the indentation after them, less the space before a word
        r"\s+(?!\S)|\s+",  # other blanks, likewise
    )
)

# Requests to a machine speak of "I" and "you", and ask. Few sentences of textbooks do, so these count more.
SPOKEN = re.compile(
    r"\b(i|i'm|i'd|my|me|you|your|please|we|our|us)\b|\?$"
    r"|^(what|how|can|who|where|when|why|is|are|do|does|did|could|would|should|which)\b"
)
SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
SPOKEN_WEIGHT = 6  # how often each spoken sentence is repeated, in lower case
CODE_WEIGHT = 1.5  # how often each code file counts


def spoken_sentences(texts: Iterable[str]) -> Iterator[str]:
    """The sentences of texts that sound like requests, one by one, in lower case and with straight apostrophes."""
    for text in texts:
        for sentence in SENTENCE_END.split(text.lower().replace("’", "'")):
            if SPOKEN.search(sentence):
                yield sentence


def training_mix(prose: list[str], code: list[str]) -> Iterator[str]:
    """What the merges are counted on: prose, its spoken sentences `SPOKEN_WEIGHT` times, code `CODE_WEIGHT` times.

    Sentences by themselves also teach how words look at the start of a text, where no space stands before them.
    """
    yield from prose
    for sentence in spoken_sentences(prose):
        for _ in range(SPOKEN_WEIGHT):
            yield sentence
    whole, part = divmod(CODE_WEIGHT, 1)
    for _ in range(int(whole)):
        yield from code
    if part:
        yield from code[:: round(1 / part)]


def train_tokenizer(prose: list[str], code: list[str], vocab_size: int = 16384) -> GroupFormerTokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2016, section 3.2, on bytes), of exactly `vocab_size` tokens.

    The result depends on the texts alone: of the `textbooks` and `code` sets, the defaults make the vocabulary that
    ships, byte for byte.

    Args:
        prose: Texts in natural language.
        code: Source files.
        vocab_size: Number of tokens, the special ones and the 256 bytes included.

    Raises:
        ValueError: a vocabulary too small for bytes and special tokens, texts too small to fill it, or something among
            the texts that is none.
    """
    check_texts("prose", prose)
    check_texts("code", code)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size ({vocab_size}) must hold bytes and special tokens; choose at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(alphabet),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_mix(prose, code), trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) is more than the texts fill ({tokenizer.get_vocab_size()} tokens); "
            "give more text or choose a smaller vocabulary"
        )
    return GroupFormerTokenizer(tokenizer_object=tokenizer)


def evaluate_tokenizer(tokenizer: Any, texts: Mapping[str, list[str]]) -> dict[str, dict[str, float]]:
    """Bytes (UTF-8), tokens and bytes per token of each named list of texts; special tokens are not added.

    Raises:
        ValueError: a list without any text, or with something in it that is none.
    """
    rows = {}
    for name, items in texts.items():
        check_texts(f"texts[{name!r}]", items)
        size = sum(len(text.encode("utf-8")) for text in items)
        if size == 0:
            raise ValueError(f"texts[{name!r}] is empty; give at least one text that is not")
        encoded = tokenizer(items, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        tokens = sum(len(input_ids) for input_ids in encoded)
        rows[name] = {"bytes": size, "tokens": tokens, "bytes_per_token": size / tokens}
    return rows


def check_texts(name: str, texts: list[str]) -> None:
    """Raises ValueError if `texts` is a single text, or holds anything else than texts, such as empty cells."""
    if isinstance(texts, str):
        raise ValueError(f"{name} ({texts[:20]!r}) is a single text; give a list of texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] ({text!r}) is not a text; leave such rows out")
