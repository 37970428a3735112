"""What out_dir holds: a run's checkpoints, log and circuits, how they are written whole, and how a new run
takes its place there while nothing of an earlier one is lost.

Each file is written beside its place and renamed, so whatever ends a run, what is there is whole. What a
user can mend ends the script with one line (`configurator.fail`).
"""
import fcntl
import glob
import itertools
import json
import math
import os
import re
import shutil
import signal
import warnings
import zipfile
from contextlib import contextmanager

import torch

import released
from configurator import complain, fail, is_gone, lose_output, one_line, read_json, tell
from model import GPT, GPTConfig
from tokenizer import tokenizer_in

# ----------------------------------------------------------------------------------------------------------
# files


@contextmanager
def opened_beside(path, mode="w"):
    """A file beside `path` to write to, text in UTF-8 or bytes, which is renamed to `path` when it is whole.

    Whatever happens meanwhile, `path` holds all of the old or all of the new. Raises what writing raises.
    """
    beside = os.fspath(path) + ".tmp"
    try:
        with open(beside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException:
        if os.path.isfile(beside):
            os.remove(beside)
        raise


def write_atomically(path, text):
    """Write a text file all or not at all; ends the script if that cannot be done."""
    try:
        with opened_beside(path) as f:
            f.write(text)
    except OSError as e:
        fail(f"cannot write {path} ({e.strerror}): make room, or choose another place")


# ----------------------------------------------------------------------------------------------------------
# out_dir and its checkpoints


RUN_FILES = (r"(ckpt|best|finished-\d+)\.pt|log\.jsonl|(tokenizer|settings)\.json|means-.*\.npz|circuits|"
             r"curves\.png")
STARTING = ".starting"  # where in out_dir a new run is until its first checkpoint is whole


@contextmanager
def claim_out_dir(out_dir):
    """Keep other runs out of out_dir meanwhile. At the end a start that has failed leaves nothing there."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(os.path.join(out_dir, "lock"), "w")  # noqa: SIM115  closed by the caller
    except OSError as e:
        fail(f"cannot write to out_dir={out_dir} ({e.strerror}): choose another --out_dir")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to out_dir={out_dir}: stop it, or choose another --out_dir")
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        shutil.rmtree(os.path.join(out_dir, STARTING), ignore_errors=True)
        lock.close()


def chosen_start(init_from, out_dir):
    """What init_from='auto' means: 'resume' if there is a checkpoint in out_dir, else 'scratch'."""
    if init_from != "auto":
        return init_from
    return "resume" if os.path.exists(os.path.join(out_dir, "ckpt.pt")) else "scratch"


def start_out_dir(out_dir, tokenizer):
    """Begin a new run in a folder of its own in out_dir, which is returned. Until its first checkpoint is
    whole a run that is there stays as it is: see `settle`."""
    folder = os.path.join(out_dir, STARTING)
    try:
        if {"meta.json", "beeg_config.json"} & set(os.listdir(out_dir)):
            fail(f"out_dir={out_dir} holds data or a released model: choose another --out_dir")
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
        os.mkdir(folder)
        with open(tokenizer_in(folder), "w", encoding="utf-8", newline="") as f:
            f.write(tokenizer)
    except OSError as e:
        fail(f"cannot write to out_dir={out_dir} ({e.strerror}): choose another --out_dir")
    return folder


def settle(out_dir):
    """Give a run that `start_out_dir` began its place; what another run left there is moved aside."""
    folder = os.path.join(out_dir, STARTING)
    try:
        if aside := move_aside(out_dir):
            tell(f"{out_dir} held another run, which is now in {aside}")
        for name in in_order(os.listdir(folder)):
            os.replace(os.path.join(folder, name), os.path.join(out_dir, name))
        os.rmdir(folder)
    except OSError as e:
        fail(f"cannot write to out_dir={out_dir} ({e.strerror}): choose another --out_dir")


def move_aside(out_dir, files=RUN_FILES):
    """Move the files of a run to a new folder in out_dir, which is returned; None if there are none."""
    names = in_order(name for name in os.listdir(out_dir) if re.fullmatch(files, name))
    if not names:
        return None
    aside = unused(os.path.join(out_dir, "previous-"))
    os.mkdir(aside)
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(aside, name))
    return aside


def unused(path):
    """The path with the first number, from 1, behind it that is not there yet."""
    return next(f"{path}{n}" for n in itertools.count(1) if not os.path.exists(f"{path}{n}"))


def in_order(names):
    """Names in the order in which files are moved: ckpt.pt last, as with it there is a run to go on."""
    return sorted(names, key=lambda name: name == "ckpt.pt")


def what_is_left(path):
    """What a run that could not write the file at `path` can go on from, in words."""
    path = os.path.join(os.path.dirname(path), "ckpt.pt")
    if os.path.exists(path):
        return f"{path} is whole: make room, then --init_from=resume"
    return "this run has no checkpoint yet: make room, or choose another --out_dir, and start it again"


def write_checkpoint(path, checkpoint):
    """Write it, or end the script and leave the one before it as it was."""
    try:
        with opened_beside(path, "wb") as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:
        while not isinstance(e, OSError) and e.__context__:  # torch says that its writer failed, not why
            e = e.__context__
        fail(f"cannot write {path} ({e}): {what_is_left(path)}")


def keep_finished(out_dir, checkpoint, max_iters):
    """Keep the model of a run that was complete and now goes on to `max_iters`; say so, in a few words."""
    path = os.path.join(out_dir, f"finished-{checkpoint['step']}.pt")
    if not checkpoint["step"] == checkpoint["settings"]["max_iters"] < max_iters:
        return ""
    write_checkpoint(path, checkpoint)
    return f"; the finished model stays in {path}, and best.pt until a better one is as sparse"


ENTRIES = {  # of a checkpoint, and their types
    "model": dict, "optimizer": dict, "scaler": dict, "config": dict, "settings": dict, "step": int,
    "best_val_loss": float, "best_l0": float, "tokenizer_sha256": str}
NEWER = {"l0": float, "data": dict, "wandb_id": str | None, "torch": str}  # which older ones lack


def load_checkpoint(path):
    """The checkpoint at `path`, a dict, on the CPU. Runs no code from it.

    settings: train.py's. step: updates made. l0: that of the last. best_val_loss: with best_l0, of best.pt.
    data: what meta.json says of train and val. The file's own checksums are tested, which torch does not do:
    a tenth of a second for 100 MB.
    """
    try:
        with zipfile.ZipFile(path) as f:
            if name := f.testzip():
                raise zipfile.BadZipFile(f"{name} has a wrong checksum")
        with warnings.catch_warnings(action="ignore"):  # our line, below, is enough
            checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        folder, file = os.path.split(path)
        earlier = os.path.join(folder, "previous-1")
        earlier = f"; an earlier run is in {earlier}" if os.path.isdir(earlier) else ""
        above = folder if os.path.isdir(folder) else os.path.dirname(folder)
        there = [os.path.dirname(found) for found in glob.glob(os.path.join(glob.escape(above), "*", file))]
        there = f" (there is one in {', '.join(sorted(there)[:4])})" if there else ""
        fail(f"no checkpoint at {path}: check --out_dir{there}, or train first, without "
             f"--init_from=resume{earlier}")
    except Exception as e:  # noqa: BLE001  what torch.load raises depends on what is in the file
        reason = e if isinstance(e, zipfile.BadZipFile) else type(e).__name__
        fail(f"{path} is no readable checkpoint ({reason}): restore it, or give another --out_dir")
    check_entries(checkpoint, path)
    return checkpoint


def check_entries(checkpoint, path):
    """End the script if an entry of a checkpoint is missing or makes no sense."""
    if missing := ENTRIES.keys() - checkpoint.keys():
        fail(f"{path} is no checkpoint of train.py (it lacks {', '.join(sorted(missing))}): choose another")
    strange = [name for name, kind in (ENTRIES | NEWER).items()
               if name in checkpoint and not isinstance(checkpoint[name], kind)]
    if not strange:
        parts = checkpoint.get("data", {"train": {"tokens": 0}, "val": {"tokens": 0}})
        strange = [name for name, is_right in (
            ("step", checkpoint["step"] >= 0),
            ("settings", type(checkpoint["settings"].get("dataset")) is str),
            ("data", parts.keys() == {"train", "val"} and all(
                type(part) is dict and type(part.get("tokens")) is int for part in parts.values())),
        ) if not is_right]
    if strange:
        fail(f"{path} is no checkpoint of train.py (its {strange[0]} makes no sense): choose another")


def model_of(checkpoint):
    """The model that a checkpoint holds; like a released one it has the `tokenizer_sha256` of its data."""
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        model.tokenizer_sha256 = checkpoint["tokenizer_sha256"]
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        reason = " ".join(str(e).split())
        fail(f"the checkpoint does not fit model.py, use the code that wrote it: {reason}")
    return model


def load_start(init_from, name=None):
    """The model in an out_dir, a checkpoint or a released model's folder; the path of its tokenizer.json.

    `name`, if given, is that of the checkpoint in an out_dir.
    """
    path = init_from if os.path.isfile(init_from) else os.path.join(init_from, name or "ckpt.pt")
    tokenizer = tokenizer_in(os.path.dirname(path))
    if name and not (os.path.isfile(path) and os.path.isdir(init_from)):
        fail(f"checkpoint={name} names a file in an out_dir, and {path} is none: leave it out, or check it")
    if os.path.isfile(path):
        return model_of(load_checkpoint(path)), tokenizer
    try:
        return released.read(init_from), tokenizer
    except (OSError, ValueError) as e:
        fail(f"init_from={init_from} must be 'scratch', 'resume', an out_dir with a ckpt.pt, a checkpoint "
             f"or the folder of a released model: {e}")


# ----------------------------------------------------------------------------------------------------------
# the circuits of its model


def start_circuit(out_dir, name, identity):
    """The folder of the results of circuit.py for a task. An earlier result that has another identity, a
    dict of what circuit.json says, is moved aside."""
    folder = os.path.join(out_dir, "circuits", name)
    path = os.path.join(folder, "circuit.json")
    try:
        if os.path.exists(path):
            earlier = read_json(path)
            if any(earlier.get(key) != value for key, value in identity.items()):
                aside = unused(f"{folder}.previous-")
                os.rename(folder, aside)
                print(f"an earlier circuit, of another checkpoint, task or search, is now in {aside}")
        os.makedirs(folder, exist_ok=True)
        write_atomically(os.path.join(folder, "writable"), "")
        os.remove(os.path.join(folder, "writable"))
    except (OSError, ValueError) as e:
        fail(f"cannot write to {folder} ({one_line(e)}): move it away, or choose another --out_dir")
    return folder


# ----------------------------------------------------------------------------------------------------------
# the log


def read_log(path):
    """The records of a log.jsonl, a list of dicts with their "step"; ends the script if there are none.

    A killed run may have torn its last line: it does not count.
    """
    try:
        with open(path, encoding="utf-8") as f:
            records = [json.loads(line) for line in f if line.endswith("}\n")]
        if not all(type(record) is dict and type(record.get("step")) is int for record in records):
            raise ValueError("a line has no step")
    except (OSError, ValueError, RecursionError) as e:
        fail(f"cannot read the log {path} ({e}): give the --out_dir of a training run, or move the log away")
    return records


class Log:
    """Where the records of a run go: the terminal, log.jsonl in its folder and, if asked, wandb."""

    def __init__(self, folder, start, evaluates, wandb_id=None):
        """Records from step `start` on will be made again: drop those that an interrupted run left. That of
        an evaluation at `start` is kept unless the run `evaluates` there again."""
        self.folder, self.wandb, self.wandb_id = folder, None, wandb_id
        self.lost = None  # the error with which standard output took no more
        records = read_log(self.path) if start and os.path.exists(self.path) else []
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in records if (
            record["step"] < start or record["step"] == start and "val/loss" in record and not evaluates)))

    @property
    def path(self):
        return os.path.join(self.folder, "log.jsonl")

    def start_wandb(self, settings):
        """Send what is written to wandb too: to the run `wandb_id`, or to a new one if settings say so."""
        try:
            from wandb import Error, init  # not the package alone, which any folder named wandb would do for
        except ImportError:
            fail("wandb is not installed: pip install -r requirements.txt, or --wandb_log=False")
        folder = os.path.abspath(settings["out_dir"])
        earlier = None if settings["wandb_new_run"] else self.wandb_id
        try:
            self.wandb = init(project=settings["wandb_project"], dir=folder, config=settings, id=earlier,
                              name=settings["wandb_run_name"] or os.path.basename(folder),
                              resume="allow" if earlier else None)
        except Error as e:
            fail(f"wandb: {' '.join(str(e).split())} (or set WANDB_MODE=offline, or --wandb_log=False)")
        self.wandb_id = self.wandb.id

    def write(self, record):
        """Write one record, a dict of numbers with their step; JSON knows no infinity, so that is None."""
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            fail(f"cannot write {self.path} ({e.strerror}): {what_is_left(self.path)}")
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        try:
            if not self.lost:
                self.show(record)
        except OSError as e:  # a terminal is gone, or the reader of a pipe, or a disk is full: the run stops
            self.lost = e
            lose_output()
            if not is_gone(e):
                complain(f"cannot write the standard output ({e.strerror}): the run stops with a checkpoint")
            signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # which nohup has ignored
            os.kill(os.getpid(), signal.SIGHUP)

    def show(self, record):
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
        """The last that a run does; ends the script if its output had no room."""
        if self.wandb:
            self.wandb.finish()
        if self.lost and not is_gone(self.lost):
            raise SystemExit(2)
