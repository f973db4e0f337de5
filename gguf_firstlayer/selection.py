"""Which sites become tables: all, or those that save most within a budget for the growth of the file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from gguf_firstlayer import file_format
from gguf_firstlayer.cost import CostModel, SiteTypes
from gguf_firstlayer.errors import FirstLayerError, UsageError, option
from gguf_firstlayer.estimate import SitePlan, price
from gguf_firstlayer.runtime import Site
from gguf_firstlayer.text import count, size_text

# groups of sites whose combinations are all tried: those that read most
MAX_GROUPS = 12


def select(
    model: CostModel, site_types: SiteTypes, budget: float, keep_weights: bool
) -> tuple[list[Site], list[SitePlan], int]:
    """The sites that save most bytes per token while the file grows by at most a number of bytes.

    A weight is only saved if all sites that are computed from it come from tables, so such groups of sites are taken or left.
    If several choices save most, the one that needs the least space.

    Returns:
        The sites, the prices of those left out, and the smallest growth of the file with any table.
    """

    def growth(sites: Sequence[Site]) -> int:
        tables, _ = file_format.layout(sites, site_types, model.n_vocab)
        elided = [] if keep_weights else model.elided(sites)
        return sum(table.bytes for table in tables) - sum(model.weights[name].bytes for name in elided)

    def saved(sites: Sequence[Site]) -> float:
        tables, _ = file_format.layout(sites, site_types, model.n_vocab)
        return sum(map(model.bytes_read, model.replaced(sites))) - sum(table.row_bytes for table in tables)

    if growth(model.sites) <= budget:
        return list(model.sites), [], growth(model.sites)

    gone = sorted((use for use in model.uses if use.replaced and not use.is_lookup), key=model.bytes_read, reverse=True)
    groups = list(dict.fromkeys(frozenset(site for site in model.sites if use.weight in site.weights) for use in gone))
    unions = {frozenset[Site]()}
    for group in groups[:MAX_GROUPS]:
        unions |= {union | group for union in unions}
    candidates = [[site for site in model.sites if site in union] for union in unions]
    fitting = [sites for sites in candidates if not sites or growth(sites) <= budget]
    least = min((growth(sites) for sites in candidates if sites), default=growth(model.sites))
    chosen = max(fitting, key=lambda sites: (saved(sites), -growth(sites), [site.name for site in sites]))
    return chosen, [price(model, chosen, site, site_types[site]) for site in model.sites if site not in chosen], least


def describe_price(site: SitePlan) -> str:
    """A site and its price on one line."""
    return (
        f"{site.name} ({site.width} values per token): {size_text(site.bytes_stored)} of {site.type.name.lower()}"
        f" for {size_text(site.bytes_freed)} of weights, {size_text(site.bytes_saved)} less to read per token"
    )


class Growth(NamedTuple):
    """How much a file may grow: as the caller said it (None for no limit), and in bytes."""

    asked: str | float | None
    bytes: float


def read_growth(max_growth: str | float | None, source_bytes: int) -> Growth:
    """Parse a growth like `5%`, `500M` or `2G`, or in bytes.

    Raises:
        UsageError: it is not a growth.
    """
    if max_growth is None:
        return Growth(None, math.inf)
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([%KMG]?)", str(max_growth).strip())
    factors = {"": 1.0, "%": source_bytes / 100, "K": 1e3, "M": 1e6, "G": 1e9}
    growth = float(match[1]) * factors[match[2]] if match else math.nan
    if not math.isfinite(growth):
        raise UsageError(f"'{max_growth}' is not a growth; give one like 5%, 500M or 2G, or a number of bytes")
    return Growth(max_growth, growth)


def within(growth: Growth, model: CostModel, site_types: SiteTypes, keep_weights: bool) -> tuple[list[Site], list[SitePlan]]:
    """The sites that save most within a growth of the file, and the prices of the others.

    Raises:
        FirstLayerError: none fits.
    """
    # at least what the keys of a converted file take, with the infos of the source's tensors
    metadata = sum(len(site.recipe) + len(site.name) + 256 for site in model.sites)
    metadata += sum(len(name) + 128 for name in model.elidable) + 4096
    metadata += sum(len(name.encode()) + 8 * len(weight.shape) + 24 for name, weight in model.weights.items())
    chosen, left_out, least = select(model, site_types, growth.bytes - metadata, keep_weights)
    if not chosen:
        needed = least + metadata
        prices = "; ".join(map(describe_price, left_out))
        if needed <= growth.bytes:
            raise FirstLayerError(
                f"no table of {model.name} saves anything within {option('max_growth', growth.asked)}: {prices}"
            )
        percent = math.ceil(1e4 * needed / model.bytes) / 100  # no less, so that it is enough
        raise FirstLayerError(
            f"no table of {model.name} fits into {option('max_growth', growth.asked)}, which is"
            f" {count(round(growth.bytes), 'byte')}; the least is {needed:,}, or {percent:.2f}%: {prices}"
        )
    return chosen, left_out
