"""Table types by measurement: the smallest tables without a measurable effect on a model's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_firstlayer import file_format
from gguf_firstlayer.decoder import TEXT_BYTES, InMemoryDecoder, held
from gguf_firstlayer.divergence import Rows, kl_divergence, log_softmax
from gguf_firstlayer.errors import FirstLayerError, option
from gguf_firstlayer.isolation import EndedError
from gguf_firstlayer.memory import memory_limit
from gguf_firstlayer.runtime import Analysis, IsolatedAnalysis, Site
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import count, progress

SiteTypes = dict[Site, GGMLQuantizationType]

SAMPLE = Path(__file__).with_name("sample.txt")
N_TOKENS = 512

# Codebook types are left out: they are designed for importance matrices, and quantizing to them is slow; and
# Q1_0, which gguf-py cannot read
CANDIDATES = [kind for name, kind in file_format.TYPES.items() if not name.startswith(("iq1", "iq2", "iq3", "q1_0"))]

# KL divergence grows with the square of a small error; the model's own noise does not. So errors are enlarged before they
# are measured, which separates them from the noise.
ENLARGED = 4.0

# Relative size of the smallest possible change, the rounding error of F16, enlarged like the errors
JITTER = ENLARGED * 2.0**-12
N_JITTER = 2

# relative RMS error at which the sensitivity of each site is measured: that of the relevant types, enlarged
PROBE = 0.1

# factor by which predictions may be wrong
UNCERTAIN = 3

# sensitivity below which a probe shows nothing
LEAST = 1e-5


@dataclass(frozen=True)
class _Outcome:
    klds: npt.NDArray[np.float64]  # per token
    top1: float
    perplexity: float

    @property
    def kld(self) -> float:
        return max(float(self.klds.mean()), 0.0)  # rounding may make it negative


class _Trial:
    """Runs a text with rows in memory, and compares the output with that of the first run. In the analysis's child process.

    Args:
        analysis, path: of the model
        tokens: ids of the text, i32 [n]
        ids: the distinct ones among them

    Raises:
        FirstLayerError: the model has no next-token distribution.
    """

    def __init__(self, analysis: Analysis, path: Path, tokens: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> None:
        self._tokens, self._ids = tokens, ids
        self._reference: list[Rows] = []
        self._decoder = InMemoryDecoder(path, analysis, len(tokens))

    def run(self, rows: Mapping[int, Rows]) -> _Outcome:
        """The outcome with some rows, F32 [distinct tokens of the text, width] by their first column in the decoder's.

        Raises:
            FirstLayerError: the output of the first run is not finite.
        """
        for first, values in rows.items():
            self._decoder.rows[self._ids, first : first + values.shape[1]] = values

        is_first = not self._reference
        klds: list[npt.NDArray[np.float64]] = []
        same, losses = [], []
        next_tokens = np.append(self._tokens[1:], -1)
        done = 0
        self._decoder.keep(0)
        for logits in self._decoder.decode(self._tokens):
            p = log_softmax(logits)
            if is_first:
                if not np.isfinite(p).all():
                    raise FirstLayerError("the model cannot be measured: its output is not finite")
                self._reference.append(p)
            reference = self._reference[len(klds)]
            klds.append(kl_divergence(reference, p))
            same.append(p.argmax(axis=1) == reference.argmax(axis=1))
            following = next_tokens[done : done + len(p)]
            done += len(p)
            losses.append(-p[np.arange(len(p)), following][following >= 0])
        return _Outcome(
            np.concatenate(klds),
            float(np.concatenate(same).mean()),
            float(np.exp(np.concatenate(losses).mean(dtype=np.float64))),
        )

    def close(self) -> None:
        """Free the model."""
        self._reference.clear()
        self._decoder.close()


class Effects:
    """Measures what errors in the rows of sites do to a model's output. A context manager.

    Args:
        path, analysis: of the model
        tokens: ids of a text, i32 [n]; by default, the built-in one. As many are used as memory is meant for (`TEXT_BYTES`)
        n_measured: roughly how often errors will be measured

    Attributes:
        tokens: ids of the text
        ids: the distinct ones among them, i32 [distinct tokens of the text]
        exact: rows of each site, F32 [distinct tokens of the text, width]
        floor: mean KL divergence that a change in the last bits causes
        perplexity: of the text, without errors

    Raises:
        FirstLayerError: the model has no next-token distribution, or it is not finite.
    """

    def __init__(
        self, path: Path, analysis: IsolatedAnalysis, tokens: npt.NDArray[np.int32] | None = None, n_measured: int = 2
    ) -> None:
        self.tokens = (sample_tokens(analysis) if tokens is None else tokens)[: held(TEXT_BYTES, analysis.n_vocab)]
        self.ids, self._counts = np.unique(self.tokens, return_counts=True)
        widths = [site.width for site in analysis.sites]
        rows = analysis.rows(self.ids)
        self._quantize = analysis.quantize
        self.exact: dict[Site, Rows] = dict(zip(analysis.sites, np.split(rows, np.cumsum(widths)[:-1], axis=1), strict=True))
        columns = np.cumsum([0] + [file_format.padded(width) for width in widths])
        self._columns = dict(zip(analysis.sites, columns.tolist(), strict=False))

        self._trial = analysis.make(_Trial, path, self.tokens, self.ids)
        self._progress = progress(f"measuring on {count(len(self.tokens), 'token')}", 1 + N_JITTER + n_measured, "run")
        try:
            self.perplexity = self.measure({}).perplexity
            self._floors = np.mean([self.measure(self._jitter(seed)).klds for seed in range(N_JITTER)], axis=0)
            self.floor = max(0.0, float(self._floors.mean()))
        except FirstLayerError:
            self.close()
            raise

    def _jitter(self, seed: int) -> dict[Site, Rows]:
        random = np.random.default_rng(seed)
        return {
            site: rows * random.uniform(-JITTER, JITTER, rows.shape).astype(np.float32) for site, rows in self.exact.items()
        }

    def rise(self, errors: Mapping[Site, Rows], factor: float) -> tuple[float, float]:
        """What errors add to the mean KL divergence, measured with the errors enlarged by a factor, and its standard error."""
        if not any(error.any() for error in errors.values()):
            return 0.0, 0.0
        outcome = self.measure({site: np.float32(factor) * error for site, error in errors.items()})
        rises = (outcome.klds - self._floors) / factor**2
        return float(rises.mean()), float(rises.std(ddof=1) / np.sqrt(len(rises)))

    def relative_error(self, site: Site, errors: Rows) -> float:
        """RMS error of a site relative to its RMS, over the text."""
        weights = self._counts[:, None]
        power = float(np.sum(weights * np.square(self.exact[site], dtype=np.float64)))
        return float(np.sqrt(np.sum(weights * np.square(errors, dtype=np.float64)) / power)) if power > 0 else 0.0

    def measure(self, errors: Mapping[Site, Rows]) -> _Outcome:
        """Outcome if the rows of some sites are off by errors, F32 [distinct tokens of the text, width].

        The first outcome is the reference for the others.
        """
        rows = {self._columns[site]: exact + errors.get(site, np.float32(0)) for site, exact in self.exact.items()}
        outcome = self._trial.call(_Trial.run, rows)
        self._progress.update()
        return outcome

    def rounding(self, site: Site, kind: GGMLQuantizationType) -> Rows:
        """Errors of the rows of a site in a table of some type, F32 [distinct tokens of the text, width].

        Raises:
            NotImplementedError: gguf-py cannot read the type.
            FirstLayerError: the type cannot hold the values.
        """
        exact = self.exact[site]
        back: Rows = gguf.quants.dequantize(self._quantize(exact, kind), kind).reshape(exact.shape).astype(np.float32)
        return back - exact

    def close(self) -> None:
        """Free the model."""
        self._progress.total = self._progress.n  # fewer may have been enough
        self._progress.close()
        with suppress(EndedError):
            self._trial.call(_Trial.close)

    def __enter__(self) -> Effects:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sample_tokens(analysis: Analysis | IsolatedAnalysis) -> npt.NDArray[np.int32]:
    """Token ids of the built-in text, i32 [N_TOKENS]; random ones if the tokenizer finds too few distinct tokens in it."""
    tokens = analysis.tokenize(SAMPLE.read_text(encoding="utf-8"))
    if len(np.unique(tokens)) < N_TOKENS / 8:
        return np.random.default_rng(0).integers(0, analysis.n_vocab, N_TOKENS, np.int32)
    return tokens[:N_TOKENS]


def table_errors(effects: Effects, site_types: Mapping[Site, GGMLQuantizationType]) -> dict[Site, Rows]:
    """Errors of the rows in tables of given types."""
    return {site: effects.rounding(site, kind) for site, kind in site_types.items()}


def measure(effects: Effects, site_types: Mapping[Site, GGMLQuantizationType], max_kld: float) -> file_format.Measurement:
    """What tables of given types do to the output."""
    errors = table_errors(effects, site_types)
    plain = effects.measure(errors)
    return file_format.Measurement(
        len(effects.tokens),
        max_kld,
        plain.kld,
        effects.floor,
        *effects.rise(errors, ENLARGED),
        plain.top1,
        effects.perplexity,
        plain.perplexity,
    )


@dataclass(frozen=True)
class _Step:
    """A type on a site's ladder, and the KL divergence expected of it."""

    kind: GGMLQuantizationType
    row_bytes: int
    kld: float


