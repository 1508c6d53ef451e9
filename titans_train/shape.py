"""The resolved architecture: every number that fixes what a model computes.

`plan.py` derives it from a run config, once. Models are built from it, a checkpoint stores it, and a
run refuses to continue with another one. Plain data: imports nothing heavy, so that login nodes can plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

KERNEL_WIDTHS = range(16, 257, 2)  # of heads, that flash-linear-attention's kernels take
BLOCKS = ("transformer", "lmm", "mac", "mag", "mal")
LEAST_TOKENS, MOST_TOKENS = 16, 64  # of the parts in which kernels walk over a chunk
BEFORE: dict[str, dict[str, Any]] = {  # what models are that were stored before there was a choice
    "memory": {"rule": "titans", "gate": "both", "forget_to": "zero"}, "attention": {"residual": False},
}  # fmt: skip


@dataclass(frozen=True)
class PeerRule:
    """What another paper's memory rule is given beside q, k and v, and what it learns: by "head" or by "channel"."""

    gates: dict[str, str]
    constants: dict[str, str]


PEERS = {
    "deltanet": PeerRule({"beta": "head"}, {}),
    "gated_deltanet": PeerRule({"beta": "head", "decay": "head"}, {"A": "head", "bias": "head"}),
    "mamba2": PeerRule({"decay": "head"}, {"A": "head", "bias": "head", "D": "head"}),
    "rwkv7": PeerRule(
        {"decay": "channel", "rate": "channel"}, dict.fromkeys(("bias", "removal", "mix", "bonus"), "channel")
    ),
}


@dataclass(frozen=True)
class MemoryShape:
    """The neural memory of one layer (design: Titans paper, section 3).

    `chunk_size` is part of the function computed, not a speed setting: it says how often the anchor moves.
    """

    rule: str  # "titans", or a peer's (memory/peers): those have chunk_size (speed only) and convolution alone
    chunk_size: int  # b, tokens between two anchors
    depth: int  # weight matrices of the memory MLP, 1 to 4
    hidden: int  # width between them
    activation: str  # "silu" or "gelu"
    residual_norm: bool  # M(k) = k + gain * LayerNorm(MLP(k)) + bias
    momentum: bool  # False: eta = 0
    forgetting: bool  # False: alpha = 0
    forget_to: str  # "zero", or "start": the learned initial weights
    write: bool  # False: theta = 0, the memory stays at its initial weights
    normalize_values: bool  # l2-normalise v as q and k
    convolution: int  # taps of the causal depthwise convolutions; 1 means none
    key_start: str  # start of the keys' convolution: "token" (identity) or "pair" (average with the token before)
    gate: str  # of MAC and MAG: which sides pass a non-linearity before their product, "memory" or "both"
    theta_max: float  # upper limit of the step size theta
    couple_theta: bool  # theta = theta_max * (1 - eta) * sigmoid(.)
    forget_bias: float  # alpha = sigmoid(. + forget_bias)
    momentum_bias: float
    theta_bias: float
    store_every: int  # the backward keeps the state of every k-th chunk (no effect on results)
    kernels: str = "auto"  # "auto", "plain", "compiled" or "triton": how the Titans rule is computed; not stored
    peer_kernels: str = "auto"  # "auto", "plain" or "fla": how a peer's is; not stored


@dataclass(frozen=True)
class AttentionShape:
    window: int | None  # keys a query sees, itself included; None: all
    segment: int | None  # MAC: tokens per segment, a multiple of the chunk
    residual: bool  # MAC: what is written is x + attended; False: attended alone
    persistent_tokens: int
    rope_base: float
    kernels: str = "auto"  # "auto", "plain" or "flex": how windows and documents are computed; not stored


def tile(size: int) -> int:
    """Of Triton's: powers of two, and it multiplies no matrices smaller than 16."""
    return max(16, 1 << (size - 1).bit_length())


