"""A trained model with all that it takes to ask it something: its tokenizer, its data, its device.

    from circuits import load
    run = load("out/quickstart")
    logits, nodes = run.read("print('hello")     # of every token; "0.attn.attn_v" -> (tokens, channels)
    with run.frozen({"0.attn.attn_k": [97]}):    # at its mean over train
        without, _ = run.read("print('hello")

What cannot be opened is a `configurator.UserError`, one sentence, as in the scripts; what is asked of a
model and makes no sense is a ValueError. Nothing here needs torch.no_grad: the weights have no gradients.
"""
import functools
import hashlib
import json
import os
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

import configurator
import runs
from checkpoints import opened_beside
from circuits.nodes import Nodes, hooks, matrices, means_over, no_hooks, node_sites
from model import GPT, attention_weights
from tokenizer import load_tokenizer, one_token, spell, tokenizer_in

WINDOWS = 1024  # of train, for the means; of val, where a node is looked for
KINDS = ("mean", "read")  # of what `means_over` returns, in its order
ALIKE = 4  # of two places whose last tokens are the same, so many, one is shown


@dataclass
class Place:
    """A place of ordinary text: the tokens up to it as texts, a node's values there, and what comes next."""

    value: float  # of the node at the last of the tokens
    tokens: list
    values: list  # of the node at each of them
    next: str
    position: int  # of the last token, in the bin

    def __str__(self):
        return f"{self.value:+8.3f}  {''.join(self.tokens[-13:-1])}[{self.tokens[-1]}] -> {self.next}"


