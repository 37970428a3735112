"""The picture of a circuit: from the tokens on the left to the two answers on the right.

    python -m circuits.picture --circuit=out/quickstart/circuits/quotes/circuit.json       # draws it again

circuit.py calls `describe` for what is drawn, which it keeps in circuit.json, and `draw`. A node that reads
the residual stream stands beside the tokens that write most to its channel. The legend says the rest.
"""
import os
import textwrap

import torch

from circuits.figures import drawable, new_figure, save
from circuits.saved import record_at
from circuits.search import apply_fit
from configurator import configure, ends_explained
from tokenizer import spell

circuit = ""  # the path of a circuit.json
image = ""  # where to write the figure; '': circuit.png, beside it

TOKENS = 4  # spelled at a node
EXAMPLES = 2  # of each answer
NUMBERED = 80  # fewer weights than this bear their numbers
COLORS = {True: "#1f5fa8", False: "#c0392b"}  # of positive and negative
WIDTH = 152  # characters in a line of a context
HEADS, ROWS, VALUES = 3, 6, 4  # at most, in the table of what heads find
STRONGEST = 120  # edges that are drawn; of a larger circuit the rest is left out, and the title says so
SITES = {  # location -> what its column is called, and its place among those of a block
    "attn_in": ("attention reads", 0), "attn_q": ("query", 1), "attn_k": ("key", 1), "attn_v": ("value", 1),
    "attn_out": ("attention writes", 2), "mlp_in": ("MLP reads", 3), "mlp_neuron": ("neuron", 4),
    "mlp_out": ("MLP writes", 5)}
LEGEND = """Blue is positive, red negative. A line is as thick as its weight times the spread of the node
it comes from. On the left: the tokens that write most to a channel. Under queries, keys and neurons: those
at which they are largest and smallest; under values: those of which the last one reads most. The table
has what one unit of attention to a token adds to the first answer, less what to the other, unfitted. Below,
contexts: the darker a token, the more the last one attends to it; then the answer, and by how much of a
(fitted) logit the circuit prefers it to the other."""
STREAM = " A dashed line is a channel of the stream that is written and read."

# ----------------------------------------------------------------------------------------------------------
# what is drawn


def location_of(site):
    return site.split(".")[-1]


def stream_of(nodes, kept):
    """Channels of the residual stream from a kept node that writes to one that reads, as edges: the weight
    is the gain of the reader's norm."""
    order, found = list(nodes.sites), []
    for written in (site for site in kept if site.endswith("_out")):
        for read in (site for site in kept if site.endswith("_in")):
            if order.index(read) > order.index(written):
                block = nodes.model.transformer.h[int(read.split(".")[0])]
                gain = (block.ln_1 if read.endswith("attn_in") else block.ln_2).weight
                found += [[written, c, read, c, gain[c].item()] for c in kept[written] if c in kept[read]]
    return found


def extremes(nodes, contexts, gates, kept, activations, tokenizer):
    """'site.channel' of a query, key, value or neuron -> [[token, number], ...], the largest and smallest.

    The number is the mean of the node at the token; of a value, the sum of what attention takes of it.
    """
    found = {}
    real = torch.arange(contexts.idx.size(1), device=nodes.device) <= contexts.last[:, None]
    for site in (s for s in kept if location_of(s) in ("attn_q", "attn_k", "attn_v", "mlp_neuron")):
        tokens = contexts.idx[real]
        if len(activations[site]) < len(tokens):
            tokens = contexts.last_tokens()[:, 0]
        if location_of(site) == "attn_v":
            attention = nodes.attention(contexts, gates, int(site.split(".")[0]))
        ids, which, times = tokens.unique(return_inverse=True, return_counts=True)
        for channel in kept[site]:
            x = activations[site][:, channel]
            if location_of(site) == "attn_v":
                head = channel // nodes.model.config.d_head
                x = x * attention[:, head][real]
            sums = x.new_zeros(len(ids)).index_add_(0, which, x)
            if location_of(site) != "attn_v":
                sums = sums / times * (times >= 3)  # what is too rare says nothing
            order = sums.argsort(descending=True).tolist()
            found[f"{site}.{channel}"] = [[spell(tokenizer, int(ids[i])), sums[i].item()] for i in
                                          dict.fromkeys(order[:TOKENS] + order[-TOKENS:]) if sums[i] != 0]
    return found


