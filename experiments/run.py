"""Train the models behind the README's ablation table and scaling figure, one CSV row each.

    python prepare.py --vocab_size=512 --name=python_stdlib_512
    python -m experiments.run                      # whatever experiments/runs.csv lacks, then the tables
    python -m experiments.run --only=sink          # of the rows whose name contains this
    python -m experiments.run --jobs=0             # nothing: only print the tables

A run is train.py with experiments/tiny.py and the flags of its row, on one core. It can be stopped and
started again: rows that are recorded are not run twice. To have one's own ablation in the table, add a line.
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

only = ""  # run the rows whose name contains this; '': all
jobs = os.cpu_count() or 1  # runs at a time, a core each

PATH = os.path.join(os.path.dirname(__file__), "runs.csv")
SEEDS = (1, 2, 3)
RATES = (0.9e-2, 1.8e-2, 3.6e-2, 7.2e-2)  # the grid for a new width
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
                for record in csv.DictReader(f):
                    self.rows[self.key(record["flags"], float(record["learning_rate"]),
                                       int(record["seed"]))] = record

    @staticmethod
    def key(flags, rate, seed):
        return flags, f"{rate:.4g}", seed

    def loss(self, flags, rate, seed):
        record = self.rows.get(self.key(flags, rate, seed))
        return float(record["val_loss"]) if record else None

    def add(self, flags, rate, seed, record):
        record = {"flags": flags, "learning_rate": f"{rate:.4g}", "seed": seed, **record}
        with self.lock:
            is_new = not os.path.exists(PATH)
            with open(PATH, "a", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(record)
            self.rows[self.key(flags, rate, seed)] = record
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


def best_rate(runs, flags, rates):
    """The rate with the least loss at the first seed, or None if one has not been run."""
    losses = [runs.loss(flags, rate, SEEDS[0]) for rate in rates]
    return None if None in losses else rates[int(np.argmin(losses))]


def run_missing(runs, wanted):
    """Train all of `wanted`, a list of (flags, rate, seed), that is not recorded."""
    missing = [w for w in dict.fromkeys(wanted) if runs.loss(*w) is None]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda w: runs.add(*w, train_one(*w)), missing))


# ----------------------------------------------------------------------------------------------------------
# the ablations


def ablations(runs):
    """Choose the base's learning rate on a grid, each ablation's on its own, then run all seeds."""
    rows = [row for row in ABLATIONS if only in row.name]
    if jobs:
        run_missing(runs, [("", rate, SEEDS[0]) for rate in RATES])
    base_rate = best_rate(runs, "", RATES)
    if jobs:
        run_missing(runs, [("", base_rate, seed) for seed in SEEDS])
        run_missing(runs, [(row.flags, base_rate * m, SEEDS[0]) for row in rows for m in row.multiples])
        chosen = [(row, best_rate(runs, row.flags, [base_rate * m for m in row.multiples])) for row in rows]
        run_missing(runs, [(row.flags, rate, seed) for seed in SEEDS for row, rate in chosen])
    print_ablations(runs, base_rate)


def print_ablations(runs, base_rate):
    """The table as Markdown: the change in val loss from the base, paired by seed."""
    base = np.array([runs.loss("", base_rate, seed) or np.nan for seed in SEEDS])
    print(f"base: learning rate {base_rate:.4g}, val loss {base.mean():.4f} +- {base.std(ddof=1):.4f}\n")
    print("| ablation | flag | learning rate | change in val loss | n | dead neurons | the paper |")
    print("|---|---|---|---|---|---|---|")
    for row in ABLATIONS[1:]:
        rate = best_rate(runs, row.flags, [base_rate * m for m in row.multiples])
        if rate is None:
            continue
        losses = [runs.loss(row.flags, rate, seed) for seed in SEEDS]
        change = np.array([x - b for x, b in zip(losses, base, strict=True) if x is not None])
        spread = f" +- {change.std(ddof=1):.3f}" if len(change) > 1 else ""
        dead = [int(runs.rows[runs.key(row.flags, rate, seed)]["dead_neurons"] or 0)
                for seed, x in zip(SEEDS, losses, strict=True) if x is not None]
        print(f"| {row.name} | `{row.flags}` | {rate:.2g} | {change.mean():+.3f}{spread} | {len(change)} | "
              f"{np.mean(dead):.0f} | {row.paper} |")


def main():
    configure(globals())
    runs = Runs()
    ablations(runs)


if __name__ == "__main__":
    main()
