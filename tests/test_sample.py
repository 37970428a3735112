"""Samples: what the prompt and top_k do. Generation itself is tested in test_sparsity.py."""
import math
from pathlib import Path

import pytest
import torch

from conftest import call_before, checkpoint, finish, launch, run
from model import GPT


def test_top_k_0_draws_among_all_tokens(trained, capsys):
    """sample.py --top_k=0 prints what a top_k of the whole vocabulary does."""
    printed = []
    for top_k in (0, 257):
        assert run(f"sample.py --device=cpu --num_samples=1 --max_new_tokens=20 --top_k={top_k}") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_prompt_may_fill_the_window(trained, capsys):
    """A prompt of block_size tokens is continued; one token more is refused."""
    flags = "--device=cpu --num_samples=1 --max_new_tokens=3"
    assert run(f"sample.py {flags} --start=sixteen-tokens-.") == 0
    assert "sixteen-tokens-." in capsys.readouterr().out
    assert run(f"sample.py {flags} --start=seventeen-tokens.") == 2


def test_a_prompt_from_a_file(trained, monkeypatch, capsys):
    """FILE: may begin with the home folder, and the file with a byte order mark, which is no text."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("prompt.txt").write_text("import os", encoding="utf-8-sig")
    assert run("sample.py --device=cpu --num_samples=1 --max_new_tokens=3 --start=FILE:~/prompt.txt") == 0
    assert "\nimport os" in capsys.readouterr().out


@pytest.mark.parametrize("flags, printed", [
    ("--out_dir=out", "ckpt.pt"), ("--out_dir=out --checkpoint=best.pt", "best.pt"),
    ("--init_from=out", "ckpt.pt"), ("--init_from=out --checkpoint=best.pt", "best.pt"),
    ("--init_from=out/best.pt", "best.pt")])
def test_the_checkpoint_that_was_named_is_the_one(trained, capsys, monkeypatch, flags, printed):
    """Of an out_dir, however that is given."""
    found = []
    call_before(monkeypatch, "stream", lambda model, *_: found.append(model.lm_head.weight), owner=GPT)
    assert run(f"sample.py {flags} --device=cpu --num_samples=1 --max_new_tokens=1") == 0
    assert torch.equal(found[0], checkpoint(printed)["model"]["lm_head.weight"])
    assert not torch.equal(checkpoint("best.pt")["model"]["lm_head.weight"],
                           checkpoint("ckpt.pt")["model"]["lm_head.weight"])


def test_two_names_of_a_model_are_one_too_many(trained, capsys):
    """What would be ignored is refused: out_dir beside init_from, and a checkpoint beside a file."""
    for flags in ("--init_from=out --out_dir=out", "--init_from=out/best.pt --checkpoint=best.pt",
                  "--init_from=out --checkpoint=nonsense.pt"):
        assert run(f"sample.py {flags}") == 2
    assert capsys.readouterr().err.count("leave ") == 3


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(trained, capsys, number):
    """There is nothing to sample from."""
    saved = checkpoint()
    saved["model"]["lm_head.weight"][3, 4] = number
    torch.save(saved, "out/ckpt.pt")
    assert run("sample.py") == 2
    assert capsys.readouterr().err.startswith("error: the model has weights that are no numbers")


def test_memory_that_does_not_suffice(trained, monkeypatch, capsys):
    """One line with a remedy that sample.py has."""
    call_before(monkeypatch, "stream", lambda *_: torch.empty(2**56), owner=GPT)
    assert run("sample.py --device=cpu") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory") and "--max_new_tokens" in line


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_a_terminal_that_is_not_utf8(trained, monkeypatch, encoding):
    """What it cannot show becomes a question mark, and the samples are printed to their end."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    status, error = finish(launch("sample.py --num_samples=2 --max_new_tokens=20 --device=cpu --start=€"))
    assert (status, error) == (0, "")
    assert "sample 2 of 2\n?" in Path("stdout.txt").read_text(encoding=encoding)
