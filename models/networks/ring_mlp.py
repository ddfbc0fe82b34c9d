"""A small MLP for points in the plane: the student and the fake of the world `ring`."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.diffusion import sinusoid
from models.networks import lora
from models.networks.layers import check_label, check_time


class RingMLP(nn.Module):
    """Trainable stand-in for the closed-form RingTeacher (models/worlds/ring.py).

    Time and label are added to the first of `depth` hidden layers of width dim. steps_cond adds an
    embedding of `steps` that starts at zero. world is only recorded.
    """

    prediction = "flow_v"
    default_shift = 1.0
    cond_names = ("label",)
    latent_shape = (2,)

    def __init__(self, dim=128, depth=3, num_classes=4, steps_cond=False, world="ring"):
        super().__init__()
        self.config = dict(
            dim=dim, depth=depth, num_classes=num_classes, steps_cond=steps_cond, world=world
        )
        self.num_classes = num_classes
        self.embed, self.time = nn.Linear(2, dim), nn.Linear(64, dim)
        self.label = nn.Embedding(num_classes + 1, dim)
        self.steps = nn.Linear(64, dim) if steps_cond else None
        self.hidden = nn.ModuleList([lora.Linear(dim, dim) for _ in range(depth)])
        self.lora_targets = tuple(f"hidden.{i}" for i in range(depth))
        self.final = nn.Linear(dim, 2)
        self.gradient_checkpointing = False  # without effect: there is nothing to save
        if steps_cond:
            nn.init.zeros_(self.steps.weight)
            nn.init.zeros_(self.steps.bias)

    def forward(self, x, t, label=None, steps=None, return_features=False, adapter=None):
        """x (B, 2), t (B,), label (B,) or None = null, steps (B,) -> velocity eps - x0 (B, 2).

        return_features=True: the output (B, 1, dim) of hidden layer depth // 2 instead. adapter: a
        name of models/networks/lora.py, None = the bare network. Raises ValueError for shapes that
        do not fit, an unknown adapter, and steps without steps_cond.
        """
        lora.check(self, adapter)
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"RingMLP expects points (B, 2), got {tuple(x.shape)}")
        check_time(t, x)
        if label is None:
            label = torch.full((x.shape[0],), self.num_classes, device=x.device)
        check_label(label, x, self.num_classes)
        dtype = self.embed.weight.dtype
        h = self.embed(x.to(dtype))
        h = h + self.time(sinusoid(t, 64, max_period=1000.0).to(dtype)) + self.label(label)
        if steps is not None:
            if self.steps is None:
                raise ValueError(
                    "this RingMLP was built without steps_cond=True and cannot take `steps`"
                )
            h = h + self.steps(sinusoid(steps.float() / 1000, 64, max_period=1000.0).to(dtype))
        for i, layer in enumerate(self.hidden):
            h = layer(F.silu(h), adapter)
            if return_features and i == len(self.hidden) // 2:
                return h[:, None]
        return self.final(F.silu(h))
