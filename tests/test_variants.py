"""The variants: what their docstrings state, by enumeration and against their neighbours, and whole runs of each."""

import inspect
import itertools
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_run import TINY, divided, flags, fork_group, read, same, weights
from tiny import all_completions, as_batch, exact_logprobs, float64, fork, gradient, llama_config, make_policy, start

from nano_rl import cispo, dapo, distill, dr_grpo, grpo, gspo, maxrl, ppo, reinforce_pp, remax, rloo, sums

VARIANTS = [dr_grpo, gspo, cispo, dapo, reinforce_pp, maxrl]
GROUPED = [dr_grpo, gspo, cispo, dapo]  # GRPO's
PROMPT, COMPLETIONS = [2, 4], all_completions(5, 2, {1})  # 21, of one token or two
by_run = pytest.mark.parametrize("file", [*VARIANTS, distill], ids=lambda file: file.__name__[8:])


class World:
    """A policy, an older one that sampled where `off_policy`, and what they think of every completion."""

    def __init__(self, off_policy: bool) -> None:
        self.policy, ref_policy = (float64(make_policy(llama_config(5), seed)) for seed in (0, 7))
        old_policy = float64(make_policy(llama_config(5), 3)) if off_policy else self.policy
        self.batch = as_batch(PROMPT, COMPLETIONS, pad=1)
        self.mask = self.batch["mask"]
        self.lengths = self.mask.sum(dim=1)
        self.logprobs = grpo.compute_logprobs(self.policy, self.batch, 0.6)
        self.exact = exact_logprobs(self.policy, PROMPT, COMPLETIONS, 0.6)
        with torch.no_grad():
            self.old, self.ref = (grpo.compute_logprobs(model, self.batch, 0.6) for model in (old_policy, ref_policy))
            self.probabilities = exact_logprobs(old_policy, PROMPT, COMPLETIONS, 0.6).exp()
        self.ratio = grpo.compute_ratio(self.logprobs, self.old)
        self.kl = grpo.compute_kl(self.logprobs, self.ref)
        self.rewards = torch.rand(len(COMPLETIONS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def groups(self, size: int):
        for group in itertools.product(range(len(COMPLETIONS)), repeat=size):
            yield list(group), self.probabilities[list(group)].prod()


@pytest.fixture(scope="module", params=[False, True], ids=["on policy", "off policy"])
def world(request):
    return World(request.param)


@pytest.fixture(scope="module")
def on_policy():
    return World(False)


def file_loss(file, world: World, rows: list[int], rewards: torch.Tensor, kl_coef: float = 0.3) -> torch.Tensor:
    """The file's own loss of a group, that is of a step, with clips that both kinds of ratio reach."""
    mask, ratio, kl = world.mask[rows], world.ratio[rows], world.kl[rows]
    num_tokens, group_size = mask.sum().item(), len(rows)
    if file is dr_grpo:
        return file.compute_loss(
            ratio, kl, file.compute_advantages(rewards, group_size), mask, 0.2, kl_coef, group_size * 5
        )
    if file is gspo:
        ratio = file.compute_ratio(world.logprobs[rows], world.old[rows], mask)
        advantages = file.compute_advantages(rewards, group_size)
        return file.compute_loss(ratio, kl, advantages, mask, (0.2, 0.3), kl_coef, group_size)
    if file is cispo:
        advantages = file.compute_advantages(rewards, group_size)
        return file.compute_loss(ratio, world.logprobs[rows], kl, advantages, mask, 0.5, kl_coef, num_tokens)
    if file is dapo:
        rewards = rewards - file.compute_penalty(world.lengths[rows], 2, 1)
        return file.compute_loss(ratio, file.compute_advantages(rewards, group_size), mask, (0.2, 0.28), num_tokens)
    if file is reinforce_pp:
        returns = file.compute_returns(rewards, world.old[rows] - world.ref[rows], kl_coef)
        advantages = file.compute_advantages(returns, returns[mask.bool()])
        return file.compute_loss(ratio, advantages, mask, 0.2, group_size)


def stated_loss(file, world: World, rows: list[int], rewards: torch.Tensor) -> torch.Tensor:
    """The same in numbers and loops, from the docstring."""
    total, count, G, kl_coef = 0.0, sum(len(COMPLETIONS[i]) for i in rows), len(rows), 0.3
    scores = [rewards[j].item() - (len(COMPLETIONS[i]) == 2 if file is dapo else 0) for j, i in enumerate(rows)]
    mean = sum(scores) / G
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / (G - 1))
    log_ratios, old_kl = world.logprobs - world.old, (world.old - world.ref).tolist()
    if file is reinforce_pp:
        returns = [
            [s - kl_coef * sum(old_kl[i][t : len(COMPLETIONS[i])]) for t in range(2)] for s, i in zip(scores, rows)
        ]
        every = [value for row, i in zip(returns, rows) for value in row[: len(COMPLETIONS[i])]]
        mean = sum(every) / len(every)
        std = math.sqrt(sum((value - mean) ** 2 for value in every) / len(every))
    for j, i in enumerate(rows):
        length, tokens = len(COMPLETIONS[i]), 0.0
        for t in range(length):
            rho = log_ratios[i, t].exp()
            A = (scores[j] - mean) / (std + 1e-4)
            low, high = 0.8, 1.2
            if file is dr_grpo:
                A = scores[j] - mean
            elif file is gspo:
                rho, low, high = (sum(log_ratios[i, s] for s in range(length)) / length).exp(), 0.8, 1.3
            elif file is dapo:
                high = 1.28
            elif file is reinforce_pp:
                A = (returns[j][t] - mean) / (std + 1e-4)
            objective = min(rho * A, min(max(rho, low), high) * A)
            if file is cispo:
                objective = min(rho.item(), 1.5) * A * world.logprobs[i, t]
            if file in (dr_grpo, gspo, cispo):
                gap = world.ref[i, t] - world.logprobs[i, t]
                objective = objective - kl_coef * (gap.exp() - gap - 1)
            tokens = tokens + objective
        weight = {dr_grpo: 1 / (G * 5), cispo: 1 / count, dapo: 1 / count}.get(file, 1 / (G * length))
        total = total - tokens * weight
    return total


@pytest.mark.parametrize("file", [*GROUPED, reinforce_pp], ids=lambda file: file.__name__[8:])
def test_the_expected_gradient_is_that_of_the_stated_objective(file, world):
    """Over every pair of completions that π_old can give; biased ones are what their docstrings say, no more."""
    ours = truth = 0.0
    for rows, probability in world.groups(2):
        ours = ours + probability * file_loss(file, world, rows, world.rewards[rows])
        truth = truth + probability * stated_loss(file, world, rows, world.rewards[rows])
    ours, truth = gradient(ours, world.policy), gradient(truth, world.policy)
    assert truth.norm() > 1e-2
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("group_size", [2, 3])
def test_dr_grpo_is_the_policy_gradient_but_for_a_factor(on_policy, group_size):
    """(1 - 1/G) / T_max of the true one, at unequal lengths; GRPO's has another direction (pitfalls 17, 27)."""
    truth = -gradient((on_policy.exact.exp() * on_policy.rewards).sum(), on_policy.policy)
    groups = list(on_policy.groups(group_size))
    expected = sum(p * file_loss(dr_grpo, on_policy, rows, on_policy.rewards[rows], kl_coef=0.0) for rows, p in groups)
    ours = gradient(expected, on_policy.policy)
    torch.testing.assert_close(ours, truth * (1 - 1 / group_size) / 5, atol=1e-9, rtol=0)
    theirs = gradient(sum(p * grpo_loss(on_policy, rows, kl_coef=0.0) for rows, p in groups), on_policy.policy)
    assert (theirs / theirs.norm() - truth / truth.norm()).norm() > 1e-2


def test_dr_grpo_is_rloo_in_the_first_update(on_policy):
    rows, G = [0, 3, 9, 20], 4
    assert len({len(COMPLETIONS[i]) for i in rows}) == 2
    rewards, mask = on_policy.rewards[rows], on_policy.mask[rows]
    theirs = rloo.compute_loss(on_policy.logprobs[rows], rloo.compute_advantages(rewards, G), mask, G)
    ours = gradient(file_loss(dr_grpo, on_policy, rows, rewards, kl_coef=0.0), on_policy.policy)
    theirs = gradient(theirs, on_policy.policy)
    torch.testing.assert_close(ours, theirs * (G - 1) / (G * 5), atol=1e-9, rtol=0)


def grpo_loss(world: World, rows: list[int], kl_coef: float = 0.3) -> torch.Tensor:
    advantages = grpo.compute_advantages(world.rewards[rows], len(rows))
    return grpo.compute_loss(world.ratio[rows], world.kl[rows], advantages, world.mask[rows], 0.2, kl_coef, len(rows))


def test_gspo_is_grpo_in_the_first_update(on_policy):
    """At any lengths: 1/|y| stands before GRPO's sum of tokens, too. Nothing is left."""
    for rows in ([9, 12, 15, 20], [0, 3, 9, 20]):  # of equal lengths, and not
        ours, theirs = file_loss(gspo, on_policy, rows, on_policy.rewards[rows]), grpo_loss(on_policy, rows)
        torch.testing.assert_close(
            gradient(ours, on_policy.policy), gradient(theirs, on_policy.policy), atol=1e-9, rtol=0
        )


def test_cispo_is_dapos_token_mean_in_the_first_update(on_policy):
    """And GRPO's where all lengths are equal."""
    rows = [0, 3, 9, 20]
    mask, advantages = on_policy.mask[rows], grpo.compute_advantages(on_policy.rewards[rows], 4)
    num_tokens = mask.sum().item()
    ours = gradient(file_loss(cispo, on_policy, rows, on_policy.rewards[rows], kl_coef=0.0), on_policy.policy)
    theirs = dapo.compute_loss(on_policy.ratio[rows], advantages, mask, (0.2, 0.28), num_tokens)
    torch.testing.assert_close(ours, gradient(theirs, on_policy.policy), atol=1e-9, rtol=0)
    rows = [9, 12, 15, 20]
    ours, theirs = file_loss(cispo, on_policy, rows, on_policy.rewards[rows]), grpo_loss(on_policy, rows)
    torch.testing.assert_close(gradient(ours, on_policy.policy), gradient(theirs, on_policy.policy), atol=1e-9, rtol=0)


def test_where_they_part_in_a_later_update():
    """A token above the clip has a gradient in CISPO alone; a completion's ratio takes all of its tokens with it."""
    old = torch.tensor([[-2.0, -1.0, -1.0]])
    logprobs = torch.tensor([[-1.0, -1.05, -1.0]], requires_grad=True)  # the first is 2.7 times as likely
    ones, advantages, zeros = torch.ones(1, 3), torch.ones(1), torch.zeros(1, 3)
    ratio = grpo.compute_ratio(logprobs, old)
    (clipped,) = torch.autograd.grad(grpo.compute_loss(ratio, zeros, advantages, ones, 0.2, 0.0, 1), logprobs)
    assert clipped[0, 0] == 0 and (clipped[0, 1:] < 0).all()
    ratio = cispo.compute_ratio(logprobs, old)
    (kept,) = torch.autograd.grad(cispo.compute_loss(ratio, logprobs, zeros, advantages, ones, 4.0, 0.0, 3), logprobs)
    torch.testing.assert_close(kept, -ratio.detach() / 3)
    (capped,) = torch.autograd.grad(
        cispo.compute_loss(cispo.compute_ratio(logprobs, old), logprobs, zeros, advantages, ones, 0.5, 0.0, 3), logprobs
    )
    assert capped[0, 0] == pytest.approx(-1.5 / 3)
    for sign, count in ((1.0, 0), (-1.0, 3)):  # the ratio of the whole is above 1: only a reward that is good is met
        ratio = gspo.compute_ratio(logprobs, old, ones)
        assert ratio[0].tolist() == pytest.approx([math.exp(0.95 / 3)] * 3)
        loss = gspo.compute_loss(ratio, zeros, sign * advantages, ones, (3e-4, 4e-4), 0.0, 1)
        (grads,) = torch.autograd.grad(loss, logprobs)
        assert (grads != 0).sum() == count


@pytest.mark.parametrize("file", [gspo, dapo], ids=lambda file: file.__name__[8:])
@pytest.mark.parametrize("advantage, ratio, slope", [
    (1, 0.7, -1), (1, 1.25, -1), (1, 1.35, 0), (-1, 0.75, 0), (-1, 0.85, 1), (-1, 1.35, 1),
])  # fmt: skip
def test_a_clip_of_two_sides(file, advantage, ratio, slope):
    """0.2 below, 0.3 above."""
    ratio, one = torch.tensor([[ratio]], requires_grad=True), torch.ones(1, 1)
    rows = (ratio, torch.zeros(1, 1)) if file is gspo else (ratio,)
    coefs = ((0.2, 0.3), 0.0, 1) if file is gspo else ((0.2, 0.3), 1)
    file.compute_loss(*rows, torch.tensor([float(advantage)]), one, *coefs).backward()
    assert ratio.grad.item() == slope


def test_dapos_penalty_by_hand():
    lengths = torch.tensor([1, 48, 52, 64])
    assert dapo.compute_penalty(lengths, 64, 16).tolist() == [0, 0, 0.25, 1]
    assert dapo.compute_penalty(lengths, 64, 0).tolist() == [0, 0, 0, 0]


def test_whitening_by_hand():
    """The KL from the token on, and the moments of all tokens, of whichever process (pitfall 28)."""
    returns = reinforce_pp.compute_returns(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 1.0], [2.0, 0.0]]), 0.1)
    torch.testing.assert_close(returns, torch.tensor([[0.85, 0.9], [-0.2, 0.0]]))
    advantages = reinforce_pp.compute_advantages(torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(advantages, torch.tensor([[1.0], [-1.0]]) / 1.0002)


def test_equal_returns_have_no_advantage(model, tmp_path, monkeypatch):
    """To the last bit: Adam would make a step of its full size of what float32 leaves of a mean of many 0.7."""
    seen, compute_loss = [], reinforce_pp.compute_loss

    def spy(ratio, advantages, *rest):
        seen.append(advantages)
        return compute_loss(ratio, advantages, *rest)

    monkeypatch.setattr(reinforce_pp, "compute_loss", spy)
    options = {"num_steps": 1, "batch_size": 100, "eval_every": 0}
    folder = train(reinforce_pp, model, tmp_path / "run", lambda completions, **_: [0.7] * len(completions), **options)
    assert seen and not any(advantages.any() for advantages in seen) and read(folder)[1]["grad_norm"] == 0


def test_one_completion_is_its_own_mean(model, tmp_path):
    with pytest.raises(reinforce_pp.InputError, match="--batch-size 1: needs two completions or more"):
        train(reinforce_pp, model, tmp_path / "run", batch_size=1, num_steps=1, eval_every=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group_size", [2, 3])
def test_maxrl_is_the_series_of_log_p_up_to_the_group_size_less_one(on_policy, group_size):
    """E[∇L] = -∇p Σ_{k<G} (1-p)^(k-1): exactly RLOO's at G = 2, and nearer to ∇ log p with each completion more."""
    rewards = (on_policy.rewards > 0.6).double()
    p = (on_policy.exact.exp() * rewards).sum()
    series = sum((1 - p.item()) ** (k - 1) for k in range(1, group_size))
    coefficients = torch.zeros_like(rewards)
    for rows, probability in on_policy.groups(group_size):
        advantages = maxrl.compute_advantages(rewards[rows], group_size)
        coefficients.index_add_(0, torch.tensor(rows), probability * advantages / group_size)
    ours = gradient(maxrl.compute_loss(on_policy.logprobs, coefficients, on_policy.mask, 1), on_policy.policy)
    assert 0.1 < p < 0.9
    torch.testing.assert_close(ours, -series * gradient(p, on_policy.policy), atol=1e-9, rtol=0)


def test_maxrls_advantages_are_rloos_times_a_factor():
    rewards, G = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]).double(), 4
    ours = maxrl.compute_advantages(rewards, G).view(-1, G)
    means = rewards.view(-1, G).mean(dim=1, keepdim=True)
    assert ours.tolist()[0] == [3, -1, -1, -1] and ours.tolist()[2] == [0, 0, 0, 0]
    theirs = rloo.compute_advantages(rewards, G).view(-1, G) * (G - 1) / (G * means)
    torch.testing.assert_close(ours[:2], theirs[:2], atol=1e-9, rtol=0)


