"""Reward models: the losses, the text that is scored, what a run writes, and bad input."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_run import read, same
from tiny import CHAT_TEMPLATE, WORDS, gpt2_config, llama_config, make_policy, make_tokenizer, save_policy, start
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import nano_rl.reward_model as rm
from nano_rl import reinforce, remax

ROOT = Path(__file__).parent.parent
TINY = dict(batch_size=4, num_steps=3, learning_rate=1e-3, max_length=60)
PAIRS = [  # the chosen one sings
    {"prompt": f"write about the {word}", "chosen": f"the {other} sings", "rejected": f"the {other} falls on stone"}
    for word in WORDS
    for other in ("sun", "river")
]
LABELS = [
    {"text": f"the {word} {verb}", "label": int(verb == "sings")} for word in WORDS for verb in ("sings", "falls")
]
EOS = 1  # in tests/tiny.py's vocabulary


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(model: str, folder: Path, rows: list[dict] = PAIRS, **args) -> Path:
    flag = "labels" if "label" in rows[0] else "pairs"
    file = write(folder.with_name(folder.name + ".jsonl"), rows)
    return rm.train(rm.Args(model=model, output_dir=str(folder), **{flag: file}, **(TINY | args)))


def build_row(row: dict, tokenizer=None, **args) -> dict:
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.model_max_length = 64
    return rm.build_row(make_policy(llama_config(27)), tokenizer, rm.Args(**args), row)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(run / "reward_model").state_dict()


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """A GPT-2 without a chat template and without a pad token."""
    tokenizer = make_tokenizer(chat=False, pad=None)
    return save_policy(tmp_path_factory.mktemp("plain") / "gpt2", gpt2_config(len(tokenizer)), tokenizer)


# ---- The losses -----------------------------------------------------------------------------------------------------


def naive_losses(logits: torch.Tensor, targets: list, center_coef: float) -> list[float]:
    losses = []
    for row, target in zip(logits.tolist(), targets):
        p = [[math.exp(x) / sum(math.exp(y) for y in text) for x in text] for text in row]
        if len(row) == 1 and len(row[0]) == 1:
            probability = 1 / (1 + math.exp(-row[0][0]))
            losses.append(-math.log(probability if target else 1 - probability))
        elif len(row) == 1:
            losses.append(-math.log(p[0][target]))
        elif len(row[0]) == 1:
            (r_w,), (r_l,) = row
            losses.append(-math.log(1 / (1 + math.exp(-(r_w - r_l - target)))) + center_coef * (r_w + r_l) ** 2)
        else:
            wins = 0.0
            for i, p_i in enumerate(p[0]):
                for j, p_j in enumerate(p[1]):
                    wins += p_i * p_j * (1.0 if i > j else 0.5 if i == j else 0.0)
            losses.append(-math.log(wins))
    return losses


CASES = [
    (random_logits(5, 2, 1), [0.0, 0.5, 2.0, -1.0, 0.0]),
    (random_logits(5, 2, 4), [0.0] * 5),
    (random_logits(5, 1, 1), [0, 1, 1, 0, 1]),
    (random_logits(5, 1, 3), [0, 1, 2, 2, 1]),
]
NAMES = ["scalar", "probabilistic", "two labels", "three labels"]


@pytest.mark.parametrize("logits, targets", CASES, ids=NAMES)
def test_losses_are_those_of_a_naive_loop(logits, targets):
    expected = naive_losses(logits, targets, center_coef=0.1)
    loss = rm.compute_loss(logits, torch.tensor(targets), center_coef=0.1, num_rows=5)
    assert loss.item() == pytest.approx(sum(expected) / 5, rel=1e-9)
    parts = [
        rm.compute_loss(logits[rows], torch.tensor(targets[rows]), 0.1, num_rows=5) for rows in (slice(2), slice(2, 5))
    ]
    assert sum(parts).item() == pytest.approx(sum(expected) / 5, rel=1e-9), "the parts of a batch add up to it"


@pytest.mark.parametrize("logits, targets", CASES, ids=NAMES)
def test_gradients_are_finite_differences(logits, targets):
    targets = torch.tensor(targets)
    assert torch.autograd.gradcheck(lambda x: rm.compute_loss(x, targets, 0.1, 5), (logits,))


def test_a_margin_asks_for_more_and_centring_for_less():
    r_w, r_l = torch.tensor([1.0]), torch.tensor([0.0])
    without = rm.scalar_loss(r_w, r_l, torch.tensor([0.0]), center_coef=0.0)
    assert rm.scalar_loss(r_w, r_l, torch.tensor([1.0]), center_coef=0.0).item() == pytest.approx(math.log(2))
    moved = rm.scalar_loss(r_w + 5, r_l + 5, torch.tensor([0.0]), center_coef=0.0)
    torch.testing.assert_close(moved, without, msg="only the difference counts")
    assert rm.scalar_loss(r_w, r_l, torch.tensor([0.0]), 0.25).item() == pytest.approx(without.item() + 0.25)


def test_the_two_outcomes_of_a_pair_sum_to_one():
    """With ties as losses they would not (pitfall 41)."""
    logits_w, logits_l = random_logits(7, 10), random_logits(7, 10, seed=1)
    wins, loses = (-rm.probabilistic_loss(*pair) for pair in ((logits_w, logits_l), (logits_l, logits_w)))
    torch.testing.assert_close(wins.exp() + loses.exp(), torch.ones(7, dtype=torch.float64))


def test_a_pair_of_equal_texts_costs_log_2():
    logits = random_logits(7, 10)
    torch.testing.assert_close(rm.probabilistic_loss(logits, logits), torch.full((7,), math.log(2)).double())
    scores = logits[:, 0]
    torch.testing.assert_close(
        rm.scalar_loss(scores, scores, torch.zeros(7), 0.0), torch.full((7,), math.log(2)).double()
    )


def test_the_probabilistic_loss_is_finite_where_a_probability_is_0():
    """One-hot at the wrong ends: P(w > l) underflows, its logarithm does not, and the gradient leads out."""
    logits_w = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]], requires_grad=True)
    logits_l = torch.tensor([[0.0, 0.0, 1e4], [0.0, 1e4, 0.0]], requires_grad=True)
    losses = rm.probabilistic_loss(logits_w, logits_l)
    assert losses[0] > 9e3 and losses[1].item() == pytest.approx(math.log(2))
    losses.sum().backward()
    for logits in (logits_w, logits_l):
        assert logits.grad.isfinite().all()
    assert logits_w.grad[0, 0] > 0.4 and logits_l.grad[0, 2] > 0.4


def test_the_expected_score_and_its_deviation():
    logits = random_logits(3, 2, 5)
    r, deviation = rm.expected_score_and_deviation(logits)
    assert r.shape == deviation.shape == (3, 2)
    for text, r_one, deviation_one in zip(logits.flatten(0, 1), r.flatten(), deviation.flatten()):
        p = text.softmax(dim=0).tolist()
        mean = sum(k * p_k for k, p_k in enumerate(p, start=1))
        assert r_one.item() == pytest.approx(mean)
        variance = sum(p_k * (k - mean) ** 2 for k, p_k in enumerate(p, start=1))
        assert deviation_one.item() == pytest.approx(math.sqrt(variance))
    r, deviation = rm.expected_score_and_deviation(logits[..., :1])
    assert torch.equal(r, logits[..., 0]) and (deviation == 0).all()


def test_what_is_told_right():
    pairs = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]], [[2.0], [2.0]]])
    assert rm.compute_correct(pairs, torch.zeros(3)).tolist() == [1, 0, 0.5]
    two_scores = torch.tensor([[[0.0, 3.0], [3.0, 0.0]]])  # by expected score, not by the first logit
    assert rm.compute_correct(two_scores, torch.zeros(1)).tolist() == [1]
    assert rm.compute_correct(torch.tensor([[[0.5]], [[-0.5]]]), torch.tensor([1, 1])).tolist() == [1, 0]
    assert rm.compute_correct(torch.tensor([[[0.0, 2.0, 1.0]]] * 2), torch.tensor([1, 2])).tolist() == [1, 0]


# ---- The text that is scored ----------------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": "write about the sea"}, {"role": "assistant", "content": "the sea sings"}]
OTHER = [CONVERSATION[0], {"role": "assistant", "content": "the sun falls"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "write about the sea", "chosen": "the sea sings", "rejected": "the sun falls"},
        {"prompt": CONVERSATION[:1], "chosen": CONVERSATION[1:], "rejected": OTHER[1:]},
        {"prompt": CONVERSATION[:1], "chosen": "the sea sings", "rejected": "the sun falls"},
        {"prompt": "write about the sea", "chosen": CONVERSATION, "rejected": OTHER},
        {"prompt": CONVERSATION[:1], "chosen": CONVERSATION, "rejected": OTHER},
        {"chosen": CONVERSATION, "rejected": OTHER},
    ],
    ids=["text", "messages", "mixed", "text and all of it", "messages and all of it", "implicit"],
)
@pytest.mark.parametrize("chat", [True, False])
def test_trls_formats_are_one_text(row, chat):
    tokenizer = make_tokenizer(chat=chat)
    texts = (
        "<user> write about the sea <assistant> the sea sings <eos>",
        "<user> write about the sea <assistant> the sun falls <eos>",
    )
    if not chat:
        texts = "write about the sea the sea sings", "write about the sea the sun falls"
    example = build_row(row, tokenizer)
    assert example["ids"] == [tokenizer(text)["input_ids"] for text in texts]
    assert example["completions"] == ["the sea sings", "the sun falls"]
    assert rm.as_messages(example["prompt"], "user") == CONVERSATION[:1]


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("the sea sings", "the sea falls", ("the sea", " sings", " falls")),
        ("the sea", "the seas", ("the", " sea", " seas")),  # not in the middle of a word
        ("a: x\nb: yes", "a: x\nb: no", ("a: x\nb:", " yes", " no")),
        ("a sea:\nyes", "a sea:\nno", ("a sea:", "\nyes", "\nno")),
        ("sea", "sun", ("", "sea", "sun")),
        ("the sea", "the sea", ("the", " sea", " sea")),
    ],
)
def test_an_implicit_prompt_of_texts(chosen, rejected, expected):
    assert rm.split_prompt({"chosen": chosen, "rejected": rejected}) == expected


def test_equal_conversations_keep_an_answer():
    prompt, chosen, rejected = rm.split_prompt({"chosen": CONVERSATION, "rejected": CONVERSATION})
    assert prompt == CONVERSATION[:1] and chosen == rejected == CONVERSATION[1:]


def scored_by_reinforce(folder: Path, monkeypatch, prompts: list, completions: list) -> tuple[list, list[list[int]]]:
    """The rewards that --reward-model gives, and the tokens that it reads for them."""
    load, seen = reinforce.load, []

    def record(model, positional, inputs):
        seen.append(inputs["input_ids"][0].tolist())

    def load_and_record(*inputs):
        model, tokenizer = load(*inputs)
        model.register_forward_pre_hook(record, with_kwargs=True)
        return model, tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(reinforce, "load", load_and_record)
        args = reinforce.Args(reward_model=str(folder / "reward_model"))
        reward_fn = reinforce.load_reward_fn(args, torch.device("cpu"))
    return reward_fn(prompts=prompts, completions=completions), seen


def spy_on_training(monkeypatch) -> list[list[int]]:
    """The tokens of every text that is scored with a gradient."""
    seen, compute_logits = [], rm.compute_logits

    def spy(model, batch):
        if torch.is_grad_enabled():
            width = batch["mask"].shape[1]
            for row in zip(batch["input_ids"], batch["attention_mask"].bool()):
                texts = [ids[mask].tolist() for ids, mask in zip(*[part.tensor_split([-width]) for part in row])]
                seen.extend(filter(None, texts))
        return compute_logits(model, batch)

    monkeypatch.setattr(rm, "compute_logits", spy)
    return seen


@pytest.mark.parametrize("kind", ["model", "plain"])
@pytest.mark.parametrize("head", ["scalar", "probabilistic"])
def test_use_is_training(kind, head, tmp_path, monkeypatch, request):
    """The other files' --reward-model reads the tokens that training read, and gives the score that it evaluated."""
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)
    seen = spy_on_training(monkeypatch)
    folder = run(request.getfixturevalue(kind), tmp_path / "run", num_steps=9, head=head)  # all rows
    rows = PAIRS[: 9 * 4]
    prompts, completions = (
        [row["prompt"] for row in rows] * 2,
        [row[side] for side in ("chosen", "rejected") for row in rows],
    )
    _, used = scored_by_reinforce(folder, monkeypatch, prompts, completions)
    assert len(seen) == 72 and sorted(seen) == sorted(used)
    samples = [row for row in read(folder, "completions.jsonl") if row["step"] == 9]
    rewards, _ = scored_by_reinforce(
        folder, monkeypatch, *zip(*[(row["prompt"], row["completion"]) for row in samples])
    )
    assert rewards == pytest.approx([row["reward"] for row in samples], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["model", "plain"])
