"""Measuring: acceptance, speed and losslessness of drafters, trees, rules and backends."""
