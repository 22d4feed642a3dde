"""Token-level gates: hidden states inside a module -> the weight of each expert for each token; one file each."""
