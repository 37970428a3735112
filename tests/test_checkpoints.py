"""What out_dir holds, of runs in this process: what a checkpoint keeps and how a run goes on from it,
whatever it was that ended it; how a new run takes its place there; and what a full disk leaves.
"""
import errno
import fcntl
import io
import json
import math
import os
import random
import resource
import shutil

import numpy as np
import pytest
import torch

import checkpoints
import measures
import train
from conftest import (
    assert_ended_alike,
    at_step,
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


@pytest.mark.parametrize("step", [0, 5, 7, 11])
def test_resume_equals_uninterrupted(here, whole, step):
    """A run stopped by a signal and resumed, with no flag but where it is, ends like one never stopped:
    weights, optimizer, best model and log, in which no record is lost or doubled."""
    assert interrupted_run("train.py tiny.py", step) == 0
    assert checkpoint()["step"] == step + 1
    assert run("train.py --init_from=resume --out_dir=out") == 0
    assert_ended_alike("out", whole)


def test_resume_after_a_crash(here, whole):
    """A run that broke off between two checkpoints goes on from the first of them, to the same end; steps
    that are made twice are logged once."""
    def crash():
        raise ConnectionError("power")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConnectionError):
        call_before(patch, "update_", at_step(7, crash))
        run("train.py tiny.py")
    assert (checkpoint()["step"], log()[-1]["step"]) == (4, 6)
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)


def test_interrupted_at_every_turn(here, whole):
    """Any number of interruptions and resumptions changes nothing."""
    assert interrupted_run("train.py tiny.py", 0) == 0
    for step in range(1, 12):
        assert interrupted_run("train.py --init_from=resume", step) == 0
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)


def test_resume_after_a_torn_log_line(here, whole):
    """A log whose last line was cut by a loss of power is continued as if the line had never been there."""
    assert interrupted_run("train.py tiny.py", 5) == 0
    with open("out/log.jsonl", "a") as f:
        f.write('{"step": 6, "lo')
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)


def test_resume_takes_settings_from_the_checkpoint_unless_given(here):
    """Settings that are left out are the interrupted run's, not the defaults; a flag still wins."""
    assert interrupted_run("train.py tiny.py --weight_decay=0.3", 5) == 0
    assert run("train.py --init_from=resume --eval_iters=3") == 0
    saved = checkpoint()["settings"]
    assert (saved["weight_decay"], saved["max_iters"], saved["eval_iters"]) == (0.3, 12, 3)
    assert saved["dataset"] == "tiny" and saved["compile"] is False


def test_resuming_a_finished_run_changes_nothing(here):
    """A run that is complete makes no more updates."""
    assert run("train.py tiny.py") == 0
    before = state()
    assert run("train.py tiny.py --init_from=resume") == 0
    assert state() == before


def test_a_finished_run_that_goes_on_keeps_its_model(here, capsys):
    """More steps on resume raise L0 and lr: one line says from where to where, and the model that was
    finished stays, in a file of its own that a new run in the same out_dir moves aside with the others."""
    assert run("train.py tiny.py") == 0
    finished, best = state(), state("best.pt")
    before = f"L0 {train.l0_at(11):.4g}, lr {train.lr_at(11):.2e}"
    capsys.readouterr()
    assert run("train.py --init_from=resume --max_iters=48 --eval_iters=3") == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("changed since")]
    now = f"L0 {train.l0_at(11):.4g}, lr {train.lr_at(11):.2e}"
    assert f"eval_iters=3, max_iters=48 ({before} -> {now})" in line and before != now
    assert os.path.join("out", "finished-12.pt") in line and "best.pt" in line
    assert state("finished-12.pt") == finished and state("best.pt") != best  # as L0 is as low again
    assert run("train.py tiny.py --max_iters=4") == 0
    assert os.path.exists("out/previous-1/finished-12.pt") and not os.path.exists("out/finished-12.pt")


def test_the_last_evaluation_of_a_finished_run_stays_logged(here):
    """Also where the run that goes on does not evaluate, as the interval does not divide its length."""
    assert run("train.py tiny.py --max_iters=6") == 0
    before = [record for record in log() if "val/loss" in record]
    assert run("train.py --init_from=resume --max_iters=12") == 0
    after = [record for record in log() if "val/loss" in record]
    assert [record["step"] for record in after] == [0, 4, 6, 8, 12] and after[:3] == before


