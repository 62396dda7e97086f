# Copyright 2026 The GroupFormer authors. Licensed under the Apache License, Version 2.0.
"""GroupFormer's tokenizer: byte-level BPE of 16,384 tokens, in which every string has exactly one way back.

- Bytes are the alphabet, so nothing is unknown and `decode(encode(text)) == text` for any string.
- Each digit is a token of its own (with the space before it, where there is one), so numbers are read digit by digit.
- Nothing is added to a text: no begin token, no end token. Chat templates and training recipes place them.
- The text of a special token inside a string becomes that token, as everywhere in transformers; pass
  `split_special_tokens=True` to read it as plain text. Either way it is decoded as it was written.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend


# Each opens a turn of a conversation.
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

# In the order of their ids, from 0 on.
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", *ROLE_TOKENS)

# The vocabulary that ships in the package. On the Hub there is none: a repository brings its own tokenizer.json.
SHIPPED_VOCABULARY = Path(__file__).parent / "vocabulary" / "tokenizer.json"

# Tokens to which `truncation=True` cuts, where no limit is given: the positions of `GroupFormerConfig()`.
MODEL_MAX_LENGTH = 2048

# A turn is its role's token, its text and the end token. `generation` marks what the assistant says, for loss masks.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- set where = "content of role " + message['role'] -%}
    {%- set remedy = "; give a text, or a list of parts {'type': 'text', 'text': ...}" -%}
    {%- set content = message['content'] -%}
    {%- if content is not defined or content is none -%}
        {{- raise_exception(where + " is missing or None" + remedy) -}}
    {%- elif content is string -%}
        {{- content -}}
    {%- elif content is mapping or content is not sequence -%}
        {{- raise_exception(where + " (" + content | string + ") is no text" + remedy) -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is not mapping or part['type'] != 'text' or part['text'] is not string -%}
                {{- raise_exception(where + " has a part that is no text (" + part | string + ")" + remedy) -}}
            {%- endif -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("role (" + message['role'] + ") is unknown; choose system, user or assistant") -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- text_of(message) + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- text_of(message) + eos_token -}}
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
        extra_special_tokens (`list[str]`, *optional*): Further ones; by default those that open a turn.
        chat_template (`str`, *optional*): A Jinja template; by default one with system, user and assistant turns,
            whose content is a text or a list of parts of the type "text".
        model_max_length (`int`, defaults to 2048): Tokens to which `truncation=True` cuts: the model's positions.

    Special tokens that the vocabulary lacks are added at its end.

    Raises:
        ValueError: the file is not there; or neither file nor object is given, and none lies beside this module.
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
        extra_special_tokens: Sequence[str | AddedToken] | dict[str, str | AddedToken] | None = None,
        chat_template: str | dict | None = None,
        model_max_length: int | None = None,
        **kwargs,
    ):
        if tokenizer_file is None and tokenizer_object is None and kwargs.get("gguf_file") is None:
            if not SHIPPED_VOCABULARY.is_file():
                raise ValueError(
                    "tokenizer_file (None) must be given: no vocabulary lies beside this module; "
                    "use GroupFormerTokenizer.from_pretrained(folder or Hub id)"
                )
            tokenizer_file = str(SHIPPED_VOCABULARY)
        if tokenizer_file is not None and not Path(tokenizer_file).is_file():
            raise ValueError(f"tokenizer_file ({tokenizer_file}) is not there; give the path of a tokenizer.json")
        super().__init__(
            tokenizer_file=tokenizer_file,
            tokenizer_object=tokenizer_object,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            extra_special_tokens=list(ROLE_TOKENS) if extra_special_tokens is None else extra_special_tokens,
            chat_template=CHAT_TEMPLATE if chat_template is None else chat_template,
            model_max_length=MODEL_MAX_LENGTH if model_max_length is None else model_max_length,
            **kwargs,
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        """What `from_pretrained` passes to `__init__`: the file's path, for the file is loaded whole, as it was saved.

        Raises:
            OSError: the folder or repository has no `tokenizer.json`; the vocabulary of the package must not quietly
                stand in for it.
        """
        if all(kwargs.get(source) is None for source in ("tokenizer_file", "tokenizer_object", "gguf_file")):
            raise OSError(
                f"tokenizer.json is not in {kwargs.get('name_or_path')!r}; save a tokenizer there with "
                "save_pretrained, or use GroupFormerTokenizer() for the vocabulary that ships in the package"
            )
        return kwargs

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Saves as transformers' tokenizers do, but without the padding and truncation of the last call.

        Those would be taken for settings when the file is loaded: a tokenizer saved after a call that padded on the
        left would pad on the left for good.
        """
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["GroupFormerTokenizer"]
