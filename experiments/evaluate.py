"""Measure trained models on all of val, and print a CSV: a row for each, and one for counting bigrams.

    python -m experiments.evaluate --out_dirs=out/one_gpu,out/one_gpu_dense

All windows of val are taken, without overlap. A standard error is over windows as if they were
independent, though those of a file are alike: it is a lower bound on what another val split would change,
and says nothing of another seed. The smoothing of the bigrams is the best of three on val itself, in their
favour.
"""
import csv
import math
import os
import sys

import numpy as np
import torch

import train
from configurator import configure, fail

out_dirs = "out"  # of training runs, by commas, all on the same data
checkpoint = "ckpt.pt"  # or best.pt
batch_size = 16  # windows at a time
device = "auto"
dtype = "auto"

COLUMNS = ("model", "updates", "parameters", "nonzero", "dead_neurons", "val_loss", "val_loss_se",
           "bits_per_byte", "kurtosis", "kurtosis_se")


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


@torch.no_grad()
def measure(model, data, place):
    """Loss in nats per token, and kurtosis of the final residual stream, of each window of val."""
    T, losses, kurtoses = model.config.block_size, [], []
    starts = np.arange(0, len(data.val) - T, T)
    for batch in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        idx, targets = train.windows(data.val, batch, place)
        with place.autocast():
            x = model.residual_stream(idx)
            logits = model.unembed(x, idx)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        losses += loss.mean(1).tolist()
        kurtoses += train.kurtosis(x.float()).mean(1).tolist()
    return np.array(losses), np.array(kurtoses)


def bigram_loss(data, strength):
    """Of the bigrams that were counted in train, with `strength` counts spread as the single tokens are."""
    V = data.meta["vocab_size"]
    pairs = np.zeros(V * V, dtype=np.int64)
    for start in range(0, len(data.train) - 1, 2**24):
        part = data.train[start:start + 2**24 + 1].astype(np.int64)
        pairs += np.bincount(part[:-1] * V + part[1:], minlength=V * V)
    pairs = pairs.reshape(V, V)
    single = (pairs.sum(0) + 1) / (pairs.sum() + V)
    val = data.val.astype(np.int64)
    first, second = val[:-1], val[1:]
    p = (pairs[first, second] + strength * single[second]) / (pairs.sum(1)[first] + strength)
    return -np.log(p).mean()


def main():
    configure(globals())
    place = train.find_place(device, dtype)
    writer = csv.DictWriter(sys.stdout, COLUMNS)
    writer.writeheader()
    for out_dir in out_dirs.split(","):
        saved = train.load_checkpoint(os.path.join(out_dir, checkpoint))
        model = train.model_of(saved).to(place.device).eval()
        train.block_size = model.config.block_size
        data = train.load_data(os.path.join("data", saved["settings"]["dataset"]), train.block_size)
        if data.meta["tokenizer_sha256"] != saved["tokenizer_sha256"]:
            fail(f"data/{saved['settings']['dataset']} has another tokenizer than the model of {out_dir} "
                 "was trained with: prepare that data again")
        losses, kurtoses = measure(model, data, place)
        sparsity = train.sparsity_statistics(model, saved["step"])
        writer.writerow({
            "model": os.path.basename(os.path.abspath(out_dir)), "updates": saved["step"],
            "parameters": sum(p.numel() for _, p, _ in model.sparse_parameters()),
            "nonzero": sparsity["sparsity/nonzero"], "dead_neurons": sparsity["sparsity/dead_neurons"],
            "val_loss": f"{losses.mean():.4f}", "val_loss_se": f"{standard_error(losses):.4f}",
            "bits_per_byte": f"{losses.mean() / math.log(2) * data.tokens_per_byte('val'):.4f}",
            "kurtosis": f"{kurtoses.mean():.2f}", "kurtosis_se": f"{standard_error(kurtoses):.2f}"})
        sys.stdout.flush()
    loss = min(bigram_loss(data, strength) for strength in (1, 10, 100))
    writer.writerow({"model": "counted bigrams", "val_loss": f"{loss:.4f}",
                     "bits_per_byte": f"{loss / math.log(2) * data.tokens_per_byte('val'):.4f}"})


if __name__ == "__main__":
    main()