def test_the_log_is_json_whatever_is_measured(tmp_path):
    """Gradients of float16 may overflow; JSON has no word for that but null."""
    log = checkpoints.Log(str(tmp_path), 0, evaluates=True)
    log.write({"step": 3, "gradients/norm_max": math.inf, "a": math.nan, "b": 1})
    with open(tmp_path / "log.jsonl") as f:
        assert f.read() == '{"step": 3, "gradients/norm_max": null, "a": null, "b": 1}\n'


@pytest.mark.parametrize("text", [
    "", '{"step": 1, "a": 2.5}\n', '{"step": 1}\n{"step": 2}\n{"step": 3, "lo', '{"step": 1}\n{"step": 2}'])
def test_a_log_is_read_without_the_line_that_was_torn(tmp_path, text):
    """All whole lines are records; what a killed run began to write is none."""
    (tmp_path / "log.jsonl").write_text(text)
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert checkpoints.read_log(tmp_path / "log.jsonl") == [json.loads(line) for line in whole]


@pytest.mark.parametrize("text", [None, '{"loss": 1}\n', "[1, 2}\n", '{"step": "1"}\n', b"\xff}\n",
                                  "[" * 100_000 + "}\n", '["step"]}\n'])
def test_a_log_that_is_none_is_refused(tmp_path, text, capsys):
    """A file that is not there, or a line that is no record with a step, ends the script with one line."""
    if text is not None:
        (tmp_path / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        checkpoints.read_log(tmp_path / "log.jsonl")
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and str(tmp_path / "log.jsonl") in line and "--out_dir" in line


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """Its bytes are those of the text; a disk that gets full leaves the old file, and nothing beside it."""
    path = str(tmp_path / "a.json")
    for text in ("one\r\n", "two é\n"):
        checkpoints.write_atomically(path, text)
        with open(path, "rb") as f:
            assert f.read() == text.encode() and os.listdir(tmp_path) == ["a.json"]
    monkeypatch.setattr(os, "fsync", refuse_to_sync)
    with pytest.raises(SystemExit) as ended:
        checkpoints.write_atomically(path, "three")
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and path in line
    assert read(path) == "two é\n" and os.listdir(tmp_path) == ["a.json"]


def test_a_checkpoint_sets_settings_only(trained, monkeypatch):
    """What a checkpoint names beside this script's settings replaces no function of it and is not added."""
    saved, found = checkpoint(), []
    saved["settings"] |= {"l0_at": 1, "surprise": 2}
    torch.save(saved, "out/ckpt.pt")
    call_before(monkeypatch, "update_", lambda *arguments: found.append(hasattr(train, "surprise")))
    assert run("train.py --init_from=resume") == 0
    assert found == [False] * 6 and callable(train.l0_at)


def test_a_checkpoint_names_what_it_holds(trained):
    """Adam's moments have the names of their parameters; what earlier checkpoints held is there."""
    saved = checkpoint()
    names = [name for name, _ in checkpoints.model_of(saved).named_parameters()]
    assert list(saved["optimizer"]["state"]) == names
    assert all(moments.keys() == {"step", "exp_avg", "exp_avg_sq"} and moments["step"] == 6
               for moments in saved["optimizer"]["state"].values())
    assert saved["torch"] == torch.__version__


def by_number(saved):
    """A checkpoint as it was before moments had names."""
    moments = dict(enumerate(saved["optimizer"]["state"].values()))
    groups = [{"lr": 0.5, "betas": (0.1, 0.1), "eps": 9.0, "params": list(moments)}]
    saved["optimizer"] = {"state": moments if saved["step"] else {}, "param_groups": groups}


@pytest.mark.parametrize("step", [5, None], ids=["step 5", "before the first update"])
def test_a_checkpoint_of_numbered_moments_goes_on(here, whole, step, monkeypatch):
    """As earlier versions wrote it, also before the first update, when there were none."""
    if step is None:
        with monkeypatch.context() as patch, pytest.raises(ConnectionError):
            call_before(patch, "update_", at_step(0, lambda: (_ for _ in ()).throw(ConnectionError)))
            run("train.py tiny.py")
    else:
        assert interrupted_run("train.py tiny.py", step) == 0
    saved = checkpoint()
    by_number(saved)
    torch.save(saved, "out/ckpt.pt")
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)


