"""All tests, on a CPU: each states a property in its name and its first line. -m "not slow" takes a minute.

The oracles (plain_...) are slow, plain and share no code with what they check; what they check is what
training, sampling and preparing call.
"""
import ast
import collections
import csv
import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import plot
import prepare
import sample
import train
from configurator import configure, settings_of
from experiments import evaluate, look_inside
from experiments import run as experiments
from model import (
    GPT,
    LOCATIONS,
    AbsTopK,
    GPTConfig,
    KVCache,
    SparseLinear,
    abs_topk,
    keep_largest,
    largest_by_topk,
    prune_by_partition_,
    prune_by_topk_,
    sink_attention,
    zero_where_not,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is first imported: look-ups fail at once

torch.set_num_threads(1)  # the tensors here are small: more threads would wait for each other

CPU = train.Place(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

few = hypothesis_settings(max_examples=40, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def choose(monkeypatch):
    """choose(name=value, ...) changes settings of train.py; they are what they were when the test is
    over."""

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setattr(train, name, value)

    return set_all


# ----------------------------------------------------------------------------------------------------------
# oracles


def plain_largest(values, k):
    """Indices of the k values of largest magnitude, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]


def plain_abs_topk(x, k):
    """x with all but its k largest entries zeroed, by a stable sort."""
    largest = x.abs().argsort(dim=-1, descending=True, stable=True)[..., :k]
    return x * torch.zeros_like(x).scatter(-1, largest, 1.0)


def plain_prune(w, k, neuron_dim, j):
    """The numpy array w with k entries left: the j largest of every neuron, then the largest of the rest."""
    flat = w.flatten().tolist()
    index = np.arange(w.size).reshape(w.shape)
    kept = set()
    if neuron_dim is not None:
        for neuron in index if neuron_dim == 0 else index.T:
            kept.update(neuron[plain_largest([flat[i] for i in neuron], j)].tolist())
    rest = [i for i in plain_largest(flat, len(flat)) if i not in kept]
    kept.update(rest[:k - len(kept)])
    return np.array([value if i in kept else 0.0 for i, value in enumerate(flat)]).reshape(w.shape)


def plain_attention(q, k, v, sink=None):
    """Causal attention of one head, q, k, v (B, T, d_head): an explicit softmax, the sink one more
    column."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[1:]).triu(1 + k.size(1) - q.size(1)) > 0  # the last query sees all keys
    scores = scores.masked_fill(future, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(*scores.shape[:2], 1)], dim=-1)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights[..., :k.size(1)] @ v


def plain_logits(w, c, idx, change=None):
    """Logits of the model of config c and weights w (name -> tensor), written out.

    `change`: name of a site -> a function that its nodes go through.
    """

    def site(name, x):
        if name.split(".")[-1] in c.activation_sparsity_locations.split(","):
            x = plain_abs_topk(x, int(c.activation_topk_fraction * x.size(-1)))
        return change[name](x) if change and name in change else x

    def norm(name, x):
        if c.use_rms_norm:
            x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        else:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def attention(name, x):
        x = linear(f"{name}.c_attn", site(f"{name}.attn_in", x))
        q, k, v = (site(f"{name}.attn_{part}", y) for part, y in zip("qkv", x.chunk(3, dim=-1)))
        heads = []
        for h in range(c.n_head):
            sink = w[f"{name}.sink_logit"][h] if c.use_attention_sinks else None
            own = slice(h * c.d_head, (h + 1) * c.d_head)
            heads.append(plain_attention(q[..., own], k[..., own], v[..., own], sink))
        return site(f"{name}.attn_out", linear(f"{name}.c_proj", torch.cat(heads, dim=-1)))

    def mlp(name, x):
        x = linear(f"{name}.c_fc", site(f"{name}.mlp_in", x))
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2 if c.activation == "gelu" else x * (x > 0)
        return site(f"{name}.mlp_out", linear(f"{name}.c_proj", site(f"{name}.mlp_neuron", x)))

    def residual(x):
        return x * (x > 0) if c.residual_activation == "relu" else x

    x = w["transformer.wte.weight"][idx]
    if c.use_positional_embeddings:
        x = x + w["transformer.wpe.weight"][:idx.size(1)]
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        x = residual(x + attention(f"{block}.attn", norm(f"{block}.ln_1", x)))
        x = site(f"{block}.resid_post_attn", x)
        x = residual(x + mlp(f"{block}.mlp", norm(f"{block}.ln_2", x)))
        x = site(f"{block}.resid_post_mlp", x)
    unembedding = "transformer.wte" if c.tie_embeddings else "lm_head"
    logits = norm("transformer.ln_f", x) @ w[f"{unembedding}.weight"].T
    if c.use_bigram_table:
        table = w["bigram_table"]
        table = torch.cat([table[:-1], table[-1:].detach()])  # the last row is not trained
        logits = logits + table[idx]
    return logits


def plain_loss(logits, targets):
    """Mean cross-entropy over the targets that are not -1."""
    losses = [logits[b, t].exp().sum().log() - logits[b, t, target]
              for b, row in enumerate(targets.tolist()) for t, target in enumerate(row) if target != -1]
    return sum(losses) / len(losses)


def plain_gradients(w, c, batches):
    """Mean loss over batches of (idx, targets) and its gradients, which like w are name -> numpy array."""
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in w.items()}
    loss = sum(plain_loss(plain_logits(leaves, c, idx), targets) for idx, targets in batches) / len(batches)
    loss.backward()
    return loss.item(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def plain_step(w, moments, gradients, step):
    """Update w (name -> numpy array) in place: normalize, Adam, prune, decay. Returns the RMS before."""
    lr, l0 = train.lr_at(step), train.l0_at(step)
    rms = math.sqrt(np.mean(np.concatenate([g.flatten() for g in gradients.values()]) ** 2))
    for name, g in gradients.items():
        if train.grad_clip_rms:
            g = g * train.grad_clip_rms / (rms + 1e-5)
        m, v = moments.setdefault(name, [np.zeros_like(g), np.zeros_like(g)])
        m[...] = train.beta1 * m + (1 - train.beta1) * g
        v[...] = train.beta2 * v + (1 - train.beta2) * g ** 2
        m_hat, v_hat = m / (1 - train.beta1 ** (step + 1)), v / (1 - train.beta2 ** (step + 1))
        w[name] = w[name] - lr * m_hat / (np.sqrt(v_hat) + train.eps)

        part, kind = name.split(".")[-2:] if "." in name else ("", name)
        if part in ("c_attn", "c_fc", "c_proj", "wte", "wpe", "lm_head"):
            k = int(l0 * g.size)
            if kind == "bias":
                k = max(1, k) if train.sparsify_biases else g.size
            neuron_dim = {"c_attn": 0, "c_fc": 0, "c_proj": 1}.get(part) if kind == "weight" else None
            w[name] = plain_prune(w[name], k, neuron_dim, train.min_weights_per_neuron)
            if kind == "weight":
                w[name] = w[name] - train.weight_decay * lr * w[name]
    return rms


def arrays_of(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def assert_close(found, expected, tolerance):
    """No entry is off by more than `tolerance` of the largest entry."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1e-3, expected.abs().max())


def random_model(seed, **fixed):
    """A small GPT in float64, of a random configuration but for what is fixed; biases and sinks are not
    0."""
    options = {
        "n_layer": (1, 2), "d_model": (8, 12), "d_head": (4,), "n_head": (0, 3), "d_mlp": (0, 20),
        "block_size": (8,), "vocab_size": (11,),
        "residual_activation": ("identity", "relu"), "activation": ("gelu", "relu"),
        "use_rms_norm": (True, False), "use_bias": (True, False), "tie_embeddings": (True, False),
        "use_positional_embeddings": (True, False), "use_bigram_table": (True, False),
        "use_attention_sinks": (True, False), "activation_topk_fraction": (0.25, 0.5, 0.8, 1.0),
    }
    rng = random.Random(seed)
    values = {name: rng.choice(values) for name, values in options.items()}
    some = rng.sample(LOCATIONS, rng.randint(0, len(LOCATIONS)))
    values["activation_sparsity_locations"] = ",".join(some)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**values | fixed)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def tiny_model(seed=0, **values):
    """A small GPT in float32, of the default configuration but for `values`; biases and sinks are not 0."""
    small = {"n_layer": 2, "d_model": 16, "d_head": 4, "block_size": 8, "vocab_size": 11}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**small | values))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def random_gradients_(model):
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def some_tokens(batch, length):
    return torch.from_numpy(np.random.default_rng(length).integers(11, size=(batch, length)))


@contextmanager
def hooked(module, function):
    """Within it, `function` gets the module's output; what it returns, if anything, goes on in its place."""
    handle = module.register_forward_hook(lambda module, inputs, output: function(output))
    yield
    handle.remove()


# ----------------------------------------------------------------------------------------------------------
# AbsTopK


def plain_mask(x, k):
    """The mask of the k largest of each row of x (rows, n)."""
    return torch.tensor([[i in plain_largest(row, k) for i in range(len(row))] for row in x.tolist()])


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
numbers = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e4, 1e4, width=32))  # ints: ties, zeros
rows_of = {n: st.lists(numbers, min_size=n, max_size=n) for n in range(1, 21)}
tables = st.integers(1, 20).flatmap(lambda n: st.lists(rows_of[n], min_size=1, max_size=4))


@few
@given(tables, st.sampled_from(DTYPES), st.data())
def test_abs_topk_keeps_exactly_the_k_largest_lower_index_first(table, dtype, data):
    """Of any numbers, with ties and zeros, in any precision: what a sort finds, unchanged, and no other."""
    x = torch.tensor(table, dtype=dtype)
    k = data.draw(st.integers(1, x.size(1)))
    assert torch.equal(abs_topk(x, k), x * plain_mask(x, k))


@few
@given(tables, st.sampled_from(DTYPES), st.data())
def test_both_kernels_choose_the_same_entries(table, dtype, data):
    """The kernel for CPUs and the one for all other devices both agree with a sort."""
    x = torch.tensor(table, dtype=dtype)
    k = data.draw(st.integers(1, x.size(1)))
    expected = plain_mask(x, k)
    kept, mask = keep_largest(x, k)
    assert torch.equal(mask, expected)
    assert torch.equal(kept, x * expected)
    assert torch.equal(largest_by_topk(x, k), expected)
    assert torch.equal(zero_where_not(expected, x), x * expected)


def test_abs_topk_can_be_differentiated_twice():
    """Its second derivatives are those of a product with a fixed mask."""
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: abs_topk(x, 3) ** 3, x)


def test_prune_without_a_cpu():
    """Also where nothing is to be pruned: what a GPU would be asked to do, on a device without memory."""
    model = random_model(0).to("meta")
    for l0 in (1.0, 0.5):
        model.prune_(l0)


def test_prune_between_forward_and_backward_is_noticed():
    """As with any in-place operation, autograd refuses to mix old weights and new ones."""
    model = random_model(0)
    _, loss = model(some_tokens(2, 4), some_tokens(2, 4))
    model.prune_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def pruned_in_a_fork(connection):
    model = random_model(0)
    model.prune_(0.5)
    connection.send(model.lm_head.weight.count_nonzero().item())


def test_prune_works_in_a_forked_process():
    """A data loader's workers are forks: threads that were started before are not there."""
    model = random_model(0)
    model.prune_(0.5)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=pruned_in_a_fork, args=(there,))
    process.start()
    assert here.poll(60), "the fork hangs"
    assert here.recv() == model.lm_head.weight.count_nonzero()
    process.join()


@few
@given(tables, st.sampled_from(DTYPES), st.data())
def test_both_kernels_prune_alike(table, dtype, data):
    """With and without a floor for rows or columns: the one for CPUs, the other one, and a sort agree."""
    p = torch.tensor(table, dtype=dtype)
    neuron_dim = data.draw(st.sampled_from([None, 0, 1]))
    j = 0 if neuron_dim is None else data.draw(st.integers(0, p.size(1 - neuron_dim)))
    floor = j * p.size(neuron_dim) if j else 1
    k = data.draw(st.integers(floor, p.numel()))
    expected = torch.from_numpy(plain_prune(p.double().numpy(), k, neuron_dim, j)).to(dtype)
    for kernel in (prune_by_topk_, prune_by_partition_):
        pruned = p.clone()
        kernel(pruned, k, j, neuron_dim)
        assert torch.equal(pruned, expected), kernel.__name__


