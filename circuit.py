"""Find the circuit of a task in a trained model, with the controls that a sceptic would ask for.

    python circuit.py --out_dir=out/quickstart --task=quotes
    python circuit.py --out_dir=out/quickstart --task=my/own.json --controls=False --target_loss=0.3

A circuit is a set of nodes (circuits/nodes.py) that does a task while all others are frozen at their mean
over the training text. Which nodes is learned by gradient descent (Gao et al. 2025, sections 2.2 and A.5).
Edges between them, and nodes, that the target loss does not need are then removed (circuits/search.py).
Results go to out_dir/circuits/TASK: circuit.json, from which every loss can be computed again with a few
hooks, circuit.png, which circuits/picture.py draws from it, and circuit.html, in which the model runs.

From the top: settings, tasks, the search, what is measured of a circuit, controls, the report.
"""
import json
import os
import time

import numpy as np
import torch

import kernels
from circuits import controls as asked
from circuits import page as page_of
from circuits import picture
from circuits.controls import result
from circuits.nodes import Contexts, Nodes, count, means_over, survival
from circuits.search import fit as fit_of
from circuits.search import loss_at, loss_of, needed
from configurator import check_rules, configure, fail, settings_of
from runs import load_run, this_process, windows, write_atomically
from tokenizer import load_tokenizer, tokenizer_in

out_dir = "out"  # of the training run
checkpoint = "ckpt.pt"  # in out_dir: 'ckpt.pt' is the latest, 'best.pt' the sparsest of least val loss
task = "quotes"  # of tasks/NAME.json; or the path of such a file
target_loss = 0.0  # of a circuit, in nats, chance being 0.693; 0: the task's own, or else the paper's 0.15
ablation = "mean"  # what a node outside the circuit is: its 'mean' over train, or 'zero'
fit = True  # the target is met after a scale and a shift of the logits are fitted on train, as in the paper
fast_kernels = True  # False: the plain definitions of model.py run, which compute the same
page = True  # False: no circuit.html, in which the circuit can be explored and the model runs
controls = True  # False: the circuit alone, in a fraction of the time
# the search: masks are learned once for each penalty and each seed
penalties = "1e-3,3e-3,1e-2"  # of a kept node, in nats, by commas; large ones make small circuits, or none
mask_seeds = 3  # for each penalty
steps = 300
batch_size = 32  # contexts a step
learning_rate = 3e-2  # of Adam, linearly to zero
temperature = 0.3  # of the sigmoid whose derivative stands in for that of a step
start = 0.5  # of tau, at most 1: a node is kept while its tau is positive
noise = 0.01  # added to that
# contexts
choosing_contexts = 512  # of train, unseen by the masks: they choose the size
judging_contexts = 1024  # of val, at most: what is reported comes from them, and they choose nothing
mean_windows = 1024  # of train, for the means
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'

TARGET = 0.15  # the paper's
FEWEST = 16  # contexts that a set must have
AROUND = 8  # sizes below that of the bisection that are tried too

# ----------------------------------------------------------------------------------------------------------
# tasks


def read_task(task, tokenizer):
    """The task of tasks/NAME.json or of a path, a dict, with its tokens spelled as ids, and its name."""
    path = task if task.endswith(".json") else os.path.join("tasks", f"{task}.json")
    try:
        with open(path, encoding="utf-8") as f:
            spec = json.load(f)
        spec["target_loss"] = float(spec.get("target_loss", TARGET))
        if "answers" in spec:
            first, second = spec["answers"]
            spec["pair"] = [one_token(tokenizer, first), one_token(tokenizer, second)]
            if first == second or not isinstance(spec.get("contains", ""), str):
                raise ValueError("two different answers, and a text that a context contains")
        elif "families" in spec:  # inputs that another task lists as "beyond"
            spec["families"] = {str(family): spelled(tokenizer, prompts)
                                for family, prompts in spec["families"].items()}
        else:
            for part in ("prompts", "held_out"):
                spec[part] = spelled(tokenizer, spec[part])
            if {tuple(ids) for ids, _ in spec["prompts"]} & {tuple(ids) for ids, _ in spec["held_out"]}:
                raise ValueError("held-out prompts that are not among the others")
            if any(right == other for part in ("prompts", "held_out") for _, (right, other) in spec[part]):
                raise ValueError("two different answers to each prompt")
        spec["beyond"] = [str(other) for other in spec.get("beyond", ())]
    except OSError as e:
        fail(f"no task {path} ({e.strerror}): name a file of tasks/, or give a path that ends in .json")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        fail(f'{path} is no task ({type(e).__name__}: {e}): it needs {{"answers": [text, text]}}, or '
             '{"prompts": [[prompt, answer, other answer], ...], "held_out": [...]}')
    return spec, os.path.splitext(os.path.basename(path))[0]


