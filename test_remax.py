"""What remax.py claims, proved on small models. No GPU and no network needed:  python -m pytest -q"""
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import remax

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
EOS, PAD = 2, 0
warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # there is no pytest.ini to name slow in
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
torch.set_num_threads(1)  # the models are tiny, the cores are shared


# ------------------------------------------- helpers -------------------------------------------

def make(kind="gpt2", vocab_size=31, seed=0):
    """A random model of a family, small, in float32, loud enough that mistakes show."""
    names = dict(vocab_size=vocab_size, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS)
    llama = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=64, max_position_embeddings=64)
    config = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                                **names),
        "llama": lambda: transformers.LlamaConfig(**llama, **names),
        "qwen2": lambda: transformers.Qwen2Config(**llama, **names),
        "neox": lambda: transformers.GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                   intermediate_size=64, max_position_embeddings=64, **names),
        "opt": lambda: transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
                                              word_embed_proj_dim=32, max_position_embeddings=64, **names),
        "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **names),
        "gemma2": lambda: transformers.Gemma2Config(**llama, **names, head_dim=8, sliding_window=8,
                                                    query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    }[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3)
    return model.eval()


FAMILIES = ["gpt2", "llama", "qwen2", "neox", "opt", "bloom", "gemma2"]


def prompts(B=4, P=6, vocab_size=31, seed=1):
    """Prompts (B,P) padded on the left by 0, 1, 2, ... columns; one holds an EOS that must stay visible."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, vocab_size, (B, P), generator=generator)
    attention = torch.ones_like(prompt)
    for b in range(1, B):
        attention[b, :b % P] = 0
    prompt = prompt.masked_fill(attention == 0, PAD)
    prompt[0, 2] = EOS
    return prompt, attention


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(policy, reference=None, reward=None, B=4, lr=1.0, **kwargs):
    """One remax_step of plain SGD: with no clipping, old weights minus new ones is the gradient."""
    torch.manual_seed(5)
    reward = reward or (lambda ys: ys.float().mean(1))
    options = dict(eos_id=EOS, pad_id=PAD, max_new_tokens=7, greedy=True, kl_coef=0.1, micro_batch_size=2,
                   max_grad_norm=1e9, dtype=torch.float32, home=torch.device("cpu")) | kwargs
    return remax.remax_step(policy, reference, torch.optim.SGD(policy.parameters(), lr), torch.amp.GradScaler("cpu", enabled=False),
                            reward, *prompts(B, vocab_size=policy.config.vocab_size), **options)


@contextlib.contextmanager
def recorded_logits(model):
    """The logits of each forward call, as the caller sees them."""
    seen = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output.logits[:, -1].float()))
    yield seen
    hook.remove()


def run(*args, **env):
    """remax.py as a user runs it: the finished process."""
    return subprocess.run([sys.executable, remax.__file__, *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | env, timeout=300)


def answer(capsys, *args):
    """What remax.py would leave on standard error, bars aside, and its exit code; in this process, to save start-up."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        remax.main([*map(str, args)])
    said = [line for line in capsys.readouterr().err.split("\n") if line.strip() and "\r" not in line]
    if isinstance(stop.value.code, str):  # the interpreter prints it and exits with 1
        return 1, said + stop.value.code.split("\n")
    return stop.value.code, said


def metrics(folder):
    return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]


# ------------------------------------------ the estimator ------------------------------------------

@pytest.fixture(scope="module")
def enumeration():
    """Every response of up to 3 tokens of a 5-token policy, with its probability and reward."""
    policy, reference = make(vocab_size=5, seed=3).double(), make(vocab_size=5, seed=4).double()
    found = {}
    for tokens in product(range(5), repeat=3):
        if EOS in tokens:
            tokens = tokens[:tokens.index(EOS) + 1] + (PAD,) * (2 - tokens.index(EOS))
        found[tokens] = None
    response = torch.tensor(list(found))
    prompt = torch.tensor([[PAD, 3, 4]]).repeat(len(response), 1)
    attention = torch.tensor([[0, 1, 1]]).repeat(len(response), 1)
    mask = remax.response_mask(response, EOS)
    reward = torch.rand(len(response), generator=torch.Generator().manual_seed(0)).double()
    logprobs = remax.token_logprobs(policy, prompt, attention, response, mask)
    ref_logprobs = remax.token_logprobs(reference, prompt, attention, response, mask).detach()
    probability = logprobs.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)

    def gradient(scalar):
        policy.zero_grad()
        scalar.backward(retain_graph=True)
        return flat_grad(policy).clone()

    def expected(baseline, kl_coef, probability=probability.detach()):
        """sum_y p(y) * gradient of remax_loss(y): what many samples would give on average."""
        rows = [remax.remax_loss(logprobs[i:i + 1], ref_logprobs[i:i + 1], mask[i:i + 1], reward[i:i + 1],
                                 baseline[i:i + 1], kl_coef) for i in range(len(response))]
        return gradient((torch.stack(rows) * probability).sum())

    kl = (probability * (logprobs - ref_logprobs).sum(1)).sum()
    exact = {beta: gradient(-(probability * reward).sum() + beta * kl) for beta in (0.0, 0.3)}
    return expected, exact, reward, probability.detach()


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("baseline", [0.0, 0.7, -5.0])
def test_estimator_is_unbiased_whatever_the_baseline(enumeration, beta, baseline):
    expected, exact, reward, _ = enumeration
    assert error(expected(torch.full_like(reward, baseline), beta), exact[beta]) < 1e-4


def test_negative_controls_action_dependent_baseline_and_truncated_sampler_are_biased(enumeration):
    expected, exact, reward, probability = enumeration
    assert error(expected(0.5 * reward, 0.0), exact[0.0]) > 0.1
    kept = probability * (probability >= probability.topk(10).values[-1])
    top = [expected(torch.full_like(reward, b), 0.0, kept / kept.sum()) for b in (0.0, 5.0)]
    assert error(top[0], exact[0.0]) > 0.1 and error(top[1], top[0]) > 0.5  # even the baseline moves it


def test_loss_and_gradient_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)  # the last column is padding
    ref_logprobs, mask = torch.tensor([[-1.5, -1.0, 50.0]]), torch.tensor([[1, 1, 0]])
    loss = remax.remax_loss(logprobs, ref_logprobs, mask, torch.tensor([1.0]), torch.tensor([0.4]), 0.1)
    assert loss.item() == pytest.approx(2.05) and "= 2.05." in remax.remax_loss.__doc__
    loss.backward()
    assert logprobs.grad.tolist()[0] == pytest.approx([-0.65, -0.7, 0.0])


