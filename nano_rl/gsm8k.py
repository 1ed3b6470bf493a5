r"""GSM8K: a reward that needs no model, as the number at the end of an answer is right or it is not.

Cobbe et al. 2021 (arXiv 2110.14168): 8,792 school problems, {"question": ..., "answer": "... #### 72"}. DeepSeek-AI
2025 (arXiv 2501.12948) trained R1-Zero on two rewards by rule, one for the answer and one for its form:

    r(y) = 1 if v(y) = v(a), else 0                          correct: a is the row's "answer", v is read as below   (1)
    f(y) = 1 if y = <think>...</think><answer>...</answer>   formatted: each tag once, space between, no part empty (2)

v(y) is an exact fraction, or nothing. In the last <answer>, or in all of y if there is none, it is the number after
    #### or the one in \boxed{}, whichever comes last, else the last number of all. "#### 1. Add" is a heading.
    one number each:       1,234  1 234  1,00,000  -$5.00  $-5  .5  12.  1.5e3  3/4  3 1/2  3½  \frac{3}{4}  −7  ٣
    no unit is read:       50% and 50 apples are 50; 5k and 5 million are 5; the 2 of m^2 is part of the unit
    nothing, so r(y) = 0:  1/0  3:30  5/6/2024  1.2.3  1,23  1_000  10^6  USD50, a number of more than 50 characters;
    a part of the answer:  2\sqrt{3}  5\pi  \frac{\sqrt{3}}{2}  3 × 4, and of a box also  3, 4  x = 3, y = 4
    a sign touches its number, so "- 7" is 7; in 16-9 and 5–7 there is none

A policy finds whatever breaks its reward, so nothing is evaluated: no eval, no powers (a tower of fives hung a library
for this, github.com/huggingface/Math-Verify/issues/65); only the last 10,000 characters are read, in linear time. A
row whose own answer is no number, or several, is an error: it could only teach noise. Cobbe et al. read only what
follows ####, as they trained for it. DeepSeek-AI add r and f, and ask for the tags; here the prompt is the question.

Run: uv run -m nano_rl.grpo --model Qwen/Qwen2.5-1.5B-Instruct --learning-rate 1e-6 --prompts train.jsonl
         --reward-fn nano_rl.gsm8k:correct --max-new-tokens 320 --output-dir runs/gsm8k
     uv run -m nano_rl.compare --policies runs/gsm8k/policy --prompts test.jsonl --all-prompts --temperature 0
         --num-samples 1 --reward-fn nano_rl.gsm8k:correct --max-new-tokens 320    # the share that it gets right
"""

import re
from fractions import Fraction

TAIL = 10_000  # characters from the end of a completion that are read
DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000~"
PLAIN = dict.fromkeys(DASHES, "-") | dict.fromkeys(SPACES, " ") | dict.fromkeys("\u200b\u2060", "")
PLAIN |= dict(zip("\uff0c\u066c\uff0e\u066b\u2044\u2215\u2019", ",,..//'")) | {"²": "^2", "³": "^3"}
PLAIN = str.maketrans(PLAIN | {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"})
LATEX = {r"\$": "$", r"\,": " ", r"\;": " ", r"\:": " ", "\\ ": " ", r"\!": "", "{,}": ",", "{ }": " ", "^{": "^"}
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
UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]{0,200}\}|(?<![A-Za-z])[A-Za-z]++\^-?\d+|\^\s*\\circ")
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
    for latex, character in LATEX.items():
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
    return (whole + number / divisor) * (-1 if sign else 1) if divisor else None


def as_text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else "\n".join(str(part.get("content")) for part in completion)


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
