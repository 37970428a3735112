"""The scripts around the experiments: which runs are made and how they are summed up, the evaluation on all
of val, and the curves.
"""
import collections
import contextlib
import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
from circuits.tasks import Source
from conftest import REPO, checkpoint
from experiments import ablations, circuit_sizes, evaluate, needed, plot
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------
# experiments/ablations.py


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A folder for the CSV, and runs that take no time: the list that they are appended to.

    The best learning rate is 0.02, or a quarter of it with --eps=9.
    """
    trained = []

    def train_one(flags, rate, seed):
        trained.append((flags, rate, seed))
        loss = round(abs(math.log(rate / (0.005 if "eps" in flags else 0.02))), 4) + seed + ("eps" in flags)
        return dict.fromkeys(ablations.COLUMNS[3:], 0) | {"val_loss": loss, "nonzero": 9}

    monkeypatch.setattr(ablations, "PATH", str(tmp_path / "ablations.csv"))
    monkeypatch.setattr(ablations, "train_one", train_one)
    monkeypatch.setattr(ablations, "jobs", 2)
    monkeypatch.setattr(ablations, "image", str(tmp_path / "figure.png"))
    monkeypatch.setattr(ablations, "ABLATIONS", [
        ablations.Ablation("beta", "--beta1=0.8", "neutral"),
        ablations.Ablation("eps 9", "--eps=9.0", "neutral", "nothing", tuned=True)])
    return trained


def test_ablations_are_run_once(recorded, capsys):
    """Three seeds each, at a tuned rate or the base's, the changes paired by seed; and never again."""
    ablations.run_ablations(ablations.Record())
    rates = {seed: {rate for flags, rate, s in recorded if not flags and s == seed} for seed in (1, 2, 3)}
    assert rates == {1: {0.009, 0.018, 0.036}, 2: {0.018}, 3: {0.018}}
    assert sorted(run[1:] for run in recorded if "beta" in run[0]) == [(0.018, seed) for seed in (1, 2, 3)]
    assert {rate for flags, rate, seed in recorded if "eps" in flags and seed > 1} == {0.0045}
    before = len(recorded)
    runs = ablations.Record()
    ablations.run_ablations(runs)
    assert len(recorded) == before
    ablations.print_ablations(runs)
    printed = capsys.readouterr().out
    assert "| eps 9 | `--eps=9.0` | 0.0045 | +1.000 ± 0.000 | 3 | 0 | nothing | no: worse |" in printed
    assert "| beta | `--beta1=0.8` | 0.018 | +0.000 ± 0.000 | 3 | 0 |  | yes |" in printed


def test_the_best_rate_lies_between_two_others(recorded, monkeypatch):
    """However far from the start it is, also if the runs are stopped and started on the way."""
    best = {0.00225, 0.0045, 0.009, 0.018, 0.036}
    train_one = ablations.train_one

    def stop_at_the_third(flags, rate, seed):
        if len(recorded) == 3:
            raise SystemExit("stopped")
        return train_one(flags, rate, seed)

    monkeypatch.setattr(ablations, "train_one", stop_at_the_third)
    with pytest.raises(SystemExit):
        ablations.tune(ablations.Record(), ["--eps=9.0"])
    monkeypatch.setattr(ablations, "train_one", train_one)
    runs = ablations.Record()
    ablations.tune(runs, ["--eps=9.0"])
    assert runs.rates("--eps=9.0")[0] == 0.0045
    assert {rate for _, rate, _ in recorded} == best and len(recorded) == len(best)


def test_the_rate_with_most_seeds_is_reported(recorded):
    """One run of another rate, even if it is better, does not stand for three."""
    runs = ablations.Record()
    ablations.run_missing(runs, [("--eps=9.0", rate, seed) for rate, seed in
                                   ((0.009, 1), (0.009, 2), (0.009, 3), (0.0045, 1))])
    assert [float(row["learning_rate"]) for row in runs.reported("--eps=9.0")] == [0.009] * 3


