"""``python -m qdiff``."""

from qdiff.cli.main import main

main()
