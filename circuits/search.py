"""The search for a circuit (Gao et al. 2025, sections 2.2 and A.5): nodes by learned masks, then what of
them, and of the edges between them, is needed.

A mask makes an order of the nodes, and the fewest that reach the target loss are a circuit. An edge then is
there if two kept nodes happen to be joined, needed or not: `needed` removes edges and nodes, the one whose
removal costs least first, while the target holds. The target is met after a scale and a shift of the logits
are fitted, as in the paper, unless `fit` is False.
"""
import itertools
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from circuits.nodes import count
from configurator import fail

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # penalties to look among
FIRST = 1e-2  # of these
STABLE = 1.1  # times the fewest nodes: of the penalties that come as near, the least depends less on luck
AROUND = 8  # sizes below that of the bisection that are tried too
SHARES = (0.25, 0.5, 0.75, 1)  # of the rise that is allowed, in turn: what costs little goes first
MEASURED = 16  # candidates of least estimated cost that are tried one by one, before some go together
QUICKLY = 128  # contexts on which they are tried; what is removed is tried on all
CANDIDATES, NEAR = 2, 1.3  # so many circuits, of at most so many times the fewest nodes, lose what is idle
MORE = (1, 1.5)  # and so many times their nodes are what is removed from
CONSTANT = 1e-4  # a node that varies less than this share of its mean square is folded into the biases

# ----------------------------------------------------------------------------------------------------------
# the loss, and the fit


def loss_of(logits):
    """Cross-entropy between two answers, logits (n, 2), the right one's first: (n)."""
    return F.softplus(logits[:, 1] - logits[:, 0])


def apply_fit(logits, sides, scale, shift):
    """Logits (n, 2) whose difference is scaled, and the answer of the lower id (sides 1) shifted."""
    margin = scale * (logits[:, 0] - logits[:, 1]) + shift * sides
    return torch.stack([margin, torch.zeros_like(margin)], dim=1)


@torch.no_grad()
def fit_of(logits, sides):
    """Scale and shift, two floats, with which logits (n, 2) of n contexts do best; sides (n): `apply_fit`.

    The paper's A.5 fits them too. It is a logistic regression, solved by Newton's method. Where all contexts
    are right the best scale is endless, so a few count as wrong (Platt 1999). A scale is never negative: a
    circuit that prefers the wrong answer does not do the task.
    """
    margin = (logits[:, 0] - logits[:, 1]).double()
    unit = margin.square().mean().sqrt().clamp(min=1e-12)
    features = torch.stack([margin / unit, sides.double()], dim=1)
    right = 1 - 1 / (len(logits) / 2 + 2)
    best, least = features.new_zeros(2), torch.inf
    parameters = best
    for _ in range(50):
        z = features @ parameters
        loss = (right * F.softplus(-z) + (1 - right) * F.softplus(z)).mean()
        if loss < least:
            best, least = parameters, loss
        p = torch.sigmoid(z)
        gradient = features.T @ (p - right)
        curvature = (features * (p * (1 - p))[:, None]).T @ features + 1e-9 * torch.eye(2, device=z.device)
        step = torch.linalg.solve(curvature.cpu(), gradient.cpu()).to(z.device)
        parameters = parameters - step * (2 / step.norm()).clamp(max=1)
        if step.norm() < 1e-8:
            break
    scale, shift = (best / torch.stack([unit, torch.ones_like(unit)])).tolist()
    return (scale, shift) if scale > 0 else (0.0, 0.0)


def loss_at(nodes, contexts, gates, fit=True, known=None):
    """Mean loss on `contexts` of the circuit with these gates, its logits fitted on the same contexts."""
    logits = nodes.judge(contexts, gates, known)
    if fit:
        logits = apply_fit(logits, contexts.sides(), *fit_of(logits, contexts.sides()))
    return loss_of(logits).mean().item()


# ----------------------------------------------------------------------------------------------------------
# nodes, by learned masks


