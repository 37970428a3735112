"""The page of a circuit: one file in which it can be explored and the model itself runs, without a server.

    python -m circuits.page --circuit=out/quickstart/circuits/quotes/circuit.json       # writes it again

circuit.py calls `write`. What is costly is computed here: the values of nodes on ordinary text, what each
token is to a head, what freezing a node does. The rest is in page.html, a template, and in model.js: the
forward pass and the tokenizer.
"""
import base64
import gzip
import hashlib
import json
import os
import re
from dataclasses import asdict

import numpy as np
import torch

from checkpoints import write_atomically
from circuits.controls import result
from circuits.nodes import Contexts, hooks, node_sites, weights_between
from circuits.report import HEADINGS
from circuits.saved import circuit_of, record_at, run_of
from circuits.search import apply_fit
from circuits.tasks import recorded_contexts
from configurator import configure, ends_explained

circuit = ""  # the path of a circuit.json
page = ""  # where to write the page; '': circuit.html, beside it

HERE = os.path.dirname(os.path.abspath(__file__))
TEMPLATE, MODEL = os.path.join(HERE, "page.html"), os.path.join(HERE, "model.js")
LIVE = 3_000_000  # a model of more nonzero weights is not put into the page
TOKENS = 32_768  # of ordinary text, for the values of the nodes
MOST_CONTEXTS = 1024  # of the task
QUANTILES = (1.0, 0.999, 0.99, 0.9, 0.5, 0.1, 0.01, 0.001, 0.0)
EACH = 5  # contexts of a quantile
BINS = 40
FROZEN = 2**20  # tokens that may be read to see what freezing one node does
FEW = 32  # contexts, at least, for that
TO_FREEZE = ("attn_k", "attn_v", "attn_q", "mlp_neuron", "attn_out", "mlp_out", "attn_in", "mlp_in")
SHOWN = ("task", "target_loss", "fit", "ablation", "answers", "answer_ids", "nodes", "edges", "cut", "scale",
         "shift", "hard", "curve", "whole_train_loss", "edge_costs", "node_costs", "caveats",
         "warnings")  # of the record

# ----------------------------------------------------------------------------------------------------------
# arrays: all in one gzip, in base64

TYPES = {"float32": "<f4", "int8": "i1", "uint16": "<u2", "uint32": "<u4"}


class Arrays:
    """Arrays for the page. `add` returns what stands for one of them in the page's JSON."""

    def __init__(self):
        self.parts, self.length = [], 0

    def add(self, x, dtype):
        data = np.ascontiguousarray(x).astype(TYPES[dtype]).tobytes()
        self.parts.append(data + bytes(-len(data) % 4))
        start, self.length = self.length, self.length + len(self.parts[-1])
        return {"type": dtype, "start": start, "shape": list(np.shape(x))}

    def sparse(self, x):
        """A tensor by its nonzeros: how far each is from the one before, and their values."""
        x = x.detach().float().cpu().numpy()
        where = np.flatnonzero(x)
        return {"shape": list(x.shape), "steps": self.add(np.diff(where, prepend=0), "uint32"),
                "values": self.add(x.ravel()[where], "float32")}

    def text(self):
        return base64.b64encode(gzip.compress(b"".join(self.parts), 9, mtime=0)).decode()


def parameters_of(model, live, kept, arrays):
    """The parameters but the bigram table, name -> sparse array; tied ones once. Of a model that is not live
    what says what the kept channels of the stream have to do with tokens: their part of both ends."""
    named = {name: p for name, p in model.named_parameters() if name != "bigram_table"}
    if not live:
        on = torch.zeros(model.config.d_model)
        on[[c for site in kept if site.endswith(("_in", "_out")) for c in kept[site]]] = 1
        ends = ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")
        named = {name: named[name] * on for name in ends if name in named}
    return {name: arrays.sparse(p) for name, p in named.items()}


def bigrams_of(model, answers, arrays):
    """The bigram table, in the columns of the answers, or None."""
    if not model.config.use_bigram_table:
        return None
    table = model.bigram_table.detach().cpu()
    return {"answers": answers, "exact": arrays.add(table[:, answers].T.numpy(), "float32")}


# ----------------------------------------------------------------------------------------------------------
# values of nodes


