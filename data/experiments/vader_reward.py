"""A reward function that uses a library: how positive a text sounds, from -1 to 1.

pip install vaderSentiment
python remax.py --model gpt2 --reward data/experiments/vader_reward.py:positive
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def text_of(completion):
    """A completion is a text or, for chats, a list with one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def positive(prompts, completions, **kwargs):
    texts = [text_of(completion) for completion in completions]
    return [analyzer.polarity_scores(text)["compound"] for text in texts]
