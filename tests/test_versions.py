"""What is too old for this says so in one line, not in a traceback from the middle of an import; and what CI
installs is within the ranges that requirements.txt allows.
"""
import os
import re
import subprocess
import sys

import pytest

from conftest import REPO

TORCH = "sys.modules['torch'] = types.SimpleNamespace(__version__='{}')"


def read(name):
    with open(os.path.join(REPO, name), encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("change, words", [
    ("sys.version_info = (3, 10, 9)", "this is Python 3.10: 3.11 or later"),
    (TORCH.format("2.5.1+cu124"), "this is PyTorch 2.5.1"),
    (TORCH.format("1.13.0"), "this is PyTorch 1.13.0"),
    (TORCH.format("2.10.0a0+git"), None), ("", None)])
def test_what_is_too_old_is_named(change, words):
    """Exit status 2 and one line, before anything else of ours is imported."""
    code = f"import sys, types\n{change}\nimport configurator"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True,
                            check=False)
    if words is None:
        assert (result.returncode, result.stderr) == (0, "")
    else:
        assert result.returncode == 2 and result.stderr.startswith(f"error: {words}")
        assert result.stderr.count("\n") == 1


def version(text):
    return [int(part) for part in text.split(".")]


def test_ci_tests_the_versions_that_are_allowed():
    """Each requirement has an exact version in constraints.txt, in the range."""
    exact = dict(re.findall(r"^([a-z]+)==([\d.]+)$", read("constraints.txt"), re.MULTILINE))
    required = re.findall(r"^([a-z]+)>=([\d.]+),<([\d.]+)", read("requirements.txt"), re.MULTILINE)
    assert len(required) == sum(not line.startswith("#") for line in read("requirements.txt").splitlines())
    for name, least, beyond in required:
        assert version(least) <= version(exact[name]) < version(beyond), name
    assert exact.keys() == {name for name, *_ in required} | {"ruff"}
