"""Are two circuits the same? Of one model: the nodes and edges that they share. Of two models: for each node
of the first the node of the other that does most alike on the same text, and so for heads.

    python -m circuits.compare A/circuit.json B/circuit.json

Alike is measured by correlation over the tokens of ordinary text. Something correlates best in any model, so
each number stands beside two baselines: the best match when the other model reads other windows of the same
text, and the best of nodes of the first model that are drawn at random from the same site. Models may differ
in seed, width, depth and sparsity, not in the tokenizer. A match does alike on the same text; that does not
prove that it is used for the same.
"""
import sys

import numpy as np
import torch

from circuits.nodes import hooks, node_sites
from circuits.saved import load_circuit
from configurator import check_rules, configure, ends_explained, fail
from model import attention_weights

text = "val"  # of the first model; 'task': the contexts of its circuit
windows = 256  # of val, at most
draws = 1000  # of random circuits as large, for what two share by chance
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'

BATCH = 32  # windows at a time
ROLLS = (1, 2, 3)  # windows of a batch by which the other model's are moved for the baseline
DRAWN = 16  # nodes of a site that are drawn at random


# ----------------------------------------------------------------------------------------------------------
# one model


def shared(a, b):
    """What two Circuits of one model share: {"nodes": [...], "edges": [...]}, lists of names."""
    def names(c):
        return ([f"{site} {channel}" for site, channels in c.kept.items() for channel in channels],
                ["{} {} -> {} {}".format(*edge) for edge in c.edges])
    return {what: [name for name in mine if name in set(theirs)]
            for what, mine, theirs in zip(("nodes", "edges"), names(a), names(b), strict=True)}


def shared_by_chance(a, b):
    """The mean number of nodes that two circuits share that have as many of each site, drawn at random."""
    rng, total = np.random.default_rng(seed), 0
    for site in a.kept.keys() & b.kept.keys():
        live = np.flatnonzero(a.run.means[site].cpu().numpy())
        sizes = [min(len(c.kept[site]), len(live)) for c in (a, b)]
        total += sum(len(np.intersect1d(*(rng.choice(live, size, replace=False) for size in sizes)))
                     for _ in range(draws)) / draws
    return total


def print_shared(a, b):
    found, sizes = shared(a, b), [{"nodes": sum(map(len, c.kept.values())), "edges": len(c.edges)}
                                  for c in (a, b)]
    for what, names in found.items():
        print(f"{what}: {len(names)} shared of {sizes[0][what]} and {sizes[1][what]}"
              + (f"; by chance {shared_by_chance(a, b):.2f}" if what == "nodes" else ""))
        print("".join(f"    {name}\n" for name in names), end="")


# ----------------------------------------------------------------------------------------------------------
# two models


class Correlation:
    """Correlations of columns, summed up over batches of rows."""

    def __init__(self):
        self.n, self.sums = 0, None

    def add(self, x, y):
        """x (rows, a), y (rows, b), numbers of the same rows."""
        x, y = x.double(), y.double()
        sums = [x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y]
        self.sums = sums if self.sums is None else [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.n += len(x)

    def matrix(self):
        """(a, b); 0 where a column does not vary."""
        x, y, xx, yy, xy = (s / self.n for s in self.sums)
        spread = (xx - x.square()).clamp(min=0)[:, None] * (yy - y.square()).clamp(min=0)
        return torch.where(spread > 1e-18, (xy - x[:, None] * y) / spread.sqrt().clamp(min=1e-9), 0.0)


def read(run, idx):
    """What a model makes of idx (n, T): site -> (n, T, channels), and for each block, as "0 head", what its
    heads attend to, (n, T * (T + 1) / 2, n_head)."""
    seen = {}
    with hooks([(module, lambda x, name=name: seen.update({name: x})) for name, module in
                node_sites(run.model).items()]):
        run.model.residual_stream(idx)
    past = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool, device=idx.device).tril()
    for i, block in enumerate(run.model.transformer.h):
        q, k = (seen[f"{i}.attn.attn_{name}"].unflatten(-1, (block.attn.n_head, -1)).transpose(1, 2)
                for name in "qk")
        seen[f"{i}.head"] = attention_weights(q, k, block.attn.sink_logit)[..., past].transpose(1, 2)
    return seen


