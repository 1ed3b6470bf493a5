"""Sums: the smallest task with a right answer, which a model of 135M gives now and then.

    uv run -m nano_rl.sums

writes the questions "What is 7 plus 12?", of all pairs of 1 to 15, as JSON lines with their "answer": 97 to train on in
runs/sums/train.jsonl, 128 others in runs/sums/test.jsonl. It prints such commands as these, for maxrl.

    correct(y) = 1 if the last number in the completion y is the answer, else 0

Of "7 + 12 = 19." it is 19; -19, 19.5, 19/2 and 19% are other numbers. Nothing is evaluated. A policy finds what breaks
its reward: a completion of many numbers is right if it ends in the right one.

Learn:  uv run -m nano_rl.grpo --prompts runs/sums/train.jsonl --reward-fn nano_rl.sums:correct --max-new-tokens 32
            --learning-rate 2e-5 --num-steps 20 --output-dir runs/sums-grpo
Ask:    uv run -m nano_rl.compare --policies runs/sums-grpo/policy --prompts runs/sums/test.jsonl --all-prompts
            --reward-fn nano_rl.sums:correct --temperature 0 --num-samples 1 --max-new-tokens 32
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

LARGEST = 15
NUM_TEST = 128
NUMBER = re.compile(r"(?:(?<![\w)])[-−])?\d[\d.,/]*%?")  # as it is written, with what belongs to it


@dataclass
class Args:  # a flag's comment is its --help
    output_dir: str = "runs/sums"  # folder of train.jsonl and test.jsonl, which are written anew
    seed: int = 0  # of which questions are in which file


def correct(completions: list, answer: list, **_) -> list[float]:
    """1 for each completion, text or [message], whose last number is the row's `answer`, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    lasts = [(NUMBER.findall(text) or [""])[-1].rstrip(".,") for text in texts]
    return [float(last == str(right)) for last, right in zip(lasts, answer, strict=True)]


def write(args: Args) -> list[Path]:
    """The two files; the same seed writes the same."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(args.seed).shuffle(pairs)
    rows = [{"prompt": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in pairs]
    paths = []
    for name, part in (("train", rows[NUM_TEST:]), ("test", rows[:NUM_TEST])):
        paths.append(Path(args.output_dir, f"{name}.jsonl"))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


if __name__ == "__main__":
    train, test = write(tyro.cli(Args))
    task = "--reward-fn nano_rl.sums:correct --max-new-tokens 32"
    print(f"uv run -m nano_rl.maxrl --prompts {train} {task} --learning-rate 2e-5 --output-dir runs/sums-maxrl")
    print(
        f"uv run -m nano_rl.compare --policies runs/sums-maxrl/policy --prompts {test} --all-prompts {task}"
        " --temperature 0 --num-samples 1"
    )
