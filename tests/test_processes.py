"""Runs in processes of their own, all of them slow: two ranks under torchrun, which stay alike and stop
together, and kill -9 at any moment, after which a run goes on to the bytes of one that was left alone.
KILLS=20 pytest -k killed makes 20 kills instead of the few that keep these tests fast.
"""
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import (
    REPO,
    SPEED,
    assert_ended_alike,
    checkpoint,
    family,
    finish,
    frozen,
    kill,
    launch,
    log,
    printed,
    read,
    run,
    state,
    tree,
    wait_for,
    weights,
)

pytestmark = pytest.mark.slow

# ----------------------------------------------------------------------------------------------------------
# two ranks

LONG = "train.py tiny.py --max_iters=60 --eval_interval=10 --log_every_n_steps=5"
WATCHED = """
loop, destroy = train.train, torch.distributed.destroy_process_group
def watched_loop(run):
    loop(run)
    torch.save(run.model.state_dict(), f"rank{run.process.rank}.pt")
def watched_end():
    before = os.listdir("/proc/self/task")
    destroy()
    with open(f"rank{rank}.txt", "w") as f:
        f.write(f"{len(before)} {len(os.listdir('/proc/self/task'))}")
train.train, torch.distributed.destroy_process_group = watched_loop, watched_end
"""


@pytest.fixture(scope="session")
def two_ranks(prepared, tmp_path_factory):
    """A folder in which LONG was run by two ranks. Each left its weights, and how many threads it had
    before and after it left the group."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("two_ranks") / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status, error = finish(launch(LONG, ranks=2, fault=WATCHED))
        assert status == 0, error
    return folder


def test_ranks_stay_bit_identical(two_ranks):
    """After 60 updates both ranks hold the same bytes, and they are what was saved."""
    first, second = (frozen(torch.load(two_ranks / f"rank{rank}.pt", weights_only=True)) for rank in (0, 1))
    assert first == second == weights(two_ranks / "out")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are read from Linux's /proc")
def test_the_threads_of_the_group_end_with_it(two_ranks):
    """One that is left may touch a tensor while Python ends, which aborts the process: a run that failed."""
    for rank in (0, 1):
        before, after = read(two_ranks / f"rank{rank}.txt").split()
        assert int(after) <= int(before) - 2  # gloo has two that do the work


def test_two_ranks_equal_one_with_twice_the_accumulation(here):
    """Two ranks see the data that one process sees, and end with its weights, losses and nonzeros."""
    command = "train.py tiny.py --max_iters=60 --eval_interval=10"
    assert run(command) == 0
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2"
    subprocess.run([sys.executable, *shlex.split(f"{launcher} {REPO}/{command} --out_dir=two")], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    one, two = checkpoint()["model"], checkpoint(out_dir="two")["model"]
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
        assert two[name].count_nonzero() == weight.count_nonzero()
    for ours, theirs in zip(log(without=SPEED), log("two", without=SPEED), strict=True):
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
def broken_gradients(network, data, scaler, step, process):
    if rank == 1 and step == 26:
        next(network.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    return gradients_of_step(network, data, scaler, step, process)
train.gradients_of_step = broken_gradients
"""
NAN_ON_ONE_RANK_ALONE = """
gradients_of_step = train.gradients_of_step
def broken_gradients(network, data, scaler, step, process):
    loss = gradients_of_step(network, data, scaler, step, process)
    if rank == 1 and step == 26:
        next(network.parameters()).grad.view(-1)[7] = float("nan")
    return loss
train.gradients_of_step = broken_gradients
"""


@pytest.mark.parametrize("fault, step, complaint", [
    (DIVERGE, 30, "rank 1"), (NAN_BEFORE_THE_RANKS_AVERAGE, 26, "nan"), (NAN_ON_ONE_RANK_ALONE, 26, "nan")],
    ids=["diverge", "nan", "nan on one rank alone"])
