"""Train the models behind the README's ablation table and scaling figure, one CSV row each.

    python prepare.py --vocab_size=512 --name=python_stdlib_512
    python -m experiments.ablations                # what ablations.csv lacks, then tables and figure
    python -m experiments.ablations --only=sink    # only ablations whose name contains this
    python -m experiments.ablations --jobs=0       # run nothing: tables and figure of what is recorded

A run is train.py with config/tiny.py and the flags of its row, on one core. All can be stopped, once
the runs under way have ended, and started again: rows that are recorded are not run twice. To have your own
ablation in the table, add a line.
"""
import csv
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from checkpoints import read_log
from circuits.figures import new_figure, plain, save
from configurator import configure, ends_explained, fail
from model import GPT, GPTConfig

only = ""  # run the ablations whose name contains this; '': all, and the models of the scaling figure
jobs = os.cpu_count() or 1  # runs at a time, a core each
image = "assets/scaling.png"

PATH = os.path.join(os.path.dirname(__file__), "ablations.csv")
SEEDS = (1, 2, 3)  # the first also chooses the learning rate
COLUMNS = ("flags", "learning_rate", "seed", "val_loss", "bits_per_byte", "nonzero", "dead_neurons",
           "cpu_seconds")


@dataclass
class Ablation:
    """A change to the base: the flag that makes it, and what the paper says of its effect on the loss."""

    name: str
    flags: str
    expected: str = ""  # "worse", "better", "neutral"; "" if the paper has no sentence about the loss
    paper: str = ""  # in a few words
    tuned: bool = False  # it shifts the learning rate's scale: tune that anew
    longer: bool = False  # run it for four times the steps too, beside the base, each at its own best rate


ABLATIONS = [
    Ablation("no warmup", "--warmup_fraction=0", "worse", "critical at high rates"),
    Ablation("warmup 5%", "--warmup_fraction=0.05", "better", "longer helps slightly"),
    Ablation("warmup 10%", "--warmup_fraction=0.1", "better", "longer helps slightly", longer=True),
    Ablation("no learning rate decay", "--decay_lr=False", tuned=True),
    Ablation("gradients not normalized", "--grad_clip_rms=0", "worse", "essential"),
    Ablation("the same, eps at their scale", "--grad_clip_rms=0 --eps=2e-5", "worse", "essential",
             tuned=True, longer=True),
    Ablation("anneal until 20%", "--sparsity_anneal_end_fraction=0.2"),
    Ablation("anneal until 80%", "--sparsity_anneal_end_fraction=0.8",
             paper="the largest, sparsest models wanted it"),
    Ablation("no annealing", "--sparsity_anneal_start_fraction=0 --sparsity_anneal_end_fraction=0", "worse",
             "annealing helps, with the sharkfin", tuned=True, longer=True),
    Ablation("no sharkfin", "--use_sharkfin_schedule=False", "worse", "annealing helps only with it",
             tuned=True, longer=True),
    Ablation("no attention sink", "--use_attention_sinks=False", "neutral", "no substantial effect"),
    Ablation("dense biases", "--sparsify_biases=False"),
    Ablation("d_head 32", "--d_head=32"),
    Ablation("d_head 64", "--d_head=64"),
    Ablation("j = 2", "--min_weights_per_neuron=2", "better", "j = 4 hurts the loss"),
    Ablation("j = 1", "--min_weights_per_neuron=1", "better", "j = 4 hurts the loss"),
    Ablation("no floor", "--min_weights_per_neuron=0", "better", "j = 4 hurts the loss", longer=True),
    Ablation("no bigram table", "--use_bigram_table=False", "worse", "it helps the loss"),
    Ablation("positional embeddings", "--use_positional_embeddings=True", "neutral", "roughly neutral",
             longer=True),
    Ablation("no AbsTopK", "--activation_topk_fraction=1.0", paper="too much of it hurts", tuned=True),
    Ablation("beta1 0.8", "--beta1=0.8"),
    Ablation("beta1 0.95", "--beta1=0.95"),
    Ablation("beta2 0.99", "--beta2=0.99"),
    Ablation("beta2 0.999", "--beta2=0.999"),
    Ablation("weight decay 0.03", "--weight_decay=0.03"),
    Ablation("weight decay 0.3", "--weight_decay=0.3"),
    Ablation("eps 1", "--eps=1.0", tuned=True),
    Ablation("eps 0.01", "--eps=0.01", tuned=True),
    Ablation("eps 0.001", "--eps=0.001", tuned=True),
]
NEUTRAL = 0.02  # nats: a smaller change is called none
LONGER = "--max_iters=3200 --eval_interval=3200"  # four times the steps

