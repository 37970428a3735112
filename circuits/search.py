"""What the search for a circuit is made of, after its masks: the fit of the logits, and what is needed.

Learned masks find nodes. An edge then is there if two kept nodes happen to be joined, needed or not:
`needed` removes edges and nodes, the one whose removal costs least first, while the target loss holds.
"""
import torch
import torch.nn.functional as F

MEASURED = 16  # candidates of least estimated cost that are tried one by one, before some go together


def loss_of(logits):
    """Cross-entropy between two answers, logits (n, 2), the right one's first: (n)."""
    return F.softplus(logits[:, 1] - logits[:, 0])


def apply_fit(logits, sides, scale, shift):
    """Logits (n, 2) whose difference is scaled, and the answer of the lower id (sides 1) shifted."""
    margin = scale * (logits[:, 0] - logits[:, 1]) + shift * sides
    return torch.stack([margin, torch.zeros_like(margin)], dim=1)


@torch.no_grad()
def fit(logits, sides):
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


def loss_at(nodes, contexts, gates, fitted=True):
    """Mean loss on `contexts` of the circuit with these gates, its logits fitted on the same contexts."""
    logits = nodes.judge(contexts, gates)
    if fitted:
        logits = apply_fit(logits, contexts.sides(), *fit(logits, contexts.sides()))
    return loss_of(logits).mean().item()


def estimated_costs(nodes, contexts, gates, fitted=True):
    """By how much the loss rises when each gate goes from 1 to 0, to first order: (number)."""
    scale, shift = fit(nodes.judge(contexts, gates), contexts.sides()) if fitted else (1.0, 0.0)
    gates = gates.clone().requires_grad_()
    for batch in contexts.batches():
        logits = apply_fit(nodes.logits(batch, gates), batch.sides(), scale, shift)
        (loss_of(logits).sum() / len(contexts)).backward()
    return -gates.grad


def needed(nodes, gates, contexts, target, fitted=True):
    """Remove edges and nodes from a circuit (gates of nodes alone) while its loss on `contexts` is at most
    `target`. Returns Nodes with its edges and gates for both, and the path: [nodes, edges, loss], ....

    In each round the candidates of least estimated cost are measured alone; as many of the cheapest go
    together as the target allows. When not even one of them may go, all are measured, and the search ends if
    none may. Many candidates, as a dense model has, first go in large bites by their estimates alone.
    """
    inside = nodes.with_edges([edge[:4] for edge in nodes.edges_in(gates)])
    gates = torch.cat([gates, gates.new_ones(len(inside.edges))])
    path = [[int(gates[:inside.nodes].sum()), len(inside.edges), loss_at(inside, contexts, gates, fitted)]]

    def without(candidates):
        less = gates.clone()
        less[list(candidates)] = 0
        return less

    def present():
        both = gates[inside.ends].ne(0).all(1)  # the edge of a node that is gone is no candidate
        edges = inside.nodes + ((gates[inside.nodes:] != 0) & both).nonzero()[:, 0]
        return torch.cat([gates[:inside.nodes].nonzero()[:, 0], edges])

    def take(candidates, sizes):
        """Remove the first of `candidates`, as many of `sizes` as the target allows; whether any went."""
        nonlocal gates
        for size in sizes:
            less = without(candidates[:size])
            if not less[:inside.nodes].any():  # chance alone reaches the target: a node is kept, to be shown
                continue
            loss = loss_at(inside, contexts, less, fitted)
            if loss <= target:
                gates = less
                edges = int(present().ge(inside.nodes).sum())
                path.append([int(gates[:inside.nodes].sum()), edges, loss])
                return True
        return False

    def by_measure(candidates):
        costs = {c: loss_at(inside, contexts, without([c]), fitted) for c in candidates}
        return [c for c in sorted(costs, key=costs.get) if costs[c] <= target]

    while len(candidates := present()):
        costs = estimated_costs(inside, contexts, gates, fitted)[candidates]
        order = candidates[costs.argsort(stable=True)].tolist()
        large = [len(order) // part for part in (2, 4, 8) if len(order) // part > MEASURED]
        if large and take(order, large):
            continue
        cheap = by_measure(order[:MEASURED])
        cheap = cheap or by_measure(order[MEASURED:])
        if not cheap or not take(cheap, [n for n in (16, 8, 4, 2, 1) if n <= len(cheap)]):
            break
    return inside, gates, path
