"""Runs, in this process: how they begin, what they print and keep, the data they are given, and how a signal
or a number that is none ends them. What a step computes is in test_sparsity.py, what out_dir holds in
test_checkpoints.py, what happens to runs in processes of their own in test_processes.py.
"""
import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoints
import kernels
import runs
from conftest import (
    REPO,
    assert_ended_alike,
    call_before,
    checkpoint,
    interrupted_run,
    log,
    read,
    run,
    state,
    tree,
    weights,
)


def test_one_update_is_the_shortest_run(here):
    """max_iters=1 trains, evaluates before and after, and ends."""
    assert run("train.py tiny.py --max_iters=1") == 0
    assert [record["step"] for record in log()] == [0, 0, 1]


def test_a_run_makes_max_iters_updates(here, monkeypatch):
    """Updates 0 .. max_iters - 1 are made, once each, and the checkpoint counts them."""
    steps = []
    call_before(monkeypatch, "update_", lambda model, optimizer, scaler, step: steps.append(step))
    assert run("train.py tiny.py --max_iters=7") == 0
    assert steps == list(range(7))
    assert checkpoint()["step"] == 7


def test_the_seed_alone_decides_the_weights(here, whole):
    """The same seed gives the same bytes twice, in weights, optimizer and log; another seed gives others."""
    assert run("train.py tiny.py --out_dir=same") == run("train.py tiny.py --out_dir=other --seed=2") == 0
    assert_ended_alike("same", whole)
    assert weights("other") != weights(whole)


@pytest.mark.parametrize("change", [
    "--eval_interval=5", "--eval_interval=100 --eval_iters=7", "--wandb_log=True", "--log_every_n_steps=0",
    "--log_gradients_every_n_steps=1 --log_weights_every_n_steps=1 --log_sparsity_every_n_steps=1"])
def test_watching_changes_nothing(here, whole, change, monkeypatch):
    """Evaluation and logging, whenever they happen, leave the weights as they are to the last bit."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run(f"train.py tiny.py {change}") == 0
    assert weights() == weights(whole)


def test_importing_train_has_no_side_effects(tmp_path):
    """It prints nothing, writes nothing and draws no random number."""
    code = "import torch; s = torch.get_rng_state(); import train; assert s.equal(torch.get_rng_state())"
    environment = os.environ | {"PYTHONPATH": REPO}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, b"", b"", [])


def test_some_of_torchruns_variables_are_no_torchrun(here, monkeypatch):
    """Schedulers leave such names in the environment: a run without torchrun is a single process."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run("train.py tiny.py --max_iters=1") == 0


def test_the_settings_of_a_run_are_printed_and_kept(here, monkeypatch, capsys):
    """Printed are those that are not the defaults. settings.json has all, with what the run was made by and
    on; outside of a git checkout it says so."""
    assert run("train.py tiny.py --max_iters=1 --activation=relu") == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("settings")]
    changed = dict(item.split("=") for item in line.split("defaults: ")[1].split(", "))
    assert changed.keys() - {"device"} == {
        "activation", "batch_size", "block_size", "compile", "d_head", "d_model", "dataset", "dropout",
        "eval_interval", "eval_iters", "gradient_accumulation_steps", "learning_rate", "max_iters",
        "n_layer", "target_l0_fraction", "use_bigram_table"}
    assert (changed["activation"], changed["max_iters"]) == ("'relu'", "1")
    kept = json.loads(read("out/settings.json"))
    assert kept["settings"] == checkpoint()["settings"] and kept["settings"]["activation"] == "relu"
    assert (kept["torch"], kept["numpy"]) == (torch.__version__, np.__version__)
    assert kept["python"] == sys.version.split()[0] and kept["device"]
    if kept["commit"] is not None:
        assert len(kept["commit"]) == 40 and type(kept["clean"]) is bool
    monkeypatch.setenv("PATH", "")
    with open("out/settings.json", "w") as f:
        f.write("nobody reads it")
    assert run("train.py tiny.py --init_from=resume --max_iters=2") == 0
    kept = json.loads(read("out/settings.json"))
    assert (kept["commit"], kept["clean"], kept["settings"]["max_iters"]) == (None, None, 2)


