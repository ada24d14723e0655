"""The attention benchmark: cases, peers, a clock, and a report."""
