"""What a run stands on: its process and device, the data, the run itself, what is read of it, how it ends.

train.py has the method and the loop; sample.py, circuit.py and the experiments open data and trained models
by the same functions. What out_dir holds is in checkpoints.py. What a user can mend ends the script with one
line (`configurator.fail`).
"""
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

# its functions keep the group of processes that exists when they are first imported. So it would outlive its
# destruction, and its threads could abort the exit of a run that is done
import torch.distributed.nn.functional
from torch.nn.parallel import DistributedDataParallel

from checkpoints import (
    STARTING,
    Log,
    keep_finished,
    load_checkpoint,
    load_start,
    model_of,
    move_aside,
    settle,
    write_atomically,
    write_checkpoint,
)
from configurator import complain, fail, read_json, tell
from kernels import has_compiler
from model import GPT
from tokenizer import read_tokenizer, tokenizer_in

# ----------------------------------------------------------------------------------------------------------
# this process, its device and precision


@dataclass
class Process:
    """One of the processes of a run, which are all alike but for their rank."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast

    def autocast(self):
        lower = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if lower else nullcontext()

    def sum(self, *values):
        """Sum each of `values`, numbers or tensors (), over all ranks: a float64 tensor (len(values)).

        Nothing waits for the device until it is read.
        """
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(self.device, non_blocking=True)
                              for v in values])
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


def this_process(device="auto", dtype="auto"):
    """Choose device and precision; under torchrun, join the other processes."""
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()  # all by torchrun
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    local_rank, on_node = os.environ.get("LOCAL_RANK", "0"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        fail(f"device={device!r} does not exist: choose auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and on_node > 1:
        fail("under torchrun write --device=cuda: each rank takes the GPU of its number")
    if device.startswith("cuda") and torch.cuda.device_count() < on_node:
        fail(f"{on_node} process(es), {torch.cuda.device_count()} GPU(s): try --device=cpu, or fewer")
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
    return Process(rank, world_size, device, legal[dtype])


def name_of_device(device):
    """What the GPU or the CPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git(*arguments):
    """What git says in the folder of this file, or None if it is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=os.path.dirname(os.path.abspath(__file__)),
                              capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def can_compile(device):
    """Whether torch.compile works: a compiler that is there may lack a header, or a place to write to."""
    try:
        return has_compiler(device.type) and bool(torch.compile(torch.exp)(torch.zeros(1, device=device)))
    except Exception:  # noqa: BLE001  a compiler can fail in any way
        return False


def distributed(model, process):
    """The model as the ranks train it together: their gradients are averaged in its backward pass."""
    if process.world_size == 1:
        return model
    return DistributedDataParallel(model, [process.device] if process.device.type == "cuda" else None)


def compile_blocks(model, process):
    """Compile the blocks, in place: they share one compilation, and the raw model stays what is saved."""
    if not can_compile(process.device):
        if process.rank == 0:
            print("no working gcc and g++, or no Python.h (python3-dev): running without torch.compile")
        return
    torch._dynamo.config.optimize_ddp = False  # blocks are small enough for DDP
    for block in model.transformer.h:
        block.compile()


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

    def differs_from(self, then):
        """Whether this is not the data that a checkpoint names, {split: part of meta.json}. What both say
        decides, as earlier versions of prepare.py said less."""
        return any(value != self.meta[split].get(key, value)
                   for split in then for key, value in then[split].items())


REMEDY = "make it with python prepare.py (its settings are explained at its top)"
CHEAP = 2**28  # bytes: a bin up to this size is read and hashed in a fraction of a second


def load_data(folder, block_size):
    """Open and check the data in `folder`; ends the script if it cannot be trained on."""
    try:
        meta = read_json(os.path.join(folder, "meta.json"))
        tokenizer, digest = read_tokenizer(tokenizer_in(folder))
        sizes = {split: meta[split]["tokens"] for split in ("train", "val")}
        vocab_size, sha256 = meta["vocab_size"], meta["tokenizer_sha256"]
        if not all(type(n) is int and n > 0 for n in (vocab_size, *sizes.values(), meta["train"]["bytes"],
                                                      meta["val"]["bytes"])):
            raise ValueError("a number is not one")
    except OSError as e:
        fail(f"no data in {folder} ({os.path.basename(e.filename)}: {e.strerror}): {REMEDY}")
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{folder}/meta.json is damaged ({type(e).__name__}: {e}): {REMEDY}")
    if digest != sha256:
        fail(f"{tokenizer_in(folder)} is not the one that {folder}/meta.json names: {REMEDY}")
    tokens = {}
    for split, expected in sizes.items():
        path = os.path.join(folder, f"{split}.bin")
        size = os.path.getsize(path) if os.path.isfile(path) else "no"
        if size != 2 * expected:
            fail(f"{path} should hold {expected} tokens in {2 * expected} bytes, has {size} bytes: {REMEDY}")
        if expected <= block_size:
            fail(f"{path} holds {expected} tokens, fewer than one window of block_size={block_size}: "
                 "prepare more text, or with a larger --val_fraction, or train with a smaller --block_size")
        try:
            tokens[split] = np.memmap(path, dtype="<u2", mode="r")
            # one process of a node reads it all: the others would only wait for the same disk
            if os.environ.get("LOCAL_RANK", "0") == "0":
                check_tokens(tokens[split], path, vocab_size, meta[split].get("sha256"))
        except OSError as e:
            fail(f"cannot read {path} ({e.strerror}): see who may read it, or {REMEDY}")
    return Data(tokens["train"], tokens["val"], meta, tokenizer)


def check_tokens(tokens, path, vocab_size, sha256):
    """End the script if the bin at `path` is seen to hold other tokens than prepare.py wrote: by the sha256
    of meta.json, if the bin is no larger than CHEAP and there is one, and by ids that do not exist."""
    if sha256 and tokens.nbytes <= CHEAP:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                fail(f"{path} is not the file that prepare.py wrote, by the sha256 in meta.json: {REMEDY}")
    if (largest := tokens.max()) >= vocab_size:
        fail(f"{path} holds the token id {largest}, beyond the vocabulary of {vocab_size}: {REMEDY}")


def check_tokenizer(model, path, folder, meta):
    """End the script unless the data in `folder` has the tokenizer of the model, which is at `path`."""
    if model.tokenizer_sha256:
        needed, same = path, model.tokenizer_sha256 == meta["tokenizer_sha256"]
    else:  # a released model, which came without it
        needed, same = model.tokenizer_name, model.tokenizer_name == meta["tokenizer"]
    if not same:
        fail(f"the data in {folder} has another tokenizer, {meta.get('tokenizer')!r}, than the model: "
             f"prepare it again with {shlex.quote(f'--tokenizer={needed}')}")
    if meta["vocab_size"] > model.config.vocab_size:
        fail(f"the data's vocabulary of {meta['vocab_size']} exceeds the model's {model.config.vocab_size}: "
             "prepare the data with the model's tokenizer")


def check_start(model, path, folder, meta):
    """End the script unless the data in `folder` can train the model, whose tokenizer is at `path`."""
    check_tokenizer(model, path, folder, meta)
    if not all(p.requires_grad for p in model.parameters()):
        fail("the bigram table of this model is marked as fixed: it can be sampled from, not trained, here")


def windows(tokens, starts, block_size, process):
    """Inputs and targets (len(starts), block_size), int64 on the device: the targets are one token ahead."""
    rows = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
    if process.device.type == "cuda":
        rows = rows.pin_memory().to(process.device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def data_folder(dataset):
    """The folder of a data set: in data/ of the current folder or, if it is not there, of the repository."""
    here = os.path.join("data", dataset)
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), here)
    if not os.path.isdir(here) and not os.path.isdir(beside):
        fail(f"no data in {here}" + f", nor in {beside}" * (beside != here)
             + f": {REMEDY}")
    return here if os.path.isdir(here) else beside


def load_run(out_dir, name="ckpt.pt", dataset=""):
    """A trained model: checkpoint `name` (a dict) without the optimizer, the model to evaluate, the data.

    Instead of an out_dir the path of a checkpoint, or the folder of a released model, of which the dict says
    less: its "step" is None, and its `dataset` must be given. "path" says where the weights are.
    """
    if os.path.exists(os.path.join(out_dir, "beeg_config.json")):
        if not dataset:
            fail(f"{out_dir} holds a released model, which does not say what it was trained on: add "
                 "--dataset=NAME, data that is prepared with its tokenizer")
        model, path = load_start(out_dir)[0], os.path.join(out_dir, "final_model.pt")
        checkpoint = {"settings": {"dataset": dataset}, "step": None}
    else:
        path = out_dir if os.path.isfile(out_dir) else os.path.join(out_dir, name)
        checkpoint = load_checkpoint(path)
        del checkpoint["optimizer"]  # twice the size of the model, and of no use here
        model = model_of(checkpoint)
    folder = data_folder(dataset or checkpoint["settings"]["dataset"])
    data = load_data(folder, model.config.block_size)
    check_tokenizer(model, tokenizer_in(os.path.dirname(path)), folder, data.meta)
    return checkpoint | {"path": path}, model.eval(), data


# ----------------------------------------------------------------------------------------------------------
# a run


@dataclass
class Run:
    """A training run as it stands between two updates."""

    settings: dict  # train.py's
    process: Process
    data: Data
    model: GPT  # neither compiled nor wrapped: what is saved
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler  # idle unless the precision is float16
    step: int = 0  # updates made
    l0: float = 1.0  # of the last update: to it the weights are pruned
    best: tuple = (1.0, math.inf)  # L0 and val loss of best.pt
    log: Log | None = None  # the first rank's

    def save(self, name):
        """Write a checkpoint to out_dir, if this is the first rank. Nothing random is in it: all that is
        random in training is a function of the seed and the step. Adam's moments have the names of their
        parameters."""
        if not self.log:
            return
        moments = {name: self.optimizer.state.get(p, {}) for name, p in self.model.named_parameters()}
        write_checkpoint(os.path.join(self.log.folder, name), {
            "model": self.model.state_dict(), "optimizer": {"state": moments},
            "scaler": self.scaler.state_dict(), "config": asdict(self.model.config),
            "settings": self.settings, "step": self.step, "l0": self.l0,
            "lr": self.optimizer.param_groups[0]["lr"], "best_l0": self.best[0],
            "best_val_loss": self.best[1], "tokenizer_sha256": self.data.meta["tokenizer_sha256"],
            "data": {split: self.data.meta[split] for split in ("train", "val")},
            "wandb_id": self.log.wandb_id, "torch": str(torch.__version__)})
        if name == "ckpt.pt" and self.log.folder != self.settings["out_dir"]:
            settle(self.settings["out_dir"])
            self.log.folder = self.settings["out_dir"]

    def restore_(self, checkpoint):
        """Stand where a checkpoint of the same model stood; ends the script if its numbers do not fit.

        Adam's betas and eps stay those of the settings, which may have changed.
        """
        parameters, moments = dict(self.model.named_parameters()), checkpoint["optimizer"].get("state")
        moments = moments if type(moments) is dict else {None: None}
        if "param_groups" in checkpoint["optimizer"]:  # an older checkpoint, which numbers the parameters
            names = dict(enumerate(parameters))
            moments = {names.get(i, i): found for i, found in moments.items()}
        if checkpoint["step"] == 0 and not moments:  # likewise, before the first update
            moments = {name: {} for name in parameters}
        for name in [*parameters, *moments]:
            if name not in parameters or not are_moments(moments.get(name), parameters[name]):
                fail(f"Adam's moments of {name} do not fit: use the code that wrote the checkpoint, "
                     "or begin a new run with its weights, --init_from=PATH")
        state = {i: moments[name] for i, name in enumerate(parameters) if moments[name]}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        if self.scaler.is_enabled() and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.best = checkpoint["step"], (checkpoint["best_l0"], checkpoint["best_val_loss"])
        self.l0 = checkpoint.get("l0", 1.0)  # of an older one unknown until the next update
        if self.step > (max_iters := self.settings["max_iters"]):
            fail(f"max_iters={max_iters} is less than the {self.step} updates that this run has made: raise "
                 "it")

    def compare_with(self, checkpoint, changed, rates):
        """Say what is not as it was when a run goes on: the settings that `changed`, in words, with rates
        then and the `rates` now, and the data. The model of a run that was finished is kept. best.pt, if it
        is of other data or if no model can be as sparse any more, is moved aside and begins anew."""
        out_dir, then = self.settings["out_dir"], checkpoint.get("data", {})
        if changed and self.step == self.settings["max_iters"]:
            print(f"changed since the checkpoint: {changed} (but no updates are left: raise --max_iters)")
        elif changed:
            kept = keep_finished(out_dir, checkpoint, self.settings["max_iters"])
            before = f"L0 {self.l0:.4g}, lr {checkpoint.get('lr', math.nan):.2e}"  # an older one has none
            print(f"changed since the checkpoint: {changed} ({before} -> {rates}){kept}")
        other = self.data.differs_from(then)
        if other:
            print(f"{self.settings['dataset']} is not the data of the checkpoint: it had "
                  f"{then['train']['tokens']:,} training tokens, now it has {len(self.data.train):,}")
        if other or self.settings["target_l0_fraction"] > self.best[0]:
            self.best = (1.0, math.inf)
            aside = move_aside(out_dir, r"best\.pt")
            print("best.pt begins anew: it is the best on other data, or sparser than this run can be"
                  + (f"; it is now in {aside}" if aside else ""))


def are_moments(found, p):
    """Whether `found` is what Adam keeps of parameter p: {} before its first update, else three tensors."""
    shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
    return type(found) is dict and (not found or found.keys() == shapes.keys() and all(
        isinstance(found[key], torch.Tensor) and found[key].shape == shape for key, shape in shapes.items()))


def write_settings(run):
    """Write out_dir/settings.json, which nothing reads: the settings, and with what and on what it runs."""
    changes = git("status", "--porcelain")
    about = {"settings": run.settings, "torch": torch.__version__, "numpy": np.__version__,
             "python": platform.python_version(), "device": name_of_device(run.process.device),
             "commit": git("rev-parse", "HEAD"), "clean": None if changes is None else not changes}
    path = os.path.join(run.log.folder, "settings.json")
    write_atomically(path, json.dumps(about, indent=2) + "\n")


def check_ranks_agree(run):
    """Compare a checksum of the step and all weights across ranks; end the run if a single bit differs."""
    if run.process.world_size == 1:
        return
    checksum = torch.full((1,), run.step, dtype=torch.int64, device=run.process.device)
    for p in run.model.parameters():
        checksum = 31 * checksum + p.detach().view(torch.int32).sum(dtype=torch.int64)
    checksums = [torch.empty_like(checksum) for _ in range(run.process.world_size)]
    dist.all_gather(checksums, checksum)
    differing = [rank for rank, other in enumerate(checksums) if other != checksums[0]]
    if differing:
        stop(f"at step {run.step} the weights, or the step, of rank {differing[0]} are not those of rank 0",
             run.settings["out_dir"])


# ----------------------------------------------------------------------------------------------------------
# how a run ends


SMALLER_STEPS = (  # where memory does not suffice
    "halve --batch_size, and double --gradient_accumulation_steps and --eval_iters, which keeps the size "
    "of a step; or choose a smaller model")


def stop(message, out_dir):
    """End a run that cannot go on, naming what is left of it: exit status 1. No checkpoint is written."""
    path = os.path.join(out_dir, "ckpt.pt")
    is_ours = os.path.exists(path) and not os.path.exists(os.path.join(out_dir, STARTING))
    left = f"the last good checkpoint is {path}" if is_ours else "there is no checkpoint yet"
    complain(f"{message}; {left}")
    raise SystemExit(1)


class StopSignal:
    """Notes a signal, for the loop to see after the step. A second SIGINT or SIGTERM ends all at once.

    SIGUSR1 is what schedulers send before the time is up, where SIGHUP is of the terminal.
    A scheduler that signals all processes reaches those of torchrun twice, as torchrun passes its own signal
    on: there, a second one counts only if it comes seconds later.
    """

    def __init__(self):
        self.received = None  # when
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        grace, ends = 5 if "LOCAL_RANK" in os.environ else 0, number in (signal.SIGINT, signal.SIGTERM)
        if ends and self.received and time.monotonic() - self.received >= grace:
            os._exit(128 + number)
        self.received = self.received or time.monotonic()


class Readings:
    """Losses and gradients' RMS of the updates made, which stay on the device until they are read.

    To read them makes the CPU wait for the device. So it is done where they are needed, and else about every
    five seconds, for a signal may ask to stop. All ranks read after the same updates: at each reading they
    reckon from the seconds that they took together after how many updates the next one is due.
    """

    SECONDS = 5  # between readings

    def __init__(self, run):
        self.process, self.overflows = run.process, run.scaler.is_enabled()
        self.out_dir = run.settings["out_dir"]
        self.signal, self.unread = StopSignal(), []
        self.unsaved = 0.0  # seconds since the last checkpoint, the same on all ranks
        self.wait, self.last_time = 1, time.monotonic()  # updates until the next reading; when the last was

    def add(self, step, loss, rms):
        """Note what update `step` has made, tensors (): nothing waits for them."""
        self.unread.append((step, loss, rms))

    def are_due(self):
        return len(self.unread) >= self.wait

    def read(self):
        """Loss and RMS of the last update, means over the ranks, and whether a rank was asked to stop.

        Ends the run if a number of any update since the last reading is not finite.
        """
        steps, losses, norms = zip(*self.unread, strict=True)
        stopping, seconds = self.signal.received is not None, time.monotonic() - self.last_time
        totals = self.process.sum(stopping, seconds, *losses, *norms) / self.process.world_size
        stopping, seconds, *numbers = totals.tolist()
        for step, loss, rms in zip(steps, numbers, numbers[len(steps):], strict=False):
            overflow = not math.isfinite(rms) and self.overflows  # of float16: Adam was skipped
            if not math.isfinite(loss) or not (math.isfinite(rms) or overflow):
                stop(f"at step {step} the loss is {loss} and the gradients' RMS {rms}", self.out_dir)
        self.wait = max(1, int(self.SECONDS * len(steps) / max(seconds, 1e-9)))
        self.unread, self.last_time = [], time.monotonic()
        self.unsaved += seconds
        return loss, rms, stopping > 0

    def ask_for_checkpoint(self, minutes):
        """Whether, when last read, it was `minutes` since a checkpoint: the count then begins anew."""
        asked = 0 < 60 * minutes <= self.unsaved
        self.unsaved = 0.0 if asked else self.unsaved
        return asked


def say_how_to_go_on(run):
    """Print the command line of this run, with --init_from=resume."""
    if run.process.rank != 0:
        return
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        launcher += [f"--nnodes={os.environ['GROUP_WORLD_SIZE']}", "--rdzv_backend=c10d",
                     "--rdzv_endpoint=HOST:29400"]
    arguments = [a for a in sys.argv if not a.startswith("--init_from=")]
    command = shlex.join([*launcher, *arguments, "--init_from=resume"])
    tell(f"stopped before step {run.step}; go on with: {command}")
