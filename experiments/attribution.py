"""Do learned masks find smaller circuits than attribution? Figure 31 of Gao et al. 2025 in miniature.

    python -m experiments.attribution --out_dir=out/quickstart --tasks=single_double_quote,quotes

Nodes are kept in the order of their importance: as masks learn it, the best of `penalties` at each size; or
by attribution, how much the loss would rise without the node to first order, which is its gradient times its
difference from its mean, summed over contexts, or the absolute values of these. "random" keeps nodes that
are ever active. Each loss is judged on contexts that no order was made on, after a scale and a shift of the
logits were fitted on others.
"""
import torch

from circuits import load
from circuits.controls import fitted
from circuits.search import Search, estimated_costs, first_of, learn_masks, loss_at, loss_of
from circuits.tasks import Source, read_task
from configurator import check_rules, configure, ends_explained, fail

out_dir = "out"  # of the training run; or the folder of a released model
checkpoint = "ckpt.pt"  # in out_dir
dataset = ""  # '': what it was trained on, which a released model does not say; data of its tokenizer
tasks = "single_double_quote,quotes"  # names or paths, by commas
sizes = "8,16,32,64,128,256,512"  # numbers of nodes
penalties = "1e-3,1e-2,3e-2"  # of a kept node, in nats
steps = 300  # of learning a mask
contexts = 512  # for attribution
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'


def absolute_costs(nodes, contexts):
    """The costs of `estimated_costs` of each context by itself, as absolute values, summed: (number)."""
    total = torch.zeros(nodes.number, device=nodes.device)
    for batch in contexts.batches(32):
        gates = torch.ones(len(batch), nodes.number, device=nodes.device, requires_grad=True)
        loss_of(nodes.logits(batch, gates)).sum().backward()
        total += gates.grad.abs().sum(0)
    return total


def orders_of(nodes, learning):
    """Name -> orders of the nodes, the most important first, made on `learning`: a list of several tries."""
    how = Search(steps=steps, batch_size=32)
    ones = torch.ones(nodes.number, device=nodes.device)
    some = learning[torch.arange(min(contexts, len(learning)), device=nodes.device)]
    live = torch.cat([nodes.means[site] for site in nodes.sites]) != 0
    drawn = torch.rand(nodes.number, generator=torch.Generator().manual_seed(seed)).to(nodes.device) + live
    importance = {"learned masks": [learn_masks(nodes, learning, [(float(penalty), 0)], how)[0]
                                    for penalty in penalties.split(",")],
                  "attribution": [estimated_costs(nodes, some, ones, fit=False)],
                  "absolute attribution": [absolute_costs(nodes, some)], "random": [drawn]}
    return {name: [x.argsort(descending=True, stable=True) for x in tries]
            for name, tries in importance.items()}


def print_task(nodes, source, spec):
    learning, choosing, judging = source.three_sets(spec)
    numbers = [int(size) for size in sizes.split(",")]
    ones = torch.ones(nodes.number, device=nodes.device)
    whole, none = (fitted(nodes, gates, choosing, judging)["loss"] for gates in (ones, 0 * ones))
    print(f"\n{spec['name']}: whole model {whole:.3f}, no node {none:.3f}\n\n| nodes | "
          + " | ".join(map(str, numbers)) + " |\n|---|" + "---|" * len(numbers), flush=True)
    for name, orders in orders_of(nodes, learning).items():
        row = []
        for size in numbers:  # the best of several tries by what does not judge
            best = min((first_of(order, size) for order in orders),
                       key=lambda gates: loss_at(nodes, choosing, gates))
            row.append(f"{fitted(nodes, best, choosing, judging)['loss']:.3f}")
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


@ends_explained()
def main():
    configure(globals())
    check_rules(globals(), (("steps contexts", lambda v: v >= 1, "must be at least 1"),
                            ("seed", lambda v: v >= 0, "must not be negative")))
    loaded = load(out_dir, checkpoint, device, dataset)
    nodes = loaded.nodes()
    for name in tasks.split(","):
        try:
            spec = read_task(name, loaded.tokenizer)
            print_task(nodes, Source(loaded, learning=32 * steps, seed=seed), spec)
        except ValueError as e:
            fail(e)


if __name__ == "__main__":
    main()