# ---- Whole runs -----------------------------------------------------------------------------------------------------


def reward(completions, **_) -> list[float]:
    """0 or 1, as maxrl.py asks for."""
    return [float(len(text) % 2) for text in completions]


def every_other(completions, **_) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def flags_of(file, model: str, **args) -> dict:
    """Those of `args` that the file has, beside a tiny run's."""
    args = TINY | {"model": model, "teacher": str(Path(model).with_name("teacher")), "kl_coef": 0.1} | args
    return {name: value for name, value in args.items() if hasattr(file.Args, name)}


def train(file, model, folder: Path, reward_fn=reward, **args) -> Path:
    return file.train(file.Args(**flags_of(file, model, output_dir=str(folder), **args)), reward_fn)


@by_run
def test_micro_batches_do_not_change_a_run(model, tmp_path, monkeypatch, file):
    """Nor the constant, nor the number of tokens, nor the moments (pitfall 28)."""
    monkeypatch.setattr(file, "has_bfloat16", lambda device: False)  # whose rounding depends on the batch
    options = {"num_steps": 1, "eval_every": 0, "batch_size": 8, "max_grad_norm": 1e-3}
    one, all_at_once = (
        train(file, model, tmp_path / str(size), micro_batch_tokens=size, **options) for size in (1, 9999)
    )
    a, b = read(one)[1], read(all_at_once)[1]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["grad_norm"] > 0


