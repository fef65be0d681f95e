"""`icl-moe reproduce`: trains and evaluates every row of one of the paper's tables."""
