"""The recipe's `monitor.detectors` and `monitor.policy`: thresholds with units, and what is done when one is crossed.

Every detector raises an alarm once, when what it watches is beyond the first threshold for `steps` steps in a row, and clears it
after `clear_steps` steps in a row within the second one. In between nothing changes.
"""

from dataclasses import dataclass, field
from typing import Literal

Act = Literal["ignore", "warn", "skip", "clip", "rewind", "stop"]
"""`ignore`: nothing · `warn`: ledger, log and alert · `skip`: the step's update is left out · `clip`: activation limits are switched on
for the layer · `rewind`: back to a checkpoint, past the data that did it · `stop`: save, and end with exit code 3."""


@dataclass(frozen=True, kw_only=True)
class LossSpikeConfig:
    """The loss jumps away from the median of the last few steps, further than it usually does. Starts anew with each stage.

    What is usual is the median and spread of these changes in a window of steps before. The spread is 1.4826 · MAD, and at least the
    distance from the median to the 2nd or 98th percentile over 2.054."""

    window: int = 128
    """Steps that say what is usual; steps that were spikes do not count."""
    warm_up: int = 20
    """Steps of the window that must be there before anything is judged."""
    recent: int = 15
    """Last steps whose median a step is compared with; and it must not be like any of them."""
    up: float = 5.5
    """Spreads upwards that are a spike."""
    down: float = 5.5
    """Spreads downwards that are a spike: a batch of repetitions is learned by heart."""
    min_up: float = 0.7
    """Nats upwards below which nothing is a spike, however small the spread."""
    min_down: float = 0.7
    """Nats downwards below which nothing is a spike."""
    clear: float = 0.5
    """Share of the threshold's distance within which of any of the last steps a step is clean."""
    steps: int = 1
    """Steps in a row that raise the alarm."""
    clear_steps: int = 3
    """Clean steps in a row that clear it."""
    new_normal: int = 30
    """Steps in a row at another level that make it the new normal."""


@dataclass(frozen=True, kw_only=True)
class GradNormSpikeConfig:
    """The gradient norm, before clipping, jumps away from the median of the last few steps; as for the loss, but by factors."""

    window: int = 128
    """Steps that say what is usual; steps that were spikes do not count."""
    warm_up: int = 20
    """Steps of the window that must be there before anything is judged."""
    recent: int = 15
    """Last steps whose median a step is compared with; and it must not be like any of them."""
    up: float = 10.0
    """Spreads upwards that are a spike; of factors, so that 0.2 is a norm that varies by a fifth."""
    down: float = 3.0
    """Spreads downwards that are a spike."""
    factor_up: float = 5.0
    """Times the median of the last steps below which nothing is a spike upwards."""
    factor_down: float = 10.0
    """The median over this is what nothing above is a spike downwards."""
    clear: float = 0.5
    """Share of the threshold's distance within which of any of the last steps a step is clean."""
    steps: int = 1
    """Steps in a row that raise the alarm."""
    clear_steps: int = 3
    """Clean steps in a row that clear it."""
    new_normal: int = 30
    """Steps in a row at another level that make it the new normal."""


