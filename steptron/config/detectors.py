"""The recipe's `monitor.detectors` and `monitor.policy`: thresholds with units, and the action when one is crossed.

A detector raises its alarm once, after its value has been beyond the first threshold for `steps` steps in a row. It
clears the alarm after `clear_steps` steps in a row within the second threshold. Between the two thresholds nothing
changes.
"""

from dataclasses import dataclass, field
from typing import Literal

Act = Literal["ignore", "warn", "skip", "clip", "rewind", "stop"]
"""An action of the policy. `ignore` does nothing. `warn` writes to the ledger, to the log and to the alerts. `skip`
leaves out the update of the step. `clip` switches on activation limits for the layer. `rewind` returns to a checkpoint
and skips the data that caused the alarm. `stop` saves and ends the run with exit code 3."""


@dataclass(frozen=True, kw_only=True)
class LossSpikeConfig:
    """The next-token loss moves away from the median of the last few steps further than usual. The detector starts anew
    with each stage.

    The usual change is the median and the spread of such changes in a window of earlier steps. The spread is 1.4826 ·
    MAD, and at least the distance from the median to the 2nd or 98th percentile divided by 2.054.
    """

    window: int = 128
    """The number of earlier steps that define the usual change. Steps that were spikes do not count."""
    warm_up: int = 20
    """The number of steps that the window must hold before the detector judges a step."""
    recent: int = 15
    """The number of last steps whose median a step is compared with. A step that is like any of them is not a spike."""
    threshold_up: float = 5.5
    """The upward change, in spreads, above which a step is a spike."""
    threshold_down: float = 5.5
    """The downward change, in spreads, above which a step is a spike. A batch of repeated text causes one."""
    min_up: float = 0.7
    """The smallest upward change in nats that can be a spike, however small the spread is."""
    min_down: float = 0.7
    """The smallest downward change in nats that can be a spike, however small the spread is."""
    clear_ratio: float = 0.5
    """The share of the threshold that defines a clean step: its distance from the nearest of the `recent` steps is at
    most this share."""
    raise_after_steps: int = 1
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 3
    """The number of clean steps in a row that clear the alarm."""
    rebase_after_steps: int = 30
    """The number of steps in a row at another level after which that level is the new normal."""


@dataclass(frozen=True, kw_only=True)
class GradNormSpikeConfig:
    """The gradient norm before clipping moves away from the median of the last few steps. Changes are factors, not
    differences."""

    window: int = 128
    """The number of earlier steps that define the usual change. Steps that were spikes do not count."""
    warm_up: int = 20
    """The number of steps that the window must hold before the detector judges a step."""
    recent: int = 15
    """The number of last steps whose median a step is compared with. A step that is like any of them is not a spike."""
    threshold_up: float = 10.0
    """The upward change, in spreads, above which a step is a spike. A spread of 0.2 belongs to a norm that varies by a
    fifth."""
    threshold_down: float = 3.0
    """The downward change, in spreads, above which a step is a spike."""
    factor_up: float = 5.0
    """The smallest rise that can be a spike, as a factor on the median of the last steps."""
    factor_down: float = 10.0
    """The smallest fall that can be a spike, as a divisor of the median of the last steps."""
    clear_ratio: float = 0.5
    """The share of the threshold that defines a clean step: its distance from the nearest of the `recent` steps is at
    most this share."""
    raise_after_steps: int = 1
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 3
    """The number of clean steps in a row that clear the alarm."""
    rebase_after_steps: int = 30
    """The number of steps in a row at another level after which that level is the new normal."""


