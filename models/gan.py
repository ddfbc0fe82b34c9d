"""The GAN of DMD2 (arXiv 2405.14867 v2, Sec. 4.3): real or fake, judged from the middle features of the fake score.

The discriminator is a head on a network that is there anyway. Its samples are noised first, real and fake alike, so that the two overlap.
The head is an MLP on tokens, for transformers; the paper has convolutions on UNet features.
"""
import torch.nn as nn
import torch.nn.functional as F

from models.diffusion import add_noise


class GanHead(nn.Module):
    """Real-or-fake logit from the fake score's middle features (2405.14867, Sec. 4.3): per-token MLP, mean over tokens."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    def forward(self, features):  # (B, N, D) -> (B,)
        return self.net(features).mean((1, 2))


def gan_logit(fake, head, schedule, x, eps, t, cond):
    """D(F(x_t, t)): the sample is noised first, real or fake alike.  x, eps (B, ...), t (B,) -> (B,)."""
    _, features = fake(add_noise(schedule, x, eps, t), t, return_features=True, **cond)
    return head(features.float())


def discriminator_loss(logit_real, logit_fake):
    """Non-saturating GAN (2405.14867, Eq. 4 as the code computes it); trains the head and the fake's encoder.  -> scalar."""
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()


def generator_gan_loss(logit_fake):
    """The student's side; the gradient passes through the frozen fake into x.  -> scalar."""
    return F.softplus(-logit_fake).mean()
