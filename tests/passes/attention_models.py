"""Small attention models of several kinds, as modules and as .onnx files."""

import warnings

import torch
import torch.nn.functional as F


class Block(torch.nn.Module):
    """Self-attention and an output projection; `kind` says what its mask does."""

    def __init__(self, kind="bidirectional", heads=4, kv_heads=4, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.heads, self.kv_heads, self.dim = kind, heads, kv_heads, width // heads
        self.q = torch.nn.Linear(width, width)
        self.k = torch.nn.Linear(width, kv_heads * self.dim)
        self.v = torch.nn.Linear(width, kv_heads * self.dim)
        self.o = torch.nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = (
            p(x).view(x.shape[0], x.shape[1], n, self.dim).transpose(1, 2)
            for p, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.dim**-0.5
        T = x.shape[1]
        if self.kind not in ("bidirectional", "expanded"):
            at = torch.arange(T, device=x.device)
            visible = at[:, None] >= at[None, :]
            scores = scores.masked_fill(~visible, torch.finfo(x.dtype).min)
        if self.kind == "alibi":
            at = torch.arange(T)
            scores = scores - 0.1 * (at[:, None] - at[None, :]).abs().to(x.dtype)
        if self.kind == "expanded":
            # As transformers' exports have it: a [B, 1, T, T] mask made of an expanded one and of positions.
            at = torch.arange(T, device=x.device)
            visible = (at[:, None] >= 0) & mask[:, None, None, :].to(torch.bool).expand(-1, 1, T, -1)
            scores = scores + torch.where(visible, 0.0, torch.finfo(x.dtype).min)
        elif self.kind != "causal":
            scores = scores + (1 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        y = F.softmax(scores, -1) @ v
        out = self.o(y.transpose(1, 2).flatten(-2))
        # The purely causal model uses its mask only here, so that every kind has the same inputs.
        return out * mask[..., None].to(x.dtype) if self.kind == "causal" else out


def example(batch=2, length=12, width=32, dtype=torch.float32, padded=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=generator).to(dtype)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        mask[-1, length * 2 // 3 :] = 0
    return x, mask


def export(module, path, dtype=torch.float32, opset=17):
    """Write `module` with dynamic batch and length."""
    x, mask = example(dtype=dtype)
    axes = {0: "batch", 1: "seq"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval().to(dtype),
            (x, mask),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["x", "mask"],
            output_names=["y"],
            dynamic_axes={"x": axes, "mask": axes, "y": axes},
        )
