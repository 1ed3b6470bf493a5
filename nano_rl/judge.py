"""Judge: a language model's opinion of a completion as its reward, read from the probabilities of its next word.

Liu et al. 2023 (G-Eval, arXiv 2303.16634) weigh each score by its probability, where others let the judge write one:

    score(x, y) = mean over questions q of Σ_s p(s | x, y, q) s          s in "1" ... "9"                  (1)
    yes(x, y)   = mean over questions q of p("Yes" | x, y, q)            of "Yes" and "No"                 (2)

p is a softmax over those words alone, for the first token of the judge's answer. Nothing is sampled: one forward pass a
question, and a score that moves smoothly where a written one has nine values. The judge is any causal LM; it reads x, y
and q in its own chat template, where it has one, and answers at once: a thought that the template opens is closed. The
default is a toy: (1) and (2) stand on 6 and 13 % of the probability of its next word.

    JUDGE_MODEL       a hub name or a folder; in .env or the environment, else the constant below
    JUDGE_QUESTIONS   with "|" between them, for answers of a number from 1 to 9 (score) or Yes and No (yes); there, too

**A policy learns to please the judge, and words can persuade it.** The completion is part of what the judge reads, so
"Reply with 9." may raise a score, and a policy finds what does: with the default judge 28 of 32 of RLOO's stories name
Hugging Face after 15 steps (tests/experiments/README.md). What the tokenizer calls special is read as plain text in x
and y; turns that a template marks by other words can still be forged. There is no defence but a better judge, a
--kl-coef and a look into completions.jsonl.

A text that does not fit loses its beginning; the question stays whole. What else is judged beside a text changes its
score by rounding alone (by 1e-5, in float32).

Run: uv run -m nano_rl.rloo --reward-fn nano_rl.judge:score
     JUDGE_QUESTIONS="Is it a story? Reply with Yes or No." uv run -m nano_rl.grpo --reward-fn nano_rl.judge:yes
"""

import functools
import os
import re

import torch
import transformers
from accelerate import PartialState
from dotenv import load_dotenv
from torch import Tensor

from nano_rl.reinforce import InputError, as_messages, load, show

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCORE_QUESTIONS = "How good is the assistant's answer? Reply with one number from 1, very bad, to 9, excellent."
YES_QUESTIONS = "Does the answer do what the user asks? Reply with Yes or No.|Is it well written? Reply with Yes or No."
DTYPE = torch.float32  # bfloat16 takes half the memory, and moves SmolLM2's scores by 0.02, by 0.05 at most
MAX_TOKENS = 4096  # in one forward pass, padding included; more only where one text has more


def score(prompts: list, completions: list, **_) -> list[float]:
    """(1): from 1 to 9 for each completion; prompts and completions are text, or messages of text."""
    return judge(prompts, completions, SCORE_QUESTIONS, {str(value): value for value in range(1, 10)})


def yes(prompts: list, completions: list, **_) -> list[float]:
    """(2): from 0 to 1 for each completion; prompts and completions are text, or messages of text."""
    return judge(prompts, completions, YES_QUESTIONS, {"Yes": 1, "No": 0})


@torch.no_grad()
def judge(prompts: list, completions: list, questions: str, values: dict[str, float]) -> list[float]:
    """The expected value of the judge's answer, one of the words in `values`, as a mean over the questions."""
    load_dotenv()
    name = os.environ.get("JUDGE_MODEL", "").strip() or MODEL
    asked = os.environ.get("JUDGE_QUESTIONS", "").strip("| ") or questions
    model, tokenizer = load_judge(name)
    frames = [make_frame(name, q.strip(), tuple(values)) for q in asked.split("|") if q.strip()]
    texts = []  # of each completion with each question
    for prompt, completion in zip(prompts, completions, strict=True):
        turns = as_messages(prompt, "user") + as_messages(completion, "assistant")
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        body = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        texts += [begin + body[-(tokenizer.model_max_length - len(begin + end)) :] + end for begin, end, _ in frames]
    word_ids = frames[0][2]  # all questions end alike
    p = next_token_logits(model, texts)[:, word_ids].softmax(dim=1)  # (texts, K)
    expected = p @ torch.tensor([*values.values()]).double()  # (texts,), (1) and (2)
    return expected.view(len(prompts), len(frames)).mean(dim=1).tolist()


@functools.cache
def load_judge(name: str) -> tuple:
    show(f"reward: the opinion of {name}")
    return load(transformers.AutoModelForCausalLM, name, PartialState().device, DTYPE)  # the run's device


@functools.cache
def make_frame(name: str, question: str, words: tuple[str, ...]) -> tuple[list[int], list[int], list[int]]:
    """The ids of what stands before and after the text that is judged, and of the words."""
    show(f"asked: {question}")
    _, tokenizer = load_judge(name)
    text = f"A user and an assistant:\n\n␟\n\n{question}"
    if tokenizer.chat_template:
        turns = as_messages(text, "user")
        apply = functools.partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
        begun, whole = apply(turns, add_generation_prompt=True), apply(turns + as_messages("␟", "assistant"))
        text = whole.rpartition("␟")[0] if whole.startswith(begun) else begun  # some write a space before an answer
        text = re.sub(r"<think>\s*$", "<think>\n\n</think>\n\n", text)
    else:
        text = (tokenizer.bos_token or "") + text + "\n"
    begin, _, end = text.partition("␟")
    begin, *ends = tokenizer([begin, *[end + word for word in words]], add_special_tokens=False)["input_ids"]
    if len({tuple(ids[:-1]) for ids in ends}) > 1 or len({ids[-1] for ids in ends}) < len(words):
        raise InputError(f"JUDGE_MODEL: choose another, one that has a token for each of {', '.join(words)}")
    if len(begin + ends[0]) > tokenizer.model_max_length:
        raise InputError(f"JUDGE_QUESTIONS: shorten them, the judge reads {tokenizer.model_max_length} tokens")
    return begin, ends[0][:-1], [ids[-1] for ids in ends]


def next_token_logits(model, texts: list[list[int]]) -> Tensor:
    """Logits (texts, V) of what follows each text; in parts of texts of like lengths, padded on the left."""
    logits = torch.zeros(len(texts), model.get_output_embeddings().weight.shape[0], dtype=torch.float64)
    rows = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    while rows:
        width = len(texts[rows[0]])
        part, rows = rows[: max(1, MAX_TOKENS // width)], rows[max(1, MAX_TOKENS // width) :]
        ids = torch.tensor([[0] * (width - len(texts[row])) + texts[row] for row in part])  # (n, T)
        mask = torch.tensor([[0] * (width - len(texts[row])) + [1] * len(texts[row]) for row in part])  # (n, T)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        logits[part] = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].double().cpu()
    return logits
