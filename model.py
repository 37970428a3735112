"""A weight-sparse GPT, after Gao et al. 2025, "Weight-sparse transformers have interpretable circuits"
(arXiv 2511.13653).

The architecture is GPT-2's with six changes: RMSNorm, AbsTopK at the paper's node sites, an attention sink
in every head, a dense bigram table beside the unembedding, an unembedding of its own, and no positional
embedding. What makes the model weight-sparse is not in the forward pass: train.py calls `GPT.prune_` after
every optimizer step.

Read from the top: each part is built from those above it. The format of the released models comes last.
"""
import importlib.util
import json
import math
import os
import shutil
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------
# the k largest: what activations and weights are both sparsified by

SAME_SIZE_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes


def largest_by_topk(x, k):
    """Mask, bool (..., n), of the k >= 1 entries of x (..., n) of largest magnitude in the last dimension.

    Exactly k entries are kept, the lower index first among equals: bfloat16 and ReLU make many.
    """
    integer = SAME_SIZE_INT[x.itemsize]
    bits = x.view(integer) & torch.iinfo(integer).max  # |x|: as integers they keep their order
    kth = bits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = bits > kth, bits == kth
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True)))


def largest_by_partition(bits, k):
    """The same of numpy's `bits` (rows, n), magnitudes as integers: on a CPU far faster than torch.topk."""
    n = bits.shape[1]
    kth = np.partition(bits, n - k, axis=1)[:, n - k, None]
    mask = bits >= kth
    if np.count_nonzero(mask) > k * len(bits):  # equals
        above, equal = bits > kth, bits == kth
        room = k - np.count_nonzero(above, axis=1, keepdims=True)
        mask = above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= room))
    return mask


def start_workers():
    """Threads for numpy, which keeps to the one it is called in. They do not survive a fork."""
    global workers
    workers = ThreadPoolExecutor(torch.get_num_threads())


start_workers()
os.register_at_fork(after_in_child=start_workers)


def over_rows(f, x):
    """Call f(slice) for slices of the rows of x (rows, n), on all cores if there is enough to do."""
    share = -(-len(x) // torch.get_num_threads())
    size = max(1, 2**16 // x.shape[1], min(share, 2**18 // x.shape[1]))
    slices = [slice(start, start + size) for start in range(0, len(x), size)]
    list(workers.map(f, slices) if len(slices) > 1 else map(f, slices))


# `abs_topk` is an operator of our own, into which torch.compile does not look. On a CPU so is its gradient:
# the code that the compiler makes for bool masks there is slow.


@torch.library.custom_op("weight_sparse::keep_largest", mutates_args=(), device_types="cpu")
def keep_largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., n), contiguous, with all but the k largest entries of each row zeroed, and their mask."""
    x_np = x.view(SAME_SIZE_INT[x.itemsize]).view(-1, x.size(-1)).numpy()
    kept, mask = np.empty_like(x_np), np.empty(x_np.shape, bool)

    def keep(rows):
        mask[rows] = largest_by_partition(x_np[rows] & np.iinfo(x_np.dtype).max, k)
        np.multiply(x_np[rows], mask[rows], out=kept[rows])

    over_rows(keep, x_np)
    return torch.from_numpy(kept).view(x.dtype).view(x.shape), torch.from_numpy(mask).view(x.shape)


@torch.library.custom_op("weight_sparse::zero_where_not", mutates_args=(), device_types="cpu")
def zero_where_not(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x, contiguous, with zeros where `mask`, bool of the same shape, is false."""
    x_np = x.view(SAME_SIZE_INT[x.itemsize]).view(-1, x.size(-1)).numpy()
    mask, kept = mask.view(x_np.shape).numpy(), np.empty_like(x_np)
    over_rows(lambda rows: np.multiply(x_np[rows], mask[rows], out=kept[rows]), x_np)
    return torch.from_numpy(kept).view(x.dtype).view(x.shape)


keep_largest.register_fake(lambda x, k: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)))
zero_where_not.register_fake(lambda mask, x: torch.empty_like(x))


def has_compiler(device_type):
    """Whether there is what torch.compile and Triton need: a compiler for the device, and Python.h."""
    compiler = os.environ.get("CXX", "g++") if device_type == "cpu" else os.environ.get("CC", "gcc")
    return bool(shutil.which(compiler)) and os.path.exists(
        os.path.join(sysconfig.get_path("include"), "Python.h"))


