"""Train a weight-sparse transformer: normalize, Adam, prune, decay (Gao et al. 2025, sections 2.1 and A.2).

    python train.py config/quickstart.py                                  # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py config/sparse_python.py          # one node, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py ...

Any setting below is changed in a config file or by a flag: --target_l0_fraction=1/32. A run that was
interrupted goes on with the same command and --init_from=resume. All nodes must see data/ and out_dir. In
the order of the file: the settings, the method, the order of the data, the loop, and the start, which
builds what the loop needs. What a run stands on is in runs.py, what out_dir holds in checkpoints.py, what is
measured of a run in measures.py.
"""
import math
import os
import time
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist

import checkpoints
import configurator
import kernels
import measures
import runs
from configurator import ends_explained, fail
from model import GPT, NODE_LOCATIONS, GPTConfig
from tokenizer import tokenizer_in

# ----------------------------------------------------------------------------------------------------------
# settings

# model: these are the fields of model.GPTConfig
n_layer = 8
d_model = 1024  # width of the residual stream
d_head = 16  # n_head is d_model / d_head
d_mlp = 0  # 0: 4 * d_model
block_size = 256  # context, in tokens
residual_activation = "identity"  # or 'relu'
activation = "gelu"  # or 'relu'
use_rms_norm = True  # False: LayerNorm
use_bias = True
tie_embeddings = False
use_positional_embeddings = False  # True: learned, absolute
use_bigram_table = True
use_attention_sinks = True
dropout = 0.0
activation_topk_fraction = 0.25  # of the entries at a node site stay nonzero; 1.0: no AbsTopK
activation_sparsity_locations = ",".join(NODE_LOCATIONS)  # any of model.LOCATIONS, by commas
# weight sparsity
target_l0_fraction = 1 / 64  # of the entries of every matrix stay nonzero; 1.0 trains dense
sparsity_anneal_start_fraction = 0.01  # of training; until here the model is dense
sparsity_anneal_end_fraction = 0.5  # of training; from here on L0 is the target; 1: at no update
min_weights_per_neuron = 4  # the paper's j; 0 switches it off
sparsify_biases = True
# optimizer
learning_rate = 1.6e-3  # the base rate, at L0 = 1; small models want more, 1e-2 and beyond
use_sharkfin_schedule = True  # multiply the rate by 1 / sqrt(L0)
warmup_fraction = 0.01  # of training
decay_lr = True  # linearly to zero at the end
beta1 = 0.9
beta2 = 0.95
eps = 0.1  # not 1e-8: gradients have an RMS of 1, and what is far below that moves little
weight_decay = 0.1  # times the rate, the sharkfin included; of matrices, but not of the bigram table
grad_clip_rms = 1.0  # no clip: gradients are scaled, up or down, to this root mean square; 0: they are not
# batches
dataset = "python_stdlib"  # a folder in data/ that prepare.py wrote, or the absolute path of one
batch_size = 64  # sequences in a micro-batch: the most that fit the memory of a rank
gradient_accumulation_steps = 8  # micro-batches in a step, over all ranks together
max_iters = 10000  # updates
seed = 1337  # of the weights, of the order of the data, and of dropout
# evaluation, checkpoints, logs
out_dir = "out"  # ckpt.pt, best.pt, log.jsonl, settings.json and tokenizer.json are written here
init_from = "scratch"  # or 'resume': out_dir's run goes on; 'auto': if there is one; or an out_dir, a
#                        checkpoint or the folder of a released model, with whose weights a new run begins
eval_interval = 250  # updates between evaluations, with a checkpoint at each
checkpoint_minutes = 30.0  # after which there is one between evaluations too; 0: never
eval_iters = 20  # micro-batches of each split in an evaluation
log_every_n_steps = 1  # loss, rates, activation statistics
log_gradients_every_n_steps = 10
log_weights_every_n_steps = 100
log_sparsity_every_n_steps = 50
wandb_log = False
wandb_project = "weight-sparse"
wandb_run_name = ""  # '': the last part of out_dir
wandb_new_run = False  # True: a run that goes on is a new one there, as that of a copy of out_dir is
# system
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'; under torchrun each rank takes the GPU of its number
dtype = "auto"  # of autocast: 'float32', 'bfloat16', 'float16'; 'auto' is float32 on a CPU, else the best
compile = True  # torch.compile, where there is a compiler for it
fast_kernels = True  # False: the definitions of model.py run as they stand there, which is slow

