# SPDX-License-Identifier: MIT
"""remax.py with another baseline: the mean reward of the other prompts in the batch.

    python data/experiments/batch_mean.py --output-dir runs/batch-mean    # and any flag of remax.py

This baseline does not depend on the response either, and needs no greedy one. In metrics.jsonl
greedy_reward is the baseline then; the evaluations are remax.py's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

import remax

remax_step = remax.remax_step


def step_with_batch_mean(score, **arguments):
    """remax_step, but the rewards of the greedy responses are replaced by the other baseline."""

    def score_with_batch_mean(responses):
        reward, _ = score(responses).chunk(2)  # (B,) each
        others = (reward.sum() - reward) / (len(reward) - 1)  # (B,)
        return torch.cat([reward, others])  # (2B,)

    return remax_step(score=score_with_batch_mean, **arguments)


if __name__ == "__main__":
    remax.remax_step = step_with_batch_mean
    remax.main()
