"""The k largest on a GPU, in Triton: of activations for AbsTopK, of the scores of weights for the prune.

Numbers are compared by the bits of their magnitudes, which keep their order as integers. Exactly k are kept,
the lower index first among equals. The kernels run on the current device, and none waits for another's
result on the CPU. kernels.py imports this where there is Triton.
"""
import math

import numpy as np
import torch
import triton
import triton.language as tl

# ----------------------------------------------------------------------------------------------------------
# of each row: AbsTopK. A row is a program's, one warp for 1024 columns, and stays in registers: no barriers.
# On an H100 16384 bfloat16 rows of 1024 take 35 microseconds and their gradients 30, where a copy takes 27


@triton.jit
def as_key(number, WIDE: tl.constexpr):
    """What stands for a number in comparisons. If it is less than 2**23, a float32: compared and counted in
    two instructions, where an integer takes three."""
    return number if WIDE else (number | 0x4B000000).to(tl.float32, bitcast=True)  # 2**23 + number


@triton.jit
def search(keys, k, low, high, count, guess, higher, lower, WIDE: tl.constexpr):
    """The largest number from `low` to below `high` that at least k of the keys reach, and how many do; or
    the first one found that exactly k reach. `count` of them reach low, fewer than k reach high.

    `guess` is tried first, then `higher` or `lower`, then what the counts suggest.
    """
    count_high = 0
    passes, same_side, was_low = 0, 0, False
    while (high - low > 1) & (count > k):
        guess = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        reach = tl.sum((keys >= as_key(guess, WIDE)).to(tl.float32), 0).to(tl.int32)
        is_low = reach >= k
        low, count = tl.where(is_low, guess, low), tl.where(is_low, reach, count)
        high, count_high = tl.where(is_low, high, guess), tl.where(is_low, count_high, reach)
        same_side = tl.where(is_low == was_low, same_side + 1, 0)
        was_low = is_low
        # next in proportion to the counts, unless that moves only one end: then halfway
        part = (count - k).to(tl.float32) / (count - count_high).to(tl.float32)
        part = tl.where(same_side < 3, part, 0.5)
        guess = low + ((high - low).to(tl.float32) * part).to(low.dtype)
        guess = tl.where(passes == 0, tl.where(is_low, higher, lower), guess)
        passes += 1
    return low, count