def test_two_ranks_stop_together(here, fault, step, complaint):
    """A weight that differs by one bit between ranks, or a NaN in one rank's gradient, stops both: at step
    26 nothing is logged, so it is read later, but before anything is saved.
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


@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_to_torchrun(two_ranks, here, everyone):
    """SIGTERM to torchrun, or to every process, to which torchrun then adds its own: both ranks stop after
    the same step, within about five seconds, as many steps here; one checkpoint is written and the command
    to resume is printed; resumed, the run ends as if it had not been stopped."""
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
    assert stopped and checkpoint()["step"] == int(stopped[1]) in range(16, 21)
    launcher, ranks, script, *arguments = shlex.split(stopped[2])
    assert (launcher, ranks, os.path.basename(script)) == ("torchrun", "--nproc_per_node=2", "faulty.py")
    status, error = finish(launch(shlex.join(["train.py", *arguments]), ranks=2))
    assert status == 0, error
    assert state() == state(out_dir=two_ranks / "out")
    assert log(without=SPEED) == log(two_ranks / "out", without=SPEED)


def test_accumulation_that_two_ranks_cannot_share(here):
    """An odd number of micro-batches on two ranks is an error of one line, before anything is written."""
    status, error = finish(launch(f"{LONG} --gradient_accumulation_steps=3", ranks=2))
    assert status != 0 and not os.path.exists("out")
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "multiple" in line and "2" in line


# ----------------------------------------------------------------------------------------------------------
# kill -9, whenever


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


def test_killed_at_random_moments(here):
    """Killed again and again and resumed each time, a run ends with the bytes of one that was left alone."""
    assert finish(launch(f"{LONG} --out_dir=whole"))[0] == 0
    survive_kills(kills(5), 1, state(out_dir="whole"))


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


@pytest.mark.parametrize("moment, name, step", [
    ("half written", "best.pt", 4), ("renamed", "best.pt", 4),
    ("half written", "ckpt.pt", 4), ("not renamed", "ckpt.pt", 4), ("renamed", "ckpt.pt", 8)])
def test_killed_inside_a_checkpoint(here, whole, moment, name, step):
    """Killed while a checkpoint is half written, whole but not renamed, or just renamed, the run has a whole
    checkpoint to go on from, and ends with the bytes of one that was left alone."""
    process = launch("train.py tiny.py", fault=PAUSE_IN_SAVE.format(moment=moment, name=name))
    wait_for(lambda: os.path.exists("paused"), process)
    assert process.poll() is None, read("stderr.txt")
    kill(family(process.pid))
    process.wait()
    assert checkpoint()["step"] == step
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)
    assert not [path for path in tree() if path.endswith(".tmp")]


@pytest.mark.parametrize("ignored", [False, True])
def test_sighup(here, monkeypatch, ignored):
    """When the terminal hangs up the run finishes its step, writes a checkpoint and ends; under nohup, which
    has the signal ignored, it goes on."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # it is inherited
    try:
        process = launch("train.py tiny.py --eval_interval=100", fault="""
            update_ = train.update_
            def hung_up_update_(model, optimizer, scaler, step):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGHUP)
                return update_(model, optimizer, scaler, step)
            train.update_ = hung_up_update_
            """)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert finish(process) == (0, "")
    assert checkpoint()["step"] == (12 if ignored else 6)


def test_the_reader_of_a_pipe_is_gone(here):
    """`train.py | head -3` ends soon after, without a traceback, with a checkpoint of its last step; the
    command that resumes is printed where it can be read."""
    command = [sys.executable, os.path.join(REPO, "train.py"), "tiny.py", "--max_iters=100000"]
    with open("stderr.txt", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err)
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    status, error = finish(process)
    step = checkpoint()["step"]
    assert status == 0 and step == log()[-1]["step"] + 1
    assert re.fullmatch(rf"stopped before step {step}; go on with: python .*--init_from=resume\n", error)