@pytest.mark.parametrize("shape", [(3, 70_000), (2000, 100), (5, 1, 7, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_topk_of_large_tensors(shape, dtype):
    """Also where the CPU's kernel takes the rows in several parts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = shape[-1] // 4
    assert torch.equal(abs_topk(x, k), plain_abs_topk(x, k))


def test_abs_topk_passes_gradient_to_the_kept_alone():
    """Kept entries get their whole gradient, kept zeros too; all others get none."""
    x = torch.tensor([[0.0, -3.0, 0.0, 0.0], [2.0, -2.0, 2.0, -2.0]], requires_grad=True)
    dy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    abs_topk(x, 3).backward(dy)
    assert x.grad.tolist() == [[1.0, 2.0, 3.0, 0.0], [5.0, 6.0, 7.0, 0.0]]


def test_abs_topk_of_a_view_is_that_of_its_copy():
    """Strides do not matter: transposed, sliced and expanded inputs give what their contiguous copies do."""
    x = torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0))
    for view in (x.transpose(1, 2), x[:, ::2, 1::3], x[:1].expand(4, 8, 10), x.permute(2, 0, 1)):
        assert torch.equal(abs_topk(view, 2), abs_topk(view.contiguous(), 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_topk_of_all_entries_is_the_identity(dtype):
    """k = n keeps all."""
    x = torch.randn(3, 5).to(dtype)
    assert torch.equal(abs_topk(x, 5), x)


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_abs_topk_refuses_a_k_out_of_range(k):
    """The error says what range is legal."""
    with pytest.raises(ValueError, match="between 1 and 5"):
        abs_topk(torch.randn(3, 5), k)


# ----------------------------------------------------------------------------------------------------------
# the prune


MATRICES = {"transformer.wte.weight": None, "lm_head.weight": None, "transformer.h.0.attn.c_attn.weight": 0,
            "transformer.h.0.attn.c_proj.weight": 1, "transformer.h.0.mlp.c_fc.weight": 0,
            "transformer.h.0.mlp.c_proj.weight": 1}
BIASES = [f"transformer.h.0.{part}.bias" for part in
          ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_every_parameter_is_pruned_or_dense_as_the_paper_has_it():
    """Matrices and biases are, with neurons along the right dimension; gains, sinks and bigrams are not."""
    model = tiny_model(n_layer=1, use_positional_embeddings=True, use_rms_norm=False)
    sparse = model.sparse_parameters()
    expected = MATRICES | {"transformer.wpe.weight": None} | dict.fromkeys(BIASES)
    assert {name: dim for name, _, dim in sparse} == expected
    assert all(p is model.get_parameter(name) for name, p, _ in sparse)
    dense = {name for name, _ in model.named_parameters()} - set(expected)
    norms = ("h.0.ln_1", "h.0.ln_2", "ln_f")
    gains = {f"transformer.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    assert dense == {"bigram_table", "transformer.h.0.attn.sink_logit"} | gains


def test_a_new_parameter_must_be_classified():
    """A fork that adds a parameter without saying whether it is pruned hears of it by name."""
    model = tiny_model()
    model.transformer["extra"] = torch.nn.Linear(4, 4)
    with pytest.raises(AssertionError, match="transformer.extra.weight"):
        model.prune_(0.5)


@pytest.mark.parametrize("j", [0, 1, 3, 4])
@pytest.mark.parametrize("l0", [0.9, 0.5, 0.377, 0.25])
def test_prune_leaves_exactly_k_in_every_matrix_and_each_neuron_its_floor(l0, j):
    """int(l0 * numel) in all; at least j in every row of c_attn and c_fc and every column of both c_proj."""
    model = tiny_model(n_layer=1)
    with torch.no_grad():
        for name in MATRICES:  # neurons of very different size: with no floor the small ones would lose all
            w = model.get_parameter(name)
            w *= torch.logspace(-3, 3, w.size(0)).view(-1, 1) * torch.logspace(-3, 3, w.size(1))
    model.prune_(l0, j)
    for name, neuron_dim in MATRICES.items():
        w = model.get_parameter(name)
        assert w.count_nonzero() == int(l0 * w.numel())
        if neuron_dim is not None:
            assert (w != 0).sum(dim=1 - neuron_dim).min() >= j
    for name in BIASES:
        b = model.get_parameter(name)
        assert b.count_nonzero() == max(1, int(l0 * b.numel()))


@pytest.mark.parametrize("seed", range(12))
def test_prune_keeps_what_the_plain_prune_keeps(seed):
    """On random configurations, L0 and j, with many equal weights: the same survivors, bit for bit."""
    rng = random.Random(seed)
    model, j = random_model(seed), rng.randint(0, 4)
    if seed % 2:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p * 3).round())  # ties, and zeros
    l0 = rng.uniform(max(0.05, model.smallest_l0(j)), 1)
    before = arrays_of(model)
    model.prune_(l0, j)
    sparse = {name: neuron_dim for name, _, neuron_dim in model.sparse_parameters()}
    for name, w in before.items():
        if name in sparse:
            k = int(l0 * w.size) if w.ndim == 2 else max(1, int(l0 * w.size))
            w = plain_prune(w, k, sparse[name], j)
        assert np.array_equal(model.get_parameter(name).detach().numpy(), w), name


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.floats(0.01, 1), st.data())
def test_one_matrix_is_pruned_as_the_plain_prune_does(rows, columns, j, l0, data):
    """Any matrix of few distinct values: exact k, the floor inside k, the lower index first among equals."""
    neuron_dim = data.draw(st.sampled_from([None, 0, 1]))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    w = torch.tensor(values, dtype=torch.float64).view(rows, columns)
    k = int(l0 * w.numel())
    neurons, weights_of_each = (w.T if neuron_dim == 1 else w).shape
    floor = 0 if neuron_dim is None else neurons * min(j, weights_of_each)
    model = tiny_model(n_layer=1)
    parameter = torch.nn.Parameter(w.clone())
    model.sparse_parameters = lambda: [("c_fc.weight", parameter, neuron_dim)]
    if k < floor:
        with pytest.raises(ValueError, match="c_fc.weight"):
            model.prune_(l0, j)
    else:
        model.prune_(l0, j)
        assert np.array_equal(parameter.detach().numpy(), plain_prune(w.numpy(), k, neuron_dim, j))


def test_prune_leaves_dense_parameters_alone():
    """Bigram table, gains and sinks keep every bit, and biases do where they are not sparsified."""
    model = tiny_model(n_layer=1, use_rms_norm=False)
    before = arrays_of(model)
    model.prune_(0.3, sparsify_biases=False)
    for name, w in before.items():
        unchanged = np.array_equal(model.get_parameter(name).detach().numpy(), w)
        assert unchanged == (name not in MATRICES), name


def test_prune_at_l0_1_changes_nothing():
    """Dense training is the case l0 = 1, whatever j."""
    model = tiny_model()
    before = arrays_of(model)
    model.prune_(1.0, min_weights_per_neuron=4)
    assert all(np.array_equal(model.get_parameter(name).detach().numpy(), w) for name, w in before.items())


def test_prune_of_tied_embeddings_and_of_positions():
    """One matrix for embedding and unembedding is pruned once and stays one; positions are pruned like
    it."""
    model = tiny_model(tie_embeddings=True, use_positional_embeddings=True)
    model.prune_(0.3)
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    assert model.lm_head.weight is wte
    assert wte.count_nonzero() == int(0.3 * wte.numel()) and wpe.count_nonzero() == int(0.3 * wpe.numel())


def test_prune_to_less_than_one_weight_leaves_none():
    """Without a floor k may be 0 in a small matrix: it is zeroed then, and a bias keeps its largest
    entry."""
    model = tiny_model(n_layer=1)
    model.prune_(1 / 2000, min_weights_per_neuron=0)
    assert all(model.get_parameter(name).count_nonzero() == 0 for name in MATRICES)
    assert all(model.get_parameter(name).count_nonzero() == 1 for name in BIASES)


@pytest.mark.parametrize("d_model, d_mlp", [(8, 0), (12, 0), (20, 28), (24, 56), (44, 0), (48, 100)])
def test_smallest_l0_is_the_smallest_that_fits(d_model, d_mlp):
    """For every j it can be pruned to, and the next smaller count of weights cannot."""
    model = tiny_model(n_layer=1, d_model=d_model, d_mlp=d_mlp, vocab_size=7)
    for j in (1, 2, 3, 4, 5, 7):
        smallest = model.smallest_l0(j)
        model.prune_(smallest, j)
        largest_matrix = max(model.get_parameter(name).numel() for name in MATRICES)
        with pytest.raises(ValueError, match=f"fewer than {j}"):
            model.prune_(smallest - 1 / largest_matrix, j)


# ----------------------------------------------------------------------------------------------------------
# schedules


def test_l0_at_every_corner(choose):
    """1 until the anneal starts, halfway in its middle, the target from its end on, exactly."""
    choose(max_iters=1000, sparsity_anneal_start_fraction=0.01, sparsity_anneal_end_fraction=0.5)
    for target in (0.1, 1 / 3, 1 / 64, 0.7, 1.0):
        choose(target_l0_fraction=target)
        assert [train.l0_at(step) for step in (0, 9, 10)] == [1, 1, 1]
        assert train.l0_at(255) == pytest.approx(1 + (target - 1) * 245 / 490, rel=1e-15)
        assert [train.l0_at(step) for step in (500, 501, 999)] == [target] * 3


def test_l0_without_an_anneal_drops_at_once(choose):
    """Start equal to end: dense before that step, at the target from it on, be it step 0."""
    choose(max_iters=10, target_l0_fraction=0.1)
    for fraction, start in ((0.0, 0), (0.5, 5), (1.0, 10)):
        choose(sparsity_anneal_start_fraction=fraction, sparsity_anneal_end_fraction=fraction)
        assert [train.l0_at(step) for step in range(10)] == [1.0] * start + [0.1] * (10 - start)


fractions = st.integers(0, 100).map(lambda percent: percent / 100)


@few
@given(st.integers(1, 400), fractions, fractions, st.floats(1e-4, 1.0))
def test_l0_follows_its_formula_and_never_rises(choose, n, a, b, target):
    """For any run: a straight line, monotone, never beyond the target, and exactly there when it is over."""
    a, b = min(a, b), max(a, b)
    choose(max_iters=n, target_l0_fraction=target)
    choose(sparsity_anneal_start_fraction=a, sparsity_anneal_end_fraction=b)
    l0 = [train.l0_at(step) for step in range(n)]
    if a < b:
        expected = [1 + (target - 1) * min(max((i - a * n) / ((b - a) * n), 0), 1) for i in range(n)]
        assert l0 == pytest.approx(expected, rel=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(l0))
    assert all(target <= value <= 1 for value in l0)
    assert all(value == target for i, value in enumerate(l0) if i > b * n)


def test_lr_at_every_corner(choose):
    """0 at step 0, the whole rate where warmup ends, then linearly down, to be 0 just after the last
    step."""
    choose(max_iters=100, warmup_fraction=0.1, learning_rate=0.5, decay_lr=True, use_sharkfin_schedule=False)
    assert [train.lr_at(step) for step in (0, 1, 5, 10)] == [0, 0.05, 0.25, 0.5]
    assert train.lr_at(55) == pytest.approx(0.25)
    assert train.lr_at(99) == pytest.approx(0.5 / 90)
    choose(decay_lr=False)
    assert [train.lr_at(step) for step in (9, 10, 55, 99)] == [0.45, 0.5, 0.5, 0.5]
    choose(warmup_fraction=0.0)
    assert train.lr_at(0) == 0.5
    choose(warmup_fraction=1.0, decay_lr=True)
    assert [train.lr_at(step) for step in (0, 50, 99)] == [0, 0.25, 0.495]


def test_lr_is_multiplied_by_one_over_root_l0(choose):
    """The shark's fin: at every step the rate without it, over the square root of L0."""
    choose(max_iters=50, target_l0_fraction=1 / 64, sparsity_anneal_start_fraction=0.1, warmup_fraction=0.2)
    choose(use_sharkfin_schedule=False)
    base = [train.lr_at(step) for step in range(50)]
    choose(use_sharkfin_schedule=True)
    assert [train.lr_at(step) for step in range(50)] == pytest.approx(
        [rate * train.l0_at(step) ** -0.5 for step, rate in enumerate(base)], rel=1e-12)
    assert train.lr_at(40) / base[40] == pytest.approx(8)


@few
@given(st.integers(1, 300), fractions, st.booleans())
def test_lr_rises_in_warmup_and_falls_after(choose, n, warmup_fraction, decay):
    """For any run: monotone on both sides of the warmup's end, never negative, never above the setting."""
    choose(max_iters=n, warmup_fraction=warmup_fraction, decay_lr=decay)
    choose(use_sharkfin_schedule=False, learning_rate=0.01)
    lr, w = [train.lr_at(step) for step in range(n)], int(warmup_fraction * n)
    assert all(earlier < later for earlier, later in itertools.pairwise(lr[:w]))
    falls = [later < earlier for earlier, later in itertools.pairwise(lr[w:])]
    assert all(falls) if decay else not any(falls)
    assert all(0 <= rate <= 0.01 for rate in lr) and (w == n or lr[w] == 0.01)


# ----------------------------------------------------------------------------------------------------------
# the step


@pytest.mark.parametrize("target", [1.0, 0.25])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_gradients_leave_with_the_target_rms(scale, target):
    """Whether they were larger or smaller; all tensors by the same factor; the RMS before is returned."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 70, 1, 3)]
    for p, size in zip(parameters, (1.0, 2.0, 30.0)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * size * scale
    before = torch.cat([p.grad for p in parameters if p.grad is not None])
    rms = before.square().mean().sqrt()
    assert train.normalize_gradients_(parameters, target) == pytest.approx(rms.item(), rel=1e-5)
    after = torch.cat([p.grad for p in parameters if p.grad is not None])
    assert_close(after, before * target / (rms + 1e-5), 1e-5)
    assert after.square().mean().sqrt() == pytest.approx(target, rel=1e-2)
    assert parameters[3].grad is None


def test_target_rms_0_leaves_gradients_alone():
    """Not a bit changes, and the RMS is still returned."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, -3.0, 3.0, -3.0])
    assert train.normalize_gradients_([p], 0.0) == 3.0
    assert p.grad.tolist() == [3.0, -3.0, 3.0, -3.0]


def test_zero_gradients_stay_zero():
    """The 1e-5 in the denominator: no division by zero."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.zeros(4)
    assert train.normalize_gradients_([p], 1.0) == 0.0
    assert p.grad.tolist() == [0.0] * 4


def test_the_optimizer_is_plain_adam(choose):
    """Adam, not AdamW: betas and eps of the settings, no decay inside, every parameter once."""
    choose(beta1=0.8, beta2=0.85, eps=0.25)
    model = tiny_model(tie_embeddings=True)
    optimizer = train.build_optimizer(model)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["betas"] == (0.8, 0.85) and optimizer.defaults["eps"] == 0.25
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0 and not group["amsgrad"]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("seed", range(16))
def test_eight_steps_equal_the_plain_recipe(choose, seed):
    """On random configurations, from gradients to weights: what training calls gives what the method
    says."""
    rng = random.Random(seed)
    model = random_model(seed)
    j = rng.randint(0, 4)
    smallest = model.smallest_l0(j) or 0.05
    choose(target_l0_fraction=rng.choice((1.0, smallest, rng.uniform(smallest, 1))),
           min_weights_per_neuron=j, sparsity_anneal_start_fraction=0.125, sparsity_anneal_end_fraction=0.75,
           max_iters=8, seed=seed, sparsify_biases=rng.random() < 0.7,
           grad_clip_rms=rng.choice((1.0, 1.0, 0.5, 0.0)), batch_size=2, block_size=8,
           gradient_accumulation_steps=rng.choice((1, 2)), learning_rate=0.05, weight_decay=0.5,
           warmup_fraction=rng.choice((0.0, 0.25)), use_sharkfin_schedule=rng.random() < 0.7)
    tokens = np.random.default_rng(seed).integers(model.config.vocab_size, size=500).astype(np.uint16)
    data = train.Data(train=tokens, val=tokens, meta={}, tokenizer="")
    optimizer = train.build_optimizer(model)
    weights, moments = arrays_of(model), {}
    for step in range(8):
        batches = [train.training_batch(data, step, micro_step, CPU)
                   for micro_step in range(train.gradient_accumulation_steps)]
        expected_loss, gradients = plain_gradients(weights, model.config, batches)
        expected_rms = plain_step(weights, moments, gradients, step)

        loss = train.gradients_of_step(model, data, NO_SCALER, step, CPU)
        rms = train.update_(model, optimizer, NO_SCALER, step)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-9)
        assert rms.item() == pytest.approx(expected_rms, rel=1e-9)
        for name, w in weights.items():
            assert_close(model.get_parameter(name).detach(), w, 1e-9)
            assert np.array_equal(model.get_parameter(name).detach().numpy() != 0, w != 0), name


def still_(choose, model, **values):
    """An optimizer whose step moves nothing, as gradients are zero: only the prune and the decay do."""
    choose(grad_clip_rms=0.0, warmup_fraction=0.0, decay_lr=False, use_sharkfin_schedule=False)
    choose(target_l0_fraction=1.0, sparsity_anneal_start_fraction=0.0, sparsity_anneal_end_fraction=0.0)
    choose(**values)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return train.build_optimizer(model)


def test_decay_comes_after_the_prune(choose):
    """Of two neighbouring floats that the decay makes equal, the prune still sees which is the larger."""
    model = tiny_model(n_layer=1, d_model=4, vocab_size=4).double()
    below_1 = 1 - np.arange(2, 99) * 2.0**-53
    smaller = next(x for x in below_1 if x * (1 - 0.49) == np.nextafter(x, 1) * (1 - 0.49))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = smaller
        model.lm_head.weight[3, 3] = np.nextafter(smaller, 1)
    optimizer = still_(choose, model, learning_rate=1.0, weight_decay=0.49, target_l0_fraction=1 / 16,
                       min_weights_per_neuron=0)
    train.update_(model, optimizer, NO_SCALER, 0)
    assert model.lm_head.weight.nonzero().tolist() == [[3, 3]]


@pytest.mark.parametrize("tied", [True, False])
def test_decay_takes_matrices_but_the_bigram_table(choose, tied):
    """Each matrix shrinks by the factor 1 - weight_decay * lr, once; nothing else changes by a bit."""
    model = tiny_model(n_layer=1, tie_embeddings=tied, use_positional_embeddings=True, use_rms_norm=False)
    before = arrays_of(model)
    train.update_(model, still_(choose, model, learning_rate=0.5, weight_decay=0.5), NO_SCALER, 3)
    for name, w in before.items():
        factor = 0.75 if name in MATRICES or name == "transformer.wpe.weight" else 1
        assert np.array_equal(model.get_parameter(name).detach().numpy(), w * np.float32(factor)), name


def test_a_pruned_weight_comes_back_when_its_gradient_says_so(choose):
    """Zeroed at one step and pushed by its gradient at the next ones, it survives; another goes instead."""
    model = tiny_model()
    w = model.transformer.h[0].mlp.c_fc.weight
    choose(target_l0_fraction=0.5, sparsity_anneal_start_fraction=0.0, sparsity_anneal_end_fraction=0.0,
           max_iters=100, learning_rate=0.05, warmup_fraction=0.0)
    optimizer = train.build_optimizer(model)
    random_gradients_(model)
    train.update_(model, optimizer, NO_SCALER, 0)
    pruned = tuple((w == 0).nonzero()[7].tolist())
    for step in range(1, 20):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        w.grad[pruned] = 1.0
        train.update_(model, optimizer, NO_SCALER, step)
        assert w.count_nonzero() == w.numel() // 2
    assert w[pruned] < -0.05


def test_embeddings_and_biases_anneal_gradually(choose):
    """They follow L0 step by step, like every other tensor: none goes sparse at one blow."""
    model = tiny_model(n_layer=1, vocab_size=30, use_positional_embeddings=True)
    choose(target_l0_fraction=0.25, sparsity_anneal_start_fraction=0.1, sparsity_anneal_end_fraction=0.9)
    choose(max_iters=20)
    optimizer = train.build_optimizer(model)
    names = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight", *BIASES]
    tensors = [model.get_parameter(name) for name in names]
    fraction = []
    for step in range(20):
        random_gradients_(model)
        train.update_(model, optimizer, NO_SCALER, step)
        fraction.append([p.count_nonzero().item() / p.numel() for p in tensors])
    drops = -np.diff(np.array(fraction), axis=0)
    assert fraction[2] == [1.0] * len(names) and fraction[-1] == [0.25] * len(names)
    share_of_a_step, one_entry = 0.75 / 16, 1 / min(p.numel() for p in tensors)
    assert drops.min() >= 0 and drops.max() <= share_of_a_step + one_entry


def test_a_scaled_loss_gives_the_same_step(choose):
    """Gradients are unscaled before they are normalized: a loss scaler changes no bit of the weights."""
    choose(target_l0_fraction=0.5, sparsity_anneal_start_fraction=0.0, sparsity_anneal_end_fraction=0.0)
    choose(learning_rate=0.1)
    weights, rms = [], []
    for scaler in (NO_SCALER, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = tiny_model()
        optimizer = train.build_optimizer(model)
        scaler.scale(model(torch.arange(8).view(1, 8), torch.arange(1, 9).view(1, 8))[1]).backward()
        rms.append(train.update_(model, optimizer, scaler, 500))
        weights.append(arrays_of(model))
    assert rms[0] == rms[1]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_overflow_of_scaled_gradients_skips_adam(choose):
    """As float16 has them now and then: the infinite gradient touches no weight, and the scale is halved."""
    model = tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = still_(choose, model, weight_decay=0.0, grad_clip_rms=1.0, learning_rate=0.1)
    before = arrays_of(model)
    scaler.scale(torch.zeros(1))  # as the backward pass does
    model.lm_head.weight.grad[0, 0] = torch.inf
    assert train.update_(model, optimizer, scaler, 5).isinf()
    assert all(np.array_equal(model.get_parameter(name).detach().numpy(), w) for name, w in before.items())
    assert scaler.get_scale() == 512.0


def test_gradients_are_gone_after_the_update(choose):
    """The next step's micro-batches do not add to this step's gradients."""
    model = tiny_model()
    train.update_(model, still_(choose, model), NO_SCALER, 1)
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------
# the forward pass


@pytest.mark.parametrize("seed", range(24))
def test_logits_loss_and_gradients_equal_the_plain_forward(seed):
    """On random configurations, in float64; some targets are -1; in some the first position alone counts."""
    model = random_model(seed)
    c = model.config
    rng = np.random.default_rng(seed)
    idx = torch.from_numpy(rng.integers(c.vocab_size, size=(3, rng.integers(1, c.block_size + 1))))
    targets = torch.from_numpy(rng.integers(-1, c.vocab_size, size=idx.shape))
    if seed % 3 == 0:
        targets[:, 1:] = -1
    targets[0, 0] = 1
    weights = arrays_of(model)
    expected_loss, gradients = plain_gradients(weights, c, [(idx, targets)])

    logits, loss = model(idx, targets)
    loss.backward()
    plain = plain_logits({name: torch.from_numpy(w) for name, w in weights.items()}, c, idx)
    assert_close(logits.detach(), plain, 1e-9)
    assert_close(model(idx)[0].detach(), plain, 1e-9)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-9)
    for name, gradient in gradients.items():
        assert_close(model.get_parameter(name).grad, gradient, 1e-9)


def test_without_targets_there_is_no_loss():
    """model(idx) gives the logits of all positions, and None."""
    logits, loss = tiny_model()(torch.zeros(2, 5, dtype=torch.int64))
    assert logits.shape == (2, 5, 11) and loss is None


def test_too_long_an_input_is_refused():
    """The error names both lengths."""
    with pytest.raises(ValueError, match="9.*8"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.int64))


SINK_LOSSES = {
    "all positions": lambda y, dy: (y * dy).sum(),
    "the first position alone": lambda y, dy: (y * dy)[:, :, 0].sum(),
    "the last position alone": lambda y, dy: (y * dy)[:, :, -1].sum(),
    "an expanded gradient": lambda y, dy: y.sum(),
    "a transposed gradient": lambda y, dy: (y.transpose(2, 3) * dy.transpose(2, 3).contiguous()).sum(),
}


@pytest.mark.parametrize("loss", SINK_LOSSES)
@pytest.mark.parametrize("dropout_p", [0.0, 1e-12], ids=["fused on a CPU", "general"])
@pytest.mark.parametrize("queries, keys", [(1, 1), (6, 6), (70, 70), (1, 6)])
def test_the_sink_is_one_more_column_of_the_softmax(queries, keys, dropout_p, loss):
    """On both code paths, all gradients too; one query and many keys is how a cache decodes."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, queries, 4), (2, 3, keys, 4), (2, 3, keys, 4), (3,)]
    q, k, v, b = (torch.randn(shape, generator=g).double().requires_grad_() for shape in shapes)
    dy = torch.randn(q.shape, generator=g).double()
    expected = torch.stack([plain_attention(q[:, h], k[:, h], v[:, h], b[h]) for h in range(3)], dim=1)
    expected_gradients = torch.autograd.grad(SINK_LOSSES[loss](expected, dy), (q, k, v, b))
    y = sink_attention(q, k, v, b, dropout_p)
    assert_close(y.detach(), expected.detach(), 1e-9)
    gradients = torch.autograd.grad(SINK_LOSSES[loss](y, dy), (q, k, v, b))
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert_close(gradient, expected_gradient, 1e-9)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-12], ids=["fused on a CPU", "general"])
def test_attention_with_a_sink_does_not_depend_on_strides(dropout_p):
    """Views whose last dimension is not the innermost (a sparse product makes such) give what copies
    give."""
    g = torch.Generator().manual_seed(0)
    copies = [torch.randn(2, 3, 6, 4, generator=g, requires_grad=True) for _ in range(3)]
    views = [t.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in copies]
    b = torch.randn(3, generator=g)
    y, y_of_views = (sink_attention(*tensors, b, dropout_p) for tensors in (copies, views))
    assert_close(y_of_views.detach(), y.detach(), 1e-5)
    y.square().sum().backward()
    y_of_views.square().sum().backward()
    for copy, view in zip(copies, views):
        assert_close(view.grad, copy.grad, 1e-5)


def test_a_low_sink_is_no_sink_and_a_high_one_takes_all():
    """Logit -30: plain causal attention. Logit +30: the output is zero."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    plain = plain_attention(q[:, 0], k[:, 0], v[:, 0])
    assert_close(sink_attention(q, k, v, torch.tensor([-30.0]).double(), 0.0)[:, 0], plain, 1e-9)
    assert sink_attention(q, k, v, torch.tensor([30.0]).double(), 0.0).abs().max() < 1e-9


def test_loss_is_float32_under_autocast():
    """The blocks run in bfloat16; logits and loss are float32, and the loss is that of the logits."""
    model, seen = tiny_model(), []
    idx = torch.arange(8).view(1, 8)
    place = train.Place(0, 1, torch.device("cpu"), torch.bfloat16)
    with hooked(model.transformer.h[0].mlp.c_fc, seen.append), place.autocast():
        logits, loss = model(idx, idx + 1)
    assert [x.dtype for x in (*seen, logits, loss)] == [torch.bfloat16, torch.float32, torch.float32]
    assert loss.item() == pytest.approx(plain_loss(logits.double(), idx + 1).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_dropout_acts_in_training_alone():
    """With dropout the model in eval mode is the one without; in training two passes differ."""
    model, without = tiny_model(dropout=0.5), tiny_model(dropout=0.0)
    idx = torch.arange(8).view(1, 8)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], without.eval()(idx)[0])


def test_weights_start_as_they_should():
    """N(0, 0.02), c_proj smaller by sqrt(2 n_layer), bigrams uniform in [0, 0.02), gains 1, all others 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, d_model=128, d_head=16, vocab_size=256, block_size=128,
                          use_positional_embeddings=True, use_rms_norm=False))
    for name, p in model.state_dict().items():
        if name == "bigram_table":
            assert 0 <= p.min() and 0.0199 < p.max() < 0.02 and p.mean() == pytest.approx(0.01, rel=0.02)
        elif p.ndim == 2:
            std = 0.02 / math.sqrt(4) if "c_proj" in name else 0.02
            assert p.std() == pytest.approx(std, rel=0.02) and p.mean().abs() < std / 20
        else:
            assert (p == (1.0 if ".ln_" in name and name.endswith("weight") else 0.0)).all(), name


def test_state_dict_names_are_gpt2s():
    """Exactly the names that other tools look for; parts that are switched off have none."""
    block = ["ln_1.weight", "attn.sink_logit", "attn.c_attn.weight", "attn.c_attn.bias",
             "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "mlp.c_fc.weight", "mlp.c_fc.bias",
             "mlp.c_proj.weight", "mlp.c_proj.bias"]
    names = {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight", "bigram_table",
             *(f"transformer.h.{i}.{name}" for i in range(2) for name in block)}
    biases = {name for name in names if name.endswith("bias")}
    sinks = {name for name in names if name.endswith("sink_logit")}
    norm_biases = {name.replace("weight", "bias") for name in names if ".ln_" in name}
    assert set(tiny_model().state_dict()) == names
    assert set(tiny_model(tie_embeddings=True).state_dict()) == names
    assert set(tiny_model(use_positional_embeddings=True).state_dict()) == names | {"transformer.wpe.weight"}
    assert set(tiny_model(use_bias=False).state_dict()) == names - biases
    assert set(tiny_model(use_attention_sinks=False).state_dict()) == names - sinks
    assert set(tiny_model(use_bigram_table=False).state_dict()) == names - {"bigram_table"}
    assert set(tiny_model(use_rms_norm=False).state_dict()) == names | norm_biases


# ----------------------------------------------------------------------------------------------------------
# the nodes


def site_names(location):
    """Where the two modules of a location are in a model of two layers."""
    owner = location.split("_")[0] + "." if location in LOCATIONS[:8] else ""
    return [f"transformer.h.{i}.{owner}{location}" for i in range(2)]


def ablate_every_third(nodes):
    return nodes * (torch.arange(nodes.size(-1)) % 3 > 0)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("switched_on", [True, False], ids=["on", "off"])