@triton.jit
def keep_largest_kernel(x, kept, bits, row_stride, n: tl.constexpr, k: tl.constexpr, Z: tl.constexpr,
                        BLOCK: tl.constexpr):
    """A row with zeros in the place of all but its k largest magnitudes; `bits` has a bit for each column.

    The first guesses are right for normal numbers, of which a share k / n is above Z standard deviations:
    5 passes instead of 15. In 16 bits the place in the row is appended to the number, so equals are rare.
    """
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth - 1  # of a magnitude
    WIDE: tl.constexpr = BITS > 15
    NUMBER: tl.constexpr = tl.int64 if BITS == 63 else tl.int32
    INT: tl.constexpr = NUMBER if WIDE else tl.int16
    SPARE: tl.constexpr = 0 if WIDE else 8
    MAGNITUDE: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    values = tl.load(x + row * row_stride + column, mask=inside, other=0)
    number = (values.to(INT, bitcast=True).to(NUMBER) & MAGNITUDE) << SPARE
    if not WIDE:
        number |= (BLOCK - 1 - column) * 256 // BLOCK
    keys = tl.where(inside, as_key(number, WIDE), -1)

    real = values.to(tl.float32)
    quantile = tl.sqrt(tl.sum(real * real, 0) / n) * Z
    guess = (0.96 * quantile).to(values.dtype).to(INT, bitcast=True).to(NUMBER) & MAGNITUDE
    higher = (1.04 * quantile).to(values.dtype).to(INT, bitcast=True).to(NUMBER) & MAGNITUDE
    lower = (0.7 * quantile).to(values.dtype).to(INT, bitcast=True).to(NUMBER) & MAGNITUDE
    zero = guess - guess
    kth, count = search(keys, k, zero, zero + (MAGNITUDE << SPARE), tl.sum(inside.to(tl.int32), 0),
                        guess << SPARE, higher << SPARE, lower << SPARE, WIDE)
    if count > k:  # equals: all that is larger, and of them the leftmost
        order = tl.where(keys == as_key(kth, WIDE), BLOCK - column, 0)
        order = tl.where(keys > as_key(kth, WIDE), BLOCK + 1, order)
        keys = as_key(order.to(NUMBER), WIDE)
        kth, count = search(keys, k, zero + 1, zero + BLOCK + 1, count, zero + BLOCK // 2,
                            zero + 3 * BLOCK // 4, zero + BLOCK // 4, WIDE)
    keep = keys >= as_key(kth, WIDE)
    tl.store(kept + row * n + column, tl.where(keep, values, 0), mask=inside)
    packed = tl.sum(tl.reshape(keep.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :], 1)
    byte = tl.arange(0, BLOCK // 8)
    tl.store(bits + row * ((n + 7) // 8) + byte, packed.to(tl.uint8), mask=byte < (n + 7) // 8)


@triton.jit
def zero_dropped_kernel(dy, bits, dx, n: tl.constexpr, BLOCK: tl.constexpr):
    """A row of dy with zeros where `bits` has none."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    byte = tl.load(bits + row * ((n + 7) // 8) + column // 8, mask=column < n, other=0)
    keep = ((byte.to(tl.int32) >> (column % 8)) & 1) != 0
    values = tl.load(dy + row * n + column, mask=keep, other=0)
    tl.store(dx + row * n + column, values, mask=column < n)


class KeepLargest(torch.autograd.Function):
    """x (..., n) with all but the k largest magnitudes of each row zeroed; their gradient is zero too."""

    @staticmethod
    def forward(ctx, x, k):
        n = x.size(-1)
        rows = x.reshape(-1, n)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        bits = torch.empty(*x.shape[:-1], (n + 7) // 8, dtype=torch.uint8, device=x.device)
        block = max(8, power_of_2(n))
        z = math.log(2 * n / k - 1) / 1.702  # as the logistic distribution has it: within 2% at k = n / 4
        if len(rows):
            keep_largest_kernel[(len(rows),)](rows, kept, bits, rows.stride(0), n=n, k=k, Z=z, BLOCK=block,
                                              num_warps=warps(block))
        ctx.save_for_backward(bits)
        return kept

    @staticmethod
    def backward(ctx, dy):
        bits, = ctx.saved_tensors
        n = dy.size(-1)
        # in operators that the compiler fuses with what is next to them, or that can be differentiated again
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            mask = (bits.int().unsqueeze(-1) >> torch.arange(8, dtype=torch.int32, device=dy.device)) & 1
            return torch.where(mask.flatten(-2)[..., :n] != 0, dy, 0.0), None
        dy = dy.contiguous()
        dx, block = torch.empty_like(dy), power_of_2(n)
        if dy.numel():
            zero_dropped_kernel[(dy.numel() // n,)](dy, bits, dx, n=n, BLOCK=block, num_warps=warps(block))
        return dx, None


def power_of_2(n):
    return 1 << (n - 1).bit_length()


def warps(block):
    return max(1, min(16, block // 1024))


# ----------------------------------------------------------------------------------------------------------
# of whole matrices: the prune, of all of them at once. What is kept of one is its floor, the j largest of
# each neuron, and of the rest the largest until there are k. One number orders it all, a key: the bits of a
# score and below them, for the lower index first among equals, the index counted down. A key is the k-th if
# there are k entries that reach it or are of the floor.
#
# floor_kernel lists the keys of the floors. bracket_kernel tells from a sample of a tensor between which two
# scores the k-th is. candidates_kernel reads every score, counts those above and lists the keys of those
# between, which are few. Among them kth_kernel finds the k-th key; or, if the sample was wrong or the list
# is too short, among all, which is slow. zero_kernel zeros what does not reach it, and restore_kernel puts
# the floors back. A launch is over all tensors, so there are seven: 1.15 ms for 105 million weights on an
# H100, which reads and writes them once in 0.28. A table, int64, has a row for each tensor, of these:

FIELDS = ("scores", "weights", "size", "k", "neurons", "floor_size", "candidates_size", "first_block",
          "first_row", "first_column_tile", "first_floor", "first_candidate")
WIDTH = tl.constexpr(len(FIELDS))
(SCORES, WEIGHTS, SIZE, K, NEURONS, FLOOR_SIZE, CANDIDATES_SIZE, FIRST_BLOCK, FIRST_ROW, FIRST_COLUMN_TILE,
 FIRST_FLOOR, FIRST_CANDIDATE) = map(tl.constexpr, range(len(FIELDS)))
BLOCK = tl.constexpr(4096)  # entries of a tensor that a program works on
COLUMNS = 8  # of a matrix that a program works on: 32 bytes, the least that the memory gives
SAMPLE = 16384  # entries of a tensor by which the k-th key is guessed, if it has more than four times that
LARGEST = tl.constexpr(2**31 - 1)
LAST_INDEX = tl.constexpr(2**32 - 1)


@triton.jit
def tensor_of(table, field, TENSORS: tl.constexpr):
    """Which tensor a program works on, its row, and as which of its programs: `field` says the first."""
    i = tl.arange(0, triton.next_power_of_2(TENSORS))
    first = tl.load(table + i * WIDTH + field, mask=i < TENSORS, other=LARGEST)
    which = tl.sum((first <= tl.program_id(0)).to(tl.int32), 0) - 1
    return which, table + which * WIDTH, tl.program_id(0) - tl.load(table + which * WIDTH + field)


@triton.jit
def floats_at(address, ALIGN: tl.constexpr):
    """The pointer to float32 numbers at an address, ALIGN of which the memory may give at once."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * ALIGN)


@triton.jit
def bits_of(scores, index, inside):
    """The bits, without the sign, of the scores with these indices; -1 outside."""
    bits = tl.load(scores + index, mask=inside, other=0.0).to(tl.int32, bitcast=True) & LARGEST
    return tl.where(inside, bits, -1)


@triton.jit
def key_of(bits, index):
    """Of entries outside, whose bits are -1, the key is negative: it reaches no key of an entry."""
    return (bits.to(tl.int64) << 32) | (~index.to(tl.int64) & LAST_INDEX)


@triton.jit
def count_reach(keys, n, key, CHUNK: tl.constexpr):
    """How many of n keys in memory reach `key`."""
    count, start = tl.zeros((CHUNK,), tl.int32), 0
    while start < n:
        index = start + tl.arange(0, CHUNK)
        count += (tl.load(keys + index, mask=index < n, other=-1) >= key).to(tl.int32)
        start += CHUNK
    return tl.sum(count, 0)


@triton.jit
def floor_kernel(table, keys, addresses, values, BY_COLUMNS: tl.constexpr, NEURONS_HERE: tl.constexpr,
                 LENGTH: tl.constexpr, ALIGN: tl.constexpr, TENSORS: tl.constexpr):
    """Keys, addresses and values of the j largest of each of a few neurons that lie next to each other: the
    largest is found j times, and is -1 from then on. So a neuron is read once; j is small.
    """
    _, tensor, tile = tensor_of(table, FIRST_COLUMN_TILE if BY_COLUMNS else FIRST_ROW, TENSORS)
    neurons = tl.load(tensor + NEURONS)
    n = tl.load(tensor + SIZE) // neurons
    neuron, weight = tile * NEURONS_HERE + tl.arange(0, NEURONS_HERE), tl.arange(0, LENGTH)
    if BY_COLUMNS:
        neurons = tl.multiple_of(neurons, ALIGN)
        index = neuron[:, None] + weight[None, :] * neurons
    else:
        n = tl.multiple_of(n, ALIGN)
        index = neuron[:, None] * n + weight[None, :]
    is_neuron = neuron < neurons
    scores = floats_at(tl.load(tensor + SCORES), ALIGN)
    bits = bits_of(scores, index, is_neuron[:, None] & (weight < n)[None, :])
    j, i = (tl.load(tensor + FLOOR_SIZE) // neurons).to(tl.int32), 0
    to = tl.load(tensor + FIRST_FLOOR) + neuron * j
    while i < j:
        largest = tl.max(bits, 1)
        chosen = tl.min(tl.where(bits == largest[:, None], weight[None, :], LENGTH), 1)
        bits = tl.where(weight[None, :] == chosen[:, None], -1, bits)
        at = neuron + chosen * neurons if BY_COLUMNS else neuron * n + chosen
        address = tl.load(tensor + WEIGHTS) + at * 4
        value = tl.load(address.to(tl.pointer_type(tl.float32)), mask=is_neuron)
        tl.store(keys + to + i, key_of(largest, at), mask=is_neuron)
        tl.store(addresses + to + i, address, mask=is_neuron)
        tl.store(values + to + i, value, mask=is_neuron)
        i += 1


@triton.jit
def bracket_kernel(table, floors, brackets, SAMPLE: tl.constexpr):
    """Bits of scores between which the k-th key of a tensor is, almost surely, as a sample of it says: the
    largest that k scores reach if the sample shows too many of them by a margin, or too few.
    """
    tensor = table + tl.program_id(0) * WIDTH
    size, k = tl.load(tensor + SIZE), tl.load(tensor + K)
    floor, floor_size = floors + tl.load(tensor + FIRST_FLOOR), tl.load(tensor + FLOOR_SIZE)
    low = (size - size).to(tl.int32)  # a zero in a register, of a type that the loop can keep
    high = low + LARGEST  # these are for small tensors
    if size > 4 * SAMPLE:
        i, share = tl.arange(0, SAMPLE), size // SAMPLE
        anywhere = ((i * 0x1E3779B1) >> 8) & 0xFFFFFF  # or a sample would be of few columns
        sample = bits_of(floats_at(tl.load(tensor + SCORES), 1), i * share + anywhere % share, i >= 0)
        high = low
        for bit in range(30, 13, -1):  # the rest of the 31 bits is a part in 500 of the score
            for side in tl.static_range(2):
                trial = (high if side else low) | (1 << bit)
                count = tl.sum((sample >= trial).to(tl.int32), 0).to(tl.float32)
                margin = 4 + 4 * tl.sqrt(count * (1 - count / SAMPLE))  # four standard deviations
                count = (count + margin if side else count - margin) * (size.to(tl.float32) / SAMPLE)
                count += floor_size - count_reach(floor, floor_size, trial.to(tl.int64) << 32, 4096)
                if side:
                    high = tl.where(count >= k, trial, high)
                else:
                    low = tl.where(count >= k, trial, low)
        high += (1 << 14) - 1  # at most LARGEST
    tl.store(brackets + 2 * tl.program_id(0), low)
    tl.store(brackets + 2 * tl.program_id(0) + 1, high)


@triton.jit
def candidates_kernel(table, brackets, counts, candidates, ALIGN: tl.constexpr, TENSORS: tl.constexpr):
    """Of a block, how many scores are above the bracket, and the keys of those within, added to a list, in
    no order between blocks.
    """
    which, tensor, block = tensor_of(table, FIRST_BLOCK, TENSORS)
    start, index = block * BLOCK, tl.arange(0, BLOCK)
    inside = index < tl.multiple_of((tl.load(tensor + SIZE) - start).to(tl.int32), ALIGN)
    bits = bits_of(floats_at(tl.load(tensor + SCORES), ALIGN) + start, index, inside)
    low, high = tl.load(brackets + 2 * which), tl.load(brackets + 2 * which + 1)
    tl.atomic_add(counts + 2 * which, tl.sum((bits >= high).to(tl.int32), 0), sem="relaxed")
    within = (bits >= tl.maximum(low, 1)) & (bits < high)  # no zeros: pruned weights have many
    fours = tl.reshape(within.to(tl.int32), [BLOCK // 4, 4])  # which a thread holds: a cumsum of few numbers
    before = tl.cumsum(tl.sum(fours, 1), 0) - tl.sum(fours, 1)
    place = tl.reshape(before[:, None] + tl.cumsum(fours, 1) - 1, [BLOCK])
    place += tl.atomic_add(counts + 2 * which + 1, tl.sum(within.to(tl.int32), 0), sem="relaxed")
    fits = within & (place < tl.load(tensor + CANDIDATES_SIZE).to(tl.int32))
    tl.store(candidates + tl.load(tensor + FIRST_CANDIDATE) + place, key_of(bits, start + index), mask=fits)


@triton.jit
def kth_kernel(table, floors, brackets, counts, candidates, kth, CHUNK: tl.constexpr):
    """The k-th key of a tensor, by halving: among the candidates or, if it is not there, among all."""
    i = tl.program_id(0)
    tensor = table + i * WIDTH
    size, k, scores = tl.load(tensor + SIZE), tl.load(tensor + K), floats_at(tl.load(tensor + SCORES), 1)
    floor, floor_size = floors + tl.load(tensor + FIRST_FLOOR), tl.load(tensor + FLOOR_SIZE)
    candidates += tl.load(tensor + FIRST_CANDIDATE)
    above, n = tl.load(counts + 2 * i), tl.load(counts + 2 * i + 1)
    low = tl.maximum(tl.load(brackets + 2 * i), 1).to(tl.int64) << 32
    high = tl.load(brackets + 2 * i + 1).to(tl.int64) << 32
    count = above + n + floor_size - count_reach(floor, floor_size, low, CHUNK)
    count_high = above + floor_size - count_reach(floor, floor_size, high, CHUNK)
    # fewer than k are not zero: which zeros are kept matters only if they are the scores of other numbers
    no_matter = (low == 1 << 32) & (tl.load(tensor + SCORES) == tl.load(tensor + WEIGHTS))
    found = (n <= tl.load(tensor + CANDIDATES_SIZE)) & (count_high <= k) & ((count >= k) | no_matter)
    if not found:
        low, high, count = low * 0, tl.where(count < k, low, LARGEST * 2**32), count * 0 + size
    elif count_high == k:  # as where the floor is all that is kept
        low, count = high, count_high
    while (high - low > 1) & (count > k):
        key = low + (high - low) // 2
        reach = floor_size - count_reach(floor, floor_size, key, CHUNK)
        if found:
            reach += above + count_reach(candidates, n, key, CHUNK)
        else:
            start = size - size
            while start < size:
                index = start + tl.arange(0, CHUNK)
                keys = key_of(bits_of(scores, index, index < size), index)
                reach += tl.sum((keys >= key).to(tl.int32), 0)
                start += CHUNK
        low, count = tl.where(reach >= k, key, low), tl.where(reach >= k, reach, count)
        high = tl.where(reach >= k, high, key)
    tl.store(kth + i, low)


@triton.jit
def zero_kernel(table, kth, ALIGN: tl.constexpr, TENSORS: tl.constexpr):
    """Zeros in the place of the weights of a block whose keys do not reach the k-th: in 32 bits, as a key is
    at least the k-th if its score is larger, or is equal and its index at most the k-th's.
    """
    which, tensor, block = tensor_of(table, FIRST_BLOCK, TENSORS)
    key = tl.load(kth + which)
    start, index = block * BLOCK, tl.arange(0, BLOCK)
    inside = index < tl.multiple_of((tl.load(tensor + SIZE) - start).to(tl.int32), ALIGN)
    bits = bits_of(floats_at(tl.load(tensor + SCORES), ALIGN) + start, index, inside)
    last = tl.minimum((~key & LAST_INDEX) - start, BLOCK).to(tl.int32)  # that is kept of equals
    kth_bits = (key >> 32).to(tl.int32)
    weights = floats_at(tl.load(tensor + WEIGHTS), ALIGN) + start + index
    keep = (bits > kth_bits) | ((bits == kth_bits) & (index <= last))
    tl.store(weights, tl.where(keep, tl.load(weights, mask=inside), 0.0), mask=inside)


@triton.jit
def restore_kernel(addresses, values, n, BLOCK: tl.constexpr):
    """The weights of the floors, some of which were zeroed."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address, value = tl.load(addresses + index, mask=index < n), tl.load(values + index, mask=index < n)
    tl.store(address.to(tl.pointer_type(tl.float32)), value, mask=index < n)


def table_of(tensors, scores):
    """The table, and the sums of its last five fields, which count what comes before a tensor."""
    addresses = [[t.data_ptr() for t in some] for some in (scores, [p for p, *_ in tensors])]
    size, k, j = (np.array(numbers) for numbers in zip(*((p.numel(), k, j) for p, k, j, _ in tensors)))
    neurons = np.array([p.size(dim) if j else 1 for p, _, j, dim in tensors])
    by_columns = np.array([dim == 1 for *_, dim in tensors])
    candidates = np.where(size <= 4 * SAMPLE, size, size // 16)
    own = np.stack([-(-size // BLOCK.value), neurons * ((j > 0) & ~by_columns),
                    -(-neurons // COLUMNS) * ((j > 0) & by_columns), neurons * j, candidates])
    table = np.stack([*addresses, size, k, neurons, neurons * j, candidates, *own.cumsum(1) - own], axis=1)
    return torch.from_numpy(table), own.sum(1).tolist()


def keep_survivors_(tensors, score):
    """`model.keep_survivors_` of contiguous float32 tensors, with scores compared as float32."""
    device, count = tensors[0][0].device, len(tensors)
    scores = [score(p).float().contiguous().view_as(p) for p, *_ in tensors]
    table, (blocks, rows, column_tiles, floor_size, candidates_size) = table_of(tensors, scores)
    table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
    used = [*scores, *(p for p, *_ in tensors)]
    aligned = all(t.size(-1) % 4 == 0 and t.data_ptr() % 16 == 0 for t in used)
    align = 4 if aligned else 1  # floats that are read at once

    def memory(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device=device)

    floors, addresses = memory(2, floor_size)
    values, candidates, kth = memory(floor_size, dtype=torch.float32), memory(candidates_size), memory(count)
    brackets, counts = torch.zeros(2, 2 * count, dtype=torch.int32, device=device)

    for by_columns, programs, neurons in ((False, rows, 1), (True, column_tiles, COLUMNS)):
        if programs:
            longest = max(p.size(1 - dim) for p, _, j, dim in tensors if j and dim == by_columns)
            floor_kernel[(programs,)](
                table, floors, addresses, values, BY_COLUMNS=by_columns, NEURONS_HERE=neurons,
                LENGTH=power_of_2(longest), ALIGN=align, TENSORS=count, num_warps=neurons)
    bracket_kernel[(count,)](table, floors, brackets, SAMPLE=SAMPLE, num_warps=16)
    candidates_kernel[(blocks,)](table, brackets, counts, candidates, ALIGN=align, TENSORS=count,
                                 num_warps=8)
    kth_kernel[(count,)](table, floors, brackets, counts, candidates, kth, CHUNK=4096, num_warps=16)
    zero_kernel[(blocks,)](table, kth, ALIGN=align, TENSORS=count)
    if floor_size:
        restore_kernel[(triton.cdiv(floor_size, 1024),)](addresses, values, floor_size, BLOCK=1024)
    torch.autograd.graph.increment_version([p for p, *_ in tensors])  # as PyTorch's own operators do