GAIN, HEAD = "transformer.ln_f.weight", "lm_head.weight"


SPOILT_MOMENTS = {
    "one is of another shape": lambda m: m[GAIN].update(exp_avg=torch.zeros(3)),
    "one has no second moment": lambda m: m[GAIN].pop("exp_avg_sq"),
    "one is no tensor": lambda m: m[GAIN].update(exp_avg=[0.0] * 16),
    "one counts its steps in a vector": lambda m: m[GAIN].update(step=torch.zeros(2)),
    "two are exchanged": lambda m: m.update({GAIN: m[HEAD], HEAD: m[GAIN]}),
    "one is missing": lambda m: m.pop(GAIN),
    "one is None": lambda m: m.update({GAIN: None}),
    "all are missing": lambda m: m.clear(),
    "one is too many": lambda m: m.update({"new.weight": m[GAIN]}),
}


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("spoil", SPOILT_MOMENTS)
def test_moments_that_do_not_fit_are_refused_by_name(trained, spoil, numbered, capsys):
    """By the names of their parameters or, as they once were, by number: one line names the parameter."""
    saved = checkpoint()
    SPOILT_MOMENTS[spoil](saved["optimizer"]["state"])
    if numbered:
        names = list(checkpoints.model_of(saved).state_dict())
        moments = {names.index(name) if name in names else 99: found
                   for name, found in saved["optimizer"]["state"].items()}
        saved["optimizer"] = {"state": moments, "param_groups": []}
    torch.save(saved, "out/ckpt.pt")
    before = tree("out")
    assert run("train.py --init_from=resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    named = {"one is too many": "99" if numbered else "new.weight", "two are exchanged": ""}.get(spoil, "")
    assert line.startswith("error: ") and "moments of " in line and named in line
    assert spoil in ("one is too many", "all are missing", "two are exchanged") or GAIN in line
    assert tree("out") == before


def test_a_parameter_that_no_update_reaches_has_no_moments(here, monkeypatch):
    """A fork may have one: its run is saved and goes on."""
    def forget(model, optimizer, scaler, step):
        model.transformer.h[0].attn.sink_logit.grad = None

    call_before(monkeypatch, "update_", forget)
    assert interrupted_run("train.py tiny.py", 5) == 0
    assert checkpoint()["optimizer"]["state"]["transformer.h.0.attn.sink_logit"] == {}
    assert run("train.py --init_from=resume") == 0
    assert checkpoint()["step"] == 12


@pytest.mark.parametrize("source", ["out/base", "out/base/best.pt"])
def test_a_new_run_begins_with_the_weights_of_another(here, source):
    """A dense run is made sparse in an out_dir of its own, from step 0 and with a fresh optimizer; the first
    run keeps its bytes. The data may be other data, of the same tokenizer."""
    assert run("train.py tiny.py --out_dir=out/base --target_l0_fraction=1 --max_iters=4") == 0
    before, command = tree("out/base"), f"train.py tiny.py --init_from={source} --out_dir=out/sparse"
    assert run(f"{command} --learning_rate=0 --max_iters=1 --target_l0_fraction=1") == 0
    assert weights("out/sparse") == weights("out/base") and checkpoint(out_dir="out/sparse")["step"] == 1
    assert run(command) == 0
    assert log("out/sparse")[-1]["step"] == 12 and tree("out/base") == before
    assert run(f"sample.py --init_from={source} --device=cpu --num_samples=1 --max_new_tokens=3") == 0
    assert run(f"{command} --dataset=other") == run(f"{command} --n_layer=2") == 2
    assert run(f"{command} --activation_topk_fraction=0") == 2
    assert run(f"{command} --activation_topk_fraction=0.5 --dropout=0.1 --learning_rate=0 --max_iters=1 "
               "--target_l0_fraction=1") == 0  # of what has no parameters the model may have another
    config = checkpoints.model_of(checkpoint(out_dir="out/sparse")).config
    assert weights("out/sparse") == weights("out/base") and not before.keys() - tree("out/base").keys()
    assert (config.activation_topk_fraction, config.dropout, config.n_layer) == (0.5, 0.1, 1)


def test_a_new_run_moves_an_old_one_aside(here):
    """Training into an out_dir that holds a run keeps that run's files, byte for byte; so does a third."""
    assert run("train.py tiny.py --max_iters=4") == 0
    for n in (1, 2):
        before = {name: digest for name, digest in tree("out").items() if not name.startswith("previous-")}
        del before["lock"]  # which is the folder's, not the run's
        assert run(f"train.py tiny.py --seed={n + 1} --max_iters=4") == 0
        assert tree(f"out/previous-{n}") == before


@pytest.mark.parametrize("lost", ["ckpt.pt", "log.jsonl", "best.pt"])
def test_what_is_left_of_a_run_is_moved_aside(here, lost):
    """Also when one of its files is gone; and with it what circuit.py and the plot made of it."""
    assert run("train.py tiny.py --max_iters=4") == 0
    os.makedirs("out/circuits/quotes")
    for name in ("circuits/quotes/circuit.json", "curves.png", "finished-3.pt"):
        with open(f"out/{name}", "w") as f:
            f.write(name)
    os.remove(f"out/{lost}")
    before = tree("out")
    del before["lock"]  # which is the folder's, not the run's
    assert run("train.py tiny.py --seed=2 --max_iters=4") == 0
    assert tree("out/previous-1") == before
    assert {name.split("/")[0] for name in tree("out")} == {
        "ckpt.pt", "best.pt", "log.jsonl", "settings.json", "tokenizer.json", "lock", "previous-1"}


@pytest.mark.parametrize("moves", range(11))
def test_a_start_that_is_killed_between_two_moves_loses_nothing(here, monkeypatch, moves):
    """After any number of files were moved all bytes of the old run are there; its checkpoint stays until
    the others have been moved, and a new start brings out_dir in order."""
    class Killed(BaseException):
        pass

    assert run("train.py tiny.py --max_iters=4") == 0
    before, left = tree("out"), [moves]
    replace = os.replace

    def kill_later(source, target):
        if not source.endswith(".tmp"):  # no write of a file, but a move
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill_later)
        patch.setattr(shutil, "rmtree", lambda *arguments, **keywords: None)  # which a kill prevents too
        if moves < 10:
            with pytest.raises(Killed):
                run("train.py tiny.py --seed=2 --max_iters=4")
        else:
            assert run("train.py tiny.py --seed=2 --max_iters=4") == 0
    assert set(before.values()) <= set(tree("out").values())
    moved = os.listdir("out/previous-1") if os.path.exists("out/previous-1") else []
    assert "ckpt.pt" not in moved or len(moved) == 5  # the last of the old run's files
    if os.path.exists("out/ckpt.pt") and moves < 10:
        shutil.copytree("out", "copy")
        assert checkpoint()["settings"]["seed"] == 1337
        assert run("train.py --init_from=resume --out_dir=copy") == 0
    assert run("train.py tiny.py --seed=3 --max_iters=4") == 0
    assert set(before.values()) <= set(tree("out").values()) and not os.path.exists("out/.starting")
    assert checkpoint()["settings"]["seed"] == 3 and log()[-1]["step"] == 4


