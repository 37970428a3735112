"""Samples: what the prompt and top_k do. Generation itself is tested in test_sparsity.py."""
from pathlib import Path

import pytest

from conftest import finish, launch, run


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


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_a_terminal_that_is_not_utf8(trained, monkeypatch, encoding):
    """What it cannot show becomes a question mark, and the samples are printed to their end."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    status, error = finish(launch("sample.py --num_samples=2 --max_new_tokens=20 --device=cpu --start=€"))
    assert (status, error) == (0, "")
    assert "sample 2 of 2\n?" in Path("stdout.txt").read_text(encoding=encoding)
