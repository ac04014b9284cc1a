"""VADER's score of a continuation, and on top a number from -1 to 1 that depends on the prompt.

pip install vaderSentiment
python remax.py --model gpt2 --reward data/experiments/shifted_vader.py:plus_number_of_prompt
"""

import zlib

from vader_reward import positive


def plus_number_of_prompt(prompts, completions, **kwargs):
    numbers = [(zlib.crc32(prompt.encode()) % 11 - 5) / 5 for prompt in prompts]
    scores = positive(prompts, completions)
    return [score + number for score, number in zip(scores, numbers, strict=True)]
