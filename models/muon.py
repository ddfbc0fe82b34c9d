"""Muon (momentum, orthogonalised by Newton-Schulz; Keller Jordan 2024), quick on every processor.

torch.optim.Muon orthogonalises in bfloat16. A GPU is made for that. Most processors have no
bfloat16 instructions and emulate it: there one update of a small network costs twenty times what it
costs in float32. So on a CPU the same iteration runs in float32 here, and elsewhere torch's own.
"""

import torch

from models.shards import own_rows, rows_in, whole_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon


def orthogonalise(g, coefficients=COEFFICIENTS, steps=5, eps=1e-7):
    """U S' V^T, with all of S' near 1, for a matrix g = U S V^T.  (m, n) -> (m, n), in its dtype.

    Each step applies s -> a s + b s^3 + c s^5 to all singular values at once: x is replaced by
    (a + b x x^T + c (x x^T)^2) x. Five steps bring what begins above 0.003 into [0.68, 1.21].
    """
    a, b, c = coefficients
    x = g.T if g.shape[0] > g.shape[1] else g  # x x^T is then the smaller of the two products
    x = x / x.norm().clamp_min(eps)  # no singular value is above 1
    for _ in range(steps):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if g.shape[0] > g.shape[1] else x


def flops_of(matrices, steps=5):
    """FLOPs of `orthogonalise` of each of these: 4 m m n + 2 m m m a step, m the shorter side."""
    sides = [sorted(p.shape) for p in matrices]
    return sum(steps * (4 * m * m * n + 2 * m**3) for m, n in sides)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with its defaults and its state, in float32 for matrices on a CPU.

    All matrices of one optimiser are on the same device. Of a matrix that is shared out over ranks
    every rank keeps its rows of the momentum; to orthogonalise it, which takes the whole matrix,
    the rows are gathered, one matrix at a time.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix p that has a gradient.  -> closure(), if there is one."""
        first = self.param_groups[0]["params"][0]
        if first.device.type != "cpu" and own_rows(first).shape == first.shape:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_here(p, group)
        return loss

    def step_here(self, p, group):
        """p (m, n) -> (1 - lr decay) p - lr sqrt(max(1, m / n)) orthogonalise(momentum)."""
        state, momentum, lr = self.state[p], group["momentum"], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        direction = p.grad.lerp(average, momentum) if group["nesterov"] else average
        direction = whole_tensor(direction)  # (m, n)
        direction = direction.float() if p.device.type == "cpu" else direction.bfloat16()
        direction = orthogonalise(
            direction, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        own = own_rows(p)
        own.mul_(1 - lr * group["weight_decay"])
        own.add_(rows_in(p, direction), alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