HAS_TRITON = has_compiler("cuda") and importlib.util.find_spec("triton") is not None


@keep_largest.register_kernel("cuda")
def keep_largest_on_gpu(x, k):
    if not HAS_TRITON:
        mask = largest_by_topk(x, k)
        return torch.where(mask, x, 0.0), mask
    import kernels

    with torch.cuda.device_of(x):
        return kernels.keep_largest(x, k)


def gradient_of_keep_largest(ctx, dy, _):
    """Zero where the output was made zero. On a GPU the compiler fuses this with what is next to it."""
    mask, = ctx.saved_tensors
    return zero_where_not(mask, dy.contiguous()) if dy.is_cpu else torch.where(mask, dy, 0.0), None


keep_largest.register_autograd(
    gradient_of_keep_largest,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]))
zero_where_not.register_autograd(
    lambda ctx, dy: (None, zero_where_not(ctx.saved_tensors[0], dy.contiguous())),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))


def abs_topk(x, k):
    """Keep the k entries of x (..., n) of largest magnitude along the last dimension, and zero the rest.

    Exactly k are kept, the lower index first among equals; gradient flows to them alone (section 2.1).
    Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= x.size(-1):
        raise ValueError(f"abs_topk keeps between 1 and {x.size(-1)} entries here, not {k}")
    if x.device.type in ("cpu", "cuda"):
        return keep_largest(x.contiguous(), k)[0]
    return torch.where(largest_by_topk(x.detach(), k), x, 0.0)


def prune_by_topk_(p, k, j, neuron_dim):
    """Zero all but the k >= 1 entries of p of largest magnitude, the j largest of each neuron among them.

    Neurons are the rows of p if neuron_dim is 0, its columns if 1. Ties as above.
    """
    magnitude = p.abs()
    if j:
        neurons = magnitude.transpose(0, neuron_dim).contiguous()  # (neurons, weights of each)
        magnitude.masked_fill_(largest_by_topk(neurons, j).transpose(0, neuron_dim), torch.inf)
    p.masked_fill_(~largest_by_topk(magnitude.flatten(), k).view_as(p), 0.0)


def prune_by_partition_(p, k, j, neuron_dim):
    """The same on a CPU."""
    weights = p.view(SAME_SIZE_INT[p.itemsize]).numpy()
    largest = np.iinfo(weights.dtype).max
    bits = weights & largest
    if j:
        neurons = torch.from_numpy(bits).transpose(0, neuron_dim).contiguous()  # numpy transposes slowly
        bits.swapaxes(0, neuron_dim)[largest_by_partition(neurons.numpy(), j)] = largest
    weights *= largest_by_partition(bits.reshape(1, -1), k).reshape(bits.shape)
    torch.autograd.graph.increment_version(p)  # as PyTorch's own in-place operators do


class AbsTopK(nn.Module):
    """`abs_topk` as a module, so that a forward hook can read or replace the nodes that it makes."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        return abs_topk(x, self.k)

    def extra_repr(self):
        return f"k={self.k}"


def site(config, location, dim):
    """The module at one of the paper's node sites: AbsTopK over `dim` entries, or an identity if off."""
    k = int(config.activation_topk_fraction * dim)
    return AbsTopK(k) if location in config.locations and k < dim else nn.Identity()


# ----------------------------------------------------------------------------------------------------------
# attention, without and with a sink. q, k, v: (B, n_head, T, d_head); one query and all keys when decoding


