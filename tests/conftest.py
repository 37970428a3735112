"""What the tests in this folder share: the fixtures of test_sparsity.py, a folder with a run that was
interrupted, and the means to start scripts in processes of their own, to break them and to kill them.
"""
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tiktoken

import test_sparsity
from test_sparsity import REPO, interrupted_run

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is first imported: look-ups fail at once

choose, prepared, here, whole = (
    test_sparsity.choose, test_sparsity.prepared, test_sparsity.here, test_sparsity.whole)


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