def part_tokens(chunk: int, most: int = MOST_TOKENS, least: int = LEAST_TOKENS) -> int:
    """Of the equal parts in which kernels walk over a chunk: the largest from `least` to `most`; all of a chunk of no
    more, or that has no such parts.
    """
    if chunk <= most:
        return chunk
    return next((size for size in range(most, least - 1, -1) if chunk % size == 0), chunk)


def triton_tokens(width: int, exact: bool) -> int:
    """Most tokens of a part for Triton's kernels, whose tiles are to fit on a GPU's chip. width: of a head; exact: they
    multiply in float32.
    """
    return min(MOST_TOKENS // 2 if exact else MOST_TOKENS, 4096 // tile(width))


def beyond_kernels(depth: int, chunk: int, width: int, exact: bool) -> list[str]:
    """What Triton's kernels (memory/kernels) take, where that is not what is asked for; arguments as above."""
    limits = [("a depth", depth, 2), ("heads", width, 256)]
    found = [f"{what} of at most {most}; here it is {given}" for what, given, most in limits if given > most]
    most = triton_tokens(min(width, 256), exact)
    if part_tokens(chunk, most) > most:
        divisor = f"a divisor from {LEAST_TOKENS} to {most}" if most > LEAST_TOKENS else f"{most} as a divisor"
        found.append(f"chunks of at most {most} tokens, or with {divisor}; here it is {chunk}")
    return found


def missing(shape: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a stored shape does not say, with what it was then, by section."""
    sections = {name: (shape[name], old) for name, old in BEFORE.items() if isinstance(shape.get(name), dict)}
    return {name: {k: v for k, v in old.items() if k not in given} for name, (given, old) in sections.items()}


def completed(shape: dict[str, Any]) -> dict[str, Any]:
    """A stored shape with what it does not say."""
    return shape | {name: values | shape[name] for name, values in missing(shape).items()}


@dataclass(frozen=True)
class ModelShape:
    block: str  # one of BLOCKS
    layers: int
    width: int
    heads: int
    head_dim: int  # width // heads
    vocabulary: int  # token ids are below this
    padded_vocabulary: int  # rows of the table, a multiple of model.vocabulary_multiple; the last are never used
    feed_forward: int  # hidden width of SwiGLU
    tied_head: bool
    norm_eps: float
    initializer_std: float
    memory: MemoryShape | None  # None for block "transformer"
    attention: AttentionShape
    compile: bool = False  # element-wise stretches by torch.compile; not stored

    def to_dict(self) -> dict[str, Any]:
        """Without what says how, not what, is computed: a run may go on, and a model be used, on another machine."""
        out = asdict(self)
        del out["compile"], out["attention"]["kernels"]
        if self.memory is not None:
            del out["memory"]["kernels"], out["memory"]["peer_kernels"]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelShape:
        """Of `to_dict`, of this or an earlier version."""
        data = completed(data)
        memory = MemoryShape(**data["memory"]) if data["memory"] else None
        return cls(**{**data, "memory": memory, "attention": AttentionShape(**data["attention"])})

    def peer_gates(self) -> dict[str, int]:
        """Widths of the gates of another paper's rule."""
        assert self.memory is not None
        of = {"head": self.heads, "channel": self.width}
        return {name: of[by] for name, by in PEERS[self.memory.rule].gates.items()}

    def peer_constants(self) -> dict[str, tuple[int, ...]]:
        """Sizes of its learned constants, [H] or [H, d]."""
        assert self.memory is not None
        of: dict[str, tuple[int, ...]] = {"head": (self.heads,), "channel": (self.heads, self.head_dim)}
        return {name: of[by] for name, by in PEERS[self.memory.rule].constants.items()}

    @property
    def has_memory(self) -> bool:
        return self.block != "transformer"

    @property
    def has_attention(self) -> bool:
        return self.block != "lmm"

    @property
    def document_alignment(self) -> int:
        """Tokens: an isolated document may start only at multiples of this (chunk; MAC: segment; else 1)."""
        if self.block == "mac":
            assert self.attention.segment is not None
            return self.attention.segment
        return self.memory.chunk_size if self.memory is not None else 1
