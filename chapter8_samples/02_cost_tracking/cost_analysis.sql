-- 8.2 コスト分析の SQL(本書では表8.1 で参照)。
-- トレースのアーカイブ表から、10 の問いに答える。同じファイルが PySpark 4 と手元の DuckDB で動き、Databricks SQL に貼れる。
-- 手元で:       python -m chapter8_samples.cost_tracking sql エクスペリメント名
-- Databricks で: クエリを 1 つ貼り付けて、名前付きパラメーターに値を入れる。
--
-- パラメーター
--   :trace_table         表の名前。例 main.monitoring.archived_traces
--   :start_time          この時刻から(UTC)。:end_time の手前まで(半開区間)
--   :as_of               budget の「いま」(UTC)。CURRENT_DATE を使わないので、同じ入力なら同じ結果になる
--   :tz                  日や時を区切る時間帯。例 Asia/Tokyo
--   :monthly_budget_usd  月の予算(USD)
--
-- 列の意味
--   stored    保存されているトレースの数。1 行を 1 件と数える。export は同じトレースを 2 行に書かないが、ほかの方法で
--             入れた表では、trace_id の重複を先に確かめること
--   requests  推定のリクエスト数。間引いた分を重み sampling.weight で補う(ないもの、正の数でないもの、1,000 万以上は 1)
--   cost_usd  推定のコスト(USD)。補い方は requests と同じ
--   unpriced  コストを計算しきれなかったトレースの数。0 でなければ、cost_usd は下限になる
--
-- 注意
--   * convert_timezone は TIMESTAMP をセッションの時間帯で読む。先に SET TIME ZONE 'UTC' を実行する。
--   * 列名は Databricks の資料の *_trace_unified に合わせた。アーカイブ表の定義は公開されておらず、Databricks では試して
--     いない。spans の親の列も、資料により parent_span_id と parent_id がある。先に DESCRIBE で確かめること。
--   * usd に weight をそのまま掛けると 38 桁に収まらない。重みを整数と小数の部分に分けて掛ける。
--   * 割合は、DECIMAL にしてから丸める。DOUBLE のまま丸めると、ちょうど半分の値がエンジンで上にも下にもなる。

