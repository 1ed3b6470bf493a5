"""Sampling and log-probabilities: masks, stops, padding, precision and the distribution itself."""

import json
import weakref

import pytest
import torch
from test_run import TINY
from tiny import (
    all_completions,
    as_batch,
    exact_logprobs,
    float64,
    gpt2_config,
    gradient,
    llama_config,
    make_examples,
    make_policy,
    make_tokenizer,
    save_policy,
    save_reward_model,
    score,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
)

import nano_rl.reinforce as reinforce

CPU = torch.device("cpu")
SMALL = {"vocab_size": 25, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "initializer_range": 0.5}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}


def gemma_config(_) -> Gemma2Config:
    """With a softcap on the logits, and every second layer looking back four tokens."""
    return Gemma2Config(head_dim=8, final_logit_softcapping=2.0, sliding_window=4, **SMALL)


has_bfloat16 = reinforce.has_bfloat16


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The same arithmetic on all hardware; `bfloat16` below is the exception."""
    monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: False)


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def bfloat16(request, monkeypatch, float32) -> bool:
    """On either kind of hardware, both kinds of sampler."""
    monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: request.param)
    return request.param


def make_sampler(config, tokenizer=None, double: bool = False, **args):
    policy = make_policy(config)
    sampler = reinforce.make_sampler(policy, tokenizer or make_tokenizer(), reinforce.Args(**args))
    return policy, float64(sampler) if double else sampler


@pytest.mark.parametrize("config", [llama_config, gpt2_config])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_stepwise_generation(config, temperature):
    """Teacher forcing one padded batch, against a pass without padding over every beginning (pitfalls 5, 6)."""
    _, sampler = make_sampler(config(25), double=True, max_new_tokens=6)
    prompts = make_examples([3, 5, 7], [4, 9], [8, 10, 11, 12, 6])
    torch.manual_seed(0)
    batch, _ = reinforce.sample(sampler, make_tokenizer(), prompts, temperature)
    logprobs = reinforce.compute_logprobs(sampler, batch, temperature)
    for row, prompt in enumerate(prompts):
        ids = batch["input_ids"][row, 5:].tolist()[: int(batch["mask"][row].sum())]
        exact = exact_logprobs(sampler, prompt["prompt_ids"], [ids], temperature)
        assert logprobs[row].sum().item() == pytest.approx(exact.item(), abs=1e-9)


@pytest.mark.parametrize("config", [llama_config, gpt2_config])
def test_left_padding_changes_nothing(config):
    """GPT-2's absolute positions make any position error loud (pitfall 5)."""
    policy, completions = float64(make_policy(config(8))), [[3, 4, 1], [5], [6, 6, 6, 2]]
    plain = reinforce.compute_logprobs(policy, as_batch([2, 7], completions, pad=1), 1.0)
    padded = reinforce.compute_logprobs(policy, as_batch([2, 7], completions, pad=1, left=10), 1.0)
    torch.testing.assert_close(padded, plain, atol=1e-9, rtol=0)
    assert (plain[1, 1:] == 0).all()


def test_whole_batch_logprobs_do_not_depend_on_micro_batches():
    """Also of parts that are narrower than the batch, on both sides."""
    policy = make_policy(gpt2_config(8, n_positions=256))
    batch = as_batch([2, 7], [[3] * 130, *all_completions(5, 3, {1})], pad=1, left=70)
    whole = reinforce.score_logprobs(policy, batch, reinforce.Args(micro_batch_tokens=10**6))
    for max_tokens in (1, 900):
        parts = reinforce.score_logprobs(policy, batch, reinforce.Args(micro_batch_tokens=max_tokens))
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert (whole[0] < 0).all()


@pytest.mark.parametrize(
    "used, kept",
    [((3, 0), (64, 0)), ((3, 1), (64, 64)), ((64, 64), (64, 64)), ((65, 65), (128, 128)), ((129, 129), (130, 190))],
)
def test_parts_lose_blocks_of_padding(used, kept):
    """Of 64 columns, counted from where completions begin: few widths, whatever the lengths are."""
    (prompt, completion), input_ids = used, torch.arange(2 * 320).view(2, 320)
    attention_mask = torch.ones(2, 320, dtype=torch.long)
    attention_mask[0, : 130 - prompt] = attention_mask[0, 130 + completion :] = 0
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "mask": attention_mask[:, 130:]}
    whole, part = reinforce.micro_batches(batch, 1)
    assert whole["input_ids"].tolist() == [input_ids[1].tolist()] and whole["mask"].shape == (1, 190)
    assert part["input_ids"].tolist() == [input_ids[0, 130 - kept[0] : 130 + kept[1]].tolist()]
    assert part["mask"].tolist() == [[1] * completion + [0] * (kept[1] - completion)]


