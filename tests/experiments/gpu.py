"""What NanoRL does on a GPU, as a page that one call prints in at most nine minutes, without a network.

    uv run --extra lora -m tests.experiments.gpu
    uv run --extra lora -m tests.experiments.gpu --shapes 0.5B --minutes 3

1. Seconds a step and peak memory of the files (GRPO with one update of a batch), and sampling's share.
2. Learning: RLOO and GRPO on the questions of nano_rl/sums.py, if the weights of --model are at hand.
3. Tokens a second of transformers' three ways of sampling, and how near each is to the least: reading weights and
   cache once a token.

Weights of the larger shapes, and all where --model is not at hand, are random, which changes no time: every completion
has the full length. What is not reached in time is named at the end. The page and its numbers, as gpu.md and gpu.json,
go to --output-dir. On a CPU it runs too, where it is of use to tests only.
"""

import copy
import gc
import importlib
import json
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import transformers
import tyro

from nano_rl import reinforce, sums
from tests.experiments.benchmark import SHAPES, best_seconds, bounds, machine_limits, random_model, run_job
from tests.tiny import make_tokenizer

WAYS = ("eager", "continuous batching", "compiled, static cache")  # the last takes a minute to compile
STEPS = [  # shape, file, completions, tokens, LoRA's rank
    *(("135M", file, 64, 64, 0) for file in "reinforce rloo remax raft grpo ppo".split()),
    *(("135M", "grpo", *size, 0) for size in ((16, 64), (256, 64), (64, 256), (16, 512))),
    *(("135M", file, 64, 64, 16) for file in ("grpo", "ppo")),
    *(("0.5B", file, 64, 128, rank) for file in ("grpo", "ppo") for rank in (0, 16)),
    *(("1B", file, 64, 128, rank) for file, rank in (("grpo", 0), ("grpo", 16), ("ppo", 16))),
]


@dataclass
class Args:
    model: str = reinforce.Args.model  # what learns, and the weights of shape 135M
    shapes: tuple[Literal["135M", "0.5B", "1B"], ...] = ("135M", "0.5B", "1B")
    rows: tuple[int, ...] = (16, 64, 256)  # completions sampled at a time
    compiled_rows: int = 64  # of these one is compiled, too
    length: int = 64  # tokens of each
    learning_steps: int = 20
    minutes: float = 8.5  # it stops then
    output_dir: Path = Path("runs/gpu")


