"""What tables gain and cost where a device, such as a GPU, holds all layers: rows are on the host, and go over a bus."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGMLQuantizationType

from gguf_firstlayer import file_format
from gguf_firstlayer.cost import CostModel, SiteTypes
from gguf_firstlayer.demand import N_TOKENS
from gguf_firstlayer.errors import UsageError

# seconds that a lookup on the host takes a decoded token besides its bytes, for its operation, its copy and its kernel there:
# 13 to 21 microseconds with a GPU of type H200
LOOKUP = 18e-6

# seconds that a layer takes a decoded token besides its bytes, to start its kernels: 60 to 80 microseconds there
LAYER = 60e-6

# bytes that a thread of the host gathers in a second, and that all threads do
GATHER, GATHER_PARALLEL = 10e9, 15e9

# bytes from which on they do (llama-firstlayer-gather.cpp)
PARALLEL = 4 << 20

# share of the peak that llama.cpp's products of quantized matrices reach in a prompt: 12 to 14 % with a GPU of type H200
EFFICIENCY = 0.13

# types of rows that travel as they are stored (llama_firstlayer_gather); others travel as F32
_T = GGMLQuantizationType
AS_STORED = (_T.F32, _T.F16, _T.BF16, _T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.Q8_0)


@dataclass(frozen=True)
class Device:
    """A device by its published peaks.

    Attributes:
        name: of the profile, or "given"
        memory: bytes per second of its memory
        bus: bytes per second between it and the host
        compute: floating-point operations per second of its products of matrices, in F16 with F32 sums
    """

    name: str
    memory: float
    bus: float
    compute: float


PROFILES = {
    device.name: device
    for device in (
        Device("rtx-3060", 360e9, 25e9, 51e12),
        Device("rtx-4090", 1008e9, 25e9, 165e12),
        Device("h100", 3350e9, 50e9, 990e12),
        Device("m3-max", 400e9, 400e9, 28e12),
    )
}


@dataclass(frozen=True)
class DevicePlan:
    """What tables change on a device that holds all layers. Per decoded token, in bytes, unless stated otherwise.

    Attributes:
        device: name of the profile, or "given"
        bus_without, bus_with: that go to the device: rows of embeddings in F32; rows as stored
        memory_without, memory_with: read of the device's memory
        freed: of the device's memory
        decode: ratio of the speeds, at the peak speed of the device's memory
        prefill: the same for a prompt of 512 tokens, at 13 % of its peak in products
    """

    device: str
    bus_without: float
    bus_with: float
    memory_without: float
    memory_with: float
    freed: int
    decode: float
    prefill: float


def parse_device(text: str) -> Device:
    """A device by the name of its profile, or by its peaks: `memory=GB/s,bus=GB/s,compute=TFLOP/s`.

    Raises:
        UsageError: it is neither.
    """
    if text in PROFILES:
        return PROFILES[text]
    try:
        given = {key: float(value) for key, value in (item.split("=") for item in text.split(","))}
        if set(given) != {"memory", "bus", "compute"} or not all(0 < value < 1e9 for value in given.values()):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"'{text}' is not a device; give one of {', '.join(PROFILES)}, or memory=GB/s,bus=GB/s,compute=TFLOP/s"
        ) from None
    return Device("given", given["memory"] * 1e9, given["bus"] * 1e9, given["compute"] * 1e12)


@dataclass(frozen=True)
class _Rows:
    """Rows that are looked up on the host for each token.

    Attributes:
        gathered: bytes that the host writes
        threaded: whether all threads do where there are many
    """

    gathered: float
    threaded: bool

    def seconds(self, device: Device, n_tokens: int) -> float:
        """Until the rows of some tokens are on the device."""
        n_bytes = self.gathered * n_tokens
        rate = GATHER_PARALLEL if self.threaded and n_bytes >= PARALLEL else GATHER
        return LOOKUP + n_bytes / rate + n_bytes / device.bus


def device_plan(model: CostModel, site_types: SiteTypes, device: Device, keep_weights: bool = False) -> DevicePlan:
    """The plan for the sites that have a type in `site_types`; weights that are kept stay on the device."""
    sites = [site for site in model.sites if site in site_types]
    tables, _ = file_format.layout(sites, site_types, model.n_vocab)
    gone = model.replaced(sites)
    lookups = [use for use in model.uses if use.is_lookup]
    values = {use: model.weights[use.weight].values / use.n_slices * use.n_used for use in lookups}

    def rows(kind: GGMLQuantizationType, as_stored: float, n_values: float) -> _Rows:
        return _Rows(as_stored if kind in AS_STORED else 4 * n_values, True)

    stock = [_Rows(4 * values[use], False) for use in lookups]
    ours = [rows(model.weights[use.weight].type, model.bytes_read(use), values[use]) for use in lookups if use not in gone] + [
        rows(table.type, table.row_bytes, table.width) for table in tables
    ]

    n_layers = len({name.split(".")[1] for name in model.weights if name.startswith("blk.")})

    def seconds(host: list[_Rows], n_tokens: int, without: bool) -> float:
        uses = [use for use in model.uses if not use.is_lookup and not (without and use in gone)]
        by_memory = sum(model.bytes_read(use, n_tokens) for use in uses) / device.memory
        products = sum(model.products(use, n_tokens) for use in uses)
        by_products = 2 * products / (EFFICIENCY * device.compute) if n_tokens > 1 else 0.0
        return max(by_memory + LAYER * n_layers, by_products) + sum(lookup.seconds(device, n_tokens) for lookup in host)

    def ratio(n_tokens: int) -> float:
        return seconds(stock, n_tokens, False) / seconds(ours, n_tokens, True)

    unread = [] if keep_weights else model.unread(sites)
    read = sum(model.bytes_read(use) for use in model.uses if not use.is_lookup)
    return DevicePlan(
        device.name,
        sum(lookup.gathered for lookup in stock),
        sum(lookup.gathered for lookup in ours),
        read,
        read - sum(model.bytes_read(use) for use in gone if not use.is_lookup),
        sum(model.weights[name].bytes for name in unread if name not in {use.weight for use in lookups}),
        ratio(1) if sites else 1.0,
        ratio(N_TOKENS) if sites else 1.0,
    )