def test_settings_of_a_checkout_name_its_commit(tmp_path, monkeypatch):
    """And whether what ran is what was committed."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    made = runs.Run({"out_dir": str(tmp_path), "x": 1}, runs.this_process("cpu"), None, None, None, None,
                    log=checkpoints.Log(str(tmp_path), 0, evaluates=True))

    def kept():
        runs.write_settings(made)
        return json.loads(read(tmp_path / "settings.json"))

    assert (kept()["commit"], kept()["clean"]) == (None, None)
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m one"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, check=True)
    assert (kept()["commit"], kept()["clean"]) == (head.stdout.decode().strip(), False)
    (tmp_path / ".gitignore").write_text("*")
    (tmp_path / ".git/info/exclude").write_text("*")
    assert kept()["clean"] is True and kept()["settings"] == {"out_dir": str(tmp_path), "x": 1}


def test_fast_kernels_change_no_choice(here, whole, capsys):
    """Without them the definitions make the same choices: the run ends at the same bytes, as with dropout
    its attention is the definition anyway. Samples are the same, too."""
    assert run("train.py tiny.py --fast_kernels=False --out_dir=plain") == 0
    assert weights("plain") == weights(whole)
    capsys.readouterr()
    texts = []
    for flag in ("True", "False"):
        command = f"sample.py --out_dir=plain --temperature=0 --device=cpu --fast_kernels={flag}"
        assert run(command + " --num_samples=1 --max_new_tokens=30") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("script", ["train.py tiny.py --max_iters=1", "sample.py --max_new_tokens=1"])
@pytest.mark.parametrize("fast", [True, False])
def test_one_setting_switches_all_kernels(trained, script, fast, monkeypatch):
    """In training and in sampling."""
    called = []
    for name in ("abs_topk", "sink_attention", "keep_survivors_", "use_sparse_linears_"):
        call_before(monkeypatch, name, lambda *arguments, name=name: called.append(name), owner=kernels)
    assert run(f"{script} --device=cpu --fast_kernels={fast}") == 0
    expected = {"abs_topk", "sink_attention",
                "keep_survivors_" if script.startswith("train") else "use_sparse_linears_"}
    assert set(called) == (expected if fast else set())


@pytest.mark.parametrize("minutes, steps", [
    (0, {0, 4, 8, 12}), (1e-9, set(range(13))), (60, {0, 4, 8, 12})])
def test_checkpoints_by_time(here, whole, monkeypatch, minutes, steps):
    """Besides those of evaluations there is one when `checkpoint_minutes` have passed, from which the run
    goes on to the same end."""
    saved = []
    call_before(monkeypatch, "save", lambda run, name: saved.append(run.step), owner=runs.Run)
    assert run(f"train.py tiny.py --checkpoint_minutes={minutes}") == 0
    assert set(saved) == steps
    assert_ended_alike("out", whole)


def test_the_time_is_that_since_the_last_checkpoint(readings):
    """Of any kind: the loop sets it to 0 at an evaluation. All ranks count the same seconds."""
    add(readings, [0], seconds=100)
    readings.read()
    assert not readings.ask_for_checkpoint(2)
    add(readings, [1], seconds=30)
    readings.read()
    assert not readings.ask_for_checkpoint(0) and readings.ask_for_checkpoint(2)
    assert not readings.ask_for_checkpoint(2)


def test_sigusr1_is_a_request_to_stop(readings):
    """As schedulers send it before the time is up; a second one is none to end at once."""
    for step in range(2):
        os.kill(os.getpid(), signal.SIGUSR1)
        readings.add(step, torch.tensor(1.0), torch.tensor(2.0))
        assert readings.read() == (1.0, 2.0, True)


def other_data():
    """Prepare data/tiny anew, with the same tokenizer, from the text of this test."""
    shutil.copy("data/tiny/tokenizer.json", "tokenizer.json")
    source = os.path.abspath(__file__)
    flags = "--name=tiny --tokenizer=tokenizer.json --val_fraction=0.3"
    assert run(f"prepare.py --dataset={source} {flags}") == 0


def test_a_run_that_goes_on_with_other_data_says_so(here, capsys):
    """The checkpoint names the data that it was trained on; best.pt, which is of that, begins anew."""
    assert interrupted_run("train.py tiny.py", 5) == 0
    meta = json.loads(read("data/tiny/meta.json"))
    assert checkpoint()["data"] == {"train": meta["train"], "val": meta["val"]}
    best, tokens = state("best.pt"), meta["train"]["tokens"]
    assert interrupted_run("train.py --init_from=resume", 6) == 0
    assert "data of the checkpoint" not in capsys.readouterr().out
    other_data()
    capsys.readouterr()
    assert interrupted_run("train.py --init_from=resume", 7) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if "is not the data of the checkpoint" in x]
    now = json.loads(read("data/tiny/meta.json"))["train"]["tokens"]
    assert f"{tokens:,}" in line and f"{now:,}" in line
    assert state("best.pt", "out/previous-1") == best and not os.path.exists("out/best.pt")
    assert run("train.py --init_from=resume") == 0
    assert "data of the checkpoint" not in capsys.readouterr().out and os.path.exists("out/best.pt")


def test_older_data_and_checkpoints_said_less(here, capsys):
    """A checkpoint that names no data, and data whose bins have no sha256, are none to complain of."""
    assert interrupted_run("train.py tiny.py", 5) == 0
    saved = checkpoint()
    del saved["data"]["train"]["sha256"], saved["data"]["val"]["sha256"]
    torch.save(saved, "out/ckpt.pt")
    assert interrupted_run("train.py --init_from=resume", 6) == 0
    saved = checkpoint()
    del saved["data"], saved["l0"]
    torch.save(saved, "out/ckpt.pt")
    meta = json.loads(read("data/tiny/meta.json"))
    del meta["train"]["sha256"], meta["val"]["sha256"]
    with open("data/tiny/meta.json", "w") as f:
        json.dump(meta, f)
    assert run("train.py --init_from=resume") == 0
    assert "data of the checkpoint" not in capsys.readouterr().out and not os.path.exists("out/previous-1")


@pytest.mark.parametrize("size", [runs.CHEAP, 0])
def test_bins_are_what_was_prepared(here, monkeypatch, capsys, size):
    """Their sha256 is compared where that is cheap: a token that became another one, of the vocabulary, is
    noticed. Larger bins take too long for each start."""
    monkeypatch.setattr(runs, "CHEAP", size)
    tokens = np.memmap("data/tiny/train.bin", "<u2", "r+")
    tokens[1000] ^= 1
    tokens.flush()
    assert run("train.py tiny.py --max_iters=1") == (2 if size else 0)
    assert ("train.bin is not the file" in capsys.readouterr().err) == bool(size)


def test_bins_that_may_not_be_read(here, monkeypatch, capsys):
    """Those of another user: one line."""
    def refuse(path, **keywords):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(np, "memmap", refuse)
    assert run("train.py tiny.py") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot read data/tiny/train.bin (Permission denied)")


def test_other_tokenizers_are_told_with_the_remedy_that_works(trained, capsys):
    """The same one for a run that goes on and for those who measure it: to prepare with the run's."""
    shutil.rmtree("data/tiny")
    shutil.copytree("data/other", "data/tiny")
    assert run("train.py --init_from=resume") == 2
    with pytest.raises(SystemExit):
        runs.load_run("out", "ckpt.pt")
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "--tokenizer=out/tokenizer.json" in first


