"""The shape of the project: what it depends on, and how its files look."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import same
from tiny import main

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "nano_rl").glob("[a-z]*.py"))
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


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in ("compare", "judge")], ids=lambda file: file.stem
)
def test_a_lesson_stands_alone(file):
    """A tool may import from nano_rl."""
    source = file.read_text()
    assert not re.search(r"^\s*(from|import) +(nano_rl|\.)", source, re.MULTILINE)


# How many lines may stand above a file's banner, and how many of them may differ from its neighbour's, docstring aside.
ABOVE = {"reinforce": 210, "rloo": 195, "remax": 195, "raft": 195, "grpo": 225, "ppo": 305}
ABOVE |= {"dr_grpo": 225, "gspo": 225, "cispo": 225, "dapo": 260, "reinforce_pp": 225, "maxrl": 195, "distill": 210}
DIFFS = {
    ("reinforce", "rloo"): 55,
    ("rloo", "remax"): 40,
    ("rloo", "raft"): 30,
    ("rloo", "grpo"): 66,
    ("grpo", "ppo"): 190,
    ("grpo", "dr_grpo"): 15,
    ("grpo", "gspo"): 25,
    ("grpo", "cispo"): 25,
    ("grpo", "dapo"): 90,
    ("grpo", "reinforce_pp"): 45,
    ("rloo", "maxrl"): 15,
    ("reinforce", "distill"): 60,
}


def above_and_below(name: str) -> tuple[str, str]:
    return same.split((ROOT / "nano_rl" / f"{name}.py").read_text())


def test_one_text_below_the_banner():
    texts = {above_and_below(name)[1] for name in ABOVE}
    assert len(texts) == 1
    assert texts.pop().count("\n") <= 430, "the banner included"


@pytest.mark.parametrize("name, most", ABOVE.items())
def test_the_lesson_is_short_and_not_crammed(name, most):
    above, _ = above_and_below(name)
    assert above.count("\n") <= most
    assert len(above) / above.count("\n") <= 60, "characters a line, on average"
    assert max(map(len, (ROOT / "nano_rl" / f"{name}.py").read_text().splitlines())) <= 120


@pytest.mark.parametrize("names, most", DIFFS.items(), ids=str)
def test_neighbours_differ_by_the_idea_alone(names, most, tmp_path):
    for name in names:
        (tmp_path / name).write_text(above_and_below(name)[0].split('"""', 2)[2])
    diff = subprocess.run(["diff", "-w", *names], cwd=tmp_path, capture_output=True, text=True).stdout
    assert 0 < sum(line[:1] in ("<", ">") for line in diff.splitlines()) <= most


@pytest.mark.parametrize("name", [*ABOVE, "multi_turn", *same.BEFORE_RL])
def test_what_a_lesson_leaves_out(name):
    """One class of machinery, which computes nothing of the algorithm, and no exit out of a library call."""
    tree = ast.parse((ROOT / "nano_rl" / f"{name}.py").read_text())
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    environments = ["HigherOrLower", "Lines"] if name == "multi_turn" else []
    assert classes == ["Args", *environments, "InputError", "Run"]
    calls = [ast.unparse(node) for node in ast.walk(tree.body[-1]) if isinstance(node, ast.Call)]
    assert "sys.exit(str(error))" in calls, "the program says an error in one line"
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        text = ast.unparse(function)
        assert "sys.exit" not in text and "sys.argv" not in text, function.name
    run = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Run")
    assert not {"compute_advantages", "compute_loss", "compute_logprobs"} & set(re.findall(r"\w+", ast.unparse(run)))


def test_several_turns_in_one_file():
    """The lesson and its environments; below the banner the ladder's text, and one block that several turns need."""
    above, below = above_and_below("multi_turn")
    lesson, _, environments = above.partition("# ---- Environments ")
    (block,) = same.TURNS.findall(below)
    assert below.replace(block, "") == above_and_below("reinforce")[1] and block.count("\n") > 100
    assert lesson.count("\n") <= 270 and environments.count("\n") <= 120
    assert len(lesson) / lesson.count("\n") <= 60, "characters a line, on average"


def test_same_copies_what_stands_below_the_banner(tmp_path):
    for name in [*ABOVE, "multi_turn"]:
        shutil.copy(ROOT / "nano_rl" / f"{name}.py", tmp_path)
    (tmp_path / "other.py").write_text("print()\n")
    sft = tmp_path / "sft.py"
    shutil.copy(ROOT / "nano_rl/sft.py", sft)
    rloo = tmp_path / "rloo.py"
    whole = rloo.read_text()
    rloo.write_text(whole.replace("return texts", "return").replace("class InputError", "class Other"))
    turns = tmp_path / "multi_turn.py"
    several = turns.read_text()
    turns.write_text(several.replace("class InputError", "class Other"))
    lesson = sft.read_text()
    sft.write_text(lesson.replace("def interrupt", "def other").replace("is not empty: choose", "is full: choose"))
    assert same.copy(tmp_path) == ["multi_turn.py", "rloo.py", "sft.py"]
    assert (turns.read_text(), rloo.read_text(), sft.read_text()) == (several, whole, lesson)
    assert same.copy(tmp_path) == [] and (tmp_path / "other.py").read_text() == "print()\n"