def causal_attention(q, k, v, sink_logit, dropout_p):
    """Plain causal attention, scale 1/sqrt(d_head). A single query is the newest token: it sees all keys."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=q.size(2) > 1)


def softmax_attention(q, k, v):
    """Attention y of a fused kernel and the lse (B, n_head, T) of its scores, causal unless T is 1.

    Then two tuples, of tensors and of other things, for `gradients_of_softmax_attention`.
    """
    if q.is_cpu:
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, q.size(2) > 1)
        return y, lse, (), ()
    y, lse, *lengths, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True)
    return y, lse.view(y.shape[:3]), (seed, offset), tuple(lengths)


def gradients_of_softmax_attention(dy, q, k, v, y, lse, tensors, others):
    """Gradients of q, k and v."""
    if q.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, q.size(2) > 1)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dy, q, k, v, y, lse.unsqueeze(-1), *tensors, None, *others, 0.0, True)


class FusedSinkAttention(torch.autograd.Function):
    """`sink_attention` by the kernels of plain causal attention, on a CPU at nearly its price.

    Fused attention gives y = sum(exp(s) v) / Z and lse = log Z, with Z = sum(exp(s)). A sink adds exp(b):

        y_sink = y * Z / (Z + exp(b)) = y * sigmoid(lse - b)        lse_sink = log(exp(lse) + exp(b))

    Its backward pass knows the softmax by y and lse alone. It rebuilds each weight as exp(s - lse) and
    subtracts the row sum of dy * y. Given y_sink and lse_sink it therefore yields the exact gradients of q,
    k and v. The sink has the weight 1 - sigmoid(lse - b) and the value zero, so the gradient of b is that
    weight times -sum(dy * y_sink).
    """

    @staticmethod
    def forward(ctx, q, k, v, sink_logit):
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # the kernels rely on it
        y, lse, tensors, ctx.others = softmax_attention(q, k, v)
        b = sink_logit.view(-1, 1)
        kept = torch.sigmoid(lse - b)  # (B, n_head, T): the share of the weight that does not go to the sink
        y = y * kept.unsqueeze(-1).to(y.dtype)
        ctx.save_for_backward(q, k, v, y, torch.logaddexp(lse, b), kept, *tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, lse, kept, *tensors = ctx.saved_tensors
        db = -((dy * y).sum(-1) * (1 - kept)).sum((0, 2))
        return *gradients_of_softmax_attention(dy, q, k, v, y, lse, tensors, ctx.others), db


def sink_attention(q, k, v, sink_logit, dropout_p):
    """Causal attention in which a head sees one more key, of logit `sink_logit` (n_head) and value zero.

    The weights are exp(s) / (exp(b) + sum exp(s)) for scores s and sink logit b: a head may attend to
    nothing.
    """
    d_head, queries = q.size(-1), q.size(2)
    for_cudnn = (q.is_cuda and q.dtype == torch.bfloat16 and d_head % 8 == 0 and d_head <= 128
                 and queries > 1)  # what cuDNN's kernels can do
    if dropout_p == 0.0 and (q.is_cpu or (for_cudnn and torch.version.cuda)):
        return FusedSinkAttention.apply(q, k, v, sink_logit)
    b = sink_logit.view(1, -1, 1, 1).expand(q.size(0), -1, 1, 1)
    if queries == 1:
        scores = torch.cat([q @ k.mT * d_head**-0.5, b.to(q.dtype)], dim=-1)
        return F.dropout(scores.softmax(-1)[..., :-1], dropout_p) @ v
    # Otherwise the sink is a real key at position 0, where the causal mask lets every query see it. One
    # coordinate more, 1 in all queries and 0 in all other keys, gives it the logit b whatever the query.
    more = 8  # coordinates: one does it, fused kernels want a multiple of eight
    b = F.pad((b * math.sqrt(d_head)).to(k.dtype), (d_head, more - 1))
    k = torch.cat([b, F.pad(k, (0, more))], dim=2)
    v = F.pad(v, (0, more, 1, 0))
    q = F.pad(F.pad(q, (0, 1), value=1.0), (0, more - 1, 1, 0))  # the sink's position takes a query too
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=d_head**-0.5)
    return y[:, :, 1:, :d_head]


class KVCache:
    """Keys and values of the positions an attention layer has seen: allocated once, filled as they come."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0

    def extend(self, k, v):
        """Append k, v (B, n_head, T, d_head); return all that are held, the new ones last.

        Raises ValueError for several tokens after others: causal masks here start at the first key.
        """
        if self.length and k.size(2) > 1:
            raise ValueError("a cache that holds tokens is continued by one token at a time")
        if self.length == 0:
            B, n_head, _, d_head = k.shape
            self.k, self.v = k.new_empty(2, B, n_head, self.block_size, d_head)
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
        self.attn_q = site(config, "attn_q", width)  # one vector over all heads each
        self.attn_k = site(config, "attn_k", width)
        self.attn_v = site(config, "attn_v", width)
        self.sink_logit = nn.Parameter(torch.zeros(config.n_head)) if config.use_attention_sinks else None
        self.attend = sink_attention if config.use_attention_sinks else causal_attention
        self.dropout_p = config.dropout
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
        y = self.attend(q, k, v, self.sink_logit, self.dropout_p if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.d_head)
        return self.attn_out(self.dropout(self.c_proj(y)))


