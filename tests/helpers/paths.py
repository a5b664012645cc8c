"""Where the repository is, for tests that start processes or read its files."""

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
