"""The k largest on a GPU, in Triton: of activations for AbsTopK, of the scores of weights for the prune.

Both take non-negative floats as the integers that have their bits, which keeps their order, and find the
k-th largest from its highest bit down, by counting how many entries are at least so large. Exactly k are
kept, the lower index first among equals. They run on the current device. kernels.py imports this only where
there is a GPU and Triton, and a C compiler for it.
"""
import torch
import triton
import triton.language as tl

from kernels import SAME_SIZE_INT

LARGEST = torch.iinfo(torch.int32).max

# ----------------------------------------------------------------------------------------------------------
# of each row: AbsTopK


@triton.jit
def keep_largest_kernel(x, kept, mask, n, k, BITS: tl.constexpr, INT: tl.constexpr, BLOCK: tl.constexpr):
    """A program keeps a row in registers. It stops as soon as the bits known so far part k from the rest."""
    start = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    inside = column < n
    values = tl.load(x + start + column, mask=inside, other=0)
    one = tl.full((), 1, INT)
    bits = tl.where(inside, values.to(INT) & ((one << BITS) - 1), -one)
    kth = one - one
    count = tl.sum(inside.to(tl.int32), 0)  # of entries that are at least kth
    bit = BITS - 1
    while (bit >= 0) & (count > k):
        trial = kth + (one << bit)
        count_of_trial = tl.sum((bits >= trial).to(tl.int32), 0)
        kth = tl.where(count_of_trial >= k, trial, kth)
        count = tl.where(count_of_trial >= k, count_of_trial, count)
        bit -= 1
    keep = bits >= kth
    if count > k:
        above, equal = bits > kth, bits == kth
        room = k - tl.sum(above.to(tl.int32), 0)
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    tl.store(kept + start + column, tl.where(keep, values, 0), mask=inside)
    tl.store(mask + start + column, keep, mask=inside)


def keep_largest(x, k):
    """x (..., n), contiguous, with all but the k largest entries of each row zeroed, and their mask."""
    n, integer = x.size(-1), SAME_SIZE_INT[x.itemsize]
    kept, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    block = triton.next_power_of_2(n)
    if x.numel():
        keep_largest_kernel[(x.numel() // n,)](
            x.view(integer), kept.view(integer), mask, n, k, BITS=8 * x.itemsize - 1, BLOCK=block,
            INT=tl.int64 if x.itemsize == 8 else tl.int32, num_warps=max(1, min(16, block // 512)))
    return kept, mask


# ----------------------------------------------------------------------------------------------------------
# of whole matrices: the prune. All of them lie end to end in one buffer, each from a multiple of BLOCK on

BLOCK = 8192
DIGIT = 4  # bits of the k-th largest that a pass over the buffer finds


@triton.jit
def raise_floor_kernel(bits, n, neuron_stride, weight_stride, J: tl.constexpr, LARGEST: tl.constexpr,
                       BLOCK: tl.constexpr):
    """A program sets the J largest of the n scores of a neuron to LARGEST."""
    weight = tl.arange(0, BLOCK)
    at = tl.program_id(0) * neuron_stride + weight * weight_stride
    inside = weight < n
    left = tl.load(bits + at, mask=inside, other=-1)
    raised = left < -1
    for _ in range(J):
        chosen = weight == tl.argmax(left, 0)  # the lowest index among equals
        left = tl.where(chosen, -1, left)
        raised = raised | chosen
    tl.store(bits + at, tl.full((BLOCK,), LARGEST, tl.int32), mask=inside & raised)


@triton.jit(do_not_specialize=["step"])
def count_kernel(bits, matrix_of_block, kth, counts, step, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """A program counts, in a block of a matrix, what is at least kth + digit * step, for every digit."""
    block = tl.program_id(0)
    matrix = tl.load(matrix_of_block + block)
    known = tl.load(kth + matrix)
    scores = tl.load(bits + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    for digit in tl.static_range(DIGITS):
        count = tl.sum((scores >= known + digit * step).to(tl.int32), 0)
        tl.atomic_add(counts + matrix * DIGITS + digit, count)


def keep_survivors_(tensors, score):
    """`model.keep_survivors_` of contiguous float32 tensors, with scores compared as float32.

    Only the search for equals, at the end, waits for the GPU.
    """
    assert all(p.is_contiguous() for p, *_ in tensors), "the scores are laid out as contiguous matrices"
    device = tensors[0][0].device

    def to_device(values):  # without waiting for what the GPU is busy with
        return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)

    blocks = [triton.cdiv(p.numel(), BLOCK) for p, *_ in tensors]
    matrices = torch.arange(len(tensors), dtype=torch.int32)
    matrix_of_block = to_device(matrices.repeat_interleave(torch.tensor(blocks)))
    k = to_device(torch.tensor([[k] for _, k, *_ in tensors]))
    bits = torch.full((sum(blocks) * BLOCK,), -1, dtype=torch.int32, device=device)
    views = [part[:p.numel()].view_as(p) for part, (p, *_) in
             zip(bits.split([n * BLOCK for n in blocks]), tensors, strict=True)]
    for (p, _, j, neuron_dim), view in zip(tensors, views, strict=True):
        view.copy_(score(p).float().contiguous().view(torch.int32))
        if j:
            n = p.size(1 - neuron_dim)
            raise_floor_kernel[(p.size(neuron_dim),)](
                view, n, p.stride(neuron_dim), p.stride(1 - neuron_dim), J=j, LARGEST=LARGEST,
                BLOCK=triton.next_power_of_2(n))

    kth = torch.zeros(len(tensors), 1, dtype=torch.int32, device=device)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        digits = min(2**DIGIT, 2**(31 - shift))  # the first of the 32 bits is the sign's
        counts = torch.zeros(len(tensors), digits, dtype=torch.int32, device=device)
        count_kernel[(len(matrix_of_block),)](bits, matrix_of_block, kth, counts, 2**shift, DIGITS=digits,
                                              BLOCK=BLOCK, num_warps=8)
        digit = (counts >= k).sum(1, keepdim=True) - 1  # the counts fall as the digit grows
        kth += digit.int() * 2**shift
    for (p, *_), view, threshold in zip(tensors, views, kth, strict=True):
        p.masked_fill_(view < threshold, 0.0)

    has_equals = counts.gather(1, digit) > k
    for i in has_equals.flatten().nonzero().flatten().tolist():
        p, above, equal = tensors[i][0], (views[i] > kth[i]).flatten(), (views[i] == kth[i]).flatten()
        p.masked_fill_((equal & (equal.cumsum(0) > k[i] - above.sum())).view_as(p), 0.0)
