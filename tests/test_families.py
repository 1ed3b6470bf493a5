"""Tiny random models of many families sample, score and train alike, whatever they keep of what they have read."""

import pytest
import torch
from test_run import TINY
from tiny import make_examples, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import nano_rl.grpo as grpo

CPU = torch.device("cpu")
SIZES = dict(vocab_size=27, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None)
HEADS = dict(head_dim=8)
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64)
DELTA = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8
)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
MIXED = dict(layer_types=["linear_attention", "full_attention"])
HYBRIDS = {  # what they keep of a prompt is no cache of keys and values
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_next": DELTA
    | MIXED
    | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_5_text": DELTA | MIXED,
    "granitemoehybrid": MAMBA
    | dict(layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=16),
    "falcon_h1": MAMBA | HEADS | dict(mamba_d_ssm=32),
    "jamba": dict(
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
        mamba_dt_rank=4,
    ),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "minimax": EXPERTS | HEADS | MIXED | dict(block_size=8),
    "mamba": dict(state_size=8, time_step_rank=4),
    "mamba2": dict(state_size=8, num_heads=4, head_dim=8, n_groups=1, chunk_size=8),
    "recurrent_gemma": HEADS | dict(num_hidden_layers=3, lru_width=16, attention_window_size=32),
}
OTHERS = {
    "llama": {},
    "mistral": {},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen2_moe": dict(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3": HEADS,
    "qwen3_moe": HEADS | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "cohere": dict(logit_scale=1.0),
    "cohere2": dict(logit_scale=1.0),
    "granite": {},
    "granitemoe": EXPERTS,
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
    "glm": HEADS,
    "glm4": HEADS,
    "ernie4_5": HEADS,
    "exaone4": HEADS,
    "helium": HEADS,
    "nemotron": {},
    "persimmon": {},
    "gpt_neox": {},
    "gpt2": GPT,
    "gptj": GPT | dict(rotary_dim=4),
    "codegen": GPT | dict(rotary_dim=4, n_head=4, num_attention_heads=4),
    "gpt_bigcode": GPT,
    "gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    "openai-gpt": GPT,
    "opt": dict(ffn_dim=32, word_embed_proj_dim=16),
    "bloom": {},
    "falcon": {},
    "mpt": dict(d_model=16, n_heads=2, n_layers=2, max_seq_len=64),
    "xglm": dict(d_model=16, ffn_dim=32, num_layers=2, attention_heads=2),
}
QUICK = [
    "lfm2",
    "qwen3_5_text",
    "granitemoehybrid",
    "mamba2",
    "gemma3_text",
    "xglm",
]  # one of each kind; the others are slow
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in HYBRIDS | OTHERS]


def save(folder, family: str) -> str:
    """Wide weights, also in the row of the pad token, so that a model that reads its padding shows it."""
    config = CONFIG_MAPPING[family](**(SIZES | (HYBRIDS | OTHERS)[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight)).mul_(1.0 if weight.dim() == 1 else 2.0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_stepwise_logits_under_left_padding(tmp_path, monkeypatch, family):
    """Every sampled token, against a forward pass over its own prefix alone."""
    monkeypatch.setattr(grpo, "has_bfloat16", lambda device: False)  # whose rounding is larger
    policy, tokenizer = grpo.load(AutoModelForCausalLM, save(tmp_path, family), CPU)
    sampler = grpo.make_sampler(policy, tokenizer, grpo.Args(max_new_tokens=6))
    prompts = [[3, 5, 7], [4], [8, 10, 11, 12, 6]]
    if family == "recurrent_gemma":  # its convolution reads the padding, in transformers: no prompts are padded
        prompts = [prompts[2]] * 3
    torch.manual_seed(0)
    batch, _ = grpo.sample(sampler, tokenizer, make_examples(*prompts), 1.0)
    logprobs = grpo.compute_logprobs(policy, batch, 1.0)
    assert logprobs[batch["mask"].bool()].std() > 0.3, "the tokens are not all as likely"
    for row, prompt in enumerate(prompts):
        ids = batch["input_ids"][row, -batch["mask"].shape[1] :][batch["mask"][row].bool()].tolist()
        for t, token in enumerate(ids):
            logits = policy(torch.tensor([prompt + ids[:t]]), use_cache=False).logits[0, -1]
            assert (logits.float().log_softmax(dim=0)[token] - logprobs[row, t]).abs() < 2e-4


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_grpo(tmp_path, monkeypatch, family, bfloat16):
    """With a sampler in bfloat16, of which only matrices are cast, as autocast does, and a policy that loads again."""
    monkeypatch.setattr(grpo, "has_bfloat16", lambda device: bfloat16)
    args = TINY | {"num_steps": 2, "kl_coef": 0.1, "learning_rate": 1e-4, "max_grad_norm": 1e-3}
    args |= {"model": save(tmp_path / "model", family), "output_dir": str(tmp_path / "run")}
    folder = grpo.train(grpo.Args(**args), lambda completions, **_: [float(len(text)) for text in completions])
    start, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", folder / "policy"))
    moved = [(a - b).abs().max() for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    assert max(moved) > 0 and all(change.isfinite() for change in moved)
