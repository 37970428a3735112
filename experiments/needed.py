"""Are circuits in weight-sparse models still smaller when idle edges do not count, and are they closer to
their model?

    python -m experiments.needed             # what needed.csv lacks, then tables and the figure
    python -m experiments.needed --jobs=0    # run nothing: tables and the figure of what is recorded

circuit_sizes.py, after figures 2 and 3 of Gao et al. 2025, counts every weight between two kept nodes. In a
dense model all kept nodes are joined, needed or not. Here edges are removed on both sides while the target
holds, by circuits/search.py's `needed`, with the fit and without.

A job is a task in a model of circuit_sizes.py, which is trained if it is not there. Its masks, of bracketed
penalties and of a second seed at the best, serve all targets. What is idle is removed from twice the fewest
nodes that reach a target, and from what was left at the target before: the fewest nodes themselves leave a
dense model no room, and end with more edges. All can be stopped at any time and started again: a
training goes on from its checkpoint, and targets that are recorded are not searched for twice (so give
--unseen from the first call on).
"""
import os
import time
from dataclasses import replace

import numpy as np
import torch

from circuits import controls as asked
from circuits.figures import new_figure, plain, save
from circuits.loaded import load
from circuits.nodes import count
from circuits.search import (
    FIRST,
    LADDER,
    Search,
    apply_fit,
    bracketed,
    fewest,
    first_of,
    fit_of,
    learn_masks,
    loss_at,
    loss_of,
    needed,
)
from circuits.tasks import Source, not_found, path_of, read_task
from configurator import configure, ends_explained, fail, settings_of
from experiments import circuit_sizes
from experiments.ablations import last_of_log
from experiments.circuit_sizes import SEEDS, describe, draw_means, geometric_mean, table
from runs import data_folder

jobs = os.cpu_count() or 1  # processes
device = "auto"  # 'auto', 'cpu', 'cuda'
tasks = "single_double_quote,string_end,fstring_brace,for_if,quotes"  # to search for, by commas
record = "experiments/needed.csv"
image = "assets/circuits_needed.png"
unseen = ""  # a folder of data/ with files that the models have not seen, prepared with their tokenizer

MODELS = {label: flags for label, flags in (circuit_sizes.MODELS | circuit_sizes.SAME_LOSS).items()
          if "fewer steps" not in label}  # those are the training of another, cut short
COLORS = {label: f"C{i}" for i, label in enumerate((*circuit_sizes.MODELS, *circuit_sizes.SAME_LOSS))}
TARGETS = (0.05, 0.15, 0.3, 0.5)
STRICTEST = {"for_if": 0.5, "quotes": 0.5}  # stricter ones take a dense model a thousand nodes, and hours
FAITHFUL = (0.15, 0.3)  # targets at which a circuit is compared with its model
SHUFFLED_TASKS = ("single_double_quote",)  # in which a model of shuffled weights is searched too, at 0.15
MASK_SEEDS = 2
MORE = 2  # times the fewest nodes are what is removed from
DRAWS = 5  # of edges removed by chance
SEARCH = Search()
CONTEXTS = {"choosing": 256, "judging": 512}
OF_A_CIRCUIT = (
    "needed_nodes", "needed_edges", "train_loss", "val_loss", "val_loss_fitted", "accuracy", "embedding",
    "unembedding", "chance_train_loss", "same_answer", "same_hard", "same_unseen", "whole_hard",
    "resampled_loss", "attention_same", "shuffled_loss", "shuffled_weights", "shuffled_edges")
COLUMNS = ("flags", "seed", "task", "pretraining_loss", "target_loss", "fit", "penalty", "mask_seed",
           "nodes", "weights", *OF_A_CIRCUIT, "cpu_seconds", "whole_train_loss")  # never empty: read_rows


# ----------------------------------------------------------------------------------------------------------
# a job


class Mask:
    """An order of the nodes, by a learned mask, and the losses of the first of them, raw and fitted."""

    def __init__(self, nodes, sets, penalty, mask_seed):
        self.nodes, self.choosing, self.penalty, self.mask_seed = nodes, sets[1], penalty, mask_seed
        [tau] = learn_masks(nodes, sets[0], [(penalty, mask_seed)], SEARCH)
        self.order, self.seen = tau.argsort(descending=True, stable=True), {}

    def loss(self, size, fit):
        if size not in self.seen:
            sides = self.choosing.sides()
            logits = self.nodes.judge(self.choosing, first_of(self.order, size))
            fitted = apply_fit(logits, sides, *fit_of(logits, sides))
            self.seen[size] = {True: loss_of(fitted).mean().item(), False: loss_of(logits).mean().item()}
        return self.seen[size][fit]

    def fewest(self, target_loss, fit):
        """The fewest nodes found that reach a target, or None."""
        return fewest(lambda size: self.loss(size, fit), self.nodes.number, target_loss)[0]

    def size(self):
        """The geometric mean of the fewest nodes over all targets, fitted; all nodes where one is missed."""
        return geometric_mean([self.fewest(t, True) or self.nodes.number for t in TARGETS])


