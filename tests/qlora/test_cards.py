from __future__ import annotations

import pytest
import torch
import transformers as tf

from qat_plugin.errors import ConfigError
from qat_plugin.qlora.cards import (
    CARDS,
    Card,
    card_named,
    card_of_size,
    dequantization_bytes,
    measured_host,
    roofline,
    token_flops,
    usable_gib,
)
from qat_plugin.qlora.forecast import CARD_GIB, Forecast, Settings, forecast_of
from qat_plugin.qlora.outline import outline
from qat_plugin.qlora.prepare import base_plan

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def seventy() -> Forecast:
    config = tf.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    return forecast_of(outline(model, base_plan(model, "nf4-dq")), Settings())


def test_operations_and_traffic_by_hand(seventy: Forecast) -> None:
    linears, head, adapters = 68_451_041_280, 128256 * 8192, 207_093_760
    expected = 6 * linears + 4 * head + 8 * adapters + 9 * 2048 * 8192 * 80
    assert token_flops(seventy) == pytest.approx(expected)
    assert dequantization_bytes(seventy) == pytest.approx(3 * (0.5159 + 4) * linears, rel=1e-3)


def test_seventy_billion_on_an_h200(seventy: Forecast) -> None:
    low, high = roofline(seventy, card_named("h200"))
    assert 550 < low < 700
    assert 900 < high < 1100
    # dequantization costs the same for any number of tokens: a short micro step is slower
    assert roofline(seventy, card_named("H200"), tokens=256)[1] < 0.65 * high


def test_cards_are_found_by_name_and_size() -> None:
    assert card_named("a100-80gb").gb_per_s == 2039
    assert card_of_size(48).name == "L40S"
    assert card_of_size(60).gib == 80
    assert card_of_size(1000).name == "H200"
    assert {card.gib for card in CARDS} == set(CARD_GIB)
    with pytest.raises(ConfigError, match="Did you mean 'H100'"):
        card_named("H10O")


def test_a_card_of_another_size_has_the_least_share_of_the_standard_ones() -> None:
    assert usable_gib(24) == usable_gib(24.0) == CARD_GIB[24]
    assert usable_gib(8) == pytest.approx(8 * 44.4 / 48)
    assert usable_gib(20.5) < 20.5


def test_a_card_without_peaks_is_refused(seventy: Forecast) -> None:
    with pytest.raises(ConfigError, match="no peaks"):
        roofline(seventy, Card("mine", 24, 0, 0))


def test_the_host_is_measured() -> None:
    host = measured_host(torch.float32, seconds=0.05)
    assert 1e-3 < host.tflops < 100
    assert 0.1 < host.gb_per_s < 2000
