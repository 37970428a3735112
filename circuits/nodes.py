"""The nodes of a model and the edges between them: reading, ablating and counting them.

A node is one channel at one of the eight sites of a block (Gao et al. 2025, section A.5). An edge is a
nonzero weight that joins two kept nodes. All of it goes through forward hooks on the modules of the model:
there is no forward pass here.
"""
import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from model import NODE_LOCATIONS, attention_weights


@dataclass
class Contexts:
    """Texts and the two tokens that may come next."""

    idx: torch.Tensor  # (n, T), filled up on the right where the texts differ in length
    last: torch.Tensor  # (n): where in it the last token is
    answers: torch.Tensor  # (n, 2): the right one, and the other
    positions: torch.Tensor | None = None  # (n): where in the bin the right one is; None for templates

    @classmethod
    def of(cls, texts, device="cpu"):
        """Those of a list of (ids, [right, other])."""
        longest = max(len(ids) for ids, _ in texts)
        parts = ([ids + [0] * (longest - len(ids)) for ids, _ in texts], [len(ids) - 1 for ids, _ in texts],
                 [list(answers) for _, answers in texts])
        return cls(*(torch.tensor(part, device=device) for part in parts))

    def __len__(self):
        return len(self.idx)

    def __getitem__(self, rows):
        positions = None if self.positions is None else self.positions[rows]
        return Contexts(self.idx[rows], self.last[rows], self.answers[rows], positions)

    def batches(self, size=None):
        size = size or (128 if self.idx.is_cpu else 512)  # what fits a cache, what keeps a GPU busy
        return (self[rows] for rows in torch.arange(len(self), device=self.idx.device).split(size))

    def last_tokens(self):
        return self.idx.gather(1, self.last[:, None])

    def sides(self):
        """1 where the right answer has the lower id of the two, else -1: (n)."""
        return (self.answers[:, 1] - self.answers[:, 0]).sign()

    def pairs(self):
        """How many different pairs of answers there are."""
        return len(self.answers.sort(1).values.unique(dim=0))

    def in_random_order(self, seed):
        """The same contexts, the tokens between the first and the last shuffled: the first of a prompt, the
        <|endoftext|>, would be strange elsewhere."""
        generator, idx = torch.Generator().manual_seed(seed), self.idx.clone()
        for row, last in zip(idx, self.last.tolist(), strict=True):
            order = 1 + torch.randperm(max(last - 1, 0), generator=generator)
            row[1:last] = row[order.to(row.device)]
        return replace(self, idx=idx)


def node_sites(model):
    """The modules whose outputs are nodes: name, such as 0.attn.attn_in -> module, in forward order."""
    names = {module: name.removeprefix("transformer.h.") for name, module in model.named_modules()}
    return {names[module]: module for location, module in model.sites() if location in NODE_LOCATIONS}


