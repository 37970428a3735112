"""The nodes of a model: reading them, ablating them, and counting what joins them.

A node is one channel at one of the eight sites of a block (Gao et al. 2025, section A.5). All of it goes
through forward hooks on the modules that `GPT.sites` lists: there is no forward pass here.
"""
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model import NODE_LOCATIONS, attention_weights


@dataclass
class Contexts:
    """Texts and the two tokens that may come next."""

    idx: torch.Tensor  # (n, T), filled up on the right where the texts differ in length
    last: torch.Tensor  # (n): where in it the last token is
    answers: torch.Tensor  # (n, 2): the right one, and the other
    positions: torch.Tensor | None = None  # (n): where in the bin the right one is; None for templates

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

    def in_random_order(self, seed):
        """The same contexts, the tokens before the last shuffled."""
        generator, idx = torch.Generator().manual_seed(seed), self.idx.clone()
        for row, last in zip(idx, self.last.tolist(), strict=True):
            row[:last] = row[torch.randperm(last, generator=generator).to(row.device)]
        return replace(self, idx=idx)


def node_sites(model):
    """The modules whose outputs are nodes: name, such as 0.attn.attn_in -> module, in forward order."""
    names = {module: name.removeprefix("transformer.h.") for name, module in model.named_modules()}
    return {names[module]: module for location, module in model.sites() if location in NODE_LOCATIONS}


@contextmanager
def hooks(pairs, before=False):
    """For each (module, f) call f on its output, or its input, and use what it returns, if anything."""
    handles = [module.register_forward_pre_hook(lambda m, inputs, f=f: f(inputs[0])) if before else
               module.register_forward_hook(lambda m, inputs, output, f=f: f(output)) for module, f in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def means_over(model, idx, size=64):
    """Mean of every node over all positions of idx (n, T), AbsTopK on: site -> (channels)."""
    sums = {}

    def add(name, x):
        sums[name] = sums.get(name, 0.0) + x.sum((0, 1), dtype=torch.float64)

    with hooks([(module, lambda x, name=name: add(name, x)) for name, module in node_sites(model).items()]):
        for part in idx.split(size):
            model.residual_stream(part)
    return {name: (total / idx.numel()).float() for name, total in sums.items()}


class Nodes:
    """All nodes of a model, and the values that they have when ablated: their means, or zero.

    Gates are one vector (nodes), site after site in forward order. 1 keeps a node and 0 ablates it; -1
    reverses it, so that it lies as far on the other side of its ablated value.
    """

    def __init__(self, model, means, ablation="mean"):
        self.model, self.means, self.sites = model, means, node_sites(model)
        self.ablated = {name: mean if ablation == "mean" else torch.zeros_like(mean)
                        for name, mean in means.items()}
        self.sizes = [len(means[name]) for name in self.sites]
        self.number = sum(self.sizes)
        self.device = next(model.parameters()).device

    def split(self, gates):
        """site -> (..., channels), views of gates (..., nodes)."""
        return dict(zip(self.sites, gates.split(self.sizes, dim=-1), strict=True))

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

    def logits(self, contexts, gates, watch=None):
        """Logits (n, 2) of the right answer and of the other when all nodes pass their gates.

        Gates may also be m vectors (m, nodes), for m equal parts of the contexts, in order. `watch`, if
        given, is called with the name of each site and its gated nodes (n, T or 1, channels).
        After its scores the last block matters at the last token alone, so all else is cut off there, before
        attention is projected and before the MLP. What they write is added to the stream of all tokens,
        of which only that of the last is right, and read.
        """
        rows = torch.arange(len(contexts), device=self.device)
        parts, block = self.split(gates), self.model.transformer.h[-1]

        def gate(name):
            g = parts[name][..., None, None, :]  # alike for all texts of a part, and all positions

            def pass_gate(x):
                x = x.unflatten(0, (*gates.shape[:-1], -1))
                x = (g * x + (1 - g) * self.ablated[name]).flatten(0, gates.dim() - 1)
                if watch:
                    watch(name, x)
                return x
            return pass_gate

        def last_only(x):
            return x[rows, contexts.last].unsqueeze(1)

        with hooks([(module, gate(name)) for name, module in self.sites.items()]), \
                hooks([(block.attn.c_proj, last_only), (block.ln_2, last_only)], before=True):
            x = last_only(self.model.residual_stream(contexts.idx))
        return self.model.unembed(x, contexts.last_tokens())[:, 0].gather(1, contexts.answers)

    @torch.no_grad()
    def judge(self, contexts, gates):
        """The same for many contexts, without gradients."""
        return torch.cat([self.logits(batch, gates) for batch in contexts.batches()])

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


def matrices(model):
    """What joins two nodes: (site read, site written, weight (written, read), bias (written) or None)."""
    for i, block in enumerate(model.transformer.h):
        attn, mlp = block.attn, block.mlp
        weights = attn.c_attn.weight.chunk(3)
        biases = [None] * 3 if attn.c_attn.bias is None else attn.c_attn.bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            yield f"{i}.attn.attn_in", f"{i}.attn.attn_{name}", weight, bias
        yield f"{i}.attn.attn_v", f"{i}.attn.attn_out", attn.c_proj.weight, attn.c_proj.bias
        yield f"{i}.mlp.mlp_in", f"{i}.mlp.mlp_neuron", mlp.c_fc.weight, mlp.c_fc.bias
        yield f"{i}.mlp.mlp_neuron", f"{i}.mlp.mlp_out", mlp.c_proj.weight, mlp.c_proj.bias


def count(nodes, gates):
    """A dict: nodes; edges, the nonzero weights between two of them; and, apart from these, their biases and
    the weights of the embedding and unembedding at the channels that they read and write."""
    kept = {name: part != 0 for name, part in nodes.split(gates).items()}
    number = {"nodes": int(gates.count_nonzero()), "edges": 0, "biases": 0}
    for read, written, weight, bias in matrices(nodes.model):
        number["edges"] += int(weight[kept[written]][:, kept[read]].count_nonzero())
        number["biases"] += 0 if bias is None else int(bias[kept[written]].count_nonzero())
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


def loss_of(logits):
    """Cross-entropy between two answers, logits (n, 2), the right one's first: (n)."""
    return F.softplus(logits[:, 1] - logits[:, 0])