def examples_of(nodes, gates, contexts, kept, tokenizer, fit):
    """For each answer contexts that the circuit is as sure of as of half of them: a list of dicts."""
    logits = apply_fit(nodes.judge(contexts, gates), contexts.sides(), *fit)
    margins, heads, found = logits[:, 0] - logits[:, 1], nodes.kept_heads(gates), []
    for side in (1, -1):
        rows = (contexts.sides() == side).nonzero()[:, 0]
        rows = rows[(margins[rows] - margins[rows].median()).abs().argsort()][:EXAMPLES]
        for row in rows.tolist():
            one, seen = contexts[[row]], {}
            nodes.logits(one, gates, watch=seen.__setitem__)
            T = int(one.last) + 1
            found.append({
                "tokens": [spell(tokenizer, t) for t in one.idx[0, :T].tolist()],
                "right": spell(tokenizer, int(one.answers[0, 0])), "margin": margins[row].item(),
                "attention": {f"{block}.{head}": nodes.attention(one, gates, block)[0, head, :T].tolist()
                              for block, head in heads},
                "values": {f"{site}.{c}": seen[site][0, :T, c].tolist() for site in kept for c in kept[site]
                           if location_of(site) == "attn_v"}})
    return found


@torch.no_grad()
def describe(nodes, gates, contexts, tokenizer, fit=(1.0, 0.0)):
    """All that `draw` needs of a circuit besides its size and loss: a dict that JSON can hold."""
    model, kept = nodes.model, nodes.kept(gates)
    inside = nodes.activations(contexts, gates)
    unembedding = model.lm_head.weight * model.transformer.ln_f.weight
    present = contexts.idx.unique()
    wte, tokens = model.transformer.wte.weight[present], {}
    for channel in {c for site in kept if site.endswith("_in") for c in kept[site]}:
        strongest = wte[:, channel].abs().argsort(descending=True)[:TOKENS].tolist()
        tokens[str(channel)] = [[spell(tokenizer, int(present[t])), wte[t, channel].item()]
                                for t in strongest if wte[t, channel] != 0]
    pair = contexts.answers[0].sort().values.tolist()
    return {"edges": [list(edge) for edge in nodes.edges_in(gates)], "stream": stream_of(nodes, kept),
            "tokens": tokens,
            "spread": {f"{site}.{c}": inside[site][:, c].std().item() for site in kept for c in kept[site]},
            "d_head": model.config.d_head, "answers": [spell(tokenizer, t) for t in pair],
            "pairs": contexts.pairs(),
            "answer_edges": [[site, c, i, unembedding[t, c].item()] for site in kept if site.endswith("_out")
                             for c in kept[site] for i, t in enumerate(pair) if unembedding[t, c] != 0],
            "extremes": extremes(nodes, contexts, gates, kept, inside, tokenizer),
            "examples": examples_of(nodes, gates, contexts, kept, tokenizer, fit)}


# ----------------------------------------------------------------------------------------------------------
# drawing


def place_nodes(record):
    """'site.channel' -> (x, y), a column for each kind of site; y from 0 below to 1 above.

    The nodes of a column stand in the order of what they are joined with, so that lines cross little.
    """
    shown, columns = record["picture"], {}
    for site, channels in record["nodes"].items():
        key = int(site.split(".")[0]), SITES[location_of(site)][1]
        columns.setdefault(key, []).extend(f"{site}.{c}" for c in channels)
    lines = [(f"{a}.{i}", f"{b}.{o}", abs(w)) for a, i, b, o, w in shown["edges"] + shown["stream"]]
    y = {}

    def spread_out(names):
        y.update({name: 1 - (i + 0.5) / len(names) for i, name in enumerate(names)})

    for names in columns.values():
        spread_out(names)
    for forward in (True, False, True, False):
        for key in sorted(columns, reverse=not forward):
            wish = {}
            for a, b, w in lines:
                here, there = (b, a) if forward else (a, b)
                if here in columns[key]:
                    wish.setdefault(here, []).append((y[there], w))
            wish = {name: sum(height * w for height, w in seen) / sum(w for _, w in seen)
                    for name, seen in wish.items()}
            columns[key].sort(key=lambda name, wish=wish: -wish.get(name, y[name]))
            spread_out(columns[key])
    return {name: (x, y[name]) for x, key in enumerate(sorted(columns)) for name in columns[key]}


