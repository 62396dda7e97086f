"""What the app does, without its page: one loaded model, and what can be shown about it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, set_seed

import groupformer

from ..conversion.loading import best_device, load_checked, load_tokenizer
from ..measuring.cache import cache_bytes_per_token, decoder_of, layer_caches
from ..measuring.evaluation import evaluate
from ..measuring.speed import measure
from ..model.configuration_groupformer import divisors
from ..samples import sample_text, shipped_checkpoint


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
    """A decoder of transformers with its tokenizer, and the regrouped models that were asked for."""

    model: Any
    tokenizer: Any
    name: str
    regrouped: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | None = None) -> "Session":
        """The model of a folder or Hub id, by default the checkpoint that ships; in float32, on the best device.

        Raises:
            ValueError: a damaged checkpoint, no tokenizer, or a model that predicts no next token.
        """
        source = source or shipped_checkpoint()
        model = load_checked(AutoModelForCausalLM, source, dtype=torch.float32).to(best_device(device))
        if not getattr(model.config, "is_causal", True):
            raise ValueError(f"{source} has is_causal=False: it predicts no next token")
        return cls(model.eval(), load_tokenizer(source), Path(source).name if Path(source).is_dir() else str(source))

    def kv_heads(self, model: Any = None) -> list[int]:
        """The number of key-value heads in each layer, of a model or of the session's own."""
        return [layer.kv_heads for layer in layer_caches(decoder_of((model or self.model).config))]

    @property
    def position_limit(self) -> int | None:
        """The positions that the config names, if it names any."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    # Generation ------------------------------------------------------------------------------------------------------

    def read(self, prompt: str, room: int = 0) -> torch.Tensor:
        """Token ids (1, T) of a prompt.

        Raises:
            ValueError: no text, or too long for the positions, with `room` tokens to come.
        """
        if not prompt or not prompt.strip():
            raise ValueError("The text is empty; write something to go on from.")
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        limit = self.position_limit
        if limit is not None and ids.shape[1] + room > limit:
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

    def legal_counts(self) -> list[int]:
        """The KV-head counts that every layer of this model can be regrouped to, the present one included."""
        present = self.kv_heads()
        return [count for count in divisors(min(present)) if not any(heads % count for heads in present)]

    def with_kv_heads(self, wanted: int) -> tuple[int, Any]:
        """The model with so many KV heads, or with the next smaller count that is legal; made once."""
        count = max(legal for legal in self.legal_counts() if legal <= max(1, int(wanted)))
        if count not in self.regrouped:
            ids = self.tokenizer(sample_text()[0], return_tensors="pt").input_ids
            ids = ids[:, : self.position_limit].to(self.model.device)
            self.regrouped[count] = groupformer.regroup(self.model, count, calibration=ids)
        return count, self.regrouped[count]

    def save(self, wanted: int, folder: str | Path) -> str:
        """Saves the model with so many KV heads, with its tokenizer, and returns the name of its class.

        Raises:
            ValueError: the folder exists and is not empty.
        """
        folder = Path(folder).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; choose a new folder to save to.")
        _, small = self.with_kv_heads(wanted)
        small.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return type(small).__name__

    def compare(self, wanted: int) -> list[list[Any]]:
        """Rows (what, original, regrouped): KV heads, bytes of cache a token, bits per byte, tokens a second."""
        count, small = self.with_kv_heads(wanted)
        models = {"original": self.model, "regrouped": small}
        speeds = measure(models, context=64, new_tokens=16, rounds=2)
        scores = [evaluate(model, self.tokenizer, [sample_text()[1]]) for model in models.values()]
        return [
            ["KV heads", *(" or ".join(map(str, sorted(set(self.kv_heads(model))))) for model in models.values())],
            ["cache, bytes a token", *(cache_bytes_per_token(each.config, each.dtype) for each in models.values())],
            ["bits per byte", *(round(score["bits_per_byte"], 3) for score in scores)],
            ["tokens a second", *(round(speed["decode_tokens_per_second"], 1) for speed in speeds)],
        ]

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
        with eager_attention(model):
            output = model(ids, output_attentions=True, use_cache=False)
        tokens = [self.tokenizer.decode([token]) for token in ids[0].tolist()]
        return Attention(tokens, [layer[0].float().cpu() for layer in output.attentions], self.kv_heads(model))


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Lets the model compute with the backend that returns probabilities."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