def test_every_node_can_be_read_and_ablated_by_a_forward_hook(switched_on, location):
    """A site is a module of its name, on or off: a hook sees its k nonzeros, and what it returns goes on."""
    model = random_model(3, n_layer=2, n_head=0, activation_topk_fraction=0.5, activation="gelu",
                         residual_activation="identity", use_positional_embeddings=True,
                         activation_sparsity_locations=",".join(LOCATIONS) if switched_on else "")
    idx = some_tokens(2, 8)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dim = model.config.d_mlp if location == "mlp_neuron" else model.config.d_model
    for name in site_names(location):
        site, seen = model.get_submodule(name), []
        with hooked(site, seen.append):
            untouched = model(idx)[0].detach()
        (nodes,) = seen
        assert nodes.shape == (2, 8, dim)
        assert (nodes.count_nonzero(-1) == (dim // 2 if switched_on else dim)).all()
        with hooked(site, ablate_every_third):
            ablated = model(idx)[0].detach()
        assert_close(ablated, plain_logits(weights, model.config, idx, {name: ablate_every_third}), 1e-9)
        assert not torch.allclose(ablated, untouched)


def test_sites_lists_every_node_site():
    """All locations of all layers, on or off, each with its module."""
    model = tiny_model(activation_sparsity_locations="attn_q")
    named = dict(model.named_modules())
    expected = [(location, id(named[name])) for location in LOCATIONS for name in site_names(location)]
    assert sorted((location, id(module)) for location, module in model.sites()) == sorted(expected)
    assert {location for location, module in model.sites() if isinstance(module, AbsTopK)} == {"attn_q"}


# ----------------------------------------------------------------------------------------------------------
# generation


def plain_greedy(model, idx, n):
    """n tokens more, each the likeliest after the last block_size, without a cache."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
    return idx


@pytest.mark.parametrize("prompt_length", [1, 5, 8, 13], ids=lambda n: f"{n} of 8")
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no positions"])
def test_cached_generation_equals_uncached(positions, sinks, prompt_length):
    """Token for token, for a batch, well past block_size, from prompts shorter than it and longer."""
    model = random_model(5, use_positional_embeddings=positions, use_attention_sinks=sinks,
                         use_bigram_table=False, activation_topk_fraction=0.5,
                         activation_sparsity_locations=",".join(LOCATIONS))
    prompt = some_tokens(3, prompt_length)
    expected = plain_greedy(model, prompt, 20)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    different = max(len(set(row[prompt_length:].tolist())) for row in expected)
    assert different > 2, "a test on a constant text shows little"


def test_a_cache_is_continued_by_one_token():
    """Where several would be masked wrongly, there is an error."""
    model, idx = tiny_model(), some_tokens(2, 6)
    caches = [KVCache(8) for _ in model.transformer.h]
    with torch.no_grad():
        x = torch.cat([model.residual_stream(part, caches) for part in (idx[:, :5], idx[:, 5:])], dim=1)
        torch.testing.assert_close(x, model.residual_stream(idx))
        with pytest.raises(ValueError, match="one token at a time"):
            model.residual_stream(idx[:, :2], caches)


def test_each_row_of_a_batch_is_generated_as_if_alone():
    """Rows do not see each other."""
    model, prompt = random_model(2, use_bigram_table=False), some_tokens(4, 3)
    together = model.generate(prompt, 12, temperature=0)
    assert torch.equal(together, torch.cat([model.generate(row[None], 12, temperature=0) for row in prompt]))


def test_stream_yields_what_generate_returns():
    """Token by token, (B, 1) each; no tokens asked for, none given."""
    model, prompt = tiny_model(), some_tokens(2, 3)
    torch.manual_seed(0)
    whole = model.generate(prompt, 10)
    torch.manual_seed(0)
    tokens = list(model.stream(prompt, 10))
    assert all(token.shape == (2, 1) for token in tokens)
    assert torch.equal(whole, torch.cat([prompt, *tokens], dim=1))
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_what_is_generated_can_be_trained_on():
    """It is a tensor like any other, and the model still has gradients."""
    model = random_model(0)
    text = model.generate(some_tokens(1, 2), 3)
    model(text[:, :-1], text[:, 1:])[1].backward()
    assert model.lm_head.weight.grad.any()


def test_top_k_1_is_greedy():
    """And so is a temperature near 0."""
    model, prompt = tiny_model(), some_tokens(3, 4)
    expected = plain_greedy(model, prompt, 12)
    assert torch.equal(model.generate(prompt, 12, top_k=1), expected)
    assert torch.equal(model.generate(prompt, 12, temperature=1e-4), expected)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 3), (1.0, 1000)])
def test_tokens_are_drawn_as_temperature_and_top_k_say(temperature, top_k):
    """In 20,000 draws every token is as frequent as its probability, and none beyond the top_k is drawn."""
    model, n = random_model(5), 20_000
    prompt = some_tokens(1, 4)
    with torch.no_grad():
        logits = model(prompt)[0][0, -1] / temperature
    allowed = plain_largest((logits - logits.min() + 1).tolist(), top_k or 11)
    p = torch.zeros(11, dtype=torch.float64)
    p[allowed] = logits[allowed].exp() / logits[allowed].exp().sum()
    torch.manual_seed(0)
    (drawn,) = model.stream(prompt.expand(n, -1), 1, temperature, top_k)
    frequency = torch.bincount(drawn.flatten(), minlength=11) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was(training):
    """It runs without dropout, and training goes on as before: also when the stream is left half-way."""
    model = tiny_model(dropout=0.5).train(training)
    prompt = some_tokens(1, 4)
    expected = plain_greedy(tiny_model(dropout=0.0), prompt, 8)
    assert torch.equal(model.generate(prompt, 8, temperature=0), expected)
    assert all(module.training == training for module in model.modules())
    stream = model.stream(prompt, 5)
    next(stream)
    stream.close()
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
def test_sparse_kernels_give_the_same_logits(sinks):
    """A model that does not multiply its zeros is the same model, for one sequence and several."""
    model = tiny_model(d_model=32, vocab_size=40, use_attention_sinks=sinks)
    model.prune_(0.15)
    inputs = [some_tokens(batch, length) for batch, length in ((1, 8), (3, 8), (1, 1), (3, 1))]
    expected = [model(idx)[0].detach() for idx in inputs]
    text = model.generate(inputs[1][:, :4], 12, temperature=0)
    model.use_sparse_kernels_()
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 9
    for idx, logits in zip(inputs, expected):
        assert_close(model(idx)[0].detach(), logits, 1e-5)
    assert torch.equal(model.generate(inputs[1][:, :4], 12, temperature=0), text)


def test_sparse_kernels_work_under_autocast():
    """Sampling in bfloat16 on a CPU gives finite logits, in float32."""
    model = tiny_model()
    model.prune_(0.15, min_weights_per_neuron=1)
    model.use_sparse_kernels_()
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    with train.Place(0, 1, torch.device("cpu"), torch.bfloat16).autocast():
        logits, _ = model(some_tokens(2, 8))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_sparse_kernels_replace_only_what_is_sparse():
    """A dense model stays as it is."""
    model = tiny_model().use_sparse_kernels_()
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


# ----------------------------------------------------------------------------------------------------------
# settings


ILLEGAL = [
    ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
    ({"d_model": 0}, ["d_model=0", "at least 1"]),
    ({"d_head": 0}, ["d_head=0", "at least 1"]),
    ({"block_size": 0}, ["block_size=0", "at least 1"]),
    ({"vocab_size": -5}, ["vocab_size=-5", "at least 1"]),
    ({"d_mlp": -1}, ["d_mlp=-1", "negative"]),
    ({"n_head": -1}, ["n_head=-1", "negative"]),
    ({"d_model": 20, "d_head": 16}, ["d_model=20", "divisible", "d_head=16"]),
    ({"activation": "silu"}, ["activation", "'silu'", "gelu", "relu"]),
    ({"activation": ""}, ["activation", "''", "gelu", "relu"]),
    ({"residual_activation": "gelu"}, ["residual_activation", "'gelu'", "identity", "relu"]),
    ({"activation_sparsity_locations": "attn_in,mlp_neurons"}, ["'mlp_neurons'", *LOCATIONS]),
    ({"activation_sparsity_locations": "attn_in;mlp_in"}, ["'attn_in;mlp_in'", *LOCATIONS]),
    ({"dropout": 1.0}, ["dropout=1.0", "less than 1"]),
    ({"dropout": -0.1}, ["dropout=-0.1", "at least 0"]),
    ({"dropout": math.nan}, ["dropout=nan", "at least 0"]),
    ({"activation_topk_fraction": 1.5}, ["activation_topk_fraction=1.5", "at most 1"]),
    ({"activation_topk_fraction": 0.0}, ["activation_topk_fraction=0", "0.03125 or more"]),
    ({"activation_topk_fraction": 0.02}, ["activation_topk_fraction=0.02", "0.03125 or more"]),
    ({"activation_topk_fraction": math.nan}, ["activation_topk_fraction=nan"]),
]


@pytest.mark.parametrize("values, words", ILLEGAL, ids=lambda x: str(x)[:60] if isinstance(x, dict) else "")
def test_an_illegal_configuration_is_refused_in_one_sentence(values, words):
    """The error names field and value, and says or lists what is legal."""
    with pytest.raises(ValueError) as error:
        GPTConfig(**{"d_model": 32} | values)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_left_open_is_filled_in():
    """d_mlp is four times d_model, heads are d_model / d_head; spaces in the list of locations do no
    harm."""
    c = GPTConfig(d_model=32, d_head=8, activation_sparsity_locations=" attn_in , mlp_out,")
    assert (c.d_mlp, c.n_head, c.locations) == (128, 4, ["attn_in", "mlp_out"])
    assert GPTConfig(d_model=32, d_head=8, d_mlp=48, n_head=3).d_mlp == 48


def test_default_settings_are_the_papers():
    """The table of the method: a number that changes here changes what the project reproduces."""
    expected = {
        "n_layer": 8, "d_model": 1024, "d_head": 16, "d_mlp": 0, "block_size": 256,
        "residual_activation": "identity", "activation": "gelu",
        "use_rms_norm": True, "use_bias": True, "tie_embeddings": False,
        "use_positional_embeddings": False, "use_bigram_table": True, "use_attention_sinks": True,
        "dropout": 0.0,
        "target_l0_fraction": 1 / 64, "sparsity_anneal_start_fraction": 0.01,
        "sparsity_anneal_end_fraction": 0.5, "min_weights_per_neuron": 4, "sparsify_biases": True,
        "activation_topk_fraction": 0.25,
        "activation_sparsity_locations": "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out",
        "learning_rate": 1.6e-3, "beta1": 0.9, "beta2": 0.95, "eps": 0.1, "weight_decay": 0.1,
        "grad_clip_rms": 1.0, "use_sharkfin_schedule": True, "warmup_fraction": 0.01, "decay_lr": True,
        "log_every_n_steps": 1, "log_gradients_every_n_steps": 10, "log_weights_every_n_steps": 100,
        "log_sparsity_every_n_steps": 50,
    }
    assert expected.items() <= settings_of(vars(train)).items()


def script():
    """The globals of a script with a setting of each type, and with what is no setting."""
    return {"d_model": 64, "learning_rate": 1e-3, "use_bias": True, "start": "x",
            "CONSTANT": 3, "_private": 4, "__name__": "script", "function": print, "module": os}


def configured(*argv):
    """The settings after configure(), and the names that it says were set."""
    settings = script()
    chosen = configure(settings, [str(arg) for arg in argv])
    changes = {name: settings[name] for name in chosen}
    assert settings == script() | changes
    return changes


@pytest.fixture
def error_of(capsys):
    """error_of(*argv): the one line with which configure() ends the script, having changed nothing."""

    def run(*argv):
        settings = script()
        with pytest.raises(SystemExit) as ended:
            configure(settings, [str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and settings == script() and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return run


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="config.py"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


@pytest.mark.parametrize("argument, expected", [
    ("--d_model=256", {"d_model": 256}), ("--d_model=-1", {"d_model": -1}),
    ("--learning_rate=1/64", {"learning_rate": 1 / 64}), ("--learning_rate=3", {"learning_rate": 3.0}),
    ("--learning_rate=1.6e-3", {"learning_rate": 1.6e-3}), ("--learning_rate=.5", {"learning_rate": 0.5}),
    ("--use_bias=False", {"use_bias": False}), ("--use_bias=true", {"use_bias": True}),
    ("--start=a=b", {"start": "a=b"}), ("--start=", {"start": ""}), ("--start=1/64", {"start": "1/64"}),
    ("--start=--d_model=3", {"start": "--d_model=3"}), ("--start=a\n  b", {"start": "a\n  b"}),
])
def test_a_flag_is_read_as_its_settings_type(argument, expected):
    """A fraction or an int is welcome for a float; text is taken as it is, whatever it contains."""
    assert repr(configured(argument)) == repr(expected)


def test_files_and_flags_apply_in_the_order_given(config_file):
    """The last one wins, be it file or flag; a flag alone needs no file."""
    a = config_file("d_model = 1\nstart = 'a'\n", "a.py")
    b = config_file("d_model = 2\nlearning_rate = 1\n", "b.py")
    assert configured(a, b) == {"d_model": 2, "start": "a", "learning_rate": 1.0}
    assert configured(b, a)["d_model"] == 1
    assert configured(a, "--d_model=3", b)["d_model"] == 2
    assert configured(a, b, "--d_model=3")["d_model"] == 3
    assert configured("--d_model=3", "--d_model=4") == {"d_model": 4}
    assert configured() == {}


def test_a_config_file_is_python(config_file):
    """It may compute, and import modules; names with an underscore are its own; a float may be an int."""
    path = config_file("import math\n_width = 16\nd_model = 4 * _width  # é\n"
                       "learning_rate = 1\nuse_bias = d_model < math.pi\n")
    expected = [("d_model", 64), ("learning_rate", 1.0), ("use_bias", False)]
    assert repr(sorted(configured(path).items())) == repr(expected)


values_of_settings = st.fixed_dictionaries({
    "d_model": st.integers(), "learning_rate": st.floats(allow_nan=False, allow_infinity=False),
    "use_bias": st.booleans(), "start": st.text(st.characters(exclude_categories=["Cs"]), max_size=20)})


@few
@given(values_of_settings)
def test_any_value_survives_a_flag_and_a_file(config_file, values):
    """What is written as a flag or in a file is what the script gets."""
    assert configured(*(f"--{name}={value}" for name, value in values.items())) == values
    text = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    assert configured(config_file(text)) == values


@few
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_flag_of_any_text_is_read_or_refused(text):
    """Whatever stands after --d_model= is an int or ends the script: no other error, no other type."""
    try:
        (value,) = configured(f"--d_model={text}").values()
    except SystemExit as ended:
        assert ended.code == 2
    else:
        assert type(value) is int and value == int(text)


@pytest.mark.parametrize("key, closest", [
    ("d_modle", "d_model"), ("learning_rat", "learning_rate"), ("Start", "start"), ("use-bias", "use_bias"),
    ("CONSTANT", ""), ("_private", ""), ("__name__", ""), ("function", ""), ("module", ""), ("", ""),
])
def test_an_unknown_setting_is_an_error_that_names_the_closest(error_of, key, closest):
    """Misspelt names, and what in the script's globals is no setting."""
    error = error_of(f"--{key}=3")
    assert repr(key) in error and f"{closest}'" in error


def test_an_unknown_setting_in_a_file_is_an_error_that_names_the_file(error_of, config_file):
    """The same as for a flag, a function being no setting; what was right is not applied either."""
    path = config_file("d_modle = 3\n")
    error = error_of("--start=fine", path)
    assert "'d_modle'" in error and "'d_model'" in error and str(path) in error
    assert "'helper'" in error_of(config_file("def helper():\n    pass\n"))


@pytest.mark.parametrize("key, text, literal, expected", [
    ("d_model", "1.5", "1.5", "int"), ("d_model", "big", "'big'", "int"), ("d_model", "", "None", "int"),
    ("d_model", "True", "True", "int"), ("d_model", "1e3", "1e3", "int"), ("d_model", "1/2", "(1,)", "int"),
    ("learning_rate", "fast", "'fast'", "float"), ("learning_rate", "1/0", "'1/0'", "float"),
    ("learning_rate", "nan", "'nan'", "float"), ("learning_rate", "1e999", "'1e999'", "float"),
    ("learning_rate", "False", "False", "float"), ("learning_rate", "", "[0.1]", "float"),
    ("use_bias", "1", "1", "bool"), ("use_bias", "yes", "'yes'", "bool"), ("use_bias", "", "''", "bool"),
])
def test_a_wrong_type_names_key_value_and_type(error_of, config_file, key, text, literal, expected):
    """In a flag and in a file alike."""
    path = config_file(f"{key} = {literal}\n")
    for argument, value in ((f"--{key}={text}", text), (path, ast.literal_eval(literal))):
        error = error_of(argument)
        assert key in error and repr(value) in error and f"expected {expected}" in error
    assert str(path) in error


def test_text_is_not_made_of_a_number_in_a_file(error_of, config_file):
    """start = 3 in a file is no text: the error says so."""
    error = error_of(config_file("start = 3\n"))
    assert "start" in error and "3" in error and "expected str" in error


def test_a_number_too_large_for_a_float_is_an_error(error_of, config_file):
    """In a flag and in a file: an int that no float holds."""
    for argument in (f"--learning_rate=1{'0' * 400}", config_file(f"learning_rate = 1{'0' * 400}\n")):
        assert "learning_rate" in error_of(argument)


@pytest.mark.parametrize("text, words", [
    ("d_model = = 3\n", ["SyntaxError"]), ("if True:\nd_model = 3\n", ["IndentationError"]),
    ("d_model = 1 / 0\n", ["ZeroDivisionError"]), ("import no_such_module\n", ["no_such_module"]),
    ("raise ValueError('two\\nlines')\n", ["ValueError", "two lines"]),
    ("d_model = d_head\n", ["NameError", "d_head"]),
    (b"start = '\xff\xfe'\n", ["config.py"]), (b"d_model = 3\0\n", ["config.py"]),
])
def test_a_config_file_that_does_not_run_is_an_error(error_of, config_file, text, words):
    """One line that names the file and what is wrong in it, no traceback."""
    path = config_file(text)
    error = error_of(path)
    assert all(word in error for word in [str(path), *words]), error


def test_a_config_file_that_is_not_there_is_an_error(error_of, tmp_path):
    """Nor is a folder a config file."""
    assert "no_such.py" in error_of(tmp_path / "no_such.py")
    assert str(tmp_path) in error_of(tmp_path)


@pytest.mark.parametrize("argument", ["--d_model", "--help", "-h", "--", "-d_model=3", "--compile"])
def test_a_flag_without_a_value_is_an_error_that_says_how_to_write_it(error_of, argument):
    """The error shows the argument and the form that is read."""
    error = error_of(argument)
    assert repr(argument) in error and "--key=value" in error


def test_only_one_process_of_a_machine_prints_the_error(monkeypatch, capsys):
    """Under torchrun the other ranks end as well, but silently."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        configure(script(), ["--zz=3"])
    assert capsys.readouterr() == ("", "")


def test_importing_train_has_no_side_effects(tmp_path):
    """It prints nothing, writes nothing and draws no random number."""
    code = "import torch; s = torch.get_rng_state(); import train; assert s.equal(torch.get_rng_state())"
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.abspath(train.__file__))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, b"", b"", [])


# ----------------------------------------------------------------------------------------------------------
# the format of the released models


def random_gpt(**changes):
    """A tiny model with no weight at its initial value."""
    torch.manual_seed(1)
    tiny = {"n_layer": 2, "d_model": 16, "d_head": 4, "block_size": 8, "vocab_size": 257}
    model = GPT(GPTConfig(**(tiny | changes)))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def edit_released(folder, tensors=None, **keys):
    """Change keys of beeg_config.json (None deletes) and pass the state dict through the function
    `tensors`."""
    path = folder / "beeg_config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    if tensors:
        state = torch.load(folder / "final_model.pt", weights_only=True)
        torch.save(tensors(state), folder / "final_model.pt")


@pytest.fixture
def released(tmp_path):
    """released(**config) writes a random model in the format of the released ones: (model, folder)."""

    def write(**changes):
        model, folder = random_gpt(**changes), tmp_path / "released"
        model.to_circuit_sparsity(folder, tokenizer_name="bytes")
        return model, folder

    return write


RELEASED = [
    {}, {"tie_embeddings": True}, {"use_positional_embeddings": True}, {"use_attention_sinks": False},
    {"use_rms_norm": False, "use_bias": False}, {"use_bigram_table": False}, {"n_head": 2}, {"n_head": 8},
    {"activation_topk_fraction": 1.0}, {"residual_activation": "relu", "activation": "relu", "d_mlp": 24},
]


@pytest.mark.parametrize("changes", RELEASED, ids=str)
def test_a_model_survives_the_released_format(released, changes):
    """Written and read again it has the same configuration, the same weights bit for bit, the same
    logits."""
    model, folder = released(**changes)
    again = GPT.from_circuit_sparsity(folder)
    assert again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    idx = torch.randint(257, (2, 8))
    assert torch.equal(again(idx)[0], model(idx)[0])


@pytest.mark.parametrize("changes", RELEASED, ids=str)
def test_what_is_written_fits_the_released_loader(released, changes):
    """It has exactly the configuration keys and tensors that the authors' classes have, of the same
    shapes."""
    _, folder = released(**changes)
    config = json.loads((folder / "beeg_config.json").read_text())
    assert set(config) == {
        "block_size", "vocab_size", "n_layer", "n_head", "d_head", "d_model", "dropout", "bias", "ln_bias",
        "rms_norm", "residual_activation_type", "activation_type", "afrac", "afrac_loctypes", "debug_nans",
        "tied_unembed", "tokenizer_name", "grad_checkpointing", "d_mlp", "enable_bigram_table",
        "learnable_bigram_table", "d_pos_emb", "flash", "sink", "bigram_table_rank"}
    C, V, M = config["d_model"], config["vocab_size"], config["d_mlp"]
    W = config["n_head"] * config["d_head"]
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (config["block_size"], C),
              "lm_head.weight": (V, C), "final_logits_bias": (V,)}
    if config["enable_bigram_table"]:
        shapes["bigram_table"] = (V, V)
    norms = {"transformer.ln_f": C}
    for i in range(config["n_layer"]):
        h = f"transformer.h.{i}."
        norms |= {h + "ln_1": C, h + "ln_2": C}
        for name, rows, columns in (("attn.c_attn", 3 * W, C), ("attn.c_proj", C, W),
                                    ("mlp.c_fc", M, C), ("mlp.c_proj", C, M)):
            shapes[f"{h}{name}.weight"] = (rows, columns)
            if config["bias"]:
                shapes[f"{h}{name}.bias"] = (rows,)
        if config["sink"]:
            shapes[h + "attn.attn_imp.sink_logit"] = (config["n_head"],)
    for name, size in norms.items():
        shapes[name + ".weight"] = (size,)
        if not config["rms_norm"]:
            shapes[name + ".bias"] = (size,)
    tensors = torch.load(folder / "final_model.pt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes


def test_older_and_sparser_spellings_are_read(released):
    """n_mlp for d_mlp, keys left out that have a default, null sizes, no final_logits_bias, a causal
    mask."""
    model, folder = released(use_attention_sinks=False, d_mlp=24)

    def older(tensors):
        del tensors["final_logits_bias"]
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        return tensors

    edit_released(folder, older, n_mlp=24, d_head=None, d_mlp="absent", sink="absent", flash="absent",
                  d_pos_emb="absent", dropout="absent", residual_activation_type="absent")
    again = GPT.from_circuit_sparsity(folder)
    assert again.config == model.config
    idx = torch.randint(257, (2, 8))
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_released_half_precision_becomes_float32(released):
    """float16 weights are read as the float32 of the same value."""
    model, folder = released()
    edit_released(folder, lambda tensors: {k: t.half() for k, t in tensors.items()})
    for a, b in zip(GPT.from_circuit_sparsity(folder).parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())


def test_unknown_keys_of_a_released_model_are_warned_of(released):
    """They are named, not dropped silently, and the model is read."""
    _, folder = released()
    edit_released(folder, dan_test=3)
    with pytest.warns(UserWarning, match="dan_test"):
        GPT.from_circuit_sparsity(folder)


def test_released_positions_are_kept_unless_they_are_zero(released):
    """A zero wpe adds nothing and becomes no parameter; any other is one."""
    _, folder = released()
    assert not GPT.from_circuit_sparsity(folder).config.use_positional_embeddings
    wpe = torch.zeros(8, 16)
    wpe[3, 3] = 1e-3
    edit_released(folder, lambda tensors: tensors | {"transformer.wpe.weight": wpe})
    model = GPT.from_circuit_sparsity(folder)
    assert torch.equal(model.transformer.wpe.weight, wpe)


def test_a_released_bigram_table_that_is_fixed_stays_so(released, tmp_path):
    """It is read without gradient, and written as not learnable again."""
    _, folder = released()
    edit_released(folder, learnable_bigram_table=False)
    model = GPT.from_circuit_sparsity(folder)
    assert not model.bigram_table.requires_grad
    model.to_circuit_sparsity(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "beeg_config.json").read_text())["learnable_bigram_table"]


def with_tensor(name, value):
    return lambda tensors: tensors | {name: value}


def without_tensor(name):
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


@pytest.mark.parametrize("changes, tensors, keys, word", [
    ({}, None, {"d_pos_emb": 32}, "d_pos_emb"),
    ({}, None, {"use_tied_aux_matrix": True}, "use_tied_aux_matrix"),
    ({"use_rms_norm": False}, None, {"ln_bias": False}, "LayerNorms without bias"),
    ({}, with_tensor("final_logits_bias", torch.ones(257)), {}, "final_logits_bias"),
    ({}, with_tensor("transformer.h.0.extra.weight", torch.ones(2)), {}, "extra"),
    ({}, without_tensor("transformer.h.1.mlp.c_fc.weight"), {}, "c_fc"),
    ({}, with_tensor("lm_head.weight", torch.ones(3, 16)), {}, "lm_head"),
    ({"tie_embeddings": True}, with_tensor("lm_head.weight", torch.ones(257, 16)), {}, "tied_unembed"),
    ({}, None, {"enable_bigram_table": False}, "bigram_table"),
    ({}, None, {"sink": False}, "sink_logit"),
    ({}, None, {"n_layer": "absent"}, "n_layer"),
    ({}, None, {"afrac_loctypes": "attn_in,attn_pattern"}, "attn_pattern"),
    ({}, None, {"activation_type": "silu"}, "silu"),
    ({}, None, {"d_model": "wide"}, "beeg_config.json"),
])
def test_a_released_model_that_does_not_fit_is_refused(released, changes, tensors, keys, word):
    """In one sentence that names the part; nothing is dropped silently."""
    _, folder = released(**changes)
    edit_released(folder, tensors, **keys)
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_circuit_sparsity(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, error", [
    ("final_model.pt", b"not a checkpoint", ValueError), ("final_model.pt", None, OSError),
    ("beeg_config.json", b"{", ValueError), ("beeg_config.json", b"[1]", ValueError),
    ("beeg_config.json", None, OSError),
])
def test_broken_files_of_a_released_model_are_refused(released, name, content, error):
    """A file that is missing is an OSError, one that makes no sense a ValueError."""
    _, folder = released()
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(error):
        GPT.from_circuit_sparsity(folder)


def test_a_model_is_not_written_over_another(released):
    """to_circuit_sparsity refuses a folder that holds a model."""
    model, folder = released()
    with pytest.raises(FileExistsError, match="choose another folder"):
        model.to_circuit_sparsity(folder)


def test_a_released_model_is_trained_on_and_sampled(released, here):
    """--init_from=FOLDER starts training from its weights and shapes, and samples them; the run resumes."""
    model, folder = released(block_size=16, n_head=2)
    small = "--device=cpu --compile=False --batch_size=2 --gradient_accumulation_steps=1 --eval_iters=1"
    start = f"train.py --init_from={folder} --dataset=tiny --target_l0_fraction=1 --learning_rate=0 {small}"
    assert run(f"{start} --max_iters=2") == 0
    assert weights() == frozen(model.state_dict())
    assert run("train.py --init_from=resume --max_iters=3 --learning_rate=1e-3") == 0
    assert checkpoint()["step"] == 3 and checkpoint()["config"]["n_head"] == 2
    shutil.copy("data/tiny/tokenizer.json", folder)
    assert run(f"sample.py --init_from={folder} --num_samples=1 --max_new_tokens=20 --device=cpu") == 0
    assert run(f"{start} --d_model=32") == 2
    edit_released(folder, learnable_bigram_table=False)
    assert run(start) == 2


# ----------------------------------------------------------------------------------------------------------
# prepare.py

# With val_fraction 0.5 these are on both sides, whatever else is in the corpus.
TEXTS = [f"def f{i}(x):\n    return x + {i}  # number {i}\n" for i in range(24)]


def run_prepare(data_dir, *arguments):
    """Run prepare.py's main in this process and return the folder it wrote; put its settings back."""
    saved = dict(vars(prepare))
    try:
        usual = [f"--data_dir={data_dir}", "--name=d", "--tokenizer=bytes", "--val_fraction=0.5"]
        prepare.main([*usual, *arguments])
    finally:
        vars(prepare).update(saved)
    return Path(data_dir) / "d"


def write_jsonl(path, rows):
    """Write rows as JSON, and strings as they are, one per line."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def corpus(folder, texts=TEXTS, name="texts.jsonl"):
    folder.mkdir(exist_ok=True)
    return write_jsonl(folder / name, [{"text": text, "n": i} for i, text in enumerate(texts)])


def parts(folder):
    """The documents of train.bin and of val.bin, decoded with what is in the folder and nothing else."""
    encoding = prepare.load_tokenizer(folder / "tokenizer.json")
    documents = []
    for part in ("train", "val"):
        ids = np.fromfile(folder / f"{part}.bin", dtype="<u2")
        assert ids[-1] == encoding.eot_token, "a bin ends with <|endoftext|>"
        ends = np.flatnonzero(ids == encoding.eot_token)
        documents.append([encoding.decode(piece[piece != encoding.eot_token].tolist(), errors="strict")
                          for piece in np.split(ids, ends + 1)[:-1]])
    return documents


def contents(folder):
    """Every file below `folder` with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bins(folder):
    """What has to be the same whenever the input is; meta.json has the date in it."""
    return {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.json")}


def byte_tokenizer(eot, pattern=r"[\s\S]", missing=()):
    return tiktoken.Encoding("custom", pat_str=pattern,
                             special_tokens={} if eot is None else {"<|endoftext|>": eot},
                             mergeable_ranks={bytes([b]): b for b in range(256) if b not in missing})


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@hypothesis_settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
                              min_size=1)))
