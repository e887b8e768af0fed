"""料金表とコスト計算: 名前、日付、段、キャッシュ、誤った入力、独立した計算との一致。"""

from __future__ import annotations

import difflib
import json
import math
import pickle
import subprocess
import sys
from datetime import date, datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapter8_samples.cost_tracking import (
    CostCalculator,
    CostError,
    InvalidUsageError,
    ModelPrice,
    NoPriceError,
    PriceNotEffectiveError,
    PriceTable,
    PriceTableError,
    UnknownModelError,
    format_yen,
)
from chapter8_samples.cost_tracking.prices import table as table_module
from chapter8_samples.cost_tracking.prices.names import spellings

CALCULATOR = CostCalculator()
TABLE = PriceTable.default()
ARN = "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-3-5-sonnet-20241022-v2:0"

NAMES = {
    "gpt-4o": "gpt-4o",
    "GPT-4o-Mini": "gpt-4o-mini",
    " gpt-4o ": "gpt-4o",
    "gpt-4o-2024-08-06": "gpt-4o",
    "gpt-4o-2024-11-20": "gpt-4o",
    "gpt-4o-2024-05-13": "gpt-4o-2024-05-13",
    "gpt-4o-mini-2024-07-18": "gpt-4o-mini",
    "openai/gpt-4o-mini": "gpt-4o-mini",
    "openrouter/openai/gpt-4o": "gpt-4o",
    "azure/gpt-4o-mini": "gpt-4o-mini",
    "gpt-4-turbo-2024-04-09": "gpt-4-turbo",
    "gpt-4-0613": "gpt-4",
    "gpt-3.5-turbo-0125": "gpt-3.5-turbo",
    "o1": "o1",
    "o1-2024-12-17": "o1",
    "o1-mini-2024-09-12": "o1-mini",
    "o1-preview": "o1-preview",
    "text-embedding-3-small": "text-embedding-3-small",
    "claude-3-5-sonnet-20240620": "claude-3-5-sonnet",
    "anthropic/claude-3-5-sonnet-20241022": "claude-3-5-sonnet",
    "claude-3-5-haiku-latest": "claude-3-5-haiku",
    "anthropic.claude-3-haiku-20240307-v1:0": "claude-3-haiku",
    "us.anthropic.claude-3-5-sonnet-20241022-v2:0": "claude-3-5-sonnet",
    "apac.anthropic.claude-3-5-haiku-20241022-v1:0": "claude-3-5-haiku",
    "bedrock/us.anthropic.claude-3-haiku-20240307-v1:0": "claude-3-haiku",
    "bedrock/us-east-1/anthropic.claude-3-haiku-20240307-v1:0": "claude-3-haiku",
    ARN: "claude-3-5-sonnet",
    f"bedrock/converse/{ARN}": "claude-3-5-sonnet",
    "openai:/gpt-4o-mini": "gpt-4o-mini",
    "projects/p/locations/us-central1/publishers/google/models/gemini-1.5-pro": "gemini-1.5-pro",
    "claude-3-5-sonnet-v2@20241022": "claude-3-5-sonnet",
    "vertex_ai/claude-3-opus@20240229": "claude-3-opus",
    "models/gemini-1.5-flash": "gemini-1.5-flash",
    "gemini/gemini-1.5-pro-002": "gemini-1.5-pro",
    "gemini-1.5-flash-8b": "gemini-1.5-flash-8b",
    "gemini-1.5-flash-8b-001": "gemini-1.5-flash-8b",
}
UNKNOWN = [
    "gpt-4o-2099-01-01", "gpt-4o-mini-2099-01-01", "gpt-4o-audio-preview", "gpt-4o-minii", "gpt",
    "gpt-3.5-turbo-1106", "ft:gpt-4o-mini-2024-07-18:acme::abc", "azure/my-deployment", "my-model",
    "llama3.1:8b", "o1-", "", "databricks-claude-3-7-sonnet",
]  # fmt: skip


def test_spellings_of_providers() -> None:
    found = {name: CALCULATOR.price(name, 1, 1).matched_model for name in NAMES}
    assert found == NAMES


def test_nothing_is_guessed_from_a_prefix() -> None:
    for name in UNKNOWN:
        with pytest.raises(UnknownModelError) as error:
            CALCULATOR.calculate(name, 1000, 500)
        assert repr(name) in str(error.value)


def test_unknown_model_suggests_near_names() -> None:
    with pytest.raises(UnknownModelError, match="did you mean: gpt-4o-mini") as error:
        CALCULATOR.calculate("gpt-4o-minii", 1, 1)
    assert error.value.suggestions[0] == "gpt-4o-mini"


