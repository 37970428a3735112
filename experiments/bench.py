"""What sparsity costs and what it saves: ours beside the alternatives, all measured in one run.

    python -m experiments.bench                # all rows, at sizes for the device: minutes
    python -m experiments.bench --only=prune   # the rows whose function's name contains this

A figure is the median of `repeats` calls after a warm-up. The ratio is ours to the first alternative: it can
be compared between machines and days, the times cannot, for machines are shared and noisy.
"""
import itertools
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import kernels
import measures
import model as architecture
import train
from configurator import configure, ends_explained, fail
from kernels import use_sparse_linears_
from model import GPT, AbsTopK, GPTConfig, sink_attention
from runs import Data, compile_blocks, name_of_device, this_process

only = ""  # measure the rows whose name contains this; '': all
device = "auto"
dtype = "auto"
repeats = 5
compile = True

DEFAULT = GPTConfig()
SMALL = GPTConfig(n_layer=4, d_model=512)  # what two cores step through in a second


# ----------------------------------------------------------------------------------------------------------
# the alternatives, in plain words: what the published code does


class PlainAbsTopK(torch.nn.Module):
    """AbsTopK by torch.topk and scatter."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        index = x.abs().topk(self.k, sorted=False).indices
        return torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))


def masked_sink_attention(q, k, v, sink_logit, dropout_p):
    """The sink as a key of zeros, its logit in a dense additive mask."""
    B, H, T, _ = q.shape
    k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    hidden = torch.ones(T, T + 1, dtype=torch.bool, device=q.device).triu(2)
    mask = torch.zeros(T, T + 1, dtype=q.dtype, device=q.device).masked_fill(hidden, -torch.inf)
    sink = F.pad(sink_logit.to(q.dtype).view(H, 1, 1), (0, T))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(mask + sink).expand(B, H, T, T + 1))


@torch.no_grad()
def topk_prune_(model, l0_fraction, min_weights_per_neuron=4, sparsify_biases=True):
    """`GPT.prune_` by torch.topk over each matrix."""
    for _, p, neuron_dim in model.sparse_parameters():
        k = max(1, int(l0_fraction * p.numel()))
        magnitude = p.abs()
        if neuron_dim is not None:
            top = magnitude.topk(min_weights_per_neuron, dim=1 - neuron_dim).indices
            magnitude.scatter_(1 - neuron_dim, top, torch.inf)
        mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        mask[magnitude.flatten().topk(k, sorted=False).indices] = True
        p.mul_(mask.view_as(p))


# ----------------------------------------------------------------------------------------------------------
# measuring


def seconds(run, process, warmup=2, at_a_time=10):
    """Median time of `repeats` calls of `run`, after a warm-up; on a GPU of some that overlap."""
    times, at_a_time = [], at_a_time if process.device.type == "cuda" else 1
    for i in range(warmup + repeats):
        begun = time.perf_counter()
        for _ in range(at_a_time):
            run()
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append((time.perf_counter() - begun) / at_a_time)
    return float(np.median(times))


def row(name, ours, *others, unit="ms", scale=1e3):
    """Print a row: our figure, the others as (name, figure), and the ratio of ours to the first of them."""
    cells = [f"{name:<44}", f"ours {ours * scale:9.2f} {unit}"]
    cells += [f"{label} {figure * scale:9.2f} {unit}" for label, figure in others]
    if others:
        cells.append(f"ours / {others[0][0]} = {ours / others[0][1]:.3f}")
    print(" | ".join(cells), flush=True)


def causal_attention(q, k, v, sink_logit, dropout_p):
    """Plain causal attention. A single query is the newest token: it sees all keys."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=q.size(2) > 1)


