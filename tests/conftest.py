"""What the tests in this folder share: a folder with small data and the config of a tiny run, one with a run
that was interrupted, and the means to run scripts in this process or in others, to break them and to kill
them.
"""
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tiktoken
import torch

import circuit
import configurator
import kernels
import prepare
import sample
import train
from configurator import settings_of

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is first imported: look-ups fail at once
configurator.is_script = True  # most tests are of scripts: errors are printed, as after `configure`
torch.set_num_threads(1)  # the tensors here are small: more threads would wait for each other

# ----------------------------------------------------------------------------------------------------------
# scripts in this process, and what they leave

REPO = os.path.dirname(os.path.abspath(train.__file__))
SCRIPTS = {"circuit.py": circuit, "prepare.py": prepare, "sample.py": sample, "train.py": train}
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
SPEED = ("tokens_per_second", "seconds_left")  # what no two runs log alike


def forget_settings():
    """Give all scripts the settings that a new process would start with."""
    for name, script in SCRIPTS.items():
        for key in settings_of(vars(script)).keys() - DEFAULTS[name].keys():
            del vars(script)[key]
        vars(script).update(DEFAULTS[name])


def run(command):
    """What the command line `command` does, such as 'train.py tiny.py', in this process; its exit status."""
    forget_settings()
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    handlers = {number: signal.getsignal(number) for number in signals}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(command))
        patch.setattr(kernels, "enabled", True)  # afterwards it is, whatever the script set
        try:
            SCRIPTS[sys.argv[0]].main()
        except SystemExit as e:
            return e.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
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
    """A copy of `prepared`, as the current folder. Settings are restored at the end."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "here"))
    yield
    forget_settings()


@pytest.fixture(scope="session")
def whole(prepared, tmp_path_factory):
    """The out_dir of a tiny run that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    assert run(f"train.py {prepared}/tiny.py --dataset={prepared}/data/tiny --out_dir={out_dir}") == 0
    return out_dir


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


def assert_ended_alike(out_dir, whole):
    """Two runs left the same bytes: weights, optimizer, best model, and a log without their speed."""
    assert state(out_dir=out_dir) == state(out_dir=whole)
    assert state("best.pt", out_dir) == state("best.pt", whole)
    assert log(out_dir, without=SPEED) == log(whole, without=SPEED)


def call_before(patch, name, action, owner=train):
    """Make `action(*arguments)` run before each call of the function `name` of a module or a class."""
    original = getattr(owner, name)

    def wrapper(*arguments, **keywords):
        action(*arguments, **keywords)
        return original(*arguments, **keywords)

    patch.setattr(owner, name, wrapper)


def at_step(step, action):
    """For `call_before(patch, "update_", ...)`: `action()` at one step only."""
    return lambda model, optimizer, scaler, now: action() if now == step else None


def interrupted_run(command, step):
    """`run`, with a SIGINT to the process in the middle of `step`."""
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, "update_", at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)))
        return run(command)


@pytest.fixture(scope="session")
def interrupted(prepared, tmp_path_factory):
    """The out_dir of a tiny run that was interrupted at step 5."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("interrupted") / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert interrupted_run("train.py tiny.py", 5) == 0
    return folder / "out"


@pytest.fixture
def trained(here, interrupted):
    """The current folder is that of `here`, and in it out/ holds an interrupted run."""
    shutil.copytree(interrupted, "out")


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


def read(path):
    """The text of a file."""
    with open(path, encoding="utf-8") as f:
        return f.read()


def byte_tokenizer(eot, pattern=r"[\s\S]", missing=()):
    """One token for each byte that is not `missing`, and <|endoftext|>, if it has an id, of the id `eot`."""
    return tiktoken.Encoding("custom", pat_str=pattern,
                             special_tokens={} if eot is None else {"<|endoftext|>": eot},
                             mergeable_ranks={bytes([b]): b for b in range(256) if b not in missing})


# ----------------------------------------------------------------------------------------------------------
# processes


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


def wait_for(condition, process, timeout=120):
    """Wait until `condition()` holds, as long as `process` lives."""
    end = time.time() + timeout
    while not condition() and process.poll() is None:
        assert time.time() < end, f"waited in vain: {read('stdout.txt')} {read('stderr.txt')}"
        time.sleep(0.005)


def printed(text):
    """For `wait_for`: whether the launched process has printed `text`."""
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
