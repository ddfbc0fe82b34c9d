"""A network of another schedule or prediction, such as DiT, as one of flow velocities."""

import torch
from torch import nn

from models.diffusion import expand, to_x0_eps


class AsFlow(nn.Module):
    """A VP network as one of velocities, which solvers of flows can integrate.

    Lines of different schedules differ in their clock and scale alone. A point of a flow's at t,
    over sqrt((1 - t)^2 + t^2), is one of a VP schedule's at the u with the same alpha / sigma; the
    largest u where there is none.
    """

    prediction = "flow_v"

    def __init__(self, net, diffusion):
        """net: the network; diffusion: its schedule and prediction (models/diffusion.py)."""
        super().__init__()
        self.net, self.diffusion = net, diffusion
        self.latent_shape, self.num_classes = net.latent_shape, net.num_classes

    def time(self, t):
        """t (B,) of the flow -> u (B,), by bisection: alpha falls."""
        wanted = (1 - t.double()) / ((1 - t.double()) ** 2 + t.double() ** 2).sqrt()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(40):
            middle = (low + high) / 2
            noisy = self.diffusion.schedule.alpha(middle) < wanted
            low, high = torch.where(noisy, low, middle), torch.where(noisy, middle, high)
        return high.to(t.dtype)

    def forward(self, x, t, **cond):
        """The velocity eps - x0 that the network's prediction means, like x (B, ...)."""
        u, schedule = self.time(t), self.diffusion.schedule
        z = x / expand(((1 - t) ** 2 + t**2).sqrt(), x)
        seen = z, expand(schedule.alpha(u), x), expand(schedule.sigma(u), x)
        prediction = self.net(z, u, **cond).to(x.dtype)
        x0, eps = to_x0_eps(prediction, self.diffusion.prediction, *seen)
        return eps - x0
