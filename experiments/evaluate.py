"""Measure trained models on all of val, and print a CSV: a row for each, and one for counting bigrams.

    python -m experiments.evaluate --out_dirs=out/one_gpu,out/one_gpu_dense

All windows of val are taken, without overlap. A standard error is over windows as if they were
independent, though those of a file are alike: it is a lower bound on what another val split would change,
and says nothing of another seed. Kurtosis is of the tokens at which the residual stream is not zero.
Prunable and nonzero count what is pruned: no bigram table, norm or sink. The smoothing of the bigrams is the
best of five on val itself, in their favour.
"""
import csv
import math
import os
import sys

import numpy as np
import torch

from configurator import configure, ends_explained, fail
from measures import kurtosis, sparsity_statistics
from runs import load_run, this_process, windows

out_dirs = "out"  # of training runs, by commas, all on the same data; or folders of released models
checkpoint = "ckpt.pt"  # or best.pt
dataset = ""  # '': what they were trained on, which released models do not say; data of their tokenizer
batch_size = 16  # windows at a time
device = "auto"
dtype = "auto"

COLUMNS = ("model", "updates", "prunable", "nonzero", "dead_neurons", "val_loss", "val_loss_se",
           "bits_per_byte", "kurtosis", "kurtosis_se")
LARGEST_VOCABULARY = 2**13  # of which bigrams are counted: in a table of its square


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


@torch.no_grad()
def measure(model, data, process):
    """Loss in nats per token, and kurtosis of the final residual stream, of each window of val."""
    T, losses, kurtoses = model.config.block_size, [], []
    starts = np.arange(0, len(data.val) - T, T)
    for batch in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        idx, targets = windows(data.val, batch, T, process)
        with process.autocast():
            x = model.residual_stream(idx)
            logits = model.unembed(x, idx)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        losses += loss.mean(1).tolist()
        kurtoses += kurtosis(x.float()).nanmean(1).tolist()
    return np.array(losses), np.array(kurtoses)


def count_bigrams(tokens, vocab_size, chunk=2**24):
    """How often each token is followed by each: (vocab_size, vocab_size)."""
    pairs = np.zeros(vocab_size**2, dtype=np.int64)
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[start:start + chunk + 1].astype(np.int64)
        pairs += np.bincount(part[:-1] * vocab_size + part[1:], minlength=vocab_size**2)
    return pairs.reshape(vocab_size, vocab_size)


def bigram_loss(tokens, pairs, strength):
    """Of counted `pairs`, each token's with `strength` counts more, spread as the single tokens are."""
    single = (pairs.sum(0) + 1) / (pairs.sum() + len(pairs))
    first, second = tokens[:-1], tokens[1:]
    p = (pairs[first, second] + strength * single[second]) / (pairs.sum(1)[first] + strength)
    return -np.log(p).mean()


@ends_explained("halve --batch_size")
def main():
    configure(globals())
    if batch_size < 1:
        fail(f"batch_size={batch_size} must be at least 1")
    process = this_process(device, dtype)
    folders = [os.path.expanduser(folder) for folder in out_dirs.split(",")]
    runs = [load_run(folder, checkpoint, dataset) for folder in folders]
    if not dataset and len({saved["settings"]["dataset"] for saved, _, _ in runs}) > 1:
        fail(f"out_dirs={out_dirs} were not all trained on the same data: evaluate them apart")
    writer = csv.DictWriter(sys.stdout, COLUMNS)
    writer.writeheader()
    for folder, (saved, model, data) in zip(folders, runs, strict=True):
        losses, kurtoses = measure(model.to(process.device), data, process)
        kurtoses = kurtoses[~np.isnan(kurtoses)]
        sparsity = sparsity_statistics(model)
        writer.writerow({
            "model": os.path.basename(os.path.abspath(folder)), "updates": saved["step"],
            "prunable": sum(p.numel() for _, p, _ in model.sparse_parameters()),
            "nonzero": sparsity["sparsity/nonzero"], "dead_neurons": sparsity["sparsity/dead_neurons"],
            "val_loss": f"{losses.mean():.4f}", "val_loss_se": f"{standard_error(losses):.4f}",
            "bits_per_byte": f"{data.bits_per_byte('val', losses.mean()):.4f}",
            "kurtosis": f"{kurtoses.mean():.2f}", "kurtosis_se": f"{standard_error(kurtoses):.2f}"})
        sys.stdout.flush()
    vocab_size = data.meta["vocab_size"]
    if vocab_size > LARGEST_VOCABULARY:
        print(f"bigrams are not counted in a vocabulary of more than {LARGEST_VOCABULARY}", file=sys.stderr)
        return
    pairs = count_bigrams(data.train, vocab_size)
    loss = min(bigram_loss(data.val, pairs, strength) for strength in (10, 30, 100, 300, 1000))
    writer.writerow({"model": "counted bigrams", "val_loss": f"{loss:.4f}",
                     "bits_per_byte": f"{data.bits_per_byte('val', loss):.4f}"})


if __name__ == "__main__":
    main()