# ----------------------------------------------------------------------------------------------------------
# what has been run


class Record:
    """The recorded runs: a dict from (flags, learning rate, seed) to a row of the CSV."""

    def __init__(self):
        self.lock, self.rows = threading.Lock(), {}
        if os.path.exists(PATH):
            with open(PATH, encoding="utf-8", newline="") as f:
                for row in csv.DictReader(f):
                    self.rows[row["flags"], float(row["learning_rate"]), int(row["seed"])] = row

    def rates(self, flags, seed=SEEDS[0]):
        """The learning rates run at a seed, the one of least loss first."""
        return [rate for _, rate in sorted((float(row["val_loss"]), rate) for (f, rate, s), row
                                           in self.rows.items() if f == flags and s == seed)]

    def reported(self, flags):
        """The rows of the learning rate that is reported: of those with most seeds, that of least loss."""
        of_rate = [[self.rows[flags, rate, seed] for seed in SEEDS if (flags, rate, seed) in self.rows]
                   for rate in self.rates(flags)]
        return max(of_rate, key=len, default=[])

    def add(self, flags, rate, seed, record):
        record = {"flags": flags, "learning_rate": rate, "seed": seed, **record}
        record = {name: str(value) for name, value in record.items()}  # as they are read from the file
        with self.lock:
            is_new = not os.path.exists(PATH)
            with open(PATH, "a", encoding="utf-8", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(record)
            self.rows[flags, rate, seed] = record
            print(f"{record['val_loss']:>8} | lr {rate} | seed {seed} | {flags}", flush=True)


def last_of_log(out_dir):
    """What train.py logged last of each quantity: a dict."""
    records = read_log(os.path.join(out_dir, "log.jsonl"))
    return {key: value for record in records for key, value in record.items()}


def train_one(flags, rate, seed):
    """Run train.py once. Returns what the CSV says of it; a run that diverges has a loss of inf."""
    with tempfile.TemporaryDirectory() as out_dir, tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "train.py", "config/tiny.py", *flags.split(),
                   f"--learning_rate={rate}", f"--seed={seed}", f"--out_dir={out_dir}"]
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output,
            start_new_session=True)  # which Ctrl-C does not reach: it may finish
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        record = dict.fromkeys(COLUMNS[3:], "") | {"cpu_seconds": round(used.ru_utime + used.ru_stime)}
        output.seek(0)
        printed = output.read()
        if process.returncode == 1 and "loss is" in printed:
            return record | {"val_loss": "inf"}
        if process.returncode or "stopped before step" in printed:
            raise SystemExit(f"{' '.join(command)}\nfailed or was stopped\n{printed[-2000:]}")
        last = last_of_log(out_dir)
    return record | {
        "val_loss": f"{last['val/loss']:.4f}", "bits_per_byte": f"{last['val/bits_per_byte']:.4f}",
        "nonzero": last["sparsity/nonzero"], "dead_neurons": last["sparsity/dead_neurons"]}


def run_missing(runs, wanted):
    """Train all of `wanted`, a list of (flags, rate, seed), that is not recorded."""
    missing = [run for run in dict.fromkeys(wanted) if run not in runs.rows]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: runs.add(*run, train_one(*run)), missing))


def tune(runs, models):
    """Double and halve the learning rate of each of `models`, flags, until the best lies between two."""
    wanted = [(flags, rate, SEEDS[0]) for flags in models for rate in (1.8e-2, 3.6e-2)]
    while wanted:
        run_missing(runs, wanted)
        wanted = []
        for flags in models:
            rates = runs.rates(flags)
            if rates[0] == min(rates):
                wanted.append((flags, float(f"{rates[0] / 2:.4g}"), SEEDS[0]))
            elif rates[0] == max(rates):
                wanted.append((flags, float(f"{rates[0] * 2:.4g}"), SEEDS[0]))


