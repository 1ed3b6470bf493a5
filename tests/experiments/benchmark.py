"""NanoRL's RLOO and GRPO beside TRL's, on the same work: seconds a step, where they go, and peak memory.

    uv run --with trl==1.16.0 --with datasets -m tests.experiments.benchmark
    uv run --with trl==1.16.0 --with datasets -m tests.experiments.benchmark --completions 8 32 64 --algorithms grpo
    uv run --extra lora -m tests.experiments.benchmark --memory --algorithms reinforce rloo remax raft grpo ppo
    uv run --extra lora -m tests.experiments.benchmark --memory --shape 1B --lora-ranks 16 --algorithms grpo

Each run is a process of its own, and the two take turns. Model, prompts, group size, precision, learning rate and KL
(none) are the same, GRPO makes one update of a batch, as TRL does by default, and every completion has the full length,
so that both compute the same number of tokens. TRL's other settings are those of tests/experiments/trl_run.py.

--memory shows the peak of each file instead, with all weights trained and with adapters. For a GPU see gpu.py.
"""

import importlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Literal
from unittest import mock

import torch
import transformers
import tyro

from nano_rl import reinforce

CPU = torch.device("cpu")
SHAPES = {  # of models with random weights
    "135M": {  # SmolLM2
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "0.5B": {  # Qwen2.5
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "1B": {  # Llama 3.2
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass
class Args:
    algorithms: tuple[str, ...] = ("rloo", "grpo")  # of both; with --memory, also the others that need no teacher
    completions: tuple[int, ...] = (16,)  # completions a step, each a size of its own
    lengths: tuple[int, ...] = (64,)  # tokens of a completion, each a size of its own
    rounds: int = 1  # turns of each
    steps: int = 3  # steps that count; one more comes first
    model: str | None = None  # folder of the model; SmolLM2 from the demo group if not given
    shape: Literal["135M", "0.5B", "1B"] | None = None  # random weights of this shape instead
    memory: bool = False  # show the peak memory of each file instead
    lora_ranks: tuple[int, ...] = (0, 16)  # of --memory; 0: all weights are trained
    job: str | None = None  # one run, as JSON; the benchmark starts itself with it


def reward(prompts, completions, **_) -> list[float]:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return reinforce.lexical_richness(0.0, texts)


class Clock:
    """Seconds spent in wrapped functions, by name, since the last step."""

    def __init__(self) -> None:
        self.spent, self.steps = defaultdict(float), []

    def wrap(self, name: str, function):
        def timed(*inputs, **options):
            start = time.perf_counter()
            result = function(*inputs, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.spent[name] += time.perf_counter() - start
            return result

        return timed

    def end_step(self, seconds: float) -> None:
        self.steps.append({"step": seconds, "training": seconds - sum(self.spent.values()), **self.spent})
        self.spent.clear()


def run_nano_rl(job: dict, clock: Clock, folder: str) -> None:
    file = importlib.import_module(f"nano_rl.{job['algorithm']}")
    sizes = {"batch_size": job["completions"], "max_new_tokens": job["length"], "lora_rank": job.get("lora_rank", 0)}
    sizes["micro_batch_tokens"] = job.get("micro_batch_tokens", file.Args.micro_batch_tokens)
    if job["algorithm"] == "grpo":
        sizes["num_updates"] = 1  # TRL's default
    make_sampler = file.make_sampler

    def full_length_sampler(*inputs):
        sampler = make_sampler(*inputs)
        sampler.generation_config.min_new_tokens = job["length"]
        return sampler

    write_log = file.Run.log

    def log(run, step, metrics, samples) -> None:
        write_log(run, step, metrics, samples)
        row = json.loads((run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        if step:
            assert row["completions/mean_length"] == job["length"]
            clock.end_step(row["step_time"])

    parts = {"sample": clock.wrap("sampling", file.sample), "score": clock.wrap("scoring", file.score)}
    parts |= {"make_sampler": clock.wrap("sampling", full_length_sampler)}
    parts |= {"evaluate": lambda *_: ({"eval/reward": torch.tensor(0.0)}, [])}
    unsaved = {"save_checkpoint": lambda *_: None, "finish": lambda *_: None}
    with mock.patch.multiple(file, **parts), mock.patch.multiple(file.Run, log=log, **unsaved):
        args = file.Args(model=job["model"], num_steps=job["steps"], output_dir=folder, eval_every=0, **sizes)
        file.train(args, reward)


def run_trl(job: dict, clock: Clock, folder: str) -> None:
    from tests.experiments.trl_run import make_trainer  # its import makes a tensor, and then large pages come too late

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():  # ours waits for it, too
                torch.cuda.synchronize()
            clock.end_step(time.perf_counter() - self.start)

    model, tokenizer = reinforce.load(transformers.AutoModelForCausalLM, job["model"], CPU)
    model.set_attn_implementation("sdpa")  # transformers' default; `load` may choose another
    trainer = make_trainer(
        job["algorithm"],
        model,
        tokenizer,
        [{"prompt": f"Write a long story about a {topic}."} for topic in reinforce.TOPICS[:-8]],  # the rest is held out
        reward,
        Steps(),
        learning_rate=reinforce.Args.learning_rate,
        output_dir=folder,
        per_device_train_batch_size=job["completions"],
        max_completion_length=job["length"],
        generation_kwargs={"min_new_tokens": job["length"]},
        max_steps=job["steps"],
    )
    trainer._generate = clock.wrap("sampling", trainer._generate)
    trainer._calculate_rewards = clock.wrap("scoring", trainer._calculate_rewards)
    trainer.train()


def run_job(job: dict) -> dict:
    """Medians over the steps, in seconds, and the peak in GiB: of the GPU's memory or, without one, the process's."""
    clock = Clock()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        {"nano_rl": run_nano_rl, "trl": run_trl}[job["framework"]](job, clock, folder)
    steps = clock.steps[1:]  # the first one also warms up
    seconds = {name: median(step[name] for step in steps) for name in ("step", "sampling", "scoring", "training")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return seconds | {"memory": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak}


def random_model(shape: dict):
    ends = {"eos_token_id": None, "bos_token_id": None}
    config = transformers.LlamaConfig(**shape, **ends, tie_word_embeddings=True)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def best_seconds(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s read and written by a large copy."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * 2048**3 / best_seconds(lambda: a @ a), 2 * 4 * 2**26 / best_seconds(lambda: target.copy_(source))


def bounds(model, job: dict, prompt_tokens: int, limits: tuple[float, float], dtype: torch.dtype) -> dict:
    """Seconds that the machine's limits leave: sampling reads weights and cache for each token, training is 6 FLOP a
    weight and token (2 forward, 4 backward)."""
    flops, bandwidth = limits
    weights, config = sum(weight.numel() for weight in model.parameters()), model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # Qwen2's config has none
    cached_heads = getattr(config, "num_key_value_heads", heads)  # nor GPT-2's this
    cache_row = 2 * config.num_hidden_layers * cached_heads * head_dim  # numbers a token
    cached = job["completions"] * (prompt_tokens + job["length"] / 2) * cache_row
    sampling = job["length"] * (weights + cached) * dtype.itemsize / bandwidth
    return {
        "sampling": sampling,
        "training": 6 * weights * job["completions"] * (prompt_tokens + job["length"]) / flops,
    }


def main(args: Args) -> None:
    if args.job:
        print("\n" + json.dumps(run_job(json.loads(args.job))))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if reinforce.has_bfloat16(device) else torch.float32
    limits = machine_limits(device, dtype)
    flops, bandwidth = (f"{limit / 1e9:.0f}" for limit in limits)
    print(f"{device}, {torch.get_num_threads()} threads, {dtype}: {flops} GFLOP/s, {bandwidth} GB/s\n")
    model, tokenizer = reinforce.load(transformers.AutoModelForCausalLM, args.model or reinforce.Args.model, CPU)
    if args.shape:
        model = random_model(SHAPES[args.shape])
    examples, held_out = reinforce.load_prompts(reinforce.Args(), tokenizer, model)
    prompt_tokens = max(len(example["prompt_ids"]) for example in examples + held_out)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # a folder that all load alike
        tokenizer.save_pretrained(folder)
        job = {"framework": "nano_rl", "model": folder, "steps": args.steps + 1}
        sizes = [{"completions": n, "length": length} for n in args.completions for length in args.lengths]
        if args.memory:
            show_memory([job | size | {"algorithm": a} for a in args.algorithms for size in sizes], args.lora_ranks)
            return
        print("| round | algorithm | size | | s/step | sampling | scoring | training | tokens/s | GiB |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for turn, algorithm, size in itertools.product(range(args.rounds), args.algorithms, sizes):
            compare(turn, job | size | {"algorithm": algorithm}, model, prompt_tokens, limits, dtype)


def run_process(job: dict) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--job", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"failed: {job}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def show_memory(jobs: list[dict], lora_ranks: tuple[int, ...]) -> None:
    """The peak of each file, of its process or on the GPU."""
    titles = [f"adapters (--lora-rank {rank}), GiB" if rank else "all weights, GiB" for rank in lora_ranks]
    print(f"| file | completions × tokens | {' | '.join(titles)} |\n|---|---|{'---|' * len(titles)}")
    for job in jobs:
        peaks = [run_process(job | {"lora_rank": rank})["memory"] for rank in lora_ranks]
        names = f"{job['algorithm']}.py | {job['completions']} × {job['length']}"
        print(f"| {names} | {' | '.join(f'{peak:.1f}' for peak in peaks)} |", flush=True)


def compare(turn: int, job: dict, model, prompt_tokens: int, limits: tuple[float, float], dtype: torch.dtype) -> None:
    """A row for each of the two, one for their ratio, and one for how near NanoRL is to the machine's limits."""
    size = f"| {turn + 1} | {job['algorithm']} | {job['completions']} x {job['length']} |"
    results = {}
    for framework in ("nano_rl", "trl") if turn % 2 == 0 else ("trl", "nano_rl"):
        result = results[framework] = run_process(job | {"framework": framework})
        seconds = " | ".join(f"{result[name]:.2f}" for name in ("step", "sampling", "scoring", "training"))
        speed = job["completions"] * job["length"] / result["step"]
        print(f"{size} {framework} | {seconds} | {speed:.0f} | {result['memory']:.2f} |", flush=True)
    ratio = {name: results["nano_rl"][name] / results["trl"][name] for name in results["trl"]}
    print(
        f"{size} ratio | **{ratio['step']:.2f}** | {ratio['sampling']:.2f} | | {ratio['training']:.2f} | "
        f"{1 / ratio['step']:.2f} | **{ratio['memory']:.2f}** |"
    )
    least = bounds(model, job, prompt_tokens, limits, dtype)
    shares = {name: f"{least[name] / results['nano_rl'][name]:.0%}" for name in least}
    print(f"{size} of the limit | | {shares['sampling']} | | {shares['training']} | | |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
