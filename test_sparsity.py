"""The method, as properties: AbsTopK, the prune, the schedules, the training step, the forward pass, the
nodes, generation, and the order of the data. A test states its property in its name and docstring.

The oracles (plain_...) are slow, plain and share no code with what they check; what they check is what
training and sampling call. All other tests, those of whole runs among them, are in tests/, by subject:

    python -m pytest -q                 # all tests
    python -m pytest -q -m "not slow"   # all but those that start many processes
"""
import dataclasses
import itertools
import math
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import kernels
import runs
import train
from configurator import settings_of
from model import GPT, LOCATIONS, NODE_LOCATIONS, AbsTopK, GPTConfig, KVCache, abs_topk, sink_attention

torch.set_num_threads(1)  # the tensors here are small: more threads would wait for each other

CPU = runs.Process(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

few = hypothesis_settings(max_examples=40, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def choose(monkeypatch):
    """choose(name=value, ...) changes settings of train.py until the test is over."""

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setattr(train, name, value)

    return set_all


# ----------------------------------------------------------------------------------------------------------
# oracles


def plain_largest(values, k):
    """Indices of the k values of largest magnitude, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]


def plain_mask(x, k):
    """Where the k largest entries of each row of x (..., n) are."""
    rows = [set(plain_largest(row, k)) for row in x.flatten(0, -2).tolist()]
    return torch.tensor([[i in row for i in range(x.size(-1))] for row in rows]).view(x.shape)


def plain_abs_topk(x, k):
    """x (..., n) with all but the k largest entries of each row zeroed."""
    return torch.where(plain_mask(x, k), x, 0.0)


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
    """Causal attention of one head, q, k, v (B, T, d_head): a softmax in which the sink is a column."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[1:]).triu(1 + k.size(1) - q.size(1)) > 0  # the last query sees all keys
    scores = scores.masked_fill(future, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(*scores.shape[:2], 1)], dim=-1)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights[..., :k.size(1)] @ v


def plain_heads(q, k, v, sinks):
    """The same of several heads, q, k, v (B, n_head, T, d_head), each with its own of the `sinks`."""
    heads = [plain_attention(q[:, h], k[:, h], v[:, h], sink) for h, sink in enumerate(sinks)]
    return torch.stack(heads, dim=1)


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
        logits = logits + w["bigram_table"][idx]
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
    """Update w (name -> numpy array) in process: normalize, Adam, prune, decay. Returns the RMS before."""
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


def plain_greedy(model, idx, n):
    """n tokens more, each the likeliest after the last block_size, without a cache."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
    return idx


# ----------------------------------------------------------------------------------------------------------
# small models, data, and how they are compared


def arrays_of(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def assert_close(found, expected, tolerance):
    """No entry is off by more than `tolerance` of the largest entry."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1e-3, expected.abs().max())


def random_model(seed, **fixed):
    """A small GPT in float64, of a random configuration but for what is `fixed`. Nothing in it is 0."""
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
    """A small GPT in float32, of the default configuration but for `values`. Nothing in it is 0."""
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


def some_data(seed=0):
    """Random tokens, 500 to train on and 300 to evaluate on."""
    tokens, val = np.split(np.random.default_rng(seed).integers(11, size=800).astype(np.uint16), [500])
    meta = {"train": {"tokens": 500, "bytes": 1009}, "val": {"tokens": 300, "bytes": 707}}
    return runs.Data(tokens, val, meta, tokenizer="")


def ranks(world_size):
    """The processes of all ranks of a run on a CPU."""
    return [dataclasses.replace(CPU, rank=rank, world_size=world_size) for rank in range(world_size)]


@contextmanager
def hooked(module, function):
    """Within it, `function` gets the module's output; what it returns, if anything, goes on in its place."""
    handle = module.register_forward_hook(lambda module, inputs, output: function(output))
    yield
    handle.remove()


# ----------------------------------------------------------------------------------------------------------
# AbsTopK


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
    assert torch.equal(abs_topk(x, k), plain_abs_topk(x, k))


def test_abs_topk_passes_gradient_to_the_kept_alone():
    """Kept entries get their whole gradient, kept zeros too; all others get none."""
    x = torch.tensor([[0.0, -3.0, 0.0, 0.0], [2.0, -2.0, 2.0, -2.0]], requires_grad=True)
    dy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    abs_topk(x, 3).backward(dy)
    assert x.grad.tolist() == [[1.0, 2.0, 3.0, 0.0], [5.0, 6.0, 7.0, 0.0]]


def test_abs_topk_can_be_differentiated_twice():
    """Its second derivatives are those of a product with a fixed mask."""
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: abs_topk(x, 3) ** 3, x)


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


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "definition"])
@pytest.mark.parametrize("j", [0, 1, 3, 4])
@pytest.mark.parametrize("l0", [0.9, 0.5, 0.377, 0.25])
def test_prune_leaves_exactly_k_in_every_matrix_and_each_neuron_its_floor(l0, j, fast, monkeypatch):
    """int(l0 * numel) in all; at least j in every row of c_attn and c_fc and every column of both c_proj."""
    monkeypatch.setattr(kernels, "enabled", fast)
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
    """One matrix for embedding and unembedding is pruned once and stays one; positions are pruned too."""
    model = tiny_model(tie_embeddings=True, use_positional_embeddings=True)
    model.prune_(0.3)
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    assert model.lm_head.weight is wte
    assert wte.count_nonzero() == int(0.3 * wte.numel()) and wpe.count_nonzero() == int(0.3 * wpe.numel())