@dataclass(repr=False)
class Loaded:
    """What `load` returns. The model is in eval mode, on the device of `process`, and needs no gradient."""

    model: GPT
    tokenizer: tiktoken.Encoding
    data: runs.Data
    process: runs.Process
    path: str  # of the checkpoint
    sha256: str  # of the checkpoint
    step: int | None  # None: a released model does not say
    dataset: str
    weights: str = ""  # `digest_of` the model as it was loaded

    def __repr__(self):
        blocks, width = self.model.config.n_layer, self.model.config.d_model
        return f"<model of {self.path}: {blocks} blocks, d_model {width}, on {self.dataset}>"

    def other_data(self, name):
        """The runs.Data of data/NAME; ValueError if it was not prepared with the model's tokenizer."""
        data = runs.load_data(runs.data_folder(name), self.model.config.block_size)
        if data.meta["tokenizer_sha256"] != self.data.meta["tokenizer_sha256"]:
            own = tokenizer_in(runs.data_folder(self.dataset))
            raise ValueError(f"data/{name} has another tokenizer: prepare it with --tokenizer={own}")
        return data

    def encode(self, text):
        """The token ids of a text, a list that begins with <|endoftext|>, as in the tasks of templates."""
        return [self.tokenizer.eot_token, *self.tokenizer.encode(text, disallowed_special=())]

    def decode(self, ids):
        """The text of token ids, or of one."""
        try:
            return self.tokenizer.decode(integers(ids, "token ids"))
        except (KeyError, OverflowError) as e:
            raise ValueError(f"the tokenizer has no such token: {e}") from None

    def token(self, text):
        """The id of a text that is one token; ValueError, with the pieces, if it is more, or none."""
        return one_token(self.tokenizer, text)

    def batch(self, ids):
        """Token ids, or a text, as the model reads them: (1, T) on its device. ValueError if there is none,
        or one that the model does not have."""
        ids = self.encode(ids) if isinstance(ids, str) else integers(ids, "token ids")
        if not ids:
            raise ValueError("there are no token ids: give one or more, or a text")
        size = self.model.config.vocab_size
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise ValueError(f"the model has the tokens 0 to {size - 1}, not {wrong[0]}")
        return torch.tensor([ids], device=self.process.device)

    # ---- nodes

    def nodes(self, ablation="mean", windows=WINDOWS):
        """The nodes of the model, with their means over `windows` evenly spaced windows of train."""
        return Nodes(self.model, *self.means_over_train(windows), ablation)

    def evenly_spaced(self, split, windows):
        """So many windows of train or val: their starts (windows), and their tokens (windows, T)."""
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', not {split!r}")
        tokens, T = getattr(self.data, split), self.model.config.block_size
        starts = np.linspace(0, len(tokens) - T - 1, windows).astype(int)
        return starts, runs.windows(tokens, starts, T, self.process)[0]

    def means_over_train(self, windows=WINDOWS):
        """What `means_over` makes of windows of train, without hooks. It is kept beside the checkpoint, by
        whose sha256 it is named, and made anew if the weights or the text are others, as of a model that was
        changed."""
        _, idx = self.evenly_spaced("train", windows)
        weights = digest_of(self.model)
        made_of = weights + hashlib.sha256(idx.cpu().numpy().tobytes()).hexdigest()
        path = os.path.join(os.path.dirname(self.path), f"means-{self.sha256[:16]}-{windows}.npz")
        try:
            with np.load(path, allow_pickle=False) as saved:
                if saved["made_of"] == made_of:
                    return tuple({name.partition("/")[2]: torch.from_numpy(saved[name]).to(idx.device)
                                  for name in saved.files if name.startswith(f"{kind}/")}
                                 for kind in KINDS)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # there is none, or it is broken
        with no_hooks(self.model):  # as of `frozen`
            means = means_over(self.model, idx)
        if weights == self.weights:
            arrays = {f"{kind}/{name}": x.cpu().numpy() for kind, of in zip(KINDS, means, strict=True)
                      for name, x in of.items()}
            try:
                with opened_beside(path, "wb") as f:
                    np.savez(f, made_of=made_of, **arrays)
            except OSError:
                pass  # a folder that cannot be written to: they are made anew the next time
        return means

    @functools.cached_property
    def means(self):
        """The means over train that nodes are frozen at, site -> (channels)."""
        return self.means_over_train()[0]

    def check_nodes(self, site, *channels):
        """ValueError unless the model has these nodes."""
        if site not in self.means:
            raise ValueError(f"there is no site {site!r}: choose one of {', '.join(self.means)}")
        size = len(self.means[site])
        if wrong := [c for c in channels if not 0 <= c < size]:
            raise ValueError(f"{site} has the channels 0 to {size - 1}, not {wrong[0]}")

    def read(self, ids, gradients=False):
        """Logits (T, vocab_size) at all tokens of a text or of ids, and the nodes, site -> (T, channels).

        With `gradients` they are part of a graph, so that torch.autograd.grad of anything that is computed
        from the logits knows all nodes.
        """
        nodes = {}

        def keep(x, name):
            nodes[name] = x[0]
            return nodes[name][None]  # of which the logits are computed

        pairs = [(module, functools.partial(keep, name=name))
                 for name, module in node_sites(self.model).items()]
        if gradients:
            pairs.append((self.model.transformer.wte, lambda x: x.requires_grad_()))
        with hooks(pairs):
            logits, _ = self.model(self.batch(ids))
        return logits[0], nodes

    def attention(self, nodes, block=0):
        """What each token attends to in a block, (n_head, T, T), of nodes that `read` returned. What is left
        of 1 goes to the sink."""
        attn = self.model.transformer.h[block].attn
        q, k = (nodes[f"{block}.attn.attn_{x}"].unflatten(-1, (attn.n_head, -1)).transpose(0, 1)
                for x in "qk")
        return attention_weights(q[None], k[None], attn.sink_logit)[0]

    def attribution(self, ids, first, second):
        """How much each node makes a token likelier than another after a text or ids: site -> (channels).

        `first` and `second` are ids. It is an estimate of first order of how much their logits' difference
        is larger than with the node at its mean over train: the gradient times the node's difference from
        the mean, summed over the tokens. `frozen` tells what it really is.
        """
        with torch.enable_grad():
            logits, nodes = self.read(ids, gradients=True)
            [a, b] = self.batch([first, second])[0]
            gradients = torch.autograd.grad(logits[-1, a] - logits[-1, b], list(nodes.values()))
        return {site: ((x.detach() - self.means[site]) * g).sum(0)
                for (site, x), g in zip(nodes.items(), gradients, strict=True)}

    @contextmanager
    def frozen(self, nodes=None, at="mean", edges=()):
        """Meanwhile these nodes, site -> one channel or a list, are what `at` says, at all tokens.

        "mean": their means over train. "reversed": as far on the other side of these. Else a number, or a
        tensor that broadcasts to (T, channels). Of `edges`, each of (site read, channel, site written,
        channel), with the weight or without, what is written gets the mean of what is read, or zero if `at`
        is 0, in place of the value.
        Gradients flow: to `at`, to all nodes that are not frozen and, through reversed ones, to what they
        read.
        """
        if nodes is not None and not hasattr(nodes, "items"):
            raise ValueError(f"nodes must be a dict, site -> channels, not {configurator.shown(nodes)}")
        with ExitStack() as stack:
            for site, channels in (nodes or {}).items():
                channels = integers(channels, f"channels of {site}")
                self.check_nodes(site, *channels)
                freeze = self.freezer(site, channels, at)
                stack.enter_context(hooks([(node_sites(self.model)[site], freeze)]))
            if edges:
                stack.enter_context(self.without_edges(edges, at))
            yield

    def freezer(self, site, channels, at):
        """A hook that freezes channels of a site, as `frozen` says."""
        index = torch.as_tensor(channels, dtype=torch.long, device=self.process.device)
        mean = self.means[site][index]
        how = at if isinstance(at, str) else "value"
        try:
            given = torch.as_tensor(at, device=index.device) if how == "value" else mean
        except (TypeError, ValueError, RuntimeError):
            how = "nothing"
        if how not in ("mean", "reversed", "value"):
            raise ValueError(f"a node can be frozen at 'mean', 'reversed' or a number, not at {at!r}")
        if given.dim() > 2 or given.shape[-1:] not in ((), (1,), index.shape):
            raise ValueError(f"at has the shape {tuple(given.shape)}, which does not broadcast to (T, "
                             f"{len(index)}), tokens and channels of {site}")

        def freeze(x):
            if given.dim() == 2 and len(given) not in (1, x.size(-2)):
                raise ValueError(f"at is for {len(given)} tokens, and {x.size(-2)} are read")
            value = 2 * mean - x[..., index] if how == "reversed" else given
            return x.index_copy(-1, index, value.to(x.dtype).expand(*x.shape[:-1], len(index)))
        return freeze

    def without_edges(self, edges, at):
        """Hooks that remove edges, as `frozen` says."""
        if isinstance(at, torch.Tensor) or at not in ("mean", 0):
            raise ValueError(f"an edge can be frozen at 'mean' or 0, not at {at!r}")
        if wrong := [edge for edge in edges if type(edge) not in (tuple, list) or len(edge) not in (4, 5)]:
            raise ValueError(f"an edge is (site read, channel, site written, channel), not {wrong[0]!r}")
        edges = [tuple(edge[:4]) for edge in edges]
        weights = {(read, written): weight for read, written, weight, _ in matrices(self.model)}
        for a, i, b, o in edges:
            self.check_nodes(a, i)
            self.check_nodes(b, o)
            if (a, b) not in weights or weights[a, b][o, i] == 0:
                raise ValueError(f"there is no edge from {a} {i} to {b} {o}: no nonzero weight joins them")
        nodes = self.nodes("mean" if at == "mean" else "zero").with_edges(edges)
        gates = torch.ones(nodes.number, device=nodes.device)
        gates[nodes.nodes:] = 0
        return hooks(nodes.removals(gates), both=True)

    # ---- what a node says

    @torch.no_grad()
    def top_contexts(self, site, channel, n=5, quantile=1.0, split="val", windows=WINDOWS):
        """Up to n places of ordinary text, a list of `Place`, where the node's value is about at `quantile`.

        Quantile 1 is where it is largest, 0 where it is lowest; it counts the tokens where the value is not
        zero. No two places are of one window, or alike in their last tokens.
        """
        self.check_nodes(site, channel)
        starts, idx = self.evenly_spaced(split, windows)
        parts, size = [], 64
        with hooks([(node_sites(self.model)[site], lambda x: parts.append(x[..., channel].float()))]):
            for part in idx.split(size):
                self.model.residual_stream(part)
        values = torch.cat(parts).cpu().numpy()
        rows, columns = np.nonzero(values)
        order = np.argsort(values[rows, columns], kind="stable")
        order = order[np.argsort(np.abs(np.arange(len(order)) - quantile * (len(order) - 1)), kind="stable")]
        found, seen, text = [], set(), getattr(self.data, split)
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
            ids = idx[row, :column + 1].tolist()
            ending = tuple(ids[-ALIKE:])
            if {row, ending} & seen:
                continue
            seen |= {row, ending}
            tokens, position = [spell(self.tokenizer, i) for i in ids], int(starts[row] + column)
            found.append(Place(float(values[row, column]), tokens, values[row, :column + 1].tolist(),
                               spell(self.tokenizer, int(text[position + 1])), position))
            if len(found) == n:
                break
        return found

    @torch.no_grad()
    def direct_effect(self, site, channel, ids=None):
        """What a node adds to each token's logit directly: a list of (token, effect), the largest first.

        That is the way from the node to the stream and, past all later blocks, to the unembedding, at the
        scale that the last norm has. Of a text or of ids it is what the node, or what attention makes of the
        value, adds at the last token; else what one unit of it adds, at the scale of an average token of
        train. Only sites that write to the stream have such a way, else ValueError.
        """
        self.check_nodes(site, channel)
        model, location = self.model, site.split(".")[-1]
        if location not in ("attn_v", "attn_out", "mlp_neuron", "mlp_out"):
            raise ValueError(f"{site} does not write to the stream, as attn_v, attn_out, mlp_neuron and "
                             "mlp_out do")
        part = getattr(model.transformer.h[int(site.split(".")[0])], location.split("_")[0])
        out = part.attn_out if location.startswith("attn") else part.mlp_out
        is_out, seen = location.endswith("out"), {}
        with hooks([(part.c_proj, lambda x: seen.update(read=x[0, -1]))], before=True), \
                hooks([(out, lambda x: seen.update(written=x[0, -1]))]):
            x = model.residual_stream(self.evenly_spaced("train", 64)[1] if ids is None else self.batch(ids))
        direction = (torch.eye(x.size(-1), device=x.device) if is_out else part.c_proj.weight)[:, channel]
        if ids is not None:
            x, written = x[:, -1:], seen["written"]  # of which AbsTopK has dropped some
            direction = direction * (written[channel] if is_out else seen["read"][channel] * (written != 0))
        if not model.config.use_rms_norm:
            x, direction = x - x.mean(-1, keepdim=True), direction - direction.mean()
        scale = x.square().mean(-1).sqrt().mean()
        effects = model.lm_head.weight @ (model.transformer.ln_f.weight * direction / scale)
        return sorted(((self.tokenizer.decode([i]), effect) for i, effect in enumerate(effects.tolist())
                       if i < self.tokenizer.n_vocab), key=lambda pair: -pair[1])


