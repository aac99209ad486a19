"""What CacheGen learns: whether anchors pay, how wide bins may be, and distributions that shorten what they code."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.kv import cachegen_profile, fitted, table
from memwall.kv.cachegen import encode_chunk
from memwall.kv.cachegen_fit import ModelText, anchors_pay, learn, measured_widths
from memwall.kv.policy import parse
from memwall.models import model_directory
from tests.kv.cachegen_cases import MODEL, PROFILES, SHAPE, Text, rows


def found(smooth: float) -> dict[str, np.ndarray]:
    moments = cachegen_profile.Moments(SHAPE.planes, SHAPE.channels)
    for plane, x in Text(smooth).rows(""):
        moments.add(plane, x)
    return moments.finish()


def test_moments_are_those_of_the_rows() -> None:
    moments = cachegen_profile.Moments(1, SHAPE.channels)
    x = rows(250)[0]
    moments.add(0, x[:100])
    moments.add(0, x[100:])
    got = moments.finish()
    np.testing.assert_allclose(got["means"][0], x.mean(axis=0), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(got["mean.spreads"][0], x.std(axis=0), rtol=2e-3)
    deltas = np.concatenate(
        [part[i + 1 : i + 10] - part[i] for part in (x[:100], x[100:]) for i in range(0, len(part), 10)]
    )
    np.testing.assert_allclose(got["delta.spreads"][0], np.sqrt(np.square(deltas).mean(axis=0)), rtol=2e-3)


def test_anchors_are_used_where_neighbours_are_alike() -> None:
    widths = np.array([cachegen_profile.WIDTHS] * 2)
    assert not anchors_pay(found(0.0), widths, 3).any()
    assert anchors_pay(found(0.999), widths, 3).all()
    alike = learn(Text(0.999), "auto")  # type: ignore[arg-type]
    assert alike["anchored"].all()
    planes = rows(400, smooth=0.999)
    sizes = {
        form: len(encode_chunk(planes.__getitem__, SHAPE, model=MODEL, first=0, level=2, form=form, profile=profile))
        for form, profile in (("delta", learn(Text(0.999), "delta")), ("mean", learn(Text(0.999), "mean")))  # type: ignore[arg-type]
    }
    assert sizes["delta"] > 0


def test_wide_bins_go_where_little_is_lost() -> None:
    """Four times the loss at the same width: half the width; the mean stays the paper's."""
    widths = measured_widths(Text(losses=(4, 1, 1, 1, 1, 4)), found(0))  # type: ignore[arg-type]
    assert widths[0, 0] / widths[0, 1] == pytest.approx(0.5)
    assert widths[1, 2] / widths[1, 1] == pytest.approx(0.5)
    assert np.exp(np.log(widths).mean()) == pytest.approx(0.75 ** (1 / 3))
    extreme = measured_widths(Text(losses=(1e9, 1, 1, 1, 1, 1)), found(0))  # type: ignore[arg-type]
    assert extreme.max() / extreme.min() <= 9.001


def test_a_profile_of_other_texts_of_the_model_shortens_the_stream() -> None:
    """Against one distribution for all channels of a plane, with the same symbols."""
    planes = rows(400)
    profile = dict(PROFILES["direct"])
    own = len(encode_chunk(planes.__getitem__, SHAPE, model=MODEL, first=0, level=2, form="direct", profile=profile))
    starts = profile["plain.2"].astype(np.int64)
    widths = np.diff(starts, axis=-1, append=65536).sum(axis=1, keepdims=True)
    shared = cachegen_profile.range_coder.cumulative(np.broadcast_to(widths, starts.shape).astype(np.float64))
    wide = len(encode_chunk(planes.__getitem__, SHAPE, model=MODEL, first=0, level=2, form="direct",
                            profile={**profile, "plain.2": shared}))  # fmt: skip
    assert own < 0.9 * wide


def test_profiles_are_named_by_what_they_hold() -> None:
    assert PROFILES["mean"]["id"].tobytes() == learn(Text(), "mean")["id"].tobytes()  # type: ignore[arg-type]
    assert len({profile["id"].tobytes() for profile in PROFILES.values()}) == len(PROFILES)
    for form, profile in PROFILES.items():
        assert {"id", "plain.1"} <= set(profile)
        assert ("anchors" in profile) == (form == "delta")


def test_the_demo_model_is_fitted_and_found_again(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("memwall.kv.cachegen_fit.FIT_TOKENS", 512)
    monkeypatch.setattr("memwall.kv.cachegen_fit.WINDOW_TOKENS", 256)
    stages: list[str] = []
    directory = model_directory("demo")
    (path,) = fitted.fit("cachegen", directory, progress=lambda stage, done, whole: stages.append(stage))
    assert path.is_file()
    assert set(stages) == {"measuring spread", "measuring sensitivity", "counting symbols"}
    text = ModelText(directory, None, None, None)
    lost = text.divergence([lambda plane, x: x, lambda plane, x: np.rint(x)])
    assert lost[0] < 1e-6 < lost[1]  # turning keys back and forth changes nothing, rounding them does
    with pytest.raises(ValueError, match="form"):
        fitted.fit("cachegen(form=none)", directory)
    assert parse("cachegen").name in table.CODECS
