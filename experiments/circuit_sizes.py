"""Are circuits in weight-sparse models smaller? Figures 2 and 3 of Gao et al. 2025 in miniature.

    python -m experiments.circuit_sizes             # what circuit_sizes.csv lacks, then tables and figures
    python -m experiments.circuit_sizes --jobs=0    # run nothing: tables and figures of what is recorded

A job trains a model, train.py with `config` and the flags of the model, and searches it for the circuits of
some tasks. The search is circuit.py's, without the fit, with the same penalties, mask seeds and steps for
every model. A mask is learned once, and its nodes are counted at each target loss: a row of the CSV. All can
be stopped at any time and started again: a training goes on from its checkpoint, and rows that are recorded
are not made twice.
"""
import csv
import fcntl
import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import numpy as np
import torch

from checkpoints import load_checkpoint
from circuits.figures import new_figure, plain, save
from circuits.loaded import load
from circuits.nodes import count
from circuits.search import Search, fewest, first_of, learn_masks, loss_at, loss_of
from circuits.tasks import Source, read_task
from configurator import configure, ends_explained, fail, settings_of
from experiments.ablations import last_of_log

jobs = os.cpu_count() or 1  # processes; a GPU serves more than one, as the models are small
device = "auto"  # 'auto', 'cpu', 'cuda'
config = "config/quickstart.py"  # of the models
steps = 300  # of learning a mask
at_once = 18  # masks that are learned in one pass: they keep a GPU busy; a CPU is as fast with one
record = "experiments/circuit_sizes.csv"
models = "out/circuits"  # the folder of the trained models
targets_image, widths_image = "assets/circuits_targets.png", "assets/circuits_widths.png"
widths_target = 0.3  # the target loss of the figure of widths
widths_tasks = ""  # and its tasks, by commas: who cannot do them has no point; '': what all models can do

# figure 2: flags beside `config`, whose own model is the sparse one. 1050 steps bring the dense one with
# AbsTopK to about its pretraining loss. Without AbsTopK the best learning rate is about half
MODELS = {
    "sparse": "",
    "dense, fewer steps, same loss": "--target_l0_fraction=1 --max_iters=1050",
    "dense, same shape": "--target_l0_fraction=1",
    "dense without AbsTopK, same shape": "--target_l0_fraction=1 --activation_topk_fraction=1 "
                                         "--learning_rate=9e-3",
    "dense without AbsTopK, fewer steps": "--target_l0_fraction=1 --activation_topk_fraction=1 "
                                          "--learning_rate=9e-3 --max_iters=1050",
}
SEEDS = (1337, 1, 2)
# figure 3: d_model and L0. At width 128 four weights for each neuron leave no L0 below 1/32; the dense model
# of width 64 ends at the loss of the sparse one of width 256
GRID = {64: ("1",), 128: ("1", "1/4", "1/16", "1/32"), 256: ("1", "1/4", "1/16", "1/64"),
        512: ("1", "1/4", "1/16", "1/64")}
# a step has the config's 32 windows, in one pass: half the launches. The paper's models have no positions
TRAINING = ("--batch_size=32 --gradient_accumulation_steps=1 --eval_iters=30 --dtype=float32 "
            "--compile=False --use_positional_embeddings=False")
TASKS = ("quotes", "quotes_comma", "single_double_quote", "string_end", "fstring_brace")
MORE_TASKS = ("for_if", "braces", "brackets_comma")  # which take their turn after all else
# models that differ from the sparse one in one choice, whose circuits of one task are compared
CHOICES = {
    "positional embeddings": "--use_positional_embeddings=True",
    "no AbsTopK": "--activation_topk_fraction=1 --learning_rate=9e-3",
    "twice the steps": "--max_iters=4400",
}
CHOICES_TASKS = ("quotes",)
TARGETS = (0.05, 0.1, 0.15, 0.3, 0.5)
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TRIALS = [(penalty, mask_seed) for penalty in PENALTIES for mask_seed in range(3)]
COLUMNS = ("flags", "seed", "task", "penalty", "mask_seed", "target_loss", "nodes", "edges", "val_loss",
           "whole_val_loss", "whole_train_loss", "pretraining_loss", "nonzero")


def grid_flags(d_model, l0):
    """Flags of a model of the grid; two of them are models of figure 2."""
    flags = [f"--d_model={d_model}"] * (d_model != 256) + [f"--target_l0_fraction={l0}"] * (l0 != "1/16")
    return " ".join(flags)


