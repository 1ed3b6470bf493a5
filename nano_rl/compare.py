"""Compare: policies on the same prompts, or the learning curves of runs, with an error bar on every number.

Prompts are the sample, not completions, and two policies are compared on each prompt before the mean is taken (Miller
2024, arXiv 2411.00640). The test needs no distribution: Fisher 1935 (The Design of Experiments, chapter III).

    m_x   = 1/S Σ_s f(y_x,s)                         statistic f on prompt x, over S completions              (1)
    m     = 1/n Σ_x m_x,   se = std(m_x) / √n        over n prompts, or over n runs                           (2)
    d_x   = m_x - m_x of the first policy            its mean and se as in (2)                                (3)
    p     = 2^-n #{σ ∈ {-1,1}^n: |Σ σ_x d_x| ≥ |Σ d_x|}   if no policy is better, the sign of d_x is a coin   (4)
    PPL_x = exp(-Σ_s,t log π_1(y_t) / Σ_s T_s)       perplexity under the first policy, at temperature 1      (5)

(4) assumes independent prompts and, if no policy is better, d_x as likely as -d_x. Exact up to 13 prompts, never below
2^(1-n), 0.008 for 8; above, of 10,000 sign patterns. Of many policies and columns one is small by chance.

f is the reward, the type-token ratio (distinct words / words), the words or distinct-2 (distinct pairs of neighbours /
pairs; Li et al. 2016, 1510.03055, divide by the words of all) of one completion. In (5) the first policy reads every
text with its own tokenizer and template, without the stop. All policies draw with the same random numbers, which makes
d_x less noisy: equal policies give equal completions. Runs of one folder form a group if config.json says the same of
them but for the seed, torch's version, and where, how long and how often they wrote.

Run: uv run -m nano_rl.compare --policies HuggingFaceTB/SmolLM2-135M-Instruct runs/<time>-rloo/policy
     uv run -m nano_rl.compare --policies runs/gsm8k/policy --prompts test.jsonl --all-prompts --temperature 0
         --num-samples 1 --max-new-tokens 320 --reward-fn nano_rl.gsm8k:correct
     uv run --with matplotlib -m nano_rl.compare --runs runs/* --plot curves.svg --x kl
"""

import asyncio
import importlib
import json
import math
import string
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from dotenv import load_dotenv
from torch import Tensor, nn

from nano_rl import reinforce
from nano_rl.reinforce import WORD, InputError, compute_logprobs, lexical_richness


@dataclass
class Args:  # a flag's comment is its --help
    # Policies
    policies: tuple[str, ...] = ()  # hub names or folders, at most 26; the first is what the others are compared with
    prompts: str = ""  # JSON lines with "prompt" or "question": text or messages; if not given, 32 stories
    all_prompts: bool = False  # take all prompts, not only those that a run with these --prompts holds out
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, where it has one
    reward_fn: str = ""  # score by module:function, called as in TRL: f(prompts, completions, **columns)
    reward_model: str = ""  # score by a sequence-classification model: a hub name or a folder
    brevity_penalty_scale: float = 0.5  # what the default reward, lexical richness, takes off an empty answer
    num_samples: int = 4  # completions of each prompt (S)
    batch_size: int = 32  # most completions sampled at a time, but at least all of a prompt
    max_new_tokens: int = 64  # most tokens of a completion (T)
    temperature: float = 0.7  # of the policies when they sample; 0: the greedy completion
    seed: int = 0  # of the samples
    output_dir: str = ""  # new or empty folder for all completions; if not given, runs/<time>-compare
    # Runs
    runs: tuple[str, ...] = ()  # folders of runs, to show their learning curves in place of --policies
    metric: str = "eval/reward"  # what the curves show, a name in metrics.jsonl
    x: Literal["step", "kl"] = "step"  # what they show it over: steps, or the KL to the start, what a reward has cost
    plot: str = ""  # draw the curves too, into this .svg or .png (needs matplotlib)