def describe(values, sign=""):
    """Mean and standard deviation of some losses."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{spread}"


# ----------------------------------------------------------------------------------------------------------
# the ablations


def run_ablations(runs):
    """Tune the base, and the ablations that want it; run the others at the base's rate; then all seeds."""
    ablations = [a for a in ABLATIONS if only in a.name]
    tune(runs, [""])
    base_rate = runs.rates("")[0]
    run_missing(runs, [(a.flags, base_rate, SEEDS[0]) for a in ablations if not a.tuned])
    tune(runs, [a.flags for a in ablations if a.tuned])
    chosen = {"": base_rate} | {a.flags: runs.rates(a.flags)[0] if a.tuned else base_rate for a in ablations}
    run_missing(runs, [(flags, rate, seed) for seed in SEEDS for flags, rate in chosen.items()])


def run_longer(runs):
    """The base and some ablations for four times the steps, the rates of all tuned anew."""
    models = [longer("")] + [longer(a.flags) for a in ABLATIONS if a.longer and only in a.name]
    tune(runs, models)
    run_missing(runs, [(flags, runs.rates(flags)[0], seed) for seed in SEEDS for flags in models])


def longer(flags):
    return f"{flags} {LONGER}".strip()


def losses(rows):
    """Val loss by seed."""
    return {int(row["seed"]): float(row["val_loss"]) for row in rows}


def changes(runs, flags, base):
    """Val loss minus that of `base`, flags too, at the same seed."""
    of_base = losses(runs.reported(base))
    return [loss - of_base[seed] for seed, loss in losses(runs.reported(flags)).items() if seed in of_base]


def verdict(ablation, values):
    """Whether `values`, changes at some seeds, agree with the paper.

    It describes these runs, it is no test: a change is one if it is larger than NEUTRAL and than its spread.
    """
    if not ablation.expected or len(values) < 2:
        return ""
    mean = np.mean(values)
    found = ("neutral" if abs(mean) < max(NEUTRAL, np.std(values, ddof=1)) else
             "worse" if mean > 0 else "better")
    return "yes" if found == ablation.expected else f"no: {found}"


def rate_of(rows):
    return f"{float(rows[0]['learning_rate']):g}"


def print_base(runs, flags):
    rows = runs.reported(flags)
    print(f"base: learning rate {rate_of(rows)}, val loss {describe([*losses(rows).values()])}, "
          f"n = {len(rows)}\n")


def print_ablations(runs):
    """The table as Markdown. Changes are paired by seed; the spread is their standard deviation."""
    if not runs.reported(""):
        fail("no run is recorded: leave out --jobs=0")
    print_base(runs, "")
    print("| ablation | flag | learning rate | change in val loss | n | dead neurons | the paper | agree |")
    print("|---|---|---|---|---|---|---|---|")
    for a in ABLATIONS:
        if change := changes(runs, a.flags, ""):
            rows = runs.reported(a.flags)
            dead = np.mean([float(row["dead_neurons"] or "nan") for row in rows])
            print(f"| {a.name} | `{a.flags}` | {rate_of(rows)} | {describe(change, '+')} | {len(change)} | "
                  f"{dead:.0f} | {a.paper} | {verdict(a, change)} |")


def print_longer(runs):
    """The same for those that were run for longer, beside what they were in 800 steps."""
    if not runs.reported(longer("")):
        return
    print("\nin four times the steps, each row and the base at its own best learning rate")
    print_base(runs, longer(""))
    print("| ablation | change in 800 steps | n | change in 3,200 steps | n | learning rate | the paper | "
          "agree, then and now |")
    print("|---|---|---|---|---|---|---|---|")
    for a in ABLATIONS:
        if a.longer and (after := changes(runs, longer(a.flags), longer(""))):
            before = changes(runs, a.flags, "")
            print(f"| {a.name} | {describe(before, '+')} | {len(before)} | {describe(after, '+')} | "
                  f"{len(after)} | {rate_of(runs.reported(longer(a.flags)))} | {a.paper} | "
                  f"{verdict(a, before)}; {verdict(a, after)} |")