def learned(nodes, sets):
    """Masks of bracketed penalties, and with other mask seeds at the best: a list of Mask."""
    masks = {}

    def attempt(penalty, mask_seed=0):
        mask = masks[penalty, mask_seed] = Mask(nodes, sets, penalty, mask_seed)
        return mask.size()

    sizes = bracketed(attempt, LADDER, FIRST)
    for mask_seed in range(1, MASK_SEEDS):
        attempt(min(sizes, key=sizes.get), mask_seed)
    return list(masks.values())


def by_chance(nodes, gates, number, contexts, fit, seed):
    """The mean loss of a circuit (gates of nodes) that keeps all nodes and so many edges by chance."""
    generator, losses = torch.Generator().manual_seed(seed), []
    nodes = nodes.with_edges([edge[:4] for edge in nodes.edges_in(gates)])
    for _ in range(DRAWS):
        kept = torch.zeros(len(nodes.edges), device=gates.device)
        kept[torch.randperm(len(nodes.edges), generator=generator)[:number]] = 1
        losses.append(loss_at(nodes, contexts, torch.cat([gates, kept]), fit))
    return float(np.mean(losses))


def nearness(inside, gates, judging, fit, families, unseen_files, text, seed):
    """How near a circuit is to its model: on its own task, on families of hard inputs, on files that neither
    has seen; when the rest is as in another context; and how much of its heads' attention is the same."""
    found = {"same_answer": asked.agreement(inside, gates, judging, fit)["same_answer"]}
    hard = [asked.agreement(inside, gates, contexts, fit) for contexts in families.values()]
    if hard:
        found |= {"same_hard": np.mean([family["same_answer"] for family in hard]),
                  "whole_hard": np.mean([family["whole_right"] for family in hard])}
    if unseen_files:
        found["same_unseen"] = asked.agreement(inside, gates, unseen_files, fit)["same_answer"]
    resampled = asked.rest_otherwise(inside, gates, judging, text, fit, seed)
    found["resampled_loss"] = resampled["as in another context of the task"]["loss"]
    if heads := asked.attention_kept(inside, gates, judging):
        found["attention_same"] = np.mean([head["same"] for head in heads.values()])
    return {name: f"{value:.4f}" for name, value in found.items()}


def shuffled_too(loaded, sets, mask, size, target_loss, seed):
    """The loss, fitted, of as many nodes in a model of shuffled weights, and how many weights are between
    them; and, if it reaches the target, how many of these are needed."""
    nodes = replace(loaded, model=asked.shuffled_weights(loaded.model, seed)).nodes()
    other = Mask(nodes, sets, mask.penalty, mask.mask_seed)
    gates, loss = first_of(other.order, size), other.loss(size, True)
    row = {"shuffled_loss": f"{loss:.4f}", "shuffled_weights": count(nodes, gates)["weights"]}
    if loss <= target_loss:
        inside, left, _ = needed(nodes, gates, sets[1], target_loss)
        row["shuffled_edges"] = count(inside, left)["edges"]
    return row


def search_one(nodes, masks, sets, target_loss, fit, seed, before=None):
    """The row of a target, and what else is asked of its circuit: Nodes, gates, fit and the Mask; or the row
    alone if no mask reaches the target. `before` is the same of a stricter target."""
    begun = time.process_time()
    row = {"target_loss": target_loss, "fit": int(fit)}
    reached = [mask for mask in masks if mask.fewest(target_loss, fit)]
    if not reached:
        return row, None
    mask = min(reached, key=lambda mask: mask.fewest(target_loss, fit))
    size = mask.fewest(target_loss, fit)
    fewest_nodes, more = first_of(mask.order, size), first_of(mask.order, MORE * size)
    circuits = [needed(*start, sets[1], target_loss, fit)
                for start in [(nodes, more), before and before[:2]] if start]
    circuits = [circuit for circuit in circuits if circuit[2][-1][2] <= target_loss]
    inside, left, path = min(circuits or [needed(nodes, fewest_nodes, sets[1], target_loss, fit)],
                             key=lambda circuit: circuit[2][-1][1::-1])  # the fewest edges, then nodes
    parameters = fit_of(inside.judge(sets[1], left), sets[1].sides())
    logits = inside.judge(sets[2], left)
    raw, fitted = asked.result(logits), asked.result(apply_fit(logits, sets[2].sides(), *parameters))
    found, now = count(nodes, fewest_nodes), count(inside, left)
    weights = asked.embedding_weights(inside, left, sets[2])
    row |= {"penalty": mask.penalty, "mask_seed": mask.mask_seed, "nodes": found["nodes"],
            "weights": found["weights"], "needed_nodes": now["nodes"], "needed_edges": now["edges"],
            "train_loss": f"{path[-1][2]:.4f}", "val_loss": f"{raw['loss']:.4f}",
            "val_loss_fitted": f"{fitted['loss']:.4f}",
            "accuracy": f"{(fitted if fit else raw)['accuracy']:.4f}",
            "embedding": weights["embedding_of_tokens"], "unembedding": weights["unembedding_of_answers"],
            "chance_train_loss": f"{by_chance(nodes, more, now['edges'], sets[1], fit, seed):.4f}",
            "cpu_seconds": f"{time.process_time() - begun:.0f}"}
    return row, (inside, left, parameters if fit else (1.0, 0.0), mask)