@pytest.mark.parametrize("name", same.BEFORE_RL)
def test_what_the_files_before_rl_share(name):
    """Letter for letter where they have a function, a class, a flag or the program in common with the ladder."""
    ours, first = [(ROOT / "nano_rl" / f"{stem}.py").read_text() for stem in (name, "reinforce")]
    shared = same.definitions(ours).keys() & same.definitions(first).keys() - same.OWN
    assert shared >= {"InputError", "load", "has_bfloat16", "micro_batches", "as_messages", "show", "Run", "program"}
    assert {key for key in shared if same.definitions(ours)[key] != same.definitions(first)[key]} == set()
    flags = [{line.split(":")[0]: line for line in same.definitions(s)["Args"].splitlines()} for s in (ours, first)]
    own = "model chat_template batch_size num_steps learning_rate seed eval_every".split()  # true of their file
    assert {key for key in flags[0].keys() & flags[1].keys() if flags[0][key] != flags[1][key]} <= {
        4 * " " + name for name in own
    }


def test_what_the_two_files_before_rl_share():
    texts = [same.definitions((ROOT / "nano_rl" / f"{name}.py").read_text()) for name in same.BEFORE_RL]
    names = texts[0].keys() & texts[1].keys() - same.OWN - {"make_batch", "build_row"}
    assert "load_rows" in names and {name for name in names if texts[0][name] != texts[1][name]} == set()


@pytest.mark.parametrize(
    "name, most", [("compare", 330), ("gsm8k", 150), ("sums", 80), ("judge", 120), ("sft", 440), ("reward_model", 560)]
)
def test_the_budgets_of_the_others(name, most):
    assert (ROOT / "nano_rl" / f"{name}.py").read_text().count("\n") <= most


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in ("gsm8k", "sums", "judge")], ids=lambda file: file.stem
)
def test_help_fits_a_terminal_and_shows_defaults(file, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(monkeypatch, file.stem, "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    flags = re.findall(r"^[│ ] (--[\w-]+)", out, re.MULTILINE)
    text = " ".join(re.sub(r"[│╭╰─]", " ", out).split())
    assert "--model" in flags or "--policies" in flags
    assert "(default: " in text
    for flag in flags:
        described = " ".join(re.sub(r"[│╭╰─]", " ", re.split(rf"\n[│ ] {flag}[ ,]", out)[1]).split())
        assert re.search(r"[a-z]{2,} [a-z]", described.split("(default")[0]), f"{flag} has no help"


def test_the_package_names_its_files():
    """`uv run -m nano_rl` prints each file with the idea of its docstring, and how to start."""
    done = subprocess.run([sys.executable, "-m", "nano_rl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) < 80
    assert {line.split()[0] for line in done.stdout.splitlines() if re.match("  [a-z]", line)} == {
        f.stem for f in FILES
    }
    text = " ".join(done.stdout.split())
    assert all(ast.get_docstring(ast.parse(file.read_text())).splitlines()[0] in text for file in FILES)
    assert "uv run -m nano_rl.reinforce --help" in text


def test_the_parent_projects_commands(monkeypatch):
    """Every command of its README parses, up to the model that it would load."""
    for flags in ([], ["--baseline=mean"], ["--baseline=ema", "--ema-beta", "0.5"], ["--brevity-penalty-scale", "0.5"]):
        assert main(monkeypatch, "reinforce", *flags, "--model", "none/none").startswith("cannot load none/none: ")


def test_every_pitfall_names_a_test_that_is_there():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "tests/pitfalls.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 45))
    check_tests({name for _, names in rows for name in re.findall(r"`(\w+)`", names)}, more_than=30)


def check_tests(named: set[str], more_than: int) -> None:
    written = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > more_than and {name for name in named if f"def {name}(" not in written} == set()


def test_every_symptom_names_files_tests_and_metrics_that_are_there():
    page = (ROOT / "nano_rl/why_nothing_learns.md").read_text()
    assert page.count("\n") <= 80 and max(map(len, page.splitlines())) <= 110
    entries = page.split("\n\n**")[1:]
    words = [re.findall(r"`([^`]+)`", entry) for entry in entries]
    assert len(entries) >= 12
    assert all(any((ROOT / "nano_rl" / w).is_file() for w in of) and any("test_" in w for w in of) for of in words)
    check_tests({word for of in words for word in of if word.startswith("test_")}, more_than=20)
    code = "".join(file.read_text() for file in FILES)
    metrics = {word for of in words for word in of if not re.match(r"test_|--|\w+\.py$", word)}
    missing = {name for name in metrics if f'"{name}"' not in code and f'"completions/{name}"' not in code}
    assert len(metrics) > 8 and missing == set()
