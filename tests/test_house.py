"""The shape of the project: what it depends on, and how its files look."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "nano_rl").glob("[a-z]*.py"))
LADDER = [ROOT / "nano_rl" / f"{name}.py" for name in ("reinforce", "rloo", "remax", "raft", "grpo", "ppo")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_dependencies_are_the_six():
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["project"]["dependencies"]]
    assert names == ["torch", "transformers", "accelerate", "tyro", "python-dotenv", "wandb"]
    assert all(">=" in requirement for requirement in PROJECT["project"]["dependencies"])


def test_the_lock_pins_versions_and_names_no_index():
    """As committed: uv writes the addresses of this machine's index into the working copy."""
    lock = subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "://" not in lock
    assert 'name = "torch"\nversion = ' in lock


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_stands_alone(file):
    source = file.read_text()
    assert not re.search(r"^\s*(from|import) +(nano_rl|\.)", source, re.MULTILINE)


DIFFERENT = {"Args", "compute_advantages", "compute_loss", "train"}  # where the algorithms differ


def parts(file: Path) -> dict[str, str]:
    """The source of every function, of every shared flag, and of the imports."""
    source = file.read_text()
    tree = ast.parse(source)
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found = {node.name: ast.get_source_segment(source, node) for node in named}
    found["imports"] = source.split('"""', 2)[2].split("@dataclass")[0]
    found["program"] = source.split("__main__")[1]
    flags = source.split("class Args:")[1].split("\n\n")[0].split("    # Algorithm")[0].splitlines()[1:]
    return found | {"flag " + line.split(":")[0].strip(): line for line in flags}


@pytest.mark.parametrize("file", LADDER[:1] + LADDER[2:], ids=lambda file: file.stem)
def test_sameness(file):
    """What two files share is the same to the letter, so that their diff is the difference of two algorithms."""
    first, ours = parts(LADDER[1]), parts(file)
    shared = (first.keys() & ours.keys()) - DIFFERENT
    if file.stem == "reinforce":
        shared -= {"load_reward_fn"}  # with the deviation of a score, for its --uncertainty-penalty
    assert {name for name in shared if first[name] != ours[name]} == set()
    assert {name for name in first if name.startswith("flag ")} <= shared
    assert len(shared) > 35


@pytest.mark.parametrize("file", sorted(set(FILES) - set(LADDER)), ids=lambda file: file.stem)
def test_what_the_other_files_share_with_the_ladder(file):
    first, ours = parts(LADDER[1]), parts(file)
    shared = (first.keys() & ours.keys()) - DIFFERENT - {"imports", "evaluate", "program"}  # they import what they use
    assert {name for name in shared if first[name] != ours[name]} == set()
    assert {"load", "one_line", "save"} <= shared


@pytest.mark.parametrize("file", LADDER, ids=lambda file: file.stem)
def test_budgets(file):
    """In lines, so that a file stays readable in one sitting."""
    source = file.read_text()
    lengths = {"docstring": ast.get_docstring(ast.parse(source)).count("\n") + 1, "file": source.count("\n")}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lengths[node.name] = node.end_lineno - node.lineno + 1
    lengths["algorithm"] = lengths["compute_advantages"] + lengths["compute_loss"]
    budgets = {"docstring": 40, "Args": 70, "algorithm": 45, "train": 154, "file": 620}
    if file.stem == "ppo":  # a second model
        budgets |= {"train": 183, "file": 691}
    assert {name: lengths[name] for name in budgets if lengths[name] > budgets[name]} == {}


@pytest.mark.parametrize("file", LADDER, ids=lambda file: file.stem)
def test_the_readme_counts_the_lines(file):
    (row,) = re.findall(rf"^\| \[`{file.name}`\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row.endswith(f" | {file.read_text().count(chr(10))} |")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_help_fits_a_terminal_and_shows_defaults(file):
    command = [sys.executable, "-m", f"nano_rl.{file.stem}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    flags = re.findall(r"^│ (--[\w-]+)", done.stdout, re.MULTILINE)
    text = " ".join(re.sub(r"[│╭╰─]", " ", done.stdout).split())
    assert "--model" in flags or "--policies" in flags
    assert "(default: " in text
    for flag in flags:
        described = " ".join(re.sub(r"[│╭╰─]", " ", re.split(rf"│ {flag}[ ,]", done.stdout)[1]).split())
        assert re.search(r"[a-z]{2,} [a-z]", described.split("(default")[0]), f"{flag} has no help"


def test_the_package_names_its_files():
    """`uv run -m nano_rl` prints each file with the idea of its docstring, and how to start."""
    done = subprocess.run([sys.executable, "-m", "nano_rl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) < 80
    assert {line.split()[0] for line in done.stdout.splitlines() if re.match("[a-z]", line)} == {f.stem for f in FILES}
    text = " ".join(done.stdout.split())
    assert all(ast.get_docstring(ast.parse(file.read_text())).splitlines()[0] in text for file in FILES)
    assert "uv run -m nano_rl.reinforce --help" in text


def test_the_parent_projects_commands():
    """Every command of its README parses, up to the model that it would load."""
    for flags in ([], ["--baseline=mean"], ["--baseline=ema", "--ema-beta", "0.5"], ["--brevity-penalty-scale", "0.5"]):
        command = [sys.executable, "-m", "nano_rl.reinforce", *flags, "--model", "none/none"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("cannot load none/none: "), done.stderr
        assert done.stderr.count("\n") == 1


def test_every_pitfall_names_a_test_that_is_there():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "tests/pitfalls.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 45))
    written = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = {name for _, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert len(named) > 30 and {name for name in named if f"def {name}(" not in written} == set()
