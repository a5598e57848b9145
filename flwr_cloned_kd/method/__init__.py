"""The algorithm of the paper without a network: Phases 0 and 2, and its variants."""
