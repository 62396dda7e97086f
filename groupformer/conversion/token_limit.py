"""How many tokens a tokenizer's `truncation=True` leaves: what the model has positions for."""

import json
from pathlib import Path
from typing import Any

from ..model.configuration_groupformer import GroupFormerConfig


NO_LIMIT = int(1e20)  # transformers' own value for a tokenizer without a limit is above

# Positions that have an end. ALiBi and no positions at all have none, so the tokenizer's own limit stays.
LIMITED = ("learned", "sinusoidal", "rope")


def token_limit(config: GroupFormerConfig, own: int | None = None) -> int | None:
    """The limit of a tokenizer that comes with a model: the positions', or the tokenizer's own if that is smaller."""
    own = None if own is None or own > NO_LIMIT else own
    if config.position_embedding_type not in LIMITED:
        return own
    return config.max_position_embeddings if own is None else min(own, config.max_position_embeddings)


def limit_tokenizer(tokenizer: Any, config: Any, *, fresh: bool = False) -> None:
    """Give a tokenizer the limit of the GroupFormer that it is saved with; of a fresh one, whatever its own was."""
    if isinstance(config, GroupFormerConfig):
        limit = token_limit(config, None if fresh else tokenizer.model_max_length)
        tokenizer.model_max_length = limit or tokenizer.model_max_length


def with_token_limit(folder: Path, config: GroupFormerConfig) -> str | None:
    """The text of the folder's tokenizer_config.json with the model's limit; None where it needs none or has it."""
    path = folder / "tokenizer_config.json"
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    limit = token_limit(config, content.get("model_max_length"))
    if limit == content.get("model_max_length") or limit is None:
        return None
    return json.dumps({**content, "model_max_length": limit}, indent=2, ensure_ascii=False) + "\n"