def test_loss_with_baseline_zero_is_reinforce_and_is_summed_over_tokens_and_averaged_over_rows():
    logprobs, zero = torch.randn(3, 4), torch.zeros(3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    reward = torch.tensor([1.0, 2.0, 3.0])
    reinforce = -sum(reward[i] * logprobs[i, :n].sum() for i, n in enumerate((4, 1, 2))) / 3
    assert remax.remax_loss(logprobs, 0.0, mask, reward, zero, 0.0).item() == pytest.approx(reinforce.item())


def test_no_gradient_through_the_advantage():
    logprobs, ref = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    reward, baseline = torch.randn(2, requires_grad=True), torch.zeros(2)
    remax.remax_loss(logprobs, ref.detach(), torch.ones(2, 3), reward.detach(), baseline, 0.5).backward()
    kl = (logprobs - ref).detach()
    to_go = torch.stack([kl[:, t:].sum(1) for t in range(3)], 1)
    assert torch.allclose(logprobs.grad, -(reward.detach()[:, None] - 0.5 * to_go) / 2, atol=1e-6)


# ------------------------------------ masks, positions, log-probs ------------------------------------

def test_mask_keeps_the_first_eos_and_drops_the_pads_when_pad_is_eos():
    response = torch.tensor([[5, EOS, EOS, EOS], [5, 6, 7, 8], [EOS, 5, 6, EOS]])
    assert remax.response_mask(response, EOS).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_column_t_is_token_t():
    model = make()
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    logprobs = model(ids).logits.float().log_softmax(-1)
    by_hand = [logprobs[0, 1, 9], logprobs[0, 2, 10], logprobs[0, 3, 11]]  # position 1 predicts token 2
    ones = torch.ones_like(ids)
    got = remax.token_logprobs(model, ids[:, :2], ones[:, :2], ids[:, 2:], ones[:, 2:])
    assert got[0].tolist() == pytest.approx([x.item() for x in by_hand], abs=1e-5)


def test_logprobs_of_a_bf16_model_are_taken_in_float32():
    model, ids = make().bfloat16(), torch.randint(3, 31, (4, 9))
    exact = model(ids).logits.double().log_softmax(-1)[:, 2:-1].gather(2, ids[:, 3:, None])[..., 0]
    ones = torch.ones_like(ids)
    got = remax.token_logprobs(model, ids[:, :3], ones[:, :3], ids[:, 3:], ones[:, 3:])
    assert got.dtype == torch.float32 and (got - exact).abs().max() < 1e-4


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_changes_no_logprob(kind):
    model = make(kind)
    torch.manual_seed(0)
    prompt, response = torch.randint(3, 31, (1, 4)), torch.randint(3, 31, (1, 5))
    ones = torch.ones_like
    alone = remax.token_logprobs(model, prompt, ones(prompt), response, ones(response))
    pads = prompt.new_zeros(1, 3)
    padded = remax.token_logprobs(
        model, torch.cat([pads, prompt], 1), torch.cat([pads, ones(prompt)], 1),
        torch.cat([response, pads], 1), torch.cat([ones(response), pads], 1))
    assert torch.allclose(alone, padded[:, :5], atol=2e-5) and padded[:, 5:].abs().sum() == 0


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_rollout_is_the_policy_and_its_greedy_half_is_generate(kind, padded):
    """Log-probs gathered while decoding equal token_logprobs, with left padding and without, to 2e-4 nats."""
    model, (prompt, attention) = make(kind), prompts(B=6)
    if not padded:
        prompt, attention = prompt.masked_fill(attention == 0, 9), torch.ones_like(attention)
    torch.manual_seed(2)
    with recorded_logits(model) as seen:
        response, greedy = remax.rollout(model, prompt, attention, 9, EOS, PAD)
    seen[0] = seen[0].repeat(2, 1)  # the prompts are read once, for both halves
    decoded = torch.stack(seen, 1).log_softmax(-1)                                    # (2B,T,V)
    for half, y in (decoded[:6], response), (decoded[6:], greedy):
        mask = remax.response_mask(y, EOS)
        gathered = half.gather(2, y[..., None])[..., 0] * mask
        assert torch.allclose(gathered, remax.token_logprobs(model, prompt, attention, y, mask), atol=2e-4)
    expected = model.generate(prompt, attention_mask=attention, do_sample=False, max_new_tokens=9,
                              eos_token_id=EOS, pad_token_id=PAD)[:, 6:]
    mask = remax.response_mask(greedy, EOS)[:, :expected.size(1)]
    assert (greedy[:, :expected.size(1)] * mask == expected * mask).all()
    assert (greedy[:, 1:] == PAD)[remax.response_mask(greedy, EOS)[:, 1:] == 0].all()  # pads after EOS


def test_rollout_draws_from_the_full_softmax():
    """20,000 first tokens against the model's own probabilities: chi-square, 96 degrees of freedom."""
    model, prompt = make(vocab_size=97), torch.full((20_000, 1), 5)
    model.lm_head.weight.data *= 0.3  # no token so rare that the test is none
    torch.manual_seed(0)
    response, _ = remax.rollout(model, prompt, torch.ones_like(prompt), 1, EOS, PAD, greedy=False)
    expected = model(prompt[:1]).logits[0, -1].softmax(-1) * 20_000
    count = response[:, 0].bincount(minlength=97)
    assert expected.min() > 5 and ((count - expected) ** 2 / expected).sum().item() < 160  # 99.99 % quantile


def test_rollout_without_greedy_decodes_b_rows_and_stops_early():
    model, (prompt, attention) = make(), prompts(B=3)
    model.lm_head.weight.data[EOS] = model.lm_head.weight.data.abs().sum()  # EOS at once, whatever comes
    model.transformer.ln_f.bias.data.fill_(1.0)
    with recorded_logits(model) as seen:
        response, greedy = remax.rollout(model, prompt, attention, 40, EOS, PAD, greedy=False)
    assert greedy is None and seen[0].size(0) == 3
    assert response.tolist() == [[EOS]] * 3 and len(seen) == 1


def test_a_poisoned_generation_config_does_not_leak():
    clean, poisoned = make(), make()
    poisoned.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, min_new_tokens=9, max_length=3)
    outputs = []
    for model in clean, poisoned:
        torch.manual_seed(0)
        outputs.append(torch.cat(remax.rollout(model, *prompts(), 9, EOS, PAD)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropout_is_off_in_train_mode(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(
        config | {key: 0.5 for key, value in config.items() if "drop" in key and isinstance(value, float)}))
    AutoTokenizer.from_pretrained(DATA / "tiny-policy").save_pretrained(tmp_path)
    policy, *_ = remax.load_models(remax.Config(model=str(tmp_path), kl_coef=0), torch.device("cpu"), torch.float32, tmp_path)
    ids = torch.randint(3, 31, (2, 8))
    policy.train()
    assert torch.equal(policy(ids).logits, policy(ids).logits)


# --------------------------------------------- the step ---------------------------------------------

def test_kl_is_zero_at_the_first_step_and_has_the_right_sign_later():
    assert step(make(), make())["kl"] == 0.0
    assert step(make(), make(seed=1))["kl"] > 0.1  # the policy's own samples are likelier under it


def test_kl_of_two_known_distributions():
    """Policy (0.9, 0.1), reference (0.5, 0.5): KL = 0.9 log 1.8 + 0.1 log 0.2 nats, as a mean of k1."""
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    k1 = p.log() - q.log()
    assert (p * k1).sum().item() == pytest.approx(0.3681, abs=1e-4)
    logprobs = p.log()[:, None].requires_grad_()
    remax.remax_loss(logprobs, q.log()[:, None], torch.ones(2, 1), torch.zeros(2), torch.zeros(2), 1.0).backward()
    assert logprobs.grad[:, 0].tolist() == pytest.approx((k1 / 2).tolist())  # descent lowers what is too likely


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batch_size_does_not_change_the_gradient(size):
    """Sorted by length, cut to their longest response, of unequal sizes: the same gradient."""
    gradients = []
    for micro_batch_size in (8, size):
        policy = make(vocab_size=7)
        before = weights(policy)
        row = step(policy, make(vocab_size=7, seed=1), B=8, micro_batch_size=micro_batch_size)
        gradients.append(before - weights(policy))
    assert row["tokens"] < 7 and error(*gradients) < 1e-5


def test_the_update_is_the_gradient_of_remax_loss_on_the_unsorted_batch():
    policy, reference = make(), make(seed=1)
    torch.manual_seed(5)
    response, greedy = remax.rollout(policy, *prompts(), 7, EOS, PAD)
    mask = remax.response_mask(response, EOS)
    logprobs = remax.token_logprobs(policy, *prompts(), response, mask)
    ref_logprobs = remax.token_logprobs(reference, *prompts(), response, mask).detach()
    remax.remax_loss(logprobs, ref_logprobs, mask, response.float().mean(1), greedy.float().mean(1), 0.1).backward()
    expected, before = flat_grad(policy), weights(policy)
    policy.zero_grad()
    step(policy, reference)
    assert error(before - weights(policy), expected) < 1e-4


def test_a_non_finite_gradient_is_skipped_and_counted():
    policy = make()
    before = weights(policy)
    row = step(policy, reward=lambda ys: torch.full((len(ys),), float("nan")))
    assert torch.equal(before, weights(policy)) and row["skipped"] == 1


def test_equal_rewards_give_no_gradient_and_are_counted():
    policy = make()
    before = weights(policy)
    row = step(policy, reward=lambda ys: torch.ones(len(ys)), kl_coef=0.0)
    assert torch.equal(before, weights(policy)) and row["zero_advantage"] == 1 and row["advantage"] == 0


def test_baseline_comes_from_the_greedy_rows():
    calls = []

    def reward(ys):
        calls.append(ys)
        return torch.arange(len(ys)).float()
    row = step(make(), reward=reward)
    _, greedy = remax.rollout(make(), *prompts(), 7, EOS, PAD)
    assert len(calls) == 1 and calls[0].size(0) == 8  # one call, sampled rows first
    T = min(greedy.size(1), calls[0].size(1))
    assert torch.equal(calls[0][4:, :T], greedy[:, :T])
    assert row["reward"] == 1.5 and row["greedy_reward"] == 5.5 and row["advantage"] == -4
    row = step(make(), reward=reward, greedy=False)
    assert len(calls[1]) == 4 and row["greedy_reward"] is None and row["advantage"] == 1.5


def test_checkpointing_changes_no_update():
    results = []
    for checkpointing in False, True:
        policy = make()
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        step(policy, make(seed=1))  # it leaves the policy in train() mode
        results.append((step(policy, make(seed=1))["reward"], weights(policy)))
    assert results[0][0] == results[1][0] and torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_weights_as_gives_the_own_weights_back():
    model = make()
    before, layers = weights(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyError), remax.weights_as(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        raise KeyError
    assert torch.equal(before, weights(model)) and layers == [p.data_ptr() for p in model.parameters()]


# ---------------------------------------- memory and precision ----------------------------------------

def test_parked_models_change_nothing(tmp_path):
    """--offload: the same metrics and weights, to the bit (on a CPU: the way there and back)."""
    for name, flags in ("a", []), ("b", ["--offload"]):
        remax.main(["--steps", "2", "--eval-every", "2", "--output-dir", str(tmp_path / name), *flags])
    a, b = ([{k: v for k, v in r.items() if "seconds" not in k and k != "peak_memory_gb"} for r in metrics(tmp_path / name)]
            for name in "ab")
    assert a == b
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (tmp_path / "b/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--optimizer", "adafactor", "--lr", "5e-3"],
                                   ["--gradient-checkpointing", "--micro-batch-size", "4"]])
def test_other_flags_learn_too(tmp_path, flags):
    remax.main(["--steps", "8", "--eval-every", "8", "--output-dir", str(tmp_path), *flags])
    rows = metrics(tmp_path)
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.05 and abs(rows[1]["kl"]) < 0.1
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").parameters()} == {torch.float32}


def test_no_float32_copy_of_all_logits_is_kept_for_the_backward_pass():
    """What autograd saves between forward and backward holds no (B,T,V) float32 tensor."""
    model, ids = make().bfloat16(), torch.randint(3, 31, (4, 9))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        remax.token_logprobs(model, ids[:, :3], torch.ones_like(ids[:, :3]), ids[:, 3:], torch.ones_like(ids[:, 3:]))
    assert not any(t.dtype == torch.float32 and t.shape[-1:] == (31,) and t.numel() > 31 for t in saved)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def gpu_step(dtype, checkpointing=False, scale=None):
    torch.manual_seed(5)
    policy = make().cuda()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16, **({"init_scale": scale} if scale else {}))
    before = weights(policy)
    prompt, attention = (x.cuda() for x in prompts())
    row = remax.remax_step(
        policy, make().cuda().to(dtype), torch.optim.SGD(policy.parameters(), 1e-2), scaler,
        lambda ys: ys.float().mean(1), prompt, attention, eos_id=EOS, pad_id=PAD, max_new_tokens=7, greedy=True,
        kl_coef=0.1, micro_batch_size=2, max_grad_norm=1e9, dtype=dtype, home=torch.device("cuda"))
    return row, weights(policy) - before


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_step_in_every_precision(dtype):
    row, change = gpu_step(dtype)
    assert change.abs().max() > 0 and row["skipped"] == 0 and abs(row["kl"]) < (1e-4 if dtype == torch.float32 else 0.3)