@torch.no_grad()
def values_on(model, kept, texts):
    """site -> values (texts, T, kept channels) in the whole model; a text is a list of ids."""
    T = max(map(len, texts))
    idx = torch.tensor([ids + [0] * (T - len(ids)) for ids in texts])
    found = {site: [] for site in kept}

    def keep(site):
        return lambda x: found[site].append(x[..., kept[site]].float())

    modules = node_sites(model)
    with hooks([(modules[site], keep(site)) for site in kept]):
        for part in idx.split(32):
            model.residual_stream(part)
    return {site: torch.cat(parts).numpy() for site, parts in found.items()}


def quantile_contexts(values):
    """For each of QUANTILES up to EACH (text, position) where the values (texts, T) lie there."""
    order, T = np.argsort(-values, axis=None, kind="stable"), values.shape[1]
    found = []
    for quantile in QUANTILES:
        middle = round((1 - quantile) * (len(order) - 1))
        near = range(max(0, middle - 60), min(len(order), middle + 61))
        places = {}
        for i in sorted(near, key=lambda i, middle=middle: abs(i - middle)):
            text, position = divmod(int(order[i]), T)
            places.setdefault(text, position)
        found.append(list(places.items())[:EACH])
    return found


def histogram(x, low, high):
    counts, _ = np.histogram(x, bins=BINS, range=(low, high))
    return (counts / max(1, counts.sum())).round(5).tolist()