@dataclass(frozen=True, kw_only=True)
class NotFiniteConfig:
    """The loss, the total loss, the gradient norm or the gradient of a parameter is NaN or infinite. The alarm is
    raised at that same step."""

    clear_steps: int = 3
    """The number of finite steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class BlowUpConfig:
    """The mean output norm of one expert moves away from those of its layer (max/median). The loss does not show it."""

    ratio: float = 6.0
    """The max/median that is too much if it is also a rise."""
    rise: float = 2.0
    """The factor on the layer's own baseline that counts as a rise."""
    limit: float = 10.0
    """The max/median that is too much without a rise, because it may have risen slowly."""
    clear_ratio: float = 4.0
    """The max/median below which the layer is clean again."""
    clear_rise: float = 1.5
    """The factor on the baseline below which the layer is clean again."""
    baseline: int = 500
    """The number of steps that the baseline, a running mean of max/median, reaches back. Bad steps do not count."""
    min_tokens: int = 8
    """The number of tokens in the step that an expert needs to be judged."""
    raise_after_steps: int = 3
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 10
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class ExpertDeathConfig:
    """The activations or the weights of an expert fall towards zero compared with its layer, while it still gets
    tokens."""

    activation: float = 0.1
    """The RMS at the FFN intermediate, divided by the layer's median, below which it is too small."""
    clear_activation: float = 0.2
    """The RMS divided by the median above which the expert is clean again."""
    weight: float = 0.25
    """The norm of the expert's matrices, divided by the layer's median, below which it is too small."""
    clear_weight: float = 0.35
    """The norm divided by the median above which the expert is clean again."""
    min_tokens: int = 8
    """The number of tokens in the step that an expert needs for its activations to be judged."""
    raise_after_steps: int = 5
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 10
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class IdleExpertConfig:
    """An expert gets no tokens, or almost none."""

    share: float = 0.02
    """The share of the fair load (the layer's mean) at or below which an expert is idle. 0 means no token at all."""
    clear_share: float = 0.1
    """The share of the fair load from which the expert is clean again."""
    warm_up: int = 200
    """The number of first steps of the run that are not judged, because routers are still settling."""
    raise_after_steps: int = 15
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 5
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class RouterCollapseConfig:
    """The router of a layer chooses the same few experts for all tokens."""

    entropy: float = 0.15
    """The mean entropy of a token's probabilities, divided by ln E, below which it is too small. E is the number of
    experts."""
    clear_entropy: float = 0.25
    """The entropy divided by ln E above which the layer is clean again."""
    concentration: float = 0.9
    """The load of the `top_k` most loaded experts above which it is too much: 0 if all experts are alike, 1 if no
    others are chosen."""
    clear_concentration: float = 0.7
    """The concentration below which the layer is clean again."""
    warm_up: int = 200
    """The number of first steps of the run that are not judged, because routers are still settling."""
    raise_after_steps: int = 10
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 10
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class RankOverloadConfig:
    """The experts of one expert-parallel rank get too many tokens over all layers, so that the other ranks wait for
    it."""

    share: float = 1.5
    """The tokens divided by the fair share (the mean over the ranks) above which it is too much."""
    clear_share: float = 1.25
    """The tokens divided by the fair share below which the rank is clean again."""
    warm_up: int = 200
    """The number of first steps of the run that are not judged, because routers are still settling."""
    raise_after_steps: int = 20
    """The number of bad steps in a row that raise the alarm."""
    clear_steps: int = 10
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class StragglerConfig:
    """A rank is slow by itself: its step time without communication exceeds the median over the ranks.

    A process that shares the rank's cores slows it down for some steps by any factor. Therefore slow steps are counted,
    and their times are not added up.
    """

    ratio: float = 1.6
    """The step time divided by the median above which a step is slow, if `seconds` is exceeded too."""
    seconds: float = 0.02
    """The seconds above the median that a slow step must take at least."""
    window: int = 10
    """The number of last steps among which slow steps are counted."""
    slow: int = 8
    """The number of slow steps in the window that raise the alarm."""
    clear_slow: int = 4
    """The number of slow steps in the window up to which a step is clean."""
    clear_steps: int = 3
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class DataStallConfig:
    """A rank waits for data. The running mean of its waiting time is compared with its step time."""

    share: float = 0.25
    """The waiting time divided by the step time above which it is too much, if `seconds` is exceeded too."""
    seconds: float = 0.02
    """The seconds per step that a rank must wait at least."""
    clear_share: float = 0.1
    """The waiting time divided by the step time below which the rank is clean again."""
    raise_after_steps: int = 20
    """The number of steps that the running means reach back."""
    clear_steps: int = 5
    """The number of clean steps in a row that clear the alarm."""