def test_prune_to_less_than_one_weight_leaves_none():
    """Without a floor k may be 0 in a small matrix: it is zeroed. A bias keeps its largest entry."""
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


def test_smallest_l0_leaves_no_matrix_empty():
    """Without a floor, too: the smallest matrix keeps one weight."""
    model = tiny_model(n_layer=1)
    model.prune_(model.smallest_l0(0), min_weights_per_neuron=0)
    assert min(model.get_parameter(name).count_nonzero() for name in MATRICES) == 1


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
    """0 at step 0, the whole rate where warmup ends, then linearly down to 0 just after the last step."""
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
    """On random configurations, from data to weights: what training calls gives what the method says."""
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
    data, optimizer = some_data(seed), train.build_optimizer(model)
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


def test_what_is_left_open_is_filled_in():
    """d_mlp is 4 * d_model, n_head is d_model / d_head; spaces in the list of locations do no harm."""
    c = GPTConfig(d_model=32, d_head=8, activation_sparsity_locations=" attn_in , mlp_out,")
    assert (c.d_mlp, c.n_head, c.locations) == (128, 4, ["attn_in", "mlp_out"])
    assert GPTConfig(d_model=32, d_head=8, d_mlp=48, n_head=3).d_mlp == 48
    assert GPTConfig().activation_sparsity_locations == (
        "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out")


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
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "definition"])
@pytest.mark.parametrize("queries, keys", [(1, 1), (6, 6), (70, 70), (1, 6), (3, 6)])
def test_the_sink_is_one_more_column_of_the_softmax(queries, keys, fast, loss, monkeypatch):
    """All gradients too; fewer queries than keys is how a cache decodes."""
    monkeypatch.setattr(kernels, "enabled", fast)
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, queries, 4), (2, 3, keys, 4), (2, 3, keys, 4), (3,)]
    q, k, v, b = (torch.randn(shape, generator=g).double().requires_grad_() for shape in shapes)
    dy = torch.randn(q.shape, generator=g).double()
    expected = plain_heads(q, k, v, b)
    expected_gradients = torch.autograd.grad(SINK_LOSSES[loss](expected, dy), (q, k, v, b))
    y = sink_attention(q, k, v, b, 0.0)
    assert_close(y.detach(), expected.detach(), 1e-9)
    gradients = torch.autograd.grad(SINK_LOSSES[loss](y, dy), (q, k, v, b))
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert_close(gradient, expected_gradient, 1e-9)


