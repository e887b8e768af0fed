"""今の料金の取り込み: genai-prices と litellm との一致、名前、運べない単価、コマンド。

genai-prices と litellm は ``pip install -e ".[ci]"`` で入る。これらの要るテストは slow に置く。
"""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples._lab.doctor import checks
from chapter8_samples.cost_tracking import (
    CostCalculator,
    NoPriceError,
    PriceTable,
    PriceTableError,
    UnknownModelError,
)
from chapter8_samples.cost_tracking.__main__ import main
from chapter8_samples.cost_tracking.prices import sources
from chapter8_samples.cost_tracking.prices.sources import import_prices

LITELLM = Path(__file__).with_name("litellm_excerpt.json")
LENGTHS = (0, 1, 128_000, 128_001, 199_999, 200_000, 200_001, 272_000, 272_001, 1_000_000)
CONTEXTS: dict[str, dict[str, str] | None] = {
    "": None,
    "batch": {"processing": "batch"},
    "priority": {"service_tier": "priority"},
    "flex": {"service_tier": "flex"},
}


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> CostCalculator:
    path = tmp_path_factory.mktemp("prices") / "prices.json"
    import_prices("genai-prices").write(path)
    return CostCalculator(pricing_file=path)


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> CostCalculator:
    path = tmp_path_factory.mktemp("prices") / "prices.json"
    import_prices(str(LITELLM)).write(path)
    return CostCalculator(pricing_file=path)


def random_usage(dice: random.Random) -> dict[str, Any]:
    """ありうる使用量。長さの段の境目と、1 時間の書き込みも混ぜる。"""
    total = dice.choice((*LENGTHS, dice.randrange(5000), dice.randrange(2_000_000)))
    read = dice.choice((0, dice.randrange(total + 1)))
    write = dice.choice((0, dice.randrange(total - read + 1)))
    hour = dice.choice((0, dice.randrange(write + 1)))
    output = dice.randrange(100_000)
    return {
        "input_tokens": total,
        "output_tokens": output,
        "cached_input_tokens": read,
        "cache_write_tokens": write,
        "cache_write_1h_tokens": hour,
    }


@pytest.mark.slow
def test_every_model_of_genai_prices_costs_the_same(genai: CostCalculator) -> None:
    """2 年分の日付、処理の段、2,000 件より多い使用量で、最後の桁まで一致する。

    違うのは、1 時間の書き込みの単価がない Claude の行だけ。genai-prices は 5 分の単価で数えるが、
    Anthropic の規則は 1.6 倍で、こちらが正しい。
    """
    from genai_prices import Usage
    from genai_prices.data import providers

    dice, names = random.Random(14), {"cached_input_tokens": "cache_read_tokens"}
    compared, differ, refused = 0, dict[str, Any](), set[str]()
    pairs = [(provider, model) for provider in providers for model in provider.models]
    for provider, model in [*pairs, *dice.choices(pairs, k=2000)]:
        name, usage = f"{provider.id}/{model.id}", random_usage(dice)
        at = datetime(2024, 12, 1, tzinfo=timezone.utc) + timedelta(days=dice.randrange(730))
        tier = dice.choice(["", *active_tiers(model, at)])
        try:
            ours = genai.price(name, **usage, service_tier=tier, at=at).total_usd
        except NoPriceError as error:
            refused.add(str(error).partition(": ")[2])
            continue
        theirs = model.calc_price(
            Usage(**{names.get(key, key): count for key, count in usage.items() if count}),
            provider,
            genai_request_timestamp=at,
            price_context=CONTEXTS[tier],
        )
        compared += 1
        hour = getattr(theirs.model_price, "cache_write_1h_mtok", None)
        if ours != theirs.total_price and ("claude" not in name or hour is not None):
            differ[name] = (usage, tier, at, ours, theirs.total_price)
    assert compared > 2000
    assert not differ, [(n, d[2:]) for n, d in differ.items()]
    assert refused == {sources.NO_TOKENS, sources.FEE, sources.TIME}


