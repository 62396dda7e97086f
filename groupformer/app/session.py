"""What the app does, without its page: one loaded model, and what can be shown about it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, set_seed

import groupformer

from ..conversion.loading import best_device
from ..measuring.cache import cache_bytes_per_token
from ..measuring.evaluation import evaluate
from ..measuring.speed import measure
from ..model.configuration_groupformer import divisors


LONGEST_SENTENCE = 48  # tokens in the attention view: more are not readable


@dataclass
class Attention:
    """Where every head looks: tokens, and for each layer the probabilities (heads, T, T)."""

    tokens: list[str]
    layers: list[torch.Tensor]
    kv_heads: list[int]


class Stop(StoppingCriteria):
    """Ends a generation from another thread."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


@dataclass
class Session:
    """A GroupFormer with its tokenizer, and the regrouped models that were asked for."""

    model: Any
    tokenizer: Any
    name: str
    regrouped: dict[int, Any] = field(default_factory=dict)
    twins: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | None = None) -> "Session":
        """The model of a folder or Hub id; by default the checkpoint that ships, or a small fresh model.

        On the device that is named, by default the best there is.

        Raises:
            ValueError: a damaged checkpoint, or a model that is no causal GroupFormer.
        """
        from ..training.demo import load, shipped_checkpoint

        device = best_device(device)
        chosen = source or shipped_checkpoint()
        model, tokenizer = load(chosen)
        model.to(device)
        if not isinstance(model, groupformer.GroupFormerForCausalLM):
            raise ValueError(f"{chosen} is a {type(model).__name__}; import it first: groupformer import {chosen} DST")
        if not model.config.is_causal:
            raise ValueError(f"{chosen} has is_causal=False: it predicts no next token")
        name = Path(chosen).name if chosen and Path(chosen).is_dir() else str(chosen or "a small fresh model")
        return cls(model.eval(), tokenizer, name)

    # Generation ------------------------------------------------------------------------------------------------------

    def read(self, prompt: str, room: int = 0) -> torch.Tensor:
        """Token ids (1, T) of a prompt.

        Raises:
            ValueError: no text, or too long for the positions, with `room` tokens to come.
        """
        if not prompt or not prompt.strip():
            raise ValueError("The text is empty; write something to go on from.")
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        limit = self.model.config.max_position_embeddings
        if ids.shape[1] + room > limit:
            raise ValueError(
                f"The text has {ids.shape[1]} tokens; with {room} to come that exceeds the {limit} positions of this "
                "model. Shorten it."
            )
        return ids.to(self.model.device)

    def stream(
        self, prompt: str, max_new_tokens: int = 60, temperature: float = 0.0, model: Any = None
    ) -> Iterator[str]:
        """The prompt and its continuation, longer with every token; closing the iterator ends the generation."""
        ids = self.read(prompt, int(max_new_tokens))
        streamer = TextIteratorStreamer(self.tokenizer, skip_special_tokens=True, timeout=300)
        stop, failures = Stop(), []
        sampling = {"do_sample": True, "temperature": float(temperature)} if temperature > 0 else {"do_sample": False}

        def work() -> None:
            try:
                (model or self.model).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=int(max_new_tokens),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **sampling,
                )
            except Exception as error:  # raised again below, in the thread that shows it
                failures.append(error)
                streamer.end()

        set_seed(0)
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:
            stop.asked.set()
            worker.join()
        if failures:
            raise failures[0]

    # Regrouping ------------------------------------------------------------------------------------------------------

    @cached_property
    def sample(self) -> tuple[str, str]:
        """Text that ships: the first half to measure the inputs on, the second, held out, to score."""
        text = (Path(__file__).parent.parent / "samples" / "river.txt").read_text(encoding="utf-8")
        middle = text.index("\n", len(text) // 2)
        return text[:middle], text[middle:]

    def legal_counts(self) -> list[int]:
        """The KV-head counts that this model can be regrouped to, its own included."""
        config = self.model.config
        smallest = min(layer.num_key_value_heads for layer in config.per_layer_config)
        return [
            count
            for count in divisors(config.num_attention_heads)
            if count <= smallest and all(not layer.num_key_value_heads % count for layer in config.per_layer_config)
        ]

    def with_kv_heads(self, wanted: int) -> tuple[int, Any]:
        """The model with so many KV heads, or with the next smaller count that is legal; made once."""
        count = max(legal for legal in self.legal_counts() if legal <= max(1, int(wanted)))
        if count not in self.regrouped:
            ids = self.tokenizer(self.sample[0], return_tensors="pt").input_ids
            ids = ids[:, : self.model.config.max_position_embeddings].to(self.model.device)
            self.regrouped[count] = groupformer.regroup(self.model, count, grouping="similar", calibration=ids)
        return count, self.regrouped[count]

    def compare(self, wanted: int) -> list[list[Any]]:
        """Rows (model, KV heads, cache bytes a token, tokens a second, bits per byte) of the original and the new."""
        count, small = self.with_kv_heads(wanted)
        models = {"original": self.model, "regrouped": small}
        speeds = measure(models, context=64, new_tokens=16, rounds=2)
        rows = []
        for (name, model), speed in zip(models.items(), speeds):
            heads = sorted({layer.num_key_value_heads for layer in model.config.per_layer_config})
            scores = evaluate(model, self.tokenizer, [self.sample[1]])
            rows.append(
                [
                    name,
                    " or ".join(map(str, heads)),
                    cache_bytes_per_token(model.config, model.dtype),
                    round(speed["decode_tokens_per_second"], 1),
                    round(scores["bits_per_byte"], 3),
                ]
            )
        return rows

    # Attention -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def attend(self, sentence: str, kv_heads: int | None = None) -> Attention:
        """The attention of every layer and head on a sentence; of the regrouped model where `kv_heads` is given.

        Raises:
            ValueError: no text, or more tokens than can be shown.
        """
        ids = self.read(sentence)
        if ids.shape[1] > LONGEST_SENTENCE:
            raise ValueError(f"The text has {ids.shape[1]} tokens; the view shows at most {LONGEST_SENTENCE}.")
        model = self.model if kv_heads is None else self.with_kv_heads(kv_heads)[1]
        if id(model) not in self.twins:
            self.twins[id(model)] = eager_twin(model)
        output = self.twins[id(model)](ids, output_attentions=True, use_cache=False)
        heads = [layer.num_key_value_heads for layer in model.config.per_layer_config]
        tokens = [self.tokenizer.decode([token]) for token in ids[0].tolist()]
        return Attention(tokens, [layer[0].float().cpu() for layer in output.attentions], heads)


def eager_twin(model: Any) -> Any:
    """The same weights, not copied, with the backend that returns probabilities."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    twin.load_state_dict(model.state_dict(), assign=True)
    if twin.model.rotary_emb is not None:  # its frequencies are no weights
        twin.model.rotary_emb = model.model.rotary_emb
    twin.tie_weights()
    return twin.eval()