@contextmanager
def hooks(pairs, before=False, both=False):
    """For each (module, f) call f on its output, or its input, or both; use what it returns, if anything."""
    handles = [module.register_forward_pre_hook(lambda m, inputs, f=f: f(inputs[0])) if before else
               module.register_forward_hook(lambda m, inputs, output, f=f: f(inputs[0], output)) if both else
               module.register_forward_hook(lambda m, inputs, output, f=f: f(output)) for module, f in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def no_hooks(model):
    """Meanwhile no hook of the model acts, whoever set it."""
    there = [(of, dict(of)) for module in model.modules()
             for of in (module._forward_hooks, module._forward_pre_hooks) if of]
    for of, _ in there:
        of.clear()
    try:
        yield
    finally:
        for of, were in there:
            of.update(were)


@torch.no_grad()
def means_over(model, idx, size=64):
    """Means over all positions of idx (n, T), AbsTopK on: site -> (channels), and one more dict of the same.

    The first is of every node. The second is of what the Linears read whose input is no node itself: what
    attention makes of the values, by the site of the values.
    """
    sums, positions = {}, idx.numel()

    def add(name, x):
        sums[name] = sums.get(name, 0.0) + x.sum((0, 1), dtype=torch.float64)

    sites = node_sites(model)
    mixed = {f"{i}.attn.attn_v": block.attn.c_proj for i, block in enumerate(model.transformer.h)}
    with hooks([(module, lambda x, name=name: add(name, x)) for name, module in sites.items()]), \
            hooks([(linear, lambda x, name=name: add(("read", name), x)) for name, linear in mixed.items()],
                  before=True):
        for part in idx.split(size):
            model.residual_stream(part)
    return ({name: (sums[name] / positions).float() for name in sites},
            {name: (sums["read", name] / positions).float() for name in mixed})


class Nodes:
    """All nodes of a model, and the values that they have when ablated: their means, or zero.

    Gates are one vector (number): of the nodes, site after site in forward order, then of `edges`, a list of
    (site read, channel, site written, channel) that may be empty. For a node 1 keeps it and 0 ablates it; -1
    reverses it, so that it lies as far on the other side of its ablated value. For an edge 1 keeps it and 0
    removes it: what is written then gets the mean of what is read (or zero) in place of the value, times the
    same weight. That goes beyond the ablation of the node read only where this is a value: what attention
    makes of an ablated value varies with the attention to it.

    `means` has for each site the means of its nodes (channels), and `reads` for the site of the values those
    of what attention makes of them, both from `means_over`.
    """

    def __init__(self, model, means, reads, ablation="mean", edges=()):
        self.model, self.means, self.sites = model, means, node_sites(model)
        self.ablated, self.mean_reads = (
            {name: x if ablation == "mean" else torch.zeros_like(x) for name, x in values.items()}
            for values in (means, means | reads))
        self.sizes = [len(means[name]) for name in self.sites]
        self.nodes = sum(self.sizes)
        self.device = next(model.parameters()).device
        self.places = dict(zip(self.sites, np.cumsum([0, *self.sizes[:-1]]).tolist(), strict=True))
        self.folded = []  # (site, channel) of `with_value`
        self.set_edges(edges)

    def set_edges(self, edges):
        self.edges = [tuple(edge) for edge in edges]
        self.number = self.nodes + len(self.edges)
        self.ends = torch.tensor([(self.places[a] + i, self.places[b] + o) for a, i, b, o in self.edges],
                                 dtype=torch.long, device=self.device).view(-1, 2)
        self.by_linear = list(self.edges_by_linear())

    def with_edges(self, edges):
        """The same nodes, with gates for these edges."""
        other = copy.copy(self)
        other.set_edges(edges)
        return other

    def with_value(self, site, channel, value):
        """The same, but that this node is `value` when it is ablated."""
        other, values = copy.copy(self), self.ablated[site].clone()
        other.folded = [*self.folded, (site, channel)]
        values[channel] = value
        other.ablated = self.ablated | {site: values}
        return other

    def split(self, gates):
        """site -> (..., channels), views of gates (..., number)."""
        return dict(zip(self.sites, gates[..., :self.nodes].split(self.sizes, dim=-1), strict=True))

    def edges_in(self, gates):
        """The edges of a circuit: (site read, channel, site written, channel, weight) of each weight between
        two kept nodes, but for the removed ones."""
        kept, off = self.kept(gates), (gates[self.nodes:] == 0).nonzero()[:, 0].tolist()
        removed = {self.edges[i] for i in off}
        return [edge for edge in weights_between(self.model, kept) if edge[:4] not in removed]

    def edges_by_linear(self):
        """For each Linear with some of `edges`: it, the site it reads, and tensors: which edges these are,
        the columns and the rows of its weight that they touch, and where each is in the block of these."""
        for linear, read, rows in linears(self.model):
            mine = [e for e, edge in enumerate(self.edges) if edge[0] == read and edge[2] in rows]
            if mine:
                columns = torch.tensor([self.edges[e][1] for e in mine], device=self.device)
                written = torch.tensor([rows[self.edges[e][2]] + self.edges[e][3] for e in mine],
                                       device=self.device)
                ins, column = columns.unique(return_inverse=True)
                outs, row = written.unique(return_inverse=True)
                mine = torch.tensor(mine, device=self.device)
                yield linear, read, mine, ins, outs, row * len(ins) + column

    def joined(self, gates):
        """Of each of `edges`, whether both of its nodes are kept: bool (..., edges)."""
        return gates[..., self.ends].detach().ne(0).all(-1)

    def others(self, gates):
        """Gates that ablate the kept nodes of `gates` and keep all others, with all their weights."""
        rest = 1 - gates
        rest[..., self.nodes:] = 1
        return rest

    def cut(self, gates):
        """Those of `edges` that are removed, the node read being an ablated value and the other kept: with
        the kept nodes and `edges_in` they are all of a circuit."""
        ends = gates[self.ends] != 0
        off = (gates[self.nodes:] == 0) & ~ends[:, 0] & ends[:, 1]
        return [self.edges[e] for e in off.nonzero()[:, 0].tolist() if self.edges[e][0].endswith("attn_v")]

    def removals(self, gates):
        """For each Linear with some of `edges` a function of its input and output that removes these."""
        off, found = 1 - gates[..., self.nodes:], []
        for linear, read, mine, ins, outs, at in self.by_linear:
            lost = off.new_zeros(*off.shape[:-1], len(outs) * len(ins)).index_copy(-1, at, off[..., mine])
            lost = lost.unflatten(-1, (len(outs), len(ins))) * linear.weight[outs][:, ins]

            def remove(x, y, lost=lost, ins=ins, outs=outs, mean=self.mean_reads[read][ins]):
                x = (x[..., ins] - mean).unflatten(0, (*off.shape[:-1], -1))  # the same parts as in `logits`
                change = torch.einsum("...nti,...oi->...nto", x, lost).flatten(0, off.dim() - 1)
                return y.index_add(-1, outs, change, alpha=-1)
            found.append((linear, remove))
        return found

    def kept(self, gates):
        """site -> list of the channels whose gates are not 0, without the sites that have none."""
        kept = {name: part.nonzero()[:, 0].tolist() for name, part in self.split(gates).items()}
        return {name: channels for name, channels in kept.items() if channels}

    def kept_heads(self, gates):
        """The heads of which a query, key or value is kept: a sorted list of (block, head)."""
        d_head = self.model.config.d_head
        return sorted({(int(name.split(".")[0]), channel // d_head)
                       for name, channels in self.kept(gates).items() for channel in channels
                       if name.endswith(("attn_q", "attn_k", "attn_v"))})

    def logits(self, contexts, gates, **how):
        """Logits (n, 2) of the right answer and of the other when all nodes and edges pass their gates."""
        return self.next_logits(contexts, gates, **how).gather(1, contexts.answers)

    def next_logits(self, contexts, gates, watch=None, instead=None, known=None):
        """Logits (n, vocab_size) of what comes next when all nodes and edges pass their gates.

        Gates may also be m vectors (m, number), for m equal parts of the contexts, in order. `watch`, if
        given, is called with the name of each site and its gated nodes (n, T or 1, channels). `instead`, if
        given, has for each site such a tensor: what its nodes are when ablated, text by text.
        After its scores the last block matters at the last token alone, so all else is cut off there, before
        attention is projected and before the MLP. What they write is added to the stream of all tokens,
        of which only that of the last is right, and read. `known`, if given, is what these gates make of the
        contexts until there, from `until_read`: then the last block runs on the last tokens alone.
        """
        rows = torch.arange(len(contexts), device=self.device)
        parts, block = self.split(gates), self.model.transformer.h[-1]

        def gate(name):
            g = parts[name][..., None, None, :]  # alike for all texts of a part, and all positions
            ablated = (instead or self.ablated)[name]

            def pass_gate(x):
                x = x.unflatten(0, (*gates.shape[:-1], -1))
                x = (g * x + (1 - g) * ablated).flatten(0, gates.dim() - 1)
                if watch:
                    watch(name, x)
                return x
            return pass_gate

        def last_only(x):
            return x[rows, contexts.last].unsqueeze(1)

        with hooks([(module, gate(name)) for name, module in self.sites.items()]), \
                hooks(self.removals(gates) if self.edges else (), both=True):
            if known:
                stream, read = known
                with hooks([(block.attn.c_proj, lambda _: read)], before=True):
                    x = block(stream)
            else:
                with hooks([(block.attn.c_proj, last_only), (block.ln_2, last_only)], before=True):
                    x = last_only(self.model.residual_stream(contexts.idx))
        return self.model.unembed(x, contexts.last_tokens())[:, 0]

    @torch.no_grad()
    def until_read(self, contexts, gates):
        """What the last block gets and what its attention reads, at the last tokens: for each batch of
        contexts (n, 1, d_model) and (n, 1, n_head * d_head). They depend on no gate but those `is_early`."""
        block, found = self.model.transformer.h[-1], []
        for batch in contexts.batches():
            seen, last = [], (torch.arange(len(batch), device=self.device), batch.last)
            with hooks([(module, seen.append) for module in (block, block.attn.c_proj)], before=True):
                self.logits(batch, gates)
            found.append([x[last].unsqueeze(1) for x in seen])
        return found

    def is_early(self):
        """Of each gate, whether it acts before the last block's attention has read: bool (number)."""
        late = [f"{self.model.config.n_layer - 1}.{name}"
                for name in ("attn.attn_out", "mlp.mlp_in", "mlp.mlp_neuron", "mlp.mlp_out")]
        early = torch.tensor([True] * self.nodes + [edge[2] not in late for edge in self.edges])
        for name in late:
            self.split(early)[name][:] = False
        return early.to(self.device)

    @torch.no_grad()
    def judge(self, contexts, gates, known=None):
        """`logits` for many contexts, without gradients. `known`, if given, is from `until_read`."""
        batches = [*contexts.batches()]
        return torch.cat([self.logits(batch, gates, known=of_batch) for batch, of_batch in zip(
            batches, known or [None] * len(batches), strict=True)])

    @torch.no_grad()
    def attention(self, contexts, gates, block):
        """What the last tokens attend to in a block, (n, n_head, T). What is left of 1 goes to the sink."""
        attn, parts = self.model.transformer.h[block].attn, []
        for batch in contexts.batches(16):
            seen = {}
            self.logits(batch, gates, watch=seen.__setitem__)
            n, T = batch.idx.shape
            q, k = (seen[f"{block}.attn.attn_{part}"].view(n, T, attn.n_head, attn.d_head).transpose(1, 2)
                    for part in "qk")
            weights = attention_weights(q, k, attn.sink_logit)
            parts.append(weights[torch.arange(n, device=self.device), :, batch.last])
        return torch.cat(parts)

    @torch.no_grad()
    def activations(self, contexts, gates):
        """site -> gated nodes (tokens, channels): of all tokens, or the last where the rest is cut off."""
        found = {name: [] for name in self.sites}
        for batch in contexts.batches():
            def keep(name, x, batch=batch):
                real = torch.arange(x.size(1), device=x.device) <= batch.last[:, None]
                found[name].append(x[real])
            self.logits(batch, gates, watch=keep)
        return {name: torch.cat(x) for name, x in found.items()}


def linears(model):
    """The Linears that join nodes: (Linear, site read, {site written: its first row})."""
    for i, block in enumerate(model.transformer.h):
        width = block.attn.n_head * block.attn.d_head
        thirds = {f"{i}.attn.attn_{name}": third * width for third, name in enumerate("qkv")}
        yield block.attn.c_attn, f"{i}.attn.attn_in", thirds
        yield block.attn.c_proj, f"{i}.attn.attn_v", {f"{i}.attn.attn_out": 0}
        yield block.mlp.c_fc, f"{i}.mlp.mlp_in", {f"{i}.mlp.mlp_neuron": 0}
        yield block.mlp.c_proj, f"{i}.mlp.mlp_neuron", {f"{i}.mlp.mlp_out": 0}


def matrices(model):
    """What joins two nodes: (site read, site written, weight (written, read), bias (written) or None)."""
    for linear, read, rows in linears(model):
        biases = [None] * len(rows) if linear.bias is None else linear.bias.chunk(len(rows))
        for written, weight, bias in zip(rows, linear.weight.chunk(len(rows)), biases, strict=True):
            yield read, written, weight, bias


def weights_between(model, kept):
    """The nonzero weights between nodes, site -> channels: (site read, channel, site written, channel,
    weight)."""
    found = []
    for read, written, weight, _ in matrices(model):
        outs, ins = kept.get(written, []), kept.get(read, [])
        part = weight[outs][:, ins]
        found += [(read, ins[i], written, outs[o], part[o, i].item()) for o, i in part.nonzero().tolist()]
    return found


def count(nodes, gates):
    """A dict: nodes; edges, the nonzero weights between two of them, but for the removed ones; weights, with
    those; and, apart from these, their biases and the weights of the embedding and unembedding at the
    channels that they read and write."""
    kept = {name: part != 0 for name, part in nodes.split(gates).items()}
    number = {"nodes": int(gates[:nodes.nodes].count_nonzero()), "edges": 0, "weights": 0, "biases": 0}
    for read, written, weight, bias in matrices(nodes.model):
        number["weights"] += int(weight[kept[written]][:, kept[read]].count_nonzero())
        number["biases"] += 0 if bias is None else int(bias[kept[written]].count_nonzero())
    removed = (gates[nodes.nodes:nodes.number] == 0) & nodes.joined(gates)
    number["edges"] = number["weights"] - int(removed.sum())
    for key, weight, end in (("embedding", nodes.model.transformer.wte.weight, "_in"),
                             ("unembedding", nodes.model.lm_head.weight, "_out")):
        channels = torch.stack([k for name, k in kept.items() if name.endswith(end)]).any(0)
        number[key] = int(weight[:, channels].count_nonzero())
    return number


def survival(nodes, contexts, gates):
    """site -> (channels): 1 - var(inside - whole) / var(whole) of each node on these contexts.

    1 if the circuit makes of a node what the whole model makes of it, less than 0 if something else; NaN if
    it never varies.
    """
    whole, inside = (nodes.activations(contexts, g) for g in (torch.ones_like(gates), gates))
    return {name: 1 - (inside[name] - x).var(0) / x.var(0) for name, x in whole.items()}
