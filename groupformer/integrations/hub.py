"""Push a checkpoint folder to the Hub without loading the model; the code that loads it goes along."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..conversion.loading import check_files
from ..conversion.sources import first_line, is_adapter
from ..conversion.token_limit import with_token_limit
from ..model.configuration_groupformer import GroupFormerConfig


# What belongs to a checkpoint; training state, logs and whatever else lies beside it stays at home.
BELONGS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*_groupformer.py",
    "configuration_decilm.py",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "*.gguf",
    "space/*",
)

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- groupformer
- custom_code
- grouped-query-attention
---

# {name}

A GroupFormer with {heads} query heads on {kv_heads} key-value heads in each of {layers} layers. Its KV cache takes
{cache_bytes:,} bytes a token.

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
```

`trust_remote_code=True` runs the code of this repository. Where the package `groupformer` is
installed and imported, it is not needed.
"""

MODEL = Path(__file__).parent.parent / "model"  # whose files are the code that goes along

TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "Model": ("feature-extraction", "AutoModel"),
}


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload a checkpoint folder in one commit, with the code of a GroupFormer and a card where the folder has none.

    Args:
        folder: A checkpoint as `save_pretrained` writes it.
        repo_id: "user/name" on the Hub; made if it is not there.
        private: Whether a repository that is made is private.
        revision: A branch. Default: main.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no checkpoint, broken weights, or a Hub that refuses or cannot be reached; nothing is uploaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import filter_repo_objects

    folder = Path(folder)
    config = read_config(folder)
    check_files(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = filter_repo_objects(files, allow_patterns=list(BELONGS), ignore_patterns=["checkpoint-*/*"])
    contents: dict[str, str | bytes] = {name: str(files[name]) for name in names}
    if config.get("model_type") == "groupformer":
        limited = with_token_limit(folder, GroupFormerConfig.from_pretrained(folder))
        if limited is not None:
            contents["tokenizer_config.json"] = limited.encode()
        contents |= {name: str(MODEL / name) for name in missing_code(folder)}
    card = None if "README.md" in contents else card_of(folder, repo_id, config)
    if card is not None:
        contents["README.md"] = card.encode()
    with refused_by_hub(repo_id):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(name, content) for name, content in contents.items()],
            revision=revision,
            commit_message=message or f"Upload {folder.resolve().name}",
        )
    return str(commit.commit_url)


@contextmanager
def refused_by_hub(repo_id: str) -> Iterator[None]:
    """Names the repository and a remedy where the Hub is not asked, cannot be reached, or says no."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo_id} cannot be pushed while HF_HUB_OFFLINE=1 forbids to ask the Hub; unset it")
    if get_token() is None:
        raise ValueError(f"{repo_id} cannot be pushed without a token; log in first with: hf auth login")
    try:
        yield
    except HfHubHTTPError as error:
        raise ValueError(
            f"the Hub refuses {repo_id}: {first_line(error)}; check the name, or log in as somebody who may write "
            "there: hf auth login"
        ) from error
    except Exception as error:  # no network; the library's versions raise classes of different packages
        raise ValueError(f"{repo_id}: the Hub cannot be reached ({first_line(error)}); check the network") from error


def missing_code(folder: Path) -> list[str]:
    """The code files that a GroupFormer's folder lacks; where it has a model's code, which may be older, that goes."""
    tokenizer = folder / "tokenizer_config.json"
    names = sorted(path.name for path in MODEL.glob("*_groupformer.py"))
    if not tokenizer.is_file() or "tokenization_groupformer" not in tokenizer.read_text(encoding="utf-8"):
        names.remove("tokenization_groupformer.py")
    if (folder / "modeling_groupformer.py").is_file():
        names = [name for name in names if name.startswith("tokenization")]
    return [name for name in names if not (folder / name).is_file()]


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint folder that can be pushed.

    Raises:
        ValueError: see `push_folder`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that save_pretrained has written")
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter without its model; merge it first: groupformer import {folder} DST")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder that save_pretrained has written")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors file; give a folder that save_pretrained has written")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def card_of(folder: Path, repo_id: str, content: dict[str, Any]) -> str | None:
    """A card that says what a checkpoint is and what was done to its heads; None for a native one that is as it was.

    Args:
        content: Of its config.json.
    """
    from .model_card import regrouped_card

    card = groupformer_card(folder, repo_id) if content.get("model_type") == "groupformer" else None
    return regrouped_card(card, SimpleNamespace(**content)) if content.get("regrouping") else card


def groupformer_card(folder: Path, repo_id: str) -> str:
    """A card that says what a GroupFormer is, from its config alone."""
    import torch

    from ..measuring.cache import cache_bytes_per_token

    config = GroupFormerConfig.from_pretrained(folder)
    kind = (config.architectures or ["GroupFormerForCausalLM"])[0].removeprefix("GroupFormer")
    task, auto_class = TASKS[kind]
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    counts = sorted({layer.num_key_value_heads for layer in config.per_layer_config})
    return CARD.format(
        task=task,
        auto_class=auto_class,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        heads=config.num_attention_heads,
        kv_heads=" or ".join(map(str, counts)),
        layers=config.num_hidden_layers,
        cache_bytes=cache_bytes_per_token(config, dtype),
    )