# ----------------------------------------------------------------------------------------------------------
# the scaling figure: wider and sparser, at a fixed number of nonzero weights

WIDTHS = (64, 128, 320)  # d_model: 17-fold in parameters
LEVELS = (20_000, 40_000, 80_000, 160_000, 320_000)  # nonzero weights
DENSE_WIDTHS = (16, 32, 64, 96)
DENSE = "--target_l0_fraction=1.0 --activation_topk_fraction=1.0"
TUNED_AT = 80_000  # nonzero weights, for all levels of a width
# does the order of the widths change in longer training?
LONGER_WIDTHS, LONGER_LEVELS, LONGER_DENSE_WIDTHS = (64, 128), (40_000, 80_000, 160_000), (32, 64)


def sparse_models(d_model, levels=LEVELS):
    """Flags of the models of a width, by their number of nonzero weights."""
    model = GPT(GPTConfig(n_layer=2, d_model=d_model, vocab_size=512, use_bigram_table=False))
    total = sum(p.numel() for p in model.decayed_parameters())
    return {n: f"--d_model={d_model} --target_l0_fraction={n / total:.6f}" for n in levels
            if model.smallest_l0() <= n / total < 1}


def scaling_lines():
    """The lines of the figure by label. A line: the flags of its models, each with those it is tuned at."""
    lines = {}
    for widths, levels, dense_widths, label, for_steps in (
        (WIDTHS, LEVELS, DENSE_WIDTHS, "", str),
        (LONGER_WIDTHS, LONGER_LEVELS, LONGER_DENSE_WIDTHS, ", 4 times the steps", longer),
    ):
        for d_model in widths:
            models = {n: for_steps(flags) for n, flags in sparse_models(d_model, levels).items()}
            lines[f"d_model {d_model}{label}"] = {flags: models[TUNED_AT] for flags in models.values()}
        models = [for_steps(f"--d_model={d_model} {DENSE}") for d_model in dense_widths]
        lines[f"dense{label}"] = {flags: flags for flags in models}
    return lines


def run_scaling(runs):
    """Tune the learning rates, then run all seeds."""
    tuned_at = {flags: at for line in scaling_lines().values() for flags, at in line.items()}
    tune(runs, dict.fromkeys(tuned_at.values()))
    run_missing(runs, [(flags, runs.rates(at)[0], seed) for seed in SEEDS for flags, at in tuned_at.items()])


def draw_scaling(runs):
    """Val loss against nonzero weights: a color for each width, dashes for the longer runs."""
    colors = {f"d_model {d_model}": f"C{i}" for i, d_model in enumerate(WIDTHS)} | {"dense": "0.4"}
    figure, axis = new_figure(7, 4.5)
    for label, models in scaling_lines().items():
        points = [[row for row in runs.reported(flags) if row["nonzero"]] for flags in models]
        points = [rows for rows in points if rows]  # what is not run yet, or diverged, has no point
        if not points:
            continue
        values = [list(losses(rows).values()) for rows in points]
        axis.errorbar([np.mean([float(row["nonzero"]) for row in rows]) for rows in points],
                      [np.mean(v) for v in values], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values],
                      marker="o", markersize=4, capsize=3, label=label, color=colors[label.split(",")[0]],
                      linestyle="--" if "," in label else "-")
    axis.set(xscale="log", xlabel="nonzero weights and biases, bigram table aside",
             ylabel="val loss (nats per token)")
    plain(axis)
    axis.legend(frameon=False)
    save(figure, image)


@ends_explained()
def main():
    configure(globals())
    if jobs < 0:
        fail(f"jobs={jobs} must not be negative")
    if not any(only in a.name for a in ABLATIONS):
        fail(f"only={only!r} is in no ablation's name: see ABLATIONS in {__file__}")
    runs = Record()
    if jobs:
        run_ablations(runs)
        run_longer(runs)
    print_ablations(runs)
    print_longer(runs)
    if jobs and not only:
        run_scaling(runs)
    if any("d_model" in flags for flags, *_ in runs.rows):
        draw_scaling(runs)


if __name__ == "__main__":
    main()