OF_RUNS = {"runs", "metric", "x", "plot"}
# What may differ within a group of runs: the seed, and what changes no step that two share but for rounding.
SAME_CURVE = "seed output_dir resume track num_steps eval_every save_minutes torch".split()


# ---- Statistics -----------------------------------------------------------------------------------------------------
def describe(completions: list[str]) -> dict[str, list[float]]:
    """The f of (1) that look at the text alone, of each completion."""
    texts = [WORD.findall(completion.casefold()) for completion in completions]
    pairs = [list(zip(text, text[1:])) for text in texts]
    return {
        "type-token ratio": lexical_richness(0.0, completions),
        "words": list(map(len, texts)),
        "distinct-2": [len(set(pair)) / max(1, len(pair)) for pair in pairs],
    }


@torch.no_grad()
def compute_perplexity(judge: nn.Module, tokenizer, examples: list[dict], args: Args, completions: list[str]) -> Tensor:
    """(5) for each prompt (n,), of the judge's own `examples`; nan where all its completions are empty."""
    totals = torch.zeros(len(completions), 2, dtype=torch.float64)  # (N, 2), log π_1 of each text and its tokens
    for row, (example, text) in enumerate(zip(examples, completions, strict=True)):
        # Another policy's text may be longer in the judge's tokens: it reads as many as it can.
        room = tokenizer.model_max_length - len(example["prompt_ids"])
        ids = tokenizer(text.removeprefix(example["begun"]), add_special_tokens=False)["input_ids"][:room]
        if ids:
            input_ids = torch.tensor([example["prompt_ids"] + ids], device=judge.device)  # (1, P + T), so no padding
            ones, positions = torch.ones_like(input_ids), torch.arange(input_ids.shape[1], device=judge.device)[None]
            batch = {"input_ids": input_ids, "attention_mask": ones, "position_ids": positions}
            logprobs = compute_logprobs(judge, batch | {"mask": ones[:, -len(ids) :]}, temperature=1.0)  # (1, T)
            totals[row] = torch.tensor([logprobs.sum(), len(ids)])
    logprob, num_tokens = totals.view(-1, args.num_samples, 2).sum(dim=1).T  # (n,) each
    return (-logprob / num_tokens).exp()  # (5)


def estimate(values: Tensor) -> tuple[float | None, float | None]:
    """(2): mean and standard error of the values that there are, None where there are too few."""
    values = values[~values.isnan()]
    mean = values.mean().item() if len(values) else None
    return mean, values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def sign_flip_test(differences: Tensor) -> float | None:
    """(4): how often differences as far from 0 come about if the sign of each one (n,) is a coin's; two-sided."""
    differences = differences[~differences.isnan()]
    n = len(differences)
    if n == 0:
        return None
    if n <= 13:
        signs = 1 - 2 * (torch.arange(2**n)[:, None] >> torch.arange(n) & 1)  # (2^n, n), the bits of 0, 1, 2...
    else:
        signs = 1 - 2 * torch.randint(2, (10_000, n), generator=torch.Generator().manual_seed(0))  # (10000, n)
        signs[0] = 1  # as seen, like the bits of 0
    sums = (signs.double() @ differences.double()).abs()  # (2^n,) or (10000,)
    rounding = 1e-9 * differences.abs().sum()
    return (sums >= sums[0] - rounding).double().mean().item()  # (4)


# ---- Tables ---------------------------------------------------------------------------------------------------------
def cell(mean: float | None, error: float | None = None, sign: str = "") -> str:
    """mean ± standard error, as far as there are such."""
    if mean is None:
        return "none"
    scale = max(abs(mean), error or 0)
    digits = ".3f" if scale == 0 or 0.001 <= scale < 10_000 else ".3g"
    return f"{mean:{sign}{digits}}" + ("" if error is None else f" ± {error:{digits}}")