def active_tiers(model: Any, at: datetime) -> list[str]:
    """その日に単価のある処理の段。"""
    variants = [
        item.when
        for item in getattr(model, "price_variants", None) or ()
        if item.constraint is None or item.constraint.active(at)
    ]
    return [tier for tier, context in CONTEXTS.items() if context in variants]


LITELLM_COSTS = [  # litellm 1.110.2 の計算: (入力、出力、読み込み、書き込み、1 時間)、段、USD
    ("gpt-4o", (1000000, 100000, 0, 0, 0), "", 3.5),
    ("gpt-4o", (1000000, 100000, 0, 0, 0), "priority", 5.95),
    ("gpt-4o", (1200, 300, 1024, 0, 0), "priority", 0.008024),
    ("gpt-4o-2024-05-13", (1200, 300, 0, 0, 0), "", 0.0105),
    ("gpt-5", (1200, 300, 1024, 0, 0), "flex", 0.001674),
    ("gpt-5.4", (272000, 300, 1024, 0, 0), "", 0.682196),
    ("gpt-5.4", (272001, 300, 1024, 0, 0), "", 1.362147),
    ("gpt-5.4", (272001, 300, 1024, 0, 0), "flex", 0.6810735),
    ("gpt-6-astra", (300000, 300, 1000, 2000, 0), "priority", 12.029),
    ("text-embedding-3-small", (80, 0, 0, 0, 0), "", 1.6e-06),
    ("claude-sonnet-4-5-20250929", (2600, 50, 2000, 500, 0), "", 0.003525),
    ("claude-sonnet-4-5-20250929", (2600, 50, 2000, 500, 400), "", 0.004425),
    ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", (200001, 50, 2000, 500, 400), "", 1.3121691),
    ("gemini-2.5-pro", (200000, 100, 50, 0, 0), "", 0.25094375),
    ("gemini-2.5-pro", (200001, 100, 50, 0, 0), "", 0.50139),
    ("gemini-2.5-pro", (200001, 100, 50, 0, 0), "priority", 0.902502),
    ("mistral/mistral-large-latest", (1000, 100, 0, 0, 0), "", 0.00065),
    ("dashscope/qwen3-coder-plus", (32000, 100, 1000, 0, 0), "", 0.0316),
    ("dashscope/qwen3-coder-plus", (300000, 100, 1000, 0, 0), "", 1.8006),
    ("xai/grok-4.20-multi-agent-beta-0309", (199999, 100, 5, 0, 0), "", 0.2502435),
    ("xai/grok-4.20-multi-agent-beta-0309", (200000, 100, 5, 0, 0), "", 0.5004895),
    ("azure/gpt-4o", (1000, 100, 500, 0, 0), "", 0.002875),
    (
        "databricks/databricks-gemini-3-1-pro",
        (272000, 14519, 141267, 98751, 0),
        "priority",
        1.44737646732,
    ),
]


@pytest.mark.parametrize(("model", "usage", "tier", "usd"), LITELLM_COSTS)
def test_costs_of_litellm(
    litellm: CostCalculator, model: str, usage: tuple[int, ...], tier: str, usd: float
) -> None:
    total, output, read, write, hour = usage
    ours = litellm.calculate(
        model, total, output, read,
        cache_write_tokens=write, cache_write_1h_tokens=hour, service_tier=tier,
    )  # fmt: skip
    assert ours == pytest.approx(usd, rel=1e-9)


