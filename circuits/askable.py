"""What can a model be asked? Pairs of tokens that it tells apart, where neither the token before nor a table
of bigrams does; or whether it does the tasks given.

    python -m circuits.askable --out_dir=out/quickstart
    python -m circuits.askable --out_dir=out/quickstart --task=quotes,my/own.json

Candidates are counted, not tried: two tokens that come after the same tokens about as often. Of these, one
pass over windows of train tells which the model tells apart; those that are listed are then judged as
circuit.py judges a task, on contexts of train and val where either answer comes next as often.
"""
import json

import numpy as np
import torch
import torch.nn.functional as F

from circuits.controls import baselines
from circuits.loaded import load
from circuits.search import loss_at
from circuits.tasks import FEWEST, TARGET, Source, read_task
from configurator import check_rules, configure, ends_explained, fail
from tokenizer import spell

out_dir = "out"  # of the training run; or the folder of a released model
checkpoint = "ckpt.pt"  # in out_dir
dataset = ""  # '': what it was trained on, which a released model does not say; data of its tokenizer
task = ""  # names or paths of tasks, by commas: can they be asked? '': look for pairs of tokens
number = 16  # of pairs
most = 0.3  # nats: the loss of the whole model on a pair that is listed, chance being 0.693
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'

FREQUENT = 384  # tokens that are paired with each other, those that come most often
SHARED = 0.4  # of all times that a token comes, at least, it comes after what the other one comes after
APART = 4  # times as often as the other may one of a pair come
POOL = 1024  # windows of train, of which the first pass counts the second half of the tokens
TIMES = 2  # that a token may be listed
CONTEXTS = 512  # of each split, at most, for what is listed
COLUMNS = (  # heading, width
    ("train", 7), ("val", 7), ("right", 8), ("last token", 12), ("bigram table", 14), ("any order", 11),
    ("contexts", 10))


def counts_of(tokens, vocab_size):
    """The FREQUENT tokens, most frequent first, and how often each comes after each token of the vocabulary:
    ids (n), counts (vocab_size, n)."""
    total = np.bincount(tokens, minlength=vocab_size)
    ids = np.argsort(-total, kind="stable")[:FREQUENT]
    place = np.full(vocab_size, -1)
    place[ids] = np.arange(len(ids))
    counts = np.zeros(vocab_size * len(ids), dtype=np.int64)
    for start in range(0, len(tokens) - 1, 2**24):
        part = tokens[start:start + 2**24 + 1].astype(np.int64)
        before, after = part[:-1], place[part[1:]]
        counts += np.bincount((before * len(ids) + after)[after >= 0], minlength=len(counts))
    return ids, counts.reshape(vocab_size, len(ids))


def pairs_of(counts):
    """Candidates: pairs of columns (a, b), a < b, whose tokens come about as often as each other, and after
    the same tokens in a share of SHARED of all times: an array (pairs, 2)."""
    total = np.maximum(counts.sum(0), 1)
    shares = (counts[counts.sum(1) > 0] / total).astype(np.float32)
    shared = np.array([np.minimum(shares[:, [a]], shares).sum(0) for a in range(len(total))])
    a, b = np.triu_indices(len(total), 1)
    often = np.maximum(total[a], total[b]) <= APART * np.minimum(total[a], total[b])
    return np.stack([a, b], axis=1)[often & (shared[a, b] >= SHARED)]


@torch.no_grad()
def pool_of(loaded, ids):
    """A pass over windows of train: at the tokens of their second halves that one of `ids` (n) follows, the
    logits of all of these (places, n), those of the bigram table, what comes before, and which follows."""
    model, device = loaded.model, loaded.process.device
    _, idx = loaded.evenly_spaced("train", POOL)
    columns = torch.as_tensor(ids, device=device)
    place = torch.full((model.config.vocab_size,), -1, device=device)
    place[columns] = torch.arange(len(columns), device=device)
    start, found = idx.size(1) // 2, []
    for part in idx.split(32):
        follows, before = place[part[:, start + 1:]], part[:, start:-1]
        logits = model(part)[0][:, start:-1][follows >= 0][:, columns]
        found.append((logits, before[follows >= 0], follows[follows >= 0]))
    logits, before, follows = map(torch.cat, zip(*found, strict=True))
    table = model.bigram_table[before]
    table = table[:, columns] if table.size(1) > 1 else torch.zeros_like(logits)
    return logits, table, before, follows


def estimates(pairs, logits, table, counts, before, follows):
    """For each pair the loss, by the pool, of the model and the smaller one of the last token alone and the
    bigram table, both answers weighing the same: (pairs, 2), infinite and 0 where the pool has too few."""
    shares = torch.as_tensor(counts / np.maximum(counts.sum(0), 1)).to(logits).add(1e-5).log()[before]
    rows = [(follows == i).nonzero()[:, 0] for i in range(logits.size(1))]
    found = np.tile([np.inf, 0.0], (len(pairs), 1))
    for row, (a, b) in enumerate(pairs.tolist()):
        if min(len(rows[a]), len(rows[b])) >= FEWEST:
            model, bigrams, last = (
                sum(F.softplus(of[rows[other], this] - of[rows[other], other]).mean().item() / 2
                    for this, other in ((a, b), (b, a))) for of in (logits, table, shares))
            found[row] = model, min(bigrams, last)
    return found