def test_micro_batches_are_sorted():
    """The longest first, none above the limit unless alone, as equal as can be; with what has one value a row."""
    batch = as_batch([2, 7], [[3]] * 3 + [[3] * 8] * 16, pad=1)
    batch |= {"rows": torch.arange(19), "terminated": torch.arange(19) % 2 == 0}
    parts = list(reinforce.micro_batches(batch, 50))
    rows = [part["rows"].tolist() for part in parts]
    assert rows == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17], [18, 0, 1, 2]]
    for part in parts:
        assert torch.equal(part["terminated"], part["rows"] % 2 == 0)
        assert part["input_ids"].shape == part["attention_mask"].shape == (len(part["rows"]), 10)
        assert torch.equal(part["mask"], batch["mask"][part["rows"]])
    assert not list(reinforce.micro_batches({name: tensor[:0] for name, tensor in batch.items()}, 50))
    assert [part["rows"].tolist() for part in reinforce.micro_batches(batch, 5)][:2] == [[3], [4]]
    eight = {name: tensor[3:11] for name, tensor in batch.items()}  # of ten tokens: not seven and one
    assert [part["rows"].tolist() for part in reinforce.micro_batches(eight, 70)] == [[3, 4, 5, 6], [7, 8, 9, 10]]


@pytest.mark.parametrize("config", [llama_config, gpt2_config, gemma_config])
def test_plain_and_fused_attention_are_the_same(tmp_path, monkeypatch, config):
    """With bfloat16 plain trains faster, and fused samples; samples, log-probabilities and gradients are the same."""
    name, results = save_policy(tmp_path / "model", config(25)), []
    batch = as_batch([2, 7], [[3, 4, 1], [5, 8, 9]], pad=0, left=2)
    for bfloat16, attention in (True, "eager"), (False, "sdpa"):
        monkeypatch.setattr(reinforce, "has_bfloat16", lambda device, bfloat16=bfloat16: bfloat16)
        policy, tokenizer = reinforce.load(AutoModelForCausalLM, name, CPU)
        assert policy.config._attn_implementation == attention or config is gemma_config
        monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: False)
        sampler = reinforce.make_sampler(policy, tokenizer, reinforce.Args(max_new_tokens=6))
        assert sampler.config._attn_implementation == ("eager" if config is gemma_config else "sdpa")
        assert policy.config._attn_implementation == attention or config is gemma_config, "as it was"
        sampler.set_attn_implementation(policy.config._attn_implementation)
        torch.manual_seed(0)
        sampled, _ = reinforce.sample(sampler, tokenizer, make_examples([3, 5, 7], [4]), 1.0)
        logprobs = reinforce.compute_logprobs(policy, batch, 0.7)
        results.append((sampled["input_ids"], logprobs, gradient(logprobs.sum(), policy)))
    (samples, ours, gradients), (fused_samples, fused, fused_gradients) = results
    assert torch.equal(samples, fused_samples)
    torch.testing.assert_close(ours, fused, atol=1e-4, rtol=1e-4)
    assert (gradients - fused_gradients).norm() < 1e-5 * fused_gradients.norm(), "as a whole: small ones are rounded"


def test_mask_includes_the_first_stop_and_nothing_after_it():
    """Pad and EOS are one token, and there are two stop tokens, one of the model's alone (pitfalls 1, 4)."""
    policy, tokenizer = make_policy(llama_config(25)), make_tokenizer(pad="<eos>")
    policy.generation_config = GenerationConfig(eos_token_id=[1, 9])
    sampler = reinforce.make_sampler(policy, tokenizer, reinforce.Args(max_new_tokens=12))
    assert sampler.generation_config.eos_token_id == [1, 9]
    torch.manual_seed(0)
    batch, texts = reinforce.sample(sampler, tokenizer, make_examples(*[[5, 6]] * 200), 2.0)
    ends = set()
    for ids, mask, terminated, text in zip(batch["input_ids"][:, 2:], batch["mask"], batch["terminated"], texts):
        ids, length = ids.tolist(), int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert not {1, 9} & set(ids[: length - 1]), "a token after a stop is trained"
        assert (ids[length - 1] in {1, 9}) == bool(terminated)
        assert terminated or length == 12
        assert text == tokenizer.decode(ids[: length - bool(terminated)]), "all that was written, but the stop"
        ends.add(ids[length - 1] if terminated else None)
    assert ends == {1, 9, None}


