"""Figures, drawn without a screen: what the picture of a circuit and those of the experiments share.

matplotlib is imported only when a figure is drawn, and never its pyplot: the backend of a notebook that
calls this stays as it is.
"""
from configurator import fail


def new_figure(width, height, rows=1, **options):
    """A figure of `width` x `height` inches and its axes, one below the other; `options` of `subplots`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        fail(f"figures need matplotlib ({e}): pip install -r requirements.txt")
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, **options)


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
