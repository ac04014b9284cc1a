"""The tiny world's reward as log-odds, and the same with something added to it.

A reward model is trained to compare two responses to the same prompt. So it is defined only up to a
number that may be another one for every prompt.

python remax.py --reward data/experiments/shifted_reward.py:plus_5
"""

import zlib
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


def plus_number_of_prompt(prompts, completions, **kwargs):
    """Add a whole number from -5 to 5 that depends on the prompt alone."""
    numbers = [zlib.crc32(prompt.encode()) % 11 - 5 for prompt in prompts]
    return plus_0(prompts, completions) + torch.tensor(numbers)