def test_sigint_writes_one_checkpoint_and_says_how_to_resume(here, monkeypatch, capsys):
    """After SIGINT the step is finished, one checkpoint written, and the command to resume printed."""
    saves = []
    call_before(monkeypatch, "save", lambda run, name: saves.append(name), owner=runs.Run)
    assert interrupted_run("train.py tiny.py --out_dir='two words' --eval_interval=100", 5) == 0
    assert saves == ["best.pt", "ckpt.pt", "ckpt.pt"]  # at the evaluation before step 0, and now
    assert checkpoint(out_dir="two words")["step"] == 6
    launcher, *command = shlex.split(capsys.readouterr().out.splitlines()[-1].split("go on with: ")[1])
    assert launcher == "python"
    assert run(shlex.join(command)) == 0
    assert checkpoint(out_dir="two words")["step"] == 12


@pytest.mark.parametrize("seconds, step, end", [
    (5, 0, 1), (5, 5, 8), (5, 7, 8), (5, 11, 12), (0, 5, 6), (0, 7, 8)])
def test_a_signal_is_obeyed_where_nothing_is_logged(here, whole, monkeypatch, seconds, step, end):
    """Steps take milliseconds here: the run stops within the five seconds, which is before its next
    evaluation, and at once if none may pass; resumed, it ends like one that was not stopped."""
    monkeypatch.setattr(runs.Readings, "SECONDS", seconds)
    assert interrupted_run("train.py tiny.py --log_every_n_steps=100", step) == 0
    assert checkpoint()["step"] == end
    assert run("train.py --init_from=resume") == 0
    assert state() == state(out_dir=whole) and state("best.pt") == state("best.pt", whole)


