"""Which act a step's alarms lead to, and what it costs."""

import dataclasses
import json
from pathlib import Path

import pytest
from fake_run import make_recipe
from steptron.config.decode import decode, encode
from steptron.config.detectors import SENSIBLE, ActsConfig, DetectorsConfig, PolicyConfig
from steptron.config.monitoring import MonitorConfig
from steptron.config.resolve import to_yaml
from steptron.config.schema import Recipe
from steptron.config.validate import validate
from steptron.config.validate_monitoring import MONITOR_RANGES, ORDER
from steptron.errors import RecipeError
from steptron.monitor.detect import Alarm, Surroundings
from steptron.monitor.detect.policy import Policy, in_force


def alarm(detector: str, step: int = 10, phase: str = "raised", since: int | None = None, **where) -> Alarm:
    return Alarm(
        detector=detector,
        phase=phase,  # pyright: ignore[reportArgumentType]
        step=step,
        since=step if since is None else since,
        count=1,
        where=where,
        value=1.0,
        threshold=0.5,
        unit="1",
        text=f"{detector} is bad",
    )


def policy(**acts) -> Policy:
    return Policy(PolicyConfig(actions=ActsConfig(**acts)))


DEFAULTS = {
    "loss_spike": "warn",
    "grad_norm_spike": "warn",
    "not_finite": "skip",
    "blow_up": "warn",
    "expert_death": "warn",
    "idle_expert": "warn",
    "router_collapse": "warn",
    "rank_overload": "warn",
    "straggler": "warn",
    "data_stall": "warn",
}


def test_an_act_that_a_resume_changes_is_due_though_the_alarm_was_raised_before():
    before, after = policy(blow_up="warn"), policy(blow_up="clip")
    before.decide(10, [alarm("blow_up", layer=3, expert=1)])
    after.restore(json.loads(json.dumps(before.state())))
    lasting = alarm("blow_up", 12, "lasting", 10, layer=3, expert=1)
    assert after.decide(12, [lasting]).clip_layers == (3,)
    assert after.decide(13, [lasting]).act == "ignore", "once"
    same = policy(blow_up="warn")
    same.restore(before.state())
    assert same.decide(12, [lasting]).act == "ignore"


def test_a_changed_act_is_due_layer_by_layer_and_stays_so_over_restarts():
    table = policy(blow_up="warn")
    table.decide(10, [alarm("blow_up", layer=layer, expert=1) for layer in (3, 4, 5)])
    for _ in range(2):  # resumed twice before the next bad step
        state = json.loads(json.dumps(table.state()))
        table = policy(blow_up="clip")
        table.restore(state)
    sick = [alarm("blow_up", 12, "lasting", 10, layer=layer, expert=7) for layer in (3, 5)]
    assert table.decide(12, sick).clip_layers == (3, 5)
    assert table.decide(13, sick).act == "ignore"
    late = table.decide(14, [*sick, alarm("blow_up", 14, "lasting", 10, layer=4, expert=1)])
    assert late.clip_layers == (4,), "in between layer 4 was neither bad nor over it"


def test_an_alarm_that_was_ignored_when_it_was_raised_is_acted_upon_later():
    table = policy(blow_up="clip")
    table.decide(10, [alarm("blow_up", layer=3)])
    for act, phase, clipped in (("ignore", "raised", ()), ("clip", "lasting", (3,))):
        state, table = table.state(), policy(blow_up=act)
        table.restore(state)
        assert table.decide(20, [alarm("blow_up", 20, phase, layer=3)]).clip_layers == clipped


def test_the_table_by_default():
    assert encode(ActsConfig()) == DEFAULTS
    assert list(SENSIBLE) == list(DEFAULTS) == list(encode(DetectorsConfig()))
    for detector, act in DEFAULTS.items():
        assert policy().decide(10, [alarm(detector)]).act == act


ACTS = [(detector, act) for detector, acts in SENSIBLE.items() for act in acts]


@pytest.mark.parametrize(("detector", "act"), ACTS, ids=[f"{detector} {act}" for detector, act in ACTS])
def test_an_alarm_leads_to_the_act_of_the_table_once(detector, act):
    table = policy(**{detector: act})
    decision = table.decide(10, [alarm(detector, since=8, layer=3, expert=5)])
    assert decision.act == act
    assert decision.since == (10 if act == "ignore" else 8)
    assert decision.clip_layers == ((3,) if act == "clip" else ())
    assert bool(decision.alarms) == (act != "ignore")
    assert [event for event, _ in decision.events()] == {"ignore": [], "warn": ["alarm"]}.get(
        act, ["alarm", "decision"]
    )
    lasting = table.decide(11, [alarm(detector, step=11, phase="lasting", since=8, layer=3)])
    assert lasting.act == ("skip" if act == "skip" else "ignore")
    assert [event for event, _ in lasting.events()] == (["decision"] if act == "skip" else [])
    over = table.decide(12, [alarm(detector, step=12, phase="cleared", since=8, layer=3)])
    assert over.act == "ignore"
    assert [event for event, _ in over.events()] == ([] if act == "ignore" else ["alarm_cleared"])