DEFAULTS = configurator.settings_of(globals())
# all of GPTConfig's but vocab_size, which the data decides, and n_head
MODEL_SETTINGS = [f.name for f in fields(GPTConfig) if f.name in DEFAULTS]
# a new run that begins with the weights of a model may change these, and no other of MODEL_SETTINGS
CHANGEABLE = {"dropout", "activation_topk_fraction", "activation_sparsity_locations"}
WHERE = {"out_dir", "init_from", "wandb_new_run"}  # a run that goes on takes these from its own command

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
    """Learning rate of update `step`: warmup from 0 and linear decay, times 1/sqrt(L0) for a shark's fin."""
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

    Returns their root mean square before, a tensor (). A target of 0 leaves them alone. The 1e-5 is that of
    the authors' trainer: gradients as small as that end below the target.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rms = torch.nn.utils.get_total_norm(gradients) / math.sqrt(sum(g.numel() for g in gradients))
    if target_rms:
        torch._foreach_mul_(gradients, target_rms / (rms + 1e-5))
    return rms


@torch.no_grad()
def update_(model, optimizer, scaler, step):
    """Update `step` from the gradients at hand: normalize, Adam, prune, decay. Returns their RMS before.

    Gradients and Adam's moments are never pruned, the weights themselves are. A zero is moved like any other
    weight, but from zero at every step: it comes back when one update outgrows the smallest survivor. The
    scaler is idle unless the precision is float16.
    """
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    rms = normalize_gradients_(model.parameters(), grad_clip_rms)
    scaler.step(optimizer)  # skipped if float16 overflowed; prune and decay are not
    scaler.update()
    model.prune_(l0_at(step), min_weights_per_neuron, sparsify_biases)
    torch._foreach_mul_(model.decayed_parameters(), 1 - weight_decay * lr)
    model.zero_grad()
    return rms