def test_samples_follow_the_softmax_whatever_the_model_came_with(bfloat16):
    """A model that ships top_k, min_p, suppressed tokens and so on is sampled from π_θ all the same (pitfall 3)."""
    policy, tokenizer = make_policy(llama_config(60, initializer_range=0.2)), make_tokenizer()
    options = dict(do_sample=True, top_k=3, top_p=0.5, min_p=0.2, repetition_penalty=3.0, suppress_tokens=[7, 8, 9])
    policy.generation_config = GenerationConfig(**options)
    sampler = reinforce.make_sampler(policy, tokenizer, reinforce.Args(max_new_tokens=1))
    torch.manual_seed(0)
    batch, _ = reinforce.sample(sampler, tokenizer, make_examples(*[[5, 6, 5]] * 20_000), 0.7)
    counts = torch.bincount(batch["input_ids"][:, -1], minlength=60).double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        expected = 20_000 * (sampler(torch.tensor([[5, 6, 5]])).logits[0, -1].double() / 0.7).softmax(dim=0)
    assert (counts > 0).sum() > 50
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < 110, "59 degrees of freedom: 110 is exceeded once in 10,000 seeds"


def test_sampler_is_the_policy_with_exact_rotary_frequencies(bfloat16):
    policy, sampler = make_sampler(llama_config(25, tie_word_embeddings=True))
    dtype = torch.bfloat16 if bfloat16 else torch.float32  # of matrices; norms stay as exact as buffers are
    for ours, theirs in zip(policy.parameters(), sampler.parameters(), strict=True):
        assert theirs.dtype == (dtype if ours.dim() == 2 else torch.float32)
        assert torch.equal(ours.to(theirs.dtype), theirs)
    assert torch.equal(policy.model.rotary_emb.inv_freq, sampler.model.rotary_emb.inv_freq)
    assert sampler.model.rotary_emb.inv_freq.dtype == torch.float32
    assert sampler.lm_head.weight is sampler.model.embed_tokens.weight, "tied"
    assert sampler.lm_head.weight.is_contiguous() == bfloat16, "by columns"
    alive = weakref.ref(sampler)
    del sampler
    assert alive() is None, "its memory is free at once"


def test_what_a_module_keeps_of_a_forward_pass_is_not_copied():
    """RecurrentGemma's layers keep their last state, with its graph, which cannot be copied."""
    policy = make_policy(llama_config(25))
    policy.model.kept, policy.model.constant = policy.lm_head.weight.sum(), torch.ones(1)
    sampler = reinforce.make_sampler(policy, make_tokenizer(), reinforce.Args())
    assert sampler.model.kept is None and policy.model.kept.requires_grad and sampler.model.constant == 1


