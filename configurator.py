"""Settings of a script, from config files and from the command line, checked.

    python train.py config/quickstart.py --d_model=256 --target_l0_fraction=1/32

A script's settings are its module-level globals, and `configure(globals())` changes them in the order
given: a bare argument is a config file (Python that assigns to settings), `--key=value` is one setting. A
key that the script does not have, or a value of another type than the default's, ends the script: a
misspelt setting never runs silently.
"""
import difflib
import math
import os
import runpy
import sys
from fractions import Fraction

TYPES = (bool, int, float, str)  # of settings
# those, in any script, that may be a path: ~ is the home folder there
PATHS = {"out_dir", "init_from", "data_dir", "dataset", "tokenizer", "task", "beside", "image"}


class UserError(SystemExit):
    """What `fail` raises: an error that a user can mend, its text the sentence that says how.

    It is a SystemExit so that every script ends with status 2 and no traceback, wherever it is raised. A
    notebook does not end by it, but shows the sentence; `except UserError as e` has it in str(e).
    """

    def __init__(self, message):
        super().__init__(str(message))
        self.code = 2


def fail(message):
    """End the script as user errors do: one line on stderr (under torchrun one per node), exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise UserError(message)


def check_versions():
    """End the script on a Python or PyTorch from before those that this was tried with."""
    torch = sys.modules.get("torch")  # prepare.py has no need of it
    if sys.version_info < (3, 11):  # noqa: UP036  this line is for those who have an older one
        fail(f"this is Python {'.'.join(map(str, sys.version_info[:2]))}: 3.11 or later is needed")
    if torch and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        fail(f"this is PyTorch {torch.__version__}, 2.6 or later is needed: pip install -r requirements.txt")


def one_line(error):
    """An exception in a few words, for the line of `fail`."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def settings_of(namespace):
    """The settings among a script's globals: lower-case names of a bool, an int, a float or a string."""
    return {k: v for k, v in namespace.items() if k.islower() and k[0] != "_" and type(v) in TYPES}


def configure(settings, argv=None):
    """Override `settings` (a script's globals()) in place from `argv` (default: the command line).

    Returns the set of names that were set. Ends the script with one line (see `fail`) on an unknown key, a
    wrong type, an unreadable file or an argument that is neither a file nor `--key=value`.
    """
    if argv is None:  # a script that runs: what its terminal cannot show becomes a question mark
        sys.stdout.reconfigure(errors="replace")
    known = settings_of(settings)
    chosen = {}
    for arg in sys.argv[1:] if argv is None else argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("-"):
            for key, value in run_config_file(os.path.expanduser(arg), known).items():
                chosen[key] = check(key, value, known, where=f" (in {arg})")
        elif arg.startswith("--") and equals:
            chosen[key] = check(key, parse(text, known.get(key)), known)
        else:
            fail(f"cannot read the argument {arg!r}: write --key=value, or the name of a config file; "
                 "each setting is explained at the top of the script")
    settings.update(chosen)
    return set(chosen)


def difference(settings, other, but=()):
    """The settings whose value is not that of `other` (name -> value), as they are written: a string."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings_of(settings).items())
                     if name in other and name not in but and value != other[name])


def adopt(settings, earlier, given, look):
    """Go on with the settings of an `earlier` run (name -> value), but for those that were `given` now.

    `settings` (a script's globals()) change in place; what is no setting of the script is not added. Returns
    what look() saw while all settings were the earlier run's, before those that were given came back.
    """
    known = settings_of(settings).keys()
    now = {name: settings[name] for name in given}
    settings.update({name: value for name, value in earlier.items() if name in known})
    seen = look()
    settings.update(now)
    return seen


def check_rules(settings, rules):
    """End the script if a setting breaks one of `rules`: (names, by spaces; what is legal; the words)."""
    for names, legal, rule in rules:
        for name in names.split():
            if not legal(settings[name]):
                fail(f"{name}={settings[name]} {rule}")


def run_config_file(path, known):
    """Run the Python file at `path`; return what it assigned, not what else it imported or defined."""
    if not os.path.isfile(path):
        fail(f"no config file {path}: check the path, or write a setting as --key=value")
    try:
        namespace = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # noqa: BLE001  whatever the user's own code may raise
        fail(f"the config file {path} does not run: {type(e).__name__}: {e}".replace("\n", " "))
    return {k: v for k, v in namespace.items() if not k.startswith("_") and (k in known or type(v) in TYPES)}


def parse(text, default):
    """Read `text` as a value of the default's type, or return it as it is, for `check` to complain of."""
    try:
        if type(default) is bool:
            return {"true": True, "false": False}[text.lower()]
        if type(default) is int:
            return int(text)
        if type(default) is float:
            number = float(Fraction(text)) if "/" in text else float(text)  # 1/64 is welcome
            return number if math.isfinite(number) else text
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        pass
    return text


def check(key, value, known, where=""):
    """Return `value` as setting `key` takes it, an int as a float if need be; or end the script."""
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0)
        fail(f"unknown setting {key!r}{where}: the closest that exists is {close[0]!r}")
    expected = type(known[key])
    if expected is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not expected:
        fail(f"{key}={value!r}{where} has the wrong type: expected {expected.__name__}, like {known[key]!r}")
    return os.path.expanduser(value) if key in PATHS else value


check_versions()  # this module is the first of ours that a script imports
