"""Train the models behind the README's ablation table and scaling figure, one CSV row each.

    python prepare.py --vocab_size=512 --name=python_stdlib_512
    python -m experiments.run                      # what experiments/runs.csv lacks, then table and figure
    python -m experiments.run --only=sink          # only ablations whose name contains this
    python -m experiments.run --jobs=0             # run nothing: table and figure of what is recorded

A run is train.py with experiments/tiny.py and the flags of its row, on one core. It can be stopped and
started again: rows that are recorded are not run twice. To have your own ablation in the table, add a line.
"""
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from configurator import configure
from model import GPT, GPTConfig

only = ""  # run the ablations whose name contains this; '': all, and the models of the scaling figure
jobs = os.cpu_count() or 1  # runs at a time, a core each
image = "assets/scaling.png"

PATH = os.path.join(os.path.dirname(__file__), "runs.csv")
SEEDS = (1, 2, 3)
COLUMNS = ("flags", "learning_rate", "seed", "val_loss", "bits_per_byte", "nonzero", "dead_neurons",
           "kurtosis", "seconds")


@dataclass
class Row:
    """A model: the flags that make it, and the learning rates to choose from, as multiples of the base's."""

    name: str
    flags: str = ""
    multiples: tuple = (1,)
    paper: str = ""  # what the paper says of it


BASE = "base"
ABLATIONS = [
    Row(BASE),
    Row("no warmup", "--warmup_fraction=0", paper="warmup is critical at high learning rates"),
    Row("warmup 5%", "--warmup_fraction=0.05"),
    Row("warmup 10%", "--warmup_fraction=0.1"),
    Row("no learning rate decay", "--decay_lr=False", (0.5, 1)),
    Row("gradients not normalized", "--grad_clip_rms=0", (1, 10, 100), "essential for stability"),
    Row("anneal until 20%", "--sparsity_anneal_end_fraction=0.2"),
    Row("anneal until 80%", "--sparsity_anneal_end_fraction=0.8"),
    Row("no annealing", "--sparsity_anneal_start_fraction=0 --sparsity_anneal_end_fraction=0", (0.5, 1),
        "starting sparse hurts"),
    Row("no sharkfin", "--use_sharkfin_schedule=False", (1, 2, 4), "a smaller L0 wants a larger rate"),
    Row("no attention sink", "--use_attention_sinks=False", paper="no substantial effect on the loss"),
    Row("dense biases", "--sparsify_biases=False"),
    Row("d_head 32", "--d_head=32"),
    Row("d_head 64", "--d_head=64"),
    Row("j = 1", "--min_weights_per_neuron=1", paper="a floor leaves fewer dead neurons"),
    Row("j = 2", "--min_weights_per_neuron=2"),
    Row("no floor (j = 0)", "--min_weights_per_neuron=0", paper="a floor leaves fewer dead neurons"),
    Row("no bigram table", "--use_bigram_table=False", paper="it saves sparse weights from bigrams"),
    Row("positional embeddings", "--use_positional_embeddings=True", paper="roughly neutral on the loss"),
    Row("no AbsTopK", "--activation_topk_fraction=1.0", paper="too much of it hurts"),
    Row("beta1 0.8", "--beta1=0.8"),
    Row("beta1 0.95", "--beta1=0.95"),
    Row("beta2 0.99", "--beta2=0.99"),
    Row("beta2 0.999", "--beta2=0.999"),
    Row("weight decay 0.03", "--weight_decay=0.03"),
    Row("weight decay 0.3", "--weight_decay=0.3"),
    Row("eps 1", "--eps=1.0", (1, 2, 4)),
    Row("eps 0.01", "--eps=0.01", (0.5, 1)),
    Row("eps 0.001", "--eps=0.001", (0.25, 0.5, 1)),
]

# ----------------------------------------------------------------------------------------------------------
# what has been run


