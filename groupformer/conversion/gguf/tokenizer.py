"""A byte-level BPE tokenizer as GGUF metadata.

llama.cpp knows a tokenizer's splitting of text into words by name, each name standing for regular expressions in its
code. A tokenizer that splits otherwise would give other tokens there, so it is refused.
"""

from pathlib import Path
from typing import Any

from ...model.configuration_groupformer import GroupFormerConfig
from ..folders import read_json


# Kinds of tokens, as llama.cpp numbers them.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Llama.cpp stops at any of these.
END_TOKENS = ("eos", "eot", "eom")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# How a tokenizer.json splits text, step by step, to llama.cpp's name for it.
SPLITS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (LLAMA3_SPLIT,): "llama-bpe",
    (QWEN2_SPLIT,): "qwen2",
}


def splitting_of(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer: "words" is GPT-2's own expression, "digits" splits each digit off."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in splitting_of(part))
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ("words",) if pre_tokenizer.get("use_regex", True) else ()
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert"):
        return (str(pre_tokenizer["pattern"].get("Regex")),)
    return (f"{kind} {pre_tokenizer}",)


def tokenizer_metadata(folder: Path, config: GroupFormerConfig) -> dict[str, Any]:
    """Metadata of the folder's tokenizer.

    Raises:
        ValueError: no byte-level BPE in tokenizer.json, or one that splits text in a way that llama.cpp does not know.
    """
    hint = "pass tokenizer=False (--no-tokenizer) to write the weights alone"
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json; {hint}")
    content = read_json(folder / "tokenizer.json")
    model = content["model"]
    steps = splitting_of(content.get("pre_tokenizer"))
    normalizer = content.get("normalizer")
    for is_wrong, what in (
        (model.get("type") != "BPE" or model.get("byte_fallback"), f"its model is {model.get('type')}"),
        (normalizer and not is_composing(normalizer), f"its normalizer is {normalizer}"),
        (steps not in SPLITS, f"it splits text by {', '.join(steps) or 'nothing'}"),
    ):
        if is_wrong:
            raise ValueError(
                f"the tokenizer in {folder} is not one of the byte-level BPEs that llama.cpp knows: {what}; {hint}"
            )
    tokens, types = token_list(content, config.vocab_size)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": SPLITS[steps],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.add_bos_token": adds_begin_token(content),
    }
    ends = dict(zip(END_TOKENS, end_token_ids(folder, config)))
    for name, value in {"bos": config.bos_token_id, **ends, "padding": config.pad_token_id}.items():
        if value is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = value
    template = read_template(folder)
    return {**metadata, "tokenizer.chat_template": template} if template else metadata


def is_composing(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer only composes characters (Qwen 2).

    Llama.cpp has none, and its own converter passes this one over: text that is composed already, as nearly all text
    is, gets the same tokens.
    """
    steps = normalizer.get("normalizers", [normalizer])
    return all(step.get("type") == "NFC" for step in steps)


def end_token_ids(folder: Path, config: GroupFormerConfig) -> list[int]:
    """All tokens that end a generation: those of generation_config.json, or of the config.

    Raises:
        ValueError: more than llama.cpp has names for.
    """
    path = folder / "generation_config.json"
    ids = (read_json(path).get("eos_token_id") if path.exists() else None) or config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if len(ids) > len(END_TOKENS):
        raise ValueError(
            f"eos_token_id ({ids}) names {len(ids)} tokens, but GGUF holds at most {len(END_TOKENS)}; leave the "
            "others out of generation_config.json"
        )
    return ids


def token_list(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens by id, as many as the embeddings have rows, and their kinds."""
    vocabulary = {index: token for token, index in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    highest = max((*vocabulary, *added))
    if highest >= size:
        raise ValueError(
            f"vocab_size ({size}) has no row for token {highest} of tokenizer.json; resize the embeddings"
        )
    tokens, types = [], []
    for index in range(size):
        if index in added:
            tokens.append(added[index]["content"])
            types.append(CONTROL if added[index].get("special") else USER_DEFINED)
        else:
            tokens.append(vocabulary.get(index, f"[PAD{index}]"))
            types.append(NORMAL if index in vocabulary else UNUSED)
    return tokens, types


def adds_begin_token(content: dict[str, Any]) -> bool:
    """Whether encoding puts a special token before the text."""
    post = content.get("post_processor") or {}
    parts = post.get("processors", [post])
    return any("SpecialToken" in part.get("single", [{}])[0] for part in parts if part.get("single"))


def read_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    return template if isinstance(template, str) else None
