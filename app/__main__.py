"""``python -m qdiff.app``: the same as ``qdiff demo``."""

import sys

from qdiff.cli.main import main

main(["demo", *sys.argv[1:]])