class Runs:
    """The recorded runs: a dict from (flags, learning rate, seed) to a row of the CSV."""

    def __init__(self):
        self.lock, self.rows = threading.Lock(), {}
        if os.path.exists(PATH):
            with open(PATH, encoding="utf-8", newline="") as f:
                for row in csv.DictReader(f):
                    self.rows[row["flags"], float(row["learning_rate"]), int(row["seed"])] = row

    def best_rate(self, flags):
        """The learning rate with the least loss at the first seed."""
        return min((float(row["val_loss"]), rate) for (f, rate, seed), row in self.rows.items()
                   if f == flags and seed == SEEDS[0])[1]

    def values(self, flags, column):
        """A column of the runs at the best learning rate, in the order of SEEDS, as floats."""
        if not any(f == flags and seed == SEEDS[0] for f, _, seed in self.rows):
            return []
        found = [self.rows.get((flags, self.best_rate(flags), seed)) for seed in SEEDS]
        return [float(row[column] or 0) for row in found if row]

    def losses(self, flags):
        """Val loss by seed, at the best learning rate."""
        seeds = [int(seed) for seed in self.values(flags, "seed")]
        return dict(zip(seeds, self.values(flags, "val_loss"), strict=True))

    def add(self, flags, rate, seed, record):
        record = {"flags": flags, "learning_rate": rate, "seed": seed, **record}
        with self.lock:
            is_new = not os.path.exists(PATH)
            with open(PATH, "a", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(record)
            self.rows[flags, rate, seed] = record
            print(f"{record['val_loss']:>8} | lr {rate:.4g} | seed {seed} | {record['seconds']:>4} s | {flags}",
                  flush=True)


def train_one(flags, rate, seed):
    """Run train.py once. Returns what the CSV says of it; a run that diverges has a loss of inf."""
    with tempfile.TemporaryDirectory() as out_dir:
        begun = time.monotonic()
        command = [sys.executable, "train.py", "experiments/tiny.py", *flags.split(),
                   f"--learning_rate={rate}", f"--seed={seed}", f"--out_dir={out_dir}"]
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=one_core, capture_output=True, text=True, check=False)
        seconds = round(time.monotonic() - begun)
        if result.returncode == 1 and "the loss is" in result.stderr:
            return {"val_loss": "inf", "seconds": seconds}
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
        with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
            last = {}
            for line in f:
                last |= json.loads(line)
    return {"val_loss": f"{last['val/loss']:.4f}", "bits_per_byte": f"{last['val/bits_per_byte']:.4f}",
            "nonzero": last["sparsity/nonzero"], "dead_neurons": last["sparsity/dead_neurons"],
            "kurtosis": f"{last['activations/kurtosis_resid_final']:.1f}", "seconds": seconds}


def run_missing(runs, wanted):
    """Train all of `wanted`, a list of (flags, rate, seed), that is not recorded."""
    wanted = [(flags, float(f"{rate:.4g}"), seed) for flags, rate, seed in wanted]
    missing = [w for w in dict.fromkeys(wanted) if w not in runs.rows]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda w: runs.add(*w, train_one(*w)), missing))


def tune(runs, models):
    """Double and halve the learning rate of each of `models`, flags, until the best is between two others."""
    grids = {flags: {1.8e-2, 3.6e-2} for flags in models}
    while True:
        run_missing(runs, [(flags, rate, SEEDS[0]) for flags, grid in grids.items() for rate in sorted(grid)])
        sizes = [len(grid) for grid in grids.values()]
        for flags, grid in grids.items():
            best = runs.best_rate(flags)
            if best in (min(grid), max(grid)):
                grid.add(best / 2 if best == min(grid) else best * 2)
        if sizes == [len(grid) for grid in grids.values()]:
            return


# ----------------------------------------------------------------------------------------------------------
# the ablations


def run_ablations(runs):
    """Tune the base's learning rate, choose each ablation's among its multiples, then run all seeds."""
    tune(runs, [""])
    rows = [row for row in ABLATIONS if only in row.name]
    run_missing(runs, [("", runs.best_rate(""), seed) for seed in SEEDS])
    run_missing(runs, [(row.flags, runs.best_rate("") * m, SEEDS[0]) for row in rows for m in row.multiples])
    run_missing(runs, [(row.flags, runs.best_rate(row.flags), seed) for seed in SEEDS for row in rows])


