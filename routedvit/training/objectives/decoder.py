"""The light decoder of a masked autoencoder (2111.06377, section 3): plain timm blocks.

It sees every patch: the encoder's tokens in their places, one learned mask token everywhere else,
fixed sin-cos positions on all. It exists for pretraining only and is not exported.
"""

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """Tokens of the visible patches -> pixels of all patches.

    Args:
        encoder_dim: width of the tokens that come in.
        patch_values: numbers to predict per patch.
        dim, depth, num_heads: of the decoder.
    """

    def __init__(
        self, encoder_dim: int, patch_values: int, *, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, patch_values)
        self.init_weights()

    def init_weights(self) -> None:
        """As in the paper's code."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """One number per pixel value of every patch.

        Args:
            tokens: [B, P + V, D]; the prefix tokens come along, without a position.
            visible: int64 [B, V], the patches of the last V tokens.
            grid: (H', W') patches.

        Returns:
            [B, H' * W', patch_values].
        """
        x = self.embed(tokens)
        batch, num_prefix, dim = len(x), tokens.shape[1] - visible.shape[1], x.shape[2]
        places = visible.unsqueeze(2).expand(-1, -1, dim)
        hidden = self.mask_token.to(x.dtype).expand(batch, grid[0] * grid[1], dim)
        patches = hidden.scatter(1, places, x[:, num_prefix:])
        table = build_sincos2d_pos_embed(list(grid), dim, device=x.device, dtype=x.dtype)
        x = torch.cat([x[:, :num_prefix], patches + table], 1)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x[:, num_prefix:]))