def markdown(columns: list[list[str]]) -> str:
    """A table, the first column the names of its rows."""
    widths = [max(map(len, column)) for column in columns]
    rows = [" | ".join(text.ljust(width) for text, width in zip(row, widths)) for row in zip(*columns)]
    return "\n".join(f"| {row} |" for row in [rows[0], " | ".join("-" * width for width in widths), *rows[1:]])


# ---- Policies -------------------------------------------------------------------------------------------------------
def complete(args: Args, name: str, device: torch.device, loop: asyncio.Runner, reward_fn) -> tuple:
    """The policy, its tokenizer, its prompts, each one S times (N = n S), and their completions and rewards."""
    shared = {field.name for field in fields(reinforce.Args)} & {field.name for field in fields(Args)}
    settings = reinforce.Args(model=name, **{flag: getattr(args, flag) for flag in shared})
    policy, tokenizer = reinforce.load_policy(settings, device)[::2]  # a copy of it, π_ref, is freed
    sampler = reinforce.make_sampler(policy, tokenizer, settings)
    read = reinforce.read_prompts if args.all_prompts else lambda _, *inputs: reinforce.load_prompts(*inputs)[1]
    examples = [e for e in read(args.prompts, settings, tokenizer, policy) for _ in range(args.num_samples)]
    size = max(1, args.batch_size // args.num_samples) * args.num_samples  # of whole prompts
    run, completions, rewards = SimpleNamespace(state={"step": 0}, args=settings, loop=loop), [], []
    for start in range(0, len(examples), size):
        set_seed((args.seed + start) % 2**32)  # the same draws for every policy, however long the last batch was
        part = examples[start : start + size]
        batch, texts = reinforce.sample(sampler, tokenizer, part, args.temperature)
        completions += texts
        rewards += reinforce.score(run, reward_fn, part, batch, texts)[0].tolist()
    return policy, tokenizer, examples, completions, rewards


def compare_policies(args: Args) -> Path:
    """Prints the table and returns the folder that holds it, with all completions."""
    for name in ("num_samples", "batch_size", "max_new_tokens", "temperature"):
        if not (0 < getattr(args, name) < 2**32 or name == "temperature" and args.temperature == 0):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0 and below 2**32")
    folder = Path(args.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-compare")
    if any(folder.glob("*")) or folder.is_file():
        raise InputError(f"--output-dir {folder} is not empty: choose another")
    folder.mkdir(parents=True, exist_ok=bool(args.output_dir))  # one of this second is another comparison's
    device = Accelerator(cpu=torch.backends.mps.is_available()).device  # a Mac's GPU has no float64
    reward_fn = reinforce.load_reward_fn(args, device)
    loop = asyncio.Runner()  # of all calls of an async reward function, as in a run
    policies = dict(zip(string.ascii_uppercase, args.policies))
    statistics, answers, judge = {}, {}, None
    for letter, name in policies.items():
        policy, tokenizer, examples, completions, rewards = complete(args, name, device, loop, reward_fn)
        judge = judge or partial(compute_perplexity, policy, tokenizer, examples, args)
        del policy  # before the next one is loaded; the first stays, as judge
        answers[letter] = [{"completion": text, "reward": reward} for text, reward in zip(completions, rewards)]
        values = {"reward": rewards} | describe(completions)
        values = {f: torch.tensor(value, dtype=torch.float64) for f, value in values.items()}  # (N,) each
        values = {f: value.view(-1, args.num_samples).mean(dim=1) for f, value in values.items()}  # (n,) each, (1)
        statistics[letter] = values | {"perplexity at temperature 1": judge(completions)}

    others = list(policies)[1:]
    columns = [["", *policies, *(row for letter in others for row in (f"{letter} - A", "p"))]]
    table = {}
    for f, first in statistics["A"].items():
        estimates = {letter: estimate(values[f]) for letter, values in statistics.items()}
        table[f] = {letter: {"mean": mean, "se": error} for letter, (mean, error) in estimates.items()}
        columns.append([f, *(cell(*estimates[letter]) for letter in policies)])
        for letter in others:
            differences = statistics[letter][f] - first  # (n,), (3)
            (mean, error), p = estimate(differences), sign_flip_test(differences)
            table[f][letter] |= {"difference": mean, "difference_se": error, "p": p}
            columns[-1] += [cell(mean, error, "+"), cell(p)]
    result = {"policies": policies, "prompts": len(examples) // args.num_samples, "args": asdict(args), "table": table}
    (folder / "comparison.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = zip([{"prompt": example["prompt"]} for example in examples], *answers.values())
    lines = [json.dumps(row[0] | dict(zip(policies, row[1:])), ensure_ascii=False) + "\n" for row in rows]
    (folder / "completions.jsonl").write_text("".join(lines), encoding="utf-8")

    print("\n".join(f"{letter}: {name}" for letter, name in policies.items()))
    print(f"{result['prompts']} prompts, {args.num_samples} completions of each; ± standard error over the prompts")
    print(f"\n{markdown(columns)}\n\n{examples[0]['prompt']}")
    print("\n".join(f"{letter}: {' '.join(answer[0]['completion'].split())}" for letter, answer in answers.items()))
    print(f"\nall completions, and the table as JSON: {folder}")
    return folder


# ---- Runs -----------------------------------------------------------------------------------------------------------
def read_run(folder: Path, metric: str, x: str) -> tuple[dict, dict[int, tuple]]:
    """Its arguments, and (x, metric) at each step that has both; of a run that is writing, up to its last line."""
    curve, where = {}, folder / "config.json"
    try:
        config = dict(json.loads(where.read_text(encoding="utf-8")))
        for number, line in enumerate((folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1], start=1):
            where = f"{folder / 'metrics.jsonl'}, line {number}"
            row = json.loads(line)
            point = row["step"] if x == "step" else row.get("eval/kl"), row.get(metric)
            if None not in point and all(map(math.isfinite, point)):
                curve[row["step"]] = point
    except Exception as error:
        raise InputError(f"cannot read {where}: no run of this project wrote it ({error!r})") from error
    return config, curve


def group_runs(folders: list[Path], metric: str, x: str) -> dict[str, list[dict[int, tuple]]]:
    """The curves of each group, under a name that tells the groups apart; says which folders it leaves out, and why."""
    groups: dict[str, dict] = {}  # from the settings to the curve of each seed
    for folder in folders:
        is_run = all((folder / name).is_file() for name in ("config.json", "metrics.jsonl"))
        config, curve = read_run(folder, metric, x) if is_run else ({}, {})
        if not curve:
            print(f"left out {folder}: not a run with {metric}{' and eval/kl' * (x == 'kl')} as yet", file=sys.stderr)
            continue
        settings = {"in": str(folder.parent)} | {n: config[n] for n in sorted(config) if n not in SAME_CURVE}
        seed, seeds = config.get("seed"), groups.setdefault(json.dumps(settings), {})
        if seed in seeds:  # twice the same run is not two that agree
            print(f"{folder}: arguments and seed of another run; the longer one is taken", file=sys.stderr)
        seeds[seed] = max(seeds.get(seed, {}), curve, key=lambda of_run: max(of_run, default=-1))
    named, keys = {}, [json.loads(key) for key in groups]
    for settings, seeds in zip(keys, groups.values()):
        alike = [other for other in keys if other.get("algorithm") == settings.get("algorithm")]
        differing = [f"{k}={v}" for k, v in settings.items() if any(k not in o or o[k] != v for o in alike)]
        named[" ".join([settings.get("algorithm", "run"), *differing])] = list(seeds.values())
    return named


def draw(path: Path, curves: dict[str, dict[int, tuple]], runs: dict[str, list[dict]], labels: tuple[str, str]) -> None:
    """Means with their errors, over the KL each run's points too; to be read on a white page and on a black one."""
    try:
        matplotlib, figures = importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InputError("--plot needs matplotlib: uv run --with matplotlib -m nano_rl.compare ...") from error
    gray, colors = "#797979", "#3b7dd8 #c96a0a #21935a #d64550 #9467bd #0f8f9c".split()  # contrast 3.7 or more to both
    style = {f"{part}.color": gray for part in ("text", "xtick", "ytick")} | {"font.size": 12}
    style |= {"axes.labelcolor": gray, "axes.edgecolor": gray, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"svg.fonttype": "none", "svg.hashsalt": "nano-rl"}  # text as text, and the same bytes every time
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
        axes.set_title("mean ± standard error over (n) runs", loc="left", fontsize=12)
        for index, ((name, points), group) in enumerate(zip(curves.items(), runs.values())):
            x, means, errors, _ = zip(*points.values())
            color, line = colors[index % len(colors)], ["-", "--", ":"][index // len(colors) % 3]
            marker = "os^Dv*"[index % len(colors)]  # for those who do not tell the colours apart
            look = {"color": color, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 2, "capsize": 3}
            axes.errorbar(x, means, [math.nan if e is None else e for e in errors], label=name, **look)
            if labels[0] == "kl":
                axes.scatter(*zip(*[point for run in group for point in run.values()]), color=color, s=6)
        axes.legend(frameon=False)
        figure.savefig(path, format=path.suffix[1:], transparent=True, dpi=150, metadata={"Date": None})


def compare_runs(args: Args) -> None:
    if args.plot and not (Path(args.plot).suffix in (".svg", ".png") and Path(args.plot).parent.is_dir()):
        raise InputError(f"--plot {args.plot}: must end in .svg or .png, in a folder that exists")
    groups = group_runs([Path(folder) for folder in args.runs], args.metric, args.x)
    if not groups:
        raise InputError(f"--runs: none has {args.metric}{' and eval/kl' * (args.x == 'kl')}: give others, or --metric")
    curves = {}
    for name, runs in groups.items():
        points = {}
        for step in sorted(set().union(*runs)):
            x, values = torch.tensor([run[step] for run in runs if step in run], dtype=torch.float64).T
            points[step] = (x.mean().item(), *estimate(values), len(values))  # (2)
        curves[f"{name} ({len(runs)})"] = points
    steps = sorted(set().union(*curves.values()))
    columns = [["step", *map(str, steps)]]
    for (name, points), runs in zip(curves.items(), groups.values()):
        columns.append([name])
        for step in steps:
            x, mean, error, count = points.get(step, (None, None, None, 0))
            at = f" at KL {x:.2f}" if args.x == "kl" and count else ""
            columns[-1].append(cell(mean, error) + at + (f" ({count})" if 0 < count < len(runs) else ""))
    print(f"{args.metric}: mean ± standard error over the runs (how many; in a cell: if not all have this step)\n")
    print(markdown(columns))
    if args.plot:
        draw(Path(args.plot), curves, groups, (args.x, args.metric))
        print(f"\npicture, mean and standard error: {args.plot}")


def main(args: Args) -> None:
    load_dotenv()  # HF_TOKEN
    given = {name for name, value in asdict(args).items() if value != getattr(Args, name)}
    if unused := sorted(given - OF_RUNS if args.runs else given & OF_RUNS):
        raise InputError(f"{', '.join(unused)}: not for {'--runs' if args.runs else '--policies'}")
    if args.runs:
        compare_runs(args)
    elif 1 <= len(args.policies) <= 26:  # letters
        compare_policies(args)
    else:
        raise InputError("give policies (at most 26), --policies A B, or folders of runs, --runs runs/*")


if __name__ == "__main__":
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # ± and completions, on any screen
    try:
        main(tyro.cli(Args))
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(str(error))