def describe_nodes(model, record, data, contexts, arrays):
    """'site.channel' -> its values on ordinary text and on the task; and the ordinary texts."""
    kept, T = record["nodes"], model.config.block_size
    starts = np.linspace(0, len(data.val) - T - 1, min(TOKENS // T, len(data.val) // T)).astype(int)
    texts = [data.val[s:s + T].tolist() for s in starts]
    ordinary = values_on(model, kept, texts)
    task = values_on(model, kept, [ids for ids, _ in contexts])
    last = np.array([len(ids) - 1 for ids, _ in contexts])
    in_val = "positions" in record["contexts"]  # the order is then that of the task, else of the ids
    first = np.array([right == record["answer_ids"][0] if in_val else right < other
                      for _, (right, other) in contexts])
    nodes, used = {}, {}
    for site, channels in kept.items():
        for i, channel in enumerate(channels):
            x, on_task = ordinary[site][..., i], task[site][..., i]
            if site.endswith(("attn_in", "attn_k", "attn_v")):  # what other tokens may read
                real = np.arange(on_task.shape[1]) <= last[:, None]
                groups = [on_task[rows][real[rows]] for rows in (first, ~first)]
            else:
                groups = [on_task[np.arange(len(last)), last][rows] for rows in (first, ~first)]
            everything = np.concatenate([x.ravel(), *groups])
            low, high = float(everything.min()), float(everything.max()) + 1e-6
            places = quantile_contexts(x)
            shown = list(dict.fromkeys(text for group in places for text, _ in group))
            scale = float(np.abs(x).max()) / 127 or 1.0
            nodes[f"{site}.{channel}"] = {
                "spread": float(x.std()), "low": low, "high": high, "ordinary": histogram(x, low, high),
                "task": [histogram(group, low, high) for group in groups],
                "task_means": [float(group.mean()) for group in groups],
                "places": [[[used.setdefault(text, len(used)), position, round(float(x[text, position]), 4)]
                            for text, position in group] for group in places],
                "texts": [used[text] for text in shown], "scale": scale,
                "values": arrays.add((x[shown] / scale).round(), "int8")}
    return nodes, {"ids": arrays.add([texts[text] for text in used], "uint16")}


# ----------------------------------------------------------------------------------------------------------
# what freezing does


def freeze(nodes, gates, contexts, record):
    """What freezing does to the circuit, with its fit, and to the whole model, on `n` contexts: a dict.

    "before": results of both; "alone": 'site.channel' -> results of both with this node frozen, of as many
    of the nodes that cost most as FROZEN allows; "none": in what share of the contexts the circuit chooses
    the first answer with all its nodes frozen; "opening": what `opening` returns.
    """
    costs, T = record["node_costs"], contexts.idx.size(1)
    names = sorted(costs, key=lambda name: -costs[name])[:max(1, FROZEN // (2 * FEW * T))]
    few = contexts[torch.arange(min(len(contexts), max(FEW, FROZEN // (2 * len(names) * T))))]
    whole, fit = torch.ones_like(gates), (record["scale"], record["shift"])

    def inside(gates):
        logits = nodes.judge(few, gates)
        return apply_fit(logits, few.sides(), *fit) if record["fit"] else logits

    def without(gates, name):
        site, channel = name.rsplit(".", 1)
        less = gates.clone()
        less[nodes.places[site] + int(channel)] = 0
        return less

    def results(pair):
        return [{key: round(result(x)[key], 4) for key in ("loss", "accuracy")} for x in pair]

    before, none = (inside(gates), nodes.judge(few, whole)), inside(nodes.others(whole))
    alone = {name: (inside(without(gates, name)), nodes.judge(few, without(whole, name))) for name in names}
    first, second = record["answer_ids"]
    chosen = (none[:, 0] - none[:, 1]) * few.sides() * (1 if first < second else -1) > 0
    return {"n": len(few), "before": results(before), "none": chosen.float().mean().item(),
            "alone": {name: results(pair) for name, pair in alone.items()},
            "opening": opening(before, none, alone)}


def opening(before, none, alone):
    """A context to begin with, a node to freeze there, and "shares" of the right answer before and after, in
    circuit and whole model: a dict; of logits (n, 2), the right answer's first, as `freeze` has them.

    Both have the context right, the circuit wrong with all its nodes frozen, and the node turns it, a key or
    a value rather than others; as far as there are such.
    """
    margin = {name: pair[0][:, 0] - pair[0][:, 1] for name, pair in alone.items()}
    inside, whole = (logits[:, 0] - logits[:, 1] for logits in before)
    lowest = torch.stack(list(margin.values())).amin(0)
    moved = torch.minimum(inside, -lowest)  # how clearly it is right before, and wrong after
    best = (inside > 0) & (whole > 0) & (none[:, 0] < none[:, 1])
    row = int((moved - 1e6 * ~best).argmax())
    turning = [name for name in alone if margin[name][row] < min(0, lowest[row] / 2)]
    node = (min(turning, key=lambda name: (TO_FREEZE.index(name.split(".")[2]), margin[name][row]))
            if turning else min(alone, key=lambda name: margin[name][row]))
    return {"context": row, "node": node, "shares": [
        [x[row].softmax(0)[0].item() for x in pair] for pair in zip(before, alone[node], strict=True)]}


# ----------------------------------------------------------------------------------------------------------
# what a token is to the heads of the first block


@torch.no_grad()
def token_table(nodes, gates, contexts):
    """What attn_in, queries, keys and values of the first block are in the circuit for each token: names of
    the kept channels, the mean over positions (vocab_size, channels), and all of it by position.
    """
    model, kept, parts = nodes.model, nodes.kept(gates), nodes.split(gates)
    config, block = model.config, model.transformer.h[0]
    first = [f"0.attn.attn_{name}" for name in ("in", "q", "k", "v")]
    channels = [f"{site}.{c}" for site in first for c in kept.get(site, [])]
    if not any(site in kept for site in first[1:]):
        return None
    rows = []

    def gate(site):
        def pass_gate(x):
            x = parts[site] * x + (1 - parts[site]) * nodes.ablated[site]
            rows.append(x[0, :, kept.get(site, [])])
            return x
        return pass_gate

    positions = range(config.block_size) if config.use_positional_embeddings else range(1)
    with hooks([(nodes.sites[site], gate(site)) for site in first]), hooks(nodes.removals(gates), both=True):
        for position in positions:
            x = model.transformer.wte.weight + model.transformer.wpe(torch.tensor([position]))
            q, k, v = block.attn.c_attn(block.attn.attn_in(block.ln_1(x[None]))).chunk(3, dim=-1)
            for module, y in ((block.attn.attn_q, q), (block.attn.attn_k, k), (block.attn.attn_v, v)):
                module(y)
    found = torch.cat(rows, dim=1).view(config.vocab_size, len(positions), -1).transpose(0, 1)
    seen = np.bincount(np.concatenate([ids for ids, _ in contexts]), minlength=config.vocab_size)
    return {"channels": channels, "seen": seen, "mean": found.mean(0).numpy(), "by_position": found.numpy()}


def put_tokens(table, arrays):
    """The table as the page has it, with the values by position of the 24 tokens of the largest values."""
    if table is None:
        return None
    mean, seen = table["mean"], table["seen"]
    strength = np.abs(mean - np.median(mean, axis=0)) / (mean.std(axis=0) + 1e-6)
    strength = (strength * (seen[:, None] > 0)).max(axis=1)
    chosen = np.argsort(-strength, kind="stable")[:24]
    return {"channels": table["channels"], "seen": arrays.add(np.minimum(seen, 65535), "uint16"),
            "mean": arrays.add(mean.T, "float32"), "chosen": chosen.tolist(),
            "by_position": arrays.add(table["by_position"][:, chosen], "float32")}


# ----------------------------------------------------------------------------------------------------------
# the page


def content(record, model, data, arrays):
    """All that the page shows, as JSON can hold it."""
    nodes, gates = circuit_of(record, model)
    contexts = recorded_contexts(record, data, model.config.block_size)[:MOST_CONTEXTS]
    values, texts = describe_nodes(model, record, data, contexts, arrays)
    answers = sorted({i for _, pair in contexts for i in pair} | set(record["answer_ids"]))
    number = sum(int(p.count_nonzero()) for name, p in model.named_parameters() if name != "bigram_table")
    live = number <= LIVE
    tensors = Contexts.of(contexts)
    return {
        "record": {key: record[key] for key in SHOWN} | {
            "runs": [{key: run[key] for key in run if key != "order"} for run in record["runs"]]},
        "results": {name: record["results"][name] for name in (*HEADINGS, "heads", "otherwise", "exchanges")
                    if name in record["results"]},
        "freeze": freeze(nodes, gates, tensors, record),
        "config": asdict(model.config), "tokenizer": json.loads(data.tokenizer),
        "live": live, "nonzeros": number, "most": LIVE,
        "parameters": parameters_of(model, live, record["nodes"], arrays),
        "bigrams": bigrams_of(model, answers, arrays) if live else None,
        "means": {site: arrays.add(mean, "float32") for site, mean in record["means"].items()},
        "reads": {site: arrays.add(mean, "float32") for site, mean in record["reads"].items()},
        "weights": weights_between(model, record["nodes"]), "values": values, "ordinary": texts,
        "quantiles": QUANTILES,
        "contexts": {"ids": arrays.add(tensors.idx, "uint16"), "lengths": [len(ids) for ids, _ in contexts],
                     "answers": [list(pair) for _, pair in contexts], "split": record["contexts"]["split"]},
        "tokens": put_tokens(token_table(nodes, gates, contexts), arrays),
    }


def digests(text, tag):
    """The hashes by which the page's policy knows its own scripts or styles."""
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
                    for part in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))


def write(record, model, data, path):
    """Write the page of a circuit to `path`; returns the number of its bytes.

    record: what circuit.json holds; model: in eval mode, on the CPU; data: as runs.load_data returns it.
    """
    arrays = Arrays()
    found = json.dumps(content(record, model, data, arrays), separators=(",", ":"), allow_nan=False)
    with open(TEMPLATE, encoding="utf-8") as f, open(MODEL, encoding="utf-8") as g:
        template = f.read().replace("__MODEL__", f"\n{g.read()}")
    parts = {
        "POLICY": "default-src 'none'; base-uri 'none'; form-action 'none'; "
                  f"script-src {digests(template, 'script')}; style-src {digests(template, 'style')}",
        "DATA": found.replace("<", "\\u003c"),  # in JSON it stands in strings alone
        "ARRAYS": arrays.text()}
    text = re.sub("__(POLICY|DATA|ARRAYS)__", lambda match: parts[match[1]], template)
    write_atomically(path, text)
    return len(text.encode())


@ends_explained()
def main():
    configure(globals())
    with record_at(circuit) as record:
        loaded = run_of(record, circuit, device="cpu")
        path = page or os.path.join(os.path.dirname(circuit), "circuit.html")
        size = write(record, loaded.model, loaded.data, path)
    print(f"wrote {path} | {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
