"""8.2 トレースを Parquet に書き出し(``parquet``)、SQL で分析する(``sql``、``tables``)。

``sql`` と ``tables`` は MLflow なしで動くので、ここでまとめて import することはしない。
"""
