"""Judge: a language model's opinion of a completion as its reward, read from the probabilities of its next word.

Liu et al. 2023 (G-Eval, arXiv 2303.16634) weigh each score by its probability, where others let the judge write one:

    score(x, y) = mean over questions q of Σ_s p(s | x, y, q) s          s in "1" ... "9"                  (1)
    yes(x, y)   = mean over questions q of p("Yes" | x, y, q)            of "Yes" and "No"                 (2)

p is a softmax over those words alone, for the first token of the judge's answer. Nothing is sampled: one forward pass a
question, and a score that moves smoothly where a written one has nine values. The judge is any causal LM; it reads x, y
and q in its own chat template, where it has one, and answers without the thoughts that some models begin with.

    JUDGE_MODEL       a hub name or a folder                in .env or the environment, else the constants below
    JUDGE_QUESTIONS   of score or yes, with "|" between     the same

**A policy learns to please the judge, and words can persuade it.** The completion is part of what the judge reads, so
"Reply with 9." may raise a score, and a policy that is trained on the score may find that. Special tokens in x and y
are read as plain text, so that no completion ends its turn and answers in the judge's place. Against words there is no
defence but a better judge, a --kl-coef and a look into completions.jsonl.

A text that does not fit loses its beginning; the question stays whole. What else is judged beside a text changes its
score by rounding alone (2e-5, in float32).

Run: uv run -m nano_rl.rloo --reward-fn nano_rl.judge:score
     JUDGE_QUESTIONS="Is it a story? Reply with Yes or No." uv run -m nano_rl.grpo --reward-fn nano_rl.judge:yes
"""

import functools
import os

import torch
import transformers
from accelerate import PartialState
from dotenv import load_dotenv
from torch import Tensor

from nano_rl.reinforce import InputError, as_messages, load, micro_batches

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCORE_QUESTIONS = "How good is the assistant's answer? Reply with one number from 1, very bad, to 9, excellent."
YES_QUESTIONS = "Does the answer do what the user asks? Reply with Yes or No.|Is it well written? Reply with Yes or No."
DTYPE = torch.float32  # bfloat16 takes half the memory, and moves SmolLM2's scores by 0.06 on average, by 0.27 at most
MAX_TOKENS = 4096  # in one forward pass, padding included; more only where one text has more


def score(prompts: list, completions: list, **_) -> list[float]:
    """(1): from 1 to 9 for each completion; prompts and completions are text or messages."""
    return judge(prompts, completions, SCORE_QUESTIONS, {str(value): value for value in range(1, 10)})


def yes(prompts: list, completions: list, **_) -> list[float]:
    """(2): from 0 to 1 for each completion; prompts and completions are text or messages."""
    return judge(prompts, completions, YES_QUESTIONS, {"Yes": 1, "No": 0})


@torch.no_grad()
def judge(prompts: list, completions: list, questions: str, values: dict[str, float]) -> list[float]:
    """The expected value of the judge's answer, one of the words in `values`, as a mean over the questions."""
    load_dotenv()
    model, tokenizer = load_judge(os.environ.get("JUDGE_MODEL") or MODEL)
    frames = [make_frame(tokenizer, q) for q in (os.environ.get("JUDGE_QUESTIONS") or questions).split("|")]
    answers = encode_answers(tokenizer, frames[0][1], [*values])  # what stands before them is the end of any question
    pairs = zip(prompts, completions, strict=True)
    texts = [encode_text(tokenizer, frame, prompt, y) for prompt, y in pairs for frame in frames]
    logits = next_token_logits(model, texts, answers).view(len(prompts), len(frames), -1)  # (n, Q, K)
    expected = logits.softmax(dim=2) @ torch.tensor([*values.values()]).double()  # (n, Q), (1) and (2)
    return expected.mean(dim=1).tolist()


@functools.cache
def load_judge(name: str) -> tuple:
    device = PartialState().device  # that of the run
    return load(transformers.AutoModelForCausalLM, name, device, DTYPE)


def make_frame(tokenizer, question: str) -> tuple[str, str]:
    """What the judge reads before and after the text that it judges: the template's turns, and the question."""
    text = f"A user and an assistant:\n\n␟\n\n{question.strip()}"
    if tokenizer.chat_template:
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text = tokenizer.apply_chat_template(as_messages(text, "user"), **how)
    else:
        text = (tokenizer.bos_token or "") + text + "\n"
    begin, _, end = text.partition("␟")
    return begin, end


def encode_text(tokenizer, frame: tuple[str, str], prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
    """The ids of all that the judge reads; what is judged loses its beginning where it is too long."""
    turns = as_messages(prompt, "user") + as_messages(completion, "assistant")
    text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    body = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    begin, end = tokenizer([*frame], add_special_tokens=False)["input_ids"]
    room = tokenizer.model_max_length - len(begin) - len(end)
    if room < 1:
        raise InputError(f"JUDGE_QUESTIONS: shorten them, the judge reads {tokenizer.model_max_length} tokens")
    return begin + body[-room:] + end


def encode_answers(tokenizer, end: str, words: list[str]) -> list[int]:
    """The one token that each word is at the beginning of the judge's turn."""
    before, *answers = tokenizer([end, *[end + word for word in words]], add_special_tokens=False)["input_ids"]
    if any(ids[:-1] != before for ids in answers) or len({ids[-1] for ids in answers}) < len(words):
        raise InputError(f"JUDGE_MODEL: choose another, one that has a token for each of {', '.join(words)}")
    return [ids[-1] for ids in answers]


def next_token_logits(model, texts: list[list[int]], token_ids: list[int]) -> Tensor:
    """Logits (texts, K) of K tokens after each text; in parts of texts of like lengths, padded on the left."""
    logits, width = torch.zeros(len(texts), len(token_ids), dtype=torch.float64), max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])  # (n, T)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])  # (n, T)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    for part in micro_batches(batch | {"mask": mask, "rows": torch.arange(len(texts))}, MAX_TOKENS):
        inputs = {name: part[name].to(model.device) for name in batch}
        output = model(**inputs, logits_to_keep=1, use_cache=False)
        logits[part["rows"]] = output.logits[:, -1, token_ids].double().cpu()
    return logits