def integers(values, what):
    """One integer or several, of a list, an array or a tensor, as a list; ValueError if they are none."""
    found = np.asarray(values.tolist() if isinstance(values, torch.Tensor) else values)
    if found.size and not np.issubdtype(found.dtype, np.integer) or found.shape[:-1] not in ((), (1,)):
        raise ValueError(f"{what} must be an integer or a list of them, not {configurator.shown(values)}")
    return found.flatten().tolist()


def digest_of(model):
    """The sha256 of what a model computes with: its configuration and its weights."""
    digest = hashlib.sha256(json.dumps(vars(model.config), sort_keys=True).encode())
    for name, t in model.state_dict().items():
        digest.update(name.encode() + t.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(out_dir, checkpoint="ckpt.pt", device="auto", dataset=""):
    """Open what train.py left in `out_dir`, a checkpoint, or a released model's folder, with its data.

    The data is that of the training, which a released model does not say, or another `dataset` of the same
    tokenizer: a folder of data/ here or in the repository. Raises UserError if one is missing or does not
    fit.
    """
    process, out_dir = runs.this_process(device, "float32"), os.path.expanduser(out_dir)
    places = [os.path.join(out_dir, name) for name in (checkpoint, "beeg_config.json")]
    if not (configurator.is_script or os.path.isfile(out_dir) or any(map(os.path.exists, places))):
        configurator.fail(f"no checkpoint at {places[0]}: give the folder of a run, a checkpoint, or a "
                          "released model's folder")
    saved, model, data = runs.load_run(out_dir, checkpoint, dataset)
    path, dataset = saved["path"], dataset or saved["settings"]["dataset"]
    sha256 = hashlib.sha256()
    for name in [path] + [os.path.join(os.path.dirname(path), "beeg_config.json")] * (saved["step"] is None):
        with open(name, "rb") as f:
            sha256.update(f.read())
    tokenizer = load_tokenizer(tokenizer_in(runs.data_folder(dataset)))
    model.to(process.device).requires_grad_(False)
    return Loaded(model, tokenizer, data, process, path, sha256.hexdigest(), saved["step"], dataset,
                  digest_of(model))
