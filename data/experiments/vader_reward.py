"""A reward function that uses a library: how positive a text sounds, from -1 to 1.

pip install vaderSentiment
python remax.py --model gpt2 --reward data/experiments/vader_reward.py:positive
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def positive(prompts, completions, **kwargs):
    return [analyzer.polarity_scores(completion)["compound"] for completion in completions]
