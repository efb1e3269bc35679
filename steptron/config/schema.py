"""The recipe: frozen values, one dataclass a section. A run is described by one `Recipe` and by nothing else.

    Hydra composition → decode.py (strict) → Recipe → validate.py (rules across sections) → recipe.yaml in the run folder

A field's docstring, under it, gives its unit and meaning. Token counts are written as integers or with a decimal suffix:
`250K`, `1.5M`, `20B`, `14.6T`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from steptron.config.monitoring import Location, MonitorConfig

Tokens = Annotated[int, "tokens"]
"""A number of tokens; the decoder also takes `4K`, `1.5M`, `20B`, `14.6T` (powers of ten)."""

Precision = Literal["fp32", "bf16"]
ExpertBackend = Literal["auto", "blocks", "batched", "grouped", "triton", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and on what it runs."""

    name: str
    """Name of the run; also its folder under `runs/`."""
    dir: str = ""
    """Run folder, from the working directory of `train`. Empty: `runs/NAME`. It says where a run begins: the folder may be moved
    afterwards, and no other command reads this."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every rank; `auto` takes CUDA where there is one."""
    timeout_s: float = 600.0
    """Seconds after which a collective that does not end stops the run."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention kind (full or sliding); all layers of the kind share it."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides `num_heads`."""
    rotary_share: float = 1.0
    """Share of the head's channels that RoPE rotates (the first ones)."""
    window: int | None = None
    """Keys a query sees, its own included. None: all earlier ones."""


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """llama3 scaling of the full layers' RoPE frequencies (`rope_type: llama3` in released configs)."""

    factor: float
    """By how much low frequencies are slowed down."""
    original_max_positions: int
    """Positions of the unscaled model."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_positions / low_freq_factor are scaled in full."""
    high_freq_factor: float = 32.0
    """Wavelengths below original_max_positions / high_freq_factor are left as they are."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The routed experts and the shared expert of every layer after the leading dense ones."""

    num_experts: int
    """Routed experts a layer."""
    top_k: int
    """Experts a token goes to."""
    ffn_size: int
    """Inner width of a routed expert."""
    shared_ffn_size: int
    """Inner width of the shared expert, which sees every token."""
    scaling_factor: float = 1.0
    """Factor on the normalised weights of the selected experts."""
    route_groups: int = 1
    """Groups of neighbouring experts that a token first chooses among; 1: it chooses among all experts."""
    route_top_groups: int = 1
    """Groups a token may have experts of."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Same recipe, same parameters, whatever the layout."""

    vocab_size: int
    """Rows of the embedding and of the output matrix (padded)."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Backbone layers, MTP heads not counted."""
    layer_pattern: str
    """Attention kinds by layer, `F` full and `S` sliding, repeated up to `num_layers` (e.g. `FSSS`)."""
    head_dim: int
    """Channels a head, the same in all layers."""
    full: AttentionConfig
    """Attention of the `F` layers."""
    sliding: AttentionConfig
    """Attention of the `S` layers and of the MTP heads' blocks."""
    num_dense_layers: int
    """Leading layers with a dense FFN; the others are MoE layers."""
    ffn_size: int
    """Inner width of the dense FFN (leading layers and MTP heads)."""
    moe: MoeConfig
    """Experts of the remaining layers."""
    num_mtp_heads: int = 0
    """Multi-token-prediction heads; head h (from 1) predicts the token h + 1 places ahead."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of every matrix at the start; norms start at zero (zero-centred)."""
    max_positions: int = 4096
    """Longest sequence the position encoding is meant for, scaling included."""
    rope_scaling: RopeScalingConfig | None = None
    """Long-context scaling on the full layers."""
    loss_chunk: int = 256
    """Tokens whose logits exist at one time in the cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of tokenised shards, written by `steptron data build`."""

    path: Location
    """Folder with `source.json` and the `.bin`/`.idx` shards."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The sources that stages mix by name."""

    sources: dict[str, SourceConfig]
    """Sources by name."""
    tokenizer: Location
    """Path of the `tokenizer.json` that every source was built with; its hash is compared."""


