"""The policy: from a step's alarms to an action, the same on every rank.

    alarms ─► the recipe's table: detector → act ─► budgets ─► Decision ─► ledger, training loop

If several acts are due, the strongest is taken. Activation limits are switched on even if the step is skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steptron.config.decode import encode
from steptron.config.detectors import Act, DetectorsConfig, PolicyConfig
from steptron.monitor.detect import Alarm, Surroundings

STRENGTH: tuple[Act, ...] = ("ignore", "warn", "clip", "skip", "rewind", "stop")
"""The acts from the weakest to the strongest."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision about a step."""

    step: int
    """The step that was judged; its update has not been made."""
    act: Act
    """The strongest act that is due, or `ignore` if none is."""
    alarms: list[Alarm]
    """All alarms of the step, except those that are ignored."""
    clip_layers: tuple[int, ...]
    """Layers whose activation limits are switched on; only if the act is no stronger than `skip`."""
    since: int
    """The first bad step that the act is for, or `step` if there is none."""
    reason: str
    """The reason for the action, in words."""

    def evidence(self) -> dict[str, Any]:
        """Return the evidence of the ledger's event `decision`."""
        return {
            "act": self.act,
            "since": self.since,
            "clip_layers": list(self.clip_layers),
            "detectors": sorted({alarm.detector for alarm in self.alarms if alarm.phase != "cleared"}),
            "reason": self.reason,
        }

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the ledger's lines under this decision's step: kind of event and evidence, in order.

        A warning is its alarm. Only an interference with training is a decision of its own.
        """
        kinds = {"raised": "alarm", "cleared": "alarm_cleared"}
        events = [(kinds[alarm.phase], alarm.evidence()) for alarm in self.alarms if alarm.phase in kinds]
        if self.act not in ("ignore", "warn"):
            events.append(("decision", self.evidence()))
        return events


class Policy:
    """The recipe's table with its budgets."""

    def __init__(self, config: PolicyConfig):
        self._config = config
        self._acts: dict[str, Act] = encode(config.actions)
        self._rewinds = 0
        self._skips = 0  # consecutive skips up to the last step
        self._taken: dict[str, Act] = {}  # the last act by place: a resume may change the act for an alarm that lasts

    def decide(self, step: int, alarms: Sequence[Alarm]) -> Decision:
        """Return the decision about a step with these alarms.

        An act is due when its alarm is raised; `skip` is due at every bad step while the alarm lasts. If a resume has
        replaced an act by another, the new one is due at the next bad step, layer by layer, though the alarm was raised
        before.
        """
        heard = [alarm for alarm in alarms if self._acts[alarm.detector] != "ignore"]
        due = [(self._acts[alarm.detector], alarm) for alarm in alarms if self._is_due(alarm)]
        due = [(its_act, alarm) for its_act, alarm in due if its_act != "ignore"]
        act = STRENGTH[max((STRENGTH.index(its_act) for its_act, _ in due), default=0)]
        causes = [alarm for its_act, alarm in due if its_act == act]
        act, spent = self._within_budget(act)
        clip = {int(alarm.where["layer"]) for its_act, alarm in due if its_act == "clip"}
        reasons = [f"{alarm.detector}: {alarm.text}" for alarm in causes]
        return Decision(
            step=step,
            act=act,
            alarms=heard,
            clip_layers=tuple(sorted(clip)) if act in ("clip", "skip") else (),
            since=min((alarm.since for alarm in causes), default=step),
            reason="; ".join(([spent] if spent else []) + reasons),
        )

    def _is_due(self, alarm: Alarm) -> bool:
        """Return whether the act is to be taken now, and remember it."""
        act, place = self._acts[alarm.detector], _place(alarm)
        again = act == "skip" or self._taken.get(place) != act
        due = alarm.phase == "raised" or (alarm.phase == "lasting" and again)
        if due:
            self._taken[place] = act
        return due

    def _within_budget(self, act: Act) -> tuple[Act, str]:
        """Return the act, or `stop` and the reason if its budget is spent."""
        config = self._config
        self._skips = self._skips + 1 if act == "skip" else 0
        if act == "skip" and self._skips > config.skips:
            return "stop", f"{config.skips} updates in a row were skipped, as many as monitor.policy.skips allows"
        if act == "rewind" and self._rewinds >= config.rewinds:
            return (
                "stop",
                f"{self._rewinds} rewinds were made, as many as monitor.policy.rewinds={config.rewinds} allows",
            )
        if act == "rewind":
            self._rewinds += 1
        return act, ""

    def spent(self, rewinds: int) -> None:
        """Set the number of the run's rewinds, which a checkpoint from before them does not know."""
        self._rewinds = max(self._rewinds, rewinds)

    def state(self) -> dict[str, Any]:
        """Return the state as JSON-able values, for checkpoints."""
        return {"rewinds": self._rewinds, "skips": self._skips, "taken": dict(self._taken)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state`, but keep rewinds made since then: a rewind does not give back its own cost."""
        self._rewinds = max(self._rewinds, state["rewinds"])
        self._skips = state["skips"]
        self._taken = dict(state.get("taken", {}))  # earlier versions saved none: acts are due once more


def _place(alarm: Alarm) -> str:
    """Return the place that an act applies to: a layer, or the run. The worst expert, rank or side changes from step to
    step."""
    return f"{alarm.detector} {alarm.where.get('layer', '')}".rstrip()


def in_force(detectors: DetectorsConfig, policy: PolicyConfig, around: Surroundings) -> dict[str, Any]:
    """Return the evidence of the ledger's event `detectors`: everything that decisions depend on except the planes.

    It is written at each start and resume.
    """
    return {"detectors": encode(detectors), "policy": encode(policy), "around": encode(around)}
