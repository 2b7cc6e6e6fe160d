"""``python -m qdiff``."""

from qdiff.cli import main

main()