def test_all_messages_of_a_conversation_are_read(kind, tmp_path, monkeypatch, request):
    """In use as in training, with the chat template and without."""
    folder = run(request.getfixturevalue(kind), tmp_path / "run", num_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward_model")
    roles, texts = ("user", "assistant", "user"), ("write about the sea", "the sea sings", "write about a song")
    prompt = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    _, (used,) = scored_by_reinforce(folder, monkeypatch, [prompt], ["the old song falls"])
    assert used == rm.encode(tokenizer, [*prompt, {"role": "assistant", "content": "the old song falls"}])
    assert all(tokenizer(text)["input_ids"][-1] in used for text in texts)


@pytest.mark.parametrize("kind", ["model", "plain"])
def test_use_is_training_with_labels(kind, tmp_path, monkeypatch, request):
    """A text may be divided between prompt and completion anywhere, and also where the policy has a chat template."""
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)
    seen = spy_on_training(monkeypatch)
    folder = run(request.getfixturevalue(kind), tmp_path / "run", LABELS, num_steps=9)
    assert AutoTokenizer.from_pretrained(folder / "reward_model").chat_template is None
    texts = [row["text"].split() for row in LABELS[:36]]
    for words in (0, 1, 2):
        prompts, completions = [" ".join(text[:words]) for text in texts], [" ".join(text[words:]) for text in texts]
        _, used = scored_by_reinforce(folder, monkeypatch, prompts, completions)
        assert sorted(seen) == sorted(used)


