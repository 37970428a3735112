"""Train a weight-sparse transformer: normalize, Adam, prune, decay (Gao et al. 2025, sections 2.1 and A.2).

    python train.py config/quickstart.py                                  # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py config/sparse_python.py          # one node, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py ...

Any setting below is changed in a config file or by a flag: --target_l0_fraction=1/32. A run that was
interrupted goes on with the same command and --init_from=resume. The method is in `l0_at`, `lr_at` and
`update_`; the rest is the loop around it, in the order in which things happen.
"""
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, fail, settings_of
from model import GPT, GPTConfig, has_compiler

# ----------------------------------------------------------------------------------------------------------
# settings

# model
n_layer = GPTConfig.n_layer
d_model = GPTConfig.d_model  # width of the residual stream
d_head = GPTConfig.d_head  # n_head is d_model / d_head
d_mlp = GPTConfig.d_mlp  # 0: 4 * d_model
block_size = GPTConfig.block_size  # context, in tokens
residual_activation = GPTConfig.residual_activation  # 'identity' or 'relu'
activation = GPTConfig.activation  # 'gelu' or 'relu'
use_rms_norm = GPTConfig.use_rms_norm  # False: LayerNorm
use_bias = GPTConfig.use_bias
tie_embeddings = GPTConfig.tie_embeddings
use_positional_embeddings = GPTConfig.use_positional_embeddings  # True: learned, absolute
use_bigram_table = GPTConfig.use_bigram_table
use_attention_sinks = GPTConfig.use_attention_sinks
dropout = GPTConfig.dropout
activation_topk_fraction = GPTConfig.activation_topk_fraction  # 1.0: no AbsTopK
activation_sparsity_locations = GPTConfig.activation_sparsity_locations  # any of model.LOCATIONS, by commas
# weight sparsity
target_l0_fraction = 1 / 64  # of the entries of every matrix stay nonzero; 1.0 trains dense
sparsity_anneal_start_fraction = 0.01  # of training; until here the model is dense
sparsity_anneal_end_fraction = 0.5  # of training; from here on it is the target
min_weights_per_neuron = 4  # the paper's j; 0 switches it off
sparsify_biases = True
# optimizer
learning_rate = 1.6e-3  # the base rate, at L0 = 1; small models want more, 1e-2 and beyond
use_sharkfin_schedule = True  # multiply the rate by 1 / sqrt(L0)
warmup_fraction = 0.01  # of training
decay_lr = True  # linearly to zero at the end
beta1 = 0.9
beta2 = 0.95
eps = 0.1  # far above Adam's usual 1e-8, and meant to be
weight_decay = 0.1
grad_clip_rms = 1.0  # gradients are always scaled to this root mean square; 0 leaves them alone
# batches
dataset = "python_stdlib"  # a folder in data/ that prepare.py wrote, or the absolute path of one
batch_size = 64  # sequences in a micro-batch, the most that fit the memory
gradient_accumulation_steps = 8  # micro-batches in a step, over all ranks together
max_iters = 10000  # updates
seed = 1337  # of the weights and of the order of the data
# evaluation, checkpoints, logs
out_dir = "out"  # ckpt.pt, best.pt, log.jsonl and tokenizer.json are written here
init_from = "scratch"  # or 'resume' (out_dir's run goes on), or the folder of a released model
eval_interval = 250  # updates between evaluations, with a checkpoint at each
eval_iters = 20  # micro-batches of each split in an evaluation
log_every_n_steps = 1  # loss, rates, activation statistics
log_gradients_every_n_steps = 10
log_weights_every_n_steps = 100
log_sparsity_every_n_steps = 50
wandb_log = False
wandb_project = "weight-sparse"
wandb_run_name = ""  # '': the last part of out_dir
# system
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'; under torchrun each rank takes the GPU of its number
dtype = "auto"  # of autocast: 'float32', 'bfloat16', 'float16'; 'auto' is float32 on a CPU, else the best
compile = True  # torch.compile, where there is a compiler for it

MODEL_SETTINGS = [f.name for f in fields(GPTConfig) if f.name in globals()]

# ----------------------------------------------------------------------------------------------------------
# the method: two schedules and the step