def test_the_quick_start_of_the_readme() -> None:
    assert (
        CostCalculator().calculate(model="gpt-4o", input_tokens=1000, output_tokens=500) == 0.0075
    )


@pytest.mark.parametrize(
    ("model", "usage", "want"),
    [
        ("gpt-4o", (1200, 300, 1024), "0.00472"),
        ("gpt-4o-mini", (1200, 300, 1024), "0.0002832"),
        ("o1", (1200, 300, 1024), "0.02832"),
        ("text-embedding-3-small", (80, 0, 0), "0.0000016"),
        ("gpt-4o-mini-2024-07-18", (1_000_000, 500_000, 0), "0.45"),  # 前方一致なら 7.50
        ("gpt-4o-2024-05-13", (1_000_000, 500_000, 0), "12.50"),
        ("gpt-4o", (1000, 0, 800), "0.0015"),  # 上乗せすると 0.0035
        ("o1-mini", (1_000_000, 0, 0), "3"),
        ("gemini-1.5-pro", (128_000, 0, 0), "0.16"),
        ("gemini-1.5-pro", (128_001, 0, 0), "0.3200025"),
        ("gpt-4", (1000, 0, 800), "0.03"),  # キャッシュの単価がないモデルに割引はない
    ],
)
def test_golden_costs(model: str, usage: tuple[int, int, int], want: str) -> None:
    assert CALCULATOR.price(model, *usage).total_usd == Decimal(want)


def test_anthropic_cache_writes() -> None:
    item = CALCULATOR.price("claude-3-5-sonnet", 2600, 50, 2000, cache_write_tokens=500)
    assert (item.prompt_usd, item.output_usd) == (Decimal("0.002775"), Decimal("0.00075"))
    assert (item.input_usd, item.cached_input_usd) == (Decimal("0.0003"), Decimal("0.0006"))
    hour = ModelPrice(
        input=Decimal(3), output=Decimal(15), cache_write=Decimal("3.75"), cache_write_1h=Decimal(6)
    )
    calculator = CostCalculator(PriceTable({"m": (hour,)}))
    item = calculator.price("m", 1000, 0, cache_write_tokens=1000, cache_write_1h_tokens=400)
    assert item.cache_write_usd == Decimal("0.00465")  # 600 * 3.75 + 400 * 6


@pytest.mark.parametrize(
    ("at", "usd"),
    [
        (date(2024, 12, 2), 1.0),
        (date(2024, 12, 3), 0.8),
        (datetime(2024, 12, 2, 23, 59, tzinfo=timezone.utc), 1.0),
        (datetime.fromisoformat("2024-12-03T08:59:00+09:00"), 1.0),  # UTC ではまだ 2 日
        (None, 0.8),
    ],
)
def test_the_price_cut_of_haiku(at: date | None, usd: float) -> None:
    assert CALCULATOR.calculate("claude-3-5-haiku-20241022", 10**6, 0, at=at) == usd


@pytest.mark.parametrize(
    ("model", "day"), [("o1-mini", date(2025, 1, 31)), ("o1", date(2024, 12, 16))]
)
def test_dates_outside_the_rows_are_not_guessed(model: str, day: date) -> None:
    with pytest.raises(PriceNotEffectiveError, match=str(day)):
        CALCULATOR.calculate(model, 1, 1, at=day)


@pytest.mark.parametrize("model", ["claude-3-5-haiku", "gpt-4"])
@pytest.mark.parametrize(
    ("at", "named"),
    [
        (datetime(2024, 12, 3), "has no time zone; use datetime"),  # 動かす場所で単価が変わる
        ("2024-12-03", "at must be a date or a datetime, got '2024-12-03'"),
    ],
)
def test_a_time_that_could_mean_two_days_is_refused(model: str, at: Any, named: str) -> None:
    with pytest.raises(CostError, match=named):
        CALCULATOR.calculate(model, 1, 1, at=at)


@pytest.mark.parametrize(
    ("tier", "usage", "want"),
    [
        (None, (1_000_000, 100_000), "3.5"),
        ("default", (1_000_000, 100_000), "3.5"),
        ("batch", (1_000_000, 100_000), "1.75"),
        ("priority", (1_000_000, 100_000), "5.95"),
        (" Priority ", (1_000_000, 0, 1_000_000), "2.125"),
    ],
)
def test_service_tiers(tier: str | None, usage: tuple[int, ...], want: str) -> None:
    item = CALCULATOR.price("gpt-4o", *usage, service_tier=tier)
    assert item.total_usd == Decimal(want)
    assert item.service_tier == ("" if tier in (None, "default") else str(tier).strip().lower())