@dataclass(frozen=True, kw_only=True)
class RampStep:
    """Until `until` tokens of the stage, a batch has `batch_size` sequences."""

    until: Tokens
    """Tokens of this stage, from its start."""
    batch_size: int
    """Sequences a step."""


@dataclass(frozen=True, kw_only=True)
class LrConfig:
    """The stage's segment of the learning-rate schedule, in tokens of the stage."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After warm-up: stay at `peak` · fall to `end` on a line · on a half cosine · stay, then fall on a line in the last `decay` tokens."""
    peak: float
    """Learning rate after warm-up."""
    start: float = 0.0
    """Learning rate at the first token, where there is a warm-up."""
    end: float | None = None
    """Learning rate at the stage's last token (linear, cosine, wsd)."""
    warmup: Tokens = 0
    """Tokens of warm-up, on a line from `start` to `peak`."""
    decay: Tokens = 0
    """Tokens of the final fall (wsd)."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How the load of the experts is kept even."""

    bias_rate: float = 0.0
    """Step of the loss-free router bias, once a training step."""
    bias_rate_end: float | None = None
    """Rate at the stage's end, reached on a line by tokens. None: constant."""
    ep_loss: float = 0.0
    """Coefficient of the EP-group balance loss."""
    num_groups: int | None = None
    """Groups of the EP-group loss. None: the expert view's `ep`."""
    sequence_loss: float = 0.0
    """Coefficient of the sequence-level auxiliary loss, which evens out single experts in each batch row."""
    z_loss: float = 0.0
    """Coefficient of the router's z-loss, which keeps its logits small."""
    freeze_router: bool = False
    """Leave the router's weight and bias as they are."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Activation limits by global layer index: silu(gate) ≤ L, |up| ≤ L. A layer not named is not limited."""

    routed: dict[int, float] = field(default_factory=dict)
    """Limits of the routed experts."""
    shared: dict[int, float] = field(default_factory=dict)
    """Limits of the shared expert."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum. Everything here is switched at the stage's first step."""

    tokens: Tokens
    """Token budget; the stage ends with the step that reaches it."""
    seq_len: int
    """Tokens a sequence."""
    batch_size: int
    """Sequences a step, over all ranks."""
    ramp: tuple[RampStep, ...] = ()
    """Smaller batches at the start of the stage, in order."""
    micro_batch: int = 1
    """Sequences a rank runs at once; the rest is gradient accumulation."""
    mix: dict[str, float]
    """Weight by source name; normalised to a sum of 1."""
    lr: LrConfig
    """Learning rate."""
    rope_theta_full: float = 1e4
    """RoPE base of the full layers."""
    rope_theta_sliding: float = 1e4
    """RoPE base of the sliding layers."""
    mtp_weight: float = 0.0
    """Weight of the mean loss of the MTP heads."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Load balancing."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Activation limits."""