def run_job(flags, seed, task):
    """Train a model if need be, and add to the CSV what it lacks of the circuits of a task: fitted, raw."""
    targets = [t for t in TARGETS if t >= STRICTEST.get(task, 0)]
    there = [int(row["fit"]) for row in circuit_sizes.read_rows(record)
             if (row["flags"], row["seed"], row["task"]) == (flags, str(seed), task)]
    missing = [fit for fit in (True, False) if there.count(fit) < len(targets)]
    if not missing:
        return
    begun = time.process_time()
    folder = circuit_sizes.train(flags, seed)
    loaded = load(folder, device=device)
    nodes, source = loaded.nodes(), Source(loaded, **CONTEXTS)
    spec = read_task(task, loaded.tokenizer)
    sets = source.three_sets(spec)
    beyond, families = source.beyond(spec, sets[2], loaded.other_data(unseen) if unseen else None)
    whole = loss_at(nodes, sets[1], torch.ones(nodes.number, device=nodes.device), fit=False)
    row = {"flags": flags, "seed": seed, "task": task, "whole_train_loss": f"{whole:.4f}",
           "pretraining_loss": f"{last_of_log(folder)['val/loss']:.4f}"}
    masks = learned(nodes, sets)
    for fit in missing:
        rows, circuit = [], None
        for t in targets:
            found, circuit = search_one(nodes, masks, sets, t, fit, seed, circuit)
            if circuit and fit and t in FAITHFUL:
                inside, left, parameters, mask = circuit
                found |= nearness(inside, left, sets[2], parameters, families, beyond.get("unseen files"),
                                  beyond["ordinary text"], seed)
                if task in SHUFFLED_TASKS and t == FAITHFUL[0]:
                    found |= shuffled_too(loaded, sets, mask, MORE * found["nodes"], t, seed)
            rows.append(row | found)
        circuit_sizes.add(record, COLUMNS, rows)
    print(f"{row['pretraining_loss']} | {task} {whole:.3f} | seed {seed} | {flags} | "
          f"{time.process_time() - begun:.0f} s of CPU", flush=True)


def start_worker(settings):
    """What a new process needs to know of this one."""
    globals().update(settings)
    circuit_sizes.start_worker({"jobs": jobs, "device": device})


# ----------------------------------------------------------------------------------------------------------
# what was found


class Found:
    """The recorded circuits: (task, flags, seed, target loss, fit) -> row."""

    def __init__(self, rows):
        self.rows = {(row["task"], row["flags"], int(row["seed"]), float(row["target_loss"]),
                      int(row["fit"])): row for row in rows}
        self.tasks = list(dict.fromkeys(task for task, *_ in self.rows))

    def reached(self, t, fit, tasks=None):
        """Of `tasks`, or all, those in which all MODELS were searched and reach a target, at every seed."""
        return [task for task in tasks or self.tasks if all(
            self.rows.get((task, flags, seed, t, fit), {}).get("nodes") for flags in MODELS.values()
            for seed in SEEDS)]

    def fewest(self, column, task, flags, seed, t, fit):
        """The least weights or needed edges with which a target was reached: a circuit that reaches a
        stricter one counts too. None counts as one, for the logarithm."""
        rows = [self.rows.get((task, flags, seed, stricter, fit)) for stricter in TARGETS if stricter <= t]
        return min(max(int(row[column]), 1) for row in rows if row and row["nodes"])

    def sizes(self, column, flags, t, fit, tasks):
        """The geometric mean of these over tasks, for each seed."""
        return [geometric_mean([self.fewest(column, task, flags, seed, t, fit) for task in tasks])
                for seed in SEEDS]

    def measured(self, column, t, tasks):
        """What was measured of the fitted circuits of all models and seeds: the number of tasks in which it
        was, and for each model the mean over these for each seed."""
        cells = {(task, flags, seed): self.rows[task, flags, seed, t, 1][column]
                 for task in tasks for flags in MODELS.values() for seed in SEEDS}
        tasks = [task for task in tasks if all(cell for at, cell in cells.items() if at[0] == task)]
        return len(tasks), [[np.mean([float(cells[task, flags, seed]) for task in tasks]) for seed in SEEDS]
                            for flags in MODELS.values() if tasks]