@pytest.mark.parametrize("tier", ["flex", "scale", "priority "])
def test_a_tier_without_a_price_is_never_the_standard_price(tier: str) -> None:
    with pytest.raises(NoPriceError, match=f"no {tier.strip()} price in the row of 'o1'"):
        CALCULATOR.calculate("o1", 1000, 100, service_tier=tier)
    item = CostCalculator(on_unknown="unpriced").price("o1", 1000, 100, service_tier=tier)
    assert (item.status, item.service_tier, item.total_usd.is_nan()) == (
        "unpriced", tier.strip(), True,
    )  # fmt: skip
    with pytest.raises(InvalidUsageError, match="contradict"):
        CALCULATOR.calculate("gpt-4o", 1, 1, service_tier=tier, batch=True)


def test_what_a_table_cannot_express_is_unpriced() -> None:
    units = {"input_audio_tokens": 90, "web_searches": 0}
    with pytest.raises(NoPriceError, match=r"no price for input_audio_tokens$"):
        CALCULATOR.calculate("gpt-4o", 100, 1, other_units=units)
    assert CALCULATOR.calculate("gpt-4o", 100, 1, other_units={"web_searches": 0}) > 0


def test_one_hour_cache_writes() -> None:
    """1 時間の書き込みは、単価がなければ 5 分の 1.6 倍(Anthropic の規則)。"""
    usage: dict[str, Any] = {"cache_write_tokens": 10**6, "cache_write_1h_tokens": 10**6}
    assert CALCULATOR.price("claude-3-5-sonnet", 10**6, 0, **usage).total_usd == 6
    row = {"input": 10, "output": 0, "cache_write": "12.50"}
    calculator = CostCalculator({"models": {"m": row}})
    assert calculator.calculate("m", 10**6, 0, **usage) == 20.0
    batch = calculator.table.with_overrides({"models": {"m": {**row, "batch_input": 5,
        "batch_output": 0, "batch_cache_write": "6.25"}}})  # fmt: skip
    assert CostCalculator(batch).calculate("m", 10**6, 0, batch=True, **usage) == 10.0


def test_every_price_of_a_row_can_be_said() -> None:
    """長い入力の段の書き込み、バッチのキャッシュ、段ごとの優先の単価。"""
    rates = {"input": 4, "output": 16, "cached_input": 2, "cache_write": 5, "cache_write_1h": 8}
    tier = {**rates, "above_input_tokens": 200_000, "batch_input": 2, "batch_output": 8,
            "service_tiers": {"priority": {**rates, "cache_write": 7}}}  # fmt: skip
    row = {"input": 2, "output": 8, "batch_input": 1, "batch_output": 4, "batch_cached_input": 0.1}
    calculator = CostCalculator({"models": {"m": {**row, "tiers": [tier]}}})
    cases: list[tuple[int, dict[str, Any], str]] = [
        (200_001, {"cache_write_tokens": 200_001}, "1.000005"),
        (200_001, {"cache_write_tokens": 200_001, "cache_write_1h_tokens": 200_001}, "1.600008"),
        (200_001, {"cache_write_tokens": 200_001, "service_tier": "priority"}, "1.400007"),
        (200_001, {"cached_input_tokens": 200_001}, "0.400002"),
        (1000, {"cached_input_tokens": 1000, "batch": True}, "0.0001"),
        (200_001, {"batch": True}, "0.400002"),
    ]
    for tokens, options, want in cases:
        assert calculator.price("m", tokens, 0, **options).total_usd == Decimal(want)


def test_the_names_of_service_tiers_are_not_case_sensitive() -> None:
    rates = {"input": 4, "output": 16}
    row = {"input": 2, "output": 8, "service_tiers": {"Priority": rates}}
    calculator = CostCalculator(
        {"models": {"m": {**row, "tiers": [{**row, "above_input_tokens": 9}]}}}
    )
    for tokens in (1, 10):
        assert calculator.price("m", tokens, 0, service_tier="PRIORITY").priced
    with pytest.raises(PriceTableError, match=r"m\.service_tiers: "):
        PriceTable.from_mapping({"models": {"m": {**row, "batch_input": 1, "service_tiers": 5}}})


def test_the_throughput_of_a_bedrock_name_is_no_part_of_the_model() -> None:
    rows = {"us.vendor.m-v1": {"input": 3, "output": 3}, "vendor.n-v2:0": {"input": 2, "output": 2}}
    calculator = CostCalculator({"models": rows})
    found = {
        name: calculator.price(name, 1, 1).matched_model
        for name in ("bedrock/us.vendor.m-v1:0", "us.vendor.m-v1:0:200k", "eu.vendor.n-v2:0")
    }
    assert list(found.values()) == ["us.vendor.m-v1", "us.vendor.m-v1", "vendor.n-v2:0"]