class TwoRanks:
    """A process whose other rank has the same numbers but for what is added to its stop signal."""
    world_size, other_stops = 2, 0

    def sum(self, stopping, seconds, *numbers):
        values = [2 * stopping + self.other_stops, 2 * seconds, *(2 * x for x in numbers)]
        return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def readings(monkeypatch):
    """Readings of one of two ranks, whose clock is at readings.now."""
    float16 = torch.amp.GradScaler("cpu", init_scale=1.0)
    made = runs.Readings(runs.Run({"out_dir": "out"}, TwoRanks(), None, None, None, float16))
    made.now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    made.last_time = made.now
    yield made
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def add(readings, steps, seconds, loss=1.0, rms=2.0):
    for step in steps:
        assert not readings.are_due()
        readings.add(step, torch.tensor(loss), torch.tensor(rms))
        readings.now += seconds


def test_numbers_are_read_about_every_five_seconds(readings):
    """The first update at once; then after as many as took five seconds by the pace of the last, at least
    one; what is read is the mean over the ranks of the last update."""
    add(readings, [0], seconds=60)
    assert readings.are_due() and readings.read() == (1.0, 2.0, False)
    add(readings, [1], seconds=0.5, loss=3.0)
    assert readings.are_due() and readings.read() == (3.0, 2.0, False)
    for _ in range(2):
        add(readings, range(10), seconds=0.5)
        assert readings.are_due()
        readings.read()
    add(readings, range(3), seconds=2.0)
    readings.read()  # in between, as something is logged
    add(readings, range(2), seconds=1.0)
    assert readings.are_due()


def test_a_signal_of_another_rank_is_heard_at_the_next_reading(readings):
    """And one of this rank's own."""
    readings.process.other_stops = 1
    add(readings, [0], seconds=1)
    assert readings.read() == (1.0, 2.0, True)
    readings.process.other_stops = 0
    readings.add(1, torch.tensor(1.0), torch.tensor(2.0))
    os.kill(os.getpid(), signal.SIGTERM)
    assert readings.read() == (1.0, 2.0, True)


@pytest.mark.parametrize("loss, rms", [(math.nan, 2.0), (math.inf, math.inf), (-math.inf, 2.0)])
def test_a_loss_that_is_none_is_found_among_those_not_read(readings, capsys, loss, rms):
    """Though the losses after it are numbers again: the message names its step. An infinite gradient alone
    is float16's overflow, of which there are some; in any other precision it is as bad."""
    add(readings, [0], seconds=0.01)
    readings.read()
    add(readings, [1, 2], seconds=0.01, rms=math.inf)
    readings.read()
    add(readings, [3], seconds=0.01)
    add(readings, [4], seconds=0.01, loss=loss, rms=rms)
    add(readings, [5], seconds=0.01)
    with pytest.raises(SystemExit) as ended:
        readings.read()
    assert ended.value.code == 1 and f"at step 4 the loss is {loss}" in capsys.readouterr().err
    readings.unread, readings.overflows = [], False
    add(readings, [6], seconds=0.01, rms=math.inf)
    with pytest.raises(SystemExit):
        readings.read()
    assert "at step 6 the loss is 1.0 and the gradients' RMS inf" in capsys.readouterr().err