def test_the_verdict_looks_at_the_spread(recorded, monkeypatch, capsys):
    """A change smaller than its spread over the seeds is called neutral; one seed has no verdict."""
    monkeypatch.setattr(ablations, "ABLATIONS", [
        ablations.Ablation("noisy", "--a", "worse"), ablations.Ablation("worse", "--b", "worse"),
        ablations.Ablation("once", "--c", "worse")])
    runs = ablations.Record()
    record = dict.fromkeys(ablations.COLUMNS[3:], 0)
    for flags, all_losses in (("", (1.0, 1.0, 1.0)), ("--a", (1.0, 1.3, 0.95)), ("--b", (1.1, 1.1, 1.2)),
                              ("--c", (1.5,))):
        for seed, loss in enumerate(all_losses, 1):
            runs.add(flags, 0.018, seed, record | {"val_loss": loss})
    runs.add("", 0.009, 1, record | {"val_loss": 0.9})  # better, but of one seed
    ablations.print_ablations(runs)
    base, *_, noisy, worse, once = capsys.readouterr().out.strip().split("\n")[-7:]
    assert "learning rate 0.018, val loss 1.000" in base
    assert noisy.endswith("| no: neutral |") and worse.endswith("| yes |") and once.endswith("|  |")


def test_some_ablations_are_run_for_longer(recorded, monkeypatch, capsys):
    """The base and those that say so, at rates of their own; then both lengths stand side by side."""
    monkeypatch.setattr(ablations, "ABLATIONS", [
        ablations.Ablation("beta", "--beta1=0.8", "neutral"),
        ablations.Ablation("eps 9", "--eps=9.0", "worse", longer=True)])
    runs = ablations.Record()
    ablations.run_ablations(runs)
    ablations.print_longer(runs)
    assert not capsys.readouterr().out.count("3,200")
    before = len(recorded)
    ablations.run_longer(runs)
    assert {flags for flags, *_ in recorded[before:]} == {
        ablations.LONGER, f"--eps=9.0 {ablations.LONGER}"}
    assert {rate for flags, rate, seed in recorded[before:] if seed > 1 and "eps" in flags} == {0.0045}
    runs.rows[f"--eps=9.0 {ablations.LONGER}", 0.0045, 2]["val_loss"] = "0.0"
    capsys.readouterr()
    ablations.print_longer(runs)
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last.startswith("| eps 9 | +2.175 ± 0.000 | 3 |") and "| 3 | 0.0045 |" in last
    assert last.endswith("| yes; no: neutral |")


def test_the_scaling_runs_fit_and_are_drawn(recorded, tmp_path):
    """All models of the figure can be built at their L0, and all seeds are run at their width's rate."""
    runs = ablations.Record()
    ablations.run_scaling(runs)
    models = {flags for flags, _, _ in recorded}
    assert models == {flags for line in ablations.scaling_lines().values() for flags in line}
    assert [len(line) for line in ablations.scaling_lines().values()] == [4, 5, 4, 4, 3, 3, 2]
    assert all({(flags, 0.018, seed) for seed in (1, 2, 3)} <= set(recorded) for flags in models)
    ablations.draw_scaling(runs)
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_a_diverged_run_has_no_point_in_the_figure(recorded, tmp_path):
    """The figure is drawn without it."""
    runs = ablations.Record()
    ablations.run_scaling(runs)
    flags = next(iter(ablations.sparse_models(64).values()))
    runs.rows[flags, 0.018, 3] |= {"val_loss": "inf", "nonzero": ""}
    ablations.draw_scaling(runs)
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("flags, error", [
    ("--jobs=-1", "must not be negative"), ("--only=snik", "ABLATIONS")])
def test_bad_input_to_experiments(recorded, monkeypatch, capsys, flags, error):
    """It ends the script with one line, before any run is made."""
    monkeypatch.setattr(sys, "argv", ["run", flags])
    monkeypatch.setattr(ablations, "only", "")
    with pytest.raises(SystemExit):
        ablations.main()
    assert error in capsys.readouterr().err and not recorded


AN_EXPERIMENT = ("--max_iters=3 --d_model=16 --d_head=8 --block_size=8 --target_l0_fraction=1/2 "
                 "--eval_iters=2 --eval_interval=2")


@pytest.mark.slow
def test_an_experiment_trains(prepared, monkeypatch):
    """What is recorded is what train.py logged last; a loss that is not finite is recorded as infinite."""
    monkeypatch.chdir(REPO)
    flags = f"--dataset={prepared}/data/tiny {AN_EXPERIMENT}"
    record = ablations.train_one(flags, 0.01, 1)
    assert record.keys() == set(ablations.COLUMNS[3:])
    assert 4 < float(record["val_loss"]) < 6 and record["dead_neurons"] == 0 and record["nonzero"] > 0
    assert ablations.train_one(flags, 1e17, 1)["val_loss"] == "inf"