def draw_lines(axis, record, at, answers):
    """All weights, as lines between the nodes, and to the answers, whose (x, y) are given."""
    shown = record["picture"]
    lines = [(at[f"{a}.{i}"], at[f"{b}.{o}"], w, shown["spread"][f"{a}.{i}"], style)
             for style, group in (("-", shown["edges"]), ("--", shown["stream"])) for a, i, b, o, w in group]
    to_answers = [(at[f"{site}.{c}"], answers[i], w, shown["spread"][f"{site}.{c}"], "-")
                  for site, c, i, w in shown["answer_edges"]]
    crowd = {x: sum(other == x for other, _ in at.values()) for x, _ in at.values()} | {answers[0][0]: 2}
    for group in (lines, to_answers):  # each with a thickness of its own for the largest
        most = max((abs(w) * spread for *_, w, spread, _ in group), default=1) or 1
        for (x0, y0), (x1, y1), w, spread, style in group:
            axis.plot([x0, x1], [y0, y1], style, color=COLORS[w > 0], zorder=1, alpha=0.75,
                      linewidth=0.4 + 3.6 * abs(w) * spread / most)
            if len(lines) < NUMBERED:
                near = 0.3 if crowd[x0] >= crowd[x1] else 0.72  # where the lines are apart
                axis.text(x0 + near * (x1 - x0), y0 + near * (y1 - y0), f"{w:+.2g}", fontsize=7,
                          ha="center", va="center", color=COLORS[w > 0],
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.8})


def draw_tokens(axis, xy, offset, tokens, align):
    """A row of [token, number], coloured by sign, from `offset` (points): to the right if aligned left."""
    x, y = offset
    for token, number in tokens if align == "left" else reversed(tokens):
        token = token.replace(" ", "␣")
        axis.annotate(token, xy, xytext=(x, y), textcoords="offset points", fontsize=7.5, family="monospace",
                      color=COLORS[number > 0], ha=align, va="center", parse_math=False, zorder=4,
                      bbox={"facecolor": "0.95", "edgecolor": "none", "pad": 0.8})
        x += (4.55 * len(token) + 6) * (1 if align == "left" else -1)


def draw_nodes(axis, record, at):
    """The nodes with their names and tokens."""
    shown = record["picture"]
    for name, (x, y) in at.items():
        site, channel = name.rsplit(".", 1)
        location, label = location_of(site), channel
        if location in ("attn_q", "attn_k", "attn_v"):
            label = f"{SITES[location][0]} {channel}, head {int(channel) // shown['d_head']}"
        elif location == "mlp_neuron":
            label = f"neuron {channel}"
        query = f"{site[:-1]}q"
        if location == "attn_k" and f"{query}.{channel}" not in shown["spread"]:  # of all kept ones
            label += f"\nits query stays at {record['means'][query][int(channel)]:+.1f}"
        axis.text(x, y, label, fontsize=8, ha="center", va="center", zorder=3,
                  bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "0.3"})
        for line, positive in enumerate((True, False)):
            tokens = [pair for pair in shown["extremes"].get(name, []) if (pair[1] > 0) == positive]
            draw_tokens(axis, (x, y), (-42, -20 - 12 * line), tokens, "left")
        if x == 0 and location.endswith("_in"):
            draw_tokens(axis, (x, y), (-16, 0), shown["tokens"].get(channel, []), "right")


def draw_examples(axis, record):
    """The contexts, each on as many lines as it needs."""
    y = 0
    for example in record["picture"]["examples"]:
        attention = [max(shares) for shares in zip(*example["attention"].values(), strict=True)]
        attention = attention or [0.0] * len(example["tokens"])
        x = 0
        for t, (token, share) in enumerate(zip(example["tokens"], attention, strict=True)):
            if x + len(token) > WIDTH:
                x, y = 0, y - 1.5
            axis.text(x, y, token, fontsize=7.5, family="monospace", va="center", parse_math=False, bbox={
                "facecolor": (1, 1 - 0.45 * share**0.5, 1 - share**0.5), "edgecolor": "none", "pad": 0.7})
            x += len(token) + 0.6
        axis.text(x + 1, y, f"→  {example['right']}   ({example['margin']:+.1f})", fontsize=7.5,
                  va="center", family="monospace", fontweight="bold", parse_math=False)
        y -= 1.7
    axis.set(xlim=(0, WIDTH), ylim=(y + 1, 1))
    axis.axis("off")


def heads_table(heads, answers):
    """What each head finds, of controls.heads_of, as text: a line for a token, of those that add something
    first. What it adds to the first answer is less what it adds to the other."""
    head = f"adds to {answers[0]}"
    lines = [f"{'what the last token finds':28}attention {head:>17}  values"] if heads else []
    for head, found in list(heads.items())[:HEADS]:
        channels = "".join(f"{c:>7}" for c in found["channels"][:VALUES])
        block, number = head.split(".")
        lines.append(f"by head {number} of block {block}".ljust(56) + channels)
        rows = sorted(found["tokens"], key=lambda row: abs(row[3]) < 0.005)[:ROWS]
        lines += [f"   {token:25}{share:9.2f}{adds:+18.2f} {''.join(f'{v:+7.2f}' for v in values[:VALUES])}"
                  for token, share, values, adds, _ in rows]
    return "\n".join(lines)