def test_the_most_specific_row_wins_at_every_step_of_the_name() -> None:
    rows = {
        "vendor.model-v1:0": {"input": 3, "output": 3},
        "us.vendor.model-v1:0": {"input": 3.3, "output": 3},
        "claude-x": {"input": 5, "output": 5},
        "anthropic.claude-x": {"input": 6, "output": 6},
    }
    calculator = CostCalculator({"models": rows})
    arn = "arn:aws:bedrock:us-east-1:1:inference-profile/"
    for name, usd in {
        "vendor.model-v1:0": 3.0,
        "us.vendor.model-v1:0": 3.3,
        "bedrock/us.vendor.model-v1:0": 3.3,
        "bedrock/converse/us.vendor.model-v1:0": 3.3,
        f"{arn}us.vendor.model-v1:0": 3.3,
        f"{arn}eu.vendor.model-v1:0": 3.0,
        "us.anthropic.claude-x-v1:0": 6.0,
        "anthropic/claude-x": 5.0,
    }.items():
        assert calculator.calculate(name, 10**6, 0) == usd, name


@pytest.mark.parametrize("model", ["gpt-5", "claude-3-7-sonnet", "gemini-2.0-flash", "o3-mini"])
def test_an_unknown_model_names_the_tables_date_and_the_command(model: str) -> None:
    with pytest.raises(UnknownModelError, match=r"2024-12 \(as of 2024-12-31\)") as error:
        CALCULATOR.calculate(model, 1, 1)
    assert "chapter8_samples.cost_tracking prices import genai-prices -o" in str(error.value)
    assert error.value.suggestions == ()  # 世代の違うモデルを勧めない


def test_no_suggestion_for_a_fine_tuned_model() -> None:
    for name in ("ft:gpt-4o-mini-2024-07-18:acme::abc", "openai/ft:gpt-4o-mini", "ft:gpt-4o-mini"):
        with pytest.raises(UnknownModelError) as error:
            CALCULATOR.calculate(name, 1, 1)
        assert error.value.suggestions == ()


def test_numpy_integers() -> None:
    import numpy as np

    one = np.int64(1)
    item = CALCULATOR.price("gpt-4o", np.int64(1000), np.uint8(50), np.int32(800))  # pyright: ignore
    assert item == CALCULATOR.price("gpt-4o", 1000, 50, 800)
    assert type(item.input_tokens) is int
    for wrong in (-one, np.float64(1), np.bool_(True), np.array([5]), np.array([5, 6])):
        with pytest.raises(InvalidUsageError, match="must be an integer >= 0"):
            CALCULATOR.calculate("gpt-4o", wrong, 1)  # pyright: ignore


def test_pricing_adds_to_the_default_table() -> None:
    calculator = CostCalculator(pricing={"models": {"gpt-5": {"input": 1.25, "output": 10}}})
    assert calculator.calculate("gpt-5", 10**6, 0) == 1.25
    assert calculator.calculate("gpt-4o", 10**6, 0) == 2.5
    assert calculator.table.as_of == date(2024, 12, 31)


@pytest.mark.parametrize(
    "pricing",
    [
        {"gpt-5": {"input": 1.25, "output": 10}},  # 料金ページの 100 万トークンあたりの単価
        {"gpt-5-mini": {"input": 0.25, "output": 2}},
        {"gpt-4o-mini": {"input": 0.15, "output": 0.6}},
        {"models": {"gpt-4o": {"input": 0.0025, "output": 0.01}}},  # 本書の 1,000 トークンあたり
        {"models": {"gpt-4o": {"input": 2.5e-06, "output": 1e-05}}},  # litellm の 1 トークンあたり
        {"models": {"gpt-5": {"input": 1.25e-06, "output": 1e-05}}},
        {"models": {"gpt-5": {"input": 0.00125, "output": 0.01}}},
        {"gpt-5": {"input": 1.25e-06, "output": 1e-05}},
    ],
)
def test_a_unit_that_gives_an_absurd_price_is_refused(pricing: dict[str, Any]) -> None:
    with pytest.raises(PriceTableError, match=r"per 1M tokens.*check the .*unit"):
        CostCalculator(pricing=pricing)


def test_history_is_kept_by_an_override_from_a_date() -> None:
    """新しい単価の行だけを足しても、5 月の呼び出しは元の行で計算できる。"""
    cut = {"input": 2, "output": 8, "effective_from": "2025-06-01"}
    table = TABLE.with_overrides({"models": {"gpt-4o": cut, "claude-3-5-haiku": cut}})
    calculator = CostCalculator(table)
    for model, day, usd in (
        ("gpt-4o", date(2025, 5, 31), 2.5),
        ("gpt-4o-2024-08-06", date(2025, 6, 1), 2.0),
        ("claude-3-5-haiku", date(2024, 12, 2), 1.0),
        ("claude-3-5-haiku", date(2025, 5, 31), 0.8),
        ("claude-3-5-haiku", None, 2.0),
    ):
        assert calculator.calculate(model, 10**6, 0, at=day) == usd
    later = table.with_overrides({"models": {"gpt-4o": {**cut, "effective_from": "2999-01-01"}}})
    assert CostCalculator(later).calculate("gpt-4o", 10**6, 0) == 2.0  # まだ始まっていない