@dataclass
class Search:
    """The settings of a search, as circuit.py explains them. Without `penalties` it looks for them."""

    penalties: tuple = ()
    mask_seeds: int = 3
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-2
    temperature: float = 0.3
    start: float = 0.5
    noise: float = 0.01
    fit: bool = True


def heaviside(tau, temperature):
    """1 where tau > 0, else 0; backward the derivative of a sigmoid."""
    soft = torch.sigmoid(tau / temperature)
    return (tau > 0).float() + (soft - soft.detach())  # what is added is 0


def learn_masks(nodes, contexts, trials, how):
    """The importance tau of each node, in [-1, 1], learned on `contexts`, for each of `trials`, pairs of a
    penalty and a mask seed: (trials, nodes). `how` is a Search. Trials share their passes through the model
    and nothing else.
    """
    generators = [torch.Generator().manual_seed(mask_seed) for _, mask_seed in trials]
    tau = torch.stack([how.start + how.noise * torch.randn(nodes.number, generator=g) for g in generators])
    tau = tau.clamp(-1, 1).to(nodes.device).requires_grad_()
    penalty = torch.tensor([penalty for penalty, _ in trials], device=nodes.device)
    optimizer = torch.optim.Adam([tau], betas=(0.9, 0.95))
    for step in range(how.steps):
        optimizer.param_groups[0]["lr"] = how.learning_rate * (1 - step / how.steps)
        rows = torch.cat([torch.randint(len(contexts), (how.batch_size,), generator=g) for g in generators])
        batch = contexts[rows.to(nodes.device)]
        gates = heaviside(tau, how.temperature)
        losses = loss_of(nodes.logits(batch, gates)).view(len(trials), how.batch_size).mean(1)
        optimizer.zero_grad()
        (losses + penalty * gates.sum(1)).sum().backward()
        tau.grad.renorm_(p=2, dim=0, maxnorm=1.0)  # each trial's gradient is clipped by itself
        optimizer.step()
        with torch.no_grad():
            tau.clamp_(-1, 1)
    return tau.detach()


def fewest(loss_of_size, most, target):
    """The smallest size from 1 to `most` found whose loss is at most the target, or None; the losses seen.

    Doubles until the target is reached, bisects, and looks a little below, as the loss need not fall with
    every node.
    """
    seen = {}

    def reaches(size):
        if size not in seen:
            seen[size] = loss_of_size(size)
        return seen[size] <= target

    sizes = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    size = next(filter(reaches, sizes), None)
    if size is None:
        return None, seen
    low = size // 2
    while size - low > 1:
        middle = (low + size) // 2
        low, size = (low, middle) if reaches(middle) else (middle, size)
    below = size - 1
    while below > 0 and size - below <= AROUND:
        size = below if reaches(below) else size
        below -= 1
    return size, seen


def first_of(order, size):
    """Gates that are 1 for the first `size` nodes of `order` (nodes)."""
    gates = torch.zeros(len(order), device=order.device)
    gates[order[:size]] = 1
    return gates


def bracketed(size_at, ladder, first):
    """Call size_at (infinite if it fails) at rungs of `ladder` until the rungs beside the best were tried.

    Begins at `first`, and goes down while nothing succeeds. Returns rung -> size, in the order tried.
    """
    tried = {first: size_at(first)}
    while True:
        best = min(range(len(ladder)), key=lambda i: tried.get(ladder[i], float("inf")))
        best = best if ladder[best] in tried else ladder.index(min(tried))
        beside = (best + 1, best - 1) if tried[ladder[best]] < float("inf") else (best - 1,)
        new = [ladder[i] for i in beside if 0 <= i < len(ladder) and ladder[i] not in tried]
        if not new:
            return tried
        tried[new[0]] = size_at(new[0])


