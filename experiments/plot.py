"""Draw the curves of a run from its log: loss, share of nonzero weights, learning rate.

    python -m experiments.plot --out_dir=out/quickstart                    # writes out/quickstart/curves.png
    python -m experiments.plot --out_dir=out/sparse --beside=out/dense     # with the val loss of another run
"""
import json
import os

import matplotlib

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt

from configurator import configure, fail

out_dir = "out"  # of the training run
beside = ""  # the out_dir of another run, to compare with
image = ""  # where to write the figure; '': out_dir/curves.png


def read_log(path):
    """The records of a log.jsonl, a list of dicts."""
    try:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f if line.endswith("}\n")]  # a killed run may tear its last
    except (OSError, ValueError) as e:
        fail(f"cannot read the log {path} ({e}): give the --out_dir of a training run")


def curve(records, key):
    """Steps and values of the records that have `key`: two lists."""
    found = [(r["step"], r[key]) for r in records if key in r]
    return [step for step, _ in found], [value for _, value in found]


def save(figure, path):
    """Write a figure to `path`; ends the script if that cannot be done."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        fail(f"cannot write {path} ({e}): choose another --image")
    print(f"wrote {path}")


def main():
    configure(globals())
    records = read_log(os.path.join(out_dir, "log.jsonl"))
    figure, (loss, l0, lr) = plt.subplots(3, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1, 1))
    loss.plot(*curve(records, "loss"), color="0.75", linewidth=1, label="training batch")
    loss.plot(*curve(records, "val/loss"), color="C0", marker="o", markersize=4, label="validation")
    if beside:
        loss.plot(*curve(read_log(os.path.join(beside, "log.jsonl")), "val/loss"), color="0.3", marker="s",
                  markersize=4, linestyle="--", label=f"validation of {beside}")
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False)
    l0.plot(*curve(records, "sparsity/fraction"), color="C1", marker=".", markersize=4)
    l0.set_ylabel("nonzero weights")
    l0.set_ylim(0, 1.05)
    lr.plot(*curve(records, "lr"), color="C2")
    lr.set_ylabel("learning rate")
    lr.set_ylim(0)
    lr.set_xlabel("step")
    for axis in (loss, l0, lr):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.align_ylabels()
    figure.tight_layout()
    save(figure, image or os.path.join(out_dir, "curves.png"))


if __name__ == "__main__":
    main()
