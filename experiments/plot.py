"""Draw the curves of a run from its log: loss, share of nonzero weights, learning rate.

    python -m experiments.plot --out_dir=out/quickstart                    # writes out/quickstart/curves.png
    python experiments/plot.py --out_dir=out/sparse --beside=out/dense     # with the val loss of another run
"""
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # if run by its path
from checkpoints import read_log
from circuits.figures import new_figure, plain, save
from configurator import configure, ends_explained

out_dir = "out"  # of the training run
beside = ""  # the out_dir of another run, to compare with
image = ""  # where to write the figure; '': out_dir/curves.png


def curve(records, key):
    """Steps and values of the records that have `key`: two lists."""
    found = [(r["step"], r[key]) for r in records if key in r]
    return [step for step, _ in found], [value for _, value in found]


@ends_explained()
def main():
    configure(globals())
    records = read_log(os.path.join(out_dir, "log.jsonl"))
    figure, (loss, l0, lr) = new_figure(7, 6, rows=3, sharex=True, height_ratios=(2, 1, 1))
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
        plain(axis)
    figure.align_ylabels()
    save(figure, image or os.path.join(out_dir, "curves.png"))


if __name__ == "__main__":
    main()