@pytest.mark.parametrize("config", [llama_config, gpt2_config], ids=["llama", "gpt2"])
def test_a_score_does_not_depend_on_padding(config, monkeypatch):
    """Pitfall 40: not on its side, its width or the pad token; and the model's own forward reads the same token."""
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)
    texts = [[7, 8, 9, EOS], [10, 11, 12, 13, 14, EOS], [7, EOS], [9]]
    scores = []
    for pad in (0, 2, 20):
        policy = make_policy(config(27))
        model = rm.make_reward_model(policy, 3, pad, seed=0)
        for left, right in ((0, 0), (3, 0), (0, 3), (2, 2)):
            width = left + 6  # right padding, or left padding with more on the right
            lefts = [width - len(text) if left else 0 for text in texts]
            rights = [width - n - len(text) + right for n, text in zip(lefts, texts)]
            ids = [[pad] * n + text + [pad] * m for n, text, m in zip(lefts, texts, rights)]
            mask = [[0] * n + [1] * len(text) + [0] * m for n, text, m in zip(lefts, texts, rights)]
            mask = torch.tensor(mask)
            batch = {"input_ids": torch.tensor(ids), "attention_mask": mask, "mask": mask}  # no first text
            twice = {name: torch.cat([tensor] * 2, dim=1) for name, tensor in batch.items()} | {"mask": mask}
            with torch.no_grad():
                scores.append(rm.compute_logits(model, batch).squeeze(1))
                scores += rm.compute_logits(model, twice).unbind(dim=1)
        with torch.no_grad():
            scores.append(torch.cat([model(torch.tensor([text])).logits for text in texts]))
    for other in scores:
        torch.testing.assert_close(other, scores[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_the_pad_token_is_not_the_end_of_a_text(pad, tmp_path, monkeypatch):
    """A chat template that ends in EOS, and a tokenizer that pads with EOS, as Llama 3's does in want of another."""
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)
    folder = run(save_policy(tmp_path / "model", tokenizer=make_tokenizer(pad=pad)), tmp_path / "run", num_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model").eval()
    assert tokenizer.pad_token_id == model.config.pad_token_id != EOS
    ids = torch.tensor([rm.encode(tokenizer, CONVERSATION)])
    assert ids[0, -1] == EOS
    score, without_eos = model(ids).logits, model(ids[:, :-1]).logits
    torch.testing.assert_close(score, model.score(model.model(ids).last_hidden_state[:, -1]))
    assert not torch.allclose(score, without_eos)


def test_a_text_that_ends_in_the_pad_token_is_refused():
    """The model would skip its last tokens where it is used."""
    tokenizer = make_tokenizer(chat=False, pad=None)
    rm.choose_pad(tokenizer, 27)
    assert tokenizer.pad_token == "<eos>" or tokenizer.pad_token == "<unk>"
    with pytest.raises(ValueError, match="with the pad token at its end"):
        build_row({"prompt": "the", "chosen": f"sea {tokenizer.pad_token}", "rejected": "sun"}, tokenizer)


def test_no_word_becomes_the_pad_token(tmp_path, monkeypatch):
    """Saved as a special token, it would be cut out of every text; a model without one reads the last token, too."""
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["!", "<eos>", *WORDS])}, unk_token="!"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = run(save_policy(tmp_path / "model", tokenizer=tokenizer), tmp_path / "run", num_steps=1)
    assert AutoTokenizer.from_pretrained(folder / "reward_model").pad_token is None
    samples = [row for row in read(folder, "completions.jsonl") if row["step"] == 1]
    rewards, _ = scored_by_reinforce(
        folder, monkeypatch, *zip(*[(row["prompt"], row["completion"]) for row in samples])
    )
    assert rewards == pytest.approx([row["reward"] for row in samples], rel=1e-5, abs=1e-6)


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(tmp_path):
    """At once: --reward-model would refuse what was trained."""
    tokenizer = make_tokenizer()
    name = save_policy(tmp_path / "model", llama_config(len(tokenizer)), tokenizer)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(name)
    message = refused(model=name, pairs=write(tmp_path / "pairs", PAIRS))
    assert message == "--model: its tokenizer has tokens beyond the 27 that it has an embedding of"