@pytest.mark.slow
def test_every_model_of_litellm_costs_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """違うのは、1 時間の単価がない Claude、キャッシュを半額とする Fireworks、入力が 0 の段だけ。

    段のある行で入力が 0 だと、litellm はどの段も選ばず 0 ドルにする(こちらは最初の段)。
    """
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.delitem(sys.modules, "litellm")
    them: Any = pytest.importorskip(
        "litellm", reason="pip install litellm to compare all its models"
    )
    from litellm.litellm_core_utils.llm_cost_calc import utils  # pyright: ignore

    import_prices("litellm").write(tmp_path / "prices.json")
    calculator = CostCalculator(pricing_file=tmp_path / "prices.json", on_unknown="unpriced")
    dice, compared, differ = random.Random(14), 0, dict[str, Any]()
    costs: dict[str, dict[str, Any]] = them.model_cost
    for tier, (name, row) in product(("", "flex"), costs.items()):
        usage = random_usage(dice)
        ours = calculator.price(name, **usage, service_tier=tier)
        if name.lower() not in calculator.table.rows or not ours.priced:
            continue
        total, output, read, write, hour = usage.values()
        split = {"ephemeral_5m_input_tokens": write - hour, "ephemeral_1h_input_tokens": hour}
        details = them.types.utils.PromptTokensDetailsWrapper(
            cached_tokens=read,
            cache_creation_tokens=write,
            cache_creation_token_details=them.types.utils.CacheCreationTokenDetails(**split),
        )
        theirs = utils.generic_cost_per_token(  # pyright: ignore
            name,
            them.Usage(
                prompt_tokens=total, completion_tokens=output, prompt_tokens_details=details
            ),
            row["litellm_provider"],
            service_tier=tier or None,
            model_info=row,
        )
        compared += 1
        no_hour = "claude" in name and "cache_creation_input_token_cost_above_1hr" not in row
        fireworks = row["litellm_provider"] == "fireworks_ai"
        no_tier = "tiered_pricing" in row and not total
        known = no_hour or fireworks or no_tier
        if float(ours.total_usd) != pytest.approx(sum(theirs)) and not known:
            differ[name] = (usage, tier, sum(theirs), ours.total_usd)
    assert compared > 2000
    assert not differ, [(n, d[2:]) for n, d in differ.items()]


@pytest.mark.slow
def test_bare_names_as_mlflow_records_them(genai: CostCalculator) -> None:
    """接頭辞付きの行が、裸の名前で引ける。再販の行と単価が違えば、作った会社の行になる。"""
    names = {
        "gpt-5": "openai/gpt-5",
        "gpt-5-2025-08-07": "openai/gpt-5",
        "openai:/gpt-5": "openai/gpt-5",
        "azure/gpt-5": "openai/gpt-5",
        "claude-sonnet-4-5-20250929": "anthropic/claude-sonnet-4-5",
        "anthropic/claude-sonnet-4-5-20250929": "anthropic/claude-sonnet-4-5",
        "claude-sonnet-4-5@20250929": "anthropic/claude-sonnet-4-5",
        "gemini/gemini-2.5-pro": "google/gemini-2.5-pro",
        "mistral-large-latest": "mistral/mistral-large",
        "us.anthropic.claude-sonnet-4-5-20250929-v1:0": (
            "aws/regional.anthropic.claude-sonnet-4-5-20250929-v1:0"
        ),
        "bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0": (
            "aws/regional.anthropic.claude-sonnet-4-5-20250929-v1:0"
        ),
        "arn:aws:bedrock:::x/eu.anthropic.claude-haiku-4-5-20251001-v1:0": (
            "aws/regional.anthropic.claude-haiku-4-5-20251001-v1:0"
        ),
        "bedrock/converse/us.amazon.nova-pro-v1:0": "aws/amazon.nova-pro-v1:0",
    }
    assert {name: genai.table.resolve(name).name for name in names} == names
    for unknown in ("gpt-5-2099-01-01", "gpt-5o", "ft:gpt-4o-2024-08-06:acme::x", "claude-sonnet"):
        with pytest.raises(UnknownModelError):
            genai.table.resolve(unknown)


def test_a_bare_name_does_not_take_the_price_of_a_reseller() -> None:
    """クラウドやルーターの単価は、その名前で呼んだときだけのもの。"""
    row = {"input": 2, "output": 2}
    resellers = (
        "azure",
        "azure_ai",
        "bedrock/us-east-1",
        "vertex_ai",
        "openrouter/meta",
        "github-copilot",
    )
    for reseller in resellers:
        table = PriceTable.from_mapping({"models": {f"{reseller}/llama-x": row}})
        with pytest.raises(UnknownModelError, match=f"did you mean: {reseller}/llama-x"):
            table.resolve("llama-x")
        assert table.resolve(f"{reseller}/llama-x").kind == "exact"
        both = table.with_overrides({"models": {"fast/llama-x": {"input": 3, "output": 3}}})
        assert both.resolve("llama-x").name == "fast/llama-x"


