"""Settings of a script, from config files and from the command line, checked.

    python train.py config/quickstart.py --d_model=256 --target_l0_fraction=1/32

A script's settings are its module-level globals, and `configure(globals())` changes them in the order
given: a bare argument is a config file (Python that assigns to settings), `--key=value` is one setting, and
`--help` lists all. A key that the script does not have, or a value of another type than the default's, ends
the script: a misspelt setting never runs silently. How a script ends, and how it reads JSON that people may
have touched, is here too, as every script imports this module.
"""
import difflib
import errno
import json
import math
import os
import re
import runpy
import sys
from contextlib import contextmanager, suppress
from fractions import Fraction
from types import ModuleType

TYPES = (bool, int, float, str)  # of settings
is_script = False  # whether a script runs, as `configure` notes: else someone's own Python has imported this
# those, in any script, that may be a path: ~ is the home folder there
PATHS = {"out_dir", "init_from", "data_dir", "dataset", "tokenizer", "task", "circuit", "beside", "image",
         "checkpoint"}

# ----------------------------------------------------------------------------------------------------------
# how a script ends


def error_line(message):
    """An error as one line, whatever is in the message."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: ascii(c[0])[1:-1], f"error: {message}")


def complain(message):
    """Print an error: one line on stderr, under torchrun one per node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            print(error_line(message), file=sys.stderr, flush=True)


class UserError(SystemExit):
    """What `fail` raises: an error that a user can mend, its text the sentence that says how.

    It is a SystemExit so that every script ends with status 2 and no traceback, wherever it is raised. Its
    sentence is str(e), for `except UserError as e`; `except Exception` does not catch it. A notebook shows
    the sentence and goes on. A Python program of one's own that does not catch it ends with the line of
    `complain`, which Python prints itself, as the code is that line.
    """

    def __init__(self, message):
        super().__init__(str(message))
        self.code = 2 if is_script else error_line(message)


def fail(message):
    """End the script as user errors do: one line on stderr, exit status 2. If no script runs, whoever
    catches the UserError has the sentence, and nothing is printed here."""
    if is_script:
        complain(message)
    raise UserError(message)


def tell(line):
    """Print a line that must be read: where standard output takes no more, on stderr."""
    try:
        print(line, flush=True)
    except OSError:
        if sys.stdout is not sys.stderr:
            lose_output()
            tell(line)


def lose_output():
    """Standard output takes no more: what is still printed goes to stderr, what Python holds to nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = sys.stderr


def is_gone(error):
    """Whether an OSError of standard output says that no one reads: a pipe or a terminal that was closed."""
    return error.errno in (errno.EPIPE, errno.EIO)


def check_output(after_error=False):
    """End the script if standard output takes no more: silently if its reader has gone, as `| head` does.

    After an error, which may have been of standard output or of any file, a new line shows which it was.
    """
    try:
        print(end="\n" if after_error else "", flush=True)
    except OSError as e:
        lose_output()
        if is_gone(e):
            raise SystemExit(141) from None  # what a shell reports of a program that SIGPIPE ends
        fail(f"cannot write the standard output ({e.strerror}): make room, or send it elsewhere")


@contextmanager
def ends_explained(out_of_memory="take a smaller model, or more memory"):
    """Decorates a script's main: memory that does not suffice, the CPU's or the GPU's, output that cannot be
    written and Ctrl-C end it without a traceback. `out_of_memory` says what to do then."""
    try:
        try:
            yield
        finally:
            check_output()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError:
        check_output(after_error=True)
        raise
    except (MemoryError, RuntimeError, ValueError) as e:
        if not isinstance(e, MemoryError) and not re.search(
                "out of memory|can't allocate|Storage size calculation overflowed|array is too big", str(e)):
            raise
        fail(f"out of memory: {out_of_memory}")


def check_versions():
    """End the script on a Python or PyTorch from before those that this was tried with."""
    torch, problem = sys.modules.get("torch"), ""  # prepare.py has no need of it
    if sys.version_info < (3, 11):  # noqa: UP036  this line is for those who have an older one
        problem = f"this is Python {'.'.join(map(str, sys.version_info[:2]))}: 3.11 or later is needed"
    elif torch and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        problem = (f"this is PyTorch {torch.__version__}, 2.6 or later is needed: pip install -r "
                   "requirements.txt")
    if problem:  # before it is known whether a script runs
        complain(problem)
        raise SystemExit(2)


def one_line(error):
    """An exception in a few words, for the line of `fail`."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def shown(value):
    """A value in a few words: Python refuses to write very long integers, and some values are long."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  whatever the value's own code may raise
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_json(path):
    """The object in a JSON file that people may have touched, a dict.

    Raises OSError if the file cannot be read, and ValueError, in a few words, if it holds anything else.
    """
    with open(path, encoding="utf-8-sig") as f:
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"no JSON: {one_line(e)}") from None
    if type(found) is not dict:
        raise ValueError(f"no JSON object, but {shown(found)}")
    return found


# ----------------------------------------------------------------------------------------------------------
# settings


def settings_of(namespace):
    """The settings among a script's globals: lower-case names of a bool, an int, a float or a string."""
    return {k: v for k, v in namespace.items() if k.islower() and k[0] != "_" and type(v) in TYPES}


