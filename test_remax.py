"""What remax.py claims, proved on small models. No GPU, no network:  python -m pytest -q"""

import ast
import contextlib
import errno
import gc
import gzip
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from itertools import product
from pathlib import Path
from typing import NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import remax

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
TINY = DATA / "tiny"
EOS, PAD = 2, 0
CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
torch.set_num_threads(1)  # the models are tiny, the cores are shared
gc.freeze()  # the libraries' own objects: to look through them again takes 0.2 s in every test
# There is no pytest.ini to name the mark "slow" in.
warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)


# =================================================================================================
# Helpers
# =================================================================================================


def make(family, vocab_size=31, seed=0):
    """A random model of a family (see "Model families"), small, loud enough that mistakes show."""
    config_class, options = (FAMILIES | WITHOUT_CACHE | WRONG_CACHE)[family]
    config = getattr(transformers, config_class)(**(NAMES | options | {"vocab_size": vocab_size}))
    remax.turn_off_noise(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # The states of these two hybrids hold exponentials, in which rounding grows with the weights.
    scale = 0.1 if family in ("nemotron_h", "zamba2") else 0.3
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, scale)
    return model.eval()


def prompts(B=4, P=6, vocab_size=31, seed=1):
    """Prompts (B,P) padded on the left by 0, 1, 2, ... columns; an EOS in one must stay visible."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, vocab_size, (B, P), generator=generator)
    attention_mask = torch.ones_like(prompt)
    for b in range(1, B):
        attention_mask[b, : b % P] = 0
    prompt = prompt.masked_fill(attention_mask == 0, PAD)
    prompt[0, 2] = EOS
    return prompt, attention_mask


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def error(a, b):
    """The distance of a from b, relative to the size of b."""
    return ((a - b).norm() / b.norm()).item()


def mean_token(responses):
    """A reward that needs no text."""
    return responses.float().mean(1)


def step(
    policy, reference=None, reward=mean_token, B=4, lr=1.0, device="cpu", scaler=None, **kwargs
):
    """The metrics of a step of plain SGD: without clipping, old weights minus new ones is the
    gradient."""
    torch.manual_seed(5)
    options = {
        "eos_id": EOS,
        "pad_id": PAD,
        "max_new_tokens": 7,
        "greedy_baseline": True,
        "kl_coef": 0.1 if reference is not None else 0.0,
        "micro_batch_size": 2,
        "max_grad_norm": 1e9,
        "dtype": torch.float32,
    }
    optimizer = torch.optim.SGD(policy.parameters(), lr)
    scaler = scaler or torch.amp.GradScaler(device, enabled=False)
    prompt, attention_mask = prompts(B, vocab_size=policy.config.vocab_size)
    prompt, attention_mask = prompt.to(device), attention_mask.to(device)
    options |= kwargs
    settings = remax.StepSettings(**options)
    result = remax.remax_step(
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        scaler=scaler,
        score=reward,
        prompt=prompt,
        attention_mask=attention_mask,
        settings=settings,
    )
    return remax.step_metrics(result, settings)


@contextlib.contextmanager
def recorded_logits(model):
    """The logits of each forward call, as the caller sees them."""
    seen = []

    def record(module, args, output):
        seen.append(output.logits[:, -1].float())

    hook = model.register_forward_hook(record)
    yield seen
    hook.remove()


def checkpointing(model):
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """All tests run on the CPU, here and in the processes they start, but for those marked cuda."""
    with pytest.MonkeyPatch.context() as patch:
        if HAS_CUDA:
            torch.cuda.init()
            torch.cuda.device_count()  # remembered from now on: this process keeps its GPU
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """main() takes Ctrl-C and SIGTERM over; pytest wants them back."""
    kinds = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {kind: signal.getsignal(kind) for kind in kinds}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture(autouse=True)
def slow_only_on_request(request):
    wanted = request.config.getoption("-m")
    if request.node.get_closest_marker("slow") and "slow" not in wanted:
        pytest.skip("slow: run with -m slow")


# =================================================================================================
# The estimator
# =================================================================================================


class Enumeration(NamedTuple):
    """All N responses of up to 3 tokens that a policy of 5 tokens can give to one prompt."""

    policy: torch.nn.Module
    mask: torch.Tensor  # (N,3)
    logprobs: torch.Tensor  # (N,3), with a gradient
    ref_logprobs: torch.Tensor  # (N,3)
    probability: torch.Tensor  # (N,): pi(y|x), with a gradient
    reward: torch.Tensor  # (N,), drawn at random


def all_responses():
    """Every response of the tokens 0 to 4, padded to 3 tokens after its first EOS: (N,3)."""
    responses = []
    for tokens in product(range(5), repeat=3):
        response = list(tokens)
        if EOS in response:
            length = response.index(EOS) + 1
            response[length:] = [PAD] * (3 - length)
        if response not in responses:
            responses.append(response)
    return torch.tensor(responses)


@pytest.fixture(scope="module")
def enumeration():
    policy = make("gpt2", vocab_size=5, seed=3).double()
    reference = make("gpt2", vocab_size=5, seed=4).double()
    response = all_responses()  # (N,3)
    N = len(response)
    prompt = torch.tensor([[PAD, 3, 4]]).repeat(N, 1)  # (N,3)
    attention_mask = torch.tensor([[0, 1, 1]]).repeat(N, 1)  # (N,3)
    mask = remax.response_mask(response, EOS)  # (N,3)
    logprobs = remax.token_logprobs(policy, prompt, attention_mask, response, mask)  # (N,3)
    with torch.no_grad():
        ref_logprobs = remax.token_logprobs(reference, prompt, attention_mask, response, mask)
    probability = logprobs.sum(1).exp()  # (N,)
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    reward = torch.rand(N, generator=torch.Generator().manual_seed(0)).double()  # (N,)
    return Enumeration(policy, mask, logprobs, ref_logprobs, probability, reward)


def gradient(policy, loss):
    """The gradient of a loss, as one vector."""
    policy.zero_grad()
    loss.backward(retain_graph=True)  # other losses use the same log-probs
    return flat_grad(policy).clone()


def expected_gradient(world, baseline, kl_coef, probability):
    """sum_y p(y) * gradient of remax_loss(y): what many samples would give on average.

    baseline: (N,). probability: (N,), of the sampler.
    """
    expected_loss = 0.0
    for i in range(len(world.reward)):
        row = slice(i, i + 1)
        loss = remax.remax_loss(
            world.logprobs[row],
            world.ref_logprobs[row],
            world.mask[row],
            world.reward[row],
            baseline[row],
            kl_coef,
        )
        expected_loss += probability[i].detach() * loss
    return gradient(world.policy, expected_loss)


def exact_gradient(world, kl_coef):
    """The gradient of -(E[r] - beta * KL), with both as sums over all responses."""
    expected_reward = (world.probability * world.reward).sum()
    log_ratio = (world.logprobs - world.ref_logprobs).sum(1)  # (N,)
    kl = (world.probability * log_ratio).sum()
    return gradient(world.policy, kl_coef * kl - expected_reward)


def reward_of_the_greedy_response(world):
    """The baseline of ReMax."""
    policy, prompt = world.policy, torch.tensor([[3, 4]])
    _, greedy_response, _ = remax.rollout(policy, prompt, torch.ones_like(prompt), 3, EOS, PAD)
    padded = torch.nn.functional.pad(greedy_response, (0, 3 - greedy_response.size(1)), value=PAD)
    (index,) = (all_responses() == padded).all(1).nonzero()
    return world.reward[index].item()


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("baseline", ["greedy", 0.0, 0.7, -5.0])
def test_estimator_is_unbiased_whatever_the_baseline(enumeration, baseline, kl_coef):
    if baseline == "greedy":
        baseline = reward_of_the_greedy_response(enumeration)
    baselines = torch.full_like(enumeration.reward, baseline)
    found = expected_gradient(enumeration, baselines, kl_coef, enumeration.probability)
    assert error(found, exact_gradient(enumeration, kl_coef)) < 1e-4


def test_a_baseline_that_depends_on_the_sample_is_biased(enumeration):
    baselines = 0.5 * enumeration.reward
    found = expected_gradient(enumeration, baselines, 0.0, enumeration.probability)
    assert error(found, exact_gradient(enumeration, 0.0)) > 0.1


def test_under_a_truncated_sampler_the_gradient_is_biased_and_the_baseline_moves_it(enumeration):
    """As with top-k: only the ten likeliest responses are drawn."""
    probability = enumeration.probability
    tenth = probability.topk(10).values[-1]
    kept = probability * (probability >= tenth)
    kept = kept / kept.sum()
    zeros, fives = torch.zeros_like(kept), torch.full_like(kept, 5.0)
    without = expected_gradient(enumeration, zeros, 0.0, kept)
    shifted = expected_gradient(enumeration, fives, 0.0, kept)
    assert error(without, exact_gradient(enumeration, 0.0)) > 0.1
    assert error(shifted, without) > 0.5


def test_loss_and_gradient_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)  # the last one is padding
    ref_logprobs = torch.tensor([[-1.5, -1.0, 50.0]])
    mask = torch.tensor([[1, 1, 0]])
    reward, baseline = torch.tensor([1.0]), torch.tensor([0.4])
    loss = remax.remax_loss(logprobs, ref_logprobs, mask, reward, baseline, 0.1)
    assert loss.item() == pytest.approx(2.05)
    assert "= 2.05\n" in remax.remax_loss.__doc__
    loss.backward()
    assert logprobs.grad.tolist()[0] == pytest.approx([-0.65, -0.7, 0.0])


def test_loss_with_baseline_zero_is_reinforce_summed_over_tokens_averaged_over_rows():
    logprobs, zero = torch.randn(3, 4), torch.zeros(3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    reward = torch.tensor([1.0, 2.0, 3.0])
    lengths = 4, 1, 2
    reinforce = -sum(reward[i] * logprobs[i, :n].sum() for i, n in enumerate(lengths)) / 3
    loss = remax.remax_loss(logprobs, torch.zeros(3, 4), mask, reward, zero, 0.0)
    assert loss.item() == pytest.approx(reinforce.item())


def test_no_gradient_through_the_advantage():
    logprobs = torch.randn(2, 3, requires_grad=True)
    ref_logprobs, reward = torch.randn(2, 3), torch.randn(2)
    loss = remax.remax_loss(logprobs, ref_logprobs, torch.ones(2, 3), reward, torch.zeros(2), 0.5)
    loss.backward()
    kl = (logprobs - ref_logprobs).detach()
    kl_to_go = torch.stack([kl[:, t:].sum(1) for t in range(3)], 1)
    assert torch.allclose(logprobs.grad, -(reward[:, None] - 0.5 * kl_to_go) / 2, atol=1e-6)


def test_kl_of_two_known_distributions_is_lowered_by_descent():
    """Policy (0.9, 0.1), reference (0.5, 0.5): KL = 0.9 log 1.8 + 0.1 log 0.2 nats."""
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    k1 = p.log() - q.log()
    assert (p * k1).sum().item() == pytest.approx(0.3681, abs=1e-4)
    logprobs = p.log()[:, None].requires_grad_()
    zero = torch.zeros(2)
    loss = remax.remax_loss(logprobs, q.log()[:, None], torch.ones(2, 1), zero, zero, 1.0)
    loss.backward()
    assert logprobs.grad[:, 0].tolist() == pytest.approx((k1 / 2).tolist())


def gradient_and_kl(added, greedy_baseline):
    """Of a step whose rewards have `added` (4,) on top: a number for each prompt."""

    def reward(responses):  # the sampled ones, and the greedy ones to the same prompts
        return mean_token(responses) + torch.tensor(added + added)

    policy = make("gpt2")
    before = weights(policy)
    metrics = step(policy, make("gpt2", seed=1), reward, greedy_baseline=greedy_baseline)
    return before - weights(policy), metrics["kl"]


NOTHING = [0.0, 0.0, 0.0, 0.0]
OFFSETS = [[5.0, 5.0, 5.0, 5.0], [-5.0, 0.0, 3.0, 5.0]]


@pytest.mark.parametrize("added", OFFSETS)
def test_a_constant_added_to_the_reward_of_each_prompt_changes_no_gradient(added):
    plain_gradient, plain_kl = gradient_and_kl(NOTHING, greedy_baseline=True)
    gradient, kl = gradient_and_kl(added, greedy_baseline=True)
    assert error(gradient, plain_gradient) < 1e-4
    assert kl == plain_kl


@pytest.mark.parametrize("added", OFFSETS)
def test_without_a_baseline_what_is_added_to_the_reward_moves_the_gradient(added):
    plain_gradient, _ = gradient_and_kl(NOTHING, greedy_baseline=False)
    gradient, _ = gradient_and_kl(added, greedy_baseline=False)
    assert error(gradient, plain_gradient) > 0.1


# =================================================================================================
# Model families
# =================================================================================================

# What every config gets.
NAMES = {"vocab_size": 31, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}

# family: (its config class, what differs from the sizes above)
FAMILIES = {
    # GPT-2's kind
    "gpt2": ("GPT2Config", GPT2 | {"n_positions": 64}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gptj": ("GPTJConfig", GPT2 | {"n_positions": 64, "rotary_dim": 4}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "phi": ("PhiConfig", SIZES),
    # Llama's kind
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "phi3": ("Phi3Config", GROUPED),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "cohere": ("CohereConfig", GROUPED),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 2.0}),
    "olmo2": ("Olmo2Config", GROUPED),
    "glm4": ("Glm4Config", GROUPED | {"head_dim": 8}),
    "stablelm": ("StableLmConfig", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    # sliding windows, shorter than prompt and response
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "starcoder2": ("Starcoder2Config", GROUPED | {"sliding_window": 8}),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3_nested": (
        "Gemma3Config",
        {
            "text_config": NAMES
            | GROUPED
            | {
                "head_dim": 8,
                "sliding_window": 8,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 8,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    # mixtures of experts
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "router_jitter_noise": 0.1}),
    "qwen3_moe": ("Qwen3MoeConfig", GROUPED | EXPERTS | {"head_dim": 8}),
    "olmoe": ("OlmoeConfig", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": (
        "PhimoeConfig",
        GROUPED | {"num_local_experts": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1},
    ),
    "gpt_oss": (
        "GptOssConfig",
        GROUPED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # hybrids: linear attention, state space or convolution layers beside attention
    "qwen3_next": (
        "Qwen3NextConfig",
        GROUPED | EXPERTS | DELTA_NET | TWO_KINDS | {"shared_expert_intermediate_size": 16},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", GROUPED | DELTA_NET | TWO_KINDS),
    "qwen3_5_nested": (
        "Qwen3_5Config",
        {
            "text_config": NAMES | GROUPED | DELTA_NET | TWO_KINDS,
            "vision_config": {
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 32,
                "patch_size": 4,
            },
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        GROUPED
        | MAMBA2
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "mamba_expand": 2,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        GROUPED
        | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8},
    ),
    "jamba": (
        "JambaConfig",
        GROUPED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaConfig", GROUPED | MAMBA2 | {"attn_layer_indices": [1], "mamba_expand": 2}),
    "falcon_h1": ("FalconH1Config", GROUPED | MAMBA2 | {"head_dim": 8, "mamba_d_ssm": 64}),
    "nemotron_h": (
        "NemotronHConfig",
        GROUPED
        | {
            "hybrid_override_pattern": "M*-",
            "num_hidden_layers": 3,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        GROUPED
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
        },
    ),
}

# Their output carries no cache.
WITHOUT_CACHE = {
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        GROUPED
        | {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
    "rwkv": (
        "RwkvConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
    "bert": ("BertConfig", SIZES),
}

# Their output carries a cache, but decoding with it is not what the full forward computes.
WRONG_CACHE = {
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    # This one counts padding as positions: it is another model where a prompt is padded.
    "roformer": (
        "RoFormerConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "is_decoder": True,
        },
    ),
}


# =================================================================================================
# Masks, positions, log-probs
# =================================================================================================


def test_mask_keeps_the_first_eos_and_drops_the_pads_when_pad_is_eos():
    response = torch.tensor([[5, EOS, EOS, EOS], [5, 6, 7, 8], [EOS, 5, 6, EOS]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert remax.response_mask(response, EOS).tolist() == expected


def test_column_t_is_token_t():
    model = make("gpt2")
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    logprobs = model(ids).logits.float().log_softmax(-1)
    by_hand = [logprobs[0, 1, 9], logprobs[0, 2, 10], logprobs[0, 3, 11]]
    ones = torch.ones_like(ids)
    got = remax.token_logprobs(model, ids[:, :2], ones[:, :2], ids[:, 2:], ones[:, 2:])
    assert got[0].tolist() == pytest.approx([x.item() for x in by_hand], abs=1e-5)


def test_logprobs_of_a_bf16_model_are_taken_in_float32():
    model, ids = make("gpt2").bfloat16(), torch.randint(3, 31, (4, 9))
    logits = model(ids).logits[:, 2:-1].double()
    exact = logits.log_softmax(-1).gather(2, ids[:, 3:, None])[..., 0]
    ones = torch.ones_like(ids)
    got = remax.token_logprobs(model, ids[:, :3], ones[:, :3], ids[:, 3:], ones[:, 3:])
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_logprob(family):
    model = make(family)
    torch.manual_seed(0)
    prompt, response = torch.randint(3, 31, (1, 4)), torch.randint(3, 31, (1, 5))
    pads = prompt.new_zeros(1, 3)
    ones = torch.ones_like
    alone = remax.token_logprobs(model, prompt, ones(prompt), response, ones(response))
    padded = remax.token_logprobs(
        model,
        torch.cat([pads, prompt], 1),
        torch.cat([pads, ones(prompt)], 1),
        torch.cat([response, pads], 1),
        torch.cat([ones(response), pads], 1),
    )
    assert torch.allclose(alone, padded[:, :5], atol=2e-4)
    assert padded[:, 5:].abs().sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_is_the_policy(family):
    """The log-probs of the tokens as they were drawn are those of the full forward pass."""
    model, (prompt, attention_mask) = make(family), prompts(B=6)
    torch.manual_seed(2)
    response, _, logprobs = remax.rollout(model, prompt, attention_mask, 9, EOS, PAD)
    mask = remax.response_mask(response, EOS)
    expected = remax.token_logprobs(model, prompt, attention_mask, response, mask)
    assert mask.sum() > 12
    assert torch.allclose(logprobs, expected, atol=2e-4)  # 0 after EOS


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_half_of_the_rollout_is_generate(family):
    model, (prompt, attention_mask) = make(family), prompts(B=6)
    torch.manual_seed(2)
    _, greedy, _ = remax.rollout(model, prompt, attention_mask, 9, EOS, PAD)
    expected = model.generate(
        prompt,
        attention_mask=attention_mask,
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[:, 6:]
    T = expected.size(1)
    mask = remax.response_mask(greedy, EOS)
    assert torch.equal(greedy[:, :T] * mask[:, :T], expected * mask[:, :T])
    assert (greedy[mask == 0] == PAD).all()  # padding after EOS


def test_rollout_without_left_padding():
    model, (prompt, attention_mask) = make("gpt2"), prompts(B=6)
    prompt, attention_mask = prompt.masked_fill(attention_mask == 0, 9), attention_mask * 0 + 1
    response, _, logprobs = remax.rollout(model, prompt, attention_mask, 9, EOS, PAD)
    mask = remax.response_mask(response, EOS)
    expected = remax.token_logprobs(model, prompt, attention_mask, response, mask)
    assert torch.allclose(logprobs, expected, atol=2e-4)


@pytest.mark.parametrize("family", WITHOUT_CACHE)
def test_a_model_that_keeps_no_cache_is_refused_by_name(family):
    model = make(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__} keeps no cache"):
        remax.rollout(model, *prompts(), 3, EOS, PAD)


def test_prompts_padded_on_the_right_are_refused():
    prompt, attention_mask = prompts()
    with pytest.raises(ValueError, match="padded on the left"):
        remax.rollout(make("gpt2"), prompt, attention_mask.flip(1), 3, EOS, PAD)


def test_rollout_draws_from_the_full_softmax():
    """20,000 first tokens against the model's own probabilities: chi-square, 96 degrees."""
    model, prompt = make("gpt2", vocab_size=97), torch.full((20_000, 1), 5)
    model.lm_head.weight.data *= 0.3  # no token so rare that the test is none
    torch.manual_seed(0)
    ones = torch.ones_like(prompt)
    response, _, _ = remax.rollout(model, prompt, ones, 1, EOS, PAD)
    expected = model(prompt[:1]).logits[0, -1].softmax(-1) * 20_000
    count = response[:, 0].bincount(minlength=97)
    assert expected.min() > 5
    assert ((count - expected) ** 2 / expected).sum().item() < 160  # the 99.99 % quantile


