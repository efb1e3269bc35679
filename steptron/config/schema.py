"""The recipe as frozen values, one dataclass per section. One `Recipe` describes a run completely.

    Hydra composition → decode.py (strict) → Recipe → validate.py (rules across sections) → recipe.yaml in a run folder

The docstring under each field states its unit and its effect; docs/recipe.md is generated from these docstrings. Token
counts are integers or have a decimal suffix: `250K`, `1.5M`, `20B`, `14.6T`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from steptron.config.kernels import KernelsConfig
from steptron.config.monitoring import Location, MonitorConfig

Tokens = Annotated[int, "tokens"]
"""A number of tokens. The decoder also accepts `4K`, `1.5M`, `20B` and `14.6T` (powers of ten)."""

Chunk = Literal["auto"] | int
"""A number of rows that are computed at a time, or `auto`."""

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run is stored and which device it uses."""

    name: str
    """The name of the run. It is also the name of its folder under `runs/`."""
    dir: str = ""
    """The run folder, relative to the working directory of `train`. Empty means `runs/NAME`. Only the start of a run
    reads this key: the folder may be moved afterwards."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device of every rank. `auto` uses CUDA if there is a CUDA device, otherwise the CPU."""
    timeout_s: float = 600.0
    """The time limit of a collective in seconds. A collective that takes longer stops the run with an error that names
    the missing rank."""
    deterministic: bool = False
    """If true, the same step gives the same bits on the same CUDA devices, torch and layout. Operations that add in any
    order take a slower one that has an order (the backward pass of attention, the counts of experts), and cuBLAS keeps
    one workspace. Back ends that cannot are refused. A CPU always has one order."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The shape of one kind of attention, full or sliding. All layers of that kind share it."""

    num_heads: int
    """The number of query heads."""
    num_kv_heads: int
    """The number of key and value heads. It must divide `num_heads`."""
    rotary_share: float = 1.0
    """The share of each head's channels that RoPE rotates, from the first channel on. 1 rotates all of them."""
    window: int | None = None
    """The number of keys that a query attends to, its own position included. Sliding layers need a number. Full layers
    need null, which means all earlier positions."""


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """The llama3 scaling of RoPE frequencies in the full layers (`rope_type: llama3` in released configurations)."""

    factor: float
    """The factor by which low frequencies are divided."""
    original_max_positions: int
    """The number of positions of the model before scaling."""
    low_freq_factor: float = 1.0
    """The lower bound of the transition. Wavelengths above original_max_positions / low_freq_factor are scaled by the
    whole factor."""
    high_freq_factor: float = 32.0
    """The upper bound of the transition. Wavelengths below original_max_positions / high_freq_factor stay unchanged."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The routed experts and the shared expert of every layer that follows the leading dense layers."""

    num_experts: int
    """The number of routed experts in each layer."""
    top_k: int
    """The number of routed experts that each token is sent to."""
    ffn_size: int
    """The inner width of one routed expert."""
    shared_ffn_size: int
    """The inner width of the shared expert, which processes every token."""
    scaling_factor: float = 1.0
    """The factor on the normalised weights of the selected experts."""
    route_groups: int = 1
    """The number of groups of neighbouring experts for group-limited routing. 1 lets a token choose among all experts.
    """
    route_top_groups: int = 1
    """The number of groups that one token may take its experts from."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. The parameters depend on this section and the seed only, never on the layout."""

    vocab_size: int
    """The number of rows of the embedding and of the output matrix, padding included."""
    hidden_size: int
    """The width of the residual stream."""
    num_layers: int
    """The number of backbone layers. MTP heads are not counted."""
    layer_pattern: str
    """The kind of attention in each layer: `F` is full and `S` is sliding. The pattern repeats until it covers
    `num_layers`, for example `FSSS`."""
    head_dim: int
    """The number of channels of each attention head, equal in all layers."""
    full: AttentionConfig
    """The attention of the `F` layers."""
    sliding: AttentionConfig
    """The attention of the `S` layers and of the blocks in the MTP heads."""
    num_dense_layers: int
    """The number of leading layers with a dense FFN. All later layers are MoE layers."""
    ffn_size: int
    """The inner width of the dense FFN in the leading layers and in the MTP heads."""
    moe: MoeConfig
    """The experts of the MoE layers."""
    num_mtp_heads: int = 0
    """The number of multi-token-prediction (MTP) heads. Head h, from 1 on, predicts the token h + 1 positions ahead."""
    norm_eps: float = 1e-5
    """The epsilon of every RMSNorm."""
    init_std: float = 0.02
    """The standard deviation of every matrix at initialisation. Norm weights are zero-centred and start at zero."""
    max_positions: int = 4096
    """The longest sequence that the position encoding supports, in tokens, scaling included."""
    rope_scaling: RopeScalingConfig | None = None
    """The long-context scaling of RoPE in the full layers. Null means no scaling."""
    loss_chunk: Chunk = "auto"
    """The number of tokens whose logits exist at the same time while the cross-entropy is computed. Lower values save
    memory. `auto` takes 256 on a CPU, and on CUDA the smallest multiple of 256 whose matrix products take longer than
    the bytes that they read and write."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of tokenised shards, written by `steptron data build`."""

    path: Location
    """The folder that holds `source.json` and the `.bin`/`.idx` shards."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data sources, which the stages mix by name."""

    sources: dict[str, SourceConfig]
    """The sources by name."""
    tokenizer: Location
    """The path of the `tokenizer.json` that built every source. A run refuses sources that were built with another
    tokenizer."""
    build_command: str = ""
    """The command that builds the tokenizer and the sources. Errors about missing data name it; nothing runs it."""
    metadata_until: Tokens | None = None
    """The tokens of the run up to which metadata prefixes of documents (`--metadata` of a build) are trained.
    A sample is before it if the stages before and the samples before it in its stage have fewer tokens. From then on
    the tokens of a prefix are no targets; the model still reads them. Null trains them always, and 0 never."""
    skip: tuple[tuple[int, ...], ...] = ()
    """The steps whose data is left out, as pairs [first, last]. The steps are those of the run without the new pairs;
    the samples that they would read are left out for good, and the next ones take their place, as after a rewind. A run
    keeps the pairs it has, and can get new ones of coming steps at a resume."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The evaluation of a run on text that it is not trained on."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """The sources by name, usually those that a build has held out (`--hold-out`). A source that the run is also
    trained on is refused. Without sources there is no evaluation."""
    every: int = 1000
    """The number of optimizer steps between evaluations. The end of each stage always has one."""
    tokens: Tokens = 1_000_000
    """The number of tokens of each source that are evaluated, from its start. They are cut into sequences of the
    stage's length."""