@pytest.mark.parametrize("allocate", [
    lambda *_: torch.empty(2**56), lambda *_: np.empty(2**56),
    lambda *_: torch.cuda.caching_allocator_alloc(2**56) if torch.cuda.is_available() else full_gpu()],
    ids=["torch", "numpy", "gpu"])
def test_out_of_memory(here, allocate, monkeypatch, capsys):
    """A run for which the memory of CPU or GPU is too small ends with one line and status 2: what to halve
    and what to double. Any other error stays what it is."""
    call_before(monkeypatch, "gradients_of_step", allocate)
    assert run("train.py tiny.py") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory") and "--batch_size" in line
    call_before(monkeypatch, "gradients_of_step", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run("train.py tiny.py")


def full_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 PiB.")


@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
def test_a_number_that_is_none_stops_the_run(here, where, monkeypatch, capsys):
    """A loss or a gradient that is not finite, or weights that make the evaluation so, stop the run.
    The message names the step and the last good checkpoint, which keeps its bytes."""
    before = {}

    def spoil(model, optimizer, scaler, step):
        if step == 5:
            before.update(tree("out"))
        if step == 5 and where == "gradient":
            model.transformer.ln_f.weight.grad[3] = math.inf
        if step == {"loss": 4, "weights": 7}.get(where):
            model.transformer.ln_f.weight.data[3] = math.nan

    call_before(monkeypatch, "update_", spoil)
    status = run("train.py tiny.py")
    assert status not in (0, None)
    [line] = capsys.readouterr().err.splitlines()
    step = {"loss": 5, "gradient": 5, "weights": 8}[where]
    assert line.startswith("error: ") and f"step {step} " in line and os.path.join("out", "ckpt.pt") in line
    assert tree("out")["ckpt.pt"] == before["ckpt.pt"] and tree("out")["best.pt"] == before["best.pt"]


@pytest.mark.parametrize("step", range(4, 9))
@pytest.mark.parametrize("signal_before", [None, 0, 1])
def test_a_number_that_is_read_late_is_not_saved(here, step, signal_before, monkeypatch, capsys):
    """Where nothing is logged: the next step has begun when a NaN is read, and a signal may have come at
    that step or the one before; but the checkpoint is still that of the last evaluation."""
    def spoil(model, optimizer, scaler, now):
        if signal_before is not None and now == step - signal_before:
            os.kill(os.getpid(), signal.SIGINT)
        if now == step:
            model.transformer.ln_f.weight.grad[3] = math.nan

    call_before(monkeypatch, "update_", spoil)
    status = run("train.py tiny.py --log_every_n_steps=100")
    if signal_before and step in (4, 8):  # step - 1 is read at once, and the run stops there
        assert (status, checkpoint()["step"]) == (0, step)
    else:
        assert status == 1 and f"at step {step} the loss is" in capsys.readouterr().err
        assert checkpoint()["step"] == step // 4 * 4
    for name in ("ckpt.pt", "best.pt"):
        assert all(w.isfinite().all() for w in checkpoint(name)["model"].values())


@pytest.mark.parametrize("flags", ["--learning_rate=1e17", "--learning_rate=1e10 --eval_interval=1"])
def test_a_run_that_explodes_keeps_a_finite_checkpoint(here, flags):
    """Whatever the learning rate does to the weights, the checkpoint that is left is finite."""
    run(f"train.py tiny.py {flags}")
    assert all(w.isfinite().all() for w in checkpoint()["model"].values())