def texts_of(a, b):
    """The windows (n, T) that both models read, and which of their tokens count, (n, T)."""
    T = min(c.run.model.config.block_size for c in (a, b))
    if text == "task":
        contexts = a.contexts()
        idx, last = contexts.idx[:, -T:], contexts.last - max(0, contexts.idx.size(1) - T)
        return idx, torch.arange(idx.size(1), device=idx.device) <= last[:, None]
    _, idx = a.run.evenly_spaced("val", min(windows, len(a.run.data.val) // T))
    return idx[:, :T], torch.ones_like(idx[:, :T], dtype=torch.bool)


@torch.no_grad()
def correlations(a, b, asked):
    """Of what `asked` names in the first model, site -> channels, with all of the same kind in the other:
    site -> (names of the other's, matrix, [matrix with the other's windows exchanged, ...])."""
    sums, names = {}, {}
    idx, real = texts_of(a, b)
    query = torch.ones(idx.size(1), idx.size(1)).tril().nonzero()[:, 0]  # of each entry of a head
    for rows in torch.arange(len(idx)).split(BATCH):
        mine, theirs = read(a.run, idx[rows]), read(b.run, idx[rows].to(b.run.process.device))
        for site, channels in asked.items():
            kind = site.split(".")[-1]
            others = [other for other in theirs if other.split(".")[-1] == kind]
            names[site] = [(other, c) for other in others for c in range(theirs[other].size(-1))]
            y = torch.cat([theirs[other] for other in others], dim=-1).to(idx.device)
            x = mine[site][..., channels]
            counts = real[rows] if kind != "head" else real[rows][:, query]
            for roll in (0, *(r for r in ROLLS if r % len(rows))):
                both = counts & counts.roll(roll, 0)
                sums.setdefault((site, roll), Correlation()).add(x[both], y.roll(roll, 0)[both])
    return {site: (names[site], sums[site, 0].matrix(),
                   [sums[site, roll].matrix() for roll in ROLLS if (site, roll) in sums]) for site in asked}


def matches(a, b):
    """A dict for each node of circuit a, and for each of its heads: its best match in the other model, its
    correlation r, whether it is in circuit b, the best r there, and the two baselines."""
    rng, found = np.random.default_rng(seed), []
    kept = {site: list(channels) for site, channels in a.kept.items()}
    heads = {}
    for block, head in a.nodes.kept_heads(a.gates):
        heads.setdefault(f"{block}.head", []).append(head)
    theirs = {(site, c) for site, channels in b.kept.items() for c in channels}
    theirs |= {(f"{block}.head", head) for block, head in b.nodes.kept_heads(b.gates)}
    drawn = {}
    for site, channels in (kept | heads).items():
        live = (np.flatnonzero(a.run.means[site].cpu().numpy()) if site in kept
                else np.arange(a.run.model.config.n_head))
        rest = np.setdiff1d(live, channels)
        drawn[site] = rng.choice(rest, min(DRAWN, len(rest)), replace=False).tolist()
    asked = {site: channels + drawn[site] for site, channels in (kept | heads).items()}
    for site, (names, matrix, exchanged) in correlations(a, b, asked).items():
        best = matrix.abs().max(1).values
        inside = [i for i, name in enumerate(names) if name in theirs]
        for row, channel in enumerate(asked[site][:len(asked[site]) - len(drawn[site])]):
            at = int(matrix[row].abs().argmax())
            found.append({
                "site": site, "channel": channel, "match": names[at], "r": matrix[row, at].item(),
                "in_circuit": at in inside,
                "best_in_circuit": matrix[row, inside].abs().max().item() if inside else None,
                "exchanged": float(np.mean([m[row].abs().max().item() for m in exchanged] or [np.nan])),
                "random": best[-len(drawn[site]):].mean().item() if drawn[site] else float("nan")})
    return found


def print_matches(a, b):
    rows = matches(a, b)
    print(f"{'the first circuit':22}{'best match in the other':26}{'r':>7}{'exchanged':>11}{'random':>8}"
          f"{'  in its circuit':18}best there")
    for row in rows:
        there = "" if row["best_in_circuit"] is None else f"{row['best_in_circuit']:.2f}"
        node, match = f"{row['site']} {row['channel']}", "{} {}".format(*row["match"])
        print(f"{node:22}{match:26}{row['r']:>+7.2f}{row['exchanged']:>11.2f}{row['random']:>8.2f}"
              f"{'  yes' if row['in_circuit'] else '  no':18}{there:>10}")
    for what, some in (("nodes", [row for row in rows if "head" not in row["site"]]),
                       ("heads", [row for row in rows if "head" in row["site"]])):
        if some:
            print(f"{what}: mean |r| {np.mean([abs(row['r']) for row in some]):.2f}; other windows "
                  f"{np.mean([row['exchanged'] for row in some]):.2f}; random {what} "
                  f"{np.mean([row['random'] for row in some]):.2f}; of {len(some)} matches "
                  f"{sum(row['in_circuit'] for row in some)} are in the other circuit")


@ends_explained()
def main():
    paths = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith("--")])
    check_rules(globals(), (("windows draws", lambda v: v >= 2, "must be at least 2"),
                            ("seed", lambda v: v >= 0, "must not be negative"),
                            ("text", lambda v: v in ("val", "task"), "does not exist: choose val or task")))
    if len(paths) != 2:
        fail("name two circuits: python -m circuits.compare A/circuit.json B/circuit.json")
    a, b = (load_circuit(path, device=device) for path in paths)
    if a.run.data.meta["tokenizer_sha256"] != b.run.data.meta["tokenizer_sha256"]:
        fail("the two models have different tokenizers: no text is the same tokens to both")
    if a.run.sha256 == b.run.sha256:
        print_shared(a, b)
    else:
        print_matches(a, b)


if __name__ == "__main__":
    main()
