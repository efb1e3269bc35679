"""Detectors: from a step's vital statistics to alarms, the same on every rank.

    vital plane, summed   ─► Now ─┬─► spikes    loss_spike, grad_norm_spike, not_finite
    over all ranks                ├─► experts   blow_up, expert_death, idle_expert, router_collapse, rank_overload
                                  └─► ranks     straggler, data_stall
                                        each: Reading (bad, clean, known by cell) ─► Latch (hysteresis) ─► Alarms

A detector is a function of the vital planes that it has seen and of nothing else: no clock, no randomness, no
communication. Its arithmetic is +, −, ×, ÷, √ and comparisons in float64, which every CPU rounds alike. Its state goes
into checkpoints.
"""

from steptron.monitor.detect.alarm import Alarm, Surroundings
from steptron.monitor.detect.detectors import Detectors

__all__ = ["Alarm", "Detectors", "Surroundings"]