def print_ablations(runs):
    """The table as Markdown: the change in val loss from the base, paired by seed."""
    base = runs.losses("")
    print(f"base: learning rate {runs.best_rate(''):.2g}, {describe(base.values())}\n")
    print("| ablation | flag | learning rate | change in val loss | n | dead neurons | the paper |")
    print("|---|---|---|---|---|---|---|")
    for row in ABLATIONS[1:]:
        changes = [loss - base[seed] for seed, loss in runs.losses(row.flags).items() if seed in base]
        if changes:
            dead = np.mean(runs.values(row.flags, "dead_neurons"))
            print(f"| {row.name} | `{row.flags}` | {runs.best_rate(row.flags):.2g} | {describe(changes, '+')} | "
                  f"{len(changes)} | {dead:.0f} | {row.paper} |")


def describe(values, sign=""):
    """Mean and standard deviation of some losses."""
    values = np.array(list(values))
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{spread}"


# ----------------------------------------------------------------------------------------------------------
# the scaling figure: wider and sparser, at a fixed number of nonzero weights

WIDTHS = (64, 128, 320)  # d_model: 17-fold in parameters
LEVELS = (20_000, 40_000, 80_000, 160_000, 320_000)  # nonzero weights
DENSE_WIDTHS = (16, 32, 64, 96)
DENSE_FLAGS = "--target_l0_fraction=1.0 --activation_topk_fraction=1.0"
TUNED_AT = 80_000  # nonzero weights, for all levels of a width


def sparse_models(d_model):
    """Flags of the models of a width, by their number of nonzero weights."""
    model = GPT(GPTConfig(n_layer=2, d_model=d_model, vocab_size=512, use_bigram_table=False))
    total = sum(p.numel() for p in model.decayed_parameters())
    return {n: f"--d_model={d_model} --target_l0_fraction={n / total:.6f}" for n in LEVELS
            if model.smallest_l0() <= n / total < 1}


def run_scaling(runs):
    """Tune the learning rate of every width at one level, and of every dense model; then run all seeds."""
    dense = [f"--d_model={d_model} {DENSE_FLAGS}" for d_model in DENSE_WIDTHS]
    sparse = [sparse_models(d_model) for d_model in WIDTHS]
    tune(runs, dense + [models[TUNED_AT] for models in sparse])
    rates = {flags: runs.best_rate(models[TUNED_AT]) for models in sparse for flags in models.values()}
    rates |= {flags: runs.best_rate(flags) for flags in dense}
    run_missing(runs, [(flags, rate, seed) for seed in SEEDS for flags, rate in rates.items()])


def draw_scaling(runs):
    """Val loss against nonzero weights, a line for each width and one for the dense models."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    import matplotlib.pyplot as plt

    lines = {f"d_model {d_model}": sparse_models(d_model).values() for d_model in WIDTHS}
    lines["dense, d_model 16 to 96"] = [f"--d_model={d_model} {DENSE_FLAGS}" for d_model in DENSE_WIDTHS]
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for label, models in lines.items():
        models = [flags for flags in models if runs.losses(flags)]
        if models:
            losses = [list(runs.losses(flags).values()) for flags in models]
            x = [np.mean(runs.values(flags, "nonzero")) for flags in models]
            y = [np.mean(values) for values in losses]
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in losses]
            axis.errorbar(x, y, spread, marker="o", markersize=4, capsize=3, label=label,
                          **({"color": "0.4", "linestyle": "--"} if "dense" in label else {}))
    axis.set(xscale="log", xlabel="nonzero weights and biases", ylabel="val loss (nats per token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(image, dpi=150)
    print(f"\nwrote {image}")


def main():
    configure(globals())
    runs = Runs()
    if jobs:
        run_ablations(runs)
    print_ablations(runs)
    if jobs and not only:
        run_scaling(runs)
    draw_scaling(runs)


if __name__ == "__main__":
    main()
