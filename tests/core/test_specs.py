from __future__ import annotations

import dataclasses
import math

import pytest

from llmsys.core.config import build, to_plain
from llmsys.core.errors import ConfigError, InputError
from llmsys.core.specs import DEVICES, NODES, ClusterSpec, DeviceSpec, LinkSpec, ModelSpec

GPT = ModelSpec(
    name="gpt_6.7b",
    architecture="decoder_only",
    hidden=4096,
    num_heads=32,
    kv_channels=128,
    ffn_hidden=16384,
    num_encoder_layers=0,
    num_decoder_layers=32,
    vocab_size=50257,
)
T5 = ModelSpec(
    name="t5_11b",
    architecture="encoder_decoder",
    hidden=1024,
    num_heads=128,
    kv_channels=128,
    ffn_hidden=65536,
    num_encoder_layers=24,
    num_decoder_layers=24,
    vocab_size=32128,
)


def test_links_follow_nodes() -> None:
    cluster = NODES["p4d"].cluster(2)
    assert cluster.num_devices == 16
    assert cluster.link_between(3, 3) is None
    assert cluster.link_between(0, 7) is cluster.intra_link
    assert cluster.link_between(7, 8) is cluster.inter_link
    assert cluster.link_between(15, 8) is cluster.intra_link
    for pair in ((0, 16), (-1, 0)):
        with pytest.raises(InputError, match="no rank"):
            cluster.link_between(*pair)


def test_known_nodes() -> None:
    p4d = NODES["p4d"]
    assert p4d.device is DEVICES["A100-40GB"]
    assert (p4d.intra_link.bandwidth_gbps, p4d.inter_link.bandwidth_gbps) == (4800.0, 400.0)
    assert {node.device.name for node in NODES.values()} == set(DEVICES)
    assert all(node.devices_per_node == 8 for node in NODES.values())


def test_parameter_estimates_match_the_model_names() -> None:
    # Layer by layer: 4 h a + 2 h f, and 8 h a + 2 h f in a decoder with cross-attention.
    gpt_layer = 4 * 4096 * 4096 + 2 * 4096 * 16384
    assert GPT.num_parameters() == 32 * gpt_layer + 50257 * 4096
    assert GPT.num_parameters() == pytest.approx(6.7e9, rel=0.01)
    encoder = 4 * 1024 * 16384 + 2 * 1024 * 65536
    assert T5.num_parameters() == 24 * encoder + 24 * (encoder + 4 * 1024 * 16384) + 32128 * 1024
    assert T5.num_parameters() == pytest.approx(11.3e9, rel=0.01)


@pytest.mark.parametrize(
    ("spec", "changes", "field"),
    [
        (GPT, {"num_encoder_layers": 1}, "num_encoder_layers"),
        (GPT, {"num_decoder_layers": 0}, "num_decoder_layers"),
        (GPT, {"architecture": "encoder_only"}, "architecture"),
        (GPT, {"hidden": -1}, "hidden"),
        (T5, {"num_encoder_layers": 0}, "num_encoder_layers"),
        (DEVICES["H100-SXM"], {"memory_mb": 0.0}, "memory_mb"),
        (DEVICES["H100-SXM"], {"peak_16bit_tflops": math.inf}, "peak_16bit_tflops"),
        (NODES["p4d"].intra_link, {"bandwidth_gbps": math.nan}, "bandwidth_gbps"),
        (NODES["p4d"].intra_link, {"latency_us": -1.0}, "latency_us"),
        (NODES["p4d"].cluster(1), {"num_nodes": 0}, "num_nodes"),
        (NODES["p4d"].cluster(1), {"devices_per_node": 0}, "devices_per_node"),
    ],
)
def test_values_out_of_range_are_named(
    spec: ModelSpec | DeviceSpec | LinkSpec | ClusterSpec, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError, match=f"{field} is out of range") as caught:
        dataclasses.replace(spec, **changes)  # type: ignore[arg-type]
    assert caught.value.fix == f"set {field}"


def test_specs_round_trip_through_plain_config() -> None:
    cluster = NODES["h100"].cluster(4)
    assert build(ClusterSpec, to_plain(cluster)) == cluster
    assert build(ModelSpec, to_plain(T5)) == T5