def l0_at(step):
    """Fraction of nonzero weights after update `step`: 1, then linearly down to the target (section 2.1)."""
    start = sparsity_anneal_start_fraction * max_iters
    length = (sparsity_anneal_end_fraction - sparsity_anneal_start_fraction) * max_iters
    done = min(max((step - start) / length, 0.0), 1.0) if length > 0 else float(step >= start)
    return (1 - done) + target_l0_fraction * done


def sharkfin_at(step):
    """What sparsity multiplies the learning rate by: fewer weights take larger steps."""
    return 1 / math.sqrt(l0_at(step)) if use_sharkfin_schedule else 1.0


def lr_at(step):
    """Learning rate of update `step`: warmup and linear decay, times 1/sqrt(L0) for a shark's fin."""
    warmup = int(warmup_fraction * max_iters)
    if step < warmup:
        base = learning_rate * step / warmup
    elif decay_lr:
        base = learning_rate * (1 - (step - warmup) / (max_iters - warmup))
    else:
        base = learning_rate
    return base * sharkfin_at(step)


@torch.no_grad()
def normalize_gradients_(parameters, target_rms):
    """Scale all gradients together to a root mean square of `target_rms`, up as well as down.

    Returns their root mean square before, a tensor (). A target of 0 leaves them alone. Where others clip,
    this always scales. The 1e-5 is the reference's: a gradient as small as that ends below the target.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rms = torch.nn.utils.get_total_norm(gradients) / math.sqrt(sum(g.numel() for g in gradients))
    if target_rms:
        torch._foreach_mul_(gradients, target_rms / (rms + 1e-5))
    return rms


def gradients_of_step(network, data, scaler, step, place):
    """Forward and backward over this rank's share of a step's micro-batches. Returns their mean loss, ()."""
    micro_steps = range(place.rank, gradient_accumulation_steps, place.world_size)
    total = 0.0
    for micro_step in micro_steps:
        x, y = training_batch(data, step, micro_step, place)
        last = micro_step == micro_steps[-1]  # at which the gradients are averaged over the ranks
        with nullcontext() if last or place.world_size == 1 else network.no_sync():
            with place.autocast():
                loss = network(x, y)[1] / len(micro_steps)
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def update_(model, optimizer, scaler, step):
    """Update `step` from the gradients at hand: normalize, Adam, prune, decay. Returns their RMS before.

    Gradients and Adam's moments are never pruned: a weight that is zero now is moved by every update like
    any other, and stays once it outgrows the smallest survivor.
    """
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    rms = normalize_gradients_(model.parameters(), grad_clip_rms)
    scaler.step(optimizer)  # skipped if float16 overflowed; prune and decay are not
    scaler.update()
    model.prune_(l0_at(step), min_weights_per_neuron, sparsify_biases)
    torch._foreach_mul_(model.decayed_parameters(), 1 - weight_decay * lr)  # p <- p - weight_decay * lr * p
    optimizer.zero_grad(set_to_none=True)
    return rms


def build_optimizer(model):
    """Adam without weight decay: `update_` decays by hand, after the prune."""
    fused = next(model.parameters()).is_cuda
    return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(beta1, beta2), eps=eps, fused=fused)


# ----------------------------------------------------------------------------------------------------------
# processes, device, precision


@dataclass
class Place:
    """Where this process runs, and at what precision."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        lower = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if lower else nullcontext()

    def sum(self, *values):
        """Sum each of `values`, numbers, over all ranks: every rank gets the same list of floats."""
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.tolist()