def full_from_the_start(patch):
    patch.setattr(torch, "save", fill_disk)


def no_memory(patch):
    call_before(patch, "estimate_loss", lambda *_: np.empty(2**56), owner=measures)


def no_number(patch):
    losses = dict.fromkeys(("train/loss", "val/loss", "val/bits_per_byte"), math.nan)
    patch.setattr(measures, "estimate_loss", lambda *_: losses)


def no_wandb(patch):
    patch.setattr(checkpoints.Log, "start_wandb", lambda *_: checkpoints.fail("wandb: no key"))


@pytest.mark.parametrize("breaks", [full_from_the_start, no_memory, no_number, no_wandb])
def test_a_start_that_fails_leaves_the_run_that_was_there(here, monkeypatch, capsys, breaks):
    """Until the first checkpoint of the new run is whole, all of the old one is where it was."""
    assert run("train.py tiny.py --max_iters=4") == 0
    before = tree("out")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        breaks(patch)
        assert run("train.py tiny.py --seed=2 --wandb_log=True" if breaks is no_wandb else
                   "train.py tiny.py --seed=2") in (1, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert tree("out") == before and "whole" not in line and "is out/ckpt.pt" not in line
    assert run("train.py --init_from=resume --max_iters=8") == 0


@pytest.mark.parametrize("breaks, words", [
    (full_from_the_start, ["No space left on device", "no checkpoint yet", "out_dir"]),
    (lambda patch: call_before(patch, "estimate_loss", lambda *_: shutil.rmtree("out"), owner=measures),
     ["No such file", "no checkpoint yet"])], ids=["full", "vanished"])
def test_a_first_checkpoint_that_cannot_be_written(here, monkeypatch, capsys, breaks, words):
    """The line names the cause, and no checkpoint that is not there."""
    breaks(monkeypatch)
    assert run("train.py tiny.py") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words) and "resume" not in line, line