@dataclass(frozen=True, kw_only=True)
class RampStep:
    """One step of the batch-size ramp at the start of a stage."""

    until: Tokens
    """The number of tokens of the stage, from its start, up to which this batch size is used."""
    batch_size: int
    """The number of sequences in one optimizer step, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class LrConfig:
    """The learning-rate schedule of one stage, as a function of the stage's tokens. Its end is at `schedule_tokens`."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """The shape after warm-up. `constant` stays at `peak`. `linear` and `cosine` fall to `end` over the rest of the
    stage. `wsd` stays at `peak` and falls linearly to `end` in the last `decay` tokens."""
    peak: float
    """The learning rate after warm-up."""
    start: float = 0.0
    """The learning rate at the first token of a stage with warm-up."""
    end: float | None = None
    """The learning rate at the last token of the stage. `linear`, `cosine` and `wsd` require it."""
    warmup: Tokens = 0
    """The length of the linear warm-up from `start` to `peak`, in tokens. 0 means no warm-up."""
    decay: Tokens = 0
    """The length of the final fall of a `wsd` schedule, in tokens."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """The methods that keep the load of the experts even, with their strength."""

    bias_rate: float = 0.0
    """The change of the router bias per optimizer step, towards even load (loss-free balancing). 0 turns it off."""
    bias_rate_end: float | None = None
    """The value that `bias_rate` reaches linearly at the end of the stage. Null keeps `bias_rate` constant."""
    ep_loss: float = 0.0
    """The coefficient of the balance loss over expert groups. 0 turns it off."""
    num_groups: int | None = None
    """The number of expert groups in the `ep_loss`. Null uses `parallel.expert.ep`, which makes the loss depend on the
    layout."""
    sequence_loss: float = 0.0
    """The coefficient of the auxiliary loss that balances single experts within each batch row. 0 turns it off."""
    z_loss: float = 0.0
    """The coefficient of the router's z-loss, which keeps router logits small. 0 turns it off."""
    freeze_router: bool = False
    """If true, the weight and the bias of every router stay unchanged during the stage."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Activation limits by global layer index: silu(gate) ≤ L and |up| ≤ L. A layer that is not listed has no limit."""

    routed: dict[int, float] = field(default_factory=dict)
    """The limits of the routed experts, layer index to limit."""
    shared: dict[int, float] = field(default_factory=dict)
    """The limits of the shared expert, layer index to limit."""


