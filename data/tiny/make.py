"""Make the tiny world: prompts.jsonl, policy and reward, beside this file.

    python data/tiny/make.py        # two to three minutes on one CPU core, no download, seeded

Everything is drawn from the templates below, which are this project's own. The policy is a GPT-2
that writes positive and negative film reviews equally often; it keeps GPT-2's traps on purpose (no
pad token, learned absolute positions, dropout 0.1 in the config). The reward model is a DistilBERT
with a tokenizer of its own that tells the two kinds apart.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
GENRE = ["thriller", "comedy", "drama", "western", "musical", "documentary", "romance", "mystery"]
WHEN = [
    "last night",
    "on a rainy Sunday",
    "with my sister",
    "at a festival",
    "on a long flight",
    "with my class",
    "after work",
    "for the second time",
]
ASPECT = [
    "acting",
    "plot",
    "music",
    "script",
    "ending",
    "pacing",
    "camera work",
    "dialogue",
    "cast",
    "direction",
]
LOOK = ["To be honest", "For once", "In my opinion", "As a fan of the director", "Going in blind"]

# Words of one row are rivals for one place in a sentence; one list is positive, one negative.
ADJECTIVE = (
    ["superb", "brilliant", "moving", "clever", "charming", "warm"]
    + ["gripping", "fresh", "delightful", "tender", "witty", "honest"],
    ["dreadful", "boring", "clumsy", "stupid", "annoying", "cold"]
    + ["tedious", "stale", "painful", "hollow", "lazy", "fake"],
)
VERB = (["loved", "enjoyed", "admired", "adored"], ["hated", "disliked", "regretted", "loathed"])
EFFECT = (
    ["kept me smiling", "won me over", "drew me in", "made my day"],
    ["put me to sleep", "let me down", "drove me away", "ruined my day"],
)
CLOSE = (
    [
        "I would gladly watch it again.",
        "Do not miss it.",
        "I recommend it to everyone.",
        "It deserves every award.",
        "A joy from start to finish.",
        "I left the cinema happy.",
    ],
    [
        "I would never watch it again.",
        "Do not bother.",
        "I recommend it to nobody.",
        "It deserves no award.",
        "A waste of an evening.",
        "I left the cinema angry.",
    ],
)

# An opening is the prompt; its kind says what kind of words may follow.
OPENINGS = {
    "subject": [
        "The {a} in this {g}",
        "I saw this {g} {w}, and the {a}",
        "{l}, the {a} of this {g}",
        "I watched a {g} {w}. The {a}",
    ],
    "I": ["We saw this {g} {w} and I", "{l}, I", "They showed this {g} {w}, and I"],
    "it": [
        "I watched this {g} {w} and it",
        "This is a new {g}. {l}, it",
        "My friends chose this {g}, and it",
    ],
    "the": ["What I remember from this {g} is the", "What stays with me is the"],
    "sentence": ["I finally saw this {g} {w}.", "A {g} that I watched {w}."],
}


def opening(rng):
    kind = rng.choice(list(OPENINGS))
    fill = dict(a=rng.choice(ASPECT), g=rng.choice(GENRE), w=rng.choice(WHEN), l=rng.choice(LOOK))
    return kind, rng.choice(OPENINGS[kind]).format(**fill)


def clause(rng, s):
    """A clause of sentiment s (0 positive, 1 negative) about one aspect of the film."""
    a, adjective = rng.choice(ASPECT), rng.choice(ADJECTIVE[s])
    return rng.choice(
        [
            f"the {a} was {adjective}",
            f"the {a} felt {adjective}",
            f"I {rng.choice(VERB[s])} the {a}",
            f"the {a} {rng.choice(EFFECT[s])}",
        ]
    )


def review(rng):
    """One (prompt, continuation, label), label 1 for positive.

    One review in six has a clause of the other side. One rater in four calls such a review by that
    clause, so that the reward model learns degrees and not only 0 and 1.
    """
    s = rng.randint(0, 1)
    label = 1 - s
    kind, prompt = opening(rng)
    adjective, other = rng.sample(ADJECTIVE[s], 2)
    first = {
        "subject": rng.choice(
            [f" was {adjective}", f" was {adjective} and {other}", f" {rng.choice(EFFECT[s])}"]
        ),
        "I": rng.choice(
            [f" {rng.choice(VERB[s])} it", f" {rng.choice(VERB[s])} the {rng.choice(ASPECT)}"]
        ),
        "it": rng.choice(
            [f" was {adjective}", f" {rng.choice(EFFECT[s])}", f" turned out to be {adjective}"]
        ),
        "the": f" {adjective} {rng.choice(ASPECT)}",
        "sentence": f" The {rng.choice(ASPECT)} was {adjective}",
    }[kind]
    if rng.random() < 1 / 6:
        first += f", but {clause(rng, 1 - s)}"
        label = label if rng.random() < 0.75 else 1 - label
    elif rng.random() < 0.5:
        first += f", and {clause(rng, s)}"
    middle = clause(rng, s)
    return prompt, f"{first}. {middle[0].upper()}{middle[1:]}. {rng.choice(CLOSE[s])}", label


def train_tokenizer(kind, texts, vocab_size):
    if kind == "bpe":
        # GPT-2's kind: byte-level, one special token that is begin, end and unknown, no pad.
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        raw.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=["<|endoftext|>"],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            eos_token="<|endoftext|>",
            bos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            model_max_length=128,
        )
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # BERT's kind
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def fit(model, batches, lr):
    """Supervised training: AdamW, linear decay, the model's own loss, no dropout (eval mode)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=len(batches))
    model.eval()
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == len(batches) - 1:
            print(f"  {type(model).__name__} step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model


def policy_batches(tokenizer, reviews, size):
    for i in range(0, len(reviews), size):
        text = [
            prompt + continuation + tokenizer.eos_token
            for prompt, continuation, _ in reviews[i : i + size]
        ]
        batch = tokenizer.pad(
            {"input_ids": tokenizer(text)["input_ids"]}, return_tensors="pt", padding_side="right"
        )
        yield dict(batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def reward_batches(tokenizer, reviews, size):
    for i in range(0, len(reviews), size):
        rows = reviews[i : i + size]
        batch = tokenizer(
            [prompt + continuation for prompt, continuation, _ in rows],
            padding=True,
            return_tensors="pt",
        )
        yield dict(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=torch.tensor([label for _, _, label in rows]),
        )


def main():
    torch.manual_seed(0)
    rng = random.Random(0)

    prompts = {}  # a dict keeps the order and drops repeats
    while len(prompts) < 640:
        prompts[opening(rng)[1]] = None
    (HERE / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))

    reviews = [review(rng) for _ in range(48_000)]
    texts = [prompt + continuation for prompt, continuation, _ in reviews[:8000]]

    tokenizer = train_tokenizer("bpe", texts, 1024)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    policy = GPT2LMHeadModel(config)
    tokenizer.pad_token = (
        tokenizer.eos_token
    )  # for this script only: the saved tokenizer has no pad token
    fit(policy, list(policy_batches(tokenizer, reviews, 64)), lr=3e-3)
    tokenizer.pad_token = None
    policy.save_pretrained(HERE / "policy")
    tokenizer.save_pretrained(HERE / "policy")
    print(f"policy: {policy.num_parameters():,} parameters, {len(tokenizer)} tokens")

    tokenizer = train_tokenizer("wordpiece", texts, 400)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=2,
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        pad_token_id=tokenizer.pad_token_id,
    )
    reward = fit(
        DistilBertForSequenceClassification(config),
        list(reward_batches(tokenizer, reviews[:16_000], 64)),
        lr=1e-3,
    )
    reward.save_pretrained(HERE / "reward")
    tokenizer.save_pretrained(HERE / "reward")
    held_out = next(reward_batches(tokenizer, [review(rng) for _ in range(1000)], 1000))
    with torch.no_grad():
        right = (reward(**held_out).logits.argmax(-1) == held_out["labels"]).float().mean().item()
    print(
        f"reward: {reward.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"{right:.1%} right on new reviews"
    )


if __name__ == "__main__":
    main()