@pytest.mark.parametrize(
    ("acts", "act", "clipped"),
    [
        ({"loss_spike": "stop", "not_finite": "rewind"}, "stop", False),
        ({"loss_spike": "rewind", "not_finite": "skip"}, "rewind", False),
        ({"loss_spike": "warn", "not_finite": "skip"}, "skip", True),
        ({"loss_spike": "warn", "not_finite": "skip", "blow_up": "rewind"}, "rewind", False),
    ],
    ids=["stop over rewind", "rewind over skip", "skip beside clip", "clip's own rewind"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
def test_the_strongest_act_wins_whatever_the_order(acts, act, clipped, turned):
    alarms = [alarm("loss_spike", since=9), alarm("not_finite", rank=1), alarm("blow_up", since=4, layer=7, expert=2)]
    decision = policy(**({"blow_up": "clip"} | acts)).decide(10, alarms[::-1] if turned else alarms)
    assert decision.act == act
    assert decision.clip_layers == ((7,) if clipped else ())
    cause = next(name for name, its in ({"blow_up": "clip"} | acts).items() if its == act)
    assert decision.reason == f"{cause}: {cause} is bad"
    assert decision.since == {"loss_spike": 9, "not_finite": 10, "blow_up": 4}[cause]


def test_nothing_is_decided_without_alarms():
    decision = policy().decide(10, [])
    assert (decision.act, decision.since, decision.events()) == ("ignore", 10, [])


def test_rewinds_have_a_budget_that_a_rewind_does_not_give_back():
    table = Policy(PolicyConfig(actions=ActsConfig(loss_spike="rewind"), rewinds=2))
    checkpoint = json.loads(json.dumps(table.state()))
    for _ in range(2):
        assert table.decide(10, [alarm("loss_spike")]).act == "rewind"
        table.restore(checkpoint)
    decision = table.decide(10, [alarm("loss_spike")])
    assert decision.act == "stop"
    assert "2 rewinds were made" in decision.reason
    assert "monitor.policy.rewinds=2" in decision.reason
    assert "loss_spike is bad" in decision.reason


def test_a_new_process_is_told_of_the_rewinds_before_it():
    table = Policy(PolicyConfig(actions=ActsConfig(loss_spike="rewind"), rewinds=2))
    table.restore({"rewinds": 0, "skips": 0, "taken": {}})
    table.spent(2)
    assert table.decide(10, [alarm("loss_spike")]).act == "stop"


def test_updates_that_are_skipped_in_a_row_end_in_a_stop():
    table = Policy(PolicyConfig(skips=3))
    acts = []
    for step in range(10, 16):
        phases = {12: []}.get(step, [alarm("not_finite", step=step, phase="raised" if step in (10, 13) else "lasting")])
        acts.append(table.decide(step, phases).act)
        state = json.loads(json.dumps(table.state()))
        table = Policy(PolicyConfig(skips=3))
        table.restore(state)
    assert acts == ["skip", "skip", "ignore", "skip", "skip", "skip"]
    decision = table.decide(16, [alarm("not_finite", step=16, phase="lasting")])
    assert decision.act == "stop"
    assert "3 updates in a row" in decision.reason


def test_what_is_in_force_reads_back(tmp_path):
    around = Surroundings(layers=(1, 2), num_experts=8, top_k=2, ep=2, world_size=4, level="light")
    config = PolicyConfig(actions=ActsConfig(blow_up="clip"), limit=5.0)
    written = json.loads(json.dumps(in_force(DetectorsConfig(), config, around)))
    assert decode(Surroundings, written["around"]) == around
    assert decode(PolicyConfig, written["policy"]) == config
    assert decode(DetectorsConfig, written["detectors"]) == DetectorsConfig()


def _recipe(changes: dict) -> Recipe:
    recipe = make_recipe(Path("run"))
    plain = encode(
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_mtp_heads=1, max_positions=16384))
    )
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = plain["monitor"]
        for name in sections:
            section = section[name]
        section[last] = value
    return decode(Recipe, plain)