def test_any_text_survives_the_round_trip_through_bins_and_tokenizer(tokenizer, texts):
    """Decoding the bins with tokenizer.json alone gives every document back, in order, in one of the
    bins."""
    with tempfile.TemporaryDirectory() as tmp:
        path = corpus(Path(tmp), texts + TEXTS)
        arguments = (f"--dataset={path}", f"--tokenizer={tokenizer}", "--vocab_size=270")
        train, val = parts(run_prepare(f"{tmp}/data", *arguments))
    held_out = [text for text in texts + TEXTS if prepare.is_held_out(text.encode(), 0.5)]
    assert val == held_out
    assert train == [text for text in texts + TEXTS if text not in held_out]


def test_the_same_input_gives_the_same_bytes_on_any_number_of_cores(tmp_path, monkeypatch):
    """Two runs agree in bins and tokenizer, with one thread and with five."""
    path = corpus(tmp_path)
    arguments = (f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=280")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    first = bins(run_prepare(tmp_path / "one", *arguments))
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert bins(run_prepare(tmp_path / "two", *arguments)) == first


def test_a_trained_tokenizer_has_vocab_size_tokens_the_last_being_endoftext(tmp_path):
    """257 is bytes only, 280 has 23 merges; meta.json, encoding and <|endoftext|> agree on the number."""
    path = corpus(tmp_path, [*TEXTS, " " * 2_000_000])  # more spaces than a regular expression can take
    for size in (257, 280):
        folder = run_prepare(tmp_path, f"--dataset={path}", "--tokenizer=bpe", f"--vocab_size={size}")
        encoding = prepare.load_tokenizer(folder / "tokenizer.json")
        assert encoding.n_vocab == json.loads((folder / "meta.json").read_text())["vocab_size"] == size
        assert encoding.eot_token == size - 1 and len(encoding.token_byte_values()) == size - 1


def test_the_trained_tokenizer_sees_training_documents_only(tmp_path):
    """Changing a held-out document leaves the tokenizer as it was; changing a training document does not."""
    candidates = [f"zq{i} " * 50 for i in range(99)]
    held_out = next(text for text in candidates if prepare.is_held_out(text.encode(), 0.5))
    trained_on = next(text for text in candidates if not prepare.is_held_out(text.encode(), 0.5))
    tokenizers = []
    for i, texts in enumerate((TEXTS, [held_out, *TEXTS], [trained_on, *TEXTS])):
        path = corpus(tmp_path, texts)
        folder = run_prepare(tmp_path / str(i), f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=280")
        tokenizers.append((folder / "tokenizer.json").read_bytes())
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]


def test_text_that_spells_endoftext_stays_text(tmp_path):
    """There are as many <|endoftext|> ids as documents, even if a document contains those very
    characters."""
    texts = [text + "<|endoftext|>" for text in TEXTS]
    folder = run_prepare(tmp_path, f"--dataset={corpus(tmp_path, texts)}")
    train, val = parts(folder)
    assert sorted(train + val) == sorted(texts)


def test_meta_counts_what_is_in_the_bins(tmp_path):
    """Tokens are half the file's bytes, bytes are the text's, and the digest is that of tokenizer.json."""
    path = corpus(tmp_path, [*TEXTS, "naïve 🎉"])
    folder = run_prepare(tmp_path, f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=280")
    meta = json.loads((folder / "meta.json").read_text())
    for part, documents in zip(("train", "val"), parts(folder)):
        tokens = (folder / f"{part}.bin").stat().st_size // 2
        assert meta[part] == {"tokens": tokens, "documents": len(documents),
                              "bytes": sum(len(text.encode()) for text in documents)}
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert meta["tokenizer_sha256"] == digest


def test_validation_documents_do_not_depend_on_order_and_are_not_trained_on(tmp_path):
    """The same documents, reversed and some of them twice, are split the same way."""
    train, val = parts(run_prepare(tmp_path / "a", f"--dataset={corpus(tmp_path)}"))
    again = corpus(tmp_path, TEXTS[::-1] + TEXTS[:9])
    train_again, val_again = parts(run_prepare(tmp_path / "b", f"--dataset={again}"))
    assert set(train) == set(train_again) and set(val) == set(val_again)
    assert not set(train) & set(val)


def test_val_fraction_is_kept_on_average():
    """Of 20,000 documents one in a hundred is held out, give or take four standard deviations."""
    held_out = sum(prepare.is_held_out(str(i).encode(), 0.01) for i in range(20_000))
    assert abs(held_out - 200) < 4 * 14


def test_max_tokens_gives_a_beginning_of_the_whole(tmp_path):
    """The limited train.bin is the shortest run of whole documents, from the start, of max_tokens."""
    path = corpus(tmp_path)
    whole = np.fromfile(run_prepare(tmp_path / "whole", f"--dataset={path}") / "train.bin", dtype="<u2")
    ends = np.flatnonzero(whole == 256) + 1
    for limit in (100, ends[4]):
        folder = run_prepare(tmp_path / "some", f"--dataset={path}", f"--max_tokens={limit}")
        some = np.fromfile(folder / "train.bin", dtype="<u2")
        assert len(some) == ends[ends >= limit][0]
        assert np.array_equal(some, whole[:len(some)])


def test_the_largest_vocabulary_that_fits_uint16_is_stored_exactly(tmp_path):
    """With 65,536 tokens the last id is 65,535, and documents end with it; one more is an error."""
    prepare.save_tokenizer(byte_tokenizer(65_535), tmp_path / "tokenizer.json")
    folder = run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", f"--tokenizer={tmp_path}/tokenizer.json")
    train, val = parts(folder)
    assert sorted(train + val) == sorted(TEXTS)
    assert np.fromfile(folder / "val.bin", dtype="<u2").max() == 65_535


def test_any_encoding_comes_back_from_its_file_unchanged(tmp_path):
    """Shuffled byte ids, merges, unused ids, several special tokens: all as in published encodings."""
    order = [b for b in range(256) if chr(b).isprintable() and b != 32]
    order += [b for b in range(256) if b not in order]
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    ranks |= {b"he": 256, "é".encode(): 257, b"\xc3\xa9\xff": 259, b" th": 261, b'"\n\x7f': 262}
    gpt2_like = tiktoken.Encoding("gpt2-like", pat_str=r"'s|\p{L}+|[^\p{L}]+", mergeable_ranks=ranks,
                                  special_tokens={"<|endoftext|>": 300, "<|pad|>": 258})
    for encoding in (gpt2_like, byte_tokenizer(256)):
        prepare.save_tokenizer(encoding, tmp_path / "tokenizer.json")
        loaded = prepare.load_tokenizer(tmp_path / "tokenizer.json")
        for attribute in ("name", "_pat_str", "_mergeable_ranks", "_special_tokens", "n_vocab"):
            assert getattr(loaded, attribute) == getattr(encoding, attribute)
        assert loaded.encode_ordinary("the été's\n🎉") == encoding.encode_ordinary("the été's\n🎉")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"tokens": 3}', '{"name": "x", "pattern": "(", "special_tokens": {}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {}, "tokens": ["a", "a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {"e": 0}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {"e": -1}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {}, "tokens": [[999]]}',
    '{"name": "x", "pattern": ".", "special_tokens": {}, "tokens": [7]}'])
def test_a_malformed_tokenizer_file_is_a_value_error(tmp_path, text):
    """load_tokenizer says in a sentence which file is wrong; a missing file stays a FileNotFoundError."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        prepare.load_tokenizer(path)
    path.write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer that prepare.py wrote") as error:
        prepare.load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_local_files_of_every_format_are_read_in_order_of_their_paths(tmp_path):
    """.txt and .py are documents, rows of .jsonl and .parquet are; each as .gz too, in nested folders."""
    import pyarrow.parquet
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    names = ["a.txt", "b.py", "c.jsonl", "d.parquet", "e.txt.gz", "f.py.gz", "g.jsonl.gz", "h.parquet.gz"]
    expected = []
    for i, name in enumerate(names):
        path = deep / name.removesuffix(".gz")
        texts = [f"{name} {k}: é\r\n" for k in range(2 if name[0] in "cdgh" else 1)]
        expected += texts
        if ".jsonl" in name:
            write_jsonl(path, [{"body": text} for text in texts])
        elif ".parquet" in name:
            pyarrow.parquet.write_table(pyarrow.table({"n": [i] * len(texts), "body": texts}), path)
        else:
            path.write_bytes(texts[0].encode())
        if name.endswith(".gz"):
            (deep / name).write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    folder = run_prepare(tmp_path, f"--dataset={tmp_path}/a/**/*", "--text_column=body")
    train, val = parts(folder)
    assert train == [t for t in expected if t not in val] and val == [t for t in expected if t not in train]


def test_the_standard_library_is_the_default(tmp_path):
    """Without arguments the documents are the .py files of the running Python, not what was installed."""
    assert prepare.dataset == "python_stdlib"
    paths = prepare.local_files()
    assert paths == sorted(paths) and len(paths) > 500 and not any("site-packages" in path for path in paths)
    train, _ = parts(run_prepare(tmp_path, "--max_tokens=100000"))
    files = (Path(path).read_bytes() for path in paths)
    assert train[0].encode() == next(data for data in files if data and not prepare.is_held_out(data, 0.5))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hugging_face_datasets_are_streamed(tmp_path, monkeypatch, kind):
    """Rows go through `datasets` in streaming mode, training and validation from their own splits."""
    import datasets
    folder, calls, load = tmp_path / "copy", [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: calls.append(kw) or load(*a, **kw))
    for part, texts in (("train", TEXTS[:20]), ("test", TEXTS[20:])):
        path = corpus(folder, texts, f"{part}.jsonl")
        if kind == "parquet":
            datasets.Dataset.from_json(str(path), cache_dir=tmp_path).to_parquet(folder / f"{part}.parquet")
            path.unlink()
    train, val = parts(run_prepare(tmp_path, f"--dataset={folder}", "--val_split=test"))
    assert train == TEXTS[:20] and val == TEXTS[20:]
    assert calls == [{"split": "train", "streaming": True}, {"split": "test", "streaming": True}]
    train, val = parts(run_prepare(tmp_path, f"--dataset={folder}"))
    assert sorted(train + val) == sorted(TEXTS[:20])


def test_a_hub_name_goes_to_the_datasets_library(tmp_path, monkeypatch):
    """owner/name and its configuration arrive there as they are; the folder is named after them."""
    import datasets
    load, path = datasets.load_dataset, corpus(tmp_path)

    def load_dataset(name, config, **kw):
        assert (name, config) == ("owner/some.name", "cfg")
        return load("json", data_files={"train": str(path)}, **kw)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run_prepare(tmp_path / "data", "--dataset=owner/some.name", "--subset=cfg", "--name=")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["owner_some_name"]


def test_documents_that_cannot_be_used_are_skipped_and_counted(tmp_path, capsys):
    """The rest is kept; meta.json and the last lines say how many were left out, and why."""
    folder = tmp_path / "texts"
    corpus(folder)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é".encode("latin-1"))
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(2000))[:1000])
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "spaces.txt").write_bytes(b" " * 5_000_000)
    (folder / "picture.png").write_bytes(b"PNG")
    write_jsonl(folder / "rows.jsonl", [{"text": None}, '{"text": "cut', "[1, 2]", {"text": 5},
                                        {"other": ""}, "", '{"text": "\\ud800"}', {"text": "good"}])
    prepare.save_tokenizer(byte_tokenizer(256, pattern=r"\s+(?!\S)|\s+|\S+"), tmp_path / "t.json")
    out = run_prepare(tmp_path, f"--dataset={folder}/*", f"--tokenizer={tmp_path}/t.json")
    train, val = parts(out)
    assert sorted(train + val) == sorted([*TEXTS, "good"])
    assert json.loads((out / "meta.json").read_text())["skipped"] == {
        "empty": 2, "not UTF-8": 2, "binary": 1, "unreadable": 2, "unknown format": 1, "broken line": 2,
        "not text": 1, "no text column": 1, "not tokenizable": 1}
    assert "13 skipped (1 binary, 2 broken line, 2 empty" in capsys.readouterr().out


def test_a_long_stream_is_encoded_a_little_ahead():
    """The first documents come out long before the last go in: few are in memory at a time."""
    def documents():
        for i in range(2 * os.cpu_count()):
            yield f"{i} " * 500_000
        raise AssertionError("too many documents were taken in before the first came out")
    stream = prepare.encode_documents(documents(), byte_tokenizer(256), 0.5)
    ids, size, _ = next(stream)
    assert size == len(ids) - 1 == 1_000_000
    stream.close()


def test_an_interrupt_leaves_nothing_and_changes_nothing(tmp_path, monkeypatch, capsys):
    """Ctrl-C while writing: status 130, one line, no new folder; a folder that was there keeps its bytes."""
    path, encode = corpus(tmp_path), prepare.encode_documents

    def interrupted(*args):
        yield from itertools.islice(encode(*args), 3)
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, "encode_documents", interrupted)
    for prepare_first in (False, True):
        if prepare_first:
            with monkeypatch.context() as m:
                m.setattr(prepare, "encode_documents", encode)
                run_prepare(tmp_path / "data", f"--dataset={path}")
        before = contents(tmp_path / "data") if prepare_first else {}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_prepare(tmp_path / "data", f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=270")
        assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1
        assert contents(tmp_path / "data") == before
        assert os.listdir(tmp_path / "data") == (["d"] if prepare_first else [])


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    """kill -9 while writing: nothing has the folder's name; what was left is gone after the next run."""
    path, data = corpus(tmp_path), tmp_path / "data"
    code = ("import sys, time, prepare\n"
            "def stuck(*args):\n    print('writing', flush=True)\n    time.sleep(60)\n    yield\n"
            "prepare.encode_documents = stuck\nprepare.main(sys.argv[1:])\n")
    arguments = [f"--dataset={path}", f"--data_dir={data}", "--name=d", "--tokenizer=bytes"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
                               cwd=Path(prepare.__file__).parent)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [name.startswith(".d.new-") for name in os.listdir(data)] == [True]
    run_prepare(data, f"--dataset={path}")
    assert os.listdir(data) == ["d"]


def test_a_run_killed_while_replacing_the_folder_loses_nothing(tmp_path):
    """Between two renames the old folder has another name; the next run, even if it fails, gives it back."""
    path, data = corpus(tmp_path), tmp_path / "data"
    folder = run_prepare(data, f"--dataset={path}")
    before, dead = contents(data), subprocess.Popen(["true"])
    dead.wait()
    folder.rename(data / f".d.old-{dead.pid}")
    with pytest.raises(SystemExit):
        run_prepare(data, f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=60000")
    assert contents(data) == before


def run_script(*arguments, **options):
    """Run prepare.py as a user would, and return the finished process."""
    return subprocess.run([sys.executable, "prepare.py", *arguments], cwd=Path(prepare.__file__).parent,
                          capture_output=True, text=True, check=False, **options)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """If the last rename fails, after the old folder was moved aside, the old folder is moved back."""
    path, data, rename = corpus(tmp_path), tmp_path / "data", os.rename
    run_prepare(data, f"--dataset={path}")
    before = contents(data)

    def refuse(source, target):
        if ".new-" in str(source):
            raise OSError(13, "Permission denied")
        rename(source, target)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(SystemExit):
        run_prepare(data, f"--dataset={path}", "--max_tokens=50")
    assert contents(data) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """As a script, with files limited to 4 KB: status 2, one line, no traceback, an empty data folder."""
    resource = pytest.importorskip("resource")
    path = corpus(tmp_path, [f"{text * 99}" for text in TEXTS])
    result = run_script(f"--dataset={path}", f"--data_dir={tmp_path}/data", "--tokenizer=bytes",
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path / "data") == []


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    """Without rustbpe the default tokenizer cannot be trained; the line says what to install."""
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(SystemExit):
        run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", "--tokenizer=bpe")
    assert capsys.readouterr().err == "error: rustbpe is not installed: pip install -r requirements.txt\n"


def test_as_a_script_it_reports_and_names_the_next_command(tmp_path):
    """The last lines tell where the data is, its size, the vocabulary, bytes per token, what to do next."""
    result = run_script(f"--dataset={corpus(tmp_path)}", f"--data_dir={tmp_path}/data", "--tokenizer=bytes",
                        "--val_fraction=0.5", "--name=d")
    assert (result.returncode, result.stderr) == (0, "")
    for words in (f"{tmp_path}/data/d: ", " training tokens in ", " validation tokens in ", "0 skipped",
                  "vocabulary 257", " bytes per token",
                  f"next: python train.py config/quickstart.py --dataset={tmp_path}/data/d\n"):
        assert words in result.stdout


def bad_files(tmp):
    """Write the files that the bad runs below name."""
    import pyarrow.parquet
    corpus(tmp / "ok")
    corpus(tmp / "copy", name="train.jsonl")
    corpus(tmp / "copy", [""], name="test.jsonl")
    (tmp / "lines").mkdir()
    (tmp / "lines" / "a.txt").write_text("one\ntwo\n")
    (tmp / "one.txt").write_text("a single document")
    (tmp / "table.csv").write_text("text\nhello\n")
    write_jsonl(tmp / "nothing.jsonl", [{"text": ""}, {"text": "\0"}])
    write_jsonl(tmp / "other.jsonl", [{"body": "x", "id": 1}, {"text": "y"}])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp / "other.parquet")
    (tmp / "a_file").write_text("")
    (tmp / "used" / "d").mkdir(parents=True)
    (tmp / "used" / "d" / "thesis.tex").write_text("years of work")
    (tmp / "not.json").write_text("[1, 2]")
    for name, encoding in (("no_end", byte_tokenizer(None)), ("holes", byte_tokenizer(256, missing=b"qz")),
                           ("huge", byte_tokenizer(65_536))):
        prepare.save_tokenizer(encoding, tmp / f"{name}.json")


BAD_PREPARE = [  # what is wrong, the arguments ({tmp} holds the files above), words of the line that says so
    ("no match", ["--dataset={tmp}/*.txtt"], ["no file matches"]),
    ("no such file", ["--dataset={tmp}/missing.jsonl"], ["no file matches", "missing.jsonl"]),
    ("no network for a dataset", ["--dataset=owner/name"], ["owner/name", "reach", "glob"]),
    ("no such split", ["--dataset={tmp}/copy", "--split=tran"], ["tran", "'train'"]),
    ("no such validation split", ["--dataset={tmp}/copy", "--val_split=vla"], ["vla", "'train'"]),
    ("no such subset", ["--dataset={tmp}/copy", "--subset=en"], ["'en'", "default"]),
    ("no text column in a stream", ["--dataset={tmp}/copy", "--text_column=body"], ["'body'", "text, n"]),
    ("no text column in .jsonl", ["--dataset={tmp}/other.jsonl"], ["other.jsonl", "'text'", "body, id"]),
    ("no text column in .parquet", ["--dataset={tmp}/other.parquet"], ["other.parquet", "'text'", "body"]),
    ("lines as documents", ["--dataset={tmp}/lines"], ["every line", "**/*.txt"]),
    ("splits of local files", ["--val_split=test"], ["Hugging Face"]),
    ("unknown format", ["--dataset={tmp}/table.csv"], ["no usable document", "1 unknown format", ".jsonl"]),
    ("nothing usable", ["--dataset={tmp}/nothing.jsonl"], ["no usable document", "1 binary, 1 empty"]),
    ("nothing to validate on", ["--dataset={tmp}/one.txt", "--val_fraction=0.001"],
     ["raise --val_fraction"]),
    ("nothing to train on", ["--dataset={tmp}/one.txt", "--val_fraction=0.999"], ["lower --val_fraction"]),
    ("empty validation split", ["--dataset={tmp}/copy", "--val_split=test"], ["another --val_split"]),
    ("val_fraction of 0", ["--val_fraction=0"], ["val_fraction=0.0", "between"]),
    ("val_fraction of 1", ["--val_fraction=1"], ["val_fraction=1.0", "between"]),
    ("negative max_tokens", ["--max_tokens=-1"], ["max_tokens=-1"]),
    ("vocabulary over uint16", ["--tokenizer=bpe", "--vocab_size=65537"], ["65537", "65536"]),
    ("vocabulary under the bytes", ["--tokenizer=bpe", "--vocab_size=256"], ["256", "257"]),
    ("text too small", ["--tokenizer=bpe", "--vocab_size=5000"], ["5000", "lower --vocab_size"]),
    ("unknown encoding", ["--tokenizer=gtp2"], ["gtp2", "'bpe'", "gpt2", "cl100k_base"]),
    ("no network for an encoding", ["--tokenizer=gpt2"], ["gpt2", "no network", "'bytes'"]),
    ("encoding over uint16", ["--tokenizer={tmp}/huge.json"], ["65537", "65536"]),
    ("encoding without an end", ["--tokenizer={tmp}/no_end.json"], ["<|endoftext|>"]),
    ("encoding without all bytes", ["--tokenizer={tmp}/holes.json"], ["lacks some bytes"]),
    ("missing tokenizer.json", ["--tokenizer={tmp}/missing.json"], ["missing.json", "No such file"]),
    ("another kind of .json", ["--tokenizer={tmp}/not.json"], ["not.json is not a tokenizer"]),
    ("data_dir is a file", ["--data_dir={tmp}/a_file"], ["cannot write", "a_file"]),
    ("data_dir cannot be made", ["--data_dir={tmp}/a_file/data"], ["cannot write", "a_file"]),
    ("a folder of someone else's", ["--data_dir={tmp}/used"], ["used/d", "--name"]),
    ("a name outside data_dir", ["--name=../d"], ["'../d'", "--name"]),
    ("no name", ["--dataset=*", "--name="], ["--name"]),
    ("unknown setting", ["--vocabsize=300"], ["vocabsize", "vocab_size"]),
    ("wrong type", ["--max_tokens=many"], ["max_tokens", "many", "int"]),
]


@pytest.mark.parametrize("what, arguments, words", BAD_PREPARE, ids=[bad[0] for bad in BAD_PREPARE])
def test_bad_input_to_prepare_is_one_line(tmp_path, monkeypatch, capfd, what, arguments, words):
    """Status 2 and one line on stderr that names the problem; no file appears, disappears or changes."""
    def no_network(name):
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    bad_files(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_prepare(tmp_path / "data", f"--dataset={tmp_path}/ok/*.jsonl",
                    *(argument.format(tmp=tmp_path) for argument in arguments))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert contents(tmp_path) == before and not list(tmp_path.glob("**/.d.*"))


# ----------------------------------------------------------------------------------------------------------
# runs: in this process, in another, under torchrun

REPO = os.path.dirname(os.path.abspath(train.__file__))
SCRIPTS = {"prepare.py": prepare, "sample.py": sample, "train.py": train}
DEFAULTS = {name: settings_of(vars(script)) for name, script in SCRIPTS.items()}

TINY = """
dataset = "tiny"
n_layer = 1
d_model = 16
d_head = 8
block_size = 16
dropout = 0.1  # so that all runs draw random numbers
use_bigram_table = False
target_l0_fraction = 1 / 4
learning_rate = 1e-2
batch_size = 2
gradient_accumulation_steps = 2
max_iters = 12
eval_interval = 4
eval_iters = 2
device = "cpu"
compile = False
"""


def forget_settings():
    """Give all scripts the settings that a new process would start with."""
    for name, script in SCRIPTS.items():
        for key in settings_of(vars(script)).keys() - DEFAULTS[name].keys():
            del vars(script)[key]
        vars(script).update(DEFAULTS[name])


def run(command):
    """What the command line `command` does, such as 'train.py tiny.py', in this process; its exit status."""
    forget_settings()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(command))
        try:
            torch.set_num_threads(1)  # as `launch` has it: the number of threads decides the order of sums
            SCRIPTS[sys.argv[0]].main()
        except SystemExit as e:
            return e.code
        finally:
            torch.set_num_threads(threads)
    return 0


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with data/tiny, data/other (of another tokenizer) and tiny.py, the config of a tiny run."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = ["def f(x):\n", "    return x\n", "import os\n", "s = 'é€'\n", "for i in range(9):\n"]
    draw = random.Random(1)
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(draw.choices(lines, k=200)), encoding="utf-8")
    common = f"prepare.py --dataset='{folder}/*.txt' --data_dir={folder}/data --val_fraction=0.2"
    assert run(f"{common} --name=tiny --tokenizer=bytes") == 0
    assert run(f"{common} --name=other --tokenizer=bpe --vocab_size=270") == 0
    (folder / "tiny.py").write_text(TINY)
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A copy of `prepared`, as the current folder. Settings and signal handlers are restored at the end."""
    folder = shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)
    forget_settings()


@pytest.fixture
def settings(here, monkeypatch):
    """The settings of tiny.py in train.py's globals, without dropout."""
    forget_settings()
    configure(vars(train), ["tiny.py", "--dropout=0"])