def test_a_price_that_has_not_begun_is_not_todays() -> None:
    row = {"input": 1, "output": 1}
    two = [
        {**row, "effective_from": "2998-01-01", "effective_to": "2999-01-01"},
        {**row, "effective_from": "2999-01-01"},
    ]
    for rows in (two, two[:1]):
        with pytest.raises(PriceNotEffectiveError, match="2998-01-01 to 2999-01-01"):
            CostCalculator({"models": {"m": rows}}).calculate("m", 1, 1)


def test_the_calculator_needs_neither_pydantic_nor_mlflow() -> None:
    code = (
        "import sys; from chapter8_samples.cost_tracking import CostCalculator;"
        "CostCalculator().calculate('gpt-4o', 1, 1);"
        "print({'pydantic', 'mlflow', 'yaml', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@given(st.text(st.characters(codec="ascii"), max_size=60))
def test_the_spellings_of_any_name_get_no_longer(name: str) -> None:
    found = spellings(name)
    assert found[0] == name.strip().lower()
    assert [len(form) for form in found] == sorted((len(form) for form in found), reverse=True)


def test_batch() -> None:
    assert CALCULATOR.calculate("gpt-4o", 1000, 500, batch=True) == 0.00375
    with pytest.raises(NoPriceError, match="no batch price"):
        CALCULATOR.calculate("o1", 1, 1, batch=True)


def test_a_batch_of_long_inputs_is_not_priced_as_short_ones() -> None:
    row = {"input": 2, "output": 8, "batch_input": 1, "batch_output": 4}
    tiers = [{"above_input_tokens": 1000, "input": 4, "output": 16}]
    calculator = CostCalculator({"models": {"m": {**row, "tiers": tiers}}})
    assert calculator.calculate("m", 1000, 0, batch=True) == 0.001
    with pytest.raises(NoPriceError, match="no batch price"):
        calculator.calculate("m", 1001, 0, batch=True)


def test_unpriced_is_visible_and_never_zero() -> None:
    calculator = CostCalculator(on_unknown="unpriced")
    assert math.isnan(calculator.calculate("my-model", 1000, 500))
    item = calculator.price("my-model", 1000, 500)
    assert not item.priced
    assert item.total_usd.is_nan()
    assert "my-model" in item.reason


@pytest.mark.parametrize(
    ("usage", "named"),
    [
        ({"input_tokens": -1}, "input_tokens must be an integer >= 0, got -1"),
        ({"output_tokens": True}, "output_tokens must be an integer >= 0, got True"),
        ({"input_tokens": 1.5}, "got 1.5"),
        ({"output_tokens": math.nan}, "output_tokens must be .*nan"),
        ({"output_tokens": None}, "output_tokens must be .*None"),
        ({"input_tokens": "10"}, "'10'"),
        ({"cached_input_tokens": 200}, "exceeds input_tokens"),
        ({"cached_input_tokens": 60, "cache_write_tokens": 60}, "60 \\+ 60"),
        ({"cache_write_1h_tokens": 1}, "exceeds cache_write_tokens"),
    ],
)
def test_impossible_usage_names_the_value(usage: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"input_tokens": 100, "output_tokens": 1, **usage}
    with pytest.raises(InvalidUsageError, match=named):
        CALCULATOR.calculate("gpt-4o", **arguments)


TOKENS = st.integers(0, 2_000_000)
MODELS = st.sampled_from(sorted(TABLE.rows))


@given(MODELS, TOKENS, TOKENS, st.floats(0, 1), st.floats(0, 1))
def test_equal_to_an_independent_fraction(
    model: str, prompt: int, output: int, read_share: float, write_share: float
) -> None:
    """有理数で書き下した規則と、最後の桁まで一致する。"""
    read = int(prompt * read_share)
    write = int((prompt - read) * write_share)
    row = TABLE.rows[model][-1]
    prices: Any = row
    for tier in row.tiers:
        prices = tier if prompt > tier.above_input_tokens else prices
    cached = row.input if prices.cached_input is None else prices.cached_input
    if prices is row and row.cached_input is None:
        cached = row.input
    written = prices.input if row.cache_write is None else row.cache_write
    want = (
        (prompt - read - write) * Fraction(prices.input)
        + read * Fraction(cached)
        + write * Fraction(written)
        + output * Fraction(prices.output)
    ) / 10**6
    item = CALCULATOR.price(model, prompt, output, read, cache_write_tokens=write)
    assert Fraction(item.total_usd) == want
    again = CALCULATOR.calculate(model, prompt, output, read, cache_write_tokens=write)
    assert again == float(want)


@given(MODELS, TOKENS, TOKENS, TOKENS)
def test_more_tokens_never_cost_less(model: str, prompt: int, output: int, more: int) -> None:
    before = CALCULATOR.price(model, prompt, output).total_usd
    assert CALCULATOR.price(model, prompt + more, output).total_usd >= before
    assert CALCULATOR.price(model, prompt, output + more).total_usd >= before


@given(st.integers(1, 200_000), st.floats(0, 1))
def test_caching_never_costs_more(prompt: int, share: float) -> None:
    cached = int(prompt * share)
    for model in ("gpt-4o", "claude-3-5-sonnet", "gemini-1.5-pro", "gpt-4"):
        full = CALCULATOR.price(model, prompt, 0).total_usd
        assert CALCULATOR.price(model, prompt, 0, cached).total_usd <= full


@given(st.text(max_size=40))
def test_any_text_is_priced_exactly_or_refused(name: str) -> None:
    try:
        item = CALCULATOR.price(name, 1, 1)
    except UnknownModelError:
        return
    known = {*TABLE.rows, *TABLE.aliases}
    assert known & {*spellings(name)} and item.matched_model in TABLE.rows


def test_a_million_small_calls_add_up_exactly() -> None:
    item = CALCULATOR.price("gpt-4o-mini", 1, 1)
    assert sum([item.total_usd] * 1_000_000) == Decimal("0.75")


def test_agrees_with_mlflows_own_catalog_where_it_has_the_model() -> None:
    """独立した相手: MLflow に同梱の料金カタログ(3.18 は、ほかの行で 1.1 倍の地域料金を返す)。"""
    from mlflow.utils import providers

    for model in ("gpt-4o", "gpt-4o-mini", "gpt-4o-2024-05-13"):
        theirs = providers.cost_per_token(model, 1200, 300, cache_read_input_tokens=1024)
        if theirs is None:
            continue
        read = 1024 if TABLE.rows[model][-1].cached_input is not None else 0
        ours = CALCULATOR.price(model, 1200, 300, read)
        assert (float(ours.prompt_usd), float(ours.output_usd)) == pytest.approx(theirs), model


# genai-prices と違うことが分かっている行と、その理由(2024 年 12 月の公開料金ではこちらが正しい)
GENAI_DIFFERS = {
    "o1-mini": "値下げ後の 1.10/4.40 しか持たない",
    "gemini-1.5-flash-8b": "名前の一部が同じ gemini-1.5-flash として計算する",
}
GENAI_WITHOUT_CACHE_PRICE = {"gemini-1.5-pro", "gemini-1.5-flash"}


@pytest.mark.slow
@given(st.sampled_from(sorted(set(TABLE.rows) - set(GENAI_DIFFERS))), TOKENS, TOKENS, st.data())
def test_agrees_with_genai_prices(model: str, prompt: int, output: int, data: Any) -> None:
    """独立した相手: genai-prices。10 進数の最後の桁まで比べる。"""
    import genai_prices as genai

    row, at = TABLE.rows[model][-1], datetime(2024, 12, 20, tzinfo=timezone.utc)
    cacheable = row.cached_input is not None and model not in GENAI_WITHOUT_CACHE_PRICE
    read = data.draw(st.integers(0, prompt)) if cacheable else 0
    write = data.draw(st.integers(0, prompt - read)) if row.cache_write is not None else 0
    output = 0 if "embedding" in model else output
    usage = {"input_tokens": prompt, "output_tokens": output}
    usage |= {"cache_read_tokens": read} if read else {}
    usage |= {"cache_write_tokens": write} if write else {}
    theirs = genai.calc_price(
        genai.Usage(**usage), model, provider_id=row.provider, genai_request_timestamp=at
    )
    ours = CALCULATOR.price(model, prompt, output, read, cache_write_tokens=write, at=at)
    assert ours.total_usd == theirs.total_price


def test_own_prices_in_the_form_of_the_book(tmp_path: Path) -> None:
    """本書の形は USD / 1,000 トークン。"""
    book = {"gpt-4o": {"input": 0.0025, "output": 0.01, "cached_input": 0.00125}}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(book), encoding="utf-8")
    for calculator in (CostCalculator(book), CostCalculator(pricing_file=path)):
        assert calculator.price("gpt-4o", 1200, 300, 1024).total_usd == Decimal("0.00472")


