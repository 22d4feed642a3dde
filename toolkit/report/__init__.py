"""Self-contained HTML reports: one file each, no network, readable without scripts but for the map."""