def strongest(record):
    """The record with its STRONGEST edges alone and the nodes that these join; and how many edges are left
    out."""
    shown = record["picture"]
    if len(shown["edges"]) <= STRONGEST:
        return record, 0
    edges = sorted(shown["edges"], key=lambda edge: -abs(edge[4]) * shown["spread"][f"{edge[0]}.{edge[1]}"])
    edges = edges[:STRONGEST]
    kept = {(site, c) for a, i, b, o, _ in edges for site, c in ((a, i), (b, o))}
    stream = [edge for edge in shown["stream"] if {(edge[0], edge[1]), (edge[2], edge[3])} <= kept]
    answers = [edge for edge in shown["answer_edges"] if (edge[0], edge[1]) in kept]
    nodes = {site: [c for c in channels if (site, c) in kept] for site, channels in record["nodes"].items()}
    return record | {
        "nodes": {site: channels for site, channels in nodes.items() if channels},
        "picture": shown | {"edges": edges, "stream": stream, "answer_edges": answers}
    }, len(shown["edges"]) - STRONGEST


def draw(record, path):
    """Write the picture of a circuit, of circuit.json's content, to `path`."""
    texts = {key: drawable(record[key]) for key in ("task", "results", "picture")}
    record, left_out = strongest(record | texts)
    at = place_nodes(record)
    columns = {x: [name for name, (other, _) in at.items() if other == x] for x, _ in at.values()}
    height = min(max(4.5, 0.25 * max(map(len, columns.values()))), 30.0)
    examples = 0.17 * sum(1.7 + 1.5 * (sum(len(token) + 0.6 for token in example["tokens"]) // WIDTH)
                          for example in record["picture"]["examples"])
    figure, (axis, below) = new_figure(11, height + examples + 1.4, rows=2,
                                       height_ratios=(height, examples + 0.1))
    right = max(columns) + 1
    answers = [(right, 0.7), (right, 0.3)]
    draw_lines(axis, record, at, answers)
    draw_nodes(axis, record, at)
    for (x, y), answer in zip(answers, record["picture"]["answers"], strict=True):
        axis.text(x + 0.03, y, answer, fontsize=13, family="monospace", va="center", parse_math=False,
                  bbox={"boxstyle": "round", "facecolor": "#fff3cd", "edgecolor": "0.5"})
    for x, names in columns.items():
        roles = [role for location, (role, _) in SITES.items() if any(f".{location}." in n for n in names)]
        axis.text(x, 1.02, ", ".join(roles), fontsize=8, ha="center", color="0.3")
    axis.text(-0.2, 1.02, "tokens that write the channel", fontsize=8, ha="right", color="0.3")
    pairs = record["picture"].get("pairs", 1)
    axis.text(right, 1.02, "answers" if pairs == 1 else f"answers, one of {pairs} pairs", fontsize=8,
              ha="center", color="0.3")
    c, w = record["results"]["circuit"], record["results"]["whole"]
    f = record["results"]["circuit_fitted"]
    figure.suptitle(f"{record['task']}: {c['nodes']:,} of {w['nodes']:,} nodes and {c['edges']:,} of "
                    f"{w['edges']:,} edges are right in {f['accuracy']:.1%}, with a fitted scale and shift "
                    f"({c['accuracy']:.1%} without; whole model {w['accuracy']:.1%})"
                    + f"; {left_out:,} weaker edges are not drawn" * (left_out > 0), fontsize=10)
    axis.set(xlim=(-0.75, right + 0.3), ylim=(-0.06, 1.05))
    axis.axis("off")
    legend = textwrap.fill(LEGEND + STREAM * bool(record["picture"]["stream"]), 96)
    axis.text(-0.75, -0.04, legend, fontsize=7, color="0.3", va="top")
    table = heads_table(record["results"].get("heads", {}), record["picture"]["answers"])
    axis.text(0.52 * right, -0.04, table, fontsize=7, va="top", family="monospace", parse_math=False)
    draw_examples(below, record)
    save(figure, path)


@ends_explained()
def main():
    configure(globals())
    with record_at(circuit) as record:
        draw(record, image or os.path.join(os.path.dirname(circuit), "circuit.png"))


if __name__ == "__main__":
    main()
