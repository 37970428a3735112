"""How the definitions of model.py come fast: the same choices, bit for bit, and attention up to rounding.

The body of a definition asks `can_...` whether there is something faster for its arguments, and if not goes
on itself; tests hold the two equal. Magnitudes are compared as integers throughout: the bits of non-negative
floats keep their order. In the order of the file: choosing the k largest on a CPU, AbsTopK, the prune,
attention with a sink, Linears that are mostly zeros. kernels_triton.py has what is chosen on a GPU.
"""
import math
import os
import shutil
import sysconfig
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

try:
    import kernels_triton
except ImportError:  # without Triton
    kernels_triton = None

SAME_SIZE_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes
enabled = True  # the setting fast_kernels of a script. False: the definitions of model.py run themselves


def has_compiler(device_type):
    """Whether there is what torch.compile and Triton need: a compiler for the device, and Python.h."""
    compiler = os.environ.get("CXX", "g++") if device_type == "cpu" else os.environ.get("CC", "gcc")
    return bool(shutil.which(compiler)) and os.path.exists(
        os.path.join(sysconfig.get_path("include"), "Python.h"))


HAS_TRITON = has_compiler("cuda") and kernels_triton is not None


def for_triton(x):
    """Whether Triton can work on x: it starts its kernels on the current device."""
    return HAS_TRITON and x.is_cuda and (torch.compiler.is_compiling()
                                         or x.get_device() == torch.cuda.current_device())


# ----------------------------------------------------------------------------------------------------------
# the k largest on a CPU: numpy's partition finds the k-th far faster than torch.topk or a sort


def mask_of_largest(bits, k):
    """Mask of the k > 0 largest of each row of `bits` (rows, n), no less than 0; of equals the first."""
    n = bits.shape[1]
    if bits.itemsize == 2 and n <= 2**16:  # with its place in the row appended, no number equals another
        bits = bits.astype(np.uint32) * 2**16 + np.arange(n, dtype=np.uint32)[::-1]
    kth = np.partition(bits, n - k, axis=1)[:, n - k, None]
    mask = bits >= kth
    if np.count_nonzero(mask) > k * len(bits):  # equals
        room = k - np.count_nonzero(bits > kth, axis=1, keepdims=True)
        mask &= (bits > kth) | (np.cumsum(bits == kth, axis=1, dtype=np.int32) <= room)
    return mask


WORKER = "weight_sparse"  # a worker's name begins with this


def start_workers():
    """Threads for numpy, which keeps to the one it is called in. They do not survive a fork."""
    global workers
    workers = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix=WORKER)


start_workers()
os.register_at_fork(after_in_child=start_workers)


def over_rows(f, x):
    """Call f(slice) for slices of the rows of x (rows, n), on all cores if there is enough to do.

    Every core gets an equal share, cut to slices of at most 2**18 entries, which stay in its cache from one
    pass over them to the next; a slice of less than 2**16 is not worth waking a thread for.
    """
    least, most = (max(1, entries // x.shape[1]) for entries in (2**16, 2**18))
    share = -(-len(x) // torch.get_num_threads())
    size = max(least, min(share, most))
    slices = [slice(start, start + size) for start in range(0, len(x), size)]
    # a worker that waited for workers might wait for itself
    alone = len(slices) == 1 or threading.current_thread().name.startswith(WORKER)
    list(map(f, slices) if alone else workers.map(f, slices))


# ----------------------------------------------------------------------------------------------------------
# AbsTopK: on a CPU choosing and zeroing while a slice is in the cache. These are operators of our own, into
# which torch.compile does not look: numpy is not for it, and the code that it makes of bool masks is slow


def rows_of(x):
    """x (..., n), contiguous, as numpy integers (rows, n): the same memory."""
    return x.view(SAME_SIZE_INT[x.itemsize]).view(-1, x.size(-1)).numpy()


def like(x, rows):
    """Numpy integers (rows, n) as a tensor of the dtype and shape of x: the same memory."""
    return torch.from_numpy(rows).view(x.dtype).view(x.shape)


@torch.library.custom_op("weight_sparse::keep_largest", mutates_args=(), device_types="cpu")
def keep_largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., n), contiguous, with all but the k largest magnitudes of each row zeroed, and their mask."""
    bits = rows_of(x)
    kept, mask = np.empty_like(bits), np.empty(bits.shape, bool)

    def keep(rows):
        mask[rows] = mask_of_largest(bits[rows] & np.iinfo(bits.dtype).max, k)  # without the sign
        np.multiply(bits[rows], mask[rows], out=kept[rows])

    over_rows(keep, bits)
    return like(x, kept), torch.from_numpy(mask).view(x.shape)


@torch.library.custom_op("weight_sparse::zero_where_not", mutates_args=(), device_types="cpu")
def zero_where_not(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x, contiguous, with zeros where `mask`, bool of the same shape, is false."""
    bits = rows_of(x)
    mask, kept = mask.view(bits.shape).numpy(), np.empty_like(bits)
    over_rows(lambda rows: np.multiply(bits[rows], mask[rows], out=kept[rows]), bits)
    return like(x, kept)


keep_largest.register_fake(lambda x, k: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)))
keep_largest.register_autograd(
    lambda ctx, dy, _: (zero_where_not(ctx.saved_tensors[0], dy.contiguous()), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]))
