"""Parts of a decoder layer as single steps of the gradient tape.

Each does what several elementary operations of transformers' Llama do, with the same roundings up
to the order of additions, and keeps less for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def normalise(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm over the last axis (Zhang and Sennrich, 2019), computed in float32."""
    return _Norm.apply(states, weight, epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square_().div_(states.shape[-1]).add_(epsilon))
        ctx.save_for_backward(states, weight, scale)
        return (states * scale).to(states.dtype).mul_(weight)  # a product with float32 is float32

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        upstream, width = gradients[0].float(), states.shape[-1]
        normal = states * scale
        down = upstream * normal
        weight_gradient = down.reshape(-1, width).sum(0).to(weight.dtype)
        # d/dx of x * rsqrt(mean(x^2) + eps), times the upstream gradient g = upstream * weight:
        # scale * (g - normal * mean(g * normal)).
        mean = down.mul_(weight).sum(-1, keepdim=True).div_(width)
        down = torch.mul(upstream, weight, out=down).sub_(normal.mul_(mean)).mul_(scale)
        return down.to(states.dtype), weight_gradient, None


def gate(gated: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """silu(gated) * linear, the middle of SwiGLU (Shazeer, 2020)."""
    return _Gate.apply(gated, linear)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gated: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gated, linear)
        return nn.functional.silu(gated).mul_(linear)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gated, linear = ctx.saved_tensors
        upstream = gradients[0]
        outer = torch.ops.aten.silu_backward(upstream * linear, gated)
        return outer, nn.functional.silu(gated).mul_(upstream)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021) as Llama lays it out: [B, T, H, D] to [B, H, T, D].

    cosine, sine: [B or 1, T, D], whose halves over the last axis are alike.
    """
    return _Rotation.apply(states, cosine, sine)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        rows, length, heads, width = states.shape
        turned = states.new_empty(rows, heads, length, width)
        _turn(states.transpose(1, 2), turned, cosine[:, None], sine[:, None])
        return turned

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        upstream = gradients[0].transpose(1, 2)
        back = torch.empty(upstream.shape, dtype=upstream.dtype, device=upstream.device)
        _turn(upstream, back, cosine[:, :, None], -sine[:, :, None])
        return back, None, None


def _turn(
    states: torch.Tensor, turned: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> None:
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    cosine, sine = cosine[..., :half], sine[..., :half]
    torch.mul(first, cosine, out=turned[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned[..., half:]).addcmul_(first, sine)


def multiply(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """states weight^T for float32 on a CPU, by oneDNN.

    Its products are 10 to 20% faster than those of the BLAS that torch uses here, which is made for
    another vendor's processors; the gradient of the weight is not, and stays there.
    """
    return _Product.apply(states, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return _multiply(states, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        upstream = gradients[0]
        down = _multiply(upstream, weight.t()) if ctx.needs_input_grad[0] else None
        inner = None
        if ctx.needs_input_grad[1]:
            inner = upstream.flatten(0, -2).t() @ states.flatten(0, -2)
        return down, inner


def _multiply(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # Gradients can be expanded numbers, which oneDNN would read as if they were stored.
    return torch.ops.mkldnn._linear_pointwise(states.contiguous(), weight, None, "none", [], "")
