"""``python -m fastmerge`` is the command ``fastmerge``."""

from fastmerge.cli import main

main()
