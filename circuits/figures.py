"""Figures, drawn without a screen: what the picture of a circuit and those of the experiments share.

matplotlib is imported only when a figure is drawn, and never its pyplot: the backend of a notebook that
calls this stays as it is.
"""
import functools
import importlib

from configurator import fail

FONTS = (("monospace", "normal"), ("monospace", "bold"), ("sans-serif", "normal"))  # family, weight


def part_of_matplotlib(name):
    """A module of matplotlib; ends the script if it is not installed."""
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ImportError as e:
        fail(f"figures need matplotlib ({e}): pip install -r requirements.txt")


def new_figure(width, height, rows=1, **options):
    """A figure of `width` x `height` inches and its axes, one below the other; `options` of `subplots`."""
    figure = part_of_matplotlib("figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, **options)


@functools.cache
def glyphs():
    """The code points of the characters that all FONTS have."""
    manager = part_of_matplotlib("font_manager")
    paths = [manager.findfont(manager.FontProperties(family=family, weight=weight))
             for family, weight in FONTS]
    return frozenset.intersection(*(frozenset(manager.get_font(path).get_charmap()) for path in paths))


def drawable(value):
    """A text, or all texts in lists and dicts, with an escape for each character that a font lacks."""
    if isinstance(value, str):
        return "".join(c if ord(c) in glyphs() else ascii(c)[1:-1] for c in value)
    if isinstance(value, dict):
        return {key: drawable(x) for key, x in value.items()}
    return [drawable(x) for x in value] if isinstance(value, list) else value


def plain(axis):
    """Two spines and a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def save(figure, path):
    """Write a figure to `path`; ends the script if that cannot be done."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        fail(f"cannot write the figure {path} ({e}): make room, or choose another path for it")
    print(f"wrote {path}")