def test_a_bare_name_with_two_prices_is_not_guessed() -> None:
    rows = {"fast/llama-x": {"input": 1, "output": 1}, "slow/llama-x": {"input": 2, "output": 2}}
    table = PriceTable.from_mapping({"models": rows})
    with pytest.raises(UnknownModelError, match="fast/llama-x, slow/llama-x"):
        table.resolve("llama-x")
    table = PriceTable.from_mapping({"models": {**rows, "meta/llama-x": {"input": 3, "output": 3}}})
    assert table.resolve("llama-x").name == "meta/llama-x"
    assert table.resolve("fast/llama-x").name == "fast/llama-x"
    table = PriceTable.from_mapping({"models": {"perplexity/openai/x": {"input": 3, "output": 3}}})
    with pytest.raises(UnknownModelError):  # よその提供元が売る値段
        table.resolve("openrouter/openai/x")


@pytest.mark.slow
def test_history_is_carried(genai: CostCalculator) -> None:
    for day, usd in ((date(2025, 6, 9), 10.0), (date(2025, 6, 10), 2.0)):
        assert genai.calculate("o3", 10**6, 0, at=day) == usd
    for day, usd in ((date(2026, 3, 12), 10.0), (date(2026, 3, 13), 5.0)):
        assert genai.calculate("claude-opus-4-6", 10**6, 0, at=day) == usd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deepseek-chat", sources.TIME),
        ("perplexity/sonar", sources.FEE),
        ("whisper-large-v3", sources.NO_TOKENS),
    ],
)
def test_what_cannot_be_carried_is_unpriced(genai: CostCalculator, name: str, why: str) -> None:
    with pytest.raises(NoPriceError, match=why):
        genai.calculate(name, 1000, 100)
    quiet = CostCalculator(genai.table, on_unknown="unpriced")
    assert quiet.price(name, 1000, 100).total_usd.is_nan()


def test_what_litellm_cannot_say(litellm: CostCalculator) -> None:
    reasons = litellm.table.not_carried
    assert reasons == {
        "deepseek-v4-pro": sources.TIME,
        "perplexity/pplx-7b-online": sources.FEE,
        "ollama/llama3": "its price is 0 in litellm, which can mean unknown",
        "gpt-image-1.5": "its price is for image_generation",
    }
    assert litellm.table.resolve("azure_ai/claude-opus-latest").name == "azure_ai/claude-opus-5-5"
    with pytest.raises(UnknownModelError, match="did you mean: azure_ai/claude-opus-5-5"):
        litellm.table.resolve("claude-opus-latest")  # 再販の単価しかない


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prices", "import", "genai-prices", "-o", "prices.json"]) == 0
    told = capsys.readouterr().out
    assert "-> prices.json" in told
    for kind in ("audio prices", "image prices", "search prices", sources.TIME):
        assert kind in told
    told.encode("cp932")
    assert CostCalculator(pricing_file="prices.json").calculate("gpt-5", 10**6, 0) == 1.25
    (finding,) = checks.prices()
    assert finding.detail.startswith("genai-prices ")
    Path("bom.json").write_text(LITELLM.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert main(["prices", "import", "bom.json", "-o", "own.json"]) == 0
    assert CostCalculator(pricing_file="own.json").calculate("gpt-5", 10**6, 0) == 1.25


def test_the_doctor_shows_the_age_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (finding,) = checks.prices()
    assert (finding.level, "2024-12-31" in finding.detail) == ("ok", True)
    assert "prices import genai-prices -o prices.json" in finding.fix
    row = {"input": 1, "output": 1}
    Path("prices.json").write_text(
        json.dumps({"name": "mine", "as_of": "2025-01-01", "models": {"m": row}}), encoding="utf-8"
    )
    (finding,) = checks.prices()
    assert (finding.level, "mine の料金(2025-01-01、" in finding.detail) == ("warning", True)
    Path("prices.json").write_text("{", encoding="utf-8")
    (finding,) = checks.prices()
    assert finding.level == "error"


@pytest.mark.slow
def test_the_package_is_read_but_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from chapter8_samples.cost_tracking.__main__ import main;"
        f"main(['prices', 'import', 'genai-prices', '-o', r'{tmp_path / 'p.json'}']);"
        "print(sorted({'genai_prices', 'litellm', 'mlflow'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_path_to_the_json_of_either(tmp_path: Path) -> None:
    """リポジトリで配られている genai-prices の JSON は、data.py と同じ内容である。"""
    model = {
        "id": "gpt-x",
        "match": {"or": [{"equals": "gpt-x-1"}, {"starts_with": "gpt-x-mini"}]},
        "prices": [
            {"prices": {"input_mtok": 4, "output_mtok": 8}},
            {
                "constraint": {"start_date": "2026-01-01"},
                "prices": {
                    "input_mtok": {"base": 2, "tiers": [{"start": 1000, "price": 3}]},
                    "output_mtok": 6,
                    "input_audio_mtok": 9,
                },
            },
        ],
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "openai", "models": [model]}]), encoding="utf-8")
    found = import_prices(str(path))
    assert found.left_out == {"audio prices": ["openai/gpt-x"]}
    found.write(tmp_path / "prices.json")
    calculator = CostCalculator(pricing_file=tmp_path / "prices.json")
    for name, tokens, day, usd in (
        ("gpt-x", 1000, date(2025, 12, 31), 0.004),
        ("gpt-x-1", 1000, date(2026, 1, 1), 0.002),
        ("gpt-x-mini-2026-02-03", 2000, None, 0.006),
    ):
        assert calculator.calculate(name, tokens, 0, at=day) == usd
    with pytest.raises(UnknownModelError):
        calculator.calculate("gpt-x-mini-pro", 1, 1)