@pytest.mark.slow
def test_an_experiment_that_was_stopped_is_not_recorded(prepared, monkeypatch):
    """train.py ends well when it is told to stop: that is no result."""
    monkeypatch.chdir(REPO)
    popen = subprocess.Popen

    def stop_soon(*arguments, **options):
        process = popen(*arguments, **options)
        out_dir = next(a for a in arguments[0] if a.startswith("--out_dir=")).partition("=")[2]
        while not os.path.exists(os.path.join(out_dir, "log.jsonl")):
            time.sleep(0.05)
        process.terminate()
        return process

    monkeypatch.setattr(subprocess, "Popen", stop_soon)
    with pytest.raises(SystemExit, match="was stopped"):
        ablations.train_one(f"--dataset={prepared}/data/tiny {AN_EXPERIMENT} --max_iters=100000", 0.01, 1)


# ----------------------------------------------------------------------------------------------------------
# experiments/circuit_sizes.py


@pytest.mark.slow
def test_ctrl_c_ends_all_jobs_without_a_traceback(tmp_path):
    """Those that have not begun too: here each would take ten minutes."""
    config = tmp_path / "endless.py"
    config.write_text(f"import os, time\nopen({str(tmp_path)!r} + f'/began{{os.getpid()}}', 'w').close()\n"
                      "time.sleep(600)\n")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a child in the background would ignore it too
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.circuit_sizes", "--jobs=1", f"--config={config}",
             f"--models={tmp_path}/models", f"--record={tmp_path}/sizes.csv", "--device=cpu"],
            cwd=REPO, stderr=errors, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    try:
        end = time.time() + 120
        while not list(tmp_path.glob("began*")):
            assert process.poll() is None and time.time() < end, (tmp_path / "errors").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in (tmp_path / "errors").read_text() and len(list(tmp_path.glob("began*"))) == 1


OF_A_ROW = {"whole_val_loss": 0.1, "whole_train_loss": 0.1, "pretraining_loss": 3.8, "nonzero": 9}


@pytest.fixture
def small_search(tmp_path, monkeypatch):
    """Two tasks, two penalties, one mask seed and two targets; a CSV and figures of their own."""
    for name, value in {
        "record": str(tmp_path / "circuit_sizes.csv"), "models": str(tmp_path / "models"), "device": "cpu",
        "TASKS": ("one", "two"), "MORE_TASKS": ("three",), "TARGETS": (0.15, 5.0), "PENALTIES": (1e-3, 1e-2),
        "TRIALS": [(1e-3, 0), (1e-2, 0)], "widths_target": 0.15,
        "targets_image": str(tmp_path / "targets.png"), "widths_image": str(tmp_path / "widths.png"),
    }.items():
        monkeypatch.setattr(circuit_sizes, name, value)


def add_rows(rows):
    circuit_sizes.add(circuit_sizes.record, circuit_sizes.COLUMNS, rows)


def rows_of(flags, seed, task, edges):
    """The rows of a search: `edges` at target 5.0, twice as many with the other penalty; none at 0.15."""
    return [{"flags": flags, "seed": seed, "task": task, "penalty": penalty, "mask_seed": 0,
             "target_loss": target, "val_loss": n and 0.2, **OF_A_ROW, "nodes": n, "edges": n}
            for penalty, more in ((1e-3, 1), (1e-2, 2)) for target, n in ((0.15, ""), (5.0, more * edges))]


@pytest.fixture
def searched(small_search):
    """The sparse model and a dense one, three seeds each: ratios of 8, 2 and 4 in a task, 1 in the other."""
    for seed, ratio in zip(circuit_sizes.SEEDS, (8, 2, 4), strict=True):
        for flags, edges in (("", 10), ("--target_l0_fraction=1", 10 * ratio)):
            add_rows(rows_of(flags, seed, "one", edges))
            add_rows(rows_of(flags, seed, "two", 10))


def test_circuits_are_compared_over_tasks_and_seeds(searched, capsys):
    """The fewest edges of a search count; ratios are geometric means over tasks, by seed; and none is made
    of a target that is not reached. Figures are drawn."""
    circuit_sizes.report()
    printed = capsys.readouterr().out.split("\n")
    assert "| 5.0 | 2 | 10 (10 to 10) | 20 (14.1 to 28.3) | 2 (1.41 to 2.83) |" in printed
    assert "| one | 5.0 | 10 (10 to 10) | 40 (20 to 80) | 4 (2 to 8) |" in printed
    assert "| one | 0.15 | none, 0 of 3 | none, 0 of 3 | none, 0 of 3 |" in printed
    assert "| 0.15 | 0 |  |  |  |" in printed
    assert os.path.getsize(circuit_sizes.targets_image) > 0
    assert not os.path.exists(circuit_sizes.widths_image)  # no model reaches 0.15


