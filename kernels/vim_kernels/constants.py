"""Numbers that more than one backend needs: exponentials are taken as powers of two."""

LOG2E = 1.4426950408889634
"""log2(e): exp(x) = exp2(x LOG2E)."""
LN2 = 0.6931471805599453
"""log(2) = 1 / LOG2E."""
