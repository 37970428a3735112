"""Bad input: a configuration that cannot be built is refused in one sentence, and a script that is given
nonsense, in settings, files or prompts, ends with one line that names the remedy, before it has written
anything or run anything from a file. Bad input to prepare.py is in test_prepare.py.
"""
import json
import math
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from conftest import call_before, checkpoint, finish, launch, read, run, tree
from model import LOCATIONS, GPTConfig

ILLEGAL = [
    ({"n_layer": 0}, ["n_layer=0", "at least 1"]),
    ({"d_model": 0}, ["d_model=0", "at least 1"]),
    ({"d_head": 0}, ["d_head=0", "at least 1"]),
    ({"block_size": 0}, ["block_size=0", "at least 1"]),
    ({"vocab_size": -5}, ["vocab_size=-5", "at least 1"]),
    ({"d_mlp": -1}, ["d_mlp=-1", "negative"]),
    ({"n_head": -1}, ["n_head=-1", "negative"]),
    ({"d_model": 20, "d_head": 16}, ["d_model=20", "divisible", "d_head=16"]),
    ({"activation": "silu"}, ["activation", "'silu'", "gelu", "relu"]),
    ({"activation": ""}, ["activation", "''", "gelu", "relu"]),
    ({"residual_activation": "gelu"}, ["residual_activation", "'gelu'", "identity", "relu"]),
    ({"activation_sparsity_locations": "attn_in,mlp_neurons"}, ["'mlp_neurons'", *LOCATIONS]),
    ({"activation_sparsity_locations": "attn_in;mlp_in"}, ["'attn_in;mlp_in'", *LOCATIONS]),
    ({"dropout": 1.0}, ["dropout=1.0", "less than 1"]),
    ({"dropout": -0.1}, ["dropout=-0.1", "at least 0"]),
    ({"dropout": math.nan}, ["dropout=nan", "at least 0"]),
    ({"activation_topk_fraction": 1.5}, ["activation_topk_fraction=1.5", "at most 1"]),
    ({"activation_topk_fraction": 0.0}, ["activation_topk_fraction=0", "0.03125 or more"]),
    ({"activation_topk_fraction": 0.02}, ["activation_topk_fraction=0.02", "0.03125 or more"]),
    ({"activation_topk_fraction": math.nan}, ["activation_topk_fraction=nan"]),
]


@pytest.mark.parametrize("values, words", ILLEGAL, ids=lambda x: str(x)[:60] if isinstance(x, dict) else "")
def test_an_illegal_configuration_is_refused_in_one_sentence(values, words):
    """The error names field and value, and says or lists what is legal."""
    with pytest.raises(ValueError) as error:
        GPTConfig(**{"d_model": 32} | values)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------
# what is done to the folder (see `trained`) before a script runs


def file(path, content):
    def damage():
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
    return damage


def cut(path, size):
    return lambda: os.truncate(path, size)


def remove(path):
    return lambda: os.remove(path)


def copy(source, target):
    return lambda: shutil.copy(source, target)


def meta(split=None, **changes):
    """Change entries of data/tiny/meta.json, or of its part for one split; ... removes the entry."""
    def damage():
        found = json.loads(read("data/tiny/meta.json"))
        change(found[split] if split else found, changes)
        file("data/tiny/meta.json", json.dumps(found))()
    return damage


def saved(**changes):
    """Change entries of out/ckpt.pt; ... removes the entry."""
    def damage():
        found = checkpoint()
        change(found, changes)
        torch.save(found, "out/ckpt.pt")
    return damage


def change(entries, changes):
    for key, value in changes.items():
        if value is ...:
            del entries[key]
        else:
            entries[key] = value


def config(**changes):
    """Change the architecture that out/ckpt.pt names."""
    return lambda: saved(config={**checkpoint()["config"], **changes})()


def shorten_val():
    """A validation split of seven tokens that meta.json knows of."""
    cut("data/tiny/val.bin", 14)()
    meta("val", tokens=7)()


