"""Copies the machinery of reinforce.py into the other files: uv run tests/same.py

Into the ladder's as a whole, the text below the banner, where multi_turn.py keeps a block of its own; into those before
RL, each function and class that they share.
"""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "nano_rl"
BANNER = "# " + 117 * "=" + "\n"
BEFORE_RL = ("reward_model", "sft")
TURNS = re.compile(r"^# ---- Several turns.*?(?=^if __name__)", re.DOTALL | re.MULTILINE)  # of multi_turn.py
OWN = {"Args", "compute_loss", "train"}  # of each file


def split(source: str) -> tuple[str, str]:
    """What stands above the banner, and the banner with all below it."""
    above, _, below = source.partition(BANNER)
    return above, BANNER + below


def definitions(source: str) -> dict[str, str]:
    """The text of each function, of each class and of the program at the end."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
            found[getattr(node, "name", "program")] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def copy(folder: Path) -> list[str]:
    """The names of the files that were changed."""
    changed = []
    original = (folder / "reinforce.py").read_text(encoding="utf-8")
    for file in sorted(folder.glob("[a-z]*.py")):
        source = file.read_text(encoding="utf-8")
        above, below = split(source)
        block = "".join(TURNS.findall(below))
        text = split(original)[1].replace("if __name__", block + "if __name__")
        new = above + text if below != BANNER else source  # the banner alone: a file that has none
        if file.stem in BEFORE_RL:
            new, ours = source, definitions(original)
            for name, text in definitions(source).items():
                new = new.replace(text, ours[name]) if name in ours.keys() - OWN else new
        if new != source:
            file.write_text(new, encoding="utf-8")
            changed.append(file.name)
    return changed


if __name__ == "__main__":
    print("changed: " + (", ".join(copy(FOLDER)) or "nothing"))