def test_rollout_stops_early():
    model, (prompt, attention_mask) = make("gpt2"), prompts(B=3)
    model.lm_head.weight.data[EOS] = model.lm_head.weight.data.abs().sum()  # EOS at once
    model.transformer.ln_f.bias.data.fill_(1.0)
    with recorded_logits(model) as seen:
        response, greedy, _ = remax.rollout(model, prompt, attention_mask, 40, EOS, PAD)
    assert response.tolist() == greedy.tolist() == [[EOS]] * 3
    assert len(seen) == 1


def test_a_poisoned_generation_config_does_not_leak():
    clean, poisoned = make("gpt2"), make("gpt2")
    poisoned.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        min_new_tokens=9,
        max_length=3,
    )
    torch.manual_seed(0)
    expected = remax.rollout(clean, *prompts(), 9, EOS, PAD)
    torch.manual_seed(0)
    got = remax.rollout(poisoned, *prompts(), 9, EOS, PAD)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_policy_has_no_noise_and_trains_with_checkpointing(family, tmp_path):
    """What train() mode computes is what eval() mode computes, and it has gradients."""
    model = make(family)
    loud_config(model.config)
    model.save_pretrained(tmp_path)
    flags = ["--model", tmp_path, "--max-prompt-tokens", 6, "--max-new-tokens", 9]
    policy = remax.load_policy(remax.parse_args([*map(str, flags)]))
    prompt, attention_mask = prompts()
    response = torch.randint(3, 31, (4, 5), generator=torch.Generator().manual_seed(0))
    inputs = prompt, attention_mask, response, torch.ones_like(response)
    expected = remax.token_logprobs(policy.eval(), *inputs)
    got = remax.token_logprobs(policy.train(), *inputs)
    assert torch.allclose(got, expected, atol=2e-4)
    got.sum().backward()
    assert flat_grad(policy).norm() > 0


def loud_config(config):
    """Turn every dropout and jitter of a config up, in the configs inside it too."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            loud_config(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.5)


# =================================================================================================
# The step
# =================================================================================================


def test_a_price_of_kl_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        step(make("gpt2"), reference=None, kl_coef=0.1)


def test_kl_is_zero_at_the_first_step_and_has_the_right_sign_later():
    assert step(make("gpt2"), make("gpt2"))["kl"] == 0.0
    # A policy's own samples are likelier under it than under another model.
    assert step(make("gpt2"), make("gpt2", seed=1))["kl"] > 0.1


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batch_size_does_not_change_the_gradient(size):
    """Micro-batches of unequal sizes, with responses of several lengths: the same gradient."""
    gradients = []
    for micro_batch_size in (8, size):
        policy, reference = make("gpt2", vocab_size=7), make("gpt2", vocab_size=7, seed=1)
        before = weights(policy)
        metrics = step(policy, reference, B=8, micro_batch_size=micro_batch_size)
        gradients.append(before - weights(policy))
    assert metrics["tokens"] < 7
    assert error(*gradients) < 1e-5


class StepByHand(NamedTuple):
    """A step put together from the public functions."""

    response: torch.Tensor  # (B,T)
    mask: torch.Tensor  # (B,T)
    logprobs: torch.Tensor  # (B,T)
    ref_logprobs: torch.Tensor  # (B,T)
    reward: torch.Tensor  # (B,)
    baseline: torch.Tensor  # (B,)
    loss: torch.Tensor  # a scalar
    gradient: torch.Tensor  # of all weights, as one vector


@pytest.fixture(scope="module")
def step_by_hand():
    """What step(policy, reference, B=8) should do."""
    policy, reference = make("gpt2", vocab_size=7), make("gpt2", vocab_size=7, seed=1)
    prompt, attention_mask = prompts(8, vocab_size=7)
    torch.manual_seed(5)
    response, greedy, _ = remax.rollout(policy, prompt, attention_mask, 7, EOS, PAD)
    mask = remax.response_mask(response, EOS)
    assert mask.sum(1).unique().numel() > 1  # rows of several lengths, or errors would not show
    inputs = prompt, attention_mask, response, mask
    logprobs = remax.token_logprobs(policy, *inputs)
    ref_logprobs = remax.token_logprobs(reference, *inputs).detach()
    reward, baseline = mean_token(response), mean_token(greedy)
    loss = remax.remax_loss(logprobs, ref_logprobs, mask, reward, baseline, 0.1)
    loss.backward()
    return StepByHand(
        response,
        mask,
        logprobs.detach(),
        ref_logprobs,
        reward,
        baseline,
        loss.detach(),
        flat_grad(policy),
    )


def test_the_update_is_the_gradient_of_remax_loss_on_the_whole_batch(step_by_hand):
    policy = make("gpt2", vocab_size=7)
    before = weights(policy)
    step(policy, make("gpt2", vocab_size=7, seed=1), B=8)
    assert error(before - weights(policy), step_by_hand.gradient) < 1e-4


def test_the_figures_are_what_they_say(step_by_hand):
    hand = step_by_hand
    metrics = step(make("gpt2", vocab_size=7), make("gpt2", vocab_size=7, seed=1), B=8)
    expected = {
        "reward": hand.reward.mean(),
        "greedy_reward": hand.baseline.mean(),
        "advantage": (hand.reward - hand.baseline).mean(),
        "kl": (hand.logprobs - hand.ref_logprobs).sum(1).mean(),
        "entropy": -hand.logprobs.sum() / hand.mask.sum(),
        "tokens": hand.mask.sum() / len(hand.mask),
        "eos": (hand.response == EOS).any(1).float().mean(),
        "loss": hand.loss,
        "grad_norm": hand.gradient.norm(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_sampling_logp_difference_is_zero_for_a_true_sampler_and_shows_a_wrong_one(monkeypatch):
    assert step(make("gpt2"))["sampling_logp_difference"] < 1e-5
    rollout = remax.rollout

    def tempered(policy, *args):
        policy.lm_head.weight.data *= 0.5
        result = rollout(policy, *args)
        policy.lm_head.weight.data *= 2
        return result

    policy = make("gpt2")
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())
    monkeypatch.setattr(remax, "rollout", tempered)
    assert step(policy)["sampling_logp_difference"] > 0.02


def test_a_non_finite_gradient_is_skipped_and_counted():
    policy = make("gpt2")
    before = weights(policy)

    def nan(responses):
        return torch.full((len(responses),), float("nan"))

    assert step(policy, reward=nan)["skipped"] == 1
    assert torch.equal(before, weights(policy))


def test_rewards_as_a_column_are_refused():
    """As a classifier of one label returns them: (2B,1) would be broadcast to a wrong loss."""
    with pytest.raises(ValueError, match=r"8 rewards, not the shape \[8, 1\]"):
        step(make("gpt2"), reward=lambda responses: mean_token(responses)[:, None])


def test_whole_numbers_and_rewards_with_a_gradient_train_alike():
    """Unsigned numbers would wrap: 0 - 1 = 255."""
    weight = torch.ones((), requires_grad=True)

    def floats(responses):  # 0 for the sampled ones, 1 for the greedy ones
        return torch.arange(len(responses)).ge(len(responses) / 2).float()

    changes = {
        "floats": floats,
        "bytes": lambda responses: floats(responses).to(torch.uint8),
        "with a gradient": lambda responses: floats(responses) * weight,
    }
    found = []
    for reward in changes.values():
        policy = make("gpt2")
        step(policy, reward=reward)
        found.append(weights(policy))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert weight.grad is None


def test_gradients_left_over_from_before_do_not_count():
    fresh, used = make("gpt2"), make("gpt2")
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(fresh)
    step(used)
    assert torch.equal(weights(fresh), weights(used))


def test_frozen_weights_get_no_gradient_under_torchrun(monkeypatch):
    """Zeros would do: weight decay moves what has a gradient."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(remax, "average_in_place", lambda tensor: None)
    policy = make("gpt2")
    policy.transformer.wte.requires_grad_(False)
    remax.average_gradients(policy)
    assert policy.transformer.wte.weight.grad is None
    assert policy.transformer.ln_f.weight.grad is not None


def test_equal_rewards_give_no_gradient_and_are_counted():
    policy = make("gpt2")
    before = weights(policy)

    def one(responses):
        return torch.ones(len(responses))

    metrics = step(policy, reward=one)
    assert torch.equal(before, weights(policy))
    assert metrics["zero_advantage"] == 1
    assert metrics["advantage"] == 0


def test_baseline_comes_from_the_greedy_rows_of_one_call():
    calls = []

    def reward(responses):
        calls.append(responses)
        return torch.arange(len(responses)).float()

    metrics = step(make("gpt2"), reward=reward)
    policy = make("gpt2")
    torch.manual_seed(5)
    response, greedy, _ = remax.rollout(policy, *prompts(), 7, EOS, PAD)
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.cat([response, greedy]))
    assert metrics["reward"] == 1.5
    assert metrics["greedy_reward"] == 5.5
    assert metrics["advantage"] == -4


def test_without_the_greedy_baseline_it_is_zero_and_the_greedy_reward_is_logged_all_the_same():
    def reward(responses):
        return torch.arange(len(responses)).float()

    metrics = step(make("gpt2"), reward=reward, greedy_baseline=False)
    assert metrics["greedy_reward"] == 5.5
    assert metrics["advantage"] == metrics["reward"] == 1.5


def test_checkpointing_changes_no_update():
    results = []
    for policy in make("gpt2"), checkpointing(make("gpt2")):
        step(policy, make("gpt2", seed=1))  # it leaves the policy in train() mode
        metrics = step(policy, make("gpt2", seed=1))
        results.append((metrics["reward"], weights(policy)))
    assert results[0][0] == results[1][0]
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_checkpointing_recomputes_the_layers_in_the_backward_pass():
    """Each layer runs twice a micro-batch in the update, and once a token in the rollout."""
    policy = checkpointing(make("gpt2"))
    calls = []

    def count(module, args, output):
        calls.append(policy.training)

    policy.transformer.h[0].ln_1.register_forward_hook(count)
    step(policy, micro_batch_size=2)  # two micro-batches
    assert calls.count(True) == 4


def test_bf16_computes_the_update_in_bf16():
    policy = make("gpt2")
    seen = []

    def record(module, args, output):
        seen.append((policy.training, output.dtype))

    policy.transformer.h[0].attn.c_proj.register_forward_hook(record)
    step(policy, dtype=torch.bfloat16)
    assert set(seen) == {(False, torch.bfloat16), (True, torch.bfloat16)}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_weights_as_gives_the_own_weights_back():
    model = make("gpt2")
    before, places = weights(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyError), remax.weights_as(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        raise KeyError
    assert torch.equal(before, weights(model))
    assert places == [p.data_ptr() for p in model.parameters()]


# =================================================================================================
# Memory and precision
# =================================================================================================


def tiny_args(*flags):
    return remax.parse_args([*map(str, flags)])


def test_offloaded_models_change_nothing(small, tmp_path):
    go(small, tmp_path / "a", "--steps", 4)
    go(small, tmp_path / "b", "--steps", 4, "--offload")
    same_run(tmp_path / "a", tmp_path / "b")


def test_an_offloaded_model_is_on_the_device_for_its_own_work_alone():
    class Frozen(torch.nn.Linear):
        def to(self, device):
            moves.append(str(device))

    moves = []
    with remax.on_device(Frozen(2, 2), torch.device("meta")):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]


def test_other_flags_learn_too(tmp_path):
    flags = ["--optimizer", "adafactor", "--lr", "5e-3", "--gradient-checkpointing"]
    flags += ["--micro-batch-size", "4", "--steps", "6", "--eval-every", "6"]
    remax.main([*flags, "--output-dir", str(tmp_path)])
    rows = read_metrics(tmp_path)
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.05
    assert abs(rows[1]["kl"]) < 0.1


