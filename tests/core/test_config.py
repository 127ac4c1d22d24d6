from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from llmsys.core.config import build, load_yaml, to_plain
from llmsys.core.errors import ConfigError, DataNotFoundError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    bandwidth_gbps: float
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth_gbps <= 0:
            raise ValueError(f"bandwidth_gbps must be above 0, found {self.bandwidth_gbps}")
        if self.latency_us < 0:
            raise InputError("negative latency", expected=">= 0", found=str(self.latency_us), fix="latency_us: 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    name: str
    num_stages: int
    link: Link
    ratio: float = 1.5
    enabled: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    limit_mb: float | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    links: tuple[Link, ...] = ()
    backup: Link | None = None
    weights: dict[str, float] = field(default_factory=dict)
    by_name: Mapping[str, Link] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    seed: int | str = 0
    either: float | int | None = None
    names: list[str] = field(default_factory=list)
    root: Path = Path(".")
    shape: Link | Other | tuple[int, ...] | None = None


BASE: dict[str, Any] = {"name": "x", "num_stages": 4, "link": {"bandwidth_gbps": 100}}


def make(**changes: object) -> Config:
    return build(Config, {**BASE, **changes})


def fails(**changes: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make(**changes)
    assert caught.value.expected and caught.value.found and caught.value.fix
    return caught.value


def test_defaults_and_nested_values() -> None:
    config = make(
        sizes=[1, 2],
        pair=["b", 3],
        links=[{"bandwidth_gbps": 1}, {"bandwidth_gbps": 2.5, "latency_us": 4}],
        backup={"bandwidth_gbps": 7},
        weights={"a": 1, "b": 0.5},
        by_name={"one": {"bandwidth_gbps": 1}},
        extra={"anything": [1, {"deep": None}]},
        names=["p", "q"],
        root="some/dir",
    )
    assert config.link == Link(bandwidth_gbps=100.0)
    assert type(config.link.bandwidth_gbps) is float
    assert config.sizes == (1, 2)
    assert config.pair == ("b", 3.0) and type(config.pair[1]) is float
    assert config.links == (Link(bandwidth_gbps=1.0), Link(bandwidth_gbps=2.5, latency_us=4.0))
    assert config.backup == Link(bandwidth_gbps=7.0)
    assert config.weights == {"a": 1.0, "b": 0.5}
    assert config.by_name == {"one": Link(bandwidth_gbps=1.0)}
    assert config.extra == {"anything": [1, {"deep": None}]}
    assert config.names == ["p", "q"]
    assert config.root == Path("some/dir")
    assert config.limit_mb is None and config.recompute == "none"


def test_unions() -> None:
    assert make(seed=3).seed == 3
    assert make(seed="auto").seed == "auto"
    assert type(make(either=3).either) is int
    assert type(make(either=3.0).either) is float
    assert make(limit_mb=5).limit_mb == 5.0
    assert make(shape={"colour": "red"}).shape == Other(colour="red")
    assert make(shape={"bandwidth_gbps": 1}).shape == Link(bandwidth_gbps=1.0)
    assert make(shape=[1, 2]).shape == (1, 2)
    assert "int or str" in fails(seed=1.5).expected
    assert "int or str" in fails(seed=True).expected
    assert "int or str" in fails(seed=None).expected
    assert "Link or Other" in fails(shape={"size": 3}).expected
    assert fails(shape=[1, "x"]).summary == "shape[1]: wrong type"


def test_an_instance_is_kept() -> None:
    link = Link(bandwidth_gbps=3.0)
    assert make(link=link).link is link
    assert make(backup=link).backup is link


@pytest.mark.parametrize(
    ("changes", "path", "expected", "found"),
    [
        ({"num_stages": "4"}, "num_stages", "int", "'4' (str)"),
        ({"num_stages": 4.0}, "num_stages", "int", "4.0 (float)"),
        ({"num_stages": True}, "num_stages", "int", "True (bool)"),
        ({"ratio": True}, "ratio", "float", "True (bool)"),
        ({"ratio": "1e-3"}, "ratio", "float", "'1e-3' (str)"),
        ({"enabled": 1}, "enabled", "bool", "1 (int)"),
        ({"name": 5}, "name", "str", "5 (int)"),
        ({"name": None}, "name", "str", "None (null)"),
        ({"sizes": 3}, "sizes", "a list (tuple[int, ...])", "3 (int)"),
        ({"sizes": "12"}, "sizes", "a list (tuple[int, ...])", "'12' (str)"),
        ({"sizes": [1, "2"]}, "sizes[1]", "int", "'2' (str)"),
        ({"link": 3}, "link", "a mapping with the keys of Link", "3 (int)"),
        ({"link": None}, "link", "a mapping with the keys of Link", "None (null)"),
        ({"links": [{"bandwidth_gbps": "fast"}]}, "links[0].bandwidth_gbps", "float", "'fast' (str)"),
        ({"weights": {"a": "x"}}, "weights.a", "float", "'x' (str)"),
        ({"weights": {1: 2.0}}, "weights", "keys that are text", "1 (int)"),
        ({"weights": [1]}, "weights", "a mapping (dict[str, float])", "[1] (list)"),
        ({"backup": 4}, "backup", "Link or null", "4 (int)"),
        ({"limit_mb": "big"}, "limit_mb", "float", "'big' (str)"),
        ({"root": 4}, "root", "a path as text", "4 (int)"),
    ],
)
def test_wrong_types_name_path_expected_and_found(
    changes: dict[str, object], path: str, expected: str, found: str
) -> None:
    error = fails(**changes)
    assert error.summary == f"{path}: wrong type"
    assert (error.expected, error.found) == (expected, found)


def test_number_written_as_yaml_text_gets_a_hint() -> None:
    assert yaml.safe_load("x: 1e-3") == {"x": "1e-3"}, "the reason for the hint"
    assert "1.0e-3" in fails(ratio="1e-3").fix


def test_unknown_key_names_the_nearest() -> None:
    error = fails(num_stage=4)
    assert error.summary == "num_stage: unknown key"
    assert error.fix == "did you mean 'num_stages'?"
    nested = fails(link={"bandwith_gbps": 1})
    assert nested.summary == "link.bandwith_gbps: unknown key"
    assert nested.fix == "did you mean 'link.bandwidth_gbps'?"
    assert "bandwidth_gbps, latency_us" in nested.expected
    assert fails(links=[{"bandwidth_gbps": 1, "zzz": 1}]).summary == "links[0].zzz: unknown key"
    assert fails(zzzzzz=1).fix == "remove 'zzzzzz'"


def test_missing_keys() -> None:
    with pytest.raises(ConfigError, match=r"^num_stages, link: missing required keys") as caught:
        build(Config, {"name": "x"})
    assert caught.value.fix == "set num_stages, link"
    with pytest.raises(ConfigError, match=r"^run\.cfg\.link\.bandwidth_gbps: missing required key\n"):
        build(Config, {**BASE, "link": {}}, path="run.cfg")


def test_literals_and_fixed_tuples() -> None:
    error = fails(recompute="selectiv")
    assert error.expected == "one of 'none', 'selective', 'full'"
    assert error.fix == "did you mean 'selective'?"
    assert fails(pair=["a"]).found == "1 entries: ['a']"


def test_errors_of_the_dataclass_itself_get_the_path() -> None:
    error = fails(links=[{"bandwidth_gbps": 1}, {"bandwidth_gbps": 0}])
    assert error.summary == "links[1]: bandwidth_gbps must be above 0, found 0.0"
    assert "{'bandwidth_gbps': 0}" in error.found and error.fix == "change a key of links[1]"
    structured = fails(link={"bandwidth_gbps": 1, "latency_us": -2})
    assert (structured.summary, structured.found) == ("link: negative latency", "-2.0")
    with pytest.raises(ConfigError, match=r"^bandwidth_gbps must be above 0"):
        build(Link, {"bandwidth_gbps": -1})


def test_round_trip_through_yaml() -> None:
    config = make(
        sizes=[1, 2],
        links=[{"bandwidth_gbps": 1}],
        weights={"a": 1},
        by_name={"one": {"bandwidth_gbps": 1}},
        extra={"k": [1, None]},
        root="some/dir",
        limit_mb=1e-3,
        shape=[3],
    )
    plain = to_plain(config)
    assert plain["sizes"] == [1, 2] and plain["root"] == "some/dir"
    assert build(Config, plain) == config
    assert build(Config, yaml.safe_load(yaml.safe_dump(plain))) == config


def test_to_plain_refuses_what_yaml_cannot_write() -> None:
    with pytest.raises(ConfigError, match="plain setting"):
        to_plain({"a": {1, 2}})
    with pytest.raises(ConfigError, match="mapping key"):
        to_plain({1: 2})


def test_load_yaml(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: x\nlink: &l {bandwidth_gbps: 1}\nbackup: {<<: *l, latency_us: 2}\n", encoding="utf-8")
    assert load_yaml(file)["backup"] == {"bandwidth_gbps": 1, "latency_us": 2}
    file.write_text("", encoding="utf-8")
    assert load_yaml(file) == {}
    file.write_text("a: 1\nb: {c: 1, c: 2}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'c' is given twice in one mapping\n.*\n  found: lines 2 and 2"):
        load_yaml(file)
    file.write_text("a: [1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(file)
    file.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no mapping at its top level"):
        load_yaml(file)
    with pytest.raises(DataNotFoundError):
        load_yaml(tmp_path / "none.yaml")