def told_apart(loaded):
    """Pairs of ids that the model tells apart by the pool, those first where it is ahead of both baselines
    by the largest factor; no token in more than TIMES of them."""
    vocab_size = loaded.model.config.vocab_size
    ids, counts = counts_of(loaded.data.train, vocab_size)
    pairs = pairs_of(counts)
    logits, table, before, follows = pool_of(loaded, ids)
    losses = estimates(pairs, logits, table, counts, before, follows)
    ratio = losses[:, 1] / losses[:, 0]
    times = dict.fromkeys(ids.tolist(), 0)
    for row in np.argsort(-ratio, kind="stable"):
        pair = ids[pairs[row]].tolist()
        if losses[row, 0] < most < losses[row, 1] and all(times[i] < TIMES for i in pair):
            yield pair
            for i in pair:
                times[i] += 1


def measured(loaded, nodes, spec):
    """What circuit.py would find of a task before it searches: a dict of the columns, and the Contexts to
    judge by. Raises ValueError, in one sentence, if there are too few contexts."""
    source = Source(loaded, learning=2 * FEWEST, choosing=CONTEXTS, judging=CONTEXTS, seed=seed)
    _, choosing, judging = source.three_sets(spec)
    ones = torch.ones(nodes.number, device=nodes.device)
    known = baselines(nodes, loaded.data.train, choosing, judging, seed)
    return {"train": loss_at(nodes, choosing, ones), "val": known["whole"]["loss"],
            "right": known["whole"]["accuracy"], "last token": known["last_token"]["loss"],
            "bigram table": known["bigram_table"]["loss"], "any order": known["random_order"]["loss"],
            "contexts": len(judging)}, judging


def line_of(name, row):
    cells = (f"{row[column]:>{width}.1%}" if column == "right" else f"{row[column]:>{width},}"
             if column == "contexts" else f"{row[column]:>{width}.3f}" for column, width in COLUMNS)
    return f"{name:26}" + "".join(cells)


def examples(loaded, contexts):
    """For either answer the shortest line of text that it ends, of those of at least eight characters."""
    for answer in contexts.answers[0].sort().values.tolist():
        lines = []
        for row in (contexts.answers[:, 0] == answer).nonzero()[:, 0].tolist():
            text = loaded.tokenizer.decode(contexts.idx[row, :contexts.last[row] + 1].tolist())
            lines.append(text.rsplit("\n", 1)[-1].lstrip())
        yield min((line for line in lines if len(line) >= 8), key=len, default=""), answer


def print_pairs(loaded, nodes):
    """The table of pairs, and below it what a task file would say and an example for either answer."""
    listed, lines = 0, []
    for first, second in told_apart(loaded):
        answers = [loaded.tokenizer.decode([i]) for i in (first, second)]
        if any(loaded.tokenizer.encode(text, disallowed_special=()) != [i]
               for text, i in zip(answers, (first, second), strict=True)):
            continue  # of such a token no task file can speak
        try:
            row, contexts = measured(loaded, nodes, {"pair": [first, second], "contains": ""})
        except ValueError:
            continue  # too few on val
        if row["val"] > most or min(row["last token"], row["bigram table"]) <= most:
            continue
        print(line_of(" | ".join(spell(loaded.tokenizer, i) for i in (first, second)), row), flush=True)
        lines.append(json.dumps({"answers": answers}))
        lines += [f"    {text}[{spell(loaded.tokenizer, i)}]" for text, i in examples(loaded, contexts)]
        listed += 1
        if listed == number:
            break
    print("\nas task files, with the shortest line of val that each answer ends:\n")
    print("\n".join(lines) if lines else "none: train it further, or raise --most")


def print_tasks(loaded, nodes):
    """A line for each of the tasks given: its losses, and whether the model reaches its target. Ends the
    script, after the last of them, if one cannot be asked."""
    names, wrong = list(filter(None, (part.strip() for part in task.split(",")))), 0
    for name in names:
        try:
            spec = read_task(name, loaded.tokenizer)
            row, _ = measured(loaded, nodes, spec)
        except ValueError as e:
            print(f"{name:26} cannot be asked: {e}", flush=True)
            wrong += 1
            continue
        target = spec["target_loss"]
        able = (f"yes, at its target of {target:g}" if row["train"] <= target else
                f"no: {row['train']:.3f} on train, above its target of {target:g}")
        if row["train"] <= target and min(row["last token"], row["bigram table"]) <= target:
            able += ", but so does the token before it alone"
        print(f"{line_of(spec['name'], row)}   {able}", flush=True)
    if wrong:
        fail(f"{wrong} of {len(names)} tasks cannot be asked: the table says why")


@ends_explained()
def main():
    configure(globals())
    check_rules(globals(), (("number", lambda v: v >= 1, "must be at least 1"),
                            ("seed", lambda v: v >= 0, "must not be negative"),
                            ("most", lambda v: 0 < v < 0.69, "must lie between 0 and 0.69")))
    loaded = load(out_dir, checkpoint, device, dataset)
    nodes = loaded.nodes()
    print("loss of the choice between two answers, in nats: of the whole model, on train with its logits "
          "fitted; then on val\nof the last token alone and of the bigram table, fitted too, and of the "
          f"model on tokens in any order. The paper's target is {TARGET:g}\n")
    print(f"{'':26}" + "".join(f"{name:>{width}}" for name, width in COLUMNS), flush=True)
    print_tasks(loaded, nodes) if task else print_pairs(loaded, nodes)


if __name__ == "__main__":
    main()