def test_own_prices_by_date_and_alias(tmp_path: Path) -> None:
    row = {"input": 1, "output": 2, "effective_to": "2024-12-03"}
    later = {"input": 0.5, "output": 1.5, "effective_from": "2024-12-03", "aliases": ["my-alias"]}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"models": {"my-model": [row, later]}}), encoding="utf-8")
    calculator = CostCalculator(pricing_file=path)
    assert calculator.calculate("my-alias", 10**6, 0, at=date(2024, 12, 2)) == 1.0
    assert calculator.calculate("my-model", 10**6, 0) == 0.5


def test_overrides_keep_the_other_rows() -> None:
    table = TABLE.with_overrides({"models": {"gpt-4o": {"input": "2.75", "output": "11"}}})
    calculator = CostCalculator(table)
    assert calculator.calculate("gpt-4o-2024-08-06", 10**6, 0) == 2.75
    assert calculator.calculate("gpt-4o-mini", 10**6, 0) == 0.15
    assert CALCULATOR.calculate("gpt-4o", 10**6, 0) == 2.5  # 元の表は変わらない


def test_deployment_names_by_alias() -> None:
    calculator = CostCalculator(aliases={"My-Deployment": "gpt-4o-mini-2024-07-18"})
    item = calculator.price("azure/my-deployment", 10**6, 0)
    assert (item.matched_model, item.match_kind) == ("gpt-4o-mini", "alias")
    with pytest.raises(UnknownModelError):
        CostCalculator(aliases={"x": "no-such-model"})