# of the grid, the other two that end at about the sparse model's loss
SAME_LOSS = {"dense, d_model 64, same loss": grid_flags(64, "1"),
             "d_model 128, L0 1/4, same loss": grid_flags(128, "1/4")}


def all_jobs():
    """(flags, seed, tasks), what matters most first."""
    *compared, last = MODELS.values()
    grid = [grid_flags(d_model, l0) for d_model, levels in GRID.items() for l0 in levels]
    grid = [flags for flags in grid if flags not in (*MODELS.values(), *SAME_LOSS.values())]
    return ([(flags, seed, TASKS) for seed in SEEDS for flags in (*compared, *SAME_LOSS.values())]
            + [(flags, SEEDS[0], TASKS) for flags in grid]
            + [(last, seed, TASKS) for seed in SEEDS]
            + [(flags, seed, CHOICES_TASKS) for seed in SEEDS for flags in CHOICES.values()]
            + [(flags, seed, MORE_TASKS) for seed in SEEDS for flags in MODELS.values()]
            + [(flags, seed, TASKS) for seed in SEEDS[1:] for flags in grid])


# ----------------------------------------------------------------------------------------------------------
# a job


def read_rows(path):
    """The rows of a CSV, dicts of strings. One that was torn lacks its last column, and is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as f:
        reader = csv.DictReader(f)
        return [row for row in reader if row[reader.fieldnames[-1]] and None not in row]


def add(path, columns, rows):
    """Append rows to a CSV, whichever process comes first. What was torn off at its end goes."""
    with open(path, "a+", encoding="utf-8", newline="") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        text = f.read()
        whole = text[:text.rfind("\n") + 1]
        f.truncate(len(whole.encode()))
        writer = csv.DictWriter(f, columns)
        if not whole:
            writer.writeheader()
        writer.writerows(rows)


def train(flags, seed):
    """Train a model, or what is left of its training. Returns its folder."""
    name = flags.replace("--", "").replace(" ", ",").replace("/", "_") or "as_configured"
    folder = os.path.join(models, name, f"seed{seed}")
    os.makedirs(folder, exist_ok=True)
    checkpoint = os.path.join(folder, "ckpt.pt")
    with open(os.path.join(folder, "training"), "w", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # another job may be at it
        started = os.path.exists(checkpoint)
        if not started or not is_trained(checkpoint):
            command = [sys.executable, "train.py", config, *TRAINING.split(), *flags.split(),
                       f"--seed={seed}", f"--out_dir={folder}", f"--device={device}"]
            done = subprocess.run(command + ["--init_from=resume"] * started, check=False, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode or not is_trained(checkpoint):
                raise SystemExit(f"{' '.join(command)}\nfailed or was stopped\n{done.stdout[-2000:]}")
    return folder


def is_trained(checkpoint):
    saved = load_checkpoint(checkpoint)
    return saved["step"] == saved["settings"]["max_iters"]


def rows_of_trial(nodes, tau, choosing, judging):
    """What the importance tau of the nodes makes of each target loss."""
    order = tau.argsort(descending=True, stable=True)
    at_size = functools.cache(lambda size: loss_at(nodes, choosing, first_of(order, size), fit=False))
    for target in TARGETS:
        size, _ = fewest(at_size, nodes.number, target)
        row = {"target_loss": target, "nodes": "", "edges": "", "val_loss": ""}
        if size:
            gates = first_of(order, size)
            row |= {"nodes": size, "edges": count(nodes, gates)["edges"],
                    "val_loss": f"{loss_of(nodes.judge(judging, gates)).mean().item():.4f}"}
        yield row


def run_job(flags, seed, tasks):
    """Train a model if need be, and add to the CSV what it lacks of its circuits."""
    there = Counter((row["task"], float(row["penalty"]), int(row["mask_seed"])) for row in read_rows(record)
                    if (row["flags"], row["seed"]) == (flags, str(seed)))
    missing = {task: trials for task in tasks if (
        trials := [trial for trial in TRIALS if there[task, *trial] < len(TARGETS)])}
    if not missing:
        return
    folder = train(flags, seed)
    last, loaded, how = last_of_log(folder), load(folder, device=device), Search(steps=steps)
    nodes, source = loaded.nodes(), Source(loaded)
    for task, trials in missing.items():
        sets = source.three_sets(read_task(task, loaded.tokenizer))
        ones = torch.ones(nodes.number, device=nodes.device)
        whole = [loss_of(nodes.judge(contexts, ones)).mean().item() for contexts in sets[1:]]
        row = {"flags": flags, "seed": seed, "task": task, "whole_train_loss": f"{whole[0]:.4f}",
               "whole_val_loss": f"{whole[1]:.4f}", "pretraining_loss": f"{last['val/loss']:.4f}",
               "nonzero": last["sparsity/nonzero"]}
        for i in range(0, len(trials), at_once):
            some = trials[i:i + at_once]
            taus = learn_masks(nodes, sets[0], some, how)
            for (penalty, mask_seed), tau in zip(some, taus, strict=True):
                add(record, COLUMNS, [row | {"penalty": penalty, "mask_seed": mask_seed} | found
                                      for found in rows_of_trial(nodes, tau, *sets[1:])])
        print(f"{row['pretraining_loss']} | {task} {whole[0]:.3f} | seed {seed} | {flags}", flush=True)


def start_worker(settings):
    """What a new process needs to know of this one."""
    globals().update(settings)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and with it the jobs that have not begun
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run_all(run, todo, processes, start, settings):
    """run(*job) for each job of a list, in so many processes, each of which begins with start(settings). A
    job that fails is reported; the others go on."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start, (settings,)) as pool:
        futures = {pool.submit(run, *job): job for job in todo}
        for future in as_completed(futures):
            if error := future.exception():
                print(f"{futures[future]}: {error!r}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------
# what was found


class Found:
    """The smallest circuits of the models and tasks that were searched with all of TRIALS."""

    def __init__(self, rows):
        rows = [((row["flags"], int(row["seed"]), row["task"]), row) for row in rows]
        number = Counter(at for at, _ in rows)
        self.searched = {at for at, n in number.items() if n >= len(TRIALS) * len(TARGETS)}
        self.best, self.models = {}, {}  # (flags, seed, task, target) -> row; (flags, seed) -> any row
        for at, row in rows:
            if at in self.searched:
                self.models[at[:2]] = row
            if at in self.searched and row["nodes"]:
                key = *at, float(row["target_loss"])
                self.best[key] = min(self.best.get(key, row), row, key=lambda row: int(row["edges"]))

    def seeds(self, flags, tasks=None):
        """The seeds of a model that were searched for all of `tasks`, or of TASKS."""
        return [s for s in SEEDS if all((flags, s, task) in self.searched for task in tasks or TASKS)]

    def pretraining(self, flags, tasks=None):
        """The val loss of each of these seeds."""
        return [float(self.models[flags, seed]["pretraining_loss"]) for seed in self.seeds(flags, tasks)]

    def common(self, models, target):
        """The tasks in which all `models`, at every seed, reach the target."""
        return [task for task in TASKS + MORE_TASKS if all(
            (flags, seed, task, target) in self.best for flags in models for seed in self.seeds(flags))]

    def edges(self, flags, tasks, target):
        """The geometric mean of edges over tasks, by seed: NaN if a task does not reach the target.

        A circuit without an edge counts as one, for the logarithm.
        """
        def edges_in(seed, task):
            row = self.best.get((flags, seed, task, target))
            return max(int(row["edges"]), 1) if row else np.nan

        return {seed: geometric_mean([edges_in(seed, task) for task in tasks])
                for seed in self.seeds(flags, tasks)}


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(values))))


