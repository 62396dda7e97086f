"""What travels to the Hub, flat: these files import nothing of the package but each other."""

import transformers  # noqa: F401  registration follows it, so it never runs inside a half imported file of ours
