# SPDX-License-Identifier: MIT
"""Reward, greedy reward, KL and gradient norm of any runs of remax.py against the step.

    python data/experiments/plot.py --out figure.svg --arm ReMax runs/a runs/b --arm RLOO runs/c
    python data/experiments/plot.py --out data/results/headline.svg --headline    # the README's
    python data/experiments/plot.py --out data/results/shift.svg --shift          # the README's

After --arm comes its label, then its runs: output folders, or metrics .jsonl files. Several runs of
an arm become their mean and a band of +- 1 standard deviation. Lines are the batches trained on,
dots the evaluations on held-out prompts. A run of an older remax.py may have decoded nothing
greedily in training: its greedy reward appears only as dots. The suffix of --out sets the format,
.svg or .png.
It needs: pip install matplotlib
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib

# Text stays text; no date, no random id: the same runs give the same bytes.
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "remax",
        "font.sans-serif": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
)
import matplotlib.pyplot as plt
import numpy as np

PANELS = [
    ("Reward of the sampled response", "reward", "eval_reward"),
    ("Reward of the greedy response", "greedy_reward", "eval_greedy_reward"),
    ("KL to the reference, nats per response", "kl", "eval_kl"),
    ("Gradient norm, before clipping", "grad_norm", None),
]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]  # Okabe and Ito
STYLES = ["-", "--", "-.", ":"]  # they tell the arms apart in grey


def read(path):
    """The rows of one run: a folder with metrics.jsonl, or the file itself."""
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SystemExit(f"plot.py: {file}: no such file or run folder")
    try:
        return [{"step": row["step"]} | row for row in map(json.loads, open(file))]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"plot.py: {file}: a line is no row of metrics: {error!r}") from error


def curve(runs, key):
    """Steps, means, standard deviations over the runs; null and non-finite values are left out."""
    values = {}
    for row in sum(runs, []):
        if row.get(key) is not None and np.isfinite(row[key]):
            values.setdefault(row["step"], []).append(row[key])
    mean, sd = np.mean, lambda v: np.std(v, ddof=len(v) > 1)
    return sorted(values), *(np.array([f(values[s]) for s in sorted(values)]) for f in (mean, sd))


def logs(experiment, arm):
    """The committed runs of one arm of an experiment."""
    folder = Path(__file__).resolve().parent.parent / "results" / experiment
    return [read(path) for path in sorted(folder.glob(f"{arm}-[0-9].jsonl"))]


def smooth(values, width=5):
    """The mean of each value and up to width - 1 before it."""
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(len(values))])


def line(ax, runs, key, label, colour, style, minus=0.0, **options):
    """Mean and band over runs, smoothed over five steps."""
    steps, mean, sd = curve(runs, key)
    mean, sd = smooth(mean) - minus, smooth(sd)
    ax.plot(steps, mean, style, color=colour, label=label, lw=1.6, **options)
    ax.fill_between(steps, mean - sd, mean + sd, alpha=0.15, lw=0, fc=colour)


def draw_real_model(ax):
    """SmolLM2: lines are the training batches, markers the evaluations on held-out prompts."""
    for arm, colour, style, marker in (
        ("ReMax", COLOURS[0], "-", "o"),
        ("REINFORCE", COLOURS[1], "--", "s"),
    ):
        runs = logs("smollm2_gpu", arm.lower())
        line(ax, runs, "reward", f"{arm}, training", colour, style)
        steps, mean, sd = curve(runs, "eval_reward")
        label = f"{arm}, held out"
        ax.errorbar(steps, mean, sd, fmt=marker, color=colour, capsize=3, label=label)
    ax.set_title("A real model: SmolLM2-135M, 5 seeds")
    ax.set_ylabel("reward")
    ax.legend(loc="lower right")


def draw_shifted(ax, key, ylabel, subtract_c=False):
    """The tiny world with c added to its reward. Markers: c = 5. The two of ReMax coincide."""
    for arm, colour, style, marker in (
        ("ReMax", COLOURS[0], "-", "o"),
        ("REINFORCE", COLOURS[1], "--", "s"),
    ):
        for c in 0, 5:
            runs = logs("shift", f"{arm.lower()}-{c}")
            minus = c if subtract_c else 0
            markers = {"marker": marker, "markevery": 6, "ms": 5} if c else {}
            line(ax, runs, key, f"{arm}, c = {c}", colour, style, minus, **markers)
    ax.set_ylabel(ylabel)


def draw_number_of_prompt(ax):
    """The tiny world's KL with a number of the prompt added to the reward, and without."""
    for arm, label, colour, style in (
        ("remax", "ReMax", COLOURS[0], "-"),
        ("batch", "mean of other prompts", COLOURS[2], "--"),
    ):
        for c, words in ("0", "nothing added"), ("x", "c(x) added"):
            markers = {"marker": "o", "markevery": 6, "ms": 5} if c == "x" else {}
            runs = logs("shift", f"{arm}-{c}")
            line(ax, runs, "kl", f"{label}, {words}", colour, style, **markers)
    ax.set_title("Tiny world: c(x) added to the reward, 5 seeds")
    ax.set_ylabel("KL to the reference, nats")
    ax.set_ylim(0, 48)  # room for the legend
    ax.legend(loc="upper left")