def _ladder(effects: Effects, site: Site) -> list[_Step]:
    """The types that no other beats in both size and error, the smallest first, F32 last."""
    errors: dict[GGMLQuantizationType, tuple[int, float, Rows]] = {}
    for kind in CANDIDATES:
        if file_format.fitting(kind, site.width) != kind:
            continue
        try:
            error = effects.rounding(site, kind)
        except EndedError:
            raise
        except (NotImplementedError, FirstLayerError):
            continue
        errors[kind] = (
            file_format.Table("", kind, file_format.padded(site.width), 1).row_bytes,
            effects.relative_error(site, error),
            error,
        )

    # the output's sensitivity to this site, measured with the errors of one type, scaled to PROBE
    probe = min((entry for entry in errors.values() if entry[1] > 0), key=lambda entry: abs(entry[1] - PROBE), default=None)
    sensitivity = 0.0
    if probe is not None:
        rise, _ = effects.rise({site: probe[2]}, PROBE / probe[1])
        sensitivity = max(LEAST, rise / probe[1] ** 2)

    ladder: list[_Step] = []
    least = np.inf
    for step in sorted(
        (_Step(kind, size, sensitivity * relative**2) for kind, (size, relative, _) in errors.items()),
        key=lambda step: (step.row_bytes, step.kld),
    ):
        if step.kld < least:
            least = step.kld
            ladder.append(step)
    return ladder


