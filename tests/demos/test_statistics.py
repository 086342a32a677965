import numpy as np
import pytest

from pi0fm.demos.statistics import NAMES, QUANTILES, of_columns, of_pictures, union

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("count", [1, 2, 10, 99, 100, 1000])
def test_columns_against_numpy(count: int) -> None:
    values = RANDOM.normal(size=(count, 3)).astype(np.float32)
    found = of_columns(values)
    assert tuple(found) == NAMES and found["count"].tolist() == [count]
    assert np.array_equal(found["min"], values.min(0)) and np.array_equal(found["max"], values.max(0))
    assert np.allclose(found["mean"], values.astype(np.float64).mean(0)) and np.allclose(found["std"], values.astype(np.float64).std(0))
    for name, share in QUANTILES.items():
        assert np.array_equal(found[name], np.quantile(values, share, axis=0, method="inverted_cdf"))


def test_pictures_are_columns_of_pixels() -> None:
    pictures = RANDOM.integers(3, 250, (7, 6, 8, 3), np.uint8)
    found, pixels = of_pictures(pictures), of_columns(pictures.reshape(-1, 3) / 255)
    for name in NAMES:
        assert found[name].shape == ((1,) if name == "count" else (3, 1, 1))
        assert np.allclose(found[name].reshape(-1), pixels[name].reshape(-1), atol=1e-12)


def test_large_pictures_are_thinned() -> None:
    picture = np.zeros((1, 300, 400, 3), np.uint8)
    picture[:, ::2, ::2] = 51
    found = of_pictures(picture)
    assert found["count"].tolist() == [150 * 200] and np.allclose(found["min"], 0.2)


def test_union_is_exact_but_for_the_quantiles() -> None:
    one, other = RANDOM.normal(size=(40, 3)), 5 + RANDOM.normal(size=(60, 3))
    joined, whole = union(of_columns(one), of_columns(other)), of_columns(np.concatenate([one, other]))
    for name in ("min", "max", "mean", "std", "count"):
        assert np.allclose(joined[name], whole[name])
    for name in QUANTILES:
        assert np.allclose(joined[name], 0.4 * of_columns(one)[name] + 0.6 * of_columns(other)[name])