@cuda
def test_cuda_fp16_overflow_skips_the_step_and_counts_it():
    row, change = gpu_step(torch.float16, scale=2.0 ** 60)
    assert change.abs().max() == 0 and row["skipped"] == 1


@cuda
def test_cuda_gradient_checkpointing_changes_no_update():
    assert error(gpu_step(torch.float32)[1], gpu_step(torch.float32, checkpointing=True)[1]) < 1e-3


@cuda
def test_cuda_peak_memory_stays_in_its_budget_and_offload_lowers_it(tmp_path):
    peaks = []
    for flags in ["--no-offload"], ["--offload"]:
        torch.cuda.reset_peak_memory_stats()
        remax.main(["--steps", "2", "--device", "cuda", "--output-dir", str(tmp_path / flags[0]), *flags])
        peaks.append(metrics(tmp_path / flags[0])[-2]["peak_memory_gb"])
    assert peaks[1] < peaks[0] < 0.3  # 0.9M parameters at 16 bytes, and rollouts of 64 rows


# ------------------------------------------ prompts, rewards ------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-policy")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(path, tokenizer, column="prompt", longest=64):
    return remax.load_prompts(remax.Config(prompts=str(path), prompt_column=column, max_prompt_tokens=longest, batch_size=1), tokenizer)


def tiny_reward(path=DATA / "tiny-reward"):
    return remax.load_reward(str(path), torch.float32, torch.device("cpu"), lambda: torch.device("cpu"))


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt"])
def test_every_kind_of_prompt_file(tokenizer, tmp_path, suffix):
    import datasets
    data = datasets.Dataset.from_dict({"prompt": [f"{i} film plots were told to us" for i in range(20)], "answer": list(range(20))})
    path = str(tmp_path / f"prompts.{suffix}")
    if suffix == "txt":
        Path(path).write_text("\n".join(data["prompt"]))
    else:
        {"jsonl": data.to_json, "json": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix](path)
    rows, held_out = load(path, tokenizer, longest=5)
    assert len(rows) == 16 and len(held_out) == 4 and all(len(row["ids"]) == 5 for row in rows)
    for row in rows:  # plain text is cut to its first tokens, and the reward sees the same
        assert row["columns"]["prompt"] == tokenizer.decode(row["ids"])
        assert suffix == "txt" or row["text"].split()[0] == str(row["columns"]["answer"])