def test_an_alias_with_a_prefix_does_not_change_the_plain_name() -> None:
    """Azure のデプロイだけに付けた単価が、ほかの提供元の同じ名前に及ばない。"""
    regional = {"input": "2.75", "output": "11", "aliases": ["azure/gpt-4o"]}
    by_file = TABLE.with_overrides({"models": {"gpt-4o-azure-eu": regional}})
    by_alias = TABLE.with_aliases({"azure/gpt-4o": "gpt-4o-2024-05-13"})
    for table, want in ((by_file, "gpt-4o-azure-eu"), (by_alias, "gpt-4o-2024-05-13")):
        calculator = CostCalculator(table)
        names = ("Azure/GPT-4o", "gpt-4o", "openai/gpt-4o", "gpt-4o-2024-08-06")
        found = [calculator.price(name, 1, 1).matched_model for name in names]
        assert found == [want, "gpt-4o", "gpt-4o", "gpt-4o"]


def test_an_alias_with_a_prefix_is_found_without_it_where_it_is_clear() -> None:
    aliases = {"azure/my-bot": "gpt-4o", "azure/two": "gpt-4o", "openai/two": "gpt-4o-mini"}
    calculator = CostCalculator(aliases=aliases)
    assert calculator.price("my-bot", 1, 1).matched_model == "gpt-4o"
    for name in ("two", "openai/my-bot"):
        with pytest.raises(UnknownModelError):
            calculator.price(name, 1, 1)


def test_an_empty_table_stays_empty() -> None:
    with pytest.raises(UnknownModelError):
        CostCalculator(pricing={}).calculate("gpt-4o", 1, 1)


def test_all_mistakes_of_a_table_are_listed_at_once() -> None:
    row = {"input": 1, "output": 1}
    bad = {
        "unit": "per_token",
        "models": {
            "a": {"input": [], "output": True, "outptu": 3},
            "b": {"input": "abc"},
            "c": [{**row, "effective_from": "2024-13-01"}, {**row, "batch_input": 1}],
            "d": 5,
            "e": {**row, "input": float("nan"), "tiers": [{"above_input_tokens": "x"}, 7]},
            "f": {**row, "aliases": "my-alias", "tiers": {"input": 1}},
            "g": [],
            "h": {**row, "aliases": ["A", "x", "k"], "tiers": [{**row, "above_input_tokens": 0}]},
            "i": row,
            "o": {**row, "aliases": ["x"]},
            "I": [row, {"input": 2, "output": 2}],
            "j": {**row, "tiers": [{**row, "above_input_tokens": 9}] * 2},
            "k": {**row, "effective_from": "2025-02-01", "effective_to": "2025-01-01"},
            "l": {"input": -1, "output": 1, "service_tiers": {"flex": {"input": 1}}},
            "m": {"input": -1, "output": 1e9, "batch_input": 1, "batch_output": -2},
            "n": {**row, "effective_from": "2024/12/03", "chached_input": 1},
        },
    }
    with pytest.raises(PriceTableError) as error:
        PriceTable.from_mapping(bad)
    text = "\n".join(error.value.problems)
    for want in (
        "unit: ", "'per_token'", "a.input: ", "a.output: ", "a.outptu: unknown key",
        "b.input: ", "'abc'", "b.output: Field required", "c.effective_from: ", "'2024-13-01'",
        "c.service_tiers.batch.output: Field required", "d: ", "got 5", "e.input: ", "got nan",
        "e.tiers.above_input_tokens: ", "e.tiers: ", "got 7", "f.aliases: ", "'my-alias'",
        "f.tiers: ", "g: no rows", "h.aliases: 'k' is another model", "h.tiers.above_input_tokens",
        "o.aliases: 'x' is already 'h'", "i: given twice", "i: rows overlap",
        "j.tiers.above_input_tokens: [9, 9]", "k: effective_to is not after effective_from",
        "l.service_tiers.flex.output: Field required", "m.input: -1 USD", "m.output: 1000000000",
        "m.output: -2 USD", "n.effective_from: ", "n.chached_input: unknown key",
    ):  # fmt: skip
        assert want in text, text


