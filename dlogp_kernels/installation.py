"""What to type for a part that is missing, and why compiled kernels were not built."""

from pathlib import Path

#: setup.py writes here why it built no kernels, since pip does not show what it prints.
REASON_FILE = Path(__file__).parent / "_no_kernels.txt"


def how_to_install(extra: str | None = None) -> str:
    """The command that installs the package from its sources, with an extra; no index has it."""
    return f'in a clone of dlogp_kernels, pip install --no-build-isolation -e "{f".[{extra}]" if extra else "."}"'


def why_no_kernels() -> str:
    """Of the installation that had to do without a compiled extension, and what helps."""
    reason = REASON_FILE.read_text(encoding="utf-8").strip() if REASON_FILE.is_file() else ""
    found = f"at installation, {reason}" if reason else "it was not built"
    return f"the compiled extension is missing: {found}. To build it: {how_to_install()}"
