"""`groupformer generate`: text from any causal language model, as it comes."""

import sys
from typing import Annotated

import typer

from .shared import RUN, Device, Dtype, DtypeOption, Tokenizer, bar_for_large, checkpoint


def add_commands(app: typer.Typer) -> None:
    app.command("generate", rich_help_panel=RUN)(generate_command)


def generate_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH|HUB_ID", callback=checkpoint, help="A causal language model: folder, GGUF, adapter, Hub id."
        ),
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from standard input.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    tokenizer: Tokenizer = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
) -> None:
    """Stream a continuation of a prompt.

    Example: groupformer generate hub_card "The cell membrane is" --temperature 0.8 --max-new-tokens 50
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("prompt is empty; give some text to go on from")

    import torch
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed

    import groupformer  # noqa: F401  registers the architecture

    from ..conversion.loading import best_device, check_token_ids, load_checked, load_tokenizer
    from ..measuring.cache import positions_of

    device = best_device(device)
    bar_for_large(source)
    words = load_tokenizer(source, tokenizer)
    if chat and not words.chat_template:
        raise ValueError(f"--chat: the tokenizer of {tokenizer or source} has no chat template; leave --chat out")
    if chat:
        messages = [{"role": "user", "content": text}]
        inputs = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = words(text, return_tensors="pt", return_token_type_ids=False)
    token_ids = inputs["input_ids"][0].tolist()
    check_token_ids(token_ids, words, "the prompt")
    model = load_checked(AutoModelForCausalLM, source, dtype=dtype.value).to(device)
    check_token_ids(token_ids, words, "the prompt", model.config.get_text_config().vocab_size)
    limit = positions_of(model.config)
    if limit is not None:
        if len(token_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(token_ids):,} tokens, but the model has {limit:,} positions; shorten the prompt"
            )
        max_new_tokens = min(max_new_tokens, limit - len(token_ids))
    set_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    with torch.no_grad():
        model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(words, skip_prompt=chat, skip_special_tokens=True),
            **sampling,
        )
