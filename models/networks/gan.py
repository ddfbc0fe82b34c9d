"""The GAN of DMD2 (2405.14867 v2, Sec. 4.3): real or fake, judged by the fake score's features.

The losses are in the scripts. The discriminator is a small head on the middle features of the fake
score, a network that distillation has anyway. Samples are noised before it sees them, real and fake
alike, so that the two overlap. The head is an MLP on tokens, for transformers; the paper has
convolutions on the features of a UNet.
"""

import torch
import torch.nn as nn


class GanHead(nn.Module):
    """Features (B, N, D) -> logit of "real" (B,): an MLP per token, then the mean over tokens.

    In float32 also under autocast, as in the authors' code: bfloat16 has three digits, and a logit
    of an undecided discriminator differs between real and fake in the third.
    """

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, 1),
        )

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return self.net(features.float()).mean((1, 2))
