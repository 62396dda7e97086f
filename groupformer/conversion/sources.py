"""What a user can name as a checkpoint: a folder, a GGUF file, an adapter folder of PEFT, or a Hub id.

Everything here is checked before any work, and light: neither torch nor transformers is imported.
"""

import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any


HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT = 10.0  # seconds that the Hub may take to answer at all
ADAPTER_CONFIG = "adapter_config.json"

# What each extra of the package installs, as modules are called, and as packages are.
EXTRAS = {
    "training": ("datasets", "accelerate", "peft", "yaml", "sklearn", "seqeval", "evaluate"),
    "serving": ("gguf",),
    "app": ("gradio", "matplotlib"),
}


def require(*modules: str, what: str) -> None:
    """Refuses to begin work for which a package of an extra is missing.

    Args:
        modules: Names of modules, each of an extra.
        what: What needs them, to begin the message with.

    Raises:
        ValueError: a module is not installed; the message has the line that installs it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        extras = ",".join(name for name, contents in EXTRAS.items() if set(contents) & set(missing))
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"{what} needs {' and '.join(missing)}, which {verb} not installed; "
            f'install with: pip install "groupformer[{extras}]"'
        )


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file that is there."""
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def is_adapter(source: str | Path) -> bool:
    """Whether a source is a folder of a PEFT adapter, without the model that it adapts."""
    folder = Path(source)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of_adapter(folder: str | Path) -> str:
    """Folder or Hub id of the model that an adapter was trained on.

    Raises:
        ValueError: the adapter does not name it, or names a folder that is not there.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not base:
        raise ValueError(
            f"{path} names no base model; write its folder or Hub id into the field base_model_name_or_path"
        )
    if not Path(base).exists() and (Path(base).is_absolute() or not HUB_ID.fullmatch(str(base))):
        raise ValueError(
            f"{folder} is an adapter of {base}, which is not there; correct base_model_name_or_path in {path}"
        )
    return str(base)


def check_source(source: str | None) -> str | None:
    """A source as it is given; refused where it cannot be a checkpoint.

    Raises:
        ValueError: no file or folder, and no name of a repository; a folder without a config; or another file.
    """
    if source is None:
        return None
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file():
            ggufs = sorted(path.glob("*.gguf"))
            remedy = f"give the file itself: {ggufs[0]}" if ggufs else "give the folder of a checkpoint"
            raise ValueError(f"{source} holds no config.json; {remedy}")
    elif path.exists():
        if path.suffix != ".gguf":
            raise ValueError(f"{source} is a file, not a folder; give the folder of a checkpoint, or a GGUF file")
    elif not HUB_ID.fullmatch(source) or path.suffix == ".gguf":
        raise ValueError(f"{source} is not there, and is no Hub id (USER/NAME) either; check the path")
    return source


def check_tokenizer_source(source: str | None) -> str | None:
    """The same for a tokenizer, whose folder need not hold the config of a model."""
    return source if source is None or Path(source).is_dir() else check_source(source)


def locate(source: str | Path) -> tuple[str, dict[str, Any]]:
    """A source in the words of transformers' `from_pretrained`: where it is, and `gguf_file` where it is one.

    A Hub id is requested once, so that a missing repository or network is an error before any work.

    Raises:
        ValueError: see `check_source` and `check_on_hub`; or a GGUF file without the package that reads it.
    """
    check_source(str(source))
    path = Path(source)
    if is_gguf(path):
        require("gguf", what=f"reading {source}")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        check_on_hub(str(source))
    return str(source), {}


@functools.cache
def check_on_hub(repo_id: str, repo_type: str = "model") -> None:
    """Asks the Hub for a repository; without a network, the copy in the cache is taken, with a warning.

    Raises:
        ValueError: the Hub has no such repository, or it cannot be reached and the cache holds no copy.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        if not is_cached(repo_id, repo_type):
            raise ValueError(
                f"{repo_id} is not there, and not in the Hub's cache, while HF_HUB_OFFLINE=1 forbids to ask the Hub; "
                "check the path, or unset HF_HUB_OFFLINE"
            )
        return
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise ValueError(f"{repo_id} is gated; ask for access on its page, then log in with: hf auth login") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{repo_id} is not there, and the Hub has no such {repo_type}; check the name, or log in with: "
            "hf auth login"
        ) from None
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub refuses {repo_id}: {first_line(error)}") from error
    except Exception as error:  # no network; the library's versions raise classes of different packages
        if not is_cached(repo_id, repo_type):
            download = f"hf download {repo_id}{'' if repo_type == 'model' else f' --repo-type {repo_type}'}"
            raise ValueError(
                f"{repo_id} is not there, and the Hub cannot be reached ({first_line(error)}); check the path or the "
                f"network, or fetch it where there is one: {download} --local-dir FOLDER"
            ) from error
        print(f"warning: the Hub cannot be reached; {repo_id} is taken from its cache", file=sys.stderr)
        constants.HF_HUB_OFFLINE = True  # or each file would be asked for, and retried, by itself


def is_cached(repo_id: str, repo_type: str = "model") -> bool:
    """Whether the Hub's cache holds a snapshot of a repository."""
    from huggingface_hub import constants

    name = f"{repo_type}s--" + repo_id.replace("/", "--")
    return any(Path(constants.HF_HUB_CACHE, name, "snapshots").glob("*/*"))


def first_line(error: BaseException) -> str:
    """What an error says, without what follows on further lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