@by_run
def test_two_processes_are_one_with_the_doubled_batch(model, tmp_path, monkeypatch, file):
    """In gradients and metrics; the second process has nothing to gain in the first step. The learning rate is small,
    as Adam makes steps of its full size of gradients that are 0 but for rounding: at 1e-3 CISPO's fourth update differs
    by 3e-5, and its first by 6e-8."""
    args = flags_of(file, model, num_steps=2, eval_every=1, learning_rate=1e-4)
    args |= {"num_rounds": 1} if file is dapo else {}  # another round would be of other prompts
    if file is maxrl:
        score = file.score  # that test's rewards, rounded
        monkeypatch.setattr(file, "score", lambda *inputs: [(part > 0.5).to(part) for part in score(*inputs)])
    two, one = (divided(file, tmp_path / str(n), n, **args) for n in (2, 1))
    for ours, theirs in zip(torch.load(two / "grads.pt"), torch.load(one / "grads.pt"), strict=True):
        largest = max(1.0, *(grad.abs().max().item() for grad in theirs))  # what float32 rounds a sum by
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * largest, rtol=1e-4)
    for a, b in zip(read(two), read(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def train_and_die(file, model: str, folder: Path) -> None:
    log = file.Run.log

    def log_and_die(run, step, *rest):
        log(run, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    file.Run.log = log_and_die
    train(file, model, folder, num_steps=4, save_minutes=0)


@by_run
def test_a_killed_run_goes_on_to_the_same_bits(model, tmp_path, file):
    straight = train(file, model, tmp_path / "straight", num_steps=4, save_minutes=0)
    killed = fork(train_and_die, file, model, tmp_path / "killed")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "killed/policy").exists()
    file.train(file.Args(resume=str(tmp_path / "killed")), reward)
    assert read(tmp_path / "killed") == read(straight)
    assert read(tmp_path / "killed", "completions.jsonl") == read(straight, "completions.jsonl")
    assert same(weights(tmp_path / "killed"), weights(straight))


@by_run
def test_adapters_are_trained_and_merged(model, tmp_path, file):
    folder = train(file, model, tmp_path / "run", every_other, lora_rank=2, learning_rate=0.02, num_steps=2)
    start = grpo.transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert weights(folder).keys() == start.keys() and not same(weights(folder), start)


@by_run
def test_a_copied_file_trains(model, tmp_path, file):
    """Alone in an empty folder, without this project on the path."""
    copied = Path(shutil.copy(file.__file__, tmp_path))
    (tmp_path / "probe.py").write_text("def reward(completions, **_):\n    return [len(c) % 2 for c in completions]\n")
    done = start(
        tmp_path, copied, *flags(**flags_of(file, model, reward_fn="probe:reward", output_dir="run", kl_coef=0.0))
    )
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and (tmp_path / "run/policy").is_dir()


@pytest.mark.parametrize("file", [*VARIANTS, distill, grpo, ppo, remax], ids=lambda file: file.__name__[8:])
def test_equal_rewards_are_counted(model, tmp_path, file):
    folder = train(file, model, tmp_path / "run", lambda completions, **_: [1.0] * len(completions), num_steps=1)
    assert read(folder)[1]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("file", [grpo, dr_grpo, gspo, dapo, reinforce_pp, ppo], ids=lambda file: file.__name__[8:])
def test_what_is_clipped_has_no_slope(model, tmp_path, monkeypatch, file):
    """clip_ratio/region_mean counts the tokens whose ratio the loss does not depend on."""
    flat, compute_loss = [], file.compute_loss
    names = list(inspect.signature(compute_loss).parameters)

    def spy(*inputs):
        given = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in zip(names, inputs)}
        ratio = given["ratio"].clone().requires_grad_()
        compute_loss(**given | {"ratio": ratio}).backward()
        flat.append((ratio.grad == 0)[given["mask"].bool()])
        return compute_loss(*inputs)

    def reward_fn(completions, **_):  # no two are equal, so that every token has an advantage
        return [len(text) + 0.037 * i for i, text in enumerate(completions)]

    monkeypatch.setattr(file, "compute_loss", spy)
    args = {"num_steps": 1, "num_updates": 3, "num_epochs": 3, "value_warmup_steps": 0, "learning_rate": 0.05}
    args |= {"clip_coef": (0.02, 1.0)} if file in (gspo, dapo) else {}  # a pair, of which each has its side
    row = read(train(file, model, tmp_path / "run", reward_fn, **args | {"kl_coef": 0.0, "overlong_margin": 0}))[1]
    clipped = torch.cat(flat).float().mean().item()
    assert row["clip_ratio/region_mean"] == pytest.approx(clipped) and 0.05 < clipped < 0.95


@pytest.mark.parametrize("file", [dr_grpo, gspo, cispo, dapo, reinforce_pp], ids=lambda file: file.__name__[8:])
def test_ratios_leave_1_in_the_second_update(model, tmp_path, file):
    """Two updates a batch are the default, and what is clipped is counted (pitfall 32)."""
    first = read(train(file, model, tmp_path / "1", every_other, num_updates=1, num_steps=1, learning_rate=0.05))[1]
    assert first["ratio"] == 1 and first["clip_ratio/region_mean"] == 0
    second = read(train(file, model, tmp_path / "2", every_other, num_steps=1, learning_rate=0.05))[1]
    assert second["ratio"] != 1 and second["clip_ratio/region_mean"] > 0


# ---- DAPO's sampling ------------------------------------------------------------------------------------------------


def test_its_clips_are_the_papers():
    assert dapo.Args().clip_coef == (0.2, 0.28)


def sample_until_both_have(rank: int, model: str, folder: Path) -> None:
    calls = []

    def reward_fn(completions, **_):  # the second process finds what it can learn from in its second round
        calls.append(len(completions))
        return [float(i) * (rank == 0 or len(calls) > 1) for i in range(len(completions))]

    dapo.evaluate = lambda *_: ({"eval/reward": torch.tensor(0.0)}, [])
    train(dapo, model, folder, reward_fn, num_steps=1, num_rounds=3)


def test_processes_sample_until_each_has_its_share(model, tmp_path):
    assert fork_group(2, sample_until_both_have, model, tmp_path / "run") == [0, 0]
    row = read(tmp_path / "run")[1]
    assert (row["completions/num_sampled"], row["completions/num_trained"]) == (16, 8)


def teaches(prompts, completions, **_) -> list[float]:
    """Of the stories about half of the topics, the market and not the river, the completions differ."""
    return [float(i % 2) if prompt.split()[-1][0] in "bcmt" else 0.5 for i, prompt in enumerate(prompts)]


def test_prompts_that_teach_nothing_are_sampled_again(model, tmp_path):
    """In rounds of B, until B are found; what it trains on is counted, and those beyond B are not trained."""
    folder = train(dapo, model, tmp_path / "run", teaches, num_steps=6, batch_size=12, num_rounds=100)
    rows, samples = read(folder)[1:], [row for row in read(folder, "completions.jsonl") if row["split"] == "train"]
    beyond = []  # prompts that would teach, and are not trained
    for row in rows:
        of_step = [sample for sample in samples if sample["step"] == row["step"]]
        assert row["completions/num_sampled"] == len(of_step) and len(of_step) % 12 == 0
        assert row["completions/num_trained"] == 12 and row["grad_norm"] > 0
        assert row["reward"] == pytest.approx(sum(sample["reward"] for sample in of_step) / len(of_step))
        found = [len({sample["reward"] for sample in of_step[i : i + 4]}) > 1 for i in range(0, len(of_step), 4)]
        assert sum(found[:-3]) < 3 <= sum(found), "the last round was needed, and enough"
        assert row["reward"] == 0.5 and row["frac_reward_zero_std"] == pytest.approx(1 - sum(found) / len(found))
        beyond.append(sum(found) - 3)
    assert max(row["completions/num_sampled"] for row in rows) > 12 and max(beyond) > 0


def test_rounds_that_end_before_enough_is_found(model, tmp_path):
    """The step trains on what there is; without any it changes nothing, and logs what it has."""
    one = read(train(dapo, model, tmp_path / "some", teaches, num_steps=3, batch_size=16, num_rounds=1))[1:]
    assert {row["completions/num_sampled"] for row in one} == {16}
    assert {row["completions/num_trained"] for row in one} <= {0, 4, 8, 12}
    assert any(row["completions/num_trained"] and row["grad_norm"] > 0 for row in one)
    none = train(dapo, model, tmp_path / "none", lambda completions, **_: [0.5] * len(completions), num_rounds=2)
    for row in read(none)[1:]:
        assert row["completions/num_sampled"] == 8 and row["completions/num_trained"] == 0
        assert "grad_norm" not in row and "ratio" not in row
    assert same(weights(none), grpo.transformers.AutoModelForCausalLM.from_pretrained(model).state_dict())


def test_a_step_without_a_prompt_that_teaches_is_none(model, tmp_path):
    """Not even of Adam's momentum."""
    calls = []  # 8 of the first evaluation, of four completions each, then one a step

    def equal_in_the_second_step(completions, **_):
        calls.append(len(completions))
        return [0.5 if len(calls) == 10 else float(i % 2) for i in range(len(completions))]

    options = {"eval_every": 0, "num_rounds": 1, "reward_fn": equal_in_the_second_step}
    one, two = (train(dapo, model, tmp_path / str(n), num_steps=n, **options) for n in (1, 2) if not calls.clear())
    assert "grad_norm" in read(two)[1] and "grad_norm" not in read(two)[2]
    assert same(weights(one), weights(two))


def test_the_penalty_is_taken_off(model, tmp_path, monkeypatch):
    seen, compute_advantages = [], dapo.compute_advantages

    def spy(rewards, group_size):
        seen.append(rewards.tolist())
        return compute_advantages(rewards, group_size)

    monkeypatch.setattr(dapo, "compute_advantages", spy)
    options = {"num_steps": 1, "num_rounds": 1, "batch_size": 8, "overlong_margin": 3}
    folder = train(dapo, model, tmp_path / "run", every_other, **options)
    (found,) = seen
    penalties = [row["reward"] - r for row, r in zip(read(folder, "completions.jsonl")[32:], found)]
    assert {round(3 * penalty, 4) for penalty in penalties} <= {0, 1, 2, 3} and max(penalties) == 1 > min(penalties)


def test_only_what_is_chosen_is_trained(model, tmp_path, monkeypatch):
    advantages, compute_loss = [], dapo.compute_loss

    def spy(ratio, part_advantages, *rest):
        advantages.extend(part_advantages.tolist())
        return compute_loss(ratio, part_advantages, *rest)

    monkeypatch.setattr(dapo, "compute_loss", spy)
    options = {"num_steps": 1, "num_updates": 1, "batch_size": 8, "num_rounds": 100, "overlong_margin": 0}
    train(dapo, model, tmp_path / "run", teaches, **options)
    assert len(advantages) == 8 and sorted(round(a, 2) for a in advantages) == [-0.87] * 4 + [0.87] * 4


# ---- Sums, and who needs them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", [[0.5, 0, 1, 1], [2, 0, 1, 1]])
def test_maxrl_names_the_command_that_works(model, tmp_path, rewards):
    with pytest.raises(maxrl.InputError, match="rewards must be 0 or 1, not .*: try uv run -m nano_rl.sums"):
        train(maxrl, model, tmp_path / "run", lambda completions, **_: rewards, eval_every=0)


@pytest.mark.parametrize("clip_coef", [(-0.1, 0.2), (0.1, math.nan)])
def test_both_sides_of_a_clip_are_checked(tmp_path, clip_coef):
    for file in (gspo, dapo):
        with pytest.raises(file.InputError, match="--clip-coef .* must be above 0"):
            file.train(file.Args(clip_coef=clip_coef, output_dir=str(tmp_path / "run")))
    with pytest.raises(dapo.InputError, match="--num-rounds 0: must be above 0"):
        dapo.train(dapo.Args(num_rounds=0, output_dir=str(tmp_path / "run")))


def test_groups_that_do_not_divide(model, tmp_path):
    for file in (*GROUPED, maxrl):
        with pytest.raises(file.InputError, match="--group-size.* must be 2 or more and divide"):
            train(file, model, tmp_path / "run", group_size=3)


def test_the_questions(tmp_path):
    """All sums of 1 to 15, each in one of two files, the same for the same seed."""
    train_file, test_file = sums.write(sums.Args(output_dir=str(tmp_path)))
    train_rows, test_rows = (read_rows(file) for file in (train_file, test_file))
    assert (len(train_rows), len(test_rows)) == (97, 128)
    questions = {row["prompt"]: row["answer"] for row in train_rows + test_rows}
    assert questions == {f"What is {a} plus {b}?": str(a + b) for a in range(1, 16) for b in range(1, 16)}
    before = train_file.read_text()
    sums.write(sums.Args(output_dir=str(tmp_path)))
    assert train_file.read_text() == before
    sums.write(sums.Args(output_dir=str(tmp_path), seed=1))
    assert train_file.read_text() != before


def read_rows(file: Path) -> list[dict]:
    return [sums.json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("text, right", [
    ("19", 1), ("The answer is 19.", 1), ("7 + 12 = 19", 1), ("7+12=19!", 1), ("= **19**", 1), ("$19", 1),
    ("19, I say", 1), ("19 is 7 plus 12", 0), ("", 0), ("nineteen", 0), ("-19", 0), ("−19", 0), ("19.5", 0),
    ("19/2", 0), ("19%", 0),
    ("119", 0), ("1,9", 0), ("190", 0), ("7, 12, 19", 1), ("7,12,19", 0), ("x" * 10**6 + "19", 1), ("1" * 10**6, 0),
])  # fmt: skip
def test_the_last_number_is_the_answer(text, right):
    assert sums.correct([text], ["19"]) == [right] == sums.correct([[{"role": "assistant", "content": text}]], [19])


def test_the_commands_that_sums_prints_work(model, tmp_path, monkeypatch, capsys):
    from tiny import main

    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, "sums") == 0
    learn, ask = capsys.readouterr().out.splitlines()
    size = "--batch-size 4 --num-steps 1 --max-new-tokens 4".split()
    words = learn.removeprefix("uv run -m nano_rl.").split()
    assert words[0] == "maxrl" and main(monkeypatch, *words, "--model", model, *size) == 0
    words = ask.removeprefix("uv run -m nano_rl.").split()
    assert words[0] == "compare" and main(monkeypatch, *words, "--max-new-tokens", "4") == 0
    assert "± standard error over the prompts" in capsys.readouterr().out