def test_a_search_counts_when_it_is_whole(searched):
    """Fewer masks would be another budget: that model has no point, and a torn row no meaning."""
    add_rows(rows_of("--d_model=512", 1337, "one", 5))
    add_rows(rows_of("--d_model=512", 1337, "two", 5)[:3])
    with open(circuit_sizes.record, "a", encoding="utf-8") as f:
        f.write("--d_model=512,1337,tw")
    found = circuit_sizes.Found(circuit_sizes.read_rows(circuit_sizes.record))
    assert found.seeds("--d_model=512") == [] and found.seeds("") == list(circuit_sizes.SEEDS)


def test_a_task_that_one_model_cannot_do_is_not_common(searched):
    """Nor is one in which a seed has not been searched."""
    both = ("", "--target_l0_fraction=1")
    add_rows(rows_of("", 1, "three", 7))
    found = circuit_sizes.Found(circuit_sizes.read_rows(circuit_sizes.record))
    assert found.common(both, 5.0) == ["one", "two"] and found.common(both, 0.15) == []
    assert found.edges("", ["three"], 5.0) == {1: pytest.approx(7)}


def test_ratios_are_looked_at_otherwise(searched, monkeypatch, capsys):
    """By cell: all of them, nodes too, and only those in which both models do the task as a whole."""
    monkeypatch.setattr(circuit_sizes, "widths_target", 5.0)
    one, two = rows_of("--d_model=9", 1, "one", 40), rows_of("--d_model=9", 1, "two", 10)
    add_rows([row | {"whole_train_loss": 6.0} for row in one])
    add_rows([row | {"nodes": row["nodes"] and 20, "val_loss": 7.0} for row in two])
    found = circuit_sizes.Found(circuit_sizes.read_rows(circuit_sizes.record))
    circuit_sizes.print_otherwise(found, {"sparse": "", "other": "--d_model=9"})
    cells = [line.split(" | ")[-1] for line in capsys.readouterr().out.strip().split("\n")[2:]]
    assert cells == [" |", "2 (2) |", "2.83 (2) |", "1 (1) |", "4 (1) |", "1 to 4 |"]


def test_choices_stand_beside_the_sparse_model(searched, monkeypatch, capsys):
    """In the tasks that they are searched for; one that is not searched has no row."""
    monkeypatch.setattr(circuit_sizes, "CHOICES", {"longer": "--max_iters=9", "another": "--seed=9"})
    monkeypatch.setattr(circuit_sizes, "CHOICES_TASKS", ("one",))
    add_rows(rows_of("--max_iters=9", 1, "one", 30))
    circuit_sizes.print_choices(circuit_sizes.Found(circuit_sizes.read_rows(circuit_sizes.record)))
    base, longer = capsys.readouterr().out.strip().split("\n")[2:]
    assert base == "| as configured | `` | 3 | 3.800 | none, 0 of 3 | 10 (10 to 10) |"
    assert longer == "| longer | `--max_iters=9` | 1 | 3.800 | none, 0 of 1 | 30 |"


def test_widths_are_drawn(searched, monkeypatch):
    """The models that do the tasks that are asked for, or else those that all can do, have a point."""
    monkeypatch.setattr(circuit_sizes, "widths_target", 5.0)
    circuit_sizes.report()
    assert os.path.getsize(circuit_sizes.widths_image) > 0
    add_rows([row | {"nodes": ""} for row in rows_of("--d_model=512", 1, "one", 3)])
    add_rows(rows_of("--d_model=512", 1, "two", 3))
    found = circuit_sizes.Found(circuit_sizes.read_rows(circuit_sizes.record))
    assert [(n, len(points)) for n, points in [circuit_sizes.print_grid(found)]] == [(1, 3)]
    monkeypatch.setattr(circuit_sizes, "widths_tasks", "one,two")
    n, points = circuit_sizes.print_grid(found)
    assert n == 2 and [point[:2] for point in points] == [(256, "1"), (256, "1/16")]


def test_all_models_of_the_grid_can_be_built():
    """Every L0 leaves the neurons their minimum of weights; two models are of figure 2; no job is twice."""
    for d_model, levels in circuit_sizes.GRID.items():
        smallest = GPT(GPTConfig(n_layer=1, d_model=d_model, use_bigram_table=False)).smallest_l0()
        assert all(eval(l0) >= smallest for l0 in levels)
    jobs = [(flags, seed, task) for flags, seed, tasks in circuit_sizes.all_jobs() for task in tasks]
    assert len(jobs) == len(set(jobs))
    assert circuit_sizes.grid_flags(256, "1/16") == circuit_sizes.MODELS["sparse"]
    assert circuit_sizes.grid_flags(256, "1") == circuit_sizes.MODELS["dense, same shape"]