def test_a_run_in_bf16_computes_nearly_the_same_and_saves_float32(small, tmp_path):
    """Few steps of little work: not every CPU knows bfloat16."""
    for precision in "fp32", "bf16":
        go(small, tmp_path / precision, "--steps", 2, "--precision", precision)
    whole, half = (read_metrics(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert 0 < abs(half[1]["kl"]) < 0.1
    assert 0 < half[1]["sampling_logp_difference"] < 0.1
    assert half[1]["reward"] == pytest.approx(whole[1]["reward"], abs=0.2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16/model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(
        weights(model), weights(AutoModelForCausalLM.from_pretrained(TINY / "policy"))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_rests_in_the_dtype_asked_for(dtype):
    reference = remax.load_reference(tiny_args(), dtype)
    assert {p.dtype for p in reference.parameters()} == {dtype}
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training


def test_the_reward_model_rests_in_the_dtype_asked_for():
    reward = remax.load_reward_function(tiny_args(), torch.bfloat16, CPU)
    assert {p.dtype for p in reward.model.parameters()} == {torch.bfloat16}
    assert not reward.model.training


@pytest.fixture
def gpu(monkeypatch):
    """For the tests that need one: they are skipped where there is none."""
    if not HAS_CUDA:
        pytest.skip("no CUDA device")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


cuda = pytest.mark.usefixtures("gpu")


def gpu_step(dtype, policy=None, scale=1024.0):
    """The metrics of a step on the GPU, and the change of the weights."""
    policy = (policy or make("gpt2")).cuda()
    scaler = torch.amp.GradScaler("cuda", scale, enabled=dtype == torch.float16)
    before = weights(policy)
    reference = make("gpt2").cuda().to(dtype)
    metrics = step(policy, reference, lr=1e-2, device="cuda", scaler=scaler, dtype=dtype)
    return metrics, weights(policy) - before


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_step_in_every_precision(dtype):
    metrics, change = gpu_step(dtype)
    assert change.abs().max() > 0
    assert metrics["skipped"] == 0
    assert abs(metrics["kl"]) < (1e-4 if dtype == torch.float32 else 0.3)


@cuda
def test_cuda_fp16_overflow_skips_the_step_and_counts_it():
    metrics, change = gpu_step(torch.float16, scale=2.0**60)
    assert change.abs().max() == 0
    assert metrics["skipped"] == 1


@cuda
def test_cuda_gradient_checkpointing_changes_no_update():
    _, plain = gpu_step(torch.float32)
    _, recomputed = gpu_step(torch.float32, checkpointing(make("gpt2")))
    assert error(plain, recomputed) < 1e-3


@cuda
def test_cuda_gradients_of_padded_rows_are_finite():
    """With cuDNN's attention they are not, on an H100: at 192 tokens, with a mask, in 16 bits."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as Run does
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=128, vocab_size=31)
    policy = AutoModelForCausalLM.from_config(config).cuda()
    prompt = torch.full((4, 64), 5, device="cuda")
    attention_mask = torch.ones_like(prompt)
    attention_mask[::2, :8] = 0
    response = torch.full((4, 128), 6, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        inputs = prompt, attention_mask, response, torch.ones_like(response)
        remax.token_logprobs(policy, *inputs).sum().backward()
    assert flat_grad(policy).isfinite().all()


@cuda
def test_cuda_peak_memory_stays_in_its_budget_and_offload_lowers_it(tmp_path):
    peaks = []
    for flag in "--no-offload", "--offload":
        folder = tmp_path / flag
        remax.main(["--steps", "2", "--device", "cuda", "--output-dir", str(folder), flag])
        peaks.append(read_metrics(folder)[-2]["peak_memory_gb"])
    assert peaks[1] < peaks[0] < 0.3  # 0.9M parameters at 16 bytes, and rollouts of 64 rows


@cuda
def test_cuda_resumes_and_runs_under_torchrun(tmp_path):
    """As far as one GPU goes: the gradients by nccl, the numbers of signals by gloo."""
    flags = ["--steps", "2", "--save-every", "1", "--output-dir", str(tmp_path / "run")]
    command = [*TORCHRUN, "--nproc-per-node", "1", remax.__file__, *flags]
    assert subprocess.run(command, timeout=120).returncode == 0
    remax.main([*flags, "--steps", "3", "--resume"])
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "reward" in row] == [1, 2, 3]


# =================================================================================================
# Helpers for whole runs
# =================================================================================================


def start_shell(*args, **env):
    """remax.py as a person runs it: the process."""
    return subprocess.Popen(
        [sys.executable, remax.__file__, *map(str, args)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | env,
    )


def finished(process):
    """The process, ended, with what it said."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# To import everything takes a process some seconds. Those of the tests are forked from one that
# has done it.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        __name__,
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.distilbert.modeling_distilbert",
    ]
)


def main_in_a_child(flags, files, folder, encoding, file_limit):
    for kind in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(kind, signal.SIG_DFL)  # even if the tests were started under nohup
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    remax.main(flags)


def join(process):
    """Wait for a process. One that hangs is killed: Python would wait for it when pytest ends."""
    process.join(timeout=60)
    hangs = process.is_alive()
    process.kill()
    assert not hangs, "it hangs"


class Child:
    """A run of remax.py in a process of its own."""

    def __init__(self, *flags, folder=ROOT, encoding="utf-8", file_limit=None):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        args = [*map(str, flags)], self.files, folder, encoding, file_limit
        self.process = FORKSERVER.Process(target=main_in_a_child, args=args)
        self.process.start()

    def is_alive(self):
        return self.process.is_alive()

    def send(self, kind):
        os.kill(self.process.pid, kind)

    def wait(self):
        """Itself, ended: its exit code and what it said."""
        join(self.process)
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = (file.read_text() for file in self.files)
        return self


def run_in_a_child(target, *args):
    process = FORKSERVER.Process(target=target, args=args)
    process.start()
    join(process)
    assert process.exitcode == 0


def answer(capsys, *args):
    """What remax.py says last on standard error, and its exit code; in this process, for speed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        remax.main([*map(str, args)])
    said = [line for line in capsys.readouterr().err.split("\n") if line.strip()]
    code = stop.value.code
    del stop  # and with its traceback the run, which holds the lock of its folder
    gc.collect()
    if isinstance(code, str):  # the interpreter prints it and exits with 1
        return 1, said + code.split("\n")
    return code, said


def read_metrics(folder):
    return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]


def without_seconds(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def same_run(a, b):
    """Two runs' metrics but for seconds, and their weights, are equal to the bit."""
    assert without_seconds(read_metrics(a)) == without_seconds(read_metrics(b))
    name = "model/model.safetensors"
    assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run of little work a step: short responses to few prompts."""
    path = tmp_path_factory.mktemp("small") / "prompts.jsonl"
    lines = (TINY / "prompts.jsonl").read_text().splitlines()[:30]
    path.write_text("\n".join(lines))
    flags = ["--prompts", path, "--batch-size", 8, "--max-new-tokens", 12]
    return [*flags, "--eval-every", 4, "--save-every", 2]


def go(flags, folder, *more):
    remax.main([*map(str, flags), "--output-dir", str(folder), *map(str, more)])


# =================================================================================================
# Prompts and rewards
# =================================================================================================


@pytest.fixture(scope="module")
def tokenizer():
    return remax.load_policy_tokenizer(tiny_args())


def load(path, tokenizer, *flags):
    """The training and the held-out rows of a file."""
    return remax.load_prompts(tiny_args("--prompts", path, "--batch-size", 1, *flags), tokenizer)


def score(reward, tokenizer, rows, responses, *flags):
    return remax.score_responses(tiny_args(*flags), reward, tokenizer, rows, responses)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "policy", chat_template=TEMPLATE)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_every_kind_of_prompt_file(tokenizer, tmp_path, suffix):
    texts = [f"{i} film plots were told to us" for i in range(20)]
    data = datasets.Dataset.from_dict({"prompt": texts, "answer": list(range(20))})
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(texts))
    else:
        data = data.to_pandas()
        write = {
            "json": lambda: data.to_json(path, orient="records"),
            "jsonl": lambda: data.to_json(path, orient="records", lines=True),
            "csv": lambda: data.to_csv(path, index=False),
            "tsv": lambda: data.to_csv(path, index=False, sep="\t"),
            "parquet": lambda: data.to_parquet(path),
        }
        write[suffix]()
    rows, held_out = load(path, tokenizer, "--max-prompt-tokens", 5)
    assert (len(rows), len(held_out)) == (16, 4)
    for row in rows:  # plain text is cut to its first tokens, and the reward sees the same
        assert len(row.prompt_ids) == 5
        assert row.reward_prompt == tokenizer.decode(row.prompt_ids)
        if suffix != "txt":
            assert row.prompt_text.split()[0] == str(row.columns["answer"])


def test_prompts_of_any_alphabet_with_a_byte_order_mark_and_blank_lines(tokenizer, tmp_path):
    lines = [json.dumps({"prompt": f"Фильм {i} был 映画"}, ensure_ascii=False) for i in range(10)]
    path = tmp_path / "p.jsonl"
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    rows, held_out = load(path, tokenizer)
    assert len(rows) + len(held_out) == 10
    assert all("Фильм" in row.prompt_text for row in rows)


def test_chat_prompts_go_through_the_template_once(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )  # like Llama's, it puts BOS before a text
    contents = ["The plot" * (41 if i == 3 else 1) for i in range(10)]
    lines = [{"chat": [{"role": "user", "content": text}]} for text in contents]
    path = write_jsonl(tmp_path / "chat.jsonl", lines)
    rows, held_out = load(path, tokenizer, "--prompt-column", "chat", "--max-prompt-tokens", 60)
    assert len(rows) + len(held_out) == 9  # the long one is left out, not cut
    for row in rows:
        text = tokenizer.decode(row.prompt_ids)
        assert text == "<|endoftext|>[user] The plot<|endoftext|>\n[assistant]"


def test_the_reward_of_a_chat_gets_messages(tmp_path):
    tokenizer = chat_tokenizer()
    chats = [[{"role": "user", "content": f"The plot {i}"}] for i in range(10)]
    path = write_jsonl(
        tmp_path / "chat.jsonl", [{"prompt": chat, "n": n} for n, chat in enumerate(chats)]
    )
    rows, _ = load(path, tokenizer)
    seen = {}

    def reward(prompts, completions, n, **kwargs):
        seen.update(prompts=prompts, completions=completions, n=n)
        return [0.0] * len(n)

    score(reward, tokenizer, rows[:2] * 2, torch.full((4, 3), 5))
    assert seen["prompts"][0] == chats[seen["n"][0]]
    assert seen["n"][:2] == seen["n"][2:]
    assert seen["completions"][0][0]["role"] == "assistant"


def test_reward_columns_stay_aligned_with_rows(tokenizer, tmp_path):
    lines = [{"prompt": f"The plot {i}", "answer": i} for i in range(20)]
    rows, _ = load(write_jsonl(tmp_path / "p.jsonl", lines), tokenizer)

    def reward(prompts, completions, answer, **kwargs):
        assert prompts == [f"The plot {a}" for a in answer]
        assert completions == [" was brilliant."] * 8
        return answer

    ids = torch.tensor(tokenizer([" was brilliant."])["input_ids"]).repeat(8, 1)
    rewards = score(reward, tokenizer, rows[:4] * 2, ids)
    assert rewards.tolist() == [row.columns["answer"] for row in rows[:4]] * 2


def test_the_greedy_half_gets_the_same_prompts_in_steps_and_evaluations(small, tmp_path):
    (tmp_path / "halves.py").write_text(
        "def f(prompts, **k):\n"
        "    half = len(prompts) // 2\n"
        "    assert prompts[:half] == prompts[half:] and len(set(prompts)) > 1\n"
        "    return [float(i < half) for i in range(len(prompts))]"
    )
    go([*small, "--reward", f"{tmp_path}/halves.py:f"], tmp_path / "run", "--steps", 1)
    evaluation, step, _ = read_metrics(tmp_path / "run")
    assert (step["reward"], step["greedy_reward"]) == (1, 0)
    assert (evaluation["eval_reward"], evaluation["eval_greedy_reward"]) == (1, 0)


def test_reward_model_ignores_padding_and_reads_the_last_label():
    reward = remax.RewardModel(str(TINY / "reward"), torch.float32, CPU)
    prompts = ["The plot", "The music of this western"]
    completions = [" was superb.", " put me to sleep. I hated it, and I left the cinema angry."]
    together = reward(prompts, completions)
    alone = [reward([p], [c]).item() for p, c in zip(prompts, completions, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)
    assert alone[0] > 0.9 > 0.1 > alone[1]


@pytest.mark.parametrize("labels", [1, 3])
def test_reward_of_a_gpt2_classifier(tmp_path, labels):
    """No pad token, so pad is EOS; one label is its logit, several the last one's probability."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=700, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=labels
    )
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "policy")
    tokenizer.save_pretrained(tmp_path)
    reward = remax.RewardModel(str(tmp_path), torch.float32, CPU)
    texts = ["The plot was superb.", "It was dreadful and the cast put me to sleep."]
    for text, value in zip(texts, reward(["", ""], texts), strict=True):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = logits[0] if labels == 1 else logits.softmax(0)[-1]
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_is_masked_whatever_inputs_a_tokenizer_names(tmp_path):
    """Some name input_ids alone, and return no attention_mask unless they are asked."""
    shutil.copytree(TINY / "reward", tmp_path / "reward")
    path = tmp_path / "reward/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids"]}))
    prompts, completions = ["The plot", "The film"], [" was superb.", " put me to sleep. I left."]
    expected = remax.RewardModel(str(TINY / "reward"), torch.float32, CPU)(prompts, completions)
    found = remax.RewardModel(str(tmp_path / "reward"), torch.float32, CPU)(prompts, completions)
    assert torch.equal(found, expected)
    tokenizer = remax.load_policy_tokenizer(tiny_args())
    tokenizer.model_input_names = ["input_ids"]
    rows = [remax.PromptRow([5] * n, "", False, "", {}) for n in (1, 3)]
    assert remax.collate(tokenizer, rows, CPU)[1].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_reward_model_without_a_largest_position_reads_whole_texts(tmp_path):
    """Such as Bloom, which has none. GPT-2 has 64 here: it reads the end of a text."""
    sizes = {"vocab_size": 700, "hidden_size": 16, "n_layer": 1, "n_head": 2, "num_labels": 1}
    configs = {
        "gpt2": transformers.GPT2Config(**sizes, n_positions=64),
        "bloom": transformers.BloomConfig(**sizes),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(TINY / "policy")
        tokenizer.model_max_length = int(1e30)  # it names no limit either
        tokenizer.save_pretrained(tmp_path / name)
        reward = remax.RewardModel(str(tmp_path / name), torch.float32, CPU)
        long = " was warm" * 600
        one, other = reward(["The plot", "It is a bad film"], [long, long]).tolist()
        assert (one == other) == (name == "gpt2")


ROWS = [remax.PromptRow([5], "a", False, "a", {})] * 2


@pytest.mark.parametrize(
    "rewards",
    [[1.0], [1.0, float("nan")], [1.0, float("inf")], ["good", "bad"], None, [[1.0], [2.0]]],
)
def test_unusable_rewards_stop_the_run_before_the_update(tokenizer, rewards):
    with pytest.raises(remax.BadInput) as error:
        score(lambda **kwargs: rewards, tokenizer, ROWS, torch.full((2, 3), 5))
    assert error.value.flags == ("reward",)


def test_missing_eos_penalty_is_taken_off_sampled_and_greedy_rows_alike(tokenizer):
    eos = tokenizer.eos_token_id
    responses = torch.tensor([[7, 8, 9], [7, eos, 0], [7, 8, 9], [eos, 0, 0]])

    def one(prompts, **kwargs):
        return [1.0] * len(prompts)

    rewards = score(one, tokenizer, ROWS * 2, responses, "--missing-eos-penalty", 0.25)
    assert rewards.tolist() == [0.75, 1.0, 0.75, 1.0]


# =================================================================================================
# Whole runs
# =================================================================================================

STEP_COLUMNS = [
    *("step", "reward", "greedy_reward", "advantage", "zero_advantage", "kl", "entropy"),
    *("tokens", "eos", "sampling_logp_difference", "loss", "lr", "grad_norm", "skipped"),
    *("rollout_seconds", "score_seconds", "update_seconds", "peak_memory_gb"),
]
EVALUATION_COLUMNS = ["step", "eval_reward", "eval_greedy_reward", "eval_kl"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    remax.main(["--output-dir", str(folder), "--steps", "14", "--eval-every", "7"])
    return folder


def test_tiny_world_learns(tiny_run):
    rows = read_metrics(tiny_run)
    evaluations = [row for row in rows if "eval_reward" in row]
    assert [row["step"] for row in evaluations] == [0, 7, 14]
    assert 0.35 < evaluations[0]["eval_reward"] < 0.65
    assert evaluations[-1]["eval_reward"] > 0.85
    assert evaluations[0]["eval_kl"] == 0
    assert 0.1 < evaluations[-1]["eval_kl"] < 5


def test_metrics_have_their_columns_and_sane_values(tiny_run):
    rows = read_metrics(tiny_run)
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == list(range(1, 15))
    assert steps[0]["kl"] == 0
    assert steps[-1]["kl"] > 0.1
    for row in rows:
        assert sorted(row) == sorted(STEP_COLUMNS if "reward" in row else EVALUATION_COLUMNS)
    for row in steps:
        assert 0 < row["tokens"] <= 40
        assert 0 <= row["eos"] <= 1
        assert row["entropy"] > 0
        assert row["sampling_logp_difference"] < 1e-4


def test_saved_model_is_the_checkpoint_but_for_its_weights(tiny_run):
    original, saved = TINY / "policy", tiny_run / "model"
    for name in "config.json", "generation_config.json":
        before, after = (json.loads((folder / name).read_text()) for folder in (original, saved))
        assert before | {"transformers_version": ""} == after | {"transformers_version": ""}, name
    assert json.loads((saved / "config.json").read_text())["resid_pdrop"] == 0.1
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (original, saved))
    assert not torch.equal(weights(before), weights(after))


def with_added_token(folder, token, **tokenizer_settings):
    """A copy of the tiny policy whose tokenizer has one more special token."""
    shutil.copytree(TINY / "policy", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    for name, value in tokenizer_settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return len(tokenizer) - 1


@pytest.mark.parametrize("by_flag", [True, False])
def test_the_saved_model_stops_at_the_eos_that_it_was_trained_with(by_flag, small, tmp_path):
    """Named by --eos-token, or by the tokenizer where generation_config.json names another one."""
    settings = {} if by_flag else {"eos_token": "<end>"}
    eos_id = with_added_token(tmp_path / "policy", "<end>", **settings)
    flags = [*small, "--model", tmp_path / "policy", "--reward", TINY / "reward", "--steps", 1]
    go(flags, tmp_path / "run", *(["--eos-token", "<end>"] if by_flag else []))
    saved = tmp_path / "run/model"
    assert AutoTokenizer.from_pretrained(saved).eos_token == "<end>"
    policy = AutoModelForCausalLM.from_pretrained(saved)
    assert policy.config.eos_token_id == policy.generation_config.eos_token_id == eos_id


def test_an_ordinary_token_as_eos_stays_ordinary_in_the_saved_tokenizer(small, tmp_path):
    """Saved as the tokenizer's EOS it would be split off from words, and not be decoded."""
    go([*small, "--eos-token", "."], tmp_path / "run", "--steps", 1)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    original = AutoTokenizer.from_pretrained(TINY / "policy")
    ids = original("The plot was warm. It was 3.5 hours").input_ids
    assert saved("The plot was warm. It was 3.5 hours").input_ids == ids
    assert saved.decode(ids, skip_special_tokens=True) == original.decode(ids)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert policy.generation_config.eos_token_id == 14


def test_of_several_eos_the_saved_model_keeps_the_one_that_training_stopped_at(small, tmp_path):
    """Llama 3 names several in generation_config.json. At the others training goes on."""
    shutil.copytree(TINY / "policy", tmp_path / "policy")
    path = tmp_path / "policy/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [14, 0]}))
    flags = [*small, "--model", tmp_path / "policy", "--reward", TINY / "reward", "--steps", 1]
    go(flags, tmp_path / "run")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert policy.generation_config.eos_token_id == 0


def test_of_a_model_that_sees_images_the_language_model_is_trained_and_saved(tmp_path, capsys):
    options = FAMILIES["qwen3_5_nested"][1]
    text_config = options["text_config"] | {"vocab_size": 700, "tie_word_embeddings": True}
    config = transformers.Qwen3_5Config(**options | {"text_config": text_config})
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    whole = transformers.Qwen3_5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(TINY / "policy").save_pretrained(tmp_path / "policy")
    flags = ["--model", tmp_path / "policy", "--reward", TINY / "reward", "--steps", 1]
    go([*flags, "--max-prompt-tokens", 20, "--max-new-tokens", 4], tmp_path / "run")
    assert "policy: only its language model is trained and saved" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run/model/config.json").read_text())
    assert saved["model_type"] == "qwen3_5_text"
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_saved_tokenizer_is_the_one_found(tiny_run):
    original = AutoTokenizer.from_pretrained(TINY / "policy")
    saved = AutoTokenizer.from_pretrained(tiny_run / "model")
    assert saved("The plot was") == original("The plot was")
    assert saved.pad_token is None


def test_the_same_seed_gives_the_same_metrics_and_evaluations_do_not_touch_the_noise(
    small, tmp_path
):
    for folder, every in (tmp_path / "a", 1), (tmp_path / "b", 3):
        go(small, folder, "--steps", 3, "--eval-every", every)
    a, b = (
        [row for row in without_seconds(read_metrics(tmp_path / name)) if "reward" in row]
        for name in "ab"
    )
    assert a == b


def put_into_hub_cache(cache, name, folder):
    """Put a checkpoint where from_pretrained(name) finds it without a network."""
    repository = cache / ("models--" + name.replace("/", "--"))
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(folder, target_is_directory=True)


@pytest.fixture(scope="module")
def fresh_runs(tmp_path_factory):
    """The folders and the ended processes of two runs that a person could start, side by side."""
    folder = tmp_path_factory.mktemp("fresh")
    hub, tiny, large = folder / "hub", folder / "tiny", folder / "large"
    put_into_hub_cache(hub, "gpt2-large", TINY / "policy")
    put_into_hub_cache(hub, "lvwerra/distilbert-imdb", TINY / "reward")
    flags = ["--model", "gpt2-large", "--steps", 1, "--output-dir", large]
    processes = [
        start_shell("--steps", 2, "--eval-every", 2, "--output-dir", tiny),
        start_shell(*flags, HF_HUB_CACHE=str(hub)),
    ]
    return (tiny, large), [finished(process) for process in processes]


def test_gpt2_large_by_name_from_a_local_hub_cache(fresh_runs):
    """The command the project exists for; a small stand-in answers to the name."""
    (_, folder), (_, done) = fresh_runs
    assert done.returncode == 0, done.stderr
    args = json.loads((folder / "args.json").read_text())
    assert args["reward"] == "lvwerra/distilbert-imdb"
    assert args["max_new_tokens"] == 48
    assert args["lr"] == 1e-6
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 1]


def test_reward_function_from_a_file_without_kl(tmp_path):
    path = tmp_path / "short.py"
    path.write_text("def short(completions, **kwargs):\n    return [-len(c) for c in completions]")
    flags = ["--reward", f"{path}:short", "--kl-coef", "0", "--baseline", "none", "--steps", "2"]
    remax.main([*flags, "--output-dir", str(tmp_path / "out")])
    rows = read_metrics(tmp_path / "out")
    assert rows[1]["kl"] is None
    assert rows[1]["greedy_reward"] < 0
    assert rows[1]["reward"] < 0
    assert rows[0]["eval_kl"] is None
    assert rows[0]["eval_greedy_reward"] < 0


@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_names_every_flag_its_default_and_the_tiny_world(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        remax.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for heading in "task:", "algorithm:", "memory:", "run:":
        assert f"\n{heading}\n" in said
    for name in vars(tiny_args()):
        assert "--" + name.replace("_", "-") in said
    assert "--lr 0.0006" in said
    assert "(default: 1e-06)" in said
    assert all(len(line) <= int(columns) for line in said.splitlines() if str(ROOT) not in line)


def test_the_console_of_a_run_redirected_to_a_file(fresh_runs):
    (folder, _), (done, _) = fresh_runs
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "640 prompts: 512 to train on, 128 held out"
    for part in "policy", "(0.9M parameters)", "reward", "EOS '<|endoftext|>'", "output":
        assert part in lines[1]
    assert re.fullmatch(r"step 0: held-out reward 0\.\d{3}, greedy 0\.\d{3}, KL 0", lines[2])
    samples = lines[3:12]
    assert [line.split()[0] for line in samples] == [">", "sampled", "greedy"] * 3
    assert re.fullmatch(r"step 1: reward 0\.\d{3}, greedy 0\.\d{3}, KL 0", lines[12])
    assert lines[-1] == f"the trained model is in {folder}/model"
    assert "eval_reward " in done.stdout
    assert "rollout_seconds " in done.stdout
    assert "\r" not in done.stdout


def test_a_difference_that_is_no_number_stops_the_run(small, tmp_path):
    run = remax.Run(tiny_args(*small, "--output-dir", tmp_path))
    with pytest.raises(remax.BadInput, match="sampling_logp_difference is nan"):
        run.check_sampler(math.nan, torch.float32)


@pytest.mark.parametrize("family", WRONG_CACHE)
def test_a_model_whose_cache_is_wrong_is_refused_by_name(family, tmp_path, capsys):
    AutoTokenizer.from_pretrained(TINY / "policy").save_pretrained(tmp_path / "policy")
    model = make(family, vocab_size=700)
    model.save_pretrained(tmp_path / "policy")
    flags = ["--model", tmp_path / "policy", "--prompts", TINY / "prompts.jsonl"]
    flags += ["--reward", f"{DATA}/experiments/shifted_reward.py:plus_0", "--steps", 1]
    code, said = answer(capsys, *flags, "--output-dir", tmp_path / "run")
    assert code == 1
    assert f"{type(model).__name__} computes something else" in said[-2]
    assert "--model" in said[-1]
    assert read_metrics(tmp_path / "run") == []  # before any time was spent


@pytest.mark.parametrize("right_calls", [0, 1])
def test_a_wrong_sampler_stops_the_run_before_and_in_its_first_step(
    right_calls, tmp_path, monkeypatch, capsys
):
    rollout, calls = remax.rollout, itertools.count()

    def tempered(policy, *args, **kwargs):
        factor = 0.9 if next(calls) >= right_calls else 1.0
        policy.lm_head.weight.data *= factor
        result = rollout(policy, *args, **kwargs)
        policy.lm_head.weight.data /= factor
        return result

    monkeypatch.setattr(remax, "rollout", tempered)
    code, said = answer(capsys, "--output-dir", tmp_path, "--steps", 2)
    assert code == 1
    assert "sampling_logp_difference" in said[-2]
    assert "--model" in said[-1]
    assert not (tmp_path / "checkpoint.pt").exists()


# =================================================================================================
# Resuming
# =================================================================================================


def test_killed_twelve_times_a_run_is_the_uninterrupted_one_to_the_bit(small, tmp_path):
    """kill -9 at random moments, loading and saving included; no row is lost or doubled."""
    whole = Child(*small, "--steps", 50, "--output-dir", tmp_path / "whole")
    folder, chance = tmp_path / "killed", random.Random(0)
    flags = [*small, "--steps", 50, "--output-dir", folder]
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"

    def size():
        return metrics.stat().st_size if metrics.exists() else 0

    for life in range(12):
        resume = ["--resume"] if checkpoint.exists() else []
        dies_loading = resume and life % 4 == 3
        goal = size() + chance.randrange(600)
        child = Child(*flags, *resume)
        # Otherwise it lives for some rows more, and until there is a checkpoint.
        while child.is_alive() and not dies_loading:
            if checkpoint.exists() and size() > goal:
                break
            time.sleep(0.002)
        time.sleep(chance.random() * (0.5 if dies_loading else 0.1))
        child.send(signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL, child.stderr
    last = Child(*flags, "--resume").wait()
    assert last.returncode == 0, last.stderr
    assert whole.wait().returncode == 0
    same_run(tmp_path / "whole", folder)


def start(flags, folder, steps=80):
    """A run in a process of its own, some steps under way."""
    child = Child(*flags, "--steps", steps, "--output-dir", folder)
    wait_for_rows(child.is_alive, folder)
    return child


def wait_for_rows(is_alive, folder):
    metrics = folder / "metrics.jsonl"
    while is_alive() and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.01)


@pytest.mark.parametrize(
    "kind, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stop_signal_saves_and_says_how_to_resume_and_loses_nothing(small, tmp_path, kind, code):
    flags = [*small, "--save-every", 1000]
    child = start(flags, tmp_path / "cut", steps=30)
    child.send(kind)
    assert child.wait().returncode == code, child.stderr
    if kind != signal.SIGHUP:  # with the terminal gone nobody can press again
        assert child.stderr.strip() == "stopping after this step; press again to stop now, unsaved"
    assert "--resume" in child.stdout.splitlines()[-1]
    before = (tmp_path / "cut/metrics.jsonl").read_text()
    go(flags, tmp_path / "cut", "--steps", 30, "--resume")
    after = (tmp_path / "cut/metrics.jsonl").read_text()
    assert after.startswith(before)  # it went on, it did not start again
    steps = [row["step"] for row in read_metrics(tmp_path / "cut") if "reward" in row]
    assert steps == list(range(1, 31))


def test_larger_steps_extend_a_run(small, tmp_path):
    go(small, tmp_path, "--steps", 4)
    before = read_metrics(tmp_path)
    go(small, tmp_path, "--steps", 7, "--resume")
    rows = read_metrics(tmp_path)
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7]
    cosine = 0.5 * (1 + torch.tensor(6 / 7 * torch.pi).cos().item())
    assert rows[-2]["lr"] == pytest.approx(6e-4 * cosine)
    go(small, tmp_path, "--steps", 7, "--resume")  # nothing left to do: no harm either
    assert read_metrics(tmp_path) == rows


def test_rows_past_the_checkpoint_are_cut_off(small, tmp_path):
    go(small, tmp_path / "whole", "--steps", 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/model")
    with open(tmp_path / "cut/metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 5, "reward": 1.0}\n{"step": 6, "rew')
    go(small, tmp_path / "cut", "--steps", 4, "--resume")
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_checkpoints_are_written_when_asked_for(small, tmp_path, monkeypatch):
    written = []

    def save_checkpoint(path, checkpoint):
        written.append(checkpoint["step"])

    monkeypatch.setattr(remax, "save_checkpoint", save_checkpoint)
    go(small, tmp_path, "--steps", 7, "--save-every", 3)
    assert written == [3, 6, 7]  # and none of untouched weights at step 0


@pytest.fixture(scope="module")
def two_steps(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    go(small, folder, "--steps", 2)
    return folder


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 2", "holds a run: --resume continues it, another --output-dir starts a new"),
        ("--steps 2 --resume --lr 1e-5", "--lr is 1e-05, but the run was made with 0.0006"),
        ("--steps 1 --resume", "--steps is 1, but the run was made with 2"),
        (
            "--steps 2 --resume --baseline none",
            "--baseline is none, but the run was made with greedy",
        ),
        ("--steps 2 --resume --seed 1", "--seed is 1, but the run was made with 0"),
        (  # the run's own --precision auto was float32 on its CPU
            "--steps 2 --resume --precision bf16",
            "--precision is torch.bfloat16, but the run was made with torch.float32",
        ),
    ],
)
def test_a_run_is_neither_overwritten_nor_resumed_as_another(
    small, two_steps, flags, words, capsys
):
    before = (two_steps / "metrics.jsonl").read_bytes()
    code, said = answer(capsys, *small, "--output-dir", two_steps, *flags.split())
    assert code == 1
    assert words in " ".join(said)
    assert len(said) <= 3
    assert (two_steps / "metrics.jsonl").read_bytes() == before


def test_flags_that_change_no_mathematics_may_change(small, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "copy")
    flags = ["--resume", "--micro-batch-size", 4, "--offload", "--save-every", 9]
    go(small, tmp_path / "copy", "--steps", 3, *flags)
    assert read_metrics(tmp_path / "copy")[-1]["step"] == 3


def test_a_checkpoint_without_its_metrics_is_a_run_too(small, two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "copy")
    (tmp_path / "copy/metrics.jsonl").unlink()
    assert answer(capsys, *small, "--output-dir", tmp_path / "copy", "--steps", 2)[0] == 1
    go(small, tmp_path / "copy", "--steps", 4, "--resume")
    assert [row["step"] for row in read_metrics(tmp_path / "copy")] == [3, 4, 4]


def test_disk_full_while_saving_keeps_the_old_checkpoint_and_says_so(
    small, tmp_path, capsys, monkeypatch
):
    go(small, tmp_path / "whole", "--steps", 4)
    torch_save = torch.save

    def full(checkpoint, file):
        if checkpoint["step"] == 4:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        torch_save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "full", "--steps", 4)
    assert code == 1
    assert "No space left" in said[-2]
    assert "--output-dir" in said[-1]
    monkeypatch.undo()
    go(small, tmp_path / "full", "--steps", 4, "--resume")
    same_run(tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize(
    "kind", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")]
)
def test_disk_full_at_the_last_moment(small, tmp_path, capsys, monkeypatch, kind):
    def save_pretrained(self, folder, **kwargs):
        raise kind

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_pretrained)
    code, said = answer(capsys, *small, "--output-dir", tmp_path, "--steps", 1)
    assert code == 1
    assert "No space left" in said[-2]
    monkeypatch.undo()
    go(small, tmp_path, "--steps", 1, "--resume")
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_strangers_checkpoint_runs_no_code(small, two_steps, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    shutil.copytree(two_steps, tmp_path / "copy")
    state = {"step": 2, "metrics_bytes": 0, "args": Evil()}
    torch.save(state, tmp_path / "copy/checkpoint.pt")
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "copy", "--steps", 2, "--resume")
    assert code == 1
    assert "--output-dir" in said[-1]
    assert not (tmp_path / "owned").exists()


# =================================================================================================
# Mistakes
# =================================================================================================

CHAT = [{"role": "user", "content": "Hello"}]
LONG_CHAT = [{"role": "user", "content": "The plot was " * 9}]
FILES = {  # name: content
    "unclosed.csv": 'prompt\nThe plot\n"The cast\nThe film\n' * 20,
    "broken.py": "def f(:",
    "ok.py": "x = 1",
    "few.py": "def f(**k):\n    return [1.0]",
    "words.py": "def f(prompts, **k):\n    return ['good'] * len(prompts)",
    "nan.py": "def f(prompts, **k):\n    return [float('nan')] * len(prompts)",
    "inf.py": "def f(prompts, **k):\n    return [float('inf')] * len(prompts)",
    "none.py": "def f(**k):\n    pass",
    "memory.py": (
        "import torch\ndef f(**k):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.')"
    ),
    "some_none.py": "def f(prompts, **k):\n    return [None] * len(prompts)",
    "empty.jsonl": "",
    "named.jsonl": '{"prompt": "The plot", "completions": "was told"}\n' * 60,
    "self.jsonl": '{"prompt": "The plot", "self": "was told"}\n' * 60,
    "null_content.jsonl": '{"prompt": [{"role": "user", "content": null}]}\n' * 60,
    "parts.jsonl": '{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}\n' * 60,
    "answered.jsonl": (
        json.dumps({"prompt": [*CHAT, {"role": "assistant", "content": "Hi"}]}) + "\n"
    )
    * 60,
    "ragged.csv": "prompt\nThe plot,and more\n",
    "short.csv": "prompt,answer\nThe plot,1\nThe cast\n" * 20,
    "twice.csv": "prompt,answer,answer\n" + "The plot,1,2\n" * 60,
    "list.json": "[1, 2]",
    "roleless.jsonl": json.dumps({"prompt": CHAT}) + '\n{"prompt": [{"content": "Hello"}]}\n',
    "mixed.jsonl": '{"prompt": "The plot"}\n' + json.dumps({"prompt": CHAT}) + "\n",
    "blank.txt": "\n\n\n",
    "number.jsonl": '{"prompt": 1}\n' * 60,
    "half_an_emoji.jsonl": '{"prompt": "The plot \\ud83d"}\n' * 60,
    "null.jsonl": '{"prompt": null}\n{"prompt": "The plot"}\n' * 60,
    "broken.jsonl": '{"prompt": "The plot"}\n{"prompt": "The cast"\n',
    "broken.json": '[{"prompt": "The plot"}, {"prom',
    "header.csv": "prompt\n",
    "few.jsonl": '{"prompt": "The plot"}\n' * 20,
    "chat.jsonl": (json.dumps({"prompt": CHAT}) + "\n") * 60,
    "long.jsonl": (json.dumps({"prompt": LONG_CHAT}) + "\n") * 60,
    "afile": "",
}
MISTAKES = [  # the flags, words that the answer must have
    ("--prompts half_an_emoji.jsonl", "--prompts half_an_emoji.jsonl"),
    ("--model nosuch", "--model nosuch"),
    ("--model no/such", "--model no/such"),
    ("--model {tiny}/reward", "classifier --model"),
    ("--reward nosuch", "--reward nosuch"),
    ("--reward {tiny}/policy", "--reward classifier"),
    ("--reward nosuch.py:f", "--reward nosuch.py"),
    ("--reward ok.py:f", "--reward function f"),
    ("--reward few.py:f", "64 numbers --reward"),
    ("--reward words.py:f", "numbers --reward"),
    ("--reward nan.py:f", "nan finite --reward"),
    ("--reward inf.py:f", "inf finite --reward"),
    ("--reward none.py:f", "None --reward"),
    ("--reward some_none.py:f", "None numbers --reward"),
    ("--reward ok.py", "FILE.py:FUNCTION --reward"),
    ("--reward {tmp}/token_classifier", "classifier --reward"),
    ("--reward {tmp}/headless", "weights --reward"),
    ("--reward {tmp}/no_tokenizer", "tokenizer --reward"),
    ("--model {tmp}/missing --reward {tiny}/reward", "weights --model"),
    ("--model {tmp}/mis_sized --reward {tiny}/reward", "weights --model"),
    ("--model {tmp}/nan --reward {tiny}/reward", "finite --model"),
    ("--model {tmp}/policy_without_tokenizer", "tokenizer --model"),
    ("--model {tmp}/adapter", "adapter --model"),
    (
        "--model {tmp}/short --reward {tiny}/reward --max-prompt-tokens 9 --max-new-tokens 9",
        "embeddings --model",
    ),
    ("--eos-token nosuch", "nosuch token --eos-token"),
    ("--prompts roleless.jsonl --model {chat}", "row 2 role --prompts"),
    ("--prompts mixed.jsonl", "row 2 --prompts"),
    ("--prompts null_content.jsonl --model {chat}", "row 1 text --prompts"),
    ("--prompts parts.jsonl --model {chat}", "row 1 text --prompts"),
    ("--prompts answered.jsonl --model {chat}", "row 1 answer --prompts"),
    ("--prompts ragged.csv", "row 1 columns --prompts"),
    ("--prompts short.csv", "row 2 columns --prompts"),
    ("--prompts twice.csv", "two columns name --prompts"),
    ("--prompts unclosed.csv", "row 2 wrong --prompts"),
    ("--prompts list.json", "row 1 columns --prompts"),
    ("--prompts chat.jsonl --model {tmp}/two_ends", "<end> --eos-token"),
    ("--prompts chat.jsonl --model {tmp}/raising", "template --prompts"),
    ("--model {tmp}/mamba --reward {tiny}/reward", "MambaForCausalLM cache --model"),
    ("--model {tmp}/pad_beyond --reward {tiny}/reward", "embeddings --model"),
    ("--prompts chat.jsonl --model {tmp}/other_end", "<end> --eos-token"),
    (
        "--reward memory.py:f",
        "memory --batch-size 32 --micro-batch-size 8 --no-offload --optimizer adamw "
        "--no-gradient-checkpointing",
    ),
    ("--prompts nosuch", "--prompts nosuch"),
    ("--prompts nosuch.jsonl", "--prompts nosuch.jsonl"),
    ("--prompts empty.jsonl", "--prompts empty.jsonl"),
    ("--missing-eos-penalty 1e39 --max-new-tokens 1", "--missing-eos-penalty 1e+39"),
    ("--prompts named.jsonl", "completions rename --prompts named.jsonl"),
    ("--prompts self.jsonl", "self rename --prompts self.jsonl"),
    ("--prompts blank.txt", "0 prompts"),
    ("--prompts number.jsonl", "--prompts number.jsonl"),
    ("--prompts null.jsonl", "--prompts null.jsonl"),
    ("--prompts broken.jsonl", "line 2 --prompts broken.jsonl"),
    ("--prompts broken.json", "--prompts broken.json"),
    ("--prompts header.csv", "--prompts header.csv"),
    ("--prompts chat.jsonl", "no chat template --prompts --model"),
    ("--prompts few.jsonl", "16 prompts --batch-size 32"),
    ("--prompts afile", "--prompts afile .jsonl"),
    ("--prompt-column nosuch", "--prompt-column nosuch"),
    ("--prompts long.jsonl --model {chat} --max-prompt-tokens 9", "0 prompts"),
    ("--max-new-tokens 100", "128 positions --max-new-tokens 100 --max-prompt-tokens 64"),
    ("--device nonsense", "--device nonsense"),
    ("--device meta", "--device meta"),
    ("--device cuda", "--device cuda"),  # see on_the_cpu
    ("--baseline critic", "--baseline greedy none"),
    ("--optimizer sgd", "--optimizer adamw adafactor"),
    ("--steps two", "--steps int"),
    ("--nonsense 1", "--nonsense"),
    ("--output-dir {tmp}/afile", "--output-dir afile"),
    ("--output-dir {tmp}/afile/x", "--output-dir afile/x"),
    ("--output-dir /dev/null/x", "--output-dir /dev/null/x"),
    ("--resume", "no checkpoint to resume --output-dir"),
]
COUNTS = ["steps", "batch-size", "micro-batch-size", "max-new-tokens", "max-prompt-tokens"]
for name in [*COUNTS, "eval-every", "save-every"]:
    MISTAKES += [(f"--{name} {value}", f"--{name} above 0") for value in ("-1", "0")]
    MISTAKES += [(f"--{name} 1.5", f"--{name} int 1.5")]
for name in "lr", "max-grad-norm":
    MISTAKES += [(f"--{name} {v}", f"--{name} above 0") for v in ("-1", "0", "nan", "inf")]
for name in "kl-coef", "missing-eos-penalty":
    MISTAKES += [(f"--{name} {v}", f"--{name} below 0") for v in ("-1", "nan", "inf")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with every broken file, and a model with a chat template."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    shutil.copytree(TINY / "policy", folder / "chat")
    chat_tokenizer().save_pretrained(folder / "chat")
    write_broken_models(folder)
    return folder


def changed_copy(source, target, **config):
    """A copy of a checkpoint with some of its config.json changed."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def write_broken_models(folder):
    policy, reward = TINY / "policy", TINY / "reward"
    changed_copy(policy, folder / "missing", n_layer=5)
    changed_copy(policy, folder / "mis_sized", n_inner=200)
    changed_copy(reward, folder / "headless", n_layers=3)
    changed_copy(
        reward, folder / "token_classifier", architectures=["DistilBertForTokenClassification"]
    )
    for source, name in (policy, "policy_without_tokenizer"), (reward, "no_tokenizer"):
        for path in changed_copy(source, folder / name).glob("tokenizer*"):
            path.unlink()
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')

    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.transformer.ln_f.weight.data[3] = float("nan")
    model.save_pretrained(folder / "nan")
    tokenizer.save_pretrained(folder / "nan")
    make("gpt2", vocab_size=100).save_pretrained(folder / "short")  # fewer than the tokenizer has
    tokenizer.save_pretrained(folder / "short")
    make("mamba", vocab_size=700).save_pretrained(folder / "mamba")
    tokenizer.save_pretrained(folder / "mamba")

    # A turn that ends with another token than EOS, as Gemma 3's, or with another one and EOS, as
    # Phi 3's; and a template that refuses.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    for name, end in (
        ("other_end", "<end>"),
        ("two_ends", "<end>{{ eos_token }}"),
        ("raising", "{{ raise_exception('no') }}"),
    ):
        tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", end)
        shutil.copytree(policy, folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.chat_template = None
    tokenizer.pad_token = "<end>"  # which has no embedding
    shutil.copytree(policy, folder / "pad_beyond")
    tokenizer.save_pretrained(folder / "pad_beyond")


@pytest.mark.parametrize("flags, words", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_every_mistake_is_answered_in_words(flags, words, desk, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(desk)
    flags = flags.format(tiny=TINY, tmp=desk, chat=desk / "chat").split()
    if "--output-dir" not in flags:
        flags += ["--output-dir", str(tmp_path)]
    code, said = answer(capsys, *flags)
    assert code in (1, 2)
    assert len(said) <= 3, said
    for word in words.split():
        assert word in " ".join(said), said
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_short_run_that_skipped_every_step_fails(small, tmp_path, capsys):
    flags = ["--kl-coef", "1e39", "--steps", 2, "--save-every", 1, "--output-dir", tmp_path]
    for more in [], ["--resume"]:
        code, said = answer(capsys, *small, *flags, *more)
        assert code == 1
        assert "no finite gradient in 2 steps" in said[-2]
        assert not (tmp_path / "model").exists()


def test_a_checkpoint_with_a_flag_that_is_gone_is_refused(small, two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "run")
    path = tmp_path / "run/checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"]["gone"] = "1"
    torch.save(checkpoint, path)
    flags = ["--output-dir", tmp_path / "run", "--steps", 3, "--resume"]
    code, said = answer(capsys, *small, *flags)
    assert code == 1
    assert "--gone is None, but the run was made with 1" in said[-2]


def test_a_foreign_checkpoint_is_refused(small, tmp_path, capsys):
    torch.save({"model": 1}, tmp_path / "checkpoint.pt")
    code, said = answer(capsys, *small, "--output-dir", tmp_path, "--resume")
    assert code == 1
    assert "is no checkpoint of remax.py" in said[-2]


def test_an_empty_output_dir_is_refused(small, capsys):
    code, said = answer(capsys, *small, "--output-dir", "")
    assert code == 2
    assert "--output-dir is empty" in said[-1]


def fail_without_a_reader(flags, errors):
    """Standard output is a pipe that nobody reads, standard error a file."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    try:
        remax.main(flags)
    except SystemExit as stop:
        print(stop, file=sys.stderr, flush=True)


def test_a_mistake_is_answered_though_nobody_reads_the_output(tmp_path):
    (tmp_path / "nan.py").write_text(
        "def f(completions, **kwargs):\n    return [float('nan')] * len(completions)"
    )
    flags = ["--reward", f"{tmp_path}/nan.py:f", "--output-dir", f"{tmp_path}/run"]
    run_in_a_child(fail_without_a_reader, flags, str(tmp_path / "errors"))
    assert "look at --reward" in (tmp_path / "errors").read_text()


def test_a_mistake_as_the_shell_sees_it(tmp_path):
    done = finished(start_shell("--model", "nosuch", "--output-dir", tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert "--model nosuch" in done.stderr


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def buggy(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(remax, "remax_step", buggy)
    with pytest.raises(ValueError, match="a bug"):
        remax.main(["--output-dir", str(tmp_path)])


@pytest.mark.parametrize("source", ["def f(:", "def f(**k):\n    return 1 / 0"])
def test_errors_in_a_persons_own_reward_show_that_persons_line(source, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    flags = ["--reward", f"{tmp_path}/mine.py:f", "--output-dir", tmp_path / "run"]
    done = Child(*flags).wait()
    assert done.returncode == 1
    assert f'mine.py", line {source.count(chr(10)) + 1}' in done.stderr
    assert source.splitlines()[-1].strip() in done.stderr


def test_a_reward_that_fails_later_leaves_the_checkpoint_whole(small, tmp_path, capsys):
    (tmp_path / "late.py").write_text(
        "calls = []\n"
        "def f(completions, **k):\n"
        "    calls.append(1)\n"
        "    good = 1 if len(calls) < 6 else float('nan')\n"
        "    return [good * len(c) for c in completions]\n"
    )
    flags = ["--reward", f"{tmp_path}/late.py:f", "--steps", 9, "--kl-coef", 0]
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "run", *flags)
    assert code == 1
    assert "finite" in said[-2]
    assert "--reward" in said[-1]
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] >= 2


def test_five_steps_without_a_finite_gradient_stop_the_run(small, tmp_path, capsys):
    (tmp_path / "huge.py").write_text(
        "def f(completions, **k):\n    return [3e38 * (-1) ** i for i in range(len(completions))]"
    )
    flags = ["--reward", f"{tmp_path}/huge.py:f", "--steps", 9, "--baseline", "none"]
    flags += ["--save-every", 2]
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "run", *flags)
    assert code == 1
    assert "5 steps" in said[-2]
    assert "--lr" in said[-1]
    steps = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    assert [row["skipped"] for row in steps] == [1.0] * 5
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4
    policy = checkpoint["policy"]
    untouched = AutoModelForCausalLM.from_pretrained(TINY / "policy").state_dict()
    assert all(torch.equal(policy[name], tensor) for name, tensor in untouched.items())


def test_twenty_steps_that_teach_nothing_are_named_once(small, tmp_path, capsys):
    (tmp_path / "constant.py").write_text("def f(prompts, **k):\n    return [1.0] * len(prompts)")
    flags = ["--reward", f"{tmp_path}/constant.py:f", "--kl-coef", 0, "--eval-every", 50]
    go([*small, *flags], tmp_path / "run", "--steps", 23)
    assert capsys.readouterr().out.count("warning") == 1


def test_a_tokenizer_without_eos_is_refused(tmp_path, capsys):
    shutil.copytree(TINY / "policy", tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "policy")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "policy")
    code, said = answer(capsys, "--model", tmp_path / "policy", "--output-dir", tmp_path / "run")
    assert code == 1
    assert "EOS" in said[-2]


# =================================================================================================
# Nothing silently wrong, nothing lost
# =================================================================================================


@pytest.mark.parametrize("name", ["prompts.JSONL", "prompts.jsonl.gz", "a[1]b*?.jsonl"])
def test_prompt_files_of_unusual_names(tokenizer, tmp_path, name):
    text = (TINY / "prompts.jsonl").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    rows, held_out = load(tmp_path / name, tokenizer)
    assert len(rows) + len(held_out) == 640


def test_an_empty_chat_counts_as_empty(tmp_path):
    chats = [[]] + [[{"role": "user", "content": f"The plot {i}"}] for i in range(10)]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": chat} for chat in chats])
    rows, held_out = load(path, chat_tokenizer())
    assert len(rows) + len(held_out) == 10


def test_eos_token_ends_a_turn_that_ends_otherwise(desk, capsys):
    flags = ["--model", desk / "other_end", "--prompts", desk / "chat.jsonl"]
    args = tiny_args(*flags, "--eos-token", "<end>", "--batch-size", 1)
    tokenizer = remax.load_policy_tokenizer(args)
    assert tokenizer.decode(tokenizer.eos_token_id) == "<end>"
    remax.load_prompts(args, tokenizer)  # a turn ends with it


def test_values_reach_the_reward_as_they_stand_in_the_file(tokenizer, tmp_path):
    """datasets would guess: a date, a number, one type for a whole column."""
    values = ["2021-03-04", "007", 5, None]
    lines = [{"prompt": f"The plot {i}", "answer": value} for i, value in enumerate(values)]
    rows, held_out = load(write_jsonl(tmp_path / "p.jsonl", lines), tokenizer)
    got = {row.reward_prompt: row.columns["answer"] for row in rows + held_out}
    assert got == {line["prompt"]: line["answer"] for line in lines}
    (tmp_path / "p.csv").write_text("prompt,answer\nThe plot,007\nThe cast,2021-03-04\n")
    rows, held_out = load(tmp_path / "p.csv", tokenizer)
    assert {row.columns["answer"] for row in rows + held_out} == {"007", "2021-03-04"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_with_new_prompts_and_its_old_date_is_read_anew(tokenizer, tmp_path, suffix):
    """datasets finds files in its cache by name and date."""
    path = tmp_path / f"p.{suffix}"
    for word in "plot", "cast":
        frame = datasets.Dataset.from_list([{"prompt": f"The {word} {i}"} for i in range(9)])
        if suffix == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path)
        os.utime(path, (0, 0))
        rows, _ = load(path, tokenizer)
        assert all(word in row.prompt_text for row in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_line_separator_inside_a_prompt_cuts_it_nowhere(tokenizer, tmp_path, suffix):
    texts = [f"The plot\u2028was told {i}" for i in range(9)]
    lines = texts
    if suffix == "jsonl":
        lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / f"p.{suffix}").write_bytes("\r\n".join(lines).encode())
    rows, held_out = load(tmp_path / f"p.{suffix}", tokenizer)
    assert sorted(row.prompt_text for row in rows + held_out) == texts


def test_texts_that_are_cut_are_counted(tokenizer, tmp_path, capsys):
    lines = [{"prompt": "The plot was told" + " and told" * i} for i in range(10)]
    load(write_jsonl(tmp_path / "p.jsonl", lines), tokenizer, "--max-prompt-tokens", 8)
    assert re.search(
        r"10 prompts: 8 to train on, 2 held out, \d cut to 8 tokens\n", capsys.readouterr().out
    )


def test_an_eos_that_the_vocabulary_spells_otherwise_is_refused():
    """A newline is one token of the tiny world, but its lookup gives the unknown token."""
    with pytest.raises(ValueError, match="not one token"):
        remax.load_policy_tokenizer(tiny_args("--eos-token", "\n"))
    assert remax.load_policy_tokenizer(tiny_args("--eos-token", ".")).eos_token_id == 14


def test_a_column_named_prompt_reaches_the_reward_when_another_holds_the_prompts(
    tokenizer, tmp_path
):
    lines = [{"question": f"The plot {i}", "prompt": i} for i in range(9)]
    path = write_jsonl(tmp_path / "p.jsonl", lines)
    rows, _ = load(path, tokenizer, "--prompt-column", "question")

    def reward(prompts, completions, prompt):
        assert prompts == [f"The plot {i}" for i in prompt]
        return [float(i) for i in prompt]

    rewards = score(reward, tokenizer, rows, torch.full((len(rows), 3), 5))
    assert rewards.tolist() == [row.columns["prompt"] for row in rows]


def test_no_prompt_is_cut_within_a_letter(tokenizer, tmp_path):
    """A letter outside its vocabulary is several tokens to a byte-level tokenizer."""
    lines = [{"prompt": "The plot " + "é字" * i} for i in range(2, 12)]
    rows, held_out = load(
        write_jsonl(tmp_path / "p.jsonl", lines), tokenizer, "--max-prompt-tokens", 8
    )
    cut = [row for row in rows + held_out if row.is_cut]
    assert cut
    for row in cut:
        assert "\ufffd" not in row.prompt_text
        assert row.prompt_text == tokenizer.decode(row.prompt_ids)


@pytest.mark.parametrize("eos_token", ["<|endoftext|>", "."])
def test_a_tokenizer_that_ends_texts_with_eos_ends_no_prompt(eos_token):
    """Also if --eos-token names another one. An EOS that a person typed stays."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "policy")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.eos_token = eos_token
    ids = AutoTokenizer.from_pretrained(TINY / "policy")("The plot").input_ids
    texts = ["The plot", "The plot<|endoftext|>", ""]
    assert remax.encode_texts(tokenizer, texts) == [[0, *ids], [0, *ids, 0], []]


def test_a_reward_gets_a_prompt_as_it_stands_in_the_data(tmp_path):
    """Special tokens too, and what a tokenizer normalizes away; a prompt that is cut is cut."""
    texts = ["The plot<|endoftext|>The film"] * 20 + ["The plot " * 30] * 20
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    tokenizer = remax.load_policy_tokenizer(tiny_args())
    training_rows, held_out_rows = load(path, tokenizer, "--max-prompt-tokens", 8)
    for row in training_rows + held_out_rows:
        whole = "The plot<|endoftext|>The film" if not row.is_cut else row.prompt_text
        assert remax.reward_arguments(tokenizer, [row], torch.tensor([[5, 0]]))["prompts"] == [
            whole
        ]


def test_held_out_prompts_that_are_trained_on_are_counted(tokenizer, tmp_path, capsys):
    lines = [{"prompt": f"The plot {i % 10}"} for i in range(100)] + [{"prompt": "The film"}]
    load(write_jsonl(tmp_path / "prompts.jsonl", lines), tokenizer)
    assert "of the held-out prompts are among the training prompts too" in capsys.readouterr().out
    load(TINY / "prompts.jsonl", tokenizer)
    assert "among" not in capsys.readouterr().out


def test_a_response_that_changes_the_text_of_its_prompt_is_decoded_alone():
    """Half a letter behind a whole one, where bytes are tokens as in Llama 2's tokenizer."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    bare = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    bare.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<unk>")
    prompt_ids = [byte + 1 for byte in "é".encode()]
    row = remax.PromptRow(prompt_ids, "é", False, "é", {})
    half, whole = [0xC3 + 1, 0, 0], [byte + 1 for byte in "aé".encode()]
    texts = remax.decode_responses(tokenizer, [row, row], torch.tensor([half, whole]))
    assert texts == ["\ufffd", "aé"]


def test_responses_are_not_cleaned_up():
    """Some tokenizers ask for it: " ." would become "." and the prompt's text would not fit."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "policy")
    asked = []

    def decode(ids, **options):
        asked.append(options)
        return ""

    tokenizer.decode = decode
    remax.decode_responses(tokenizer, ROWS, torch.tensor([[5, 6], [5, 6]]))
    assert all(options["clean_up_tokenization_spaces"] is False for options in asked)


def test_weights_that_the_model_does_not_use_are_named(tmp_path, capsys):
    changed_copy(TINY / "policy", tmp_path / "shallow", n_layer=2)
    remax.load_policy(tiny_args("--model", tmp_path / "shallow"))
    assert "does not use: transformer.h." in capsys.readouterr().out


def test_a_reward_file_edited_while_the_run_lives_cannot_resume_it(small, tmp_path, capsys):
    path = tmp_path / "reward.py"
    path.write_text(
        "def f(prompts, **k):\n"
        "    open(__file__, 'a').write('# edited\\n')\n"
        "    return [1.0] * len(prompts)\n"
    )
    flags = [*small, "--reward", f"{path}:f", "--output-dir", tmp_path / "run"]
    remax.main([*map(str, flags), "--steps", "1"])
    code, said = answer(capsys, *flags, "--steps", 2, "--resume")
    assert code == 1
    assert "--reward is reward.py" in said[-2]


def test_the_optimizer_of_another_model_is_refused(small, two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "copy")
    path = tmp_path / "copy/checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(checkpoint, path)
    flags = ["--output-dir", tmp_path / "copy", "--steps", 4, "--resume"]
    code, said = answer(capsys, *small, *flags)
    assert code == 1
    assert "optimizer of another model" in said[-2]


def test_texts_for_a_chat_model_are_said_to_go_without_its_template(capsys):
    remax.load_prompts(tiny_args(), chat_tokenizer())
    assert "chat template is not applied" in capsys.readouterr().out


def test_a_reward_model_without_template_reads_the_contents_of_a_chat():
    reward = remax.RewardModel(str(TINY / "reward"), torch.float32, CPU)
    question = [{"role": "user", "content": "How was the plot?"}]
    answer = [{"role": "assistant", "content": "The plot was superb."}]
    expected = reward(["How was the plot?\n"], ["The plot was superb."])
    assert torch.equal(reward([question], [answer]), expected)


def test_an_eos_that_is_no_special_token_stands_once_in_the_text_of_a_reward():
    """decode() leaves out special tokens alone: the padding would stand there too."""
    tokenizer = remax.load_policy_tokenizer(tiny_args("--eos-token", "."))
    responses = torch.tensor([[5, 14, 14, 14], [5, 6, 7, 14]])
    first, second = remax.decode_responses(tokenizer, ROWS, responses)
    assert first.count(".") == second.count(".") == 1


def test_an_eos_at_the_end_of_a_prompt_stays_if_the_person_wrote_it():
    tokenizer = remax.load_policy_tokenizer(tiny_args("--eos-token", "."))
    (ids,) = remax.encode_texts(tokenizer, ["The plot was warm."])
    assert ids[-1] == 14


def test_a_tokenizer_whose_unknown_words_are_eos_keeps_the_ends_of_texts():
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<e>": 0, "plot": 1}, unk_token="<e>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")
    assert remax.encode_texts(tokenizer, ["plot plot"]) == [[1, 1]]


def test_a_template_may_demand_a_system_message():
    tokenizer = chat_tokenizer()
    demand = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = demand + TEMPLATE
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The plot?"}]
    remax.check_template(tokenizer, [[], chat])
    assert remax.encode_chat(tokenizer, []) == []
    assert len(remax.encode_chat(tokenizer, chat)) > 0


def test_a_reward_model_whose_template_refuses_a_chat_is_answered(monkeypatch):
    reward = remax.RewardModel(str(TINY / "reward"), torch.float32, CPU)
    reward.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(remax.BadInput, match="template refuses") as error:
        reward([CHAT], [[{"role": "assistant", "content": "The plot."}]])
    assert error.value.flags == ("reward", "prompts")


def test_a_prompt_of_nearly_all_positions_leaves_room_for_one_token(tmp_path):
    lines = [{"prompt": "The plot" + " and plot" * 80} for _ in range(10)]
    path = write_jsonl(tmp_path / "long.jsonl", lines)
    flags = ["--prompts", path, "--max-prompt-tokens", 127, "--max-new-tokens", 1]
    go([*flags, "--batch-size", 2], tmp_path / "run", "--steps", 1)


def test_a_reward_that_changes_its_arguments_changes_no_row(tokenizer):
    rows = [remax.PromptRow([5], "a", False, CHAT, {"n": [1]})]
    before = json.dumps(rows)

    def reward(prompts, completions, n, **kwargs):
        prompts[0].extend(completions[0])
        n[0].append(2)
        assert len(prompts[1]) == 1
        return [0.0] * len(prompts)

    score(reward, tokenizer, rows * 2, torch.full((2, 3), 5))
    assert json.dumps(rows) == before


def test_a_reward_with_a_gradient_of_its_own_adds_none_to_the_loss(tokenizer):
    def reward(prompts, **kwargs):
        return torch.ones(len(prompts), requires_grad=True)

    assert not score(reward, tokenizer, ROWS, torch.full((2, 3), 5)).requires_grad


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_second_run_in_a_living_runs_folder_is_refused(small, tmp_path, capsys, flags):
    child = start(small, tmp_path, steps=1000)
    try:
        code, said = answer(capsys, *small, "--output-dir", tmp_path, "--steps", 1000, *flags)
        assert code == 1
        assert "another run is writing" in said[-2]
        size = (tmp_path / "metrics.jsonl").stat().st_size
        time.sleep(0.5)
        assert child.is_alive()
        assert (tmp_path / "metrics.jsonl").stat().st_size >= size > 1000
    finally:
        child.send(signal.SIGKILL)


def test_resume_without_a_checkpoint_is_refused_and_wipes_nothing(
    small, two_steps, tmp_path, capsys
):
    shutil.copytree(two_steps, tmp_path / "copy")
    (tmp_path / "copy/checkpoint.pt").unlink()
    before = (tmp_path / "copy/metrics.jsonl").read_bytes()
    for flags in ["--resume"], []:
        code, said = answer(capsys, *small, "--output-dir", tmp_path / "copy", "--steps", 4, *flags)
        assert code == 1
        assert "checkpoint" in said[-2]
    assert (tmp_path / "copy/metrics.jsonl").read_bytes() == before
    assert (tmp_path / "copy/model/model.safetensors").exists()


@pytest.mark.parametrize("name", ["prompts.jsonl", "reward.py", "model"])
def test_resume_with_a_changed_file_or_folder_is_refused(tmp_path, capsys, name):
    lines = (TINY / "prompts.jsonl").read_text().splitlines()[:30]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "reward.py").write_text("def f(prompts, **k):\n    return [1.0] * len(prompts)\n")
    shutil.copytree(TINY / "policy", tmp_path / "model")
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--reward", f"{tmp_path}/reward.py:f"]
    flags += ["--model", tmp_path / "model", "--batch-size", 8, "--max-new-tokens", 4]
    go(flags, tmp_path / "run", "--steps", 1)
    if name == "model":  # another reference from now on
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        model.transformer.wte.weight.data += 0.1
        model.save_pretrained(tmp_path / "model")
    else:
        with open(tmp_path / name, "a") as file:
            file.write("\n")
    code, said = answer(capsys, *flags, "--output-dir", tmp_path / "run", "--steps", 2, "--resume")
    assert code == 1
    assert f"--{name.split('.')[0]} is {name}" in said[-2]


@pytest.mark.parametrize("output", ["run", "run/model"])
def test_a_folder_with_a_model_is_not_written_into(output, small, tmp_path, capsys):
    """It may be the very model that --model names."""
    shutil.copytree(TINY / "policy", tmp_path / "run/model")
    flags = [*small, "--model", tmp_path / "run/model", "--reward", TINY / "reward"]
    code, said = answer(capsys, *flags, "--output-dir", tmp_path / output, "--steps", 1)
    assert code == 1
    assert "holds a" in said[-2]
    weights = "model.safetensors"
    before = (TINY / "policy" / weights).read_bytes()
    assert (tmp_path / "run/model" / weights).read_bytes() == before
    assert not (tmp_path / "run/model/metrics.jsonl").exists()


def test_a_tilde_is_the_home_folder():
    assert tiny_args("--output-dir=~/run").output_dir == os.path.expanduser("~/run")


def test_no_check_is_an_assertion():
    """python -O leaves assertions out."""
    tree = ast.parse(Path(remax.__file__).read_text())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))


@pytest.mark.parametrize("source", ["import sys\nsys.exit(0)", "def f(**k):\n    raise SystemExit"])
def test_a_reward_that_exits_does_not_exit_0(source, small, tmp_path):
    (tmp_path / "leaves.py").write_text(source)
    flags = ["--reward", f"{tmp_path}/leaves.py:f", "--output-dir", tmp_path / "run"]
    done = Child(*small, *flags).wait()
    assert done.returncode == 1
    assert "sys.exit()" in done.stderr


def test_a_second_signal_ends_the_run_at_once_even_inside_a_reward(small, tmp_path):
    (tmp_path / "sleeps.py").write_text(
        "import time\ndef f(completions, **k):\n"
        "    open(__file__ + '.called', 'w')\n    time.sleep(60)"
    )
    child = Child(*small, "--reward", f"{tmp_path}/sleeps.py:f", "--output-dir", tmp_path / "run")
    while child.is_alive() and not (tmp_path / "sleeps.py.called").exists():
        time.sleep(0.01)
    child.send(signal.SIGINT)
    time.sleep(0.2)
    child.send(signal.SIGINT)
    assert child.wait().returncode == 130
    assert "press again to stop now" in child.stderr
    assert "Traceback" not in child.stderr


def test_what_a_reward_raises_is_shown_whatever_it_is(small, tmp_path):
    (tmp_path / "raises.py").write_text("def f(**kwargs):\n    raise KeyboardInterrupt('mine')")
    flags = [*small, "--reward", f"{tmp_path}/raises.py:f", "--output-dir", tmp_path / "run"]
    done = Child(*flags).wait()
    assert done.returncode != 0
    assert "raise KeyboardInterrupt('mine')" in done.stderr


def test_ctrl_c_while_loading_ends_the_run_without_a_traceback(small, tmp_path):
    (tmp_path / "loads.py").write_text(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # Child took it away
        "signal.raise_signal(signal.SIGINT)\nf = len"
    )
    flags = [*small, "--reward", f"{tmp_path}/loads.py:f", "--output-dir", tmp_path / "run"]
    done = Child(*flags).wait()
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "class_name", [["GPT2ForSequenceClassification"], "GPT2ForTokenClassification"]
)
def test_a_classifier_is_no_policy_however_its_config_says_so(class_name, tmp_path):
    shutil.copytree(TINY / "policy", tmp_path / "policy")
    path = tmp_path / "policy/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": class_name}))
    with pytest.raises(ValueError, match="this is a classifier"):
        remax.check_policy(tiny_args("--model", tmp_path / "policy"))


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stop = remax.StopRequest()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal_number == 0


LEAVING = """
import multiprocessing
import time

def f(completions, **kwargs):
    global process
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    process.start()
    return [len(text) for text in completions]
"""


def test_a_child_of_a_reward_does_not_hold_the_lock_of_a_killed_run(small, tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    flags = [*small, "--reward", f"{tmp_path}/leaving.py:f", "--save-every", 1]
    child = start(flags, tmp_path / "run", steps=1000)
    child.send(signal.SIGKILL)
    child.wait()
    again = start([*flags, "--resume"], tmp_path / "run", steps=1000)
    time.sleep(1)
    assert again.is_alive(), again.wait().stderr
    again.send(signal.SIGKILL)
    again.wait()


FORKING = """
import multiprocessing
import os
import signal
import subprocess
import time

fork = multiprocessing.get_context("fork")  # which is the default up to Python 3.13

def length(text):
    return len(text)

def f(completions, **kwargs):
    process = fork.Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join()
    # In a session of its own, so that it could be killed with all that it starts.
    program = subprocess.Popen(["sleep", "600"], preexec_fn=os.setsid)
    program.send_signal(signal.SIGINT)
    program.wait()
    with fork.Pool(2) as pool:
        return pool.map(length, completions)
"""


def test_a_reward_that_forks_ends(small, tmp_path):
    (tmp_path / "forking.py").write_text(FORKING)
    flags = ["--reward", f"{tmp_path}/forking.py:f", "--steps", 1, "--kl-coef", 0]
    done = Child(*small, *flags, "--output-dir", tmp_path / "run").wait()
    assert done.returncode == 0, done.stderr


def terminated_at_birth():
    """SIGTERM comes before Python has made the child ready."""
    remax.prepare_forks()
    remax.StopRequest()
    for _ in range(100):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)  # it would go on with this loop
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_a_forked_child_ends_on_sigterm_from_its_birth_on():
    run_in_a_child(terminated_at_birth)


WORKING = """
import multiprocessing
import os
import subprocess

os.setpgid(0, 0)  # a group of its own: the signal is for the run, and not for pytest

def work(seconds):
    program = subprocess.run(["sleep", str(seconds)])
    return float(program.returncode == 0)

def f(completions, **kwargs):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        if not os.path.exists(__file__ + ".called"):
            open(__file__ + ".called", "w")
            os.killpg(os.getpgid(0), NUMBER)
        return pool.map(work, [0.05] * len(completions))
"""


MADE_BY_EACH_CALL = '    with multiprocessing.get_context("fork").Pool(2) as pool:'
MADE_WITH_THE_FILE = WORKING.replace(MADE_BY_EACH_CALL, "    if True:").replace(
    "def f(", 'pool = multiprocessing.get_context("fork").Pool(2)\n\ndef f('
)


@pytest.mark.parametrize("source", [WORKING, MADE_WITH_THE_FILE], ids=["each call", "the file"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_its_group_leaves_the_forked_children_of_a_reward_at_work(
    number, source, small, tmp_path
):
    """As Ctrl-C in a terminal, `timeout` and torchrun, and a terminal that is closed."""
    (tmp_path / "working.py").write_text(source.replace("NUMBER", str(int(number))))
    flags = [*small, "--reward", f"{tmp_path}/working.py:f", "--eval-every", 10]
    done = Child(*flags, "--output-dir", tmp_path / "run").wait()
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 1
    step = read_metrics(tmp_path / "run")[-1]
    assert step["reward"] == step["greedy_reward"] == 1  # no program was ended


def receive(*numbers):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    stop = remax.StopRequest()
    for number in numbers:
        signal.raise_signal(number)
    assert stop.signal_number == numbers[-1]


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP, signal.SIGHUP),  # the shell sends one, and the kernel another
        (signal.SIGTERM, signal.SIGTERM),  # torchrun passes on what its processes get too
        (signal.SIGHUP, signal.SIGTERM),  # as systemd may send them
        (signal.SIGTERM, signal.SIGHUP),
    ],
)
def test_a_second_signal_that_nobody_pressed_does_not_end_the_run(numbers):
    run_in_a_child(receive, *numbers)


def hang_up_with_a_log(path):
    with open(path, "w") as log:
        os.dup2(log.fileno(), 1)
    receive(signal.SIGHUP)
    remax.say("stopped")


def test_a_closed_terminal_does_not_cut_a_log_file(tmp_path):
    run_in_a_child(hang_up_with_a_log, tmp_path / "log")
    assert "stopped" in (tmp_path / "log").read_text()


def print_to_a_closed_terminal():
    master, terminal = os.openpty()
    os.dup2(terminal, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    os.close(master)
    remax.say("nobody reads this")


def test_a_run_goes_on_when_its_terminal_has_gone():
    """As one started with & and disown: it gets no SIGHUP, but its output fails."""
    run_in_a_child(print_to_a_closed_terminal)


PRINTING = """
import os
import signal

def f(completions, **kwargs):
    if "MASTER" in os.environ:
        os.close(int(os.environ.pop("MASTER")))
        os.kill(os.getpid(), signal.SIGHUP)
    print("scored", flush=True)
    return [len(text) for text in completions]
"""


def run_in_a_terminal(flags):
    """The reward closes it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    master, terminal = os.openpty()
    os.environ["MASTER"] = str(master)
    for output in 1, 2:
        os.dup2(terminal, output)
    os.close(terminal)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    remax.main(flags)


def test_a_closed_terminal_saves_even_if_the_reward_prints(small, tmp_path):
    (tmp_path / "printing.py").write_text(PRINTING)
    flags = [*small, "--reward", f"{tmp_path}/printing.py:f", "--output-dir", tmp_path / "run"]
    process = FORKSERVER.Process(target=run_in_a_terminal, args=([*map(str, flags)],))
    process.start()
    join(process)
    assert process.exitcode == 128 + signal.SIGHUP
    assert (tmp_path / "run/checkpoint.pt").exists()


ECHOING = """
import subprocess

def f(completions, **kwargs):
    subprocess.run(["echo", "scored"], check=True)
    return [len(text) for text in completions]
"""


def run_without_a_reader(flags):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    remax.main(flags)


def test_a_run_whose_reader_has_gone_goes_on(small, tmp_path):
    """As `python remax.py | head -3`, or `| tee log` after Ctrl-C."""
    (tmp_path / "echoing.py").write_text(ECHOING)
    flags = [*small, "--reward", f"{tmp_path}/echoing.py:f", "--steps", 2]
    flags += ["--output-dir", tmp_path / "run"]
    run_in_a_child(run_without_a_reader, [*map(str, flags)])
    assert (tmp_path / "run/model/model.safetensors").exists()


ASLEEP = """
import multiprocessing
import os
import signal
import time

def f(completions, **kwargs):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    open(__file__ + ".pid", "w").write(str(worker.pid))
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_run_that_is_ended_at_once_takes_its_children_along(small, tmp_path):
    (tmp_path / "asleep.py").write_text(ASLEEP)
    flags = [*small, "--reward", f"{tmp_path}/asleep.py:f", "--output-dir", tmp_path / "run"]
    assert Child(*flags).wait().returncode == 130
    worker = int((tmp_path / "asleep.py.pid").read_text())
    deadline = time.time() + 10
    while Path(f"/proc/{worker}").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert time.time() < deadline, "the worker lives on"


CATCHING = """
import multiprocessing
import os
import signal
import time

pool = multiprocessing.get_context("fork").Pool(2)

def f(completions, **kwargs):
    try:
        job = pool.map_async(time.sleep, [600] * 4)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        job.wait()
    except BaseException:
        pass
    return [0.0] * len(completions)
"""


def test_a_run_is_ended_at_once_whatever_its_reward_catches_or_waits_for(small, tmp_path):
    (tmp_path / "catching.py").write_text(CATCHING)
    flags = [*small, "--reward", f"{tmp_path}/catching.py:f", "--output-dir", tmp_path / "run"]
    assert Child(*flags).wait().returncode == 130


def test_a_reward_may_change_the_working_directory(small, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moves.py").write_text(
        "import os\ndef f(completions, **k):\n"
        f"    os.chdir({str(tmp_path / 'elsewhere')!r})\n    return [len(c) for c in completions]"
    )
    shutil.copytree(TINY / "policy", tmp_path / "policy")
    flags = ["--model", "policy", "--reward", "moves.py:f", "--output-dir", "run", "--steps", 2]
    done = Child(*small, *flags, folder=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/checkpoint.pt").exists()
    assert (tmp_path / "run/model/tokenizer.json").exists()
    assert not any((tmp_path / "elsewhere").iterdir())


def resume_there(folder, flags):
    os.chdir(folder)
    remax.import_file(f"{folder}/remax.py").main([*flags, "--output-dir", "run", "--resume"])


def test_a_moved_checkout_can_be_resumed(small, tmp_path):
    go(small, tmp_path / "there/run", "--steps", 1)
    shutil.copy(remax.__file__, tmp_path / "there")
    shutil.copytree(TINY, tmp_path / "there/data/tiny")
    run_in_a_child(resume_there, tmp_path / "there", [*map(str, small), "--steps", "2"])
    steps = [row["step"] for row in read_metrics(tmp_path / "there/run") if "reward" in row]
    assert steps == [1, 2]


def test_a_full_disk_is_answered_as_one_and_the_old_checkpoint_survives(small, tmp_path):
    go(small, tmp_path, "--steps", 2)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    flags = [*small, "--output-dir", tmp_path, "--steps", 4, "--resume"]
    done = Child(*flags, file_limit=1_000_000).wait()
    assert done.returncode == 1
    assert "is the disk full?" in done.stderr
    assert "--output-dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.new").exists()


def test_a_reward_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("def g(text):\n    return len(text)")
    (tmp_path / "imports.py").write_text(
        "import neighbour_of_mine\ndef f(completions, **k):\n"
        "    return [neighbour_of_mine.g(c) for c in completions]"
    )
    reward = remax.load_reward_function(
        tiny_args("--reward", f"{tmp_path}/imports.py:f"), torch.float32, CPU
    )
    assert reward(completions=["abc"]) == [3]


def run_and_resume_as_on_windows(flags):
    sys.modules["fcntl"] = None
    del signal.SIGHUP, os.register_at_fork
    fresh = remax.import_file(remax.__file__)
    assert fresh.fcntl is None
    fresh.main([*flags, "--steps", "1"])
    fresh.main([*flags, "--steps", "2", "--resume"])


def test_on_a_machine_without_fcntl_sighup_and_fork(small, tmp_path):
    """As on Windows: the file imports, runs and resumes."""
    flags = [*map(str, small), "--output-dir", str(tmp_path / "run")]
    run_in_a_child(run_and_resume_as_on_windows, flags)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


def test_a_terminal_that_does_not_know_a_letter_does_not_end_the_run(small, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Фильм был"}\n' * 30)
    flags = [*small, "--prompts", tmp_path / "p.jsonl", "--steps", 1]
    done = Child(*flags, "--output-dir", tmp_path / "run", encoding="ascii").wait()
    assert done.returncode == 0, done.stderr


# =================================================================================================
# More than one process
# =================================================================================================


def one_step(folder, rank, processes):
    """A step of one of several processes; what it leads to goes into a file."""
    if processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=processes)
    policy, reference, prompts = torch.load(folder / "inputs.pt", weights_only=False)
    prompt = prompts[rank::processes]  # (B,P)
    settings = remax.StepSettings(
        eos_id=EOS,
        pad_id=PAD,
        max_new_tokens=6,
        kl_coef=0.1,
        greedy_baseline=False,
        micro_batch_size=3,
        max_grad_norm=0.1,
        dtype=torch.float32,
    )
    result = remax.remax_step(
        policy,
        reference,
        torch.optim.SGD(policy.parameters(), 100.0),
        torch.amp.GradScaler("cpu", enabled=False),
        lambda responses: (responses + prompt.repeat(2, 1)[:, :1]).float().mean(1),
        prompt,
        torch.ones_like(prompt),
        settings,
    )
    metrics = remax.step_metrics(result, settings)
    torch.save((policy.state_dict(), metrics), folder / f"{rank}-of-{processes}.pt")


RECORD = """
import sys
import torch

folder = sys.argv[1]
sys.path.insert(0, sys.argv[2])
import remax

class Run(remax.Run):
    def train(self, stop):
        signal_number = super().train(stop)
        torch.save(self.policy.state_dict(), f"{folder}/weights-{self.rank}.pt")
        return signal_number

remax.Run = Run
remax.main(sys.argv[3:])
"""

# Slow under torchrun, so that there is time to disturb it.
SLOW = """
import os
import time
from pathlib import Path

if "RANK" in os.environ:
    Path(__file__).with_name("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))

def f(completions, **kwargs):
    time.sleep(0.2 if "RANK" in os.environ else 0)
    return [len(text) for text in completions]

def fails(completions, **kwargs):
    if os.environ["RANK"] == "1":
        raise RuntimeError("no reward here")
    return f(completions)
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(*command):
    """A command in two processes of one thread each, started."""
    return subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def slow(small, tmp_path):
    """Flags of a run of 20 steps that is slow under torchrun."""
    (tmp_path / "slow.py").write_text(SLOW)
    flags = [*small, "--steps", 20, "--reward", f"{tmp_path}/slow.py:f"]
    return [*flags, "--output-dir", tmp_path / "run"]


def test_two_processes_make_the_update_of_one(tmp_path):
    """Averaged before it is clipped, the gradient of two halves is that of the whole batch."""
    torch.manual_seed(0)
    policy = make("llama")
    policy.lm_head.weight.data *= 2000  # so sure of itself that what it samples is its argmax
    prompts = torch.randint(3, 31, (8, 5))
    torch.save((policy, make("llama"), prompts), tmp_path / "inputs.pt")
    one_step(tmp_path, 0, 1)
    pair = [FORKSERVER.Process(target=one_step, args=(tmp_path, rank, 2)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(timeout=120)
        assert process.exitcode == 0

    weights, metrics = torch.load(tmp_path / "0-of-1.pt")
    first_weights, first_figures = torch.load(tmp_path / "0-of-2.pt")
    second_weights, second_figures = torch.load(tmp_path / "1-of-2.pt")
    assert metrics["grad_norm"] > 0.1  # it was clipped
    for name, before in policy.state_dict().items():
        assert torch.equal(first_weights[name], second_weights[name])
        update = weights[name] - before
        assert (first_weights[name] - weights[name]).norm() < 1e-3 * update.norm()
    for name, figure in metrics.items():
        if figure is not None:
            assert first_figures[name] == second_figures[name]
            assert first_figures[name] == pytest.approx(figure, rel=1e-3, abs=1e-5), name


def test_a_run_of_two_processes(small, tmp_path):
    (tmp_path / "record.py").write_text(RECORD)
    flags = [*small, "--steps", 4, "--output-dir", tmp_path / "run"]
    process = torchrun(tmp_path / "record.py", tmp_path, Path(remax.__file__).parent, *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 4]
    assert out.count("step 3: reward") == 1  # only the first process speaks
    first = torch.load(tmp_path / "weights-0.pt")
    second = torch.load(tmp_path / "weights-1.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_can_go_on(slow, tmp_path):
    process = torchrun(remax.__file__, *slow)
    while process.poll() is None and not (tmp_path / "run/checkpoint.pt").exists():
        time.sleep(0.01)
    first, second = (int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1))
    os.kill(second, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    remax.main([*map(str, slow), "--resume"])  # one process may continue what two began
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "reward" in row]
    assert steps == list(range(1, 21))


def test_sigterm_to_torchrun_saves(slow, tmp_path):
    process = torchrun(remax.__file__, *slow, "--save-every", 1000)
    wait_for_rows(lambda: process.poll() is None, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "in remax_step" not in err  # no process was left in the middle of a step
    assert "--resume continues" in out
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "reward" in row]
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert steps == list(range(1, checkpoint["step"] + 1))


def test_an_error_in_the_reward_of_one_process_ends_both_and_is_shown(slow):
    slow = [str(flag).replace("slow.py:f", "slow.py:fails") for flag in slow]
    process = torchrun(remax.__file__, *slow)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "no reward here" in err


def test_a_batch_that_does_not_divide_is_refused(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remax.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(remax.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(remax.dist, "get_world_size", lambda: 3)
    code, said = answer(capsys, *small, "--output-dir", tmp_path / "run")
    assert code == 1
    assert "3 processes" in said[-2]
    assert "--batch-size 8" in said[-1]


# =================================================================================================
# Sabotage: each fault, put into a copy of remax.py, makes its test fail
# =================================================================================================

SABOTAGE = [  # what is broken, the line, its broken form, the test that must notice
    ("position_ids dropped", "        position_ids=position_ids(full_mask),\n", "",
     "padding_changes"),
    ("positions dropped while decoding", "            position_ids=positions,\n", "",
     "rollout_is_the_policy"),
    ("position that stands still", "positions = positions[:, -1:] + 1",
     "positions = positions[:, -1:]", "rollout_is_the_policy"),
    ("EOS left out of the mask", "(eos_before == 0)", "(is_eos.cumsum(1) == 0)", "first_eos"),
    ("mask from pad ids", "(eos_before == 0)", "(response != eos_id)", "first_eos"),
    ("KL sign flipped", "(logprobs.detach() - ref_logprobs) * mask",
     "(ref_logprobs - logprobs.detach()) * mask", "by_hand"),
    ("KL one-step", "kl_to_go = log_ratio.flip(1).cumsum(1).flip(1)", "kl_to_go = log_ratio",
     "by_hand"),
    ("KL unmasked", "(logprobs.detach() - ref_logprobs) * mask",
     "(logprobs.detach() - ref_logprobs)", "by_hand"),
    ("k3 in the reward", "(logprobs.detach() - ref_logprobs) * mask",
     "((ref_logprobs - logprobs.detach()).exp() - 1 + logprobs.detach() - ref_logprobs) * mask",
     "unbiased"),
    ("baseline from the wrong rows", "baseline = greedy_reward  # (B,)", "baseline = reward",
     "one_call"),
    ("baseline not subtracted", "(reward - baseline)[:, None]", "reward[:, None]", "by_hand"),
    ("gradient through the advantage", "(logprobs.detach() - ref_logprobs)",
     "(logprobs - ref_logprobs)", "no_gradient"),
    ("token mean", "(logprobs * token_advantage * mask).sum(1).mean()",
     "(logprobs * token_advantage * mask).sum() / mask.sum()", "reinforce"),
    ("per-micro-batch mean", "share_of_loss = loss * len(logprobs) / B",
     "share_of_loss = loss * settings.micro_batch_size / B", "micro_batch_size"),
    ("top_k left at its default", "all_logprobs = sampled_logits.log_softmax(-1)",
     "all_logprobs = sampled_logits.masked_fill("
     "sampled_logits < sampled_logits.topk(50).values[:, -1:], -99).log_softmax(-1)",
     "full_softmax"),
    ("checkpoint's generation_config kept", "all_logprobs = sampled_logits.log_softmax(-1)",
     "all_logprobs = (sampled_logits / (policy.generation_config.temperature or 1))"
     ".log_softmax(-1)",
     "poisoned"),
    ("dropout left on", "setattr(config, name, 0.0)", "pass", "no_noise"),
    ("jitter left on", ' or "jitter" in name', "", "no_noise"),
    ("log-softmax in bf16", "response_logits.float().log_softmax(-1)",
     "response_logits.log_softmax(-1)", "taken_in_float32"),
    ("off by one in the logits", "output.logits[:, -(T + 1) : -1]",
     "output.logits[:, -T:]", "column_t"),
    ("generation in train mode with checkpointing",
     "    policy.eval()\n    with weights_as(policy, dtype):",
     "    with weights_as(policy, dtype):",
     "checkpointing_changes"),
    ("greedy rows of other prompts", "next_input = torch.cat([prompt, prompt])",
     "next_input = torch.cat([prompt, prompt.flip(0)])", "generate"),
    ("greedy rows drawn too", "greedy_logits.argmax(-1, keepdim=True)",
     "torch.multinomial(greedy_logits.softmax(-1), 1)", "generate"),
    ("sampler's log-probs of another token", ".gather(1, sampled)",
     ".gather(1, all_logprobs.argmax(1, keepdim=True))", "rollout_is_the_policy"),
    ("no cache, no refusal", "        if cache is None:\n", "        if False:\n",
     "keeps_no_cache"),
    ("reward scored on prompt + response twice", "both.removeprefix(row.prompt_text)", "both",
     "aligned"),
    ("reward model left-padded", 'padding_side="right"', 'padding_side="left"', "ignores_padding"),
    ("reward model without mask", "self.model(**batch)", 'self.model(batch["input_ids"])',
     "ignores_padding"),
    ("columns misaligned with rows", "self.tokenizer, rows + rows, responses",
     "self.tokenizer, [row for row in rows for _ in range(2)], responses", "greedy_half_gets"),
    ("weights saved with use_cache off", "AutoConfig.from_pretrained(self.args.model)",
     "AutoConfig.from_pretrained(self.args.model, use_cache=False)", "saved_model_is"),
    ("dropout saved as 0", "self.policy.config = self.config_as_loaded()",
     "pass", "saved_model"),
    ("finished rows go on", ".masked_fill(done, pad_id)", "", "half_of_the_rollout"),
    ("resume that forgets the RNG", "seed_of_step(self.args.seed, step)",
     "self.args.seed + (step - self.steps_before)", "twelve_times"),
    ("resume that forgets the weights", 'self.policy.load_state_dict(checkpoint["policy"])', "pass",
     "twelve_times"),
    ("resume that forgets the optimizer",
     'self.optimizer.load_state_dict(checkpoint["optimizer"])', "pass", "twelve_times"),
    ("resume that restarts the learning rate", "progress = (step - 1) / self.args.steps",
     "progress = (step - 1 - self.steps_before) / self.args.steps", "extend_a_run"),
    ("resume that keeps the rows past the checkpoint",
     "metrics_file.truncate(min(size_now, size_then))", "pass", "cut_off"),
    ("resume with other mathematics", "    return new == old\n", "    return True\n",
     "resumed_as_another"),
    ("checkpoint written over the old one", 'unfinished = path.with_suffix(".new")',
     "unfinished = path",
     "disk_full_while"),
    ("checkpoint that runs code", "weights_only=True", "weights_only=False", "stranger"),
    ("new run over an old one", 'if (folder / "checkpoint.pt").exists():', "if False:",
     "neither_overwritten"),
    ("child that survives SIGTERM", "signal.signal(number, signal.SIG_DFL)", "pass",
     "reward_that_forks"),
    ("child that is born deaf to SIGTERM", "before=hold_signals", "before=release_signals",
     "from_its_birth"),
    ("child that the run's signals reach", "    os.setpgrp()\n", "    pass\n",
     "forked_children"),
    ("second SIGTERM that ends the run", "signal.signal(signal.SIGTERM, self.on_stop)",
     "signal.signal(signal.SIGTERM, self.on_ctrl_c)",
     "second_signal_that_nobody"),
    ("printing to nobody", "    except OSError:  # `| head`", "    except ZeroDivisionError:  #",
     "reader_has_gone"),
    ("stop that saves nothing", "is_last or is_stopped or", "is_last or",
     "stop_signal"),
    ("penalty for sampled rows alone", "args.missing_eos_penalty * has_no_eos",
     "args.missing_eos_penalty * has_no_eos * (torch.arange(len(rows)) < 2)", "penalty"),
    ("bugs answered like mistakes", "            metrics = self.train_step(step)\n",
     '            with blame("lr"):\n'
     "                metrics = self.train_step(step)\n",
     "traceback"),
    ("evaluation moves the noise of training",
     "        transformers.set_seed((step_seed + self.rank) % 2**32)\n",
     "        step > 1 or transformers.set_seed(self.args.seed)\n",
     "same_seed"),
    ("second BOS", "tokenizer.encode(text, add_special_tokens=False)", "tokenizer.encode(text)",
     "template_once"),
    ("random weights for missing ones", "    if absent:\n", "    if False:\n",
     "every_mistake and missing"),
    ("weights that are not finite", "if not parameter.isfinite().all():", "if False:",
     "every_mistake and nan"),
    ("columns that a reward may spoil", "copy.deepcopy(row.columns[name])",
     "row.columns[name]", "changes_its_arguments"),
    ("two runs in one folder", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
     "living_run"),
    ("changed prompts file",
     'hashes += hashlib.file_digest(opened, "sha256").hexdigest()', "pass",
     "changed_file"),
    ("tokens averaged over the wrong axis", 'mean_over_processes(batch.mask.sum(1))',
     'mean_over_processes(batch.mask.sum(0))', "figures_are"),
    ("logged loss scaled wrongly", 'return batch_loss, ', 'return batch_loss / B, ', "figures_are"),
    ("autocast off in bf16", "enabled=is_16_bit", "enabled=False", "in_bf16"),
    ("policy.train() left out", "    policy.train()\n", "", "recomputes"),
    ("reference in another dtype",
     "load_model(AutoModelForCausalLM, args.model, dtype=dtype).requires_grad_",
     "load_model(AutoModelForCausalLM, args.model, dtype=torch.float32).requires_grad_",
     "reference_rests"),
    ("checkpoints at other steps", "is_stopped or step % args.save_every == 0",
     "is_stopped or step % args.eval_every == 0",
     "when_asked_for"),
    ("sampler not checked",
     "if math.isnan(difference) or difference > LARGEST_DIFFERENCE[dtype]:", "if False:",
     "cache_is_wrong"),
    ("sampler not checked before the run",
     "self.check_sampler(mean_difference.item(), torch.float32)", "pass",
     "cache_is_wrong"),
    ("sampler not checked in the first step",
     'self.check_sampler(metrics["sampling_logp_difference"], self.dtype)', "pass",
     "wrong_sampler"),
    ("gradients not averaged", "        average_in_place(parameter.grad)\n",
     "        pass\n",
     "update_of_one"),
    ("figures of one process", "    average_in_place(mean)\n", "",
     "update_of_one"),
    ("processes that stop at different steps",
     "dist.all_reduce(number, dist.ReduceOp.MAX)", "number *= 1 - dist.get_rank()",
     "torchrun_saves"),
]  # fmt: skip


def test_every_line_to_break_is_there_once():
    source = (ROOT / "remax.py").read_text()
    for name, line, _, _ in SABOTAGE:
        assert source.count(line) == 1, name


@pytest.mark.slow
@pytest.mark.parametrize("name, line, broken, test", SABOTAGE, ids=[row[0] for row in SABOTAGE])
def test_sabotage_is_noticed(name, line, broken, test, tmp_path):
    source = (ROOT / "remax.py").read_text()
    (tmp_path / "remax.py").write_text(source.replace(line, broken))
    (tmp_path / "test_remax.py").symlink_to(ROOT / "test_remax.py")
    (tmp_path / "data").symlink_to(DATA)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", f"{test} and not sabotage", "test_remax.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout


# =================================================================================================
# The README
# =================================================================================================

README = (ROOT / "README.md").read_text()
DATA_README = (DATA / "README.md").read_text()
TEXT = " ".join(f"{README} {DATA_README}".split())  # line ends aside


def read_results(name):
    return [json.loads(line) for line in open(DATA / "results" / name)]


def anchors_of(page):
    """What a link into this page may name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", DATA / "README.md"], ids=["top", "data"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


ON_ONE_LINE = re.sub(r" \\\n +", " ", README)
COMMANDS = re.findall(r"^ *(?:.*&& )?python remax.py(.*?)(?:  +#.*)?$", ON_ONE_LINE, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command):
    remax.parse_args(command.split())


def spread(logs, column, last=1):
    """Mean and standard deviation over runs, of each run's mean over its last rows."""
    values = []
    for log in logs:
        rows = [row for row in log if row.get(column) is not None]
        values.append(statistics.mean(row[column] for row in rows[-last:]))
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def in_table(mean_and_deviation, digits=2):
    mean, deviation = mean_and_deviation
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def arm_logs(experiment, arm):
    folder = DATA / "results" / experiment
    paths = sorted(folder.glob(f"{arm}-[0-9].jsonl"))
    return [[json.loads(line) for line in open(path)] for path in paths]


METHOD_NAMES = {"remax": "ReMax", "rloo": "RLOO"}  # in the log: in the README


def beside_rloo(kind, lr):
    """The runs of one method at one learning rate, one for each seed."""
    runs = read_results("smollm2_vs_rloo.jsonl")
    return [run for run in runs if run["kind"] == kind and run["lr"] == lr]


def median_seconds(kind):
    runs = beside_rloo(kind, 5e-5) + beside_rloo(kind, 1e-4)
    return statistics.median(run["seconds_per_step"] for run in runs)


EVALUATED = ("eval_reward", "eval_greedy_reward", "eval_kl")
MEMORY_NAMES = {  # in the log: in the README
    "PPO, default, one by one": "with a critic, updated after the policy",
    "PPO, default, together": "with a critic, both gradients kept at once",
    "default": "ReMax, the default",
    "default, on a small GPU (--offload)": "ReMax, `--offload`",
    "--optimizer adafactor --offload --micro-batch-size 1": (
        "ReMax, `--offload --optimizer adafactor --micro-batch-size 1`"
    ),
}


def quoted_rows():
    """The rows of the README's tables, made from the logs."""
    rows = []
    for experiment, names in (
        (
            "smollm2",
            ("ReMax, half the batch", "REINFORCE, half the batch", "mean of the other prompts"),
        ),
        ("tiny", ("ReMax", "REINFORCE", "the mean of the other prompts")),
    ):
        for name, arm in zip(names, ("remax", "reinforce", "batch"), strict=True):
            logs = arm_logs(experiment, arm)
            digits = 3 if experiment == "tiny" else 2
            cells = [in_table(spread(logs, c), 2 if "kl" in c else digits) for c in EVALUATED]
            rows.append(f"| {name} | {' | '.join(cells)} |")
    for arm, name in (("remax", "ReMax"), ("reinforce", "REINFORCE")):
        logs = arm_logs("smollm2_gpu", arm)
        cells = [in_table(spread(logs, column)) for column in EVALUATED]
        cells += [in_table(spread(logs, "grad_norm", last=20), 1)]
        flag = " (`--baseline none`)" if arm == "reinforce" else ""
        rows.append(f"| {name}{flag} | {' | '.join(cells)} |")
    for kind, lr in product(("remax", "rloo"), (5e-5, 1e-4)):
        logs = [row["evaluations"] for row in beside_rloo(kind, lr)]
        cells = [in_table(spread(logs, column)) for column in EVALUATED]
        rows.append(f"| {METHOD_NAMES[kind]} | {lr:.0e} | {' | '.join(cells)} |")
    peaks = {}
    for row in read_results("memory_gpu.jsonl"):
        if row["model"] in ("gpt2-large", "Llama-3.2-1B size"):
            peaks.setdefault(row["flags"], []).append(f"{row['peak_gb']:.1f}")
    rows += [f"| {MEMORY_NAMES[flags]} | {' | '.join(gb)} |" for flags, gb in peaks.items()]
    for row in read_results("cpu.jsonl"):
        size, ratio = f"{row['parameters'] / 1e6:.0f}M", row["ratio"]
        rows.append(
            f"| {size} | {row['threads']} | {ratio['ReMax/RLOO']:.2f} | {ratio['ReMax/GRPO']:.2f} |"
        )
    return rows + shift_rows() + real_shift_rows() + variance_rows()


def shift_rows():
    """What was added to the rewards, on average over the held-out prompts, shows before step 1."""
    rows, without = [], arm_logs("shift", "remax-0")[0][0]["eval_reward"]
    arms = {"remax": "ReMax", "batch": "mean of the other prompts", "reinforce": "REINFORCE"}
    added = {"0": "nothing", "5": "5", "x": "c(x)"}
    for (arm, name), (c, words) in product(arms.items(), added.items()):
        logs = arm_logs("shift", f"{arm}-{c}")
        mean, deviation = spread(logs, "eval_reward")
        cells = [
            in_table((mean - (logs[0][0]["eval_reward"] - without), deviation)),
            in_table(spread(logs, "eval_kl"), 1),
            in_table(spread(logs, "grad_norm", last=20), 1),
        ]
        rows.append(f"| {name} | {words} | {' | '.join(cells)} |")
    return rows


def real_shift_rows():
    """The same on the real model, where what was added is known: see shifted_vader.py."""
    tokenizer = remax.load_policy_tokenizer(tiny_args())
    _, held_out = remax.load_prompts(tiny_args(), tokenizer)
    c = statistics.mean((zlib.crc32(row.reward_prompt.encode()) % 11 - 5) / 5 for row in held_out)
    rows = []
    arms = {"remax": "ReMax", "batch": "mean of the other prompts"}
    added = {("smollm2", ""): "nothing", ("smollm2_shift", "-x"): "c(x)"}
    for (arm, name), ((experiment, ending), words) in product(arms.items(), added.items()):
        logs = arm_logs(experiment, f"{arm}{ending}")
        mean, deviation = spread(logs, "eval_reward")
        cells = [
            in_table((mean - (c if words == "c(x)" else 0), deviation)),
            in_table(spread(logs, "eval_kl"), 1),
            in_table(spread(logs, "grad_norm", last=20), 1),
        ]
        rows.append(f"| {name} | {words} | {' | '.join(cells)} |")
    return rows


def variance_rows():
    rows, measured = [], read_results("variance.jsonl")
    for step in sorted({row["step"] for row in measured}):
        cells = []
        for column in "reward", "greedy_reward", "ratio_greedy", "ratio_batch":
            mean = statistics.fmean(row[column] for row in measured if row["step"] == step)
            cells.append(f"{mean:.2f}")
        rows.append(f"| {step} | {' | '.join(cells)} |")
    return rows


def numbers_in_tables(text):
    """The rows of tables whose last cell is a number."""
    return re.findall(r"^\|.*\d \|$", text, re.M)


def test_the_tables_of_the_readme_are_the_logs():
    made, results = quoted_rows(), README[README.index("## Results") : README.index("## Use")]
    for row in made:
        assert row in README + DATA_README, row
    for row in numbers_in_tables(results + DATA_README):  # and there is no other, older one
        assert row in made or row.startswith(("| before", "| on an")), row


def assert_quoted(*sentences):
    for sentence in sentences:
        assert sentence in TEXT, sentence


def evaluations_of(log):
    return [row for row in log if "eval_reward" in row]


def test_the_runs_of_the_real_model_are_quoted_right():
    logs = arm_logs("smollm2_gpu", "remax") + arm_logs("smollm2_gpu", "reinforce")
    before = logs[0][0]
    differences, norms = [], []
    for log in logs:
        steps = [row for row in log if "reward" in row]
        differences += [row["sampling_logp_difference"] for row in steps]
        norms += [row["grad_norm"] for row in steps]
    assert_quoted(
        f"| before | {before['eval_reward']:.2f} | {before['eval_greedy_reward']:.2f} | 0 | |",
        f"below {math.ceil(max(differences) * 100) / 100} nats",
    )
    assert min(norms) > 1  # "every gradient was scaled down"


def test_the_smaller_runs_of_the_real_model_are_quoted_right():
    logs, other_logs = arm_logs("smollm2", "remax"), arm_logs("smollm2", "batch")
    before = logs[0][0]
    reward, kl = spread(logs, "eval_reward"), spread(logs, "eval_kl")[0]
    other_reward, other_kl = spread(other_logs, "eval_reward"), spread(other_logs, "eval_kl")[0]
    after, strict = logs[0][-1], arm_logs("smollm2_kl", "remax")[0][-1]
    assert_quoted(
        f"| before | {before['eval_reward']:.2f} | {before['eval_greedy_reward']:.2f} | 0 |",
        f"({in_table(other_reward)}, ReMax {in_table(reward)})",
        f"({other_kl:.1f}, ReMax {kl:.1f})",
        f"the KL ends at {strict['eval_kl']:.1f} in place of {after['eval_kl']:.1f}",
        f"the reward at {strict['eval_reward']:.2f} in place of {after['eval_reward']:.2f}",
    )


def test_the_chat_task_is_quoted_right():
    evaluations = evaluations_of(arm_logs("chat", "remax")[0])
    first, last = evaluations[0], evaluations[-1]
    assert_quoted(
        f"went from {first['eval_greedy_reward']:.0%} to {last['eval_greedy_reward']:.0%} right",
        f"went from {first['eval_reward']:.1%} to {last['eval_reward']:.1%}",
    )


def test_the_race_beside_trl_is_quoted_right():
    race = read_results("tiny_vs_rloo.jsonl")[-1]
    remax_seconds, rloo_seconds = race["ReMax"]["seconds"], race["RLOO"]["seconds"]
    assert_quoted(
        f"in {race['ReMax']['median']:.1f} seconds of training",
        f"RLOO in {race['RLOO']['median']:.1f}",
        f"from {min(remax_seconds):.1f} to {max(remax_seconds):.1f} seconds for ReMax",
        f"from {min(rloo_seconds):.1f} to {max(rloo_seconds):.1f} for RLOO",
        f"A step of ReMax took {median_seconds('remax'):.1f} seconds",
        f"one of RLOO {median_seconds('rloo'):.1f}",
    )


def test_the_seconds_of_a_step_on_a_gpu_are_quoted_right():
    first, second = (row["seconds"] for row in read_results("gpu.jsonl"))
    ratios = [second["RLOO"] / second["ReMax"], median_seconds("rloo") / median_seconds("remax")]
    ratios += [1 / row["ratio"]["ReMax/RLOO"] for row in read_results("cpu.jsonl")]
    row = "{ReMax:.1f} | {RLOO:.1f} | {GRPO:.1f} |"
    assert_quoted(
        f"| on an H200 | {row.format(**first)}",
        f"| on another H200 | {row.format(**second)}",
        f"a step of RLOO took {min(ratios):.1f} to {max(ratios):.1f} times as long",
    )


def test_where_the_seconds_go_on_a_gpu_is_quoted_right():
    measured = read_results("gpu_step.jsonl")
    profile = measured[-1]
    decoding = [row["seconds"] for row in measured if "seconds" in row]
    small_parts, large_parts = (row for row in measured if "update_seconds" in row)
    more_memory = large_parts["peak_gb"] / small_parts["peak_gb"] - 1
    assert_quoted(
        f"kernels took {profile['kernel_seconds']:.2f} of {profile['wall_seconds']:.2f} seconds",
        f"`rollout` took {decoding[0]:.1f} seconds, with a static cache {decoding[2]:.1f}",
        f"with each token captured as a CUDA graph {decoding[3]:.1f}",
        f"the update took {large_parts['update_seconds']:.1f} seconds in place of "
        f"{small_parts['update_seconds']:.1f}",
        f"the step's peak of memory rose by {more_memory:.0%}",
    )


def test_the_seconds_on_a_cpu_are_quoted_right():
    fast, slow = (row["whole_seconds"] for row in read_results("whole_run.jsonl"))
    seconds = read_results("two_processes.jsonl")[-1]["seconds"]
    share = seconds["two processes of one thread"] / seconds["one process of two threads"]
    assert_quoted(
        f"It took {statistics.median(fast):.0f} seconds on one idle machine",
        f"and {statistics.median(slow):.0f} on a slower one",
        f"took {share:.2f} times the seconds of one process with two threads",
    )


def test_the_cost_of_the_greedy_response_is_quoted_right():
    ratios = [row["ratio"] for row in read_results("greedy_half.jsonl")]
    assert_quoted(f"took {min(ratios):.1f} to {max(ratios):.1f} times as long as decoding the")


@pytest.mark.parametrize("column", ["eval_reward", "eval_kl"])
def test_each_seed_of_remax_ends_above_each_of_the_other_baseline_with_c_of_x(column):
    ends = {}
    for arm in "remax-x", "batch-x":
        ends[arm] = [log[-1][column] for log in arm_logs("smollm2_shift", arm)]
    assert min(ends["remax-x"]) > max(ends["batch-x"])


def test_measured_and_computed_memory_are_quoted_right():
    measured, computed = {}, {}
    for name, peaks in ("memory_gpu.jsonl", measured), ("memory.jsonl", computed):
        for row in read_results(name):
            peaks[row["model"], row["flags"]] = row["peak_gb"]
    lower = max(1 - gb / measured[key] for key, gb in computed.items())
    assert_quoted(
        f"It needs {measured['gpt2-large', 'default']:.1f} GB of GPU memory",
        f"figures are up to {lower:.0%} lower",
    )


def test_the_numbers_of_the_tests_are_quoted_right():
    assert_quoted(
        f"in {len(FAMILIES)} model families",
        f"tries {len(MISTAKES)} mistakes",
        f"in {len(SABOTAGE)} ways",
    )


def test_the_memory_and_disk_of_the_readme_are_the_logs_and_12_bytes_a_parameter():
    peaks = {}
    parameters = {"SmolLM2, 135M": 134_515_008}
    largest = "1.24B, 16 prompts of 64 + 128 tokens"
    names = {"gpt2-large": "gpt2-large, 774M", "Llama-3.2-1B size": largest}
    for row in read_results("memory_gpu.jsonl"):
        if row["model"] in names and "PPO" not in row["flags"]:
            peaks.setdefault(names[row["model"]], []).append(f"{row['peak_gb']:.1f}")
            parameters[names[row["model"]]] = row["parameters"]
    rows = [row for log in arm_logs("smollm2_gpu", "remax") for row in log]
    peak = max(row.get("peak_memory_gb", 0) for row in rows)
    peaks["SmolLM2, 135M"] = [f"{peak:.1f}", "not measured", "not measured"]
    for name, cells in peaks.items():
        checkpoint, model = 12e-9 * parameters[name], 4e-9 * parameters[name]
        cells = [*cells, f"{checkpoint:.1f}", f"{model:.1f}"]
        assert f"| {name} | {' | '.join(cells)} |" in README


def test_each_seed_of_remax_ends_with_a_higher_reward():
    """The README says so of the real model."""
    ends = {}
    for arm in "remax", "reinforce":
        ends[arm] = [log[-1]["eval_reward"] for log in arm_logs("smollm2_gpu", arm)]
    assert min(ends["remax"]) > max(ends["reinforce"])


def test_each_seed_of_rloo_ends_where_the_readme_says():
    ends = {}
    for kind, lr in product(("remax", "rloo"), (5e-5, 1e-4)):
        ends[kind, lr] = [run["evaluations"][-1] for run in beside_rloo(kind, lr)]
        assert len(ends[kind, lr]) == 5
    rewards = {key: [end["eval_reward"] for end in runs] for key, runs in ends.items()}
    kls = {key: [end["eval_kl"] for end in runs] for key, runs in ends.items()}
    assert min(rewards["rloo", 5e-5]) > max(rewards["remax", 5e-5])
    assert max(kls["rloo", 1e-4]) < min(kls["remax", 1e-4])


def test_the_samples_of_the_readme_are_those_of_the_run():
    console = (DATA / "results/smollm2_gpu/remax-1.txt").read_text()
    console = " ".join(console.replace("\\n", " ").split())
    (samples,) = re.findall(r"ReMax, seed 1\):\n\n(.*?)\n\nBoth became", README, re.S)
    end = r"(?=\n +after \(|\n\n|$)"
    texts = re.findall(r"\((-?\d\.\d+)\):\n(.*?)" + end, samples, re.S)
    assert len(texts) == 4
    for reward, text in texts:
        assert reward in console
        assert " ".join(text.split()) in console, text


def test_the_console_of_the_readme_is_that_of_the_run():
    console = (DATA / "results/tiny/remax-0.txt").read_text().splitlines()
    shown = re.findall(r"^    ((?:640 prompts|step \d+: held|eval_|\w+_seconds ).*)$", README, re.M)
    assert len(shown) == 9
    assert all(line in console for line in shown)


def test_the_rewards_of_the_three_samples_are_those_of_the_run():
    console = (DATA / "results/tiny/remax-0.txt").read_text()
    samples = re.findall(r"> (.*)\n +sampled +(\S+) .*\n +greedy +(\S+) ", console)[:3]
    for prompt, reward, baseline in samples:
        difference = float(reward) - float(baseline)
        assert f"| {prompt} | {reward} | {baseline} | {difference:.3f} |" in README


def test_the_readme_names_every_column():
    columns = set(STEP_COLUMNS + EVALUATION_COLUMNS) - {"step"}
    assert all(f"`{column}`" in README for column in columns)


def test_the_reward_function_of_the_readme_reads_texts_and_chats(tmp_path):
    (source,) = re.findall(r"( +def text_of.*?)\n\nSave this", README, re.S)
    functions = {}
    exec(textwrap.dedent(source), functions)
    chat = [{"role": "assistant", "content": " five."}]
    assert functions["right"](["", ""], [" five", chat], ["five", "six"]) == [1.0, 0.0]


def test_lines_of_the_readme_are_short():
    for page in README, DATA_README:
        long = [line for line in page.splitlines() if len(line) > 100 and "|" not in line]
        assert not long


PASTEABLE = re.findall(r"^\| (`.*`) \| (`(?:import|from) .*?`) \|", README, re.M)


@pytest.mark.parametrize("functions, imports", PASTEABLE)
def test_what_the_readme_calls_pasteable_is(functions, imports):
    """Each function, with the imports that its row names and nothing else."""
    pieces = re.findall(r"`([^`]+)`", imports)
    for name in re.findall(r"`([^`]+)`", functions):
        pieces.append(inspect.getsource(getattr(remax, name)))
    names = {}
    exec("\n\n".join(pieces), names)
    model, (prompt, attention_mask) = make("gpt2"), prompts(B=3)
    response = torch.randint(3, 31, (3, 5))
    if "rollout" in names:
        names["rollout"](model, prompt, attention_mask, 5, EOS, PAD)
    if "token_logprobs" in names:
        names["token_logprobs"](model, prompt, attention_mask, response, torch.ones_like(response))
    if "remax_loss" in names:
        mask = names["response_mask"](response, EOS)
        logprobs = -torch.rand(3, 5)
        names["remax_loss"](logprobs, logprobs, mask, torch.ones(3), torch.zeros(3), 0.1)
    if "weights_as" in names:
        with names["weights_as"](model, torch.bfloat16):
            assert model.dtype == torch.bfloat16


def test_the_algorithm_can_be_pasted_whole(monkeypatch):
    """remax_step and all that it uses, with the imports that the README lists for it."""
    (imports,) = re.findall(r"with these imports:\n\n(.*?)\n\n\S", README, re.S)
    source = inspect.getsource(remax)
    start, end = (
        source.index("@torch.no_grad()\ndef rollout"),
        source.index("# End of the algorithm"),
    )
    names = {}
    exec(f"{textwrap.dedent(imports)}\n{source[start:end]}", names)
    expected = step(make("gpt2"), make("gpt2", seed=1))
    monkeypatch.setattr(remax, "remax_step", names["remax_step"])
    assert step(make("gpt2"), make("gpt2", seed=1)) == expected


def test_the_loop_of_the_readme_works_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (source,) = re.findall(r"```python\n(.*?)```", README, re.S)
    torch.manual_seed(0)  # whatever ran before
    exec(source, {})
    rewards = [float(text) for text in re.findall(r"reward (.*?),", capsys.readouterr().out)]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5])


def test_variances_of_gradients_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(DATA / "experiments")
    import variance

    flags = ["--at", "0", "1", "--estimates", "2", "--batch", "2"]
    variance.main([*flags, "--out", str(tmp_path / "variance.jsonl")])
    lines = (tmp_path / "variance.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        ratio = row["variance"]["greedy"] / row["variance"]["none"]
        assert row["ratio_greedy"] == pytest.approx(ratio)


def count_memory():
    sys.path.insert(0, str(DATA / "experiments"))
    import memory

    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, **no_dropout)
    memory.MODELS["tiny"] = (config, 8, 5, 3)
    parameters, peaks, _ = memory.step_peaks("tiny", memory.DEFAULT)
    assert parameters > 1e6
    assert peaks["rollout"] > 0
    assert peaks["update"] > peaks["score"]


def test_memory_is_counted_without_a_gpu():
    run_in_a_child(count_memory)


def test_the_mean_of_the_other_prompts_is_a_baseline_that_leaves_no_mean_advantage(monkeypatch):
    monkeypatch.syspath_prepend(DATA / "experiments")
    import batch_mean

    monkeypatch.setattr(remax, "remax_step", batch_mean.step_with_batch_mean)
    metrics = step(make("gpt2"))
    assert metrics["advantage"] == pytest.approx(0, abs=1e-5)
    assert metrics["zero_advantage"] < 1


def test_plot_draws_any_runs(tmp_path):
    pytest.importorskip("matplotlib")
    logs = sorted((DATA / "results/tiny").glob("remax-*.jsonl"))
    for name in "figure.svg", "figure.png":
        command = [sys.executable, DATA / "experiments/plot.py", "--out", tmp_path / name]
        done = subprocess.run([*command, "--arm", "ReMax", *logs], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).stat().st_size > 5000