def test_prompts_of_any_alphabet_with_a_byte_order_mark_and_blank_lines(tokenizer, tmp_path):
    lines = [json.dumps({"prompt": f"Фильм {i} был 映画"}, ensure_ascii=False) for i in range(10)]
    (tmp_path / "p.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    rows, held_out = load(tmp_path / "p.jsonl", tokenizer)
    assert len(rows) + len(held_out) == 10 and all("Фильм" in row["text"] for row in rows)


def test_chat_prompts_go_through_the_template_once(tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-policy", chat_template=TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # like Llama's, it puts BOS before a text
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    lines = [{"chat": [{"role": "user", "content": "The plot" * (1 + 40 * (i == 3))}], "n": i} for i in range(10)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, held_out = load(tmp_path / "chat.jsonl", tokenizer, "chat", 60)
    assert len(rows) + len(held_out) == 9  # the long one is dropped, not cut
    for row in rows:
        assert row["ids"].count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(row["ids"]).endswith("The plot\n[assistant]")
    seen = {}

    def reward(prompts, completions, n, **kwargs):
        seen.update(prompts=prompts, completions=completions, n=n)
        return [0.0] * len(n)
    remax.score_responses(reward, tokenizer, 0.0, rows[:2], torch.full((4, 3), 5))
    assert seen["prompts"][0] == lines[seen["n"][0]]["chat"] and seen["n"][:2] == seen["n"][2:]
    assert seen["completions"][0][0]["role"] == "assistant"


def test_reward_columns_stay_aligned_with_rows(tokenizer, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"The plot {i}", "answer": i}) for i in range(20)))
    rows, _ = load(tmp_path / "p.jsonl", tokenizer)

    def reward(prompts, completions, answer, **kwargs):
        assert all(p == f"The plot {a}" for p, a in zip(prompts, answer)) and len(completions) == 8
        return [float(a) for a in answer]
    ids = torch.tensor(tokenizer([" was brilliant."])["input_ids"]).repeat(8, 1)
    rewards, texts = remax.score_responses(reward, tokenizer, 0.0, rows[:4], ids)
    assert rewards.tolist() == [row["columns"]["answer"] for row in rows[:4]] * 2
    assert texts == [" was brilliant."] * 8


def test_reward_model_ignores_padding_and_reads_the_last_label():
    reward = tiny_reward()
    prompts, answers = ["The plot", "The music of this western"], [" was superb.", " put me to sleep. I hated it, and I left the cinema angry."]
    together = reward(prompts=prompts, completions=answers)
    alone = [reward(prompts=[p], completions=[a]).item() for p, a in zip(prompts, answers)]
    assert together.tolist() == pytest.approx(alone, abs=1e-6) and alone[0] > 0.9 > 0.1 > alone[1]


@pytest.mark.parametrize("labels", [1, 3])
def test_reward_of_a_gpt2_classifier(tmp_path, labels):
    """No pad token, so pad is EOS; one label is its logit, several the probability of the last."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=700, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=labels)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-policy")
    tokenizer.save_pretrained(tmp_path)
    reward = tiny_reward(tmp_path)
    texts = ["The plot was superb.", "It was dreadful and the cast put me to sleep."]
    got = reward(prompts=["", ""], completions=texts)
    for text, value in zip(texts, got):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert value.item() == pytest.approx((logits[0] if labels == 1 else logits.softmax(0)[-1]).item(), abs=1e-5)


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("nan")], [1.0, float("inf")], ["good", "bad"], None, [[1.0], [2.0]]])
def test_unusable_rewards_stop_the_run_before_the_update(tokenizer, answer):
    rows = [{"ids": [5], "text": "a", "columns": {"prompt": "a"}}] * 2
    with pytest.raises((AssertionError, ValueError, TypeError, RuntimeError)):
        remax.score_responses(lambda **kwargs: answer, tokenizer, 0.0, rows, torch.full((2, 3), 5))


def test_missing_eos_penalty_is_taken_off_sampled_and_greedy_rows_alike(tokenizer):
    rows, eos = [{"ids": [5], "text": "a", "columns": {"prompt": "a"}}] * 2, tokenizer.eos_token_id
    responses = torch.tensor([[7, 8, 9], [7, eos, 0], [7, 8, 9], [eos, 0, 0]])
    rewards, _ = remax.score_responses(lambda prompts, **kwargs: [1.0] * len(prompts), tokenizer, 0.25, rows, responses)
    assert rewards.tolist() == [0.75, 1.0, 0.75, 1.0]


# --------------------------------------------- whole runs ---------------------------------------------

COLUMNS = {"step", "reward", "greedy_reward", "advantage", "zero_advantage", "kl", "entropy", "tokens", "eos",
           "grad_norm", "loss", "lr", "rollout_seconds", "score_seconds", "update_seconds", "peak_memory_gb"}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    remax.main(["--output-dir", str(folder), "--steps", "24", "--eval-every", "12"])
    return folder


def test_tiny_world_learns(tiny_run):
    rows = metrics(tiny_run)
    evals, train = [r for r in rows if "eval_reward" in r], [r for r in rows if "reward" in r]
    assert [r["step"] for r in evals] == [0, 12, 24] and [r["step"] for r in train] == list(range(1, 25))
    assert 0.35 < evals[0]["eval_reward"] < 0.65 and evals[-1]["eval_reward"] > 0.85
    assert evals[0]["eval_kl"] == 0 and 0.1 < evals[-1]["eval_kl"] < 5
    assert all(set(r) >= COLUMNS for r in train) and train[0]["kl"] == 0 and train[-1]["kl"] > 0.1
    assert all(0 < r["tokens"] <= 40 and 0 <= r["eos"] <= 1 and r["entropy"] > 0 for r in train)


def test_saved_model_is_the_checkpoint_but_for_its_weights(tiny_run):
    original, saved = DATA / "tiny-policy", tiny_run / "model"
    for name in "config.json", "generation_config.json":
        a, b = (json.loads((folder / name).read_text()) for folder in (original, saved))
        assert a | {"transformers_version": ""} == b | {"transformers_version": ""}, name
    assert json.loads((saved / "config.json").read_text())["resid_pdrop"] == 0.1
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (original, saved))
    assert not torch.equal(weights(before), weights(after))
    text = "The plot was"
    assert AutoTokenizer.from_pretrained(saved)(text) == AutoTokenizer.from_pretrained(original)(text)
    assert AutoTokenizer.from_pretrained(saved).pad_token is None
    assert json.loads((tiny_run / "args.json").read_text())["steps"] == 24


def test_the_same_seed_gives_the_same_metrics(tiny_run, tmp_path):
    """To the bit, on a CPU; nor do evaluations touch the noise of training."""
    remax.main(["--output-dir", str(tmp_path), "--steps", "3", "--eval-every", "1", "--lr", "1e-30"])
    remax.main(["--output-dir", str(tmp_path / "b"), "--steps", "3", "--eval-every", "3", "--lr", "1e-30"])
    a, b = ([{k: v for k, v in r.items() if "seconds" not in k and k != "peak_memory_gb"} for r in metrics(folder)
             if "reward" in r] for folder in (tmp_path, tmp_path / "b"))
    assert a == b and a[0]["reward"] == metrics(tiny_run)[1]["reward"]


def hub(cache, name, folder):
    """Put a checkpoint into a local hub cache, where from_pretrained(name) finds it offline."""
    repo = cache / ("models--" + name.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)


def test_gpt2_large_by_name_from_a_local_hub_cache(tmp_path):
    """The command the project exists for; a small stand-in answers to the name, the defaults are its own."""
    hub(tmp_path / "hub", "gpt2-large", DATA / "tiny-policy")
    hub(tmp_path / "hub", "lvwerra/distilbert-imdb", DATA / "tiny-reward")
    done = run("--model", "gpt2-large", "--steps", "2", "--output-dir", tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["reward"] == "lvwerra/distilbert-imdb" and args["max_new_tokens"] == 48 and args["lr"] == 1e-6
    assert "eval_reward" in done.stdout and "rollout_seconds" in done.stdout
    assert [r["step"] for r in metrics(tmp_path / "out")] == [0, 1, 2, 2]


def test_reward_function_from_a_file_without_kl(tmp_path):
    (tmp_path / "short.py").write_text("def short(prompts, completions, **kwargs):\n    return [-len(c) / 100 for c in completions]\n")
    remax.main(["--reward", f"{tmp_path}/short.py:short", "--kl-coef", "0", "--baseline", "none", "--steps", "2",
                "--output-dir", str(tmp_path / "out")])
    rows = metrics(tmp_path / "out")
    assert rows[1]["kl"] is None and rows[1]["greedy_reward"] is None and rows[1]["reward"] < 0
    assert rows[0]["eval_kl"] is None and rows[0]["eval_greedy_reward"] < 0


def test_help_names_every_flag_and_the_tiny_defaults():
    done = run("--help", COLUMNS="100")
    assert done.returncode == 0 and "tiny-reward" in done.stdout
    assert all(f"\n{heading}:\n" in done.stdout for heading in remax.GROUPS.values())
    assert max(map(len, done.stdout.replace(str(ROOT), "").splitlines())) <= 100
    for field in remax.Config.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in done.stdout


# ------------------------------------------ resuming ------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run of little work a step: short answers to few prompts."""
    path = tmp_path_factory.mktemp("small") / "prompts.jsonl"
    lines = (DATA / "prompts.jsonl").read_text().splitlines()[:30]
    path.write_text("\n".join(lines))
    return ["--prompts", path, "--batch-size", 8, "--max-new-tokens", 12, "--eval-every", 4, "--save-every", 2]