def test_a_pad_token_that_ends_no_text_stays(plain):
    for tokenizer in (make_tokenizer(), AutoTokenizer.from_pretrained(plain, pad_token="<eos>")):
        before = tokenizer.pad_token_id
        rm.choose_pad(tokenizer, 100)
        assert tokenizer.pad_token_id == before


def test_a_rows_texts_stay_together():
    """Beside each other, in parts that hold no more tokens than they may."""
    rows = [{"ids": [[7] * n, [8] * (n // 2 + 1)], "target": n} for n in (3, 90, 1, 300, 4, 90, 2)]
    seen = []
    for part in rm.micro_batches(rm.make_batch(rows, torch.device("cpu")), max_tokens=1000):
        assert part["input_ids"].numel() <= 1000
        for ids, mask, target in zip(part["input_ids"], part["attention_mask"].bool(), part["target"].tolist()):
            assert ids[mask].tolist() == [7] * target + [8] * (target // 2 + 1)
            assert ids[-part["mask"].shape[1] :][0] == 8, "the second text begins where the mask does"
            seen.append(target)
    assert sorted(seen) == [1, 2, 3, 4, 90, 90, 300]


def test_long_texts_lose_their_beginning(model, tmp_path, monkeypatch, capsys):
    """The end is where a score is read."""
    seen = spy_on_training(monkeypatch)
    long = {"prompt": "write about " + "the sea " * 20, "chosen": "the sun sings", "rejected": "falls"}
    run(model, tmp_path / "run", [long, *PAIRS], num_steps=11, max_length=12)
    ids = rm.encode(
        make_tokenizer(), rm.as_messages(long["prompt"], "user") + rm.as_messages(long["chosen"], "assistant")
    )
    assert ids[-12:] in seen and max(map(len, seen)) == 12
    assert "37 rows to train on, 2 texts cut; 4 held out" in capsys.readouterr().out
    longer = build_row(long | {"prompt": "the " * 90}, max_length=1000)
    assert [len(text) for text in longer["ids"]] == [62, 62], "the model's context, as --reward-model reads it"


# ---- Held-out rows --------------------------------------------------------------------------------------------------


def test_no_prompt_is_on_both_sides(tmp_path):
    def load(*prompts: str) -> tuple[list[str], list[str]]:
        path = write(tmp_path / "rows.jsonl", [{"group": prompt} for prompt in prompts])
        parts = rm.load_rows(path, "", "", lambda row: row | {"text": row["group"]})
        return [[row["text"] for row in part] for part in parts]

    train, held_out = load(*[f"{i // 3}" for i in range(90)], "0", "29")
    assert held_out == [f"{i // 3}" for i in range(81, 90)] + ["29"], "all rows of the last tenth of the prompts"
    assert len(train) == 82 and not set(train) & set(held_out)
    assert len(load(*map(str, range(9000)))[1]) == 512
    assert [len(part) for part in load("0", "1", "2")] == [1, 2]


def test_a_text_of_two_labels_is_on_one_side(tmp_path):
    """It is one prompt, as the rows of a pair are."""
    rows = [{"text": f"the {word}", "label": label} for label in (0, 1) for word in WORDS]
    path, build = (
        write(tmp_path / "rows.jsonl", rows),
        lambda row: build_row(row, make_tokenizer(chat=False), labels="a"),
    )
    train, held_out = rm.load_rows(path, "", "", build)
    assert len(train) + len(held_out) == 2 * len(WORDS) and len(held_out) == 4
    assert not {row["completions"][0] for row in train} & {row["completions"][0] for row in held_out}


def test_held_out_metrics(model, tmp_path, monkeypatch, capsys):
    """Against the definitions, from the scores of --reward-model; a tie of lengths is half right."""
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)
    held_out = [
        {"prompt": "the sea", "chosen": "sings sings", "rejected": "sun"},
        {"prompt": "the sea", "chosen": "sun", "rejected": "old"},
        {"prompt": "the sun", "chosen": "old", "rejected": "river walks"},
    ]
    folder = run(model, tmp_path / "run", head="probabilistic", eval_pairs=write(tmp_path / "held.jsonl", held_out))
    last = read(folder)[-1]
    assert f"{len(PAIRS)} rows to train on, 0 texts cut; 3 held out" in capsys.readouterr().out
    chosen, _ = scored_by_reinforce(folder, monkeypatch, *zip(*[(row["prompt"], row["chosen"]) for row in held_out]))
    rejected, _ = scored_by_reinforce(
        folder, monkeypatch, *zip(*[(row["prompt"], row["rejected"]) for row in held_out])
    )
    correct = [float(r_w > r_l) for r_w, r_l in zip(chosen, rejected)]
    accuracy = sum(correct) / 3
    assert last["eval/accuracy"] == pytest.approx(accuracy) and 0 < accuracy < 1
    off = [correct[0] + correct[1] - 2 * accuracy, correct[2] - accuracy]  # two prompts
    assert last["eval/accuracy_se"] == pytest.approx(math.sqrt(2 * (off[0] ** 2 + off[1] ** 2)) / 3)
    assert last["eval/longer_accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert last["eval/score_mean"] == pytest.approx(sum(chosen + rejected) / 6, rel=1e-5)
    assert 0 < last["eval/score_deviation"] < 4.5


def test_held_out_labels(model, tmp_path):
    held_out = [{"text": "the sea", "label": 1}, {"text": "the sun", "label": 0}, {"text": "a red sun", "label": 1}]
    folder = run(model, tmp_path / "run", LABELS, eval_labels=write(tmp_path / "held.jsonl", held_out))
    metrics = read(folder)[-1]
    assert metrics["eval/majority_accuracy"] == pytest.approx(2 / 3)
    assert not {"eval/longer_accuracy", "eval/score_deviation"} & metrics.keys()


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["scalar", "probabilistic"])
def test_it_learns_a_preference_against_length(model, tmp_path, head):
    metrics = read(run(model, tmp_path / "run", head=head, num_steps=40, learning_rate=3e-3))
    assert metrics[-1]["eval/accuracy"] == 1 and metrics[-1]["eval/longer_accuracy"] == 0
    assert metrics[-1]["eval/loss"] < 0.3 < metrics[0]["eval/loss"]
    assert metrics[-1]["accuracy"] == 1 > min(row["accuracy"] for row in metrics[1:5])


@pytest.mark.parametrize("num_labels", [2, 3])
def test_it_learns_labels(model, tmp_path, num_labels):
    rows = [row | {"label": row["label"] * (num_labels - 1)} for row in LABELS]
    if num_labels == 3:
        rows = [{"text": f"the {word} of", "label": 1} for word in WORDS] + rows
    folder = run(model, tmp_path / "run", rows, num_steps=120, learning_rate=3e-3)
    assert read(folder)[-1]["eval/accuracy"] == 1
    assert weights(folder)["score.weight"].shape[0] == (1 if num_labels == 2 else 3)


@pytest.mark.parametrize("head, num_labels", [("scalar", 1), ("probabilistic", 4)])
def test_a_run_writes_its_files(model, tmp_path, head, num_labels, capsys):
    folder = run(model, tmp_path / "run", head=head, num_scores=4, eval_every=2)
    files = ["checkpoint.pt", "completions.jsonl", "config.json", "metrics.jsonl", "reward_model"]
    assert sorted(path.name for path in folder.iterdir()) == files
    metrics = read(folder)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics if "eval/accuracy" in row] == [0, 2, 3]
    assert list(metrics[1]) == "step epoch loss accuracy grad_norm".split()
    assert metrics[1]["epoch"] == pytest.approx(4 / 36)
    assert len(read(folder, "completions.jsonl")) == 3 * 2 * 4
    out = capsys.readouterr().out
    assert "36 rows to train on, 0 texts cut; 4 held out" in out
    for step in range(4):
        assert f"step {step}/3" + ("  " if step else "\n") in out
    assert max(len(line) for line in out.splitlines() if line.startswith("step ")) <= 80
    assert "\n  eval/loss " in out and "  eval/longer_accuracy " in out
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    assert loaded.config.num_labels == num_labels and loaded.dtype == torch.float32
    assert loaded.config.pad_token_id == AutoTokenizer.from_pretrained(folder / "reward_model").pad_token_id == 0
    args = dict(model=model, batch_size=4, num_steps=1, max_new_tokens=8, output_dir=str(tmp_path / "rl"))
    assert reinforce.train(reinforce.Args(reward_model=str(folder / "reward_model"), **args)).is_dir()


def test_one_pass_by_default(model, tmp_path):
    metrics = read(run(model, tmp_path / "run", num_steps=0, batch_size=10))
    assert metrics[-1]["step"] == 4
    seen = json.loads((tmp_path / "run" / "config.json").read_text())
    assert seen["num_steps"] == 4


def test_each_pass_sees_every_row_once(model, tmp_path, monkeypatch):
    seen = spy_on_training(monkeypatch)
    run(model, tmp_path / "run", num_steps=18)  # 2 passes over 36 rows
    tokenizer = make_tokenizer()
    ids = [ids for row in PAIRS[:36] for ids in build_row(row, tokenizer)["ids"]]
    assert sorted(seen[:72]) == sorted(seen[72:144]) == sorted(ids) and seen[:72] != seen[72:144]
    run(model, tmp_path / "other", num_steps=9, seed=1)
    assert sorted(seen[144:]) == sorted(ids) and seen[144:] not in (seen[:72], seen[72:144]), "another seed's order"


def test_margins_reach_the_loss(model, tmp_path):
    rows = [row | {"margin": 3.0} for row in PAIRS]
    assert read(run(model, tmp_path / "1", rows))[1]["loss"] > read(run(model, tmp_path / "2"))[1]["loss"] + 0.5


def test_centring_reaches_the_loss(model, tmp_path):
    """In training and held out: η (r_w + r_l)² beside the rest."""
    centred, free = [read(run(model, tmp_path / f"{eta}", center_coef=eta)) for eta in (10.0, 0.0)]
    assert centred[0]["eval/loss"] > free[0]["eval/loss"] + 1e-3 and centred[1]["loss"] > free[1]["loss"] + 1e-3


@pytest.mark.parametrize("rows, args", [(PAIRS, {}), (PAIRS, {"head": "probabilistic"}), (LABELS, {})])
def test_micro_batches_do_not_change_a_run(model, tmp_path, monkeypatch, rows, args):
    monkeypatch.setattr(rm, "has_bfloat16", lambda device: False)  # whose rounding depends on the batch
    one, all_at_once = (
        read(run(model, tmp_path / str(size), rows, micro_batch_tokens=size, **args)) for size in (1, 10**6)
    )
    for a, b in zip(one, all_at_once, strict=True):
        for name in a:
            assert a[name] == b[name] or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_the_gradient_reaches_all_layers_and_is_clipped(model, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        total = clip(parameters, max_norm)
        norms.append([parameter.grad.norm().item() for parameter in parameters])
        return total

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    metrics = read(run(model, tmp_path / "run", max_grad_norm=0.25))
    for row, after in zip(metrics[1:], norms, strict=True):
        assert row["grad_norm"] > 0.25 and math.hypot(*after) == pytest.approx(0.25, rel=1e-3)
        assert min(after) > 0


def test_the_head_starts_at_the_scale_of_its_inputs():
    head = rm.make_reward_model(make_policy(llama_config(27)), 1000, 0, seed=0).score.weight  # (1000, 16)
    assert head.std().item() == pytest.approx(1 / math.sqrt(17), rel=0.02)


def test_same_seed_same_bits(model, tmp_path):
    first, second = run(model, tmp_path / "1"), run(model, tmp_path / "2")
    assert read(first) == read(second) and same(weights(first), weights(second))
    assert read(first) != read(run(model, tmp_path / "3", seed=1))


def test_dropout_is_off(tmp_path):
    configs = [gpt2_config(27, attn_pdrop=p, resid_pdrop=p, embd_pdrop=p) for p in (0.5, 0.0)]
    with_dropout, without = (save_policy(tmp_path / str(i), config) for i, config in enumerate(configs))
    assert read(run(with_dropout, tmp_path / "a")) == read(run(without, tmp_path / "b"))


def test_wandb_offline(model, tmp_path):
    assert list(run(model, tmp_path / "run", track=True, num_steps=1).glob("wandb/offline-run-*/*.wandb"))


# ---- A copied file, killed and resumed ------------------------------------------------------------------------------

KILLER = """
import os, signal
import reward_model

log = reward_model.Run.log

def log_and_die(run, step, *rest):
    log(run, step, *rest)
    if step == 5:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "los')  # killed in the middle of a line
        os.kill(os.getpid(), signal.SIGKILL)

reward_model.Run.log = log_and_die
reward_model.train(reward_model.tyro.cli(reward_model.Args))
"""


def test_a_copied_file_killed_and_resumed_ends_in_the_same_bits(model, tmp_path):
    """Alone in an empty folder, without this project on the path."""
    file, killer = shutil.copy(ROOT / "nano_rl" / "reward_model.py", tmp_path), tmp_path / "killer.py"
    killer.write_text(KILLER)
    args = TINY | {"num_steps": 6, "save_minutes": 0, "eval_every": 3}
    straight = run(model, tmp_path / "straight", **args)
    args |= {"model": model, "pairs": "straight.jsonl", "output_dir": "run"}
    words = [word for flag, value in args.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    killed = start(tmp_path, killer, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "reward_model").exists()
    resumed = start(tmp_path, Path(file), "--resume", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert read(tmp_path / "run") == read(straight)
    assert read(tmp_path / "run", "completions.jsonl") == read(straight, "completions.jsonl")
    assert same(weights(tmp_path / "run"), weights(straight))


def test_more_steps(model, tmp_path):
    """Four steps, resumed for two more, are the six of a run that was asked for six."""
    straight = run(model, tmp_path / "straight", num_steps=6)
    folder = run(model, tmp_path / "run", num_steps=4)
    rm.train(rm.Args(resume=str(folder), num_steps=6))
    assert same(weights(folder), weights(straight))


def test_ctrl_c_ends_the_run_after_its_step(model, tmp_path, monkeypatch):
    """And the run goes on to the weights of one without a stop."""
    straight = run(model, tmp_path / "straight", num_steps=4)
    log = rm.Run.log

    def press(run, step, *rest):
        log(run, step, *rest)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="step 2: go on with --resume"):
        patch.setattr(rm.Run, "log", press)
        run(model, tmp_path / "run", num_steps=4)
    rm.train(rm.Args(resume=str(tmp_path / "run")))
    assert same(weights(tmp_path / "run"), weights(straight))


# ---- Bad input ------------------------------------------------------------------------------------------------------


def refused(**args) -> str:
    """The message that the user reads."""
    with pytest.raises(rm.InputError) as error:
        rm.train(rm.Args(**(TINY | args)))
    return str(error.value)


GOOD = '{"prompt": "the sea", "chosen": "sings", "rejected": "falls"}'


@pytest.mark.parametrize(
    "bad, what",
    [
        ('{"prompt": "a", "chosen": "b"', "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[1]", "AttributeError"),
        ('{"prompt": "a", "chosen": "b"}', "KeyError('rejected')"),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "a prompt, and the assistant's answer to it, are texts"),
        ('{"prompt": 1, "chosen": "b", "rejected": "c"}', "a prompt, and the assistant's answer to it, are"),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', "a prompt, and the assistant's answer to it, are"),
        ('{"prompt": "a", "chosen": [], "rejected": "c"}', "a prompt, and the assistant's answer to it, are"),
        (
            '{"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}',
            "TypeError",
        ),
        (
            '{"chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}',
            "in a chat template the prompt is a turn",
        ),
        ('{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}', "KeyError('content')"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}', "ValueError"),
        ('{"chosen": "a b", "rejected": "a c"}', "in a chat template the prompt is a turn: give it, or messages"),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}',
            "the assistant's answer",
        ),
        (
            '{"prompt": "a", "rejected": "c", "chosen": [{"role": "user", "content": "b"}]}',
            "the assistant's answer",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "margin nan"),
    ],
)
def test_bad_pairs_are_named_by_file_and_line(model, tmp_path, bad, what):
    good = [GOOD.replace("sea", word) for word in WORDS[:4]]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([*good[:2], bad, *good[2:]]) + "\n")
    message = refused(model=model, pairs=str(file), output_dir=str(tmp_path / "run"))
    needs = '{"prompt", "chosen", "rejected": text or messages}'
    assert message.startswith(f"cannot read {file}, line 3: needs {needs}") and what in message
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    message = refused(
        model=model, pairs=str(tmp_path / "good.jsonl"), eval_pairs=str(file), output_dir=str(tmp_path / "run")
    )
    assert message.startswith(f"cannot read {file}, line 3: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad, what",
    [
        ('{"text": "a"}', "KeyError('label')"),
        ('{"text": "a", "label": "1"}', "label '1'"),
        ('{"text": "a", "label": 0.5}', "label 0.5"),
        ('{"text": "a", "label": -1}', "label -1"),
        ('{"text": null, "label": 1}', "TypeError"),
        ('{"text": "", "label": 1}', "a text without tokens"),
    ],
)
def test_bad_labels_are_named_by_file_and_line(model, tmp_path, bad, what):
    file = tmp_path / "labels.jsonl"
    file.write_text(f'{{"text": "b", "label": 0}}\n{bad}\n')
    message = refused(model=model, labels=str(file))
    needs = '{"text": text, "label": 0, 1, ...}'
    assert message.startswith(f"cannot read {file}, line 2: needs {needs}") and what in message


def test_too_few_rows(model, tmp_path):
    for name, rows in (("1", PAIRS[:2]), ("2", PAIRS[:4])):
        message = refused(model=model, pairs=write(tmp_path / name, rows))
        assert message.startswith(f"{tmp_path / name}: needs 2 different prompts to hold out, and one more to train on")
    for label in 0, 1, 2:
        message = refused(model=model, labels=write(tmp_path / "3", [row | {"label": label} for row in LABELS]))
        assert message == f"{tmp_path / '3'}: need labels 0, 1 and so on without a gap, not {{{label}}}"
    for labels in ((1, 2), (0, 2), (0, 1, 3)):
        rows = [{"text": f"the {word}", "label": labels[i % len(labels)]} for i, word in enumerate(WORDS)]
        assert "without a gap" in refused(model=model, labels=write(tmp_path / "4", rows))
    good = write(tmp_path / "5", [{"text": f"the {word}", "label": i % 2} for i, word in enumerate(WORDS)])
    message = refused(model=model, labels=good, eval_labels=write(tmp_path / "6", rows))
    both = f"{tmp_path / '5'} and {tmp_path / '6'}"
    assert message == f"{both}: need labels 0, 1 and so on without a gap, not {{0, 1, 3}}"


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "give --pairs (with it --eval-pairs"),
        ({"pairs": "a", "labels": "b"}, "give --pairs (with it --eval-pairs"),
        ({"pairs": "a", "eval_labels": "b"}, "give --pairs (with it --eval-pairs"),
        ({"labels": "a", "eval_pairs": "b"}, "give --pairs (with it --eval-pairs"),
        ({"labels": "a", "head": "probabilistic"}, "give --pairs (with it --eval-pairs"),
        ({"pairs": "a", "num_scores": 1}, "give --pairs (with it --eval-pairs"),
        ({"pairs": "a", "batch_size": 0}, "--batch-size 0: must be above 0"),
        ({"pairs": "a", "max_length": -1}, "--max-length -1: must be above 0"),
        ({"pairs": "a", "center_coef": -1.0}, "--center-coef -1.0: must be above 0"),
        ({"pairs": "no/such/file"}, "cannot read no/such/file"),
        ({"pairs": "a", "model": "no-one/none"}, "cannot load no-one/none: check name"),
    ],
)
def test_bad_arguments(model, args, message):
    assert message in refused(**({"model": model} | args))


def test_an_output_folder_that_holds_something(model, tmp_path):
    run(model, tmp_path / "run", num_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = refused(model=model, pairs=str(tmp_path / "run.jsonl"), output_dir=str(tmp_path / "run"))
    assert "is not empty: choose another" in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_goes_on_without_the_logs_that_were_lost(model, tmp_path):
    folder = run(model, tmp_path / "run", num_steps=1)
    (folder / "completions.jsonl").unlink()
    (folder / "metrics.jsonl").write_text("")
    rm.train(rm.Args(resume=str(folder), num_steps=2))
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [2]


def test_resume_of_another_files_run(model, tmp_path):
    args = dict(model=model, batch_size=4, num_steps=1, max_new_tokens=8, eval_every=0)
    folder = remax.train(remax.Args(output_dir=str(tmp_path / "rl"), **args))
    with pytest.raises(rm.InputError) as error:
        rm.train(rm.Args(resume=str(folder)))
    assert str(error.value).startswith(f"cannot resume {folder}: no run of this file")