def checkpoint(name="ckpt.pt", out_dir="out"):
    return torch.load(os.path.join(out_dir, name), weights_only=True)


def frozen(value):
    """`value` with all tensors as bytes, so that == compares to the last bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(v) for key, v in value.items()}
    return [frozen(v) for v in value] if isinstance(value, (list, tuple)) else value


def state(name="ckpt.pt", out_dir="out"):
    """All of a checkpoint that decides how training goes on, to the last bit."""
    kept = ("model", "scaler", "step", "best_val_loss", "best_l0")
    saved = checkpoint(name, out_dir)
    return {key: frozen(saved[key]) for key in kept} | {"optimizer": frozen(saved["optimizer"]["state"])}


def weights(out_dir="out"):
    return frozen(checkpoint(out_dir=out_dir)["model"])


def log(out_dir="out", without=()):
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in without} for line in f]


def tree(folder="."):
    """The bytes of all files below `folder`, hashed, and the names of its folders."""
    found = {}
    for path, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(path, name), folder)] = "folder"
        for name in files:
            with open(os.path.join(path, name), "rb") as f:
                found[os.path.relpath(f.name, folder)] = hashlib.sha256(f.read()).hexdigest()
    return found


SPEED = ("tokens_per_second", "seconds_left")  # what no two runs log alike


def call_before(patch, name, action):
    """Make `action(*arguments)` run before each call of train.py's function `name`."""
    original = getattr(train, name)

    def wrapper(*arguments, **keywords):
        action(*arguments, **keywords)
        return original(*arguments, **keywords)

    patch.setattr(train, name, wrapper)


def at_step(step, action):
    """For `call_before(patch, "update_", ...)`: `action()` at one step only."""
    return lambda model, optimizer, scaler, now: action() if now == step else None


def interrupted_run(command, step):
    """`run`, with a SIGINT to the process in the middle of `step`."""
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, "update_", at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)))
        return run(command)


def launch(command, ranks=1, fault=""):
    """Start `command` in a new process, or in `ranks` of them under torchrun; return the Popen.

    What it prints goes to stdout.txt and stderr.txt here. `fault` is Python code that runs first, with
    train.py imported and `rank` defined, to break something.
    """
    script, *arguments = shlex.split(command)
    path = os.path.join(REPO, script)
    if fault:
        path = os.path.abspath("faulty.py")
        with open(path, "w") as f:
            f.write("import io, os, signal, time\nimport torch\nimport train\n"
                    f"rank = int(os.environ.get('RANK', 0))\n{textwrap.dedent(fault)}\ntrain.main()\n")
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"PYTHONPATH": REPO, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open("stdout.txt", "w") as out, open("stderr.txt", "w") as err:
        return subprocess.Popen([*launcher, path, *arguments], env=env, start_new_session=True,
                                stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def finish(process, timeout=120):
    """Wait for a launched process; its exit status and what it wrote to stderr."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill(family(process.pid))
        raise
    return process.returncode, read("stderr.txt")


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def wait_for(condition, process, timeout=120):
    """Wait until `condition()` holds, as long as `process` lives."""
    end = time.time() + timeout
    while not condition() and process.poll() is None:
        assert time.time() < end, f"waited in vain: {read('stdout.txt')} {read('stderr.txt')}"
        time.sleep(0.005)


def printed(text):
    return lambda: text in read("stdout.txt")


def processes():
    """All processes that run: {pid: parent's pid}."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True, check=True)
    rows = (line.split() for line in table.stdout.splitlines())
    return {int(pid): int(parent) for pid, parent, status in rows if not status.startswith("Z")}


def family(pid):
    """`pid` and its descendants."""
    parents, found = processes(), [pid]
    for member in found:
        found += sorted(child for child, parent in parents.items() if parent == member)
    return found


def kill(pids):
    """SIGKILL, all at once as in a loss of power; wait until they are gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    while processes().keys() & set(pids):
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------
# what a run computes

def test_a_run_makes_max_iters_updates(here, monkeypatch):
    """Updates 0 .. max_iters - 1 are made, once each, and the checkpoint counts them."""
    steps = []
    call_before(monkeypatch, "update_", lambda model, optimizer, scaler, step: steps.append(step))
    assert run("train.py tiny.py --max_iters=7") == 0
    assert steps == list(range(7))
    assert checkpoint()["step"] == 7


def test_one_update_is_the_shortest_run(here):
    """max_iters=1 trains, evaluates before and after, and ends."""
    assert run("train.py tiny.py --max_iters=1") == 0
    assert [record["step"] for record in log()] == [0, 0, 1]


def test_the_seed_alone_decides_the_weights(here):
    """The same seed gives the same bytes twice, in weights, optimizer and log; another seed gives others."""
    for out_dir, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"train.py tiny.py --out_dir={out_dir} --seed={seed}") == 0
    assert state(out_dir="a") == state(out_dir="b")
    assert log("a", without=SPEED) == log("b", without=SPEED)
    assert weights("a") != weights("c")


@pytest.mark.parametrize("change", [
    "--eval_interval=5", "--eval_interval=100 --eval_iters=7", "--wandb_log=True", "--log_every_n_steps=0",
    "--log_gradients_every_n_steps=1 --log_weights_every_n_steps=1 --log_sparsity_every_n_steps=1"])
def test_watching_changes_nothing(here, change, monkeypatch):
    """Evaluation and logging, whenever they happen, leave the weights as they are to the last bit."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run("train.py tiny.py --out_dir=a") == run(f"train.py tiny.py --out_dir=b {change}") == 0
    assert weights("a") == weights("b")


def test_data_order_is_a_function_of_seed_step_and_micro_step(settings, monkeypatch):
    """A batch is the same whatever came before it, and another for another seed, step or micro-step."""
    data, place = train.load_data("data/tiny", 16), train.Place(0, 1, torch.device("cpu"), torch.float32)

    def batch(step, micro_step):
        x, y = train.training_batch(data, step, micro_step, place)
        assert x.shape == y.shape == (2, 16) and torch.equal(x[:, 1:], y[:, :-1])
        return x.tolist()

    first = batch(5, 1)
    others = [batch(5, 0), batch(1, 5), batch(6, 1)]
    torch.manual_seed(0)
    np.random.seed(0)
    assert batch(5, 1) == first
    monkeypatch.setattr(train, "seed", train.seed + 1)
    others.append(batch(5, 1))
    assert first not in others


def test_gradients_are_those_of_the_mean_over_micro_batches(settings, monkeypatch):
    """Loss and gradients of a step are those of all its sequences in one batch; two ranks share them out."""
    monkeypatch.setattr(train, "gradient_accumulation_steps", 4)
    data, scaler = train.load_data("data/tiny", 16), torch.amp.GradScaler("cpu", enabled=False)
    places = [train.Place(rank, 2, torch.device("cpu"), torch.float32) for rank in (0, 1)]
    alone = train.Place(0, 1, torch.device("cpu"), torch.float32)
    model = GPT(GPTConfig(n_layer=1, d_model=16, d_head=8, block_size=16, vocab_size=257))
    unshared = []
    model.no_sync = lambda: unshared.append("micro-batch") or nullcontext()

    def loss_and_gradients(place):
        model.zero_grad()
        loss = train.gradients_of_step(model, data, scaler, 3, place).item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    batches = [train.training_batch(data, 3, micro_step, alone) for micro_step in range(4)]
    expected = model(*(torch.cat(part) for part in zip(*batches)))[1]
    expected.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    (loss_0, found_0), (loss_1, found_1) = map(loss_and_gradients, places)
    for loss, found in (loss_and_gradients(alone), ((loss_0 + loss_1) / 2, (found_0 + found_1) / 2)):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-7)
    assert loss_0 != loss_1
    assert len(unshared) == 2  # the first of each rank's two micro-batches: DDP averages at the last


def test_evaluation_is_fixed_complete_and_shared(settings, monkeypatch):
    """Evaluation reports the same at each call, on windows from the first token to the last; the ranks'
    shares add up. It draws no random number and leaves the model in training mode."""
    monkeypatch.setattr(train, "eval_iters", 3)
    monkeypatch.setattr(train.Place, "sum", lambda self, *values: list(values))
    data = train.load_data("data/tiny", 16)
    model = GPT(GPTConfig(n_layer=1, d_model=16, d_head=8, block_size=16, vocab_size=257, dropout=0.5))
    alone, *pair = (train.Place(rank, ranks, torch.device("cpu"), torch.float32)
                    for rank, ranks in ((0, 1), (0, 2), (1, 2)))
    starts = {len(data.train): [], len(data.val): []}
    random_state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        call_before(patch, "windows", lambda tokens, starting, place: starts[len(tokens)].extend(starting))
        record = train.evaluate(model, data, alone)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    for split, tokens in (("train", data.train), ("val", data.val)):
        first, *between, last = starts[len(tokens)]
        assert (first, len(between), last) == (0, 3 * 2 - 2, len(tokens) - 1 - 16)
        rows = torch.tensor(np.array([tokens[start:start + 17] for start in starts[len(tokens)]], int))
        nats = model.eval()(rows[:, :-1], rows[:, 1:])[1].item()
        assert record[f"{split}/loss"] == pytest.approx(nats)
        shares = [train.evaluate(model, data, place)[f"{split}/loss"] for place in pair]
        assert nats == pytest.approx(sum(shares)) and min(shares) > 0
        bits = nats * data.meta[split]["tokens"] / math.log(2)
        assert record[f"{split}/bits_per_byte"] == pytest.approx(bits / data.meta[split]["bytes"])
    assert train.evaluate(model, data, alone) == record


# ----------------------------------------------------------------------------------------------------------
# checkpoints

@pytest.mark.parametrize("step", [0, 5, 7, 11])
def test_resume_equals_uninterrupted(here, step):
    """A run stopped by a signal and resumed, with no flag but where it is, ends like one never stopped:
    weights, optimizer, best model and log, in which no record is lost or doubled."""
    assert run("train.py tiny.py --out_dir=whole") == 0
    assert interrupted_run("train.py tiny.py", step) == 0
    assert checkpoint()["step"] == step + 1
    assert run("train.py --init_from=resume --out_dir=out") == 0
    assert state() == state(out_dir="whole")
    assert state("best.pt") == state("best.pt", "whole")
    assert log(without=SPEED) == log("whole", without=SPEED)


def test_resume_after_a_crash(here):
    """A run that broke off between two checkpoints goes on from the first of them, to the same end; steps
    that are made twice are logged once."""
    def crash():
        raise ConnectionError("power")

    assert run("train.py tiny.py --out_dir=whole") == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConnectionError):
        call_before(patch, "update_", at_step(7, crash))
        run("train.py tiny.py")
    assert (checkpoint()["step"], log()[-1]["step"]) == (4, 6)
    assert run("train.py --init_from=resume") == 0
    assert state() == state(out_dir="whole")
    assert log(without=SPEED) == log("whole", without=SPEED)


def test_interrupted_at_every_turn(here):
    """Any number of interruptions and resumptions changes nothing."""
    assert run("train.py tiny.py --out_dir=whole --max_iters=6") == 0
    assert interrupted_run("train.py tiny.py --max_iters=6", 0) == 0
    for step in range(1, 6):
        assert interrupted_run("train.py --init_from=resume", step) == 0
    assert run("train.py --init_from=resume") == 0
    assert state() == state(out_dir="whole")
    assert log(without=SPEED) == log("whole", without=SPEED)


def test_resume_after_a_torn_log_line(here):
    """A log whose last line was cut by a loss of power is continued as if the line had never been there."""
    assert run("train.py tiny.py --out_dir=whole") == 0
    assert interrupted_run("train.py tiny.py", 5) == 0
    with open("out/log.jsonl", "a") as f:
        f.write('{"step": 6, "lo')
    assert run("train.py --init_from=resume") == 0
    assert log(without=SPEED) == log("whole", without=SPEED)


def test_resume_takes_settings_from_the_checkpoint_unless_given(here):
    """Settings that are left out are the interrupted run's, not the defaults; a flag still wins."""
    assert interrupted_run("train.py tiny.py --weight_decay=0.3", 5) == 0
    assert run("train.py --init_from=resume --eval_iters=3") == 0
    saved = checkpoint()["settings"]
    assert (saved["weight_decay"], saved["max_iters"], saved["eval_iters"]) == (0.3, 12, 3)
    assert saved["dataset"] == "tiny" and saved["compile"] is False


def test_resuming_a_finished_run_changes_nothing(here):
    """A run that is complete makes no more updates."""
    assert run("train.py tiny.py") == 0
    before = state()
    assert run("train.py tiny.py --init_from=resume") == 0
    assert state() == before


def test_a_new_run_moves_an_old_one_aside(here):
    """Training into an out_dir that holds a run keeps that run's files, byte for byte."""
    assert run("train.py tiny.py") == 0
    before = tree("out")
    del before["lock"]  # which is the folder's, not the run's
    assert run("train.py tiny.py --seed=2") == 0
    assert tree("out/previous-1") == before


