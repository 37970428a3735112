"""A weight-sparse GPT, after Gao et al. 2025, "Weight-sparse transformers have interpretable circuits"
(arXiv 2511.13653).

The architecture is GPT-2's with six changes: RMSNorm, AbsTopK at the paper's node sites, an attention sink
in every head, a dense bigram table beside the unembedding, an unembedding of its own, and no positional
embedding. What makes the weights sparse is not in the forward pass: train.py calls `GPT.prune_` after every
update. The definitions come first, then the configuration, then the modules that are built of them, from the
leaves to the root. A definition begins by asking kernels.py for the same, faster: to change one, delete
these lines, or train with --fast_kernels=False; otherwise the change does nothing.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernels

# ----------------------------------------------------------------------------------------------------------
# the definitions: what is kept of activations and of weights, attention with a sink


def largest(x, k):
    """Mask, bool, of the k largest entries of x (..., n) along the last dimension.

    Exactly k are chosen, among equals the lower index first: bfloat16 and ReLU make many equals.
    """
    order = x.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order[..., :k], True)


def abs_topk(x, k):
    """Keep the k entries of x (..., n) of largest magnitude along the last dimension, and zero the rest.

    Gradient flows to the kept entries alone (section 2.1). Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= x.size(-1):
        raise ValueError(f"abs_topk keeps between 1 and {x.size(-1)} entries here, not {k}")
    if kernels.can_abs_topk(x):  # the same entries, sooner
        return kernels.abs_topk(x, k)
    return torch.where(largest(x.detach().abs(), k), x, 0.0)


def attention_weights(q, k, sink_logit):
    """What the queries attend to (B, n_head, T, S), causally; one key more, the sink, takes its share.

    With scores s and sink logit b the weights are exp(s) / (exp(b) + sum exp(s)): a head may attend to
    nothing. q: (B, n_head, T, d_head), of the last T positions; k: (B, n_head, S, d_head).
    """
    T, S = q.size(2), k.size(2)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    scores = scores.masked_fill(future, -torch.inf)
    sink = sink_logit.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([sink, scores], dim=-1).softmax(dim=-1)[..., 1:]


def sink_attention(q, k, v, sink_logit, dropout_p):
    """What each head reads of the values v (B, n_head, S, d_head): (B, n_head, T, d_head)."""
    if kernels.can_sink_attention(q, k, dropout_p):  # the same up to rounding, without the (T, S) weights
        return kernels.sink_attention(q, k, v, sink_logit, dropout_p)
    return F.dropout(attention_weights(q, k, sink_logit), dropout_p) @ v


def weight_score(p):
    """What ranks the weights of p, by magnitude: finite numbers. In training p.grad is the normalized
    gradient, which is not finite after an overflow in float16."""
    return p


def keep_survivors_(tensors, score):
    """Zero, in place, all but the k entries of largest |score| in each of `tensors`: (p, k, j, neuron_dim).

    The j entries of largest score of each neuron of p are among the survivors whatever their rank. Neurons
    are the rows of a matrix p if neuron_dim is 0, its columns if 1; a tensor without neurons has j = 0.
    """
    if kernels.can_keep_survivors(tensors):  # the same survivors, sooner
        return kernels.keep_survivors_(tensors, score)
    for p, k, j, neuron_dim in tensors:
        scores = score(p).abs()
        if j:  # with the neurons as rows, and back
            floor = largest(scores.transpose(neuron_dim, 0), j).transpose(0, neuron_dim)
            scores = scores.masked_fill(floor, torch.inf)
        p.masked_fill_(~largest(scores.flatten(), k).view_as(p), 0.0)


# ----------------------------------------------------------------------------------------------------------
# the modules and their configuration. No forward asks the configuration: in the place of a module that is
# switched off stands one that changes nothing, in the place of a parameter a constant that changes nothing

# where AbsTopK may sit. A new site is named here, and made and called in the module that it belongs to
NODE_LOCATIONS = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
LOCATIONS = (*NODE_LOCATIONS, "resid_post_attn", "resid_post_mlp")  # the paper's nodes, and the stream