class Bomb:
    """A pickle of this runs a command when it is loaded the careless way."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def bomb():
    with open("out/ckpt.pt", "wb") as f:
        pickle.dump({"model": Bomb()}, f)


def zipped_bomb():
    torch.save({"model": Bomb(), "config": {}, "settings": {}, "step": 0}, "out/ckpt.pt")


# ----------------------------------------------------------------------------------------------------------
# the command, a word of the remedy, and what is done before

BAD_INPUTS = [
    # settings: test_configurator.py has what is wrong with them one by one
    ("train.py tiny.py --n_layr=2", "n_layer"),
    ("train.py tiny.py --n_layer=two", "expected int"),
    ("train.py tiny.py --n_layer", "--n_layer=VALUE"),
    ("train.py missing.py", "missing.py"),
    ("train.py tiny.py bad.py", "n_layer", file("bad.py", "n_layr = 2")),
    ("train.py tiny.py bad.py", "learning_rate", file("bad.py", "learning_rate = float('nan')")),
    ("train.py tiny.py bad.py", "learning_rate", file("bad.py", "learning_rate = float('inf')")),
    ("sample.py --temprature=1", "temperature"),
    # values that no run can have
    *((f"train.py tiny.py --{name}={value}", name) for name, value in [
        ("batch_size", 0), ("gradient_accumulation_steps", 0), ("max_iters", 0), ("max_iters", -5),
        ("eval_interval", 0), ("eval_iters", 0), ("sparsity_anneal_start_fraction", -0.1),
        ("sparsity_anneal_end_fraction", 1.5), ("sparsity_anneal_end_fraction", 0.005),
        ("warmup_fraction", 2), ("learning_rate", -1), ("learning_rate", 1e38), ("beta1", -0.1),
        ("beta1", 1), ("beta2", 1.5), ("beta2", 1), ("eps", -1),
        ("weight_decay", -1), ("grad_clip_rms", -1), ("min_weights_per_neuron", -1), ("seed", -1),
        ("seed", 2**64), ("log_every_n_steps", -1), ("log_gradients_every_n_steps", -1),
        ("log_weights_every_n_steps", -1), ("log_sparsity_every_n_steps", -1), ("target_l0_fraction", 0),
        ("target_l0_fraction", 1.5), ("block_size", 0), ("dtype", "float8"),
        ("dtype", "float16 --device=cpu"), ("device", "cuda:99"), ("device", "abacus"), ("device", "meta")]),
    ("train.py tiny.py --activation=swish", "gelu, relu"),  # what GPTConfig refuses is above
    ("train.py tiny.py --target_l0_fraction=0.2", "smallest that fits is 0.25"),
    ("train.py tiny.py --init_from=resmue", "'resume'"),
    ("sample.py --num_samples=0", "num_samples"),
    ("sample.py --max_new_tokens=0", "max_new_tokens"),
    ("sample.py --temperature=-1", "temperature"),
    ("sample.py --top_k=-1", "top_k"),
    ("sample.py --seed=-1", "seed"),
    (f"sample.py --seed={2**64}", "seed"),
    ("sample.py --dtype=float8", "dtype"),
    ("sample.py --dtype=float16 --device=cpu", "dtype"),
    ("sample.py --device=cuda:99", "--device=cpu" if torch.cuda.device_count() == 0 else "cuda:0"),
    # data
    ("train.py tiny.py --dataset=nowhere", "python prepare.py"),
    ("train.py tiny.py --dataset=", "python prepare.py"),
    ("train.py tiny.py --dataset=../tiny.py", "python prepare.py"),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/meta.json")),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/tokenizer.json")),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/train.bin")),
    ("train.py tiny.py", "python prepare.py", remove("data/tiny/val.bin")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", "")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", "[]")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", b"\xff")),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/meta.json", 100)),
    *(("train.py tiny.py", "python prepare.py", meta(**changes)) for changes in [
        {"vocab_size": ...}, {"vocab_size": "many"}, {"vocab_size": 100}, {"tokenizer_sha256": ...},
        {"val": ...}, {"train": [1, 2]}]),
    *(("train.py tiny.py", "python prepare.py", meta("train", **changes)) for changes in [
        {"tokens": ...}, {"tokens": None}, {"tokens": "7"}, {"bytes": 0}, {"bytes": "7"}]),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/train.bin", 0)),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/train.bin", 2001)),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/train.bin", 2000)),
    ("train.py tiny.py", "python prepare.py", cut("data/tiny/val.bin", 0)),
    ("train.py tiny.py", "block_size", shorten_val),
    ("train.py tiny.py", "--val_fraction", shorten_val),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/meta.json", '{"train":' * 100_000)),
    ("train.py tiny.py --block_size=100000", "block_size"),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/val.bin", b"\xff\xff" * 3000)),
    ("train.py tiny.py", "python prepare.py", lambda: np.full_like(
        np.memmap("data/tiny/train.bin", "<u2", "r"), 257).tofile("data/tiny/train.bin")),
    ("train.py tiny.py", "python prepare.py", copy("data/other/tokenizer.json", "data/tiny/tokenizer.json")),
    ("train.py tiny.py", "python prepare.py", file("data/tiny/tokenizer.json", b"\xff")),
    ("train.py tiny.py --dataset=other --init_from=resume", "tokenizer"),
    ("train.py --init_from=resume", "vocabulary of 300", meta(vocab_size=300)),
    # where to write
    ("train.py tiny.py --out_dir=tiny.py/out", "--out_dir"),
    ("train.py tiny.py --out_dir=tiny.py", "--out_dir"),
    ("train.py tiny.py --out_dir=/proc/nothing", "--out_dir"),
    ("train.py tiny.py --out_dir=", "out_dir"),
    ("train.py --init_from=resume", "out/log.jsonl", lambda: os.mkdir("out/log.jsonl.tmp")),
    # what to go on from
    ("train.py tiny.py --init_from=resume --out_dir=new", "without --init_from=resume"),
    ("train.py tiny.py --init_from=resume --n_layer=2", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --d_head=4", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --block_size=8", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --activation=relu", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --activation_sparsity_locations=", "leave the setting out"),
    ("train.py tiny.py --init_from=resume --target_l0_fraction=0.1", "smallest that fits is 0.25"),
    ("train.py tiny.py --init_from=resume --max_iters=3", "max_iters"),
    ("train.py --init_from=resume", "optimizer", saved(optimizer=...)),
    *((f"train.py tiny.py --{name}={value}", words) for value, words in [
        ("9" * 25, "63 bits"), ("9" * 400, "63 bits"), (9 * 10**17, "out of memory")] for name in [
        "batch_size", "eval_iters", "d_model", "d_mlp"]),
    *((f"train.py tiny.py --{name}={'9' * digits}", "63 bits") for name, digits in [
        ("max_iters", 25), ("gradient_accumulation_steps", 25), ("eval_interval", 701)]),
    ("train.py tiny.py bad.py", "max_iters", file("bad.py", "max_iters = 10**5000")),
    ("train.py tiny.py bad.py", "is no path", file("bad.py", "out_dir = 'a\\0b'")),
    ("train.py tiny.py bad.py", "KeyboardInterrupt", file("bad.py", "raise KeyboardInterrupt")),
    ("train.py tiny.py bad.py", "learning_rate", file("bad.py", "learning_rat = [0.01]")),
    ("train.py tiny.py --dataset='two\nlines'", "python prepare.py"),
    ("train.py tiny.py --checkpoint_minutes=-1", "checkpoint_minutes"),
    *((f"{script} --device=cpu", name, saved(**{name: value})) for script in (
        "train.py --init_from=resume", "sample.py") for name, value in [
        ("settings", ["n_layer"]), ("settings", {}), ("step", "6"), ("step", -1), ("step", 6.0),
        ("best_l0", None), ("best_val_loss", "low"), ("model", [1]), ("optimizer", [1]), ("scaler", 3),
        ("config", "small"), ("tokenizer_sha256", 5), ("data", [1]), ("data", {"train": 5}), ("l0", "1"),
        ("data", {"train": {"tokens": "many"}, "val": {"tokens": 1}}), ("wandb_id", 7)]),
    ("train.py --init_from=resume", "Adam's moments", saved(optimizer={"state": [1]})),
    ("train.py --init_from=resume", "Adam's moments", saved(optimizer={})),
    ("train.py --init_from=resume", "n_layer", lambda: saved(
        settings=checkpoint()["settings"] | {"n_layer": "two"})()),
    *((script, "code that wrote it", config(**{name: value})) for script in (
        "train.py --init_from=resume", "sample.py") for name, value in [
        ("n_layer", 1.5), ("activation_sparsity_locations", 0), ("d_model", "16"), ("vocab_size", None)]),
    *((command, *rest) for command in ("train.py --init_from=resume", "sample.py") for rest in [
        ("--out_dir", remove("out/ckpt.pt")),
        ("--out_dir", cut("out/ckpt.pt", 10_000)),
        ("--out_dir", cut("out/ckpt.pt", 0)),
        ("--out_dir", file("out/ckpt.pt", random.Random(2).randbytes(20_000))),
        ("--out_dir", bomb),
        ("--out_dir", zipped_bomb),
        ("--out_dir", lambda: torch.save([1, 2], "out/ckpt.pt")),
        ("choose another", lambda: torch.save({"model": {}, "iter_num": 3}, "out/ckpt.pt")),
        ("--out_dir", lambda: (os.remove("out/ckpt.pt"), os.mkdir("out/ckpt.pt"))),
        ("code that wrote it", config(n_layer=2)),
        ("code that wrote it", config(d_model=32)),
        ("code that wrote it", config(flavour="sweet")),
        ("code that wrote it", config(activation="swish"))]),
    ("sample.py --checkpoint=first.pt", "first.pt"),
    ("sample.py --init_from=nowhere", "nowhere"),
    ("sample.py", "tokenizer.json", remove("out/tokenizer.json")),
    ("sample.py", "tokenizer.json", file("out/tokenizer.json", "{}")),
    ("sample.py", "tokenizer.json", file("out/tokenizer.json", b"\xff")),
    ("sample.py", "tokenizer.json", copy("data/other/tokenizer.json", "out/tokenizer.json")),
    # prompts
    ("sample.py --start='seventeen tokens.'", "shorten it"),
    ("sample.py --start=FILE:missing.txt", "missing.txt"),
    ("sample.py --start=FILE:data", "UTF-8"),
    ("sample.py --start=FILE:prompt.txt", "UTF-8", file("prompt.txt", b"caf\xe9")),
    ("sample.py --start=FILE:prompt.txt", "shorten it", file("prompt.txt", "long " * 100)),
    ("sample.py --start=\udcff", "cannot spell"),
]


def names(cases):
    return [ascii(case[0]) + ("" if len(case) == 2 else f" {i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", BAD_INPUTS, ids=names(BAD_INPUTS))
def test_bad_input(trained, monkeypatch, capfd, recwarn, case):
    """Bad input ends a script with status 2 and one line that names the remedy, before any update. No file
    is changed, made or removed, and nothing from a file is executed."""
    command, remedy, *damage = case
    call_before(monkeypatch, "update_", lambda *arguments: pytest.fail("trained all the same"))
    for spoil in damage:
        spoil()
    before = tree()
    status = run(command)
    lines = capfd.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and remedy in lines[0], lines
    assert not [w for w in recwarn if w.category is UserWarning]  # which would print one more line
    assert tree() == before


SOME_BAD_INPUTS = [case for case in BAD_INPUTS if case[0] in (
    "train.py tiny.py --n_layr=2", "train.py tiny.py --dataset=nowhere", "train.py tiny.py --device=cuda:99",
    "sample.py --start=FILE:missing.txt") or case[2:] == (zipped_bomb,)]


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME_BAD_INPUTS, ids=names(SOME_BAD_INPUTS))
def test_bad_input_to_a_process(trained, case):
    """The same of a few in a process of their own: nothing is printed on the way, either."""
    command, remedy, *damage = case
    for spoil in damage:
        spoil()
    before = tree()
    status, error = finish(launch(command))
    assert status == 2
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and remedy in error
    assert {**tree(), **before} == tree() and tree().keys() - before.keys() == {"stdout.txt", "stderr.txt"}


@pytest.mark.parametrize("flags", [
    "", "--d_mlp=40", "--d_model=24 --min_weights_per_neuron=5", "--min_weights_per_neuron=100",
    "--tie_embeddings=True --min_weights_per_neuron=3"])
def test_the_smallest_target_that_is_offered_fits(here, flags, capsys):
    """The target that the error message offers trains, and one a little smaller does not."""
    assert run(f"train.py tiny.py {flags} --target_l0_fraction=1e-4") == 2
    smallest = float(capsys.readouterr().err.split("smallest that fits is ")[1])
    assert run(f"train.py tiny.py {flags} --target_l0_fraction={smallest - 2e-6}") == 2
    assert run(f"train.py tiny.py {flags} --target_l0_fraction={smallest}") == 0