zero_where_not.register_fake(lambda mask, x: torch.empty_like(x))
zero_where_not.register_autograd(
    lambda ctx, dy: (None, zero_where_not(ctx.saved_tensors[0], dy.contiguous())),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))


def can_abs_topk(x):
    """On a CPU, and on a GPU that Triton can compile for."""
    return enabled and (x.is_cpu or for_triton(x))


def abs_topk(x, k):
    """`model.abs_topk`, of 1 <= k <= n."""
    return keep_largest(x.contiguous(), k)[0] if x.is_cpu else kernels_triton.KeepLargest.apply(x, k)


# ----------------------------------------------------------------------------------------------------------
# the prune: on a CPU a matrix for each thread, on a GPU all matrices at once


def can_keep_survivors(tensors):
    """On a CPU, and of float32 tensors on a GPU that Triton can compile for."""
    if not enabled or all(p.is_cpu for p, *_ in tensors):
        return enabled
    return for_triton(tensors[0][0]) and all(
        p.dtype == torch.float32 and p.is_contiguous() and p.device == tensors[0][0].device
        and p.numel() < 2**31 for p, *_ in tensors)


def keep_survivors_(tensors, score):
    """`model.keep_survivors_`."""
    if all(p.is_cpu for p, *_ in tensors):
        list(workers.map(lambda tensor: keep_survivors_of_one_(*tensor, score), tensors))
    else:
        kernels_triton.keep_survivors_(tensors, score)


@torch.no_grad()  # which a thread does not inherit
def keep_survivors_of_one_(p, k, j, neuron_dim, score):
    bits = rows_of(score(p).detach().contiguous())
    bits = bits & np.iinfo(bits.dtype).max  # without the sign: a copy, as the scores may be anyone's
    if j:
        neurons = torch.from_numpy(bits).transpose(0, neuron_dim).contiguous().numpy()  # numpy is slow here
        for _ in range(j):  # a j of ten or less is found sooner by argmax than by a partition
            at = np.arange(len(neurons)), neurons.argmax(axis=1)
            neurons[at] = bits.swapaxes(0, neuron_dim)[at] = -1  # taken; unsigned, it is the largest
    weights = p.detach().view(SAME_SIZE_INT[p.itemsize]).numpy()
    bits = bits.view(f"u{bits.itemsize}").reshape(1, -1)
    weights *= mask_of_largest(bits, k).reshape(p.shape) if k else 0
    torch.autograd.graph.increment_version(p)  # as PyTorch's own in-place operators do


# ----------------------------------------------------------------------------------------------------------
# attention with a sink. q, k, v: (B, n_head, T, d_head); a single query sees all keys


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
    """Attention with a sink by the kernels of plain causal attention, on a CPU at nearly its price.

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


def attention_with_a_key_more(q, k, v, sink_logit, dropout_p):
    """The sink as a real key at position 0, where the causal mask lets every query see it.

    One coordinate more, 1 in all queries and 0 in all other keys, gives that key the logit b whatever the
    query. For the GPUs and precisions that cuDNN's attention does not serve, and for dropout.
    """
    d_head, more = q.size(-1), 8  # one coordinate would do, but fused kernels want a multiple of eight
    b = sink_logit.view(1, -1, 1, 1).expand(q.size(0), -1, 1, 1) * math.sqrt(d_head)
    b = F.pad(b.clamp(min=-3e4).to(k.dtype), (d_head, more - 1))  # of -inf the gradient would be NaN
    k = torch.cat([b, F.pad(k, (0, more))], dim=2)
    v = F.pad(v, (0, more, 1, 0))
    q = F.pad(F.pad(q, (0, 1), value=1.0), (0, more - 1, 1, 0))  # the sink's position takes a query too
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=d_head**-0.5)
    return y[:, :, 1:, :d_head]


def can_sink_attention(q, k, dropout_p):
    """On a CPU without dropout, on CUDA unless there is a single query; the fused masks start at key 0."""
    queries = q.size(2)
    if not enabled or 1 < queries < k.size(2):
        return False
    return dropout_p == 0.0 if q.is_cpu else q.is_cuda and queries > 1


def sink_attention(q, k, v, sink_logit, dropout_p):
    """`model.sink_attention`."""
    for_cudnn = (torch.version.cuda and q.dtype == torch.bfloat16 and q.size(-1) % 8 == 0
                 and q.size(-1) <= 128 and dropout_p == 0.0)
    return (FusedSinkAttention.apply(q, k, v, sink_logit) if q.is_cpu or for_cudnn else
            attention_with_a_key_more(q, k, v, sink_logit, dropout_p))


# ----------------------------------------------------------------------------------------------------------
# sampling: Linears that do not multiply their zeros


class SparseLinear(nn.Module):
    """A Linear with its weight as compressed sparse rows, on a CPU, without gradients."""

    DENSITY = 0.2  # below this fraction of nonzeros it beats the dense product

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


def use_sparse_linears_(model):
    """Replace the Linears of a model that are mostly zeros by `SparseLinear`, in place, and return it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and (child.weight != 0).float().mean() < SparseLinear.DENSITY:
                setattr(module, name, SparseLinear(child))
    return model