def find_place(device="auto", dtype="auto"):
    """Choose device and precision; under torchrun, join the other processes."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, here = os.environ.get("LOCAL_RANK", "0"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        fail(f"device={device!r} does not exist: choose auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and here > 1:
        fail("under torchrun write --device=cuda: each rank takes the GPU of its number")
    if device.startswith("cuda") and torch.cuda.device_count() < here:
        fail(f"{here} process(es), {torch.cuda.device_count()} GPU(s): try --device=cpu or fewer processes")
    device = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            fail(f"device={device} does not exist: try cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if dtype == "auto":
        dtype = "float32"
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    legal = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in legal:
        fail(f"dtype={dtype!r} does not exist: choose one of auto, {', '.join(legal)}")
    if dtype == "float16" and device.type == "cpu":
        fail("dtype='float16' needs a GPU: on a CPU choose float32 or bfloat16")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return Place(rank, world_size, device, legal[dtype])


# ----------------------------------------------------------------------------------------------------------
# data


@dataclass
class Data:
    """What prepare.py wrote to a folder. The tokens are memory-mapped, so a corpus may exceed the memory."""

    train: np.memmap
    val: np.memmap
    meta: dict
    tokenizer: str  # the text of tokenizer.json

    def bits_per_byte(self, split, loss):
        """What a loss in nats per token is in bits per byte of the text of a split."""
        return loss / math.log(2) * (self.meta[split]["tokens"] / self.meta[split]["bytes"])


def load_data(folder, block_size):
    """Open and check the data in `folder`; ends the script if it cannot be trained on."""
    remedy = "make it with python prepare.py (its settings are explained at its top)"
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as f:
            tokenizer = f.read()
        sizes = {split: meta[split]["tokens"] for split in ("train", "val")}
        vocab_size, sha256 = meta["vocab_size"], meta["tokenizer_sha256"]
        if not all(type(n) is int and n > 0 for n in (vocab_size, *sizes.values(), meta["train"]["bytes"],
                                                      meta["val"]["bytes"])):
            raise ValueError("a number is not one")
    except OSError as e:
        fail(f"no data in {folder} ({os.path.basename(e.filename)}: {e.strerror}): {remedy}")
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{folder}/meta.json is damaged ({type(e).__name__}: {e}): {remedy}")
    if hashlib.sha256(tokenizer.encode()).hexdigest() != sha256:
        fail(f"{folder}/tokenizer.json is not the one that {folder}/meta.json names: {remedy}")
    tokens = {}
    for split, expected in sizes.items():
        path = os.path.join(folder, f"{split}.bin")
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        if size != 2 * expected:
            found = f"{size} bytes" if size >= 0 else "no such file"
            fail(f"{path} should hold {expected} tokens in {2 * expected} bytes, but has {found}: {remedy}")
        if expected <= block_size:
            fail(f"{path} holds {expected} tokens, fewer than one window of block_size={block_size}: "
                 "prepare more data, or train with a smaller --block_size")
        tokens[split] = np.memmap(path, dtype="<u2", mode="r")
        # one process of a node reads it all: the others would only wait for the same disk
        if os.environ.get("LOCAL_RANK", "0") == "0" and (largest := tokens[split].max()) >= vocab_size:
            fail(f"{path} holds the token id {largest}, beyond the vocabulary of {vocab_size}: {remedy}")
    return Data(tokens["train"], tokens["val"], meta, tokenizer)


def windows(tokens, starts, place):
    """Inputs and targets (len(starts), block_size), int64 on the device: the targets are one token ahead."""
    rows = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
    if place.device.type == "cuda":
        rows = rows.pin_memory().to(place.device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def training_batch(data, step, micro_step, place):
    """Micro-batch `micro_step` of update `step`, a function of these two and of `seed`.

    So a resumed run needs nothing but its step, and any number of ranks sees the same data. What else is
    random in training, dropout, is seeded here by the same rule.
    """
    rng = np.random.default_rng([seed, step, micro_step])
    starts = rng.integers(len(data.train) - block_size, size=batch_size)
    torch.manual_seed(int(rng.integers(2**62)))
    return windows(data.train, starts, place)


# ----------------------------------------------------------------------------------------------------------
# what is logged


def tensor_group(name):
    """A parameter's name without its layer: the same tensor of all layers is one group."""
    return re.sub(r"transformer\.(h\.\d+\.)?|\.weight$", "", name)


def kurtosis(x):
    """Of each token's channels, x (..., d_model): (...). 3 if they are Gaussian, NaN if all are equal."""
    x = x - x.mean(-1, keepdim=True)
    return x.pow(4).mean(-1) / x.square().mean(-1).square()


def watch_activations(model):
    """Let every node site, and the final norm of its input, keep statistics of what passed through it last.

    They are of one token at each position, from the sequences of the batch in turn: a sample, at a fraction
    of the cost. Of kurtosis, which differs widely between tokens, it is a rough one; experiments/evaluate.py
    takes all of val.
    """

    def some_tokens(x):
        positions = torch.arange(x.size(1), device=x.device)
        return x.detach()[positions % len(x), positions].float()

    def watch_site(module, inputs, output):
        x = some_tokens(output)
        module.statistics = torch.stack([x.count_nonzero() / x.numel(), x.square().mean().sqrt()])

    def watch_residual(module, inputs):
        module.statistics = kurtosis(some_tokens(inputs[0])).nanmean().nan_to_num()

    for _, module in model.sites():
        module.register_forward_hook(watch_site)
    model.transformer.ln_f.register_forward_pre_hook(watch_residual)


