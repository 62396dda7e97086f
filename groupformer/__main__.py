"""`python -m groupformer`: the same as the command `groupformer`."""

from .commands.main import main


main()