def find(nodes, learning, choosing, target, how, name, trials=()):
    """Learn masks on `learning`, and prune each to the fewest nodes that reach the target on `choosing`.

    `trials` are pairs of a penalty and a mask seed; without any those of `how`, a Search. Returns a list of
    dicts: penalty, mask_seed, nodes (a number, None if no size reaches the target), lowest_loss of all sizes
    tried, losses by size, order of the nodes, and gates, those of the size found or else of the lowest loss.
    """
    runs = []

    def attempt(penalty, mask_seed=0):
        begun = time.perf_counter()
        [tau] = learn_masks(nodes, learning, [(penalty, mask_seed)], how)
        order = tau.argsort(descending=True, stable=True)
        size, seen = fewest(lambda n: loss_at(nodes, choosing, first_of(order, n), how.fit),
                            nodes.number, target)
        best = size or min(seen, key=seen.get)
        runs.append({"penalty": penalty, "mask_seed": mask_seed, "nodes": size,
                     "lowest_loss": min(seen.values()), "gates": first_of(order, best),
                     "losses": {str(n): loss for n, loss in sorted(seen.items())},
                     "order": order[:int(max(MORE) * best)].tolist()})
        found = f"{size} nodes" if size else "not reached"
        print(f"{name} | penalty {penalty:g} | mask seed {mask_seed} | {found} | loss {seen[best]:.3f} "
              f"on train | {time.perf_counter() - begun:.0f} s", flush=True)
        return size or float("inf")

    if not trials and not how.penalties:  # then the other mask seeds, where the first does about best
        tried = bracketed(attempt, LADDER, FIRST)
        penalty = min(p for p, size in tried.items() if size <= STABLE * min(tried.values()))
        trials = [(penalty, mask_seed) for mask_seed in range(1, how.mask_seeds)]
    elif not trials:
        trials = [(penalty, mask_seed) for penalty in how.penalties for mask_seed in range(how.mask_seeds)]
    for trial in trials:
        attempt(*trial)
    return runs


# ----------------------------------------------------------------------------------------------------------
# what is needed


def estimated_costs(nodes, contexts, gates, fit=True):
    """By how much the loss rises when each gate goes from 1 to 0, to first order: (number)."""
    scale, shift = fit_of(nodes.judge(contexts, gates), contexts.sides()) if fit else (1.0, 0.0)
    gates = gates.clone().requires_grad_()
    for batch in contexts.batches():
        logits = apply_fit(nodes.logits(batch, gates), batch.sides(), scale, shift)
        (loss_of(logits).sum() / len(contexts)).backward()
    return -gates.grad