@dataclass(frozen=True, kw_only=True)
class NotFiniteConfig:
    """Loss, gradient norm or any parameter's gradient is NaN or infinite. Raised at that very step."""

    clear_steps: int = 3
    """Finite steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class BlowUpConfig:
    """One expert's mean output norm runs away from those of its layer (max/median); the loss does not show it."""

    ratio: float = 6.0
    """Max/median that is too much, where it also is a rise."""
    rise: float = 2.0
    """Times the layer's own baseline that is a rise."""
    limit: float = 10.0
    """Max/median that is too much whatever the baseline: it may have risen slowly."""
    clear_ratio: float = 4.0
    """Max/median that is clean again."""
    clear_rise: float = 1.5
    """Times the baseline that is clean again too."""
    baseline: int = 500
    """Steps that the baseline, a running mean of max/median, reaches back; blown-up steps do not count."""
    min_tokens: int = 8
    """Tokens of the step that an expert needs for its norm to be judged."""
    steps: int = 3
    """Steps in a row that raise the alarm."""
    clear_steps: int = 10
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class ExpertDeathConfig:
    """An expert's activations or weights fall towards zero against those of its layer (min/median), while it still gets tokens."""

    activation: float = 0.1
    """RMS at the FFN intermediate ÷ the layer's median that is too little."""
    clear_activation: float = 0.2
    """RMS ÷ median that is clean again."""
    weight: float = 0.25
    """Norm of the expert's matrices ÷ the layer's median that is too little."""
    clear_weight: float = 0.35
    """Norm ÷ median that is clean again."""
    min_tokens: int = 8
    """Tokens of the step that an expert needs for its activations to be judged."""
    steps: int = 5
    """Steps in a row that raise the alarm."""
    clear_steps: int = 10
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class IdleExpertConfig:
    """An expert gets no tokens, or next to none."""

    share: float = 0.02
    """Share of the fair load (the layer's mean) up to which an expert is idle; 0: without any token."""
    clear_share: float = 0.1
    """Share of the fair load from which it is not."""
    warm_up: int = 200
    """First steps of the run, in which routers still find their way; nothing is judged there."""
    steps: int = 15
    """Steps in a row that raise the alarm."""
    clear_steps: int = 5
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class RouterCollapseConfig:
    """A layer's router chooses the same few experts for all tokens."""

    entropy: float = 0.15
    """Mean entropy of a token's probabilities ÷ ln E that is too little."""
    clear_entropy: float = 0.25
    """Entropy ÷ ln E that is clean again."""
    concentration: float = 0.9
    """Load of the top_k most loaded experts, from 0 (all experts alike) to 1 (no others are chosen), that is too much."""
    clear_concentration: float = 0.7
    """Concentration that is clean again."""
    warm_up: int = 200
    """First steps of the run; nothing is judged there."""
    steps: int = 10
    """Steps in a row that raise the alarm."""
    clear_steps: int = 10
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class RankOverloadConfig:
    """The experts of one expert-parallel rank get too many of all layers' tokens: the others wait for it."""

    share: float = 1.5
    """Tokens ÷ the fair share (the mean over the ranks) that is too much."""
    clear_share: float = 1.25
    """Tokens ÷ the fair share that is clean again."""
    warm_up: int = 200
    """First steps of the run; nothing is judged there."""
    steps: int = 20
    """Steps in a row that raise the alarm."""
    clear_steps: int = 10
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class StragglerConfig:
    """A rank is slow by itself: its step time without communication, against the median over the ranks.

    What shares its cores slows a rank down for some steps, by any factor. So slow steps are counted, not their times."""

    ratio: float = 1.6
    """Time ÷ median above which a rank's step is slow …"""
    seconds: float = 0.02
    """… where it is so many seconds more, too."""
    window: int = 10
    """Last steps that are looked at."""
    slow: int = 8
    """Slow ones among them that raise the alarm."""
    clear_slow: int = 4
    """Slow ones among them up to which a rank is fine again."""
    clear_steps: int = 3
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class DataStallConfig:
    """A rank waits for data: its share of the step, a running mean."""

    share: float = 0.25
    """Wait ÷ step time that is too much …"""
    seconds: float = 0.02
    """… where it is so many seconds a step, too."""
    clear_share: float = 0.1
    """Wait ÷ step time that is clean again."""
    steps: int = 20
    """Steps that the running means reach back."""
    clear_steps: int = 5
    """Clean steps in a row that clear it."""