def describe(values):
    """Geometric mean and range of those that are no NaN; and of how many, if not all."""
    good = [x for x in values if np.isfinite(x)]
    words = f"{geometric_mean(good):,.3g}" if good else "none" if values else ""
    words += f" ({min(good):,.3g} to {max(good):,.3g})" if len(good) > 1 else ""
    return words + (f", {len(good)} of {len(values)}" if len(good) < len(values) else "")


def table(*rows):
    """Print a table in Markdown: the first row is its head."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(map(str, row))} |")
    print()


def compare(found, compared, tasks, target):
    """Cells of a table: the edges of each model, and their ratio to those of the sparse one, by seed."""
    if not tasks:
        return [""] * (2 * len(compared) - 1)
    sparse, *others = all_edges = [found.edges(flags, tasks, target) for flags in compared.values()]
    return [*(describe([*edges.values()]) for edges in all_edges),
            *(describe([edges[seed] / sparse[seed] for seed in edges if seed in sparse])
              for edges in others)]


def print_tables(found, compared):
    """The models and which penalties were best; edges and ratios over the common tasks, and in each."""
    best = Counter((key[0], float(row["penalty"])) for key, row in found.best.items())
    table(("model", "flags", "seeds", "val loss", "nonzero", *(f"best at {p:g}" for p in PENALTIES)), *(
        (label, f"`{flags}`", len(losses := found.pretraining(flags)),
         f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
         found.models[flags, found.seeds(flags)[0]]["nonzero"], *(best[flags, p] for p in PENALTIES))
        for label, flags in compared.items()))
    head = [*(f"edges, {label}" for label in compared), *(f"ratio, {label}" for label in list(compared)[1:])]
    common = {target: found.common(compared.values(), target) for target in TARGETS}
    table(("target", "tasks", *head), *((target, len(tasks), *compare(found, compared, tasks, target))
                                        for target, tasks in common.items()))
    table(("task", "target", *head), *(
        (task, target, *compare(found, compared, [task], target)) for task in TASKS + MORE_TASKS
        if any((flags, seed, task) in found.searched for flags in compared.values() for seed in SEEDS)
        for target in TARGETS))


def print_otherwise(found, compared):
    """The ratios over cells, a task at a seed in which both models have a circuit.

    At `widths_target` also of nodes; of the cells in which both models without ablation reach the target;
    and of those in which both circuits are within a quarter of it on val.
    """
    def ratios(flags, at=widths_target, of="edges", where=lambda row: True):
        """By cell, of the edges or nodes."""
        cells = {(seed, task): (row, found.best["", seed, task, target])
                 for (f, seed, task, target), row in found.best.items()
                 if f == flags and target == at and ("", seed, task, target) in found.best}
        return {cell: max(int(row[of]), 1) / max(int(sparse[of]), 1)
                for cell, (row, sparse) in cells.items() if where(row) and where(sparse)}

    def words(values):
        return f"{geometric_mean([*values.values()]):.3g} ({len(values)})" if values else ""

    at = f"at {widths_target:g}"
    ways = {f"edges at {target:g} (cells)": {"at": target} for target in TARGETS} | {
        f"nodes {at}": {"of": "nodes"},
        f"edges {at}, where both whole models reach it": {
            "where": lambda row: float(row["whole_train_loss"]) <= widths_target},
        f"edges {at}, where both circuits are near it on val": {
            "where": lambda row: float(row["val_loss"]) <= 1.25 * widths_target},
    }
    models = {label: flags for label, flags in (compared | SAME_LOSS).items()
              if flags and found.seeds(flags)}
    table(("times the sparse model's", *models),
          *((way, *(words(ratios(flags, **how)) for flags in models.values())) for way, how in ways.items()),
          (f"edges {at}, 95% interval", *(interval(ratios(flags)) for flags in models.values())))


def interval(ratios, draws=2000):
    """Where 95% of the geometric means are if seeds and tasks are drawn anew, of ratios by (seed, task)."""
    if not ratios:
        return ""
    rng, means = np.random.default_rng(0), []
    seeds, tasks = (sorted(set(names)) for names in zip(*ratios, strict=True))
    while len(means) < draws:
        drawn = itertools.product(rng.choice(seeds, len(seeds)), rng.choice(tasks, len(tasks)))
        if some := [ratios[cell] for cell in drawn if cell in ratios]:
            means.append(geometric_mean(some))
    return "{:.2g} to {:.2g}".format(*np.percentile(means, [2.5, 97.5]))


def print_choices(found):
    """The smallest circuits of the sparse model, and of those that differ from it in one choice."""
    rows = []
    for label, flags in ({"as configured": ""} | CHOICES).items():
        if losses := found.pretraining(flags, CHOICES_TASKS):
            rows.append((label, f"`{flags}`", len(losses), f"{np.mean(losses):.3f}",
                         *(describe([*found.edges(flags, CHOICES_TASKS, t).values()]) for t in TARGETS)))
    table(("model", "flags", "seeds", "val loss", *(
        f"edges of {', '.join(CHOICES_TASKS)} at {t:g}" for t in TARGETS)), *rows)


def print_grid(found):
    """The table of figure 3. Returns the number of tasks, and of models (d_model, L0, val loss, edges), the
    edges by seed."""
    grid = {(d_model, l0): grid_flags(d_model, l0) for d_model, levels in GRID.items() for l0 in levels}
    grid = {at: flags for at, flags in grid.items() if found.seeds(flags)}
    tasks = widths_tasks.split(",") if widths_tasks else found.common(grid.values(), widths_target)
    points, rows = [], []
    for at, flags in grid.items():
        losses = found.pretraining(flags)
        over, *of_each = ([*found.edges(flags, some, widths_target).values()] if some else []
                          for some in (tasks, *([task] for task in TASKS)))
        rows.append((*at, len(losses), f"{np.mean(losses):.3f}", *map(describe, (over, *of_each))))
        if over and np.isfinite(over).all():
            points.append((*at, np.mean(losses), over))
    table(("d_model", "L0", "seeds", "val loss", f"edges at {widths_target:g}, {len(tasks)} tasks", *TASKS),
          *rows)
    return len(tasks), points


@contextmanager
def figure(path, **labels):
    """An axis to draw on, and the figure written to `path`."""
    figure, axis = new_figure(7, 4.5)
    axis.set(yscale="log", **labels)
    yield axis
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_formatter(lambda y, _: f"{y:,.0f}" if f"{y:.0e}"[0] in "25" else "")
    plain(axis)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save(figure, path)


def draw_means(axis, x, values, label, color=None):
    """A line through the geometric means of values, a list for each x, with bars over each list."""
    middle = np.array([geometric_mean(some) for some in values])
    least, most = (np.array([end(some) for some in values]) for end in (min, max))
    bars = [(middle - least).clip(0), (most - middle).clip(0)]  # less than 0 by rounding, if all are alike
    axis.errorbar(x, middle, bars, marker="o", markersize=4, capsize=3, label=label, color=color)


def draw_targets(found, compared):
    """Figure 2: edges against target loss. The bars reach over the seeds."""
    common = {target: found.common(compared.values(), target) for target in TARGETS}
    with figure(targets_image, xlabel="target loss of the circuit; tasks in which all models reach it",
                ylabel="edges of the circuit, geometric mean", xscale="log") as axis:
        for label, flags in compared.items():
            edges = {t: [*found.edges(flags, tasks, t).values()] for t, tasks in common.items() if tasks}
            draw_means(axis, [*edges], edges.values(), f"{label}, n = {len(found.seeds(flags))}")
        axis.set_xticks(TARGETS, [f"{t:g}\n{len(tasks) or 'no'} tasks" for t, tasks in common.items()])
        axis.minorticks_off()


def draw_widths(n, points):
    """Figure 3: edges against val loss, a line for each width, its points by L0; bars over the seeds."""
    with figure(widths_image, xlabel="val loss of the model (nats per token)",
                ylabel=f"edges at loss {widths_target:g}, geometric mean over {n} tasks") as axis:
        for d_model in sorted({point[0] for point in points}):
            line = [point[1:] for point in points if point[0] == d_model]
            _, x, edges = zip(*line, strict=True)
            draw_means(axis, x, edges, f"d_model {d_model}")
            for l0, x, edges in line:
                axis.annotate(f"{l0}, n = {len(edges)}", (x, geometric_mean(edges)), (5, 5),
                              textcoords="offset points", fontsize=8)


def report():
    found = Found(read_rows(record))
    compared = {label: flags for label, flags in MODELS.items() if found.seeds(flags)}
    if "sparse" not in compared:
        fail(f"{record} has no sparse model that was searched for all tasks: leave out --jobs=0")
    print_tables(found, compared)
    draw_targets(found, compared)
    print_otherwise(found, compared)
    print_choices(found)
    n, points = print_grid(found)
    if points:
        draw_widths(n, points)


@ends_explained("take fewer --jobs, or a smaller --at_once")
def main():
    configure(globals())
    if jobs < 0 or at_once < 1:
        fail(f"jobs={jobs} must not be negative, and at_once={at_once} must be at least 1")
    if widths_target not in TARGETS:
        fail(f"widths_target={widths_target} must be one of {TARGETS}")
    if jobs:
        run_all(run_job, all_jobs(), jobs, start_worker, settings_of(globals()))
    report()


if __name__ == "__main__":
    main()