class Removal:
    """A circuit that gets smaller: Nodes with its edges, and gates of both. The last of its path, [nodes,
    edges, loss], ..., has the loss of these gates on all contexts."""

    def __init__(self, nodes, gates, contexts, target, fit):
        self.nodes, self.gates = nodes, gates
        if not nodes.edges:
            self.nodes = nodes.with_edges([edge[:4] for edge in nodes.edges_in(gates)])
            self.gates = torch.cat([gates, gates.new_ones(len(self.nodes.edges))])
        self.contexts, self.target, self.fit = contexts, target, fit
        self.some = contexts[torch.arange(min(QUICKLY, len(contexts)), device=contexts.idx.device)]
        self.early, self.known, self.path = self.nodes.is_early(), {}, []
        self.note(self.loss(self.gates, self.contexts))

    def loss(self, gates, contexts):
        """The loss with these gates. If they differ from self.gates only after the last block's attention
        has read, what it reads is not computed again."""
        known = None
        if torch.equal(gates[self.early], self.gates[self.early]):
            before, known = self.known.get(contexts is self.some, (None, None))
            if before is None or not torch.equal(before, gates[self.early]):
                known = self.nodes.until_read(contexts, gates)
                self.known[contexts is self.some] = gates[self.early], known
        return loss_at(self.nodes, contexts, gates, self.fit, known)

    def note(self, loss):
        size = count(self.nodes, self.gates)
        self.path.append([size["nodes"], size["edges"], loss])

    def candidates(self):
        """The gates that may go, cheapest first by estimate: of kept nodes, and of edges between them."""
        kept = (self.gates[self.nodes.nodes:] != 0) & self.nodes.joined(self.gates)
        edges = self.nodes.nodes + kept.nonzero()[:, 0]
        there = torch.cat([self.gates[:self.nodes.nodes].nonzero()[:, 0], edges])
        costs = estimated_costs(self.nodes, self.some, self.gates, self.fit)[there]
        return there[costs.argsort(stable=True)].tolist()

    def without(self, candidates):
        """Gates without these. Removed edges of what they ablate come back: its mean is what they pass, and
        of a value more than that."""
        less = self.gates.clone()
        less[list(candidates)] = 0
        less[self.nodes.nodes:][self.nodes.joined(self.gates) & ~self.nodes.joined(less)] = 1
        return less

    def allows(self, loss):
        """Whether a smaller circuit may have this loss: at most the target, or what it is now if above."""
        return loss <= max(self.target, self.path[-1][2])

    def by_measure(self, candidates, contexts):
        """What the loss on all contexts would be without each of the candidates, a dict, the least first:
        the loss now, and the rise that is measured on these contexts."""
        difference = self.path[-1][2] - self.loss(self.gates, contexts)
        losses = {c: self.loss(self.without([c]), contexts) + difference for c in candidates}
        return {c: losses[c] for c in sorted(losses, key=losses.get)}

    def take_of(self, losses):
        """Remove of those that may go alone, of `by_measure`, as many as may together; whether any went."""
        cheap = [c for c, loss in losses.items() if self.allows(loss)]
        return self.take(cheap, [n for n in (16, 8, 4, 2, 1) if n <= len(cheap)])

    def take(self, candidates, sizes):
        """Remove the first of `candidates`, as many of `sizes` as the target allows; whether any went."""
        return any(self.go_to(self.without(candidates[:size])) for size in sizes)

    def go_to(self, less):
        """Take these gates in place of its own, if a node is left, to be shown, and their loss is allowed;
        whether it did."""
        if not less[:self.nodes.nodes].any():
            return False
        loss = self.loss(less, self.contexts)
        if not self.allows(loss):
            return False
        self.gates = less
        self.note(loss)
        return True

    def drop_idle(self):
        """A value whose edges are all removed does nothing, but its edges would come back without it. So it
        goes and they stay removed."""
        read = {edge[:2] for edge in self.nodes.edges_in(self.gates)}
        idle = [(site, c) for site, channels in self.nodes.kept(self.gates).items() for c in channels
                if site.endswith("attn_v") and (site, c) not in read]
        for site, channel in idle:
            less = self.gates.clone()
            less[self.nodes.places[site] + channel] = 0
            self.go_to(less)