class Page:
    """Tables that are shown row by row, and kept."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.screen, self.lines, self.rows = folder, sys.stdout, [], []
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True, file=self.screen)
        (self.folder / "gpu.md").write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def table(self, title: str, columns: list[str]) -> None:
        self.say(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *names: str | int, **numbers: float) -> None:
        cells = [f"{value:.0%}" if name.startswith("share") else f"{value:.3g}" for name, value in numbers.items()]
        self.say(f"| {' | '.join([*map(str, names), *cells])} |")
        self.rows.append({"names": names, **numbers})
        (self.folder / "gpu.json").write_text(json.dumps(self.rows, indent=1), encoding="utf-8")


def free_memory() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_of_sampling(model, tokenizer, way: str, rows: int, length: int) -> tuple[float, float]:
    """Of the first call, which compiles and warms up, and of the best of three more."""
    sampler = reinforce.make_sampler(model, tokenizer, reinforce.Args(max_new_tokens=length))
    config = sampler.generation_config
    config.eos_token_id, config.cache_implementation = None, "static" if way == WAYS[2] else None
    config.do_sample = way == WAYS[1]  # `sample` draws by itself
    prompt_ids = [3] * 37
    examples = [{"prompt_ids": prompt_ids, "begun": ""}] * rows
    function = partial(reinforce.sample, sampler, tokenizer, examples, 1.0)
    if way == WAYS[1]:
        function = partial(sampler.bfloat16().generate_batch, [prompt_ids] * rows, progress_bar=False)
    return best_seconds(function, repeats=1), best_seconds(function, repeats=3)


def show_sampling(args: Args, page: Page, load, limits: tuple[float, float], way: str) -> None:
    columns = ["model", "rows", "s, the first time", "tokens/s", "ms a token", "of the bandwidth limit"]
    page.table(f"Sampling of {args.length} tokens, {way}", columns)
    for shape in args.shapes:
        free_memory()
        model, tokenizer = load(shape)
        for rows in [args.compiled_rows] if way == WAYS[2] else args.rows:
            try:
                first, seconds = seconds_of_sampling(model, tokenizer, way, rows, args.length)
            except Exception as error:  # continuous batching has many
                page.say(f"| {shape} | {rows} | failed: {type(error).__name__} | | | |")
                continue
            least = bounds(model, {"completions": rows, "length": args.length}, 37, limits, torch.bfloat16)["sampling"]
            speed = {
                "first": first,
                "tokens_a_second": rows * args.length / seconds,
                "ms_a_token": 1000 * seconds / args.length,
            }
            page.row(shape, rows, **speed, share_of_the_limit=least / seconds)


def show_steps(args: Args, page: Page, load) -> None:
    page.table("Steps", ["model", "file", "completions × tokens", "LoRA", "s a step", "GiB", "of it sampling"])
    for shape, algorithm, completions, length, rank in [row for row in STEPS if row[0] in args.shapes]:
        free_memory()
        names = (shape, f"{algorithm}.py", f"{completions} × {length}", rank or "no")
        job = {"framework": "nano_rl", "algorithm": algorithm, "completions": completions, "length": length, "steps": 2}
        job |= {"model": args.model, "lora_rank": rank, "micro_batch_tokens": 8192}
        file = importlib.import_module(f"nano_rl.{algorithm}")
        try:
            with mock.patch.object(file, "load", lambda _, __, ___, dtype, s=shape: load(s, dtype)):
                result = run_job(job)
        except torch.OutOfMemoryError:
            page.say(f"| {' | '.join(map(str, names))} | out of memory | | |")
            continue
        page.row(*names, step=result["step"], GiB=result["memory"], share_sampling=result["sampling"] / result["step"])


def show_learning(args: Args, page: Page) -> None:
    page.table("Learning: sums right, of 128 unseen", ["file", "seconds", "before", "after"])
    questions, test = sums.write(sums.Args(output_dir=str(args.output_dir)))
    how = {"model": args.model, "prompts": str(questions), "eval_prompts": str(test), "max_new_tokens": 32}
    how |= {"num_steps": args.learning_steps, "eval_every": 0, "learning_rate": 2e-5, "micro_batch_tokens": 8192}
    for name in ("rloo", "grpo"):
        free_memory()
        file, start_time = importlib.import_module(f"nano_rl.{name}"), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(file.Run, "finish", lambda *_: None):
            file.train(file.Args(output_dir=folder, **how), sums.correct)
            lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        before, after = (json.loads(line)["eval/reward"] for line in (lines[0], lines[-1]))
        page.row(f"{name}.py", seconds=time.perf_counter() - start_time, before=before, after=after)


class TimeIsUp(BaseException):  # no Exception, which some part would catch
    pass


def stop(*_) -> None:
    raise TimeIsUp


def main(args: Args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    page = Page(args.output_dir)
    transformers.logging.disable_progress_bar()
    try:
        real, tokenizer = reinforce.load(transformers.AutoModelForCausalLM, args.model, device)
        real.cpu()  # the GPU's memory is measured
    except reinforce.InputError:
        real, tokenizer = None, make_tokenizer()

    @lru_cache(maxsize=1)  # the shape in use, beside the GPU's memory
    def make(shape: str) -> torch.nn.Module:
        return real if shape == "135M" and real else random_model(SHAPES[shape])

    def load(shape: str, dtype: torch.dtype = torch.float32) -> tuple:
        return copy.deepcopy(make(shape)).to(device, dtype), tokenizer

    limits = machine_limits(device, torch.bfloat16)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    page.say(f"{name}, {limits[0] / 1e12:.0f} TFLOP/s in bfloat16, {limits[1] / 1e9:.0f} GB/s; {versions}")
    sections = {"steps": partial(show_steps, args, page, load), "learning": partial(show_learning, args, page)}
    for way in WAYS if device.type == "cuda" else WAYS[::2]:  # the second fills a CPU's memory with its pages
        sections[way] = partial(show_sampling, args, page, load, limits, way)
    if not real:
        del sections["learning"]
        page.say(f"No weights of {args.model} are at hand: all are random, and nothing learns.")
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        for title, show in list(sections.items()):
            with redirect_stdout(sys.stderr):  # what the files show of their steps
                show()
            del sections[title]
    except TimeIsUp:
        page.say(f"\nStopped after {args.minutes:g} minutes, before the end of: {', '.join(sections)}.")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
