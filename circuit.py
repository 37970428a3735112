"""Find the circuit of a task in a trained model, with the controls that a sceptic would ask for.

    python circuit.py --out_dir=out/quickstart --task=quotes
    python circuit.py --out_dir=out/quickstart --task=my/own.json --controls=False --target_loss=0.3

A circuit is a set of nodes, and of edges between them, that does a task while all other nodes are frozen at
their mean over the training text (Gao et al. 2025, sections 2.2 and A.5). What it is made of stands in
circuits/: nodes and edges, tasks, the search, the controls, the picture and the page. Results go to
out_dir/circuits/TASK: circuit.json, from which every loss can be computed again with a few hooks,
circuit.png, and circuit.html, in which the model itself runs.
"""
import json
import os
import time
from dataclasses import replace

import torch

import kernels
from checkpoints import start_circuit, write_atomically
from circuits import controls as asked
from circuits import page as page_of
from circuits import picture, report, search
from circuits.loaded import load
from circuits.nodes import count
from circuits.saved import FORMAT
from circuits.tasks import FEWEST, Source, contexts_record, joined_otherwise, prompts_record, read_task
from configurator import check_rules, configure, ends_explained, fail, settings_of

out_dir = "out"  # of the training run; or the folder of a released model
checkpoint = "ckpt.pt"  # in out_dir: 'ckpt.pt' is the latest, 'best.pt' the sparsest of least val loss
dataset = ""  # '': what it was trained on, which a released model does not say; data of its tokenizer
task = "quotes"  # of tasks/NAME.json; or the path of such a file
target_loss = 0.0  # of a circuit, in nats, chance being 0.693; 0: the task's own, or else the paper's 0.15
ablation = "mean"  # what a node outside the circuit is: its 'mean' over train, or 'zero'
fit = True  # the target is met after a scale and a shift of the logits are fitted on train, as in the paper
fast_kernels = True  # False: the plain definitions of model.py run, which compute the same
page = True  # False: no circuit.html, in which the circuit can be explored and the model runs
controls = True  # False: the circuit alone, in a fraction of the time
nonsense_task = "brackets_comma"  # a control asks the answers after the contexts of this one; '': none
unseen = ""  # a folder of data/ with text of other origin, prepared with the same tokenizer; '': none
# the search: masks are learned once for each penalty and each seed
penalties = ""  # of a kept node, in nats, by commas; '': larger and smaller ones, until the best is inside
mask_seeds = 3  # for each penalty; if these are found, for the best
steps = 300
batch_size = 32  # contexts a step
learning_rate = 3e-2  # of Adam, linearly to zero
temperature = 0.3  # of the sigmoid whose derivative stands in for that of a step
start = 0.5  # of tau, at most 1: a node is kept while its tau is positive
noise = 0.01  # added to that
# contexts
choosing_contexts = 512  # of train, at most, unseen by the masks: they choose the size
judging_contexts = 1024  # of val, at most: what is reported comes from them, and they choose nothing
mean_windows = 1024  # of train, for the means
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'

# with other settings of these another circuit is found
FIND = ("ablation", "fit", "penalties", "mask_seeds", "steps", "batch_size", "learning_rate", "temperature",
        "start", "noise", "choosing_contexts", "judging_contexts", "mean_windows", "seed")