@pytest.mark.parametrize("names", [[], ["avx2", "avx512_f"], ["avx512_bf16"], ["amx_bf16"], ["neon", "bf16"]])
def test_bfloat16_is_used_where_the_processor_has_it(names, monkeypatch):
    """Emulated, it is three times slower than float32."""
    capabilities = {"avx512_bf16": False, "amx_bf16": False} | dict.fromkeys(names, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16(CPU) == any("bf16" in name for name in names)


def test_dropout_is_off(tmp_path):
    """A model that ships dropout scores the same tokens the same twice (pitfall 7)."""
    dropout = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    name = save_policy(tmp_path / "gpt2", gpt2_config(25, **dropout))
    policy, _ = reinforce.load(AutoModelForCausalLM, name, CPU)
    batch = as_batch([2, 7], [[3, 1], [4, 5, 6]], pad=1)
    first, second = (reinforce.compute_logprobs(policy, batch, 1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_logits_are_scored_in_float32():
    """A log-softmax over 50,000 bfloat16 logits would keep 3 digits (pitfall 8)."""
    logits = (torch.randn(2, 5, 50_000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()

    class Stub(torch.nn.Module):
        device = CPU

        def forward(self, input_ids, logits_to_keep, **_):
            return type("Output", (), {"logits": logits[:, : input_ids.shape[1]][:, -logits_to_keep:]})

    batch = as_batch([2, 7], [[3, 1, 9], [4, 5, 6]], pad=1)
    ours = reinforce.compute_logprobs(Stub(), batch, 0.7)
    exact = (logits[:, 1:-1].double() / 0.7).log_softmax(dim=-1)  # before each token of the completion
    exact = exact.gather(2, batch["input_ids"][:, 2:, None])[:, :, 0]
    assert (ours - exact).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["softcap", "scale"])
def test_logprobs_are_the_models_own(kind):
    """A softcap or a scale on the logits is in them, and in their gradient (pitfall 11)."""
    config = gemma_config(25) if kind == "softcap" else CohereConfig(logit_scale=0.3, **SMALL)
    policy = make_policy(config)
    batch = as_batch([2, 7], [[3, 4, 1], [5, 8, 9]], pad=0)
    dense = (policy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 1:-1] / 0.7).log_softmax(-1)
    dense = dense.gather(2, batch["input_ids"][:, 2:, None])[:, :, 0]
    ours = reinforce.compute_logprobs(policy, batch, 0.7)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(gradient(ours.sum(), policy), gradient(dense.sum(), policy), atol=1e-4, rtol=1e-3)


def test_generation_uses_the_cache():
    """One pass over the prompt, then one token at a time (pitfall 10)."""
    _, sampler = make_sampler(llama_config(25, eos_token_id=None), make_tokenizer(eos=None), max_new_tokens=8)
    widths = []
    sampler.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    reinforce.sample(sampler, make_tokenizer(eos=None), make_examples([3, 5, 7], [4]), 1.0)
    assert widths == [3] + [1] * 7


def test_greedy_samples_are_deterministic_and_as_long():
    """SCST's baseline: the same weights and length limit, no randomness (pitfall 44)."""
    tokenizer = make_tokenizer(eos=None)  # nothing ends before the limit
    _, sampler = make_sampler(llama_config(25, eos_token_id=None), tokenizer, max_new_tokens=7)
    examples = make_examples([3, 5, 7], [4, 8])
    greedy = [reinforce.sample(sampler, tokenizer, examples, 0.0)[0] for _ in range(2)]
    assert torch.equal(greedy[0]["input_ids"], greedy[1]["input_ids"])
    assert greedy[0]["mask"].sum(dim=1).tolist() == [7, 7]
    for example, ids, mask in zip(examples, greedy[0]["input_ids"][:, 3:], greedy[0]["mask"]):
        prefix = list(example["prompt_ids"])
        for token in ids[mask.bool()].tolist():
            assert token == sampler(torch.tensor([prefix])).logits[0, -1].float().argmax().item()
            prefix.append(token)


def test_a_chat_template_brings_its_own_bos():
    """It stands once, with the template and without (pitfall 14)."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    tokenizer.chat_template = "<unk> " + tokenizer.chat_template
    for chat in (True, False):
        args = reinforce.Args(chat_template=chat, max_new_tokens=8)
        examples, _ = reinforce.load_prompts(args, tokenizer, make_policy(llama_config(25)))
        assert examples[0]["prompt_ids"][:3] == ([2, 3, 2] if chat else [2, 2, 7])  # "Write", unknown, is 2, too


@pytest.mark.parametrize("num_labels", [1, 4])
@pytest.mark.parametrize("chat", [True, False])
def test_reward_model_scores_one_text_at_a_time(tmp_path, num_labels, chat):
    """The score does not depend on the batch; K labels give the expected value over 1..K (pitfall 40)."""
    tokenizer = make_tokenizer(pad="<eos>", chat=chat)
    name = save_reward_model(tmp_path / "rm", num_labels, tokenizer, llama_config(len(tokenizer), pad_token_id=1))
    reward_fn = reinforce.load_reward_fn(reinforce.Args(reward_model=name), CPU)
    prompts, completions = ["write about the sea", "write"], ["the old sea sings", "sun"]
    together = reward_fn(prompts=prompts, completions=completions, answer=["unused", "unused"])
    apart = [reward_fn(prompts=[p], completions=[c])[0] for p, c in zip(prompts, completions)]
    assert together == pytest.approx(apart, abs=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    for prompt, completion, reward in zip(prompts, completions, together):
        text = f"<user> {prompt} <assistant> {completion} <eos>" if chat else f"{prompt} {completion}"
        logits = model(torch.tensor([AutoTokenizer.from_pretrained(name)(text).input_ids])).logits[0]
        expected = logits[0] if num_labels == 1 else sum(k * p for k, p in enumerate(logits.softmax(dim=0), start=1))
        assert reward == pytest.approx(expected.item(), abs=1e-5)
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert reward_fn(prompts=messages, completions=answers) == pytest.approx(together)
    turns = [{"role": "user", "content": "write"}, {"role": "system", "content": "about the sea"}]
    if not chat:  # the whole conversation, as the policy reads it
        assert reward_fn(prompts=[turns], completions=completions[:1]) == pytest.approx(together[:1])


def test_lexical_richness():
    def reward(text, penalty=0.0):
        return reinforce.lexical_richness(penalty, [text])[0]

    assert reward("The cat saw the dog") == pytest.approx(4 / 5)  # case-folded
    assert reward("don't don’t Straße STRASSE café") == pytest.approx(4 / 5)
    assert reward("a_b_a") == pytest.approx(2 / 3)  # PPO found out that \w+ reads it as one word
    assert reward("") == reward("... !") == 0
    assert reward([{"role": "assistant", "content": "the cat the dog"}]) == 3 / 4  # the answer to a conversation
    assert reward("", penalty=0.5) == -0.5
    assert reinforce.MIN_WORDS == 64 / 3
    assert reward("one two three four five six seven eight", penalty=0.5) == pytest.approx(1 - 0.5 * (1 - 24 / 64))
    assert reward("a b c d e f g h i j k l m n o p q r s t u v", penalty=0.5) == 1


def test_prompts_and_columns(tmp_path):
    rows = [
        {"prompt": "the sea", "answer": 1},
        {"prompt": [{"role": "user", "content": "the sun"}], "answer": 2},
        {"question": "a stone"},  # GSM8K's name
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer()
    args = reinforce.Args(prompts=str(file), max_new_tokens=8)
    train, held_out = reinforce.load_prompts(args, tokenizer, make_policy(llama_config(25)))
    assert (len(train), len(held_out)) == (1, 2)
    examples = train + held_out
    assert tokenizer.decode(examples[1]["prompt_ids"]) == "<user> the sun <assistant>"
    seen = {}

    def reward_fn(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0, 1.5, -2]

    rewards, deviations = score(reinforce, reward_fn, ["x", "y", "z"], examples)
    assert rewards.tolist() == [0, 1.5, -2] and deviations.tolist() == [0, 0, 0]
    assert rewards.dtype == torch.float64
    assert seen.pop("completion_ids") == [[1], [1], [1]]
    assert seen.pop("trainer_state").max_steps == 3 and seen.pop("log_metric") and seen.pop("log_extra")
    assert seen == {
        "prompts": [row.get("prompt", "a stone") for row in rows],
        "completions": ["x", [{"role": "assistant", "content": "y"}], "z"],  # a conversation is answered by a message
        "answer": [1, 2, None],
        "question": [None, None, "a stone"],
    }


@pytest.mark.parametrize("config", [llama_config, gpt2_config, gemma_config])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_equal_weights_have_a_kl_of_exactly_zero(tmp_path, bfloat16, config, lora_rank):
    """The reference rounds nothing that autocast does not round in the policy."""
    args = reinforce.Args(model=save_policy(tmp_path / "model", config(25)), lora_rank=lora_rank)
    policy, ref_policy, _ = reinforce.load_policy(args, CPU)
    batch = as_batch([2, 7], [[3, 4, 1], [5, 8, 9]], pad=0, left=2)
    logprobs = reinforce.score_logprobs(policy, batch, args)
    assert torch.equal(logprobs, reinforce.score_logprobs(ref_policy, batch, args))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    moved = reinforce.score_logprobs(policy, batch, args)
    assert (moved - reinforce.score_logprobs(ref_policy, batch, args)).abs().max() > 1e-3
    assert torch.equal(logprobs, reinforce.score_logprobs(ref_policy, batch, args))


def test_the_reference_is_a_frozen_copy(tmp_path):
    args = reinforce.Args(model=save_policy(tmp_path / "model", llama_config(25)))
    policy, ref_policy, _ = reinforce.load_policy(args, CPU)
    assert not any(weight.requires_grad for weight in ref_policy.parameters())
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    ours, theirs = ({weight.data_ptr() for weight in model.parameters()} for model in (policy, ref_policy))
    assert not ours & theirs


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_saved_policy_has_the_generation_config_that_it_came_with(tmp_path, lora_rank):
    name = save_policy(tmp_path / "model")
    options = dict(do_sample=True, min_p=0.2, repetition_penalty=3.0, suppress_tokens=[7, 8], eos_token_id=[1, 9])
    GenerationConfig(**options).save_pretrained(name)
    args = reinforce.Args(
        model=name, output_dir=str(tmp_path / "run"), lora_rank=lora_rank, **(TINY | {"num_steps": 1})
    )
    folder = reinforce.train(args)
    came, saved = (GenerationConfig.from_pretrained(path).to_dict() for path in (name, folder / "policy"))
    assert {key: saved[key] for key in options} == options
    assert saved | {"_from_model_config": None} == came | {"_from_model_config": None}
