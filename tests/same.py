"""Copies the text below the banner of reinforce.py, the machinery, into the other files: uv run tests/same.py"""

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "nano_rl"
BANNER = "# " + 117 * "=" + "\n"


def split(source: str) -> tuple[str, str]:
    """What stands above the banner, and the banner with all below it."""
    above, _, below = source.partition(BANNER)
    return above, BANNER + below


def copy(folder: Path) -> list[str]:
    """The names of the files that were changed."""
    changed = []
    _, machinery = split((folder / "reinforce.py").read_text(encoding="utf-8"))
    for file in sorted(folder.glob("[a-z]*.py")):
        above, below = split(file.read_text(encoding="utf-8"))
        if below not in (BANNER, machinery):  # the banner alone: a file that has none
            file.write_text(above + machinery, encoding="utf-8")
            changed.append(file.name)
    return changed


if __name__ == "__main__":
    print("changed: " + (", ".join(copy(FOLDER)) or "nothing"))