@pytest.fixture
def tasks_here(trained, small_search, monkeypatch):
    """A trained run in the place of all models, and two tasks."""
    for task, answers in {"one": ["r", "t"], "two": ["e", "s"]}.items():
        Path(f"{task}.json").write_text(json.dumps({"answers": answers}))
    monkeypatch.setattr(circuit_sizes, "train", lambda flags, seed: "out")
    monkeypatch.setattr(circuit_sizes, "steps", 2)
    monkeypatch.setattr(circuit_sizes, "Source", lambda loaded: Source(loaded, 60, 32, 40))


@pytest.mark.parametrize("torn", ["", "3", "3,", "3,2"])
def test_a_row_after_a_torn_one_has_a_line_of_its_own(torn, tmp_path):
    """What a full disk cut off is lost, also within its last cell; what is added later is not."""
    path = str(tmp_path / "rows.csv")
    circuit_sizes.add(path, ("a", "b"), [{"a": 1, "b": 2}])
    with open(path, "a", encoding="utf-8") as f:
        f.write(torn)
    circuit_sizes.add(path, ("a", "b"), [{"a": 4, "b": 5}])
    assert circuit_sizes.read_rows(path) == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]


def test_a_job_adds_what_is_missing(tasks_here, monkeypatch):
    """A row for each mask and target; a job that was stopped goes on after its last mask."""
    circuit_sizes.run_job("", 1, ("one",))
    whole = circuit_sizes.read_rows(circuit_sizes.record)
    assert [(float(row["penalty"]), float(row["target_loss"])) for row in whole] == [
        (penalty, target) for penalty in circuit_sizes.PENALTIES for target in circuit_sizes.TARGETS]
    assert all(1 <= int(row["nodes"]) <= int(row["edges"]) + int(row["nodes"]) for row in whole[1::2])
    os.remove(circuit_sizes.record)
    add_rows([{name: row[name] for name in circuit_sizes.COLUMNS} for row in whole[:2]])
    learned, learn_masks = [], circuit_sizes.learn_masks
    monkeypatch.setattr(circuit_sizes, "learn_masks", lambda nodes, contexts, trials, how: (
        learned.extend(trials), learn_masks(nodes, contexts, trials, how))[1])
    circuit_sizes.run_job("", 1, ("one",))
    assert circuit_sizes.read_rows(circuit_sizes.record) == whole and learned == [(1e-2, 0)]
    circuit_sizes.run_job("", 1, ("one",))
    assert len(learned) == 1


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on(prepared, small_search, monkeypatch):
    """From its checkpoint; and once it is at its end, nothing is run."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(circuit_sizes, "config", "config/tiny.py")
    monkeypatch.setattr(circuit_sizes, "TRAINING", f"{AN_EXPERIMENT} --dataset={prepared}/data/tiny")
    folder, commands = circuit_sizes.train("", 1), []
    path = os.path.join(folder, "ckpt.pt")
    saved = checkpoints.load_checkpoint(path)
    saved["step"] = 2
    torch.save(saved, path)
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: (
        commands.append(command), run(command, **options))[1])
    assert circuit_sizes.train("", 1) == folder and commands[0][-1] == "--init_from=resume"
    assert checkpoints.load_checkpoint(path)["step"] == 3
    circuit_sizes.train("", 1)
    assert len(commands) == 1
    with pytest.raises(SystemExit, match="smallest that fits"):
        circuit_sizes.train("--target_l0_fraction=1/9999", 1)


def test_bad_input_to_circuits(small_search, monkeypatch, capsys):
    """It ends the script with one line."""
    for argument, error in (("--jobs=-1", "must not be negative"), ("--jobs=0", "no sparse model"),
                            ("--widths_target=0.2", "widths_target=0.2")):
        monkeypatch.setattr(sys, "argv", ["circuit_sizes", argument])
        with pytest.raises(SystemExit):
            circuit_sizes.main()
        captured = capsys.readouterr().err
        assert error in captured and captured.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------
# experiments/needed.py


@pytest.fixture
def small_needed(tmp_path, monkeypatch):
    """A sparse model and a dense one, two targets; a CSV and a figure of their own."""
    for name, value in {"record": str(tmp_path / "needed.csv"), "image": str(tmp_path / "needed.png"),
                        "device": "cpu", "MODELS": {"sparse": "", "dense": "--d_model=9"},
                        "TARGETS": (0.15, 5.0), "FAITHFUL": (5.0,)}.items():
        monkeypatch.setattr(needed, name, value)


def cell(flags, seed, task, target, fit, weights, edges, **more):
    row = {"flags": flags, "seed": seed, "task": task, "target_loss": target, "fit": fit, "nodes": weights,
           "weights": weights, "needed_edges": edges, "pretraining_loss": 3.8, "whole_train_loss": 0.1}
    return dict.fromkeys(needed.COLUMNS, "") | row | more


def test_needed_edges_are_compared_over_tasks_and_seeds(small_needed, capsys):
    """Ratios paired by seed, over the tasks that all models reach; what is measured of a circuit is a mean
    over the tasks in which it is measured in all models."""
    for seed, edges in zip(circuit_sizes.SEEDS, (2, 4, 8), strict=True):
        rows = [cell(flags, seed, task, target, fit, 16, edges * (4 if flags else 1), same_answer=0.5,
                     same_hard=0.2)
                for flags in needed.MODELS.values() for task in ("one", "two") for target in needed.TARGETS
                for fit in (0, 1)]
        for row in rows:
            if row["task"] == "two":
                row |= {"needed_edges": 6, "same_answer": 0.9 if row["flags"] else 0.5, "same_hard": ""}
                if row["flags"] and row["target_loss"] == 0.15:
                    row |= {"weights": "", "nodes": "", "needed_edges": ""}  # not reached
        circuit_sizes.add(needed.record, needed.COLUMNS, rows)
    circuit_sizes.add(needed.record, needed.COLUMNS, [cell("", 1, "three", 5.0, 1, 9, 9)])
    needed.report()
    printed = capsys.readouterr().out.split("\n")
    assert "| 0.15 | fitted | 1 | 16 -> 4 | 16 [1 (1 to 1)] -> 16 [4 (4 to 4)] |" in printed
    assert "| 5.0 | fitted | 2 | 16 -> 4.9 | 16 [1 (1 to 1)] -> 9.8 [2 (2 to 2)] |" in printed
    assert "| two | 5.0 | raw | 16 -> 6 | 16 [1 (1 to 1)] -> 6 [1 (1 to 1)] |" in printed
    assert "| same_answer | 2 | 0.5 ± 0 | 0.7 ± 0 |" in [line.replace("1e-16", "0") for line in printed]
    assert "| same_hard | 1 | 0.2 ± 0 | 0.2 ± 0 |" in [line.replace("3e-17", "0") for line in printed]
    assert not any("three" in line or line.startswith("| two | 0.15") for line in printed)
    assert os.path.getsize(needed.image) > 0


def test_what_is_reached_raw_alone_has_no_figure(small_needed, capsys):
    """And what is reached by no model has no table: the script ends. A search that is not whole counts as
    not reached."""
    def rows(fit):
        return [cell(flags, seed, "one", target, fit, 9, 3) for flags in needed.MODELS.values()
                for seed in circuit_sizes.SEEDS for target in needed.TARGETS]

    circuit_sizes.add(needed.record, needed.COLUMNS, rows(0) + rows(1)[:-3])
    needed.report()
    assert "| 5.0 | raw | 1 |" in capsys.readouterr().out and not os.path.exists(needed.image)
    os.remove(needed.record)
    circuit_sizes.add(needed.record, needed.COLUMNS, [row | {"nodes": ""} for row in rows(1)])
    with pytest.raises(SystemExit):
        needed.report()


def test_a_stricter_circuit_counts_too(small_needed):
    """Never a looser one, nor one that is raw where the others are fitted."""
    edges = {(0.15, 0): 7, (0.15, 1): 5, (5.0, 0): 3, (5.0, 1): 6}

    def fewest(t, fit):
        rows = [cell("", 1, "one", *at, 9, number) for at, number in edges.items()]
        found = needed.Found([{name: str(value) for name, value in row.items()} for row in rows])
        return found.fewest("needed_edges", "one", "", 1, t, fit)

    assert [fewest(*at) for at in edges] == [7, 5, 3, 5]
    edges[0.15, 1] = 0  # none counts as one
    assert [fewest(*at) for at in edges] == [7, 1, 3, 1]


@pytest.fixture
def one_task(trained, small_needed, tasks_here, monkeypatch):
    """A trained run whose circuits take no time, and a target that a few nodes do not reach."""
    monkeypatch.setattr(needed, "SEARCH", needed.Search(steps=2))
    monkeypatch.setattr(needed, "LADDER", (1e-2,))
    monkeypatch.setattr(needed, "CONTEXTS", {"learning": 60, "choosing": 32, "judging": 40})
    monkeypatch.setattr(needed, "TARGETS", (1e-6, 0.6))
    monkeypatch.setattr(needed, "FAITHFUL", (0.6,))
    monkeypatch.setattr(needed, "SHUFFLED_TASKS", ("one",))


def test_a_job_of_needed_edges_adds_what_is_missing(one_task, monkeypatch):
    """A row for each target, fitted and raw. A job that was stopped does what it has not done at all."""
    needed.run_job("", 1, "one")
    whole = circuit_sizes.read_rows(needed.record)
    assert [(float(row["target_loss"]), row["fit"]) for row in whole] == [
        (1e-6, "1"), (0.6, "1"), (1e-6, "0"), (0.6, "0")]
    assert [bool(row["nodes"]) for row in whole] == [False, True] * 2
    assert all(float(row["train_loss"]) <= 0.6 for row in whole[1::2])
    assert [bool(row["same_answer"]) for row in whole] == [False, True, False, False]
    assert whole[1]["shuffled_loss"] and whole[1]["same_hard"] == ""  # it has no families
    assert whole[1]["shuffled_edges"] == ""  # not reached
    os.remove(needed.record)
    circuit_sizes.add(needed.record, needed.COLUMNS, whole[:2])
    needed.run_job("", 1, "one")
    again = circuit_sizes.read_rows(needed.record)
    assert [row | {"cpu_seconds": ""} for row in again] == [row | {"cpu_seconds": ""} for row in whole]
    monkeypatch.setattr(needed, "load", None)
    needed.run_job("", 1, "one")


def test_a_task_may_have_no_strict_target(one_task, monkeypatch):
    """Then it is neither searched for nor missed, and circuits of the other targets are all that count."""
    monkeypatch.setattr(needed, "STRICTEST", {"one": 0.6})
    needed.run_job("", 1, "one")
    rows = circuit_sizes.read_rows(needed.record)
    assert [(row["target_loss"], row["fit"]) for row in rows] == [("0.6", "1"), ("0.6", "0")]
    expected = int(rows[0]["needed_edges"])
    assert needed.Found(rows).fewest("needed_edges", "one", "", 1, 0.6, 1) == max(expected, 1)
    monkeypatch.setattr(needed, "load", None)
    needed.run_job("", 1, "one")


def test_edges_that_go_by_chance_are_as_many(one_task, monkeypatch):
    """As many as asked for, other ones each time, and no node."""
    run = needed.load("out", device="cpu")
    _, contexts, _ = Source(run, 60, 32, 40).three_sets(needed.read_task("one", run.tokenizer))
    nodes, drawn = run.nodes(), []
    gates = torch.ones(nodes.number)
    monkeypatch.setattr(needed, "loss_at", lambda nodes, contexts, gates, fit: drawn.append(gates) or 1.0)
    for number in (0, 5, needed.count(nodes, gates)["weights"]):
        assert needed.by_chance(nodes, gates, number, contexts, True, 0) == 1
        assert [int(gates[nodes.nodes:].sum()) for gates in drawn] == [number] * needed.DRAWS
        assert all(gates[:nodes.nodes].all() for gates in drawn)
        assert len({tuple(gates.tolist()) for gates in drawn}) == (needed.DRAWS if number == 5 else 1)
        drawn.clear()


def test_bad_input_to_needed(small_needed, monkeypatch, capsys):
    """It ends the script with one line."""
    for argument, error in (("--jobs=-1", "must not be negative"), ("--jobs=0", "no task in which"),
                            ("--tasks=quote", "closest that exists is"),
                            ("--unseen=none --tasks=quotes --jobs=1", "no data in")):
        monkeypatch.setattr(sys, "argv", ["needed", *argument.split()])
        with pytest.raises(SystemExit):
            needed.main()
        captured = capsys.readouterr().err
        assert error in captured and captured.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------
# experiments/evaluate.py


def test_evaluation_takes_all_windows_of_val_once(trained, monkeypatch, capsys):
    """Loss and kurtosis are those of a plain loop over windows, and the standard errors their spread."""
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    monkeypatch.setattr(evaluate, "batch_size", 3)
    evaluate.main()
    found, bigrams = csv.DictReader(io.StringIO(capsys.readouterr().out))
    meta = json.loads(Path("data/tiny/meta.json").read_text())["val"]
    model = checkpoints.model_of(checkpoint()).eval()
    val = torch.from_numpy(np.fromfile("data/tiny/val.bin", dtype="<u2").astype(np.int64))
    T, losses, kurtoses = model.config.block_size, [], []
    for start in range(0, len(val) - T, T):
        idx, targets = val[None, start:start + T], val[None, start + 1:start + T + 1]
        with torch.no_grad():
            losses.append(model(idx, targets)[1].item())
            x = model.residual_stream(idx)[0].double()
        z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
        kurtoses.append((z ** 4).mean().item())
    assert float(found["val_loss"]) == pytest.approx(np.mean(losses), abs=1e-4)
    standard_error = np.std(losses, ddof=1) / len(losses) ** 0.5
    assert float(found["val_loss_se"]) == pytest.approx(standard_error, abs=1e-4)
    assert float(found["kurtosis"]) == pytest.approx(np.mean(kurtoses), abs=1e-2)
    assert found["nonzero"] == str(sum(p.count_nonzero().item() for _, p, _ in model.sparse_parameters()))
    assert 0 < float(bigrams["val_loss"]) < math.log(257)
    for row in (found, bigrams):
        bits = float(row["val_loss"]) / math.log(2) * meta["tokens"] / meta["bytes"]
        assert float(row["bits_per_byte"]) == pytest.approx(bits, abs=1e-3)


def test_each_out_dir_may_begin_with_the_home_folder(trained, monkeypatch, capsys):
    """The ~ of each is one, also after a comma; rows have the last part of their names."""
    monkeypatch.setenv("HOME", os.getcwd())
    shutil.copytree("out", "other")
    monkeypatch.setattr(evaluate, "out_dirs", "~/out,~/other")
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    evaluate.main()
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["model"] for row in rows] == ["out", "other", "counted bigrams"]


def test_evaluation_is_of_one_data_set(trained, monkeypatch, capsys):
    """The bigrams are counted in the data of all the models."""
    shutil.copytree("data/tiny", "data/copy")
    shutil.copytree("out", "other")
    saved = checkpoints.load_checkpoint("other/ckpt.pt")
    saved["settings"]["dataset"] = "copy"
    torch.save(saved, "other/ckpt.pt")
    monkeypatch.setattr(evaluate, "out_dirs", "out,other")
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "same data" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [1, 7, 49, 1000])
def test_all_bigrams_are_counted(chunk):
    """Once, also those that lie across two of the parts in which the tokens are read."""
    tokens = np.random.default_rng(0).integers(5, size=50).astype(np.uint16)
    pairs = evaluate.count_bigrams(tokens, 5, chunk)
    expected = collections.Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    assert {(i, j): n for (i, j), n in np.ndenumerate(pairs) if n} == expected


def test_counted_bigrams_are_a_distribution():
    """Over all tokens that may follow they sum to one; with little smoothing they are the counts."""
    pairs = np.array([[3, 0, 1], [0, 0, 0], [5, 2, 2]])
    for strength in (1e-6, 1, 10):
        for first in range(3):
            p = [math.exp(-evaluate.bigram_loss(np.array([first, second], dtype=np.uint16), pairs, strength))
                 for second in range(3)]
            assert sum(p) == pytest.approx(1)
            if strength < 1 and pairs[first].any():
                assert p == pytest.approx(pairs[first] / pairs[first].sum(), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------
# experiments/plot.py


def test_curves_are_drawn_beside_those_of_another_run(trained, monkeypatch):
    """Its val loss is in the figure."""
    shutil.copytree("out", "other")
    Path("other/log.jsonl").write_text('{"step": 0, "val/loss": 7.5}\n{"step": 9, "val/loss": 6.25}\n')
    monkeypatch.setattr(plot, "beside", "other")
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    plot.main()
    line = figures[0].axes[0].get_lines()[-1]
    assert line.get_label() == "validation of other"
    assert list(line.get_xdata()) == [0, 9] and list(line.get_ydata()) == [7.5, 6.25]


def test_nothing_but_a_figure_needs_matplotlib():
    """Importing circuit.py loads none of it; drawing leaves pyplot, and with it the backend, alone."""
    code = """
import sys
import circuit
from circuits import figures
from circuits import picture
from experiments import ablations, circuit_sizes, plot
assert "matplotlib" not in sys.modules
figures.save(figures.new_figure(1, 1)[0], sys.argv[1])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "figure.png")
        subprocess.run([sys.executable, "-c", code, path], cwd=REPO, check=True)
        assert os.path.getsize(path) > 100
