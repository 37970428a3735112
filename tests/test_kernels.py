"""The fast versions equal the plain definitions: of AbsTopK, of the prune, of attention with a sink and of
sampling with sparse weights, on a CPU, in Triton and on a GPU. Without a GPU the tests of Triton's kernels
run in its interpreter, where it is installed: TRITON_INTERPRET=1 pytest -k triton.
"""
import dataclasses
import multiprocessing
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import kernels
from conftest import checkpoint, finish, launch, log, read
from kernels import SparseLinear, keep_largest, use_sparse_linears_, zero_where_not
from model import (
    GPT,
    GPTConfig,
    abs_topk,
    attention_weights,
    keep_survivors_,
    largest,
    sink_attention,
    weight_score,
)
from test_sparsity import (
    CPU,
    DTYPES,
    SINK_LOSSES,
    assert_close,
    few,
    plain_abs_topk,
    plain_greedy,
    plain_heads,
    plain_mask,
    plain_prune,
    random_model,
    some_tokens,
    tables,
    tiny_model,
)


def plainly(definition):
    """The function that runs a definition of model.py itself, without what is faster."""
    def run_it(*arguments, **keywords):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "enabled", False)
            return definition(*arguments, **keywords)

    return run_it


# ----------------------------------------------------------------------------------------------------------
# AbsTopK and the prune on a CPU


@few
@given(tables, st.sampled_from(DTYPES), st.data())
def test_both_versions_choose_the_same_entries(table, dtype, data):
    """The fast version and the definition both agree with a sort."""
    x = torch.tensor(table, dtype=dtype)
    k = data.draw(st.integers(1, x.size(1)))
    expected, (kept, mask) = plain_mask(x, k), keep_largest(x, k)
    assert torch.equal(mask, expected) and torch.equal(largest(x.abs(), k), expected)
    assert torch.equal(kept, plain_abs_topk(x, k)) and torch.equal(plainly(abs_topk)(x, k), kept)
    assert torch.equal(zero_where_not(expected, x), kept)