def build_optimizer(model):
    """Adam without weight decay: `update_` decays by hand, after the prune."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(beta1, beta2), eps=eps, fused=True)


# ----------------------------------------------------------------------------------------------------------
# the order of the data, and the gradients of a step. `process` is a runs.Process: it knows its rank, the
# world_size, its device and precision. `data` is a runs.Data: the tokens of train and val, and meta.json


def training_batch(data, step, micro_step, process):
    """Micro-batch `micro_step` of update `step`, a function of these two and of the settings alone.

    So a resumed run needs nothing but its step, and any number of ranks sees the same data. What else is
    random in training, dropout, is seeded here by the same rule.
    """
    rng = np.random.default_rng([seed, step, micro_step])
    starts = rng.integers(len(data.train) - block_size, size=batch_size)
    torch.manual_seed(int(rng.integers(2**62)))
    return runs.windows(data.train, starts, block_size, process)


def gradients_of_step(network, data, scaler, step, process):
    """Forward and backward over this rank's share of a step's micro-batches. Returns their mean loss, ()."""
    micro_steps = range(process.rank, gradient_accumulation_steps, process.world_size)
    total = 0.0
    for micro_step in micro_steps:
        x, y = training_batch(data, step, micro_step, process)
        last = micro_step == micro_steps[-1]  # at which the gradients are averaged over the ranks
        with nullcontext() if last or process.world_size == 1 else network.no_sync():
            with process.autocast():
                loss = network(x, y)[1] / len(micro_steps)
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


# ----------------------------------------------------------------------------------------------------------
# the loop


def tokens_in_step():
    return gradient_accumulation_steps * batch_size * block_size


def due(step, every_n_steps):
    """Whether to log at this step: at every n-th and at the last; n = 0 never logs."""
    return every_n_steps > 0 and (step % every_n_steps == 0 or step == max_iters - 1)


def evaluates(step):
    """Whether the model is evaluated and saved after `step` updates."""
    return step % eval_interval == 0 or step == max_iters


def record_of_update(model, step, loss, rms, seconds):
    """What is logged of update `step`, `seconds` being the time of one: a dict of numbers."""
    record = {}
    if due(step, log_every_n_steps):
        record |= {"loss": loss, "lr": lr_at(step), "l0": l0_at(step), "grad_rms": rms,
                   "tokens": (step + 1) * tokens_in_step(), "tokens_per_second": tokens_in_step() / seconds,
                   "seconds_left": seconds * (max_iters - 1 - step), **measures.activation_statistics(model)}
    if due(step, log_weights_every_n_steps):
        record |= measures.weight_statistics(model)
    if due(step, log_sparsity_every_n_steps):
        record |= {"sparsity/l0": l0_at(step), "sparsity/l0_target": target_l0_fraction,
                   "sparsity/sharkfin": sharkfin_at(step), **measures.sparsity_statistics(model)}
    return record


def evaluate_and_save(run):
    """What happens at every evaluation. Nothing is saved of ranks that differ, or of a loss that is none."""
    runs.check_ranks_agree(run)
    losses = measures.estimate_loss(run.model, run.data, run.process, eval_iters, batch_size)
    if not math.isfinite(losses["val/loss"]):
        runs.stop(f"at step {run.step} the val loss is {losses['val/loss']}", out_dir)
    result = max(run.l0, target_l0_fraction), losses["val/loss"]  # sparser than the target is no merit
    is_best = result < run.best  # a lower L0 wins whatever its loss, then the lower loss
    run.best = min(result, run.best)
    if run.log:
        run.log.write({"step": run.step, **losses, "val/best_loss": run.best[1]})
        if is_best:
            run.save("best.pt")
        run.save("ckpt.pt")


def train(run):
    """Make the updates from run.step on, with all that goes on around them. `run` is a runs.Run."""
    readings = runs.Readings(run)
    measures.watch_activations(run.model)
    if compile:
        runs.compile_blocks(run.model, run.process)
    network = runs.distributed(run.model, run.process)
    seconds, updates = 0.0, 0  # since they were last logged
    while True:
        if evaluates(run.step):
            evaluate_and_save(run)
            readings.unsaved = 0.0
        if run.step == max_iters:
            break

        begun = time.perf_counter()
        step, record, stopping = run.step, {}, False
        loss = gradients_of_step(network, run.data, run.scaler, step, run.process)
        if run.log and due(step, log_gradients_every_n_steps):
            record |= measures.gradient_statistics(run.model, run.scaler.get_scale())
        rms = update_(run.model, run.optimizer, run.scaler, step)
        run.step, run.l0 = step + 1, l0_at(step)

        # on a GPU all this is only under way: to read a number waits for it. Before an evaluation all are
        # read, as a checkpoint follows; and all ranks come here at the same steps
        readings.add(step, loss, rms)
        if readings.are_due() or due(step, log_every_n_steps) or evaluates(run.step):
            loss, rms, stopping = readings.read()
        seconds, updates = seconds + time.perf_counter() - begun, updates + 1

        if run.log and (record := record | record_of_update(run.model, step, loss, rms, seconds / updates)):
            run.log.write({"step": step, **record})
        if due(step, log_every_n_steps):
            seconds, updates = 0.0, 0

        if stopping or readings.ask_for_checkpoint(checkpoint_minutes):
            runs.check_ranks_agree(run)
            run.save("ckpt.pt")
        if stopping:
            runs.say_how_to_go_on(run)
            break


# ----------------------------------------------------------------------------------------------------------
# the start


def check_training(world_size):
    """End the script if the settings cannot make a run, whatever the model and the data."""
    configurator.check_rules(globals(), (
        ("batch_size gradient_accumulation_steps max_iters eval_interval eval_iters",
         lambda v: v >= 1, "must be at least 1"),
        ("sparsity_anneal_start_fraction sparsity_anneal_end_fraction warmup_fraction",
         lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
        ("beta1 beta2", lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
        ("target_l0_fraction", lambda v: 0 < v <= 1, "must be more than 0 and at most 1; 1 trains dense"),
        ("learning_rate eps weight_decay grad_clip_rms log_every_n_steps checkpoint_minutes",
         lambda v: 0 <= v < 1e18, "must be at least 0 and less than 1e18"),  # the largest float32 is 3e38
        ("seed min_weights_per_neuron", lambda v: v >= 0, "must not be negative"),
        ("log_gradients_every_n_steps log_weights_every_n_steps log_sparsity_every_n_steps",
         lambda v: v >= 0, "must not be negative; 0 never logs"),
        ("sparsity_anneal_end_fraction", lambda v: v >= sparsity_anneal_start_fraction,
         f"must not be less than sparsity_anneal_start_fraction={sparsity_anneal_start_fraction}"),
        ("gradient_accumulation_steps", lambda v: v % world_size == 0,
         f"counts over all ranks and must be a multiple of their number, {world_size}"),
    ))


def build_model(start, vocab_size, given):
    """A new model, with the weights of `start` if there is one; or `start` itself, if its run goes on.

    Ends the script if settings that were `given` contradict it. A new run may set those of CHANGEABLE.
    """
    fixed = {"vocab_size": vocab_size}
    if start:
        fixed = {"vocab_size": start.config.vocab_size, "n_head": start.config.n_head}
    try:
        asked = GPTConfig(**{name: globals()[name] for name in MODEL_SETTINGS}, **fixed)
    except ValueError as e:
        fail(e)
    model = start if init_from == "resume" else GPT(asked)
    if start:
        for name in sorted(given & set(MODEL_SETTINGS) - (set() if init_from == "resume" else CHANGEABLE)):
            if getattr(asked, name) != (has := getattr(start.config, name)):
                fail(f"{name}={globals()[name]!r} contradicts the model to go on with, which has {has!r}: "
                     "leave the setting out, or start anew in another --out_dir")
    if start and model is not start:
        model.load_state_dict(start.state_dict())
    smallest = model.smallest_l0(min_weights_per_neuron)
    if target_l0_fraction < smallest:
        fail(f"target_l0_fraction={target_l0_fraction:.6g} is too small for min_weights_per_neuron="
             f"{min_weights_per_neuron}: the smallest that fits is {math.ceil(smallest * 1e6) / 1e6}")
    return model


def begin(run, checkpoint):
    """What the first rank does at the start: out_dir, the log, and what is printed."""
    folder = out_dir if checkpoint else checkpoints.start_out_dir(out_dir, run.data.tokenizer)
    wandb_id = checkpoint and checkpoint.get("wandb_id")
    run.log = checkpoints.Log(folder, run.step, evaluates(run.step), wandb_id)
    if wandb_log:
        run.log.start_wandb(run.settings)
    if checkpoint:
        changed = configurator.difference(globals(), checkpoint["settings"], but=WHERE)
        last = max(run.step - 1, 0)  # update
        run.compare_with(checkpoint, changed, f"L0 {l0_at(last):.4g}, lr {lr_at(last):.2e}")
    runs.write_settings(run)
    print(f"settings that are not the defaults: {configurator.difference(globals(), DEFAULTS)}")
    n = sum(p.numel() for p in run.model.parameters())
    pruned = sum(p.numel() for _, p, _ in run.model.sparse_parameters() if p.ndim == 2)
    print(f"{n:,} parameters, {pruned:,} in matrices that are pruned to {target_l0_fraction:.4%} | "
          f"{max_iters:,} steps of {tokens_in_step():,} tokens | "
          f"{run.process.world_size} x {run.process.device.type}, {run.process.dtype}", flush=True)


@ends_explained(runs.SMALLER_STEPS)
def main():
    given = configurator.configure(globals())
    globals()["init_from"] = checkpoints.chosen_start(init_from, out_dir)
    checkpoint, start, earlier = None, None, {}  # earlier: settings to go on with, but for those given now
    if init_from == "resume":
        checkpoint = checkpoints.load_checkpoint(os.path.join(out_dir, "ckpt.pt"))
        start, tokenizer_path = checkpoints.model_of(checkpoint), tokenizer_in(out_dir)
        earlier = {name: value for name, value in checkpoint["settings"].items() if name not in WHERE}
    elif init_from != "scratch":
        start, tokenizer_path = checkpoints.load_start(init_from)
        earlier = {name: getattr(start.config, name) for name in MODEL_SETTINGS}
    configurator.adopt(globals(), earlier, given)
    kernels.enabled = fast_kernels
    process = runs.this_process(device, dtype)
    check_training(process.world_size)
    data = runs.load_data(os.path.join("data", dataset), block_size)
    torch.manual_seed(seed)  # for the weights
    if start:
        runs.check_start(start, tokenizer_path, os.path.join("data", dataset), data.meta)
    model = build_model(start, data.meta["vocab_size"], given).to(process.device)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    run = runs.Run(configurator.settings_of(globals()), process, data, model, build_optimizer(model), scaler)
    if checkpoint:
        run.restore_(checkpoint)
    with checkpoints.claim_out_dir(out_dir) if process.rank == 0 else nullcontext():
        if process.rank == 0:
            begin(run, checkpoint)
        checkpoint = start = None  # to free the checkpoint's copy of weights and moments
        train(run)
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.log:
        run.log.close()


if __name__ == "__main__":
    main()
