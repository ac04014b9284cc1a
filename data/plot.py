# SPDX-License-Identifier: MIT
"""Reward, greedy reward, KL and gradient norm of any runs of remax.py, drawn against the step.

    python data/plot.py --out figure.svg --arm ReMax runs/a runs/b --arm REINFORCE runs/c runs/d

After --arm comes its label, then its runs: output folders, or metrics .jsonl files. Several runs of
an arm become their mean and a band of +- 1 standard deviation. Lines are the batches trained on,
dots the evaluations on held-out prompts. REINFORCE decodes nothing greedily in training, so its
greedy reward is dots only. The suffix of --out decides: .svg or .png. Needs: pip install matplotlib
"""
import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
# Text stays text and nothing is drawn from a clock or at random: the same runs, the same bytes.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "remax", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False})
import matplotlib.pyplot as plt

PANELS = [("Reward of the sampled response", "reward", "eval_reward"),
          ("Reward of the greedy response", "greedy_reward", "eval_greedy_reward"),
          ("KL to the reference, nats per response", "kl", "eval_kl"),
          ("Gradient norm, before clipping", "grad_norm", None)]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]  # Okabe and Ito


def read(path):
    """The rows of one run: a folder with metrics.jsonl, or the file itself."""
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SystemExit(f"plot.py: {file}: no such file or run folder")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"plot.py: {file}:{number}: not a row of metrics: {line[:60]!r}")
    return rows


def curve(runs, key):
    """(steps, means, standard deviations) over the runs; null and non-finite values are left out."""
    values = {}
    for row in (row for run in runs for row in run):
        value = row.get(key)
        if value is not None and math.isfinite(value):
            values.setdefault(row["step"], []).append(value)
    steps = sorted(values)
    return (steps, [statistics.fmean(values[s]) for s in steps],
            [statistics.stdev(values[s]) if len(values[s]) > 1 else 0.0 for s in steps])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the figure, .svg or .png")
    parser.add_argument("--arm", required=True, action="append", nargs="+", metavar="LABEL RUN",
                        help="a label and its runs; once per arm")
    args = parser.parse_args(argv)
    if (suffix := Path(args.out).suffix) not in (".svg", ".png"):
        parser.error(f"--out {args.out}: .svg or .png")
    if short := [arm[0] for arm in args.arm if len(arm) < 2]:
        parser.error(f"--arm {short[0]}: a label, then at least one run")
    arms = [(label, [read(path) for path in paths]) for label, *paths in args.arm]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, layout="constrained")
    for ax, (title, key, evaluated) in zip(axes.flat, PANELS):
        for i, (label, runs) in enumerate(arms):
            style = dict(color=COLOURS[i % len(COLOURS)], zorder=3)
            steps, mean, sd = curve(runs, key)
            ax.plot(steps, mean, lw=1.5, label=f"{label} ({len(runs)})", **style)
            if any(sd):
                ax.fill_between(steps, [m - s for m, s in zip(mean, sd)],
                                [m + s for m, s in zip(mean, sd)], alpha=0.2, lw=0, fc=style["color"])
            if evaluated:
                ax.plot(*curve(runs, evaluated)[:2], "o", ms=5, mec="white", mew=0.8, **style)
        ax.set_title(title, loc="left", fontsize=10)
        ax.grid(alpha=0.25, lw=0.6)
    for ax in axes[1]:
        ax.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", frameon=False,
                  ncols=len(arms))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    svg = dict(metadata={"Date": None, "Creator": None}) if suffix == ".svg" else dict(dpi=150)
    figure.savefig(args.out, **svg)
    print(f"{args.out}: " + ", ".join(f"{label}, {len(runs)} runs" for label, runs in arms))


if __name__ == "__main__":
    main()
