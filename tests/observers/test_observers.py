"""Observers against float64 and NumPy references on the raw activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from qat_plugin.errors import ConfigError, DataError
from qat_plugin.observers import (
    KINDS,
    AbsMaxObserver,
    HistogramObserver,
    MinMaxObserver,
    Observer,
    ObserverSpec,
    make_observer,
    observed_scale,
)

HISTOGRAMS = ["percentile:99.9", "mse", "entropy"]


def heavy_tailed(rows: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 512, generator=generator)
    return x * (1 + 4 * (torch.rand(rows, 512, generator=generator) > 0.999))


def observed(spec: str, *batches: Tensor) -> Observer:
    observer = make_observer(spec)
    for batch in batches:
        observer(batch)
    return observer


def limit(observer: Observer) -> float:
    return float(observer.scale()) * 127


class TestGreatestMagnitude:
    def test_minmax_is_the_greatest_of_all_batches(self) -> None:
        batches = [torch.randn(3, 4, 8) * size for size in (1.0, 7.0, 2.0)]
        observer = observed("minmax", *batches)
        assert torch.equal(observer.absmax, torch.cat(batches).abs().max())
        assert torch.equal(observer.scale(), torch.cat(batches).abs().max() / 127)

    def test_the_moving_average_starts_at_the_first_batch(self) -> None:
        batches = [torch.randn(4, 8) * size for size in (1.0, 5.0, 2.0)]
        expected = float(batches[0].abs().max())
        for batch in batches[1:]:
            expected = 0.75 * expected + 0.25 * float(batch.abs().max())
        assert float(observed("moving-average:0.75", *batches).absmax) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("spec", ["minmax", "moving-average"])
    @pytest.mark.parametrize("axis", [-1, 0, 1])
    def test_per_channel_is_each_channel_by_itself(self, spec: str, axis: int) -> None:
        batches = [torch.randn(5, 6, 7) * size for size in (1.0, 3.0)]
        channels = batches[0].shape[axis]
        whole = make_observer(spec, channels=channels, axis=axis)
        apart = [make_observer(spec) for _ in range(channels)]
        for batch in batches:
            whole(batch)
            for index, observer in enumerate(apart):
                observer(batch.select(axis, index))
        assert torch.equal(whole.scale(), torch.stack([observer.scale() for observer in apart]))

    def test_a_channel_of_zeros_has_scale_one(self) -> None:
        observer = MinMaxObserver(channels=3)
        observer(torch.tensor([[0.0, 127.0, -254.0]]))
        assert observer.scale().tolist() == [1.0, 1.0, 2.0]

    def test_another_number_of_channels_is_an_error(self) -> None:
        with pytest.raises(DataError, match=r"3 channels, and the tensor has \[2, 4\]"):
            AbsMaxObserver(channels=3)(torch.randn(2, 4))


class TestHistogram:
    def test_counts_are_those_of_the_whole_data_binned_at_once(self) -> None:
        batches = [heavy_tailed(8, seed) * 10.0**exponent for seed, exponent in enumerate((-6, -2, 0, -1, 3))]
        observer = observed("mse", *batches)
        everything = torch.cat(batches).abs().double().flatten()
        top = 2.0 ** (np.floor(np.log2(float(everything.max()))) + 1)
        expected, _ = np.histogram(everything.numpy(), bins=len(observer.counts), range=(0.0, top))
        assert observer.counts.tolist() == expected.tolist()

    @pytest.mark.parametrize("spec", HISTOGRAMS)
    def test_order_and_cutting_of_batches_do_not_matter(self, spec: str) -> None:
        x = heavy_tailed() * torch.logspace(-3, 2, 64).unsqueeze(1)
        at_once, cut = observed(spec, x), observed(spec, *x.split(5))
        backwards = observed(spec, *reversed(x.split(3)))
        for other in (cut, backwards):
            assert torch.equal(other.counts, at_once.counts)
            assert torch.equal(other.scale(), at_once.scale())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_floats_count_as_the_numbers_they_are(self, dtype: torch.dtype) -> None:
        x = heavy_tailed(8).to(dtype)
        assert torch.equal(observed("mse", x).counts, observed("mse", x.float()).counts)

    def test_zeros_before_and_after_small_numbers(self) -> None:
        observer = observed("percentile:100", torch.zeros(10), torch.full((3,), 1e-20), torch.zeros(5))
        assert observer.counts[0] == 15
        assert int(observer.counts.sum()) == 18
        assert limit(observer) == pytest.approx(1e-20, rel=1e-6)

    @pytest.mark.parametrize("spec", HISTOGRAMS)
    @pytest.mark.parametrize("value", [1e-44, 1e-38, 3e38])
    def test_extreme_magnitudes_give_a_usable_scale(self, spec: str, value: float) -> None:
        scale = observed(spec, torch.tensor([value, -value / 2])).scale()
        assert torch.isfinite(scale)
        assert scale > 0

    def test_new_data_moves_a_scale_that_was_asked_for(self) -> None:
        observer = observed("mse", torch.ones(8))
        before = float(observer.scale())
        observer(torch.full((8,), 3.0))
        assert float(observer.scale()) > 2 * before


class TestCriteria:
    @pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99])
    def test_percentile_is_numpys_within_a_bin(self, percentile: float) -> None:
        x = heavy_tailed()
        observer = observed(f"percentile:{percentile}", *x.split(7))
        width = 2.0 ** np.ceil(np.log2(float(x.abs().max()))) / 8192
        expected = np.percentile(x.abs().double().numpy(), percentile, method="inverted_cdf")
        assert limit(observer) == pytest.approx(expected, abs=width * 1.001)

    def test_percentile_100_is_the_greatest(self) -> None:
        x = heavy_tailed()
        assert torch.equal(observed("percentile:100", x).scale(), x.abs().max() / 127)

    @pytest.mark.parametrize("seed", range(3))
    def test_mse_is_as_good_as_a_search_on_the_raw_activations(self, seed: int) -> None:
        x = heavy_tailed(32, seed).double()

        def error(scale: float) -> float:
            return float(((x / scale).round().clamp(-127, 127) * scale - x).square().mean())

        greatest = float(x.abs().max())
        best = min(error(greatest * part / 127) for part in np.linspace(0.05, 1.0, 400))
        found = error(float(observed("mse", *x.float().split(4)).scale()))
        assert found <= best * 1.005
        assert found < error(greatest / 127) * 0.95  # clipping pays on heavy tails

    @pytest.mark.parametrize("data", ["normal", "relu", "heavy"])
    def test_entropy_is_the_loop_of_the_published_method(self, data: str) -> None:
        x = {"normal": torch.randn(200, 64), "relu": torch.randn(200, 64).relu(), "heavy": heavy_tailed(24)}[data]
        observer = observed("entropy", x)
        greatest = float(x.abs().max())
        top = 2.0 ** np.ceil(np.log2(greatest))
        histogram, edges = np.histogram(x.abs().double().numpy(), bins=2048, range=(0.0, top))
        assert limit(observer) == pytest.approx(min(entropy_threshold(histogram, edges), greatest), rel=1e-6)

    def test_evenly_spread_activations_are_hardly_clipped(self) -> None:
        x = torch.linspace(-1, 1, 100_001)
        assert limit(observed("mse", x)) > 0.98
        assert limit(observed("entropy", x)) > 0.98


def entropy_threshold(histogram: np.ndarray, edges: np.ndarray) -> float:
    """NVIDIA's calibration, bin by bin: the KL divergence of the pooled histogram of each size, the last least wins."""
    counts = histogram.astype(np.float64)
    counts[0] = counts[1]
    last = int(np.nonzero(counts)[0].max()) + 1
    best, threshold = np.inf, 0.0
    for size in range(min(128, last), last + 1):
        levels = np.arange(size) * 128 // size
        p = counts[:size].copy()
        filled = p > 0
        pooled = np.bincount(levels[filled], weights=p[filled], minlength=128)
        members = np.bincount(levels[filled], minlength=128)
        q = np.where(filled, (pooled / np.maximum(members, 1))[levels], 0.0)
        p[-1] += counts[size:].sum()
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(p > 0, p * np.log(p / q), 0.0).sum()
        if divergence <= best + 1e-13:
            best, threshold = min(best, divergence), edges[size]
    return float(threshold)


