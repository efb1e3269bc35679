"""Detectors of MoE layers: experts that blow up, die or starve, routers that collapse, ranks with too many tokens.

Shape suffixes: L layers, E experts, R expert-parallel ranks."""

import math

import numpy as np

from steptron.config.detectors import (
    BlowUpConfig,
    ExpertDeathConfig,
    IdleExpertConfig,
    RankOverloadConfig,
    RouterCollapseConfig,
)
from steptron.monitor.detect.alarm import Now, Surroundings
from steptron.monitor.detect.base import AlarmCell, Detector, Reading


def median_by_row(values_LE: np.ndarray, known_LE: np.ndarray) -> np.ndarray:
    """Median over the known experts of each layer [L]; NaN where less than half of them are known.

    `np.nanmedian` goes through the layers one by one in Python."""
    ordered_LE = np.sort(np.where(known_LE, values_LE, np.inf), axis=1)
    count_L = known_LE.sum(axis=1)
    rows = np.arange(len(ordered_LE))
    low, high = np.maximum(count_L - 1, 0) // 2, np.minimum(count_L // 2, values_LE.shape[1] - 1)
    median_L = (ordered_LE[rows, low] + ordered_LE[rows, high]) / 2
    return np.where(2 * count_L >= values_LE.shape[1], median_L, np.nan)


class BlowUp(Detector):
    """See `BlowUpConfig`. A cell is a layer, for which the expert with the largest norm is named."""

    name = "blow_up"
    needs = ("rows", "out_norm")
    kept = ("baseline_L", "seen_L")

    def __init__(self, config: BlowUpConfig, around: Surroundings):
        super().__init__(
            cells=len(around.layers), group=1, steps=config.raise_after_steps, clear_steps=config.clear_steps
        )
        self._config = config
        self._layers = around.layers
        self.baseline_L = np.zeros(len(around.layers))
        self.seen_L = np.zeros(len(around.layers), dtype=np.int64)

    def read(self, now: Now) -> Reading:
        by = self._config
        known_LE = (now.values("rows") >= by.min_tokens) & np.isfinite(now.values("out_norm"))
        norm_LE = np.where(known_LE, now.values("out_norm"), 0.0)
        median_L = median_by_row(norm_LE, known_LE)
        expert_L = norm_LE.argmax(axis=1)
        known_L = median_L > 0
        ratio_L = norm_LE.max(axis=1) / np.where(known_L, median_L, 1.0)
        started_L = self.seen_L > 0
        threshold_L = np.where(started_L, np.clip(by.rise * self.baseline_L, by.ratio, by.limit), by.limit)
        clear_L = np.clip(by.clear_rise * self.baseline_L, by.clear_ratio, by.limit)
        bad_L = ratio_L > threshold_L
        self._follow(ratio_L, known_L & ~bad_L & ~self.latch.up)

        def tell(layer: int) -> AlarmCell:
            value, threshold, expert = float(ratio_L[layer]), float(threshold_L[layer]), int(expert_L[layer])
            number = self._layers[layer]
            return AlarmCell(
                where={"layer": number, "expert": expert},
                value=value,
                threshold=threshold,
                unit="× median",
                text=f"layer {number}: the output of expert {expert} is {value:.3g} × the median expert's, "
                f"the limit is {threshold:.3g}",
            )

        clean_L = ratio_L < clear_L
        return Reading(bad=bad_L, clean=clean_L & ~bad_L, known=known_L, severity=ratio_L, tell=tell)

    def _follow(self, ratio_L: np.ndarray, use_L: np.ndarray) -> None:
        """Move the baseline: a mean at first, a running one later."""
        self.seen_L[use_L] += 1
        reach_L = np.clip(self.seen_L, 1, self._config.baseline)
        self.baseline_L += np.where(use_L, (ratio_L - self.baseline_L) / reach_L, 0.0)


