"""What there is to try things with: a short text that ships, and in a clone the reference checkpoint."""

from pathlib import Path


HERE = Path(__file__).parent
HELD_OUT_HEADING = "The school"  # the text's last chapter


def sample_text() -> tuple[str, str]:
    """A text that was written for this project, in two parts: one to calibrate and train on, one held out to score."""
    text = (HERE / "river.txt").read_text(encoding="utf-8")
    start = text.index(f"{HELD_OUT_HEADING}\n")
    return text[:start], text[start:]


def shipped_checkpoint() -> Path:
    """The folder of the reference checkpoint, `hub_card/` of a clone.

    Raises:
        ValueError: it is not there, because the package was installed without its repository.
    """
    folder = HERE.parents[1] / "hub_card"
    if not (folder / "model.safetensors").is_file():
        raise ValueError("the reference checkpoint is not part of the installed package; give a folder or a Hub id")
    return folder