def spread(values):
    """Mean and standard deviation over seeds, in words, with three and two figures."""
    mean, deviation = float(f"{np.mean(values):.3g}"), float(f"{np.std(values, ddof=1):.2g}")
    return f"{mean:,g} ± {round(deviation, 4):g}"


def print_sizes(found):
    """For each model: weights between kept nodes -> needed edges, over the tasks that all reach, and in each
    of these; behind it how many times the sparse model's, with the range over seeds."""
    def cells(t, fit, tasks):
        for flags in MODELS.values():
            both = []
            for column in ("weights", "needed_edges"):
                values, sparse = (found.sizes(column, f, t, fit, tasks) for f in (flags, ""))
                times = [value / other for value, other in zip(values, sparse, strict=True)]
                mean = float(f"{geometric_mean(values):.3g}")
                both.append(f"{mean:,g}" + f" [{describe(times)}]" * bool(flags))
            yield " -> ".join(both)

    table(("target", "logits", "tasks", *MODELS), *(
        (t, "fitted" if fit else "raw", len(tasks), *cells(t, fit, tasks)) for fit in (1, 0) for t in TARGETS
        if (tasks := found.reached(t, fit))))
    table(("task", "target", "logits", *MODELS), *(
        (task, t, "fitted" if fit else "raw", *cells(t, fit, [task])) for fit in (1, 0)
        for task in found.tasks for t in TARGETS if found.reached(t, fit, [task])))


def print_measured(found):
    """What was measured of the fitted circuits, and in how many tasks: means over these."""
    for t in FAITHFUL:
        rows = {column: found.measured(column, t, found.reached(t, 1)) for column in OF_A_CIRCUIT}
        table((f"target {t:g}", "tasks", *MODELS), *(
            (column, n, *map(spread, values)) for column, (n, values) in rows.items() if n))


def draw(found):
    """Both ways to count, beside each other: edges against target loss; bars over the seeds."""
    figure, axes = new_figure(10, 4.5, ncols=2, sharey=True)
    targets = [t for t in TARGETS if found.reached(t, 1)]
    for axis, column, words in zip(axes, ("weights", "needed_edges"), (
            "all weights between kept nodes", "needed edges alone"), strict=True):
        for place, (label, flags) in enumerate(MODELS.items()):
            sizes = [found.sizes(column, flags, t, 1, found.reached(t, 1)) for t in targets]
            beside = 1.02 ** (place - len(MODELS) // 2)  # so that no bar hides another
            draw_means(axis, [t * beside for t in targets], sizes, label, COLORS.get(label))
        axis.set(yscale="log", xscale="log", title=words, xlabel="target loss of the circuit, in nats")
        axis.set_xticks(targets, [f"{t:g}\n{len(found.reached(t, 1))} tasks" for t in targets])
        axis.minorticks_off()
        plain(axis)
    axes[0].set_ylabel(f"edges, geometric mean; bars: {len(SEEDS)} seeds")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, image)


def report():
    rows = circuit_sizes.read_rows(record)
    found = Found(rows)
    common = [task for t in TARGETS for fit in (1, 0) for task in found.reached(t, fit)]
    if not common:
        fail(f"{record} has no task in which all models reach a target at all seeds: leave out --jobs=0")
    losses = {label: [next(float(row["pretraining_loss"]) for (_, *at, _, _), row in found.rows.items()
                           if at == [flags, seed]) for seed in SEEDS] for label, flags in MODELS.items()}
    table(("model", "flags", "val loss"), *(
        (label, f"`{flags}`", spread(losses[label])) for label, flags in MODELS.items()))
    print_sizes(found)
    print_measured(found)
    print(f"{sum(float(row['cpu_seconds'] or 0) for row in rows) / 3600:.1f} core-hours of removal")
    if any(found.reached(t, 1) for t in TARGETS):
        draw(found)


@ends_explained("take fewer --jobs")
def main():
    configure(globals())
    if jobs < 0:
        fail(f"jobs={jobs} must not be negative")
    for task in tasks.split(","):
        if not os.path.exists(path_of(task)):
            fail(not_found(task, "."))
    if jobs:
        if unseen:
            data_folder(unseen)  # ends the script if it is not there
        todo = [(flags, seed, task) for task in tasks.split(",") for seed in SEEDS
                for flags in MODELS.values()]
        circuit_sizes.run_all(run_job, todo, jobs, start_worker, settings_of(globals()))
    report()


if __name__ == "__main__":
    main()