def test_a_misspelt_key_of_a_file_is_named(tmp_path: Path) -> None:
    """単位の綴りが違えば、1,000 倍の差になる。下線で始まる鍵は覚え書き。"""
    path = tmp_path / "prices.json"
    row = {"input": 1, "output": 2}
    data = {"_meta": {"note": "ok"}, "units": "per_1k_tokens", "models": {"a": row}}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PriceTableError) as error:
        PriceTable.from_file(path)
    assert error.value.problems == ("units: unknown key",)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"m": ', "Expecting value"),
        ("[]", "expected a mapping, got list"),
        ('{"m": {"input": 1, "output": 2, "input": 3}}', "'input' is given twice"),
        ('{"m": {"input": 1, "output": 1}, "m": {"input": 2, "output": 1}}', "'m' is given twice"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    """読み取りの部品は、2 度書かれた鍵の最後の値だけを黙って残す。"""
    path = tmp_path / "prices.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PriceTableError) as error:
        CostCalculator(pricing_file=path)
    assert error.value.problems[0].startswith(f"{path}: {why}")


def test_prices_that_are_not_there_are_named(tmp_path: Path) -> None:
    for missing in (tmp_path / "prices.json", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            CostCalculator(pricing_file=missing)
        assert str(error.value).startswith(f"{missing}: no such price file; today's prices: python")
    odd: Any = ["gpt-4o"]
    with pytest.raises(PriceTableError, match=r"expected a mapping of models, got \['gpt-4o'\]"):
        CostCalculator(pricing=odd)


def test_a_file_saved_by_notepad(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"m": {"input": 0.001, "output": 0.002}}', encoding="utf-8-sig")
    assert CostCalculator(pricing_file=path).calculate("m", 1000, 0) == 0.001


def test_overlapping_rows_are_refused() -> None:
    rows = [{"input": 1, "output": 1}, {"input": 2, "output": 2, "effective_from": "2024-12-03"}]
    with pytest.raises(PriceTableError, match="rows overlap"):
        PriceTable.from_mapping({"models": {"m": rows}})


def test_conflicting_arguments(tmp_path: Path) -> None:
    with pytest.raises(CostError, match="not both"):
        CostCalculator({}, tmp_path / "x.json")
    with pytest.raises(CostError, match="on_unknown"):
        CostCalculator(on_unknown="zero")  # pyright: ignore[reportArgumentType]


def test_names_from_outside_do_not_grow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PriceTable.from_mapping({"models": {"m": {"input": 1, "output": 1}}})
    monkeypatch.setattr(table_module, "_CACHE_LIMIT", 64)
    for i in range(150):
        assert table.resolve(f"M{' ' * i}").name == "m"
    assert vars(table)["_look_up_once"].cache_info().currsize == 64


def test_an_unknown_model_is_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """近い名前を探すのは遅い。料金未定のモデルの、すべての呼び出しで待たせない。"""
    searched: list[str] = []

    def search(name: str, *_: Any) -> list[str]:
        searched.append(name)
        return ["gpt-4o"]

    calculator = CostCalculator(on_unknown="unpriced")
    monkeypatch.setattr(difflib, "get_close_matches", search)
    for _ in range(3):
        assert "did you mean: gpt-4o" in calculator.price("openai/my-model", 1, 1).reason
    assert not calculator.price("x" * 1000, 1, 1).priced
    assert searched == ["my-model"]


def test_yen() -> None:
    assert format_yen(0.0075, 150) == "1.125 円"
    assert format_yen(Decimal("12345.6"), 150) == "1,851,840 円"
    assert format_yen(math.nan, 150) == "料金未定"  # 未計算の金額を 0 円にも例外にもしない


def test_a_calculator_that_has_calculated_can_be_sent_to_another_process() -> None:
    calculator = CostCalculator()
    expected = calculator.calculate("gpt-4o", 1000, 500)
    assert pickle.loads(pickle.dumps(calculator)).calculate("gpt-4o", 1000, 500) == expected
