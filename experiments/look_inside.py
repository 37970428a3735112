"""Draw the strongest nodes of a model, with the few weights that each reads and writes by.

    python -m experiments.look_inside --out_dir=out/quickstart      # writes out/quickstart/inside.png

Of every block the value channel of attention and the MLP neuron that write most to the residual stream: what
each reads (left), what it writes (right), and the text at which it is largest. A weight connects a node to a
channel of the residual stream, which has no name but those of what else writes or reads there: tokens, by
their embedding or unembedding, and other nodes, `mlp_neuron 0.7` being neuron 7 of block 0. A minus before a
name is a negative weight there. The strongest three are named: by weight, which of a node that writes is
multiplied by its mean magnitude. Positional embeddings and biases have no name. A look, not a circuit:
nothing is ablated here.
"""
import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import sample
from configurator import configure, fail
from experiments import plot
from experiments.evaluate import load_run
from prepare import load_tokenizer

out_dir = "out"  # of the training run
image = ""  # where to write the figure; '': out_dir/inside.png
blocks = ""  # to show, their numbers by commas; '': all
windows = 64  # of val, that activations are measured on
weights = 5  # to show on either side of a node
texts = 3  # to show under a node

COLORS = {True: "C0", False: "C3"}  # of positive and negative weights


@dataclass
class Nodes:
    """The nodes of one site of one block, and their weights from and to the residual stream."""

    name: str
    activations: torch.Tensor  # (windows, T, nodes)
    written: torch.Tensor  # (nodes): mean magnitude of what the output weights multiply
    reads: torch.Tensor  # (nodes, d_model), the gain of the norm multiplied in
    writes: torch.Tensor  # (d_model, nodes)

    def strongest(self):
        return (self.written * self.writes.norm(dim=0)).argmax().item()


@torch.no_grad()
def measure(model, idx):
    """Run the model on idx (windows, T). Returns the Nodes of every block, in order: attn_v, mlp_neuron."""
    seen, handles = {}, []
    for block in model.transformer.h:
        for site in (block.attn.attn_v, block.mlp.mlp_neuron):
            handles.append(site.register_forward_hook(lambda m, _, output: seen.__setitem__(m, output)))
        for out in (block.attn.c_proj, block.mlp.c_proj):  # of values, what attention makes of them
            handles.append(out.register_forward_pre_hook(
                lambda m, inputs: seen.__setitem__(m, inputs[0].abs().mean((0, 1)))))
    model(idx)
    for handle in handles:
        handle.remove()
    found = []
    for i, block in enumerate(model.transformer.h):
        values = block.attn.c_attn.weight.chunk(3)[2]
        for name, part, site, reads in (
            ("attn_v", block.attn, block.attn.attn_v, values * block.ln_1.weight),
            ("mlp_neuron", block.mlp, block.mlp.mlp_neuron, block.mlp.c_fc.weight * block.ln_2.weight),
        ):
            found.append(Nodes(f"{name} {i}", seen[site], seen[part.c_proj], reads, part.c_proj.weight))
    return found


def queries_and_keys(model, block):
    """What else reads the residual stream: pairs of a name and weights (d_model, channels)."""
    attn = model.transformer.h[block].attn
    q, k, _ = (attn.c_attn.weight * model.transformer.h[block].ln_1.weight).chunk(3)
    return [(f"attn_q {block}", q.T), (f"attn_k {block}", k.T)]


def spelling(tokenizer, token):
    return repr(sample.spell(tokenizer, token).decode(errors="replace"))


def name_channel(tokens, others, tokenizer, channel, how_many=3):
    """What else is at a channel of the residual stream, the strongest first: a string.

    tokens: (vocab_size, d_model), by which tokens write or read it. others: pairs of a name and the
    strengths, (d_model, nodes), at which nodes do.
    """
    found = [(tokens[t, channel].item(), spelling(tokenizer, t)) for t in tokens[:, channel].nonzero()[:, 0]]
    for name, strengths in others:
        found += [(strengths[channel, i].item(), f"{name}.{i}")
                  for i in strengths[channel].nonzero()[:, 0].tolist()]
    found.sort(key=lambda pair: -abs(pair[0]))
    return ", ".join("-" * (strength < 0) + name for strength, name in found[:how_many]) or "nothing"


