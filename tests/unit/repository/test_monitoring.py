"""Alert rules, dashboard and page name metrics and labels that there are, in expressions that can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchord.coordinator.metrics.collector import ROLES, STATES
from torchord.coordinator.metrics.families import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "monitoring"
KNOWN = {family.name: family for family in FAMILIES}
PAGE = (ROOT / "docs" / "metrics.md").read_text()
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
WORDS = {
    *("sum", "max", "by", "on", "and", "or", "unless", "absent", "abs", "increase", "rate", "delta", "Inf"),
    *("max_over_time", "run", "tier"),
}
VALUES = {"state": {*STATES, "waiting", "dead"}, "role": set(ROLES), "part": {"whole", "compute", "other"}}
_TOKEN = re.compile(
    r"\s+|(?P<metric>torchord_\w+)(?:\{(?P<labels>[^{}]*)\})?(?:\[\d+[smhd]\])?|(?P<word>[A-Za-z_]\w*)"
    r"|\d+(?:\.\d+)?|==|!=|<=|>=|[-+*/<>(),]"
)


def faults(expression: str) -> list[str]:
    """What is wrong with an expression: a token, a metric, a label or value that there is not, a bracket."""
    found, place, open_ = [], 0, 0
    while place < len(expression):
        token = _TOKEN.match(expression, place)
        if token is None:
            return [*found, f"cannot be read from {expression[place:]!r} on"]
        place = token.end()
        open_ += {"(": 1, ")": -1}.get(token[0], 0)
        if token["word"] and token["word"] not in WORDS:
            found.append(f"no word {token['word']}")
        if token["metric"] and token["metric"] not in KNOWN:
            found.append(f"no metric {token['metric']}")
        elif token["labels"]:
            for pair in token["labels"].split(","):
                label = re.fullmatch(r'(\w+)(?:=|!=|=~|!~)"([^"]*)"', pair)
                if label is None or label[1] not in KNOWN[token["metric"]].labels:
                    found.append(f"no label {pair} of {token['metric']}")
                elif label[1] in VALUES and not set(label[2].split("|")) <= VALUES[label[1]]:
                    found.append(f"no value of {pair}")
        if open_ < 0:
            return [*found, "a bracket is closed that is not open"]
    return [*found, *(["a bracket stays open"] if open_ else [])]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_can_be_raised_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert faults(rule["expr"]) == []
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "todo"}
    labels = set().union(*(KNOWN[name].labels for name in re.findall(r"torchord_\w+", rule["expr"])))
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_panel_shows_what_there_is(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        assert faults(target["expr"].replace('run=~"$run"', 'run=~".*"')) == []
        names = re.findall(r"torchord_\w+", target["expr"])
        labels = set().union(*(KNOWN[name].labels for name in names))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_lie_beside_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("torchord_nothing > 0", "no metric torchord_nothing"),
        ('torchord_workers{rule="client"} > 0', 'no label rule="client" of torchord_workers'),
        ('torchord_workers{role="clients"} > 0', 'no value of role="clients"'),
        ("sum(torchord_workers", "a bracket stays open"),
        ("som(torchord_workers)", "no word som"),
        ("torchord_workers > > $x", "cannot be read from '$x' on"),
    ],
)
def test_what_is_wrong_is_noticed(expression: str, fault: str) -> None:
    assert faults(expression) == [fault]


def test_the_page_has_every_metric_and_every_alert() -> None:
    table = re.findall(r"^\| `(torchord_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", PAGE, re.M)
    assert [(name, kind, labels, text) for name, kind, labels, text in table] == [
        (family.name, family.kind, ", ".join(f"`{label}`" for label in family.labels), family.text)
        for family in FAMILIES
    ]
    alerts = re.findall(r"^\| `(Torchord\w+)` \| (\w+) \|", PAGE, re.M)
    assert alerts == [(rule["alert"], rule["labels"]["severity"]) for rule in RULES]


def test_prometheus_and_grafana_find_their_files() -> None:
    overlay = yaml.safe_load((ROOT / "deploy" / "monitoring.yml").read_text())["services"]
    mounted = {volume.split(":")[1] for volume in overlay["prometheus"]["volumes"]}
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert set(settings["rule_files"]) <= mounted
    (target,) = settings["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "flower:5555"
    (source,) = yaml.safe_load((FOLDER / "grafana-sources.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((FOLDER / "grafana-dashboards.yml").read_text())["providers"]
    boards = [
        v.split(":")[1] for v in overlay["grafana"]["volumes"] if v.split(":")[0].endswith("dashboard.json")
    ]
    assert [Path(board).parent for board in boards] == [Path(provider["options"]["path"])]
