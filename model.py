"""
The network of Duo: a diffusion transformer (DiT, arXiv 2212.09748) over tokens, and nothing else.

A bidirectional pre-norm transformer, told how noisy its input is by adaLN: the time
embedding of sigma shifts, scales and gates every block. Its input need not be tokens: any mixture
of token embeddings will do, which is what Duo's curriculum feeds it. Parameter names are those of
the authors' published checkpoints.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError


@dataclass
class DiTConfig:
    vocab_size: int = 50257
    block_size: int = 1024    # the length trained on; RoPE lets any length run
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    cond_dim: int = 128       # width of the time embedding
    dropout: float = 0.1
    causal: bool = False      # True: autoregressive, left to right, and without time (no adaLN)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class EmbeddingLayer(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, n_embd))
        nn.init.uniform_(self.embedding, -n_embd ** -0.5, n_embd ** -0.5)

    def forward(self, x, weights=None):
        if x.is_floating_point():                     # (B,T,K) @ (K,C): a distribution over tokens
            return x @ self.embedding
        if weights is None:
            return F.embedding(x, self.embedding)     # (B,T) -> (B,T,C)
        weights = weights.to(self.embedding.dtype)
        mixed = 0                                     # slot by slot: no (B,T,k,C) tensor
        for i in range(x.size(-1)):
            mixed += weights[..., i, None] * F.embedding(x[..., i], self.embedding)
        return mixed


class TimestepEmbedder(nn.Module):
    def __init__(self, cond_dim):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, cond_dim),
            nn.SiLU(),
            nn.Linear(cond_dim, cond_dim),
        )

    def forward(self, sigma):
        freqs = 10000 ** (-torch.arange(128, device=sigma.device) / 128)
        angles = sigma.reshape(-1, 1, 1).float() * freqs               # (B,1,128)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)     # (B,1,256)
        return self.mlp(features)                                      # (B,1,cond_dim)


def rotary_angles(start, T, head_dim, device):
    """cos and sin (T, head_dim/2) of RoPE for the positions start .. start+T-1."""
    freqs = 10000 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(start, start + T, device=device), freqs)
    return angles.cos(), angles.sin()


def rotate_half(x, rotary):
    """RoPE: turn the two halves of x (B,H,T,D) by the angles of their positions."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def zero_linear(n_in, n_out):
    """A linear layer that starts at zero, so that blocks add nothing at first."""
    layer = nn.Linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.attn_qkv = nn.Linear(C, 3 * C, bias=False)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(C, 4 * C),
            nn.GELU(approximate='tanh'),
            nn.Linear(4 * C, C),
        )
        if not config.causal:
            self.adaLN_modulation = zero_linear(config.cond_dim, 6 * C)

    def attention(self, x, rotary, cache):
        qkv = self.attn_qkv(x).unflatten(-1, (3, self.config.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B,T,3,H,D) -> 3 x (B,H,T,D)
        q = rotate_half(q, rotary)
        k = rotate_half(k, rotary)
        is_causal = self.config.causal and not cache
        if cache:                                            # keys and values of earlier tokens
            k = torch.cat([cache[0], k], dim=2)
            v = torch.cat([cache[1], v], dim=2)
        if cache is not None:
            cache[:] = [k, v]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        y = y.transpose(1, 2).flatten(2)                     # (B,H,T,D) -> (B,T,C)
        return self.attn_out(y)

    def drop(self, x):
        return F.dropout(x, self.config.dropout, self.training)

    def forward(self, x, c, rotary, cache=None):
        """x (B,T,C); c (B,1,cond_dim), the time embedding, or None in a causal model; rotary:
        the angles of the positions."""
        if c is None:
            x = x + self.drop(self.attention(self.norm1(x), rotary, cache))
            return x + self.drop(self.mlp(self.norm2(x)))
        modulation = self.adaLN_modulation(c)                # (B,1,6C)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        y = self.attention(modulate(self.norm1(x), shift1, scale1), rotary, cache)
        x = x + gate1 * self.drop(y)
        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2 * self.drop(y)


class OutputLayer(nn.Module):
    """The last norm, and the head `linear`, which the losses apply to a few tokens at a time."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.norm_final = nn.LayerNorm(C, bias=False)
        self.linear = zero_linear(C, config.vocab_size)
        if not config.causal:
            self.adaLN_modulation = zero_linear(config.cond_dim, 2 * C)

    def forward(self, x, c):
        """The head's input, (B,T,C)."""
        x = self.norm_final(x)
        if c is None:
            return x
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)         # (B,1,C) x 2
        return modulate(x, shift, scale)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise UserError(
                f'n_embd ({config.n_embd}) must be a multiple of 2 * n_head ({2 * config.n_head}): '
                'RoPE turns pairs of channels in every head')
        self.config = config
        self.vocab_embed = EmbeddingLayer(config.vocab_size, config.n_embd)
        if not config.causal:
            self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.output_layer = OutputLayer(config)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def hidden(self, x, sigma=None, weights=None, cache=None):
        """The trunk: everything before the head, (B,T,C).

        x: ids (B,T); or ids (B,T,k) with weights (B,T,k), mixed in embedding space; or a float
        (B,T,K) distribution.
        sigma: (B,) or (B,1), -log(alpha); not used by a causal model.
        cache: causal models only, n_layer lists, empty at first; from the second call on, x is one
            token.
        """
        start = cache[0][0].size(2) if cache and cache[0] else 0
        head_dim = self.config.n_embd // self.config.n_head
        rotary = rotary_angles(start, x.size(1), head_dim, x.device)
        h = self.vocab_embed(x, weights)
        c = None
        if not self.config.causal:
            c = F.silu(self.sigma_map(sigma))                # (B,1,cond_dim)
        for i, block in enumerate(self.blocks):
            h = block(h, c, rotary, cache and cache[i])
        return self.output_layer(h, c)

    def forward(self, x, sigma=None, weights=None, head=None):
        """logits (B,T,K); or, with head, whatever head(h, weight, bias) makes of the trunk's output
        and the last linear layer: so the losses of diffusion.py need not hold all logits, and DDP
        sees every parameter in use."""
        h = self.hidden(x, sigma, weights)
        linear = self.output_layer.linear
        if head is None:
            return linear(h)
        return head(h, linear.weight, linear.bias)