def test_two_runs_do_not_share_an_out_dir(here, capsys):
    """While one run writes there, another ends with one line, and changes nothing; then it may go on."""
    assert run("train.py tiny.py --max_iters=4") == 0
    before = tree("out")
    with open("out/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("train.py tiny.py --seed=2") == run("train.py --init_from=resume --max_iters=8") == 2
    assert capsys.readouterr().err.count("error: another run is writing") == 2
    assert tree("out") == before
    assert run("train.py --init_from=resume --max_iters=8") == 0


@pytest.mark.parametrize("target, losses, best_step", [
    (1.0, [5.0, 3.0, 4.0, 3.5], 4), (1.0, [5.0, 4.0, 3.5, 3.0], 12),
    (0.25, [5.0, 1.0, 4.0, 4.5], 8), (0.25, [5.0, 1.0, 4.0, 3.5], 12)])
def test_best_checkpoint(here, monkeypatch, target, losses, best_step):
    """best.pt has the lowest val loss of all evaluations at the lowest L0, before or after a resume."""
    scripted = iter(losses)

    def evaluate(model, data, place):
        return dict.fromkeys(LOGGED["eval_interval"] - {"val/best_loss"}, next(scripted))

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert interrupted_run(f"train.py tiny.py --target_l0_fraction={target}", 6) == 0
    assert run("train.py --init_from=resume") == 0
    best, last = checkpoint("best.pt"), checkpoint()
    assert (best["step"], last["step"]) == (best_step, 12)
    assert best["best_val_loss"] == last["best_val_loss"] == losses[best_step // 4]
    assert log()[-1]["val/best_loss"] == losses[best_step // 4]


def test_sigint_writes_one_checkpoint_and_says_how_to_resume(here, monkeypatch, capsys):
    """After SIGINT the step is finished, one checkpoint written, and the command to resume printed."""
    saves = []
    call_before(monkeypatch, "save_checkpoint", lambda name, *rest: saves.append(name))
    assert interrupted_run("train.py tiny.py --out_dir='two words' --eval_interval=100", 5) == 0
    assert saves == ["best.pt", "ckpt.pt", "ckpt.pt"]  # at the evaluation before step 0, and now
    assert checkpoint(out_dir="two words")["step"] == 6
    launcher, *command = shlex.split(capsys.readouterr().out.splitlines()[-1].split("go on with: ")[1])
    assert launcher == "python"
    assert run(shlex.join(command)) == 0
    assert checkpoint(out_dir="two words")["step"] == 12


# ----------------------------------------------------------------------------------------------------------
# what is logged

PRUNED_GROUPS = ["wte", "lm_head", *(f"{matrix}{end}" for end in ("", ".bias") for matrix in (
    "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))]
GROUPS = [*PRUNED_GROUPS, "ln_1", "ln_2", "ln_f", "attn.sink_logit", "bigram_table"]
LOGGED = {
    "log_every_n_steps": {
        "loss", "lr", "l0", "tokens", "grad_rms", *SPEED, "activations/kurtosis_resid_final",
        *(f"activations/{what}/{where}" for what in ("nonzero", "rms") for where in LOCATIONS)},
    "log_gradients_every_n_steps": {f"gradients/norm_{what}" for what in ("mean", "max", "min")},
    "log_weights_every_n_steps": {f"weights/{what}/{g}" for what in ("norm", "mean", "std") for g in GROUPS},
    "log_sparsity_every_n_steps": {
        "sparsity/l0", "sparsity/l0_target", "sparsity/sharkfin", "sparsity/dead_neurons",
        *(f"sparsity/{what}" for what in ("nonzero", "fraction")),
        *(f"sparsity/{what}/{g}" for what in ("nonzero", "fraction") for g in PRUNED_GROUPS)},
    "eval_interval": {
        "val/best_loss",
        *(f"{split}/{what}" for split in ("train", "val") for what in ("loss", "bits_per_byte"))},
}


@pytest.mark.parametrize("every", [(2, 3, 4, 5, 6), (5, 1, 0, 2, 100), (0, 0, 7, 0, 1)])
def test_everything_is_logged_at_its_frequency(here, every):
    """Each group of keys is complete at the multiples of its setting and at the end of the run, and absent
    at all other steps; 0 is never."""
    flags = " ".join(f"--{name}={n}" for name, n in zip(LOGGED, every))
    assert run(f"train.py tiny.py --use_bigram_table=True --max_iters=13 {flags}") == 0
    found = {}
    for record in log():
        found.setdefault(record["step"], set()).update(record.keys() - {"step"})
    expected = {}
    for (name, keys), n in zip(LOGGED.items(), every):
        last = 13 if name == "eval_interval" else 12
        for step in range(last + 1):
            if n and (step % n == 0 or step == last):
                expected.setdefault(step, set()).update(keys)
    assert found == expected


def test_logged_numbers_of_a_run(here, monkeypatch):
    """Rates, L0, tokens and the gradients' norms and RMS are those of the step that they are logged for."""
    norms = []
    call_before(monkeypatch, "update_", lambda model, optimizer, scaler, step: norms.append(
        [np.sqrt(np.sum(p.grad.numpy().astype(float) ** 2)) for p in model.parameters()]))
    assert run("train.py tiny.py --log_gradients_every_n_steps=1 --log_sparsity_every_n_steps=1") == 0
    numel = sum(w.numel() for w in checkpoint()["model"].values())
    records = [record for record in log() if "loss" in record]
    assert [record["step"] for record in records] == list(range(12))
    for step, (record, norm) in enumerate(zip(records, norms)):
        done = min(max((step - 0.01 * 12) / (0.49 * 12), 0), 1)
        l0 = 1 - 0.75 * done
        assert record["sparsity/l0"] == record["l0"] == pytest.approx(l0)
        assert record["sparsity/l0_target"] == 0.25
        assert record["sparsity/sharkfin"] == pytest.approx(l0 ** -0.5)
        assert record["lr"] == pytest.approx(1e-2 * (1 - step / 12) * l0 ** -0.5)
        assert record["tokens"] == (step + 1) * 2 * 2 * 16
        assert record["grad_rms"] == pytest.approx(math.sqrt(sum(n**2 for n in norm) / numel), rel=1e-4)
        assert record["gradients/norm_mean"] == pytest.approx(np.mean(norm), rel=1e-4)
        assert record["gradients/norm_max"] == pytest.approx(max(norm), rel=1e-4)
        assert record["gradients/norm_min"] == pytest.approx(min(norm), rel=1e-4)
        assert 0 < record["tokens_per_second"] and record["seconds_left"] >= 0
    assert records[-1]["seconds_left"] == 0
    assert records[-1]["sparsity/fraction"] == pytest.approx(0.25, abs=0.01)


def two_layers():
    """A pruned model of two layers with three dead neurons: rows 3 and 4 of a c_fc, column 5 of a c_proj."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(n_layer=2, d_model=16, d_head=8, block_size=16, vocab_size=29))
    model.prune_(0.4)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3:5] = 0
        model.transformer.h[1].attn.c_proj.weight[:, 5] = 0
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p))
    return model


def arrays_by_group(model):
    """All weights of a model as float64 arrays, flat, by the group that they are logged in."""
    groups = {}
    for name, p in model.named_parameters():
        layer = re.match(r"transformer\.h\.\d+\.(.*)", name)
        name = (layer[1] if layer else name.removeprefix("transformer.")).removesuffix(".weight")
        groups.setdefault(name, []).append(p.detach().numpy().astype(float).ravel())
    return {name: np.concatenate(parts) for name, parts in groups.items()}


def test_sparsity_statistics_count_what_is_there(settings):
    """Nonzeros and fractions in all and per tensor group, and dead neurons, counted one by one."""
    model = two_layers()
    found, arrays = train.sparsity_statistics(model, 0), arrays_by_group(model)
    total = size = 0
    for group in PRUNED_GROUPS:
        nonzero = sum(x != 0 for x in arrays[group].tolist())
        assert found[f"sparsity/nonzero/{group}"] == nonzero
        assert found[f"sparsity/fraction/{group}"] == pytest.approx(nonzero / len(arrays[group]))
        total, size = total + nonzero, size + len(arrays[group])
    assert (found["sparsity/nonzero"], found["sparsity/fraction"]) == (total, pytest.approx(total / size))
    assert found["sparsity/dead_neurons"] == 3
    assert not any("bigram" in key or "ln_" in key or "sink" in key for key in found)


def test_weight_statistics_are_those_of_numpy(settings):
    """Norm, mean and standard deviation of a tensor group are those of all its numbers in one array."""
    model = two_layers()
    found = train.weight_statistics(model)
    assert found.keys() == LOGGED["log_weights_every_n_steps"]
    for group, array in arrays_by_group(model).items():
        assert found[f"weights/norm/{group}"] == pytest.approx(np.linalg.norm(array), rel=1e-5)
        assert found[f"weights/mean/{group}"] == pytest.approx(array.mean(), rel=1e-4, abs=1e-7)
        assert found[f"weights/std/{group}"] == pytest.approx(array.std(), rel=1e-4, abs=1e-6)


def test_activation_statistics_are_those_of_numpy(settings):
    """Fraction of nonzeros and RMS of every node site, averaged over layers, and the kurtosis of the final
    residual stream without tokens at which it is zero: of one token at each position."""
    model, seen = two_layers(), {}
    alive = (torch.arange(16) != 4)[:, None]
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: output * alive)
    train.watch_activations(model)

    def see(location, output):
        seen.setdefault(location, []).append(
            np.stack([output[t % 3, t].detach().numpy().astype(float) for t in range(16)]))

    for location, module in [*model.sites(), ("final", model.transformer.h[1])]:
        module.register_forward_hook(lambda module, inputs, output, at=location: see(at, output))
    model(torch.randint(29, (3, 16)))
    found, [final] = train.activation_statistics(model), seen.pop("final")
    assert found.keys() == {key for key in LOGGED["log_every_n_steps"] if key.startswith("activations/")}
    for location, layers in seen.items():
        assert len(layers) == 2
        nonzero, rms = [(x != 0).mean() for x in layers], [np.sqrt((x ** 2).mean()) for x in layers]
        assert found[f"activations/nonzero/{location}"] == pytest.approx(np.mean(nonzero))
        assert found[f"activations/rms/{location}"] == pytest.approx(np.mean(rms), rel=1e-5)
    assert not final[4].any()
    centred = np.delete(final, 4, axis=0)
    centred -= centred.mean(-1, keepdims=True)
    kurtosis = ((centred ** 4).mean(-1) / (centred ** 2).mean(-1) ** 2).mean()
    assert found["activations/kurtosis_resid_final"] == pytest.approx(kurtosis, rel=1e-4)


def test_wandb_disabled(here, monkeypatch):
    """With WANDB_MODE=disabled the real package takes every record of log.jsonl, and writes nothing."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    records = []
    init = wandb.init

    def watched_init(**arguments):
        wandb_run = init(**arguments)
        assert wandb_run.disabled
        wandb_run.log = lambda record, step: records.append({**record, "step": step})
        return wandb_run

    monkeypatch.setattr(wandb, "init", watched_init)
    assert run("train.py tiny.py --wandb_log=True") == 0
    assert records == log()
    assert not os.path.exists("out/wandb") and not os.path.exists("wandb")


@pytest.mark.slow
def test_wandb_offline(here):
    """With WANDB_MODE=offline the real package keeps the run in out_dir, and no account is needed."""
    fault = "os.environ |= {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}"
    assert finish(launch("train.py tiny.py --wandb_log=True --wandb_run_name='a name'", fault=fault))[0] == 0
    [folder] = [name for name in os.listdir("out/wandb") if name.startswith("offline-run-")]
    [name] = [name for name in os.listdir(f"out/wandb/{folder}") if name.endswith(".wandb")]
    with open(f"out/wandb/{folder}/{name}", "rb") as f:
        data = f.read()
    for text in (b"a name", b"val/bits_per_byte", b"sparsity/dead_neurons", b"target_l0_fraction"):
        assert text in data


@pytest.mark.slow
def test_wandb_without_an_account(here):
    """Asked for wandb on a machine that is not logged in, the run says so in one line, before it begins."""
    status, error = finish(launch("train.py tiny.py --wandb_log=True", fault="""
        os.environ |= {"HOME": os.getcwd(), "WANDB_MODE": "online"}
        os.environ.pop("WANDB_API_KEY", None)
        """))
    assert status == 2
    assert "wandb login" in error.splitlines()[-1] and "Traceback" not in error


# ----------------------------------------------------------------------------------------------------------
# two ranks

LONG = "train.py tiny.py --max_iters=60 --eval_interval=10 --log_every_n_steps=5"
KEEP_EACH_RANKS_WEIGHTS = """
loop = train.train
def watched_loop(place, data, model, *rest):
    loop(place, data, model, *rest)
    torch.save(model.state_dict(), f"rank{place.rank}.pt")
train.train = watched_loop
"""


@pytest.fixture(scope="session")
def two_ranks(prepared, tmp_path_factory):
    """A folder in which LONG was run by two ranks, each of which also left its own weights."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("two_ranks") / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status, error = finish(launch(LONG, ranks=2, fault=KEEP_EACH_RANKS_WEIGHTS))
        assert status == 0, error
    return folder


@pytest.mark.slow
def test_ranks_stay_bit_identical(two_ranks):
    """After 60 updates both ranks hold the same bytes, and they are what was saved."""
    first, second = (frozen(torch.load(two_ranks / f"rank{rank}.pt", weights_only=True)) for rank in (0, 1))
    assert first == second == weights(two_ranks / "out")


@pytest.mark.slow
def test_two_ranks_equal_one_with_twice_the_accumulation(two_ranks, here):
    """Two ranks see the data that one process sees, and end with its weights, losses and nonzeros."""
    assert run(LONG) == 0
    one, two = checkpoint()["model"], checkpoint(out_dir=two_ranks / "out")["model"]
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
        assert two[name].count_nonzero() == weight.count_nonzero()
    for ours, theirs in zip(log(without=SPEED), log(two_ranks / "out", without=SPEED), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & {"loss", "train/loss", "val/loss", "lr", "tokens", "sparsity/nonzero"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4)


DIVERGE = """
update_ = train.update_
def diverging_update_(model, optimizer, scaler, step):
    rms = update_(model, optimizer, scaler, step)
    if rank == 1 and step == 25:
        gain = model.transformer.ln_f.weight.data
        gain[3] = torch.nextafter(gain[3], torch.tensor(9.0))
    return rms
train.update_ = diverging_update_
"""
NAN_BEFORE_THE_RANKS_AVERAGE = """
gradients_of_step = train.gradients_of_step
def broken_gradients(network, data, scaler, step, place):
    if rank == 1 and step == 25:
        next(network.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    return gradients_of_step(network, data, scaler, step, place)
train.gradients_of_step = broken_gradients
"""
NAN_ON_ONE_RANK_ALONE = """
gradients_of_step = train.gradients_of_step
def broken_gradients(network, data, scaler, step, place):
    loss = gradients_of_step(network, data, scaler, step, place)
    if rank == 1 and step == 25:
        next(network.parameters()).grad.view(-1)[7] = float("nan")
    return loss
train.gradients_of_step = broken_gradients
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault, step, complaint", [
    (DIVERGE, 30, "rank 1"), (NAN_BEFORE_THE_RANKS_AVERAGE, 25, "nan"), (NAN_ON_ONE_RANK_ALONE, 25, "nan")],
    ids=["diverge", "nan", "nan on one rank alone"])
def test_two_ranks_stop_together(here, fault, step, complaint):
    """A weight that differs by one bit between ranks, or a NaN in one rank's gradient, stops both.
    The message names the step and the last checkpoint, which is not overwritten."""
    process = launch(LONG, ranks=2, fault=fault)
    status, error = finish(process)
    assert status != 0
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"step {step} " in line and complaint in line and os.path.join("out", "ckpt.pt") in line
    assert "train.main()" not in error  # no traceback of ours, only torchrun's
    assert checkpoint()["step"] == 20 and not os.path.exists("out/ckpt.pt.tmp")


DIE = """
update_ = train.update_
def dying_update_(model, optimizer, scaler, step):
    if rank == {rank} and step == 25:
        os._exit(7)
    return update_(model, optimizer, scaler, step)
train.update_ = dying_update_
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_the_other(two_ranks, here, rank):
    """If one rank dies the other does not wait for it, and torchrun says which one it was; what is resumed
    from the last checkpoint ends like a run without the accident."""
    begin = time.time()
    status, error = finish(launch(LONG, ranks=2, fault=DIE.format(rank=rank)))
    assert status != 0 and time.time() - begin < 60
    assert re.search(rf"rank\s*: {rank} .*\n\s*exitcode\s*: 7", error)
    assert checkpoint()["step"] == 20
    if rank == 1:
        assert finish(launch(f"{LONG} --init_from=resume", ranks=2))[0] == 0
        assert state() == state(out_dir=two_ranks / "out")


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_to_torchrun(two_ranks, here, everyone):
    """SIGTERM to torchrun, or to every process, to which torchrun then adds its own: both ranks finish the
    step, one checkpoint is written and the command to resume is printed; resumed, the run ends as if it had
    not been stopped."""
    process = launch(LONG, ranks=2, fault="""
        update_ = train.update_
        def slow_update_(model, optimizer, scaler, step):
            time.sleep(1 if step > 15 else 0)
            return update_(model, optimizer, scaler, step)
        train.update_ = slow_update_
        """)
    wait_for(printed("step    15 | loss"), process)
    for pid in family(process.pid) if everyone else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    finish(process)
    stopped = re.search(r"stopped before step (\d+); go on with: (torchrun .*)", read("stdout.txt"))
    assert stopped and checkpoint()["step"] == int(stopped[1]) in range(16, 20)
    launcher, ranks, script, *arguments = shlex.split(stopped[2])
    assert (launcher, ranks, os.path.basename(script)) == ("torchrun", "--nproc_per_node=2", "faulty.py")
    status, error = finish(launch(shlex.join(["train.py", *arguments]), ranks=2))
    assert status == 0, error
    assert state() == state(out_dir=two_ranks / "out")
    assert log(without=SPEED) == log(two_ranks / "out", without=SPEED)


@pytest.mark.slow
def test_accumulation_that_two_ranks_cannot_share(here):
    """An odd number of micro-batches on two ranks is an error of one line, before anything is written."""
    status, error = finish(launch(f"{LONG} --gradient_accumulation_steps=3", ranks=2))
    assert status != 0 and not os.path.exists("out")
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "multiple" in line and "2" in line


# ----------------------------------------------------------------------------------------------------------
# kill -9, whenever: KILLS=20 pytest -k killed makes 20 instead of the few that keep this file fast

def kills(default):
    return int(os.environ.get("KILLS", default))


def kill_at_random(process, ranks, draw, step):
    """SIGKILL to a run, while it starts or after a random step, `step` or later. False if it ends before.

    All dies at once, as in a loss of power; or one of several ranks, after which torchrun ends the rest.
    """
    wait_for(lambda: ranks == 1 or len(family(process.pid)) > ranks, process)
    victims = family(process.pid) if ranks > 1 else [process.pid]
    if ranks > 1 and draw.random() < 0.5:
        victims = [draw.choice(victims[-ranks:])]
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 3))
    else:
        wait_for(printed(f"step {draw.randrange(step, min(step + 25, 60)):5d} | loss"), process)
        time.sleep(draw.uniform(0, 0.01))
    alive = process.poll() is None
    if alive:
        kill(victims)
    return alive


def survive_kills(number, ranks, reference):
    """Make `number` kills of runs of LONG, resuming each until it ends with the bytes of `reference`."""
    draw, made = random.Random(number), []
    while len(made) < number:
        shutil.rmtree("out", ignore_errors=True)
        status = None
        while status != 0:
            step = checkpoint()["step"] if os.path.exists("out/ckpt.pt") else -1
            go_on = f"--init_from={'scratch' if step < 0 else 'resume'} --log_every_n_steps=1"
            process = launch(f"{LONG} {go_on}", ranks)
            killed = len(made) < number and step < 50 and kill_at_random(process, ranks, draw, max(step, 0))
            status, error = finish(process)
            assert killed or status == 0, error
            if killed and status != 0:
                done = re.findall(r"step +(\d+) \| loss", read("stdout.txt"))
                made.append(f"{step}..{done[-1] if done else step}")
        assert state() == reference
        assert not [name for name in tree() if name.endswith(".tmp")]
    print(f"{ranks} rank(s), survived {len(made)} kills, begun..killed at steps (-1: scratch):", *made)


@pytest.mark.slow
def test_killed_at_random_moments(here):
    """Killed again and again and resumed each time, a run ends with the bytes of one that was left alone."""
    assert finish(launch(f"{LONG} --out_dir=whole"))[0] == 0
    survive_kills(kills(5), 1, state(out_dir="whole"))


@pytest.mark.slow
def test_two_ranks_killed_at_random_moments(two_ranks, here):
    """The same on two ranks, of which one or both are killed."""
    survive_kills(kills(2), 2, state(out_dir=two_ranks / "out"))


PAUSE_IN_SAVE = """
def pause():
    open("paused", "w").close()
    time.sleep(600)
save, replace = torch.save, os.replace
def halting_save(saved, file):
    whole = io.BytesIO()
    save(saved, whole)
    halfway = {moment!r} == "half written" and saved["step"] == 8 and {name!r} in file.name
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    if halfway:
        pause()
    file.write(whole.getvalue()[len(whole.getvalue()) // 2:])
    file.flush()
    if {moment!r} == "not renamed" and saved["step"] == 8 and {name!r} in file.name:
        pause()
def halting_replace(source, target):
    replace(source, target)
    if {moment!r} == "renamed" and {name!r} in target and torch.load(target, weights_only=True)["step"] == 8:
        pause()
torch.save, os.replace = halting_save, halting_replace
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment, name, step", [
    ("half written", "best.pt", 4), ("renamed", "best.pt", 4),
    ("half written", "ckpt.pt", 4), ("not renamed", "ckpt.pt", 4), ("renamed", "ckpt.pt", 8)])
def test_killed_inside_a_checkpoint(here, moment, name, step):
    """Killed while a checkpoint is half written, whole but not renamed, or just renamed, the run has a whole
    checkpoint to go on from, and ends with the bytes of one that was left alone."""
    process = launch("train.py tiny.py", fault=PAUSE_IN_SAVE.format(moment=moment, name=name))
    wait_for(lambda: os.path.exists("paused"), process)
    assert process.poll() is None, read("stderr.txt")
    kill(family(process.pid))
    process.wait()
    assert checkpoint()["step"] == step
    assert run("train.py --init_from=resume") == 0
    assert run("train.py tiny.py --out_dir=whole") == 0
    assert state() == state(out_dir="whole") and state("best.pt") == state("best.pt", "whole")
    assert log(without=SPEED) == log("whole", without=SPEED)
    assert not [path for path in tree() if path.endswith(".tmp")]


@pytest.mark.slow
def test_a_second_sigint_aborts_at_once(here):
    """A first SIGINT waits for the step, which here takes ten minutes; a second one does not."""
    process = launch("train.py tiny.py", fault="""
        def endless_update_(*arguments):
            print("updating", flush=True)
            while True:
                time.sleep(0.01)
        train.update_ = endless_update_
        """)
    wait_for(printed("updating"), process)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert checkpoint()["step"] == 0  # of the evaluation before the first step


# ----------------------------------------------------------------------------------------------------------
# full disks and numbers that are none

def fill_disk(saved, file, save=torch.save):
    """What torch.save does on a disk that gets full on the way."""
    whole = io.BytesIO()
    save(saved, whole)
    file.write(whole.getvalue()[:10_000])
    file.flush()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_to_sync(file):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def limit_files(size):
    """From now on the system lets no file of this process grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("fault", ["disk full", "sync fails", "file limit"])
def test_disk_full_during_a_checkpoint(here, fault, capfd):
    """A checkpoint that cannot be written ends the run with one line and status 2, and leaves the one before
    as it was, with nothing else beside it; once there is room the run goes on to the same end."""
    assert run("train.py tiny.py --out_dir=whole") == 0
    before = {}
    before_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        def break_disk():
            before.update(tree("out"))
            if fault == "disk full":
                patch.setattr(torch, "save", fill_disk)
            elif fault == "sync fails":
                patch.setattr(os, "fsync", refuse_to_sync)
            else:
                limit_files(100_000)

        call_before(patch, "update_", at_step(5, break_disk))
        try:
            status = run("train.py tiny.py")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before_limit)
    assert status == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "make room" in line
    after = tree("out")
    assert after.keys() == before.keys()
    assert after["ckpt.pt"] == before["ckpt.pt"] and after["best.pt"] == before["best.pt"]
    assert run("train.py --init_from=resume") == 0
    assert state() == state(out_dir="whole")


def test_disk_full_during_the_log(here, capfd):
    """A log that cannot be written ends the run with one line and status 2; the last checkpoint is whole."""
    before_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, "update_", at_step(
            5, lambda: limit_files(os.path.getsize("out/log.jsonl") + 100)))
        try:
            status = run("train.py tiny.py")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before_limit)
    assert status == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "log.jsonl" in line
    assert checkpoint()["step"] == 4


@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
def test_a_number_that_is_none_stops_the_run(here, where, monkeypatch, capsys):
    """A loss or a gradient that is not finite, or weights that make the evaluation so, stop the run.
    The message names the step and the last good checkpoint, which keeps its bytes."""
    before = {}

    def spoil(model, optimizer, scaler, step):
        if step == 5:
            before.update(tree("out"))
        if step == 5 and where == "gradient":
            model.transformer.ln_f.weight.grad[3] = math.inf
        if step == {"loss": 4, "weights": 7}.get(where):
            model.transformer.ln_f.weight.data[3] = math.nan

    call_before(monkeypatch, "update_", spoil)
    status = run("train.py tiny.py")
    assert status not in (0, None)
    [line] = capsys.readouterr().err.splitlines()
    step = {"loss": 5, "gradient": 5, "weights": 8}[where]
    assert line.startswith("error: ") and f"step {step} " in line and os.path.join("out", "ckpt.pt") in line
    assert tree("out")["ckpt.pt"] == before["ckpt.pt"] and tree("out")["best.pt"] == before["best.pt"]


@pytest.mark.parametrize("flags", ["--learning_rate=1e30", "--learning_rate=1e20 --eval_interval=1"])
def test_a_run_that_explodes_keeps_a_finite_checkpoint(here, flags):
    """Whatever the learning rate does to the weights, the checkpoint that is left is finite."""
    run(f"train.py tiny.py {flags}")
    assert all(w.isfinite().all() for w in checkpoint()["model"].values())


# ----------------------------------------------------------------------------------------------------------
# bad input: the command, a word of the remedy, and what was done before to the folder (see `trained`)

def file(path, content):
    def damage():
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
    return damage


def cut(path, size):
    return lambda: os.truncate(path, size)


def remove(path):
    return lambda: os.remove(path)


def copy(source, target):
    return lambda: shutil.copy(source, target)


def meta(split=None, **changes):
    """Change entries of data/tiny/meta.json, or of its part for one split; ... removes the entry."""
    def damage():
        found = json.loads(read("data/tiny/meta.json"))
        change(found[split] if split else found, changes)
        file("data/tiny/meta.json", json.dumps(found))()
    return damage


def saved(**changes):
    """Change entries of out/ckpt.pt; ... removes the entry."""
    def damage():
        found = checkpoint()
        change(found, changes)
        torch.save(found, "out/ckpt.pt")
    return damage


def change(entries, changes):
    for key, value in changes.items():
        if value is ...:
            del entries[key]
        else:
            entries[key] = value


def config(**changes):
    """Change the architecture that out/ckpt.pt names."""
    return lambda: saved(config={**checkpoint()["config"], **changes})()


def shorten_val():
    """A validation split of seven tokens that meta.json knows of."""
    cut("data/tiny/val.bin", 14)()
    meta("val", tokens=7)()


class Bomb:
    """A pickle of this runs a command when it is loaded the careless way."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def bomb():
    with open("out/ckpt.pt", "wb") as f:
        pickle.dump({"model": Bomb()}, f)


def zipped_bomb():
    torch.save({"model": Bomb(), "config": {}, "settings": {}, "step": 0}, "out/ckpt.pt")


BAD_INPUTS = [
    # the configurator, in flags and in files
    ("train.py tiny.py --n_layr=2", "n_layer"),
    ("train.py tiny.py --N_LAYER=2", "the closest"),
    ("train.py tiny.py --=2", "unknown"),
    ("train.py tiny.py --main=2", "unknown"),
    ("train.py tiny.py --n_layer=two", "expected int"),
    ("train.py tiny.py --n_layer=1.5", "expected int"),
    ("train.py tiny.py --n_layer=", "expected int"),
    ("train.py tiny.py --learning_rate=fast", "expected float"),
    ("train.py tiny.py --learning_rate=1/0", "expected float"),
    ("train.py tiny.py --learning_rate=nan", "expected float"),
    ("train.py tiny.py --learning_rate=1e999", "learning_rate"),
    ("train.py tiny.py --use_bias=maybe", "expected bool"),
    ("train.py tiny.py --use_bias=1", "expected bool"),
    ("train.py tiny.py --n_layer", "--key=value"),
    ("train.py tiny.py -n_layer=2", "--key=value"),
    ("train.py --help", "--key=value"),
    ("train.py missing.py", "missing.py"),
    ("train.py data", "config file"),
    ("train.py bad.py", "n_layer", file("bad.py", "n_layr = 2")),
    ("train.py bad.py", "expected int", file("bad.py", "n_layer = '2'")),
    ("train.py bad.py", "expected int", file("bad.py", "n_layer = True")),
    ("train.py bad.py", "expected int", file("bad.py", "n_layer = 2.0")),
    ("train.py bad.py", "expected bool", file("bad.py", "compile = 0")),
    ("train.py bad.py", "expected str", file("bad.py", "dataset = None")),
    ("train.py tiny.py bad.py", "learning_rate", file("bad.py", "learning_rate = float('nan')")),
    ("train.py tiny.py bad.py", "learning_rate", file("bad.py", "learning_rate = float('inf')")),
    ("train.py bad.py", "bad.py", file("bad.py", "n_layer = = 2")),
    ("train.py bad.py", "bad.py", file("bad.py", "n_layer = 2\nn_head = n_layer / 0")),
    ("train.py bad.py", "bad.py", file("bad.py", "raise ValueError('one\\ntwo')")),
    ("train.py bad.py", "bad.py", file("bad.py", b"dataset = '\xff'")),
    ("train.py bad.py", "bad.py", file("bad.py", b"n_layer = 2\0")),
    ("sample.py --temprature=1", "temperature"),
    ("sample.py --temperature=hot", "expected float"),
    ("sample.py --max_new_tokens=1e3", "expected int"),
    # values that no run can have
    *((f"train.py tiny.py --{name}={value}", name) for name, value in [
        ("batch_size", 0), ("gradient_accumulation_steps", 0), ("max_iters", 0), ("max_iters", -5),
        ("eval_interval", 0), ("eval_iters", 0), ("sparsity_anneal_start_fraction", -0.1),
        ("sparsity_anneal_end_fraction", 1.5), ("sparsity_anneal_end_fraction", 0.005),
        ("warmup_fraction", 2), ("learning_rate", -1), ("beta1", -0.1), ("beta1", 1), ("beta2", 1.5),
        ("beta2", 1), ("eps", -1),
        ("weight_decay", -1), ("grad_clip_rms", -1), ("min_weights_per_neuron", -1), ("seed", -1),
        ("seed", 2**64), ("log_every_n_steps", -1), ("log_gradients_every_n_steps", -1),
        ("log_weights_every_n_steps", -1), ("log_sparsity_every_n_steps", -1), ("target_l0_fraction", 0),
        ("target_l0_fraction", 1.5), ("n_layer", 0), ("d_model", 0), ("d_head", 0), ("d_head", 5),
        ("block_size", 0), ("d_mlp", -1), ("dropout", 1), ("dropout", -0.1), ("activation_topk_fraction", 0),
        ("activation_topk_fraction", 1.5), ("activation_topk_fraction", 0.01), ("dtype", "float8"),
        ("dtype", "float16 --device=cpu"), ("device", "cuda:99"), ("device", "abacus"), ("device", "meta")]),
    ("train.py tiny.py --activation=swish", "gelu, relu"),
    ("train.py tiny.py --residual_activation=gelu", "identity, relu"),
    ("train.py tiny.py --activation_sparsity_locations=attn_in,mlp_inn", "mlp_in, mlp_neuron"),
    ("train.py tiny.py --target_l0_fraction=0.2", "smallest that fits is 0.25"),
    ("train.py tiny.py --init_from=resmue", "'resume'"),
    ("sample.py --num_samples=0", "num_samples"),
    ("sample.py --max_new_tokens=0", "max_new_tokens"),
    ("sample.py --temperature=-1", "temperature"),
    ("sample.py --top_k=-1", "top_k"),
    ("sample.py --seed=-1", "seed"),
    (f"sample.py --seed={2**64}", "seed"),
    ("sample.py --dtype=float8", "dtype"),
    ("sample.py --dtype=float16 --device=cpu", "dtype"),
    ("sample.py --device=cuda:99", "--device=cpu" if torch.cuda.device_count() == 0 else "cuda:0"),
    # data
    ("train.py tiny.py --dataset=nowhere", "python prepare.py"),
    ("train.py tiny.py --dataset=", "python prepare.py"),
    ("train.py tiny.py --dataset=../tiny.py", "python prepare.py"),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/meta.json")),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/tokenizer.json")),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/train.bin")),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/val.bin")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", "")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", "[]")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", b"\xff")),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/meta.json", 100)),
    *(("train.py tiny.py", "python prepare.py", meta(**changes)) for changes in [
        {"vocab_size": ...}, {"vocab_size": "many"}, {"vocab_size": 100}, {"tokenizer_sha256": ...},
        {"val": ...}, {"train": [1, 2]}]),
    *(("train.py tiny.py", "python prepare.py", meta("train", **changes)) for changes in [
        {"tokens": ...}, {"tokens": None}, {"tokens": "7"}, {"bytes": 0}, {"bytes": "7"}]),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/train.bin", 0)),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/train.bin", 2001)),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/train.bin", 2000)),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/val.bin", 0)),
    ("train.py tiny.py", "block_size", shorten_val),
    ("train.py tiny.py --block_size=100000", "block_size"),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/val.bin", b"\xff\xff" * 3000)),
    ("train.py tiny.py", "python prepare.py", lambda: np.full_like(
        np.memmap("data/tiny/train.bin", "<u2", "r"), 257).tofile("data/tiny/train.bin")),
    ("train.py tiny.py", "python prepare.py", copy("data/other/tokenizer.json", "data/tiny/tokenizer.json")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/tokenizer.json", b"\xff")),
    ("train.py tiny.py --dataset=other --init_from=resume", "tokenizer"),
    # where to write
    ("train.py tiny.py --out_dir=tiny.py/out", "--out_dir"),
    ("train.py tiny.py --out_dir=tiny.py", "--out_dir"),
    ("train.py tiny.py --out_dir=/proc/nothing", "--out_dir"),
    ("train.py tiny.py --out_dir=", "out_dir"),
    ("train.py --init_from=resume", "out/log.jsonl", lambda: os.mkdir("out/log.jsonl.tmp")),
    # what to go on from
    ("train.py tiny.py --init_from=resume --out_dir=new", "without --init_from=resume"),
    ("train.py tiny.py --init_from=resume --n_layer=2", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --d_head=4", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --block_size=8", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --activation=relu", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --activation_sparsity_locations=", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --target_l0_fraction=0.1", "smallest that fits is 0.25"),
    ("train.py tiny.py --init_from=resume --max_iters=3", "max_iters"),
    ("train.py --init_from=resume", "optimizer", saved(optimizer=...)),
    *((command, *rest) for command in ("train.py --init_from=resume", "sample.py") for rest in [
        ("--out_dir", remove("out/ckpt.pt")),
        ("--out_dir", cut("out/ckpt.pt", 10_000)),
        ("--out_dir", cut("out/ckpt.pt", 0)),
        ("--out_dir", file("out/ckpt.pt", random.Random(2).randbytes(20_000))),
        ("--out_dir", bomb),
        ("--out_dir", zipped_bomb),
        ("--out_dir", lambda: torch.save([1, 2], "out/ckpt.pt")),
        ("choose another", lambda: torch.save({"model": {}, "iter_num": 3}, "out/ckpt.pt")),
        ("--out_dir", lambda: (os.remove("out/ckpt.pt"), os.mkdir("out/ckpt.pt"))),
        ("code that wrote it", config(n_layer=2)),
        ("code that wrote it", config(d_model=32)),
        ("code that wrote it", config(flavour="sweet")),
        ("code that wrote it", config(activation="swish"))]),
    ("sample.py --checkpoint=first.pt", "first.pt"),
    ("sample.py --init_from=nowhere", "nowhere"),
    ("sample.py", "tokenizer.json", remove("out/tokenizer.json")),
    ("sample.py", "tokenizer.json", file("out/tokenizer.json", "{}")),
    ("sample.py", "tokenizer.json", file("out/tokenizer.json", b"\xff")),
    ("sample.py", "tokenizer.json", copy("data/other/tokenizer.json", "out/tokenizer.json")),
    # prompts
    ("sample.py --start='seventeen tokens.'", "shorten it"),
    ("sample.py --start=FILE:missing.txt", "missing.txt"),
    ("sample.py --start=FILE:data", "UTF-8"),
    ("sample.py --start=FILE:prompt.txt", "UTF-8", file("prompt.txt", b"caf\xe9")),
    ("sample.py --start=FILE:prompt.txt", "shorten it", file("prompt.txt", "long " * 100)),
    ("sample.py --start=\udcff", "cannot spell"),
]


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory):
    """A copy of `prepared` in which out/ holds an interrupted run."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("trained") / "here")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert interrupted_run("train.py tiny.py", 5) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


def names(cases):
    return [ascii(case[0]) + ("" if len(case) == 2 else f" {i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", BAD_INPUTS, ids=names(BAD_INPUTS))
def test_bad_input(trained, tmp_path, monkeypatch, capfd, recwarn, case):
    """Bad input ends a script with status 2 and one line that names the remedy, before any update. No file
    is changed, made or removed, and nothing from a file is executed."""
    command, remedy, *damage = case
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    call_before(monkeypatch, "update_", lambda *arguments: pytest.fail("trained all the same"))
    for spoil in damage:
        spoil()
    before = tree()
    try:
        status = run(command)
    finally:
        forget_settings()
    lines = capfd.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and remedy in lines[0], lines
    assert not [w for w in recwarn if w.category is UserWarning]  # which would print one more line
    assert tree() == before


SOME_BAD_INPUTS = [case for case in BAD_INPUTS if case[0] in (
    "train.py tiny.py --n_layr=2", "train.py tiny.py --dataset=nowhere", "train.py tiny.py --device=cuda:99",
    "sample.py --start=FILE:missing.txt") or case[2:] == (zipped_bomb,)]


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME_BAD_INPUTS, ids=names(SOME_BAD_INPUTS))
def test_bad_input_to_a_process(trained, tmp_path, monkeypatch, case):
    """The same of a few in a process of their own: nothing is printed on the way, either."""
    command, remedy, *damage = case
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    for spoil in damage:
        spoil()
    before = tree()
    status, error = finish(launch(command))
    assert status == 2
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and remedy in error
    assert {**tree(), **before} == tree() and tree().keys() - before.keys() == {"stdout.txt", "stderr.txt"}


def test_accumulation_must_be_a_multiple_of_the_ranks(settings, monkeypatch, capsys):
    """Micro-batches that the ranks cannot share evenly are an error that says so."""
    monkeypatch.setattr(train, "gradient_accumulation_steps", 6)
    with pytest.raises(SystemExit) as stopped:
        train.check_settings(4)
    assert stopped.value.code == 2 and "multiple of their number, 4" in capsys.readouterr().err
    train.check_settings(3)


@pytest.mark.parametrize("flags", [
    "", "--d_mlp=40", "--d_model=24 --min_weights_per_neuron=5", "--min_weights_per_neuron=100",
    "--tie_embeddings=True --min_weights_per_neuron=3"])
def test_the_smallest_target_that_is_offered_fits(here, flags, capsys):
    """The target that the error message offers trains, and one a little smaller does not."""
    assert run(f"train.py tiny.py {flags} --target_l0_fraction=1e-4") == 2
    smallest = float(capsys.readouterr().err.split("smallest that fits is ")[1])
    assert run(f"train.py tiny.py {flags} --target_l0_fraction={smallest - 2e-6}") == 2
    assert run(f"train.py tiny.py {flags} --target_l0_fraction={smallest}") == 0


def test_a_checkpoint_sets_settings_only(trained, here):
    """What a checkpoint names beside this script's settings replaces no function of it."""
    shutil.copytree(trained / "out", "out")
    saved(settings={**checkpoint()["settings"], "fail": 1, "surprise": 2})()
    assert run("train.py --init_from=resume") in (0, 2)
    assert callable(train.fail) and not hasattr(train, "surprise")