-- name: daily_summary
-- 日別のリクエスト数、コスト、トークン数。まずこれを見る。
WITH t AS (
  SELECT CAST(convert_timezone(:tz, request_time) AS DATE) AS day,
         trace_metadata['mlflow.trace.tokenUsage'] AS tokens,
         COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage')
           OR (usd IS NULL AND COALESCE(tokens, trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced,
         TRY_CAST(get_json_object(tokens, '$.input_tokens') AS DECIMAL(12,0)) * weight AS input,
         TRY_CAST(get_json_object(tokens, '$.output_tokens') AS DECIMAL(12,0)) * weight AS output
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
)
SELECT day, COUNT(*) AS stored, ROUND(SUM(weight), 6) AS requests,
       COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced, SUM(cost) AS cost_usd,
       CAST(ROUND(CAST(CAST(SUM(cost) AS DOUBLE)
         / CAST(SUM(CASE WHEN usd IS NOT NULL THEN weight END) AS DOUBLE) AS DECIMAL(38,10)), 8) AS DOUBLE) AS cost_per_request,
       ROUND(SUM(input), 6) AS input_tokens, ROUND(SUM(output), 6) AS output_tokens
FROM t GROUP BY day ORDER BY day DESC;

-- name: by_model
-- モデル別のコスト。どのモデルを小さいものに替えると効くかが分かる。
-- 親と子の両方に使用量があるときは、子だけを数える(二重計上を防ぐ)。cost.status が rollup のスパンと、
-- 理由 cost.reason のない partial のスパンは親の合計なので除く。印のないデータでは、祖先を 4 段までたどって除く。
WITH s AS (
  SELECT trace_id, weight, sp.span_id AS span_id, sp.parent_span_id AS parent_id, sp.attributes AS attributes,
         COALESCE(get_json_object(sp.attributes['cost.status'], '$'), sp.attributes['cost.status'], '') AS status,
         sp.attributes['mlflow.chat.tokenUsage'] IS NOT NULL AS bearing
  FROM (SELECT trace_id, explode(spans) AS sp,
               COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight
        FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)) x
), nested AS (
  SELECT trace_id FROM s WHERE bearing GROUP BY trace_id HAVING COUNT(*) > 1
), tree AS (
  SELECT s.trace_id, s.span_id, s.parent_id, s.bearing FROM s JOIN nested n ON n.trace_id = s.trace_id
), covered AS (
  SELECT c.trace_id, c.parent_id AS a1, p1.parent_id AS a2, p2.parent_id AS a3, p3.parent_id AS a4
  FROM tree c
  LEFT JOIN tree p1 ON p1.trace_id = c.trace_id AND p1.span_id = c.parent_id
  LEFT JOIN tree p2 ON p2.trace_id = c.trace_id AND p2.span_id = p1.parent_id
  LEFT JOIN tree p3 ON p3.trace_id = c.trace_id AND p3.span_id = p2.parent_id
  WHERE c.bearing
), ancestor AS (
  SELECT trace_id, a1 AS span_id FROM covered UNION SELECT trace_id, a2 FROM covered
  UNION SELECT trace_id, a3 FROM covered UNION SELECT trace_id, a4 FROM covered
), leaf AS (
  SELECT s.weight, s.status, s.attributes['mlflow.llm.model'] AS given,
         COALESCE(CASE WHEN given LIKE '"%' THEN get_json_object(given, '$') END, NULLIF(given, 'null'), '(unknown)') AS model,
         TRY_CAST(get_json_object(s.attributes['mlflow.llm.cost'], '$.total_cost') AS DECIMAL(22,15)) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         TRY_CAST(get_json_object(s.attributes['mlflow.chat.tokenUsage'], '$.total_tokens') AS DECIMAL(12,0)) * weight AS tokens
  FROM s ANTI JOIN ancestor a ON a.trace_id = s.trace_id AND a.span_id = s.span_id
  WHERE (s.bearing OR s.status = 'missing_usage') AND s.status <> 'rollup'
    AND NOT (s.status = 'partial' AND s.attributes['cost.reason'] IS NULL)
)
SELECT model, COUNT(*) AS stored_calls, ROUND(SUM(weight), 6) AS calls,
       COUNT(CASE WHEN usd IS NULL OR status IN ('unpriced', 'partial') THEN 1 END) AS unpriced,
       SUM(cost) AS cost_usd, ROUND(SUM(tokens), 6) AS tokens,
       CAST(ROUND(CAST(100 * CAST(SUM(cost) AS DOUBLE) / NULLIF(CAST(SUM(SUM(cost)) OVER () AS DOUBLE), 0) AS DECIMAL(38,10)), 2) AS DOUBLE) AS cost_pct
FROM leaf GROUP BY model ORDER BY cost_usd DESC NULLS LAST, model;

-- name: top_users
-- コストの大きいユーザー 10 人。使いすぎや悪用を見つける。
WITH t AS (
  SELECT COALESCE(trace_metadata['mlflow.trace.user'], '(unknown)') AS user_id,
         COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage') OR (usd IS NULL
           AND COALESCE(trace_metadata['mlflow.trace.tokenUsage'], trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
)
SELECT user_id, COUNT(*) AS stored, ROUND(SUM(weight), 6) AS requests,
       COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced, SUM(cost) AS cost_usd
FROM t GROUP BY user_id ORDER BY cost_usd DESC NULLS LAST, user_id LIMIT 10;

-- name: by_hour
-- 時刻別(0 時から 23 時)。バッチをずらす時間や、レート制限の山を見る。
WITH t AS (
  SELECT HOUR(convert_timezone(:tz, request_time)) AS hour_of_day,
         COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage') OR (usd IS NULL
           AND COALESCE(trace_metadata['mlflow.trace.tokenUsage'], trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
)
SELECT hour_of_day, COUNT(*) AS stored, ROUND(SUM(weight), 6) AS requests,
       COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced, SUM(cost) AS cost_usd
FROM t GROUP BY hour_of_day ORDER BY hour_of_day;

-- name: anomalies
-- 桁違いに高いトレース。同じ名前のトレースの 95 パーセンタイルの 3 倍を超えたもの。
-- 99 パーセンタイルを使わないのは、100 件ほどしかないと、異常な 1 件がしきい値を押し上げるから。
-- コストの分かるトレースが 15 件に満たない名前では、どんなに高い 1 件も見つからない(15 件なら、ほかの
-- 21 倍を超えると見つかる。21 件からは 3 倍)。手元で実行すると、その名前を結果の下に示す。
-- 個々のトレースを見る問いなので、重みは掛けない。
WITH t AS (
  SELECT trace_id, convert_timezone(:tz, request_time) AS local_time, trace_metadata['mlflow.trace.user'] AS user_id,
         COALESCE(tags['mlflow.traceName'], '(unnamed)') AS trace_name,
         CAST(COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                       TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS DOUBLE) AS usd
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
), q AS (
  SELECT trace_name, percentile_cont(0.5) WITHIN GROUP (ORDER BY usd) AS p50,
         percentile_cont(0.95) WITHIN GROUP (ORDER BY usd) AS p95
  FROM t WHERE usd IS NOT NULL GROUP BY trace_name
)
SELECT t.trace_id, t.local_time, t.user_id, t.usd AS cost_usd, ROUND(q.p50, 10) AS median_usd,
       CAST(ROUND(CAST(t.usd / NULLIF(q.p50, 0) AS DECIMAL(38,10)), 2) AS DOUBLE) AS times_median
FROM t JOIN q ON t.trace_name = q.trace_name
WHERE t.usd > q.p95 * 3 ORDER BY t.usd DESC, t.trace_id LIMIT 50;

-- name: week_over_week
-- 週別(月曜始まり)と前の週からの増減。端の週は途中までしか入っていないことに注意。
WITH t AS (
  SELECT CAST(DATE_TRUNC('WEEK', convert_timezone(:tz, request_time)) AS DATE) AS week_start,
         COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage') OR (usd IS NULL
           AND COALESCE(trace_metadata['mlflow.trace.tokenUsage'], trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
), w AS (
  SELECT week_start, COUNT(*) AS stored, ROUND(SUM(weight), 6) AS requests,
         COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced, SUM(cost) AS cost_usd
  FROM t GROUP BY week_start
), l AS (
  SELECT w.*, LAG(cost_usd) OVER (ORDER BY week_start) AS prev_cost_usd FROM w
)
SELECT week_start, stored, requests, unpriced, cost_usd, prev_cost_usd,
       CAST(ROUND(CAST(100 * CAST(cost_usd - prev_cost_usd AS DOUBLE) / NULLIF(CAST(prev_cost_usd AS DOUBLE), 0) AS DECIMAL(38,10)), 2) AS DOUBLE) AS change_pct
FROM l ORDER BY week_start DESC;

-- name: sessions
-- 高くついた会話 20 件(トレースが 2 件以上のもの)。
-- やり取りが長引くほど、同じ履歴を何度も送って高くなる。
-- 保存された 1 件ずつの会話を見る問いなので、重みは掛けない(間引くと、会話は途中が欠ける)。
WITH t AS (
  SELECT trace_metadata['mlflow.trace.session'] AS session_id, trace_metadata['mlflow.trace.user'] AS user_id, request_time,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage') OR (usd IS NULL
           AND COALESCE(trace_metadata['mlflow.trace.tokenUsage'], trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
    AND trace_metadata['mlflow.trace.session'] IS NOT NULL
)
SELECT session_id, MIN(user_id) AS user_id, COUNT(*) AS turns, COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced,
       SUM(usd) AS cost_usd, MIN(convert_timezone(:tz, request_time)) AS started_at,
       CAST(ROUND(CAST((unix_micros(MAX(request_time)) - unix_micros(MIN(request_time))) / 60000000 AS DECIMAL(38,10)), 1) AS DOUBLE) AS minutes
FROM t GROUP BY session_id HAVING COUNT(*) > 1 ORDER BY cost_usd DESC NULLS LAST, session_id LIMIT 20;

-- name: error_waste
-- 失敗したリクエストに払ったコスト。再試行やタイムアウトの設定を見直す手がかり。
WITH t AS (
  SELECT CAST(convert_timezone(:tz, request_time) AS DATE) AS day, state,
         COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage') OR (usd IS NULL
           AND COALESCE(trace_metadata['mlflow.trace.tokenUsage'], trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
)
SELECT day, COUNT(*) AS stored, ROUND(SUM(weight), 6) AS requests,
       ROUND(COALESCE(SUM(CASE WHEN state = 'ERROR' THEN weight END), 0), 6) AS errors,
       COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced, SUM(CASE WHEN state = 'ERROR' THEN cost END) AS wasted_usd,
       CAST(ROUND(CAST(100 * CAST(SUM(CASE WHEN state = 'ERROR' THEN cost END) AS DOUBLE) / NULLIF(CAST(SUM(cost) AS DOUBLE), 0) AS DECIMAL(38,10)), 2) AS DOUBLE) AS wasted_pct
FROM t GROUP BY day ORDER BY day DESC;

-- name: budget
-- 今月の予算に対する消化と、このまま進んだときの月末の見込み。月の区切りも :tz で決める。
WITH p AS (
  SELECT convert_timezone(:tz, CAST(:as_of AS TIMESTAMP)) AS now_local, CAST(:monthly_budget_usd AS DECIMAL(18,4)) AS budget
), t AS (
  SELECT COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage') OR (usd IS NULL
           AND COALESCE(trace_metadata['mlflow.trace.tokenUsage'], trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced
  FROM IDENTIFIER(:trace_table) CROSS JOIN p
  WHERE request_time >= CAST(:as_of AS TIMESTAMP) - INTERVAL '32' DAY  -- 読む範囲を先に絞る
    AND request_time < CAST(:as_of AS TIMESTAMP)
    AND convert_timezone(:tz, request_time) >= DATE_TRUNC('MONTH', now_local)
), c AS (
  SELECT COALESCE(SUM(cost), 0) AS spent, COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced FROM t
), d AS (
  SELECT budget, spent, unpriced, DAY(LAST_DAY(CAST(now_local AS DATE))) AS days_in_month,
         (unix_micros(now_local) - unix_micros(DATE_TRUNC('MONTH', now_local))) / 86400000000 AS days_elapsed
  FROM p CROSS JOIN c
)
SELECT budget AS budget_usd, spent AS spent_usd, budget - spent AS remaining_usd, unpriced,
       CAST(ROUND(CAST(100 * CAST(spent AS DOUBLE) / CAST(budget AS DOUBLE) AS DECIMAL(38,10)), 2) AS DOUBLE) AS used_pct,
       CAST(ROUND(CAST(days_elapsed AS DECIMAL(38,10)), 4) AS DOUBLE) AS days_elapsed, days_in_month AS days,
       CAST(ROUND(CAST(CAST(spent AS DOUBLE) / NULLIF(days_elapsed, 0) * days_in_month AS DECIMAL(38,10)), 4) AS DOUBLE) AS projected_usd
FROM d;

-- name: token_efficiency
-- 処理の名前別のトークンの使い方。入力が長すぎないか、キャッシュが効いているかを見る。
WITH t AS (
  SELECT COALESCE(tags['mlflow.traceName'], '(unnamed)') AS trace_name,
         trace_metadata['mlflow.trace.tokenUsage'] AS tokens,
         COALESCE(NULLIF(GREATEST(TRY_CAST(trace_metadata['sampling.weight'] AS DECIMAL(23,16)), 0), 0), 1) AS weight,
         COALESCE(TRY_CAST(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost') AS DECIMAL(22,15)),
                  TRY_CAST(tags['cost.total_usd'] AS DECIMAL(22,15))) AS usd,
         usd * FLOOR(weight) + CAST(usd * (weight % 1) AS DECIMAL(35,15)) AS cost,
         tags['cost.status'] IN ('unpriced', 'partial', 'missing_usage')
           OR (usd IS NULL AND COALESCE(tokens, trace_metadata['mlflow.trace.cost']) IS NOT NULL) AS unpriced,
         TRY_CAST(get_json_object(tokens, '$.input_tokens') AS DECIMAL(12,0)) * weight AS input,
         TRY_CAST(get_json_object(tokens, '$.output_tokens') AS DECIMAL(12,0)) * weight AS output,
         TRY_CAST(get_json_object(tokens, '$.cache_read_input_tokens') AS DECIMAL(12,0)) * weight AS cached
  FROM IDENTIFIER(:trace_table) WHERE request_time >= CAST(:start_time AS TIMESTAMP) AND request_time < CAST(:end_time AS TIMESTAMP)
), n AS (
  SELECT trace_name, COUNT(*) AS stored, ROUND(SUM(weight), 6) AS requests,
         COUNT(CASE WHEN unpriced THEN 1 END) AS unpriced, CAST(SUM(cost) AS DOUBLE) AS usd,
         CAST(SUM(input) AS DOUBLE) AS input, CAST(SUM(CASE WHEN input IS NOT NULL THEN weight END) AS DOUBLE) AS input_weight,
         CAST(SUM(output) AS DOUBLE) AS output, CAST(SUM(CASE WHEN output IS NOT NULL THEN weight END) AS DOUBLE) AS output_weight,
         CAST(COALESCE(SUM(cached), 0) AS DOUBLE) AS cached,
         CAST(SUM(CASE WHEN usd IS NOT NULL THEN input + output END) AS DOUBLE) AS priced_tokens
  FROM t GROUP BY trace_name
)
SELECT trace_name, stored, requests, unpriced,
       CAST(ROUND(CAST(input / input_weight AS DECIMAL(38,10)), 2) AS DOUBLE) AS avg_in,
       CAST(ROUND(CAST(output / output_weight AS DECIMAL(38,10)), 2) AS DOUBLE) AS avg_out,
       CAST(ROUND(CAST(cached / NULLIF(input, 0) AS DECIMAL(38,10)), 4) AS DOUBLE) AS cache_hit,
       CAST(ROUND(CAST(output / NULLIF(input, 0) AS DECIMAL(38,10)), 4) AS DOUBLE) AS out_in,
       CAST(ROUND(CAST(usd / NULLIF(priced_tokens, 0) * 1000000 AS DECIMAL(38,10)), 4) AS DOUBLE) AS usd_per_mtok
FROM n ORDER BY stored DESC, trace_name;
