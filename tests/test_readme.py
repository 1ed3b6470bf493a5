"""Every command of README, results page and superseded.md runs, small: a tiny model, one step, a few rows."""

import glob
import importlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro
from tiny import llama_config, make_byte_tokenizer, save_policy, save_reward_model

import nano_rl.reinforce as reinforce

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [README, *((ROOT / name).read_text() for name in ("tests/experiments/README.md", "nano_rl/superseded.md"))]
TEXTS = "\n".join(PAGES).replace("\\\n", " ")
FOUND = re.findall(r"-m nano_rl\.(\w+)([^`\n]*)", TEXTS)
COMMANDS = list(dict.fromkeys((name, " ".join(shlex.split(flags, comments=True))) for name, flags in FOUND))

SCRIPTS = sorted(set(re.findall(r"(tests\.experiments\.\w+)([^`#\n)]*)", TEXTS)))

SMALL = dict(num_steps=1, batch_size=8, max_new_tokens=4, eval_every=0, num_samples=1)
FILES = {
    "prompts.jsonl": [{"prompt": f"write about {i}"} for i in range(8)],
    "answers.jsonl": [{"prompt": f"write about {i}", "completion": "the sea sings"} for i in range(8)],
    "pairs.jsonl": [{"prompt": f"write {i}", "chosen": "the sea", "rejected": "a song"} for i in range(8)],
    "reviews.jsonl": [{"text": f"the sea sings {i}", "label": i % 2} for i in range(8)],
    "train.jsonl": [{"question": f"{i} + 1 ?", "answer": f"#### {i + 1}"} for i in range(8)],
    "test.jsonl": [{"question": f"{i} + 1 ?", "answer": f"#### {i + 1}"} for i in range(8)],
    "runs/sums/train.jsonl": [{"prompt": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(8)],
}


def test_the_page_fits():
    assert README.count("\n") <= 120 and max(map(len, README.splitlines())) <= 100


def test_the_commands_are_found():
    assert len(COMMANDS) > 20 and {name for name, _ in COMMANDS} >= {"reinforce", "grpo", "sft", "compare"}
    assert "pip install uv" in README and "$ uv run -m nano_rl.reinforce" in README and "uv run pytest" in README


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """What the commands read: their files, the reward function that the README defines, and runs."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "runs/sums").mkdir(parents=True)
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(re.search(r"```python\n(def .*?)```", README, re.DOTALL)[1])
    save_reward_model(folder / "runs/score/reward_model")
    save_reward_model(folder / "runs/scores/reward_model", num_labels=10)
    judge = make_byte_tokenizer()
    save_policy(folder / "runs/judge", llama_config(len(judge), max_position_embeddings=512), judge)
    for name in "ppo", "gsm8k":
        save_policy(folder / f"runs/{name}/policy")
    run = folder / "runs/first"
    reinforce.train(reinforce.Args(model=model, output_dir=str(run), **{n: SMALL[n] for n in small(reinforce)}))
    shutil.copytree(run, folder / "runs/now-reinforce")
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


def small(module) -> set[str]:
    return SMALL.keys() & {field.name for field in fields(module.Args)}


def expand(word: str) -> list[str]:  # as a shell does
    before, choices, after = re.fullmatch(r"([^{]*)\{?([^}]*)\}?(.*)", word).groups()
    words = [before + choice + after for choice in choices.split(",")] if "{" in word else [word]
    return [path for word in words for path in (sorted(glob.glob(word)) if re.search("[*?]", word) else [word])]


@pytest.mark.parametrize("name, flags", COMMANDS, ids=lambda words: words)
def test_a_command_of_the_readme(name, flags, folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JUDGE_MODEL", "runs/judge")
    monkeypatch.syspath_prepend(folder)  # as `python -m` does
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    module = importlib.import_module(f"nano_rl.{name}")
    words = flags.replace("<time>", "now").split()
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            tyro.cli(module.Args, args=words)
        return
    words = [word for w in words for word in expand(w)]
    assert not [word for word in words if word.startswith("tests/") and not Path(word).exists()]
    args = tyro.cli(module.Args, args=words)

    def here(model_name: str) -> str:  # a model of the hub is the tiny one
        return model_name if Path(model_name).exists() else model

    given = {name: value for name, value in vars(args).items() if value}
    changes = {name: SMALL[name] for name in small(module)} | {"output_dir": str(tmp_path / "run")}
    if name == "sums":
        module.write(replace(args, **changes))
        return
    if name != "compare":
        changes |= {"model": here(args.model)}
    if "policies" in given:
        changes |= {"policies": tuple(map(here, args.policies))}
    if "reward_model" in given and not Path(args.reward_model).exists():
        changes |= {"reward_model": str(folder / "runs/score/reward_model")}
    if "resume" in given:
        changes = {"num_steps": 2}
    if "runs" in given:
        changes = {"plot": str(tmp_path / args.plot) if args.plot else ""}
    (module.main if name == "compare" else module.train)(replace(args, **changes))


@pytest.mark.parametrize("name, flags", SCRIPTS, ids=lambda words: words)
def test_a_script_of_the_readme_takes_its_flags(name, flags):
    """What the scripts do with them is test_benchmark's and test_experiments's."""
    tyro.cli(importlib.import_module(name).Args, args=shlex.split(flags))
