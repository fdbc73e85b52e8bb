"""
The network of Duo: a diffusion transformer (DiT, arXiv 2212.09748) over tokens, and nothing else.

A pre-norm transformer that looks both ways, told how noisy its input is by adaLN: the time embedding of sigma
shifts, scales and gates every block. Its input need not be words: any mixture of word embeddings will do, which
is what Duo's curriculum feeds it. Parameter names are those of the authors' published checkpoints.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class DiTConfig:
    vocab_size: int = 50257
    block_size: int = 1024    # the length trained on; RoPE lets any length run
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    cond_dim: int = 128       # width of the time embedding
    dropout: float = 0.1
    causal: bool = False      # True: an autoregressive transformer, left to right and told no time (no adaLN)


class EmbeddingLayer(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, n_embd))
        nn.init.uniform_(self.embedding, -n_embd ** -0.5, n_embd ** -0.5)

    def forward(self, x, weights=None):
        if x.is_floating_point():                     # (B,T,K) @ (K,C): a whole distribution over tokens
            return x @ self.embedding
        if weights is None:
            return F.embedding(x, self.embedding)     # (B,T) -> (B,T,C)
        # one gather a slot: all k at once would hold a (B,T,k,C) tensor
        return sum(w.unsqueeze(-1) * F.embedding(ids, self.embedding)
                   for ids, w in zip(x.unbind(-1), weights.to(self.embedding.dtype).unbind(-1)))


class TimestepEmbedder(nn.Module):
    def __init__(self, cond_dim, n_features=256):
        super().__init__()
        self.n_features = n_features
        self.mlp = nn.Sequential(nn.Linear(n_features, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma):
        half = self.n_features // 2
        freqs = 10000 ** (-torch.arange(half, device=sigma.device) / half)
        angles = sigma.reshape(-1, 1).float() * freqs                     # (B,128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (B,256) -> (B,cond_dim)


def rotary(start, T, head_dim, device):
    """cos and sin (T, head_dim/2) of RoPE for the positions start .. start+T-1."""
    freqs = 10000 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(start, start + T, device=device), freqs)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the halves of x (B,H,T,D) by their positions' angles ("rotate-half")."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.attn_qkv = nn.Linear(C, 3 * C, bias=False)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate='tanh'), nn.Linear(4 * C, C))
        if not config.causal:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * C)
            nn.init.zeros_(self.adaLN_modulation.weight)
            nn.init.zeros_(self.adaLN_modulation.bias)

    def attention(self, x, cos, sin, cache):
        B, T, C = x.shape
        q, k, v = self.attn_qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 x (B,H,T,D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        fresh = not cache
        if cache is not None:                                # what came before is kept and never computed again
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and fresh)
        return self.attn_out(y.transpose(1, 2).reshape(B, T, C))                          # (B,H,T,D) -> (B,T,C)

    def forward(self, x, c, cos, sin, cache=None):
        if self.causal:
            x = x + F.dropout(self.attention(self.norm1(x), cos, sin, cache), self.dropout, self.training)
            return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # (B,1,C)
        y = self.attention(self.norm1(x) * (1 + scale1) + shift1, cos, sin, cache)
        x = x + gate1 * F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * F.dropout(y, self.dropout, self.training)


class OutputLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.norm_final = nn.LayerNorm(C, bias=False)
        self.linear = nn.Linear(C, config.vocab_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if not config.causal:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * C)
            nn.init.zeros_(self.adaLN_modulation.weight)
            nn.init.zeros_(self.adaLN_modulation.bias)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise SystemExit(f'n_embd ({config.n_embd}) must be a multiple of 2 * n_head ({2 * config.n_head}): '
                             f'RoPE turns pairs of channels in every head')
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

        x: ids (B,T); or ids (B,T,k) with weights (B,T,k), mixed in embedding space; or a float (B,T,K) distribution.
        sigma: (B,) or (B,1), -log(alpha); not used by a causal model.
        cache: causal models only, a list of n_layer lists, empty at first: x then holds only the new tokens.
        """
        start = cache[0][0].size(2) if cache and cache[0] else 0
        cos, sin = rotary(start, x.size(1), self.config.n_embd // self.config.n_head, x.device)
        h = self.vocab_embed(x, weights)
        c = None if self.config.causal else F.silu(self.sigma_map(sigma))  # (B,cond_dim)
        for i, block in enumerate(self.blocks):
            h = block(h, c, cos, sin, cache and cache[i])
        h = self.output_layer.norm_final(h)
        if not self.config.causal:
            shift, scale = self.output_layer.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        return h

    def forward(self, x, sigma=None, weights=None, head=None):
        """logits (B,T,K); or, with head, whatever head(h, weight, bias) makes of the trunk's output and the last
        linear layer: the losses of diffusion.py never hold all the logits, and DDP wants to see it in here."""
        h = self.hidden(x, sigma, weights)
        linear = self.output_layer.linear
        return linear(h) if head is None else head(h, linear.weight, linear.bias)