def draw_headline():
    """Left the real model, right what a number of the prompt does to the KL of two baselines."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    draw_real_model(left)
    draw_number_of_prompt(right)
    for ax in left, right:
        ax.set_xlabel("step")
    return figure


def draw_shift():
    """Reward, KL and gradient norm with a constant added to the reward."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    draw_shifted(axes[0], "reward", "reward without c", subtract_c=True)
    draw_shifted(axes[1], "kl", "KL to the reference, nats")
    draw_shifted(axes[2], "grad_norm", "gradient norm, before clipping")
    for ax in axes:
        ax.set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def draw_arms(arms):
    """Four panels of any runs."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, layout="constrained")
    axes[0, 0].sharey(axes[0, 1])  # before anything is drawn
    for ax, (title, key, evaluated) in zip(axes.flat, PANELS, strict=True):
        ax.set_title(title)
        for i, (label, runs) in enumerate(arms):
            colour = COLOURS[i % len(COLOURS)]
            steps, mean, sd = curve(runs, key)
            style = STYLES[i % len(STYLES)]
            label_of_arm = f"{label}, runs: {len(runs)}"
            ax.plot(steps, mean, style, color=colour, zorder=3, label=label_of_arm)
            if sd.any():
                ax.fill_between(steps, mean - sd, mean + sd, alpha=0.2, lw=0, fc=colour)
            # smaller for later arms: dots on one spot all stay visible
            ax.plot(*curve(runs, evaluated)[:2], "o", ms=max(7 - 2 * i, 2), color=colour, zorder=4)
    axes[1, 1].set_ylim(bottom=0)
    dot = plt.Line2D([], [], ls="", marker="o", ms=5, color="0.4", label="held-out prompts")
    handles = axes[0, 0].get_legend_handles_labels()[0] + [dot]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    figure.supxlabel("step", fontsize=9)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="the figure, .svg or .png")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--headline", action="store_true", help="the README's first figure")
    what.add_argument("--shift", action="store_true", help="the README's second figure")
    what.add_argument(
        "--arm",
        action="append",
        nargs="+",
        metavar=("LABEL", "RUN"),
        help="a label and its runs; once per arm",
    )
    args = parser.parse_args(argv)
    if (suffix := args.out.suffix) not in (".svg", ".png"):
        parser.error(f"--out {args.out}: .svg or .png")
    if args.headline:
        figure = draw_headline()
    elif args.shift:
        figure = draw_shift()
    else:
        if min(map(len, args.arm)) < 2:
            parser.error("--arm: a label, then at least one run")
        figure = draw_arms([(label, list(map(read, paths))) for label, *paths in args.arm])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None} if suffix == ".svg" else None
    figure.savefig(args.out, dpi=150, metadata=metadata)
    if suffix == ".svg":  # 1/100 of a point is fine enough
        args.out.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", args.out.read_text()))


if __name__ == "__main__":
    main()
