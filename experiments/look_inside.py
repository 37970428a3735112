"""Draw the strongest nodes of a model, with the few weights that each reads and writes by.

    python -m experiments.look_inside --out_dir=out/quickstart      # writes out/quickstart/inside.png

Of every block the MLP neuron and the value channel of attention that move the residual stream most: what a
node reads from (left), what it writes to (right), and the text at which it is largest. A weight connects the
node to a channel of the residual stream, which has no name but those of what else writes or reads it: tokens
by their embedding or unembedding, and other nodes, `mlp_neuron 0.7` being neuron 7 of block 0. A minus is a
negative weight there. A look, not a circuit: nothing is ablated here.
"""
import os
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt
import numpy as np
import torch

import sample
import train
from configurator import configure, fail

out_dir = "out"  # of the training run
image = ""  # where to write the figure; '': out_dir/inside.png
windows = 64  # of val, that activations are measured on
weights = 5  # to show on either side of a node
texts = 3  # to show under a node

SIGNS = {True: "C0", False: "C3"}  # colours of positive and negative weights


@dataclass
class Nodes:
    """The nodes of one site: what they did on the text, and their weights from and to the stream."""

    name: str
    activations: torch.Tensor  # (windows, T, nodes)
    reads: torch.Tensor  # (nodes, d_model), the gain of the norm multiplied in
    writes: torch.Tensor  # (d_model, nodes)

    def size(self):
        """Mean magnitude of each node, (nodes)."""
        return self.activations.abs().mean((0, 1))

    def strongest(self):
        """The node that writes most: its mean magnitude times the norm of its weights."""
        return (self.size() * self.writes.norm(dim=0)).argmax().item()


@torch.no_grad()
def measure(model, idx):
    """Run the model on idx (windows, T). Returns the Nodes of every block: value channels, MLP neurons."""
    kept, handles = {}, []
    for block in model.transformer.h:
        for site in (block.attn.attn_v, block.mlp.mlp_neuron):
            handles.append(site.register_forward_hook(lambda site, _, output: kept.__setitem__(site, output)))
    model(idx)
    for handle in handles:
        handle.remove()
    found = []
    for i, block in enumerate(model.transformer.h):
        values = block.attn.c_attn.weight.chunk(3)[2]
        found.append(Nodes(f"attn_v {i}", kept[block.attn.attn_v],
                           values * block.ln_1.weight, block.attn.c_proj.weight))
        found.append(Nodes(f"mlp_neuron {i}", kept[block.mlp.mlp_neuron],
                           block.mlp.c_fc.weight * block.ln_2.weight, block.mlp.c_proj.weight))
    return found


def spelling(tokenizer, token):
    return repr(sample.spell(tokenizer, token).decode(errors="replace"))


def names(channel, tokens, others, tokenizer, how_many=3):
    """What else is at a channel of the residual stream, the strongest first.

    tokens: (vocab_size, d_model), by which tokens write or read it. others: pairs of the Nodes before or
    after and their strengths there, (d_model, nodes).
    """
    found = [(tokens[t, channel].item(), spelling(tokenizer, t)) for t in tokens[:, channel].nonzero().flatten()]
    for nodes, strengths in others:
        found += [(strengths[channel, i].item(), f"{nodes.name}.{i}")
                  for i in strengths[channel].nonzero().flatten().tolist()]
    found.sort(key=lambda pair: -abs(pair[0]))
    return ", ".join(("-" if strength < 0 else "") + name for strength, name in found[:how_many]) or "nothing"


def snippets(nodes, node, idx, tokenizer):
    """Where the node is largest: (activation, text before, the token, text after), one for each window."""
    a = nodes.activations[..., node]
    positions = a.abs().argmax(-1)
    strengths = a.gather(1, positions[:, None])[:, 0]
    for w in strengths.abs().argsort(descending=True)[:texts].tolist():
        at, spelled = positions[w].item(), [spelling(tokenizer, t)[1:-1] for t in idx[w].tolist()]
        yield strengths[w].item(), "".join(spelled[:at])[-70:], spelled[at], "".join(spelled[at + 1:])[:25]


def draw_side(axis, weights_of, label_of, side):
    """The weights of one side of a node, as lines of their strength to labels. side: -1 left, 1 right."""
    order = weights_of.abs().argsort(descending=True)[:weights]
    order = order[weights_of[order] != 0].tolist()
    largest = weights_of.abs().max().item()
    for line, channel in enumerate(order):
        w, y = weights_of[channel].item(), 0.95 - 0.13 * line
        axis.plot([0.5 + side * 0.012, 0.5 + side * 0.07], [0.69, y], color=SIGNS[w > 0],
                  linewidth=0.5 + 2.5 * abs(w) / largest)
        axis.text(0.5 + side * 0.075, y, f"{w:+.2f}  channel {channel}: {label_of(channel)}", fontsize=7.5,
                  ha="left" if side > 0 else "right", va="center")
    more = int((weights_of != 0).sum()) - len(order)
    if more:
        axis.text(0.5 + side * 0.075, 0.95 - 0.13 * len(order), f"and {more} more", fontsize=7, color="0.5",
                  ha="left" if side > 0 else "right", va="center")


def draw(figure, model, tokenizer, idx, found):
    tokens_in, tokens_out = model.transformer.wte.weight, model.lm_head.weight * model.transformer.ln_f.weight
    for i, (axis, nodes) in enumerate(zip(figure.subplots(len(found), 1), found, strict=True)):
        node = nodes.strongest()
        before = [(n, n.writes * n.size()) for n in found[:i]]
        after = [(n, n.reads.T) for n in found[i + 1:]]
        draw_side(axis, nodes.reads[node], lambda c, b=before: names(c, tokens_in, b, tokenizer), -1)
        draw_side(axis, nodes.writes[:, node], lambda c, a=after: names(c, tokens_out, a, tokenizer), 1)
        axis.plot([0.5], [0.69], "o", color="0.2", markersize=9)
        axis.set_title(f"{nodes.name}.{node}", fontsize=9.5, fontweight="bold")
        for line, (strength, left, token, right) in enumerate(snippets(nodes, node, idx, tokenizer)):
            y = 0.16 - 0.1 * line
            style = {"fontsize": 7.5, "family": "monospace", "va": "center", "parse_math": False}
            axis.text(0.5, y, left + " ", ha="right", **style)
            shown = axis.text(0.5, y, token, backgroundcolor="#ffe08a", **style)
            axis.annotate(f" {right}   ({strength:+.1f})", (1, 0.5), xycoords=shown, xytext=(3, 0),
                          textcoords="offset points", **style)
        axis.set(xlim=(0, 1), ylim=(-0.15, 1.05))
        axis.axis("off")


def main():
    configure(globals())
    sample.out_dir = out_dir
    model, tokenizer = sample.load_model()
    settings = train.load_checkpoint(os.path.join(out_dir, "ckpt.pt"))["settings"]
    data = train.load_data(os.path.join("data", settings["dataset"]), model.config.block_size)
    starts = np.linspace(0, len(data.val) - model.config.block_size, windows).astype(int)
    idx = torch.from_numpy(np.stack([data.val[s:s + model.config.block_size] for s in starts]).astype(np.int64))
    with torch.no_grad():
        found = measure(model.eval(), idx)
        figure = plt.figure(figsize=(13, 2.6 * len(found)), layout="constrained")
        draw(figure, model, tokenizer, idx, found)
    path = image or os.path.join(out_dir, "inside.png")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as e:
        fail(f"cannot write {path} ({e}): choose another --image")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
