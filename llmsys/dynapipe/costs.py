"""Cost model: what a micro-batch takes on each pipeline stage, in time, memory and transfers.

One ``CostModel`` stands for one way of spreading one model over one cluster. Planner, baselines and simulator all ask
it; it is the only thing about costs that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmsys import _C
from llmsys.core.costs import GridTable, alpha_beta_ms, ring_all_reduce_ms
from llmsys.core.errors import ConfigError, InputError
from llmsys.core.specs import ClusterSpec, LinkSpec, ModelSpec
from llmsys.dynapipe.config import Parallelism, Recompute, StageLayers, first_decoder_stage, stage_layers
from llmsys.dynapipe.profile import LayerProfile, LayerTables, PackSums, VarlenLayer, varlen_terms

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BYTES_PER_VALUE = 2  # activations, gradients and parameters travel and rest in 16 bits
# Adam in mixed precision, in units of the 16-bit parameters: parameters 1, gradients 1, and the fp32 copy and two
# moments 2 each. ZeRO 1, 2, 3 divide the last three, then the gradients, then the parameters over the replicas.
_OPTIMIZER_UNITS = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchCosts:
    """Costs of M micro-batches on V stages; every array has shape (M, V).

    ``stored_mb`` stays from the end of the forward to the end of the backward pass. ``forward_peak_mb`` is needed
    while the forward pass runs and includes ``stored_mb``. ``backward_extra_mb`` is needed while the backward pass
    runs, on top of everything stored. ``send_forward_ms`` is the transfer from stage v to v + 1,
    ``send_backward_ms`` from v to v - 1 (0 where there is none, or no other device).
    """

    forward_ms: FloatArray
    backward_ms: FloatArray
    stored_mb: FloatArray
    forward_peak_mb: FloatArray
    backward_extra_mb: FloatArray
    send_forward_ms: FloatArray
    send_backward_ms: FloatArray

    def columns(self) -> list[FloatArray]:
        """The arrays in the order of the native solvers."""
        return [
            self.forward_ms,
            self.backward_ms,
            self.stored_mb,
            self.forward_peak_mb,
            self.backward_extra_mb,
            self.send_forward_ms,
            self.send_backward_ms,
        ]

    def select(self, indices: Sequence[int] | IntArray) -> MicroBatchCosts:
        """The costs of some micro-batches, in the order of ``indices``."""
        chosen = [np.ascontiguousarray(column[indices]) for column in self.columns()]
        return MicroBatchCosts(
            forward_ms=chosen[0],
            backward_ms=chosen[1],
            stored_mb=chosen[2],
            forward_peak_mb=chosen[3],
            backward_extra_mb=chosen[4],
            send_forward_ms=chosen[5],
            send_backward_ms=chosen[6],
        )

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Shape (M,): whether the profile covers the micro-batch on every stage."""
        columns = (self.forward_ms, self.backward_ms, self.stored_mb, self.forward_peak_mb)
        covered: NDArray[np.bool_] = np.logical_and.reduce([np.isfinite(column).all(axis=1) for column in columns])
        return covered


