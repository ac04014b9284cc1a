# SPDX-License-Identifier: MIT
"""Does the greedy baseline lower the variance of the gradient? ReMax against REINFORCE, measured.

    python remax.py                                             # trains runs/tiny-policy-0
    python data/experiments/variance.py --trained runs/tiny-policy-0/model  # a minute

Policy and prompts stay fixed, nothing is updated. An estimate is the gradient of remax_loss over a
new response to each of --batch prompts, before clipping. Both arms see the same responses and the
same KL penalty; the baseline alone differs: the reward of the greedy answer, or 0. Variance is the
trace of the covariance, sum_i |g_i - mean|^2 / (n - 1). The ratio is greedy / none: below 1 the
baseline helps. Its 95 % interval is a paired bootstrap over the estimates. The choice of prompts is
not in it: --seeds 0 1 2 gives a row each. "start" is data/tiny/policy, which is also the reference
of the KL penalty throughout; "end" is --trained.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from itertools import product
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import remax


def estimates(run, policy, rows, n):
    """n gradients of each arm, greedy and none, flat: (2,n,D); mean reward, sampled and greedy."""

    def score(responses):
        return remax.score_responses(run.args, run.reward_function, run.tokenizer, rows, responses)

    eos_id, pad_id = run.tokenizer.eos_token_id, run.tokenizer.pad_token_id
    prompt, attention_mask = remax.collate(run.tokenizer, rows, run.device)  # (B,P)
    decoding = prompt, attention_mask, run.args.max_new_tokens, eos_id, pad_id
    parameters = list(policy.eval().parameters())
    grads = torch.empty(2, n, sum(p.numel() for p in parameters))
    _, greedy_response, _ = remax.rollout(policy, *decoding)  # (B,T)
    baseline = score(greedy_response)  # (B,): there is no noise in it
    rewards = torch.zeros(n)
    for i in tqdm(range(n), leave=False):
        response, _, _ = remax.rollout(policy, *decoding)  # (B,T)
        reward = score(response)  # (B,)
        rewards[i] = reward.mean()
        mask = remax.response_mask(response, eos_id)  # (B,T)
        inputs = prompt, attention_mask, response, mask
        with torch.no_grad():
            ref_logprobs = remax.token_logprobs(run.reference, *inputs)  # (B,T)
        logprobs = remax.token_logprobs(policy, *inputs)  # (B,T)
        for arm, b in enumerate((baseline, torch.zeros_like(baseline))):
            loss = remax.remax_loss(logprobs, ref_logprobs, mask, reward, b, run.args.kl_coef)
            parts = torch.autograd.grad(loss, parameters, retain_graph=arm == 0)
            grads[arm, i] = torch.cat([part.flatten() for part in parts])
    return grads, rewards.mean().item(), baseline.mean().item()


def variances(grads, counts):
    """Trace of the covariance of gradients (n,D), unbiased, each counted (R,n) times -> (R,)"""
    n = len(grads)
    grads = grads - grads.mean(0)  # no difference of large numbers
    products = (grads @ grads.T).double()  # (n,n)
    # sum |g - mean|^2 = sum |g|^2 - |sum g|^2 / n: the inner products are enough
    return (counts @ products.diag() - (counts @ products * counts).sum(1) / n) / (n - 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trained", help="model folder of a finished run; without it: start alone")
    parser.add_argument("--estimates", type=int, default=200, help="gradients per arm [200]")
    parser.add_argument("--batch", type=int, default=8, help="prompts per gradient [8]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="prompts and samples [0]")
    parser.add_argument("--out", default="data/results/variance.jsonl", help="appended to")
    args = parser.parse_args(argv)
    if args.trained and not (Path(args.trained) / "config.json").is_file():
        parser.error(f"--trained {args.trained}: no model there; python remax.py makes one")
    n = args.estimates
    if n < 2:
        parser.error("--estimates: at least 2, or there is no variance")
    with tempfile.TemporaryDirectory() as folder:
        run = remax.Run(remax.parse_args(["--device", "cpu", "--output-dir", folder]))
    policies = {"start": run.policy}
    if args.trained:
        policies["end"] = AutoModelForCausalLM.from_pretrained(args.trained)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for seed, (name, policy) in product(args.seeds, policies.items()):
        torch.manual_seed(seed)
        batch = random.Random(seed).sample(run.training_rows, args.batch)
        grads, sampled, greedy = estimates(run, policy, batch, n)
        draws = torch.randint(n, (10_000, n))
        counts = torch.zeros(draws.shape).scatter_add_(1, draws, torch.ones(draws.shape))
        counts = torch.cat([torch.ones(1, n), counts]).double()  # row 0: the estimates themselves
        variance, plain = (variances(arm, counts) for arm in grads)  # (10001,) each
        ratio, *resampled = (variance / plain).tolist()
        low, high = torch.tensor(resampled).quantile(torch.tensor([0.025, 0.975])).tolist()
        row = dict(
            model=name,
            estimates=n,
            batch=args.batch,
            ratio=ratio,
            low=low,
            high=high,
            variance_greedy=variance[0].item(),
            variance_none=plain[0].item(),
            mean_reward=sampled,
            mean_greedy_reward=greedy,
            kl_coef=run.args.kl_coef,
            command=shlex.join(["python", *sys.argv]),
            torch=torch.__version__,
            transformers=transformers.__version__,
            seed=seed,
        )
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        verdict = "helps" if high < 1 else "hurts" if low > 1 else "makes no clear difference"
        print(
            f"{name:5} seed {seed}: variance {variance[0]:.4g} with the greedy baseline, "
            f"{plain[0]:.4g} without: ratio {ratio:.3f} [{low:.3f}, {high:.3f}], it {verdict}; "
            f"reward {sampled:.3f}, greedy {greedy:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
