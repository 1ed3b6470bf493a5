"""Tiny random models, tokenizers and the exact expectations that the tests compare with."""

import asyncio
import functools
import itertools
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

OURS = [str(Path(__file__).parent.parent), str(Path(__file__).parent), "", "."]
WORDS = "a the sea sun tree song stone river walks sings falls and of in on old new far red blue".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(pad: str | None = "<pad>", eos: str | None = "<eos>", chat: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "write", "about", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": pad, "eos_token": eos, "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in named.items() if v})
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def make_byte_tokenizer(words: tuple[str, ...] = ("Yes", "No"), chat: bool = True) -> PreTrainedTokenizerFast:
    """Of bytes, but for these words, which are one token each: as the large ones, it can read and write all texts."""
    begins = [word[:length] for word in words for length in range(2, len(word) + 1)]
    vocabulary = ["<pad>", "<eos>", "<user>", "<assistant>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *begins]
    merges = [(begin[:-1], begin[-1]) for begin in begins]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(vocabulary[:4])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


# Wide initialisations, so that the distributions are far from uniform.
IDS = {"eos_token_id": 1, "pad_token_id": None, "bos_token_id": None, "initializer_range": 0.5}


def llama_config(vocab_size: int, **options) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaConfig(vocab_size=vocab_size, **(sizes | heads | IDS | options))


def gpt2_config(vocab_size: int, **options) -> GPT2Config:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2Config(vocab_size=vocab_size, **(sizes | IDS | options))


def make_policy(config, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def save_policy(folder: Path, config=None, tokenizer=None, seed: int = 0) -> str:
    tokenizer = tokenizer or make_tokenizer()
    make_policy(config or llama_config(len(tokenizer)), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, num_labels: int = 1, tokenizer=None, config=None, seed: int = 1) -> str:
    tokenizer = tokenizer or make_tokenizer()
    config = config or llama_config(len(tokenizer), pad_token_id=0)
    config.num_labels = num_labels
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def all_completions(vocab_size: int, max_tokens: int, stops: set[int]) -> list[list[int]]:
    """Every completion there is: those that end in their first stop token, and those cut at `max_tokens`."""
    completions = []
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(range(vocab_size), repeat=length):
            if not stops & set(ids[:-1]) and (ids[-1] in stops or length == max_tokens):
                completions.append(list(ids))
    return completions


def as_batch(prompt: list[int], completions: list[list[int]], pad: int, left: int = 0) -> dict[str, torch.Tensor]:
    """The batch that `sample` would make of these completions, with `left` more columns of left padding."""
    width = max(map(len, completions))
    input_ids = [[pad] * left + prompt + ids + [pad] * (width - len(ids)) for ids in completions]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in completions]
    attention_mask = [[0] * left + [1] * len(prompt) + row for row in mask]
    return {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(attention_mask),
        "position_ids": (torch.tensor(attention_mask).cumsum(dim=1) - 1).clamp(min=0),
        "mask": torch.tensor(mask),
    }


def make_examples(*prompts: list[int], **columns: list) -> list[dict]:
    """As `load_prompts` makes them; of the columns, one value for each."""
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
    return [{"prompt": "", "prompt_ids": ids, "begun": "", "columns": row} for ids, row in zip(prompts, rows)]


def score(file, reward_fn: Callable, texts: list[str], examples: list[dict] | None = None, **args) -> tuple:
    """`file`'s score of these completions of one token each, in the first step of a run."""
    ones = torch.ones(len(texts), 1, dtype=torch.long)
    run = SimpleNamespace(state={"step": 0}, args=file.Args(num_steps=3, **args), loop=asyncio.Runner())
    batch = {"input_ids": ones, "mask": ones}
    return file.score(run, reward_fn, examples or make_examples(*[[1]] * len(texts)), batch, texts)


def float64(policy: torch.nn.Module) -> torch.nn.Module:
    """All of it: transformers' RMSNorm computes in float32 whatever it is given, torch's does not."""
    policy = policy.double()
    for name, module in list(policy.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            policy.set_submodule(name, norm)
    return policy


def exact_logprobs(policy, prompt: list[int], completions: list[list[int]], temperature: float) -> torch.Tensor:
    """log π(completion | prompt) of each, from an unpadded forward pass for every prefix."""

    @functools.cache
    def next_token(prefix: tuple[int, ...]) -> torch.Tensor:
        return (policy(torch.tensor([prompt + list(prefix)])).logits[0, -1] / temperature).log_softmax(dim=-1)

    totals = [sum(next_token(tuple(ids[:t]))[token] for t, token in enumerate(ids)) for ids in completions]
    return torch.stack(totals)


def gradient(value: torch.Tensor, policy) -> torch.Tensor:
    """d value / d parameters, one flat vector."""
    grads = torch.autograd.grad(value, list(policy.parameters()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def fork(target: Callable, *inputs) -> torch.multiprocessing.Process:
    """A process that starts as a copy of this one, without importing anything again."""
    process = torch.multiprocessing.get_context("fork").Process(target=target, args=inputs)
    process.start()
    return process


def start(folder: Path, file: Path, *words: str, encoding: str = "utf-8") -> subprocess.CompletedProcess:
    """`python file words` in `folder`, without this project on its path; a fork, which need not import torch again."""

    def run() -> None:
        os.chdir(folder)
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", encoding=encoding), open(2, "w")
        sys.argv, sys.path = [str(file), *words], [str(file.parent), *(path for path in sys.path if path not in OURS)]
        for name in [name for name in sys.modules if name.split(".")[0] in ("nano_rl", "tests")]:
            del sys.modules[name]
        AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test has left
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runpy.run_path(str(file), run_name="__main__")

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (out, err)
        process = fork(run)
        process.join(timeout=300)
        process.kill()
        out.seek(0), err.seek(0)
        texts = out.read().decode(encoding), err.read().decode()
    return subprocess.CompletedProcess([str(file), *words], process.exitcode, *texts)


def main(monkeypatch, name: str, *words: str) -> str | int:
    """Runs `python -m nano_rl.<name>` in this process, and returns what it exits with: 0, or what it says on stderr."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, f"nano_rl.{name}", raising=False)  # runpy warns of a module that is there already
        try:
            runpy.run_module(f"nano_rl.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            return exit.code or 0
    return 0