# ----------------------------------------------------------------------------------------------------------
# good input

def test_settings_are_read_in_order(tmp_path):
    """Files and flags are applied from left to right; ints may stand for floats, and fractions are read."""
    path = tmp_path / "config.py"
    path.write_text("import math\n_half = 1 / 2\nrate = 3\nname = 'a'\nn = 2 ** 4\n")
    settings = {"rate": 0.5, "name": "", "n": 1, "on": True, "other": "", "Constant": 1, "_private": 2}
    chosen = configure(settings, ["--n=2", str(path), "--name=a=b", "--on=FALSE", "--rate=1/64"])
    assert chosen == {"rate", "name", "n", "on"}
    assert settings == {**settings, "rate": 1 / 64, "name": "a=b", "n": 16, "on": False, "other": ""}
    configure(settings, [str(path)])
    assert settings["rate"] == 3 and type(settings["rate"]) is float


@given(key=st.sampled_from(["flag", "number", "rate", "name", "nmae"]), text=st.text(max_size=8) |
       st.from_regex(r"-?[0-9]{1,3}([./e][0-9]{1,2})?|[Tt]rue|false", fullmatch=True))
def test_a_flag_is_read_as_its_type_or_refused(key, text):
    """Whatever is written after --key=, the setting gets a value of its type, or the script ends with
    status 2 and no setting is changed."""
    settings = {"flag": True, "number": 3, "rate": 0.5, "name": "x"}
    before = dict(settings)
    try:
        configure(settings, [f"--{key}={text}"])
    except SystemExit as e:
        assert e.code == 2 and settings == before and key != "name"
    else:
        assert [type(v) for v in settings.values()] == [bool, int, float, str]
        assert key == "name" and settings["name"] == text or key in ("flag", "number", "rate")


# ----------------------------------------------------------------------------------------------------------
# experiments/


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A folder for the CSV, and runs that take no time: the list that they are appended to.

    The best learning rate is 0.02, or a quarter of it with --eps=9.
    """
    trained = []

    def train_one(flags, rate, seed):
        trained.append((flags, rate, seed))
        loss = round(abs(math.log(rate / (0.005 if "eps" in flags else 0.02))), 4) + seed + ("eps" in flags)
        return dict.fromkeys(experiments.COLUMNS[3:], 0) | {"val_loss": loss, "nonzero": 9}

    monkeypatch.setattr(experiments, "PATH", str(tmp_path / "runs.csv"))
    monkeypatch.setattr(experiments, "train_one", train_one)
    monkeypatch.setattr(experiments, "jobs", 2)
    monkeypatch.setattr(experiments, "image", str(tmp_path / "figure.png"))
    monkeypatch.setattr(experiments, "ABLATIONS", [
        experiments.Ablation("beta", "--beta1=0.8", "neutral"),
        experiments.Ablation("eps 9", "--eps=9.0", "neutral", "nothing", tuned=True)])
    return trained


def test_ablations_are_run_once(recorded, capsys):
    """Three seeds each, at a tuned rate or the base's, the changes paired by seed; and never again."""
    experiments.run_ablations(experiments.Runs())
    rates = {seed: {rate for flags, rate, s in recorded if not flags and s == seed} for seed in (1, 2, 3)}
    assert rates == {1: {0.009, 0.018, 0.036}, 2: {0.018}, 3: {0.018}}
    assert sorted(run[1:] for run in recorded if "beta" in run[0]) == [(0.018, seed) for seed in (1, 2, 3)]
    assert {rate for flags, rate, seed in recorded if "eps" in flags and seed > 1} == {0.0045}
    before = len(recorded)
    runs = experiments.Runs()
    experiments.run_ablations(runs)
    assert len(recorded) == before
    experiments.print_ablations(runs)
    printed = capsys.readouterr().out
    assert "| eps 9 | `--eps=9.0` | 0.0045 | +1.000 ± 0.000 | 3 | 0 | nothing | no: worse |" in printed
    assert "| beta | `--beta1=0.8` | 0.018 | +0.000 ± 0.000 | 3 | 0 |  | yes |" in printed


