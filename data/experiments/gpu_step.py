# SPDX-License-Identifier: MIT
"""Where the seconds of a step go on a GPU, and what other ways to decode would save.

    python data/experiments/gpu_step.py   # writes data/results/gpu_step.jsonl; no download

Random weights of gpt2-large's size, 64 prompts of 64 tokens, 128 new tokens without an EOS, a
DistilBERT as reward model, gradient checkpointing, bfloat16. It measures
  - remax.rollout alone, beside three loops that it could be: without asking after every token
    whether all rows are done; with a static cache; with a static cache and each token's work
    captured as one CUDA graph;
  - remax.remax_step: seconds by phase, with 8 and with 32 rows in a backward pass;
  - the ten kernels that take most of a step's time on the GPU, in a step of 8 new tokens (a profile
    of all 128 takes many minutes to put together).
Each time is the median of several repeats, after one to warm up.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    StaticCache,
)

import remax

DTYPE = torch.bfloat16
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20, **NO_DROPOUT)
B, P, T = 64, 64, 128
NO_EOS, PAD = -1, 0
MICRO_BATCH_SIZES = (8, 32)
PROFILED_TOKENS = 8


def seconds(function, repeats):
    """The median seconds of a call."""
    function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def next_tokens(logits):
    """The first half of the rows draws, the second takes the best: (2B,V) -> (2B,1)."""
    sampled = torch.multinomial(logits[:B].float().softmax(-1), 1)  # (B,1)
    best = logits[B:].argmax(-1, keepdim=True)  # (B,1)
    return torch.cat([sampled, best])


@torch.no_grad()
def loop(policy, prompt, attention_mask, cache=None):
    """remax.rollout's loop without its question whether all rows are done."""
    inputs, tokens = prompt, []  # (2B,P), then (2B,1)
    if cache is not None:  # one mask over the whole length: the cache hides what is still to come
        room = torch.ones(2 * B, T, dtype=torch.long, device=prompt.device)
        attention_mask = torch.cat([attention_mask, room], 1)  # (2B,P+T)
    for t in range(T):
        seen = attention_mask if cache is not None else attention_mask[:, : P + t]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, : P + t]  # (2B,P+t)
        output = policy(
            inputs,
            attention_mask=seen,
            position_ids=positions[:, -inputs.size(1) :],
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if not isinstance(cache, StaticCache):
            cache = output.cache
            room = torch.ones_like(prompt[:, :1])
            attention_mask = torch.cat([attention_mask, room], 1)  # (2B,P+t+1)
        inputs = next_tokens(output.logits[:, -1])  # (2B,1)
        tokens.append(inputs)
    return torch.cat(tokens, 1)


class Captured:
    """The static cache's loop with the work of one token captured as a CUDA graph."""

    def __init__(self, policy, prompt, attention_mask):
        self.policy, self.prompt = policy, prompt
        room = torch.ones(2 * B, T, dtype=torch.long, device=prompt.device)
        self.attention_mask = torch.cat([attention_mask, room], 1)  # (2B,P+T)
        self.columns = torch.arange(P + T, device=prompt.device)  # (P+T,)
        self.first_position = attention_mask.sum(1, keepdim=True)  # (2B,1)
        self.cache = StaticCache(config=policy.config, max_cache_len=P + T)
        self.newest = torch.zeros(2 * B, 1, dtype=torch.long, device=prompt.device)
        self.column = torch.zeros(1, dtype=torch.long, device=prompt.device)
        self.graph = None

    def prefill(self):
        self.cache.reset()
        positions = (self.attention_mask.cumsum(1) - 1).clamp(min=0)  # (2B,P+T)
        output = self.policy(
            self.prompt,
            attention_mask=self.attention_mask,
            position_ids=positions[:, :P],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.newest.copy_(next_tokens(output.logits[:, -1]))
        self.column.fill_(P)

    def one_token(self):
        """All in place, at fixed addresses: nothing here may depend on a number of the CPU's."""
        visible = (self.columns <= self.column) & self.attention_mask.bool()  # (2B,P+T)
        positions = self.first_position + self.column - P  # (2B,1)
        output = self.policy(
            self.newest,
            attention_mask=visible[:, None, None, :],
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.newest.copy_(next_tokens(output.logits[:, -1]))
        self.column += 1

    def capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.one_token()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.one_token()

    @torch.no_grad()
    def __call__(self):
        self.prefill()
        if self.graph is None:
            self.capture()
            self.prefill()
        tokens = [self.newest.clone()]
        for _ in range(T - 1):
            self.graph.replay()
            tokens.append(self.newest.clone())
        return torch.cat(tokens, 1)  # (2B,T)


def ways_to_decode(policy, prompt, attention_mask):
    """name -> a function that returns the tokens of all rows, (2B,T)."""
    both = prompt.repeat(2, 1), attention_mask.repeat(2, 1)  # (2B,P) each

    def rollout():
        return torch.cat(remax.rollout(policy, prompt, attention_mask, T, NO_EOS, PAD)[:2])

    def dynamic():
        return loop(policy, *both)

    def static():
        return loop(policy, *both, StaticCache(config=policy.config, max_cache_len=P + T))

    return {
        "remax.rollout": rollout,
        "without asking whether all are done": dynamic,
        "static cache": static,
        "static cache and CUDA graph": Captured(policy, *both),
    }


def decoding(policy, prompt, attention_mask, repeats):
    """Yield a row for each way: seconds, and how many greedy tokens are those of remax.rollout.

    In 16 bits two ways round differently, and one other token changes all that follow it.
    """
    policy.eval()
    expected = None
    with remax.weights_as(policy, DTYPE):
        for name, way in ways_to_decode(policy, prompt, attention_mask).items():
            greedy = way()[B:]
            expected = greedy if expected is None else expected
            agreement = (greedy == expected).float().mean().item()
            yield {
                "what": f"decoding: {name}",
                "seconds": seconds(way, repeats),
                "same_greedy_tokens": agreement,
            }


def profile(call):
    """The seconds of a call by the clock and on the GPU, and its ten most expensive kernels."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
        wall_seconds = time.perf_counter() - start
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    return {
        "wall_seconds": wall_seconds,
        "kernel_seconds": sum(kernel.self_device_time_total for kernel in kernels) / 1e6,
        "kernels": [
            {
                "name": kernel.key[:100],
                "seconds": kernel.self_device_time_total / 1e6,
                "calls": kernel.count,
            }
            for kernel in kernels[:10]
        ],
    }


def steps(policy, prompt, attention_mask, repeats):
    """Yield a row of seconds by phase for each micro-batch size, then a profile."""
    device = prompt.device
    reference = AutoModelForCausalLM.from_config(policy.config, dtype=DTYPE).to(device).eval()
    reference.requires_grad_(False)
    classifier = AutoModelForSequenceClassification.from_config(DistilBertConfig(), dtype=DTYPE)
    classifier.to(device).eval().requires_grad_(False)
    policy.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    @torch.no_grad()
    def score(responses):
        # GPT-2's tokens are not DistilBERT's: cut to its vocabulary, they cost the same.
        ids = torch.cat([prompt.repeat(2, 1), responses], 1) % 30000  # (2B,P+T)
        return classifier(ids).logits[:, -1].float()

    def step(micro_batch_size, new_tokens=T):
        settings = remax.StepSettings(
            eos_id=NO_EOS,
            pad_id=PAD,
            max_new_tokens=new_tokens,
            kl_coef=0.01,
            greedy_baseline=True,
            micro_batch_size=micro_batch_size,
            max_grad_norm=1.0,
            dtype=DTYPE,
        )
        stopwatch = remax.Stopwatch()

        def timed_score(responses):
            stopwatch.lap("rollout_seconds")
            rewards = score(responses)
            stopwatch.lap("score_seconds")
            return rewards

        result = remax.remax_step(
            policy, reference, optimizer, scaler, timed_score, prompt, attention_mask, settings
        )
        stopwatch.lap("update_seconds")
        return remax.step_metrics(result, settings) | stopwatch.seconds

    names = "rollout_seconds", "score_seconds", "update_seconds"
    for size in MICRO_BATCH_SIZES:
        step(size)  # the first one creates the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        measured = [step(size) for _ in range(repeats)]
        row = {"what": f"remax_step, --micro-batch-size {size}"}
        for name in names:
            row[name] = statistics.median(metrics[name] for metrics in measured)
        row["sampling_logp_difference"] = measured[0]["sampling_logp_difference"]
        row["skipped"] = sum(metrics["skipped"] for metrics in measured)
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        yield row
    what = f"profile of remax_step with {PROFILED_TOKENS} new tokens"
    yield {"what": what} | profile(lambda: step(max(MICRO_BATCH_SIZES), PROFILED_TOKENS))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_step.py: torch finds no CUDA GPU here")
    device = torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as remax.Run does
    torch.manual_seed(0)
    with device:
        policy = AutoModelForCausalLM.from_config(GPT2_LARGE, dtype=torch.float32)
        prompt = torch.randint(1, 50000, (B, P))  # (B,P)
        attention_mask = torch.ones_like(prompt)  # (B,P)
    attention_mask[::2, :8] = 0  # some padding, so that attention takes the path with a mask
    about = {
        "parameters": policy.num_parameters(),
        "prompts": B,
        "prompt_tokens": P,
        "new_tokens": T,
        "repeats": args.repeats,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python data/experiments/gpu_step.py", *sys.argv[1:]]),
    }
    inputs = policy, prompt, attention_mask, args.repeats
    with open(ROOT / "data/results/gpu_step.jsonl", "w", buffering=1) as file:
        for row in itertools.chain(decoding(*inputs), steps(*inputs)):
            file.write(json.dumps(row | about) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