def types(sites: Sequence[Site]) -> tuple[SiteTypes, SiteTypes, SiteTypes]:
    """Types of the sites: without a measurement, the smallest that a measurement may choose, and F32."""
    fitting = {site: [kind for kind in CANDIDATES if file_format.fitting(kind, site.width) == kind] for site in sites}
    return (
        {site: file_format.fitting(GGMLQuantizationType.Q8_0, site.width) for site in sites},
        {
            site: min(site_types, key=lambda kind: file_format.Table("", kind, file_format.padded(site.width), 1).row_bytes)
            for site, site_types in fitting.items()
        },
        dict.fromkeys(sites, GGMLQuantizationType.F32),
    )


def choose(model: Source, analysis: IsolatedAnalysis, max_kld: float) -> tuple[SiteTypes, file_format.Measurement | None, str]:
    """The types of the smallest tables whose contribution to the KL divergence is within a bound.

    Returns:
        The type of each site, the measurement, and an empty string; or q8_0 (or what fits instead), None, and why nothing was
        measured.
    """
    default, _, _ = types(analysis.sites)
    memory = memory_limit()
    logits = 4 * analysis.n_vocab * min(N_TOKENS, held(TEXT_BYTES, analysis.n_vocab))
    if memory is not None and model.bytes + 2 * logits > 0.75 * memory:
        return default, None, "the model needs more memory than there is"
    try:
        with Effects(model.path, analysis, n_measured=2 * len(analysis.sites) + 3) as effects:
            return *search(effects, max_kld), ""
    except EndedError:
        raise
    except FirstLayerError as err:
        return default, None, str(err)


