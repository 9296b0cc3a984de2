"""Whole models as expressions, scored: coefficients, geometry, one-shot families, sweeps."""