@dataclass(frozen=True, kw_only=True, eq=False)
class CostModel:
    """Costs of ``model`` on ``cluster`` under ``parallelism``, from a layer profile.

    ``count_backward_extra``: whether memory that a backward pass needs beyond the stored activations counts (layers
    are recomputed there, and one layer's workspace is live). The public planner leaves it out; comparisons with it
    set False.
    ``attention_speedup``: of variable-length attention over the profiled kernels; only ``varlen_costs`` reads it.
    ``padded_profile``: prices padded micro-batches instead of ``profile`` (``fused_profile`` makes one).
    Raises ConfigError when the profile is of another architecture, the cluster is too small, or a stage would be
    empty; InfeasibleError when the profile lacks a tensor-parallel degree.
    """

    profile: LayerProfile
    model: ModelSpec
    cluster: ClusterSpec
    parallelism: Parallelism
    count_backward_extra: bool = True
    attention_speedup: float = 1.0
    padded_profile: LayerProfile | None = None
    _native: dict[Recompute, tuple[_C.CostTable | None, _C.CostTable, _C.CostTable]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.profile.architecture != self.model.architecture:
            raise ConfigError(
                "the layer profile is of another kind of model",
                expected=f"a {self.model.architecture} profile for {self.model.name}",
                found=f"{self.profile.name}: {self.profile.architecture}",
                fix="choose the profile that belongs to the model",
            )
        if self.parallelism.num_devices > self.cluster.num_devices:
            raise ConfigError(
                "the cluster has too few devices",
                expected=f"{self.parallelism.num_devices} for {self.parallelism.label()}",
                found=f"{self.cluster.num_devices} in {self.cluster.name}",
                fix="lower data, pipeline or tensor, or raise num_nodes",
            )
        shape = self.model.layer_shape
        if self.profile.layer_shape not in (None, shape):
            raise ConfigError(
                "the layer profile is of other layers than the model's",
                expected=f"hidden, num_heads, kv_channels, ffn_hidden = {self.profile.layer_shape}",
                found=f"{shape} in {self.model.name}",
                fix="choose the profile that belongs to the model",
            )
        _ = self.any_tables, self.stages

    def __getstate__(self) -> dict[str, object]:
        # What the native solvers hold cannot be pickled and is made again when it is asked for.
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "_native": {}}

    @cached_property
    def any_tables(self) -> LayerTables:
        """The tables of one recompute kind; all kinds cover the same lengths."""
        kinds = [kind for tensor, kind in self.profile.tables if tensor == self.parallelism.tensor]
        return self.layer_tables(kinds[0] if kinds else "none")

    @cached_property
    def stages(self) -> tuple[StageLayers, ...]:
        """The layers of each stage, V entries."""
        return stage_layers(self.model, self.parallelism)

    @property
    def encoder_decoder(self) -> bool:
        return self.model.architecture == "encoder_decoder"

    def layer_tables(self, recompute: Recompute) -> LayerTables:
        return (self.padded_profile or self.profile).layer_tables(self.parallelism.tensor, recompute)

    def native_tables(self, recompute: Recompute) -> tuple[_C.CostTable | None, _C.CostTable, _C.CostTable]:
        """(encoder, decoder, head) for the native solvers, made once."""
        if recompute not in self._native:
            tables = self.layer_tables(recompute)
            encoder = _native_table(tables.encoder) if tables.encoder is not None else None
            self._native[recompute] = (encoder, _native_table(tables.decoder), _native_table(tables.head))
        return self._native[recompute]

    @cached_property
    def max_lengths(self) -> tuple[int, int]:
        """The longest (encoder, decoder) lengths of the profile, in tokens."""
        axes = self.any_tables.decoder.axes
        return (int(axes[0][-1]), int(axes[1][-1])) if self.encoder_decoder else (0, int(axes[0][-1]))

    def device_stages(self, device: int) -> list[int]:
        return list(range(device, self.parallelism.num_stages, self.parallelism.pipeline))

    def state_mb(self, recompute: Recompute) -> FloatArray:
        """Parameters, gradients and optimizer state, shape (pipeline devices,).

        The embedding rests on the devices that read or write it: the first stage, the first stage with decoder
        layers, and the head's.
        """
        units = 2.0 + _OPTIMIZER_UNITS
        data = self.parallelism.data
        zero = self.parallelism.zero_stage
        if zero >= 1:
            units = 2.0 + _OPTIMIZER_UNITS / data
        if zero >= 2:
            units -= 1.0 - 1.0 / data
        if zero >= 3:
            units -= 1.0 - 1.0 / data
        return units * self.params_mb(recompute)

    def params_mb(self, recompute: Recompute) -> FloatArray:
        """16-bit parameters of each pipeline device, shape (pipeline devices,)."""
        sizes = self.profile.params_mb
        tensor = self.parallelism.tensor
        encoder = sizes[tensor, recompute, "encoder"] if self.encoder_decoder else 0.0
        decoder = sizes[tensor, recompute, "decoder"]
        embedding = sizes[tensor, recompute, "embedding"]
        with_embedding = {0, first_decoder_stage(self.stages), len(self.stages) - 1}
        result = np.zeros(self.parallelism.pipeline)
        for device in range(self.parallelism.pipeline):
            stages = self.device_stages(device)
            layers = sum(self.stages[v].num_encoder * encoder + self.stages[v].num_decoder * decoder for v in stages)
            result[device] = layers + (embedding if with_embedding & set(stages) else 0.0)
        return result

    def grad_sync_ms(self, recompute: Recompute) -> float:
        """Ring all-reduce of the 16-bit gradients over the replicas, not overlapped: the slowest device's, in ms."""
        data = self.parallelism.data
        if data == 1:
            return 0.0
        ranks = [self._rank(replica, 0) for replica in range(data)]
        links = [self.cluster.link_between(ranks[i], ranks[(i + 1) % data]) for i in range(data)]
        slowest = min((link for link in links if link is not None), key=lambda link: link.bandwidth_gbps)
        return ring_all_reduce_ms(float(self.params_mb(recompute).max()), data, slowest)

    def _rank(self, replica: int, device: int) -> int:
        # Tensor-parallel ranks are neighbours, then replicas, then pipeline devices: the heaviest traffic stays
        # inside a node.
        return (device * self.parallelism.data + replica) * self.parallelism.tensor

    def link(self, stage: int) -> LinkSpec | None:
        """The link from ``stage`` to ``stage + 1`` that the slowest replica has; None on one device."""
        a, b = stage % self.parallelism.pipeline, (stage + 1) % self.parallelism.pipeline
        links = [
            self.cluster.link_between(self._rank(replica, a), self._rank(replica, b))
            for replica in range(self.parallelism.data)
        ]
        real = [link for link in links if link is not None]
        return min(real, key=lambda link: link.bandwidth_gbps) if real else None

    def device_loads(self, recompute: Recompute, limits_mb: Sequence[float], in_flight: int) -> FloatArray:
        """What the partition solver needs to know of each kind of device.

        Rows (encoder layers, decoder layers, head, in_flight, MB beside the model state), equal kinds merged to the
        least memory. ``in_flight`` equal micro-batches must fit a device at once.
        """
        state = self.state_mb(recompute)
        kinds: dict[tuple[int, int, bool], float] = {}
        for device in range(self.parallelism.pipeline):
            stages = [self.stages[v] for v in self.device_stages(device)]
            kind = (
                sum(stage.num_encoder for stage in stages),
                sum(stage.num_decoder for stage in stages),
                any(stage.head for stage in stages),
            )
            available = limits_mb[device] - state[device]
            kinds[kind] = min(kinds.get(kind, np.inf), available)
        rows = [[*kind, in_flight, available] for kind, available in kinds.items()]
        return np.array(rows, dtype=np.float64)

    def micro_batch_costs(self, shapes: IntArray, recompute: Recompute) -> MicroBatchCosts:
        """Costs of micro-batches of the given ``shapes``: rows (samples, encoder length, decoder length).

        Padded lengths in tokens; the encoder length of a decoder-only model is ignored. Uncovered micro-batches are
        infinite.
        """
        shapes = np.asarray(shapes, dtype=np.int64)
        if shapes.ndim != 2 or shapes.shape[1] != 3 or (shapes[:, 0] < 1).any():
            raise InputError(
                "micro-batch shapes have the wrong form",
                expected="rows (samples >= 1, encoder length, decoder length)",
                found=f"an array of shape {shapes.shape}",
                fix="pass one row of three numbers for each micro-batch",
            )
        distinct, index = np.unique(shapes, axis=0, return_inverse=True)
        return self._costs_of(distinct, recompute).select(index.reshape(-1))

    def _costs_of(self, shapes: IntArray, recompute: Recompute) -> MicroBatchCosts:
        tables = self.layer_tables(recompute)
        count, encoder_len, decoder_len = shapes.T.astype(np.float64)
        if tables.encoder is not None:
            encoder = _query(tables.encoder, np.stack([encoder_len, count], axis=1))
            decoder = _query(tables.decoder, np.stack([encoder_len, decoder_len, count], axis=1))
        else:
            encoder = {}
            decoder = _query(tables.decoder, np.stack([decoder_len, count], axis=1))
        head = _query(tables.head, np.stack([decoder_len, count], axis=1))
        return self._stage_costs(encoder, decoder, head, count * encoder_len, count * decoder_len)

    def varlen_costs(
        self, encoder_len: Sequence[IntArray], decoder_len: Sequence[IntArray], recompute: Recompute
    ) -> MicroBatchCosts:
        """Costs of micro-batches of concatenated samples under variable-length attention.

        ``encoder_len[m]`` and ``decoder_len[m]``: lengths in tokens of the samples of micro-batch m, without padding.
        Derived from the profile, see ``llmsys.dynapipe.profile.varlen``.
        """
        return self.varlen_costs_of_sums(PackSums.of(encoder_len), PackSums.of(decoder_len, encoder_len), recompute)

    def varlen_costs_of_sums(self, encoder: PackSums, decoder: PackSums, recompute: Recompute) -> MicroBatchCosts:
        """The same from the sums of the samples' lengths; the decoder's cross lengths are the encoder's."""
        terms = varlen_terms(self.profile, self.parallelism.tensor, recompute, attention_speedup=self.attention_speedup)
        encoder_layer = _varlen_layer(terms.encoder, encoder) if terms.encoder is not None else {}
        forward, backward = terms.head.time_of_sums_ms(decoder)
        head = {"fw_ms": forward, "bw_ms": backward}
        return self._stage_costs(
            encoder_layer, _varlen_layer(terms.decoder, decoder), head, encoder.tokens, decoder.tokens
        )

    def _stage_costs(
        self,
        encoder: dict[str, FloatArray],
        decoder: dict[str, FloatArray],
        head: dict[str, FloatArray],
        encoder_tokens: FloatArray,
        decoder_tokens: FloatArray,
    ) -> MicroBatchCosts:
        """Stages from layers: ``encoder`` and ``decoder`` hold one layer's columns, (M,); tokens include padding."""
        num_stages = self.parallelism.num_stages
        shape = (len(decoder_tokens), num_stages)
        costs = {name: np.zeros(shape) for name in MicroBatchCosts.__dataclass_fields__}
        for v, stage in enumerate(self.stages):
            forward, backward = costs["forward_ms"][:, v], costs["backward_ms"][:, v]
            stored, peak = costs["stored_mb"][:, v], costs["forward_peak_mb"][:, v]
            if stage.head:
                forward += head["fw_ms"]
                backward += head["bw_ms"]
            for number, layer in ((stage.num_encoder, encoder), (stage.num_decoder, decoder)):
                if number == 0:
                    continue
                forward += number * layer["fw_ms"]
                backward += number * layer["bw_ms"]
                # The last of equal layers peaks highest: it runs on top of all the others' stored activations.
                below = stored + _times(number - 1, layer["stored_mb"])
                np.maximum(peak, below + layer["peak_mb"], out=peak)
                stored += number * layer["stored_mb"]
        if self.count_backward_extra:
            # Going back, a layer runs when all later layers are freed: the forward pass's peaks come again.
            peak, stored = costs["forward_peak_mb"], costs["stored_mb"]
            covered = np.isfinite(peak) & np.isfinite(stored)
            np.subtract(peak, stored, out=costs["backward_extra_mb"], where=covered)
            np.maximum(costs["backward_extra_mb"], 0.0, out=costs["backward_extra_mb"])
        for v in range(num_stages - 1):
            link = self.link(v)
            if link is None:
                continue
            tokens = self.boundary_tokens(v, encoder_tokens, decoder_tokens)
            size_mb = tokens * self.model.hidden * BYTES_PER_VALUE / 1e6
            time_ms = alpha_beta_ms(size_mb, link)
            costs["send_forward_ms"][:, v] = time_ms
            costs["send_backward_ms"][:, v + 1] = time_ms
        return MicroBatchCosts(**costs)

    def boundary_tokens(self, stage: int, encoder_tokens: FloatArray, decoder_tokens: FloatArray) -> FloatArray:
        """Tokens sent from ``stage`` to the next: the encoder's output and, once there is one, the decoder's."""
        if not self.encoder_decoder:
            return decoder_tokens
        has_decoder = any(self.stages[v].num_decoder > 0 for v in range(stage + 1))
        return encoder_tokens + decoder_tokens if has_decoder else encoder_tokens


def _times(number: int, values: FloatArray) -> FloatArray:
    # 0 * infinity is not a number.
    return number * values if number > 0 else np.zeros_like(values)


def _query(table: GridTable, points: FloatArray) -> dict[str, FloatArray]:
    # Extrapolation below a table's smallest length can pass 0, which no cost does.
    return {name: np.maximum(values, 0.0) for name, values in table.query(points).items()}


def _varlen_layer(layer: VarlenLayer, sums: PackSums) -> dict[str, FloatArray]:
    forward, backward = layer.time_of_sums_ms(sums)
    cross_tokens = sums.cross_tokens if layer.kind == "cross_layer" else None
    return {
        "fw_ms": forward,
        "bw_ms": backward,
        "stored_mb": layer.stored_mb(sums.tokens, cross_tokens),
        "peak_mb": layer.peak_mb(sums.tokens, cross_tokens),
    }


def _native_table(table: GridTable) -> _C.CostTable:
    size = int(np.prod(table.shape))
    empty = np.zeros(size)
    columns = [
        table.columns[name].reshape(-1) if name in table.columns else empty
        for name in ("fw_ms", "bw_ms", "stored_mb", "peak_mb")
    ]
    return _C.CostTable(list(table.axes), columns)