def same(a, b):
    """Two runs' metrics but for seconds, and their weights, are equal to the bit."""
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in metrics(folder)] for folder in (a, b)]
    assert rows[0] == rows[1]
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()


def go(small, folder, *args):
    remax.main([*map(str, small), "--output-dir", str(folder), *map(str, args)])


KILLER = """
import os, random, signal, sys, time, datasets
from transformers import DistilBertForSequenceClassification, GPT2LMHeadModel
sys.path.insert(0, sys.argv[1])
import remax
log, args, chance = sys.argv[2] + "/metrics.jsonl", sys.argv[3:] + ["--output-dir", sys.argv[2]], random.Random(0)
size = lambda: os.path.getsize(log) if os.path.exists(log) else 0
for life in range(13):
    start, pid = size(), os.fork()  # a fork spares the imports
    if pid == 0:
        remax.main(args + ["--resume"] * (start > 0))
        os._exit(0)
    goal = -1 if life % 4 == 3 else start + chance.randrange(900)  # while it loads, or some rows further on
    while life < 12 and size() <= goal and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    if life < 12:
        time.sleep(chance.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1])
"""


def test_killed_twelve_times_a_run_is_the_uninterrupted_one_to_the_bit(small, tmp_path):
    """kill -9 at random moments, loading and saving included; no row lost, doubled or half-written."""
    go(small, tmp_path / "whole", "--steps", 80)
    done = subprocess.run([sys.executable, "-c", KILLER, Path(remax.__file__).parent, tmp_path / "killed", *map(str, small), "--steps", "80"],
                          capture_output=True, text=True, timeout=280)
    ends = [word for word in done.stdout.split("\n") if word.isdigit()]
    assert ends == ["9"] * 12 + ["0"], done.stderr[-2000:]  # signal 9, and at last a clean exit
    same(tmp_path / "whole", tmp_path / "killed")
    assert len(list((tmp_path / "killed/checkpoint").glob("step-*"))) == 1