@dataclass(frozen=True, kw_only=True)
class DenseMeshConfig:
    """The dense view of the ranks: attention, dense FFN, norms and embeddings. One axis may be −1 and then takes the
    remaining ranks."""

    dp_replicate: int = 1
    """The number of replicas of the sharded parameters (HSDP)."""
    dp_shard: int = -1
    """The number of ranks that parameters are sharded over (FSDP)."""
    cp: int = 1
    """The number of context-parallel ranks, which share the tokens of a sequence."""
    tp: int = 1
    """The number of tensor-parallel ranks, which share heads, FFN columns and the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ExpertMeshConfig:
    """The expert view of the same ranks: routed experts only. One axis may be −1 and then takes the remaining ranks."""

    dp_replicate: int = 1
    """The number of replicas of the sharded expert parameters (HSDP)."""
    dp_shard: int = -1
    """The number of ranks that expert parameters are sharded over (FSDP)."""
    ep: int = 1
    """The number of expert-parallel ranks, which share the experts of a layer."""
    etp: int = 1
    """The number of expert-tensor-parallel ranks, which share the columns of each expert."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The cut of the layers into pipeline stages, and the order of their work."""

    schedule: Literal["1f1b", "interleaved", "zb-v", "dualpipe-v"] = "1f1b"
    """The pipeline schedule. `1f1b` has one pipeline stage per rank, `interleaved` has `chunks` of them, `zb-v` and
    `dualpipe-v` have two, in a V. With `dualpipe-v`, experts exchange one micro-batch while another one computes."""
    chunks: int = 2
    """The number of pipeline stages per rank in the interleaved schedule."""
    layers: tuple[int, ...] = ()
    """The number of backbone layers in each pipeline stage, in order. The first stage may have 0. Stages of 0 layers at
    the end share output matrix and MTP heads with the last one that has layers. Empty cuts all evenly by cost."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation checkpointing: the parts that the backward pass computes again instead of keeping them. The router
    always runs once."""

    parts: tuple[Literal["attention", "ffn", "norm", "silu", "permutation"], ...] = ()
    """The parts to recompute. `attention` and `ffn` are whole sublayers (dense FFN, shared and routed experts), `norm`
    is the output of the norms, `silu` is the product before a down projection, and `permutation` is the rows gathered
    for the experts."""
    every: int = 1
    """The distance between layers that recompute. 1 recomputes in every layer, 2 in every second layer."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout: two views of the same ranks. The views share `pp` and nothing else."""

    ranks: int | None = None
    """The number of ranks. Null takes as many as the launcher starts and, in a later stage, as the stage before has. If
    a stage has another number than the one before, the run saves at the border and exits with code 76, and the launch
    scripts start it again with that number."""
    pp: int = 1
    """The number of pipeline-parallel ranks."""
    dense: DenseMeshConfig = field(default_factory=DenseMeshConfig)
    """The dense view."""
    expert: ExpertMeshConfig = field(default_factory=ExpertMeshConfig)
    """The expert view."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """The stages and the schedule of the pipeline."""
    cp_method: Literal["ring", "all_gather"] = "ring"
    """The method of full attention under context parallelism. `ring` passes keys and values around a ring, `all_gather`
    gathers them at once. Sliding layers always exchange a halo."""
    ep_dispatch: Literal["all_to_all", "all_gather"] = "all_to_all"
    """The exchange that brings tokens to experts on other ranks. `all_to_all` sends each token only to the ranks that
    need it, `all_gather` sends all tokens to all ranks of the group."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Activation checkpointing."""
    compile: bool = False
    """If true, torch.compile compiles the model block by block."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum. All of its settings take effect at the first step of the stage."""

    tokens: Tokens
    """The token budget. The stage ends with the step that reaches it."""
    schedule_tokens: Tokens | None = None
    """The number of tokens over which the schedules of `lr` and `balance` run; behind it they stay at their end. Null
    uses `tokens`. It keeps the rates of a stage whose budget is raised later."""
    seq_len: int
    """The length of a sequence in tokens."""
    batch_size: int
    """The number of sequences in one optimizer step, over all ranks."""
    ramp: tuple[RampStep, ...] = ()
    """Smaller batch sizes at the start of the stage, in order of tokens."""
    micro_batch: int = 1
    """The number of sequences that a rank processes at once. Gradients are accumulated over the rest of its share of
    the batch."""
    mix: dict[str, float]
    """The weight of each source, by name. Weights are normalised to a sum of 1."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """The way from documents to sequences. `concatenate` joins all documents and cuts them at the length of a sequence.
    `best_fit` packs whole documents into sequences and fills up the rest with padding, which is no target; it cuts only
    documents that are longer than a sequence."""
    min_length: dict[str, int] = field(default_factory=dict)
    """The least length of a document by source, in tokens with its end. Shorter documents of that source are left
    out of the stage."""
    max_length: dict[str, int] = field(default_factory=dict)
    """The greatest length of a document by source, in tokens with its end. Longer documents of that source are left out
    of the stage."""
    lr: LrConfig
    """The learning-rate schedule."""
    rope_theta_full: float = 1e4
    """The RoPE base of the full layers."""
    rope_theta_sliding: float = 1e4
    """The RoPE base of the sliding layers."""
    mtp_weight: float = 0.0
    """The weight of the mean loss of the MTP heads. 0 takes it out of the loss."""
    mtp_heads: int | None = None
    """The number of MTP heads that the stage trains, from the first on. Null trains all. A later stage may not train
    fewer. If it trains more, the new heads begin as copies of the first one, its optimizer state included."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """The balancing of expert load."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """The activation limits."""
    parallel: ParallelConfig | None = None
    """The layout of this stage, in place of the recipe's `parallel`. Keys that it leaves out have their defaults. At a
    border of two layouts the run saves, the ranks build the network again, and the run continues. They are the same
    processes, unless `parallel.ranks` changes."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """The settings of `engine: deepspeed`. Other engines ignore them."""

    zero: Literal[1, 2, 3] = 2
    """The ZeRO stage. 1 shards the optimizer state and the master weights over the data-parallel ranks, 2 also the
    gradients, 3 also the parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """The optimizer of the hidden matrices. Embeddings, output matrices and vectors always use AdamW."""
    weight_decay: float = 0.1
    """The decoupled weight decay of matrices and embeddings. Norms are not decayed."""
    clip_norm: float = 1.0
    """The global gradient norm above which gradients are scaled down to it."""
    beta1: float = 0.9
    """The decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """The decay rate of AdamW's second moment."""
    eps: float = 1e-8
    """The epsilon of AdamW."""
    momentum: float = 0.95
    """The Nesterov momentum of Muon."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The schedule of checkpoints, and the rules that decide which ones are kept."""

    every: int = 1000
    """The number of optimizer steps between checkpoints. The end of a stage and the end of the run always write one."""
    keep: int = 3
    """The number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """The interval, in steps, of checkpoints that are kept for good: those of steps that are a multiple of it. Null
    keeps none this way."""
    keep_events: tuple[Literal["stage_start", "alarm", "decision", "rewind", "resume"], ...] = ()
    """The kinds of ledger events that protect a checkpoint: the newest checkpoint before each such event is kept for
    good."""
    keep_best: bool = False
    """If true, the checkpoint with the lowest evaluation loss is kept. `evaluation.every` must divide `every`."""
    background: bool = True
    """If true, checkpoints are written from a copy in host memory while training continues. If false, training waits
    until all files are on disk."""
    mirror_to: Location = ""
    """A mirror of the checkpoints: a folder, or a URL that fsspec knows. Copies are stored there in a folder named
    after the run. Empty makes no copies."""
    timeout_s: float = 3600.0
    """The time in seconds within which all ranks must have written a checkpoint."""
    init_from: Location = ""
    """The initial weights of a new run: a run folder, one checkpoint, or an imported model. Empty draws initial values
    from the seed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run."""

    run: RunConfig
    """The name, the folder and the device of the run."""
    seed: int = 0
    """The seed of initialisation and of the data order."""
    precision: Precision = "fp32"
    """The precision of matrix products. Master weights, router, norms, losses and reductions always use fp32."""
    model: ModelConfig
    """The network."""
    data: DataConfig
    """The data sources."""
    stages: dict[str, StageConfig]
    """The stages of the curriculum by name, in order."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluation on held-out text during training."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout of the ranks."""
    engine: Literal["native", "deepspeed"] = "native"
    """The engine that shards parameters and sums gradients. `native` is torch's FSDP2. `deepspeed` is DeepSpeed's ZeRO,
    for data-parallel and expert-parallel layouts."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """The settings of `engine: deepspeed`."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """The choice of kernels."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Metrics, detectors and policy."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""


def trained_heads(model: ModelConfig, stage: StageConfig) -> int:
    """Return the number of MTP heads that a stage trains."""
    return model.num_mtp_heads if stage.mtp_heads is None else stage.mtp_heads


def layer_kinds(model: ModelConfig) -> str:
    """Return the kind of attention of each backbone layer, `F` or `S`, one character per layer."""
    repeats = -(-model.num_layers // len(model.layer_pattern))
    return (model.layer_pattern * repeats)[: model.num_layers]


def moe_layers(model: ModelConfig) -> range:
    """Return the global indices of the MoE layers."""
    return range(model.num_dense_layers, model.num_layers)