@dataclass(frozen=True, kw_only=True)
class DenseMeshConfig:
    """The dense view: attention, dense FFN, norms, embeddings. −1 in one place: what is left of the ranks."""

    dp_replicate: int = 1
    """Replicas of the sharded parameters (HSDP)."""
    dp_shard: int = -1
    """Ranks that parameters are sharded over (FSDP)."""
    cp: int = 1
    """Context parallel ranks."""
    tp: int = 1
    """Tensor parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class ExpertMeshConfig:
    """The expert view over the same ranks: routed experts only."""

    dp_replicate: int = 1
    """Replicas of the sharded expert parameters."""
    dp_shard: int = -1
    """Ranks that expert parameters are sharded over."""
    ep: int = 1
    """Expert parallel ranks."""
    etp: int = 1
    """Expert-tensor parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How pipeline stages are cut and in what order they work."""

    schedule: Literal["1f1b", "interleaved", "zb-v", "dualpipe-v"] = "1f1b"
    """`1f1b`: one stage a rank · `interleaved`: `chunks` stages a rank · `zb-v`, `dualpipe-v`: two stages a rank, laid in a V."""
    chunks: int = 2
    """Stages a rank with the interleaved schedule."""
    layers: tuple[int, ...] = ()
    """Backbone layers of each stage, in order of the layers. Empty: cut evenly by cost."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What the backward pass computes again instead of keeping it. The router is never among it."""

    parts: tuple[Literal["attention", "ffn", "norm", "silu", "permutation"], ...] = ()
    """`attention`: the whole sublayer · `ffn`: dense FFN, shared and routed experts · `norm`: outputs of the norms ·
    `silu`: the product before a down projection · `permutation`: rows gathered for the experts."""
    every: int = 1
    """1: in all layers, 2: in every second one, …"""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Two views of the same ranks; they share `pp` and nothing else."""

    pp: int = 1
    """Pipeline parallel ranks."""
    dense: DenseMeshConfig = field(default_factory=DenseMeshConfig)
    """The dense view."""
    expert: ExpertMeshConfig = field(default_factory=ExpertMeshConfig)
    """The expert view."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Stages and schedule of the pipeline."""
    context: Literal["ring", "all_gather"] = "ring"
    """Full attention under context parallelism: K/V pass round a ring, or are gathered whole. Sliding layers exchange a halo."""
    dispatch: Literal["all_to_all", "all_gather"] = "all_to_all"
    """How tokens reach experts on other ranks: only those that are needed, or all of them."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Activation checkpointing."""
    compile: bool = False
    """Compile block by block with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What `engine: deepspeed` needs to know; without it, nothing."""

    zero: Literal[1, 2, 3] = 2
    """What ZeRO shards over the data-parallel ranks. 1: optimizer state and master weights · 2: gradients too · 3: parameters too."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """How things are computed, where there are several ways that give the same to rounding."""

    experts: ExpertBackend = "auto"
    """Routed experts. `auto`: the fastest for the device · `blocks`: CPU, cache by cache · `batched`: padded batched products ·
    `grouped`: torch's grouped_mm · `triton`: grouped_mm, and SwiGLU with its statistics in one pass · `transformer_engine`: its
    grouped product."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    matrices: Literal["muon", "adamw"] = "muon"
    """What moves the hidden matrices; embeddings, output matrices and vectors are always AdamW's."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; norms are not decayed."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    beta1: float = 0.9
    """AdamW: first moment."""
    beta2: float = 0.95
    """AdamW: second moment."""
    eps: float = 1e-8
    """AdamW: epsilon."""
    momentum: float = 0.95
    """Muon: Nesterov momentum."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a checkpoint is written, and how many are kept."""

    every: int = 1000
    """Steps between checkpoints; the end of a stage and of the run always writes one."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that are a multiple of it are kept for good. None: no such rule."""
    keep_events: tuple[Literal["stage_start", "alarm", "decision", "rewind", "resume"], ...] = ()
    """Kinds of ledger lines: the newest checkpoint before each is kept for good."""
    background: bool = True
    """Write from a copy in host memory while training goes on. False: training waits until all is on disk."""
    copy_to: Location = ""
    """A second place, a folder or URL for fsspec; checkpoints are copied to a folder of the run's name in it. Empty: none."""
    timeout_s: float = 3600.0
    """Seconds within which all ranks must have written a checkpoint."""
    start: Location = ""
    """Where a new run takes its weights from: a run folder, one of its checkpoints, or an import. Empty: initial values by seed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a run."""

    run: RunConfig
    """Name, folder, device."""
    seed: int = 0
    """Of initialisation and of data order."""
    precision: Precision = "fp32"
    """Of matmuls; master weights, router, norms, losses and reductions are fp32 always."""
    model: ModelConfig
    """The network."""
    data: DataConfig
    """The sources."""
    stages: dict[str, StageConfig]
    """The curriculum, in order."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""
    engine: Literal["native", "deepspeed"] = "native"
    """What shards parameters and sums gradients: `native`, torch's FSDP2 · `deepspeed`, its ZeRO, for data and expert parallel layouts."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Settings of `engine: deepspeed`."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Ways to compute the same."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Metrics."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""


def layer_kinds(model: ModelConfig) -> str:
    """Attention kind of each backbone layer, `F` or `S`, one character a layer."""
    repeats = -(-model.num_layers // len(model.layer_pattern))
    return (model.layer_pattern * repeats)[: model.num_layers]


def moe_layers(model: ModelConfig) -> range:
    """Global indices of the mixture-of-experts layers."""
    return range(model.num_dense_layers, model.num_layers)
