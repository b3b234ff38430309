"""Balancing what has no index: strict tar streams, and stages that rebalance them in one pass."""