def test_thresholds_and_acts_stand_in_the_resolved_recipe():
    text = to_yaml(_recipe({}))
    assert "not_finite: skip" in text
    assert "clear_activation: 0.2" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"detectors.blow_up.clear_ratio": 6.0},
            "monitor.detectors.blow_up.clear_ratio=6.0 must be below monitor.detectors.blow_up.ratio=6.0; "
            "by default they are 4.0 and 6.0",
        ),
        ({"detectors.expert_death.activation": 0.3}, "monitor.detectors.expert_death.activation=0.3 must be below"),
        ({"detectors.data_stall.clear_share": 0.4}, "monitor.detectors.data_stall.clear_share=0.4 must be below"),
        (
            {"detectors.loss_spike.raise_after_steps": 0},
            "monitor.detectors.loss_spike.raise_after_steps=0 must be at least 1",
        ),
        ({"detectors.blow_up.ratios": 3.0}, "monitor.detectors.blow_up has no key 'ratios'; nearest: ratio"),
        (
            {"policy.actions.lossspike": "warn"},
            "section monitor.policy.actions has no key 'lossspike'; nearest: loss_spike",
        ),
        ({"policy.actions.loss_spike": "skp"}, "monitor.policy.actions.loss_spike=skp must be one of ignore, warn"),
        (
            {"policy.actions.loss_spike": "clip"},
            "monitor.policy.actions.loss_spike=clip makes no sense: activation limits apply to a layer whose experts "
            "blow up, which only blow_up detects; choose one of ignore, warn, skip, rewind, stop",
        ),
        (
            {"policy.actions.not_finite": "warn"},
            "an update that is not finite destroys the model; choose one of skip, rewind",
        ),
        ({"policy.actions.straggler": "rewind"}, "other data does not change what this detector finds"),
        ({"policy.rewinds": -1}, "monitor.policy.rewinds=-1 must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_meant_is_refused_with_the_way_out(changes, message):
    with pytest.raises(RecipeError) as caught:
        validate(_recipe(changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


SERVERS = {
    "no port": (["node1"], {}, "monitor.server.addresses.0=node1 must be HOST:PORT, such as"),
    "a scheme": (["a:1", "grpc://a:1"], {}, "monitor.server.addresses.1=grpc://a:1 must be HOST:PORT"),
    "port 0": (["a:0"], {}, "monitor.server.addresses.0=a:0 must be HOST:PORT"),
    "v6 without brackets": (["fe80::1:8890"], {}, "[fe80::1]:8890"),
    "token in clear": (
        ["127.0.0.1:1", "10.0.0.5:1"],
        {"token_file": "t"},
        "addresses.1=10.0.0.5:1 would receive the token",
    ),
    "token in clear to a name": (["node1:1"], {"token_file": "t"}, "set monitor.server.certificate too"),
    "run name": (["a:1"], {}, "run.name=my run is not accepted by metrics servers"),
}


@pytest.mark.parametrize(("addresses", "more", "message"), SERVERS.values(), ids=list(SERVERS))
def test_servers_that_cannot_be_reached_or_trusted_are_refused(addresses, more, message):
    recipe = _recipe({"server.addresses": addresses} | {f"server.{key}": value for key, value in more.items()})
    if "run.name" in message:
        validate(recipe)
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, name="my run"))
    with pytest.raises(RecipeError) as caught:
        validate(recipe)
    assert message in str(caught.value)
    validate(dataclasses.replace(recipe, monitor=MonitorConfig()))


@pytest.mark.parametrize(
    ("address", "more"),
    [
        ("127.0.0.1:8890", {"token_file": "t"}),
        ("[::1]:8890", {"token_file": "t"}),
        ("localhost:8890", {"token_file": "t"}),
        ("node-1.cluster:8890", {"token_file": "t", "certificate": "c"}),
        ("node-1.cluster:8890", {}),
    ],
)
def test_servers_with_tls_or_on_loopback_are_taken(address, more):
    validate(_recipe({"server.addresses": [address]} | {f"server.{key}": value for key, value in more.items()}))


def test_every_pair_of_thresholds_and_every_number_has_a_rule():
    detectors = DetectorsConfig()
    for field in dataclasses.fields(detectors):
        config = getattr(detectors, field.name)
        names = {item.name for item in dataclasses.fields(config)}
        assert names == set(MONITOR_RANGES[type(config)]), field.name
        ordered = {name for pair in ORDER.get(field.name, ()) for name in pair}
        assert {name for name in names if name.startswith("clear_")} - {"clear_steps", "clear_ratio"} <= ordered, (
            field.name
        )