@dataclass
class GPTConfig:
    """Architecture of a GPT. Raises ValueError, in one sentence, on what cannot be built."""

    n_layer: int = 8
    d_model: int = 1024  # width of the residual stream
    d_head: int = 16  # the paper finds small heads the easiest to read
    d_mlp: int = 0  # 0: 4 * d_model
    block_size: int = 256  # longest context, in tokens
    residual_activation: str = "identity"  # or "relu": applied to the residual stream after each sub-block
    activation: str = "gelu"  # the exact one, or "relu"
    use_rms_norm: bool = True  # False: LayerNorm
    use_bias: bool = True  # in the four Linears of a block; the unembedding never has one
    tie_embeddings: bool = False  # one matrix for embedding and unembedding
    use_positional_embeddings: bool = False  # True: learned, absolute, added to the token embedding
    use_bigram_table: bool = True  # dense vocab_size x vocab_size logits beside the unembedding
    use_attention_sinks: bool = True  # one learnable logit per head that attends to nothing
    dropout: float = 0.0
    activation_topk_fraction: float = 0.25  # AbsTopK keeps int(fraction * dim) entries; 1.0 switches it off
    activation_sparsity_locations: str = ",".join(NODE_LOCATIONS)  # any of LOCATIONS, by commas
    vocab_size: int = 2048
    n_head: int = 0  # 0: d_model / d_head, which must divide

    def __post_init__(self):
        for name in ("n_layer", "d_model", "d_head", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, value, legal in (
            ("activation", self.activation, ("gelu", "relu")),
            ("residual_activation", self.residual_activation, ("identity", "relu")),
            *(("activation_sparsity_locations", location, LOCATIONS) for location in self.locations),
        ):
            if value not in legal:
                raise ValueError(f"{name}: {value!r} does not exist, choose from {', '.join(legal)}")
        if self.n_head < 0 or self.d_mlp < 0:
            raise ValueError(f"n_head={self.n_head} and d_mlp={self.d_mlp} must not be negative")
        if not self.n_head and self.d_model % self.d_head:
            raise ValueError(f"d_model={self.d_model} is not divisible by d_head={self.d_head}: change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")
        self.n_head = self.n_head or self.d_model // self.d_head
        self.d_mlp = self.d_mlp or 4 * self.d_model
        smallest = min(self.d_model, self.n_head * self.d_head, self.d_mlp)
        if not 1 <= self.activation_topk_fraction * smallest <= smallest:
            raise ValueError(f"activation_topk_fraction={self.activation_topk_fraction} must be at most 1; "
                             f"to keep one of {smallest} entries, {math.ceil(1e6 / smallest) / 1e6} or more")

    @property
    def locations(self):
        return [name.strip() for name in self.activation_sparsity_locations.split(",") if name.strip()]


class AbsTopK(nn.Module):
    """`abs_topk` as a module, so that a forward hook can read or replace the nodes that it makes."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        return abs_topk(x, self.k)


def site(config, location, dim):
    """The module at a site: AbsTopK over `dim` entries, or an identity if it is switched off there."""
    k = int(config.activation_topk_fraction * dim)
    return AbsTopK(k) if location in config.locations and k < dim else nn.Identity()


class KVCache:
    """Keys and values of the positions an attention layer has seen: allocated at the first, then filled."""

    def __init__(self, block_size):
        self.block_size, self.length = block_size, 0

    def extend(self, k, v):
        """Append k, v (B, n_head, T, d_head); return all that are held, the new ones last."""
        if self.length == 0:
            self.k, self.v = k.new_empty(2, *k.shape[:2], self.block_size, k.size(3))
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.d_head = config.n_head, config.d_head
        width = config.n_head * config.d_head
        self.attn_in = site(config, "attn_in", config.d_model)
        self.c_attn = nn.Linear(config.d_model, 3 * width, bias=config.use_bias)  # q, k, v, in this order
        self.attn_q = site(config, "attn_q", width)  # AbsTopK among the channels of all heads together
        self.attn_k = site(config, "attn_k", width)
        self.attn_v = site(config, "attn_v", width)
        if config.use_attention_sinks:
            self.sink_logit = nn.Parameter(torch.zeros(config.n_head))
        else:  # exp(-inf) = 0: nothing goes to the sink
            self.register_buffer("sink_logit", torch.full((config.n_head,), -torch.inf), persistent=False)
        self.c_proj = nn.Linear(width, config.d_model, bias=config.use_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.attn_out = site(config, "attn_out", config.d_model)

    def forward(self, x, cache=None):
        B, T, _ = x.shape
        q, k, v = self.c_attn(self.attn_in(x)).chunk(3, dim=-1)
        q, k, v = self.attn_q(q), self.attn_k(k), self.attn_v(v)
        q, k, v = (t.view(B, T, self.n_head, self.d_head).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.extend(k, v)
        y = sink_attention(q, k, v, self.sink_logit, self.dropout.p if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.d_head)
        return self.attn_out(self.dropout(self.c_proj(y)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp_in = site(config, "mlp_in", config.d_model)
        self.c_fc = nn.Linear(config.d_model, config.d_mlp, bias=config.use_bias)
        self.activation = {"gelu": nn.GELU(), "relu": nn.ReLU()}[config.activation]
        self.mlp_neuron = site(config, "mlp_neuron", config.d_mlp)
        self.c_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.use_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp_out = site(config, "mlp_out", config.d_model)

    def forward(self, x):
        x = self.mlp_neuron(self.activation(self.c_fc(self.mlp_in(x))))
        return self.mlp_out(self.dropout(self.c_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = nn.RMSNorm if config.use_rms_norm else nn.LayerNorm
        self.ln_1 = norm(config.d_model)
        self.attn = CausalSelfAttention(config)
        self.resid_post_attn = site(config, "resid_post_attn", config.d_model)
        self.ln_2 = norm(config.d_model)
        self.mlp = MLP(config)
        self.resid_post_mlp = site(config, "resid_post_mlp", config.d_model)
        self.residual_activation = {"identity": nn.Identity(), "relu": nn.ReLU()}[config.residual_activation]

    def forward(self, x, cache=None):
        x = self.resid_post_attn(self.residual_activation(x + self.attn(self.ln_1(x), cache)))
        return self.resid_post_mlp(self.residual_activation(x + self.mlp(self.ln_2(x))))


class NoPositions(nn.Module):
    """A positional embedding that is switched off: it has no parameter and adds nothing."""

    def forward(self, positions):
        return 0.0


def draw(logits, temperature, top_k):
    """One token id for each row of logits (B, vocab_size): (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


PRUNED = {  # module -> the dimension of its weight along which its neurons lie: each keeps a minimum (2.1)
    "wte": None, "wpe": None, "lm_head": None,  # embedding, positions, unembedding: no neurons
    "c_attn": 0,  # a row reads the stream for one channel of q, k or v
    "c_fc": 0,  # a row reads the stream for one MLP neuron
    "c_proj": 1,  # a column is what one channel of a head, or one MLP neuron, writes to the stream
}
DENSE = {"ln_1", "ln_2", "ln_f",  # gains, and LayerNorm's biases: one number a channel
         "sink_logit", "bigram_table"}  # one number a head; logits that need no circuit


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        norm = nn.RMSNorm if config.use_rms_norm else nn.LayerNorm
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.d_model),
            "wpe": (nn.Embedding(config.block_size, config.d_model) if config.use_positional_embeddings
                    else NoPositions()),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": norm(config.d_model),
        })
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        if config.use_bigram_table:
            self.bigram_table = nn.Parameter(torch.empty(config.vocab_size, config.vocab_size))
        else:  # a single column of zeros, which is added to all logits alike
            self.register_buffer("bigram_table", torch.zeros(config.vocab_size, 1), persistent=False)
        self.initialize_()

    @torch.no_grad()
    def initialize_(self):
        """Draw all weights afresh. Norm gains stay 1, biases and sink logits 0."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # as in GPT-2: the stream's variance does not grow with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name == "bigram_table":
                nn.init.uniform_(p, 0.0, 0.02)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    # ---- forward

    def forward(self, idx, targets=None):
        """Logits of the next token at all positions (B, T, vocab_size), and the loss or None.

        idx, targets: (B, T) token ids, T <= block_size (else ValueError). The loss is the mean
        cross-entropy in nats over the targets that are not -1, in float32 whatever autocast says.
        """
        logits = self.unembed(self.residual_stream(idx), idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def residual_stream(self, idx, caches=None):
        """The residual stream after the last block (B, T, d_model).

        With `caches`, one for each block, idx continues what they hold.
        """
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the block_size of {self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer, strict=True):
            x = block(x, cache)
        return x

    def unembed(self, x, idx):
        """Logits (B, T, vocab_size) in float32, of residual stream x (B, T, d_model) and tokens idx."""
        logits = self.lm_head(self.transformer.ln_f(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits + F.embedding(idx, self.bigram_table)  # the row of the current token

    def sites(self):
        """All sites, on or off: a list of (location, module), the module's output being the nodes."""
        return [(where, module) for name, module in self.named_modules()
                if (where := name.split(".")[-1]) in LOCATIONS]

    # ---- what is pruned, and how (section 2.1)

    def sparse_parameters(self):
        """All that `prune_` prunes: a list of (name, parameter, neuron_dim or None)."""
        found = []
        for name, p in self.named_parameters():
            *words, kind = name.split(".")
            part = words[-1] if kind in ("weight", "bias") else kind  # the module, or a parameter on its own
            if part in PRUNED:
                found.append((name, p, PRUNED[part] if kind == "weight" else None))
            else:
                assert part in DENSE, f"say in PRUNED or DENSE whether {name} is pruned"
        return found

    def decayed_parameters(self):
        """The parameters that decay: all matrices but the bigram table."""
        return [p for _, p, _ in self.sparse_parameters() if p.ndim == 2]

    def smallest_l0(self, min_weights_per_neuron=4):
        """The smallest fraction of nonzeros to give every neuron its minimum and leave no matrix empty."""
        smallest = 0.0
        for _, p, neuron_dim in self.sparse_parameters():
            if p.ndim == 2:
                n, neurons = p.numel(), 0 if neuron_dim is None else p.size(neuron_dim)
                least = max(1, min(neurons * min_weights_per_neuron, n))
                fits = least / n if int(least / n * n) == least else math.nextafter(least / n, 1)  # rounded
                smallest = max(smallest, fits)
        return smallest

    @torch.no_grad()
    def prune_(self, l0_fraction, min_weights_per_neuron=4, sparsify_biases=True):
        """Zero all but the k = int(l0_fraction * numel) entries of largest score in every matrix, in place.

        The `min_weights_per_neuron` largest of each neuron are among the k whatever their rank. Biases keep
        max(1, k), or all without `sparsify_biases`. Raises ValueError if the neurons' minimum does not fit.
        """
        tensors = []
        for name, p, neuron_dim in self.sparse_parameters():
            k = int(l0_fraction * p.numel())
            if p.ndim == 1:
                k = max(1, k) if sparsify_biases else p.numel()
            j = 0 if neuron_dim is None else min(min_weights_per_neuron, p.size(1 - neuron_dim))
            if j and j * p.size(neuron_dim) > k:
                raise ValueError(f"an L0 fraction of {l0_fraction:.6g} leaves {name} {k} weights, fewer "
                                 f"than {j} for each of its {p.size(neuron_dim)} neurons")
            if k < p.numel():
                tensors.append((p, k, j, neuron_dim))
        keep_survivors_(tensors, weight_score)

    # ---- sampling

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T >= 1) by `max_new_tokens`, yielding each token (B, 1) as soon as it is drawn.

        Temperature 0 takes the likeliest token, top_k draws among the k likeliest. Keys and values are
        cached while the text fits block_size; past that the window slides and is read anew for each token.
        """
        was_training = self.training
        self.eval()
        try:
            caches = None
            for _ in range(max_new_tokens):
                with torch.inference_mode():  # a fifth faster than no_grad at one token a time
                    if caches is None or caches[0].length == self.config.block_size:
                        caches = [KVCache(self.config.block_size) for _ in self.transformer.h]
                        unread = idx[:, -self.config.block_size:]
                    x = self.residual_stream(unread, caches)
                    token = unread = draw(self.unembed(x[:, -1:], idx[:, -1:])[:, -1], temperature, top_k)
                    idx = torch.cat([idx, token], dim=1)
                yield token.clone()  # what is made in inference mode cannot be trained on; its clone can
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) and its continuation, (B, T + max_new_tokens); see `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)