def test_ctrl_c_reaches_the_reader_of_the_pipe_too(here):
    """`train.py | tee log` and Ctrl-C: tee is gone first; the command that resumes is not lost."""
    command = [sys.executable, os.path.join(REPO, "train.py"), "tiny.py", "--max_iters=100000",
               "--log_every_n_steps=50000", "--eval_interval=50000"]
    with open("stderr.txt", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err)
    while b"step     0 | loss" not in process.stdout.readline():
        pass
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    status, error = finish(process)
    assert status == 0 and checkpoint()["step"] > 0
    assert re.fullmatch(r"stopped before step \d+; go on with: python .*--init_from=resume\n", error)


FULL_OUTPUT = """
update_ = train.update_
def update_on_a_full_disk_(model, optimizer, scaler, step):
    if step == 5:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return update_(model, optimizer, scaler, step)
train.update_ = update_on_a_full_disk_
"""


def test_a_disk_that_is_full_of_output(here, whole):
    """No room for what is printed is no hang-up: the run stops with a checkpoint, a line that says why, and
    a status that is not 0. Resumed, it ends as if nothing had been."""
    status, error = finish(launch("train.py tiny.py", fault=FULL_OUTPUT))
    first, second = error.splitlines()
    assert status == 2
    assert first.startswith("error: cannot write the standard output (No space left on device)")
    assert second.startswith(f"stopped before step {checkpoint()['step']}; go on with: ")
    assert checkpoint()["step"] in (6, 7)
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)


@pytest.mark.parametrize("script", [
    "train.py tiny.py --max_iters=2 --out_dir=new", "sample.py --device=cpu --max_new_tokens=2",
    "prepare.py --dataset=tiny.py --tokenizer=bytes --name=new --val_fraction=0.3",
    "experiments/plot.py --out_dir=out"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output, statuses, words", [
    ("> /dev/full", {2}, "error: cannot write the standard output (No space left on device)"),
    ("| true", {0, 141}, ""), (">&-", {0}, "")])
def test_output_that_goes_nowhere(trained, script, output, statuses, words, unbuffered):
    """A full disk is said in a line, a reader that has gone and a closed output in none. (A run of train.py
    has a line more when it has begun: how to go on.)"""
    command = f"{sys.executable} {REPO}/{script} {output}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", command], env=environment, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL, timeout=120, check=False)
    error = [line for line in done.stderr.splitlines() if not line.startswith("stopped before")]
    assert done.returncode in statuses and len(error) == bool(words), done.stderr
    assert not words or error[0].startswith(words)


def test_sigusr1_to_a_process(here, whole):
    """It finishes its step, writes a checkpoint and ends well, as a scheduler that requeues it expects."""
    process = launch("train.py tiny.py --eval_interval=100", fault="""
        update_ = train.update_
        def warned_update_(model, optimizer, scaler, step):
            if step == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            return update_(model, optimizer, scaler, step)
        train.update_ = warned_update_
        """)
    assert finish(process) == (0, "")
    assert checkpoint()["step"] == 6
    assert run("train.py tiny.py --init_from=auto") == 0
    assert state() == state(out_dir=whole)


def test_a_compiler_that_does_not_work_is_no_compiler(here, monkeypatch):
    """A compiler that is there and fails, here for want of a header, is found out at the start: the run says
    so in one line and goes on without torch.compile."""
    with open("g++", "w") as f:
        f.write("#!/bin/sh\necho 'fatal error: omp.h: No such file or directory' >&2\nexit 1\n")
    os.chmod("g++", 0o755)
    monkeypatch.setenv("CXX", os.path.abspath("g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.abspath("cache"))
    status, error = finish(launch("train.py tiny.py --compile=True"))
    assert status == 0 and "Traceback" not in error, error
    assert read("stdout.txt").count("running without torch.compile") == 1


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
