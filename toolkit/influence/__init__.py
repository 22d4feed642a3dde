"""Influence of pool rows on target rows: EK-FAC, DataInf, and a check of how far any such score can be trusted."""
