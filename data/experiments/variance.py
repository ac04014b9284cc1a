# SPDX-License-Identifier: MIT
"""Does the greedy baseline lower the variance of the gradient? Measured along a training run.

    python data/experiments/variance.py --at 0 2 5 10 20 40 60 --seeds 0 1 2   # half an hour

The run is `python remax.py`. After each of the steps --at, the policy stands still and its gradient
is estimated many times, before clipping: each time from a new response to each of --batch prompts.
The estimates differ in the baseline alone: 0 (REINFORCE), the reward of the greedy response (ReMax)
or the mean reward of the other prompts in the batch. Responses and KL penalty are the same.

Variance is the trace of the covariance, sum_i |g_i - mean|^2 / (n - 1). A ratio is that of a
baseline to that of REINFORCE: below 1 the baseline helps. Its 95 % interval is a paired bootstrap
over the estimates. The choice of prompts is not in it: --seeds 0 1 2 gives a row each.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch
import transformers
from tqdm import tqdm

import remax

ARMS = "none", "greedy", "batch"


def baselines(reward, greedy_reward):
    """{arm: (B,)}: no baseline may depend on the response to its own prompt."""
    others = (reward.sum() - reward) / (len(reward) - 1)  # (B,)
    return {"none": torch.zeros_like(reward), "greedy": greedy_reward, "batch": others}


def estimates(run, rows, n):
    """{arm: n gradients (n,D)}; mean reward, sampled and greedy."""

    def score(responses):
        return remax.score_responses(run.args, run.reward_function, run.tokenizer, rows, responses)

    eos_id, pad_id = run.tokenizer.eos_token_id, run.tokenizer.pad_token_id
    prompt, attention_mask = remax.collate(run.tokenizer, rows, run.device)  # (B,P)
    parameters = list(run.policy.eval().parameters())
    size = sum(parameter.numel() for parameter in parameters)
    grads = {arm: torch.empty(n, size) for arm in ARMS}
    rewards, greedy_reward = torch.zeros(n), None
    for i in tqdm(range(n), leave=False):
        response, greedy_response, _ = remax.rollout(
            run.policy, prompt, attention_mask, run.args.max_new_tokens, eos_id, pad_id
        )  # (B,T) each
        if greedy_reward is None:  # it is the same every time
            greedy_reward = score(greedy_response)  # (B,)
        reward = score(response)  # (B,)
        rewards[i] = reward.mean()
        mask = remax.response_mask(response, eos_id)  # (B,T)
        inputs = prompt, attention_mask, response, mask
        with torch.no_grad():
            ref_logprobs = remax.token_logprobs(run.reference, *inputs)  # (B,T)
        logprobs = remax.token_logprobs(run.policy, *inputs)  # (B,T)
        for arm, baseline in baselines(reward, greedy_reward).items():
            loss = remax.remax_loss(
                logprobs, ref_logprobs, mask, reward, baseline, run.args.kl_coef
            )
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            grads[arm][i] = torch.cat([part.flatten() for part in parts])
    return grads, rewards.mean().item(), greedy_reward.mean().item()


def variances(grads, counts):
    """Trace of the covariance of gradients (n,D), unbiased, each counted (R,n) times -> (R,)"""
    n = len(grads)
    grads = grads - grads.mean(0)  # no difference of large numbers
    products = (grads @ grads.T).double()  # (n,n)
    # sum |g - mean|^2 = sum |g|^2 - |sum g|^2 / n: the inner products are enough
    return (counts @ products.diag() - (counts @ products * counts).sum(1) / n) / (n - 1)


def measure(run, seed, args):
    """A row of the log: the policy as it is now, and one choice of prompts."""
    n = args.estimates
    torch.manual_seed(seed)
    rows = random.Random(seed).sample(run.training_rows, args.batch)
    grads, reward, greedy_reward = estimates(run, rows, n)
    draws = torch.randint(n, (10_000, n))
    counts = torch.zeros(draws.shape).scatter_add_(1, draws, torch.ones(draws.shape))
    counts = torch.cat([torch.ones(1, n), counts]).double()  # row 0: the estimates themselves
    variance = {arm: variances(grads[arm], counts) for arm in ARMS}  # (10001,) each
    row = {
        "seed": seed,
        "estimates": n,
        "batch": args.batch,
        "reward": reward,
        "greedy_reward": greedy_reward,
        "variance": {arm: variance[arm][0].item() for arm in ARMS},
    }
    for arm in ARMS[1:]:
        ratio, *resampled = (variance[arm] / variance["none"]).tolist()
        interval = torch.tensor(resampled).quantile(torch.tensor([0.025, 0.975])).tolist()
        row[f"ratio_{arm}"], row[f"interval_{arm}"] = ratio, interval
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--at", type=int, nargs="+", default=[0], help="steps to measure after [0]")
    parser.add_argument("--estimates", type=int, default=100, help="gradients per baseline [100]")
    parser.add_argument("--batch", type=int, default=32, help="prompts per gradient [32]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="prompts and samples [0]")
    parser.add_argument("--out", default="data/results/variance.jsonl", help="appended to")
    args = parser.parse_args(argv)
    if args.estimates < 2:
        parser.error("--estimates: at least 2, or there is no variance")
    if args.batch < 2:
        parser.error("--batch: at least 2, or there are no other prompts")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = remax.Run(remax.parse_args(["--device", "cpu", "--output-dir", folder]))
        for step in range(max(args.at) + 1):
            if step > 0:
                run.train_step(step)
            if step not in args.at:
                continue
            for seed in args.seeds:
                row = {"step": step} | measure(run, seed, args)
                row["command"] = shlex.join(["python", *sys.argv])
                row["versions"] = {"torch": torch.__version__}
                row["versions"]["transformers"] = transformers.__version__
                with open(args.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"step {step}, seed {seed}: variance / REINFORCE's: greedy "
                    f"{row['ratio_greedy']:.3f}, batch {row['ratio_batch']:.3f}; "
                    f"reward {row['reward']:.3f}, greedy {row['greedy_reward']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