def snippets(nodes, node, idx, tokenizer):
    """Where the node is largest and not zero, once a window: (activation, text before, the token, after)."""
    a = nodes.activations[..., node]
    positions = a.abs().argmax(-1)
    strengths = a.gather(1, positions[:, None])[:, 0]
    for w in strengths.abs().argsort(descending=True)[:min(texts, strengths.count_nonzero())].tolist():
        at, spelled = positions[w].item(), [spelling(tokenizer, t)[1:-1] for t in idx[w].tolist()]
        yield strengths[w].item(), "".join(spelled[:at])[-70:], spelled[at], "".join(spelled[at + 1:])[:25]


def draw_side(axis, strengths, name, side):
    """The weights of one side of a node, as lines to the names of their channels. side: -1 left, 1 right."""
    align = {"ha": "left" if side > 0 else "right", "va": "center"}
    order = strengths.abs().argsort(descending=True)[:weights]
    order = order[strengths[order] != 0].tolist()
    for line, channel in enumerate(order):
        w, y = strengths[channel].item(), 0.95 - 0.13 * line
        axis.plot([0.5 + side * 0.012, 0.5 + side * 0.07], [0.69, y], color=COLORS[w > 0],
                  linewidth=0.5 + 2.5 * abs(w) / strengths.abs().max().item())
        label = f"{w:+.2f}  channel {channel}: {name(channel)}"
        axis.text(0.5 + side * 0.075, y, label, fontsize=7.5, parse_math=False, **align)
    more = strengths.count_nonzero().item() - len(order)
    axis.text(0.5 + side * 0.075, 0.95 - 0.13 * len(order), f"and {more} more" if more else "", fontsize=7,
              color="0.5", **align)


@torch.no_grad()
def draw(figure, model, tokenizer, idx, shown):
    """Draw the strongest nodes of the blocks whose numbers are in `shown`."""
    found = measure(model, idx)
    tokens_in = model.transformer.wte.weight
    tokens_out = model.lm_head.weight * model.transformer.ln_f.weight
    chosen = [i for i in range(len(found)) if i // 2 in shown]
    for i, axis in zip(chosen, figure.subplots(len(chosen), 1), strict=True):
        nodes, block = found[i], i // 2
        node = nodes.strongest()
        before = [(n.name, n.writes * n.written) for n in found[:i]]
        after = [(n.name, n.reads.T) for n in found[i + 1:]]
        for later in range(block + 1, len(model.transformer.h)):
            after += queries_and_keys(model, later)
        for side, strengths, tokens, others in ((-1, nodes.reads[node], tokens_in, before),
                                                (1, nodes.writes[:, node], tokens_out, after)):
            draw_side(axis, strengths, partial(name_channel, tokens, others, tokenizer), side)
        axis.plot([0.5], [0.69], "o", color="0.2", markersize=9)
        axis.set_title(f"{nodes.name}.{node}", fontsize=9.5, fontweight="bold")
        for line, (strength, left, token, right) in enumerate(snippets(nodes, node, idx, tokenizer)):
            y = 0.16 - 0.1 * line
            style = {"fontsize": 7.5, "family": "monospace", "va": "center", "parse_math": False}
            axis.text(0.497, y, left, ha="right", **style)
            marked = axis.text(0.5, y, token, backgroundcolor="#ffe08a", **style)
            axis.annotate(f"{right}   ({strength:+.1f})", (1, 0.5), xycoords=marked, xytext=(3, 0),
                          textcoords="offset points", **style)
        axis.set(xlim=(0, 1), ylim=(-0.15, 1.05))
        axis.axis("off")


def main():
    configure(globals())
    for name, least in (("windows", 1), ("weights", 0), ("texts", 0)):
        if globals()[name] < least:
            fail(f"{name}={globals()[name]} must be at least {least}")
    _, model, data = load_run(out_dir, "ckpt.pt")
    T = model.config.block_size
    starts = np.linspace(0, len(data.val) - T, windows).astype(int)
    idx = torch.from_numpy(np.stack([data.val[s:s + T] for s in starts]).astype(np.int64))
    shown = set(range(len(model.transformer.h)))
    if blocks:
        numbers = [number.strip() for number in blocks.split(",")]
        if not set(numbers) <= set(map(str, shown)):
            fail(f"blocks={blocks!r} must be numbers from 0 to {len(shown) - 1}, by commas")
        shown = set(map(int, numbers))
    figure = plot.plt.figure(figsize=(13, 5.2 * len(shown)), layout="constrained")
    draw(figure, model, load_tokenizer(os.path.join(out_dir, "tokenizer.json")), idx, shown)
    plot.save(figure, image or os.path.join(out_dir, "inside.png"))


if __name__ == "__main__":
    main()