@contextmanager
def replaced(module, name, value):
    """Within it, a function or a setting of a module is another."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def by_definition(f):
    """`f` with the definitions of model.py and nothing that is faster."""
    def run(*arguments):
        with replaced(kernels, "enabled", False):
            return f(*arguments)

    return run


ATTENTION = {"ours": sink_attention, "dense": causal_attention, "plain": masked_sink_attention}


def attention_of(kind):
    """Within it, models attend as one of this kind does: ours, dense or plain."""
    return replaced(architecture, "sink_attention", ATTENTION[kind])


def dense_twin(config):
    """A GPT of the same shapes with nothing sparse, and no sink: to be run with the dense attention."""
    return GPT(replace(config, activation_topk_fraction=1.0, use_attention_sinks=False))


def step_runner(config, batch, process, kind):
    """A function that makes one step at the target L0, and its model. kind: ours, dense or plain."""
    sparse = kind != "dense"
    train.batch_size, train.block_size, train.gradient_accumulation_steps = batch, config.block_size, 1
    train.max_iters, train.target_l0_fraction = 1000, 1 / 64 if sparse else 1.0
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=2**20).astype(np.uint16)
    data = Data(tokens, tokens, {}, "")
    model = (GPT(config) if sparse else dense_twin(config)).to(process.device)
    optimizer = train.build_optimizer(model)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    measures.watch_activations(model)
    if kind == "plain":
        replace_by_plain(model)
    elif compile:
        compile_blocks(model, process)

    steps = itertools.count(600)  # past the anneal

    def step():
        i = next(steps)
        with attention_of(kind):
            train.gradients_of_step(model, data, scaler, i, process)
        train.update_(model, optimizer, scaler, i)

    return step, model


def replace_by_plain(model):
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, AbsTopK):
                    setattr(part, name, PlainAbsTopK(child.k))
    model.prune_ = topk_prune_.__get__(model)


# ----------------------------------------------------------------------------------------------------------
# the rows


def sizes(process):
    """Configuration and batch size of a training step that takes about a second."""
    return (DEFAULT, 64) if process.device.type == "cuda" else (SMALL, 8)


def bench_step(process):
    config, batch = sizes(process)
    ours, dense, plain = (seconds(step_runner(config, batch, process, kind)[0], process)
                          for kind in ("ours", "dense", "plain"))
    row(f"training step, d_model {config.d_model}, batch {batch} x {config.block_size}", ours,
        ("dense twin", dense), ("plain, eager", plain))


def bench_abs_topk(process):
    for n in (1024, 4096):
        x = torch.randn(16384, n, device=process.device, dtype=process.dtype, requires_grad=True)
        dy = torch.randn_like(x)
        ours, plain, definition, copy = (
            seconds(lambda f=f, x=x, dy=dy: torch.autograd.grad(f(x), x, dy), process)
            for f in (AbsTopK(n // 4), PlainAbsTopK(n // 4), by_definition(AbsTopK(n // 4)),
                      lambda x: x * 1.0))
        row(f"AbsTopK forward + backward, 16384 x {n}", ours, ("topk + scatter", plain),
            ("definition", definition), ("x * 1.0", copy))


def seconds_to_prune(model, prune, process):
    """Of dense weights, as they are after an optimizer step: the time of copying them back is taken off."""
    dense = [p.detach().clone() for p in model.parameters()]

    def copy():
        torch._foreach_copy_([p.data for p in model.parameters()], dense)

    def run():
        copy()
        prune(model, 1 / 64)

    return seconds(run, process) - seconds(copy, process)


def bench_prune(process):
    model = GPT(DEFAULT).to(process.device)
    row("prune of the default model", seconds_to_prune(model, GPT.prune_, process),
        ("topk per matrix", seconds_to_prune(model, topk_prune_, process)))
    config, batch = sizes(process)
    step, _ = step_runner(config, batch, process, "ours")
    model = GPT(config).to(process.device)
    row(f"prune, of the step at d_model {config.d_model}", seconds_to_prune(model, GPT.prune_, process),
        ("step", seconds(step, process)),
        ("definition", seconds_to_prune(model, by_definition(GPT.prune_), process)))


def bench_attention(process):
    """Each called by itself, which on a GPU measures launches; then as in training, where it is compiled."""
    def time_of(f, inputs, dy):
        return seconds(lambda: f(*inputs, 0.0).backward(dy), process)

    for T in (256, 1024):
        q, k, v = torch.randn(3, 8192 // T, 32, T, 16, device=process.device, dtype=process.dtype).unbind()
        inputs = [t.requires_grad_() for t in (q, k, v, torch.zeros(32, device=process.device))]
        dy = torch.randn_like(q)
        ours, plain, masked, definition = (time_of(f, inputs, dy) for f in (
            sink_attention, causal_attention, masked_sink_attention, by_definition(sink_attention)))
        row(f"sink attention, d_head 16, T {T}", ours, ("plain causal", plain), ("dense mask", masked),
            ("definition", definition))
        if compile:
            ours, plain = (time_of(torch.compile(f, dynamic=False), inputs, dy)
                           for f in (sink_attention, causal_attention))
            row(f"the same, compiled, T {T}", ours, ("plain causal", plain))


def bench_statistics(process):
    """Their share of a step at the default frequencies: each part timed alone, over the steps it serves."""
    config, batch = sizes(process)
    step, model = step_runner(config, batch, process, "ours")
    watched = [module for _, module in model.sites()]
    outputs = {}
    handles = [m.register_forward_hook(lambda m, i, o: outputs.__setitem__(m, o)) for m in watched]
    with torch.compiler.set_stance("force_eager"):  # rather than compile all for these hooks
        step()
    for handle in handles:
        handle.remove()

    def watch():
        for module, output in outputs.items():
            for hook in module._forward_hooks.values():
                hook(module, None, output)

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    parts = (
        (watch, 1),
        (lambda: measures.activation_statistics(model), train.log_every_n_steps),
        (lambda: measures.gradient_statistics(model, 1.0), train.log_gradients_every_n_steps),
        (lambda: measures.weight_statistics(model), train.log_weights_every_n_steps),
        (lambda: measures.sparsity_statistics(model), train.log_sparsity_every_n_steps),
    )
    cost = sum(seconds(part, process) / every for part, every in parts)
    row("statistics and logging, of a step", cost, ("step", seconds(step, process)))


def bench_sampling(process):
    """The default model, pruned to 1/64, writes until its window is full, batch 1."""
    model, twin = (model.to(process.device).eval() for model in (GPT(DEFAULT), dense_twin(DEFAULT)))
    model.prune_(1 / 64)
    prompt, n = torch.zeros(1, 1, dtype=torch.int64, device=process.device), DEFAULT.block_size - 1

    @torch.no_grad()
    def recompute(n=10):
        idx = prompt.repeat(1, DEFAULT.block_size // 2 - n // 2)  # the time grows with the length: the mean
        for _ in range(n):
            logits = model.unembed(model.residual_stream(idx)[:, -1:], idx[:, -1:])
            idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)

    def write(model):
        model.generate(prompt, n, temperature=0)

    with process.autocast():
        again = seconds(recompute, process, at_a_time=1) / 10
        if process.device.type == "cpu":
            use_sparse_linears_(model)
        ours = seconds(lambda: write(model), process, at_a_time=1) / n
        with attention_of("dense"):
            dense = seconds(lambda: write(twin), process, at_a_time=1) / n
    row(f"sampling, a token of a window of {n + 1}", ours, ("recompute", again),
        ("dense twin, cached", dense))


def bench_profile(process):
    """On a GPU: of ten steps of ours and of the twin, how long it was idle and the 20 longest kernels."""
    for kind in ("ours", "dense") if process.device.type == "cuda" else ():
        step, _ = step_runner(*sizes(process), process, kind)
        seconds(step, process)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            begun = time.perf_counter()
            for _ in range(10):
                step()
            torch.cuda.synchronize()
            wall = 1e6 * (time.perf_counter() - begun)
        launched = [k for k in profiler.key_averages() if k.self_device_time_total > 0]
        busy = sum(k.self_device_time_total for k in launched)
        print(f"{kind}: {wall / 1e4:.2f} ms a step, {1 - busy / wall:.1%} idle, "
              f"{sum(k.count for k in launched) / 10:.0f} kernels and copies")
        for k in sorted(launched, key=lambda k: -k.self_device_time_total)[:20]:
            print(f"{k.self_device_time_total / 1e4:8.3f} ms {k.count / 10:6.1f} x {k.key[:80]}")


def bench_prepare(process):
    import prepare

    texts = list(prepare.read_documents("train", prepare.Counter()))
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        encoding = prepare.get_encoding()
        ours = seconds(lambda: prepare.write_bins(folder, encoding, prepare.Counter()), process, warmup=1,
                       at_a_time=1)
    raw = seconds(lambda: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()), process,
                  warmup=1, at_a_time=1)
    row("prepare, MB/s", size / ours, ("raw tiktoken", size / raw), unit="MB/s", scale=1)


def child(code):
    """What a fresh process prints that runs `code`, a number: with nothing compiled before."""
    setup = ("import time; begun = time.perf_counter(); import torch; "
             "from experiments import bench; from runs import this_process; "
             f"bench.compile = {compile}; process = this_process({device!r}, {dtype!r})\n")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        result = subprocess.run([sys.executable, "-c", setup + code], env=environment, capture_output=True,
                                text=True, check=True)
    return float(result.stdout.split()[-1])


def bench_memory(process):
    """Peak memory of a process that makes three steps."""
    # ru_maxrss would not do: a new process starts it at its parent's
    peak = ("torch.cuda.max_memory_allocated()" if process.device.type == "cuda" else
            "1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    ours, dense = (child(f"step, _ = bench.step_runner(*bench.sizes(process), process, {kind!r})\n"
                         f"for _ in range(3): step()\nprint({peak})") for kind in ("ours", "dense"))
    row("peak memory of the step", ours, ("dense twin", dense), unit="MB", scale=1e-6)


def bench_first_step(process):
    """From nothing to the end of the first step, imports and compilation included."""
    first = child("step, _ = bench.step_runner(*bench.sizes(process), process, 'ours')\n"
                  "step()\nprint(time.perf_counter() - begun)")
    row("time to the first step", first, unit="s", scale=1)


@ends_explained()
def main():
    configure(globals())
    if repeats < 1:
        fail(f"repeats={repeats} must be at least 1")
    process = this_process(device, dtype)
    print(f"{name_of_device(process.device)}, {torch.get_num_threads()} threads, {process.dtype}, "
          f"torch {torch.__version__}, numpy {np.__version__}; median of {repeats}")
    for bench in (bench_step, bench_abs_topk, bench_prune, bench_attention, bench_statistics, bench_sampling,
                  bench_profile, bench_prepare, bench_memory, bench_first_step):
        if only in bench.__name__:
            bench(process)


if __name__ == "__main__":
    main()
