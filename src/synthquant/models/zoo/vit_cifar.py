"""Vision transformer for 32x32 images, Dosovitskiy et al. 2021 (arXiv:2010.11929), with patches of 4x4 pixels.

Modules and parameters bear the names of timm's `VisionTransformer`, and a state dict fits both, so that whatever looks
for `attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2` or `head` finds them here too.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Cut the image into patches and embed each of them."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[B, N, dim]` for images `[B, 3, H, W]`, patches row by row."""
        patches: torch.Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; one linear layer makes queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[B, N, dim]` for tokens `[B, N, dim]`."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of `x`."""
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and around a shortcut."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[B, N, dim]` for tokens `[B, N, dim]`."""
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class CifarVisionTransformer(nn.Module):
    """Vision transformer with a class token and learned positions.

    Input `[B, 3, 32, 32]`, output logits `[B, num_classes]`.
    """

    def __init__(
        self, dim: int = 128, depth: int = 6, num_heads: int = 4, mlp_ratio: float = 2.0, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(4, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, num_classes]` for images `[B, 3, 32, 32]`."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        logits: torch.Tensor = self.head(x[:, 0])
        return logits


def vit(num_classes: int = 10) -> CifarVisionTransformer:
    """ViT of 6 blocks, width 128, 4 heads: 0.8 M parameters, 58 M multiply-adds at 32x32."""
    return CifarVisionTransformer(num_classes=num_classes)
