"""From torch's graphs to plans and back: ``capture`` reads FX modules, ``rules`` split, ``rewrite`` writes plans."""