@dataclass(frozen=True, kw_only=True)
class DetectorsConfig:
    """Thresholds, detector by detector. To be rid of one, set its act to `ignore`."""

    loss_spike: LossSpikeConfig = field(default_factory=LossSpikeConfig)
    """The loss jumps, up or down."""
    grad_norm_spike: GradNormSpikeConfig = field(default_factory=GradNormSpikeConfig)
    """The gradient norm jumps, up or down."""
    not_finite: NotFiniteConfig = field(default_factory=NotFiniteConfig)
    """NaN or infinity."""
    blow_up: BlowUpConfig = field(default_factory=BlowUpConfig)
    """One expert's output explodes."""
    expert_death: ExpertDeathConfig = field(default_factory=ExpertDeathConfig)
    """One expert's activations or weights vanish."""
    idle_expert: IdleExpertConfig = field(default_factory=IdleExpertConfig)
    """One expert gets no tokens."""
    router_collapse: RouterCollapseConfig = field(default_factory=RouterCollapseConfig)
    """One layer's tokens all go to the same experts."""
    rank_overload: RankOverloadConfig = field(default_factory=RankOverloadConfig)
    """One expert-parallel rank gets too many tokens."""
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    """One rank is slow."""
    data_stall: DataStallConfig = field(default_factory=DataStallConfig)
    """One rank waits for data."""


@dataclass(frozen=True, kw_only=True)
class ActsConfig:
    """What is done, detector by detector; which acts make sense for which is SENSIBLE."""

    loss_spike: Act = "warn"
    """The loss jumps."""
    grad_norm_spike: Act = "warn"
    """The gradient norm jumps; clipping takes the worst of it."""
    not_finite: Act = "skip"
    """NaN or infinity; `skips` in a row mean `stop`."""
    blow_up: Act = "warn"
    """One expert's output explodes; `clip` cures it."""
    expert_death: Act = "warn"
    """One expert's activations or weights vanish."""
    idle_expert: Act = "warn"
    """One expert gets no tokens."""
    router_collapse: Act = "warn"
    """One layer's tokens all go to the same experts."""
    rank_overload: Act = "warn"
    """One expert-parallel rank gets too many tokens."""
    straggler: Act = "warn"
    """One rank is slow."""
    data_stall: Act = "warn"
    """One rank waits for data."""


_STATE: tuple[Act, ...] = ("ignore", "warn", "rewind", "stop")
_MACHINE: tuple[Act, ...] = ("ignore", "warn", "stop")

SENSIBLE: dict[str, tuple[Act, ...]] = {
    "loss_spike": ("ignore", "warn", "skip", "rewind", "stop"),
    "grad_norm_spike": ("ignore", "warn", "skip", "rewind", "stop"),
    "not_finite": ("skip", "rewind", "stop"),
    "blow_up": ("ignore", "warn", "clip", "rewind", "stop"),
    "expert_death": _STATE,
    "idle_expert": _STATE,
    "router_collapse": _STATE,
    "rank_overload": _MACHINE,
    "straggler": _MACHINE,
    "data_stall": _MACHINE,
}
"""The acts that can help against what a detector sees."""

WHY_NOT: dict[Act, str] = {
    "ignore": "an update that is not finite ends the model",
    "warn": "an update that is not finite ends the model",
    "skip": "leaving out single updates does not change what this detector sees",
    "clip": "activation limits are set for the layer whose experts blow up, which only blow_up sees",
    "rewind": "other data does not change what this detector sees",
}
"""Why an act is not among the sensible ones, where it is not."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What is done when a detector raises an alarm. Of several acts in one step the strongest is taken."""

    acts: ActsConfig = field(default_factory=ActsConfig)
    """Detector → act."""
    skips: int = 5
    """Steps in a row whose update may be skipped; after them `skip` means `stop`."""
    rewinds: int = 3
    """Rewinds a run may make; after them `rewind` means `stop`."""
    rewind_before: int = 1
    """Steps before the first bad one whose data is skipped too."""
    limit: float = 7.0
    """Activation limit that `clip` sets for the routed experts of the layer."""