def activation_statistics(model):
    """Of the last forward: the fraction of nonzeros and the RMS at each location, averaged over layers.

    And the kurtosis of the final residual stream over its channels, averaged over tokens: 3 if Gaussian, and
    rising with sparsity in the paper's figure 10.
    """
    found = {}
    for location, module in model.sites():
        found.setdefault(location, []).append(module.statistics)
    rows = torch.stack([torch.stack(layers).mean(0) for layers in found.values()]).tolist()
    statistics = {"activations/kurtosis_resid_final": model.transformer.ln_f.statistics.item()}
    for location, (nonzero, rms) in zip(found, rows, strict=True):
        statistics[f"activations/nonzero/{location}"] = nonzero
        statistics[f"activations/rms/{location}"] = rms
    return statistics


@torch.no_grad()
def gradient_statistics(model, scale):
    """Mean, largest and smallest norm of a tensor's gradient before normalization. `scale`: the loss's."""
    norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()])) / scale
    mean, largest, smallest = torch.stack([norms.mean(), norms.max(), norms.min()]).tolist()
    return {"gradients/norm_mean": mean, "gradients/norm_max": largest, "gradients/norm_min": smallest}


@torch.no_grad()
def weight_statistics(model):
    """Norm, mean and standard deviation of the weights of each tensor group."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault(tensor_group(name), []).append(p.flatten())
    statistics = {}
    for group, tensors in groups.items():
        weights = torch.cat(tensors)
        statistics[f"weights/norm/{group}"] = weights.norm().item()
        statistics[f"weights/mean/{group}"] = weights.mean().item()
        statistics[f"weights/std/{group}"] = weights.std(correction=0).item()
    return statistics


@torch.no_grad()
def sparsity_statistics(model, step):
    """What update `step` was to leave and what is there.

    Nonzeros in all and in each group of pruned tensors, as number and fraction; neurons with no weight left.
    """
    nonzero, total, dead = {}, {}, []
    for name, p, neuron_dim in model.sparse_parameters():
        group = tensor_group(name)
        nonzero[group] = nonzero.get(group, 0) + p.count_nonzero()
        total[group] = total.get(group, 0) + p.numel()
        if neuron_dim is not None:
            dead.append((p == 0).all(dim=1 - neuron_dim).sum())
    numbers = torch.stack([*nonzero.values(), torch.stack(dead).sum()]).tolist()
    statistics = {
        "sparsity/l0": l0_at(step),
        "sparsity/l0_target": target_l0_fraction,
        "sparsity/sharkfin": sharkfin_at(step),
        "sparsity/nonzero": sum(numbers[:-1]),
        "sparsity/fraction": sum(numbers[:-1]) / sum(total.values()),
        "sparsity/dead_neurons": numbers[-1],
    }
    for group, number in zip(nonzero, numbers, strict=False):
        statistics[f"sparsity/nonzero/{group}"] = number
        statistics[f"sparsity/fraction/{group}"] = number / total[group]
    return statistics


def due(step, every_n_steps):
    """Whether what is logged every n steps (0: never) is logged at this one; the last step always is."""
    return every_n_steps > 0 and (step % every_n_steps == 0 or step == max_iters - 1)


class Log:
    """Where the records of rank 0 go: the terminal, out_dir/log.jsonl and, if asked, wandb."""

    def __init__(self, start):
        """Records from step `start` on will be made again: drop those that an interrupted run left."""
        self.path, self.wandb = os.path.join(out_dir, "log.jsonl"), None
        try:
            kept = []
            if start and os.path.exists(self.path):
                with open(self.path, encoding="utf-8") as f:
                    records = [json.loads(line) for line in f if line.endswith("}\n")]  # one may be torn
                kept = [json.dumps(record) + "\n" for record in records if record["step"] < start]
            with open(self.path + ".tmp", "w", encoding="utf-8") as f:
                f.writelines(kept)
            os.replace(self.path + ".tmp", self.path)
        except (OSError, ValueError) as e:
            fail(f"cannot rewrite {self.path} ({e}): repair it or move it away")
        if wandb_log:
            self.start_wandb()

    def start_wandb(self):
        try:
            import wandb
        except ImportError:
            fail("wandb is not installed: pip install -r requirements.txt, or --wandb_log=False")
        name = wandb_run_name or os.path.basename(os.path.abspath(out_dir))
        try:
            settings = settings_of(globals())
            self.wandb = wandb.init(project=wandb_project, name=name, dir=out_dir, config=settings)
        except wandb.Error as e:
            fail(f"wandb: {' '.join(str(e).split())} (or set WANDB_MODE=offline, or --wandb_log=False)")

    def write(self, record):
        """Write one record, a dict of numbers with their step."""
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            fail(f"cannot write {self.path} ({e.strerror}): make room, then --init_from=resume")
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        line = f"step {record['step']:5d}"
        if "val/loss" in record:
            print(f"{line} | train loss {record['train/loss']:.4f} | val loss {record['val/loss']:.4f} | "
                  f"{record['val/bits_per_byte']:.4f} bits per byte", flush=True)
        if "loss" in record:
            rms = math.inf if record["grad_rms"] is None else record["grad_rms"]
            print(f"{line} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | L0 {record['l0']:.4f} | "
                  f"grad RMS {rms:.1e} | {record['tokens_per_second']:,.0f} tokens/s | "
                  f"{record['seconds_left'] / 60:.1f} min left", flush=True)

    def close(self):
        if self.wandb:
            self.wandb.finish()


# ----------------------------------------------------------------------------------------------------------
# evaluation and checkpoints


@torch.no_grad()
def evaluate(model, data, place):
    """Loss in nats per token, and bits per byte, on evenly spaced windows of both splits.

    The windows are the same at each call and are shared out over the ranks. No random number is drawn.
    """
    model.eval()
    record = {}
    for split in ("train", "val"):
        tokens = getattr(data, split)
        starts = np.linspace(0, len(tokens) - block_size - 1, eval_iters * batch_size).astype(np.int64)
        total = torch.zeros((), dtype=torch.float64, device=place.device)
        for batch in starts.reshape(eval_iters, batch_size)[place.rank::place.world_size]:
            with place.autocast():
                total += model(*windows(tokens, batch, place))[1]
        loss = place.sum(total.item())[0] / eval_iters
        record[f"{split}/loss"] = loss
        record[f"{split}/bits_per_byte"] = data.bits_per_byte(split, loss)
    model.train()
    return record


def check_ranks_agree(model, place, step):
    """Compare a checksum of all weights across ranks; end the run if they differ by a single bit."""
    if place.world_size == 1:
        return
    checksum = torch.zeros(1, dtype=torch.int64, device=place.device)
    for p in model.parameters():
        checksum = 31 * checksum + p.detach().view(torch.int32).sum(dtype=torch.int64)
    checksums = [torch.empty_like(checksum) for _ in range(place.world_size)]
    dist.all_gather(checksums, checksum)
    differing = [rank for rank, other in enumerate(checksums) if other != checksums[0]]
    if differing:
        stop(f"at step {step} the weights of rank {differing[0]} differ from those of rank 0")


def save_checkpoint(name, model, optimizer, scaler, step, best, data):
    """Write out_dir/`name` beside and rename it into place: whatever happens, a whole checkpoint is there.

    The random state takes no room: all that is random in training is a function of the seed and the step.
    """
    path = os.path.join(out_dir, name)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "config": asdict(model.config),
        "settings": settings_of(globals()),
        "step": step,  # updates made
        "best_val_loss": best[1],
        "best_l0": best[0],  # of the model that had this loss
        "tokenizer_sha256": data.meta["tokenizer_sha256"],
        "torch": str(torch.__version__),
    }
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        fail(f"cannot write {path} ({e}); the one before it is whole: make room, then --init_from=resume")


def load_checkpoint(path):
    """The checkpoint at `path`, a dict as `save_checkpoint` makes it, on the CPU. Runs no code from it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # our line, below, is enough
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "optimizer", "scaler", "config", "settings", "step", "best_val_loss", "best_l0",
                   "tokenizer_sha256"} - checkpoint.keys()
    except FileNotFoundError:
        fail(f"no checkpoint at {path}: train without --init_from=resume first, or check --out_dir")
    except Exception as e:  # noqa: BLE001  what torch.load raises depends on what is in the file
        fail(f"{path} is no readable checkpoint ({type(e).__name__}): restore it, or give another --out_dir")
    if missing:
        fail(f"{path} is no checkpoint of train.py (it lacks {', '.join(sorted(missing))}): choose another")
    return checkpoint