class ExpertDeath(Detector):
    """See `ExpertDeathConfig`. A cell is an expert; a layer's experts share an alarm."""

    name = "expert_death"
    needs = ("rows", "activation_rms", "weight_norm")

    def __init__(self, config: ExpertDeathConfig, around: Surroundings):
        cells = len(around.layers) * around.num_experts
        super().__init__(
            cells=cells, group=around.num_experts, steps=config.raise_after_steps, clear_steps=config.clear_steps
        )
        self._config = config
        self._around = around

    def read(self, now: Now) -> Reading:
        by = self._config
        rms_LE, weight_LE = now.values("activation_rms"), now.values("weight_norm")
        known_LE, finite_LE = (now.values("rows") >= by.min_tokens) & np.isfinite(rms_LE), np.isfinite(weight_LE)
        activation = _to_median(np.where(known_LE, rms_LE, 0.0), known_LE).ravel()
        weight = _to_median(np.where(finite_LE, weight_LE, 0.0), finite_LE).ravel()
        # Comparisons with NaN, where there is nothing to judge, are false.
        bad = (activation < by.activation) | (weight < by.weight)
        clean = (activation > by.clear_activation) & (weight > by.clear_weight)
        severity = -np.fmin(activation / by.activation, weight / by.weight)

        def tell(cell: int) -> AlarmCell:
            layer, expert = divmod(cell, self._around.num_experts)
            parts = []
            by_name = {"activation_rms": (activation, by.activation), "weight_norm": (weight, by.weight)}
            low = {name: pair for name, pair in by_name.items() if pair[0][cell] < pair[1]} or by_name
            for name, (ratio, limit) in low.items():
                title = "activation RMS" if name == "activation_rms" else "weight norm"
                parts.append(f"{title} {ratio[cell]:.3g} × the median expert's (limit {limit:g})")
            worst = min(low, key=lambda name: float(np.nan_to_num(low[name][0][cell] / low[name][1], nan=np.inf)))
            number = self._around.layers[layer]
            return AlarmCell(
                where={"layer": number, "expert": expert, "of": " ".join(low)},
                value=float(low[worst][0][cell]),
                threshold=low[worst][1],
                unit="× median",
                text=f"layer {number}: expert {expert} has {' and '.join(parts)}",
            )

        known = bad | (np.isfinite(activation) & np.isfinite(weight))
        return Reading(bad=bad, clean=clean, known=known, severity=severity, tell=tell)


def _to_median(values_LE: np.ndarray, known_LE: np.ndarray) -> np.ndarray:
    """Each expert's value ÷ its layer's median; NaN where either is not there."""
    median_L = median_by_row(values_LE, known_LE)
    median_L = np.where(median_L > 0, median_L, np.nan)
    return np.where(known_LE, values_LE / median_L[:, None], np.nan)


class IdleExpert(Detector):
    """See `IdleExpertConfig`. A cell is an expert; a layer's experts share an alarm."""

    name = "idle_expert"
    needs = ("tokens",)

    def __init__(self, config: IdleExpertConfig, around: Surroundings):
        cells = len(around.layers) * around.num_experts
        super().__init__(
            cells=cells, group=around.num_experts, steps=config.raise_after_steps, clear_steps=config.clear_steps
        )
        self._config = config
        self._around = around

    def read(self, now: Now) -> Reading | None:
        if now.step <= self._config.warm_up:
            return None
        tokens_LE = now.values("tokens")
        fair_L1 = tokens_LE.mean(axis=1, keepdims=True)
        known_L1 = fair_L1 > 0
        share = (tokens_LE / np.where(known_L1, fair_L1, 1.0)).ravel()

        def tell(cell: int) -> AlarmCell:
            layer, expert = divmod(cell, self._around.num_experts)
            number = self._around.layers[layer]
            return AlarmCell(
                where={"layer": number, "expert": expert},
                value=float(share[cell]),
                threshold=self._config.share,
                unit="× fair",
                text=f"layer {number}: expert {expert} got {int(tokens_LE[layer, expert])} tokens, "
                f"a fair share is {fair_L1[layer, 0]:.4g}",
            )

        return Reading(
            bad=share <= self._config.share,
            clean=share >= self._config.clear_share,
            known=np.broadcast_to(known_L1, tokens_LE.shape).ravel(),
            severity=-share,
            tell=tell,
        )