@pytest.mark.parametrize("kind, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_say_how_to_resume_and_lose_nothing(small, tmp_path, kind, code):
    flags = [*map(str, small), "--steps", "80", "--save-every", "1000", "--output-dir", str(tmp_path / "cut")]
    process = subprocess.Popen([sys.executable, remax.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 1000):
        time.sleep(0.01)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and "--resume" in out.splitlines()[-1], err
    before = log.read_text()
    assert len(before) > 1000 and "Traceback" not in out
    remax.main([*flags, "--resume"])
    assert log.read_text().startswith(before)  # it went on, it did not start again
    assert [r["step"] for r in metrics(tmp_path / "cut") if "reward" in r] == list(range(1, 81))
    state = torch.load(tmp_path / "cut/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 80 and (tmp_path / "cut/checkpoint/step-80/model.safetensors").exists()


def test_resumed_equals_whole_and_larger_steps_extend_a_run(small, tmp_path):
    go(small, tmp_path / "a", "--steps", 4)
    before = metrics(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    go(small, tmp_path / "moved", "--steps", 7, "--resume")
    rows = metrics(tmp_path / "moved")
    assert rows[:len(before)] == before and [r["step"] for r in rows] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert rows[-2]["lr"] == pytest.approx(6e-4 * 0.5 * (1 + torch.tensor(6 / 7 * torch.pi).cos().item()))
    go(small, tmp_path / "moved", "--steps", 7, "--resume")  # nothing left to do: no harm either
    assert metrics(tmp_path / "moved") == rows


def test_rows_past_the_checkpoint_are_cut_off(small, tmp_path):
    go(small, tmp_path / "whole", "--steps", 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/model")
    with open(tmp_path / "cut/metrics.jsonl", "a") as log:
        log.write('{"step": 5, "reward": 1.0}\n{"step": 6, "rew')
    go(small, tmp_path / "cut", "--steps", 4, "--resume")
    same(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_other_mathematics_and_a_new_run_a_used_folder(small, tmp_path, capsys):
    go(small, tmp_path, "--steps", 2)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    flags = [*small, "--output-dir", tmp_path]
    for extra, word in ((["--steps", 2], "--resume"), (["--steps", 2, "--resume", "--lr", "1e-5"], "--lr 1e-05"), (["--steps", 1, "--resume"], "--steps 1"),
                        (["--steps", 2, "--resume", "--baseline", "none"], "--baseline none"), (["--steps", 2, "--resume", "--seed", 1], "--seed 1")):
        code, said = answer(capsys, *flags, *extra)
        assert code == 1 and word in " ".join(said) and len(said) <= 3
        assert (tmp_path / "metrics.jsonl").read_bytes() == log
    go(small, tmp_path, "--steps", 2, "--resume", "--micro-batch-size", 4, "--offload")  # these change no mathematics
    (tmp_path / "metrics.jsonl").unlink()  # a checkpoint alone is a run, too
    assert answer(capsys, *flags, "--steps", 2)[0] == 1
    go(small, tmp_path, "--steps", 4, "--resume")
    assert [row["step"] for row in metrics(tmp_path)] == [3, 4, 4]


def test_disk_full_while_saving_keeps_the_old_checkpoint_and_says_so(small, tmp_path, capsys, monkeypatch):
    go(small, tmp_path / "whole", "--steps", 4)
    torch_save = torch.save

    def full(state, path):
        if state["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        torch_save(state, path)
    monkeypatch.setattr(torch, "save", full)
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "full", "--steps", 4)
    assert code == 1 and "No space left" in said[-2] and "what was saved stays" in said[-1] and "--output-dir" in said[-1]
    monkeypatch.undo()
    go(small, tmp_path / "full", "--steps", 4, "--resume")
    same(tmp_path / "whole", tmp_path / "full")


def test_disk_full_at_the_last_moment(small, tmp_path, capsys, monkeypatch):
    original = transformers.PreTrainedModel.save_pretrained

    def save_pretrained(self, folder, **kwargs):
        if Path(folder).name == "model":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, folder, **kwargs)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_pretrained)
    code, said = answer(capsys, *small, "--output-dir", tmp_path, "--steps", 1)
    assert code == 1 and "No space left" in said[-2] and "what was saved stays" in said[-1]
    monkeypatch.undo()
    go(small, tmp_path, "--steps", 1, "--resume")
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_strangers_checkpoint_runs_no_code(small, tmp_path, capsys):
    go(small, tmp_path, "--steps", 2)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)
    torch.save({"step": 2, "log_bytes": 0, "args": Evil()}, tmp_path / "checkpoint/state.pt")
    code, said = answer(capsys, *small, "--output-dir", tmp_path, "--steps", 2, "--resume")
    assert code == 1 and "--output-dir" in said[-1] and not (tmp_path / "owned").exists()


# ------------------------------------------ mistakes ------------------------------------------

FILES = {  # name -> content
    "broken.py": "def f(:", "ok.py": "x = 1", "raises.py": "def f(**k):\n    return 1 / 0", "few.py": "def f(**k):\n    return [1.0]",
    "words.py": "def f(prompts, **k):\n    return ['good'] * len(prompts)", "nan.py": "def f(prompts, **k):\n    return [float('nan')] * len(prompts)",
    "inf.py": "def f(prompts, **k):\n    return [float('inf')] * len(prompts)", "none.py": "def f(**k):\n    pass",
    "memory.py": "import torch\ndef f(**k):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.')",
    "empty.jsonl": "", "blank.txt": "\n\n\n", "number.jsonl": '{"prompt": 1}\n' * 60, "null.jsonl": '{"prompt": null}\n{"prompt": "The plot"}\n' * 60,
    "broken.jsonl": '{"prompt": "The plot"}\n{"prompt": "The cast"\n', "broken.json": '[{"prompt": "The plot"}, {"prom', "header.csv": "prompt\n",
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "Hello"}]}\n' * 60, "few.jsonl": '{"prompt": "The plot"}\n' * 20, "a file": "",
}
MISTAKES = [  # the flags, words that the answer must have
    ("--model nosuch", "--model nosuch"), ("--model no/such", "--model no/such"), ("--model {data}/tiny-reward", "classifier --model"),
    ("--reward nosuch", "--reward nosuch"), ("--reward {data}/tiny-policy", "--reward classifier"), ("--reward nosuch.py:f", "--reward nosuch.py"),
    ("--reward broken.py:f", "SyntaxError broken.py line"), ("--reward ok.py:f", "--reward function f"), ("--reward raises.py:f", "ZeroDivisionError --reward"),
    ("--reward few.py:f", "64 number --reward"), ("--reward words.py:f", "str --reward"), ("--reward nan.py:f", "nan finite --reward"),
    ("--reward inf.py:f", "inf finite --reward"), ("--reward none.py:f", "None --reward"),
    ("--reward memory.py:f", "memory --batch-size 32 --micro-batch-size 8 --offload None --optimizer adamw --gradient-checkpointing False"),
    ("--prompts nosuch", "--prompts nosuch"), ("--prompts nosuch.jsonl", "--prompts nosuch.jsonl"), ("--prompts empty.jsonl", "--prompts empty.jsonl"),
    ("--prompts blank.txt", "0 prompts"), ("--prompts number.jsonl", "--prompts str"), ("--prompts null.jsonl", "--prompts str"),
    ("--prompts broken.jsonl", "line 2 broken.jsonl"), ("--prompts broken.json", "position broken.json"), ("--prompts header.csv", "--prompts header.csv"),
    ("--prompts chat.jsonl", "template --prompts"), ("--prompts few.jsonl", "16 prompts --batch-size 32"), ("--prompt-column nosuch", "--prompt-column nosuch"),
    ("--prompts long.jsonl --model {chat} --max-prompt-tokens 9", "0 prompts"),
    ("--max-new-tokens 100", "128 positions --max-new-tokens 100 --max-prompt-tokens 64"), ("--device nonsense", "--device nonsense"),
    ("--baseline critic", "--baseline greedy none"), ("--optimizer sgd", "--optimizer adamw adafactor"), ("--steps two", "--steps int"), ("--nonsense 1", "--nonsense"),
    ("--micro-batch-size 5", "--micro-batch-size 5 divide --batch-size 32"), ("--output-dir {tmp}/afile", "--output-dir afile"),
    ("--output-dir {tmp}/afile/x", "--output-dir afile/x"), ("--output-dir /dev/null/x", "--output-dir /dev/null/x"), ("--resume", "no run to resume --resume"),
    *((f"--{flag} {value}", f"--{flag} 0") for flag in (
        "steps batch-size lr max-grad-norm kl-coef micro-batch-size max-new-tokens max-prompt-tokens eval-every save-every missing-eos-penalty seed".split())
      for value in (["-1", "0"] if flag not in ("kl-coef", "missing-eos-penalty", "seed") else ["-1"])),
    *((f"--{flag} {value}", f"--{flag} {value} finite") for flag in ("lr", "kl-coef", "max-grad-norm", "missing-eos-penalty") for value in ("nan", "inf")),
] + [("--device cuda", "--device cuda")] * (not torch.cuda.is_available())


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with every broken file, and a model with a chat template."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name.replace(" ", "")).write_text(text)
    (folder / "long.jsonl").write_text((json.dumps({"prompt": [{"role": "user", "content": "The plot was " * 9}]}) + "\n") * 60)
    shutil.copytree(DATA / "tiny-policy", folder / "chat")
    AutoTokenizer.from_pretrained(DATA / "tiny-policy", chat_template=TEMPLATE).save_pretrained(folder / "chat")
    return folder


@pytest.mark.parametrize("flags, words", MISTAKES, ids=[flags.replace("{data}/", "") for flags, _ in MISTAKES])
def test_every_mistake_is_answered_in_words(flags, words, desk, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(desk)
    flags = flags.format(data=DATA, tmp=desk, chat=desk / "chat").split()
    code, said = answer(capsys, *["--output-dir", tmp_path] * ("--output-dir" not in flags), *flags)
    assert code in (1, 2) and len(said) <= 3 and "Traceback" not in " ".join(said)
    for word in words.split():
        assert word in " ".join(said), said
    assert not (tmp_path / "checkpoint").exists()


def test_a_mistake_as_the_shell_sees_it(desk, tmp_path):
    done = run("--model", "nosuch", "--output-dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(done.stderr.strip().split("\n")) <= 3, done.stderr
    assert "--model nosuch" in done.stderr and not done.stdout


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def buggy(*args, **kwargs):
        raise ValueError("a bug")
    monkeypatch.setattr(remax, "remax_step", buggy)
    with pytest.raises(ValueError, match="a bug"):
        remax.main(["--output-dir", str(tmp_path)])


def test_a_reward_that_fails_later_leaves_the_checkpoint_whole(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "late.py").write_text("calls = []\ndef f(completions, **k):\n    calls.append(1)\n"
                                      "    return [len(c) * (1 if len(calls) < 6 else float('nan')) for c in completions]")
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "run", "--reward", f"{tmp_path}/late.py:f", "--steps", 9, "--kl-coef", 0)
    assert code == 1 and "finite" in said[-2] and "--reward" in said[-1]
    (folder,) = (tmp_path / "run/checkpoint").glob("step-*")
    assert torch.load(folder.parent / "state.pt", weights_only=True)["step"] == int(folder.name[5:]) >= 2
    AutoModelForCausalLM.from_pretrained(folder)


def test_five_steps_without_a_finite_gradient_stop_the_run_with_a_checkpoint(small, tmp_path, capsys):
    (tmp_path / "huge.py").write_text("def f(completions, **k):\n    return [3e38 * (-1) ** i for i in range(len(completions))]")
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "run", "--reward", f"{tmp_path}/huge.py:f", "--steps", 9, "--baseline", "none")
    assert code == 1 and "5 steps" in said[-1] and "--lr" in said[-1]
    assert [r["skipped"] for r in metrics(tmp_path / "run") if "reward" in r] == [1.0] * 5
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint/step-5")
    assert torch.equal(weights(saved), weights(AutoModelForCausalLM.from_pretrained(DATA / "tiny-policy")))


