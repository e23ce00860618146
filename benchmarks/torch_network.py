"""The network of a config in PyTorch, with the names of the published state_dict.

What jdm is timed against, and what the tests compare it with. The layers are written from the
description of the network in Dhariwal & Nichol 2021 and of the head in Deja et al. 2023. The
weights of a model of ours fit by name (`jdm.convert.state_dict`).
"""

import math

import torch
from torch import nn
from torch.nn import functional

from jdm.nn.unet import level_sizes


class Residual(nn.Module):
    def __init__(self, before, after, embedding, *, dropout, add, resize=None):
        super().__init__()
        silu, self.add, self.resize = nn.SiLU(), add, resize or nn.Identity()
        conv_in = nn.Conv2d(before, after, 3, padding=1)
        conv_out = nn.Conv2d(after, after, 3, padding=1)
        self.in_layers = nn.Sequential(norm(before), silu, conv_in)
        self.emb_layers = nn.Sequential(silu, nn.Linear(embedding, after if add else 2 * after))
        self.out_layers = nn.Sequential(norm(after), silu, nn.Dropout(dropout), conv_out)
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x, embedding):
        norm, silu, conv = self.in_layers
        h = conv(self.resize(silu(norm(x))))
        numbers, (norm, *rest) = self.emb_layers(embedding)[:, :, None, None], self.out_layers
        if self.add:
            h = norm(h + numbers)
        else:
            scale, shift = numbers.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resize(x)) + h


def norm(channels):
    return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0), channels)


class Attention(nn.Module):
    """fused: by scaled_dot_product_attention; otherwise all score matrices at once."""

    def __init__(self, channels, heads, *, qkv_first, fused):
        super().__init__()
        self.heads, self.qkv_first, self.fused = heads, qkv_first, fused
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding):
        b, c, *_ = x.shape
        h = self.qkv(self.norm(x).reshape(b, c, -1))
        width = c // self.heads
        if self.qkv_first:
            q, k, v = h.reshape(b, 3, self.heads, width, -1).unbind(1)
        else:
            q, k, v = h.reshape(b, self.heads, 3, width, -1).unbind(2)
        if self.fused:
            q, k, v = (z.transpose(2, 3) for z in (q, k, v))
            h = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        else:
            scale = width**-0.25
            weights = torch.einsum("bhdq,bhdk->bhqk", q * scale, k * scale)
            weights = weights.float().softmax(-1).type(weights.dtype)
            h = torch.einsum("bhqk,bhdk->bhdq", weights, v)
        return x + self.proj_out(h.reshape(b, c, -1)).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class Head(nn.Module):
    """The published classifier, on the means of the bottleneck and the skips, and t."""

    def __init__(self, width, classes, dropout):
        super().__init__()
        self.bn_1, self.fc_1 = nn.BatchNorm1d(width + 1), nn.Linear(width + 1, width // 2)
        self.bn_2, self.fc_2 = nn.BatchNorm1d(width // 2), nn.Linear(width // 2, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features, t):
        means = [z.mean(dim=(2, 3)) for z in features]
        h = torch.cat([*means, t[:, None].to(means[0].dtype)], dim=1)
        h = functional.leaky_relu(self.fc_1(self.bn_1(self.dropout(h))), 0.01)
        return self.fc_2(self.bn_2(self.dropout(h)))


class Network(nn.Module):
    """model: the section config.model. head: with the published classifier. fused: see Attention.

    Images are [B, C, H, W]; t is [B].
    """

    def __init__(self, model, *, head=True, fused=False):
        super().__init__()
        sides = level_sizes(model.image_size, len(model.multipliers))
        widths = [model.channels * m for m in model.multipliers]
        self.width, embedding, last = model.channels, 4 * model.channels, len(sides) - 1
        add, inside = model.time_conditioning == "add", model.resample == "resblock"
        qkv_first = model.attention_order == "qkv_first"

        def residual(before, after, resize=None):
            return Residual(before, after, embedding, dropout=model.dropout, add=add, resize=resize)

        def up(width):
            return residual(width, width, nn.Upsample(scale_factor=2)) if inside else Up(width)

        def attention(width):
            heads = width // model.head_channels if model.head_channels else model.heads
            return Attention(width, heads, qkv_first=qkv_first, fused=fused)

        def block(before, level):
            layers = [residual(before, widths[level])]
            if sides[level] in model.attention:
                layers.append(attention(widths[level]))
            return layers

        inputs = [[nn.Conv2d(model.image_channels, widths[0], 3, padding=1)]]
        skips = [widths[0]]  # the channels of each
        for level, width in enumerate(widths):
            for _ in range(model.blocks):
                inputs.append(block(skips[-1], level))
                skips.append(width)
            if level < last:
                inputs.append([residual(width, width, nn.AvgPool2d(2)) if inside else Down(width)])
                skips.append(width)
        if head:
            self.clasifier = Head(sum(skips) + widths[-1], model.num_classes, model.head_dropout)
        outputs, before = [], widths[-1]
        for level in range(last, -1, -1):
            width = widths[level]
            for i in range(model.blocks + 1):
                layers = block(before + skips.pop(), level)
                if level > 0 and i == model.blocks:
                    up = (
                        residual(width, width, nn.Upsample(scale_factor=2)) if inside else Up(width)
                    )
                    layers.append(up)
                outputs.append(layers)
                before = width
        self.time_embed = nn.Sequential(
            nn.Linear(self.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, inputs))
        middle = [residual(widths[-1], widths[-1]), attention(widths[-1])]
        self.middle_block = nn.ModuleList([*middle, residual(widths[-1], widths[-1])])
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, outputs))
        out = model.image_channels * (2 if model.learned_variance else 1)
        self.out = nn.Sequential(
            norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], out, 3, padding=1)
        )

    def embed(self, t):
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t[:, None] * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))

    def encode(self, x, t):
        """(the bottleneck, the skips)"""
        embedding = self.embed(t)
        (stem,), *inputs = self.input_blocks
        h = stem(x)
        skips = [h]
        for block in inputs:
            for layer in block:
                h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        return h, skips

    def decode(self, mid, skips, t):
        embedding, h, skips = self.embed(t), mid, list(skips)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, embedding)
        return self.out(h)

    def classify(self, mid, skips, t):
        return self.clasifier([mid, *skips], t)

    def forward(self, x, t):
        return self.decode(*self.encode(x, t), t)