def search(effects: Effects, max_kld: float) -> tuple[SiteTypes, file_format.Measurement]:
    """The types of the smallest tables whose contribution to the KL divergence is within a bound, and their measurement."""
    ladders = {site: _ladder(effects, site) for site in effects.exact}

    def predicted(site_types: SiteTypes) -> float:
        return sum(step.kld for site in ladders for step in ladders[site] if step.kind == site_types[site])

    def measured(site_types: SiteTypes) -> float:
        return sum(effects.rise(table_errors(effects, site_types), ENLARGED))

    scale = 1.0
    while True:
        site_types = _cheapest(ladders, max_kld / scale)
        rise = measured(site_types)
        if not math.isfinite(rise):
            raise FirstLayerError(f"types cannot be measured, since the output is not finite; choose one with {option('type')}")
        if rise <= max_kld:
            break
        scale = rise / predicted(site_types)  # the prediction was too low by this factor

    # for some sites the prediction may be too high: where that is likely, try one step down, the widest site first
    for site in sorted(ladders, key=lambda site: site.width, reverse=True):
        place = [step.kind for step in ladders[site]].index(site_types[site])
        lower = site_types | {site: ladders[site][max(0, place - 1)].kind}
        if lower != site_types and predicted(lower) <= UNCERTAIN * max_kld and measured(lower) <= max_kld:
            site_types = lower
    return site_types, measure(effects, site_types, max_kld)


def measure_again(model: Source, analysis: IsolatedAnalysis, site_types: SiteTypes, max_kld: float) -> file_format.Measurement:
    """The measurement of some of the sites' tables."""
    with Effects(model.path, analysis) as effects:
        return measure(effects, site_types, max_kld)


def describe(types: Mapping[str, str], measurement: file_format.Measurement | None, unmeasured: str) -> list[str]:
    """The types chosen by measurement, by site, and their effect, as readable lines."""
    if unmeasured:
        return [f"types were not measured: {unmeasured}"]
    if measurement is None:
        return []
    chosen = ", ".join(f"{name} {kind}" for name, kind in types.items())
    return [
        f"types chosen by measurement: {chosen}",
        f"KL divergence over the {measurement.tokens} tokens of the built-in sample: {measurement.kld:.1e} nats, of which"
        f" {measurement.kld_tables:.1e} ± {measurement.kld_tables_error:.1e} from the tables (bound {measurement.max_kld:g});"
        f" any change in the last bits causes {measurement.kld_floor:.1e}",
        f"most probable token the same: {measurement.top1:.1%}; perplexity {measurement.perplexity_source:.3f} ->"
        f" {measurement.perplexity:.3f}",
    ]


def _cheapest(ladders: Mapping[Site, Sequence[_Step]], bound: float) -> SiteTypes:
    """The types with the smallest total size whose expected KL divergence is within a bound."""
    # combinations of types for the sites so far that no other beats in both size and divergence
    front: list[tuple[int, float, SiteTypes]] = [(0, 0.0, {})]
    for site, ladder in ladders.items():
        longer = [
            (size + step.row_bytes, kld + step.kld, site_types | {site: step.kind})
            for size, kld, site_types in front
            for step in ladder
            if kld + step.kld <= bound
        ]
        front = []
        for entry in sorted(longer, key=lambda entry: entry[:2]):
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    return front[0][2]