@pytest.mark.parametrize("shape", [(7, 70_000), (6000, 100), (5, 1, 7, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_topk_of_large_tensors(shape, dtype):
    """Also where the CPU's kernel takes the rows in several parts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = shape[-1] // 4
    assert torch.equal(abs_topk(x, k), plain_abs_topk(x, k))


def test_abs_topk_of_a_view_is_that_of_its_copy():
    """Strides do not matter: transposed, sliced and expanded inputs give what their contiguous copies do."""
    x = torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0))
    for view in (x.transpose(1, 2), x[:, ::2, 1::3], x[:1].expand(4, 8, 10), x.permute(2, 0, 1)):
        assert torch.equal(abs_topk(view, 2), abs_topk(view.contiguous(), 2))


@few
@given(tables, st.sampled_from(DTYPES), st.data())
def test_both_versions_prune_alike(table, dtype, data):
    """With and without a floor for rows or columns: the fast version, the definition and a sort agree."""
    p = torch.tensor(table, dtype=dtype)
    neuron_dim = data.draw(st.sampled_from([None, 0, 1]))
    j = 0 if neuron_dim is None else data.draw(st.integers(0, p.size(1 - neuron_dim)))
    floor = j * p.size(neuron_dim) if j else 1
    k = data.draw(st.integers(floor, p.numel()))
    expected = torch.from_numpy(plain_prune(p.double().numpy(), k, neuron_dim, j)).to(dtype)
    for version in (keep_survivors_, plainly(keep_survivors_)):
        pruned = p.clone()
        version([(pruned, k, j, neuron_dim)], weight_score)
        assert torch.equal(pruned, expected), version


def test_any_number_of_equals_is_pruned_lower_index_first():
    """Of 70,000 equal scores exactly the first k survive, in both versions."""
    for version in (keep_survivors_, plainly(keep_survivors_)):
        p = torch.ones(2, 35_000)
        version([(p, 69_000, 0, None)], weight_score)
        assert p.flatten()[:69_000].all() and not p.flatten()[69_000:].any()


def test_the_prune_takes_any_score():
    """Both versions keep what scores highest, leave the scores as they were, and may call AbsTopK."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 60, 80, generator=g)
    stored = torch.rand(60, 80, generator=g).round(decimals=1)
    for other in (lambda p: stored, lambda p: stored * p.abs(), lambda p: p.abs() + abs_topk(p, 4).abs()):
        before, pruned = stored.clone(), []
        for version in (keep_survivors_, plainly(keep_survivors_)):
            pair = [(p.clone(), 1000, 4, 0), (q.clone(), 700, 3, 1), (q.clone(), 0, 0, None)]
            version(pair, other)
            pruned.append(pair)
            assert torch.equal(stored, before)
        for (fast, k, *_), (plain, *_) in zip(*pruned):
            assert torch.equal(fast, plain) and fast.count_nonzero() == k


def no_kernel(*arguments):
    pytest.fail("a kernel ran")


KERNELS = ("abs_topk", "sink_attention", "keep_survivors_")


@pytest.mark.parametrize("name", KERNELS)
def test_a_definition_runs_itself_where_kernels_are_off(name, monkeypatch):
    """With kernels.enabled a step of a model calls the faster version of each definition; without, none."""
    calls = []
    monkeypatch.setattr(kernels, name, lambda *arguments: calls.append(name) or plain(*arguments))
    plain = plainly({"abs_topk": abs_topk, "sink_attention": sink_attention,
                     "keep_survivors_": keep_survivors_}[name])
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "enabled", enabled)
        calls.clear()
        model = tiny_model()
        model(some_tokens(2, 4))
        model.prune_(0.5)
        assert (name in calls) == enabled


def test_kernels_on_or_off_a_compiled_model_computes_the_same(monkeypatch):
    """torch.compile notices that they are switched, and neither is a graph break."""
    x = torch.randn(3, 8)
    q, k, v = torch.randn(3, 2, 2, 6, 4)

    def both(x, q, k, v):
        return abs_topk(x, 2), sink_attention(q, k, v, torch.zeros(2), 0.0)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for enabled in (True, False, True):
        monkeypatch.setattr(kernels, "enabled", enabled)
        kept, y = compiled(x, q, k, v)
        assert torch.equal(kept, both(x, q, k, v)[0])
        assert_close(y, plainly(sink_attention)(q, k, v, torch.zeros(2), 0.0), 1e-5)
    monkeypatch.setattr(kernels, "enabled", False)
    monkeypatch.setattr(kernels, "keep_largest", no_kernel)
    compiled(x, q, k, v)


def test_attention_weights_are_those_of_the_softmax_with_a_sink():
    """With the identity for values attention puts out its weights; their rest goes to the sink."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 4, generator=g, dtype=torch.float64) for n in (4, 6))
    b = torch.randn(3, generator=g, dtype=torch.float64)
    weights = attention_weights(q, k, b)
    assert weights.shape == (2, 3, 4, 6)
    assert_close(weights, plain_heads(q, k, torch.eye(6).double().expand(2, 3, 6, 6), b), 1e-9)
    assert (weights.sum(-1) < 1).all() and not weights.triu(3).any()


def test_without_a_cpu_the_definitions_run():
    """Also where nothing is to be pruned: what a GPU would be asked to do, on a device without memory."""
    model = random_model(0).to("meta")
    assert model(some_tokens(2, 4).to("meta"))[0].shape == (2, 4, 11)
    assert abs_topk(torch.empty(3, 8, device="meta"), 2).shape == (3, 8)
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
    try:
        assert here.poll(60), "the fork hangs"
        assert here.recv() == model.lm_head.weight.count_nonzero()
    finally:
        process.kill()
        process.join()


# ----------------------------------------------------------------------------------------------------------
# attention with a sink, and sparse products


@pytest.mark.parametrize("attend", [
    sink_attention, plainly(sink_attention), kernels.attention_with_a_key_more,
], ids=["fused", "definition", "a key more"])
def test_attention_with_a_sink_does_not_depend_on_strides(attend):
    """Views whose last dimension is not the innermost, as a sparse product makes, give what copies give."""
    g = torch.Generator().manual_seed(0)
    copies = [torch.randn(2, 3, 6, 4, generator=g, requires_grad=True) for _ in range(3)]
    views = [t.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in copies]
    b = torch.randn(3, generator=g)
    y, y_of_views = (attend(*tensors, b, 0.0) for tensors in (copies, views))
    assert_close(y_of_views.detach(), y.detach(), 1e-5)
    y.square().sum().backward()
    y_of_views.square().sum().backward()
    for copy, view in zip(copies, views):
        assert_close(view.grad, copy.grad, 1e-5)


@pytest.mark.parametrize("b", [0.7, -2.0, -torch.inf])
def test_a_key_more_is_a_sink(b):
    """The way for GPUs and precisions without the fused kernel, a sink that is switched off among them."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 6, 4, generator=g).double().requires_grad_() for _ in range(3)]
    sinks, dy = torch.full((3,), b, dtype=torch.float64), torch.randn(2, 3, 6, 4, generator=g).double()
    results = []
    for attend in (kernels.attention_with_a_key_more, plainly(sink_attention)):
        y = attend(*inputs, sinks, 0.0)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
    for found, expected in zip(*results):
        assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
def test_sparse_kernels_give_the_same_logits(sinks):
    """A model that does not multiply its zeros is the same model, for one sequence and several."""
    model = tiny_model(d_model=32, vocab_size=40, use_attention_sinks=sinks)
    model.prune_(0.15)
    inputs = [some_tokens(batch, length) for batch, length in ((1, 8), (3, 8), (1, 1), (3, 1))]
    expected = [model(idx)[0].detach() for idx in inputs]
    text = model.generate(inputs[1][:, :4], 12, temperature=0)
    use_sparse_linears_(model)
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 9
    for idx, logits in zip(inputs, expected):
        assert_close(model(idx)[0].detach(), logits, 1e-5)
    assert torch.equal(model.generate(inputs[1][:, :4], 12, temperature=0), text)


def test_sparse_kernels_work_under_autocast():
    """Sampling in bfloat16 on a CPU gives finite logits, in float32."""
    model = tiny_model()
    model.prune_(0.15, min_weights_per_neuron=1)
    use_sparse_linears_(model)
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    with dataclasses.replace(CPU, dtype=torch.bfloat16).autocast():
        logits, _ = model(some_tokens(2, 8))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_sparse_kernels_replace_only_what_is_sparse():
    """A dense model stays as it is."""
    model = use_sparse_linears_(tiny_model())
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


# ----------------------------------------------------------------------------------------------------------
# Triton, on a GPU or in its interpreter


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
    import kernels_triton

    x = torch.randn(9, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1], x[2], x[3], x[4, n // 2] = 0.0, 1.0, x[2].relu(), x[3].round(), torch.inf
    view = torch.cat([x, x], dim=1).to(triton_device)[:, :n]
    leaf, dy = view.detach().requires_grad_(), torch.randn(9, n).to(dtype)
    kept = kernels_triton.KeepLargest.apply(leaf, k)
    assert torch.equal(kept.detach().cpu(), plain_abs_topk(x, k))
    dy = dy.to(triton_device).requires_grad_()
    expected = torch.where(plain_mask(x, k), dy.detach().cpu(), 0.0)
    for again in (False, True):  # the second time as if the gradient were to be differentiated
        dx, = torch.autograd.grad(kept, leaf, dy, retain_graph=True, create_graph=again)
        assert torch.equal(dx.detach().cpu(), expected) and dx.requires_grad == again


def to_prune(width):
    """(p, k, j, neuron_dim) of matrices of up to three blocks: without ties, with, with nothing but equals,
    with zeros. k is from the floor's size to all but one."""
    g = torch.Generator().manual_seed(width)
    normal = torch.randn(20, 18 * width, generator=g)
    found = []
    for l0 in (1.0, 0.6, 0.1, 0.0):
        for p, j, dim in ((torch.zeros(8, width), 2, 0), (normal, 4, 0), (normal, 2, 1),
                          (normal[:, :16], 1, 1), (normal[:9], 0, None),
                          ((2 * normal).round(), 0, None), (normal.relu(), 1, 0), (normal[0], 0, None),
                          (torch.full((20, 18 * width), -0.5), 0, None)):
            least = j * p.size(dim) if j else 0
            found.append((p.clone(memory_format=torch.contiguous_format),
                          max(least, min(int(l0 * p.numel()), p.numel() - 1)), j, dim))
    return found


def assert_prunes_as_defined(tensors, score, device):
    """What Triton's kernels leave of all `tensors` at once is what the definition leaves of each."""
    import kernels_triton

    pruned = [(p.to(device, copy=True), *how) for p, *how in tensors]
    kernels_triton.keep_survivors_(pruned, weight_score)
    for (p, *_), (plain, *how) in zip(pruned, tensors, strict=True):
        expected = plain.to(device, copy=True)
        plainly(keep_survivors_)([(expected, *how)], weight_score)
        assert torch.equal(p, expected), (p.shape, how)


@pytest.mark.parametrize("width, sample", [(25, 16384), (32, 64)])
def test_triton_prunes_as_defined(triton_device, width, sample, monkeypatch):
    """Many tensors at once, whose rows are aligned or not; also where a sample says, rightly or wrongly,
    which weights may be the last to survive."""
    monkeypatch.setattr("kernels_triton.SAMPLE", sample)
    assert_prunes_as_defined(to_prune(width), weight_score, triton_device)


@pytest.mark.parametrize("low, high", [(0.0, 1e-45), (0.5, 2.0), (1e30, 1e31), (100.0, 150.00002)])
def test_triton_survives_a_wrong_guess(triton_device, low, high, monkeypatch):
    """Whatever the sample says, k survive; also if exactly k reach the upper end of what it says."""
    ends = torch.tensor([low, high]).view(torch.int32)

    class Guess:
        def __getitem__(self, grid):
            return lambda table, floors, brackets, **_: brackets.copy_(ends.repeat(len(brackets) // 2))

    monkeypatch.setattr("kernels_triton.bracket_kernel", Guess())
    monkeypatch.setattr("kernels_triton.SAMPLE", 64)
    p = torch.cat([torch.arange(150.0, 201.0), torch.arange(150.0)])  # 50 are larger than the first
    tensors = [(p, 50, 0, None), (torch.arange(240.0) % 4, 150, 0, None), *to_prune(25)[::5]]
    assert_prunes_as_defined(tensors, weight_score, triton_device)


def test_triton_prunes_by_any_score(triton_device, monkeypatch):
    """Of weights whose score is zero the first are kept; also of other precisions and strides. A score of
    another size is refused."""
    for i, (sample, other) in enumerate((
            (16384, torch.relu), (64, torch.Tensor.bfloat16), (64, torch.zeros_like),
            (64, torch.relu), (16384, lambda p: torch.stack([p, p], -1)[..., 0]))):
        monkeypatch.setattr("kernels_triton.SAMPLE", sample)
        assert_prunes_as_defined(to_prune(25)[i::5], other, triton_device)
    with pytest.raises(RuntimeError, match="size"):
        assert_prunes_as_defined(to_prune(25), lambda p: p[:1], triton_device)


# ----------------------------------------------------------------------------------------------------------
# on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_abs_topk_and_its_gradient_are_those_of_a_cpu(dtype, triton, monkeypatch):
    """Of a tensor and of a view, compiled and not; also where Triton cannot work."""
    monkeypatch.setattr("kernels.HAS_TRITON", triton)
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
    expected = plain_heads(q, k, v, b)
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
    sizes = [p.numel() for _, p, _ in checkpoints.model_of(checkpoint()).sparse_parameters()]
    assert last["sparsity/nonzero"] == sum(n // 4 for n in sizes)
    status, errors = finish(launch(command + " --max_iters=70 --init_from=resume"))
    assert status == 0 and checkpoint()["step"] == 70, errors
    status, errors = finish(launch("sample.py --num_samples=1 --max_new_tokens=20"))
    assert status == 0 and read("stdout.txt"), errors
