"""What is measured of a model: its loss, and statistics of its activations, gradients, weights and sparsity.

Names as they are in log.jsonl. The statistics of training are samples and sums that cost it little;
experiments/evaluate.py measures a trained model over all of val.
"""
import re

import numpy as np
import torch

from runs import windows


@torch.no_grad()
def estimate_loss(model, data, process, eval_iters, batch_size):
    """Loss in nats per token, and bits per byte, on evenly spaced windows of both splits.

    The windows are the same at each call, eval_iters batches of batch_size, shared out over the ranks. No
    random number is drawn.
    """
    block_size = model.config.block_size
    model.eval()
    record = {}
    for split in ("train", "val"):
        tokens = getattr(data, split)
        starts = np.linspace(0, len(tokens) - block_size - 1, eval_iters * batch_size).astype(np.int64)
        total = torch.zeros((), dtype=torch.float64, device=process.device)
        for batch in starts.reshape(eval_iters, batch_size)[process.rank::process.world_size]:
            with process.autocast():
                total += model(*windows(tokens, batch, block_size, process))[1]
        loss = process.sum(total)[0].item() / eval_iters
        record[f"{split}/loss"] = loss
        record[f"{split}/bits_per_byte"] = data.bits_per_byte(split, loss)
    model.train()
    return record


def tensor_group(name):
    """A parameter's name without its layer: the same tensor of all layers is one group."""
    return re.sub(r"transformer\.(h\.\d+\.)?|\.weight$", "", name)


def kurtosis(x):
    """Of each token's channels, x (..., d_model): (...). 3 if they are Gaussian, NaN if all are equal."""
    x = x - x.mean(-1, keepdim=True)
    return x.pow(4).mean(-1) / x.square().mean(-1).square()


def watch_activations(model):
    """Let every node site, and the final norm of its input, keep statistics of what passed through it last.

    They are of one token at each position, from the sequences of the batch in turn: a sample, at a fraction
    of the cost. Of kurtosis, which differs widely between tokens, it is a rough one.
    """

    def some_tokens(x):
        positions = torch.arange(x.size(1), device=x.device)
        return x.detach()[positions % len(x), positions].float()

    def watch_site(module, inputs, output):
        x = some_tokens(output)
        module.statistics = torch.stack([x.count_nonzero() / x.numel(), x.square().mean().sqrt()])

    def watch_residual(module, inputs):
        module.statistics = kurtosis(some_tokens(inputs[0])).nanmean().nan_to_num()

    for _, module in model.sites():
        module.register_forward_hook(watch_site)
    model.transformer.ln_f.register_forward_pre_hook(watch_residual)


def activation_statistics(model):
    """Of the last forward: the fraction of nonzeros and the RMS at each location, averaged over layers.

    And the kurtosis of the final residual stream over its channels, averaged over tokens: 3 if Gaussian, and
    rising with sparsity in the paper's figure 10. The model is one that `watch_activations` has prepared.
    """
    found = {}
    for location, module in model.sites():
        found.setdefault(location, []).append(module.statistics)
    rows = torch.stack([torch.stack(layers).mean(0) for layers in found.values()]).tolist()
    statistics = {"activations/kurtosis_resid_final": model.transformer.ln_f.statistics.item()}
    for location, (nonzero, rms) in zip(found, rows, strict=True):
        statistics[f"activations/nonzero/{location}"] = nonzero
        statistics[f"activations/rms/{location}"] = rms
    return statistics


@torch.no_grad()
def gradient_statistics(model, scale):
    """Mean, largest and smallest norm of a tensor's gradient before normalization. `scale`: the loss's."""
    norms = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()])) / scale
    mean, largest, smallest = torch.stack([norms.mean(), norms.max(), norms.min()]).tolist()
    return {"gradients/norm_mean": mean, "gradients/norm_max": largest, "gradients/norm_min": smallest}


@torch.no_grad()
def weight_statistics(model):
    """Norm, mean and standard deviation of the weights of each tensor group."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault(tensor_group(name), []).append(p.flatten())
    statistics = {}
    for group, tensors in groups.items():
        weights = torch.cat(tensors)
        statistics[f"weights/norm/{group}"] = weights.norm().item()
        statistics[f"weights/mean/{group}"] = weights.mean().item()
        statistics[f"weights/std/{group}"] = weights.std(correction=0).item()
    return statistics


@torch.no_grad()
def sparsity_statistics(model):
    """Nonzeros in all and in each group of pruned tensors, number and fraction; neurons without a weight."""
    nonzero, total, dead = {}, {}, []
    for name, p, neuron_dim in model.sparse_parameters():
        group = tensor_group(name)
        nonzero[group] = nonzero.get(group, 0) + p.count_nonzero()
        total[group] = total.get(group, 0) + p.numel()
        if neuron_dim is not None:
            dead.append((p == 0).all(dim=1 - neuron_dim).sum())
    *numbers, dead_neurons = torch.stack([*nonzero.values(), torch.stack(dead).sum()]).tolist()
    statistics = {"sparsity/nonzero": sum(numbers), "sparsity/fraction": sum(numbers) / sum(total.values()),
                  "sparsity/dead_neurons": dead_neurons}
    for group, number in zip(nonzero, numbers, strict=True):
        statistics[f"sparsity/nonzero/{group}"] = number
        statistics[f"sparsity/fraction/{group}"] = number / total[group]
    return statistics
