"""``python -m selfwright`` is the ``selfwright`` command."""

from .commands.cli import main

main()