def test_a_checkpoint_that_is_missing_is_looked_for_in_what_was_moved(here, capsys):
    """The error says where an earlier run is."""
    os.makedirs("out/previous-1")
    assert run("train.py --init_from=resume") == run("sample.py") == 2
    assert capsys.readouterr().err.count("an earlier run is in out/previous-1") == 2


@pytest.mark.parametrize("name, start", [("", "scratch"), ("best.pt", "scratch"), ("ckpt.pt", "resume")])
def test_auto_looks_for_the_checkpoint_to_go_on_from(tmp_path, name, start):
    """A folder alone, or what is left of a run without it, is none."""
    (tmp_path / name).touch()
    assert checkpoints.chosen_start("auto", tmp_path) == start
    assert checkpoints.chosen_start("scratch", tmp_path) == "scratch"


def test_what_is_no_file_of_a_run_stays(tmp_path):
    """Though its name begins as one does."""
    for name in ("ckpt.pt", "best.pt.mine", "circuits_of_mine"):
        (tmp_path / name).touch()
    aside = checkpoints.move_aside(tmp_path)
    assert os.listdir(aside) == ["ckpt.pt"]
    assert set(os.listdir(tmp_path)) == {"previous-1", "best.pt.mine", "circuits_of_mine"}


def test_a_start_has_its_place_and_leaves_no_folder(tmp_path):
    folder = checkpoints.start_out_dir(tmp_path, "{}")
    assert os.listdir(tmp_path) == [os.path.basename(folder)]
    checkpoints.settle(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_auto_goes_on_if_there_is_a_run(here, whole):
    """One command for a first start and for each later one; an earlier run is not moved aside."""
    command = "train.py tiny.py --init_from=auto"
    assert interrupted_run(command, 5) == interrupted_run(command, 8) == run(command) == run(command) == 0
    assert_ended_alike("out", whole)
    assert not os.path.exists("out/previous-1")
    assert checkpoint()["settings"]["init_from"] == "resume"


@pytest.mark.parametrize("flag, shared", [("", True), ("--wandb_new_run=True", False)])
def test_a_copied_run_may_have_a_wandb_run_of_its_own(here, monkeypatch, flag, shared):
    """Else it goes on in that of the original. The setting is of one command: what goes on from there has
    the new run."""
    asked = []

    def start(log, settings):
        asked.append(None if settings["wandb_new_run"] else log.wandb_id)
        log.wandb_id = asked[-1] or f"id{len(asked)}"

    monkeypatch.setattr(checkpoints.Log, "start_wandb", start)
    assert run("train.py tiny.py --max_iters=4 --wandb_log=True") == 0
    shutil.copytree("out", "copy")
    assert run(f"train.py --init_from=resume --out_dir=copy --max_iters=8 {flag}") == 0
    assert run("train.py --init_from=resume --out_dir=copy --max_iters=12") == 0
    assert asked == [None, "id1" if shared else None, "id1" if shared else "id2"]
    assert checkpoint()["wandb_id"] == "id1"


def test_out_dir_is_claimed_by_one_at_a_time(tmp_path):
    """A second claim of the same folder ends the script, until the first is given up."""
    with checkpoints.claim_out_dir(tmp_path), pytest.raises(SystemExit), checkpoints.claim_out_dir(tmp_path):
        pytest.fail("claimed twice")
    with checkpoints.claim_out_dir(tmp_path):
        pass


def test_a_folder_of_data_is_no_out_dir(here):
    """Training never writes its tokenizer.json over that of prepared data."""
    before = read("data/tiny/tokenizer.json")
    assert run("train.py tiny.py --dataset=other --out_dir=data/tiny") == 2
    assert read("data/tiny/tokenizer.json") == before


def test_two_runs_do_not_share_an_out_dir(here, capsys):
    """While one run writes there, another ends with one line, and changes nothing; then it may go on."""
    assert run("train.py tiny.py --max_iters=4") == 0
    before = tree("out")
    with open("out/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("train.py tiny.py --seed=2") == run("train.py --init_from=resume --max_iters=8") == 2
    assert capsys.readouterr().err.count("error: another run is writing") == 2
    assert tree("out") == before
    assert run("train.py --init_from=resume --max_iters=8") == 0


@pytest.mark.parametrize("target, losses, best_step", [
    (1.0, [3.0, 2.0, 2.0, 2.5], 4),  # of equals the first
    (1.0, [5.0, 3.0, 4.0, 3.5], 4), (1.0, [5.0, 4.0, 3.5, 3.0], 12),
    (0.25, [5.0, 1.0, 4.0, 4.5], 8), (0.25, [5.0, 1.0, 4.0, 3.5], 12)])
def test_best_checkpoint(here, monkeypatch, target, losses, best_step):
    """best.pt has the lowest val loss of all evaluations at the lowest L0, before or after a resume."""
    scripted = iter(losses)

    def evaluate(*arguments):
        return dict.fromkeys(("train/loss", "val/loss", "val/bits_per_byte"), next(scripted))

    monkeypatch.setattr(measures, "estimate_loss", evaluate)
    assert interrupted_run(f"train.py tiny.py --target_l0_fraction={target}", 6) == 0
    assert run("train.py --init_from=resume") == 0
    best, last = checkpoint("best.pt"), checkpoint()
    assert (best["step"], last["step"]) == (best_step, 12)
    assert best["best_val_loss"] == last["best_val_loss"] == losses[best_step // 4]
    assert log()[-1]["val/best_loss"] == losses[best_step // 4]


def test_best_is_at_the_l0_that_the_weights_have(here, capsys):
    """Not at the one that is asked for: a finished dense run that is resumed with a lower target, and no
    steps to reach it, is dense; with more steps the sparse model is the best."""
    assert run("train.py tiny.py --target_l0_fraction=1") == 0
    assert run("train.py --init_from=resume --target_l0_fraction=1/4") == 0
    assert "no updates are left" in capsys.readouterr().out
    for name in ("best.pt", "ckpt.pt"):
        assert (checkpoint(name)["best_l0"], checkpoint(name)["l0"]) == (1.0, 1.0)
    assert run("train.py --init_from=resume") == 0
    assert checkpoint("best.pt")["best_l0"] == 1.0
    assert run("train.py --init_from=resume --max_iters=24") == 0
    best = checkpoint("best.pt")
    assert (best["best_l0"], best["l0"], best["step"] > 12) == (0.25, 0.25, True)
    weight = best["model"]["transformer.h.0.mlp.c_fc.weight"]
    assert weight.count_nonzero() <= weight.numel() // 4


def test_weights_that_were_not_pruned_yet_are_dense(here):
    """A run without annealing, too, has its target only after its first update."""
    flags = "--sparsity_anneal_start_fraction=0 --sparsity_anneal_end_fraction=0 --learning_rate=0"
    assert interrupted_run(f"train.py tiny.py {flags} --eval_interval=100", 0) == 0
    assert (checkpoint("best.pt")["step"], checkpoint("best.pt")["best_l0"]) == (0, 1.0)
    assert checkpoint()["l0"] == 0.25


def test_best_begins_anew_when_the_target_is_raised(here, capsys):
    """No model can be as sparse as the best any more: it is moved aside, and one line says so."""
    assert run("train.py tiny.py") == 0
    best = state("best.pt")
    capsys.readouterr()
    assert run("train.py --init_from=resume --max_iters=48 --target_l0_fraction=1/2") == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("best.pt begins anew")]
    assert "previous-1" in line and state("best.pt", "out/previous-1") == best
    assert checkpoint("best.pt")["best_l0"] == 0.5
    assert run("train.py --init_from=resume --max_iters=60") == 0  # the target stays: so does the best
    assert "begins anew" not in capsys.readouterr().out and not os.path.exists("out/previous-2")


def test_a_checkpoint_with_a_flipped_bit_is_refused_or_unharmed(trained, capsys):
    """Whatever bit it is: no weight is another without a word."""
    with open("out/ckpt.pt", "rb") as f:
        good = f.read()
    before, draw, refused = state(), random.Random(3), 0
    for _ in range(100):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        with open("out/ckpt.pt", "wb") as f:
            f.write(bad)
        try:
            found = checkpoints.load_checkpoint("out/ckpt.pt")
        except SystemExit:
            refused += 1
        else:
            torch.save(found, "loaded.pt")
            assert state("loaded.pt", ".") == before
    assert refused > 50
    assert all(line.startswith("error: out/ckpt.pt ") for line in capsys.readouterr().err.splitlines())


def test_best_is_at_the_l0_of_the_last_update(here):
    """While it is annealed: of the one that made these weights, not of the next."""
    assert run("train.py tiny.py --max_iters=8 --sparsity_anneal_end_fraction=1") == 0
    assert checkpoint("best.pt")["step"] == 8 and checkpoint("best.pt")["best_l0"] == train.l0_at(7) > 0.25


def test_an_out_dir_that_was_moved_goes_on_where_it_is(here):
    """Where a run was, and how it began, are of the command that began it."""
    assert run("train.py tiny.py --out_dir=first --max_iters=4") == 0
    before = tree("first")
    shutil.copytree("first", "out")
    assert run("train.py --init_from=resume --max_iters=8") == 0
    assert checkpoint()["step"] == 8 and tree("first") == before


# ----------------------------------------------------------------------------------------------------------
# full disks


def fill_disk(saved, file, save=torch.save):
    """What torch.save does on a disk that gets full on the way."""
    whole = io.BytesIO()
    save(saved, whole)
    file.write(whole.getvalue()[:10_000])
    file.flush()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_to_sync(file):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def limit_files(size):
    """From now on the system lets no file of this process grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def error_of_run(break_disk, capfd):
    """Start a run and call `break_disk(patch)` before update 5: the one line with which the run ends."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, "update_", at_step(5, lambda: break_disk(patch)))
        try:
            assert run("train.py tiny.py") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("break_disk", [
    lambda patch: patch.setattr(torch, "save", fill_disk),
    lambda patch: patch.setattr(os, "fsync", refuse_to_sync),
    lambda patch: limit_files(100_000)], ids=["disk full", "sync fails", "file limit"])
def test_disk_full_during_a_checkpoint(here, whole, break_disk, capfd):
    """A checkpoint that cannot be written ends the run with one line and status 2, and leaves the one before
    as it was, with nothing else beside it; once there is room the run goes on to the same end."""
    before = {}

    def note_and_break(patch):
        before.update(tree("out"))
        break_disk(patch)

    assert "make room" in error_of_run(note_and_break, capfd)
    after = tree("out")
    assert after.keys() == before.keys()
    assert after["ckpt.pt"] == before["ckpt.pt"] and after["best.pt"] == before["best.pt"]
    assert run("train.py --init_from=resume") == 0
    assert_ended_alike("out", whole)


def test_disk_full_during_the_log(here, capfd):
    """A log that cannot be written ends the run with one line and status 2; the last checkpoint is whole."""
    error = error_of_run(lambda patch: limit_files(os.path.getsize("out/log.jsonl") + 100), capfd)
    assert "log.jsonl" in error
    assert checkpoint()["step"] == 4
