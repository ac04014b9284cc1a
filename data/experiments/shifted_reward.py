"""The tiny world's reward as log-odds, and the same with a constant added to it.

A reward model that was trained on comparisons is defined only up to such a constant.

python remax.py --reward data/experiments/shifted_reward.py:plus_5
"""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).resolve().parent.parent / "tiny/reward"
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)


@torch.no_grad()
def plus_0(prompts, completions, **kwargs):
    """log(p / (1 - p)), where p is the probability of the label POSITIVE."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    negative, positive = model(**batch).logits.T  # (N,) each
    return positive - negative


def plus_5(prompts, completions, **kwargs):
    return plus_0(prompts, completions) + 5
