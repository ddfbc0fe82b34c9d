"""A small transformer for points in the plane: the world `ring` for methods about attention.

A point is seen as `tokens` numbers, its coordinates along as many directions, and a token knows
one of them. So nothing but attention brings two coordinates together: what a token does with the
others is all that the network can know about the place of the point.
"""

import math

import torch

from models.networks.dit import DiT


class RingDiT(DiT):
    """A DiT over the coordinates of a point: teacher and student of linvideo.py on the ring.

    Keyword arguments as DiT's; tokens is the number of directions. world is only recorded.
    """

    latent_shape = (2,)

    def __init__(
        self,
        tokens=4,
        dim=32,
        depth=4,
        num_classes=4,
        steps_cond=False,
        world="ring",
        linear_layers=None,
        feature_map="hedgehog",
        feature_dim=None,
    ):
        super().__init__(
            size=(tokens,),
            patch=(1,),
            channels=1,
            dim=dim,
            depth=depth,
            num_classes=num_classes,
            steps_cond=steps_cond,
            linear_layers=linear_layers,
            feature_map=feature_map,
            feature_dim=feature_dim,
        )
        own = {"tokens": tokens, "world": world}
        shared = "dim depth num_classes steps_cond linear_layers feature_map feature_dim".split()
        self.config = own | {k: self.config[k] for k in shared if k in self.config}
        self.latent_shape = (2,)
        angle = math.pi * torch.arange(tokens, device="cpu") / tokens  # of half a circle
        directions = torch.stack([angle.cos(), angle.sin()])  # (2, tokens)
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, x, t, label=None, steps=None, return_features=False, adapter=None):
        """x (B, 2), t (B,), label (B,) or None = null, steps (B,) -> velocity eps - x0 (B, 2).

        As DiT's forward in everything else.
        """
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"RingDiT expects points (B, 2), got {tuple(x.shape)}")
        seen = (x @ self.directions.to(x.dtype))[:, None]  # (B, 1, tokens)
        out = super().forward(seen, t, label, steps, return_features, adapter)
        if return_features:
            return out
        # the point with these coordinates, or where they do not agree the nearest to it
        return out[:, 0] @ self.directions.T.to(out.dtype) * (2 / self.directions.shape[1])