def configure(settings, argv=None):
    """Override `settings` (a script's globals()) in place from `argv` (default: the command line).

    Returns the set of names that were set. Ends the script with one line (see `fail`) on an unknown key, a
    wrong type, an unreadable file or an argument that is neither a file nor `--key=value`.
    """
    global is_script
    is_script = True
    if sys.stdout is None:  # as after >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for as long as the script runs
    if argv is None and hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show becomes a question mark
    known = settings_of(settings)
    chosen = {}
    for arg in sys.argv[1:] if argv is None else argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if arg in ("-h", "--help"):
            print(help_of(settings, known))
            raise SystemExit(0)
        if not arg.startswith("-"):
            for key, value in run_config_file(os.path.expanduser(arg), known).items():
                chosen[key] = check(key, value, known, where=f" (in {arg})")
        elif arg.startswith("--") and equals:
            chosen[key] = check(key, parse(text, known.get(key)), known)
        else:
            how = f"{arg}=VALUE" if key in known else "--key=value, or the name of a config file"
            fail(f"cannot read the argument {arg!r}: write {how}, without spaces; --help lists all settings")
    settings.update(chosen)
    return set(chosen)


def difference(settings, other, but=()):
    """The settings whose value is not that of `other` (name -> value), as they are written: a string."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings_of(settings).items())
                     if name in other and name not in but and value != other[name])


def adopt(settings, earlier, given):
    """Go on with the settings of an `earlier` run (name -> value), but for those that were `given` now.

    `settings` (a script's globals()) change in place; what is no setting of the script is not added.
    """
    known = settings_of(settings)
    now = {name: settings[name] for name in given}
    settings.update({name: check(name, value, known, where=" (of the earlier run)")
                     for name, value in earlier.items() if name in known})
    settings.update(now)


def check_rules(settings, rules):
    """End the script if a setting breaks one of `rules`: (names, by spaces; what is legal; the words)."""
    for names, legal, rule in rules:
        for name in names.split():
            if not legal(settings[name]):
                fail(f"{name}={settings[name]} {rule}")


def help_of(settings, known):
    """A script's docstring, and its settings with their comments, as they stand in its file."""
    with open(settings["__file__"], encoding="utf-8") as f:
        lines = f.read().split("\ndef ")[0].splitlines()
    listed = [settings["__doc__"]]
    for line in lines:
        if line.partition(" = ")[0] in known:
            listed.append(f"--{line.replace(' = ', '=', 1)}")
        elif re.match("# +[a-z]", line):
            listed.append(line)
    return "\n".join(listed)


def closest(key, known):
    """The setting that a misspelt one, or the beginning or the end of a name, may have meant; None if none
    is alike."""
    part = [name for name in known if key and (name.startswith(key) or name.endswith(key))]
    return part[0] if part else next(iter(difflib.get_close_matches(key, known, n=1)), None)


def run_config_file(path, known):
    """Run the Python file at `path`; return what it assigned: not its modules, functions and classes."""
    if not os.path.isfile(path):
        fail(f"no config file {path}: check the path, or write a setting as --key=value")
    try:
        namespace = runpy.run_path(path)
    except BaseException as e:  # noqa: BLE001  whatever the user's own code may raise
        fail(f"the config file {path} does not run: {one_line(e)}")
    return {k: v for k, v in namespace.items() if not k.startswith("_") and (
        k in known or not (isinstance(v, ModuleType) or callable(v)))}


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
        close = closest(key, known)
        close = f"the closest that exists is {close!r}" if close else "--help lists those that exist"
        own = "; names of the file's own begin with _" if where else ""
        fail(f"unknown setting {key!r}{where}: {close}{own}")
    expected = type(known[key])
    if expected is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not expected:
        fail(f"{key}={shown(value)}{where} has the wrong type: expected {expected.__name__}, like "
             f"{known[key]!r}")
    if expected is int and not -2**63 <= value < 2**63:
        fail(f"{key}{where} has more than 63 bits: choose a smaller number")
    if key in PATHS and "\0" in value:
        fail(f"{key}={value!r}{where} is no path, as it holds a NUL: choose another")
    return os.path.expanduser(value) if key in PATHS else value


check_versions()  # this module is the first of ours that a script imports