# ----------------------------------------------------------------------------------------------------------
# the block

ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp_in = site(config, "mlp_in", config.d_model)
        self.c_fc = nn.Linear(config.d_model, config.d_mlp, bias=config.use_bias)
        self.activation = ACTIVATIONS[config.activation]()
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
        self.residual_activation = ACTIVATIONS[config.residual_activation]()

    def forward(self, x, cache=None):
        x = self.resid_post_attn(self.residual_activation(x + self.attn(self.ln_1(x), cache)))
        x = self.resid_post_mlp(self.residual_activation(x + self.mlp(self.ln_2(x))))
        return x


class NoPositions(nn.Module):
    """Stands where the positional embedding would, and adds nothing."""

    def __init__(self, block_size, d_model):
        super().__init__()

    def forward(self, positions):
        return 0.0


def bigram_row(idx, table):
    """The logits that the current token by itself gives the next, its row of `table`: (B, T, vocab_size).

    As in the released code, the row of the last token (here the end of a text) gets no gradient.
    """
    return F.embedding(idx, table, padding_idx=-1)


def no_bigram(idx, table):
    return 0.0


# ----------------------------------------------------------------------------------------------------------
# sampling


def draw(logits, temperature, top_k):
    """One token id for each row of logits (B, vocab_size): (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


class SparseLinear(nn.Module):
    """A Linear that does not multiply its zeros: the weight as compressed sparse rows."""

    DENSITY = 0.2  # below this fraction of nonzeros it beats the dense product on a CPU

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        with warnings.catch_warnings(action="ignore"):  # that this kind of tensor is in beta
            csr = weight.to_sparse_csr()
            self.weight = torch.sparse_csr_tensor(  # MKL wants int32: else they are converted in every call
                csr.crow_indices().int(), csr.col_indices().int(), csr.values(), weight.shape)
        self.bias = linear.bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1)).to(self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if len(rows) == 1 and torch.backends.mkl.is_available():
                y = self.weight @ rows[0]  # MKL's product with a vector is the faster
            else:
                y = (self.weight @ rows.T).T
        y = y.reshape(*x.shape[:-1], -1).contiguous()
        return y if self.bias is None else y + self.bias


# ----------------------------------------------------------------------------------------------------------
# the model

LOCATIONS = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out",
             "resid_post_attn", "resid_post_mlp")


@dataclass
class GPTConfig:
    """Architecture of a GPT. Raises ValueError, in one sentence, on what cannot be built."""

    n_layer: int = 8
    d_model: int = 1024  # width of the residual stream, a multiple of d_head
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
    activation_sparsity_locations: str = ",".join(LOCATIONS[:8])  # any of LOCATIONS, by commas
    vocab_size: int = 2048
    n_head: int = 0  # 0: d_model / d_head

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
        fraction = self.activation_topk_fraction
        if not 1 <= fraction * smallest <= smallest:
            raise ValueError(f"activation_topk_fraction={fraction} must be at most 1 and keep at least one "
                             f"of {smallest} entries: choose {1 / smallest:.4g} or more")

    @property
    def locations(self):
        return [name.strip() for name in self.activation_sparsity_locations.split(",") if name.strip()]


# Every parameter is in one of these two, by the end of its name. PRUNED says along which dimension a
# matrix's neurons lie, each of which keeps a minimum of weights: a neuron is a row of what reads the
# residual stream, a column of what writes to it; None where there is no such minimum.
PRUNED = {"wte.weight": None, "wpe.weight": None, "lm_head.weight": None,
          "c_attn.weight": 0, "c_fc.weight": 0, "c_proj.weight": 1,
          "c_attn.bias": None, "c_fc.bias": None, "c_proj.bias": None}
DENSE = ("bigram_table", "attn.sink_logit", "ln_1.weight", "ln_2.weight", "ln_f.weight",
         "ln_1.bias", "ln_2.bias", "ln_f.bias")


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        norm = nn.RMSNorm if config.use_rms_norm else nn.LayerNorm
        positions = nn.Embedding if config.use_positional_embeddings else NoPositions
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.d_model),
            "wpe": positions(config.block_size, config.d_model),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": norm(config.d_model),
        })
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        table = torch.empty(config.vocab_size, config.vocab_size) if config.use_bigram_table else None
        self.bigram_table = nn.Parameter(table) if config.use_bigram_table else None
        self.bigram = bigram_row if config.use_bigram_table else no_bigram
        self.initialize_()

    @torch.no_grad()
    def initialize_(self):
        """Draw all weights afresh. Norm gains stay 1, biases and sink logits 0."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # as in GPT-2: the more layers add to the stream, the less
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
        cross-entropy, in nats, over the targets that are not -1, computed in float32 whatever autocast
        says.
        """
        x = self.residual_stream(idx)
        logits = self.unembed(x, idx)
        if targets is None:
            return logits, None
        with torch.autocast(idx.device.type, enabled=False):
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def residual_stream(self, idx, caches=None):
        """The residual stream after the last block (B, T, d_model).

        With `caches`, one for each block, idx continues what they hold: any number of tokens if that is
        nothing, else one.
        """
        start = caches[0].length if caches else 0
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit the block_size of {self.config.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        return x

    def unembed(self, x, idx):
        """Logits (B, T, vocab_size) in float32, of residual stream x (B, T, d_model) and tokens idx."""
        logits = self.lm_head(self.transformer.ln_f(x))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits + self.bigram(idx, self.bigram_table)

    def sites(self):
        """All node sites, on or off: a list of (location, module), the module's output being the nodes."""
        named = [(name.split(".")[-1], module) for name, module in self.named_modules()]
        return [(location, module) for location, module in named if location in LOCATIONS]

    # ---- what is pruned, and how (section 2.1)

    def sparse_parameters(self):
        """All that `prune_` prunes: a list of (name, parameter, neuron_dim or None)."""
        found = []
        for name, p in self.named_parameters():
            end = ".".join(name.split(".")[-2:])
            if end in PRUNED:
                found.append((name, p, PRUNED[end]))
            else:
                assert end in DENSE, f"say in PRUNED or DENSE whether {name} is pruned"
        return found

    def decayed_parameters(self):
        """The parameters that decay: all matrices but the bigram table."""
        return [p for _, p, _ in self.sparse_parameters() if p.ndim == 2]

    def smallest_l0(self, min_weights_per_neuron=4):
        """The smallest fraction of nonzeros to give every neuron its minimum and leave no matrix empty."""
        smallest = 0.0
        for _, p, neuron_dim in self.sparse_parameters():
            least = 1
            if neuron_dim is not None and min_weights_per_neuron:
                least = min(min_weights_per_neuron, p.size(1 - neuron_dim)) * p.size(neuron_dim)
            fits = least / p.numel()
            if int(fits * p.numel()) < least:  # the product was rounded down
                fits = math.nextafter(fits, 1)
            smallest = max(smallest, fits if p.ndim == 2 else 0.0)
        return smallest

    @torch.no_grad()
    def prune_(self, l0_fraction, min_weights_per_neuron=4, sparsify_biases=True):
        """Zero all but the int(l0_fraction * numel) entries of largest magnitude in every matrix, in place.

        The `min_weights_per_neuron` largest weights of each neuron are among the survivors whatever their
        rank, and count among them. Biases keep max(1, int(l0_fraction * numel)) entries, or all without
        `sparsify_biases`. Raises ValueError if the neurons' minimum does not fit.
        """
        tensors = []
        for name, p, neuron_dim in self.sparse_parameters():
            is_bias = p.ndim == 1
            k = max(int(l0_fraction * p.numel()), 1 if is_bias else 0)
            if k == p.numel() or (is_bias and not sparsify_biases):
                continue
            j = 0 if neuron_dim is None else min(min_weights_per_neuron, p.size(1 - neuron_dim))
            if j and j * p.size(neuron_dim) > k:
                raise ValueError(f"an L0 fraction of {l0_fraction:.6g} leaves {name} {k} weights, fewer "
                                 f"than {j} for each of its {p.size(neuron_dim)} neurons")
            if k == 0:
                p.zero_()
            else:
                tensors.append((p.detach(), k, j, neuron_dim))
        if all(p.is_cpu for p, *_ in tensors):
            list(workers.map(lambda tensor: prune_by_partition_(*tensor), tensors))
        elif HAS_TRITON and all(p.is_cuda and p.dtype == torch.float32 for p, *_ in tensors):
            import kernels

            with torch.cuda.device_of(tensors[0][0]):
                kernels.prune_(tensors)
        else:
            for tensor in tensors:
                prune_by_topk_(*tensor)

    # ---- the format of github.com/openai/circuit_sparsity

    @classmethod
    def from_circuit_sparsity(cls, folder):
        """Read a model in the format of the released ones: beeg_config.json and final_model.pt in `folder`.

        Raises OSError if a file cannot be read and ValueError, in one sentence, if the model has a part
        that this one lacks: nothing is dropped but constants, and unknown keys of the configuration are
        warned of.
        """
        with open(os.path.join(folder, "beeg_config.json"), encoding="utf-8") as f:
            theirs = json.load(f)
        path = os.path.join(folder, "final_model.pt")
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as e:  # noqa: BLE001  what torch.load raises depends on what is in the file
            raise ValueError(f"{path} cannot be read as a state dict ({type(e).__name__})") from None
        tensors = {name.replace("attn.attn_imp.", "attn."): t for name, t in tensors.items()
                   if not (name.endswith(".attn.bias") and t.ndim == 4)}  # a causal mask
        config = config_from_circuit_sparsity(theirs)
        if tensors.pop("final_logits_bias", torch.zeros(1)).any():
            raise ValueError(f"{path} has a nonzero final_logits_bias, for which there is no place here")
        positions = tensors.get("transformer.wpe.weight", torch.zeros(1))
        config.use_positional_embeddings = bool(positions.any())
        if not config.use_positional_embeddings:
            tensors.pop("transformer.wpe.weight", None)  # zeros: adding them does nothing
        if not config.use_bigram_table and not tensors.get("bigram_table", torch.zeros(1)).any():
            tensors.pop("bigram_table", None)
        if config.tie_embeddings:
            wte = tensors.setdefault("transformer.wte.weight", tensors.get("lm_head.weight"))
            if wte is None or not torch.equal(wte, tensors.setdefault("lm_head.weight", wte)):
                raise ValueError(f"{path} holds two embeddings where beeg_config.json says tied_unembed")
        model = cls(config)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as e:
            reason = " ".join(str(e).split("\n", 1)[-1].split())
            raise ValueError(f"{path} does not fit its beeg_config.json: {reason}") from None
        if config.use_bigram_table and not theirs.get("learnable_bigram_table", False):
            model.bigram_table.requires_grad_(False)
        model.tokenizer_name = theirs.get("tokenizer_name", "tinypython_2k")
        return model

    def to_circuit_sparsity(self, folder, tokenizer_name="bpe"):
        """Write the model to `folder` in the format of the released ones, with all that their loader wants.

        `tokenizer_name`: what their tools know the tokenizer by. Raises FileExistsError if there is a model
        already.
        """
        path = os.path.join(folder, "beeg_config.json")
        if os.path.exists(path):
            raise FileExistsError(f"{path} exists: choose another folder")
        os.makedirs(folder, exist_ok=True)
        config = self.config
        theirs = {their_name: getattr(config, name) for their_name, name in CIRCUIT_SPARSITY_NAMES.items()}
        theirs |= {
            "afrac": None if config.activation_topk_fraction == 1 else config.activation_topk_fraction,
            "learnable_bigram_table": config.use_bigram_table and self.bigram_table.requires_grad,
            "ln_bias": not config.use_rms_norm, "tokenizer_name": tokenizer_name, "d_pos_emb": None,
            "flash": True, "grad_checkpointing": False, "debug_nans": False, "bigram_table_rank": None,
        }
        tensors = {name.replace("attn.sink_logit", "attn.attn_imp.sink_logit"): t.cpu()
                   for name, t in self.state_dict().items()}
        tensors.setdefault("transformer.wpe.weight", torch.zeros(config.block_size, config.d_model))
        tensors["final_logits_bias"] = torch.zeros(config.vocab_size)
        torch.save(tensors, os.path.join(folder, "final_model.pt"))
        with open(path, "w", encoding="utf-8") as f:
            json.dump(theirs, f, indent=2)

    # ---- sampling

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T >= 1) by `max_new_tokens`, yielding each token (B, 1) as soon as it is drawn.

        Temperature 0 takes the likeliest token; top_k draws among the k likeliest. Keys and values are
        cached while the text fits block_size; past that the window slides by a token at a time and is read
        anew for each.
        """
        was_training = self.training
        self.eval()
        try:
            caches, new = None, idx
            for _ in range(max_new_tokens):
                with torch.inference_mode():  # a fifth faster than no_grad at one token a time
                    if caches is None or caches[0].length == self.config.block_size:
                        caches = [KVCache(self.config.block_size) for _ in self.transformer.h]
                        new = idx[:, -self.config.block_size:]
                    x = self.residual_stream(new, caches)
                    new = draw(self.unembed(x[:, -1:], new[:, -1:])[:, -1], temperature, top_k)
                    idx = torch.cat([idx, new], dim=1)
                yield new.clone()  # which may be trained on, as what is made in inference mode may not
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) and its continuation, (B, T + max_new_tokens); see `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], dim=1)

    def use_sparse_kernels_(self):
        """Replace Linears that are mostly zeros by `SparseLinear`, in place: for sampling, on a CPU."""
        for module in list(self.modules()):
            for name, child in module.named_children():
                is_linear = isinstance(child, nn.Linear)
                if is_linear and (child.weight != 0).float().mean() < SparseLinear.DENSITY:
                    setattr(module, name, SparseLinear(child))
        return self


# ----------------------------------------------------------------------------------------------------------
# what a configuration in the format of github.com/openai/circuit_sparsity means

CIRCUIT_SPARSITY_NAMES = {  # key of beeg_config.json -> field of GPTConfig
    "block_size": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "d_head": "d_head", "d_model": "d_model", "d_mlp": "d_mlp", "dropout": "dropout", "bias": "use_bias",
    "rms_norm": "use_rms_norm", "residual_activation_type": "residual_activation",
    "activation_type": "activation", "afrac": "activation_topk_fraction",
    "afrac_loctypes": "activation_sparsity_locations", "tied_unembed": "tie_embeddings",
    "enable_bigram_table": "use_bigram_table", "sink": "use_attention_sinks",
}
CIRCUIT_SPARSITY_DEFAULTS = {  # of the keys that a beeg_config.json may lack
    "d_head": None, "d_mlp": None, "dropout": 0.0, "bias": True, "rms_norm": False,
    "residual_activation_type": "identity", "activation_type": "gelu", "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out", "tied_unembed": True, "enable_bigram_table": False,
    "sink": False,
}
CIRCUIT_SPARSITY_OTHER = {  # keys that change nothing in the model's function, or are seen to apart
    "n_mlp", "ln_bias", "flash", "grad_checkpointing", "debug_nans", "learnable_bigram_table",
    "bigram_table_rank", "d_pos_emb", "dropout_cat_pos_emb", "sinusoidal_cat_pos_emb",
    "enable_sparse_kernels", "tokenizer_name", "use_tied_aux_matrix",
}


def config_from_circuit_sparsity(theirs):
    """The GPTConfig that a beeg_config.json (a dict) means. Raises ValueError on what is not here."""
    if not isinstance(theirs, dict):
        raise ValueError("beeg_config.json holds no configuration")  # noqa: TRY004  like the rest
    for is_there, part in (
        (theirs.get("d_pos_emb") is not None, "concatenated positional embeddings (d_pos_emb)"),
        (theirs.get("use_tied_aux_matrix"), "an auxiliary matrix (use_tied_aux_matrix)"),
        (not theirs.get("rms_norm") and not theirs.get("ln_bias", True), "LayerNorms without bias"),
    ):
        if is_there:
            raise ValueError(f"the model has {part}, for which there is no part here: it cannot be read")
    unknown = ", ".join(sorted(theirs.keys() - CIRCUIT_SPARSITY_NAMES.keys() - CIRCUIT_SPARSITY_OTHER))
    if unknown:
        warnings.warn(f"beeg_config.json has keys that mean nothing here: {unknown}", stacklevel=3)
    values = CIRCUIT_SPARSITY_DEFAULTS | theirs
    if "n_mlp" in theirs:
        values["d_mlp"] = theirs["n_mlp"]
    try:
        values["d_head"] = values["d_head"] or values["d_model"] // values["n_head"]
        values["d_mlp"] = values["d_mlp"] or 0
        values["afrac"] = 1.0 if values["afrac"] is None else values["afrac"]
        return GPTConfig(**{name: values[their_name] for their_name, name in CIRCUIT_SPARSITY_NAMES.items()})
    except (KeyError, TypeError) as e:
        raise ValueError(f"beeg_config.json lacks or misstates a key ({e})") from None