def model_of(checkpoint):
    """The model that a checkpoint holds."""
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        fail(f"the checkpoint does not fit model.py, use the code that wrote it: {reason}")
    return model


def load_released(folder):
    """A model in the format of github.com/openai/circuit_sparsity."""
    try:
        return GPT.from_circuit_sparsity(folder)
    except (OSError, ValueError) as e:
        fail(f"init_from={folder} must be 'scratch', 'resume' or the folder of a released model: {e}")


# ----------------------------------------------------------------------------------------------------------
# the run


def stop(message):
    """End a run that cannot go on, naming what is left of it: exit status 1. No checkpoint is written."""
    path = os.path.join(out_dir, "ckpt.pt")
    left = f"the last good checkpoint is {path}" if os.path.exists(path) else "there is no checkpoint yet"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}; {left}", file=sys.stderr, flush=True)
    raise SystemExit(1)


class StopSignal:
    """Notes SIGINT or SIGTERM, for the loop to see after the step. A second one ends the process at once.

    A scheduler that signals all processes reaches those of torchrun twice, as torchrun passes its own signal
    on: there, a second one counts only if it comes seconds later.
    """

    def __init__(self):
        self.received = None  # when
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        grace = 5 if "LOCAL_RANK" in os.environ else 0
        if self.received and time.monotonic() - self.received >= grace:
            os._exit(128 + number)
        self.received = self.received or time.monotonic()


