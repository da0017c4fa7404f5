"""The vision transformers of arcface_torch (arXiv 2010.11929), with the same shapes and parameter names."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from f2c_plugin.utils.tensors import without_autocast

PATCH_SIZE, PATCHES = 9, 12 * 12  # of 112 pixels the last four are left out


class _Attention(nn.Module):
    """Multi-head self-attention (appendix A). Scores and softmax are float32, whatever the autocast type."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).float().unbind(2)  # (B, heads, L, dim / heads)
        with without_autocast(x.device.type):
            x = scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a shortcut (equations 2 and 3).

    In training each is left out of ``drop_path`` of the images (stochastic depth, arXiv 1603.09382).
    """

    def __init__(self, dim: int, heads: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Attention(dim, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.ReLU6(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return x
        share = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(share).div_(share)


class VisionTransformer(nn.Module):
    """Patches of 9×9 pixels as tokens, without a class token: two linear layers take the tokens of all patches.

    Args:
        dim: of a token, a multiple of ``heads``.
        depth: blocks, two at least.
        drop_path: of the last block; it grows linearly from 0 in the first.
        mask_ratio: share of the patches that the blocks do not see in training. In their place is one token that learns.
        num_features: D.
        fp16: whether the blocks run under autocast.
        checkpointing: whether activations in blocks are computed again in the backward pass, which saves their memory.
    """

    def __init__(self, dim: int, depth: int, drop_path: float, mask_ratio: float, num_features: int = 512, fp16: bool = False,
                 checkpointing: bool = False, heads: int = 8):
        super().__init__()
        self.mask_ratio, self.fp16, self.checkpointing = mask_ratio, fp16, checkpointing
        self.pos_embed = nn.Parameter(torch.empty(1, PATCHES, dim))
        # DDP waits for the gradient of every parameter that takes one.
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim), requires_grad=mask_ratio > 0)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, PATCH_SIZE, PATCH_SIZE)))
        self.blocks = nn.ModuleList(_Block(dim, heads, drop_path * index / (depth - 1)) for index in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.feature = nn.Sequential(nn.Linear(dim * PATCHES, dim, bias=False), nn.BatchNorm1d(dim, eps=2e-5),
                                     nn.Linear(dim, num_features, bias=False), nn.BatchNorm1d(num_features, eps=2e-5))
        # As in arcface_torch, which cuts off what lies 100 standard deviations away.
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, 144, dim)
        if not self.training or not self.mask_ratio:
            return self.feature(self._encoded(x).flatten(1))
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)
        seen = order[:, :int(PATCHES * (1 - self.mask_ratio)), None].expand(-1, -1, x.size(2))
        x = self.mask_token.expand_as(x).scatter(1, seen, self._encoded(x.gather(1, seen)))
        return self.feature(x.flatten(1))

    def _encoded(self, x: Tensor) -> Tensor:
        """Tokens, float32 (B, L, dim), of L patches."""
        with torch.autocast(x.device.type, enabled=self.fp16):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.norm(x.float())