@dataclass(frozen=True, kw_only=True)
class DetectorsConfig:
    """The thresholds of each detector. To turn a detector off, set its action to `ignore`; `not_finite` cannot be
    turned off."""

    loss_spike: LossSpikeConfig = field(default_factory=LossSpikeConfig)
    """The loss jumps up or down."""
    grad_norm_spike: GradNormSpikeConfig = field(default_factory=GradNormSpikeConfig)
    """The gradient norm jumps up or down."""
    not_finite: NotFiniteConfig = field(default_factory=NotFiniteConfig)
    """A value is NaN or infinite."""
    blow_up: BlowUpConfig = field(default_factory=BlowUpConfig)
    """The output of one expert explodes."""
    expert_death: ExpertDeathConfig = field(default_factory=ExpertDeathConfig)
    """The activations or the weights of one expert vanish."""
    idle_expert: IdleExpertConfig = field(default_factory=IdleExpertConfig)
    """One expert gets no tokens."""
    router_collapse: RouterCollapseConfig = field(default_factory=RouterCollapseConfig)
    """All tokens of one layer go to the same experts."""
    rank_overload: RankOverloadConfig = field(default_factory=RankOverloadConfig)
    """One expert-parallel rank gets too many tokens."""
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    """One rank is slow."""
    data_stall: DataStallConfig = field(default_factory=DataStallConfig)
    """One rank waits for data."""


@dataclass(frozen=True, kw_only=True)
class ActsConfig:
    """The action for each detector. Actions that cannot help against what a detector finds are refused."""

    loss_spike: Act = "warn"
    """The action when the loss jumps."""
    grad_norm_spike: Act = "warn"
    """The action when the gradient norm jumps. Clipping already limits its effect."""
    not_finite: Act = "skip"
    """The action when a value is NaN or infinite. After `skips` skipped updates in a row it becomes `stop`."""
    blow_up: Act = "warn"
    """The action when the output of one expert explodes. `clip` limits it."""
    expert_death: Act = "warn"
    """The action when the activations or the weights of one expert vanish."""
    idle_expert: Act = "warn"
    """The action when one expert gets no tokens."""
    router_collapse: Act = "warn"
    """The action when all tokens of one layer go to the same experts."""
    rank_overload: Act = "warn"
    """The action when one expert-parallel rank gets too many tokens."""
    straggler: Act = "warn"
    """The action when one rank is slow."""
    data_stall: Act = "warn"
    """The action when one rank waits for data."""


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
"""The actions that can help, by detector."""

WHY_NOT: dict[Act, str] = {
    "ignore": "an update that is not finite destroys the model",
    "warn": "an update that is not finite destroys the model",
    "skip": "leaving out single updates does not change what this detector finds",
    "clip": "activation limits apply to a layer whose experts blow up, which only blow_up detects",
    "rewind": "other data does not change what this detector finds",
}
"""The reason why an action is not sensible for a detector that does not list it."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The actions when detectors raise alarms. If several actions are due in one step, the strongest is taken."""

    actions: ActsConfig = field(default_factory=ActsConfig)
    """The action of each detector."""
    skips: int = 5
    """The number of updates in a row that may be skipped. After that, `skip` becomes `stop`."""
    rewinds: int = 3
    """The number of rewinds that a run may make. After that, `rewind` becomes `stop`."""
    rewind_before: int = 1
    """The number of steps before the first bad step whose data a rewind skips too."""
    limit: float = 7.0
    """The activation limit that `clip` sets for the routed experts of the layer."""