def resume_command():
    """The command line of this run, with --init_from=resume."""
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        launcher += [f"--nnodes={os.environ['GROUP_WORLD_SIZE']}", "--rdzv_backend=c10d",
                     "--rdzv_endpoint=HOST:29400"]
    arguments = [a for a in sys.argv if not a.startswith("--init_from=")]
    return shlex.join([*launcher, *arguments, "--init_from=resume"])


def check_settings(world_size):
    """End the script if the settings cannot make a run, whatever the model and the data."""
    for names, legal, rule in (
        ("batch_size gradient_accumulation_steps max_iters eval_interval eval_iters",
         lambda v: v >= 1, "must be at least 1"),
        ("sparsity_anneal_start_fraction sparsity_anneal_end_fraction warmup_fraction",
         lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
        ("beta1 beta2", lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
        ("target_l0_fraction", lambda v: 0 < v <= 1, "must be more than 0 and at most 1; 1 trains dense"),
        ("learning_rate eps weight_decay grad_clip_rms min_weights_per_neuron log_every_n_steps",
         lambda v: 0 <= v < math.inf, "must not be negative"),
        ("seed", lambda v: 0 <= v < 2**63, "must not be negative, nor more than 63 bits"),
        ("log_gradients_every_n_steps log_weights_every_n_steps log_sparsity_every_n_steps",
         lambda v: v >= 0, "must not be negative; 0 never logs"),
        ("sparsity_anneal_end_fraction", lambda v: v >= sparsity_anneal_start_fraction,
         f"must not be less than sparsity_anneal_start_fraction={sparsity_anneal_start_fraction}"),
        ("gradient_accumulation_steps", lambda v: v % world_size == 0,
         f"counts over all ranks and must be a multiple of their number, {world_size}"),
    ):
        for name in names.split():
            if not legal(globals()[name]):
                fail(f"{name}={globals()[name]} {rule}")


def build_model(model, vocab_size, given):
    """A new model, or `model`, if the settings that were `given` do not contradict it."""
    fixed = {"vocab_size": vocab_size} | ({"n_head": model.config.n_head} if model else {})
    try:
        asked = GPTConfig(**{name: globals()[name] for name in MODEL_SETTINGS}, **fixed)
    except ValueError as e:
        fail(e)
    model = model or GPT(asked)
    for name in sorted(given & set(MODEL_SETTINGS)):
        has = getattr(model.config, name)
        if getattr(asked, name) != has:
            fail(f"{name}={globals()[name]!r} contradicts the model to go on with, which has {has!r}: leave "
                 "the setting out, or start anew in another --out_dir")
    if vocab_size > model.config.vocab_size:
        fail(f"the data's vocabulary of {vocab_size} exceeds the model's {model.config.vocab_size}: prepare "
             "the data with the model's tokenizer")
    if not all(p.requires_grad for p in model.parameters()):
        fail("the bigram table of this model is marked as fixed: it can be sampled from, not trained, here")
    smallest = model.smallest_l0(min_weights_per_neuron)
    if target_l0_fraction < smallest:
        fail(f"target_l0_fraction={target_l0_fraction:.6g} is too small for min_weights_per_neuron="
             f"{min_weights_per_neuron}: the smallest that fits is {math.ceil(smallest * 1e6) / 1e6}")
    return model


def claim_out_dir():
    """Keep other runs out of out_dir. Returns a file that holds the lock while it is open."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(os.path.join(out_dir, "lock"), "w")  # noqa: SIM115  closed by `main`
    except OSError as e:
        fail(f"cannot write to out_dir={out_dir} ({e.strerror}): choose another --out_dir")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to out_dir={out_dir}: stop it, or choose another --out_dir")
    except OSError:
        pass  # a file system without locks
    return lock


def start_out_dir(data):
    """Make out_dir ready for a new run. What another run left there is moved aside, never overwritten."""
    try:
        if {"meta.json", "beeg_config.json"} & set(os.listdir(out_dir)):
            fail(f"out_dir={out_dir} holds data or a released model: choose another --out_dir")
        if os.path.exists(os.path.join(out_dir, "ckpt.pt")):
            n = 1
            while os.path.exists(aside := os.path.join(out_dir, f"previous-{n}")):
                n += 1
            os.mkdir(aside)
            for name in ("ckpt.pt", "best.pt", "log.jsonl", "tokenizer.json"):
                if os.path.exists(os.path.join(out_dir, name)):
                    os.replace(os.path.join(out_dir, name), os.path.join(aside, name))
            print(f"{out_dir} held another run, which is now in {aside}")
        with open(os.path.join(out_dir, "tokenizer.json"), "w", encoding="utf-8") as f:
            f.write(data.tokenizer)
    except OSError as e:
        fail(f"cannot write to out_dir={out_dir} ({e.strerror}): choose another --out_dir")


def compile_blocks(model, place):
    """Compile the blocks, in place: they share one compilation, and the raw model stays what is saved."""
    if not has_compiler(place.device.type):
        if place.rank == 0:
            print("no compiler (gcc, g++) or no Python.h (python3-dev): running without torch.compile")
        return
    torch._dynamo.config.optimize_ddp = False  # blocks are small enough for DDP
    for block in model.transformer.h:
        block.compile()


def main():
    given = configure(globals())
    checkpoint, model, adopted = None, None, {}
    if init_from == "resume":  # with the settings of the run, but for those that are given now
        checkpoint = load_checkpoint(os.path.join(out_dir, "ckpt.pt"))
        known = settings_of(globals()).keys() - {"out_dir", "init_from"}
        adopted = {k: v for k, v in checkpoint["settings"].items() if k in known}
    elif init_from != "scratch":
        model = load_released(init_from)
        adopted = {name: getattr(model.config, name) for name in MODEL_SETTINGS}
    changed = {k: globals()[k] for k in sorted(given & adopted.keys()) if globals()[k] != adopted[k]}
    globals().update(adopted | changed)
    place = find_place(device, dtype)
    check_settings(place.world_size)
    data = load_data(os.path.join("data", dataset), block_size)
    torch.manual_seed(seed)
    if model and model.tokenizer_name != data.meta["tokenizer"]:
        fail(f"data/{dataset} was made with --tokenizer={data.meta['tokenizer']}, but the model needs "
             f"{model.tokenizer_name}: prepare the data with it")
    if checkpoint:
        if checkpoint["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
            fail(f"data/{dataset} has another tokenizer than the run's data had: choose that --dataset")
        model = model_of(checkpoint)
    model = build_model(model, data.meta["vocab_size"], given).to(place.device)
    optimizer = build_optimizer(model)
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
    step, best = 0, (1.0, math.inf)  # best: L0 and val loss
    if checkpoint:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]["state"]})
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        step, best = checkpoint["step"], (checkpoint["best_l0"], checkpoint["best_val_loss"])
        if step > max_iters:
            fail(f"max_iters={max_iters} is less than the {step} updates that this run has made: raise it")
        if place.rank == 0 and changed:
            print("changed since the checkpoint:", ", ".join(f"{k}={v!r}" for k, v in changed.items()))
    with claim_out_dir() if place.rank == 0 else nullcontext():
        if place.rank == 0 and not checkpoint:
            start_out_dir(data)
        train(place, data, model, optimizer, scaler, step, best)
    if dist.is_initialized():
        dist.destroy_process_group()


def announce(model, tokens_per_step, place):
    n, pruned = (sum(p.numel() for p in ps) for ps in (model.parameters(), model.decayed_parameters()))
    print(f"{n:,} parameters, {pruned:,} in matrices that are pruned to {target_l0_fraction:.4%} | "
          f"{max_iters:,} steps of {tokens_per_step:,} tokens | "
          f"{place.world_size} x {place.device.type}, {place.dtype}", flush=True)


def evaluate_and_save(model, optimizer, scaler, data, place, step, best, log):
    """What happens at every evaluation. Returns the best (L0, val loss) so far."""
    check_ranks_agree(model, place, step)
    losses = evaluate(model, data, place)
    if not math.isfinite(losses["val/loss"]):
        stop(f"at step {step} the val loss is {losses['val/loss']}")
    result = l0_at(max(step - 1, 0)), losses["val/loss"]
    better, best = result < best, min(result, best)  # the sparser model is the better, then the lower loss
    if place.rank == 0:
        log.write({"step": step, **losses, "val/best_loss": best[1]})
        for name in ("best.pt", "ckpt.pt") if better else ("ckpt.pt",):
            save_checkpoint(name, model, optimizer, scaler, step, best, data)
    return best


def train(place, data, model, optimizer, scaler, step, best):
    """Make the updates from `step` on, with all that goes on around them."""
    master = place.rank == 0
    log = Log(step) if master else None
    stop_signal = StopSignal()
    watch_activations(model)
    if compile:
        compile_blocks(model, place)
    network = model
    if place.world_size > 1:
        network = DistributedDataParallel(model, [place.device] if place.device.type == "cuda" else None)
    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    seconds = []  # that steps took since they were last logged
    if master:
        announce(model, tokens_per_step, place)

    while True:
        if step % eval_interval == 0 or step == max_iters:
            best = evaluate_and_save(model, optimizer, scaler, data, place, step, best, log)
        if step == max_iters:
            break

        begun, record = time.perf_counter(), {}
        loss = gradients_of_step(network, data, scaler, step, place)
        if master and due(step, log_gradients_every_n_steps):
            record |= gradient_statistics(model, scaler.get_scale())
        rms = update_(model, optimizer, scaler, step)
        loss, rms, stopping = place.sum(loss.item() / place.world_size, rms.item() / place.world_size,
                                        stop_signal.received is not None)
        seconds.append(time.perf_counter() - begun)
        overflow = not math.isfinite(rms) and scaler.get_scale() > 1  # of float16: Adam was skipped
        if not math.isfinite(loss) or not (math.isfinite(rms) or overflow):
            stop(f"at step {step} the loss is {loss} and the gradients' RMS {rms}")
        if master and due(step, log_every_n_steps):
            seconds_per_step = sum(seconds) / len(seconds)
            seconds.clear()
            record |= {"loss": loss, "lr": lr_at(step), "l0": l0_at(step),
                       "grad_rms": None if overflow else rms, "tokens": (step + 1) * tokens_per_step,
                       "tokens_per_second": tokens_per_step / seconds_per_step,
                       "seconds_left": seconds_per_step * (max_iters - 1 - step)}
            record |= activation_statistics(model)
        if master and due(step, log_weights_every_n_steps):
            record |= weight_statistics(model)
        if master and due(step, log_sparsity_every_n_steps):
            record |= sparsity_statistics(model, step)
        if record:
            log.write({"step": step, **record})
        step += 1

        if stopping:
            check_ranks_agree(model, place, step)
            if master:
                save_checkpoint("ckpt.pt", model, optimizer, scaler, step, best, data)
                print(f"stopped before step {step}; go on with: {resume_command()}", flush=True)
            break

    if master:
        log.close()


if __name__ == "__main__":
    main()