def test_a_low_sink_is_no_sink_and_a_high_one_takes_all():
    """With the logit -30 attention is plain causal attention, with +30 its output is zero."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    plain = plain_attention(q[:, 0], k[:, 0], v[:, 0])
    assert_close(sink_attention(q, k, v, torch.tensor([-30.0]).double(), 0.0)[:, 0], plain, 1e-9)
    assert sink_attention(q, k, v, torch.tensor([30.0]).double(), 0.0).abs().max() < 1e-9


def test_loss_is_float32_under_autocast():
    """The blocks run in bfloat16; logits and loss are float32, and the loss is that of the logits."""
    model, seen = tiny_model(), []
    idx = torch.arange(8).view(1, 8)
    process = dataclasses.replace(CPU, dtype=torch.bfloat16)
    with hooked(model.transformer.h[0].mlp.c_fc, seen.append), process.autocast():
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


def test_dropout_takes_attention_weights_and_scales_the_rest():
    """With the identity for values attention puts out its weights: of each the double, or zero."""
    q, k = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, b = torch.eye(8, dtype=torch.float64).expand(2, 3, 8, 8), torch.zeros(3, dtype=torch.float64)
    weights, dropped = sink_attention(q, k, v, b, 0.0), sink_attention(q, k, v, b, 0.5)
    kept = dropped != 0
    assert_close(dropped, 2 * weights * kept, 1e-9)
    assert 0.3 < kept.sum() / (weights != 0).sum() < 0.7


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


# ----------------------------------------------------------------------------------------------------------
# the nodes


def site_names(location):
    """Where the two modules of a location are in a model of two layers."""
    owner = location.split("_")[0] + "." if location in NODE_LOCATIONS else ""
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


@pytest.mark.parametrize("parts", [(5, 1), (3, 3), (1, 2, 3)], ids=str)
def test_a_cache_goes_on_by_any_number_of_tokens(parts):
    """What is read in parts is what is read at once."""
    model, idx = tiny_model(), some_tokens(2, 6)
    caches = [KVCache(8) for _ in model.transformer.h]
    with torch.no_grad():
        x = torch.cat([model.residual_stream(part, caches) for part in idx.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(x, model.residual_stream(idx))


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


# ----------------------------------------------------------------------------------------------------------
# the settings, and the order of the data


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


def test_data_order_is_a_function_of_seed_step_and_micro_step(choose):
    """A batch is the same whatever came before it, and another for another seed, step or micro-step."""
    choose(block_size=8, batch_size=2, seed=7)
    data = some_data()

    def batch(step, micro_step):
        x, y = train.training_batch(data, step, micro_step, CPU)
        assert x.shape == y.shape == (2, 8) and torch.equal(x[:, 1:], y[:, :-1])
        return x.tolist()

    first = batch(5, 1)
    others = [batch(5, 0), batch(1, 5), batch(6, 1)]
    torch.manual_seed(0)
    np.random.seed(0)
    assert batch(5, 1) == first
    choose(seed=8)
    assert first not in [*others, batch(5, 1)]


def test_every_window_is_drawn(choose):
    """Of data with two windows both are drawn, the last one too; the last token is a target."""
    choose(block_size=8, batch_size=64)
    data = runs.Data(np.arange(10, dtype="<u2"), None, {}, "")
    x, y = train.training_batch(data, 0, 0, CPU)
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 9


def test_gradients_are_those_of_the_mean_over_micro_batches(choose):
    """Loss and gradients of a step are those of all its sequences in one batch; two ranks share them out."""
    choose(block_size=8, batch_size=2, gradient_accumulation_steps=4)
    data, model, unshared = some_data(), tiny_model(), []
    model.no_sync = lambda: unshared.append("micro-batch") or nullcontext()

    def loss_and_gradients(process):
        model.zero_grad()
        loss = train.gradients_of_step(model, data, NO_SCALER, 3, process).item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    batches = [train.training_batch(data, 3, micro_step, CPU) for micro_step in range(4)]
    expected = model(*(torch.cat(part) for part in zip(*batches)))[1]
    expected.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    (loss_0, found_0), (loss_1, found_1) = map(loss_and_gradients, ranks(2))
    for loss, found in (loss_and_gradients(CPU), ((loss_0 + loss_1) / 2, (found_0 + found_1) / 2)):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-7)
    assert loss_0 != loss_1
    assert len(unshared) == 2  # the first of each rank's two micro-batches: DDP averages at the last
