"""The GAN of DMD2 (2405.14867 v2, Sec. 4.3): real or fake, judged by the fake score's features.

The losses are in the scripts. The discriminator is a small head on the middle features of the fake
score, a network that distillation has anyway. Samples are noised before it sees them, real and fake
alike, so that the two overlap. The head is an MLP on tokens, for transformers; the paper has
convolutions on the features of a UNet.
"""

import torch.nn as nn


class GanHead(nn.Module):
    """Features (B, N, D) -> logit of "real" (B,): an MLP per token, then the mean over tokens."""

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
        return self.net(features).mean((1, 2))