class RouterCollapse(Detector):
    """See `RouterCollapseConfig`. A cell is a layer."""

    name = "router_collapse"
    needs = ("router_entropy", "tokens")

    def __init__(self, config: RouterCollapseConfig, around: Surroundings):
        super().__init__(
            cells=len(around.layers), group=1, steps=config.raise_after_steps, clear_steps=config.clear_steps
        )
        self._config = config
        self._around = around
        # Rounded, so that it is the same with every C library.
        self._log_experts = round(math.log(max(2, around.num_experts)), 6)

    def read(self, now: Now) -> Reading | None:
        by, around = self._config, self._around
        if now.step <= by.warm_up:
            return None
        entropy_L, tokens_LE = now.values("router_entropy"), now.values("tokens")
        total_L = tokens_LE.sum(axis=1)
        known_L = (total_L > 0) & np.isfinite(entropy_L)
        entropy_L = np.where(known_L, entropy_L, 0.0) / self._log_experts
        top_L = np.sort(tokens_LE, axis=1)[:, -around.top_k :].sum(axis=1) / np.where(known_L, total_L, 1.0)
        fair = around.top_k / around.num_experts
        concentration_L = (top_L - fair) / (1 - fair) if fair < 1 else np.zeros_like(top_L)
        bad_L = (entropy_L < by.entropy) | (concentration_L > by.concentration)
        clean_L = (entropy_L > by.clear_entropy) & (concentration_L < by.clear_concentration)

        def tell(layer: int) -> AlarmCell:
            number = around.layers[layer]
            entropy, concentration = float(entropy_L[layer]), float(concentration_L[layer])
            of = "entropy" if entropy / by.entropy < by.concentration / max(concentration, 1e-9) else "concentration"
            return AlarmCell(
                where={"layer": number, "of": of},
                value=entropy if of == "entropy" else concentration,
                threshold=by.entropy if of == "entropy" else by.concentration,
                unit="× ln E" if of == "entropy" else "1",
                text=f"layer {number}: router entropy {entropy:.3g} × ln E (limit {by.entropy:g}), "
                f"load concentrated by {concentration:.3g} (limit {by.concentration:g})",
            )

        return Reading(bad=bad_L, clean=clean_L, known=known_L, severity=-entropy_L, tell=tell)


class RankOverload(Detector):
    """See `RankOverloadConfig`. A cell is an expert-parallel rank; they share an alarm."""

    name = "rank_overload"
    needs = ("tokens",)

    def __init__(self, config: RankOverloadConfig, around: Surroundings):
        super().__init__(
            cells=around.ep, group=around.ep, steps=config.raise_after_steps, clear_steps=config.clear_steps
        )
        self._config = config
        self._ep = around.ep

    def read(self, now: Now) -> Reading | None:
        if now.step <= self._config.warm_up or self._ep < 2:
            return None
        tokens_LE = now.values("tokens")
        load_R = tokens_LE.reshape(len(tokens_LE), self._ep, -1).sum(axis=(0, 2))
        fair = load_R.mean()
        if not fair > 0:
            return None
        share_R = load_R / fair

        def tell(rank: int) -> AlarmCell:
            value, limit = float(share_R[rank]), self._config.share
            return AlarmCell(
                where={"ep_rank": rank},
                value=value,
                threshold=limit,
                unit="× fair",
                text=f"expert-parallel rank {rank} has {value:.3g} × its fair share of tokens, the limit is {limit:g}",
            )

        bad, clean = share_R > self._config.share, share_R < self._config.clear_share
        return Reading(bad=bad, clean=clean, severity=share_R, tell=tell)
