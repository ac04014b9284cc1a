# SPDX-License-Identifier: MIT
"""What does it cost to decode the greedy response beside the sampled one?

    OMP_NUM_THREADS=1 python data/experiments/greedy_half.py >> data/results/greedy_half.jsonl

rollout() of B prompts decodes 2B rows. Without the greedy ones it would decode B rows, which is
what it does for half as many prompts. The two take turns. The ratio of their seconds is the median
over the rounds. The models are GPT-2s with random weights, in float32, and no response ends early.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config

import remax

SIZES = {
    "1M": dict(vocab_size=700, n_embd=128, n_layer=4, n_head=4),
    "15M": dict(vocab_size=8192, n_embd=384, n_layer=6, n_head=6),
    "111M": dict(vocab_size=32768, n_embd=768, n_layer=12, n_head=12),
}
IDS = dict(bos_token_id=0, eos_token_id=0)  # GPT-2's own are beyond these vocabularies
NO_TOKEN = -1  # as EOS: no response ends


def seconds_of_a_rollout(policy, B, args):
    prompt = torch.ones(B, args.prompt_tokens, dtype=torch.long, device=args.device)  # (B,P)
    start = time.perf_counter()
    response, _, _ = remax.rollout(
        policy, prompt, torch.ones_like(prompt), args.new_tokens, NO_TOKEN, pad_id=0
    )
    response.sum().item()  # waits for a GPU
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for size in args.sizes:
        torch.manual_seed(0)
        policy = (
            AutoModelForCausalLM.from_config(GPT2Config(**SIZES[size], **IDS))
            .to(args.device)
            .eval()
        )
        both, sampled_alone = [], []
        seconds_of_a_rollout(policy, 2, args)  # the first call is slower
        for _ in range(args.rounds):
            both.append(seconds_of_a_rollout(policy, args.batch, args))
            sampled_alone.append(seconds_of_a_rollout(policy, args.batch // 2, args))
        ratios = [a / b for a, b in zip(both, sampled_alone, strict=True)]
        row = {
            "size": size,
            "parameters": policy.num_parameters(),
            "rows": [2 * (args.batch // 2), 2 * args.batch],
            "seconds": [round(statistics.median(s), 3) for s in (sampled_alone, both)],
            "ratio": round(statistics.median(ratios), 3),
            "command": " ".join(["python", *sys.argv]),
            "threads": torch.get_num_threads(),
            "hardware": f"{os.cpu_count()} virtual {platform.machine()} cores, {args.device}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