@pytest.mark.parametrize(
    ("source", "text", "named"),
    [
        ("nope.json", None, "no such file; give genai-prices, litellm or a path"),
        ("odd.json", '{"a": 1}', "neither the prices of genai-prices nor of litellm"),
        ("broken.json", "{", "broken.json: neither the prices of genai-prices nor of litellm"),
        ("none.json", "[]", "none.json: neither the prices of genai-prices nor of litellm"),
        ("list.json", '[{"id": "x"}]', "list.json: neither the prices of genai-prices nor of"),
        ("row.json", '{"a": {"litellm_provider": "x"}, "b": 3}', "row.json: neither the prices"),
        ("odd.py", "x = 1", "odd.py: neither the prices of genai-prices nor of litellm"),
        ("litellm", None, "python -m pip install litellm"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    text: str | None,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "find_spec", lambda name: None)  # 入っていない環境
    if text is not None:
        Path(source).write_text(text, encoding="utf-8")
    assert main(["prices", "import", source]) == 1
    assert named in capsys.readouterr().err
    assert not Path("prices.json").exists()


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none" / "prices.json"
    assert main(["prices", "import", str(LITELLM), "-o", str(path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert repr(str(path))[:-1] in told


def test_a_full_disk_leaves_the_last_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """毎晩の取り込みが失敗しても、次に起動するアプリは前の料金で動く。"""
    path, found = tmp_path / "prices.json", import_prices(str(LITELLM))
    found.write(path)
    before = path.read_bytes()

    def fill(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        found.write(path)
    assert path.read_bytes() == before


def test_litellms_json_as_a_price_file_names_the_command() -> None:
    with pytest.raises(PriceTableError) as error:
        CostCalculator(pricing_file=LITELLM)
    assert "prices import PATH -o prices.json" in str(error.value)


def test_the_errors_of_a_large_file_are_a_summary() -> None:
    rows: Mapping[str, Any] = {f"m{i}": {"price": "x" * 5000} for i in range(4000)}
    with pytest.raises(PriceTableError) as error:
        PriceTable.from_mapping({"models": rows})
    assert len(error.value.problems) == 12_000
    assert len(str(error.value)) < 1000
    assert str(error.value).endswith("and 11992 more")
