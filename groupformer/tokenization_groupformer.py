# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""GroupFormer's tokenizer: byte-level BPE of 16,384 tokens, in which every string has exactly one way back.

- Bytes are the alphabet, so nothing is unknown and `decode(encode(text)) == text` for any string.
- Each digit is a token of its own (with the space before it, where there is one), so numbers are read digit by digit.
- Nothing is added to a text: no begin token, no end token. Chat templates and training recipes place them.
- The text of a special token inside a string becomes that token, as everywhere in transformers; pass
  `split_special_tokens=True` to read it as plain text.

The class also travels to the Hub as remote code, so it imports nothing but transformers and tokenizers.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend


# In the order of their ids, from 0 on.
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")

# The vocabulary that ships in the package. On the Hub there is none: a repository brings its own tokenizer.json.
SHIPPED_VOCABULARY = Path(__file__).parent / "vocabulary" / "tokenizer.json"

# A turn is its role's token, its text and the end token. `generation` marks what the assistant says, for loss masks.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("role (" + message['role'] + ") is unknown; choose system, user or assistant") -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class GroupFormerTokenizer(TokenizersBackend):
    """A fast byte-level BPE tokenizer; without arguments, the one that ships in the package.

    Args:
        tokenizer_file (`str`, *optional*): A `tokenizer.json` of the `tokenizers` library.
        tokenizer_object (`tokenizers.Tokenizer`, *optional*): A tokenizer in memory, instead of a file.
        bos_token, eos_token, pad_token (`str`, default to `"<|begin|>"`, `"<|end|>"`, `"<|pad|>"`): Special tokens.
        chat_template (`str`, *optional*): A Jinja template; by default one with system, user and assistant turns.

    Raises:
        ValueError: neither file nor object is given, and no vocabulary lies beside this module.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    slow_tokenizer_class = None

    def __init__(
        self,
        tokenizer_file: str | None = None,
        tokenizer_object: Tokenizer | None = None,
        bos_token: str | AddedToken = "<|begin|>",
        eos_token: str | AddedToken = "<|end|>",
        pad_token: str | AddedToken = "<|pad|>",
        chat_template: str | dict | None = None,
        **kwargs,
    ):
        if tokenizer_file is None and tokenizer_object is None:
            if not SHIPPED_VOCABULARY.is_file():
                raise ValueError(
                    "tokenizer_file (None) must be given: no vocabulary lies beside this module; "
                    "use GroupFormerTokenizer.from_pretrained(folder or Hub id)"
                )
            tokenizer_file = str(SHIPPED_VOCABULARY)
        super().__init__(
            tokenizer_file=tokenizer_file,
            tokenizer_object=tokenizer_object,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
            **kwargs,
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        """Transformers takes vocabulary and merges out of the file here; ours is loaded whole, as it was saved."""
        return kwargs


__all__ = ["GroupFormerTokenizer"]
