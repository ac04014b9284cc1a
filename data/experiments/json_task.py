"""A chat task with a verifiable reward: answer with a bare JSON object of one given key.

python data/experiments/json_task.py     # writes runs/json_task.jsonl, 400 chats
python remax.py --model runs/smollm2 --prompts runs/json_task.jsonl --max-prompt-tokens 80 \
  --reward data/experiments/json_task.py:is_bare_json
"""

import json
from itertools import product
from pathlib import Path

KEYS = ["colour", "shape", "material", "taste", "size", "smell", "use", "price"]
THINGS = """
snow grass milk coal honey butter bread paper glass iron gold silver copper wood stone
sand water ice smoke leather cotton wool silk rubber chalk clay salt sugar pepper coffee
tea rice corn wheat apples lemons cherries carrots onions tomatoes potatoes plums grapes
bananas peaches mint garlic ginger chocolate vinegar
""".split()  # noqa: SIM905, a list of fifty strings is no easier to read


def is_bare_json(prompts, completions, key, **kwargs):
    """1 if the whole answer is a JSON object whose single key is the one asked for, else 0."""
    rewards = []
    for completion, wanted in zip(completions, key, strict=True):
        try:
            answer = json.loads(completion[0]["content"])
            is_right = isinstance(answer, dict) and list(answer) == [wanted]
        except ValueError:
            is_right = False
        rewards.append(float(is_right))
    return rewards


def main():
    path = Path("runs/json_task.jsonl")
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        for key, thing in product(KEYS, THINGS):
            question = f'Give the {key} of {thing} as JSON with the single key "{key}".'
            chat = [{"role": "user", "content": question}]
            file.write(json.dumps({"prompt": chat, "key": key}) + "\n")
    print(f"{len(KEYS) * len(THINGS)} chats in {path}")


if __name__ == "__main__":
    main()