@pytest.mark.parametrize("spec", KINDS)
class TestEveryKind:
    def test_only_zeros_give_scale_one(self, spec: str) -> None:
        observer = observed(spec, torch.zeros(4, 8))
        assert observer.has_data
        assert observer.scale() == 1
        assert observer.scale().dtype == torch.float32

    def test_nothing_seen_is_no_data_and_an_empty_tensor_is_nothing(self, spec: str) -> None:
        assert not observed(spec).has_data
        assert not observed(spec, torch.zeros(0, 8)).has_data

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_one_bad_number_is_remembered(self, spec: str, bad: float) -> None:
        observer = observed(spec, torch.ones(4), torch.tensor([1.0, bad]), torch.ones(4))
        assert not observer.is_finite
        assert not torch.isfinite(observer.scale())
        assert observed(spec, torch.ones(4)).is_finite

    def test_statistics_are_float32_whatever_the_default_type(self, spec: str) -> None:
        expected = observed(spec, heavy_tailed(4)).scale()
        torch.set_default_dtype(torch.bfloat16)
        try:
            scale = observed(spec, heavy_tailed(4).float()).scale()
        finally:
            torch.set_default_dtype(torch.float32)
        assert scale.dtype == torch.float32
        assert scale.isfinite()
        assert expected.dtype == scale.dtype

    def test_the_scale_never_exceeds_the_greatest_magnitude(self, spec: str) -> None:
        for x in (torch.ones(5), heavy_tailed(4), torch.tensor([1e-3, 1.0])):
            assert 0 < limit(observed(spec, x)) <= float(x.abs().max()) * (1 + 1e-6)

    def test_buffers_restore_it(self, spec: str) -> None:
        observer = observed(spec, heavy_tailed(4), heavy_tailed(4, 1) * 3)
        state = {name: value.clone() for name, value in observer.named_buffers()}
        fresh = make_observer(spec)
        fresh.restore(state)
        assert torch.equal(fresh.scale(), observer.scale())
        assert torch.equal(observed_scale(spec, state), observer.scale())
        for one in (fresh, observer):
            one(heavy_tailed(4, 2) * 9)
        assert torch.equal(fresh.scale(), observer.scale())

    def test_it_is_a_histogram_or_counts_channels(self, spec: str) -> None:
        if isinstance(make_observer(spec), HistogramObserver):
            with pytest.raises(ConfigError, match="per channel there are minmax and moving-average"):
                make_observer(spec, channels=4)
        else:
            assert make_observer(spec, channels=4).absmax.shape == (4,)

    def test_its_spelling_says_it(self, spec: str) -> None:
        assert str(ObserverSpec.parse(spec)) == spec
        assert make_observer(spec).spec == ObserverSpec.parse(spec)
        assert spec in repr(make_observer(spec))


def parsed() -> Iterator[tuple[str, str]]:
    yield "percentil", "Did you mean 'percentile'"
    yield "maxmin", "one of minmax, moving-average, percentile, mse, entropy"
    yield "percentile:101", "above 0 and at most 100"
    yield "percentile:0", "above 0 and at most 100"
    yield "percentile:", "above 0 and at most 100"
    yield "percentile:nan", "above 0 and at most 100"
    yield "moving-average:1", "a momentum from 0 to below 1"
    yield "mse:3", "mse takes no number"


@pytest.mark.parametrize(("given", "text"), list(parsed()))
def test_a_wrong_spelling_says_what_is_allowed(given: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        ObserverSpec.parse(given, "ptq.observer")
    assert f"ptq.observer={given}" in str(error.value)


def test_numbers_are_read_and_default() -> None:
    spelled: Callable[[str], str] = lambda text: str(ObserverSpec.parse(text))
    assert spelled("percentile:99.99") == "percentile"
    assert spelled("percentile:99.9") == "percentile:99.9"
    assert spelled("moving-average:0.9") == "moving-average"
    with pytest.raises(ConfigError, match="observer=None"):
        ObserverSpec.parse(None)  # type: ignore[arg-type]
