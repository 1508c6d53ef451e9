"""The run config: typed, frozen, strict. Every key a user may write, with its meaning and unit.

Checks that need one section live here; checks across sections live in `checks.py`, so that all problems
are reported at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="run directory = folder/name")
    folder: str = Field(default="runs", min_length=1, description="parent of the run directory")
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: Literal["float32", "bfloat16"] = "float32"


class Model(Section):
    block: Literal["transformer", "lmm", "mac", "mag", "mal"]
    layers: int = Field(ge=1, le=1024)
    width: int = Field(ge=8, le=65536)
    heads: int = Field(ge=1, le=1024)
    vocabulary: int = Field(ge=2, le=2**31 - 1, description="token ids are below this")
    vocabulary_multiple: int = Field(
        default=128, ge=1, le=65536, description="the table has rows up to a multiple of this, for any parallel.tensor"
    )
    feed_forward: int | None = Field(default=None, ge=1, description="of SwiGLU; null: 8/3 width, rounded up to 32")
    tied_head: bool = True
    norm_eps: float = Field(default=1e-5, gt=0, le=1e-2)
    initializer_std: float = Field(default=0.02, gt=0, le=1)
    compile: bool = Field(default=False, description="element-wise stretches as one loop each, by torch.compile")


class Memory(Section):
    rule: Literal["titans", "deltanet", "gated_deltanet", "mamba2", "rwkv7"] = Field(
        default="titans", description="how the memory learns; others' rules, to compare with, use the * keys and gate"
    )
    chunk_size: int = Field(default=64, ge=1, le=65536, description="* b: tokens per anchor; part of the model")
    depth: int = Field(default=2, ge=1, le=4)
    expansion: int = Field(default=4, ge=1, le=16, description="hidden width = expansion * head width")
    activation: Literal["silu", "gelu"] = "silu"
    residual_norm: bool = True
    momentum: bool = True
    forgetting: bool = True
    forget_to: Literal["zero", "start"] = Field(
        default="zero", description="where forgetting leads the weights: to zero, or to their learned start"
    )
    write: bool = Field(default=True, description="false: theta = alpha = 0: the memory stays as it starts")
    normalize_values: bool = True
    convolution: int = Field(default=4, ge=1, le=64, description="* taps; 1: none")
    key_start: Literal["token", "pair"] = Field(
        default="token", description="* start of the keys' convolution: identity, or average with the token before"
    )
    gate: Literal["memory", "both"] = Field(
        default="memory", description="of MAC and MAG: which sides pass a non-linearity before their product"
    )
    theta_max: float | None = Field(default=None, gt=0, le=100, description="null: a stable limit for the chunk size")
    couple_theta: bool = Field(default=True, description="theta = theta_max (1 - eta) sigmoid(.)")
    forget_bias: float = Field(default=-6.0, ge=-30, le=30)
    momentum_bias: float = Field(default=0.0, ge=-30, le=30)
    theta_bias: float = Field(default=0.0, ge=-30, le=30)
    store_every: int | None = Field(default=None, ge=1, description="backward keeps every k-th state; null: chosen")
    kernels: Literal["auto", "plain", "compiled", "triton"] = Field(
        default="auto", description="* how the scan runs; auto: compiled C++ on a CPU, plain PyTorch on a GPU"
    )
    peer_kernels: Literal["auto", "plain", "fla"] = Field(
        default="auto", description="* how others' rules run; auto: flash-linear-attention for bfloat16 on a GPU"
    )


class Attention(Section):
    window: int | None = Field(default=None, ge=1, description="keys a query sees, itself included; null: all")
    segment: int | None = Field(default=None, ge=1, description="MAC segment, a multiple of memory.chunk_size")
    residual: bool = Field(default=True, description="MAC writes x + attended; false: attended alone, as in the paper")
    persistent_tokens: int = Field(default=4, ge=0, le=4096, description="none with others' memory.rule")
    rope_base: float = Field(default=10000.0, gt=1)
    kernels: Literal["auto", "plain", "flex"] = Field(
        default="auto", description="plain: PyTorch's with masks; flex: FlexAttention, on a GPU, no MAC; auto: plain"
    )


class Parallel(Section):
    tensor: int = Field(default=1, ge=1, description="neighbouring ranks that share each layer's heads and units")
    sequence: int = Field(default=1, ge=1, description="ranks that hold neighbouring shards of each sequence")
    scan: Literal["wavefront", "affine"] | None = Field(
        default=None, description="how the memory's scan crosses shards; null: the plan chooses"
    )
    pieces: int | None = Field(default=None, ge=1, description="parts of a scan, sent on one by one; null: chosen")
    wave: int | None = Field(default=None, ge=1, description="micro-batches per backward; null: the plan chooses")
    timeout_seconds: int = Field(
        default=900, ge=1, description="a rank that waits longer for its model's others ends the run"
    )
    sequence_parallel: bool = Field(default=False, description="Megatron's: tensor ranks share norms and residuals too")
    zero_stage: int = Field(default=1, ge=0, le=3, description="DeepSpeed's, over the ranks with the same weights")


class Recall(Section):
    """The synthetic associative-recall task: pairs first, then fillers, then queries for the values."""

    pairs: int = Field(default=16, ge=1)
    keys: int = Field(default=64, ge=1)
    values: int = Field(default=64, ge=2)
    gap: int = Field(default=64, ge=0, description="filler tokens between the last pair and the first query")
    spread: float | None = Field(
        default=None, gt=0, le=10, description="queries anywhere after the gap, places ~ x^(spread - 1); null: dense"
    )


class Needles(Section):
    """The synthetic needle in a haystack: values of several tokens, asked for at the end."""

    needles: int = Field(default=1, ge=1, description="in the haystack; one is asked for")
    keys: int = Field(default=32, ge=1)
    digits: int = Field(default=4, ge=1, description="tokens of a value")
    symbols: int = Field(default=10, ge=2, description="that a value's tokens are drawn from")
    words: int = Field(default=64, ge=1, description="that the haystack is drawn from")


class Source(Section):
    path: str = Field(min_length=1, description="prepared folder or URL")
    part: str | None = Field(default=None, description="one of the sources in that folder; null: all of them")
    weight: float = Field(ge=0, le=1e6, description="share of the sequences, relative to the other sources' weights")


class Data(Section):
    source: Literal["shards", "recall", "needles"] = "shards"
    path: str | None = Field(
        default=None, description="prepared folder or URL such as s3://bucket/folder; or give data.sources"
    )
    sources: dict[str, Source] | None = Field(default=None, description="name: {path, weight}, mixed by weight")
    weights_from: dict[str, dict[str, float]] | None = Field(
        default=None, description="step: {name: weight of every source}, in force from that step on"
    )
    packing: Literal["concatenate", "isolate"] = "concatenate"
    shuffle: bool = True
    workers: int = Field(default=1, ge=0, le=64, description="reader processes per rank")
    timeout_seconds: int = Field(default=480, ge=1, description="a batch that takes longer to read ends the run")
    remote_timeout_seconds: int = Field(default=60, ge=1, description="of a try to fetch a file")
    cache: str | None = Field(default=None, description="folder for decompressed shards; null: <run directory>/cache")
    cache_limit_gib: float | None = Field(default=None, gt=0, description="of a user's files there; null: none")
    recall: Recall | None = None
    needles: Needles | None = None


class Training(Section):
    steps: int = Field(ge=1)
    sequence_length: int = Field(ge=2)
    global_batch_size: int = Field(ge=1, description="sequences per optimiser step, all ranks together")
    micro_batch_size: int = Field(ge=1, description="sequences per rank and forward")
    activation_checkpointing: bool = False
    carry_state: bool = Field(
        default=False, description="each row of a batch goes on where it ended in the batch before (truncated backprop)"
    )
    skip_nonfinite: int = Field(
        default=10, ge=0, description="steps with a loss or gradient that is not finite, of any 1,000; one more ends it"
    )


class Optimizer(Section):
    learning_rate: float = Field(default=4e-4, gt=0, le=1)
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="final learning rate / peak")
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0, le=1e-2)
    gradient_clip: float = Field(default=1.0, gt=0)


class Checkpoint(Section):
    every: int = Field(default=1000, ge=1, description="steps between checkpoints; the last step always saves")
    keep: int = Field(default=2, ge=1, description="the newest that stay")
    keep_every: int | None = Field(default=None, ge=1, description="those of steps that this divides stay too")
    keep_best: int = Field(default=0, ge=0, description="those with the lowest validation loss (of that step) stay too")
    asynchronous: bool = Field(default=True, description="training goes on while a copy in host memory is written")


class Monitoring(Section):
    log_every: int = Field(default=10, ge=1)
    validate_every: int | None = Field(default=None, ge=1, description="null: only at the end")
    validation_sequences: int = Field(default=64, ge=1)
    sample_every: int | None = Field(default=None, ge=1)
    sample_prompt: str = Field(default="def ", min_length=1)
    sample_tokens: int = Field(default=64, ge=1)
    tensorboard: bool = True
    peak_flops: float | None = Field(default=None, gt=0, description="per device; null: measured with a matmul")
    hang_seconds: int = Field(
        default=600, ge=1, description="a rank that has not got on for so long ends (three times as long at the start)"
    )
    straggler_ratio: float = Field(
        default=1.3, gt=1, le=1000, description="a rank with more time of its own than so many medians is named"
    )
    compare_every: int | None = Field(
        default=1000, ge=1, description="steps between comparisons of what ranks have copies of; null: never"
    )


class NeedleEvaluation(Section):
    kinds: list[Literal["passkey", "number", "uuid", "word"]] = Field(default=["passkey"], min_length=1)
    lengths: list[int] = Field(min_length=1, description="tokens of a text")
    depths: int = Field(default=5, ge=1, description="from the start of the haystack to its end")
    cases: int = Field(default=4, ge=1, description="texts for each length and depth")
    haystack: str | None = Field(default=None, description="UTF-8 text, for all kinds but passkey")


class Evaluation(Section):
    every: int | None = Field(default=None, ge=1, description="steps; null: never")
    needles: NeedleEvaluation | None = None


class RunConfig(Section):
    run: Run
    model: Model
    memory: Memory = Memory()
    attention: Attention = Attention()
    parallel: Parallel = Parallel()
    data: Data
    training: Training
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    monitoring: Monitoring = Monitoring()
    evaluation: Evaluation = Evaluation()