def spelled(tokenizer, prompts):
    """Prompts [text, right answer, other answer] as (ids, [right, other])."""
    return [([tokenizer.eot_token, *tokenizer.encode(prompt, disallowed_special=())],
             [one_token(tokenizer, right), one_token(tokenizer, other)]) for prompt, right, other in prompts]


def one_token(tokenizer, text):
    ids = tokenizer.encode(text, disallowed_special=())
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]
        fail(f"the answer {text!r} is {len(ids)} tokens of this model's tokenizer, {pieces}: "
             "choose answers of one token each")
    return ids[0]


def contexts_in(tokens, split, spec, tokenizer, block_size, most, process):
    """Up to `most` contexts of a natural task, both answers equally often, in random order."""
    rng = np.random.default_rng(seed)
    found = []
    for answer in spec["pair"]:
        places = rng.permutation(np.flatnonzero(tokens[block_size:] == answer)) + block_size
        if "contains" in spec:
            wanted = spec["contains"].encode()
            places = [p for p in places if wanted in tokenizer.decode_bytes(tokens[p - block_size:p])]
        found.append(places[:most // 2])
    n = min(map(len, found))
    if n < FEWEST:
        shortest = tokenizer.decode([spec["pair"][min((0, 1), key=lambda c: len(found[c]))]])
        with_text = f" that contain {spec['contains']!r}" if "contains" in spec else ""
        fail(f"{split} has {n} contexts of {block_size} tokens before {shortest!r}{with_text}, fewer than "
             f"{FEWEST}: choose a more frequent answer, or another task")
    positions = np.stack([places[:n] for places in found], axis=1).flatten()
    idx, _ = windows(tokens, positions - block_size, block_size, process)
    answers = torch.tensor(spec["pair"])
    answers = torch.stack([answers, answers.flip(0)]).repeat(n, 1)
    last = torch.full((2 * n,), block_size - 1)
    return Contexts(idx, *(t.to(process.device) for t in (last, answers, torch.from_numpy(positions))))


def contexts_of(prompts, part, block_size, process):
    """Those of a list of (ids, answers), from templates, in random order: as many of which the right answer
    has the lower id of the two as of which it has the higher."""
    longest = max((len(ids) for ids, _ in prompts), default=0)
    shuffled = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]
    lower = np.array([right < other for _, (right, other) in shuffled], dtype=bool)
    n = min(lower.sum(), (~lower).sum())
    prompts = [shuffled[i] for i in sorted([*np.flatnonzero(lower)[:n], *np.flatnonzero(~lower)[:n]])]
    if len(prompts) < FEWEST:
        fail(f"the task has {len(prompts)} {part} if either answer is to be right as often, fewer than "
             f"{FEWEST}: write more")
    if longest > block_size:
        fail(f"a prompt of the task has {longest} tokens, with the <|endoftext|> before it, more than the "
             f"model's window of {block_size}: shorten it")
    idx = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in prompts])
    last = torch.tensor([len(ids) - 1 for ids, _ in prompts])
    answers = torch.tensor([answers for _, answers in prompts])
    return Contexts(*(t.to(process.device) for t in (idx, last, answers)))


