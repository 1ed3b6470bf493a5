"""Rewards for verifiable answers: what a text parses to, that no text breaks them, and the accuracy of a policy."""

import importlib
import json
import math
import random
import signal
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import tyro

from nano_rl import compare, gsm8k, reinforce
from nano_rl.gsm8k import correct, formatted, parse_answer

ROOT = Path(__file__).parent.parent
HALF = Fraction(1, 2)

PARSED = [
    # after ####
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", 72),
    ("####72", 72),
    ("#### 72 of the 100 apples", 72),
    ("#### $1,234.50", Fraction("1234.5")),
    ("#### **72**\n\nIs there anything else? I have 3 ideas.", 72),
    ("#### $72$", 72),
    ("#### = 72", 72),
    ("#### \\boxed{72}", 72),
    ("#### 1\nNo, I was wrong.\n#### 2", 2),
    ("#### 72\n#### Notes\nThis took 3 steps.", 72),  # a heading without a number is no mark
    ("####\n5 + 67 = 72 of 100, so \\boxed{72}", 72),  # nor is one on a line of its own
    ("\\boxed{5}\n#### 72", 72),
    ("#### -7", -7),
    ("#### - 7", 7),  # a bullet
    ("#### 50%", 50),
    ("#### 3:30", None),
    ("#### 9:30 to 10", None),  # what follows the mark is the answer, even where it is none
    ("#### 1. Add 9 and 9.\nThat is \\boxed{18}", 18),  # a heading of level four is no answer
    ("#### 1) Add\n#### 2) Multiply\nThe answer is \\boxed{18}.", 18),
    ("#### 2. Multiply: 9 times 2 are 18", 18),
    ("#### 5\nNo, it is \\boxed{18}", 18),  # the later of the two
    ("#### 18.", 18),
    ("#### **1.** Add 9 and 9: 18", 18),
    ("#### 2\\sqrt{3}", None),
    ("#### 3 × 4", None),
    # in \boxed{}
    ("\\boxed{2\\sqrt{3}}", None),
    ("\\boxed{\\frac{\\sqrt{3}}{2}}", None),
    ("\\boxed{5\\pi}", None),
    ("\\boxed{3, 4}", None),
    ("\\boxed{x = 3, y = 4}", None),
    ("\\boxed{9 + 9 = 18}", 18),
    ("\\boxed{\\textbf{72}}", 72),
    ("\\boxed{1~234}", 1234),
    ("12{\\,}345", 12345),
    ("1’234", None),
    ("x = 3, so \\boxed{\\frac12}", HALF),
    ("\\boxed{\\frac1{2}}", HALF),
    ("\\boxed{\\frac{1}2}", HALF),
    ("x = 3, so \\boxed{\\pi}", None),
    ("\\boxed{18\\text{ or }20}", None),
    ("\\boxed{90^\\circ}", 90),
    ("\\boxed{x \\ge 3}", None),
    ("\\boxed{x + 3}", None),
    ("\\boxed{x - 3}", None),
    ("\\boxed{50\\%}", 50),
    ("\\boxed{1\\;234}", 1234),
    ("\\boxed{72}", 72),
    ("So \\boxed{72} apples for 3 children.", 72),
    ("\\boxed{1} or \\boxed{2}", 2),
    ("#### Step 2: add\n\\boxed{72}", 72),
    ("\\boxed{x = 72} for 5", 72),
    ("\\boxed{72 \\text{ eggs in 2 days}}", 72),
    ("\\boxed{\\text{none}} is not 5, but 6", 6),
    ("\\boxed {72} of 100", 72),
    ("$\\boxed{\\$1{,}234}$", 1234),
    ("\\boxed{12\\,345}", 12345),
    ("\\boxed{12,\\!345}", 12345),
    ("\\boxed{\\frac{1}{2}} of 4", HALF),
    ("\\boxed{-\\dfrac{1}{2}}", -HALF),
    ("\\boxed{3\\tfrac{1}{2}}", 3 + HALF),
    ("\\boxed{\\frac{1,000}{-2.5}}", -400),
    ("\\boxed{72", 72),  # cut off
    # in <answer>
    ("<think>16 - 9 = 7\n#### 5</think> <answer>7</answer>", 7),
    ("<answer>72</answer> for 5 people", 72),
    ("<answer>The answer is $72 \\boxed{3}</answer>", 3),
    ("<answer>1</answer> <answer>2</answer>", 2),
    ("5 is wrong. <answer>none</answer>", None),
    ("<answer>72", 72),
    # the last number
    ("She sold 48 and 24 clips, 72 in all.", 72),
    ("The answer is 12.", 12),
    ("12...", 12),
    ("is...72", 72),
    ("The answer is \\(72\\).", 72),
    ("1,234,567.89!", Fraction("1234567.89")),
    ("1,00,000 rupees", 100000),
    ("72, 73", 73),
    ("0.50", HALF),
    (".5", HALF),
    ("It costs $.50", HALF),
    ("72.0", 72),
    ("007", 7),
    ("-0", 0),
    ("+7", 7),
    ("-$5.00", -5),
    ("$-5", -5),
    ("-\\$5", -5),
    ("-€5", -5),
    ("-.5", -HALF),
    ("16-9", 9),
    ("(16)-9", 9),
    ("from 5–7", 7),
    ("−7", -7),
    ("x = –7", -7),
    ("--7", 7),
    ("3/4", Fraction(3, 4)),
    ("48 / 2", 24),
    ("1/-2", -HALF),
    ("3 1/2 cups", 3 + HALF),
    ("-3 1/2", -3 - HALF),
    ("½ a cup", HALF),
    ("-3½", -3 - HALF),
    ("1\u20442", HALF),
    ("1.5e3", 1500),
    ("2E-2", Fraction(1, 50)),
    ("5 dollars", 5),
    ("72kg", 72),
    ("the 3rd", 3),
    ("$5/hour", 5),
    ("5 million", 5),
    ("50 m^2", 50),
    ("50 cm^{2}", 50),
    ("50 m²", 50),
    ("答案是72元", 72),
    ("答案是－７２", -72),
    ("٣٫٥", 3 + HALF),
    ("١٬٢٣٤", 1234),
    ("1\u202f234 km", 1234),
    ("1\u00a0234", 1234),
    ("1\u2009234\u2009567", 1234567),
    ("1 234.5 m", Fraction("1234.5")),
    ("3\u00a01/2", 3 + HALF),
    ("in 2023 100 people", 100),
    ("It is 2\\sqrt{3}.", None),
    ("It is 2√3", None),
    ("\\frac{\\sqrt{3}}{2}", None),
    ("so 3 × 4", None),
    ("3 × 4 = 12", 12),
    # no number, or no single one
    ("", None),
    ("seventy-two", None),
    ("GSM8K", None),
    ("x2", None),
    ("#### USD50", None),
    ("step_2", None),
    ("1/0", None),
    ("\\frac{1}{0}", None),
    ("7 / 0.00", None),
    ("5/6/2024", None),
    ("at 3:30", None),
    ("version 1.2.3", None),
    ("1,23", None),
    ("1234,567", None),
    ("1.234,50", None),
    ("1_000", None),
    ("5'6", None),
    ("10^6", None),
    ("10^{-6}", None),
    ("10²", None),
    ("nan", None),
    ("-inf", None),
    ("Infinity", None),
    # hostile
    ("\0", None),
    ("#### \0 72 \0", 72),
    ("\ud800 72 \udfff", 72),
    ("1e999999", None),
    ("1e99999999999999999999", None),
    ("#### 1e-99999999999", None),
    ("1e99/1e99", 1),
    ("9" * 50, 10**50 - 1),
    ("9" * 51, None),
    ("#### " + "9" * 5000, None),
    ("5 " + "9" * 10**6, None),
    ("#### " + "1/" * 5000 + "1", None),
    ("#### " + "1," * 4000 + "1", None),
    ("\\boxed{" * 1000 + "72" + "}" * 1000, 72),
    ("{" * 5000 + "72" + "}" * 5000, 72),
    ("__import__('os').abort()", None),
    ("9**9**9**9", 9),
    ("5^{5^{5^{5^{5}}}}", None),
]