def needed(nodes, gates, contexts, target, fit=True):
    """Remove edges and nodes from a circuit while its loss on `contexts` is at most `target`, or, where it
    begins above that, does not rise. It is given by the gates of its nodes, or is what this returned for a
    stricter target. Returns Nodes with its edges, gates for both, and the path: [nodes, edges, loss], ....

    In each round the candidates of least estimated cost are measured alone, on some of the contexts; as many
    of the cheapest go together as the target allows on all. The loss may rise by a quarter of what is
    allowed, then by half, and so on, so that no single bite uses up all of it. In the last of these steps,
    when none of those measured may go, all candidates are measured so, and the cheapest of them on all
    contexts; the search ends if none of these may go. Many candidates, as a dense model has, first go in
    large bites by their estimates alone. Nodes that are constant in what is left are folded into the biases.
    """
    circuit = Removal(nodes, gates, contexts, target, fit)
    allowed = max(target - circuit.path[0][2], 0)  # 0 where more nodes than the fewest miss the target
    for share in SHARES if allowed else SHARES[-1:]:
        circuit.target = target - (1 - share) * allowed
        while order := circuit.candidates():
            large = [len(order) // part for part in (2, 4, 8) if len(order) // part > MEASURED]
            if large and circuit.take(order, large):
                continue
            if circuit.take_of(circuit.by_measure(order[:MEASURED], circuit.some)):
                continue
            if share < 1:
                break
            cheapest = list(circuit.by_measure(order, circuit.some))[:MEASURED]
            if not circuit.take_of(circuit.by_measure(cheapest, contexts)):
                break
    circuit.drop_idle()
    return (*fold(circuit), circuit.path)


def fold(circuit):
    """Nodes and gates of a Removal, without the nodes that are constant in it: what they always are becomes
    their ablated value, as a bias. One stays if the loss would then miss the target."""
    nodes, gates = circuit.nodes, circuit.gates
    for site, x in nodes.activations(circuit.contexts, gates).items():
        still = x.var(0, correction=0) <= CONSTANT * x.square().mean(0)
        for channel in (still & (nodes.split(gates)[site] != 0)).nonzero()[:, 0].tolist():
            less = circuit.without([nodes.places[site] + channel])
            folded = nodes.with_value(site, channel, x[:, channel].mean().item())
            loss = loss_at(folded, circuit.contexts, less, circuit.fit)
            if loss <= circuit.target and less[:nodes.nodes].any():  # a node stays, to be shown
                circuit.nodes, circuit.gates = nodes, gates = folded, less
                circuit.note(loss)
    return nodes, gates


def smallest(nodes, runs, choosing, target, fit=True):
    """The smallest circuit: what is not needed is removed from those of the runs with the fewest nodes, and
    from some more nodes, as then there is more to choose from. Of what is left, where it reaches the target,
    the one with the fewest edges, then nodes, is taken: its run, Nodes, gates and path."""
    reached = sorted((run for run in runs if run["nodes"]), key=lambda run: run["nodes"])
    if not reached:
        best = min(run["lowest_loss"] for run in runs)
        fail(f"no search reached the target of {target:g}, the best was {best:.3f}: raise --target_loss or "
             "--steps, or lower --penalties")
    near = [run for run in reached if run["nodes"] <= NEAR * reached[0]["nodes"]]
    different = [run for i, run in enumerate(near)
                 if not any(torch.equal(run["gates"], other["gates"]) for other in near[:i])]
    found = []
    for run, more in itertools.product(different[:CANDIDATES], MORE):
        order = torch.tensor(run["order"], device=nodes.device)
        gates = torch.zeros(nodes.nodes, device=nodes.device)
        gates[order[:int(more * run["nodes"])]] = 1
        begun, were = time.perf_counter(), count(nodes, gates)
        inside, gates, path = needed(nodes, gates, choosing, target, fit)
        found.append((run, inside, gates, path))
        print(f"needed | from {more:g} x the fewest: {were['nodes']} nodes, {were['weights']} weights -> "
              f"{path[-1][0]} nodes, {path[-1][1]} edges | loss {path[-1][2]:.3f} on train | "
              f"{time.perf_counter() - begun:.0f} s", flush=True)
    return min(found, key=lambda parts: (parts[3][-1][2] > target, *parts[3][-1][1::-1]))


def costs_of(nodes, gates, choosing, loss, fit=True):
    """By how much the loss of the circuit rises when one edge, or one node, of it is removed. What was
    removed before stays so; of a node that goes, `needed` brings back the removed edges."""
    def cost(place):
        less = gates.clone()
        less[place] = 0
        return loss_at(nodes, choosing, less, fit) - loss

    there = {edge: nodes.nodes + e for e, edge in enumerate(nodes.edges)}
    return {"edge_costs": [cost(there[edge[:4]]) for edge in nodes.edges_in(gates)],
            "node_costs": {f"{site}.{c}": cost(nodes.places[site] + c)
                           for site, channels in nodes.kept(gates).items() for c in channels}}