def test_twenty_steps_that_teach_nothing_are_named_once(small, tmp_path, capsys):
    (tmp_path / "constant.py").write_text("def f(completions, **k):\n    return [1.0] * len(completions)")
    go(small, tmp_path / "run", "--reward", f"{tmp_path}/constant.py:f", "--steps", 23, "--kl-coef", 0, "--eval-every", 50)
    assert capsys.readouterr().out.count("warning") == 1


def test_tokens_that_are_missing_are_replaced_and_said(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-policy")
    shutil.copytree(DATA / "tiny-policy", tmp_path / "policy")
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.eos_token, None
    tokenizer.save_pretrained(tmp_path / "policy")
    remax.main(["--model", str(tmp_path / "policy"), "--reward", str(DATA / "tiny-reward"), "--steps", "1", "--output-dir", str(tmp_path / "run"), "--lr", "1e-9"])
    assert "EOS '<|endoftext|>', pad '<|endoftext|>'" in capsys.readouterr().out


# ------------------------------------------- sabotage -------------------------------------------

SABOTAGE = [  # what is broken, the line, its broken form, the test that must notice
    ("position_ids dropped", "position_ids=positions, use_cache=False", "use_cache=False", "padding_changes"),
    ("positions dropped while decoding", "position_ids=positions[:rows, start:end], ", "", "greedy_half"),
    ("EOS left out of the mask", "is_eos.cumsum(1) - is_eos == 0", "is_eos.cumsum(1) == 0", "first_eos"),
    ("mask from pad ids", "(is_eos.cumsum(1) - is_eos == 0)", "(response != eos_id)", "first_eos"),
    ("KL sign flipped", "logprobs.detach() - ref_logprobs)", "ref_logprobs - logprobs.detach())", "by_hand"),
    ("KL one-step", "kl_to_go = kl.flip(1).cumsum(1).flip(1)", "kl_to_go = kl", "by_hand"),
    ("KL unmasked", "(logprobs.detach() - ref_logprobs) * mask", "logprobs.detach() - ref_logprobs", "by_hand"),
    ("k3 in the reward", "(logprobs.detach() - ref_logprobs) * mask",
     "((ref_logprobs - logprobs.detach()).exp() - 1 + logprobs.detach() - ref_logprobs) * mask", "unbiased"),
    ("baseline from the wrong rows", "scores.chunk(2) if greedy", "scores.chunk(2)[::-1] if greedy", "greedy_rows"),
    ("baseline not subtracted", "(reward - baseline)[:, None]", "reward[:, None]", "by_hand"),
    ("gradient through the advantage", "(logprobs.detach() - ref_logprobs)", "(logprobs - ref_logprobs)", "no_gradient"),
    ("token mean", "(logprobs * advantage * mask).sum(1).mean()", "(logprobs * advantage * mask).sum() / mask.sum()", "reinforce"),
    ("per-micro-batch mean", "loss * len(rows) / B", "loss / len(batches)", "micro_batch_size"),
    ("top_k left at its default", "logits[:B].softmax(-1)",
     "logits[:B].masked_fill(logits[:B] < logits[:B].topk(50).values[:, -1:], -99).softmax(-1)", "full_softmax"),
    ("checkpoint's generation_config kept", "logits[:B].softmax(-1)",
     "(logits[:B] / (policy.generation_config.temperature or 1)).softmax(-1)", "poisoned"),
    ("dropout left on", "key: 0.0 for key", "key: value for key", "dropout"),
    ("log-softmax in bf16", "- logits.float().logsumexp(1)", "- logits.logsumexp(1)", "taken_in_float32"),
    ("float32 copy of all logits kept", "picked = [checkpoint(pick, *row, use_reentrant=False)", "picked = [pick(*row)", "no_float32"),
    ("off by one in the logits", ".logits[:, -T - 1:-1]", ".logits[:, -T:]", "column_t"),
    ("generation in train mode with checkpointing", "weights_as(policy.eval(), dtype):  ", "weights_as(policy, dtype):  ", "checkpointing_changes"),
    ("reward scored on prompt + response twice", "[len(row[\"text\"]):]", "", "aligned"),
    ("reward model left-padded", 'padding_side="right"', 'padding_side="left"', "ignores_padding"),
    ("reward model without mask", "model.to(device)(**batch)", 'model.to(device)(batch["input_ids"])', "ignores_padding"),
    ("columns misaligned with rows", "rows = rows * (len(responses) // len(rows))",
     "rows = [row for row in rows for _ in range(len(responses) // len(rows))]", "aligned"),
    ("weights saved with use_cache off", "policy.config = config",
     "policy.config = AutoConfig.from_pretrained(cfg.model, use_cache=False)", "saved_model"),
    ("dropout saved as 0", "policy.config = config", "pass", "saved_model"),
    ("finished rows go on", ".masked_fill(done, pad_id)", "", "greedy_half"),
    ("resume that forgets the RNG", 'set_seed(random.Random(f"{cfg.seed}/{step}").getrandbits(32))', 'step == state["step"] + 1 and set_seed(cfg.seed)', "while_saving"),
    ("resume that restarts the data order", "random.sample(rows,", 'random.Random(step - state["step"]).sample(rows,', "while_saving"),
    ("resume that forgets the weights", 'weights = path.with_name(f"step-{state[\'step\']}")', "pass", "while_saving"),
    ("resume that forgets the optimizer", 'optimizer.load_state_dict(state.pop("optimizer", optimizer.state_dict()))', "pass", "while_saving"),
    ("resume that restarts the learning rate", 'max(state["step"], 0) - 1)', "-1)", "extend_a_run"),
    ("resume that keeps the rows past the checkpoint", 'log.truncate(min(state["log_bytes"], log.tell()))', "pass", "cut_off"),
    ("resume with other mathematics", 'if name == "micro_batch_size":', "if True:", "other_mathematics"),
    ("checkpoint written over the old one", 'folder / f"step-{state[\'step\']}"', 'folder / "step-0"', "killed"),
    ("checkpoint that runs code", "weights_only=True", "weights_only=False", "stranger"),
    ("new run over an old one", "assert cfg.resume == there", "assert True", "used_folder"),
    ("Ctrl-C that saves nothing", "if asked or skipped == 5 or step == cfg.steps or", "if skipped == 5 or step == cfg.steps or", "sigterm"),
    ("penalty for sampled rows alone", "missing_eos_penalty * (responses", "missing_eos_penalty * (torch.arange(len(rows)) < 2) * (responses", "penalty"),
    ("bugs answered like mistakes", "if place in FAULT), []))", 'if place in FAULT), ["model"]))', "traceback"),
    ("evaluation moves the noise of training", 'set_seed(random.Random(f"{cfg.seed}/{step}").getrandbits(32))', "step or set_seed(cfg.seed)", "same_seed"),
    ("second BOS", "add_special_tokens=not chat)[", "add_special_tokens=True)[", "template_once"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, line, broken, test", SABOTAGE, ids=[row[0].replace(" ", "-") for row in SABOTAGE])
def test_sabotage_is_noticed(name, line, broken, test, tmp_path):
    """The fault, put into a copy of remax.py, makes its test fail; the untouched copy passes all of them."""
    source = (ROOT / "remax.py").read_text()
    assert source.count(line) == 1, f"{name}: the line to break is not there, or not unique"
    (tmp_path / "remax.py").write_text(source.replace(line, broken))
    (tmp_path / "test_remax.py").symlink_to(ROOT / "test_remax.py")
    (tmp_path / "data").symlink_to(DATA)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-k", f"{test} and not sabotage", "-p", "no:cacheprovider",
                           str(tmp_path / "test_remax.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]


@pytest.fixture(autouse=True)
def slow_only_on_request(request):
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("slow: run with -m slow")


# ------------------------------------------- the README -------------------------------------------

README = (ROOT / "README.md").read_text()
TEXT = " ".join(README.split())  # line ends aside


def results(name):
    return [json.loads(line) for line in open(DATA / "results" / name)]


def test_readme_quotes_its_logs():
    arms = {arm: [results(f"tiny/{arm}-{seed}.jsonl") for seed in range(5)] for arm in ("remax", "reinforce")}
    logged = {row["log"]: row for row in results("tiny/runs.jsonl")}
    for arm, runs in arms.items():
        kl = [run[-1]["eval_kl"] for run in runs]
        cells = [f"{statistics.mean(v):.3f} +- {statistics.stdev(v):.3f}" for v in (
            [run[-1]["eval_reward"] for run in runs], [run[-1]["eval_reward"] - 0.05 * run[-1]["eval_kl"] for run in runs])]
        rows = [logged[f"{arm}-{seed}.jsonl"] for seed in range(5)]
        cells += [f"{statistics.mean(kl):.2f} +- {statistics.stdev(kl):.2f}", f"{statistics.mean(run[-1]['eval_greedy_reward'] for run in runs):.3f}"]
        cells += [f"{statistics.mean(row['grad_norm_last_20'] for row in rows):.1f} +- {statistics.stdev(row['grad_norm_last_20'] for row in rows):.1f}"]
        cells += [f"{statistics.mean(row['step_seconds'] for row in rows):.0f} |"]
        line = next(line for line in README.split("\n") if line.startswith({"remax": "| ReMax |", "reinforce": "| REINFORCE"}[arm]))
        assert all(cell in line for cell in cells), (arm, cells)
        for seed, run in enumerate(runs):  # a row of runs.jsonl is what its log says
            assert rows[seed]["eval_reward_after"] == run[-1]["eval_reward"] and f"--seed {seed}" in rows[seed]["command"]
    kl = [statistics.mean(run[-1]["eval_kl"] for run in runs) for runs in arms.values()]
    assert f"{kl[1] / kl[0]:.1f} times the KL" in TEXT
    assert f"from a held-out reward of {logged['remax-0.jsonl']['eval_reward_before']:.3f};" in TEXT
    assert remax.TINY["kl_coef"] == 0.05 and remax.TINY["steps"] == 60
    for model in "start", "end":
        quoted = [f"{row['ratio']:.2f}" for row in results("variance.jsonl") if row["model"] == model]
        assert f"{quoted[0]}, {quoted[1]} and {quoted[2]} of" in TEXT
    for row in results("memory.jsonl"):
        assert row["kind"] == "computed" and f"{row['peak_gb']:.1f}" in TEXT, row["flags"]
    small, large = (row["ratio"] for row in results("cpu.jsonl"))
    assert f"takes {small['ReMax/RLOO']:.2f} of RLOO's and {small['ReMax/GRPO']:.2f} of GRPO's" in TEXT
    assert f"{large['ReMax/RLOO']:.2f} and {large['ReMax/GRPO']:.2f} at 17M" in TEXT
    (peer,) = results("tiny_vs_rloo.jsonl")
    assert f"{peer['RLOO']['median']:.1f} s at the best of three rates (chosen on one seed), ReMax {peer['ReMax']['median']:.1f} s" in TEXT


@pytest.mark.parametrize("p, r, none, greedy", [(0.3, (1.0, 0.5), "0.152", "0.026"), (0.9, (1.0, 0.1), "0.0032", "0.059")])
def test_readme_example_of_a_greedy_baseline_that_helps_and_one_that_hurts(p, r, none, greedy):
    """Two answers: the variance of (r - b) d log pi / d logit, from remax_loss."""
    def variance(b):
        logit = torch.tensor(p).logit().requires_grad_()
        grads = []
        for logprob, reward in zip((torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)), r):
            loss = remax.remax_loss(logprob.view(1, 1), 0.0, torch.ones(1, 1), torch.tensor([reward]), torch.tensor([b]), 0.0)
            grads.append(torch.autograd.grad(loss, logit)[0].item())
        return p * (1 - p) * (grads[0] - grads[1]) ** 2
    before, after = variance(0.0), variance(r[0] if p > 0.5 else r[1])
    assert f"{before:.{len(none) - 2}f}" == none and f"{after:.{len(greedy) - 2}f}" == greedy
    assert (after < before) == (p < 0.5 + 0.5 * r[1] / (r[0] - r[1])) and f"from {none} to {greedy}" in TEXT


def test_readme_console_is_the_first_seeds():
    """The figures of its closing table; the samples come from the same run."""
    first, last = (results("tiny/remax-0.jsonl")[i] for i in (0, -1))
    for key in "eval_reward", "eval_kl":
        assert f"    {key:20}{first[key]:.4g} -> {last[key]:.4g}" in README


def test_readme_exercises_name_tests_that_there_are():
    source = (ROOT / "test_remax.py").read_text()
    exercises = re.findall(r"^\d\. .*(?:Fails|Passes): .*$", README, re.M)
    assert len(exercises) == 8
    for word in re.findall(r"`(\w+)`", " ".join(line.split("s: ", 1)[1].split("Runs")[0] for line in exercises)):
        assert re.search(rf"def test_\w*{word}", source), word


def test_readme_reward_function_with_an_answer_column(tmp_path, monkeypatch):
    """The worked example, word for word, but with the tiny policy."""
    monkeypatch.chdir(tmp_path)
    Path("sums.py").write_text(re.search(r"^      def right.*\n.*\n", README, re.M)[0].replace("\n      ", "\n").strip())
    Path("sums.jsonl").write_text((re.search(r"`(\{\"prompt\": \"Two.*?\})`", README)[1] + "\n") * 12)
    remax.main("--prompts sums.jsonl --reward sums.py:right --steps 1 --batch-size 8 --output-dir out".split())
    assert 0 <= metrics("out")[1]["reward"] <= 1


def test_plot_draws_any_runs(tmp_path):
    pytest.importorskip("matplotlib")
    for name in "figure.svg", "figure.png":
        done = subprocess.run([sys.executable, DATA / "plot.py", "--out", tmp_path / name, "--arm", "ReMax", *(DATA / "results/tiny").glob("remax-*.jsonl")],
                              capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path / name).stat().st_size > 5000, done.stderr


def test_readme_names_every_flag_column_and_file_there_is():
    for field in remax.Config.__dataclass_fields__:
        assert f"`--{field.replace('_', '-')}`" in README, field
    for column in COLUMNS | {"skipped", "eval_reward", "eval_greedy_reward", "eval_kl"}:
        assert f"`{column}`" in README, column
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", README, re.M)]
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for name in re.findall(r"`(rollout|response_mask|token_logprobs|remax_loss|remax_step|weights_as)`", README):
        assert callable(getattr(remax, name))


@pytest.mark.parametrize("command", re.findall(r"^ +(?:.*&& )?python remax.py(.*?)(?:  +#.*)?$", README, re.M))
def test_readme_commands_parse(command):
    remax.parse(command.split())


def test_readme_counts_its_tests():
    assert f"breaks remax.py in {len(SABOTAGE)} known ways" in TEXT and f"over {len(MISTAKES) // 10 * 10} mistakes" in TEXT
    assert len(README.splitlines()) <= 180


def test_the_files_bounds():
    lines = (ROOT / "remax.py").read_text().splitlines()
    assert len(lines) <= 450 and max(map(len, lines)) <= 100