@pytest.mark.parametrize("text, number", PARSED, ids=[f"{i}-{text[:20]!a}" for i, (text, _) in enumerate(PARSED)])
def test_what_a_text_parses_to(text, number):
    parsed = parse_answer(text)
    assert parsed == number and (parsed is None or type(parsed) is Fraction)


def test_the_table_is_long_enough():
    assert len({text for text, _ in PARSED}) == len(PARSED) >= 60


def test_only_the_end_is_read():
    """What an answer's last 10,000 characters hold, without half a number where they begin."""
    assert parse_answer("#### 72" + " a" * 4000) == 72
    assert parse_answer("#### 72" + " a" * 5000) is None
    assert parse_answer("1234" + "a" * 9998) is None, "not 34"
    assert parse_answer("答" * 20_000 + "72") == 72, "no space to cut at"


@pytest.fixture
def no_hang():
    """Half a minute for what takes milliseconds: a guard against minutes and days, not a measurement."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # KeyboardInterrupt, which no code catches
    signal.alarm(30)
    yield
    signal.alarm(0)


PIECES = (
    "#### \\boxed{ } { \\frac{ $ - . , : / ^ ( ) 1 23 9999 0 e E x nan ½ ² ٣ − \0 \n _ ' <answer> </answer> <think>"
).split(" ")


def test_no_text_hangs_or_raises(no_hang):
    """A long repeat of anything, at the end of a completion and after each mark."""
    units = [
        *PIECES,
        " ",
        "1 ",
        "1/",
        "1,",
        "1 1/",
        "1.1",
        "1e1",
        "-1",
        "/ ",
        "^-",
        "\\frac{1}{",
        "\\frac ",
        "</think> ",
    ]
    texts = [
        mark + unit * (10**5 // len(unit)) for mark in ("", "#### ", "\\boxed{", "1") for unit in filter(None, units)
    ]
    texts += [mark + text[:9000] + "!" for mark in ("#### 1", "\\boxed{") for text in texts]
    texts += ["<think>a</think>" + " " * 10**6 + "<answer>a</answer>b", "<think>" + "a" * 10**6 + "<answer>"]
    assert set(correct([""] * len(texts), texts, ["#### 123456789"] * len(texts))) == {0.0}
    assert set(formatted([""] * len(texts), texts)) == {0.0}


def test_random_texts_do_not_raise(no_hang):
    shuffle = random.Random(0)
    for _ in range(20_000):
        parsed = parse_answer("".join(shuffle.choices([*PIECES, " "], k=shuffle.randint(1, 12))))
        assert parsed is None or type(parsed) is Fraction


# ---- The reward functions -------------------------------------------------------------------------------------------


def test_correct_compares_numbers_not_texts():
    answers = ["...\n#### 1,234", "#### 72", 72, 0.5, "-7", "#### 72"]
    completions = ["$1234.00", "#### 27", "72.0", "1/2", "−7", "I do not know."]
    assert correct([""] * 6, completions, answers) == [1, 0, 1, 1, 1, 0]


def test_messages_and_odd_messages():
    """Completions as TRL passes them for conversations; what is no text scores 0."""
    conversations = [
        [{"role": "assistant", "content": "#### 72"}],
        [{"role": "assistant", "content": "#### 72"}, {"role": "assistant", "content": "No.\n#### 5"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "tool_calls": []}],
        [],
    ]
    assert correct([[]] * 5, conversations, ["72"] * 5) == [1, 0, 0, 0, 0]
    assert formatted([[]] * 5, conversations) == [0] * 5


@pytest.mark.parametrize("answer", ["seventy-two", "", None, math.nan, "#### 1/0", True])
def test_a_row_without_a_number_is_an_error_of_the_data(answer):
    with pytest.raises(ValueError) as error:
        correct(["How many?", "Which row?"], ["1", "2"], ["1", answer])
    assert str(error.value) == f"no number, or several, in the answer {answer!r} to 'Which row?'"


SEVERAL = ["2\\sqrt{3}", "#### 2\\sqrt{3}", "\\boxed{2\\sqrt{3}}", "3, 4", "x = 3 or x = 5", "5\\pi", "#### 3 or 5"]
SEVERAL += ["\\boxed{3} or \\boxed{5}", "\\ln 2", "5!", "2^n", "3 + i", "\\pi/2"]


@pytest.mark.parametrize("answer", SEVERAL)
def test_a_row_with_more_than_one_number_is_an_error_of_the_data(answer):
    """`2\\sqrt{3}` was read as 3, so that 3 was right: a part of an expression is not taken for the whole."""
    with pytest.raises(ValueError, match="no number, or several, in the answer"):
        correct(["q"], ["\\boxed{3}"], [answer])


@pytest.mark.parametrize("answer", ["72 eggs", "50 m^2", "1\u00a0234", "9 + 9 = 18", "-3 1/2", "So she has 3 + 4 = 7"])
def test_golds_with_a_unit_or_a_way(answer):
    assert gsm8k.parse_gold(answer, "q") == parse_answer(answer)


FORM = "<think>16 - 9 = 7</think> <answer>7</answer>"


@pytest.mark.parametrize(
    "text, reward",
    [
        (FORM, 1),
        (f"\n{FORM}\n", 1),
        ("<think>\n1\n2\n</think>\n\n<answer>\n7\n</answer>", 1),
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a < b</think><answer>b</answer>", 1),
        (f"Sure! {FORM}", 0),
        (f"{FORM} Done.", 0),
        (FORM * 2, 0),
        ("<think>a</think> so <answer>7</answer>", 0),
        ("<think>a</think> <answer>7", 0),
        ("<think>a</think>", 0),
        ("<answer>7</answer> <think>a</think>", 0),
        ("<think>a <answer>7</answer></think>", 0),
        ("<think>a</think> <answer>7</answer> <answer>8</answer>", 0),
        ("<think><think>a</think></think> <answer>7</answer>", 0),
        ("<think>a</think> <answer><answer>7</answer></answer>", 0),
        ("<think> </think> <answer>7</answer>", 0),
        ("<think>a</think> <answer>\n</answer>", 0),
        ("<THINK>a</THINK> <answer>7</answer>", 0),
        ("", 0),
    ],
)
def test_formatted(text, reward):
    assert formatted([""], [text]) == [reward]
    assert formatted([[]], [[{"role": "assistant", "content": text}]]) == [reward]


# ---- In training ----------------------------------------------------------------------------------------------------

ROWS = [{"question": f"the {word} sings", "answer": f"so <<1+{n}=1>>\n#### {n}"} for n, word in enumerate("abcdef")]


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "name", "reinforce rloo remax raft grpo ppo dr_grpo gspo cispo dapo reinforce_pp maxrl distill".split()
)
def test_it_rewards_in_every_file(model, tmp_path, monkeypatch, name):
    """--reward-fn nano_rl.gsm8k:correct --prompts train.jsonl, with completions that are right for one question."""
    file = importlib.import_module(f"nano_rl.{name}")
    sample = file.sample
    monkeypatch.setattr(file, "sample", lambda *i, **o: (sample(*i, **o)[0], ["It is 3."] * len(i[2])))
    flags = ["--reward-fn", "nano_rl.gsm8k:correct", "--prompts", write(tmp_path / "train.jsonl", ROWS)]
    sizes = "--batch-size 8 --num-steps 2 --max-new-tokens 4 --eval-every 0".split()
    flags += ["--teacher", model] if name == "distill" else []
    args = file.tyro.cli(file.Args, args=[*flags, *sizes, "--model", model, "--output-dir", str(tmp_path / "run")])
    rows = (file.train(args) / "completions.jsonl").read_text().splitlines()
    rewards = {(row["prompt"], row["reward"]) for row in map(json.loads, rows)}
    assert rewards == {(row["question"], float("#### 3" in row["answer"])) for row in ROWS}


def test_the_accuracy_of_policies(model, tmp_path, monkeypatch):
    """compare.py with the same reward: greedy, with a standard error over the questions, of one policy or several."""
    texts = {"the a sings": "0", "the c sings": "2", "the d sings": "4"}
    sample, calls = reinforce.sample, []

    def answer(sampler, tokenizer, examples, temperature):
        calls.append((len(examples), temperature))
        return sample(sampler, tokenizer, examples, temperature)[0], [texts.get(e["prompt"], "") for e in examples]

    monkeypatch.setattr(reinforce, "sample", answer)
    flags = ["--policies", model, "--prompts", write(tmp_path / "test.jsonl", ROWS), "--all-prompts"]
    flags += "--temperature 0 --num-samples 1 --max-new-tokens 8 --batch-size 4".split()
    flags += ["--reward-fn", "nano_rl.gsm8k:correct", "--output-dir", str(tmp_path / "compared")]
    compare.main(tyro.cli(compare.Args, args=flags))
    assert calls == [(4, 0.0), (2, 0.0)]
    found = json.loads((tmp_path / "compared/comparison.json").read_text())
    rewards = [1, 0, 1, 0, 0, 0]
    standard_error = statistics.stdev(rewards) / math.sqrt(6)
    assert found["prompts"] == 6
    assert found["table"]["reward"] == {"A": {"mean": pytest.approx(2 / 6), "se": pytest.approx(standard_error)}}


def test_it_needs_neither_a_model_nor_this_project():
    code = "import sys, gsm8k; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "nano_rl").returncode == 0