def three_sets(spec, data, tokenizer, block_size, process):
    """Contexts to learn masks on, to choose the size on, and to judge by; either answer as often right."""
    if "pair" in spec:
        most = choosing_contexts + steps * batch_size
        train = contexts_in(data.train, "train", spec, tokenizer, block_size, most, process)
        val = contexts_in(data.val, "val", spec, tokenizer, block_size, judging_contexts, process)
    else:
        train = contexts_of(spec["prompts"], "prompts", block_size, process)
        val = contexts_of(spec["held_out"], "held_out", block_size, process)
    half, sides = min(choosing_contexts, len(train) // 3) // 2, train.sides()
    nth = torch.where(sides > 0, (sides > 0).cumsum(0), (sides < 0).cumsum(0))  # of its side, from 1
    choosing = nth <= half
    return train[~choosing], train[choosing], val


def sets_beyond(spec, judging, data, tokenizer, block_size, process):
    """Contexts that the circuit was not made for: name -> Contexts. The task's in random order, those of the
    tasks that it lists as "beyond", and any places of val, where the task's first two answers compete. And
    the same of the families of hard inputs alone."""
    starts = np.random.default_rng(seed).integers(len(data.val) - block_size, size=judging_contexts)
    idx, _ = windows(data.val, starts, block_size, process)
    n, answers = len(idx), judging.answers[0].sort().values
    last = torch.full((n,), block_size - 1, device=idx.device)
    found, hard = {"random order": judging.in_random_order(seed)}, {}
    for other in spec["beyond"]:
        asked_too = read_task(other, tokenizer)[0]
        if "families" in asked_too:
            hard |= {f"{other}: {family}": contexts_of(prompts, f"prompts of {family}", block_size, process)
                     for family, prompts in asked_too["families"].items()}
            found |= hard
        else:
            found[other] = three_sets(asked_too, data, tokenizer, block_size, process)[-1]
    return found | {"ordinary text": Contexts(idx, last, answers.expand(n, 2))}, hard


# ----------------------------------------------------------------------------------------------------------
# the search (section A.5)


def heaviside(tau):
    """1 where tau > 0, else 0; backward the derivative of a sigmoid."""
    soft = torch.sigmoid(tau / temperature)
    return (tau > 0).float() + (soft - soft.detach())  # what is added is 0


def learn_masks(nodes, contexts, trials):
    """The importance tau of each node, in [-1, 1], learned on `contexts`, for each of `trials`, pairs of a
    penalty and a mask seed: (trials, nodes). Trials share their passes through the model and nothing else.
    """
    generators = [torch.Generator().manual_seed(mask_seed) for _, mask_seed in trials]
    tau = torch.stack([start + noise * torch.randn(nodes.number, generator=g) for g in generators])
    tau = tau.clamp(-1, 1).to(nodes.device).requires_grad_()
    penalty = torch.tensor([penalty for penalty, _ in trials], device=nodes.device)
    optimizer = torch.optim.Adam([tau], betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        rows = torch.cat([torch.randint(len(contexts), (batch_size,), generator=g) for g in generators])
        batch = contexts[rows.to(nodes.device)]
        gates = heaviside(tau)
        losses = loss_of(nodes.logits(batch, gates)).view(len(trials), batch_size).mean(1)
        optimizer.zero_grad()
        (losses + penalty * gates.sum(1)).sum().backward()
        tau.grad.renorm_(p=2, dim=0, maxnorm=1.0)  # each trial's gradient is clipped by itself
        optimizer.step()
        with torch.no_grad():
            tau.clamp_(-1, 1)
    return tau.detach()


def fewest(loss_at, most, target):
    """The smallest size from 1 to `most` found at which loss_at(size) <= target, or None; the losses seen.

    Doubles until the target is reached, bisects, and looks a little below, as the loss need not fall with
    every node.
    """
    seen = {}

    def reaches(size):
        if size not in seen:
            seen[size] = loss_at(size)
        return seen[size] <= target

    sizes = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    size = next(filter(reaches, sizes), None)
    if size is None:
        return None, seen
    low = size // 2
    while size - low > 1:
        middle = (low + size) // 2
        low, size = (low, middle) if reaches(middle) else (middle, size)
    below = size - 1
    while below > 0 and size - below <= AROUND:
        size = below if reaches(below) else size
        below -= 1
    return size, seen


def first_of(order, size):
    """Gates that are 1 for the first `size` nodes of `order` (nodes)."""
    gates = torch.zeros(len(order), device=order.device)
    gates[order[:size]] = 1
    return gates


def search(nodes, learning, choosing, target, name):
    """Learn masks for each penalty and seed, and prune each to the fewest nodes that reach the target.

    Returns a list of dicts: penalty, mask_seed, nodes (a number, None if no size reaches the target),
    lowest_loss of all sizes tried, and gates, those of the size found or else of the lowest loss.
    """
    runs = []
    for penalty in map(float, penalties.split(",")):
        for mask_seed in range(mask_seeds):
            begun = time.perf_counter()
            [tau] = learn_masks(nodes, learning, [(penalty, mask_seed)])
            order = tau.argsort(descending=True, stable=True)

            size, seen = fewest(lambda n, order=order: loss_at(nodes, choosing, first_of(order, n), fit),
                                nodes.number, target)
            best = size or min(seen, key=seen.get)
            runs.append({"penalty": penalty, "mask_seed": mask_seed, "nodes": size,
                         "lowest_loss": min(seen.values()), "gates": first_of(order, best),
                         "losses": {str(n): loss for n, loss in sorted(seen.items())}})
            found = f"{size} nodes" if size else "not reached"
            print(f"{name} | penalty {penalty:g} | mask seed {mask_seed} | {found} | loss {seen[best]:.3f} "
                  f"on train | {time.perf_counter() - begun:.0f} s", flush=True)
    return runs


# ----------------------------------------------------------------------------------------------------------
# what needs searches: seeds and controls


def seeds_agree(nodes, runs, chosen):
    """The sizes that the mask seeds of the chosen penalty end at, and the overlap of their nodes, by pairs:
    nodes of both over nodes of either."""
    same = [run for run in runs if run["penalty"] == chosen["penalty"] and run["nodes"]]
    overlaps = [((a["gates"] * b["gates"]).sum() / (a["gates"] + b["gates"]).clamp(max=1).sum()).item()
                for i, a in enumerate(same) for b in same[:i]]
    return {"penalty": chosen["penalty"], "nodes": [run["nodes"] for run in same],
            "weights": [count(nodes, run["gates"])["edges"] for run in same], "overlaps": overlaps,
            "failed": sum(run["nodes"] is None for run in runs), "of": len(runs)}


def control(name, nodes, sets, target):
    """The search with something of it destroyed: how many of its runs reach the target, and the best."""
    learning, choosing, judging = sets
    runs = search(nodes, learning, choosing, target, name)
    best = min(runs, key=lambda run: (run["nodes"] or nodes.number + 1, run["lowest_loss"]))
    return {"reached": sum(run["nodes"] is not None for run in runs), "of": len(runs),
            "lowest_loss": best["lowest_loss"]} | result(nodes.judge(judging, best["gates"])) | count(
                nodes, best["gates"])


# ----------------------------------------------------------------------------------------------------------
# the record, and all in order


def contexts_record(contexts, answers):
    """The contexts as they are kept: for each answer its positions in val.bin, or the ids of its prompts."""
    first = contexts.answers[:, 0] == answers[0] if answers else contexts.sides() > 0
    groups = [rows.nonzero()[:, 0].tolist() for rows in (first, ~first)]
    if contexts.positions is not None:
        return {"split": "val", "positions": [contexts.positions[rows].tolist() for rows in groups]}
    ids = [contexts.idx[row, :contexts.last[row] + 1].tolist() for row in range(len(contexts))]
    return {"split": "held_out", "ids": [[ids[row] for row in rows] for rows in groups],
            "answers": [contexts.answers[rows].tolist() for rows in groups]}


def measured_nodes(model, data, process):
    T = model.config.block_size
    starts = np.linspace(0, len(data.train) - T - 1, mean_windows).astype(int)
    return Nodes(model, *means_over(model, windows(data.train, starts, T, process)[0]), ablation)


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
        [float(p) for p in penalties.split(",")]
    except ValueError:
        fail(f"penalties={penalties!r} must be numbers, by commas")


def put_beside(nodes, gates, sets, beyond, data, target, process):
    """All that is asked of a circuit besides its own result: name -> result."""
    judging = sets[-1]
    random, without_random = asked.random_draws(nodes, gates, judging, seed)
    found = {
        "without": result(nodes.judge(judging, nodes.others(gates))) | count(nodes, nodes.others(gates)),
        "without_random": without_random, "random": random,
        "faithfulness": asked.faithfulness(nodes, gates, judging, seed),
        "beyond": {name: {"circuit": asked.agreement(nodes, gates, contexts),
                          "nothing": asked.agreement(nodes, 0 * gates, contexts)}
                   for name, contexts in beyond.items()},
        "survival": {name: {c: round(x[c].item(), 4) if x[c].isfinite() else None
                            for c in nodes.kept(gates)[name]}
                     for name, x in survival(nodes, judging, gates).items() if name in nodes.kept(gates)},
        "interventions": asked.interventions(nodes, gates, judging),
    }
    exchanged = [asked.shuffled_labels(contexts, seed) for contexts in sets]
    found["labels_shuffled"] = control("labels shuffled", nodes, exchanged, target)
    for name, destroy in (("weights_drawn_anew", asked.drawn_anew),
                          ("weights_shuffled", asked.shuffled_weights)):
        other = measured_nodes(destroy(nodes.model, seed), data, process)
        found[name] = control(name.replace("_", " "), other, sets, target)
    return found


def remove_idle(nodes, gates, choosing, target):
    """Nodes with the edges between those found, gates of what is needed, and the path there; says so."""
    begun, were = time.perf_counter(), count(nodes, gates)
    nodes, gates, path = needed(nodes, gates, choosing, target, fit)
    print(f"needed | {were['nodes']} nodes, {were['weights']} weights between them -> "
          f"{path[-1][0]} nodes, {path[-1][1]} edges | loss {path[-1][2]:.3f} on train | "
          f"{time.perf_counter() - begun:.0f} s", flush=True)
    return nodes, gates, path


def check_able(name, nodes, choosing, target):
    """End the script if the whole model does not do the task. Returns its result on contexts of train."""
    ones = torch.ones(nodes.number, device=nodes.device)
    able = result(nodes.judge(choosing, ones)) | {"loss": loss_at(nodes, choosing, ones, fit)}
    if able["loss"] > target:
        could = 1.25 * able["loss"]
        remedy = (f"it could reach --target_loss={could:.2f}" if could < 0.65 else
                  "that is about chance, 0.69: train it further, or choose another task")
        fail(f"the whole model does not do {name}: its loss is {able['loss']:.3f} (accuracy "
             f"{able['accuracy']:.1%}) on contexts of train, above the target of {target:g}; {remedy}")
    return able


def prompts_record(hard):
    """The prompts of the families of hard inputs as they are kept: name -> [[ids, right, other], ...]."""
    return {name: [[contexts.idx[row, :last + 1].tolist(), *contexts.answers[row].tolist()]
                   for row, last in enumerate(contexts.last.tolist())]
            for name, contexts in hard.items()}


def costs_of(nodes, gates, choosing, loss):
    """By how much the loss of the circuit rises when one edge, or one node, of it is removed."""
    def cost(place):
        less = gates.clone()
        less[place] = 0
        return loss_at(nodes, choosing, less, fit) - loss

    there = {nodes.edges[e]: nodes.nodes + e for e in range(len(nodes.edges))}
    return {"edge_costs": [cost(there[edge[:4]]) for edge in nodes.edges_in(gates)],
            "node_costs": {f"{site}.{c}": cost(nodes.places[site] + c)
                           for site, channels in nodes.kept(gates).items() for c in channels}}


def save(record, model, data):
    """Write circuit.json, circuit.png and circuit.html."""
    folder = os.path.join(out_dir, "circuits", record["task"])
    try:
        os.makedirs(folder, exist_ok=True)
        write_atomically(os.path.join(folder, "circuit.json"), json.dumps(record, allow_nan=False))
    except OSError as e:
        fail(f"cannot write to {folder} ({e.strerror}): choose another --out_dir")
    print(f"\nwrote {folder}/circuit.json | {record['seconds']:.0f} s")
    picture.draw(record, os.path.join(folder, "circuit.png"))
    if page:
        path = os.path.join(folder, "circuit.html")
        print(f"wrote {path} | {page_of.write(record, model.cpu(), data, path) / 1e6:.1f} MB")


def main():
    begun = time.perf_counter()
    configure(globals())
    kernels.enabled = fast_kernels
    check_settings()
    process = this_process(device, "float32")
    saved, model, data = load_run(out_dir, checkpoint)
    model.to(process.device).requires_grad_(False)
    tokenizer = load_tokenizer(tokenizer_in(os.path.join("data", saved["settings"]["dataset"])))
    spec, name = read_task(task, tokenizer)
    sets = learning, choosing, judging = three_sets(spec, data, tokenizer, model.config.block_size, process)
    target = target_loss or spec["target_loss"]
    beyond, hard = sets_beyond(spec, judging, data, tokenizer, model.config.block_size, process)
    nodes = measured_nodes(model, data, process)
    able = check_able(name, nodes, choosing, target)
    print(f"{name}: {nodes.number:,} nodes; target loss {target:g} on train, where the whole model has "
          f"{able['loss']:.3f}; {len(learning):,} contexts to learn on, {len(choosing)} to choose the size "
          f"on, {len(judging)} to judge by", flush=True)
    runs = search(nodes, learning, choosing, target, name)
    chosen = min(runs, key=lambda run: run["nodes"] or nodes.number + 1)
    if not chosen["nodes"]:
        fail(f"no search reached the target of {target:g}, the best was {chosen['lowest_loss']:.3f}: raise "
             "--target_loss or --steps, or lower --penalties")
    found = chosen["gates"]
    nodes, gates, path = remove_idle(nodes, found, choosing, target)
    ones = torch.ones(nodes.number, device=nodes.device)
    scale, shift = fit_of(nodes.judge(choosing, gates), choosing.sides())
    before = nodes.with_edges(())
    results = asked.baselines(nodes, data.train, judging, seed) | {
        "found": result(before.judge(judging, found)) | count(before, found),
        "found_fitted": asked.fitted(before, found, choosing, judging),
        "circuit": result(nodes.judge(judging, gates)) | count(nodes, gates),
        "circuit_fitted": asked.fitted(nodes, gates, choosing, judging),
        "whole_fitted": asked.fitted(nodes, ones, choosing, judging),
        "seeds": seeds_agree(before, runs, chosen)}
    if controls:
        results |= put_beside(nodes, gates, sets, beyond, data, target, process)
    answers, table = spec.get("pair"), asked.table_of(results)
    pair = answers or judging.answers[0].sort().values.tolist()
    asked.print_table(table, f"{len(judging)} {'contexts of val' if answers else 'held-out prompts'}")
    asked.print_rest(results)
    save({
        "task": name, "answers": [tokenizer.decode([i]) for i in pair], "answer_ids": pair, "table": table,
        "caveats": asked.CAVEATS.replace("\n", " "), "hard": prompts_record(hard),
        **costs_of(nodes, gates, choosing, path[-1][2]), "model": os.path.join(out_dir, checkpoint),
        "target_loss": target,
        "ablation": ablation, "format": 2, "fit": fit, "scale": scale, "shift": shift,
        "dataset": saved["settings"]["dataset"], "step": saved["step"], "settings": settings_of(globals()),
        "edges": [edge[:4] for edge in nodes.edges_in(gates)], "curve": path,
        "reads": {site: mean.tolist() for site, mean in nodes.reads.items()},
        "nodes": nodes.kept(gates), "contexts": contexts_record(judging, answers),
        "results": results, "runs": [{k: v for k, v in run.items() if k != "gates"} for run in runs],
        "picture": picture.describe(nodes, gates, judging, tokenizer),
        "seconds": time.perf_counter() - begun,
        "means": {site: mean.tolist() for site, mean in nodes.means.items()}}, model, data)


if __name__ == "__main__":
    main()