def check_settings():
    check_rules(globals(), (
        ("mask_seeds steps batch_size mean_windows", lambda v: v >= 1, "must be at least 1"),
        ("choosing_contexts judging_contexts", lambda v: v >= 2 * FEWEST, f"must be at least {2 * FEWEST}"),
        ("target_loss seed", lambda v: v >= 0, "must not be negative"),
        ("learning_rate temperature", lambda v: v > 0, "must be more than 0"),
        ("start noise", lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
        ("ablation", lambda v: v in ("mean", "zero"), "does not exist: choose mean or zero"),
    ))
    try:
        found = tuple(float(p) for p in penalties.split(",") if p.strip())
        if not all(0 <= p < 1e6 for p in found):
            raise ValueError
    except ValueError:
        fail(f"penalties={penalties!r} must be numbers of at least 0, by commas")
    return search.Search(found, mask_seeds, steps, batch_size, learning_rate, temperature, start, noise, fit)


def all_contexts(loaded):
    """The task and its contexts: to learn on, to choose by, to judge by; those beyond it, all and the hard
    ones; of the nonsense task, or None. Ends the script if there are too few."""
    source = Source(loaded, steps * batch_size, choosing_contexts, judging_contexts, seed)
    text, others = None, None
    try:
        if unseen:
            text = loaded.other_data(unseen)
        spec = read_task(task, loaded.tokenizer)
        sets = source.three_sets(spec)
    except ValueError as e:
        fail(e)
    try:
        beyond = source.beyond(spec, sets[-1], text)
    except ValueError as e:
        if controls:
            fail(e)
        print(f"without inputs beyond the task: {e}")
        beyond = {}, {}
    try:
        if nonsense_task and controls:
            other = read_task(nonsense_task, loaded.tokenizer)
            if other["sha256"] == spec["sha256"]:
                raise ValueError("it is the task itself")
            others = source.three_sets(other)
    except ValueError as e:
        print(f"without the control of nonsense_task: {e}")
    return spec, sets, beyond, others


def results_of(loaded, contexts, nodes, runs, circuit, how, target):
    """All that is measured of a circuit; its fit, scale and shift; whether Ctrl-C ended the controls."""
    chosen, inside, gates, _ = circuit
    sets, (beyond, _), others = contexts
    _, choosing, judging = sets
    ones, fitted = torch.ones(nodes.number, device=nodes.device), (1.0, 0.0)
    if fit:
        fitted = search.fit_of(inside.judge(choosing, gates), choosing.sides())
    found = asked.baselines(nodes, loaded.data.train, choosing, judging, seed, fit) | {
        "found": asked.result(nodes.judge(judging, chosen["gates"])) | count(nodes, chosen["gates"]),
        "found_fitted": asked.fitted(nodes, chosen["gates"], choosing, judging),
        "circuit": asked.result(inside.judge(judging, gates)) | count(inside, gates)
        | asked.embedding_weights(inside, gates, judging),
        "circuit_fitted": asked.fitted(inside, gates, choosing, judging),
        "whole_fitted": asked.fitted(nodes, ones, choosing, judging),
        "seeds": asked.seeds_agree(nodes, runs),
        "first_of_all": {"whole": asked.first_of_all(nodes, ones, judging),
                         "circuit": asked.first_of_all(inside, gates, judging)},
        "rules": asked.simple_rules(judging, loaded.tokenizer),
        "heads": asked.heads_of(inside, gates, judging, loaded.tokenizer)}
    try:
        if controls:
            trials = [(run["penalty"], run["mask_seed"]) for run in runs]
            found |= asked.without_searches(inside, gates, nodes, sets, beyond, fitted, seed)
            for name, result in asked.searches(
                    nodes, lambda model: replace(loaded, model=model).nodes(ablation, mean_windows), sets,
                    others, target, how, trials, seed):
                found[name] = result
    except KeyboardInterrupt:
        return found, fitted, True
    return found, fitted, False


@ends_explained("choose a smaller --batch_size, or --device=cpu")
def main():
    begun = time.perf_counter()
    configure(globals())
    kernels.enabled = fast_kernels
    how = check_settings()
    loaded = load(out_dir, checkpoint, device, dataset)
    spec, *contexts = all_contexts(loaded)
    name, target = spec["name"], target_loss or spec["target_loss"]
    (learning, choosing, judging), (_, hard), _ = contexts
    identity = {"sha256": loaded.sha256, "dataset": loaded.dataset, "task_sha256": spec["sha256"],
                "target_loss": target, "search": {name: globals()[name] for name in FIND}}
    nodes = loaded.nodes(ablation, mean_windows)
    whole = asked.check_able(name, nodes, loaded.data.train, choosing, target, fit,
                             joined_otherwise(spec, loaded.tokenizer))
    folder = start_circuit(out_dir, name, identity)
    print(f"{name}: {nodes.number:,} nodes; target loss {target:g} on train, where the whole model has "
          f"{whole:.3f}; {len(learning):,} contexts to learn on, {len(choosing)} to choose the size on, "
          f"{len(judging)} to judge by", flush=True)
    runs = search.find(nodes, learning, choosing, target, how, name)
    circuit = chosen, inside, gates, path = search.smallest(nodes, runs, choosing, target, fit)
    results, fitted, stopped = results_of(loaded, contexts, nodes, runs, circuit, how, target)
    pair = spec.get("pair") or judging.answers[0].sort().values.tolist()
    table, loss = report.table_of(results), results["circuit_fitted" if fit else "circuit"]["loss"]
    warned = list(asked.warnings_of(nodes, runs, chosen, gates, contexts[0], loss, target))
    warned += ["stopped by Ctrl-C: the controls that are not in the table were not made"] * stopped
    kind = "contexts of val" if "pair" in spec else "held-out prompts"
    report.print_table(table, f"{len(judging)} {kind}")
    report.print_rest(results)
    print("".join(f"warning: {line}\n" for line in warned), end="")
    record = identity | {
        "task": name, "answers": [loaded.tokenizer.decode([i]) for i in pair], "answer_ids": pair,
        "model": loaded.path, "step": loaded.step, "ablation": ablation,
        "nodes": inside.kept(gates), "edges": [edge[:4] for edge in inside.edges_in(gates)],
        "cut": inside.cut(gates),
        "means": {site: x.tolist() for site, x in inside.ablated.items()},
        "reads": {site: x.tolist() for site, x in inside.mean_reads.items() if site.endswith("attn_v")},
        "fit": fit, "scale": fitted[0], "shift": fitted[1], "whole_train_loss": whole, "curve": path,
        "runs": [{key: value for key, value in run.items() if key != "gates"} for run in runs],
        **search.costs_of(inside, gates, choosing, path[-1][2], fit), "results": results, "table": table,
        "caveats": report.CAVEATS.replace("\n", " "), "warnings": warned, "hard": prompts_record(hard),
        "contexts": contexts_record(judging, spec.get("pair")), "settings": settings_of(globals()),
        "picture": picture.describe(inside, gates, judging, loaded.tokenizer, fitted),
        "seconds": time.perf_counter() - begun, "format": FORMAT}
    write_atomically(os.path.join(folder, "circuit.json"), json.dumps(record, allow_nan=False))
    print(f"\nwrote {folder}/circuit.json | {record['seconds']:.0f} s")
    picture.draw(record, os.path.join(folder, "circuit.png"))
    if page:
        path = os.path.join(folder, "circuit.html")
        print(f"wrote {path} | {page_of.write(record, loaded.model.cpu(), loaded.data, path) / 1e6:.1f} MB")
    if stopped:
        raise KeyboardInterrupt


if __name__ == "__main__":
    main()