def test_the_best_rate_lies_between_two_others(recorded, monkeypatch):
    """However far from the start it is, also if the runs are stopped and started on the way."""
    best = {0.00225, 0.0045, 0.009, 0.018, 0.036}
    train_one = experiments.train_one

    def stop_at_the_third(flags, rate, seed):
        if len(recorded) == 3:
            raise SystemExit("stopped")
        return train_one(flags, rate, seed)

    monkeypatch.setattr(experiments, "train_one", stop_at_the_third)
    with pytest.raises(SystemExit):
        experiments.tune(experiments.Runs(), ["--eps=9.0"])
    monkeypatch.setattr(experiments, "train_one", train_one)
    runs = experiments.Runs()
    experiments.tune(runs, ["--eps=9.0"])
    assert runs.rates("--eps=9.0")[0] == 0.0045
    assert {rate for _, rate, _ in recorded} == best and len(recorded) == len(best)


def test_the_rate_with_most_seeds_is_reported(recorded):
    """One run of another rate, even if it is better, does not stand for three."""
    runs = experiments.Runs()
    experiments.run_missing(runs, [("--eps=9.0", rate, seed) for rate, seed in
                                   ((0.009, 1), (0.009, 2), (0.009, 3), (0.0045, 1))])
    assert [float(row["learning_rate"]) for row in runs.reported("--eps=9.0")] == [0.009] * 3


def test_the_scaling_runs_fit_and_are_drawn(recorded, tmp_path):
    """All models of the figure can be built at their L0, and all seeds are run at their width's rate."""
    runs = experiments.Runs()
    experiments.run_scaling(runs)
    models = {flags for flags, _, _ in recorded}
    assert models == {flags for line in experiments.scaling_lines().values() for flags in line}
    assert [len(line) for line in experiments.scaling_lines().values()] == [4, 5, 4, 4, 3, 3, 2]
    assert all({(flags, 0.018, seed) for seed in (1, 2, 3)} <= set(recorded) for flags in models)
    experiments.draw_scaling(runs)
    assert (tmp_path / "figure.png").stat().st_size > 0


AN_EXPERIMENT = ("--max_iters=3 --d_model=16 --d_head=8 --block_size=8 --target_l0_fraction=1/2 "
                 "--eval_iters=2 --eval_interval=2")


@pytest.mark.slow
def test_an_experiment_trains(prepared, monkeypatch):
    """What is recorded is what train.py logged last; a loss that is not finite is recorded as infinite."""
    monkeypatch.chdir(Path(train.__file__).parent)
    flags = f"--dataset={prepared}/data/tiny {AN_EXPERIMENT}"
    record = experiments.train_one(flags, 0.01, 1)
    assert record.keys() == set(experiments.COLUMNS[3:])
    assert 4 < float(record["val_loss"]) < 6 and record["dead_neurons"] == 0 and record["nonzero"] > 0
    assert experiments.train_one(flags, 1e30, 1)["val_loss"] == "inf"


@pytest.mark.slow
def test_an_experiment_that_was_stopped_is_not_recorded(prepared, monkeypatch):
    """train.py ends well when it is told to stop: that is no result."""
    monkeypatch.chdir(Path(train.__file__).parent)
    popen = subprocess.Popen

    def stop_soon(*arguments, **options):
        process = popen(*arguments, **options)
        out_dir = next(a for a in arguments[0] if a.startswith("--out_dir=")).partition("=")[2]
        while not os.path.exists(os.path.join(out_dir, "log.jsonl")):
            time.sleep(0.05)
        process.terminate()
        return process

    monkeypatch.setattr(subprocess, "Popen", stop_soon)
    with pytest.raises(SystemExit, match="was stopped"):
        experiments.train_one(f"--dataset={prepared}/data/tiny {AN_EXPERIMENT} --max_iters=100000", 0.01, 1)


def test_the_strongest_nodes_are_those_that_write_most():
    """By what attention passes on of the values, by the activations of neurons; with their own weights."""
    model, idx = random_model(3, n_layer=2), some_tokens(3, 8)
    passed_on = {}
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            part.c_proj.register_forward_hook(lambda m, inputs, _: passed_on.update({m: inputs[0]}))
    found = look_inside.measure(model, idx)
    assert [nodes.name for nodes in found] == ["attn_v 0", "mlp_neuron 0", "attn_v 1", "mlp_neuron 1"]
    for attn_v, neurons, block in zip(found[::2], found[1::2], model.transformer.h, strict=True):
        values = block.attn.c_attn.weight[2 * block.attn.c_proj.in_features:]
        assert torch.equal(attn_v.reads, values * block.ln_1.weight)
        assert torch.equal(neurons.reads, block.mlp.c_fc.weight * block.ln_2.weight)
        for nodes, part in ((attn_v, block.attn), (neurons, block.mlp)):
            assert torch.equal(nodes.writes, part.c_proj.weight)
            written = [passed_on[part.c_proj][..., i, None].abs() * nodes.writes[:, i].norm()
                       for i in range(nodes.writes.size(1))]
            assert nodes.strongest() == max(range(len(written)), key=lambda i: written[i].sum())
        assert torch.equal(neurons.activations, passed_on[block.mlp.c_proj])


def test_a_channel_is_named_by_the_largest_weights_on_it():
    """Of tokens and nodes, three at most, a minus before the negative ones."""
    tokens, nodes = torch.zeros(5, 2), torch.zeros(2, 4)
    tokens[3, 0], tokens[1, 0] = 0.5, -2.0
    nodes[0, 2], nodes[0, 3] = 1.0, 0.1
    tokenizer = byte_tokenizer(5)
    names = [look_inside.spelling(tokenizer, t) for t in range(5)]
    assert look_inside.name_channel(tokens, [("mlp_neuron 0", nodes)], tokenizer, 0) == (
        f"-{names[1]}, mlp_neuron 0.2, {names[3]}")
    assert look_inside.name_channel(tokens, [("mlp_neuron 0", nodes)], tokenizer, 1) == "nothing"


def test_snippets_are_where_the_node_is_largest(monkeypatch):
    """Once a window, the largest magnitude first, none where it is zero."""
    activations = torch.zeros(4, 6, 2)
    activations[0, 5, 1], activations[1, 2, 1], activations[1, 3, 1], activations[3, 0, 1] = 1, -3, 2, 2
    activations[2, 1, 0] = 9  # another node
    nodes = look_inside.Nodes("", activations, None, None, None)
    idx, tokenizer = torch.arange(24).view(4, 6), byte_tokenizer(30)
    spelled = [look_inside.spelling(tokenizer, t)[1:-1] for t in range(24)]
    found = list(look_inside.snippets(nodes, 1, idx, tokenizer))
    assert [strength for strength, *_ in found] == [-3, 2, 1]
    assert [token for _, _, token, _ in found] == [spelled[8], spelled[18], spelled[5]]
    assert found[0][1].endswith(spelled[7]) and found[0][3].startswith(spelled[9])
    monkeypatch.setattr(look_inside, "texts", 1)
    assert len(list(look_inside.snippets(nodes, 1, idx, tokenizer))) == 1


def test_a_node_is_drawn_with_its_largest_weights(monkeypatch):
    """Those it reads on the left, those it writes on the right, the largest first."""
    monkeypatch.setattr(look_inside, "weights", 2)
    for side, align in ((-1, "right"), (1, "left")):
        axis = plot.plt.figure().subplots()
        strengths = torch.tensor([0.1, 0.0, -3.0, 2.0])
        look_inside.draw_side(axis, strengths, lambda channel: f"name {channel}", side)
        texts = [text for text in axis.texts if text.get_text()]
        assert [text.get_text() for text in texts] == [
            "-3.00  channel 2: name 2", "+2.00  channel 3: name 3", "and 1 more"]
        assert {text.get_ha() for text in texts} == {align}


@pytest.mark.parametrize("flags, error", [
    ("--blocks=1", "must be numbers from 0 to 0"), ("--windows=0", "at least 1"),
    ("--texts=-1", "at least 0")])
def test_bad_input_to_look_inside(trained, tmp_path, monkeypatch, capsys, flags, error):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    monkeypatch.setattr(sys, "argv", ["look_inside", flags])
    for name in ("blocks", "windows", "texts"):  # for configure() sets them
        monkeypatch.setattr(look_inside, name, getattr(look_inside, name))
    with pytest.raises(SystemExit):
        look_inside.main()
    assert error in capsys.readouterr().err


def test_a_look_inside(trained, tmp_path, monkeypatch):
    """Two nodes for each block that is asked for, the left of each drawn from what it reads."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    monkeypatch.setattr(sys, "argv", ["look_inside"])
    look_inside.main()
    assert Path("out/inside.png").stat().st_size > 0
    model, idx, sides = random_model(3, n_layer=3), some_tokens(3, 8), []
    monkeypatch.setattr(look_inside, "draw_side",
                        lambda axis, strengths, name, side: sides.append((side, strengths)))
    figure = plot.plt.figure()
    look_inside.draw(figure, model, byte_tokenizer(model.config.vocab_size), idx, {1})
    found = look_inside.measure(model, idx)[2:4]
    assert [axis.get_title() for axis in figure.axes] == [f"{n.name}.{n.strongest()}" for n in found]
    assert [side for side, _ in sides] == [-1, 1, -1, 1]
    for nodes, (_, reads), (_, writes) in zip(found, sides[::2], sides[1::2], strict=True):
        assert torch.equal(reads, nodes.reads[nodes.strongest()])
        assert torch.equal(writes, nodes.writes[:, nodes.strongest()])


def test_curves_are_drawn_beside_those_of_another_run(trained, tmp_path, monkeypatch):
    """Its val loss is in the figure."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    shutil.copytree("out", "other")
    Path("other/log.jsonl").write_text('{"step": 0, "val/loss": 7.5}\n{"step": 9, "val/loss": 6.25}\n')
    monkeypatch.setattr(plot, "beside", "other")
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    plot.main()
    line = figures[0].axes[0].get_lines()[-1]
    assert line.get_label() == "validation of other"
    assert list(line.get_xdata()) == [0, 9] and list(line.get_ydata()) == [7.5, 6.25]


def test_evaluation_takes_all_windows_of_val_once(trained, tmp_path, monkeypatch, capsys):
    """Loss and kurtosis are those of a plain loop over windows, and the standard errors their spread."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    monkeypatch.setattr(evaluate, "batch_size", 3)
    evaluate.main()
    found, bigrams = csv.DictReader(io.StringIO(capsys.readouterr().out))
    meta = json.loads(Path("data/tiny/meta.json").read_text())["val"]
    model = train.model_of(checkpoint()).eval()
    val = torch.from_numpy(np.fromfile("data/tiny/val.bin", dtype="<u2").astype(np.int64))
    T, losses, kurtoses = model.config.block_size, [], []
    for start in range(0, len(val) - T, T):
        idx, targets = val[None, start:start + T], val[None, start + 1:start + T + 1]
        with torch.no_grad():
            losses.append(model(idx, targets)[1].item())
            x = model.residual_stream(idx)[0].double()
        z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
        kurtoses.append((z ** 4).mean().item())
    assert float(found["val_loss"]) == pytest.approx(np.mean(losses), abs=1e-4)
    standard_error = np.std(losses, ddof=1) / len(losses) ** 0.5
    assert float(found["val_loss_se"]) == pytest.approx(standard_error, abs=1e-4)
    assert float(found["kurtosis"]) == pytest.approx(np.mean(kurtoses), abs=1e-2)
    assert found["nonzero"] == str(sum(p.count_nonzero().item() for _, p, _ in model.sparse_parameters()))
    assert 0 < float(bigrams["val_loss"]) < math.log(257)
    for row in (found, bigrams):
        bits = float(row["val_loss"]) / math.log(2) * meta["tokens"] / meta["bytes"]
        assert float(row["bits_per_byte"]) == pytest.approx(bits, abs=1e-3)


def test_evaluation_is_of_one_data_set(trained, tmp_path, monkeypatch, capsys):
    """The bigrams are counted in the data of all the models."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    shutil.copytree("data/tiny", "data/copy")
    shutil.copytree("out", "other")
    saved = train.load_checkpoint("other/ckpt.pt")
    saved["settings"]["dataset"] = "copy"
    torch.save(saved, "other/ckpt.pt")
    monkeypatch.setattr(evaluate, "out_dirs", "out,other")
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "same data" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [1, 7, 49, 1000])
def test_all_bigrams_are_counted(chunk):
    """Once, also those that lie across two of the parts in which the tokens are read."""
    tokens = np.random.default_rng(0).integers(5, size=50).astype(np.uint16)
    pairs = evaluate.count_bigrams(tokens, 5, chunk)
    expected = collections.Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    assert {(i, j): n for (i, j), n in np.ndenumerate(pairs) if n} == expected


def test_counted_bigrams_are_a_distribution():
    """Over all tokens that may follow they sum to one; with little smoothing they are the counts."""
    pairs = np.array([[3, 0, 1], [0, 0, 0], [5, 2, 2]])
    for strength in (1e-6, 1, 10):
        for first in range(3):
            p = [math.exp(-evaluate.bigram_loss(np.array([first, second], dtype=np.uint16), pairs, strength))
                 for second in range(3)]
            assert sum(p) == pytest.approx(1)
            if strength < 1 and pairs[first].any():
                assert p == pytest.approx(pairs[first] / pairs[first].sum(), abs=1e-6)


def test_the_verdict_looks_at_the_spread(recorded, monkeypatch, capsys):
    """A change smaller than its spread over the seeds is called neutral; one seed has no verdict."""
    monkeypatch.setattr(experiments, "ABLATIONS", [
        experiments.Ablation("noisy", "--a", "worse"), experiments.Ablation("worse", "--b", "worse"),
        experiments.Ablation("once", "--c", "worse")])
    runs = experiments.Runs()
    record = dict.fromkeys(experiments.COLUMNS[3:], 0)
    for flags, all_losses in (("", (1.0, 1.0, 1.0)), ("--a", (1.0, 1.3, 0.95)), ("--b", (1.1, 1.1, 1.2)),
                              ("--c", (1.5,))):
        for seed, loss in enumerate(all_losses, 1):
            runs.add(flags, 0.018, seed, record | {"val_loss": loss})
    runs.add("", 0.009, 1, record | {"val_loss": 0.9})  # better, but of one seed
    experiments.print_ablations(runs)
    base, *_, noisy, worse, once = capsys.readouterr().out.strip().split("\n")[-7:]
    assert "learning rate 0.018, val loss 1.000" in base
    assert noisy.endswith("| no: neutral |") and worse.endswith("| yes |") and once.endswith("|  |")


def test_a_diverged_run_has_no_point_in_the_figure(recorded, tmp_path):
    """The figure is drawn without it."""
    runs = experiments.Runs()
    experiments.run_scaling(runs)
    flags = next(iter(experiments.sparse_models(64).values()))
    runs.rows[flags, 0.018, 3] |= {"val_loss": "inf", "nonzero": ""}
    experiments.draw_scaling(runs)
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("flags, error", [
    ("--jobs=-1", "must not be negative"), ("--only=snik", "ABLATIONS")])
def test_bad_input_to_experiments(recorded, monkeypatch, capsys, flags, error):
    monkeypatch.setattr(sys, "argv", ["run", flags])
    monkeypatch.setattr(experiments, "only", "")
    with pytest.raises(SystemExit):
        experiments.main()
    assert error in capsys.readouterr().err and not recorded


# ----------------------------------------------------------------------------------------------------------
# on a GPU. The kernels also without one: TRITON_INTERPRET=1 pytest -k triton, where Triton is installed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def triton_device():
    """Where Triton's kernels can run: on a GPU, or in its interpreter."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n, k", [(1, 1), (3, 2), (64, 1), (100, 25), (100, 100), (1024, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_keeps_the_k_largest(triton_device, dtype, n, k):
    """What a sort keeps, of numbers without and with ties, among them rows of zeros and of one value."""
    import kernels

    x = torch.randn(9, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1], x[2], x[3], x[4, n // 2] = 0.0, 1.0, x[2].relu(), x[3].round(), torch.inf
    kept, mask = kernels.keep_largest(x.to(triton_device), k)
    expected = torch.tensor([[i in plain_largest(row, k) for i in range(n)] for row in x.tolist()])
    assert torch.equal(mask.cpu(), expected)
    assert torch.equal(kept.cpu(), torch.where(expected, x, 0.0))


@pytest.mark.parametrize("j", [0, 1, 4])
@pytest.mark.parametrize("l0", [0.95, 0.5, 0.15])
def test_triton_prunes_as_a_cpu_does(triton_device, l0, j):
    """All matrices at once, some of them with ties and with more zeros than are pruned."""
    import kernels

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, d_model=48, d_head=16, d_mlp=400, vocab_size=50))  # up to 3 blocks
    with torch.no_grad():
        model.transformer.wte.weight.round_(decimals=2)
        model.transformer.h[0].attn.c_attn.weight.copy_(torch.randint(-3, 4, (144, 48)))
        model.lm_head.weight[:, 10:] = 0.0
    parameters = [(p.detach(), dim) for _, p, dim in model.sparse_parameters()]
    todo = [(p.to(triton_device, copy=True), max(1, int(l0 * p.numel())), 0 if dim is None else j, dim)
            for p, dim in parameters]
    kernels.prune_(todo)
    for (pruned, *how), (p, _) in zip(todo, parameters, strict=True):
        prune_by_partition_(p, *how)
        assert torch.equal(pruned.cpu(), p)


@needs_gpu
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_abs_topk_and_its_gradient_are_those_of_a_cpu(dtype, triton, monkeypatch):
    """Of a tensor and of a view, compiled and not; also where Triton cannot work."""
    monkeypatch.setattr("model.HAS_TRITON", triton)
    x = torch.randn(4, 50, 200, generator=torch.Generator().manual_seed(0)).to(dtype).relu()
    for view in (x, x[:, ::2], x.transpose(1, 2)):
        dy = torch.randn(view.mT.shape).to(dtype).mT
        results = []
        for f, device in ((abs_topk, "cpu"), (abs_topk, "cuda"), (torch.compile(abs_topk), "cuda")):
            leaf = view.to(device).detach().requires_grad_()
            y = f(leaf, 40)
            results.append((y.detach().cpu(), torch.autograd.grad(y, leaf, dy.to(device))[0].cpu()))
        for result in results[1:]:
            assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@needs_gpu
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("l0", [1.0, 0.4, 1 / 16])
def test_gpu_prunes_as_a_cpu_does(l0, double):
    """A whole model, also of a precision for which there is no kernel."""
    config = GPTConfig(n_layer=2, d_model=256, vocab_size=300)
    models = [GPT(config), GPT(config).cuda()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.double() if double else model
        model.prune_(l0)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q.cpu()), name


@needs_gpu
@pytest.mark.parametrize("loss, compiled",
                         [*((loss, False) for loss in SINK_LOSSES), ("all positions", True)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("queries, keys", [(256, 256), (70, 70), (1, 33)])
def test_gpu_sink_attention_and_its_gradients(queries, keys, dtype, tolerance, loss, compiled):
    """On all code paths, against an explicit softmax in float64, as a fraction of the largest entry."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, queries, 16), (2, 3, keys, 16), (2, 3, keys, 16), (3,)]
    inputs = [torch.randn(shape, generator=g).to(dtype).double() for shape in shapes]
    dy = torch.randn(2, 3, queries, 16, generator=g).to(dtype).double()
    q, k, v, b = (t.clone().requires_grad_() for t in inputs)
    expected = torch.stack([plain_attention(q[:, h], k[:, h], v[:, h], b[h]) for h in range(3)], dim=1)
    expected_gradients = torch.autograd.grad(SINK_LOSSES[loss](expected, dy), (q, k, v, b))
    on_gpu = [t.cuda().to(torch.float32 if t.ndim == 1 else dtype).requires_grad_() for t in inputs]
    torch._dynamo.reset()  # what the other cases compiled
    f = torch.compile(sink_attention) if compiled else sink_attention
    y = f(*on_gpu, 0.0)
    assert_close(y.detach().cpu().double(), expected.detach(), tolerance)
    gradients = torch.autograd.grad(SINK_LOSSES[loss](y, dy.cuda().to(dtype)), on_gpu)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient.cpu().double(), expected_gradient, tolerance)


@needs_gpu
@pytest.mark.parametrize("sinks", [True, False])
def test_gpu_logits_and_gradients_are_those_of_a_cpu(sinks):
    """In float32, without AbsTopK, whose choice among near equals would hang on the last bit."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    model = tiny_model(d_model=64, d_head=16, block_size=64, activation_topk_fraction=1.0,
                       use_attention_sinks=sinks)
    twin = tiny_model(d_model=64, d_head=16, block_size=64, activation_topk_fraction=1.0,
                      use_attention_sinks=sinks).cuda()
    idx = some_tokens(4, 65)
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    twin_logits, twin_loss = twin(idx[:, :-1].cuda(), idx[:, 1:].cuda())
    loss.backward()
    twin_loss.backward()
    torch.set_float32_matmul_precision(precision)
    assert_close(twin_logits.detach().cpu(), logits.detach(), 1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(q.grad.cpu(), p.grad, 1e-3)


@needs_gpu
def test_gpu_generation_equals_uncached():
    """Token for token, past the end of the window too."""
    model = tiny_model(activation_topk_fraction=0.5).cuda()
    prompt = some_tokens(2, 5).cuda()
    assert torch.equal(model.generate(prompt, 9, temperature=0), plain_greedy(model, prompt, 9))


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu_trains_stops_resumes_and_samples(here, dtype):
    """Compiled, in a process of its own: the loss falls, exactly k weights are left, and a run goes on."""
    command = (f"train.py tiny.py --device=cuda --dtype={dtype} --compile=True --max_iters=60 --dropout=0 "
               "--d_model=32 --d_head=16 --eval_interval=30 --log_sparsity_every_n_steps=1")
    status, errors = finish(launch(command))
    assert status == 0, errors
    records = log()
    losses = [record["val/loss"] for record in records if "val/loss" in record]
    assert losses[-1] < losses[0] - 0.3
    last = [record for record in records if "sparsity/nonzero" in record][-1]
    sizes = [p.numel() for _, p, _ in train.model_of(checkpoint()).sparse_parameters()]
    assert last["sparsity/nonzero"] == sum(n // 4 for n in sizes)
    status, errors = finish(launch(command + " --max_iters=70 --init_from=resume"))
    assert status == 0 and checkpoint()["step"] == 70, errors
    status, errors = finish(launch("sample.py --num_samples=1 --max_new_tokens=20"))
    assert status == 0 and read("stdout.txt"), errors
